"""What a user can do wrong and what a machine can do to a run: one line that says it, and no good file lost.

Exit code 2 is a refusal, with nothing written, and 1 an error of the system or of the numbers.
"""

import contextlib
import dataclasses
import fcntl
import importlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import collect_dataset as stage0
import numpy as np
import prepare
import pytest
import torch
import tyro
from conftest import ENV, ROOT, TINY1, TINY2, Forked, argv, load, tree

import evaluate_alignment as stage3
import pretrain_q as stage1
import train_qalign_dt as stage2
import transfer_cheetah_vel as transfer

FOLDER1, FOLDER2, DATA = f"{ENV}__pretrain_q__1", f"{ENV}__train_qalign_dt__1", Path(f"{ENV}__data", "dataset.pt")
DT = [*TINY2, "--lambda-e", "0"]  # needs no critic
BOTH = pytest.mark.parametrize("stage", [stage1, stage2], ids=["pretrain_q", "train_qalign_dt"])
SAMPLE = pytest.mark.parametrize("nth", [4, pytest.param(1, marks=pytest.mark.slow)], ids=["every fourth", "all"])


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
    monkeypatch.setattr(stage, "tyro", SimpleNamespace(cli=parse, conf=tyro.conf))
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
        if stage in (stage1, stage2):
            assert_one_line(run_main(stage, "--env", name), 2, "--env")
        elif stage is not stage0:
            assert_one_line(run_main(stage, "--env", name), 2, "no policy at runs/", "runs there: none")
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


@pytest.mark.parametrize(
    "script, flags, says",
    [
        ("pretrain_q", ["--warm-start-steps", 20000], "--warm-start-steps 20000: more than --total-steps 10000"),
        ("train_qalign_dt", ["--n-head", 3], "--embed-dim 64 is not a multiple of --n-head 3"),
        ("train_qalign_dt", ["--context-len", 1], "--context-len 1: Eq. 7's targets need two steps"),
        ("train_radt", ["--n-head", 5], "--embed-dim 64 is not a multiple of --n-head 5"),
        ("train_vdt", ["--embed-dim", 65], "--embed-dim 65 is not a multiple of --n-head 2"),
        ("train_qt", ["--context-len", 1], "--context-len 1: Q's targets need two steps"),
        ("train_rvdt", ["--n-head", 3], "--embed-dim 64 is not a multiple of --n-head 3"),
    ],
)
def test_a_flag_that_does_not_fit_the_preset(script, flags, says, run_main, hopper_file, tmp_path):
    """Known only once the data have named the preset."""
    result = run_main(importlib.import_module(script), *argv(hopper_file, tmp_path, "--preset", "small", *flags))
    assert_one_line(result, 2, says)
    assert os.listdir(tmp_path) == [str(DATA.parent)]


def test_other_bad_input_is_one_line(tmp_path, run_main, pipeline, hopper_file):
    policy, critic, new = pipeline.policy, pipeline.critic, ["--exp-name", "new"]
    good = argv(hopper_file, pipeline.runs)
    sizes = [*TINY2, "--critic", critic]
    cases = [
        (stage1, ["--env", "hopper-medum-v2"], "hopper-medium-v2"),
        (stage2, ["--env", "hopper-mixed-zoo"], "--dataset-path"),
        (stage2, [*good, *TINY2, *new, "--critic", tmp_path / "none.pt"], "none.pt: No such file"),
        (stage2, [*good, *TINY2, *new, "--critic", policy], "not of pretrain_q.py"),
        (stage2, [*good, *sizes, *new, "--critic-width", 17], "--critic-width"),
        (stage3, ["--env", "walker2d-medium-tiny", "--checkpoint", policy], "not walker2d-medium-tiny"),
        (stage3, ["--env", ENV, "--runs-dir", tmp_path / "runs"], "policy.pt; train it first; runs there: none"),
        (stage3, ["--env", ENV, "--runs-dir", pipeline.runs, *new], f"; runs there: {ENV}__dt__1, {FOLDER2}"),
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
    """Copies of the pipeline's checkpoints, to damage, in a runs folder with the data."""
    shutil.copytree(pipeline.runs / f"{ENV}__data", tmp_path / "runs" / f"{ENV}__data")

    def copy(kind: str) -> Path:
        own = {"resume of stage 1": pipeline.critic.parent / "resume.pt", "dataset": pipeline.runs / DATA}
        source = own.get(kind) or getattr(pipeline, kind)
        folder = tmp_path / "runs" / source.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(source, folder))

    return copy


def readers(pipeline, hopper_file, tmp_path):
    """For each kind of checkpoint the stage and the flags that read it."""
    own = argv(hopper_file, tmp_path / "runs", *TINY2)
    return {
        "dataset": (stage1, argv(hopper_file, tmp_path / "runs", *TINY1)),
        "critic": (stage2, [*own, "--critic", tmp_path / "runs" / FOLDER1 / "critic.pt"]),
        "resume": (stage2, [*own, "--eval-every", 15]),
        "resume of stage 1": (stage1, argv(hopper_file, tmp_path / "runs", *TINY1)),
        "policy": (
            stage3,
            ["--checkpoint", tmp_path / "runs" / FOLDER2 / "policy.pt", "--rollouts", 1, "--device", "cpu"],
        ),
    }


KINDS = ["dataset", "critic", "resume", "policy"]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_checkpoints_are_one_line(kind, copy_of, pipeline, hopper_file, tmp_path, run_main):
    stage, flags = readers(pipeline, hopper_file, tmp_path)[kind]
    path = copy_of(kind)
    whole = path.read_bytes()
    (path.parent / ".lock").touch()  # of resume.pt the networks are read under the lock

    def replaced(content: dict) -> None:
        torch.save(content, path)

    def linked(target) -> None:
        path.unlink()
        path.symlink_to(target)

    def folder() -> None:
        path.unlink()
        path.mkdir()

    def fifo() -> None:
        path.unlink()
        os.mkfifo(path)

    def nested(x=()):
        for _ in range(60):  # whose text would have 2^60 parts
            x = (x, x)
        return x

    content = load(path)
    key, weight = {"dataset": "observations", "policy": "obs_mean"}.get(kind), "weights.0"
    first = content[key] if key else content["critic"][weight]
    huge = torch.zeros(1).expand(10**11)  # a view: the file stays small

    def of_the_reader(x) -> dict:
        """A tensor that whoever reads this checkpoint uses."""
        return {key: x} if key else {"critic": content["critic"] | {weight: x}}

    troubles = {
        "empty": (lambda: path.write_bytes(b""), "damaged"),
        "text": (lambda: path.write_text("hello"), "damaged"),
        "truncated": (lambda: path.write_bytes(whole[:3000]), "damaged"),
        "end missing": (lambda: path.write_bytes(whole[:-1]), "damaged"),
        "code": (lambda: replaced(content | {"x": RunsCode(str(tmp_path / "it-ran"))}), "damaged"),
        "no dictionary": (lambda: replaced([1, 2]), "damaged"),
        "other stage": (lambda: replaced(content | {"stage": "other"}), "other.py"),
        "stage with escapes": (lambda: replaced(content | {"stage": "a\n\x1b[31mb" * 99}), r"of a\n\x1b[31mba\n"),
        "stage without end": (lambda: replaced(content | {"stage": nested()}), "damaged"),
        "stage of another type": (lambda: replaced(content | {"stage": torch.zeros(2)}), "damaged"),
        "other format": (lambda: replaced(content | {"format": 99}), "another version wrote it"),
        "format of another type": (lambda: replaced(content | {"format": torch.zeros(2)}), "damaged"),
        "huge view": (lambda: replaced(content | of_the_reader(huge)), "another shape or type"),
        "sparse": (lambda: replaced(content | of_the_reader(first.to_sparse())), "another shape or type"),
        "meta": (lambda: replaced(content | of_the_reader(first.to("meta"))), "another shape or type"),
        "parameter": (lambda: replaced(content | of_the_reader(torch.nn.Parameter(first))), "another shape or type"),
        "view": (lambda: replaced(content | of_the_reader(first[:1].expand(first.shape))), "another shape or type"),
        "dangling link": (lambda: linked(tmp_path / "nowhere"), "No such file"),
        "loop of links": (lambda: linked(path), "symbolic links"),
        "folder": (folder, "not a regular file"),
        "fifo": (fifo, "not a regular file"),
        "device": (lambda: linked("/dev/zero"), "not a regular file"),
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
        assert len(result[2]) < 1000, name
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


def without(content: dict, where: tuple) -> dict:
    """The content without the entry at a path of keys."""
    name, *rest = where
    if not rest:
        return {key: x for key, x in content.items() if key != name}
    return content | {name: without(content[name], rest)}


# checkpoint, who reads it, and the entries that this reader does without
READERS = {
    "dataset, stage 1": set(),
    "dataset, stage 2": set(),
    "dataset, prepare": {"observations", "actions", "rewards", "terminals", "ends", "obs_mean", "obs_std"},
    "critic, stage 2": {"data"},  # labels
    "resume of stage 1, stage 1": set(),
    "resume, stage 2": set(),
    "policy, stage 3": {"critic", "q_scale"},  # only its correlations are missing then
    "policy, transfer": {"critic", "gamma", "q_scale"},
}
SIZES = {"embed_dim", "n_layer", "n_head", "context_len", "max_timestep", "seed", "total_steps", *stage3.REPORTED}
CONFIG_READ = {  # all that these read of the configuration; the others read the whole of it
    "critic, stage 2": {"data", "gamma"},
    "policy, stage 3": SIZES | {"critic_width"},
    "policy, transfer": SIZES,
}


@SAMPLE
@pytest.mark.parametrize("reader", READERS)
def test_a_checkpoint_without_any_one_of_its_entries_is_one_line(
    nth, reader, copy_of, pipeline, hopper_file, tmp_path, run_main
):
    kind, _, who = reader.partition(", ")
    path, (stage, flags) = copy_of(kind), readers(pipeline, hopper_file, tmp_path)[kind]
    if who == "prepare":
        stage, flags = prepare, argv(hopper_file, tmp_path / "runs")
    elif who == "transfer":
        stage, flags = transfer, ["--checkpoint", path]
    elif who == "stage 2":
        stage, flags = stage2, flags if kind != "dataset" else argv(hopper_file, tmp_path / "runs", *TINY2)
    content = load(path)
    entries = [(key,) for key in content if key not in READERS[reader]]
    for name in ("task", "config", "progress", "actor_opt", "opt"):
        read = CONFIG_READ.get(reader) if name == "config" else None
        entries += [(name, key) for key in content.get(name, ()) if read is None or key in read]
    entries = [where for where in entries if where != ("config", "critic")]  # None: without it the file says the same
    entries += [("policy", "embed_obs.weight")] * ("policy" in content)
    assert len(entries) >= 6
    for where in entries[::nth]:
        torch.save(without(content, where), path)
        before = tree(tmp_path) | {path.parent.relative_to(tmp_path) / ".lock": b""}
        result = run_main(stage, *flags)
        assert_one_line(result, 2, path)
        assert result[1] == "" and before.items() >= tree(tmp_path).items(), where


@SAMPLE
def test_whole_but_foreign_states_are_one_line(nth, copy_of, pipeline, hopper_file, tmp_path, run_main):
    """resume.pt with a step outside the run, NaN weights, other shapes and types."""
    stage, flags = readers(pipeline, hopper_file, tmp_path)["resume"]
    path = copy_of("resume")
    content = load(path)
    weight = next(iter(content["policy"]))
    progress, opt = content["progress"], content["actor_opt"]
    changes = [{"progress": progress | {"step": step}} for step in (31, -1, 1.5, None, True, torch.zeros(2))]
    changes += [{"progress": progress | {key: x}} for key in ("rows", "scores") for x in (None, [1], [{"loss": 1.0}])]
    changes += [{"progress": progress | {key: [{"step": x}]}} for key in ("rows", "scores") for x in (0.5, 10**30)]
    changes += [{"progress": progress | {key: x}} for key in ("gamma", "q_scale") for x in ("x", torch.nan)]
    changes += [{"random": x} for x in ((), None, (torch.zeros(3),) * 3)]
    changes += [{"sums": x} for x in (torch.zeros(3), torch.full_like(content["sums"], torch.nan), None)]
    bad = (torch.zeros(3), torch.nan * content["policy"][weight], content["policy"][weight].double(), None)
    changes += [{"policy": content["policy"] | {weight: x}} for x in bad]
    changes += [{"actor_opt": {}}, {"critic": {}}, {"actor_opt": None}]
    first = opt["state"][0]
    for x in (torch.zeros(3), first["exp_avg"].double(), torch.nan * first["exp_avg"], None):  # fused Adam would crash
        changes += [{"actor_opt": opt | {"state": opt["state"] | {0: first | {"exp_avg": x}}}}]
    changes += [{"actor_opt": opt | {"state": x}} for x in (opt["state"] | {999: first}, [first], {0: {}}, None)]
    (group,) = opt["param_groups"]
    for key, x in (("betas", 0.9), ("betas", ("x", "y")), ("eps", None)):  # the rate follows from flags and step
        changes += [{"actor_opt": opt | {"param_groups": [group | {key: x}]}}]
    changes += [{"actor_opt": opt | {"param_groups": x}} for x in ([], [group, group], {0: group}, None)]
    changes += [{"config": content["config"] | {key: torch.zeros(2)}} for key in ("sigma_e", "data")]
    nested = ()
    for _ in range(60):
        nested = (nested, nested)
    changes += [{"config": content["config"] | {"sigma_e": nested}}, {"config": None}, {"config": [1]}]
    for change in changes[::nth]:
        torch.save(content | change, path)
        result = run_main(stage, *flags)
        assert_one_line(result, 2, path)
        assert len(result[2]) < 1500
    assert not [p for p in path.parent.iterdir() if p.suffix in (".pt", ".tmp") and p != path]


def test_foreign_states_of_stage_1_are_one_line(copy_of, pipeline, hopper_file, tmp_path, run_main):
    stage, flags = readers(pipeline, hopper_file, tmp_path)["resume of stage 1"]
    path = copy_of("resume of stage 1")
    content = load(path)
    opt = content["opt"]
    changes = [
        {"progress": x} for x in ({}, {"step": 31, "rows": []}, {"step": 3}, {"step": 3, "rows": [{"step": 1.5}]})
    ]
    changes += [{"critic": {}}, {"opt": opt | {"param_groups": []}}]
    changes += [{"opt": opt | {"state": opt["state"] | {0: opt["state"][0] | {"exp_avg_sq": torch.zeros(2)}}}}]
    for change in changes:
        torch.save(content | change, path)
        assert_one_line(run_main(stage, *flags), 2, path)


def test_foreign_critics_are_one_line(copy_of, pipeline, hopper_file, tmp_path, run_main):
    stage, flags = readers(pipeline, hopper_file, tmp_path)["critic"]
    path = copy_of("critic")
    content = load(path)
    weight, config = next(iter(content["critic"])), content["config"]
    changes = [
        {"critic": content["critic"] | {weight: x}} for x in (torch.zeros(3), torch.nan * content["critic"][weight])
    ]
    changes += [{"config": config | {"gamma": x}} for x in (torch.nan, 1.5, "x", torch.zeros(2))]
    changes += [{"config": config | {"data": torch.zeros(2)}}, {"config": 3}, {"critic": None}]
    other, nested = config | {"data": "0" * 16}, ()
    for _ in range(60):
        nested = (nested, nested)
    changes += [{"config": other, "data": x} for x in ({"label": "a\n\x1b[31m" * 200}, {"label": nested}, {}, None)]
    for change in changes:
        torch.save(content | change, path)
        result = run_main(stage, *flags)
        assert_one_line(result, 2, path)
        assert result[1] == "" and len(result[2]) < 1000 and not (tmp_path / "runs" / FOLDER2).exists()
        assert_one_line(run_main(stage1, *argv(hopper_file, tmp_path / "runs", *TINY1)), 2, path)  # nor finished


def test_foreign_datasets_are_one_line(copy_of, pipeline, hopper_file, tmp_path, run_main):
    stage, flags = readers(pipeline, hopper_file, tmp_path)["dataset"]
    path = copy_of("dataset")
    content = load(path)
    task, rewards, ends = content["task"], content["rewards"], content["ends"]
    changes = [{"task": task | {"sources": x}} for x in (5, None, [], [1], [{"name": torch.zeros(2)}], torch.zeros(2))]
    (source,) = task["sources"]
    changes += [{"task": task | {"obs_dim": x}} for x in (12, 0, "x", 11.0)] + [
        {"task": None},
        {"task": task | {"x": 1}},
    ]
    changes += [{"rewards": x} for x in (None, rewards.double(), torch.nan * rewards, rewards[1:], torch.tensor(1.0))]
    changes += [{"rewards": rewards.clone().requires_grad_()}, {"ends": ends.flip(0)}, {"ends": ends[:0]}]
    changes += [{"obs_std": 0 * content["obs_std"]}, {"terminals": content["terminals"].float()}]
    for change in changes:
        torch.save(content | change, path)
        result = run_main(stage, *flags)
        assert_one_line(result, 2, path)
        assert result[1] == "" and os.listdir(tmp_path / "runs") == [f"{ENV}__data"]
    unknown = source | {"size": torch.zeros(2), "sha256": torch.zeros(2)}  # as if the file had changed: made again
    torch.save(content | {"task": task | {"sources": [unknown]}}, path)
    code, out, err = run_main(prepare, *argv(hopper_file, tmp_path / "runs"))
    assert code == 0 and load(path)["task"]["sources"] == [source], err


@pytest.mark.parametrize("stage", [stage3, transfer], ids=["evaluate_alignment", "transfer_cheetah_vel"])
def test_edited_policies_are_one_line_before_any_rollout(stage, copy_of, pipeline, run_main, tmp_path, monkeypatch):
    """policy.pt with NaN weights, with other shapes, types and numbers."""
    path = copy_of("policy")
    content = load(path)
    weight, config, task = next(iter(content["policy"])), content["config"], content["task"]
    std, returns = content["obs_std"], content["episode_returns"]
    changes = [
        {"policy": content["policy"] | {weight: x}} for x in (torch.zeros(3), torch.nan * content["policy"][weight])
    ]
    edits = dict(embed_dim=(32, "x"), n_head=(0, 3, -1, "2", 2.0), context_len=(-5, 0, "4", 1.5, torch.zeros(2)))
    edits |= dict(eval_context_len=(-9, "x"), total_steps=("x", None), lambda_e=(torch.nan, "x"), max_push=("x", [1]))
    edits |= dict(dropout=(7, "x"), max_timestep=(0, -1, 1.5), seed=([1], torch.zeros(2)), conv=(torch.zeros(2),))
    changes += [{"config": config | {name: x}} for name, values in edits.items() for x in values]
    changes += [{"obs_std": x} for x in (0 * std, -std, std[1:], std.double(), torch.nan * std, None, std.tolist())]
    changes += [{"step": x} for x in ("a", 1.5, None, torch.zeros(2))]
    huge = torch.zeros(1, dtype=torch.float64).expand(10**11)
    changes += [{"episode_returns": x} for x in (torch.nan * returns, huge, returns[:0], returns.float(), None, 3)]
    changes += [{"data": {}, "task": {}}, {"task": task | {"x": 1}}, {"config": 3}, {"policy": None}]
    edits = dict(horizon=(0, 10**9, "x"), rtg_scale=(0.0, torch.nan), targets=((), ("x",), 3), obs_dim=(12, -1))
    edits |= dict(label=("a\nb", "\x1b[31m", "x" * 999), ref_max=(-1e9,), env_kwargs=(3,), sweep=((torch.inf,),))
    changes += [{"task": task | {name: x}} for name, values in edits.items() for x in values]
    monkeypatch.setattr(stage, "rollout", None)  # would raise if it were called
    before = os.listdir(path.parent)
    for change in changes:
        torch.save(content | change, path)
        result = run_main(stage, "--checkpoint", path, "--device", "cpu")
        assert result[1] == "", change
        assert_one_line(result, 2, path)
        assert len(result[2]) < 1000 and os.listdir(path.parent) == before
    if stage is stage3:  # also where it is not the first
        other = Path(shutil.copy(pipeline.policy, tmp_path / "policy.pt"))
        for change in ({"horizon": 6}, {"ref_min": -1.0}):  # whose scores mean something else
            torch.save(content | {"task": task | change}, path)
            result = run_main(stage3, "--checkpoint", other, "--compare", path, "--device", "cpu")
            assert_one_line(result, 2, path, "--compare needs one environment")
        for change in ({"gamma": 2.0}, {"gamma": "x"}, {"critic": {}}, {"critic": 3}):
            torch.save(content | change, path)
            result = run_main(stage3, "--checkpoint", other, "--compare", path, "--device", "cpu")
            assert_one_line(result, 2, path, "critic is not whole")


def test_an_environment_of_other_sizes_than_the_task_is_one_line(copy_of, run_main, hopper_file, tmp_path):
    evaluating = argv(hopper_file, tmp_path / "runs", *DT, "--eval-every", 15)
    for stage, kind, flags in ((stage2, "dataset", evaluating), (stage3, "policy", ["--rollouts", 1])):
        path = copy_of(kind)
        content = load(path)
        torch.save(content | {"task": content["task"] | {"env_id": "HalfCheetah-v4"}}, path)
        result = run_main(stage, *flags, *["--checkpoint", path] * (stage is stage3))
        assert_one_line(result, 2, "HalfCheetah-v4", "(17, 6), not (11, 3)")
    stage3.make_env("Ant-v4", {}, (111, 8))  # D4RL's zeros


def test_an_export_never_replaces_the_checkpoint(copy_of, run_main, tmp_path):
    path = copy_of("policy")
    before = tree(tmp_path)
    (tmp_path / "link.pt2").symlink_to(path)
    for name in (path, path.parent / ".." / path.parent.name / "policy.pt", tmp_path / "link.pt2"):
        assert_one_line(run_main(stage3, "--checkpoint", path, "--export", name), 2, name, "the checkpoint itself")
    (tmp_path / "link.pt2").unlink()
    assert tree(tmp_path) == before


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
    assert not list(folder.glob("*.tmp")) and load(folder / "resume.pt")["progress"]["step"] == 17
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
    """Without room for the data, and without room for anything after them."""
    runs, full = no_room
    died = []  # TensorBoard's thread, too; run sees to it that it says nothing
    monkeypatch.setattr(threading, "excepthook", died.append)
    for prepared in (False, True):
        if prepared:
            prepare.prepare(ENV, (str(hopper_file),), runs)
        with full() as says:
            result = run_main(stage, *argv(hopper_file, runs, *(TINY1 if stage is stage1 else DT)))
            time.sleep(0.2)  # for that
        assert_one_line(result, 1, says)
        assert not died
        assert prepared or not [*(runs / DATA).parent.glob("*.*t*")]  # neither dataset.pt nor a part of it


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
        assert not (tmp_path / "runs").exists() or os.listdir(tmp_path / "runs") == [f"{ENV}__data"]


def test_stage_3_refuses_a_folder_that_it_cannot_write_before_the_sweep(pipeline, run_main, tmp_path):
    with small_disk(tmp_path / "disk", 1000) as folder:
        shutil.copy(pipeline.policy, folder)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        result = run_main(stage3, "--checkpoint", folder / "policy.pt", "--device", "cpu")
        assert result[1] == ""
        assert_one_line(result, 2, folder)


def test_our_stale_temporary_files_go_once_the_lock_is_held_and_foreign_ones_stay(run_main, hopper_file, tmp_path):
    for stage, flags in ((stage1, TINY1), (stage2, [*DT, "--total-steps", 2])):
        folder, seen = tmp_path / f"{ENV}__{stage.__name__}__1", []
        folder.mkdir()
        stale = [folder / name for name in ("resume.pt.123.tmp", "metrics.csv.4.tmp", "policy_40.pt.77.tmp")]
        names = ("notes.tmp", "resume.pt.tmp", "a.resume.pt.1.tmp", "resume.pt.x.tmp", "x.pt.123.tmp", "1.tmp")
        foreign = [folder / name for name in names]
        for path in (*stale, *foreign):
            path.write_bytes(b"half")
        command, held = argv(hopper_file, tmp_path, *flags), open(folder / ".lock", "w")
        fcntl.flock(held, fcntl.LOCK_EX)  # as another process does
        if stage is stage2:
            assert_one_line(run_main(stage, *command), 2, "another process", folder)
            seen += [path.exists() for path in stale]  # they are the other process's
            held.close()
        else:
            end = lambda: [seen.extend(path.exists() for path in stale), held.close()]  # noqa: E731, B023
            threading.Timer(0.3, end).start()
        code, out, err = run_main(stage, *command)
        assert code == 0 and ("waiting for another process" in out) == (stage is stage1), err
        assert seen == [True] * 3
        assert not any(path.exists() for path in stale) and {path.read_bytes() for path in foreign} == {b"half"}


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
    assert load(folder / "resume.pt")["progress"]["step"] == 17 and is_finite(folder / "resume.pt")
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
    monkeypatch.setattr(stage2, "evaluate", lambda policy, data, config: [0.0] * len(data.task.targets))
    folder = tmp_path / (FOLDER1 if stage is stage1 else FOLDER2)
    flags = [*TINY1, "--total-steps", 1] if stage is stage1 else [*DT, "--total-steps", 1, "--eval-every", 1]
    assert_one_line(run_main(stage, *argv(hopper_file, tmp_path, *flags)), 1, "step 1", "infinite")
    assert not (folder / "resume.pt").exists() and not (folder / "policy.pt").exists()
    assert not (folder / "critic.pt").exists()


def test_no_policy_is_saved_with_weights_that_are_not_finite(run_main, hopper_file, tmp_path, monkeypatch):
    """Saved between two rows of metrics.csv, whose losses would tell; the evaluation's actions need no state head."""
    real, calls = stage2.CoTraining.step, []
    monkeypatch.setattr(stage2, "evaluate", lambda policy, data, config: [0.0] * len(data.task.targets))

    def overflowing(self):
        result = real(self)
        calls.append(1)
        if len(calls) == 4:
            self.policy.state_head.bias.data[0] = torch.nan
        return result

    monkeypatch.setattr(stage2.CoTraining, "step", overflowing)
    result = run_main(stage2, *argv(hopper_file, tmp_path, *DT, "--eval-every", 1, "--checkpoint-minutes", 0))
    assert_one_line(result, 1, "NaN")
    for name in ("policy.pt", "resume.pt"):
        assert is_finite(tmp_path / FOLDER2 / name)
    assert load(tmp_path / FOLDER2 / "policy.pt")["step"] == 3


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
    code, out, err = run_main(stage, *command)
    assert code == 1 and "finite" in err  # continued from the last good state, it meets the same end


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
def test_sizes_that_no_memory_holds_are_one_line(hopper_file, tmp_path, pipeline):
    """In a child that may take 600 MB more than it has."""
    large = [
        ("pretrain_q", "--batch-size", 100_000_000),
        ("pretrain_q", "--critic-width", 1_000_000),
        ("train_qalign_dt", "--embed-dim", 1_000_000),
        ("train_qalign_dt", "--embed-dim", 1_000_000_000),
        ("train_qalign_dt", "--batch-size", 1_000_000_000),
        ("train_qalign_dt", "--context-len", 1_000_000),
    ]
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = (pages * resource.getpagesize() + 600_000_000,) * 2
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for i, (stage, flag, value) in enumerate(large):
        sizes = TINY1 if stage == "pretrain_q" else [*TINY2, "--critic", pipeline.critic]
        command = [sys.executable, ROOT / f"{stage}.py", *argv(hopper_file, tmp_path / f"runs{i}", *sizes, flag, value)]
        process = Forked(command, before=lambda: resource.setrlimit(resource.RLIMIT_AS, limit), **pipes)
        out, err = process.communicate(timeout=300)
        assert process.returncode in (1, 2), (flag, out, err)
        assert_one_line((process.returncode, out, err), process.returncode)


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
    monkeypatch.setattr(sys, "argv", ["train_qalign_dt.py", *argv(tmp_path / "\u00e9", tmp_path / "other", *DT)])
    with pytest.raises(SystemExit):
        stage2.run(stage2.main)
    streams["stderr"].flush()
    assert b"?: " in streams["stderr"].buffer.getvalue()


NAMES = ["cost_$5_to_$6^.hdf5", os.fsdecode(b"donn\xe9es.hdf5"), "two\nlines \x1b[31m.hdf5"]


@pytest.mark.parametrize("name", NAMES, ids=["mathematics", "not UTF-8", "escapes"])
def test_the_sweep_is_written_whatever_the_data_are_called(name, run_main, hopper_file, tmp_path):
    data = tmp_path / name
    shutil.copy(hopper_file, data)
    code, out, err = run_main(stage2, *argv(data, tmp_path / "runs", *DT, "--total-steps", 1))
    assert code == 0 and len(out.splitlines()) == 4, err
    folder = tmp_path / "runs" / FOLDER2
    code, more, err = run_main(stage3, "--checkpoint", folder / "policy.pt", "--rollouts", 1, "--trajectories")
    assert code == 0 and "Traceback" not in err and all(line.isprintable() for line in (out + more).splitlines()), err
    for kind in ("json", "csv", "png"):
        assert (folder / f"alignment.{kind}").stat().st_size and (folder / f"behaviour.{kind}").stat().st_size
    label = json.loads((folder / "alignment.json").read_text())["trained_on"]["label"]
    assert (
        label.isprintable() and label.endswith(prepare.printable(name)) and (label.endswith(name) == name.isprintable())
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes there")
def test_folders_with_accents_where_the_locale_knows_none(pipeline, hopper_file, tmp_path):
    """LC_ALL=C without UTF-8: data are prepared, the sweep is written; training, TensorBoard's end, is one line."""
    folder = tmp_path / "r\u00e9sultats" / "\u65e5\u672c"
    (folder / FOLDER2).mkdir(parents=True)
    data = shutil.copy(hopper_file, folder / "donn\u00e9es.hdf5")
    shutil.copy(pipeline.policy, folder / FOLDER2)
    surroundings = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    def go(script, *flags):
        command = [sys.executable, ROOT / script, "--env", ENV, "--runs-dir", folder, *flags]
        result = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=300)
        return result.returncode, result.stdout, result.stderr

    code, _, err = go("data/prepare.py", "--dataset-path", data)
    assert code == 0 and err == "", err
    code, _, err = go("evaluate_alignment.py", "--rollouts", "1", "--trajectories")
    assert code == 0 and "Traceback" not in err, err
    written = {path.name for path in (folder / FOLDER2).iterdir()}
    assert {f"{stem}.{kind}" for stem in ("alignment", "behaviour") for kind in ("json", "csv", "png")} <= written
    assert str(folder) in (folder / FOLDER2 / "alignment.csv").read_text(encoding="utf-8")
    assert_one_line(go("pretrain_q.py", *TINY1), 2, "TensorBoard", "PYTHONUTF8=1")


def test_numbers_are_written_before_pictures(copy_of, run_main, monkeypatch):
    path = copy_of("policy")

    def no_picture(*args):
        raise MemoryError

    for name, stem, flags in (("plot", "alignment", ()), ("plot_behaviour", "behaviour", ["--trajectories"])):
        with monkeypatch.context() as patch:
            patch.setattr(stage3, name, no_picture)
            result = run_main(stage3, "--checkpoint", path, "--rollouts", 1, *flags)
        assert_one_line(result, 1, "MemoryError")
        assert json.loads((path.parent / f"{stem}.json").read_text())["step"] == 30
        assert (path.parent / f"{stem}.csv").stat().st_size and not (path.parent / f"{stem}.png").exists()


INTERRUPT = """
import os, runpy, signal, sys

class Interrupt:
    module = sys.argv.pop(1)

    def find_spec(self, name, path=None, target=None):
        if name == self.module:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


LOADED = {"pretrain_q.py": "filelock", "train_qalign_dt.py": "torch.nn.functional", "data/prepare.py": "h5py"}
LATER = {"evaluate_alignment.py": "tyro", "transfer_cheetah_vel.py": "gymnasium"}


@pytest.mark.parametrize("where", [LOADED, pytest.param(LATER, marks=pytest.mark.slow)], ids=", ".join)
def test_ctrl_c_while_modules_load_is_one_line(where, tmp_path):
    """At the import of one module each: the first, one in the midst of torch, the last."""
    pipes, processes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path), {}
    for script, module in where.items():
        processes[script] = subprocess.Popen([sys.executable, "-c", INTERRUPT, module, ROOT / script], **pipes)
    for script, process in processes.items():
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out, err) == (130, "", "error: interrupted\n"), (script, err)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("script", ["pretrain_q", "train_qalign_dt", "evaluate_alignment", "transfer_cheetah_vel"])
def test_ctrl_c_at_any_time_in_the_first_seconds_is_one_line(script, hopper_file, tmp_path):
    """Once Python itself has started; then while modules load, while the data are read, in the first steps."""
    flags = argv(hopper_file, tmp_path, *(TINY1 if script == "pretrain_q" else DT), "--total-steps", 10**6)
    flags = flags if script in ("pretrain_q", "train_qalign_dt") else ["--runs-dir", str(tmp_path)]
    for seconds in (0, 0.1, 0.3, 0.6, 1, 1.5, 2, 3):
        command = [sys.executable, ROOT / f"{script}.py", *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        maps = Path(f"/proc/{process.pid}/maps")
        while "/numpy/" not in maps.read_text():  # a module after the handler
            time.sleep(0.001)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        if err.startswith("error: no policy at") and len(err.splitlines()) == 1:  # it has come to its end
            break  # whose last milliseconds belong to Python: exit 2, or -2 by the signal
        lines = [line for line in err.splitlines() if line.strip() and not re.search(r"\d+/\d+ \[", line)]
        assert process.returncode == 130 and len(lines) == 1 and lines[0].startswith("error: interrupted"), (
            seconds,
            err,
        )


def test_bugs_keep_their_traceback():
    """The wrapper catches what a machine does, not what a programmer did."""
    runtime = ("shapes do not match", "CUDA error: an illegal memory access was encountered", "in a worker thread")
    for error in (ValueError("x"), KeyError("x"), AssertionError("x"), *map(RuntimeError, runtime)):
        with pytest.raises(type(error)):
            stage2.run(mock.Mock(side_effect=error))


def test_no_more_threads_are_one_line(run_main, hopper_file, tmp_path, monkeypatch):
    """Where a process may start none; TensorBoard wants one, tqdm does without."""
    monkeypatch.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
    assert_one_line(run_main(stage1, *argv(hopper_file, tmp_path, *TINY1)), 1, "thread", "nothing was saved")
