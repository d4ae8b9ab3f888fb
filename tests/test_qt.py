"""baselines/train_qt.py: window targets, Q term and choice by Q by hand; schedules; what moves what; its files."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train_qt as qt
import train_rvdt as rvdt
from conftest import ENV, argv, call, data_of, task_of
from torch import nn

import evaluate_alignment as stage3
import train_qalign_dt as stage2

CPU = torch.device("cpu")
SIZES = dict(embed_dim=16, n_layer=1, n_head=2, context_len=4, batch_size=8, critic_width=16, total_steps=30)
TINY = ["--device", "cpu", "--precision", "fp32"]
TINY += [x for name, value in SIZES.items() for x in (f"--{name.replace('_', '-')}", str(value))]


def batch_of(reward, valid, terminal=False) -> qt.Batch:
    K = len(reward)
    ends = torch.zeros(1, K, dtype=torch.bool)
    ends[0, -1] = terminal
    return qt.Batch(*[None] * 4, torch.tensor([valid]), torch.tensor([reward], dtype=torch.float32), ends)


@pytest.mark.parametrize(
    "reward, valid, terminal, expected",
    [
        ((1, 2, 3, 4), (True,) * 4, False, [4, 6, 8, None]),
        ((1, 2, 3, 4), (True,) * 4, True, [3.25, 4.5, 5, 4]),
        ((0, 0, 3, 4), (False, False, True, True), False, [None, None, 8, None]),
    ],
)
def test_window_targets_by_hand(reward, valid, terminal, expected):
    """gamma 0.5, bootstrap 10."""
    y, mask = qt.window_target(batch_of(reward, valid, terminal), torch.tensor([10.0]), 0.5)
    assert [y[0, i].item() if mask[0, i] else None for i in range(4)] == expected


def test_the_q_term_by_hand():
    valid = torch.ones(1, 2, dtype=torch.bool)
    for factor in (1, 7):  # the scale of Q does not matter
        q = factor * torch.tensor([[[2.0, 4]], [[1, -3]]])
        q.requires_grad_(True)
        term = qt.q_term(q, valid, torch.tensor(0))
        term.backward()
        assert term.item() == pytest.approx(-1.5)
        assert (factor * q.grad[0]).flatten().tolist() == pytest.approx([-0.25, -0.25]) and not q.grad[1].any()
        assert qt.q_term(q, valid, torch.tensor(1)).item() == pytest.approx(1 / 3)


def make(hopper_file, **changes) -> qt.Training:
    data = data_of(ENV, hopper_file)
    task = data.task
    config = qt.resolve(qt.Args(**SIZES | dict(precision="fp32") | changes), task, data, CPU)
    return qt.Training(task, qt.Windows(data, 4, CPU), config)


def weights(net):
    return [p.clone() for p in net.parameters()]


def same(xs, ys):
    return all(torch.equal(x, y) for x, y in zip(xs, ys))


def test_without_the_q_term_a_step_is_a_dts(hopper_file):
    """eta 0 against stage 2's own step without alignment loss, on the same windows: every bit."""
    learner = make(hopper_file, eta=0.0)
    config = stage2.Config(
        **SIZES | dict(lambda_e=0.0, conv=False, actor_lr=1e-3, rtg_range=(0.0, 1.0), sigma_e=1.0, dropout=0.1)
    )
    other = stage2.CoTraining(task_of(ENV), learner.windows, config)
    other.policy.load_state_dict(learner.policy.state_dict())
    batch = learner.windows.sample(8, torch.Generator().manual_seed(3))
    losses = []
    for policy, loss in (
        (learner.policy, lambda p: sum(qt.supervised_loss(*p(*batch.inputs), batch))),
        (other.policy, lambda p: stage2.actor_loss(p, None, batch, 1.0, config, torch.Generator().manual_seed(0))[0]),
    ):
        torch.manual_seed(0)  # of dropout
        losses.append(loss(policy))
        losses[-1].backward()
    assert torch.equal(*losses)
    assert same(*([p.grad for p in one.policy.parameters()] for one in (learner, other)))
    before = weights(learner.critic)
    learner.step(0)
    assert same(before, weights(learner.critic)) and same(before, weights(learner.target_critic))


def test_the_q_term_leaves_the_critic_and_the_targets_leave_the_policy(hopper_file, monkeypatch):
    learner, moved = make(hopper_file, eta=1.0), []
    descend = qt.descend

    def watched(opt, loss, max_norm):
        before = weights(learner.policy), weights(learner.critic)
        descend(opt, loss, max_norm)
        moved.append([not same(x, weights(net)) for x, net in zip(before, (learner.policy, learner.critic))])

    monkeypatch.setattr(qt, "descend", watched)
    learner.step(0)
    assert moved == [[False, True], [True, False]]
    assert learner.critic.weights[0].requires_grad


def test_the_target_policy_moves_every_fifth_step_after_a_thousand(hopper_file):
    learner = make(hopper_file, eta=1.0)
    for step, moves in ((5, False), (1000, False), (1001, False), (1005, True)):
        learner.config = SimpleNamespace(**vars(learner.config) | {"total_steps": 5000})
        before = weights(learner.target_policy)
        learner.step(step)
        assert same(before, weights(learner.target_policy)) != moves
        if moves:
            for old, new, online in zip(before, weights(learner.target_policy), weights(learner.policy)):
                torch.testing.assert_close(new, old + 0.005 * (online - old))
    assert not learner.target_policy.training and learner.policy.training


# ---- the choice by Q


class Asked(nn.Module):
    def act(self, rtg, obs, act, timestep, valid):
        self.rtg = rtg
        return rtg[:, -1:]


def choose(n, draw, offsets=(1.0, 2.0, 3.0)):
    policy, critic = Asked(), nn.Identity()
    critic.forward = lambda obs, act: torch.stack([act[:, 0], act[:, 0] + 1])  # min_m Q'_m is the action
    chooser = qt.Candidates(policy, critic, offsets, draw)
    valid = torch.tensor([[False, True]]).expand(n, 2)
    window = (torch.zeros(n, 2), torch.zeros(n, 2, 1), torch.zeros(n, 2, 1), torch.zeros(n, 2, dtype=torch.int64))
    return chooser.act(*window, valid)[:, 0], policy


def test_best_takes_the_highest_q_and_softmax_draws():
    chosen, policy = choose(2, draw=False)
    assert chosen.tolist() == [3.0, 3.0]
    assert policy.rtg.tolist() == [[0, 1], [0, 2], [0, 3]] * 2  # padding keeps its zero
    chosen, _ = choose(20_000, draw=True)
    share = [(chosen == x).float().mean().item() for x in (1, 2, 3)]
    assert share == pytest.approx([0.0900, 0.2447, 0.6652], abs=0.015)
    for draw in (False, True):  # one candidate, the request itself: the same as act
        assert choose(2, draw, offsets=(0.0,))[0].tolist() == [0.0, 0.0]


# ---- files and command lines


@pytest.fixture(scope="module")
def trained(pipeline, hopper_file, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(pipeline.critic.parent, runs / pipeline.critic.parent.name)
    code, _, err = call(qt, *argv(hopper_file, runs, *TINY))
    assert code == 0, err
    return runs / f"{ENV}__train_qt__1"


def test_it_starts_from_stage_1s_critic_and_discount(trained, pipeline, run_main, hopper_file, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        seen = []
        m.setattr(qt.Training, "__init__", lambda self, *args: seen.append(args) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_main(qt, *argv(hopper_file, tmp_path, *TINY, "--critic", pipeline.critic))
    expected = torch.load(pipeline.critic, weights_only=True)
    assert all(torch.equal(x, expected["critic"][name]) for name, x in seen[0][3].items())
    assert torch.load(trained / "policy.pt", weights_only=True)["config"]["gamma"] == expected["config"]["gamma"]
    with monkeypatch.context() as m:  # a missing one is trained, as by stage 2
        m.setattr(stage2.subprocess, "run", lambda command: SimpleNamespace(returncode=len(command) and 7))
        code, out, err = run_main(qt, *argv(hopper_file, tmp_path, *TINY))
        assert code == 7 and "critic.pt is missing: starting pretrain_q.py" in out and not err
    random = argv(hopper_file, tmp_path, *TINY, "--critic", "none", "--total-steps", 2)
    code, _, err = run_main(qt, *random)
    assert code == 0, err
    code, _, err = run_main(qt, *random, "--gamma", 0.9)  # of a random critic it is the run's own
    assert code == 2 and "gamma 0.99 there, 0.9 here" in err


def test_a_critic_of_other_data_is_refused(pipeline, run_main, hopper_file, tmp_path):
    content = torch.load(pipeline.critic, weights_only=True)
    content["config"]["data"] = "0" * 16
    torch.save(content, tmp_path / "critic.pt")
    code, _, err = run_main(qt, *argv(hopper_file, tmp_path, *TINY, "--critic", tmp_path / "critic.pt"))
    assert code == 2 and "other data" in err


def test_high_targets_by_best_and_softmax(trained, run_main, tmp_path):
    (copy := tmp_path / "policy.pt").write_bytes((trained / "policy.pt").read_bytes())
    for mode in ("best", "softmax"):
        flags = ["--high-targets", "--inference", mode, "--rollouts", 2, "--device", "cpu"]
        code, _, err = run_main(stage3, "--checkpoint", copy, *flags)
        assert code == 0, err
        result = json.loads((tmp_path / f"high_targets_{mode}.json").read_text())
        assert (result["inference"], result["method"], len(result["high_targets"])) == (mode, "QT", 1)
    code, _, err = run_main(stage3, "--checkpoint", copy, "--rollouts", 1, "--device", "cpu")
    assert code == 0, err
    assert "spearman_q_vs_return" in json.loads((tmp_path / "alignment.json").read_text())


def test_without_the_q_term_there_is_no_critic(pipeline, run_main, hopper_file, tmp_path):
    """Nothing has trained it, so nothing is said of it, and it cannot choose."""
    assert run_main(qt, *argv(hopper_file, tmp_path, *TINY, "--eta", 0, "--total-steps", 1))[0] == 0
    path = tmp_path / f"{ENV}__train_qt__1" / "policy.pt"
    assert run_main(stage3, "--checkpoint", path, "--rollouts", 1, "--device", "cpu")[0] == 0
    result = json.loads((path.parent / "alignment.json").read_text())
    assert "spearman_q_vs_return" not in result and result["sweep"][0]["q_mean"] is None
    code, _, err = run_main(stage3, "--checkpoint", path, "--high-targets", "--inference", "best", "--device", "cpu")
    assert code == 2 and "trained with --eta 0" in err and err.count("\n") == 1


def test_candidates_are_the_releases_on_d4rl_and_multiples_on_own_data(trained):
    content = torch.load(trained / "policy.pt", weights_only=True)
    task, policy = stage2.Task(**content["task"]), nn.Linear(1, 1)
    best = content["config"]["best_return"]
    own = qt.make_candidates(task, content, policy).offsets
    assert own.tolist() == pytest.approx([(x - 1) * best / 1000 for x in (0.5, 0.75, 1, 1.2)])
    content["config"]["best_return"] = -100.0  # multiples would be on the wrong side of it
    below_zero = qt.make_candidates(task, content, policy).offsets
    assert below_zero.tolist() == pytest.approx([-0.05, -0.025, 0, 0.02])
    content["config"]["best_return"] = best
    theirs = qt.make_candidates(replace(task, is_d4rl=True), content, policy).offsets
    assert theirs.tolist() == pytest.approx([(x - best) / 1000 for x in (3600, 1800)])
    content["config"]["best_return"] = 1.0  # an AntMaze's returns are 0 and 1
    maze = qt.make_candidates(replace(task, body="antmaze", rtg_scale=1.0), content, policy).offsets
    assert maze.tolist() == pytest.approx([0, -0.1, -0.2, -0.3, -0.4, -0.5, -0.7])


def test_killed_and_resumed_ends_with_the_same_bits(trained, pipeline, run_main, hopper_file, tmp_path, monkeypatch):
    flags = argv(hopper_file, tmp_path, *TINY, "--critic", pipeline.critic, "--checkpoint-minutes", 0)
    with monkeypatch.context() as m:
        step = qt.Training.step

        def killed(self, i):
            if i == 17:
                raise KeyboardInterrupt
            return step(self, i)

        m.setattr(qt.Training, "step", killed)
        assert run_main(qt, *flags)[0] == 130
    code, _, err = run_main(qt, *argv(hopper_file, tmp_path, *TINY))
    assert code == 2 and "of another run (critic " in err  # that of another folder, by its content
    code, out, err = run_main(qt, *flags)
    assert code == 0 and "step 17" in out, err
    ours, whole = (torch.load(f / trained.name / "policy.pt", weights_only=True) for f in (tmp_path, trained.parent))
    for part in ("policy", "critic"):
        assert all(torch.equal(x, whole[part][name]) for name, x in ours[part].items())
    assert "nothing to do" in run_main(qt, *flags)[1]


def test_the_releases_settings_are_the_defaults():
    data = SimpleNamespace(lengths=np.array([20]), returns=np.array([0.0, 100.0]))

    def of(env, **task):
        config = qt.resolve(qt.Args(env=env), replace(task_of(env), **task), data, CPU)
        ours = rvdt.resolve(rvdt.Args(env=env), replace(task_of(env), **task), data, CPU)
        assert (ours.eta, ours.max_grad_norm) == (config.eta, config.max_grad_norm)
        assert ours.context_len == (10 if env.endswith("mini") else 20)
        return config.eta, config.context_len, config.max_grad_norm

    assert of("halfcheetah-medium-v2") == (5, 5, 15) and of("halfcheetah-medium-expert-v2") == (0.4, 20, 15)
    small = qt.resolve(qt.Args(preset="small"), task_of("halfcheetah-medium-v2"), data, CPU)
    assert (small.context_len, small.eta) == (10, 5)
    assert of("hopper-medium-replay-v2") == (3, 20, 9) and of("walker2d-medium-v2") == (2, 20, 5)
    assert of("halfcheetah-medium-replay-v2") == (5, 5, 15) and of("hopper-medium-v2") == (1, 20, 9)
    assert of("hopper-mini") == (1, 10, 9) and of("walker2d-medium-mine") == (1, 20, 5)
    for quality, eta in (("umaze", 0.05), ("umaze-diverse", 0.01), ("medium-diverse", 0.01), ("large-diverse", 0.005)):
        assert of(f"antmaze-{quality}-v2") == of(f"antmaze-{quality}-mine") == (eta, 20, 9)
    maze2d = dict(umaze=(5, 20), medium=(5, 9), large=(4, 9), open=(0.01, 9))
    maze2d |= {"umaze-dense": (3, 5), "medium-dense": (5, 9), "large-dense": (4, 9)}
    for quality, (eta, norm) in maze2d.items():
        assert of("hopper-medium-v2", body="maze2d", quality=quality, tag="v1") == (eta, 20, norm)
    # ours, where the release has no value
    assert of("hopper-expert-v2") == of("hopper-random-v2") == (1, 20, 9) and of("ant-medium-v2") == (1, 20, 15)
    assert of("antmaze-medium-play-v2") == (0.01, 20, 9) and of("antmaze-large-play-v2") == (0.005, 20, 9)
