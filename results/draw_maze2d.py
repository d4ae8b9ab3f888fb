"""Where policies roll the ball when they are asked for more return: a row for each policy, a column for each target.

    python results/draw_maze2d.py runs/maze2d-umaze-v1__train_qalign_dt__1/policy.pt [further policies of this maze]

Writes one PNG: ten episodes in each panel, with the same starts (dots) in all of them; the disc is where reward is.
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import qalign_mazes

import evaluate_alignment as stage3

EPISODES = 10  # in each panel


@dataclass(frozen=True)
class Args:
    checkpoints: tyro.conf.Positional[tuple[Path, ...]]  # policy.pt files of one maze2d-... environment
    targets: tuple[float, ...] = (20.0, 100.0, 300.0)  # raw target returns
    seed: int = 1  # of the episodes
    out: Path = Path("maze2d.png")  # the picture

    def __post_init__(self):
        if not self.checkpoints or not self.targets:
            raise ValueError("name at least one policy.pt and one target return")
        if not 0 <= self.seed <= 10**9 or not np.isfinite(self.targets).all():
            raise ValueError("--seed is between 0 and 1e9, --targets are finite")


def draw(panel, maze, result, own) -> None:
    """Walls, goal and the paths of the rollouts `own`; rows of the maze's map run downwards, as in its text."""
    from matplotlib.patches import Circle, Rectangle

    for i, j in qalign_mazes.cells(maze.maze, "#"):
        panel.add_patch(Rectangle((j - 0.7, i - 0.7), 1, 1, color="0.75"))
    panel.add_patch(Circle(maze.goal[::-1], 0.5, color="#D55E00", alpha=0.4, linewidth=0))
    for path in result.qpos[own]:
        panel.plot(path[:, 1], path[:, 0], color="#0072B2", linewidth=0.9, alpha=0.8)
        panel.plot(path[0, 1], path[0, 0], "ko", markersize=3)
    panel.set(aspect="equal", xticks=[], yticks=[])
    panel.grid(False)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    policies = [stage3.load_policy(path, "auto", stage3.pick_device("cpu")) for path in args.checkpoints]
    task = policies[0].task
    if task.body != "maze2d" or any(one.task.env_id != task.env_id for one in policies):
        stage3.fail("these are not policies of one maze2d-... environment")
    maze = stage3.make_env(task.env_id, task.env_kwargs).unwrapped
    shape = dict(figsize=(3.4 * len(args.targets), 3.6 * len(policies)), squeeze=False, sharex=True, sharey=True)
    figure, panels = stage3.new_figure(len(policies), len(args.targets), **shape)
    for trained, row in zip(policies, panels):
        targets = np.repeat(args.targets, EPISODES)
        seeds = [args.seed + i for i in range(EPISODES)] * len(args.targets)
        result = stage3.rollout(trained, targets, seeds, task.horizon, "episodes", keep_qpos=True)
        for k, (panel, target) in enumerate(zip(row, args.targets)):
            own = slice(k * EPISODES, (k + 1) * EPISODES)
            draw(panel, maze, result, own)
            panel.set_title(f"asked for {target:g}: {result.returns[own].mean():.0f}", fontsize=13)
        row[0].set_ylabel(trained.identity()["method"], fontsize=14)
    panels[0, 0].invert_yaxis()
    figure.suptitle(f"Paths and mean return of {EPISODES} episodes, {task.label}", fontsize=14)
    figure.savefig(picture := io.BytesIO(), format="png", dpi=100)
    stage3.write_file(args.out, picture.getvalue())
    print(args.out)


if __name__ == "__main__":
    stage3.run(main)
