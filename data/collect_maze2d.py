"""Maze2D's data by D4RL's recipe, whose own files are not always to be had: a scripted driver that never rests.

    python data/collect_maze2d.py maze2d-umaze-v1

The driver takes the shortest path to a random place, with noise on every action, draws the next place, and drives on:
one trajectory of a million steps, without resets. It passes the rewarded goal only by chance.

Quirks of D4RL's script, which are kept:
    timeouts    the rows at which the driver arrived. The row after it repeats the observation, and the driver acts on
                that, while the ball has moved; infos/qpos and infos/qvel are true in every row
    rewards     rewards[t] belongs to observations[t], not to the observation that follows
    terminals   all False

D4RL's script has no seed, so this is not its file but one like it: regenerated, and to be called so, with its seed.
"""

import os
import shlex
import sys
from dataclasses import dataclass
from math import hypot
from pathlib import Path

import h5py
import numpy as np
import tyro
from qalign_mazes import MAZE2D, Maze2D, cells
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # stage 2, for how scripts end
from train_qalign_dt import Int, Str, fail, run

NEAR = 0.1  # metres to a waypoint, and metres per step at which the ball counts as slow
NOISE = 0.5  # standard deviation of what is added to an action, which is clipped to -1 .. 1 again
ROWS = {"open": 1_000_000, "umaze": 1_000_000, "medium": 2_000_000, "large": 4_000_000}  # D4RL's


@dataclass(frozen=True)
class Args:
    env: tyro.conf.Positional[str]  # maze2d-umaze-v1, ...
    transitions: Int = None  # default: as many as D4RL's file has (1,000,000; medium 2,000,000, large 4,000,000)
    seed: int = 0  # of the start, the places and the noise
    out: Str = ""  # the file to write (default: <env>.hdf5 beside this script, where the other stages look for it)


def shortest_path(free: set, cell: tuple, goal: tuple) -> list[tuple]:
    """The cells from the one after `cell` to the goal; of equally short ways, the neighbour that comes first."""

    def neighbours(i, j):
        return [near for near in ((i, j - 1), (i, j + 1), (i - 1, j), (i + 1, j)) if near in free]

    steps, queue = {goal: 0}, [goal]  # steps: cells from here to the goal
    for here in queue:
        for near in neighbours(*here):
            if near not in steps:
                steps[near] = steps[here] + 1
                queue.append(near)
    path = []
    while cell != goal:
        cell = min(neighbours(*cell), key=steps.get)
        path.append(cell)
    return path or [goal]


class Driver:
    """D4RL's controller: full force towards the next waypoint, less its own speed; waypoints are passed slowly."""

    def __init__(self, maze: str, rng):
        self.free, self.rng, self.goal = set(cells(maze)), rng, None

    def act(self, x: float, y: float, vx: float, vy: float, target) -> tuple[float, float, bool]:
        """The action before the noise, and whether the ball has arrived: in the middle of the target's cell, and slow.

        A new plan is made only when the target's cell changes.
        """
        if (goal := (round(target[0]), round(target[1]))) != self.goal:
            self.before = (round(x), round(y))
            self.waypoints, self.goal = shortest_path(self.free, self.before, goal), goal
            for k, (i, j) in enumerate(self.waypoints[:-1]):
                du, dv = self.rng.uniform(0, 0.2, 2).tolist()
                self.waypoints[k] = (i - du, j - dv)
        slow = hypot(x - self.before[0], y - self.before[1]) < NEAR
        arrived = slow and hypot(x - goal[0], y - goal[1]) < NEAR
        wx, wy = goal if arrived else self.waypoints[0]
        if slow and not arrived and hypot(x - wx, y - wy) < NEAR:
            self.waypoints.pop(0)
        self.before = (x, y)
        return clip(10 * (wx - x) - vx), clip(10 * (wy - y) - vy), arrived


def clip(force: float) -> float:
    return max(-1.0, min(1.0, force))


def collect(name: str, transitions: int, seed: int, progress: bool = True) -> dict[str, np.ndarray]:
    """The arrays of D4RL's layout, by their keys. A shorter file of the same seed is the beginning of a longer one."""
    if "mujoco" not in sys.modules:  # nothing is rendered: look for no OpenGL
        os.environ["MUJOCO_GL"] = "disable"
    maze, horizon = MAZE2D[name]["maze"], MAZE2D[name]["horizon"]
    env, rng = Maze2D(maze, MAZE2D[name]["dense"]), np.random.default_rng(seed)
    env.np_random, driver = rng, Driver(maze, rng)
    target, began = env.draw_place().tolist(), 0
    obs = env.reset()[0].tolist()  # x, y, vx, vy
    rows = np.empty((transitions, 13), np.float32)
    hidden = None if progress else True  # None: shown on a terminal
    with tqdm(total=transitions, unit="row", desc=name, dynamic_ncols=True, disable=hidden) as bar:
        for t in range(transitions):
            ax, ay, arrived = driver.act(*obs, target)
            nx, ny = rng.standard_normal(2).tolist()
            action = clip(ax + NOISE * nx), clip(ay + NOISE * ny)
            arrived = arrived or t - began >= horizon  # never seen
            rows[t] = *obs, *action, *target, *env.data.qpos.tolist(), *env.data.qvel.tolist(), arrived
            env.advance(action)
            if arrived:  # and the next row has the same observation once more
                target, began = env.draw_place().tolist(), t + 1
            else:
                obs = env.data.qpos.tolist() + env.data.qvel.tolist()
            if t % 1000 == 999:
                bar.update(1000)
        bar.update(transitions % 1000)
    infos = dict(zip(("infos/goal", "infos/qpos", "infos/qvel"), np.split(rows[:, 6:12], 3, axis=1)))
    flags = {"terminals": np.zeros(transitions, bool), "timeouts": rows[:, 12] > 0}
    rewards = env.reward(rows[:, :2]).astype(np.float32)
    return {"observations": rows[:, :4], "actions": rows[:, 4:6], "rewards": rewards, **flags, **infos}


def main() -> None:
    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.DisallowNone,))
    if args.env not in MAZE2D:
        fail(f"{args.env}: not one of {', '.join(MAZE2D)}")
    transitions = ROWS[MAZE2D[args.env]["maze"]] if args.transitions is None else args.transitions
    for flag, x, lowest in (("--transitions", transitions, 1), ("--seed", args.seed, 0)):
        if not lowest <= x <= 10**9:
            fail(f"{flag} {x}: must be between {lowest} and 1e9")
    path = Path(args.out or Path(__file__).parent / f"{args.env}.hdf5")
    if os.path.lexists(path):
        fail(f"{path} is there already; remove it, or name another --out")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()  # found out now, not after minutes
    except OSError as error:
        fail(f"cannot write {path} ({error.strerror}); name another --out")
    try:
        arrays = collect(args.env, transitions, args.seed)
        with h5py.File(temporary, "w") as f:
            for key, array in arrays.items():
                f.create_dataset(key, data=array, compression="gzip", shuffle=True)
            f.attrs.update(env_id=args.env, seed=args.seed, transitions=transitions)
            command = shlex.join(["python", "data/collect_maze2d.py", *sys.argv[1:]])
            f.attrs["command"] = command.encode(errors="replace").decode()  # file names may not be UTF-8
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    arrivals, mean = arrays["timeouts"].sum(), arrays["rewards"].mean(dtype=np.float64)
    print(f"{path}: {transitions:,} transitions, {arrivals:,} arrivals, mean reward {mean:.4f}")


if __name__ == "__main__":
    run(main)
