"""data/prepare.py: what dataset.pt holds and when it is made again, which data are refused, downloads, any environment.

The plain reader is in test_data.py, Minari's layout in test_minari.py, Maze2D in test_maze2d.py.
"""

import contextlib
import fcntl
import hashlib
import http.server
import importlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import prepare
import pytest
import torch
from conftest import ENV, ROOT, TINY1, TINY2, argv, data_of, record, tree, write_hdf5

import evaluate_alignment as stage3
import pretrain_q as stage1
import train_qalign_dt as stage2

FOLDER = f"{ENV}__data"


@pytest.fixture
def source(tmp_path, hopper_file):
    return Path(shutil.copy(hopper_file, tmp_path / "source.hdf5"))


def assert_refused(result, *says, code=2, out="") -> None:
    """A stage's exit code, one line of error, and nothing else."""
    assert result[0] == code and result[2].count("\n") == 1 and result[2].startswith("error: "), result
    for text in says:
        assert str(text) in result[2], result
    assert out is None or result[1] == out, result


def refused(capsys, env: str, *files) -> str:
    """prepare's line of error on data that leave no file."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        data_of(env, *files)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1, error
    return error


def set_attributes(path: Path, **attributes) -> Path:
    with h5py.File(path, "a") as f:
        f.attrs.update(attributes)
    return path


# ---- dataset.pt ----


def test_dataset_pt_holds_tensors_and_plain_values(source, tmp_path, run_main, hopper_arrays):
    flags = ("--env", ENV, "--dataset-path", source, "--runs-dir", tmp_path / "runs")
    code, out, err = run_main(prepare, *flags)
    file = tmp_path / "runs" / FOLDER / "dataset.pt"
    content, sha = torch.load(file, weights_only=True), hashlib.sha256(source.read_bytes()).hexdigest()
    assert code == 0 and sha[:16] in out and f"{len(hopper_arrays[0]):,} transitions" in out, err
    assert (content.pop("stage"), content.pop("format")) == ("prepare", stage2.FORMAT)
    task = content.pop("task")
    rows = dict(observations=torch.float32, actions=torch.float32, rewards=torch.float32, terminals=torch.bool)
    types = rows | dict(ends=torch.int64, obs_mean=torch.float32, obs_std=torch.float32)
    assert {name: x.dtype for name, x in content.items()} == types
    assert all(x.is_contiguous() for x in content.values()) and len(content["ends"]) == 60
    for name, x in zip(rows, hopper_arrays):
        np.testing.assert_array_equal(content[name], x)
    assert set(task) == set(prepare.Task.__dataclass_fields__) and set(json.loads(json.dumps(task))) == set(task)
    status = source.stat()
    sources = [dict(name="source.hdf5", size=status.st_size, time=status.st_mtime_ns, sha256=sha)]
    assert task["sources"] == sources and task["label"] == "hopper data, not D4RL: source.hdf5"
    assert str(tmp_path).encode() not in file.read_bytes()  # a file is never recorded by its path
    before = tree(tmp_path)
    code, out, err = run_main(prepare, *flags)
    assert code == 0 and "ready" in out and "transitions" not in out and tree(tmp_path) == before, err


def test_the_readmes_arrays_become_a_file_and_a_dataset(tmp_path, hopper_arrays, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "data" / "README.md").read_text()
    to_hdf5, to_dataset = (block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "import" in block)
    names = dict(zip(("obs", "act", "rew", "ended", "cut"), hopper_arrays))
    exec(to_hdf5, dict(names))
    exec(to_dataset, dict(names))
    file, own = data_of("hopper-medium-mine", "mine.hdf5"), stage2.Dataset(prepare.prepare("hopper-medium-mine"))
    for name in ("observations", "actions", "rewards", "terminals", "ends"):
        np.testing.assert_array_equal(getattr(file, name), getattr(own, name))
    np.testing.assert_allclose(own.obs_std, file.obs_std, rtol=1e-4)
    assert own.task.rtg_range == pytest.approx(file.task.rtg_range, rel=1e-5)


def test_data_of_other_sources_are_refused(source, hopper_file, tmp_path, run_main):
    runs = tmp_path / "runs"
    prepare.prepare(ENV, (str(source),), runs)
    before = tree(runs)
    for files in ([hopper_file], [source, hopper_file], [hopper_file, source]):
        flags = ["--env", ENV, "--runs-dir", runs, "--dataset-path", *files]
        for stage in (prepare, stage1, stage2):
            assert_refused(run_main(stage, *flags), "holds data of source.hdf5", "another --runs-dir")
    assert tree(runs) == before


def test_changed_sources_are_read_again_unless_runs_are_of_the_old_ones(source, tmp_path, hopper_arrays, run_main):
    runs = tmp_path / "runs"
    old = prepare.prepare(ENV, (str(source),), runs)["task"]["digest"]
    hashed, real = [], hashlib.file_digest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare.hashlib, "file_digest", lambda *args: hashed.append(args) or real(*args))
        before = tree(runs)
        assert prepare.prepare(ENV, (str(source),), runs)["task"]["digest"] == old and not hashed
        os.utime(source, (1, 1))  # the same bytes at another time: only looked at
        assert prepare.prepare(ENV, (str(source),), runs)["task"]["digest"] == old and len(hashed) == 1
        assert tree(runs) == before
    (runs / f"{ENV}2__pretrain_q__1").mkdir()
    (runs / f"{ENV}2__pretrain_q__1" / "critic.pt").touch()  # of another task
    write_hdf5(source, *(x[:-40] for x in hopper_arrays))
    found = prepare.prepare(ENV, (str(source),), runs)["task"]
    assert found["digest"] != old and found["sources"][0]["size"] == source.stat().st_size
    write_hdf5(source, *(x[:-60] for x in hopper_arrays))
    before = (runs / FOLDER / "dataset.pt").read_bytes()
    for name in ("critic.pt", "resume.pt", "policy.pt"):
        run = runs / f"{ENV}__mine__1" / name
        run.parent.mkdir(exist_ok=True)
        run.touch()
        for stage in (prepare, stage2):
            assert_refused(run_main(stage, *argv(source, runs)), f"{source} has changed", run)
        run.unlink()
    assert (runs / FOLDER / "dataset.pt").read_bytes() == before
    assert prepare.prepare(ENV, (str(source),), runs)["task"]["digest"] != found["digest"]


def test_without_its_sources_a_dataset_is_used_as_it_is(source, tmp_path, run_main):
    """In a runs folder that was copied to another machine."""
    runs = tmp_path / "runs"
    made = prepare.prepare(ENV, (str(source),), runs)
    shutil.move(runs, tmp_path / "copied")
    source.unlink()
    found = prepare.prepare(ENV, (), tmp_path / "copied")
    assert found["task"] == made["task"] and torch.equal(found["observations"], made["observations"])
    assert_refused(run_main(prepare, *argv(source, tmp_path / "copied")), source, "No such file")
    assert_refused(run_main(prepare, "--env", ENV, "--runs-dir", runs), f"{ENV}.hdf5 is missing")
    assert not runs.exists()


def test_two_processes_prepare_the_same_data_once(source, tmp_path, monkeypatch, patience):
    saved, said, waits, real = [], [], threading.Event(), torch.save

    def save(*args):
        saved.append(args)
        assert waits.wait(5)  # until the other one stands before the lock
        real(*args)

    def say(text, **_):
        said.append(text)
        if "waiting for another process" in text:
            waits.set()

    monkeypatch.setattr(prepare.torch, "save", save)
    monkeypatch.setattr(stage2, "print", say, raising=False)
    results = []
    prepares = [
        threading.Thread(target=lambda: results.append(prepare.prepare(ENV, (str(source),), tmp_path)))
        for _ in range(2)
    ]
    for thread in prepares:
        thread.start()
    for thread in prepares:
        thread.join()
    assert len(saved) == 1 and len(results) == 2 and results[0]["task"] == results[1]["task"]
    assert set(os.listdir(tmp_path / FOLDER)) - {".lock"} == {"dataset.pt"}


@contextlib.contextmanager
def interrupted(seconds: float):
    """Ctrl-C after a while."""
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_ctrl_c_ends_the_waiting(source, tmp_path, run_main):
    (tmp_path / FOLDER).mkdir()
    with open(tmp_path / FOLDER / ".lock", "w") as lock, interrupted(1.0):
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another process does
        result = run_main(stage2, *argv(source, tmp_path))
    assert "waiting for another process" in result[1]
    assert_refused(result, "interrupted", code=130, out=None)
    assert os.listdir(tmp_path / FOLDER) == [".lock"]


@pytest.mark.parametrize("stage", [prepare, stage2], ids=["prepare", "train_qalign_dt"])
def test_a_full_disk_leaves_no_half_file(source, tmp_path, run_main, stage):
    runs = tmp_path / "runs"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        result = run_main(stage, *argv(source, runs))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_refused(result, "File too large", code=1, out=None)
    assert set(os.listdir(runs / FOLDER)) <= {".lock"}
    (runs / FOLDER / "dataset.pt.99.tmp").touch()  # of a process that was killed
    assert run_main(prepare, *argv(source, runs))[0] == 0
    assert set(os.listdir(runs / FOLDER)) - {".lock"} == {"dataset.pt"}


def test_a_file_that_is_no_dataset_is_one_line_and_stays(source, tmp_path, run_main, patience):
    file, made = tmp_path / FOLDER / "dataset.pt", tmp_path / "made.pt"
    prepare.prepare(ENV, (str(source),), tmp_path)
    shutil.move(file, made)
    content = torch.load(made, weights_only=True)

    def other(**values):
        return torch.save(content | values, file)

    def task(**values):
        other(task=content["task"] | values)

    damages = {
        "a named pipe": lambda: os.mkfifo(file),
        "a folder": lambda: file.mkdir(),
        "a link to nothing": lambda: file.symlink_to("nothing"),
        "text": lambda: file.write_text("hello"),
        "half": lambda: file.write_bytes(made.read_bytes()[: made.stat().st_size // 2]),
        "a critic": lambda: other(stage="pretrain_q"),
        "an older format": lambda: other(format=5),
        "no task": lambda: other(task=None),
        "a horizon of text": lambda: task(horizon="long"),
        "no targets": lambda: task(targets=()),
        "a label with an escape": lambda: task(label="\x1b[31m"),
        "sources of numbers": lambda: task(sources=[3]),
        "another scale": lambda: task(rtg_scale=float("nan")),
        **{f"no {name}": lambda name=name: task(**{name: None}) for name in ("name", "env_id", "sources", "ref_min")},
    }
    trained = {  # what only the stages that train look at
        **{f"without {key}": lambda key=key: torch.save({k: x for k, x in content.items() if k != key}, file)
           for key in ("observations", "actions", "rewards", "terminals", "ends", "obs_mean", "obs_std")},
        "actions of another type": lambda: other(actions=content["actions"].double()),
        "rewards of another length": lambda: other(rewards=content["rewards"][:-1]),
        "no standard deviation": lambda: other(obs_std=0 * content["obs_std"]),
        "episodes that go back": lambda: other(ends=content["ends"].flip(0)),
        "a NaN": lambda: other(rewards=content["rewards"] / 0),
        "another body's size": lambda: task(obs_dim=17),
    }  # fmt: skip
    for kind, damage in (damages | trained).items():
        damage()
        for stage in (prepare, stage2) if kind in damages else (stage1, stage2):
            result = run_main(stage, "--env", ENV, "--runs-dir", tmp_path)
            assert result[0] == 2 and result[2].count("\n") == 1 and str(file) in result[2], (kind, stage, result)
        assert os.path.lexists(file), kind
        file.rmdir() if file.is_dir() else file.unlink()
    assert not list(tmp_path.glob("*/*.tmp"))


def test_names_that_are_too_long_or_cannot_be_printed(hopper_file, tmp_path, capsys):
    odd = "\x1b" * 90 + "\n" + "x" * 100
    files = [shutil.copy(hopper_file, tmp_path / f"{i}{odd}.hdf5") for i in range(4)]
    label = data_of(ENV, *files).task.label
    assert label.isprintable() and len(label) <= 400 and r"0\x1b" in label
    for env in (f"hopper-medium-{'x' * 300}", f"mujoco/{'x' * 300}-v0"):
        assert "at most 200 characters" in refused(capsys, env, hopper_file)


# ---- which data are refused ----


@pytest.mark.parametrize(
    "env, attribute, says",
    [
        ("walker2d-medium-y", "HalfCheetah-v4", "recorded in HalfCheetah-v4"),  # of the same sizes
        ("ant-medium-y", "Ant-v5", "recorded in Ant-v5"),
        ("walker2d-medium-y", "Walker2d-v3", "recorded in Walker2d-v3"),
        ("walker2d-medium-y", np.bytes_(b"\xff"), "codec"),
        ("walker2d-medium-y", 3, "not plain"),
        ("walker2d-medium-y", ["Walker2d-v4"], "not plain"),
        ("walker2d-medium-y", "a\n\x1b[31m", r"recorded in a\n\x1b[31m"),
    ],
)
def test_data_of_another_environment_are_refused(env, attribute, says, tmp_path, run_main):
    N, task = 20, prepare.parse_env(env)
    arrays = (np.zeros((N, task["obs_dim"])), np.zeros((N, task["act_dim"])), np.zeros(N), np.arange(N) == N - 1)
    file = write_hdf5(tmp_path / "x.hdf5", *arrays, np.zeros(N, bool))
    set_attributes(file, env_id=attribute)
    flags = ("--env", env, "--dataset-path", file, "--runs-dir", tmp_path / "runs")
    for stage in (prepare, stage2):
        assert_refused(run_main(stage, *flags), file, says)
    assert not (tmp_path / "runs").exists()


def test_equal_returns_and_episodes_longer_than_a_rollout_are_warned_of(tmp_path, hopper_arrays, capsys):
    observations, actions, rewards, terminals, timeouts = (np.resize(x, (1200, *x.shape[1:])) for x in hopper_arrays)
    equal = write_hdf5(tmp_path / "equal.hdf5", observations, actions, 0 * rewards, terminals, timeouts)
    one = np.arange(1200) == 1199
    long = write_hdf5(tmp_path / "long.hdf5", observations, actions, rewards, 0 * one, one)
    for file, says in (
        (equal, "all returns are 0: there is"),
        (long, "episodes of up to 1,200 steps, rollouts of fewer"),
    ):
        capsys.readouterr()
        data_of(ENV, file)
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error


def test_other_environments_need_a_name_like_minaris_and_an_env_id(tmp_path, hopper_arrays, capsys):
    file = write_hdf5(tmp_path / "x.hdf5", *hopper_arrays)
    assert "(your own set: me/mine-v0)" in refused(capsys, "me/mine", file)
    assert "other bodies: me/mine-v0" in refused(capsys, "swimmer-medium-mine", file)
    assert "set its attribute env_id" in refused(capsys, "me/mine-v0", file)
    assert data_of("me/mine-v0", set_attributes(file, env_id="Hopper-v4")).task.obs_dim == 11


def test_bodies_of_v5_are_evaluated_in_v5(tmp_path, hopper_arrays, capsys):
    file = write_hdf5(tmp_path / "x.hdf5", *hopper_arrays)
    assert data_of(ENV, file).task.env_id == "Hopper-v4"  # D4RL's files do not say
    for attribute, env_id in (
        ("Hopper-v4", "Hopper-v4"),
        (np.bytes_("Hopper-v5"), "Hopper-v5"),
        ("Hopper-v5", "Hopper-v5"),
    ):
        capsys.readouterr()
        data = data_of(ENV, set_attributes(file, env_id=attribute))
        assert data.task.env_id == env_id and data.task.ref_max == 3234.3
        assert ("evaluated there" in capsys.readouterr().out) == (env_id == "Hopper-v5")
    v4 = write_hdf5(tmp_path / "v4.hdf5", *hopper_arrays)
    assert "recorded in Hopper-v4" in refused(capsys, ENV, file, v4)  # not together in one


def lengths_file(path: Path, *episodes: tuple[int, str], arrays, **attributes) -> Path:
    """A file of episodes (length, the array that ends it: terminals or timeouts), cut from rows that stand for any."""
    n = np.cumsum([length for length, _ in episodes])
    flags = {name: np.zeros(n[-1], bool) for name in ("terminals", "timeouts")}
    for last, (_, name) in zip(n - 1, episodes):
        flags[name][last] = True
    rows = (x[np.arange(n[-1]) % len(x)] for x in arrays[:3])
    return set_attributes(write_hdf5(path, *rows, **flags), **attributes)


@pytest.mark.parametrize(
    "episodes, attributes, horizon",
    [
        ([(200, "timeouts")] * 20, {}, 200),
        ([(200, "timeouts"), (30, "terminals"), (200, "timeouts")], {}, 200),
        ([(200, "timeouts"), (100, "timeouts")], {}, 1000),  # where one was cut for another reason
        ([(20, "terminals"), (30, "terminals"), (40, "timeouts")], {}, 1000),  # the end of the recording alone
        ([(1000, "timeouts")] * 2, {}, 1000),
        ([(1500, "timeouts")] * 2, {}, 1000),  # the environment's own limit stays
        ([(40, "terminals")] * 3, {}, 1000),
        ([(40, "terminals"), (13, "timeouts")], {}, 1000),  # the end of the file, and no limit: one is longer
        ([(200, "timeouts")] * 2, dict(max_episode_steps=300), 300),
        ([(40, "terminals")] * 2, dict(max_episode_steps=50), 50),
    ],
)
def test_the_horizon_is_that_of_the_data(episodes, attributes, horizon, tmp_path, hopper_arrays, capsys):
    file = lengths_file(tmp_path / "x.hdf5", *episodes, arrays=hopper_arrays, **attributes)
    assert data_of(ENV, file).task.horizon == horizon
    assert (f"episodes of at most {horizon:,} steps" in capsys.readouterr().out) == (horizon != 1000)


def test_d4rls_own_files_keep_d4rls_horizon(tmp_path, hopper_arrays, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    lengths_file(tmp_path / "hopper_medium-v2.hdf5", (200, "timeouts"), arrays=hopper_arrays)
    assert data_of("hopper-medium-v2").task.horizon == 1000


def test_d4rls_own_file_is_known_by_any_path(tmp_path, hopper_arrays, monkeypatch):
    file = lengths_file(tmp_path / "hopper_medium-v2.hdf5", (200, "timeouts"), arrays=hopper_arrays)
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D4RL_DATASET_DIR", ".")
    for i, path in enumerate((None, file, tmp_path / "link" / file.name)):
        paths = (str(path),) if path else ()
        assert prepare.prepare("hopper-medium-v2", paths, str(tmp_path / f"runs{i}"))["task"]["is_d4rl"], path


def test_a_best_return_of_0_is_asked_for_once(tmp_path, hopper_arrays):
    """1.2 times it is the same."""
    observations, actions, rewards = hopper_arrays[:3]
    file = lengths_file(tmp_path / "x.hdf5", *[(20, "terminals")] * 3, arrays=(observations, actions, -abs(rewards)))
    with h5py.File(file, "a") as f:
        f["rewards"][:20] = 0
    assert data_of(ENV, file).task.targets == (0.0,)


@pytest.mark.parametrize("limit", [0, -5, 10**9, 3.5, "all", [3, 4]])
def test_an_impossible_limit_is_one_line(limit, source, capsys):
    assert "max_episode_steps" in refused(capsys, ENV, set_attributes(source, max_episode_steps=limit))


def test_rollouts_stop_where_the_datas_episodes_do(tmp_path, run_main):
    """HalfCheetah never falls: of episodes of 12 steps nobody can ask for returns of 1,000."""
    file, env = write_hdf5(tmp_path / "x.hdf5", *record("HalfCheetah-v4", 8, 12)), "halfcheetah-medium-x"
    flags = ("--env", env, "--runs-dir", tmp_path)
    dt = [*TINY2, "--lambda-e", 0, "--total-steps", 2, "--eval-every", 2]
    code, out, err = run_main(stage2, *flags, "--dataset-path", file, *dt)
    assert code == 0 and "episodes of at most 12 steps" in out, err
    code, out, err = run_main(stage3, *flags, "--rollouts", 1)
    result = json.loads((tmp_path / f"{env}__train_qalign_dt__1" / "alignment.json").read_text())
    assert code == 0 and {row["length_mean"] for row in result["sweep"]} == {12}, err


def test_rows_after_the_last_end_are_said_and_too_many_of_them_refused(tmp_path, hopper_arrays, capsys):
    observations, actions, rewards = (x[:100] for x in hopper_arrays[:3])

    def file(last):
        flags = np.arange(100) == last
        return write_hdf5(tmp_path / "x.hdf5", observations, actions, rewards, flags, flags & False)

    assert len(data_of(ENV, file(69)).rewards) == 70
    assert f"{tmp_path / 'x.hdf5'}: 30 of 100 rows after the last end of an episode" in capsys.readouterr().out
    assert len(data_of(ENV, file(99)).rewards) == 100 and "rows after" not in capsys.readouterr().out
    assert len(data_of(ENV, file(49)).rewards) == 50
    assert "51 of 100 rows after the last end" in refused(capsys, ENV, file(48))


def test_a_constant_column_is_not_divided_by_its_spread(tmp_path, hopper_arrays):
    observations = hopper_arrays[0].copy()
    observations[:, 2], observations[:, 4], observations[:, 6] = 0.0, 1000.0, 1e-8 * observations[:, 5]
    observations[:, 8] = 1e4 + 1e-3 * (np.arange(len(observations)) % 2)
    data = data_of(ENV, write_hdf5(tmp_path / "x.hdf5", observations, *hopper_arrays[1:]))
    std = observations.std(axis=0, dtype=np.float64)
    expected = np.where(np.isin(np.arange(11), (2, 4, 6, 8)), 1.0, std + 1e-6)
    np.testing.assert_allclose(data.obs_std, expected, rtol=1e-6)
    moved = stage2.Windows(data, 2, torch.device("cpu")).obs
    assert moved[:, [2, 4, 6, 8]].abs().max() < 1e-3


def test_actions_on_another_scale_are_refused(tmp_path, hopper_arrays, capsys):
    N = len(hopper_arrays[0])

    def file(rows, value):
        actions = hopper_arrays[1].copy()
        actions[:rows, 1] = value
        return write_hdf5(tmp_path / "x.hdf5", hopper_arrays[0], actions, *hopper_arrays[2:])

    assert f"{N // 10 + 1:,} of {N:,} actions lie outside [-1, 1]" in refused(capsys, ENV, file(N // 10 + 1, -1.1))
    for rows, value, clipped in ((N // 10, 1.1, True), (N, 1 + 5e-7, False)):
        assert np.abs(data_of(ENV, file(rows, value)).actions).max() == 1
        assert (f"clipped {rows:,} actions" in capsys.readouterr().err) == clipped


def test_returns_beyond_any_range_name_the_data(tmp_path, hopper_arrays, run_main):
    arrays = [*hopper_arrays[:2], -1e8 * np.ones(len(hopper_arrays[0])), *hopper_arrays[3:]]
    file = write_hdf5(tmp_path / "x.hdf5", *arrays)
    for stage in (prepare, stage2):
        result = run_main(stage, *argv(file, tmp_path / "runs"))
        assert_refused(result, "x.hdf5: returns-to-go of up to 2e+06 x 1000", out=None)
        assert "--rtg-range" not in result[2]
    assert not (tmp_path / "runs").exists()


def test_other_layouts_get_the_line_that_helps(tmp_path, hopper_arrays, capsys, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    file = write_hdf5(tmp_path / "x.hdf5", *hopper_arrays)
    with h5py.File(file, "a") as f:
        del f["timeouts"]
    assert "no 'timeouts' (older D4RL files): add them" in refused(capsys, ENV, file)
    N = len(hopper_arrays[0])
    ant = (np.zeros((N, 27)), np.zeros((N, 8)), *hopper_arrays[2:])
    assert "84 zeros: append them" in refused(capsys, "ant-medium-x", write_hdf5(tmp_path / "a.hdf5", *ant))
    for name in ("hopper-medium-v0", "halfcheetah-expert-v1", "antmaze-umaze-v0"):
        assert "only -v2 is known" in refused(capsys, name, file)
    for name in ("antmaze-mini", "antmaze-mini-x"):
        assert "unknown --env" in refused(capsys, name, file)
    page = tmp_path / "hopper_medium-v2.hdf5"
    for text in ("<!DOCTYPE html><p>Moved", "\n <HTML>"):
        page.write_text(text)
        assert f"{page} is a web page" in refused(capsys, "hopper-medium-v2")


def test_nothing_but_a_regular_file_is_read(tmp_path, source, capsys, hopper_arrays, patience):
    """Neither a pipe, on which opening waits for ever, nor an array whose bytes or name lead to another file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert f"{pipe}: not a regular file" in refused(capsys, ENV, pipe)
    assert "/dev/zero: not a regular file" in refused(capsys, ENV, "/dev/zero")
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(100_000))
    rows = hopper_arrays[2].shape
    for target in (secret, pipe):
        shutil.copy(source, tmp_path / "external.hdf5")
        with h5py.File(tmp_path / "external.hdf5", "a") as f:
            del f["rewards"]
            f.create_dataset("rewards", rows, "f4", external=[(str(target), 0, h5py.h5f.UNLIMITED)])
        assert "'rewards' lies in another file" in refused(capsys, ENV, tmp_path / "external.hdf5")
    for target in (source, pipe):
        shutil.copy(source, tmp_path / "linked.hdf5")
        with h5py.File(tmp_path / "linked.hdf5", "a") as f:
            del f["rewards"]
            f["rewards"] = h5py.ExternalLink(str(target), "/rewards")
        assert "'rewards' lies in another file" in refused(capsys, ENV, tmp_path / "linked.hdf5")


# ---- download ----


class Server:
    """A local server for D4RL's and the mirror's files: every address answers in turn as `answers` says."""

    def __init__(self):
        self.answers, self.asked, self.end = {}, [], threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                server.asked.append(self.path)
                answers = server.answers.get(self.path, [404])
                server.answer(self, answers.pop(0) if len(answers) > 1 else answers[0])

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler, answer) -> None:
        kind, _, body = answer.partition(b" ") if isinstance(answer, bytes) else (answer, b"", b"")
        if isinstance(answer, int):
            return handler.send_error(answer, "no\r\n\x1b[31m such file" if answer == 418 else None)
        if kind == b"silent":
            self.end.wait(20)
            return None
        if kind == b"redirect":
            handler.send_response(302)
            handler.send_header("Location", body.decode())
            return handler.end_headers()
        handler.send_response(200)
        if kind != b"endless":
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2] if kind in (b"cut", b"stall") else body)
        handler.wfile.flush()
        if kind == b"stall":
            self.end.wait(20)
        return None

    def close(self) -> None:
        self.end.set()
        self.httpd.shutdown()
        self.httpd.server_close()


D4RL, MIRROR = "/offline_rl/gym_mujoco_v2/hopper_medium-v2.hdf5", "/mirror/hopper_medium-v2.hdf5"


@pytest.fixture
def server(tmp_path, monkeypatch, hopper_file):
    server = Server()
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # whatever proxy the machine has
    server.file, server.cache = hopper_file.read_bytes(), tmp_path / "cache"
    monkeypatch.setenv("D4RL_DATASET_DIR", str(server.cache))
    monkeypatch.setattr(prepare, "D4RL_URL", f"{server.url}/offline_rl")
    monkeypatch.setattr(prepare, "MIRROR_URL", f"{server.url}/mirror")
    monkeypatch.setattr(prepare, "READ_TIMEOUT", 0.5)
    yield server
    server.close()


def test_download_then_cache(server, monkeypatch, tmp_path, run_main, capsys):
    server.answers[D4RL] = [b"whole " + server.file]
    (server.cache).mkdir()
    (server.cache / "hopper_medium-v2.hdf5.123.part").touch()  # of a run that was killed
    data = data_of("hopper-medium-v2")
    assert data.task.is_d4rl and data.task.label.startswith("hopper-medium-v2 (") and server.asked == [D4RL]
    assert data.task.rtg_range == (-1.0, 4.0) and data.task.targets == (1800.0, 3600.0, 4000.0)
    assert set(os.listdir(server.cache)) - {".lock"} == {"hopper_medium-v2.hdf5"}
    monkeypatch.setattr(prepare, "D4RL_URL", "http://127.0.0.1:9")  # nothing listens there: the cache must be enough
    flags = ("--env", "hopper-medium-v2", "--runs-dir", tmp_path, *TINY2, "--lambda-e", 0, "--total-steps", 1)
    assert run_main(stage2, *flags)[0] == 0
    policy = torch.load(tmp_path / "hopper-medium-v2__train_qalign_dt__1" / "policy.pt", weights_only=True)
    assert policy["task"]["sources"][0]["sha256"] == hashlib.sha256(server.file).hexdigest()
    assert policy["task"]["digest"] == data.task.digest


@pytest.mark.parametrize(
    "answers, asked",
    [
        ({D4RL: [500, b"whole"]}, [D4RL, D4RL]),
        ({D4RL: [b"stall", b"whole"]}, [D4RL, D4RL]),
        ({D4RL: [404], MIRROR: [b"whole"]}, [D4RL, D4RL, MIRROR]),
        ({D4RL: [b"silent"], MIRROR: [b"whole"]}, [D4RL, D4RL, MIRROR]),
        ({D4RL: [b"cut"], MIRROR: [b"whole"]}, [D4RL, D4RL, MIRROR]),
        ({D4RL: [b"page"], MIRROR: [b"endless"]}, [D4RL, D4RL, MIRROR]),
        ({D4RL: [b"redirect /elsewhere"], "/elsewhere": [b"whole"]}, [D4RL, "/elsewhere"]),
    ],
    ids=lambda x: "" if isinstance(x, list) else "-".join(str(a) for answers in x.values() for a in answers),
)
def test_a_server_that_stumbles_gets_a_second_chance_then_the_mirror_does(server, answers, asked):
    bodies = {b"page": b"whole <html>moved</html>"}
    bodies |= {kind: kind + b" " + server.file for kind in (b"whole", b"stall", b"cut", b"endless")}
    server.answers = {path: [bodies.get(kind, kind) for kind in kinds] for path, kinds in answers.items()}
    data = data_of("hopper-medium-v2")
    assert server.asked == asked and data.task.is_d4rl and len(data.ends) == 60
    assert (server.cache / "hopper_medium-v2.hdf5").read_bytes() == server.file


@pytest.mark.parametrize("trouble", ["silent", "stall", "cut", "page", "other keys", 404, 418, "loop", "refused"])
def test_a_failed_download_leaves_nothing_and_says_what_to_do(server, trouble, run_main, tmp_path, monkeypatch):
    with h5py.File(tmp_path / "keys.hdf5", "w") as f:
        f["observations"] = np.zeros(3)
    answer = {
        "page": b"whole <html>moved</html>",
        "other keys": b"whole " + (tmp_path / "keys.hdf5").read_bytes(),
        "loop": f"redirect {D4RL}".encode(),
    }.get(trouble, trouble if isinstance(trouble, int) else f"{trouble} ".encode() + server.file)
    server.answers = {D4RL: [answer], MIRROR: [answer]}
    if trouble == "refused":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setattr(prepare, "D4RL_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
            monkeypatch.setattr(prepare, "MIRROR_URL", prepare.D4RL_URL)
    start = time.monotonic()
    result = run_main(stage2, "--env", "hopper-medium-v2", "--runs-dir", tmp_path / "runs")
    says = {"silent": "timed out", "stall": "timed out", "cut": "bytes arrived", "page": "signature not found"}
    says |= {"other keys": "no 'actions'", 404: "404", 418: "418", "loop": "redirect", "refused": "refused"}
    addresses = (f"{prepare.D4RL_URL}/gym_mujoco_v2/hopper_medium-v2.hdf5", f"{prepare.MIRROR_URL}/hopper_medium-v2")
    helps = (f"put the file at {server.cache}", "--dataset-path", "--env mujoco/hopper/medium-v0")
    assert_refused(result, says[trouble], *addresses, *helps, out=None)
    assert "\x1b" not in result[2] and not (tmp_path / "runs").exists() and time.monotonic() - start < 10
    assert set(os.listdir(server.cache)) <= {".lock"}


def test_ctrl_c_leaves_no_part_of_a_download(server, run_main, tmp_path):
    server.answers[D4RL] = [b"stall " + server.file]
    with interrupted(0.3):
        result = run_main(prepare, "--env", "hopper-medium-v2", "--runs-dir", tmp_path / "runs")
    assert_refused(result, "interrupted", code=130, out=None)
    assert "downloading" in result[1]
    assert set(os.listdir(server.cache)) <= {".lock"} and not (tmp_path / "runs").exists()


def test_two_processes_download_a_file_once(server, monkeypatch, tmp_path, patience):
    """The second one waits, instead of taking the first one's part for that of a killed run."""
    server.answers[D4RL] = [b"whole " + server.file]
    waits, said, real = threading.Event(), [], prepare.urllib.request.urlopen

    def say(text, **_):
        said.append(text)
        if "waiting for another process" in text:
            waits.set()

    def urlopen(*args, **kwargs):
        assert waits.wait(5)
        return real(*args, **kwargs)

    monkeypatch.setattr(stage2, "print", say, raising=False)
    monkeypatch.setattr(prepare.urllib.request, "urlopen", urlopen)
    results = []

    def start(name):
        results.append(prepare.prepare("hopper-medium-v2", (), tmp_path / name)["task"]["digest"])

    both = [threading.Thread(target=start, args=(name,)) for name in ("a", "b")]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(results) == 2 and len(set(results)) == 1 and server.asked == [D4RL]


def test_other_returns_than_d4rls_are_said(server, monkeypatch, capsys, hopper_file):
    server.answers[D4RL] = [b"whole " + server.file]
    data = data_of("hopper-medium-v2")
    assert data.task.label == "hopper-medium-v2 (other returns than D4RL's)"
    returns = data.returns
    text = f"returns from {returns.min():.2f} to {returns.max():.2f}, D4RL's from 315.87 to 3222.36"
    assert text in capsys.readouterr().err
    medium = (round(returns.min(), 2), round(returns.max(), 2))
    monkeypatch.setitem(prepare.D4RL_RETURNS, "hopper", ((0, 0), medium))  # as in QUALITIES, after random
    assert data_of("hopper-medium-v2").task.label == "hopper-medium-v2 (D4RL)"
    data_of("hopper-medium-own", hopper_file)
    assert capsys.readouterr().err == ""


def test_a_user_without_a_home_gets_the_variable_to_set(monkeypatch, capsys):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(prepare.Path, "home", home)
    for name, variable in (("hopper-medium-v2", "D4RL_DATASET_DIR"), ("a/b-v0", "MINARI_DATASETS_PATH")):
        monkeypatch.delenv(variable, raising=False)
        assert f"set {variable}" in refused(capsys, name)


def test_what_to_type_for_each_body_if_nothing_can_be_had(server, capsys):
    for env, says in (
        ("ant-medium-replay-v2", "--env mujoco/ant/medium-v0"),
        ("walker2d-random-v2", "--env mujoco/walker2d/simple-v0"),
        ("antmaze-large-play-v2", "--env D4RL/antmaze/large-play-v1"),
        ("maze2d-umaze-v1", "python data/collect_maze2d.py maze2d-umaze-v1"),
    ):
        assert says in refused(capsys, env)
    assert len(server.asked) == 12


# ---- any environment ----

PENDULUM, LIMIT = "tests/pendulum/random-v0", 25


def play(env, episodes: int) -> list:
    """Random actions: lists of observations (T + 1), actions, rewards, and how the last step ended."""
    rng, found = np.random.default_rng(0), []
    for seed in range(episodes):
        observations, actions, rewards, done = [env.reset(seed=seed)[0]], [], [], False
        while not done:
            actions.append(rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32))
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
            done = terminated or truncated
        found.append((observations, actions, rewards, terminated, truncated))
    return found


def columns_of(episode) -> dict:
    observations, actions, rewards, terminated, truncated = episode
    T = len(rewards)
    columns = dict(actions=np.array(actions), rewards=np.array(rewards))
    columns |= dict(terminations=[False] * (T - 1) + [terminated], truncations=[False] * (T - 1) + [truncated])

    def add(name, values):
        if not isinstance(values[0], dict):
            columns[name] = np.array(values)
            return
        for key in values[0]:
            add(f"{name}/{key}", [x[key] for x in values])

    add("observations", observations)
    return columns


def write_minari(name: str, episodes, more=(), **spec) -> None:
    """A data set in Minari's layout, where Minari keeps it."""
    folder = Path(os.environ["MINARI_DATASETS_PATH"]) / name / "data"
    folder.mkdir(parents=True)
    with h5py.File(folder / "main_data.hdf5", "w") as f:
        for i, episode in enumerate(episodes):
            for key, x in columns_of(episode).items():
                f[f"episode_{i}/{key}"] = x
    spec = dict(kwargs={}, max_episode_steps=None, additional_wrappers=[]) | spec
    (folder / "metadata.json").write_text(json.dumps(dict(env_spec=json.dumps(spec)) | dict(more)))


def train(name: str, runs: Path, run_main, *flags) -> dict:
    """20 steps of stages 1 and 2, then stage 3: what its JSON says."""
    common = ("--env", name, "--runs-dir", runs)
    for stage, sizes in ((stage1, TINY1), (stage2, [*TINY2, "--eval-every", 20])):
        code, _, err = run_main(stage, *common, *sizes, "--total-steps", 20)
        assert code == 0, err
    code, _, err = run_main(stage3, *common, "--device", "cpu", *flags)
    assert code == 0, err
    file = "high_targets" if "--high-targets" in flags else "alignment"
    return json.loads((runs / f"{name.replace('/', '--')}__train_qalign_dt__1" / f"{file}.json").read_text())


@pytest.fixture
def pendulum(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return play(gymnasium.make("Pendulum-v1", max_episode_steps=LIMIT), 10)


def with_minari(episodes) -> None:
    minari = pytest.importorskip("minari", reason="pip install -r tests/requirements-oracle.txt")
    from minari.data_collector import EpisodeBuffer

    buffers = []
    for i, episode in enumerate(episodes):
        columns = {key: list(x) for key, x in columns_of(episode).items()}
        buffers.append(EpisodeBuffer(id=i, seed=i, **columns))
    env = gymnasium.make("Pendulum-v1", max_episode_steps=LIMIT)
    scores = dict(ref_min_score=-250.0, ref_max_score=-50.0)
    minari.create_dataset_from_buffers(PENDULUM, buffers, env=env, data_format="hdf5", **scores)


def by_hand(episodes) -> None:
    scores = dict(ref_min_score=-250.0, ref_max_score=-50.0)
    write_minari(PENDULUM, episodes, id="Pendulum-v1", max_episode_steps=LIMIT, more=scores)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Minari's: no author, no permalink, ...
@pytest.mark.parametrize("write", [by_hand, pytest.param(with_minari, marks=pytest.mark.oracle)])
def test_pendulum_from_its_data_to_the_sweep(pendulum, tmp_path, run_main, write):
    write(pendulum)
    data = data_of(PENDULUM)
    assert (data.task.env_id, data.task.body, data.task.obs_dim, data.task.act_dim) == ("Pendulum-v1", "", 3, 1)
    assert data.task.horizon == LIMIT and data.lengths.tolist() == [LIMIT] * 10 and not data.terminals.any()
    assert data.task.score(-150) == 50 and data.task.label == f"{PENDULUM} (Minari)"
    scale = data.task.rtg_scale
    assert scale <= np.abs(data.returns).max() < 10 * scale  # normalised returns of at most 10
    actions = np.concatenate([actions for _, actions, *_ in pendulum])
    np.testing.assert_allclose(2 * data.actions, actions, atol=1e-6)  # the motor takes [-2, 2]
    simulation = stage3.simulate(data.task, [0])
    np.testing.assert_array_equal(simulation.observe([0])[0], pendulum[0][0][0])
    for t in range(LIMIT):  # the data's own actions bring the data's own rewards
        observations, rewards, ended, _ = simulation.step(np.array([0]), data.actions[t : t + 1])
        np.testing.assert_allclose(observations[0], pendulum[0][0][t + 1], atol=1e-4)
        assert rewards[0] == pytest.approx(pendulum[0][2][t], abs=1e-3) and not ended[0]
    result = train(PENDULUM, tmp_path / "runs", run_main, "--rollouts", 1)
    assert {row["length_mean"] for row in result["sweep"]} == {LIMIT} and len(result["sweep"]) >= 12
    assert all(row["velocity_mean"] is None for row in result["sweep"])
    score = data.task.score(result["sweep"][0]["return_mean"])
    assert result["sweep"][0]["score_mean"] == pytest.approx(score)
    for flags in (["--trajectories"], ["--video", -100]):
        assert_refused(run_main(stage3, "--env", PENDULUM, "--runs-dir", tmp_path / "runs", *flags), "no MuJoCo model")


ROBOTICS = """
import gymnasium
import numpy as np


class Reach(gymnasium.Env):
    '''A point that is driven to a goal; its observations are a dict, as PointMaze's.'''

    def __init__(self, speed=1.0, cut=30):
        box = lambda *shape: gymnasium.spaces.Box(-np.inf, np.inf, shape, np.float64)
        inner = gymnasium.spaces.Dict(achieved=box(2), desired=box(2))
        self.observation_space = gymnasium.spaces.Dict(observations=box(2, 2), goal=inner)
        self.action_space = gymnasium.spaces.Box(np.float32([-2, 0]), np.float32([2, 4]))
        self.speed, self.cut = speed, cut

    def observe(self):
        goal = dict(achieved=self.x.copy(), desired=self.desired)
        return dict(observations=np.stack([self.x, self.x - self.desired]), goal=goal)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.desired, self.steps = np.zeros(2), self.np_random.uniform(0.5, 1.0, 2), 0
        return self.observe(), {}

    def step(self, action):
        self.x, self.steps = self.x + 0.1 * self.speed * np.asarray(action), self.steps + 1
        distance = float(np.linalg.norm(self.x - self.desired))
        return self.observe(), -distance, distance < 0.1, self.steps == self.cut, {}
"""


def forget_robotics() -> None:
    gymnasium.registry.pop("Reach-v7", None)
    for name in ("gymnasium_robotics", "gymnasium_robotics.envs"):
        sys.modules.pop(name, None)


@pytest.fixture
def reach(tmp_path, monkeypatch):
    """A stand-in for gymnasium_robotics, imported only where a data set asks for it: its environment, and episodes."""
    package = tmp_path / "path" / "gymnasium_robotics"
    package.mkdir(parents=True)
    (package / "envs.py").write_text(ROBOTICS)
    register = 'gymnasium.register("Reach-v7", "gymnasium_robotics.envs:Reach", max_episode_steps=20)\n'
    (package / "__init__.py").write_text(f"import gymnasium\n{register}")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    forget_robotics()
    env = importlib.import_module("gymnasium_robotics.envs").Reach(speed=2.0)
    episodes = play(gymnasium.wrappers.TimeLimit(env, 12), 12)
    forget_robotics()
    yield env, episodes
    forget_robotics()


def test_dict_observations_from_their_data_to_two_rollouts(reach, tmp_path, run_main):
    env, episodes = reach
    name = "tests/reach-v0"
    write_minari(name, episodes, id="Reach-v7", kwargs={"speed": 2.0})
    data = data_of(name)
    assert (data.task.obs_dim, data.task.act_dim, data.task.horizon) == (8, 2, 12)
    assert data.task.env_kwargs == {"speed": 2.0} and data.task.score(-3.0) == -3.0
    flat = [gymnasium.spaces.flatten(env.observation_space, x) for episode in episodes for x in episode[0][:-1]]
    np.testing.assert_array_equal(data.observations, np.array(flat, np.float32))
    actions = np.concatenate([actions for _, actions, *_ in episodes])
    np.testing.assert_allclose(2 * data.actions + [0, 2], actions, atol=1e-6)
    simulation = stage3.simulate(data.task, [0])
    observations, rewards, *_ = simulation.step(np.array([0]), data.actions[:1])
    second = gymnasium.spaces.flatten(env.observation_space, episodes[0][0][1])
    np.testing.assert_allclose(observations[0], second, atol=1e-6)
    assert rewards[0] == pytest.approx(episodes[0][2][0], abs=1e-6)
    cut = [(observations[:6], actions[:5], rewards[:5], False, True) for observations, actions, rewards, *_ in episodes]
    write_minari("tests/reach-v1", episodes + cut, id="Reach-v7")
    assert data_of("tests/reach-v1").task.horizon == 20  # the environment's: episodes were cut at 5 and at 12
    simulation = stage3.simulate(replace(data.task, env_kwargs={"cut": 2}), [0])  # the environment's own time limit
    assert [bool(simulation.step(np.array([0]), np.zeros((1, 2)))[2][0]) for _ in range(2)] == [False, True]
    result = train(name, tmp_path / "runs", run_main, "--rollouts", 2, "--high-targets")
    best = float(data.returns.max())
    assert [row["target_return"] for row in result["high_targets"]] == pytest.approx([best, best + 0.2 * abs(best)])


def test_metadata_in_a_pipe_are_one_line(pendulum, capsys, patience):
    by_hand(pendulum)
    metadata = Path(os.environ["MINARI_DATASETS_PATH"]) / PENDULUM / "data" / "metadata.json"
    metadata.unlink()
    os.mkfifo(metadata)
    error = refused(capsys, PENDULUM)
    assert f"{metadata} names no environment (not a regular file)" in error and '{"env_spec": {"id": ' in error


def test_dict_observations_that_do_not_fit_are_one_line(reach, capsys):
    def error(name, change):
        write_minari(name, reach[1], id="Reach-v7")
        file = Path(os.environ["MINARI_DATASETS_PATH"]) / name / "data" / "main_data.hdf5"
        with h5py.File(file, "a") as f:
            change(f["episode_1/observations"])
        return refused(capsys, name)

    def group_for_array(x):
        del x["goal/desired"]
        x.create_group("goal/desired")

    def array_for_group(x):
        del x["goal"]
        x["goal"] = np.zeros((13, 4))

    def short(x):
        rows = x["goal/desired"][:-2]
        del x["goal/desired"]
        x["goal/desired"] = rows

    def renamed(x):
        x["goals"] = x.pop("goal")

    assert "goal" in error("tests/a-v0", renamed)
    assert "'desired'" in error("tests/b-v0", group_for_array)
    assert "'achieved'" in error("tests/c-v0", array_for_group)
    assert "size 11" in error("tests/d-v0", short)
