"""What a user can do wrong and what a machine can do to a run: one line that says it, and no good file lost.

Exit code 2 is a refusal, with nothing written, and 1 an error of the system or of the numbers.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import collect_dataset as stage0
import numpy as np
import pytest
import torch
import tyro
from conftest import ENV, ROOT, TINY1, TINY2, argv, tree

import evaluate_alignment as stage3
import pretrain_q as stage1
import train_qalign_dt as stage2
import transfer_cheetah_vel as transfer

FOLDER1, FOLDER2 = f"{ENV}__pretrain_q__1", f"{ENV}__train_qalign_dt__1"
DT = [*TINY2, "--lambda-e", "0"]  # needs no critic
BOTH = pytest.mark.parametrize("stage", [stage1, stage2], ids=["pretrain_q", "train_qalign_dt"])


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def is_finite(path: Path) -> bool:
    networks = [x for x in load(path).values() if isinstance(x, dict) and all(torch.is_tensor(y) for y in x.values())]
    assert networks
    return all(y.isfinite().all() for x in networks for y in x.values())


def assert_one_line(result: tuple[int, str, str], code: int, *says) -> None:
    """The exit code, and one line of error; a progress bar, which ends its own line, may stand above it."""
    lines = [line for line in result[2].splitlines() if line.strip() and not re.search(r"\d+/\d+ \[", line)]
    assert result[0] == code and len(lines) == 1 and lines[0].startswith("error: "), result
    for text in says:
        assert str(text) in lines[0], (text, lines[0])


# ---- the command line ----

STAGES = [stage0, stage1, stage2, stage3, transfer]
SIGNED = ("medium_return", "delta_rtg", "rtg_range", "video")  # which may be negative


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_numbers_are_finite_and_in_bounds(stage, run_main, tmp_path, monkeypatch):
    def parse(*args, **kwargs):
        raise AssertionError(f"accepted: {tyro.cli(*args, **kwargs)}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage, "tyro", SimpleNamespace(cli=parse))
    fields = [field for field in dataclasses.fields(stage.Args) if re.search(r"\b(int|float)\b", str(field.type))]
    assert len(fields) >= 4 and "seed" in [field.name for field in fields]
    for field in fields:
        flag = f"--{field.name.replace('_', '-')}"
        count = 2 if field.name == "rtg_range" else 1
        values = ("nan", "inf", "1e308", "-1e308") if "float" in str(field.type) else (str(10**30), "1e308")
        for value in (*values, *(() if field.name in SIGNED else ("-1",))):
            code, out, err = run_main(stage, flag, *[value] * count)
            assert (code, out) == (2, "") and flag in err and "Traceback" not in err, (flag, value, err)
    assert os.listdir() == []


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_a_name_never_leaves_its_folder(stage, run_main, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("../x", "..", ".", "", "a/b", "/tmp/x", "-", "a b", "a\n", "\u00e9"):
        code, out, err = run_main(stage, f"--exp-name={name}")
        assert (code, out) == (2, "") and "--exp-name" in err, (name, err)
    for name in ("hopper-medium-../x", "hopper-medium-a/b", "/hopper-mini", "../hopper-mini", "hopper-medium-"):
        if stage in (stage1, stage2, stage3):
            assert_one_line(run_main(stage, "--env", name), 2, "--env")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "here"]


def test_flags_that_contradict_each_other(run_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for stage, flags, says in (
        (stage2, ["--embed-dim", 30, "--n-head", 4], "--n-head"),
        (stage2, ["--rtg-range", 4, -1], "--rtg-range"),
        (stage2, ["--dropout", 1], "--dropout"),
        (stage2, ["--average", 1.1], "--average"),
        (stage2, ["--action-noise", -1], "--action-noise"),
        (stage2, ["--no-state-loss"], "--lambda-e 0"),
        (stage2, ["--batch-size", 0], "--batch-size"),
        (stage1, ["--total-steps", 0], "--total-steps"),
        (stage1, ["--gamma", 1], "--gamma"),
        (stage1, ["--total-steps", 10, "--warm-start-steps", 11], "--warm-start-steps"),
        (stage3, ["--rollouts", 0], "--rollouts"),
        (stage3, ["--target-step", 0], "--target-step"),
        (stage2, ["--no-such-flag"], "--no-such-flag"),
    ):
        code, out, err = run_main(stage, *flags)
        assert (code, out) == (2, "") and says in err, (flags, err)
    assert os.listdir() == []


def test_other_bad_input_is_one_line(tmp_path, run_main, pipeline, hopper_file):
    policy, critic, new = pipeline.policy, pipeline.critic, ["--exp-name", "new"]
    good = argv(hopper_file, tmp_path / "runs")
    sizes = [*TINY2, "--critic", critic]
    cases = [
        (stage1, ["--env", "hopper-medum-v2"], "hopper-medium-v2"),
        (stage2, ["--env", "hopper-mixed-zoo"], "--dataset-path"),
        (stage2, [*good, *TINY2, *new, "--critic", tmp_path / "none.pt"], "none.pt: No such file"),
        (stage2, [*good, *TINY2, *new, "--critic", policy], "not of pretrain_q.py"),
        (stage2, [*good, *sizes, *new, "--critic-width", 17], "--critic-width"),
        (stage3, ["--env", "walker2d-medium-tiny", "--checkpoint", policy], "not walker2d-medium-tiny"),
        (stage3, ["--env", ENV, "--runs-dir", tmp_path / "runs"], "policy.pt: No such file"),
        (stage3, ["--checkpoint", policy, "--compare", critic], "not of train_qalign_dt.py"),
    ]
    if not torch.cuda.is_available():
        cases += [(stage, ["--env", ENV, "--device", "cuda"], "no CUDA device") for stage in (stage1, stage2, stage3)]
    before = tree(pipeline.runs)
    for stage, arguments, says in cases:
        result = run_main(stage, *arguments)
        assert result[1] == "", arguments
        assert_one_line(result, 2, says)
        assert not (tmp_path / "runs").exists() and tree(pipeline.runs) == before


# ---- checkpoints: damaged, foreign ----


class RunsCode:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def copy_of(pipeline, tmp_path):
    """Copies of the pipeline's run folders, to damage."""

    def copy(kind: str) -> Path:
        source = getattr(pipeline, kind)
        folder = tmp_path / "runs" / source.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(source, folder))

    return copy


def readers(pipeline, hopper_file, tmp_path):
    """For each kind of checkpoint the stage and the flags that read it."""
    own = argv(hopper_file, tmp_path / "runs", *TINY2)
    return {
        "critic": (stage2, [*own, "--critic", tmp_path / "runs" / FOLDER1 / "critic.pt"]),
        "resume": (stage2, [*own, "--eval-every", 15]),
        "policy": (
            stage3,
            ["--checkpoint", tmp_path / "runs" / FOLDER2 / "policy.pt", "--rollouts", 1, "--device", "cpu"],
        ),
    }


KINDS = ["critic", "resume", "policy"]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_checkpoints_are_one_line(kind, copy_of, pipeline, hopper_file, tmp_path, run_main):
    stage, flags = readers(pipeline, hopper_file, tmp_path)[kind]
    path = copy_of(kind)
    whole = path.read_bytes()

    def replaced(content: dict) -> None:
        torch.save(content, path)

    def linked(target) -> None:
        path.unlink()
        path.symlink_to(target)

    def folder() -> None:
        path.unlink()
        path.mkdir()

    content = load(path)
    troubles = {
        "empty": (lambda: path.write_bytes(b""), "damaged"),
        "text": (lambda: path.write_text("hello"), "damaged"),
        "truncated": (lambda: path.write_bytes(whole[:3000]), "damaged"),
        "end missing": (lambda: path.write_bytes(whole[:-1]), "damaged"),
        "code": (lambda: replaced(content | {"x": RunsCode(str(tmp_path / "it-ran"))}), "damaged"),
        "no dictionary": (lambda: replaced([1, 2]), "damaged"),
        "other stage": (lambda: replaced(content | {"stage": "other"}), "other.py"),
        "other format": (lambda: replaced(content | {"format": 99}), "format 99"),
        "dangling link": (lambda: linked(tmp_path / "nowhere"), "No such file"),
        "loop of links": (lambda: linked(path), "symbolic links"),
        "folder": (folder, "directory"),
    }
    for name, (damage, says) in troubles.items():
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(whole)
        damage()
        before = sorted(tmp_path.rglob("*"))
        result = run_main(stage, *flags)
        assert result[1] == "", name
        assert_one_line(result, 2, path, says)
        assert sorted(tmp_path.rglob("*")) == before, name


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits_are_recognised_or_harmless(kind, copy_of, capsys):
    """One bit at many places of the file: either one line and exit code 2, or the very same content is read."""
    path = copy_of(kind)
    whole, content = path.read_bytes(), load(path)

    def same(x, y):
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
        if isinstance(x, list | tuple):
            return len(x) == len(y) and all(map(same, x, y))
        return torch.equal(x, y) if torch.is_tensor(x) else x == y

    recognised, rng = 0, np.random.default_rng(0)
    places = [*rng.integers(len(whole), size=60), *range(0, 60, 3), *range(len(whole) - 120, len(whole), 4)]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            assert same(content, stage2.load_checkpoint(path, content["stage"])), place
        except SystemExit as exit:
            recognised += 1
            error = capsys.readouterr().err
            assert exit.code == 2 and error.count("\n") == 1 and str(path) in error, (place, error)
    assert recognised > 20


def test_whole_but_foreign_states_are_one_line(copy_of, pipeline, hopper_file, tmp_path, run_main):
    """resume.pt without any one of its keys, with a step outside the run, NaN weights, other shapes."""
    stage, flags = readers(pipeline, hopper_file, tmp_path)["resume"]
    path = copy_of("resume")
    content = load(path)
    weight = next(iter(content["policy"]))
    counters = content["counters"]
    changes = [{"counters": counters | {"step": step}} for step in (31, -1, 1.5, None)]
    changes += [{"counters": {k: x for k, x in counters.items() if k != key}} for key in counters]
    changes += [{"random": ()}, {"sums": torch.zeros(3)}]
    changes += [{"sums": torch.full_like(content["sums"], torch.nan)}]
    changes += [
        {"policy": content["policy"] | {weight: x}} for x in (torch.zeros(3), torch.nan * content["policy"][weight])
    ]
    changes += [{"actor_opt": {}}, {"critic": {}}]
    for change in changes:
        torch.save(content | change, path)
        assert_one_line(run_main(stage, *flags), 2, path)
    for key in content:
        torch.save({k: x for k, x in content.items() if k != key}, path)
        assert_one_line(run_main(stage, *flags), 2, path)
    assert not [p for p in path.parent.iterdir() if p.suffix in (".pt", ".tmp") and p != path]


def test_foreign_states_of_stage_1_are_one_line(copy_of, pipeline, hopper_file, tmp_path, run_main):
    path, resume = tmp_path / "runs" / FOLDER1 / "resume.pt", pipeline.critic.parent / "resume.pt"
    path.parent.mkdir(parents=True)
    content = load(resume)
    changed = [content | {"counters": x} for x in ({}, {"step": 31, "rows": []}, {"step": 3})] + [
        content | {"critic": {}}
    ]
    for foreign in changed + [{k: x for k, x in content.items() if k != key} for key in content]:
        torch.save(foreign, path)
        assert_one_line(run_main(stage1, *argv(hopper_file, tmp_path / "runs", *TINY1)), 2, path)


def test_foreign_critics_are_one_line(copy_of, pipeline, hopper_file, tmp_path, run_main):
    stage, flags = readers(pipeline, hopper_file, tmp_path)["critic"]
    path = copy_of("critic")
    content = load(path)
    weight, config = next(iter(content["critic"])), content["config"]
    changes = [
        {"critic": content["critic"] | {weight: x}} for x in (torch.zeros(3), torch.nan * content["critic"][weight])
    ]
    changes += [{"config": config | {"gamma": torch.nan}}, {"config": {"data": config["data"]}}]
    without = [{k: x for k, x in content.items() if k != key} for key in ("critic", "config", "stage", "format")]
    for foreign in [content | change for change in changes] + without:
        torch.save(foreign, path)
        result = run_main(stage, *flags)
        assert_one_line(result, 2, path)
        assert result[1] == "" and not (tmp_path / "runs" / FOLDER2).exists()


def test_foreign_policies_are_one_line(copy_of, pipeline, hopper_file, tmp_path, run_main):
    """policy.pt without any one of the keys that stage 3 reads, with NaN weights, with other shapes."""
    stage, flags = readers(pipeline, hopper_file, tmp_path)["policy"]
    path = copy_of("policy")
    content = load(path)
    weight, config = next(iter(content["policy"])), content["config"]
    changes = [
        {"policy": content["policy"] | {weight: x}} for x in (torch.zeros(3), torch.nan * content["policy"][weight])
    ]
    changes += [{"config": config | {"embed_dim": 32}}, {"env": "x"}, {"data": {}}]
    changes += [{"episode_returns": torch.zeros(0)}]
    read = (
        "embed_dim",
        "n_layer",
        "n_head",
        "context_len",
        "max_timestep",
        "conv",
        "critic_width",
        "gamma",
        "lambda_e",
    )
    changes += [{"config": {k: x for k, x in config.items() if k != key}} for key in (*read, "seed", "state_loss")]
    for change in changes:
        torch.save(content | change, path)
        assert_one_line(run_main(stage, *flags), 2)
    for key in content.keys() - {"critic"}:  # without a critic only its correlations are missing
        torch.save({k: x for k, x in content.items() if k != key}, path)
        assert_one_line(run_main(stage, *flags), 2, path)
    assert os.listdir(path.parent) == ["policy.pt"]


# ---- folders ----


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int):
    """A file system of so many kB in `folder`; skips where this user may not mount one."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(params=["full", "limit"])
def no_room(request, tmp_path):
    """A folder, and a context in which every file that is written there beyond a few kB fails."""
    if request.param == "full":
        with small_disk(tmp_path / "disk", 2000) as folder:

            @contextlib.contextmanager
            def fill():
                with open(folder / "filling", "wb", buffering=0) as f, contextlib.suppress(OSError):
                    while f.write(b"x" * 1024):
                        pass
                try:
                    yield "No space left"
                finally:
                    (folder / "filling").unlink()

            yield folder, fill
    else:
        resource = pytest.importorskip("resource")

        @contextlib.contextmanager
        def limit():
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
            try:
                yield "File too large"
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        yield tmp_path, limit


@pytest.fixture(scope="module")
def whole(tmp_path_factory, run_main, hopper_file):
    """A DT that ran through, and one of stage 1, to compare with runs that did not."""
    runs = tmp_path_factory.mktemp("whole")
    assert run_main(stage1, *argv(hopper_file, runs, *TINY1))[0] == 0
    assert run_main(stage2, *argv(hopper_file, runs, *DT, "--eval-every", 15))[0] == 0
    return runs


@BOTH
def test_a_full_disk_keeps_the_last_good_state(stage, no_room, whole, run_main, hopper_file, monkeypatch):
    runs, full = no_room
    learner = {stage1: stage1.Pretraining, stage2: stage2.CoTraining}[stage]
    real, calls, stack = learner.step, [], contextlib.ExitStack()

    def filling(self, *args):
        calls.append(1)
        if len(calls) == 18:
            says.append(stack.enter_context(full()))
        return real(self, *args)

    says = []
    monkeypatch.setattr(learner, "step", filling)
    flags = [*TINY1] if stage is stage1 else [*DT, "--eval-every", 15]
    command = argv(hopper_file, runs, *flags)
    folder = runs / (FOLDER1 if stage is stage1 else FOLDER2)
    with stack:
        result = run_main(stage, *command, "--checkpoint-minutes", 0)
    assert_one_line(result, 1, says[0], f"{folder}/resume.pt")
    assert not list(folder.glob("*.tmp")) and load(folder / "resume.pt")["counters"]["step"] == 17
    code, out, err = run_main(stage, *command)
    assert code == 0 and "step 17\n" in out, err
    final = "critic.pt" if stage is stage1 else "policy.pt"
    ours, theirs = load(folder / final), load(whole / folder.name / final)
    name = "critic" if stage is stage1 else "policy"
    assert all(torch.equal(x, theirs[name][key]) for key, x in ours[name].items())
    for table in ("metrics.csv", *(["evaluations.csv"] if stage is stage2 else [])):
        assert (folder / table).read_text() == (whole / folder.name / table).read_text()


@BOTH
def test_no_room_at_the_start_is_one_line(stage, no_room, run_main, hopper_file, monkeypatch):
    runs, full = no_room
    died = []  # TensorBoard's thread, whose traceback would follow
    monkeypatch.setattr(threading, "excepthook", died.append)
    with full() as says:
        result = run_main(stage, *argv(hopper_file, runs, *(TINY1 if stage is stage1 else DT)))
        time.sleep(0.2)
    assert_one_line(result, 1, says)
    assert not died


@BOTH
def test_a_folder_in_the_way_of_a_file_is_one_line(stage, whole, run_main, hopper_file, tmp_path):
    flags = TINY1 if stage is stage1 else [*DT, "--eval-every", 15]
    names = ["resume.pt", "metrics.csv", "tensorboard"] + (
        ["critic.pt", "report.json"] if stage is stage1 else ["policy.pt"]
    )
    for i, name in enumerate(names):
        folder = tmp_path / str(i) / (FOLDER1 if stage is stage1 else FOLDER2)
        folder.mkdir(parents=True)
        if name == "tensorboard":
            (folder / name).write_text("a file in the way of a folder")
        else:
            (folder / name / "inside").mkdir(parents=True)
        result = run_main(stage, *argv(hopper_file, tmp_path / str(i), *flags))
        assert_one_line(result, 2 if name in ("resume.pt", "policy.pt", "critic.pt") else 1, name)
        assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("where", ["below a file", "below a device", "below /proc", "a long name", "read-only disk"])
def test_folders_that_cannot_be_made_are_one_line(where, run_main, hopper_file, tmp_path):
    """Conditions that root cannot overrule either."""
    (tmp_path / "file").write_text("")
    runs, flags = tmp_path / "runs", []
    with contextlib.ExitStack() as stack:
        if where == "below a file":
            runs = tmp_path / "file" / "runs"
        elif where == "below a device":
            runs = Path("/dev/null/runs")
        elif where == "below /proc":
            runs = Path("/proc/runs")
        elif where == "a long name":
            flags = ["--exp-name", "x" * 300]
        else:
            runs = stack.enter_context(small_disk(tmp_path / "disk", 100))
            subprocess.run(["mount", "-o", "remount,ro", str(runs)], check=True)
        for stage, sizes in ((stage1, TINY1), (stage2, DT)):
            result = run_main(stage, *argv(hopper_file, runs, *sizes, *flags))
            assert_one_line(result, 1, runs)
        assert not (tmp_path / "runs").exists() or os.listdir(tmp_path / "runs") == []


def test_stage_3_refuses_a_folder_that_it_cannot_write_before_the_sweep(pipeline, run_main, tmp_path):
    with small_disk(tmp_path / "disk", 1000) as folder:
        shutil.copy(pipeline.policy, folder)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        result = run_main(stage3, "--checkpoint", folder / "policy.pt", "--device", "cpu")
        assert result[1] == ""
        assert_one_line(result, 2, folder)


def test_stale_temporary_files_go_once_the_lock_is_held(pipeline, run_main, hopper_file, tmp_path):
    for stage, flags in ((stage1, TINY1), (stage2, [*DT, "--total-steps", 2])):
        folder = tmp_path / f"{ENV}__{stage.__name__}__1"
        folder.mkdir()
        stale = [folder / name for name in ("resume.pt.123.tmp", "metrics.csv.4.tmp")]
        for path in stale:
            path.write_bytes(b"half")
        with stage2.claim(tmp_path / f"{ENV}__other__1"):
            pass
        command = argv(hopper_file, tmp_path, *flags)
        with stage2.filelock.FileLock(folder / ".lock"):  # another process's
            assert_one_line(run_main(stage, *command), 2, "another process", folder)
            assert all(path.exists() for path in stale)  # they are the other process's
        assert run_main(stage, *command)[0] == 0
        assert not any(path.exists() for path in stale)


@BOTH
def test_damaged_tables_never_stop_a_run(stage, whole, run_main, hopper_file, tmp_path):
    """They are written anew from resume.pt."""
    folder = tmp_path / (FOLDER1 if stage is stage1 else FOLDER2)
    command = argv(hopper_file, tmp_path, *(TINY1 if stage is stage1 else [*DT, "--eval-every", 15]))
    for i, text in enumerate((b"", b"step\n", b"\xff\xfe\0", b"step,loss\n1,2,3\nx,y\n30", b"30,1e400,nan\n" * 50)):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        content = load(whole / folder.name / "resume.pt")
        torch.save(content, folder / "resume.pt")
        for table in ("metrics.csv", "evaluations.csv"):
            (folder / table).write_bytes(text)
        code, out, err = run_main(stage, *command)
        assert code == 0 and "Traceback" not in err, (i, err)


# ---- numbers: a bad state never replaces a good one ----


@BOTH
def test_a_nan_stops_the_run_and_keeps_the_last_good_files(stage, run_main, hopper_file, tmp_path, monkeypatch):
    """Poisoned in step 18, the state of step 17 stays; with the same command later the run ends well."""
    calls, name = [], {stage1: "td_loss", stage2: "supervised_loss"}[stage]
    real = getattr(stage, name)

    def poisoned(*args):
        calls.append(1)
        first, second = real(*args)
        return first * (torch.nan if len(calls) == 18 else 1.0), second

    monkeypatch.setattr(stage, name, poisoned)
    folder = tmp_path / (FOLDER1 if stage is stage1 else FOLDER2)
    command = argv(hopper_file, tmp_path, *(TINY1 if stage is stage1 else DT))
    result = run_main(stage, *command, "--checkpoint-minutes", 0)
    assert_one_line(result, 1, "step 18", "NaN", f"{folder}/resume.pt")
    assert load(folder / "resume.pt")["counters"]["step"] == 17 and is_finite(folder / "resume.pt")
    assert stage is stage1 or is_finite(folder / "policy.pt") and load(folder / "policy.pt")["step"] == 17
    code, out, err = run_main(stage, *command)
    assert code == 0 and "step 17\n" in out and is_finite(folder / "resume.pt"), err


@BOTH
def test_a_nan_in_the_last_update_is_no_result(stage, run_main, hopper_file, tmp_path, monkeypatch):
    """The losses are from before the update: only the weights can tell."""
    learner = {stage1: stage1.Pretraining, stage2: stage2.CoTraining}[stage]
    real = learner.step

    def overflowing(self, *args):
        result = real(self, *args)
        weight = next((self.critic if stage is stage1 else self.policy.state_head).parameters())
        weight.data[..., 0] = torch.inf
        return result

    monkeypatch.setattr(learner, "step", overflowing)
    monkeypatch.setattr(stage2, "evaluate", lambda policy, task, targets, *_: [float(policy.training)] * len(targets))
    folder = tmp_path / (FOLDER1 if stage is stage1 else FOLDER2)
    flags = [*TINY1, "--total-steps", 1] if stage is stage1 else [*DT, "--total-steps", 1, "--eval-every", 1]
    assert_one_line(run_main(stage, *argv(hopper_file, tmp_path, *flags)), 1, "step 1", "infinite")
    assert not (folder / "resume.pt").exists() and not (folder / "policy.pt").exists()
    assert not (folder / "critic.pt").exists()


def test_no_best_policy_is_saved_with_weights_that_are_not_finite(run_main, hopper_file, tmp_path, monkeypatch):
    """A better score between two rows of metrics.csv: the actions do not depend on the state head."""
    scores, real, calls = iter(range(100)), stage2.CoTraining.step, []
    monkeypatch.setattr(stage2, "evaluate", lambda policy, task, targets, *_: [float(next(scores))] * len(targets))

    def overflowing(self):
        result = real(self)
        calls.append(1)
        if len(calls) == 4:
            self.policy.state_head.bias.data[0] = torch.nan
        return result

    monkeypatch.setattr(stage2.CoTraining, "step", overflowing)
    result = run_main(stage2, *argv(hopper_file, tmp_path, *DT, "--eval-every", 1))
    assert_one_line(result, 1, "NaN")
    assert is_finite(tmp_path / FOLDER2 / "policy_best.pt") and load(tmp_path / FOLDER2 / "policy_best.pt")["step"] == 3


@BOTH
def test_a_learning_rate_far_too_high_never_saves_what_is_not_finite(stage, run_main, hopper_file, tmp_path):
    rate = "--lr" if stage is stage1 else "--actor-lr"
    flags = TINY1 if stage is stage1 else DT
    for steps in (1, 2, 30):
        command = argv(hopper_file, tmp_path, *flags, rate, 1e9, "--total-steps", steps, "--exp-name", f"{steps}_steps")
        code, out, err = run_main(stage, *command, "--checkpoint-minutes", 0)
        saved = list((tmp_path / f"{ENV}__{steps}_steps__1").glob("*.pt"))
        assert all(is_finite(path) for path in saved) and (code == 0 or code == 1 and "finite" in err), err
    assert code == 1  # 30 steps of it overflow


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    stage2.save_checkpoint(path, {"a": 1})
    for name, error in (
        ("fsync", KeyboardInterrupt),
        ("fsync", OSError),
        ("replace", OSError),
        ("replace", KeyboardInterrupt),
    ):

        def fails(*args, error=error):
            raise error

        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(stage2.os, name, fails)
            stage2.save_checkpoint(path, {"a": 2})
        assert load(path)["a"] == 1 and os.listdir(tmp_path) == ["x.pt"]


def test_files_are_on_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(stage2.os, name, lambda *args, n=name, real=real: order.append(n) or real(*args))
    stage2.write_file(tmp_path / "x", b"content")
    assert order == ["fsync", "replace"] and (tmp_path / "x").read_bytes() == b"content"


# ---- sizes, streams, surroundings ----


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_sizes_that_no_memory_holds_are_one_line_before_stage_1_is_trained(hopper_file, tmp_path):
    """In a child whose memory is limited. Stage 2 tries its sizes before it starts stage 1."""
    large = [
        ("pretrain_q", "--batch-size", 100_000_000),
        ("pretrain_q", "--critic-width", 1_000_000),
        ("train_qalign_dt", "--embed-dim", 1_000_000),
        ("train_qalign_dt", "--embed-dim", 1_000_000_000),
        ("train_qalign_dt", "--batch-size", 100_000_000),
        ("train_qalign_dt", "--batch-size", 1_000_000_000),
        ("train_qalign_dt", "--context-len", 1_000_000),
        ("train_qalign_dt", "--critic-width", 1_000_000),
    ]
    commands = []
    for i, (stage, flag, value) in enumerate(large):
        sizes = TINY1 if stage == "pretrain_q" else TINY2
        commands.append((stage, argv(hopper_file, tmp_path / f"runs{i}", *sizes, flag, value)))
    program = f"""
import json, resource, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import conftest, pretrain_q, train_qalign_dt
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 600_000_000,) * 2)
def no_stage_1(*_, **__):
    raise AssertionError("stage 1 was started")
train_qalign_dt.subprocess.run = no_stage_1
for stage, argv in {commands!r}:
    print(json.dumps(conftest.call(sys.modules[stage], *argv)), flush=True)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(answers) == len(large)
    for flags, answer in zip(large, answers):
        assert answer[0] in (1, 2), (flags, answer)
        assert_one_line(tuple(answer), answer[0])


def test_closed_streams_and_a_bad_renderer_stop_nothing(pipeline, hopper_file, tmp_path):
    """Stage 2 with stdout and stderr closed, stage 3 with a bad MUJOCO_GL: neither renders."""
    flags = argv(hopper_file, tmp_path, *DT, "--total-steps", 2, "--eval-every", 1)
    command = [sys.executable, str(ROOT / "train_qalign_dt.py"), *flags]
    closed = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], timeout=300)
    folder = tmp_path / FOLDER2
    assert closed.returncode == 0 and (folder / "policy_best.pt").exists() and load(folder / "policy.pt")["step"] == 2
    command = [sys.executable, ROOT / "evaluate_alignment.py", "--checkpoint", folder / "policy.pt", "--rollouts", "1"]
    surroundings = os.environ | {"MUJOCO_GL": "nonsense", "PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"}
    result = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and (folder / "alignment.json").exists(), result.stderr


def test_ascii_streams_write_what_they_can(whole, run_main, hopper_file, tmp_path, monkeypatch):
    data = tmp_path / "donn\u00e9es.hdf5"
    shutil.copy(hopper_file, data)
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "argv", ["train_qalign_dt.py", *argv(data, tmp_path, *DT, "--total-steps", 1)])
    stage2.run(stage2.main)
    streams["stdout"].flush()
    assert b"donn?es.hdf5" in streams["stdout"].buffer.getvalue()
    monkeypatch.setattr(sys, "argv", ["train_qalign_dt.py", *argv(tmp_path / "\u00e9", tmp_path, *DT)])
    with pytest.raises(SystemExit):
        stage2.run(stage2.main)
    streams["stderr"].flush()
    assert b"?: " in streams["stderr"].buffer.getvalue()


def test_bugs_keep_their_traceback():
    """The wrapper catches what a machine does, not what a programmer did."""
    for error in (ValueError("x"), KeyError("x"), RuntimeError("shapes do not match"), AssertionError("x")):

        def main(error=error):
            raise error

        with pytest.raises(type(error)):
            stage2.run(main)
