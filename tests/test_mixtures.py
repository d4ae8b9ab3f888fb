"""data/mix_returns.py: which episodes a low-data mixture holds."""

import h5py
import mix_returns
import numpy as np
import pytest

RETURNS = np.array([3.0, 9.0, 1.0, 7.0, 5.0, 2.0, 8.0, 0.0, 6.0, 4.0])  # strata: 9 8 7 | 6 5 4 3 | 2 1 0


def strata(indices) -> list[int]:
    """How many episodes are of the top 30%, the middle 40% and the bottom 30%."""
    returns = RETURNS[indices]
    return [int((returns >= 7).sum()), int(((returns >= 3) & (returns < 7)).sum()), int((returns < 3).sum())]


@pytest.mark.parametrize(
    "ratio, n, counts",
    [((1, 5, 1), 7, [1, 5, 1]), ((5, 4, 5), 14, [5, 4, 5]), ((0, 0, 1), 4, [0, 0, 4]), ((1, 5, 1), 4, [1, 2, 1])],
)
def test_shares_of_the_strata(ratio, n, counts):
    for seed in range(20):
        assert strata(mix_returns.draw(RETURNS, ratio, n, np.random.default_rng(seed))) == counts


def test_no_episode_is_drawn_twice_while_its_stratum_lasts():
    drawn = []
    for seed in range(200):
        indices = mix_returns.draw(RETURNS, (2, 5, 3), 10, np.random.default_rng(seed))  # five of the middle four
        of, times = np.unique(indices, return_counts=True)
        assert sorted(times) == [1] * (len(of) - 1) + [2] and len(of) == 9 and 3 <= RETURNS[of[times.argmax()]] < 7
        drawn += [i for i in indices if RETURNS[i] >= 7]
    share = np.bincount(drawn, minlength=10)[[1, 3, 6]] / 200
    assert abs(share - 2 / 3).max() < 0.12  # each of the top three equally often


def write(path, lengths=(3, 2, 4), incomplete=2):
    n = sum(lengths) + incomplete
    ends = np.zeros(n, bool)
    ends[np.cumsum(lengths) - 1] = True
    with h5py.File(path, "w") as f:
        f["observations"], f["actions"] = np.arange(n * 2.0).reshape(n, 2), np.arange(n * 1.0).reshape(n, 1)
        f["rewards"] = np.arange(n) * 1.0
        f["terminals"], f["timeouts"] = ends & (np.arange(n) < 4), ends & (np.arange(n) >= 4)
        f.attrs["env_id"] = "Hopper-v4"


def test_the_file_holds_whole_episodes_in_the_order_drawn(run_main, tmp_path):
    write(tmp_path / "all.hdf5")
    flags = (tmp_path / "all.hdf5", "--out", tmp_path / "some.hdf5", "--ratio", 1, 1, 1, "--fraction", 1)
    code, out, err = run_main(mix_returns, *flags)
    assert code == 0 and "3 of 3 episodes, 3 different, 9 transitions" in out, err
    with h5py.File(tmp_path / "some.hdf5") as f:  # returns 0+1+2, 3+4, 5+6+7+8: the last is best, then the second
        assert f.attrs["env_id"] == "Hopper-v4" and list(f.attrs["episodes"]) == [2, 1, 0]
        assert f["rewards"][:].tolist() == [5, 6, 7, 8, 3, 4, 0, 1, 2]
        assert f["observations"][:, 0].tolist() == [10, 12, 14, 16, 6, 8, 0, 2, 4]
        assert f["timeouts"][:].tolist() == [False, False, False, True, False, True, False, False, False]
        assert f["terminals"][:].tolist() == [False] * 8 + [True]
    assert list(tmp_path.glob("*.tmp")) == []
    before = (tmp_path / "all.hdf5").read_bytes()
    code, _, err = run_main(mix_returns, tmp_path / "all.hdf5", "--out", tmp_path / "all.hdf5")
    assert code == 2 and "all.hdf5 exists" in err and (tmp_path / "all.hdf5").read_bytes() == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (("missing.hdf5",), "missing.hdf5"),
        (("all.hdf5", "--ratio", 0, 0, 0), "--ratio"),
        (("all.hdf5", "--fraction", 0), "--fraction"),
        (("other.hdf5",), "D4RL's layout"),
        (("two.hdf5",), "2 complete episodes"),
        (("uneven.hdf5",), "arrays of different lengths"),
        (("truncated.hdf5",), "truncated"),
        (("all.hdf5", "--out", "nowhere/some.hdf5"), "nowhere/some.hdf5"),
    ],
)
def test_bad_input_is_one_line(flags, message, run_main, tmp_path):
    write(tmp_path / "all.hdf5")
    write(tmp_path / "two.hdf5", lengths=(2, 2))
    with h5py.File(tmp_path / "other.hdf5", "w") as f:
        f["states"] = np.zeros(3)
    write(tmp_path / "uneven.hdf5")
    with h5py.File(tmp_path / "uneven.hdf5", "a") as f:
        del f["actions"]
        f["actions"] = np.zeros((3, 1))
    (tmp_path / "truncated.hdf5").write_bytes((tmp_path / "all.hdf5").read_bytes()[:-50])
    file, *rest = flags
    rest = [tmp_path / x if "/" in str(x) else x for x in rest]
    out = () if "--out" in rest else ("--out", tmp_path / "some.hdf5")
    code, _, err = run_main(mix_returns, tmp_path / file, *rest, *out)
    assert code == (1 if "nowhere" in message else 2) and message in err and "Traceback" not in err
    assert not (tmp_path / "some.hdf5").exists() and list(tmp_path.glob("*.tmp")) == []
