"""HalfCheetah-Vel: its rewards, the bookkeeping of the return-to-go, the calibration, the command line, the video."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from conftest import task_of, tree
from PIL import Image

import train_qalign_dt
import transfer_cheetah_vel as transfer

ENV, STEPS = "halfcheetah-medium-expert-tiny", 16


class HalfCheetahVel(gymnasium.Wrapper):
    """The benchmark's task around Gymnasium's HalfCheetah-v4: reward -|v_t - v| - 0.05 |a|^2."""

    def __init__(self, target):
        super().__init__(transfer.make_env("HalfCheetah-v4"))
        self.target = target

    def step(self, action):
        observation, _, terminated, truncated, info = self.env.step(action)
        reward = -abs(info["x_velocity"] - self.target) - 0.05 * float(np.sum(np.square(action)))
        return observation, reward, terminated, truncated, info


def save_policy(path, env=ENV, seed=0, lambda_e=0.0):
    """A checkpoint of stage 2 with random weights, large enough to move the body in many ways."""
    task = task_of(env)
    config = dict(embed_dim=16, n_layer=1, n_head=2, max_timestep=1000, context_len=4, conv=lambda_e > 0)
    config |= dict(max_push=0.3, action_noise=0.3, dropout=0.0, alignment="one-sided", average=0.0)
    config |= dict(lambda_e=lambda_e, state_loss=lambda_e > 0, seed=1, total_steps=5, critic_width=8)
    config |= dict(eval_context_len=0, sigma_e=1.0, delta_rtg=0.5, update_q=True, q_noise=0.0)
    torch.manual_seed(seed)
    policy = transfer.make_policy(task, config, bf16=False)
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.4)
    content = dict(stage="train_qalign_dt", task=vars(task), config=config, gamma=0.99, step=5)
    content |= dict(obs_mean=torch.full((task.obs_dim,), 0.1), obs_std=torch.full((task.obs_dim,), 1.5))
    content |= dict(episode_returns=torch.tensor([-50.0, 900.0], dtype=torch.float64))
    path.parent.mkdir(parents=True, exist_ok=True)
    train_qalign_dt.save_checkpoint(path, content | dict(policy=policy.state_dict(), critic=None))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The checkpoints of a DT, of a Q-Align DT, and of a policy for Hopper."""
    folder = tmp_path_factory.mktemp("runs")
    dt = save_policy(folder / f"{ENV}__dt__1" / "policy.pt")
    aligned = save_policy(folder / f"{ENV}__train_qalign_dt__1" / "policy.pt", seed=1, lambda_e=0.5)
    hopper = save_policy(folder / "hopper-medium-tiny__dt__1" / "policy.pt", env="hopper-medium-tiny")
    return SimpleNamespace(folder=folder, dt=dt, aligned=aligned, hopper=hopper)


@pytest.fixture
def trained(runs):
    return transfer.load_policy(runs.dt, "fp32", torch.device("cpu"))


@pytest.fixture
def command(monkeypatch, run_main):
    """Run the script with a command line, in short episodes; returns exit code, stdout, stderr."""
    monkeypatch.setattr(transfer, "STEPS", STEPS)
    monkeypatch.setattr(transfer, "EXTENDED_STEPS", STEPS + 10)
    return lambda *argv: run_main(transfer, *argv, "--device", "cpu")


QUICK = "--precision fp32 --rollouts 2 --calibration-rollouts 1 --budgets 2".split()


def test_tasks_are_the_benchmarks():
    assert len(transfer.GRID) == 40 and transfer.GRID[0] == 0.075 and transfer.GRID[-1] == 3.0
    assert set(transfer.HELD_OUT) <= set(transfer.GRID) and len(transfer.HELD_OUT) == 5
    assert transfer.EXTENDED == tuple(range(1, 13)) and (transfer.STEPS, transfer.EXTENDED_STEPS) == (200, 1000)
    args = transfer.Args()
    assert args.budgets == (40,) and args.calibration == ("two-point",) and args.velocities == "held-out"


@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "HalfCheetah-v5"])
def test_the_simulator_equals_gymnasium(env_id):
    """Three episodes in lockstep: all that a step returns, to 1e-10."""
    env = transfer.make_env(env_id)
    simulator, rng = transfer.simulate(SimpleNamespace(env_id=env_id), [4, 5, 6]), np.random.default_rng(0)
    actions = rng.uniform(-0.3, 0.3, (40, 3, 6))
    got = [(simulator.observe(np.arange(3)), *simulator.step(np.arange(3), action)) for action in actions]
    for i in range(3):
        observation, _ = env.reset(seed=4 + i)
        for t in range(40):
            before, after, reward, ended, velocity = (x[i] for x in got[t])
            np.testing.assert_allclose(before, observation, rtol=0, atol=1e-10)
            observation, *expected, info = env.step(actions[t, i])
            np.testing.assert_allclose(after, observation, rtol=0, atol=1e-10)
            assert (reward, velocity) == pytest.approx((expected[0], info["x_velocity"]), abs=1e-10) and not ended


def test_training_reward_by_hand():
    velocity, action = np.array([2.0, -1.0]), np.array([[1.0, -1.0], [0.0, 0.5]])
    assert transfer.training_reward(velocity, action).tolist() == pytest.approx([2.0 - 0.1, -1.0 - 0.0125])


def test_return_velocity_and_tracking_error_by_hand(monkeypatch):
    cost = np.array([[-0.1, -0.2, 0.0], [0.0, 0.0, -0.3], [0.0, 0.0, 0.0], [-0.1, -0.1, -0.1]])
    v = np.array([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0], [0.0, -1.0, 0.5], [0.5, 0.5, 0.5]])
    requested = []

    def rollout(trained, targets, seeds, horizon, what, reward_function):
        requested.append((targets.tolist(), seeds.tolist(), horizon, reward_function))
        return transfer.Rollouts(None, np.full(4, 3), v + cost, v, None, None, None)

    monkeypatch.setattr(transfer, "rollout", rollout)
    got = transfer.episodes(None, np.array([2.0, 0.5]), np.array([100.0, 200.0]), np.array([7, 9]), 3, "test")
    returns, realised, errors = (x.tolist() for x in got)
    assert returns == [pytest.approx([-(1 + 0 + 1) - 0.3, -0.3]), pytest.approx([-(0.5 + 1.5 + 0), -0.3])]
    assert realised == [[2.0, 2.0], [pytest.approx(-0.5 / 3), 0.5]]
    assert errors == [[pytest.approx(2 / 3), 0.0], [pytest.approx(2 / 3), 0.0]]
    assert requested == [([100.0, 100.0, 200.0, 200.0], [7, 9, 7, 9], 3, transfer.training_reward)]


def test_two_point_rtg_is_linear_through_the_best_candidates():
    ends = {"velocity": 0.075, "best_rtg": 100.0}, {"velocity": 3.0, "best_rtg": 2000.0}
    assert transfer.two_point([0.075, 3.0], *ends).tolist() == [100.0, pytest.approx(2000.0)]
    assert float(transfer.two_point((0.075 + 3.0) / 2, *ends)) == pytest.approx(1050.0)
    assert float(transfer.two_point(4.0, *ends)) == pytest.approx(100 + 1900 * (4.0 - 0.075) / 2.925)


def test_monotone_rtg_by_hand():
    low = {"rtg": [0.0, 1000.0, 2000.0], "velocity_mean": [0.0, 0.5, 0.3]}
    high = {"rtg": [500.0, 3000.0, 4000.0], "velocity_mean": [0.1, 2.0, 2.0]}
    # 0.5 and 0.3 at 1000 and 2000 fall: one step of 0.4, its middle at 1500; another of 2.0 at 3500
    v = [-1.0, 0.0, 0.1, 0.25, 0.4, 1.2, 2.0, 5.0]
    expected = [0.0, 0.0, 500.0, 1000.0, 1500.0, 2500.0, 3500.0, 3500.0]
    assert transfer.monotone(v, low, high) == pytest.approx(expected)
    constant = {"rtg": [0.0, 1000.0], "velocity_mean": [1.0, 1.0]}  # a policy that ignores its RTG
    assert transfer.monotone([0.5, 2.0], constant, constant).tolist() == [500.0, 500.0]


def test_monotone_rtg_follows_a_bend_that_the_line_cannot():
    grids = np.linspace(-1000, 2000, 40), np.linspace(1000, 5000, 40)
    ends = [
        {"velocity": v, "best_rtg": rtg, "rtg": grid.tolist(), "velocity_mean": np.sqrt(grid.clip(0) / 1000).tolist()}
        for v, rtg, grid in zip((0.1, 2.0), (10.0, 4000.0), grids)
    ]
    v = np.array([0.5, 1.0, 1.5])
    assert np.sqrt(transfer.monotone(v, *ends) / 1000) == pytest.approx(v, abs=0.05)
    assert np.abs(np.sqrt(transfer.two_point(v, *ends) / 1000) - v).max() > 0.25


def by_hand(trained, rtg, seed, target, steps):
    """One episode through the wrapped Gymnasium environment: return, mean velocity, and the raw RTG of every step."""
    env, content = HalfCheetahVel(target), trained.content
    K, mean, std = content["config"]["context_len"], content["obs_mean"], content["obs_std"]
    observation, _ = env.reset(seed=int(seed))
    rtgs, obs, act, total, velocity = [rtg], [], [], 0.0, []
    for t in range(steps):
        obs.append((torch.as_tensor(observation, dtype=torch.float32) - mean) / std)
        act.append(torch.zeros(6))
        k, times = slice(max(0, t + 1 - K), t + 1), torch.arange(t + 1)[max(0, t + 1 - K) :][None]
        window = torch.tensor(rtgs[k])[None].float() / 1000, torch.stack(obs[k])[None], torch.stack(act[k])[None]
        with torch.no_grad():
            act[-1] = trained.policy(*window, times, torch.ones_like(times).bool())[0][0, -1]
        action = act[-1].numpy().astype(np.float64)
        observation, reward, _, _, info = env.step(action)
        total += reward
        velocity.append(info["x_velocity"])
        rtgs.append(rtgs[-1] - (info["x_velocity"] - 0.05 * np.square(action).sum()))
    return total, np.mean(velocity), rtgs


@pytest.mark.parametrize("v, grid", [(0.5, [-1000.0, 500.0, 2000.0]), (3.0, [1500.0, 3000.0, 4500.0])])
def test_calibration_rolls_out_the_wrapped_environment_and_picks_the_best(trained, v, grid):
    seeds, steps = np.array([3, 8]), 20  # later, rounding in float32 has grown to what the RTG changes
    end = transfer.calibrate(trained, v, 3, 1500.0, seeds, steps)
    assert end["rtg"] == grid and end["velocity"] == v
    expected = np.array([[by_hand(trained, rtg, seed, v, steps)[:2] for seed in seeds] for rtg in grid]).mean(axis=1)
    assert end["return_mean"] == pytest.approx(expected[:, 0], abs=1e-3)
    assert end["velocity_mean"] == pytest.approx(expected[:, 1], abs=1e-4)
    assert end["best_rtg"] == grid[int(np.argmax(expected[:, 0]))]
    assert np.ptp(expected[:, 0]) > 0.01  # the RTG matters
    short = trained._replace(task=replace(trained.task, horizon=200))  # a velocity returns a fifth of 1,000 steps'
    assert transfer.calibrate(short, v, 3, 1500.0, seeds, 1)["rtg"] == [200 * v + x for x in (-1500, 0, 1500)]


def test_return_to_go_falls_by_the_training_kind_of_reward(trained):
    """Three steps: the tokens that the policy sees are R, R - r_1, R - r_1 - r_2 over 1000, timesteps 0, 1, 2."""
    seen, act = [], trained.policy.act

    def listen(rtg, obs, a, timestep, valid):
        seen.append((rtg[0, -1].item(), timestep[0, -1].item(), int(valid.sum())))
        return act(rtg, obs, a, timestep, valid)

    trained.policy.act = listen
    got = transfer.episodes(trained, np.array([1.0]), np.array([1500.0]), np.array([4]), 3, "test")
    total, velocity, rtgs = by_hand(trained, 1500.0, 4, 1.0, 3)
    assert [x for x, _, _ in seen] == pytest.approx([x / 1000 for x in rtgs[:3]], abs=1e-7)
    assert [t for _, t, _ in seen] == [0, 1, 2] == [n - 1 for _, _, n in seen]
    assert [x.item() for x in got][:2] == pytest.approx([total, velocity], abs=1e-5)


def test_episodes_of_the_test_are_not_those_of_the_calibration(trained, monkeypatch):
    used, real = [], transfer.rollout
    monkeypatch.setattr(
        transfer, "rollout", lambda t, rtg, seeds, *rest: used.append(seeds) or real(t, rtg, seeds, *rest)
    )
    args = transfer.Args(rollouts=3, calibration_rollouts=2, budgets=(2,), calibration=("two-point", "monotone"))
    transfer.transfer(trained, np.array([1.0]), (0.075, 3.0), 2, args)
    assert [len(seeds) for seeds in used] == [4, 4, 3, 3]  # two candidates at each end, then both calibrations
    low, high, line, curve = (set(seeds) for seeds in used)
    assert low == high and line == curve and len(low) == 2 and len(line) == 3 and not low & line


def test_command_line_with_budgets_both_calibrations_and_further_checkpoints(runs, command):
    argv = ["--env", ENV, "--runs-dir", runs.folder, "--exp-name", "dt", "--compare", runs.dt, runs.aligned]
    code, out, err = command(*argv, *QUICK, "--budgets", 2, 3, "--calibration", "two-point", "monotone")
    assert code == 0, err
    result = json.loads((runs.dt.parent / "transfer.json").read_text())
    assert result["steps"] == STEPS and result["method"] == "DT" and result["data_returns"] == [-50.0, 900.0]
    kinds = [(budget, name) for budget in (2, 3) for name in ("two-point", "monotone")]
    assert [(one["budget"], one["calibration"]) for one in result["results"]] == kinds
    for one in result["results"]:
        v = [row["velocity"] for row in one["velocities"]]
        assert v == list(transfer.HELD_OUT) and [end["velocity"] for end in one["ends"]] == [0.075, 3.0]
        rtg = {"two-point": transfer.two_point, "monotone": transfer.monotone}[one["calibration"]](v, *one["ends"])
        assert [row["rtg"] for row in one["velocities"]] == pytest.approx(rtg.tolist())
        for row in one["velocities"]:
            assert row["return_mean"] <= row["return_max"] <= 0 and row["tracking_error"] > 0
            assert row["standing_still"] == pytest.approx(-STEPS * row["velocity"])
            off = abs(row["velocity_mean"] - row["velocity"])
            assert off - 1e-9 <= row["velocity_error"] <= off + row["velocity_std"] + 1e-9
            assert row["velocity_error"] <= row["tracking_error"] + 1e-9
        for mean in transfer.MEANS:
            assert one[mean] == pytest.approx(np.mean([row[mean] for row in one["velocities"]]))
        for end in one["ends"]:
            assert len(end["rtg"]) == one["budget"] and end["best_rtg"] == end["rtg"][np.argmax(end["return_mean"])]
    line, curve = ([row["rtg"] for row in one["velocities"]] for one in result["results"][:2])
    assert line != curve and result["results"][0]["ends"] == result["results"][1]["ends"]
    same, another = result["compare"]
    assert same["results"] == result["results"]  # the same policy, the same episodes
    assert another["method"] == "Q-Align DT" and another["results"] != result["results"]
    with open(runs.dt.parent / "transfer.csv") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 3 * 4 * 5 and {(int(row["budget"]), row["calibration"]) for row in rows} == set(kinds)
    assert [float(row["rtg"]) for row in rows[:5]] == line
    assert (runs.dt.parent / "transfer.png").read_bytes()[:4] == b"\x89PNG"
    assert "two-point: mean return" in out and "monotone: mean return" in out
    assert f"(standing still {-STEPS * np.mean(transfer.HELD_OUT):.1f})" in out and "0.225" in out
    assert not list(runs.folder.rglob("*.tmp"))


def test_a_baselines_policy_is_transferred_too(runs, command, tmp_path):
    """Beside a DT, by the network that its own script defines."""
    import train_radt

    task, content = task_of(ENV), torch.load(runs.dt, weights_only=True)
    content["config"] = dict(embed_dim=16, n_layer=1, n_head=2, max_timestep=1004, context_len=4, seed=1, total_steps=5)
    content["config"] |= dict(seqra=True, stepra=True, alpha=True, rtg_tokens=False, method="RADT")
    content |= dict(stage="train_radt", policy=train_radt.make_policy(task, content["config"], False).state_dict())
    train_qalign_dt.save_checkpoint(tmp_path / "policy.pt", content)
    code, _, err = command("--checkpoint", tmp_path / "policy.pt", "--compare", runs.dt, *QUICK)
    assert code == 0, err
    result = json.loads((tmp_path / "transfer.json").read_text())
    assert (result["method"], result["compare"][0]["method"]) == ("RADT", "DT")


@pytest.mark.parametrize(
    "flags, stem, steps, velocities",
    [
        (["--extended"], "transfer_extended", STEPS + 10, range(1, 13)),
        (["--extended", "--velocities", 2, 0.5], "transfer_extended", STEPS + 10, (2.0, 0.5)),
        (["--velocities", "grid"], "transfer", STEPS, transfer.GRID),
        (["--velocities", 1.5], "transfer", STEPS, (1.5,)),
    ],
)
def test_velocities_and_steps(flags, stem, steps, velocities, runs, command):
    own = save_policy(runs.folder / "own" / "policy.pt")
    code, _, err = command("--checkpoint", own, *flags, *QUICK, "--rollouts", 1)
    assert code == 0, err
    result = json.loads((own.parent / f"{stem}.json").read_text())
    (one,) = result["results"]
    assert result["steps"] == steps and [row["velocity"] for row in one["velocities"]] == list(velocities)
    assert [end["velocity"] for end in one["ends"]] == ([1.0, 12.0] if "--extended" in flags else [0.075, 3.0])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--checkpoint", "HOPPER"], "is a policy of Hopper-v4; HalfCheetah-Vel needs one of HalfCheetah"),
        (["--compare", "HOPPER"], "is a policy of Hopper-v4"),
        (["--env", "halfcheetah-medium-v2"], "was trained on --env halfcheetah-medium-expert-tiny"),
        (["--checkpoint", "", "--runs-dir", "RUNS", "--env", "halfcheeta-mini"], f"; runs there: {ENV}__dt__1, "),
        (["--checkpoint", "missing.pt"], "missing.pt: No such file"),
        (["--budgets", 40, 1], "--budgets 1: must be between 2"),
        (["--velocities", 1.0, -0.5], "--velocities -0.5: must be between 0"),
        (["--velocities", "nan"], "--velocities nan: must be between 0"),
        (["--velocities"], "name at least one"),
        (["--calibration"], "name at least one"),
        (["--calibration", "cubic"], "invalid choice 'cubic'"),
        (["--rollouts", 0], "--rollouts 0: must be between 1"),
        (["--calibration-rollouts", 0], "--calibration-rollouts 0: must be between 1"),
        (["--calibration-width", 0], "--calibration-width 0.0: must be between 1"),
        (["--video", 1.0, "nan"], "--video nan: must be between 0"),
        (["--seed", -1], "--seed -1: must be between 0"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(flags, message, runs, command):
    names, before = {"HOPPER": runs.hopper, "RUNS": runs.folder}, tree(runs.folder)
    where = [] if "--checkpoint" in flags else ["--checkpoint", runs.dt]
    code, out, err = command(*where, *(names.get(x, x) for x in flags))
    assert code == 2 and out == "" and message in " ".join(err.replace("│", "").split())
    assert err.startswith("error: ") and len(err.splitlines()) == 1 or err.startswith("╭")  # tyro's box
    assert tree(runs.folder) == before


def test_default_is_the_embedded_dataset(tmp_path, command):
    code, _, err = command("--runs-dir", tmp_path)
    assert code == 2 and f"no policy at {tmp_path}/halfcheetah-mini__train_qalign_dt__1/policy.pt" in err
    assert "; runs there: none\n" in err


class FakeRenderer:
    """Stands in for OpenGL: notes the positions that it is to draw."""

    def __init__(self):
        self.qpos = []

    def update_scene(self, data, camera):
        self.qpos.append(data.qpos.copy())

    def render(self):
        return np.full((200, 240, 3), 40, dtype=np.uint8)


def test_video_shows_the_calibrated_policy_once_per_velocity(runs, command, monkeypatch):
    renderer, drawn, rollout = FakeRenderer(), [], transfer.rollout

    def listen(*args, **options):
        if options.get("keep_qpos"):
            drawn.append((*args, options))
        return rollout(*args, **options)

    monkeypatch.setattr(transfer, "make_renderer", lambda env_id: renderer)
    monkeypatch.setattr(transfer, "rollout", listen)
    argv = ["--checkpoint", runs.aligned, "--compare", runs.dt, *QUICK, "--velocities", 1, "--calibration", "monotone"]
    code, out, err = command(*argv, "--video", 0.6, 1.8, 3)
    assert code == 0, err
    folder = runs.aligned.parent
    (one,) = json.loads((folder / "transfer.json").read_text())["results"]
    ((trained, rtg, seeds, steps, _, options),) = drawn
    assert trained.path == runs.aligned and options["reward_function"] is transfer.training_reward
    assert list(rtg) == pytest.approx(transfer.monotone([0.6, 1.8, 3.0], *one["ends"]).tolist())
    assert len(set(seeds)) == 1 and steps == STEPS
    picture = Image.open(folder / "transfer.gif")
    assert picture.size == (3 * 240, 200) and picture.n_frames > 2 and "transfer.gif" in out
    panels = np.hsplit(np.asarray(picture.convert("L")).astype(int), 3)
    assert np.abs(panels[0][:50] - panels[1][:50]).max() > 100  # another caption
    assert len(renderer.qpos) == 3 * STEPS // 2 and np.ptp([q[0] for q in renderer.qpos]) > 0.01  # the bodies move


def test_video_is_rendered_by_opengl(runs, command, monkeypatch):
    monkeypatch.setattr(transfer, "STEPS", 4)
    code, _, err = command("--checkpoint", runs.dt, *QUICK, "--velocities", 1, "--video", 0.6, 3)
    if code == 2 and "finds no OpenGL" in err:
        pytest.skip("no OpenGL on this machine (try MUJOCO_GL=egl)")
    assert code == 0, err
    picture = Image.open(runs.dt.parent / "transfer.gif")
    assert picture.size == (2 * 240, 200) and picture.info["duration"] == 100
    assert np.ptp(np.asarray(picture.convert("L"))[60:]) > 50  # there is something to see


def test_video_without_opengl_is_one_line_and_writes_nothing(runs, command, monkeypatch):
    import mujoco

    def no_opengl(*args):
        raise mujoco.FatalError("an OpenGL platform library has not been loaded into this process")

    monkeypatch.setattr(mujoco, "Renderer", no_opengl)
    before = tree(runs.folder)
    code, out, err = command("--checkpoint", runs.dt, "--video", 1.0)
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith("error: --video: MuJoCo finds no OpenGL here") and tree(runs.folder) == before


def test_the_whole_path_on_a_cut_of_halfcheetah_mini(command, run_main, tmp_path):
    """Data that come with the code -> stage 1 -> stage 2 -> calibration and transfer."""
    import pretrain_q

    root = Path(transfer.__file__).parent
    with h5py.File(root / "data/halfcheetah-mini.hdf5") as f, h5py.File(tmp_path / "cut.hdf5", "w") as cut:
        for key in f:
            cut[key] = f[key][:3000]
    common = ["--env", "halfcheetah-mini", "--dataset-path", tmp_path / "cut.hdf5", "--runs-dir", tmp_path]
    common += ["--device", "cpu", "--critic-width", 16]
    assert run_main(pretrain_q, *common, "--total-steps", 20)[0] == 0
    flags = ["--embed-dim", 16, "--total-steps", 20, "--eval-every", 0, "--precision", "fp32"]
    code, _, err = run_main(train_qalign_dt, *common, *flags)
    assert code == 0, err
    code, out, err = command("--env", "halfcheetah-mini", "--runs-dir", tmp_path, *QUICK, "--calibration", "monotone")
    assert code == 0 and "monotone: mean return" in out, err
    result = json.loads((tmp_path / "halfcheetah-mini__train_qalign_dt__1" / "transfer.json").read_text())
    assert result["method"] == "Q-Align DT" and "cut.hdf5" in result["trained_on"]["label"]
    returns = [f(result["data_returns"]) for f in (min, max)]
    assert returns == result["data_returns"] and -600 < returns[0] < returns[1] < 6000


def test_halfcheetah_mini_has_every_speed_and_each_return_means_one():
    """What its README says of it: 20 stretches of 200 steps or more at each speed, and steady episodes."""
    with h5py.File(Path(transfer.__file__).parent / "data/halfcheetah-mini.hdf5") as f:
        rewards, actions, attributes = f["rewards"][:], f["actions"][:], dict(f.attrs)
    velocity = (rewards + 0.1 * np.square(actions).sum(axis=1)).reshape(80, 5, 200).mean(axis=2)  # of each stretch
    assert (np.histogram(velocity, np.arange(0, 6, 0.5))[0] >= 20).all()
    assert np.abs(velocity - velocity.mean(axis=1, keepdims=True)).mean() < 0.2
    returns = rewards.reshape(80, 1000).sum(axis=1)
    assert np.corrcoef(returns, velocity[:, 0])[0, 1] > 0.95  # the first stretch already tells the return
    assert attributes["steady"] and attributes["policy_return"].max() > 5000 and returns.min() < 0
