"""Stage 3's --trajectories (Figures 3 and 4) and --video."""

import json
import os
import subprocess
import sys
from pathlib import Path

import evaluate_alignment as stage3
import numpy as np
import pytest
import train_qalign_dt as stage2
from conftest import TINY2

ROOT, ENV = Path(stage3.__file__).parent, "hopper-medium-tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, hopper_file):
    from unittest import mock

    runs = tmp_path_factory.mktemp("runs")
    command = ["train_qalign_dt.py", "--env", ENV, "--dataset-path", str(hopper_file), "--runs-dir", str(runs)]
    with mock.patch("sys.argv", [*command, *TINY2, "--lambda-e", "0", "--eval-every", "0"]):
        stage2.main()
    return runs / f"{ENV}__train_qalign_dt__1"


def stage3_as_a_process(folder, *flags, gl="egl"):
    command = [sys.executable, str(ROOT / "evaluate_alignment.py"), "--checkpoint", str(folder / "policy.pt")]
    command += ["--device", "cpu", "--precision", "fp32", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MUJOCO_GL": gl})


def test_velocity_over_time_by_hand():
    velocities = np.full((9, 2, 4), np.nan)  # targets, rollouts, steps
    velocities[4] = [[1.0, 2.0, 3.0, np.nan], [3.0, np.nan, np.nan, np.nan]]
    velocities[[0, 2, 6, 8], :, 0] = 0.5
    rows = [{"target_return": 100.0 * j, "target_score": j, "velocity_mean": 2.0 + j} for j in range(9)]
    curves = stage3.behaviour({"sweep": rows}, velocities, handful=5)
    assert [curve["target_return"] for curve in curves] == [0.0, 200.0, 400.0, 600.0, 800.0]
    assert curves[2]["alive"] == [2, 1, 1, 0] and curves[2]["velocity_mean"] == 6.0
    assert curves[2]["velocity"] == [2.0, 2.0, 3.0] and curves[2]["std"] == [1.0, 0.0, 0.0]


def test_trajectories_hold_every_step_of_a_handful_of_targets(folder, run_main):
    argv = ["--checkpoint", folder / "policy.pt", "--rollouts", 1, "--trajectories", "--device", "cpu"]
    code, out, err = run_main(stage3, *argv)
    assert code == 0, err
    result = json.loads((folder / "behaviour.json").read_text())
    sweep = json.loads((folder / "alignment.json").read_text())["sweep"]
    assert len(result["targets"]) == len(sweep) == 12 and len(result["over_time"]) == 5
    assert result["seconds_per_step"] == pytest.approx(0.008) and "behaviour.png" in out
    for curve in result["over_time"]:
        (row,) = [row for row in sweep if row["target_return"] == curve["target_return"]]
        assert np.mean(curve["velocity"]) == pytest.approx(row["velocity_mean"], abs=1e-4)  # one rollout each
        assert len(curve["velocity"]) == sum(curve["alive"]) == row["length_mean"]
    assert [row["velocity_mean"] for row in result["targets"]] == [row["velocity_mean"] for row in sweep]
    assert (folder / "behaviour.png").read_bytes()[:4] == b"\x89PNG"


def test_video_shows_one_episode_per_target_side_by_side(folder):
    from PIL import Image

    done = stage3_as_a_process(folder, "--rollouts", 1, "--video", 100, 3000)
    if "finds no OpenGL" in done.stderr:
        pytest.skip("no OpenGL on this machine")
    assert done.returncode == 0, done.stderr
    picture = Image.open(folder / "video.gif")
    assert picture.size == (2 * 240, 200) and picture.info["duration"] == 80 and picture.n_frames >= 2
    frames = []
    for i in (0, picture.n_frames - 1):
        picture.seek(i)
        frames.append(np.asarray(picture.convert("L")).astype(int))
    left, right = np.hsplit(frames[0], 2)
    assert np.abs(left[50:] - right[50:]).max() < 20  # the same initial state ...
    assert np.abs(left[:50] - right[:50]).max() > 100  # ... under another request
    assert np.abs(frames[1] - frames[0])[50:].max() > 50  # and the body moves
    assert not list(folder.glob("*.tmp"))


def test_video_of_an_impossible_target_is_refused(folder, run_main):
    code, _, err = run_main(stage3, "--checkpoint", folder / "policy.pt", "--video", 100, "nan")
    assert code == 2 and "--video 100.0 nan: target returns must be finite" in err and len(err.splitlines()) == 1


def test_video_without_opengl_is_one_line_and_writes_nothing(folder):
    before = {p: p.stat().st_mtime for p in folder.rglob("*")}
    done = stage3_as_a_process(folder, "--video", 100, gl="disable")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: --video: MuJoCo finds no OpenGL here") and "MUJOCO_GL" in done.stderr
    assert {p: p.stat().st_mtime for p in folder.rglob("*")} == before
