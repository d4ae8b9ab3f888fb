"""results/run_studies.py --ray on a real Ray of two workers, one of which is killed in the middle of its run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_studies import CRITIC, ENV, TRAIN, data, timeless  # noqa: F401

pytestmark = pytest.mark.oracle
NAMES = [f"{ENV}__train_qalign_dt__{seed}" for seed in (1, 2)]


@pytest.fixture
def cluster(monkeypatch):
    """Its address; ended with everything that it started."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def study(path: Path, train: str) -> list[str]:
    """Its folders are relative: Ray's workers run the commands where the study was started."""
    argv = [sys.executable, str(ROOT / "results/run_studies.py"), "spearman", "--rollouts", "1", "--env", ENV]
    argv += ["--dataset-path", str(path), "--runs-dir", "runs", "--results-dir", "results"]
    return [*argv, f"--critic-flags={CRITIC}", f"--train-flags={train}"]


def processes() -> dict[int, tuple[int, str]]:
    """Process id -> its parent's, its command line."""
    lines = subprocess.run(["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout.splitlines()
    return {int(pid): (int(parent), args) for pid, parent, args in (line.split(None, 2) for line in lines[1:])}


def kill_the_worker_of(run: Path, deadline: float) -> None:
    """Once stage 2 of this run is at work, kill the Ray worker above it, as a machine's failure would."""
    while time.monotonic() < deadline:
        every = processes()
        own = f"--seed {run.name[-1]} --runs-dir runs/noise "
        stages = [pid for pid, (_, args) in every.items() if "train_qalign_dt.py" in args and own in args]
        for pid in stages if (run / ".lock").exists() else ():  # its folder is made
            while pid in every and not every[pid][1].startswith("ray::"):
                pid = every[pid][0]
            if pid in every:
                assert not (run / "policy.pt").exists()
                return os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    pytest.fail("stage 2 did not start")


def test_a_study_on_ray_survives_a_killed_worker(cluster, data, tmp_path):  # noqa: F811
    train = TRAIN.replace("--total-steps 5 ", "--total-steps 300 ")
    script = [*study(data, train), "--seeds", "1", "2"]
    records = {}
    for how in (["--workers", "2"], ["--ray", cluster]):
        folder = tmp_path / how[0]
        folder.mkdir()
        process = subprocess.Popen(
            [*script, *how], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if how[0] == "--ray":
            kill_the_worker_of(folder / "runs/noise" / NAMES[0], time.monotonic() + 300)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert out.splitlines()[-1] == "spearman: results/studies/noise/spearman.md"
        files = [folder / f"results/records/noise/{name}.json" for name in NAMES]
        records[how[0]] = [timeless(json.loads(file.read_text())) for file in files]
        assert all(f"{name}: finished" in out for name in NAMES)
    assert records["--ray"] == records["--workers"]
    tables = [(tmp_path / how / "results/studies/noise/spearman.md").read_text().splitlines() for how in records]
    timed = ("| minutes of training", "| milliseconds per action")
    one, other = ([line for line in table if not line.startswith(timed)] for table in tables)
    assert one == other


def test_what_fails_on_ray_is_named(cluster, data, tmp_path):  # noqa: F811
    bad = tmp_path / "runs/noise" / NAMES[1]
    bad.mkdir(parents=True)
    (bad / "resume.pt").write_text("not a checkpoint")
    argv = [*study(data, TRAIN), "--seeds", "2", "--ray", cluster]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "error: 1 of 1 runs are missing; the same command continues" in done.stderr
    assert f"{NAMES[1]}: training ended with code 2: error: runs/noise/{NAMES[1]}/resume.pt: damaged" in done.stderr
