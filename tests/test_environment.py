"""requirements.txt is enough, and every script explains itself and runs when copied away alone."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENV, ROOT, TINY1, TINY2, Forked, call
from test_transfer import save_policy

STAGES = ("pretrain_q", "train_qalign_dt", "evaluate_alignment", "transfer_cheetah_vel")
SCRIPTS = (
    *STAGES,
    "data/prepare",
    "data/collect_dataset",
    "data/collect_maze2d",
    "data/mix_returns",
    "baselines/train_radt",
    "baselines/train_vdt",
    "baselines/train_qt",
    "baselines/train_rvdt",
    "baselines/tune_vdt",
    "results/run_studies",
)
OPTIONAL = {"minari", "wandb", "gymnasium_robotics", "ray"}  # imported only where the user asks for it


def closure(requirements: str) -> set[str]:
    """Names of the distributions that `pip install` of these lines brings, as far as they are installed here."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line.partition("#")[0].strip() for line in requirements.splitlines()]
    todo, found = [(Requirement(line), "") for line in lines if line], set()
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in found:
                found.add((name, wanted))
                try:
                    lines = importlib.metadata.requires(name) or []
                except importlib.metadata.PackageNotFoundError:
                    continue
                todo += [(Requirement(line), wanted) for line in lines]
    return {name for name, _ in found}


def blocked_modules(requirements: str) -> list[str]:
    """Top-level modules that are installed here, and only by distributions that requirements.txt does not bring."""
    from packaging.utils import canonicalize_name

    inside = closure(requirements) | {"pip", "setuptools", "wheel"}  # of every virtual environment
    found = importlib.metadata.packages_distributions()
    return sorted(name for name, dists in found.items() if not {canonicalize_name(d) for d in dists} & inside)


PROGRAM = """
import importlib, json, sys
blocked, scripts, modules, policy = json.loads(sys.stdin.read())

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r} (requirements.txt does not bring it)", name=name)

sys.meta_path.insert(0, Blocker())
sys.path[:0] = scripts
if policy:
    import evaluate_alignment
    sys.argv = ["evaluate_alignment.py", "--checkpoint", policy, "--rollouts", "1"]
    evaluate_alignment.run(evaluate_alignment.main)
for name in modules:  # every import statement of every script, also those inside functions
    importlib.import_module(name)
import collect_dataset, evaluate_alignment, numpy, pretrain_q, run_studies, train_qalign_dt, transfer_cheetah_vel
for stage in (collect_dataset, train_qalign_dt):
    env = stage.make_env("Hopper-v4")
    env.reset(seed=1)
    env.step(env.action_space.sample())
both = numpy.arange(2)
evaluate_alignment.Simulator("Ant-v4", [1, 2]).step(both, numpy.zeros((2, 8)))
transfer_cheetah_vel.HalfCheetah("HalfCheetah-v4", [1, 2]).step(both, numpy.zeros((2, 6)))
print("all imported and stepped")
"""


def imports() -> list[str]:
    """The modules that the scripts import, anywhere in the file."""
    names = set()
    for script in SCRIPTS:
        for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module)
    return sorted(name for name in names if name.partition(".")[0] not in OPTIONAL)


def import_and_step(requirements: str, policy: str = "", **surroundings: str) -> subprocess.CompletedProcess:
    folders = [str(ROOT), str(ROOT / "data"), str(ROOT / "results"), str(ROOT / "baselines")]
    text = json.dumps([blocked_modules(requirements), folders, imports(), policy])
    options = dict(env=os.environ | surroundings, capture_output=True, text=True, timeout=300)
    return subprocess.run([sys.executable, "-c", PROGRAM], input=text, **options)


def test_requirements_are_enough_for_every_script_and_a_bad_renderer_and_strict_streams_stop_nothing(
    pipeline, tmp_path
):
    """With everything else blocked that happens to be installed here; a sweep needs no picture of MuJoCo's."""
    policy, odd = str(shutil.copy(pipeline.policy, tmp_path)), dict(PYTHONIOENCODING="ascii:strict", LC_ALL="C")
    result = import_and_step((ROOT / "requirements.txt").read_text(), policy, MUJOCO_GL="nonsense", **odd)
    assert result.returncode == 0 and "all imported and stepped" in result.stdout, result.stderr
    assert (tmp_path / "alignment.json").exists()


@pytest.mark.parametrize("missing", ["imageio", "scipy", "tensorboard", "filelock"])
def test_a_requirement_that_is_left_out_is_blocked(missing):
    """So the test above fails without it. (Gymnasium's MuJoCo environments import imageio, and do not say so.)"""
    text = (ROOT / "requirements.txt").read_text()
    without = re.sub(rf"(?m)^{missing}==.*\n", "", text)
    others = closure(without)
    assert without != text and missing not in blocked_modules(text)
    # filelock is torch's requirement too
    assert (missing in blocked_modules(without)) == (missing not in others) == (missing != "filelock")


@pytest.mark.slow
def test_without_imageio_the_scripts_do_not_start():
    without = re.sub(r"(?m)^imageio==.*\n", "", (ROOT / "requirements.txt").read_text())
    result = import_and_step(without)
    assert result.returncode == 1 and "No module named 'imageio'" in result.stderr


@pytest.mark.parametrize("file", ["requirements.txt", "tests/requirements-oracle.txt"])
def test_requirements_are_pinned(file):
    from packaging.requirements import Requirement

    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    assert requirements and all([x.operator for x in r.specifier] == ["=="] for r in requirements)
    names = {r.name for r in requirements}
    assert ("d4rl" in names) == ("oracle" in file) and (
        file != "requirements.txt" or {"torch", "imageio", "pytest"} < names
    )


def module(script: str):
    return importlib.import_module(script.rpartition("/")[2])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_a_text_for_every_flag(script, monkeypatch):
    import dataclasses

    monkeypatch.setenv("COLUMNS", "160")
    stage = module(script)
    code, out, err = call(stage, "--help")
    assert (code, err) == (0, "")
    text = re.sub(r"[\u2500-\u257f]", " ", out)  # boxes
    assert " ".join(stage.__doc__.split())[:60] in " ".join(text.split())
    flags = re.split(r"(?m)^\s*(?=(?:-\w, )?--[a-z])", text)[1:]
    texts = {re.match(r"(?:-\w, )?--([a-z0-9-]+)", flag)[1]: flag for flag in flags}
    for field in dataclasses.fields(stage.Args):
        flag = field.name.replace("_", "-")
        if flag not in texts and "Positional" in str(field.type):
            continue
        words = re.sub(r"\([^()]*\)|\{[^}]*\}|--[\w-]+", "", texts[flag])
        assert len(re.findall(r"[a-z]{2,}", words)) >= 2, texts[flag]
        assert not re.search(r"default:\s+None|\{None\}", texts[flag]), texts[flag]


@pytest.mark.parametrize("env_id", ["CartPole-v1", "FrozenLake-v1"])
def test_discrete_actions_are_one_line(env_id, capsys):
    with pytest.raises(SystemExit) as exit:
        module("train_qalign_dt").make_env(env_id)
    says = f"error: environment {env_id}: observations must be a vector, and actions a bounded vector\n"
    assert (exit.value.code, capsys.readouterr().err) == (2, says)


@pytest.mark.parametrize("script", ["pretrain_q", "train_qalign_dt"])
def test_a_copied_stage_without_its_data_says_what_is_missing(script, tmp_path, monkeypatch):
    stage = module(script)
    monkeypatch.setattr(stage, "__file__", str(tmp_path / f"{script}.py"))
    code, out, err = call(stage, "--env", ENV, "--runs-dir", tmp_path, "--dataset-path", "mine.hdf5")
    assert (code, out) == (2, "") and "dataset.pt is missing: copy it here" in err and err.count("\n") == 1


@pytest.mark.parametrize("start", [Forked, pytest.param(subprocess.Popen, marks=pytest.mark.slow)])
def test_each_stage_runs_where_it_was_copied_to_with_the_checkpoints_that_it_reads(start, tmp_path, pipeline):
    """One file and its .pt files, from another working directory, in a process of its own; the weights are the same."""
    data, critic, run = Path(f"{ENV}__data", "dataset.pt"), Path(f"{ENV}__pretrain_q__1", "critic.pt"), f"{ENV}__%s__1"
    policy, results = Path(run % "train_qalign_dt", "policy.pt"), {"alignment.json", "alignment.csv", "alignment.png"}
    cheetah = save_policy(tmp_path / "policy.pt")
    quick = "--rollouts 1 --calibration-rollouts 1 --budgets 2 --velocities 1".split()
    stages = {
        "pretrain_q": ({data: None}, ["--env", ENV, *TINY1], {"critic.pt", "report.json"}),
        "train_qalign_dt": ({data: None, critic: None}, ["--env", ENV, *TINY2, "--eval-every", "15"], {"policy.pt"}),
        "evaluate_alignment": ({policy: None}, ["--env", ENV, "--rollouts", "1"], results),
        "transfer_cheetah_vel": ({policy: cheetah}, ["--checkpoint", Path("runs", policy), *quick], {"transfer.json"}),
    }
    processes = {}
    for name in STAGES:
        files, flags, _ = stages[name]
        for file, source in files.items():
            path = tmp_path / name / "elsewhere" / "runs" / file
            path.parent.mkdir(parents=True)
            shutil.copy(source or pipeline.runs / file, path)
        command = [sys.executable, shutil.copy(ROOT / f"{name}.py", tmp_path / name), *map(str, flags)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes[name] = start(command, cwd=tmp_path / name / "elsewhere", **pipes)
    for name, process in processes.items():
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0 and "Traceback" not in err, (name, err)
        folder = tmp_path / name / "elsewhere" / "runs" / (run % (name if name == "pretrain_q" else "train_qalign_dt"))
        assert stages[name][2] <= {path.name for path in folder.iterdir()}, out
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == sorted(["elsewhere", f"{name}.py"])
        for file, networks in ((critic, ["critic"]), (policy, ["policy", "critic"])):
            if name == file.parent.name.split("__")[1]:
                ours, theirs = (torch.load(runs / file, weights_only=True) for runs in (folder.parent, pipeline.runs))
                assert all(torch.equal(ours[key][k], x) for key in networks for k, x in theirs[key].items())
