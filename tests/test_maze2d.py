"""Maze2D: steps by hand, D4RL's printed rows and reference returns, the recipe of the data; and AntMaze's draws.

Numbers of steps are as printed, to their last digit: MuJoCo 4.0.0 and D4RL's 2.3.7 differ by 4e-14 per step, also at
walls, and processors by no more.
"""

from pathlib import Path

import collect_maze2d
import draw_maze2d as pictures
import gymnasium
import h5py
import mujoco
import numpy as np
import pytest
from collect_maze2d import Driver, collect, shortest_path
from conftest import call, tree
from gymnasium.utils.env_checker import check_env
from qalign_mazes import ANT_MAPS, BALL_MAPS, MAZE2D, cells, in_maze

import pretrain_q as stage1
import train_qalign_dt as stage2

NAMES = [*MAZE2D, *(f"AntMaze-{size}-v0" for size in ANT_MAPS)]


def make(name):
    return gymnasium.make(f"qalign_mazes:{name}")


def at(env, x, y, vx=0.0, vy=0.0):
    """The unwrapped environment, its ball put there."""
    mujoco.mj_resetData(env.model, env.data)
    env.data.qpos[:], env.data.qvel[:] = (x, y), (vx, vy)
    return env


@pytest.fixture(scope="module")
def umaze():
    return make("maze2d-umaze-v1").unwrapped


@pytest.fixture(scope="module")
def rows():
    """A small file's arrays."""
    return collect("maze2d-umaze-v1", 20_000, seed=0, progress=False)


# ---- the environments ----


@pytest.mark.parametrize("name", NAMES)
def test_gymnasium_makes_and_accepts_them(name):
    env = make(name)
    horizon = 700 if "AntMaze-umaze" in name else 1000 if "AntMaze" in name else MAZE2D[name]["horizon"]
    assert env.spec.max_episode_steps == horizon and env.unwrapped.model.camera("above").id == 0
    assert env.unwrapped.dt == pytest.approx(env.unwrapped.model.opt.timestep * env.unwrapped.frame_skip)
    with pytest.warns(UserWarning, match="A Box observation space m..imum value is") as warned:  # unbounded, as D4RL's
        check_env(env.unwrapped)
    assert all("A Box observation space" in str(w.message) for w in warned), [str(w.message) for w in warned]


def test_an_episode_ends_at_the_horizon_only():
    env = make("maze2d-umaze-v1")
    env.reset(seed=0)
    env.unwrapped.data.qpos[:], env.unwrapped.data.qvel[:] = 1, 0  # on the goal
    ends = [env.step(np.zeros(2))[1:4] for _ in range(300)]
    assert ends[:-1] == [(1.0, False, False)] * 299 and ends[-1] == (1.0, False, True)


@pytest.mark.parametrize("maze, goal, n", [("open", (2, 3), 15), ("umaze", (1, 1), 7), ("medium", (6, 6), 26)])
def test_starts_are_near_the_middle_of_every_free_cell(maze, goal, n):
    env = make(next(name for name in MAZE2D if MAZE2D[name]["maze"] == maze)).unwrapped
    starts = np.array([env.reset(seed=seed)[0] for seed in range(600)])
    assert env.goal.tolist() == list(goal) and len(cells(maze)) == n
    places, velocities = starts[:, :2], starts[:, 2:]
    assert {tuple(x) for x in places.round().astype(int).tolist()} == set(cells(maze))  # the goal's, too
    assert np.abs(places - places.round()).max() <= 0.1 and np.std(places - places.round()) > 0.05
    assert velocities.std() == pytest.approx(0.1, rel=0.1)
    np.testing.assert_array_equal(env.reset(seed=5)[0], starts[5])
    assert in_maze(maze, places).all() and not in_maze(maze, [*(places + [0, 20]), *(places + [20, 0])]).any()


def test_in_maze_knows_the_edges_of_the_cells():
    xy = [(1, 1), (0.4, 0.4), (3.2, 3.2), (0.25, 1), (1, 0.25), (2, 1), (2, 2), (3.35, 1), (-5, 1), (1, 99), (-1, -1)]
    assert in_maze("umaze", np.float32(xy)).tolist() == [True] * 3 + [False] * 8
    assert not in_maze("medium", np.array(cells("umaze"))).all()
    assert in_maze("open", np.array(cells("umaze"))).all()


def test_free_steps_by_hand(umaze):
    """v' = v + 0.01 (100 a - v) / (m + 0.01) of a ball of m = 4000 pi / 3 * 0.1^3 kg, and x' = x + 0.01 v'."""
    after = at(umaze, 1, 2).step([1, 0])[0]
    np.testing.assert_allclose(after, [1.00238164, 2, 0.23816384, 0], rtol=0, atol=6e-9)
    assert at(umaze, 1, 1, 5, 0).step([1, 0])[0][2] == pytest.approx(5.22625565, abs=6e-9)
    m = 4000 * np.pi / 3 * 0.1**3
    for a, v, clipped in ((0.5, 2.0, 2.0), (-7.0, 1.0, 1.0), (-1.0, 5.2, 5.0)):  # actions are clipped, as is v
        expected = clipped + 0.01 * (100 * max(a, -1) - clipped) / (m + 0.01)
        x, _, vx, _ = at(umaze, 1, 2, v, 0).step([a, 0])[0]
        assert vx == pytest.approx(expected, abs=1e-12) and x == pytest.approx(1 + 0.01 * expected, abs=1e-12)


def test_first_rows_of_d4rls_umaze_file(umaze):
    """As printed in public, in single precision; of the actions, which are inferred from them, -1 is a real check."""
    rows = [(1.0856489, 1.9745734, 0.00981035, 0.02174424), (1.0843927, 1.97413, -0.12562364, -0.04433781)]
    rows += [(1.0807577, 1.9752754, -0.3634883, 0.11453988)]
    for now, action, after in zip(rows, [(-0.56856, -0.27725), (-1, 0.66665)], rows[1:]):
        np.testing.assert_allclose(at(umaze, *now).step(action)[0], after, rtol=0, atol=2e-6)


def test_a_wall_stops_the_ball_as_in_d4rl(umaze):
    """Hitting a wall at 5 m/s, and pushing against it: MuJoCo 4.0's own contacts would differ by up to 0.6 m/s."""
    at(umaze, 2.9, 1, 5, 0)
    x, v = np.array([umaze.step([0, 0])[0][[0, 2]] for _ in range(8)]).T
    assert (x[6], v[6]) == pytest.approx((3.246682, 4.917236), abs=1e-6)
    assert (x[7], v[7]) == pytest.approx((3.233616, -1.306549), abs=1e-6)
    assert [umaze.step([1, 0])[0][0] for _ in range(500)][-1] == pytest.approx(3.198502, abs=1e-6)


def test_rewards_come_after_the_step():
    sparse, dense = make("maze2d-umaze-v1").unwrapped, make("maze2d-umaze-dense-v1").unwrapped
    for x, reward in ((1.52, 1.0), (1.54, 0.0)):  # 0.03 m further left by the end of the step; the goal is (1, 1)
        after, got, *_ = at(sparse, x, 1, -3, 0).step([0, 0])
        assert got == reward and abs(after[0] - (x - 0.03)) < 1e-3
        assert at(dense, x, 1, -3, 0).step([0, 0])[1] == pytest.approx(np.exp(1 - after[0]), rel=1e-12)


# ---- D4RL's reference returns ----


class ScorersRandom:
    """The global generator of D4RL's scorer, which throws a number away at every cell of the path."""

    def __init__(self):
        self.state = np.random.RandomState(0)

    def uniform(self, low, high, size):
        self.state.uniform()
        return self.state.uniform(low, high, size)


def reference_returns(name, episodes):
    """D4RL's scorer: the driver without noise, planned in the first episode only, as the target never changes."""
    env = make(name).unwrapped
    env.np_random = np.random.RandomState([547404849, 309914516])  # of seed 0 in old versions of Gym
    if env.maze == "open":  # whose returns are those of an earlier day: no start in the goal's cell, 50 steps
        env.starts = env.starts[:-1]
    driver, returns = Driver(env.maze, ScorersRandom()), []
    for _ in range(episodes):
        obs, total = env.reset()[0], 0.0
        for _ in range(50 if env.maze == "open" else MAZE2D[name]["horizon"]):
            ax, ay, _ = driver.act(*obs.tolist(), env.goal.tolist())
            obs, reward, *_ = env.step((ax, ay))
            total += reward
        returns.append(total)
    return returns


FIRST = {"umaze": [282, 0, 261, 300, 0], "medium": [552, 0, 0, 0, 0], "large": [469, 0, 681, 0, 0]}


@pytest.mark.parametrize("maze, first", FIRST.items())
def test_first_reference_returns_are_d4rls(maze, first):
    assert reference_returns(f"maze2d-{maze}-v1", 5) == first


@pytest.mark.slow
@pytest.mark.parametrize("name", MAZE2D)
def test_reference_returns_are_d4rls(name):
    """The mean of 100 episodes. D4RL's computer and MuJoCo gave what ours give, to the last digit; other processors
    may round otherwise, which changes a dense return's tenth digit at most.
    """
    assert np.mean(reference_returns(name, 100)) == pytest.approx(MAZE2D[name]["max"], rel=1e-10)


# ---- the data ----


def test_paths_are_shortest_with_ties_in_d4rls_order():
    """(0, -1) before (0, 1) before (-1, 0) before (1, 0)."""
    umaze, room, large = (set(cells(maze)) for maze in ("umaze", "open", "large"))
    assert shortest_path(umaze, (1, 1), (3, 1)) == [(1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1)]
    assert shortest_path(room, (1, 1), (2, 2)) == [(1, 2), (2, 2)]
    assert shortest_path(room, (3, 3), (1, 2)) == [(3, 2), (2, 2), (1, 2)]
    assert shortest_path(room, (1, 3), (3, 4)) == [(1, 4), (2, 4), (3, 4)]
    assert shortest_path(large, (1, 9), (3, 9)) == [(1, 8), (2, 8), (3, 8), (3, 9)]  # around a wall
    assert shortest_path(large, (2, 8), (2, 10)) == [(1, 8), (1, 9), (1, 10), (2, 10)]
    assert shortest_path(room, (2, 2), (2, 2)) == [(2, 2)]


def test_the_driver_by_hand():
    """Along the top of the umaze, from (1, 1) to (1, 3), whose way leads through (1 - 0.05, 2 - 0.1)."""

    class Fixed:
        def uniform(self, low, high, size):
            return np.array([0.05, 0.1])

    driver, target = Driver("umaze", Fixed()), (1.04, 2.93)

    def act(*state):
        return pytest.approx(driver.act(*state, target), abs=1e-12)

    assert act(1, 1, 0, 0) == (-0.5, 1, False)  # 10 (0.95 - 1) and 10 (1.9 - 1), clipped
    assert act(1, 1.86, 0.6, 0) == (-1, 0.4, False)  # near the waypoint, and too fast for it; 10 (0.95 - 1) - 0.6
    assert act(1, 1.87, 0, 0.2) == (-0.5, 0.1, False)  # near and slow: still there, once more
    assert act(1, 1.88, 0, 0) == (0, 1, False)  # on to the next, (1, 3)
    assert act(1, 2.95, 0, 0) == (0, 0.5, False)  # too fast to have arrived
    assert act(1.01, 2.96, 0, 0) == (-0.1, 0.4, True)
    target = (0.95, 3.1)  # in the same cell: no new plan, arrived at once
    assert act(1.01, 2.96, 0, 0) == (-0.1, 0.4, True)
    target = (2.7, 0.6)  # cell (3, 1): a new plan by (1.95, 2.9)
    assert act(1.01, 2.96, 0, 0) == (1, -0.6, False)
    np.testing.assert_allclose(driver.waypoints, [(1.95, 2.9), (2.95, 2.9), (2.95, 1.9), (3, 1)])


def test_rows_repeat_after_an_arrival_and_nowhere_else(rows):
    obs, infos = rows["observations"], np.hstack([rows["infos/qpos"], rows["infos/qvel"]])
    after = np.append(False, rows["timeouts"][:-1])
    assert after.sum() > 200 and not rows["terminals"].any()
    np.testing.assert_array_equal(np.append(False, (obs[1:] == obs[:-1]).all(axis=1)), after)
    np.testing.assert_array_equal((obs != infos).any(axis=1), after)
    changed = (rows["infos/goal"][1:] != rows["infos/goal"][:-1]).any(axis=1)
    np.testing.assert_array_equal(changed, after[1:])


def test_rows_follow_the_physics_and_the_recorded_actions(rows):
    x, v = rows["infos/qpos"].astype(np.float64), rows["infos/qvel"].astype(np.float64)
    np.testing.assert_allclose(x[1:], x[:-1] + 0.01 * v[1:], rtol=0, atol=1e-6)  # single precision
    assert rows["infos/qpos"].dtype == np.float32 and np.abs(v).max() <= 5.22626 and np.abs(x - 2).max() < 1.7
    before, action = v[:-1].clip(-5, 5), rows["actions"][:-1]
    free = np.abs(v[1:] - before - 0.01 * (100 * action - before) / (4 * np.pi / 3 + 0.01)) < 1e-5
    assert 0.9 < free.mean() < 1  # the other steps touch a wall
    assert in_maze("umaze", x).all() and not in_maze("medium", x).all() and not in_maze("large", x).all()


def test_rewards_belong_to_the_observation_of_their_row(rows):
    distance = np.linalg.norm(rows["observations"][:, :2] - [1.0, 1.0], axis=1)
    np.testing.assert_array_equal(rows["rewards"], np.float32(distance <= 0.5))
    dense = collect("maze2d-umaze-dense-v1", 2000, 0, progress=False)
    np.testing.assert_allclose(dense["rewards"], np.exp(-distance[:2000]), rtol=1e-6)
    np.testing.assert_array_equal(dense["actions"], rows["actions"][:2000])  # the same rows otherwise


def test_rows_are_like_d4rls(rows):
    """As published for umaze's million rows, with ranges for 20,000 of them, in which 250 paths were driven."""
    assert rows["timeouts"].sum() == pytest.approx(249, abs=30)  # 12459 per million
    assert rows["actions"].std(axis=0) == pytest.approx([0.704, 0.751], abs=0.03)
    assert rows["observations"].mean(axis=0) == pytest.approx([1.933, 2.374, 0, 0], abs=0.15)
    assert rows["observations"].std(axis=0) == pytest.approx([0.900, 0.709, 2.213, 2.468], abs=0.15)
    assert rows["rewards"].mean() == pytest.approx(0.0813, abs=0.03) and np.abs(rows["actions"]).max() == 1
    goals = rows["infos/goal"]
    assert {tuple(x) for x in goals.round().astype(int).tolist()} == set(cells("umaze"))
    assert np.abs(goals - goals.round()).max() <= 0.1001


def test_without_noise_the_driver_aims_at_its_waypoints(monkeypatch):
    """a = 10 (waypoint - x) - v gives the waypoint back: at most 0.2 short of a free cell's middle."""
    monkeypatch.setattr(collect_maze2d, "NOISE", 0.0)
    quiet = collect("maze2d-medium-v1", 3000, 1, progress=False)
    x, v = quiet["observations"][:, :2], quiet["observations"][:, 2:]
    inside = (np.abs(quiet["actions"]) < 1).all(axis=1)
    waypoints = ((quiet["actions"] + v) / 10 + x)[inside].astype(np.float64)
    cell = np.ceil(waypoints - 1e-4)  # single precision
    assert inside.sum() > 300 and (cell - waypoints).max() < 0.2001 and (cell - waypoints).max() > 0.15
    assert {tuple(x) for x in cell.astype(int).tolist()} <= set(cells("medium"))


def test_the_seed_decides_and_a_short_file_begins_a_longer_one(rows):
    again, other = (collect("maze2d-umaze-v1", 1500, seed, progress=False) for seed in (0, 1))
    for key, array in again.items():
        np.testing.assert_array_equal(array, rows[key][:1500], key)
    assert (other["observations"] != again["observations"]).any(axis=1).all()


def test_the_horizon_cuts_a_drive_that_never_arrives(monkeypatch):
    monkeypatch.setattr(Driver, "act", lambda self, *state: (0.0, 0.0, False))
    found = collect("maze2d-umaze-v1", 1000, 0, progress=False)
    assert np.flatnonzero(found["timeouts"]).tolist() == [300, 601, 902]


# ---- the command ----


def test_a_file_has_d4rls_layout_and_says_what_made_it(tmp_path, rows):
    path = tmp_path / "x.hdf5"
    code, out, err = call(collect_maze2d, "maze2d-umaze-v1", "--transitions", 1234, "--out", path)
    assert code == 0 and out.startswith(f"{path}: 1,234 transitions, ") and out.count("\n") == 1, err
    with h5py.File(path) as f:
        keys = []
        f.visititems(lambda key, item: keys.append(key) if isinstance(item, h5py.Dataset) else None)
        assert set(keys) == set(rows) and len(keys) == 8 and all(f[key].compression == "gzip" for key in keys)
        for key in keys:
            assert f[key].dtype == rows[key].dtype == (bool if key in ("terminals", "timeouts") else np.float32)
            np.testing.assert_array_equal(f[key], rows[key][:1234])
        command = f.attrs["command"]
        assert command == f"python data/collect_maze2d.py maze2d-umaze-v1 --transitions 1234 --out {path}"
        assert {k: f.attrs[k] for k in ("env_id", "seed", "transitions")} == dict(
            env_id="maze2d-umaze-v1", seed=0, transitions=1234
        )
    assert [str(name) for name in tree(tmp_path)] == ["x.hdf5"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["maze2d-umaze-v7"], "maze2d-umaze-v7: not one of maze2d-open-v0, "),
        (["maze2d-umaze-v1", "--transitions", "0"], "--transitions 0: must be between 1 and 1e9"),
        (["maze2d-umaze-v1", "--transitions", "2000000000"], "--transitions 2000000000: must be"),
        (["maze2d-umaze-v1", "--seed", "-1"], "--seed -1: must be between 0 and 1e9"),
        (["maze2d-umaze-v1", "--out", "none/x.hdf5"], "cannot write none/x.hdf5 (No such file or directory)"),
        (["maze2d-umaze-v1", "--out", "file/x.hdf5"], "cannot write file/x.hdf5 (Not a directory)"),
        (["maze2d-umaze-v1", "--out", "file"], "file is there already; remove it, or name another --out"),
    ],
)
def test_bad_input_is_one_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(collect_maze2d, "collect", lambda *_: pytest.fail("started"))
    (tmp_path / "file").write_text("mine")
    code, out, err = call(collect_maze2d, *arguments)
    assert code == 2 and out == "" and err.startswith(f"error: {says}") and err.count("\n") == 1, err
    assert {str(name): content for name, content in tree(tmp_path).items()} == {"file": b"mine"}


@pytest.mark.parametrize(
    "where, error, code, says",
    [
        ("collect_maze2d.clip", KeyboardInterrupt(), 130, "interrupted"),
        ("os.replace", OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
    ],
)
def test_a_stop_leaves_nothing_behind(where, error, code, says, tmp_path, monkeypatch):
    def stop(*_):
        raise error

    monkeypatch.setattr(where, stop)
    result = call(collect_maze2d, "maze2d-umaze-v1", "--transitions", 100, "--out", tmp_path / "x.hdf5")
    assert result == (code, "", f"error: {says}\n") and not tree(tmp_path)


def test_the_default_sizes_are_d4rls(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(collect_maze2d, "collect", lambda *a: asked.append(a) or collect(*a[:1], 10, 0, progress=False))
    for name in MAZE2D:
        assert call(collect_maze2d, name, "--out", tmp_path / f"{name}.hdf5")[0] == 0
    millions = {"open": 1, "umaze": 1, "medium": 2, "large": 4}
    assert set(millions) == set(BALL_MAPS)
    assert asked == [(name, millions[row["maze"]] * 10**6, 0) for name, row in MAZE2D.items()]


# ---- training ----


@pytest.mark.parametrize("flags, steps, noted", [("", 1, True), ("", 2, False), ("--no-update-q", 1, False)])
def test_a_long_co_training_is_warned_of(flags, steps, noted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(collect_maze2d, "maze2d-umaze-v1", "--transitions", 2000, "--out", "x.hdf5")[0] == 0
    own = "--env maze2d-mini --dataset-path x.hdf5 --device cpu --total-steps 2".split()
    assert call(stage1, *own)[0] == 0
    monkeypatch.setitem(stage2.SMALL, "total_steps", steps)
    code, out, _ = call(stage2, *own, *flags.split(), "--eval-every", 0)
    assert code == 0 and ("note: co-training has ruined a longer run" in out) == noted


# ---- pictures ----


def test_paths_of_policies_are_drawn_in_their_maze(pipeline, tmp_path, monkeypatch):
    """Two policies, two targets: a panel's episodes have its returns, start as in the other panels, cross no wall."""
    monkeypatch.chdir(tmp_path)
    assert call(collect_maze2d, "maze2d-umaze-v1", "--transitions", 2000, "--out", "x.hdf5")[0] == 0
    flags = "--env maze2d-mini --dataset-path x.hdf5 --lambda-e 0 --total-steps 1 --eval-every 0 --device cpu".split()
    assert call(stage2, *flags)[0] == 0
    policy, drawn, real = "runs/maze2d-mini__train_qalign_dt__1/policy.pt", [], pictures.draw
    monkeypatch.setattr(pictures, "EPISODES", 3)
    monkeypatch.setattr(pictures, "draw", lambda *x: drawn.append(x) or real(*x))
    code, out, err = call(pictures, policy, policy, "--targets", 20, 300, "--out", "y.png")
    assert (code, out) == (0, "y.png\n") and Path("y.png").read_bytes()[:4] == b"\x89PNG"
    assert [own for *_, own in drawn] == [slice(0, 3), slice(3, 6)] * 2
    for _, maze, result, own in drawn:
        paths = result.qpos[own]
        assert paths.shape == (3, 300, 2) and in_maze("umaze", paths.reshape(-1, 2)).all()
        assert np.abs(paths[:, 0] - drawn[0][2].qpos[drawn[0][3]][:, 0]).max() < 0.2  # after one step
        assert np.allclose(maze.reward(paths).sum(axis=1), result.returns[own])
    code, out, err = call(pictures, pipeline.policy)
    assert (code, out) == (2, "") and err == "error: these are not policies of one maze2d-... environment\n"
