"""The reader, the windows and the download, against plain loops, D4RL's own code and a local HTTP server."""

import functools
import http.server
import importlib.util
import os
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train_qalign_dt as stage2
from conftest import write_hdf5

GYM = [f"{b}-{q}-v2" for b in ("hopper", "halfcheetah", "walker2d", "ant") for q in stage2.QUALITIES]
MAZE = [f"antmaze-{m}-v2" for m in stage2.MAZES]
HOPPER = stage2.parse_env("hopper-medium-test")


# ---- names ----


@pytest.mark.parametrize("name", GYM + MAZE + ["hopper-mini", "hopper-mixed-zoo", "walker2d-medium-replay-local"])
def test_known_names(name):
    task = stage2.parse_env(name)
    assert (
        name.startswith(task.body) and task.score(task.ref_max) == pytest.approx(100) and task.score(task.ref_min) == 0
    )


@pytest.mark.parametrize("name, close", [("hoper-medium-v2", "hopper-medium-v2"), ("hopper-medum-zoo", "hopper-medium"), ("", "-v2"),
                                         ("hopper-medium-expert", "hopper-medium-expert-v2"), ("hopper-mixed-v2", "hopper-medium-v2"), ("hopper-medium-../x", "hopper-medium-v2")])  # fmt: skip
def test_unknown_names_name_the_closest(name, close, capsys):
    with pytest.raises(SystemExit) as exit:
        stage2.parse_env(name)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and close in error and error.count("\n") == 1


# ---- reader ----


def test_reader_keeps_rows_and_boundaries(hopper_file, hopper_arrays):
    data = stage2.read_dataset(HOPPER, (str(hopper_file),))
    observations, actions, rewards, terminals, timeouts = hopper_arrays
    np.testing.assert_array_equal(data.observations, observations)
    np.testing.assert_array_equal(data.ends, np.flatnonzero(terminals | timeouts) + 1)
    np.testing.assert_allclose(
        data.returns, [rewards[a:b].sum(dtype=np.float64) for a, b in zip(data.starts, data.ends)]
    )
    np.testing.assert_allclose(data.obs_std, observations.std(axis=0) + 1e-6, rtol=1e-4)
    assert not data.is_d4rl and "hopper_tiny.hdf5" in data.label and "v2" not in data.label


def test_incomplete_tails_are_dropped_per_file_and_files_are_joined(tmp_path, hopper_arrays, hopper_file):
    cut = [x[:-2] for x in hopper_arrays]  # the last episode now has neither flag
    file = write_hdf5(tmp_path / "cut.hdf5", *cut)
    one = stage2.read_dataset(HOPPER, (str(file),))
    assert one.ends[-1] == np.flatnonzero(cut[3] | cut[4])[-1] + 1 < len(cut[0])
    two = stage2.read_dataset(HOPPER, (str(file), str(hopper_file)))
    n = len(one.rewards)
    assert two.ends[len(one.ends) - 1] == n and len(two.rewards) == n + len(hopper_arrays[0])
    np.testing.assert_array_equal(two.observations[n:], hopper_arrays[0])
    assert two.hash != one.hash and two.files == ["cut.hdf5", "hopper_tiny.hdf5"]


def test_reward_columns_and_clipped_actions(tmp_path, hopper_arrays, capsys):
    observations, actions, rewards, terminals, timeouts = (x.copy() for x in hopper_arrays)
    actions[:7, 1] = 1.5
    file = write_hdf5(tmp_path / "x.hdf5", observations, actions, rewards[:, None], terminals[:, None], timeouts)
    data = stage2.read_dataset(HOPPER, (str(file),))
    assert data.rewards.shape == (len(rewards),) and np.abs(data.actions).max() == 1
    assert data.clipped == 7


def test_hash_is_of_the_content(tmp_path, hopper_arrays):
    def hash_of(name, arrays):
        return stage2.read_dataset(HOPPER, (str(write_hdf5(tmp_path / name, *arrays)),)).hash

    changed = [x.copy() for x in hopper_arrays]
    changed[2][3] += 1e-3
    assert hash_of("a.hdf5", hopper_arrays) == hash_of("b.hdf5", hopper_arrays) != hash_of("c.hdf5", changed)


def test_ant_with_contact_forces_is_refused(tmp_path, capsys):
    task, n = stage2.parse_env("ant-medium-test"), 10
    observations = np.zeros((n, 111), np.float32)
    flags = np.arange(n) == n - 1
    arrays = [observations, np.zeros((n, 8), np.float32), np.zeros(n, np.float32), flags, ~flags & False]
    assert len(stage2.read_dataset(task, (str(write_hdf5(tmp_path / "a.hdf5", *arrays)),)).rewards) == n
    observations[3, 50] = 0.1
    with pytest.raises(SystemExit):
        stage2.read_dataset(task, (str(write_hdf5(tmp_path / "b.hdf5", *arrays)),))
    assert "contact forces" in capsys.readouterr().err


# ---- windows ----


def test_windows_equal_a_plain_loop(hopper_file):
    data, K = stage2.read_dataset(HOPPER, (str(hopper_file),)), 6
    windows = stage2.Windows(data, HOPPER, K, torch.device("cpu"))
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
        for x in batch[:6]:
            assert not x[row, : K - n].any()
    assert lengths == set(range(1, K + 1))


def test_antmaze_critic_sees_rewards_minus_one_and_the_policy_raw_returns(antmaze_file):
    task = stage2.parse_env("antmaze-umaze-test")
    data = stage2.read_dataset(task, (str(antmaze_file),))
    windows = stage2.Windows(data, task, 4, torch.device("cpu"))
    np.testing.assert_allclose(windows.reward, data.rewards - 1)
    assert set(windows.rtg.unique().tolist()) <= {0.0, 1.0} and data.returns.max() == 1


# ---- D4RL itself ----


@pytest.fixture(scope="module")
def d4rl():
    if importlib.util.find_spec("d4rl") is None:
        pytest.skip("the d4rl package has no wheels here (Linux x86-64 with Python < 3.12 only)")
    sys.modules.setdefault("mujoco_py", None)  # d4rl imports without it, as long as no environment is made
    import d4rl
    import d4rl.infos

    return d4rl


def test_urls_and_reference_scores_are_d4rls(d4rl, monkeypatch, tmp_path):
    asked = []

    def refuse(url, timeout):
        asked.append(url)
        raise OSError("no network in this test")

    monkeypatch.setattr(stage2.urllib.request, "urlopen", refuse)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    for name in GYM + MAZE:
        task = stage2.parse_env(name)
        with pytest.raises(SystemExit):
            stage2.d4rl_file(task)
        assert asked[-1] == d4rl.infos.DATASET_URLS[name]
        assert (task.ref_min, task.ref_max) == (d4rl.infos.REF_MIN_SCORE[name], d4rl.infos.REF_MAX_SCORE[name])


def test_transitions_and_episodes_are_d4rls(d4rl, hopper_file, hopper_arrays):
    import pretrain_q as stage1

    keys = ("observations", "actions", "rewards", "terminals", "timeouts")
    raw = dict(zip(keys, hopper_arrays))
    data = stage1.read_dataset(stage1.parse_env("hopper-medium-test"), (str(hopper_file),))
    episodes = list(d4rl.sequence_dataset(SimpleNamespace(_max_episode_steps=1000), raw))
    assert [len(e["rewards"]) for e in episodes] == data.lengths.tolist()
    for episode, a, b in zip(episodes, data.starts, data.ends):
        np.testing.assert_array_equal(episode["observations"], data.observations[a:b])
        np.testing.assert_array_equal(episode["actions"], data.actions[a:b])

    theirs = d4rl.qlearning_dataset(SimpleNamespace(_max_episode_steps=1000), raw)
    t = stage1.Transitions(data, stage1.parse_env("hopper-medium-test"), torch.device("cpu"), 0.99)
    rows = torch.cat([t.train, t.held_out]).sort().values
    rows = rows[rows < len(data.rewards) - 1]  # D4RL's loop never looks at the file's last row
    np.testing.assert_array_equal(theirs["observations"], data.observations[rows])
    np.testing.assert_array_equal(theirs["rewards"], t.reward[rows])
    np.testing.assert_array_equal(theirs["terminals"], t.terminal[rows])
    going_on = ~theirs["terminals"]
    np.testing.assert_array_equal(theirs["next_observations"][going_on], data.observations[rows + 1][going_on])


# ---- download ----


@pytest.fixture
def server(tmp_path, monkeypatch, hopper_file):
    """A local HTTP server in the place of D4RL's; yields the folder it serves and D4RL's cache folder."""
    root = tmp_path / "served"
    (root / "gym_mujoco_v2").mkdir(parents=True)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))

    class Handler(http.server.SimpleHTTPRequestHandler):
        short = 0

        def log_message(self, *args):
            pass

        def copyfile(self, source, out):
            out.write(source.read()[: -self.short or None])

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=root))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(stage2, "D4RL_URL", f"http://127.0.0.1:{httpd.server_port}")
    yield root / "gym_mujoco_v2" / "hopper_medium-v2.hdf5", tmp_path / "cache", Handler
    httpd.shutdown()
    httpd.server_close()


def test_download_then_cache(server, hopper_file, monkeypatch):
    served, cache, _ = server
    served.write_bytes(hopper_file.read_bytes())
    task = stage2.parse_env("hopper-medium-v2")
    data = stage2.read_dataset(task, ())
    assert data.is_d4rl and data.label == "hopper-medium-v2 (D4RL)" and os.listdir(cache) == ["hopper_medium-v2.hdf5"]
    monkeypatch.setattr(stage2, "D4RL_URL", "http://127.0.0.1:9")  # nothing listens there: the cache must do
    assert stage2.read_dataset(task, ()).hash == data.hash


@pytest.mark.parametrize("trouble", ["cut off", "not HDF5", "missing", "unreachable"])
def test_a_failed_download_leaves_nothing_and_says_what_to_do(server, hopper_file, trouble, monkeypatch, capsys):
    served, cache, handler = server
    if trouble != "missing":
        served.write_bytes(b"<html>moved</html>" if trouble == "not HDF5" else hopper_file.read_bytes())
    if trouble == "cut off":
        handler.short = 1000
    if trouble == "unreachable":
        monkeypatch.setattr(stage2, "D4RL_URL", "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as exit:
        stage2.read_dataset(stage2.parse_env("hopper-medium-v2"), ())
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and stage2.D4RL_URL in error and str(cache) in error and "--dataset-path" in error
    assert not cache.exists() or os.listdir(cache) == []
    assert trouble != "cut off" or "bytes arrived" in error
