"""The policy of App. D.1: causality, padding invariance, the convolution, the size."""

import pytest
import torch
import train_qalign_dt as stage2

B, K, OBS, ACT = 3, 7, 11, 3


@pytest.fixture(params=[True, False], ids=["conv", "no-conv"])
def policy(request):
    torch.manual_seed(0)
    policy = stage2.Policy(OBS, ACT, embed_dim=32, n_layer=3, n_head=4, max_timestep=50, conv=request.param).eval()
    for p in policy.parameters():  # biases that are not zero, or padding could not leak through them
        torch.nn.init.normal_(p, std=0.3)
    return policy


def windows(k=K, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(B, k, generator=g), torch.randn(B, k, OBS, generator=g), torch.rand(B, k, ACT, generator=g) * 2 - 1,
        torch.arange(k).expand(B, k) + 5, torch.ones(B, k, dtype=torch.bool),
    ]  # fmt: skip


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


@pytest.mark.parametrize("length", [1, 2, 5])
def test_padded_window_gives_the_actions_of_its_steps_alone(policy, length):
    alone = windows(length)
    padded = [torch.zeros(B, K, *x.shape[2:], dtype=x.dtype) for x in alone]
    for x, y in zip(padded, alone):
        x[:, K - length :] = y
    for expected, got in zip(policy(*alone), policy(*padded)):
        torch.testing.assert_close(got[:, K - length :], expected, rtol=1e-5, atol=1e-5)


def test_what_stands_in_the_padding_does_not_matter(policy):
    x = windows()
    x[4][:, :3] = False
    y = [v.clone() for v in x]
    for v in y[:3]:
        v[:, :3] = 100.0
    y[3][:, :3] = 40
    a, b = policy(*x)[0][:, 3:], policy(*y)[0][:, 3:]
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert policy(*y)[0].isfinite().all()


def test_convolution_is_causal_with_window_6_and_separate_for_q_k_v():
    conv = stage2.CausalConv(8)
    x = torch.randn(1, 20, 24, requires_grad=True)
    for part in range(3):  # q, k, v of token 10
        x.grad = None
        conv(x, 20)[part][0, 10].sum().backward()
        reached, own = x.grad[0].abs() > 0, slice(8 * part, 8 * part + 8)
        assert reached[5:11, own].all()  # tokens 5..10, all channels of that part
        reached[5:11, own] = False
        assert not reached.any()


def test_convolution_is_torchs_own_and_q_of_the_last_tokens_needs_only_them():
    conv, x = stage2.CausalConv(8), torch.randn(2, 20, 24)
    expected = conv.conv(torch.nn.functional.pad(x.transpose(1, 2), (5, 0))).transpose(1, 2)  # (B, T, 3D) as conv1d
    torch.testing.assert_close(torch.cat(conv(x, 20), dim=-1), expected, rtol=1e-5, atol=1e-5)
    q, k, v = conv(x, 3)
    torch.testing.assert_close(q, expected[:, 17:, :8], rtol=1e-5, atol=1e-5)
    assert k.shape == v.shape == (2, 20, 8)


@pytest.mark.parametrize("length", [1, 4, K])
def test_act_is_the_last_action_of_the_window(policy, length):
    x = windows()
    x[4][:, : K - length] = False
    torch.testing.assert_close(policy.act(*x), policy(*x)[0][:, -1], rtol=1e-5, atol=1e-6)


def test_attention_is_torchs_own():
    block = stage2.Block(32, heads=4, conv=False, dropout=0.1).eval()
    x = torch.randn(2, 9, 32)
    mask = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9)
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    q, k, v = (y.view(2, 9, 4, 8).transpose(1, 2) for y in block.qkv(x).split(32, dim=-1))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    expected = block.out(y.transpose(1, 2).reshape(2, 9, 32))
    torch.testing.assert_close(block.attend(x, torch.ones(2, 9, 1), bias, 9), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(block.attend(x, torch.ones(2, 9, 1), bias, 2), expected[:, 7:], rtol=1e-5, atol=1e-6)


def test_paper_size_has_8_1_million_parameters():
    policy = stage2.Policy(OBS, ACT, 256, 4, 4, stage2.HORIZON)
    assert sum(p.numel() for p in policy.parameters()) == pytest.approx(8.1e6, rel=0.01)


def test_dropout_acts_in_training_only_and_differs_between_rows(policy):
    x = windows()
    same = [v[:1].expand(2, *v.shape[1:]).contiguous() for v in x]
    a = policy(*same)[0]
    assert torch.equal(a[0], a[1])
    a = policy.train()(*same)[0]
    assert not torch.allclose(a[0], a[1])


@pytest.mark.parametrize("shape", [(1_000_003,), (1000, 1000)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_a_share_p_independently_and_keeps_the_mean(shape, p):
    torch.manual_seed(0)
    dropout, x = stage2.Dropout(p), torch.ones(shape, requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    kept = y.detach() != 0
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / 1e6) ** 0.5 + 1e-5)
    assert torch.equal(x.grad, y.detach()) and y.max().item() == pytest.approx(1 / (1 - p), rel=1e-4)
    for lag in (1, 2, 3, 4, 1000):  # neighbours come out of the same 64 random bits
        a, b = kept.flatten()[:-lag].double(), kept.flatten()[lag:].double()
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 0.005
    assert not torch.equal(dropout(x) != 0, kept)
    torch.manual_seed(0)
    assert torch.equal(dropout(x) != 0, kept)  # a resumed run draws the same ones
    assert torch.equal(dropout.eval()(x), x)


def test_bf16_policy_stays_close_to_float32():
    torch.manual_seed(0)
    policy = stage2.Policy(OBS, ACT, 32, 2, 4, 50).eval()
    a32 = policy(*windows())[0]
    policy.bf16 = True
    a16 = policy(*windows())[0]
    assert a16.dtype == torch.float32
    torch.testing.assert_close(a16, a32, rtol=0, atol=0.02)
    assert not torch.equal(a16, a32)
