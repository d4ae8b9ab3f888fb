import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))


def write_hdf5(path, observations, actions, rewards, terminals, timeouts):
    with h5py.File(path, "w") as f:
        for key, x in dict(
            observations=observations, actions=actions, rewards=rewards, terminals=terminals, timeouts=timeouts
        ).items():
            f[key] = x
    return path


def record(env_id: str, episodes: int, limit: int, seed: int = 0) -> tuple:
    """Random actions in Gymnasium's own environment, in D4RL's layout; an episode longer than `limit` ends by timeout."""
    import train_qalign_dt as stage2

    env = stage2.make_env(env_id)
    rng, rows = np.random.default_rng(seed), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        for t in range(limit):
            action = rng.uniform(-1, 1, env.action_space.shape[0]).astype(np.float32)
            following, reward, terminated, _, _ = env.step(action)
            rows.append((obs, action, reward, terminated, t == limit - 1 and not terminated))
            obs = following
            if terminated:
                break
    columns = [np.array(x) for x in zip(*rows)]
    return tuple(x.astype(np.float32) for x in columns[:3]) + tuple(columns[3:])


@pytest.fixture(scope="session")
def hopper_arrays():
    return record("Hopper-v4", episodes=60, limit=20)


@pytest.fixture(scope="session")
def hopper_file(tmp_path_factory, hopper_arrays):
    arrays = hopper_arrays
    assert arrays[3].any() and arrays[4].any()  # both kinds of episode end are in it
    return write_hdf5(tmp_path_factory.mktemp("data") / "hopper_tiny.hdf5", *arrays)


@pytest.fixture(scope="session")
def antmaze_arrays():
    """A point that walks to a goal, in AntMaze's dimensions: 40 episodes of up to 30 steps, reward 1 and terminal at the goal."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(40):
        x = rng.uniform(0, 2, 2)
        for t in range(30):
            action = rng.uniform(-1, 1, 8)
            obs = np.concatenate([x, rng.normal(size=27)])
            x = x + 0.3 * np.abs(action[:2])
            goal = bool((x > 4).all())
            rows.append((obs, action, float(goal), goal, t == 29 and not goal))
            if goal:
                break
    columns = [np.array(x) for x in zip(*rows)]
    return tuple(x.astype(np.float32) for x in columns[:3]) + tuple(columns[3:])


@pytest.fixture(scope="session")
def antmaze_file(tmp_path_factory, antmaze_arrays):
    return write_hdf5(tmp_path_factory.mktemp("data") / "antmaze_tiny.hdf5", *antmaze_arrays)


@pytest.fixture
def run_main(monkeypatch, capfd):
    """Run a stage's main() with a command line; returns exit code, stdout, stderr."""
    import signal

    def run(stage, *argv):
        monkeypatch.setattr(sys, "argv", [f"{stage.__name__}.py", *map(str, argv)])
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        capfd.readouterr()
        try:
            stage.main()
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        finally:
            for n, handler in handlers.items():
                signal.signal(n, handler)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


TINY1 = "--device cpu --critic-width 16 --total-steps 30 --batch-size 32".split()
TINY2 = (
    "--device cpu --precision fp32 --critic-width 16 --embed-dim 16 --n-layer 1 --n-head 2 --context-len 4 --batch-size 8 "
    "--total-steps 30 --eval-rollouts 1"
).split()
