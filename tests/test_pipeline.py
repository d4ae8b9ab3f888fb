"""The command line: stages end to end, kill and resume, refusals, bad input."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import collect_dataset  # noqa: F401 (test_help)
import evaluate_alignment as stage3
import numpy as np
import pretrain_q as stage1
import pytest
import torch
import train_qalign_dt as stage2
import transfer_cheetah_vel  # noqa: F401 (test_help)
from conftest import TINY1, TINY2, write_hdf5

ROOT = Path(stage2.__file__).parent
ENV = "hopper-medium-tiny"


def argv(data, runs, *extra):
    return ["--env", ENV, "--dataset-path", data, "--runs-dir", runs, *extra]


def tree(folder: Path) -> dict:
    return (
        {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        if folder.exists()
        else {}
    )


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, hopper_file):
    """Stage 2 started without a critic, as a user would: it trains one first. Then stage 3."""
    runs = tmp_path_factory.mktemp("runs")
    command = [
        sys.executable,
        str(ROOT / "train_qalign_dt.py"),
        *map(str, argv(hopper_file, runs, *TINY2, "--critic-steps", 30)),
    ]
    two = subprocess.run(command, capture_output=True, text=True, cwd=runs)
    assert two.returncode == 0, two.stderr
    command = [
        sys.executable,
        str(ROOT / "evaluate_alignment.py"),
        "--env",
        ENV,
        "--runs-dir",
        str(runs),
        "--rollouts",
        "2",
        "--device",
        "cpu",
    ]
    three = subprocess.run(command, capture_output=True, text=True, cwd=runs)
    assert three.returncode == 0, three.stderr
    return runs, two, three


def test_three_stages_end_to_end(pipeline):
    runs, two, three = pipeline
    assert "starting pretrain_q.py" in two.stdout and "hopper_tiny.hdf5" in two.stdout and "(D4RL)" not in two.stdout
    assert sorted(p.name for p in runs.iterdir()) == [
        f"{ENV}__pretrain_q__1",
        f"{ENV}__train_qalign_dt__1",
    ]  # and no MUJOCO_LOG.TXT
    folder = runs / f"{ENV}__train_qalign_dt__1"
    assert {
        "policy.pt",
        "policy_best.pt",
        "resume.pt",
        "metrics.csv",
        "evaluations.csv",
        "alignment.json",
        "alignment.csv",
        "alignment.png",
    } <= set(os.listdir(folder))
    assert not list(runs.rglob("*.tmp")) and list((folder / "tensorboard").rglob("events*"))
    with open(folder / "metrics.csv") as f:
        (row,) = csv.DictReader(f)
    assert row["step"] == "30" and all(np.isfinite(float(x)) for x in row.values()) and float(row["q_loss"]) > 0
    for name in ("out of date", "settotalmass", "Traceback", "Warning"):
        assert name not in two.stderr + three.stderr
    assert str(folder / "alignment.png") in three.stdout.splitlines()[-1]


def test_alignment_json_holds_what_the_sweep_did(pipeline):
    runs, _, _ = pipeline
    folder = runs / f"{ENV}__train_qalign_dt__1"
    result = json.loads((folder / "alignment.json").read_text())
    policy = torch.load(folder / "policy.pt", weights_only=True)
    returns, task = policy["episode_returns"].numpy(), stage2.parse_env(ENV)
    targets = [row["target_return"] for row in result["sweep"]]
    assert targets == pytest.approx(np.linspace(returns.min(), returns.max(), 12).tolist())  # steps of 100 gave fewer
    for row in result["sweep"] + result["high_targets"]:
        assert row["score_mean"] == pytest.approx(task.score(row["return_mean"])) and row["length_mean"] >= 1
    errors = [row["score_mean"] - row["target_score"] for row in result["sweep"]]
    assert result["alignment_rmse"] == pytest.approx(np.sqrt(np.mean(np.square(errors))))  # Eq. 8
    assert result["best_score"] == max(row["score_mean"] for row in result["sweep"])
    assert [row["target_return"] for row in result["high_targets"]] == pytest.approx(
        [float(returns.max()) * x for x in (1.0, 1.2)]
    )
    assert result["dataset"]["hash"] == policy["data"]["hash"] and result["dataset"]["files"] == ["hopper_tiny.hdf5"]
    assert -1 <= result["spearman_q_vs_return"] <= 1 and result["rollouts"] == 2 and result["env"] == ENV
    with open(folder / "alignment.csv") as f:
        assert len(list(csv.DictReader(f))) == len(targets) + 2


def test_q_is_ranked_against_plain_and_discounted_returns_of_the_sweeps_rollouts(pipeline, monkeypatch):
    runs, _, _ = pipeline
    trained = stage3.load_policy(runs / f"{ENV}__train_qalign_dt__1" / "policy.pt", "fp32", torch.device("cpu"))
    trained.content["config"]["gamma"] = 0.5
    seen, real = [], stage3.rollout
    monkeypatch.setattr(stage3, "rollout", lambda *args, **kwargs: seen.append(real(*args, **kwargs)) or seen[0])
    record, _ = stage3.sweep(trained, np.array([10.0, 50.0, 90.0]), (100.0,), 4, seed=1)
    assert record["gamma"] == 0.5
    rollouts, q = seen[0], stage3.load_critic(trained)
    q = q(rollouts.first_obs, rollouts.first_act).amin(0).detach().numpy()[:12]  # without the high target's
    discounted = [
        sum(0.5**t * r for t, r in enumerate(rewards[:n])) for rewards, n in zip(rollouts.rewards, rollouts.lengths)
    ]
    ranks = lambda x: np.argsort(np.argsort(x))  # noqa: E731  no two of them are equal
    for key, values in (("return", rollouts.returns[:12]), ("discounted_return", discounted[:12])):
        assert record[f"spearman_q_vs_{key}"] == pytest.approx(np.corrcoef(ranks(q), ranks(values))[0, 1])


def test_targets_go_in_steps_from_the_lowest_to_the_highest_return():
    targets = stage3.target_returns(np.array([315.87, 1000.0, 3222.36]), 100.0)
    assert len(targets) == 30 and targets[0] == 315.87 and targets[-1] == pytest.approx(3215.87)  # D.6, hopper-medium
    assert len(stage3.target_returns(np.array([0.0, 500.0]), 100.0)) == 12


def test_compare_and_best_checkpoint(pipeline, run_main, hopper_file):
    runs, _, _ = pipeline
    code, _, err = run_main(stage2, *argv(hopper_file, runs, *TINY2, "--lambda-e", 0, "--no-conv", "--exp-name", "dt"))
    assert code == 0, err
    folder = runs / f"{ENV}__train_qalign_dt__1"
    before = (folder / "alignment.json").read_bytes()
    dt = runs / f"{ENV}__dt__1" / "policy.pt"
    code, out, err = run_main(
        stage3, "--checkpoint", folder / "policy_best.pt", "--compare", dt, "--rollouts", 1, "--device", "cpu"
    )
    assert code == 0, err
    result = json.loads((folder / "alignment_best.json").read_text())
    (other,) = result["compare"]
    assert other["checkpoint"] == str(dt) and other["lambda_e"] == 0 and other["spearman_q_vs_return"] is None
    assert [r["target_return"] for r in other["sweep"]] == [r["target_return"] for r in result["sweep"]]
    assert stage3.curve_label(other).startswith("DT, seed 1") and (folder / "alignment.json").read_bytes() == before
    assert torch.load(dt, weights_only=True)["critic"] is None


def test_a_dt_needs_no_critic_and_says_nothing_of_one(tmp_path, run_main, hopper_file, monkeypatch):
    monkeypatch.setattr(stage2, "load_critic", None)  # would raise if it were called
    monkeypatch.setattr(stage2, "pretrain", None)
    code, out, err = run_main(stage2, *argv(hopper_file, tmp_path, *TINY2, "--lambda-e", 0))
    assert code == 0 and os.listdir(tmp_path) == [f"{ENV}__train_qalign_dt__1"]
    assert "critic" not in torch.load(tmp_path / f"{ENV}__train_qalign_dt__1" / "resume.pt", weights_only=True)


def test_a_fixed_critic_does_not_move(pipeline, run_main, hopper_file):
    runs, _, _ = pipeline
    code, _, err = run_main(stage2, *argv(hopper_file, runs, *TINY2, "--no-update-q", "--exp-name", "fixed"))
    assert code == 0, err
    critic = torch.load(runs / f"{ENV}__pretrain_q__1" / "critic.pt", weights_only=True)["critic"]
    for name, moved in (("fixed", False), ("train_qalign_dt", True)):
        policy = torch.load(runs / f"{ENV}__{name}__1" / "policy.pt", weights_only=True)
        assert any(not torch.equal(v, policy["critic"][k]) for k, v in critic.items()) == moved


def test_untrained_policy_can_be_saved(pipeline, run_main, hopper_file):
    runs, _, _ = pipeline
    code, _, err = run_main(stage2, *argv(hopper_file, runs, *TINY2, "--total-steps", 0, "--exp-name", "untrained"))
    assert code == 0, err
    assert torch.load(runs / f"{ENV}__untrained__1" / "policy.pt", weights_only=True)["step"] == 0


def test_antmaze_trains_and_says_that_it_cannot_be_rolled_out(tmp_path, run_main, antmaze_file):
    name = "antmaze-umaze-tiny"
    data = ["--env", name, "--dataset-path", antmaze_file, "--runs-dir", tmp_path]
    assert run_main(stage1, *data, *TINY1)[0] == 0
    code, out, err = run_main(stage2, *data, *TINY2)
    assert code == 0 and "there is no simulator for AntMaze" in out, err
    policy = torch.load(tmp_path / f"{name}__train_qalign_dt__1" / "policy.pt", weights_only=True)
    cfg = policy["config"]
    assert (cfg["sigma_e"], cfg["lambda_e"], cfg["delta_rtg"], cfg["half_normal"]) == (5.0, 100.0, 1.0, True)
    assert (
        cfg["q_scale"]
        == torch.load(tmp_path / f"{name}__pretrain_q__1" / "critic.pt", weights_only=True)["report"]["q_abs_mean"]
    )
    code, _, err = run_main(stage3, "--env", name, "--runs-dir", tmp_path)
    assert code == 2 and err.count("\n") == 1 and "AntMaze simulator" in err


# ---- configuration ----


def test_table_d8_and_paper_size_are_the_defaults(monkeypatch):
    def cfg(env, *argv):
        monkeypatch.setattr(sys, "argv", ["train_qalign_dt.py", "--env", env, *argv])
        return stage2.resolve(stage2.parse_args(), stage2.parse_env(env))

    def row(env):
        return [cfg(env)[k] for k in ("sigma_e", "lambda_e", "delta_rtg")]

    sizes = ("embed_dim", "n_layer", "n_head", "context_len", "batch_size", "critic_width", "total_steps")
    assert [cfg("hopper-medium-v2")[k] for k in sizes] == [256, 4, 4, 20, 256, 256, 100_000]
    for name, values in stage2.TABLE_D8.items():
        assert row("antmaze-medium-play-v2" if name == "antmaze" else f"{name}-v2") == list(values)
    assert (
        row("hopper-expert-v2") == row("hopper-medium-expert-v2") != row("hopper-medium-v2") == row("hopper-random-zoo")
    )
    assert row("ant-medium-replay-v2") == [15, 5, 5] and row("hopper-mixed-zoo") == row("hopper-medium-replay-v2")
    assert cfg("hopper-medium-v2", "--delta-rtg", "0")["delta_rtg"] == 0 and cfg("hopper-mini")["embed_dim"] == 64
    assert "sigma_e" not in cfg("hopper-medium-v2", "--lambda-e", "0")


def test_rtg_range_is_the_datas_own_unless_the_data_is_d4rls(pipeline, tmp_path, run_main, hopper_file, monkeypatch):
    runs, _, _ = pipeline
    policy = torch.load(runs / f"{ENV}__train_qalign_dt__1" / "policy.pt", weights_only=True)
    low, high = policy["config"]["rtg_range"]
    tokens = stage2.read_dataset(stage2.parse_env(ENV), (str(hopper_file),)).returns_to_go()
    assert (low * 1000, high * 1000) == pytest.approx((tokens.min(), tokens.max()))
    (tmp_path / "d4rl").mkdir()
    (tmp_path / "d4rl" / "hopper_medium-v2.hdf5").write_bytes(hopper_file.read_bytes())
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    common = ["--env", "hopper-medium-v2", "--runs-dir", tmp_path / "runs"]
    assert run_main(stage1, *common, *TINY1)[0] == 0
    assert run_main(stage2, *common, *TINY2, "--total-steps", 1, "--eval-every", 0)[0] == 0
    assert (
        run_main(
            stage2, *common, *TINY2, "--total-steps", 1, "--eval-every", 0, "--rtg-range", "off", "--exp-name", "off"
        )[0]
        == 0
    )
    ranges = [
        torch.load(tmp_path / f"runs/hopper-medium-v2__{n}__1/policy.pt", weights_only=True)["config"]["rtg_range"]
        for n in ("train_qalign_dt", "off")
    ]
    assert ranges == [(-1.0, 4.0), (-np.inf, np.inf)]


def test_a_run_of_over_an_hour_says_so_first(tmp_path, run_main, hopper_file, monkeypatch):
    monkeypatch.setattr(stage2, "pretrain", lambda *a: stage2.fail("stopped here by the test"))
    out = run_main(stage2, *argv(hopper_file, tmp_path, "--device", "cpu", "--critic-steps", 10))[1]
    assert "hours on this cpu" in out.splitlines()[0] and "hopper-mini" in out.splitlines()[0]
    out = run_main(stage2, *argv(hopper_file, tmp_path, *TINY2, "--critic-steps", 10))[1]
    assert "hour" not in out


# ---- kill, resume, refuse ----


def final_weights(runs, name):
    policy = torch.load(runs / f"{ENV}__{name}__1" / "policy.pt", weights_only=True)
    return policy["policy"] | {f"critic.{k}": v for k, v in policy["critic"].items()}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "Ctrl-C"])
def test_killed_and_resumed_ends_with_the_same_weights(pipeline, run_main, hopper_file, tmp_path, how):
    runs, _, _ = pipeline
    common = [*argv(hopper_file, runs), *TINY2, "--total-steps", 250, "--eval-every", 120, "--critic-width", 16]
    if not (runs / f"{ENV}__whole__1").exists():
        assert run_main(stage2, *common, "--exp-name", "whole")[0] == 0
    name = f"killed{int(how)}"
    folder = runs / f"{ENV}__{name}__1"
    command = [
        sys.executable,
        str(ROOT / "train_qalign_dt.py"),
        *map(str, common),
        "--exp-name",
        name,
        "--checkpoint-minutes",
        "0",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # until it has got somewhere beyond the first log line
        if (folder / "metrics.csv").exists() and "\n100," in (folder / "metrics.csv").read_text():
            break
        time.sleep(0.002)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130)
    step = torch.load(folder / "resume.pt", weights_only=True)["step"]
    assert 90 <= step < 250
    if how == signal.SIGINT:
        assert "the same command continues" in out and "Traceback" not in err
    code, out, err = run_main(stage2, *common, "--exp-name", name)
    assert code == 0 and f"continuing at step {step:,}" in out, err
    whole, resumed = final_weights(runs, "whole"), final_weights(runs, name)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)
    for log in ("metrics.csv", "evaluations.csv"):
        assert (folder / log).read_text() == (runs / f"{ENV}__whole__1" / log).read_text()


def test_stage_1_resumes_bit_for_bit(tmp_path, run_main, hopper_file, monkeypatch):
    common = [*argv(hopper_file, tmp_path), *TINY1, "--total-steps", 60]
    assert run_main(stage1, *common, "--exp-name", "whole")[0] == 0
    saves = []
    real = stage1.save_checkpoint

    def dying(path, payload):
        real(path, payload)
        saves.append(path)
        if len(saves) == 25:
            raise KeyboardInterrupt  # in the middle, with nothing put in order

    monkeypatch.setattr(stage1, "save_checkpoint", dying)
    with pytest.raises(KeyboardInterrupt):
        run_main(stage1, *common, "--exp-name", "cut", "--checkpoint-minutes", 0)
    monkeypatch.setattr(stage1, "save_checkpoint", real)
    code, out, _ = run_main(stage1, *common, "--exp-name", "cut")
    assert code == 0 and "continuing at step 25" in out
    a, b = (torch.load(tmp_path / f"{ENV}__{n}__1" / "critic.pt", weights_only=True) for n in ("whole", "cut"))
    assert all(torch.equal(a["critic"][k], b["critic"][k]) for k in a["critic"]) and a["report"] == b["report"]


@pytest.mark.parametrize("stage, sizes", [(stage1, TINY1), (stage2, TINY2)], ids=["pretrain_q", "train_qalign_dt"])
def test_a_finished_run_says_so_and_changes_nothing(pipeline, run_main, hopper_file, stage, sizes):
    runs, _, _ = pipeline
    sizes = sizes if stage is stage2 else ["--device", "cpu", "--critic-width", 16, "--total-steps", 30]
    before = tree(runs)
    code, out, err = run_main(stage, *argv(hopper_file, runs, *sizes))
    assert code == 0 and "finished" in out and err == "" and tree(runs) == before


@pytest.mark.parametrize(
    "change, named",
    [
        (["--sigma-e", 3], "sigma_e 10.0 there, 3.0 here"),
        (["--total-steps", 31], "total_steps"),
        (["--no-conv"], "conv"),
    ],
)
def test_another_configuration_in_the_same_folder_is_refused(pipeline, run_main, hopper_file, change, named):
    runs, _, _ = pipeline
    before = tree(runs)
    code, out, err = run_main(stage2, *argv(hopper_file, runs, *TINY2, *change))
    assert code == 2 and named in err and "--exp-name" in err and err.count("\n") == 1 and tree(runs) == before


def test_other_data_in_the_same_folder_and_a_critic_of_other_data_are_refused(
    pipeline, run_main, tmp_path, hopper_arrays
):
    runs, _, _ = pipeline
    other = write_hdf5(
        tmp_path / "other.hdf5", hopper_arrays[0], hopper_arrays[1], hopper_arrays[2] + 1, *hopper_arrays[3:]
    )
    before = tree(runs)
    code, _, err = run_main(stage2, *argv(other, runs, *TINY2, "--lambda-e", 0, "--exp-name", "train_qalign_dt"))
    assert code == 2 and "data" in err and err.count("\n") == 1
    code, _, err = run_main(stage2, *argv(other, runs, *TINY2, "--exp-name", "new"))
    assert code == 2 and "critic of other data" in err and err.count("\n") == 1 and tree(runs) == before


def test_two_processes_never_write_one_folder(pipeline, run_main, hopper_file):
    runs, _, _ = pipeline
    lock = stage2.claim(runs / f"{ENV}__busy__1")
    code, _, err = run_main(stage2, *argv(hopper_file, runs, *TINY2, "--exp-name", "busy"))
    lock.release()
    assert code == 2 and "another process" in err and err.count("\n") == 1


def test_a_nan_stops_the_run_and_keeps_the_last_good_checkpoint(pipeline, run_main, hopper_file, monkeypatch):
    runs, _, _ = pipeline
    calls, real = [], stage2.supervised_loss

    def poisoned(*args):
        calls.append(1)
        action_loss, state_loss = real(*args)
        return action_loss * (float("nan") if len(calls) == 18 else 1.0), state_loss

    monkeypatch.setattr(stage2, "supervised_loss", poisoned)
    monkeypatch.setattr(stage2, "LOG_EVERY", 10)
    code, _, err = run_main(stage2, *argv(hopper_file, runs, *TINY2, "--exp-name", "nan", "--eval-every", 10))
    assert code == 1 and "step 18" in err.splitlines()[-1]
    kept = torch.load(runs / f"{ENV}__nan__1" / "resume.pt", weights_only=True)
    assert kept["step"] == 10 and all(v.isfinite().all() for v in kept["policy"].values())


def test_a_nan_before_any_checkpoint_says_that_nothing_was_saved(tmp_path, run_main, hopper_file, monkeypatch):
    monkeypatch.setattr(
        stage2, "supervised_loss", lambda *a: (torch.tensor(float("nan"), requires_grad=True), torch.tensor(0.0))
    )
    code, _, err = run_main(stage2, *argv(hopper_file, tmp_path, *TINY2, "--lambda-e", 0, "--eval-every", 0))
    assert code == 1 and "step 1:" in err.splitlines()[-1] and "nothing was saved" in err.splitlines()[-1]


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    stage2.save_checkpoint(path, {"a": 1})

    def half(payload, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(stage2.torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        stage2.save_checkpoint(path, {"a": 2})
    assert torch.load(path, weights_only=True) == {"a": 1}


def test_a_run_resumes_without_stage_1s_critic(pipeline, run_main, hopper_file, tmp_path, monkeypatch):
    """resume.pt holds the critic; only the folder of stage 2 was kept."""
    runs, _, _ = pipeline
    moved = tmp_path / "moved"
    moved.mkdir()
    name = f"{ENV}__train_qalign_dt__1"
    resume = torch.load(runs / name / "resume.pt", weights_only=True)
    (moved / name).mkdir()
    torch.save(resume | {"step": 20}, moved / name / "resume.pt")
    monkeypatch.setattr(stage2, "pretrain", None)  # would raise if it were called
    code, out, err = run_main(stage2, *argv(hopper_file, moved, *TINY2))
    assert code == 0 and "continuing at step 20" in out, err
    policy = torch.load(moved / name / "policy.pt", weights_only=True)
    assert policy["finished"] and policy["config"] == resume["config"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a child's life to its parent's")
def test_stage_2_killed_while_stage_1_runs_can_be_started_again(tmp_path, hopper_file):
    command = [
        sys.executable,
        str(ROOT / "train_qalign_dt.py"),
        *map(str, argv(hopper_file, tmp_path, *TINY2, "--critic-steps", 100_000)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / f"{ENV}__pretrain_q__1"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (folder / "metrics.csv").exists():
        time.sleep(0.01)
    time.sleep(0.5)  # it is in its loop by now
    process.kill()
    process.wait()
    while time.monotonic() < deadline and not (folder / "resume.pt").exists():
        time.sleep(0.01)
    time.sleep(0.5)  # the child has saved and is on its way out
    assert torch.load(folder / "resume.pt", weights_only=True)["step"] > 0
    stage1.claim(folder).release()  # nobody holds it any more


def test_three_steps_of_main_are_algorithm_1(pipeline, run_main, hopper_file, monkeypatch):
    """Weights after three steps, against a loop written out from method and equations: order, targets, clipping, schedules."""
    runs, _, _ = pipeline
    monkeypatch.setattr(stage2, "MAX_GRAD_NORM", 0.05)  # low enough to act in every step
    critic = ["--gamma", 0.9, "--exp-name", "gamma_0.9"]  # stage 2 takes the discount over with the critic
    assert run_main(stage1, *argv(hopper_file, runs, *TINY1, *critic))[0] == 0
    critic_file = runs / f"{ENV}__gamma_0.9__1" / "critic.pt"
    steps = ["--total-steps", 3, "--eval-every", 0, "--tau", 0.1, "--exp-name", "three", "--critic", critic_file]
    assert run_main(stage2, *argv(hopper_file, runs, *TINY2, *steps))[0] == 0
    got = torch.load(runs / f"{ENV}__three__1" / "resume.pt", weights_only=True)
    cfg, task = got["config"], stage2.parse_env(ENV)
    data = stage2.read_dataset(task, (str(hopper_file),))

    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    windows = stage2.Windows(data, task, 4, torch.device("cpu"))
    policy, critic = stage2.make_policy(task, cfg, False), stage2.DoubleQ(11, 3, 16)
    critic.load_state_dict(torch.load(critic_file, weights_only=True)["critic"])
    target_policy, target_critic = stage2.make_policy(task, cfg, False).eval(), stage2.DoubleQ(11, 3, 16)
    target_policy.load_state_dict(policy.state_dict())
    target_critic.load_state_dict(critic.state_dict())
    torch.manual_seed(1)  # main draws dropout after one policy and one critic were made
    stage2.make_policy(task, cfg, False), stage2.DoubleQ(11, 3, 16)
    for step in range(3):
        lr = 3e-4 * 0.5 * (1 + np.cos(np.pi * step / 3))
        if step == 0:
            critic_opt = torch.optim.Adam(critic.parameters(), lr=lr)
            actor_opt = torch.optim.Adam(policy.parameters(), lr=lr, weight_decay=1e-4)
        for opt in (critic_opt, actor_opt):
            opt.param_groups[0]["lr"] = lr
        batch = windows.sample(8, generator)
        rest = (batch.obs, batch.act, batch.timestep, batch.valid)
        with torch.no_grad():  # Eq. 7
            raised, _ = stage2.shift_rtg(batch.rtg, batch.valid, torch.full((8, 1), 1.0), cfg["rtg_range"])
            q_next = target_critic(batch.obs, target_policy(raised, *rest)[0]).amin(0)
            y, mask = stage2.critic_target(batch, q_next, 0.9)
        critic_opt.zero_grad()
        sum(((q - y)[mask] ** 2).mean() for q in critic(batch.obs, batch.act)).backward()
        assert torch.nn.utils.clip_grad_norm_(critic.parameters(), 0.05) > 0.05
        critic_opt.step()
        delta = 10.0 * torch.randn(8, 1, generator=generator)  # Eq. 5, 6, against the critic just updated
        perturbed, applied = stage2.shift_rtg(batch.rtg, batch.valid, delta, cfg["rtg_range"])
        a, s = policy(torch.cat([batch.rtg, perturbed]), *(torch.cat([x, x]) for x in rest))
        q, q_delta = critic(batch.obs, a[:8]).detach(), critic(batch.obs, a[8:])
        align = (-applied.sign() * (q_delta - q)).relu().amin(0)[batch.valid].mean()
        supervised = ((a[:8] - batch.act)[batch.valid] ** 2).mean() + ((s[:8] - batch.obs)[batch.valid] ** 2).mean()
        actor_opt.zero_grad()
        (supervised + 0.3 * align).backward()
        assert torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.05) > 0.05
        actor_opt.step()
        for target, online in ((target_policy, policy), (target_critic, critic)):
            for p, o in zip(target.parameters(), online.parameters()):
                p.data = 0.9 * p.data + 0.1 * o.data
    for name, module in dict(
        policy=policy, critic=critic, target_policy=target_policy, target_critic=target_critic
    ).items():
        for key, value in module.state_dict().items():
            torch.testing.assert_close(got[name][key], value, rtol=1e-4, atol=2e-6, msg=lambda m: f"{name} {key}: {m}")


# ---- bad input: one line on stderr, exit code 2, nothing made ----


def bad_file(tmp_path, arrays, kind):
    path = tmp_path / f"{kind}.hdf5"
    observations, actions, rewards, terminals, timeouts = (x.copy() for x in arrays)
    if kind == "missing":
        return path
    if kind == "not-hdf5":
        path.write_text("hello")
        return path
    if kind == "nan":
        observations[17, 3] = np.nan
    if kind == "inf-reward":
        rewards[5] = np.inf
    if kind == "too-large":
        rewards = rewards.astype(np.float64)
        rewards[5] = 1e300
    if kind == "nan-flag":
        timeouts = np.where(np.arange(len(timeouts)) == 5, np.nan, timeouts)
    if kind == "complex":
        rewards = rewards.astype(complex)
    if kind == "text":
        actions = np.array([b"left"] * len(actions))
    if kind == "one-number":
        observations = np.float32(3)
    if kind == "three-dimensional":
        observations = observations[:, :, None, None]
    if kind == "wrong-body":
        observations = observations[:, :10]
    if kind == "disagree":
        actions = actions[:-1]
    if kind == "no-episode":
        terminals, timeouts = terminals & False, timeouts & False
    write_hdf5(path, observations, actions, rewards, terminals, timeouts)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
    if kind in ("no-key", "group"):
        import h5py

        with h5py.File(path, "a") as f:
            del f["timeouts"]
            if kind == "group":
                f.create_group("timeouts")
    return path


@pytest.mark.parametrize("stage", [stage1, stage2], ids=["pretrain_q", "train_qalign_dt"])
@pytest.mark.parametrize("kind, says", [
    ("too-large", "rewards has a NaN or infinite"), ("nan-flag", "timeouts has a NaN or infinite"),
    ("complex", "rewards is not an array of numbers"), ("text", "actions is not an array of numbers"),
    ("one-number", "observations is not an array of numbers"), ("three-dimensional", "observations has shape"),
    ("group", "no array 'timeouts'"), ("missing", "no such dataset file"), ("not-hdf5", "not an HDF5 file"), ("truncated", "truncated"), ("no-key", "'timeouts'"),
    ("nan", "observations has a NaN or infinite value, first in row 17"), ("inf-reward", "rewards has a NaN or infinite"),
    ("wrong-body", "observations has shape"), ("disagree", "actions has shape"), ("no-episode", "no complete episode"),
])  # fmt: skip
def test_bad_data(stage, kind, says, tmp_path, run_main, hopper_arrays):
    path = bad_file(tmp_path, hopper_arrays, kind)
    code, out, err = run_main(stage, *argv(path, tmp_path / "runs", "--device", "cpu"))
    assert (
        code == 2
        and says in err
        and path.name in err
        and err.count("\n") == 1
        and out == ""
        and not (tmp_path / "runs").exists()
    )


class RunsCode:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def bad_checkpoint(tmp_path, kind, pipeline):
    runs, _, _ = pipeline
    path = tmp_path / "policy.pt"
    good = runs / f"{ENV}__train_qalign_dt__1" / "policy.pt"
    if kind == "stage":
        return runs / f"{ENV}__pretrain_q__1" / "critic.pt"
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:3000])
    if kind == "pickle":
        torch.save({"stage": "train_qalign_dt", "format": 1, "x": RunsCode(str(tmp_path / "it-ran"))}, path)
    if kind in ("format", "shapes"):
        content = torch.load(good, weights_only=True)
        content |= {"format": 99} if kind == "format" else {"config": content["config"] | {"embed_dim": 32}}
        torch.save(content, path)
    return path


@pytest.mark.parametrize("kind, says", [("missing", "no such checkpoint"), ("stage", "not of train_qalign_dt"), ("truncated", "not a readable checkpoint"),
                                        ("pickle", "not a readable checkpoint"), ("format", "format 99"), ("shapes", "shapes")])  # fmt: skip
def test_bad_checkpoint_in_stage_3(kind, says, tmp_path, run_main, pipeline):
    path = bad_checkpoint(tmp_path, kind, pipeline)
    before = tree(tmp_path)
    code, out, err = run_main(stage3, "--checkpoint", path, "--device", "cpu")
    assert (
        code == 2
        and says in err
        and str(path) in err
        and err.count("\n") == 1
        and out == ""
        and tree(tmp_path) == before
    )


def test_other_bad_input(tmp_path, run_main, pipeline, hopper_file, antmaze_file):
    runs, _, _ = pipeline
    policy, critic = runs / f"{ENV}__train_qalign_dt__1" / "policy.pt", runs / f"{ENV}__pretrain_q__1" / "critic.pt"
    good, new = argv(hopper_file, tmp_path / "runs"), [*TINY2, "--exp-name", "new"]
    cases = [
        (stage1, ["--env", "hopper-medum-v2"], "hopper-medium-v2"),
        (stage2, ["--env", "hopper-mixed-zoo"], "--dataset-path"),
        (stage2, ["--env", "hopper-mini", "--lambda-e", -1], "--lambda-e"),
        (stage2, [*good, "--embed-dim", 30], "--n-head"),
        (stage2, [*good, "--rtg-range", 4, -1], "--rtg-range"),
        (stage2, [*good, "--batch-size", 0], "--batch-size"),
        (stage1, [*good, "--total-steps", 0], "--total-steps"),
        *(
            (stage, [*(good if stage is not stage3 else ["--checkpoint", policy]), "--seed", seed], "--seed")
            for stage in (stage1, stage2, stage3)
            for seed in (-1, 2**70)
        ),
        (stage1, [*good, "--total-steps", 10, "--warm-start-steps", 11], "--warm-start-steps"),
        (stage2, [*good, *new, "--critic", tmp_path / "none.pt"], "no such checkpoint"),
        (stage2, [*good, *new, "--critic", policy], "not of pretrain_q"),
        (stage2, [*good, *new, "--critic", critic, "--critic-width", 17], "--critic-width 17"),
        (stage2, [*argv(hopper_file, runs), *new, "--critic-steps", 31], "--critic-steps"),
        (stage3, ["--env", "walker2d-medium-tiny", "--checkpoint", policy], "not walker2d-medium-tiny"),
        (stage3, ["--env", ENV, "--runs-dir", tmp_path / "runs"], "no such checkpoint"),
        (stage3, ["--checkpoint", policy, "--rollouts", 0], "--rollouts"),
        (stage3, ["--checkpoint", policy, "--compare", critic], "not of train_qalign_dt"),
        (stage3, ["--checkpoint", policy, "--dataset-path", antmaze_file], "shape"),
    ]
    if not torch.cuda.is_available():
        cases += [(stage, ["--env", ENV, "--device", "cuda"], "no CUDA device") for stage in (stage1, stage2, stage3)]
    before = tree(runs)
    for stage, arguments, says in cases:
        code, out, err = run_main(stage, *arguments)
        assert (code, out) == (2, "") and says in err and err.count("\n") == 1, (stage.__name__, arguments, out, err)
        assert not (tmp_path / "runs").exists() and tree(runs) == before


def test_a_child_s_error_is_its_own_and_a_missing_child_names_the_flag(tmp_path, run_main, hopper_file):
    """Stage 1's folder is taken: its one line is all of stderr, its exit code ours. Without pretrain_q.py, --critic is named."""
    lock = stage2.claim(tmp_path / f"{ENV}__pretrain_q__1")
    command = [sys.executable, str(ROOT / "train_qalign_dt.py"), *map(str, argv(hopper_file, tmp_path, *TINY2))]
    result = subprocess.run(command, capture_output=True, text=True)
    lock.release()
    assert result.returncode == 2 and "another process" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / f"{ENV}__train_qalign_dt__1").exists()

    (tmp_path / "alone").mkdir()
    alone = tmp_path / "alone" / "train_qalign_dt.py"
    alone.write_bytes((ROOT / "train_qalign_dt.py").read_bytes())
    command = [sys.executable, str(alone), *map(str, argv(hopper_file, tmp_path / "alone/runs", *TINY2))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "--critic" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "alone" / "runs").exists()


@pytest.mark.parametrize(
    "stage", ["collect_dataset", "pretrain_q", "train_qalign_dt", "evaluate_alignment", "transfer_cheetah_vel"]
)
def test_help_has_a_text_for_every_flag(stage):
    out = subprocess.run(
        [sys.executable, str(ROOT / f"{stage}.py"), "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    ).stdout
    import dataclasses

    module = sys.modules[stage]
    for field in dataclasses.fields(module.Args):
        assert f"--{field.name.replace('_', '-')}" in out
    assert out.count("(default:") >= len(dataclasses.fields(module.Args)) - 1
