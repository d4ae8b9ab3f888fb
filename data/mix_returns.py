"""Low-data regimes: some of a dataset's episodes, in other shares of good, middling and bad ones.

    python data/mix_returns.py data/hopper-mini.hdf5 --ratio 1 5 1 --fraction 0.75 --out low_data_1.hdf5
    python pretrain_q.py --env hopper-mini --dataset-path low_data_1.hdf5

RVDT's poster compares methods on four mixtures D_1 to D_4. Its release takes the 30% of the trajectories with the
highest returns, the middle 40% and the lowest 30%, and draws from them in ratios of 1:5:1 (D_1 and the smaller D_2) or
5:4:5 (D_3, D_4). Ours: 75% and 37.5% of the file's episodes, an episode twice only where its stratum has run out.
Reads and writes D4RL's layout; an incomplete last episode is left out.
"""

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # stage 2, for how scripts end and files are written
from train_qalign_dt import fail, one_line, run, write_file

KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")


@dataclass(frozen=True)
class Args:
    file: tyro.conf.Positional[str]  # HDF5 in D4RL's layout
    out: str  # the file to write
    ratio: tuple[int, int, int] = (1, 5, 1)  # shares of the top 30%, the middle 40% and the bottom 30%
    fraction: float = 0.75  # number of episodes drawn, divided by the number there are
    seed: int = 1  # seed of the draw

    def __post_init__(self):
        if min(self.ratio) < 0 or not 0 < sum(self.ratio) <= 10**6:
            raise ValueError(f"--ratio {self.ratio}: three shares of at least 0, together 1 to 1,000,000")
        if not 0 <= self.seed <= 10**9:
            raise ValueError(f"--seed {self.seed}: must be between 0 and 1e9")
        if not 0 < self.fraction <= 100:
            raise ValueError(f"--fraction {self.fraction}: must be above 0 and at most 100")


def draw(returns: np.ndarray, ratio: tuple[int, int, int], n: int, rng: np.random.Generator) -> np.ndarray:
    """Indices (n,) of episodes with returns (E,), those of a stratum together; every episode of it before any twice."""
    order = np.argsort(-returns, kind="stable")
    top, bottom = round(0.3 * len(order)), round(0.7 * len(order))
    counts = np.diff(np.round(np.cumsum([0, *ratio]) / sum(ratio) * n).astype(int))  # their sum is n
    drawn = []
    for stratum, count in zip((order[:top], order[top:bottom], order[bottom:]), counts):
        rounds = [rng.permutation(stratum) for _ in range(1 + count // len(stratum))]
        drawn.append(np.concatenate(rounds)[:count])
    return np.concatenate(drawn)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if os.path.lexists(args.out):
        fail(f"--out {args.out} exists; remove it, or name another file")
    try:
        with open(args.file, "rb"), h5py.File(args.file, "r") as f:
            arrays, attributes = {key: np.asarray(f[key]) for key in KEYS}, dict(f.attrs)
        if len({len(array) for array in arrays.values()}) > 1:
            raise ValueError("arrays of different lengths")
        ends = np.flatnonzero((arrays["terminals"] > 0) | (arrays["timeouts"] > 0)) + 1
        starts = np.append(0, ends)[:-1]
        returns = np.array([arrays["rewards"][a:b].sum(dtype=np.float64) for a, b in zip(starts, ends)])
        if len(ends) < 3:
            fail(f"{args.file}: {len(ends)} complete episodes, three strata need at least 3")
    except (OSError, KeyError, TypeError, ValueError) as error:
        fail(f"{args.file}: {one_line(error)}; give an HDF5 file in D4RL's layout: {', '.join(KEYS)}")
    chosen = draw(returns, args.ratio, max(round(args.fraction * len(ends)), 1), np.random.default_rng(args.seed))
    rows = np.concatenate([np.arange(starts[i], ends[i]) for i in chosen])
    attributes |= {"ratio": args.ratio, "fraction": args.fraction, "draw_seed": args.seed, "episodes": chosen}
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as f:
        for key, array in arrays.items():
            f.create_dataset(key, data=array[rows], compression="gzip")
        f.attrs.update(attributes)
    write_file(Path(args.out), buffer.getbuffer())
    episodes = f"{len(chosen)} of {len(ends)} episodes, {len(set(chosen))} different, {len(rows):,} transitions"
    low, high, mean = returns[chosen].min(), returns[chosen].max(), returns[chosen].mean()
    print(f"{args.out}: {episodes}, returns {low:,.0f} to {high:,.0f}, mean {mean:,.0f}")


if __name__ == "__main__":
    run(main)
