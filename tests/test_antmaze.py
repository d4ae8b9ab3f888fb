"""AntMaze: D4RL's model, maze and episode (the d4rl package is the oracle), the reader's cut at the first success."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import gymnasium
import h5py
import mujoco
import numpy as np
import prepare
import pytest
import qalign_mazes
import torch
from conftest import TINY1, TINY2, data_of, task_of, write_hdf5

import evaluate_alignment as stage3
import pretrain_q as stage1
import train_qalign_dt as stage2

SIZES = ["umaze", "medium", "large"]


def ant_maze(size: str):
    """The environment as its class makes it, with model, data and goal."""
    return stage3.make_env(f"qalign_mazes:AntMaze-{size}-v0").unwrapped


# ---- the environment ----


@pytest.mark.parametrize("size, x, y", [("umaze", 0, 8), ("medium", 20, 20), ("large", 32, 24)])
def test_goals_and_starts_are_drawn_from_the_episodes_seed(size, x, y):
    """The goal's range is D4RL's; the start lies around the origin, its quaternion not normalised."""
    env = ant_maze(size)
    goals, starts = [], []
    for seed in range(300):
        starts.append(env.reset(seed=seed)[0])
        goals.append(env.goal)
    low, high = np.min(goals, axis=0), np.max(goals, axis=0)
    assert (low >= [x, y]).all() and (high <= [x + 1.5, y + 1.5]).all() and (high - low > 1.3).all()
    positions = np.array(starts)[:, :15] - env.model.qpos0
    assert np.abs(positions).max() <= 0.1 and positions.std(axis=0) == pytest.approx(0.2 / 12**0.5, rel=0.15)
    assert np.array(starts)[:, 15:].std() == pytest.approx(0.1, rel=0.05)
    again = env.reset(seed=7)[0]
    assert (again == starts[7]).all() and (env.goal == goals[7]).all()
    assert env.observation_space.shape == again.shape == (29,) and env.action_space.shape == (8,)
    for seed in (0, 7):  # the draws that every recorded AntMaze score began with, in their order
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
        goal = np.array([x, y]) + rng.uniform(0, 1, 2) + rng.uniform(0, 0.5, 2)
        np.testing.assert_array_equal(goals[seed], goal)
        qpos = env.model.qpos0 + rng.uniform(-0.1, 0.1, 15)
        np.testing.assert_array_equal(starts[seed], np.concatenate([qpos, 0.1 * rng.standard_normal(14)]))


def test_an_episode_ends_with_reward_1_within_half_a_metre_of_the_goal():
    env, simulation = ant_maze("umaze"), stage3.simulate(task_of("antmaze-umaze-v2"), [3, 4])
    env.reset(seed=4)
    inner = simulation.envs[1].unwrapped
    np.testing.assert_array_equal(inner.goal, env.goal)
    for distance, reward in ((0.6, 0.0), (0.4, 1.0)):
        for one in (env, inner):
            one.data.qpos[:2], one.data.qvel[:] = one.goal + [distance, 0], 0
        _, got, terminated, truncated, _ = env.step(np.zeros(8))
        assert (got, terminated, truncated) == (reward, reward == 1, False)
        _, rewards, ends, _ = simulation.step(np.arange(2), np.zeros((2, 8)))
        assert rewards.tolist() == [0.0, reward] and ends.tolist() == [False, reward == 1]


@pytest.mark.parametrize("size", SIZES)
def test_rollouts_step_the_environment_itself(size):
    """Bit for bit, whichever of the simulations are still alive."""
    simulation = stage3.simulate(task_of(f"antmaze-{size}{'-play' * (size != 'umaze')}-v2"), [5, 6])
    env = ant_maze(size)
    np.testing.assert_array_equal(simulation.observe([1])[0], env.reset(seed=6)[0])
    rng = np.random.default_rng(0)
    for t in range(100):
        actions, alive = rng.uniform(-1, 1, (2, 8)), np.arange(2) if t < 50 else np.array([1])
        observations, rewards, ends, velocity = simulation.step(alive, actions[alive])
        before = env.data.qpos[0]
        expected, reward, terminated, _, _ = env.step(actions[1])
        np.testing.assert_array_equal(observations[-1], expected)
        assert (rewards[-1], ends[-1]) == (reward, terminated) and len(observations) == len(alive)
        assert velocity[-1] == (env.data.qpos[0] - before) / 0.1
        np.testing.assert_array_equal(simulation.qpos[1], env.data.qpos)


def test_an_ant_cannot_pass_a_wall():
    """Pushed for ten seconds through the wall of the start's cell, to the left, it stays in the maze."""
    env = ant_maze("umaze")
    env.reset(seed=0)
    for _ in range(100):
        env.data.xfrc_applied[1, 0] = -100.0
        env.step(np.zeros(8))
    assert -2.0 <= env.data.qpos[0] < -0.5


# ---- the reader ----


def write_walk(path: Path, xs, terminals, timeouts):
    """An AntMaze file whose ant is at x, y = 0; reward 1 where terminal."""
    N = len(xs)
    observations, actions = np.zeros((N, 29), np.float32), np.zeros((N, 8), np.float32)
    observations[:, 0] = xs
    terminals = np.array(terminals, bool)
    return write_hdf5(path, observations, actions, terminals.astype(np.float32), terminals, np.array(timeouts, bool))


def test_a_trajectory_is_cut_at_its_first_success(tmp_path, capsys):
    """D4RL's pattern: terminal on every step near the goal, also when the ant has left it and comes back."""
    xs = [0, 0.5, 1.0, 1.5, 1.0, 1.5] + [0, 0.5, 0.4] + [8, 8.5, 8.4, 8.5] + [0.1, 0.2, 0.3, 0.4, 0.3]
    near = [0, 0, 1, 1, 0, 1] + [0, 0, 0] + [0, 1, 1, 1] + [0, 0, 1, 0, 1]
    # time is up after the first and the second; the third only jumps away (umaze-diverse); the fourth is incomplete
    timeouts = [0, 0, 0, 0, 0, 1] + [0, 0, 1] + [0, 0, 0, 0] + [0, 0, 0, 0, 0]
    path = write_walk(tmp_path / "walk.hdf5", xs, near, timeouts)
    data = data_of("antmaze-medium-play-test", path)
    assert data.lengths.tolist() == [3, 3, 2, 3] and data.returns.tolist() == [1, 0, 1, 1]
    np.testing.assert_allclose(data.observations[:, 0], [0, 0.5, 1.0, 0, 0.5, 0.4, 8, 8.5, 0.1, 0.2, 0.3])
    assert data.terminals.tolist() == [0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1]
    assert f"{path}: 7 of 18 transitions come after a first success: left out" in capsys.readouterr().out
    assert data.returns_to_go().tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1]


def test_an_incomplete_trajectory_without_success_is_dropped(tmp_path):
    path = write_walk(tmp_path / "walk.hdf5", [0, 0.5, 1.0, 5.0, 5.5], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0])
    data = data_of("antmaze-umaze-test", path)
    assert data.lengths.tolist() == [2] and data.returns.tolist() == [1]


# ---- end to end ----


def test_antmaze_from_the_critic_to_the_success_rate(tmp_path, run_main, antmaze_file, monkeypatch):
    name = "antmaze-umaze-tiny"
    path = shutil.copy(antmaze_file, tmp_path)
    with h5py.File(path, "a") as f:
        f.attrs["max_episode_steps"] = 6
    data = ["--env", name, "--dataset-path", path, "--runs-dir", tmp_path]
    assert run_main(stage1, *data, *TINY1)[0] == 0
    code, out, err = run_main(stage2, *data, *TINY2, "--eval-every", 30)
    assert code == 0, err
    folder = tmp_path / f"{name}__train_qalign_dt__1"
    header, first, *_ = (folder / "evaluations.csv").read_text().splitlines()
    assert header == "step,score_at_0.8,score_at_0.9,score_at_1,score_at_100" and first == "0,0,0,0,0"
    critic = torch.load(tmp_path / f"{name}__pretrain_q__1" / "critic.pt", weights_only=True)
    resume, policy = (torch.load(folder / file, weights_only=True) for file in ("resume.pt", "policy.pt"))
    config = policy["config"]
    assert [config[k] for k in ("sigma_e", "lambda_e", "delta_rtg", "half_normal")] == [5.0, 100.0, 1.0, True]
    assert critic["config"]["method"] == "iql" and resume["progress"]["q_scale"] == critic["report"]["q_abs_mean"] > 0
    real = stage3.sweep
    monkeypatch.setattr(stage3, "sweep", lambda trained, x, n, *rest: real(trained, x, n // 100, *rest))  # 1 of the 100
    code, out, err = run_main(stage3, "--env", name, "--runs-dir", tmp_path)
    result = json.loads((folder / "high_targets.json").read_text())
    assert code == 0 and result["rollouts"] == 100 and not (folder / "alignment.json").exists(), err
    assert [row["target_return"] for row in result["high_targets"]] == [0.8, 0.9, 1.0, 100.0]
    code, _, err = run_main(stage3, "--env", name, "--runs-dir", tmp_path, "--trajectories")
    assert code == 2 and err.count("\n") == 1 and "both need the RTG sweep" in err


def test_the_score_is_100_times_the_success_rate(monkeypatch):
    """A policy that stands still, and goals that lie at the start of every second episode."""
    task, zeros = replace(task_of("antmaze-umaze-v2"), horizon=3), torch.zeros(29)
    made = type(ant_maze("umaze"))
    real = made.reset

    def reset(self, *, seed=None, options=None):
        found = real(self, seed=seed)
        self.goal = np.array([0.0, 0.0]) if len(goals) % 2 else self.goal
        goals.append(self.goal)
        return found

    goals = []
    monkeypatch.setattr(made, "reset", reset)
    policy = stage3.Policy(29, 8, 8, 1, 1, 1000).eval()
    content = {"config": {"max_timestep": 1000}, "obs_mean": zeros, "obs_std": zeros + 1}
    rows, _ = stage3.mean_per_target(stage3.Trained(Path(), task, policy, content, 2), [1.0], 10, 1)
    assert rows[0]["score_mean"] == 50 and rows[0]["length_mean"] == 2


def test_names_decide_maze_and_horizon():
    for quality in prepare.MAZES:
        task, size = prepare.parse_env(f"antmaze-{quality}-v2"), quality.partition("-")[0]
        assert task["env_id"] == f"qalign_mazes:AntMaze-{size}-v0"
        assert task["horizon"] == (700 if size == "umaze" else 1000) and task["targets"] == (0.8, 0.9, 1.0, 100.0)
        stage3.make_env(task["env_id"])
        assert gymnasium.spec(f"AntMaze-{size}-v0").max_episode_steps == task["horizon"]  # for whoever makes it himself
    assert prepare.parse_env("hopper-medium-v2")["horizon"] == 1000


# ---- D4RL itself ----


@pytest.mark.oracle
@pytest.mark.parametrize("size", SIZES)
def test_model_and_steps_are_d4rls(size, tmp_path, monkeypatch):
    """Compiled from D4RL's own ant.xml with its walls: the same fields of the model, the same 300 random steps."""
    if importlib.util.find_spec("d4rl") is None:
        pytest.skip("the d4rl package is not installed: pip install -r tests/requirements-oracle.txt")
    import xml.etree.ElementTree as ET

    monkeypatch.setitem(sys.modules, "mujoco_py", mock.MagicMock())  # imported, and unused as long as no env is made
    import d4rl
    import gym

    maze_env = importlib.import_module("d4rl.locomotion.maze_env")
    spec = gym.spec(f"antmaze-{size}{'-play' * (size != 'umaze')}-v2")
    kwargs = spec.kwargs
    maze, scaling = kwargs["maze_map"], kwargs["maze_size_scaling"]
    assert (spec.max_episode_steps, kwargs["v2_resets"], scaling) == (700 if size == "umaze" else 1000, True, 4.0)
    names = {1: "1", 0: "0", maze_env.RESET: "r", maze_env.GOAL: "g"}
    assert tuple("".join(names[cell] for cell in row) for row in maze) == qalign_mazes.ANT_MAPS[size]

    tree = ET.parse(Path(d4rl.__file__).parent / "locomotion/assets/ant.xml")
    start = next((i, j) for i, row in enumerate(maze) for j, cell in enumerate(row) if cell == maze_env.RESET)
    for i, row in enumerate(maze):
        for j, cell in enumerate(row):
            if cell == 1:
                place = f"{(j - start[1]) * scaling} {(i - start[0]) * scaling} {0.5 * scaling / 2}"
                half = f"{scaling / 2} {scaling / 2} {0.5 * scaling / 2}"
                box = dict(type="box", pos=place, size=half, contype="1", conaffinity="1", material="")
                ET.SubElement(tree.find(".//worldbody"), "geom", box)
    tree.write(tmp_path / "maze.xml")
    theirs, env = mujoco.MjModel.from_xml_path(str(tmp_path / "maze.xml")), ant_maze(size)
    for name in (
        "geom_type",
        "geom_size",
        "geom_pos",
        "geom_contype",
        "geom_conaffinity",
        "geom_solimp",
        "geom_solref",
    ):
        np.testing.assert_array_equal(getattr(env.model, name), getattr(theirs, name), name)
    for name in ("geom_friction", "geom_margin", "geom_condim", "body_mass", "body_inertia", "jnt_range", "qpos0"):
        np.testing.assert_array_equal(getattr(env.model, name), getattr(theirs, name), name)
    for name in ("dof_armature", "dof_damping", "actuator_trnid"):
        np.testing.assert_array_equal(getattr(env.model, name), getattr(theirs, name), name)
    for name in ("timestep", "integrator", "solver", "iterations", "tolerance", "impratio", "cone"):
        assert getattr(env.model.opt, name) == getattr(theirs.opt, name), name
    np.testing.assert_array_equal(env.model.opt.gravity, theirs.opt.gravity)

    data, rng = mujoco.MjData(theirs), np.random.default_rng(0)
    env.reset(seed=1)
    data.qpos[:], data.qvel[:] = env.data.qpos, env.data.qvel
    mujoco.mj_forward(theirs, data)
    for _ in range(300):
        action = rng.uniform(-1, 1, 8)
        data.ctrl[:] = 30 * action  # D4RL's torques are in the control, here in the gear
        mujoco.mj_step(theirs, data, nstep=5)
        observation = env.step(action)[0]
        np.testing.assert_array_equal(observation, np.concatenate([data.qpos, data.qvel]))
