"""baselines/train_radt.py: StepRA, SeqRA and masks by hand-computed numbers; that it follows returns; its files."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train_radt as radt
from conftest import ENV, argv, call, data_of, task_of
from conftest import by_hand as toy_data

import evaluate_alignment as stage3
import train_qalign_dt as stage2

B, K, OBS, ACT = 3, 7, 11, 3
CPU = torch.device("cpu")
SIZES = dict(embed_dim=32, n_layer=2, n_head=4, max_timestep=50)
ALL = dict(seqra=True, stepra=True, alpha=True, rtg_tokens=False)
VARIANTS = {
    "RADT": {},
    "seqra": {"stepra": False},
    "stepra": {"seqra": False},
    "no-alpha": {"alpha": False},
    "dt": {"seqra": False, "stepra": False, "rtg_tokens": True},
}
TINY = "--device cpu --embed-dim 16 --n-layer 1 --n-head 2 --context-len 4 --batch-size 8 --total-steps 30".split()


def make(obs_dim=OBS, act_dim=ACT, **changes) -> radt.Policy:
    return radt.Policy(obs_dim, act_dim, **SIZES | ALL | changes).eval()


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def policy(request):
    """With random weights everywhere: StepRA and alpha are zero before training."""
    torch.manual_seed(0)
    policy = make(**request.param)
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return policy


def windows(k=K):
    g = torch.Generator().manual_seed(1)
    rtg, obs = torch.randn(B, k, generator=g), torch.randn(B, k, OBS, generator=g)
    act = torch.rand(B, k, ACT, generator=g) * 2 - 1
    return [rtg, obs, act, torch.arange(k).expand(B, k) + 5, torch.ones(B, k, dtype=torch.bool)]


# ---- the network


def test_stepra_by_hand():
    norm, x = radt.StepNorm(4, stepra=True), torch.tensor([1.0, 2, 3, 4])
    zero = torch.zeros(4)
    torch.testing.assert_close(norm(x, zero, zero), torch.tensor([-1.3416, -0.4472, 0.4472, 1.3416]), atol=1e-4, rtol=0)
    moved = norm(x, zero + 0.5, zero + 1)
    torch.testing.assert_close(moved, torch.tensor([-1.0125, 0.3292, 1.6708, 3.0125]), atol=1e-4, rtol=0)
    assert not list(norm.parameters())
    assert len(list(radt.StepNorm(4, stepra=False).parameters())) == 2


def by_hand() -> tuple:
    """SeqRA with W_q = 0, W_v = projection = I, and two steps of returns."""
    seqra = radt.SeqRA(4, heads=1).eval()
    torch.nn.init.zeros_(seqra.attention.W_q.weight)
    for layer in (seqra.attention.W_v, seqra.attention.out):
        torch.nn.init.eye_(layer.weight)
    torch.nn.init.zeros_(seqra.attention.out.bias)
    c = torch.tensor([[[1.0, 2, 3, 4], [4, 3, 2, 1]]])
    mask = torch.tensor([[[1, 0], [1, 0], [1, 1], [1, 1]]], dtype=torch.bool)  # two tokens per step
    return seqra, c, mask


def test_seqra_by_hand():
    """Equal weights: step 0 sees the first return only, step 1 the mean of both values, which cancel."""
    seqra, c, mask = by_hand()
    o = seqra(torch.randn(1, 4, 4), c, torch.randn(1, 2, 4), mask)
    first = torch.tensor([-1.3416, -0.4472, 0.4472, 1.3416])
    torch.testing.assert_close(o[0], torch.stack([first, first, 0 * first, 0 * first]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "bias, expected",
    [(0, (-0.3416, 0.5528, 1.4472, 2.3416)), (1, (-1.6833, 0.1056, 1.8944, 3.6833)), (-1, (1, 1, 1, 1))],
)
def test_adaptive_scaling_by_hand(bias, expected):
    """q + (1 + alpha) o, with q = 1: what the block's second norm is given."""
    block = radt.Block(4, heads=1, seqra=True, stepra=True, alpha=True).eval()
    block.seqra, c, mask = by_hand()
    for layer in (block.alpha, block.modulation):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    torch.nn.init.constant_(block.alpha.bias, bias)
    seen = []
    block.norms[0].forward = lambda x, *_: torch.ones_like(x)
    block.norms[1].forward = lambda x, *_: seen.append(x) or x
    block(torch.zeros(1, 4, 4), c, torch.zeros(1, 2, 4), torch.ones(1, 4, 4, dtype=torch.bool).tril(), mask)
    torch.testing.assert_close(seen[0][0, 0], torch.tensor([float(x) for x in expected]), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen[0][0, 2], torch.ones(4), atol=1e-4, rtol=0)


def test_time_enters_the_keys_only_and_not_what_scales():
    seqra, c, mask = by_hand()
    torch.nn.init.normal_(seqra.attention.W_q.weight)
    values, x = [], torch.randn(1, 4, 4)
    seqra.attention.W_v.register_forward_hook(lambda module, inputs, _: values.append(inputs[0]))
    outputs = [seqra(x, c, e, mask) for e in (torch.zeros(1, 2, 4), torch.randn(1, 2, 4))]
    assert torch.equal(*values) and not torch.allclose(outputs[0][0, 2:], outputs[1][0, 2:])
    policy, given = make(), []
    policy.blocks[0].modulation.register_forward_hook(lambda module, inputs, _: given.append(inputs[0]))
    early, late = windows(), windows()
    late[3] = late[3] + 20
    policy(*early), policy(*late)
    assert torch.equal(*given)


def test_masks_go_by_step():
    """Both tokens of step t see returns 0 .. t; tokens see tokens up to themselves."""
    policy, seen = make(n_layer=1), []
    policy.blocks[0].register_forward_hook(lambda module, inputs, _: seen.append(inputs[3:]))
    policy(*windows(3))
    causal, by_step = (mask[0].int().tolist() for mask in seen[0])
    assert by_step == [[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert causal == np.tril(np.ones((6, 6), int)).tolist()


@pytest.mark.parametrize("changed, first", [("rtg", 0), ("obs", 0), ("act", 1)])
def test_causality(policy, changed, first):
    """A token at step t reaches actions from step t on (its own action: from t + 1 on), never an earlier one."""
    t, index = 3, ["rtg", "obs", "act"].index(changed)
    before, after = windows(), windows()
    after[index][:, t] += 1.0
    a0, a1 = policy(*before), policy(*after)
    assert torch.equal(a0[:, : t + first], a1[:, : t + first])
    assert not torch.allclose(a0[:, t + first], a1[:, t + first], atol=1e-4)


@pytest.mark.parametrize("length, K", [(1, 7), (2, 7), (5, 20)])
def test_a_padded_window_gives_the_same_as_its_steps_alone(policy, length, K):
    alone = windows(length)
    padded = [torch.full((B, K, *x.shape[2:]), 9 if x.dtype == torch.int64 else 3.0).to(x.dtype) for x in alone]
    padded[4][:] = False
    for x, y in zip(padded, alone):
        x[:, K - length :] = y
    expected = policy(*alone)
    torch.testing.assert_close(policy(*padded)[:, K - length :], expected, rtol=0, atol=3e-6)
    torch.testing.assert_close(policy.act(*padded), expected[:, -1], rtol=0, atol=3e-6)
    inverted = [*padded[:4], ~padded[4]]  # the release's mask in training
    assert not torch.allclose(policy(*inverted)[:, K - length :], expected, atol=1e-3)


@pytest.mark.parametrize("sizes, expected", [((11, 3, 128, 2), 810_243), ((17, 6, 128, 3), 1_207_302)])
def test_parameters(sizes, expected):
    S, A, D, L = sizes
    policy = make(S, A, embed_dim=D, n_layer=L, n_head=1)
    assert sum(p.numel() for p in policy.parameters()) == expected
    assert expected == L * (24 * D**2 + 18 * D) + D**2 + D + D * (S + 1) + D * (A + 1) + 2 * D + A * (D + 1)


def test_it_starts_with_plain_norms_and_alpha_zero_and_a_table_of_sines():
    policy = make()
    for block in policy.blocks:
        assert not block.modulation.weight.any() and not block.modulation.bias.any()
        assert not block.alpha.weight.any() and not block.alpha.bias.any()
    assert policy.head.weight.std().item() == pytest.approx(0.02, rel=0.4)
    assert policy.table[3, 4].item() == pytest.approx(math.sin(3 / 10_000 ** (4 / 32)))
    assert policy.table[3, 5].item() == pytest.approx(math.cos(3 / 10_000 ** (4 / 32)))
    assert "table" not in policy.state_dict()


# ---- training


def test_the_learning_rate_warms_up():
    config = SimpleNamespace(lr=1e-4, warmup_steps=10_000)
    rates = [radt.learning_rate(step, config) for step in (0, 4_999, 9_999, 50_000)]
    assert rates == pytest.approx([1e-8, 5e-5, 1e-4, 1e-4])


def test_a_step_applies_rate_decay_and_clipping(hopper_file, monkeypatch):
    data = data_of(ENV, hopper_file)
    task = data.task
    args = radt.Args(embed_dim=16, n_layer=1, n_head=2, context_len=4, lr=1e-3, warmup_steps=10, total_steps=30)
    learner = radt.Imitation(task, radt.Windows(data, 4, CPU), radt.resolve(args, task, data, CPU))
    norms = []
    weights = learner.opt.param_groups[0]["params"]
    monkeypatch.setattr(learner.opt, "step", lambda: norms.append(sum(p.grad.norm() ** 2 for p in weights)))
    found = learner.step(4)
    (group,) = learner.opt.param_groups
    assert (group["lr"], group["weight_decay"]) == (pytest.approx(5e-4), 1e-4)
    assert len(group["params"]) == len(list(learner.policy.parameters()))
    assert found[1] > 0.25 and norms[0] ** 0.5 == pytest.approx(0.25, rel=1e-3)


def test_the_loss_counts_valid_steps_and_dimensions_once():
    valid = torch.tensor([[False, True], [True, True]])
    batch = radt.Batch(*[None] * 2, torch.zeros(2, 2, 2), None, valid, None, None)
    a_hat = torch.tensor([[[9.0, 9], [1, 0]], [[0, 2], [0, 0]]])
    assert radt.action_loss(a_hat, batch).item() == pytest.approx((1 / 2 + 4 / 2 + 0) / 3)


BOTH_ENDS = [x if x in ("RADT", "dt") else pytest.param(x, marks=pytest.mark.slow) for x in VARIANTS]


@pytest.mark.parametrize("variant", BOTH_ENDS)
def test_it_learns_to_follow_the_return(variant):
    """A toy task: one state, episodes of four steps, and the action is the return asked for."""
    rng = np.random.default_rng(0)
    returns = np.repeat(rng.uniform(-1, 1, 200), 4)
    rewards = np.where(np.arange(800) % 4 == 3, returns, 0).astype(np.float32)  # so every RTG is the return
    data = toy_data(
        rng.normal(size=(800, OBS)).astype(np.float32),
        np.repeat(0.8 * returns[:, None], ACT, axis=1).astype(np.float32),
        rewards,
        np.zeros(800, bool),
        np.arange(4, 801, 4),
        rtg_scale=1.0,
    )
    task = replace(data.task, obs_dim=11, act_dim=3)
    args = radt.Args(
        total_steps=400, embed_dim=16, n_layer=1, context_len=4, batch_size=32, lr=3e-3, warmup_steps=20,
        **ALL | VARIANTS[variant],
    )  # fmt: skip
    learner = radt.Imitation(task, radt.Windows(data, 4, CPU), radt.resolve(args, task, data, CPU))
    for step in range(400):
        learner.step(step)
    policy, asked = learner.policy.eval(), torch.tensor([-0.8, -0.3, 0.3, 0.8])[:, None]
    with torch.no_grad():
        first = (torch.zeros(4, 1, OBS), torch.zeros(4, 1, ACT), torch.zeros(4, 1, dtype=torch.int64))
        action = policy.act(asked, *first, torch.ones(4, 1, dtype=torch.bool)).mean(dim=1)
    torch.testing.assert_close(action, 0.8 * asked[:, 0], atol=0.15, rtol=0)
    assert 0.08 < learner.rtg_effect() < 0.3  # half a return more or less, of returns of 0.5 on average


def test_paper_and_small_presets(hopper_file):
    def sizes(env, **flags):
        task = task_of(env)
        data = SimpleNamespace(lengths=np.array([20]))
        config = vars(radt.resolve(radt.Args(env=env, **flags), task, data, CPU))
        return [config[name] for name in radt.PAPER]

    assert sizes("walker2d-medium-v2") == [100_000, 128, 3, 1, 20, 64, 1e-4, 10_000]
    assert sizes("hopper-medium-v2") == [100_000, 128, 2, 1, 20, 64, 1e-4, 10_000]
    assert sizes("halfcheetah-medium-v2")[1:3] == [256, 3] and sizes("antmaze-umaze-v2")[5] == 256
    assert sizes("hopper-mini") == sizes("walker2d-mini") == [5_000, 64, 2, 2, 10, 64, 1e-3, 500]
    assert sizes("halfcheetah-medium-v2", preset="small") == sizes("hopper-mini")


@pytest.mark.parametrize(
    "flags, method",
    [
        ({}, "RADT"),
        ({"alpha": False}, "RADT, without alpha"),
        ({"stepra": False}, "RADT, SeqRA only"),
        ({"seqra": False}, "RADT, StepRA only"),
        ({"stepra": False, "alpha": False}, "RADT, SeqRA only, without alpha"),
        (VARIANTS["dt"], "DT in RADT's setting"),
    ],
)
def test_what_tables_call_it(flags, method):
    data = SimpleNamespace(lengths=np.array([20]))
    assert radt.resolve(radt.Args(**flags), task_of("hopper-mini"), data, CPU).method == method


# ---- files and command lines


@pytest.fixture(scope="module")
def trained(tmp_path_factory, hopper_file):
    runs = tmp_path_factory.mktemp("radt")
    code, out, err = call(radt, *argv(hopper_file, runs, *TINY))
    assert code == 0, err
    return runs / f"{ENV}__train_radt__1"


def test_stage_3_uses_its_policy(trained, pipeline, run_main, tmp_path):
    policy = stage3.load_policy(trained / "policy.pt", "auto", CPU)
    assert type(policy.policy).__module__ == "train_radt" and policy.identity()["method"] == "RADT"
    copies = [tmp_path / name / "policy.pt" for name in ("radt", "qalign")]
    for source, copy in zip((trained / "policy.pt", pipeline.policy), copies):
        copy.parent.mkdir()
        copy.write_bytes(source.read_bytes())
    flags = ["--rollouts", 2, "--device", "cpu", "--percentiles"]
    code, out, err = run_main(stage3, "--checkpoint", copies[0], "--compare", copies[1], *flags)
    assert code == 0, err
    result = json.loads((copies[0].parent / "alignment.json").read_text())
    assert (result["method"], result["compare"][0]["method"]) == ("RADT", "Q-Align DT")
    assert "spearman_q_vs_return" not in result and stage3.label_of(result) == "RADT, seed 1"


def test_percentiles_are_radts_protocol(trained, run_main, tmp_path):
    (copy := tmp_path / "policy.pt").write_bytes((trained / "policy.pt").read_bytes())
    assert run_main(stage3, "--checkpoint", copy, "--rollouts", 2, "--device", "cpu", "--percentiles")[0] == 0
    result = json.loads((tmp_path / "alignment.json").read_text())
    returns = torch.load(copy, weights_only=True)["episode_returns"].numpy()
    low, high = np.percentile(returns, (5, 95))
    rows = result["percentiles"]
    assert [row["target_return"] for row in rows] == pytest.approx(np.linspace(low, high, 7).tolist())
    error = np.mean([abs(row["return_mean"] - row["target_return"]) for row in rows])
    assert result["absolute_error"] == pytest.approx(error)
    assert result["absolute_error_of_range"] == pytest.approx(error / (high - low))
    assert result["parameters"] == sum(p.numel() for p in radt.make_policy(*described(copy)).parameters())
    assert 0 < result["seconds_per_action"] < 1
    assert sum(",percentiles," in line for line in (tmp_path / "alignment.csv").read_text().splitlines()) == 7


def described(path):
    content = torch.load(path, weights_only=True)
    return stage2.Task(**content["task"]), content["config"]


def test_the_absolute_error_by_hand():
    assert stage3.absolute_error([150, 280], [100, 300], 200) == (35, pytest.approx(0.175))
    assert stage3.absolute_error([150], [100], 0.0) == (50, None)


def test_killed_and_resumed_ends_with_the_same_bits(trained, run_main, hopper_file, tmp_path, monkeypatch):
    flags = argv(hopper_file, tmp_path, *TINY, "--checkpoint-minutes", 0)
    with monkeypatch.context() as m:
        step = radt.Imitation.step

        def killed(self, i):
            if i == 17:
                raise KeyboardInterrupt
            return step(self, i)

        m.setattr(radt.Imitation, "step", killed)
        assert run_main(radt, *flags)[0] == 130
    assert torch.load(tmp_path / trained.name / "policy.pt", weights_only=True)["step"] == 17
    code, out, err = run_main(radt, *flags)
    assert code == 0 and "step 17" in out, err
    ours, whole = (torch.load(f / trained.name / "policy.pt", weights_only=True) for f in (tmp_path, trained.parent))
    assert all(torch.equal(x, whole["policy"][name]) for name, x in ours["policy"].items())
    assert (tmp_path / trained.name / "metrics.csv").read_bytes() == (trained / "metrics.csv").read_bytes()
    assert "nothing to do" in run_main(radt, *flags)[1]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--no-seqra", "--no-stepra"], "go together"),
        (["--rtg-tokens"], "go together"),
        (["--embed-dim", "15"], "not a multiple"),
        (["--warmup-steps", "0"], "--warmup-steps"),
        (["--env", "hopper-medum-v2"], "did you mean"),
        (["--env", "hopper-good-mine"], "qualities random, medium"),
    ],
)
def test_bad_input_is_one_line(flags, said, run_main, hopper_file, tmp_path):
    code, out, err = run_main(radt, *argv(hopper_file, tmp_path / "runs", *TINY, *flags))
    assert code == 2 and said in out + err and not (tmp_path / "runs").exists()


def test_a_missing_script_and_a_foreign_stage_are_one_line(trained, run_main, tmp_path, monkeypatch):
    monkeypatch.setattr(stage3, "__file__", str(tmp_path / "evaluate_alignment.py"))
    code, _, err = run_main(stage3, "--checkpoint", trained / "policy.pt", "--device", "cpu")
    assert code == 2 and "train_radt.py is missing" in err and err.count("\n") == 1
    content = torch.load(trained / "policy.pt", weights_only=True) | {"stage": "../../evil"}
    torch.save(content, tmp_path / "policy.pt")
    code, _, err = run_main(stage3, "--checkpoint", tmp_path / "policy.pt", "--device", "cpu")
    assert code == 2 and "not of train_qalign_dt.py" in err
