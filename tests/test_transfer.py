"""HalfCheetah-Vel: the environment, the bookkeeping of the return-to-go, the calibration, the command line."""

import csv
import json

import gymnasium
import numpy as np
import pytest
import torch
import train_qalign_dt as stage2
import transfer_cheetah_vel as transfer
from conftest import TINY2, record, write_hdf5

ENV = "halfcheetah-medium-expert-tiny"


class HalfCheetahVel(gymnasium.Wrapper):
    """The benchmark's task around Gymnasium's HalfCheetah-v4: reward -|v_t - v| - 0.05 |a|^2."""

    def __init__(self, target):
        super().__init__(stage2.make_env("HalfCheetah-v4"))
        self.target = target

    def step(self, action):
        observation, _, terminated, truncated, info = self.env.step(action)
        reward = -abs(info["x_velocity"] - self.target) - 0.05 * float(np.sum(np.square(action)))
        return observation, reward, terminated, truncated, info


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two policies on random HalfCheetah episodes, a Q-Align DT and a DT, and one of Hopper."""
    from unittest import mock

    folder = tmp_path_factory.mktemp("transfer")
    cheetah = write_hdf5(folder / "cheetah.hdf5", *record("HalfCheetah-v4", episodes=20, limit=15))
    hopper = write_hdf5(folder / "hopper.hdf5", *record("Hopper-v4", episodes=20, limit=15))
    dt = ["--lambda-e", "0", "--no-conv", "--exp-name", "dt", "--eval-every", "0"]
    aligned = ["--critic-steps", "10", "--eval-every", "0"]
    for env, file, flags in ((ENV, cheetah, dt), (ENV, cheetah, aligned), ("hopper-medium-tiny", hopper, dt)):
        command = ["train_qalign_dt.py", "--env", env, "--dataset-path", str(file), "--runs-dir", str(folder / "runs")]
        with mock.patch("sys.argv", [*command, *TINY2, *flags]):
            stage2.main()
    return folder / "runs"


def randomised(path):
    """A loaded policy whose weights are large enough to move the body in many ways."""
    trained = transfer.load_policy(path, "fp32", torch.device("cpu"))
    torch.manual_seed(0)
    for p in trained.policy.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return trained


def test_tasks_are_the_benchmarks():
    assert len(transfer.GRID) == 40 and transfer.GRID[0] == 0.075 and transfer.GRID[-1] == 3.0
    assert set(transfer.HELD_OUT) <= set(transfer.GRID) and len(transfer.HELD_OUT) == 5
    assert transfer.EXTENDED == tuple(range(1, 13))


def test_rewards_by_hand():
    velocity, action = np.array([2.0, -1.0]), np.array([[1.0, -1.0], [0.0, 0.5]])
    assert transfer.training_reward(velocity, action).tolist() == pytest.approx([2.0 - 0.1, -1.0 - 0.0125])
    cost = np.array([[-0.1, -0.2, 0.0], [0.0, 0.0, -0.3]])
    v = np.array([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]])
    rollouts = stage2.Rollouts(None, None, v + cost, v, None, None, None)
    got = transfer.vel_returns(rollouts, np.array([2.0, 0.5]))
    assert got.tolist() == pytest.approx([-(1 + 0 + 1) - 0.3, -(0.5 + 1.5 + 0) - 0.3])


def test_rtg_is_linear_between_the_calibrated_ends():
    ends = (0.075, 3.0), (100.0, 2000.0)
    assert transfer.rtg_of([0.075, 3.0], *ends).tolist() == [100.0, 2000.0]
    assert float(transfer.rtg_of((0.075 + 3.0) / 2, *ends)) == pytest.approx(1050.0)
    assert float(transfer.rtg_of(4.0, *ends)) == pytest.approx(100 + 1900 * (4.0 - 0.075) / 2.925)


def by_hand(trained, rtg, seed, target, steps):
    """One episode through the wrapped Gymnasium environment: return, mean velocity, and the raw RTG of every step."""
    env, K, mean, std = (
        HalfCheetahVel(target),
        trained.content["config"]["context_len"],
        *(trained.content[key] for key in ("obs_mean", "obs_std")),
    )
    observation, _ = env.reset(seed=int(seed))
    asked, obs, act, total, velocity = [rtg], [], [], 0.0, []
    for t in range(steps):
        obs.append((torch.as_tensor(observation, dtype=torch.float32) - mean) / std)
        act.append(torch.zeros(6))
        k, times = slice(max(0, t + 1 - K), t + 1), torch.arange(t + 1)[max(0, t + 1 - K) :][None]
        window = torch.tensor(asked[k])[None].float() / 1000, torch.stack(obs[k])[None], torch.stack(act[k])[None]
        with torch.no_grad():
            act[-1] = trained.policy(*window, times, torch.ones_like(times).bool())[0][0, -1]
        action = act[-1].numpy().astype(np.float64)
        observation, reward, _, _, info = env.step(action)
        total += reward
        velocity.append(info["x_velocity"])
        asked.append(asked[-1] - (info["x_velocity"] - 0.05 * np.square(action).sum()))
    return total, np.mean(velocity), asked


def test_episodes_are_those_of_the_wrapped_environment_and_calibration_picks_the_best(runs):
    trained, steps, seeds, ends = randomised(runs / f"{ENV}__dt__1/policy.pt"), 30, np.array([3, 8]), (0.5, 3.0)
    ((low, high), (low3, high3)) = transfer.calibrate(trained, (2, 3), ends, 1500.0, 2, seeds, steps)
    assert low3["rtg"] == [-1000.0, 500.0, 2000.0] and high3["rtg"] == [1500.0, 3000.0, 4500.0]
    assert low["rtg"] == [-1000.0, 2000.0] and high["rtg"] == [1500.0, 4500.0]
    for curve in (low3, high3):
        expected = [
            np.mean([by_hand(trained, rtg, s, curve["velocity"], steps)[0] for s in seeds]) for rtg in curve["rtg"]
        ]
        assert curve["return_mean"] == pytest.approx(expected, abs=1e-3)
        assert curve["best_rtg"] == curve["rtg"][int(np.argmax(expected))]
        assert np.ptp(expected) > 0.01  # the request matters
    for coarse, fine in ((low, low3), (high, high3)):
        assert coarse["return_mean"] == pytest.approx([fine["return_mean"][0], fine["return_mean"][2]], abs=1e-4)


def test_return_to_go_falls_by_the_training_kind_of_reward(runs):
    """Three steps: the tokens that the policy sees are R, R - r_1, R - r_1 - r_2 over 1000, timesteps 0, 1, 2."""
    trained = randomised(runs / f"{ENV}__dt__1/policy.pt")
    seen, act = [], trained.policy.act

    def listen(rtg, obs, a, timestep, valid):
        seen.append((rtg[0, -1].item(), timestep[0, -1].item(), int(valid.sum())))
        return act(rtg, obs, a, timestep, valid)

    trained.policy.act = listen
    result = transfer.track(trained, np.array([1500.0]), np.array([4]), 3, "test")
    _, velocity, asked = by_hand(trained, 1500.0, 4, 1.0, 3)
    assert [x for x, _, _ in seen] == pytest.approx([x / 1000 for x in asked[:3]], abs=1e-6)
    assert [t for _, t, _ in seen] == [0, 1, 2] == [n - 1 for _, _, n in seen]
    assert result.lengths.tolist() == [3] and result.velocity[0] == pytest.approx(velocity, abs=1e-5)


QUICK = "--device cpu --precision fp32 --rollouts 2 --calibration-rollouts 1".split()


def test_command_line_with_budgets_and_further_checkpoints(runs, run_main):
    checkpoint, other = (runs / f"{ENV}__{name}__1/policy.pt" for name in ("dt", "train_qalign_dt"))
    compare = ["--compare", checkpoint, other]
    argv = ["--env", ENV, "--runs-dir", runs, "--exp-name", "dt", "--budgets", 2, 3, *compare, *QUICK]
    code, out, err = run_main(transfer, *argv)
    assert code == 0, err
    result = json.loads((checkpoint.parent / "transfer.json").read_text())
    assert result["steps"] == 200 and (result["v_min"], result["v_max"]) == (0.075, 3.0)
    assert [one["budget"] for one in result["budgets"]] == [2, 3] and len(result["compare"]) == 2
    for one in result["budgets"]:
        assert [row["velocity"] for row in one["velocities"]] == list(transfer.HELD_OUT)
        for row in one["velocities"]:
            assert row["rtg"] == pytest.approx(
                float(transfer.rtg_of(row["velocity"], (0.075, 3.0), (one["rtg_min"], one["rtg_max"])))
            )
            assert row["return_mean"] <= row["return_max"] <= 0 and row["tracking_error"] > 0
        assert one["return_mean"] == pytest.approx(np.mean([row["return_mean"] for row in one["velocities"]]))
        for curve in one["calibration"]:
            assert curve["best_rtg"] == curve["rtg"][int(np.argmax(curve["return_mean"]))]
    same, another = result["compare"]
    assert same["budgets"] == result["budgets"]  # the same policy, the same episodes
    assert another["checkpoint"] == str(other) and another["lambda_e"] > 0 and result["lambda_e"] == 0
    assert another["budgets"] != result["budgets"]
    rows = list(csv.DictReader(open(checkpoint.parent / "transfer.csv")))
    assert len(rows) == 3 * 2 * 5 and {row["budget"] for row in rows} == {"2", "3"}
    assert (checkpoint.parent / "transfer.png").read_bytes()[:4] == b"\x89PNG" and "tracking error" in out
    assert not list(runs.rglob("*.tmp"))


def test_measured_episodes_are_not_those_of_the_calibration(runs, monkeypatch):
    used = []
    real = transfer.track
    monkeypatch.setattr(
        transfer, "track", lambda t, rtg, seeds, *rest: used.append(set(seeds)) or real(t, rtg, seeds, *rest)
    )
    args = transfer.Args(rollouts=3, calibration_rollouts=2, calibration_budget=2)
    transfer.transfer(randomised(runs / f"{ENV}__dt__1/policy.pt"), np.array([1.0]), (0.075, 3.0), 5, args)
    assert len(used) == 2 and len(used[0]) == 2 and len(used[1]) == 3 and not used[0] & used[1]


def test_extended_has_1000_steps_and_velocities_1_to_12(runs, run_main):
    checkpoint = runs / f"{ENV}__dt__1/policy.pt"
    argv = ["--checkpoint", checkpoint, "--extended", "--calibration-budget", 2, "--rollouts", 1, *QUICK[:4]]
    code, _, err = run_main(transfer, *argv, "--calibration-rollouts", 1)
    assert code == 0, err
    result = json.loads((checkpoint.parent / "transfer_extended.json").read_text())
    assert result["steps"] == 1000 and (result["v_min"], result["v_max"]) == (1.0, 12.0)
    assert [row["velocity"] for row in result["budgets"][0]["velocities"]] == list(range(1, 13))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--checkpoint", "HOPPER"], "a policy of hopper; HalfCheetah-Vel needs one of halfcheetah"),
        (["--compare", "HOPPER"], "a policy of hopper"),
        (["--calibration-budget", 1], "a calibration budget of 1: at least 2"),
        (["--budgets", 40, 0], "a calibration budget of 0: at least 2"),
        (["--velocities", 1.0, -0.5], "--velocities -0.5: a target velocity must be finite and not negative"),
        (["--velocities", "nan"], "--velocities nan"),
        (["--rollouts", 0], "--rollouts and --calibration-rollouts must be at least 1"),
        (["--calibration-width", 0], "--calibration-width 0: must be positive"),
        (
            ["--env", "halfcheetah-medium-v2", "--checkpoint", "CHEETAH"],
            "was trained on --env halfcheetah-medium-expert-tiny",
        ),
        (["--checkpoint", "missing.pt"], "missing.pt: no such checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(flags, message, runs, run_main):
    names = {"HOPPER": runs / "hopper-medium-tiny__dt__1/policy.pt", "CHEETAH": runs / f"{ENV}__dt__1/policy.pt"}
    before = sorted(runs.rglob("*"))
    flags = [names.get(x, x) for x in flags]
    where = [] if "--checkpoint" in flags else ["--checkpoint", names["CHEETAH"]]
    code, _, err = run_main(transfer, *where, *flags, "--device", "cpu")
    assert code == 2 and err.startswith("error: ") and message in err and len(err.splitlines()) == 1
    assert sorted(runs.rglob("*")) == before
