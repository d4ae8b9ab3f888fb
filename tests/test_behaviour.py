"""Stage 3's --trajectories (Figures 3 and 4) and --video."""

import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate_alignment as stage3
import train_qalign_dt as stage2

ENV = "hopper-medium-tiny"
SIZES = "--embed-dim 16 --n-layer 1 --n-head 2 --context-len 4 --batch-size 8 --critic-width 16 --total-steps 1".split()


@pytest.fixture(scope="module")
def policy_file(tmp_path_factory, hopper_file, run_main):
    runs = tmp_path_factory.mktemp("runs")
    argv = ["--env", ENV, "--dataset-path", hopper_file, "--runs-dir", runs, "--device", "cpu", "--precision", "fp32"]
    code, _, err = run_main(stage2, *argv, *SIZES, "--lambda-e", 0, "--eval-every", 0)
    assert code == 0, err
    return runs / f"{ENV}__train_qalign_dt__1" / "policy.pt"


def test_velocity_over_time_by_hand():
    velocities = np.full((9, 2, 4), np.nan)  # targets, rollouts, steps
    velocities[4] = [[1.0, 2.0, 3.0, np.nan], [3.0, np.nan, np.nan, np.nan]]
    velocities[[0, 2, 6, 8], :, 0] = 0.5
    rows = [{"target_return": 100.0 * j} for j in range(9)]
    curves = stage3.behaviour({"sweep": rows}, velocities, handful=5)
    assert [curve["target_return"] for curve in curves] == [0.0, 200.0, 400.0, 600.0, 800.0]
    middle = curves[2]
    assert middle["alive"] == [2, 1, 1, 0]
    assert middle["velocity"] == [2.0, 2.0, 3.0] and middle["std"] == [1.0, 0.0, 0.0]


def test_trajectories_hold_every_step_of_a_handful_of_targets(policy_file, run_main):
    argv = ["--checkpoint", policy_file, "--rollouts", 1, "--trajectories", "--device", "cpu"]
    code, out, err = run_main(stage3, *argv)
    assert code == 0, err
    folder = policy_file.parent
    result = json.loads((folder / "behaviour.json").read_text())
    sweep = json.loads((folder / "alignment.json").read_text())["sweep"]
    assert len(result["targets"]) == len(sweep) == 12 and len(result["over_time"]) == 5
    assert result["seconds_per_step"] == pytest.approx(0.008) and "behaviour.json" in out
    for curve in result["over_time"]:
        (row,) = [row for row in sweep if row["target_return"] == curve["target_return"]]
        assert np.mean(curve["velocity"]) == pytest.approx(row["velocity_mean"], abs=1e-4)  # one rollout each
        assert len(curve["velocity"]) == sum(curve["alive"]) == row["length_mean"]
    assert [row["velocity_mean"] for row in result["targets"]] == [row["velocity_mean"] for row in sweep]
    assert (folder / "behaviour.png").read_bytes()[:4] == b"\x89PNG"
    header, *rows = (folder / "behaviour.csv").read_text().splitlines()
    assert header == "target_return,velocity_mean,length_mean" and len(rows) == 12


class Camera:
    """A stand-in for MuJoCo's renderer: its picture is as bright as the body is high."""

    def update_scene(self, data, camera):
        self.height = data.qpos[1]

    def render(self):
        return np.full((200, 240, 3), int(100 * self.height), dtype=np.uint8)


def test_video_shows_one_episode_per_target_side_by_side(policy_file):
    trained = stage3.load_policy(policy_file, "fp32", stage3.pick_device("cpu"))
    targets, seeds = (100.0, 3000.0), [5, 6]
    film = stage3.video(trained, targets, ["low", "high"], seeds, 60, Camera())
    picture, episodes = Image.open(io.BytesIO(film)), stage3.rollout(trained, targets, seeds, 60, "", keep_qpos=True)
    assert picture.size == (2 * 240, 200) and picture.info["duration"] == 80  # ms, of 10 steps
    assert picture.n_frames == -(-episodes.lengths.max() // 10) >= 2
    for i in range(picture.n_frames):
        picture.seek(i)
        left, right = np.hsplit(np.asarray(picture.convert("L")).astype(int), 2)
        for j, panel in enumerate((left, right)):
            height = episodes.qpos[j, min(10 * i, episodes.lengths[j] - 1), 1]  # the last one stays when it has ended
            assert abs(np.median(panel) - int(100 * height)) <= 2
            assert np.abs(panel[:40] - np.median(panel)).max() > 50  # the caption
    assert not np.array_equal(left[:20], right[:20])


@pytest.mark.slow
def test_video_with_mujocos_renderer(policy_file):
    """In a process of its own, since MuJoCo reads MUJOCO_GL where it is imported."""
    environment = os.environ | {"MUJOCO_GL": "egl"}
    probe = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'))"
    if subprocess.run([sys.executable, "-c", probe], capture_output=True, env=environment).returncode:
        pytest.skip("no OpenGL on this machine")
    command = [sys.executable, stage3.__file__, "--checkpoint", str(policy_file), "--rollouts", "1", "--device", "cpu"]
    done = subprocess.run([*command, "--video", "100", "3000"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    picture = Image.open(policy_file.parent / "video.gif")
    frames = []
    for i in (0, picture.n_frames - 1):
        picture.seek(i)
        frames.append(np.asarray(picture.convert("L")).astype(int))
    left, right = np.hsplit(frames[0], 2)
    assert np.abs(left[50:] - right[50:]).max() < 20 and np.ptp(left[50:]) > 50  # the same initial state, not blank
    assert np.abs(frames[1] - frames[0])[50:].max() > 50  # and the body moves


def test_video_of_an_impossible_target_is_refused(policy_file, run_main):
    code, _, err = run_main(stage3, "--checkpoint", policy_file, "--video", 100, "nan")
    assert code == 2 and "--video nan" in err


@pytest.mark.parametrize("flags", [["--video", 1], ["--trajectories"]], ids=["video", "trajectories"])
def test_without_a_mujoco_model_there_is_neither_video_nor_velocity(
    flags, policy_file, run_main, tmp_path, monkeypatch
):
    content = torch.load(policy_file, weights_only=True)
    torch.save(content | {"task": content["task"] | {"env_id": "Pendulum-v1"}}, tmp_path / "policy.pt")
    monkeypatch.setattr(stage3, "rollout", None)  # would raise if it were called
    code, out, err = run_main(stage3, "--checkpoint", tmp_path / "policy.pt", *flags)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "Pendulum-v1 has no MuJoCo model" in err


@pytest.mark.parametrize("cameras, expected", [(["track"], "track"), (["track", "above"], "above"), ([], -1)])
def test_a_video_is_seen_by_the_camera_that_the_model_has(cameras, expected, policy_file, monkeypatch):
    import mujoco

    cameras = "".join(f"<camera name='{name}'/>" for name in cameras)
    body = "<body><joint name='rootx' type='slide' axis='1 0 0'/><geom size='.1'/></body>"
    model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{cameras}{body}</worldbody></mujoco>")
    env, seen = SimpleNamespace(model=model, data=mujoco.MjData(model), dt=0.01), []
    episode = SimpleNamespace(lengths=np.array([1]), qpos=np.zeros((1, 1, 1)), velocities=np.zeros((1, 1)))
    monkeypatch.setattr(stage3, "make_env", lambda *_: SimpleNamespace(unwrapped=env))
    monkeypatch.setattr(stage3, "rollout", lambda *_, **__: episode)
    picture = np.zeros((40, 48, 3), np.uint8)
    renderer = SimpleNamespace(update_scene=lambda data, camera: seen.append(camera), render=lambda: picture)
    trained = stage3.load_policy(policy_file, "fp32", torch.device("cpu"))
    assert stage3.video(trained, [1.0], ["1"], [1], 10, renderer)[:3] == b"GIF" and seen == [expected]


def test_the_renderer_comes_before_the_first_environment(policy_file, run_main, monkeypatch):
    """An environment without a renderer imports MuJoCo with OpenGL switched off, for the whole process."""
    calls, real = [], stage3.make_env
    monkeypatch.setattr(stage3, "make_renderer", lambda task: calls.append("renderer") or stage3.fail("stop"))
    monkeypatch.setattr(stage3, "make_env", lambda *args: calls.append("environment") or real(*args))
    assert run_main(stage3, "--checkpoint", policy_file, "--video", 100, "--trajectories")[0] == 2
    assert calls == ["renderer"]


def test_video_without_opengl_is_one_line_and_writes_nothing(policy_file, run_main, monkeypatch):
    import mujoco

    def no_opengl(*args):
        raise RuntimeError("an OpenGL platform library has not been loaded\ninto this process")

    monkeypatch.setattr(mujoco, "Renderer", no_opengl, raising=False)
    files = {path: path.stat().st_mtime_ns for path in policy_file.parent.rglob("*")}
    code, out, err = run_main(stage3, "--checkpoint", policy_file, "--video", 100, "--device", "cpu")
    assert code == 2 and len(err.splitlines()) == 1 and "MUJOCO_GL" in err and "video.gif" not in out
    assert err.startswith("error: --video: MuJoCo finds no OpenGL here (an OpenGL platform library")
    assert {path: path.stat().st_mtime_ns for path in policy_file.parent.rglob("*")} == files
