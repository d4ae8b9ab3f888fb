"""baselines/train_rvdt.py: densities, KL, the proposition, D_e, duplication by hand; the expert; resuming."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train_rvdt as rvdt
from conftest import ENV, argv, call, data_of

import evaluate_alignment as stage3

CPU = torch.device("cpu")
SIZES = dict(embed_dim=16, n_layer=1, n_head=2, context_len=4, batch_size=8, critic_width=16, total_steps=20)
SIZES |= dict(expert_steps=30)
TINY = ["--device", "cpu", "--precision", "fp32"]
TINY += [x for name, value in SIZES.items() for x in (f"--{name.replace('_', '-')}", str(value))]
POSTER = {  # variant -> flags
    "DT": dict(eta=0.0, rebalance="none", std="none"),
    "DT-Dup": dict(eta=0.0, rebalance="dup"),
    "RDT": dict(eta=0.0),
    "QT": dict(rebalance="none", std="none"),
    "VDT of RVDT's poster": dict(rebalance="none"),
    "RVDT-Dup": dict(rebalance="dup"),
    "RVDT-Determ": dict(std="none"),
    "RVDT": {},
}


def one(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


# ---- distributions


def test_likelihood_and_kl_by_hand():
    mu, std = one(0.5), torch.tensor([0.1], dtype=torch.float64)
    loss = rvdt.nll(mu, std, torch.tensor([0.3]))
    (gradient,) = torch.autograd.grad(loss, mu)
    assert loss.item() == pytest.approx(0.6164, abs=1e-4) and gradient.item() == pytest.approx(20)
    divergence = rvdt.kl(mu, std, torch.tensor([0.3]), std)
    assert divergence.item() == pytest.approx(2.0, abs=1e-5)
    assert torch.autograd.grad(divergence, mu)[0].item() == pytest.approx(20, abs=1e-4)
    unit, other = (one(0.0), one(1.0)), (one(1.0), one(2.0))
    assert rvdt.kl(*unit, *other).item() == pytest.approx(0.4431, abs=1e-4)
    assert rvdt.kl(*other, *unit).item() == pytest.approx(1.3069, abs=1e-4)


def test_squashed_density_by_hand():
    assert -rvdt.squashed_nll(one(0.0), one(1.0), torch.tensor([0.5])).item() == pytest.approx(-0.7821, abs=1e-4)
    assert math.isfinite(rvdt.squashed_nll(one(0.0), one(1.0), torch.tensor([1.0])).item())


def test_squashing_both_changes_no_kl():
    """By integration over the squashed densities."""
    mu, std, mu_e, std_e = one(0.3), one(0.5), one(-0.2), one(0.8)
    a = torch.tanh(torch.linspace(-6, 6, 40_001, dtype=torch.float64))[:, None]
    log_p, log_q = -rvdt.squashed_nll(mu, std, a), -rvdt.squashed_nll(mu_e, std_e, a)
    area = torch.trapezoid(log_p.exp() * (log_p - log_q), a[:, 0]).item()
    assert area == pytest.approx(rvdt.kl(mu, std, mu_e, std_e).item(), abs=1e-4)


def test_a_reparameterised_sample_by_hand(monkeypatch):
    """mu 0.3, sigma 0.1, xi 0.7, Q = 2 a, the mean is tanh(mu): dQ / dmu = 2 (1 - tanh(mu)^2)."""
    monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.tensor([0.7]))
    mu = torch.tensor([0.3], requires_grad=True)
    mean, std = rvdt.distribution(mu, None)
    a = rvdt.sample(mean, std, "fixed", None)
    assert a.item() == pytest.approx(math.tanh(0.3) + 0.07) and rvdt.sample(mean, std, "none", None) is mean
    assert torch.autograd.grad(2 * a, mu)[0].item() == pytest.approx(1.8303, abs=1e-4)
    mean, std = rvdt.distribution(mu, torch.tensor([0.0]))
    assert std.item() == pytest.approx(math.exp(-1.5))
    assert rvdt.sample(mean, std, "learned", None).item() == pytest.approx(math.tanh(0.3 + 0.7 * math.exp(-1.5)))


# ---- losses


def config(**values) -> SimpleNamespace:
    return SimpleNamespace(**dict(std="fixed", rebalance="kl", alpha=1.0, alpha_w=4.0) | values)


def test_the_proposition():
    """The weighted likelihood has the KL form's gradient where the expert is D_e's action, alpha = alpha_w p."""
    a, valid = torch.tensor([[0.0], [0.5], [0.3], [0.9]])[:, None], torch.ones(4, 1, dtype=torch.bool)
    in_best = torch.tensor([False, False, False, True])
    gradients = []
    for given in (config(rebalance="weight", alpha_w=3.0), config(rebalance="kl", alpha=0.75)):
        mu = torch.tensor([[0.1], [0.2], [0.3], [0.4]])[:, None].requires_grad_(True)
        std = torch.full_like(mu, 0.1)
        loss = rvdt.imitation_loss(mu, std, a, valid, in_best, given)
        if given.rebalance == "kl":
            expert = torch.full_like(mu, 0.9)
            loss = loss + rvdt.expert_loss(mu, std, expert, std, valid, in_best, given)
        gradients.append(torch.autograd.grad(loss, mu)[0].flatten() / (2 * 0.1**2))  # per unit of NLL
    for gradient in gradients:
        assert gradient.tolist() == pytest.approx([2.5, -7.5, 0, -50], abs=1e-3)


@pytest.mark.parametrize("A", [1, 3])
def test_with_a_fixed_std_the_scaled_likelihood_is_a_dts_loss(A):
    g = torch.Generator().manual_seed(0)
    mu, a = (torch.randn(2, 3, A, generator=g) for _ in range(2))
    valid, std = torch.tensor([[False, True, True], [True, True, True]]), torch.full_like(mu, rvdt.SIGMA)
    mu.requires_grad_(True)
    ours = rvdt.imitation_loss(mu, std, a, valid, torch.zeros(2, dtype=torch.bool), config())
    scaled = rvdt.masked_mean(2 * rvdt.SIGMA**2 / A * rvdt.nll(mu, std, a), valid)
    mse = rvdt.masked_mean(((mu - a) ** 2).mean(dim=-1), valid)
    gradients = [torch.autograd.grad(loss, mu)[0] for loss in (ours, scaled, mse)]
    torch.testing.assert_close(gradients[0], gradients[2], atol=1e-6, rtol=0)
    torch.testing.assert_close(gradients[1], gradients[2], atol=1e-6, rtol=0)
    divergence = rvdt.masked_mean(2 * rvdt.SIGMA**2 / A * rvdt.kl(mu, std, a, std), valid)
    every = torch.ones(2, dtype=torch.bool)
    assert rvdt.expert_loss(mu, std, a, std, valid, every, config()).item() == pytest.approx(divergence.item())


def test_the_expert_pulls_on_d_e_only():
    mu = torch.zeros(2, 3, 1, requires_grad=True)
    valid, std = torch.tensor([[False, True, True], [True, True, True]]), torch.full((2, 3, 1), 0.1)
    args = (mu, std, torch.ones(2, 3, 1), std, valid)
    assert rvdt.expert_loss(*args, torch.tensor([True, False]), config(alpha=2.0)).item() == 2.0
    assert rvdt.expert_loss(*args, torch.tensor([False, False]), config()).item() == 0.0
    (gradient,) = torch.autograd.grad(rvdt.expert_loss(*args, torch.tensor([True, False]), config()), mu)
    assert gradient[0].flatten().tolist() == [0, -1, -1] and not gradient[1].any()


# ---- D_e, its expert, duplication


@pytest.mark.parametrize("fraction, expected", [(0.1, {1}), (0.2, {1, 2}), (0.25, {1, 2})])
def test_the_best_episodes(fraction, expected):
    lengths = np.array([100, 100, 100, 700])
    chosen = rvdt.best_episodes(np.array([5.0, 9, 7, 1]), lengths, fraction)
    assert set(np.flatnonzero(chosen)) == expected
    assert np.flatnonzero(rvdt.best_episodes(np.array([5.0, 9, 7, 10]), lengths, fraction)).tolist() == [3]
    assert np.flatnonzero(rvdt.best_episodes(np.array([5.0, 9, 9, 1]), lengths, 0.1)).tolist() == [1]


@pytest.fixture
def parts(hopper_file):
    data = data_of(ENV, hopper_file)
    task = data.task
    return task, data, rvdt.Windows(data, 4, CPU)


def make(parts, **changes) -> rvdt.Training:
    task, data, windows = parts
    args = rvdt.Args(**SIZES | dict(precision="fp32", eta=1.0) | changes)
    return rvdt.Training(task, windows, data, rvdt.resolve(args, task, data, CPU))


def test_duplication_draws_d_e_more_often(parts):
    learner = make(parts, rebalance="dup", alpha_w=3.0)
    learner.in_best = torch.tensor([True, False, False, False])
    learner.config = SimpleNamespace(rebalance="dup", alpha_w=3.0, batch_size=70_000)
    start = learner.draw()[:, 0]
    share = torch.bincount(start, minlength=4) / 70_000
    assert share.tolist() == pytest.approx([4 / 7, 1 / 7, 1 / 7, 1 / 7], abs=0.01)


def test_the_expert_is_frozen_deterministic_and_imitates(parts, monkeypatch):
    monkeypatch.setattr(rvdt, "EXPERT_EVERY", 50)
    task, data, windows = parts
    learner = make(parts, expert_steps=150)
    expert, rows = learner.expert, learner.in_best
    assert torch.equal(*(expert(windows.obs)[0] for _ in range(2)))
    torch.manual_seed(1)  # as the expert began
    untrained = rvdt.Expert(task.obs_dim, task.act_dim, False).eval()
    loss = [e.loss(windows.obs[rows], windows.act[rows]).item() for e in (expert, untrained)]
    assert loss[0] < loss[1]
    before = [p.clone() for p in expert.parameters()]
    learner.step(0)
    assert all(torch.equal(x, y) and y.grad is None for x, y in zip(before, expert.parameters()))


@pytest.mark.parametrize("steps", [1, 3])
def test_the_expert_of_one_short_episode(steps, parts, capsys):
    """Its held-out part is never empty."""
    task, data, windows = parts
    one_short = SimpleNamespace(starts=np.array([0]), ends=np.array([steps]))
    config = SimpleNamespace(seed=1, std="fixed", expert_steps=50)
    expert = rvdt.fit_expert(task, windows, one_short, np.array([True]), config)
    torch.manual_seed(1)
    untrained = rvdt.Expert(task.obs_dim, task.act_dim, False).eval()
    first = windows.obs[:1], windows.act[:1]
    assert expert.loss(*first) < untrained.loss(*first) and "nan" not in capsys.readouterr().out


@pytest.mark.parametrize("name", POSTER)
def test_the_posters_variants(name, parts):
    learner = make(parts, **POSTER[name])
    assert learner.config.method == name
    values = dict(zip(learner.metrics, learner.step(0).tolist()))
    assert (values["q_term"] != 0) == (learner.config.eta > 0) == (values["q_loss"] != 0)
    assert values["loss"] == pytest.approx(
        values["imitation"] + values["expert"] + learner.config.eta * values["q_term"], rel=1e-5
    )
    assert values["expert"] == 0 or learner.config.rebalance == "kl"


# ---- files and command lines


@pytest.fixture(scope="module", params=["fixed", "learned"])
def trained(request, tmp_path_factory, hopper_file):
    runs = tmp_path_factory.mktemp("rvdt")
    flags = [*TINY, "--critic", "none", "--std", request.param]
    code, out, err = call(rvdt, *argv(hopper_file, runs, *flags))
    assert code == 0 and "expert: " in out, err
    return flags, runs / f"{ENV}__train_rvdt__1"


def test_stage_3_evaluates_it(trained, run_main, tmp_path):
    (copy := tmp_path / "policy.pt").write_bytes((trained[1] / "policy.pt").read_bytes())
    code, _, err = run_main(stage3, "--checkpoint", copy, "--rollouts", 1, "--device", "cpu")
    assert code == 0, err
    policy = stage3.load_policy(copy, "fp32", CPU).policy
    window = (torch.zeros(2, 4), torch.zeros(2, 4, 11), torch.zeros(2, 4, 3), torch.arange(4).expand(2, 4))
    window += (torch.ones(2, 4, dtype=torch.bool),)
    with torch.no_grad():
        mean, _ = policy(*window)
        mode = torch.tanh(mean) if policy.std_head else mean
        torch.testing.assert_close(policy.act(*window), mode[:, -1])


def test_killed_and_resumed_ends_with_the_same_bits(trained, run_main, hopper_file, tmp_path, monkeypatch):
    flags, whole = trained
    flags = argv(hopper_file, tmp_path, *flags, "--checkpoint-minutes", 0)
    with monkeypatch.context() as m:
        step = rvdt.Training.step

        def killed(self, i):
            if i == 11:
                raise KeyboardInterrupt
            return step(self, i)

        m.setattr(rvdt.Training, "step", killed)
        assert run_main(rvdt, *flags)[0] == 130
    code, out, err = run_main(rvdt, *flags)
    assert code == 0 and "step 11" in out and "expert: " not in out, err
    ours, theirs = (torch.load(f / "policy.pt", weights_only=True) for f in (tmp_path / whole.name, whole))
    for part in ("policy", "critic"):
        assert all(torch.equal(x, theirs[part][name]) for name, x in ours[part].items())


def test_bad_input_is_one_line(run_main, hopper_file, tmp_path):
    for flags, said in ((["--expert-fraction", "0"], "--expert-fraction"), (["--rebalance", "both"], "rebalance")):
        code, out, err = run_main(rvdt, *argv(hopper_file, tmp_path / "runs", *TINY, *flags))
        assert code == 2 and said in out + err and not (tmp_path / "runs").exists()
