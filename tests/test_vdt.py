"""baselines/train_vdt.py: n-step targets, expectile, weights, Q term, model and planner by hand; who learns when."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train_vdt as vdt
from conftest import ENV, argv, call, data_of, task_of
from torch import nn

import evaluate_alignment as stage3
import train_qalign_dt as stage2

CPU = torch.device("cpu")
TINY = (
    "--device cpu --precision fp32 --embed-dim 16 --n-layer 1 --n-head 2 --context-len 4 --batch-size 8 "
    "--critic-width 16 --value-steps 20 --warm-start-steps 10 --total-steps 15 --model-steps 10"
).split()


# ---- Q and V


@pytest.mark.parametrize(
    "terminal, n, expected",
    [
        (True, 2, [4, 3.5, 3]),
        (False, 2, [4, 6, None]),
        (True, 1, [5, 6, 3]),
        (False, 1, [5, 6, None]),
        (True, 9, [2.75, 3.5, 3]),
        (False, 9, [4, 6, None]),
    ],
)
def test_n_step_targets_by_hand(terminal, n, expected):
    """r = 1, 2, 3, gamma 0.5, V = 8; the same in an episode that follows another one."""
    for before in (0, 4):
        rewards = np.array([9.0] * before + [1, 2, 3])
        ends = np.array([before, before + 3] if before else [3])
        sums, boot, discount, usable = vdt.n_step_sums(rewards, ends, np.array([terminal] * len(ends)), n, 0.5)
        y = sums + discount * 8.0
        found = [float(y[i]) if usable[i] else None for i in range(before, before + 3)]
        assert found == expected
        assert all(before <= boot[i] < before + 3 for i in range(before, before + 3))


def test_n_step_targets_against_a_loop():
    rng = np.random.default_rng(0)
    lengths, gamma = rng.integers(1, 9, 12), 0.9
    ends, rewards, v = np.cumsum(lengths), rng.normal(size=lengths.sum()), rng.normal(size=lengths.sum())
    ended = rng.random(12) < 0.5
    for n in (1, 3, 50):
        sums, boot, discount, usable = vdt.n_step_sums(rewards, ends, ended, n, gamma)
        for start, end, terminal in zip(ends - lengths, ends, ended):
            for t in range(start, end):
                m = min(n, end - t if terminal else end - 1 - t)
                assert usable[t] == (m > 0)
                y = sum(gamma**k * rewards[t + k] for k in range(m)) + (gamma**m * v[t + m] if t + m < end else 0)
                assert not m or sums[t] + discount[t] * v[boot[t]] == pytest.approx(y, abs=1e-5)


def test_expectile_by_hand():
    v, target_q = torch.zeros(2, requires_grad=True), torch.tensor([[2.0, 5], [7, -1]])  # u = 2, -1
    loss = vdt.value_loss(v, target_q, 0.7)
    loss.backward()
    assert loss.item() == pytest.approx(1.55) and v.grad.tolist() == pytest.approx([-1.4, 0.3])
    assert vdt.value_loss(v, target_q, 0.5).item() == pytest.approx((4 + 1) / 2 / 2)


# ---- the policy


def by_hand(eta=3.0, q_weight=1.0):
    """One dimension, two steps: Q'_1 = 2 a + 3, Q'_2 = a + 3.2."""
    a_hat = torch.tensor([[[0.5], [0.0]]], requires_grad=True)
    q_hat = torch.stack([2 * a_hat + 3, a_hat + 3.2])[..., 0]
    adv, valid = torch.tensor([[0, 0.5]]), torch.ones(1, 2, dtype=torch.bool)
    loss, found = vdt.policy_loss(a_hat, torch.tensor([[[0.2], [-0.4]]]), adv, q_hat, valid, eta, q_weight)
    loss.backward()
    return loss.item(), found, a_hat.grad.flatten().tolist()


def test_the_loss_by_hand():
    loss, (action_loss, weight, clipped, nu), gradient = by_hand()
    assert loss == pytest.approx(-0.5965, abs=1e-4) and gradient == pytest.approx([0.1507, 1.4942], abs=1e-4)
    assert action_loss.item() == pytest.approx(0.125) and weight.item() == pytest.approx((1 + math.exp(1.5)) / 2)
    assert clipped.item() == 0 and nu.item() == pytest.approx(3.35)


def test_without_weights_and_q_term_it_is_a_dts():
    loss, (action_loss, *_), gradient = by_hand(eta=0.0, q_weight=0.0)
    assert loss == pytest.approx(action_loss.item()) and gradient == pytest.approx([0.3, 0.4])


def test_weights_are_clipped_and_padding_does_not_count():
    adv, zeros = torch.tensor([[0.0, 1, 2, 9]]), torch.zeros(1, 4, 1)
    valid = torch.tensor([[True, True, True, False]])
    act, q_hat = torch.ones(1, 4, 1), torch.ones(2, 1, 4)
    loss, (_, weight, clipped, _) = vdt.policy_loss(zeros, act, adv, q_hat, valid, 3.0, 0.0)
    assert loss.item() == weight.item() == pytest.approx((1 + 20.0855 + 100) / 3, rel=1e-5)
    assert clipped.item() == pytest.approx(1 / 3)


@pytest.fixture
def learner(hopper_file):
    data = data_of(ENV, hopper_file)
    task = data.task
    values = dict(embed_dim=16, n_layer=1, n_head=2, context_len=4, batch_size=8, critic_width=16)
    values |= dict(value_steps=20, warm_start_steps=10, total_steps=15, model_steps=10, precision="fp32")
    config = vdt.resolve(vdt.Args(**values), task, data, CPU)
    return vdt.Training(task, data, vdt.Windows(data, 4, CPU), config)


def test_each_phase_moves_its_own_networks(learner):
    nets = ("policy", "critic", "target_critic", "value", "model")
    moves = {0: {"critic", "target_critic", "value"}, 20: {"policy"}, 35: {"model"}}
    for step, expected in moves.items():
        before = {name: [p.clone() for p in getattr(learner, name).parameters()] for name in nets}
        learner.step(step)
        moved = {
            name for name in nets
            if any(not torch.equal(x, y) for x, y in zip(before[name], getattr(learner, name).parameters()))
        }  # fmt: skip
        assert moved == expected, step


def test_whole_returns_come_first_then_n_steps(learner, monkeypatch):
    """Huge targets of one kind are seen in the loss exactly where that kind is used."""
    rows = learner.rows
    assert not torch.equal(rows.whole.sums, rows.n_step.sums)
    for step, used in ((9, "whole"), (10, "n_step")):
        for name in ("whole", "n_step"):
            with monkeypatch.context() as m:
                targets = getattr(rows, name)
                m.setattr(rows, name, targets._replace(sums=targets.sums + 1e6))
                assert (learner.step(step)[0] > 1e10) == (name == used)


def test_rewards_are_scaled_as_iql_does(learner, hopper_file):
    """1000 / (highest return - lowest), in the targets of both kinds."""
    data = data_of(ENV, hopper_file)
    scale = 1000 / (data.returns.max() - data.returns.min())
    assert learner.config.reward_scale == pytest.approx(scale) and learner.config.expectile == 0.7
    ended = data.terminals[data.ends - 1]
    for n, targets in zip((10**6, learner.config.n_step), (learner.rows.whole, learner.rows.n_step)):
        sums = vdt.n_step_sums(data.rewards * scale, data.ends, ended, n, 0.99)[0]
        torch.testing.assert_close(targets.sums, torch.as_tensor(sums), rtol=1e-4, atol=1e-3)


def test_antmazes_critic_sees_r_minus_1_unscaled(antmaze_file):
    data = data_of("antmaze-umaze-tiny", antmaze_file)
    task = data.task
    args = vdt.Args(embed_dim=16, n_layer=1, n_head=2, context_len=4, critic_width=16, n_step=1)
    config = vdt.resolve(args, task, data, CPU)
    learner = vdt.Training(task, data, vdt.Windows(data, 4, CPU), config)
    assert (config.reward_scale, config.expectile) == (1.0, 0.9)
    sums = learner.rows.n_step.sums
    assert torch.equal(sums[learner.rows.usable], torch.as_tensor(data.rewards - 1)[learner.rows.usable])


def test_the_policy_asks_the_target_critic(learner):
    """In advantages and Q term: the online critic does not matter, the target one does."""
    losses = []
    for name in (None, "critic", "target_critic"):
        for p in getattr(learner, name).parameters() if name else ():
            p.data.add_(0.1)
        state = {k: v.clone() for k, v in learner.policy.state_dict().items()}
        learner.generator.manual_seed(5), torch.manual_seed(5)
        losses.append(learner.step(20)[3].item())
        learner.policy.load_state_dict(state)
    assert losses[0] == losses[1] != losses[2]


def test_the_model_learns_from_pairs_within_episodes_that_are_not_held_out(monkeypatch):
    monkeypatch.setattr(vdt, "HELD_OUT", 3)
    lengths = np.array([3, 1, 4, 2])
    ends, N = np.cumsum(lengths), 10
    data = SimpleNamespace(ends=ends, lengths=lengths, terminals=np.zeros(N, bool), rewards=np.arange(N, dtype="f4"))
    windows = SimpleNamespace(obs=torch.zeros(N, 2), act=torch.zeros(N, 1), rtg=torch.zeros(N), reward=torch.zeros(N))
    rows = vdt.Transitions(data, windows, SimpleNamespace(reward_scale=1.0, n_step=2, gamma=0.9))
    assert rows.learn.tolist() == [0, 1, 8] and rows.test.tolist() == [4, 5, 6]


# ---- the planner


class Asked(nn.Module):
    """A policy whose action is the RTG."""

    def act(self, rtg, obs, act, timestep, valid):
        self.windows = (rtg, obs, act, timestep, valid)
        return rtg[:, -1:].clone()


def plan(steps, q, offsets=(0.0, 1.0), reward=0.0, rtg=(0.0, 0.0), timestep=(0, 1, 2), max_timestep=1000):
    """q[candidate][step] = (Q_1, Q_2). The state counts the imagined steps, the action's sign tells the candidate."""
    q = torch.tensor(q)

    def critic(obs, act):
        return q[(act[:, 0] > 0.5).long(), obs[:, 0].long()].T

    policy, K, B = Asked(), 3, len(rtg)
    planner = vdt.Plan(policy, nn.Identity(), nn.Identity(), offsets, 1000.0, 0.5, steps, max_timestep)
    planner.critic.forward = critic
    planner.model.forward = lambda obs, act: (obs + 1, torch.full((len(obs),), reward))
    context = torch.tensor(rtg)[:, None] * torch.tensor([0.0, 1, 1])
    window = (context, torch.zeros(B, K, 1), torch.zeros(B, K, 1), torch.tensor(timestep).expand(B, K))
    valid = torch.tensor([[False, True, True]]).expand(B, K)
    return planner.act(*window, valid)[:, 0].tolist(), policy.windows


def twice(*rows):
    return [[(x, x) for x in row] for row in rows]


def test_the_planner_by_hand():
    """gamma 0.5, candidate Qs (1, 4) and (2, 1): two steps prefer the first (3 > 2.5), one step the second."""
    q = twice((1.0, 4.0), (2.0, 1.0))
    assert plan(2, q)[0] == [0.0, 0.0] and plan(1, q)[0] == [1.0, 1.0]
    assert plan(1, q, offsets=(0.0,))[0] == [0.0, 0.0]  # one candidate: the request itself
    # (1, 2) against (1.6, 1): 2 < 2.1 with gamma, 3 > 2.6 without
    assert plan(2, twice((1.0, 2.0), (1.6, 1.0)))[0] == [1.0, 1.0]


def test_the_planner_takes_the_smaller_q_at_every_step():
    assert plan(1, [[(3.0, 0.0)], [(1.0, 2.0)]])[0] == [1.0, 1.0]
    assert plan(2, [[(1.0, 1.0), (9.0, 0.0)], [(1.0, 1.0), (1.0, 2.0)]])[0] == [1.0, 1.0]


def test_imagined_windows_move_on_by_one_step():
    """Two rows with two candidates each; a predicted reward of 100 lowers the RTG by 0.1."""
    q = twice((0.0, 0.0), (0.0, 0.0))
    _, (rtg, obs, act, timestep, valid) = plan(
        2, q, reward=100.0, rtg=(0.25, -0.5), timestep=(7, 8, 9), max_timestep=10
    )
    expected = [[x, x, x - 0.1] for x in (0.25, 1.25, -0.5, 0.5)]
    torch.testing.assert_close(rtg, torch.tensor(expected))
    assert obs[..., 0].tolist() == [[0, 0, 1]] * 4 and valid.all()
    assert act[..., 0].tolist() == [[0, x, 0] for x in (0.25, 1.25, -0.5, 0.5)]
    assert timestep.tolist() == [[8, 9, 9]] * 4  # the last row of the timestep embedding
    _, (rtg, *_) = plan(1, q, rtg=(0.25, -0.5))
    assert rtg[:, 0].tolist() == [0.0] * 4  # padding keeps its zero


def test_the_model_learns_and_imagines():
    """s' = s + 0.1 a, r = a_0."""
    torch.manual_seed(0)
    model, obs, act = vdt.Model(2, 2, 64), torch.randn(5000, 2), torch.rand(5000, 2) * 2 - 1
    target = torch.cat([0.1 * act, act[:, :1]], dim=1)
    model.fit_scale(target)
    opt = torch.optim.Adam(model.net.parameters(), lr=3e-3)
    for i in range(400):
        rows = torch.arange(256) * 7 + i
        vdt.descend(opt, model.loss(obs[rows % 5000], act[rows % 5000], target[rows % 5000]))
    with torch.no_grad():
        state, reward = model(obs, act)
        assert (((state - obs - 0.1 * act) ** 2).mean() / (0.1 * act).var()).item() < 0.01
        assert (((reward - act[:, 0]) ** 2).mean() / act[:, 0].var()).item() < 0.01
        imagined, first = obs[:100], obs[:100]
        for _ in range(5):
            imagined, _ = model(imagined, act[:100])
        gone = 0.5 * act[:100]
        assert ((imagined - first - gone).norm() / gone.norm()).item() < 0.02
    assert model(torch.full((1, 2), 99.0), act[:1])[0].abs().max() == vdt.MAX_STATE


# ---- files and command lines


@pytest.fixture(scope="module")
def trained(tmp_path_factory, hopper_file):
    runs = tmp_path_factory.mktemp("vdt")
    code, out, err = call(vdt, *argv(hopper_file, runs, *TINY))
    assert code == 0, err
    assert "R^2" in out
    return runs / f"{ENV}__train_vdt__1"


def test_high_targets_by_request_and_by_plan(trained, run_main, tmp_path):
    (copy := tmp_path / "policy.pt").write_bytes((trained / "policy.pt").read_bytes())
    flags = ["--checkpoint", copy, "--device", "cpu", "--rollouts", 2]
    for mode in ("request", "plan"):
        code, _, err = run_main(stage3, *flags, "--high-targets", "--inference", mode)
        assert code == 0, err
    request, plan = (json.loads((tmp_path / f"high_targets{x}.json").read_text()) for x in ("", "_plan"))
    best = torch.load(copy, weights_only=True)["episode_returns"].max().item()
    assert [row["target_return"] for row in plan["high_targets"]] == [best] and len(request["high_targets"]) == 2
    assert plan["inference"] == "plan" and plan["method"] == "VDT" and len(plan["model_r2"]) == 12
    code, _, err = run_main(stage3, *flags)  # a sweep, by request
    assert code == 0, err


def test_plan_is_refused_in_a_sweep_and_without_a_model(trained, pipeline, run_main, tmp_path):
    code, out, err = run_main(stage3, "--checkpoint", trained / "policy.pt", "--inference", "plan")
    assert code == 2 and "its answer does not" in out + err
    flags = ["--device", "cpu", "--high-targets", "--inference", "plan"]
    code, _, err = run_main(stage3, "--checkpoint", pipeline.policy, *flags)
    assert code == 2 and "train_qalign_dt.py has no --inference plan" in err
    content = torch.load(trained / "policy.pt", weights_only=True) | {"model": None}
    torch.save(content, tmp_path / "policy.pt")
    code, _, err = run_main(stage3, "--checkpoint", tmp_path / "policy.pt", *flags)
    assert code == 2 and "no model to plan in" in err and err.count("\n") == 1


def test_candidates_straddle_the_best_return_also_below_zero(trained):
    content = torch.load(trained / "policy.pt", weights_only=True)
    task, policy = stage2.Task(**content["task"]), nn.Linear(1, 1)
    for best in (100.0, -100.0):
        content["config"]["best_return"] = best
        offsets = vdt.make_planner(task, content, policy).offsets
        assert offsets.tolist() == pytest.approx([-0.05, -0.025, 0, 0.02, 0.05])


@pytest.mark.parametrize("at", [7, 27, 40], ids=["values", "policy", "model"])
def test_killed_in_any_phase_and_resumed_ends_with_the_same_bits(
    at, trained, run_main, hopper_file, tmp_path, monkeypatch
):
    flags = argv(hopper_file, tmp_path, *TINY, "--checkpoint-minutes", 0)
    with monkeypatch.context() as m:
        step = vdt.Training.step

        def killed(self, i):
            if i == at:
                raise KeyboardInterrupt
            return step(self, i)

        m.setattr(vdt.Training, "step", killed)
        assert run_main(vdt, *flags)[0] == 130
    code, out, err = run_main(vdt, *flags)
    assert code == 0 and f"step {at}" in out, err
    ours, whole = (torch.load(f / trained.name / "policy.pt", weights_only=True) for f in (tmp_path, trained.parent))
    for part in ("policy", "critic", "value", "model"):
        assert all(torch.equal(x, whole[part][name]) for name, x in ours[part].items()), part
    assert "nothing to do" in run_main(vdt, *flags)[1]


def test_bad_input_is_one_line(run_main, hopper_file, tmp_path):
    for flags, said in (
        (["--gamma", "1"], "between 0 and 1"),
        (["--n-step", "0"], "--n-step"),
        (["--expectile", "1.5"], "between 0 and 1"),
    ):
        code, out, err = run_main(vdt, *argv(hopper_file, tmp_path / "runs", *TINY, *flags))
        assert code == 2 and said in out + err and not (tmp_path / "runs").exists()


def test_paper_and_small_presets():
    data = SimpleNamespace(lengths=np.array([20]), returns=np.array([0.0, 100.0]))

    def sizes(env, **flags):
        config = vars(vdt.resolve(vdt.Args(env=env, **flags), task_of(env), data, CPU))
        return [config[name] for name in vdt.PAPER]

    assert sizes("hopper-medium-v2") == [100_000, 256, 6, 4, 20, 256, 3e-4, 1_000_000, 0, 256, 50_000, 0.1, 3.0]
    assert sizes("hopper-mini", preset="paper") == sizes("hopper-medium-v2")
    assert sizes("walker2d-mini") == [5_000, 64, 2, 2, 10, 64, 1e-3, 10_000, 9_000, 128, 5_000, 0.0, 0.3]
