"""The policy of App. D.1: causality, padding invariance, the convolution, precision, the size."""

import pytest
import torch
import torch.nn.functional as F

import train_qalign_dt as stage2

B, K, OBS, ACT = 3, 7, 11, 3


def random_policy(**changes) -> stage2.Policy:
    torch.manual_seed(0)
    policy = stage2.Policy(OBS, ACT, embed_dim=32, n_layer=2, n_head=4, max_timestep=50, **changes).eval()
    for p in policy.parameters():  # with biases that are not zero, or padding could not leak through them
        torch.nn.init.normal_(p, std=0.3)
    return policy


@pytest.fixture(params=[True, False], ids=["conv", "no-conv"])
def policy(request):
    return random_policy(conv=request.param)


def windows(k=K):
    g = torch.Generator().manual_seed(1)
    rtg, obs = torch.randn(B, k, generator=g), torch.randn(B, k, OBS, generator=g)
    act = torch.rand(B, k, ACT, generator=g) * 2 - 1
    return [rtg, obs, act, torch.arange(k).expand(B, k) + 5, torch.ones(B, k, dtype=torch.bool)]


@pytest.mark.parametrize("changed, first", [("rtg", 0), ("obs", 0), ("act", 1)])
def test_causality(policy, changed, first):
    """A token at step t reaches actions from step t on (its own action: from t + 1 on), never an earlier one."""
    t, index = 3, ["rtg", "obs", "act"].index(changed)
    before = windows()
    after = [x.clone() for x in before]
    after[index][:, t] += 1.0
    a0, s0 = policy(*before)
    a1, s1 = policy(*after)
    assert torch.equal(a0[:, : t + first], a1[:, : t + first])
    assert not torch.allclose(a0[:, t + first], a1[:, t + first], atol=1e-4)
    # s_hat_t is read off rtg_t, which comes before s_t: it must not see the state it reconstructs
    state_first = {"rtg": 0, "obs": 1, "act": 1}[changed]
    assert torch.equal(s0[:, : t + state_first], s1[:, : t + state_first])
    assert not torch.allclose(s0[:, t + state_first], s1[:, t + state_first], atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 5, 0, K, K + 2])
def test_acting_depends_on_the_last_steps_only_and_training_on_all(policy, n):
    """`recent` (--eval-context-len), 0: the whole window; a policy trained on K steps has learnt every length."""
    inputs, recent = windows(), [x[:, -n:] for x in windows()]
    whole = policy.act(*inputs)
    forward = policy(*inputs)
    alone = policy.act(*recent)
    policy.recent = n
    torch.testing.assert_close(policy.act(*inputs), alone)
    assert torch.equal(policy(*inputs)[0], forward[0]) and torch.equal(policy(*inputs)[1], forward[1])
    assert torch.allclose(alone, whole, atol=1e-4) == (n in (0, K, K + 2))


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_padded_window_gives_the_same_as_its_steps_alone(policy, length):
    alone = windows(length)
    padded = [torch.zeros(B, K, *x.shape[2:], dtype=x.dtype) for x in alone]
    for x, y in zip(padded, alone):
        x[:, K - length :] = y
    for expected, got in zip(policy(*alone), policy(*padded), strict=True):
        torch.testing.assert_close(got[:, K - length :], expected, rtol=1e-5, atol=1e-5)


def test_the_content_of_the_padding_does_not_matter(policy):
    x = windows()
    x[4][:, :3] = False
    y = [v.clone() for v in x]
    for v in y[:3]:
        v[:, :3] = 100.0
    y[3][:, :3] = 40
    actions, states = policy(*y)
    torch.testing.assert_close(actions[:, 3:], policy(*x)[0][:, 3:], rtol=0, atol=0)
    assert actions.isfinite().all() and states.isfinite().all()  # padded queries have something to attend to


@pytest.mark.parametrize("length", [1, 4, K])
def test_act_is_the_last_action_of_the_window(policy, length):
    x = windows()
    x[4][:, : K - length] = False
    torch.testing.assert_close(policy.act(*x), policy(*x)[0][:, -1], rtol=1e-5, atol=1e-6)


def test_the_convolution_is_causal_with_window_6_and_separate_for_q_k_v():
    """Through gradients: which of W_q x, W_k x, W_v x reach q, k and v of token 10."""
    block, seen = stage2.Block(8, heads=2, conv=True, dropout=0.0), []
    for layer in (block.qkv, block.conv):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    block.attend(torch.randn(1, 20, 8), torch.ones(1, 20, 1), torch.zeros(1, 1, 20, 20))
    before, after = seen[0], seen[1].squeeze(2)  # (1, T, 3D) and (1, 3D, T)
    assert after.shape == (1, 24, 20)
    for part in (slice(0, 8), slice(8, 16), slice(16, 24)):
        reached = torch.autograd.grad(after[0, part, 10].sum(), before, retain_graph=True)[0][0] != 0  # (T, 3D)
        assert reached[5:11, part].all()
        reached[5:11, part] = False
        assert not reached.any()


@pytest.mark.parametrize("conv", [True, False])
def test_attention_is_torchs_own(conv):
    """After the convolution as torch has it."""
    block = stage2.Block(32, heads=4, conv=conv, dropout=0.1).eval()
    x = torch.randn(2, 9, 32)
    mask = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9)
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    qkv = block.qkv(x)
    if conv:
        padded = torch.cat([torch.zeros(2, 5, 96), qkv], dim=1).transpose(1, 2)
        qkv = F.conv1d(padded, block.conv.weight.squeeze(2), block.conv.bias, groups=3).transpose(1, 2)
    q, k, v = (y.view(2, 9, 4, 8).transpose(1, 2) for y in qkv.split(32, dim=-1))
    expected = block.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(2, 9, 32))
    torch.testing.assert_close(block.attend(x, torch.ones(2, 9, 1), bias), expected, rtol=1e-5, atol=1e-6)


def test_the_network_is_torchs_transformer_over_tokens_with_their_times():
    """App. D.1, without the convolution: pre-norm blocks over (RTG, state, action), tanh on the actions."""
    policy, x = random_policy(conv=False), windows()
    rtg, obs, act, step, _ = x
    time = policy.embed_time(step)
    tokens = (policy.embed_rtg(rtg[..., None]) + time, policy.embed_obs(obs) + time, policy.embed_act(act) + time)
    y = policy.norm_in(torch.stack(tokens, dim=2).flatten(1, 2))
    for block in policy.blocks:
        layer = torch.nn.TransformerEncoderLayer(
            32, 4, 128, activation="gelu", batch_first=True, norm_first=True
        ).eval()
        parts = {"self_attn.out_proj": block.out, "norm1": block.norm1, "norm2": block.norm2}
        parts |= {"linear1": block.mlp[0], "linear2": block.mlp[2]}
        state = {f"{name}.{key}": p for name, part in parts.items() for key, p in part.state_dict().items()}
        state |= {f"self_attn.in_proj_{key}": p for key, p in block.qkv.state_dict().items()}
        layer.load_state_dict(state)
        y = layer(y, src_mask=torch.nn.Transformer.generate_square_subsequent_mask(3 * K))
    y = policy.norm_out(y)
    expected = torch.tanh(policy.action_head(y[:, 1::3])), policy.state_head(y[:, ::3])
    torch.testing.assert_close(policy(*x), expected, rtol=1e-4, atol=1e-5)


def test_paper_size_has_8_1_million_parameters():
    policy = stage2.Policy(OBS, ACT, 256, 4, 4, stage2.MAX_TIMESTEP)
    assert sum(p.numel() for p in policy.parameters()) == pytest.approx(8.1e6, rel=0.01)


def test_dropout_acts_in_training_only_and_differs_between_rows(policy):
    same = [v[:1].expand(2, *v.shape[1:]).contiguous() for v in windows()]
    a, _ = policy(*same)
    torch.testing.assert_close(a[0], a[1])
    assert torch.equal(policy(*same)[0], a)
    a, _ = policy.train()(*same)
    assert not torch.allclose(a[0], a[1], atol=0.01)


def test_bf16_policy_stays_close_to_float32():
    torch.manual_seed(0)
    policy = stage2.Policy(OBS, ACT, 32, 2, 4, 50).eval()
    a32, s32 = policy(*windows())
    policy.bf16 = True
    a16, s16 = policy(*windows())
    assert a16.dtype == s16.dtype == torch.float32
    torch.testing.assert_close(a16, a32, rtol=0, atol=0.02)
    assert not torch.equal(a16, a32)


def test_embeddings_and_heads_stay_float32_beside_bf16_blocks():
    policy, seen = random_policy(bf16=True), {}
    for name in ("embed_rtg", "embed_obs", "embed_act", "embed_time", "action_head", "state_head", "blocks.0.qkv"):
        policy.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output.dtype})
        )
    policy(*windows())
    assert seen.pop("blocks.0.qkv") == torch.bfloat16
    assert len(seen) == 6 and set(seen.values()) == {torch.float32}


def test_bf16_resolves_an_rtg_of_3_000_from_one_of_3_005():
    """As bfloat16 numbers the two are equal."""
    policy, x = random_policy(bf16=True), windows()
    actions = []
    for rtg in (3.0, 3.005):
        x[0][:] = rtg
        actions.append(policy.act(*x))
    assert torch.tensor(3.005).bfloat16() == 3.0 and (actions[0] != actions[1]).any(dim=1).all()
