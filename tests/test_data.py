"""Names, the reader and the windows, against plain loops and D4RL's own code. The rest of prepare: test_prepare.py."""

import importlib.util
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import prepare
import pytest
import torch
from conftest import TINY1, TINY2, argv, data_of, task_of, write_hdf5

import pretrain_q as stage1
import train_qalign_dt as stage2

GYM = [f"{b}-{q}-v2" for b in ("hopper", "halfcheetah", "walker2d", "ant") for q in prepare.QUALITIES]
MAZE = [f"antmaze-{m}-v2" for m in prepare.MAZES]
OWN = ["hopper-mini", "halfcheetah-mini", "hopper-mixed-zoo", "walker2d-medium-replay-local"]
HOPPER = "hopper-medium-test"
CPU = torch.device("cpu")
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")


# ---- names ----


def test_d4rls_reference_returns_and_the_releases_ranges_and_targets():
    expected = {
        "hopper": (-20.272305, 3234.3, (-1, 4), (1800, 3600, 4000)),
        "halfcheetah": (-280.178953, 12135.0, (-1, 25), (12000, 24000)),
        "walker2d": (1.629008, 4592.3, (-1, 20), (5000, 6000, 10000)),
        "ant": (-325.6, 3879.7, (-1, 10), (5000, 10000)),
        "antmaze": (0, 1, (0, 1), (0.8, 0.9, 1, 100)),
    }
    for body, numbers in expected.items():
        task = prepare.parse_env(f"{body}-{'umaze' if body == 'antmaze' else 'medium'}-v2")
        assert tuple(task[name] for name in ("ref_min", "ref_max", "rtg_range", "targets")) == numbers


def test_scores_of_known_names():
    for name in GYM + MAZE + OWN:
        task = task_of(name)
        assert name.startswith(task.body) and task.quality in name, name
    # by hand, from D4RL's published reference returns: the score's formula itself
    assert task_of("hopper-medium-v2").score(1000.0) == pytest.approx(100 * 1020.272305 / 3254.572305)
    assert task_of("halfcheetah-medium-v2").score(0.0) == pytest.approx(100 * 280.178953 / 12415.178953)
    assert task_of("antmaze-umaze-v2").score(0.25) == pytest.approx(25)


@pytest.mark.parametrize(
    "name, close",
    [
        ("hoper-medium-v2", "hopper-medium-v2"),
        ("hopper-medum-zoo", "hopper-medium"),
        ("", "-v2"),
        ("hopper-medium-expert", "hopper-medium-expert-v2"),
        ("hopper-mixed-v2", "hopper-medium-v2"),
        ("hopper-medium-../x", "mujoco/hopper/expert-v0"),  # a slash: Minari's
        ("hopper-medium-\u00e9", "hopper-medium-v2"),
        ("hopper-umaze-mine", "-v2"),
        ("antmaze-medium-mine", "antmaze-medium-play-v2"),
    ],
)
def test_unknown_names_name_the_closest(name, close, capsys):
    with pytest.raises(SystemExit) as exit:
        prepare.parse_env(name)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and close in error and error.count("\n") == 1


# ---- reader ----


def test_reader_keeps_rows_and_boundaries(hopper_file, hopper_arrays):
    data = data_of(HOPPER, hopper_file)
    observations, actions, rewards, terminals, timeouts = hopper_arrays
    for ours, theirs in zip((data.observations, data.actions, data.rewards, data.terminals), hopper_arrays):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(data.ends, np.flatnonzero(terminals | timeouts) + 1)
    returns = [rewards[a:b].sum(dtype=np.float64) for a, b in zip(data.starts, data.ends)]
    np.testing.assert_allclose(data.returns, returns)
    np.testing.assert_allclose(data.obs_mean, observations.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(data.obs_std, observations.std(axis=0) + 1e-6, rtol=1e-4)
    assert not data.task.is_d4rl and "hopper_tiny.hdf5" in data.task.label and "v2" not in data.task.label


def test_incomplete_episodes_at_the_end_are_dropped_per_file_and_files_are_joined(tmp_path, hopper_arrays, hopper_file):
    cut = [x[:-2] for x in hopper_arrays]  # the last episode now has neither flag
    file = write_hdf5(tmp_path / "cut.hdf5", *cut)
    one = data_of(HOPPER, file)
    assert one.ends[-1] == np.flatnonzero(cut[3] | cut[4])[-1] + 1 < len(cut[0])
    two = data_of(HOPPER, file, hopper_file)
    n = len(one.rewards)
    assert two.ends[len(one.ends) - 1] == n and len(two.rewards) == n + len(hopper_arrays[0])
    np.testing.assert_array_equal(two.observations[n:], hopper_arrays[0])
    assert two.task.digest != one.task.digest and "cut.hdf5 + hopper_tiny.hdf5" in two.task.label


def test_reward_columns_and_clipped_actions(tmp_path, hopper_arrays, capsys):
    observations, actions, rewards, terminals, timeouts = (x.copy() for x in hopper_arrays)
    actions[:7, 1] = 1.5
    file = write_hdf5(tmp_path / "x.hdf5", observations, actions, rewards[:, None], terminals[:, None], timeouts)
    data = data_of(HOPPER, file)
    assert data.rewards.shape == (len(rewards),) and np.abs(data.actions).max() == 1
    np.testing.assert_array_equal(data.rewards, rewards)
    assert "clipped 7 actions" in capsys.readouterr().err


def test_digest_is_of_the_content(tmp_path, hopper_arrays):
    def digest(name, arrays):
        return data_of(HOPPER, write_hdf5(tmp_path / name, *arrays)).task.digest

    first = digest("a.hdf5", hopper_arrays)
    assert first == digest("b.hdf5", hopper_arrays)
    for i in range(5):
        changed = [x.copy() for x in hopper_arrays]
        changed[i].flat[3] = ~changed[i].flat[3] if changed[i].dtype == bool else changed[i].flat[3] + 1e-3
        assert digest(f"{i}.hdf5", changed) != first, KEYS[i]


def test_ant_with_contact_forces_is_refused(tmp_path, capsys):
    n = 10
    observations = np.zeros((n, 111), np.float32)
    flags = np.arange(n) == n - 1
    arrays = [observations, np.zeros((n, 8), np.float32), np.zeros(n, np.float32), flags, ~flags & False]
    assert len(data_of("ant-medium-test", write_hdf5(tmp_path / "a.hdf5", *arrays)).rewards) == n
    observations[3, 50] = 0.1
    with pytest.raises(SystemExit):
        data_of("ant-medium-test", write_hdf5(tmp_path / "b.hdf5", *arrays))
    assert "contact forces" in capsys.readouterr().err


# ---- impossible data: one line on stderr, nothing written ----


def foreign_file(tmp_path, arrays, kind):
    path = tmp_path / f"{kind}.hdf5"
    observations, actions, rewards, terminals, timeouts = (x.copy() for x in arrays)
    if kind == "missing":
        return path
    if kind == "folder":
        path.mkdir()
        return path
    if kind == "link to itself":
        path.symlink_to(path)
        return path
    if kind == "not HDF5":
        path.write_text("hello")
        return path
    if kind == "nan":
        observations[17, 3] = np.nan
    if kind == "infinite reward":
        rewards[5] = np.inf
    if kind == "too large for float32":
        rewards = rewards.astype(np.float64)
        rewards[5] = 1e300
    if kind == "nan flag":
        timeouts = np.where(np.arange(len(timeouts)) == 5, np.nan, timeouts)
    if kind == "complex":
        rewards = rewards.astype(complex)
    if kind == "text":
        actions = np.array([b"left"] * len(actions))
    if kind == "compound":
        actions = np.zeros(len(actions), dtype=[("x", np.float32), ("y", np.float32)])
    if kind == "one number":
        observations = np.float32(3)
    if kind == "no value":
        observations = h5py.Empty("f4")
    if kind == "three-dimensional":
        observations = observations[:, :, None, None]
    if kind == "other body":
        observations = observations[:, :10]
    if kind == "lengths disagree":
        actions = actions[:-1]
    if kind == "no rows":
        observations, actions, rewards, terminals, timeouts = (x[:0] for x in arrays)
    if kind == "no episode":
        terminals, timeouts = terminals & False, timeouts & False
    write_hdf5(path, observations, actions, rewards, terminals, timeouts)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind in (
        "no key",
        "group",
        "HDF5 link loop",
        "external link loop",
        "dangling link",
        "virtual",
        "external",
        "larger than memory",
        "larger than any memory",
    ):
        with h5py.File(path, "a") as f:
            del f["rewards"]
            if kind == "group":
                f.create_group("rewards")
            if kind == "HDF5 link loop":
                f["rewards"] = h5py.SoftLink("/rewards")
            if kind == "external link loop":
                f["rewards"] = h5py.ExternalLink(path.name, "/rewards")
            if kind == "dangling link":
                f["rewards"] = h5py.ExternalLink("nowhere.hdf5", "/rewards")
            if kind == "virtual":
                layout = h5py.VirtualLayout(rewards.shape, "f4")
                layout[:] = h5py.VirtualSource("nowhere.hdf5", "rewards", rewards.shape)
                f.create_virtual_dataset("rewards", layout)
            if kind == "external":
                f.create_dataset("rewards", rewards.shape, "f4", external=[("nowhere.raw", 0, rewards.nbytes)])
            if kind == "larger than memory":
                f.create_dataset("rewards", (2**48,), "f4", chunks=(1024,))  # 1 PB, none of it stored
            if kind == "larger than any memory":
                f.create_dataset("rewards", (2**60, 2**3), "f4", chunks=(1024, 1))
    return path


@pytest.mark.parametrize(
    "kind, says",
    [
        ("missing", "No such file"),
        ("folder", "not a regular file"),
        ("link to itself", "No such file"),
        ("not HDF5", "signature not found"),
        ("truncated", "truncated"),
        ("half", "truncated"),
        ("no key", "'rewards'"),
        ("group", "'rewards'"),
        ("HDF5 link loop", "many links"),
        ("external link loop", "'rewards' lies in another file"),
        ("dangling link", "'rewards' lies in another file"),
        ("virtual", "'rewards'"),
        ("external", "external raw data"),
        ("complex", "'rewards'"),
        ("text", "'actions'"),
        ("compound", "'actions'"),
        ("one number", "observations"),
        ("no value", ""),
        ("three-dimensional", "observations has shape"),
        ("other body", "observations has shape"),
        ("lengths disagree", "actions has shape"),
        ("no rows", "no complete episode"),
        ("no episode", "no complete episode"),
        ("nan", "observations has a NaN or infinite value, first in row 17"),
        ("nan flag", "timeouts has a NaN or infinite"),
        ("infinite reward", "rewards has a NaN or infinite"),
        ("too large for float32", "rewards has a NaN or infinite"),
        ("larger than memory", ""),
        ("larger than any memory", ""),
    ],
)
def test_impossible_data_is_one_line(kind, says, tmp_path, run_main, hopper_arrays):
    path = foreign_file(tmp_path, hopper_arrays, kind)
    code, out, err = run_main(stage1, *argv(path, tmp_path / "runs", *TINY1))
    assert (code == 2 or code == 1 and "larger" in kind) and (path.name in err or "larger" in kind), err
    assert says in err and err.count("\n") == 1 and out == "" and not (tmp_path / "runs").exists(), err
    if kind in ("missing", "nan"):  # stage 2 reads with the same text
        assert run_main(stage2, *argv(path, tmp_path / "runs", *TINY2)) == (code, out, err)
        assert not (tmp_path / "runs").exists()


# ---- windows ----


def test_windows_equal_a_plain_loop(hopper_file):
    data, K = data_of(HOPPER, hopper_file), 6
    windows = stage2.Windows(data, K, CPU)
    starts = torch.randint(len(data.rewards), (200,), generator=torch.Generator().manual_seed(3))
    batch = windows.sample(200, torch.Generator().manual_seed(3))
    lengths = set()
    for row, i in enumerate(starts.tolist()):
        e = int(np.searchsorted(data.ends, i, side="right"))
        stop = min(i + K, int(data.ends[e]))
        n = stop - i
        lengths.add(n)
        assert batch.valid[row].tolist() == [False] * (K - n) + [True] * n
        rtg = [data.rewards[j : data.ends[e]].sum(dtype=np.float64) / 1000 for j in range(i, stop)]
        np.testing.assert_allclose(batch.rtg[row, K - n :], rtg, rtol=1e-5)
        obs = (data.observations[i:stop] - data.obs_mean.numpy()) / data.obs_std.numpy()
        np.testing.assert_allclose(batch.obs[row, K - n :], obs, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(batch.act[row, K - n :], data.actions[i:stop])
        np.testing.assert_array_equal(batch.reward[row, K - n :], data.rewards[i:stop])
        np.testing.assert_array_equal(batch.terminal[row, K - n :], data.terminals[i:stop])
        np.testing.assert_array_equal(batch.timestep[row, K - n :], np.arange(i, stop) - data.starts[e])
        for name, x in batch._asdict().items():
            assert not x[row, : K - n].any(), name
    assert lengths == set(range(1, K + 1))


def test_antmaze_critic_sees_rewards_minus_one_and_the_policy_raw_returns(antmaze_file):
    data = data_of("antmaze-umaze-test", antmaze_file)
    windows = stage2.Windows(data, 4, CPU)
    np.testing.assert_allclose(windows.reward, data.rewards - 1)
    assert set(windows.rtg.unique().tolist()) <= {0.0, 1.0} and data.returns.max() == 1


# ---- D4RL itself ----


@pytest.fixture(scope="module")
def d4rl():
    if importlib.util.find_spec("d4rl") is None:
        pytest.skip("the d4rl package is not installed: pip install -r tests/requirements-oracle.txt")
    sys.modules.setdefault("mujoco_py", None)  # d4rl imports without it, as long as no environment is made
    import d4rl
    import d4rl.infos

    return d4rl


@pytest.mark.oracle
def test_urls_and_reference_scores_are_d4rls(d4rl, monkeypatch, tmp_path):
    asked = []

    def refuse(url, **_):
        asked.append(url)
        raise OSError("no network in this test")

    monkeypatch.setattr(prepare.urllib.request, "urlopen", refuse)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    for name in GYM + MAZE + list(prepare.qalign_mazes.MAZE2D):
        asked.clear()
        task = task_of(name)
        with pytest.raises(SystemExit):
            prepare.prepare(name, (), tmp_path)
        assert asked[0] == asked[1] == d4rl.infos.DATASET_URLS[name]
        assert asked[2:] == [f"{prepare.MIRROR_URL}/{asked[0].rpartition('/')[2]}"]
        assert (task.ref_min, task.ref_max) == (d4rl.infos.REF_MIN_SCORE[name], d4rl.infos.REF_MAX_SCORE[name])


@pytest.mark.oracle
def test_transitions_and_episodes_are_d4rls(d4rl, hopper_file, hopper_arrays):
    raw = dict(zip(KEYS, hopper_arrays))
    data = data_of(HOPPER, hopper_file)
    episodes = list(d4rl.sequence_dataset(SimpleNamespace(_max_episode_steps=1000), raw))
    assert [len(e["rewards"]) for e in episodes] == data.lengths.tolist()
    for episode, a, b in zip(episodes, data.starts, data.ends):
        np.testing.assert_array_equal(episode["observations"], data.observations[a:b])
        np.testing.assert_array_equal(episode["actions"], data.actions[a:b])

    theirs = d4rl.qlearning_dataset(SimpleNamespace(_max_episode_steps=1000), raw)
    ours = stage1.Transitions(data, CPU, 0.99)
    rows = ours.usable[ours.usable < len(data.rewards) - 1]  # D4RL's loop never looks at the file's last row
    np.testing.assert_array_equal(theirs["observations"], data.observations[rows])
    np.testing.assert_array_equal(theirs["rewards"], ours.reward[rows])
    np.testing.assert_array_equal(theirs["terminals"], ours.terminal[rows])
    alive = ~theirs["terminals"]
    np.testing.assert_array_equal(theirs["next_observations"][alive], data.observations[rows + 1][alive])
