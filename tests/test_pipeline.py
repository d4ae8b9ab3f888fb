"""The command line: three stages end to end, Algorithm 1, the paper's defaults, kill and resume."""

import contextlib
import csv
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import prepare
import pytest
import torch
import train_radt
from conftest import ENV, FORK, ROOT, TINY1, TINY2, Forked, argv, data_of, load, task_of, tree, write_hdf5

import evaluate_alignment as stage3
import pretrain_q as stage1
import train_qalign_dt as stage2

CPU = torch.device("cpu")
FOLDER1 = f"{ENV}__pretrain_q__1"
FOLDER2 = f"{ENV}__train_qalign_dt__1"


def read_csv(path: Path) -> list[dict]:
    with open(path) as f:
        return list(csv.DictReader(f))


def step_of(resume: Path) -> int:
    return load(resume)["progress"]["step"]


def last_line(text: str) -> str:
    return text.splitlines()[-1] if text else ""


def error_line(err: str) -> str:
    """The one line of error, with nothing before it on its line; a progress bar may stand above and below."""
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert err.count("error") == 1 and "Traceback" not in err
    return line


# ---- the three stages ----


def test_three_stages_write_what_the_readme_lists(pipeline):
    names = {f"{ENV}__{name}__1" for name in ("pretrain_q", "train_qalign_dt", "dt")}
    assert set(os.listdir(pipeline.runs)) == names | {f"{ENV}__data"}
    assert set(os.listdir(pipeline.runs / f"{ENV}__data")) - {".lock"} == {"dataset.pt"}
    alignment = {"alignment.json", "alignment.csv", "alignment.png"}
    files = {"policy.pt", "resume.pt", "metrics.csv", "evaluations.csv", "tensorboard"} | alignment
    assert set(os.listdir(pipeline.folder)) - {".lock"} == files
    critic_files = {"critic.pt", "resume.pt", "report.json", "metrics.csv", "tensorboard"}
    assert set(os.listdir(pipeline.critic.parent)) - {".lock"} == critic_files
    *_, row = read_csv(pipeline.folder / "metrics.csv")
    assert row["step"] == "30" and all(np.isfinite(float(x)) for x in row.values()) and float(row["q_loss"]) > 0
    assert [row["step"] for row in read_csv(pipeline.folder / "evaluations.csv")] == ["0", "15", "30"]
    for stage, (_, out, err) in pipeline.outputs.items():
        assert "hopper_tiny.hdf5" in out and "(D4RL)" not in out, stage
        assert not [x for x in ("out of date", "settotalmass", "Traceback", "Warning", "error") if x in err], stage
    assert str(pipeline.folder / "alignment") in last_line(pipeline.outputs["stage 3"][1])
    assert (pipeline.folder / "alignment.png").read_bytes().startswith(b"\x89PNG")


def test_alignment_json_is_what_the_sweep_did(pipeline):
    result, policy = json.loads((pipeline.folder / "alignment.json").read_text()), load(pipeline.policy)
    returns = policy["episode_returns"].numpy()
    targets = [row["target_return"] for row in result["sweep"]]
    assert targets == pytest.approx(np.linspace(returns.min(), returns.max(), 12).tolist())  # steps of 100 gave fewer

    def score(x):  # D4RL's, of Hopper
        return 100 * (x + 20.272305) / (3234.3 + 20.272305)

    for row in result["sweep"] + result["high_targets"]:
        assert row["score_mean"] == pytest.approx(score(row["return_mean"])) and row["length_mean"] >= 1
        assert row["target_score"] == pytest.approx(score(row["target_return"]))
    errors = [row["score_mean"] - row["target_score"] for row in result["sweep"]]
    assert result["alignment_rmse"] == pytest.approx(np.sqrt(np.mean(np.square(errors))))  # Eq. 8
    assert result["best_score"] == max(row["score_mean"] for row in result["sweep"])
    high = [row["target_return"] for row in result["high_targets"]]
    assert high == pytest.approx([float(returns.max()) * x for x in (1.0, 1.2)])
    trained_on = {name: policy["task"][name] for name in ("label", "is_d4rl", "digest")}
    assert result["trained_on"] == trained_on and "hopper_tiny.hdf5" in trained_on["label"]
    assert -1 <= result["spearman_q_vs_return"] <= 1 and result["rollouts"] == 2 and result["env"] == ENV
    assert (result["method"], result["seed"], result["step"]) == ("Q-Align DT", 1, 30)
    rows = read_csv(pipeline.folder / "alignment.csv")
    assert [float(row["target_return"]) for row in rows] == pytest.approx(targets + high)


def test_q_is_ranked_against_plain_and_discounted_returns_of_the_sweep(pipeline, monkeypatch):
    trained = stage3.load_policy(pipeline.policy, "fp32", CPU)
    trained.content["gamma"] = 0.5
    seen, real = [], stage3.rollout
    monkeypatch.setattr(stage3, "rollout", lambda *args, **kwargs: seen.append(real(*args, **kwargs)) or seen[0])
    record, _ = stage3.sweep(trained, np.array([10.0, 50.0, 90.0]), 4, seed=1)
    rollouts, critic = seen[0], stage3.load_critic(trained)
    q = critic(rollouts.first_obs, rollouts.first_act).amin(0).detach().numpy()[:12]  # not the high targets'
    pairs = zip(rollouts.rewards, rollouts.lengths)
    discounted = [sum(0.5**t * r for t, r in enumerate(rewards[:n])) for rewards, n in pairs]

    def ranks(x):  # no two of them are equal
        return np.argsort(np.argsort(x))

    for key, values in (("return", rollouts.returns[:12]), ("discounted_return", discounted[:12])):
        assert record[f"spearman_q_vs_{key}"] == pytest.approx(np.corrcoef(ranks(q), ranks(values))[0, 1])
    for j, row in enumerate(record["sweep"]):
        means = [np.mean(x[4 * j : 4 * j + 4]) for x in (q, discounted)]
        assert [row["q_mean"], row["discounted_return_mean"]] == pytest.approx(means, rel=1e-5)


def test_q_stands_beside_the_return_of_the_rewards_that_the_critic_saw(pipeline):
    """AntMaze's are shifted, VDT's are scaled; what comes after the end of a rollout counts nothing."""
    trained = stage3.load_policy(pipeline.policy, "fp32", CPU)
    result = stage3.rollout(trained, [50.0], [1], 3, "test")._replace(rewards=np.array([[1.0, 2.0, np.nan]]))
    trained.content.update(gamma=0.5, config=trained.content["config"] | {"reward_scale": 10.0})
    shifted = trained._replace(task=replace(trained.task, reward_shift=-1.0))
    assert stage3.q_and_outcome(trained, result)[1].tolist() == [20.0]
    assert stage3.q_and_outcome(shifted, result)[1].tolist() == [5.0]


def test_targets_go_in_steps_from_the_lowest_to_the_highest_return(capsys):
    task = task_of(ENV)
    targets = stage3.target_returns(task, np.array([315.87, 1000.0, 3222.36]), 100.0)
    assert len(targets) == 30 and targets[0] == 315.87 and targets[-1] == pytest.approx(3215.87)  # D.6, hopper-medium
    assert stage3.target_returns(task, np.array([0.0, 500.0]), 100.0).tolist() == np.linspace(0, 500, 12).tolist()
    with pytest.raises(SystemExit):  # such as rewards of millions: not a hundred thousand rollouts, nor all memory
        stage3.target_returns(task, np.array([0.0, 2e8]), 100.0)
    assert "makes 2,000,000 target returns, more than 500; 4e+06 makes 50" in error_line(capsys.readouterr().err)
    few = stage3.target_returns(task_of(ENV), np.array([0.0, 5.0]), stage3.Args(target_step=0.25).target_step)
    assert few.tolist() == [0.25 * i for i in range(21)]
    named = replace(task, sweep=(0.0, 20.0))  # a maze names its own
    assert stage3.target_returns(named, np.array([0.0, 500.0]), 100.0).tolist() == [0, 20]


def test_a_sweep_has_30_rollouts_a_target_and_the_seeds_of_its_flag(pipeline, run_main, monkeypatch):
    asked = []

    def sweep(trained, targets, rollouts, seed, *rest):
        asked.append((rollouts, seed))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage3, "sweep", sweep)
        for flags in ((), ("--seed", 5), ("--high-targets",)):
            run_main(stage3, "--checkpoint", pipeline.policy, "--device", "cpu", *flags)
    assert asked == [(30, 1), (30, 5), (50, 1)]
    trained, seen, real = stage3.load_policy(pipeline.policy, "fp32", CPU), [], stage3.rollout
    monkeypatch.setattr(stage3, "rollout", lambda t, x, seeds, *more: seen.append([*seeds]) or real(t, x, seeds, *more))
    for seed in (1, 1, 2):
        stage3.mean_per_target(trained, [1.0, 2.0], 2, seed)
    assert seen[0] == seen[1] and len({*seen[0], *seen[2]}) == 8


def test_compare_writes_both_into_the_files_of_the_first(pipeline, run_main, tmp_path):
    own, dt = tmp_path / "policy.pt", pipeline.dt
    shutil.copy(pipeline.policy, own)
    code, out, err = run_main(stage3, "--checkpoint", own, "--compare", dt, "--rollouts", 1, "--device", "cpu")
    assert code == 0, err
    assert set(os.listdir(tmp_path)) == {"policy.pt", *(f"alignment.{x}" for x in ("json", "csv", "png"))}
    result = json.loads((tmp_path / "alignment.json").read_text())
    (other,) = result["compare"]
    assert other["checkpoint"] == str(dt) and other["lambda_e"] == 0 and other["method"] == "DT"
    assert "spearman_q_vs_return" in result and other.get("spearman_q_vs_return") is None
    assert [row["q_mean"] is None for row in (result["sweep"][0], other["sweep"][0])] == [False, True]
    assert [r["target_return"] for r in other["sweep"]] == [r["target_return"] for r in result["sweep"]]
    label = "Q-Align DT, seed 1, max_push 0.3, action_noise 0.3, average 0.002"
    assert stage3.label_of(result) == label and stage3.label_of(other) == "DT, seed 1, average 0.002"
    ablation = result | dict(alignment="squared", update_q=False, q_noise=5.0, max_push=0)
    label = "Q-Align DT, seed 1, action_noise 0.3, average 0.002, q_noise 5, squared, fixed critic"
    assert stage3.label_of(ablation) == label
    rows = read_csv(tmp_path / "alignment.csv")
    assert [row["checkpoint"] for row in rows] == [str(own)] * 14 + [str(dt)] * 14  # 12 targets, 2 high ones
    assert "note:" not in out
    torch.save(load(own) | {"step": 12}, own)
    code, out, err = run_main(stage3, "--checkpoint", own, "--high-targets", "--rollouts", 1, "--device", "cpu")
    assert code == 0 and f"note: {own} is at step 12 of 30\n" in out, err


def test_context_is_what_the_policies_act_on(pipeline, run_main, tmp_path, monkeypatch):
    """By the actions, to rounding: two cuts of a window may differ in it, and no rollout forgets such a difference."""
    own, seen, real = tmp_path / "policy.pt", [], stage3.Policy.act
    content = load(pipeline.policy)
    K, content["config"]["eval_context_len"] = content["config"]["context_len"], 0
    for name, weight in content["policy"].items():  # a policy that reacts to its context
        weight.copy_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    torch.save(content, own)

    def listen(self, *x):
        action = real(self, *x)
        if x[1].any():  # not the zeros of load_policy
            seen.append((self, x, action))
        return action

    def ask(*flags, file="high_targets"):
        """What the file says; how long the windows were; and of the last n steps alone, the largest other action."""
        seen.clear()
        flags += ("--high-targets",) * file.startswith("high_targets")
        code, _, err = run_main(stage3, "--checkpoint", own, "--rollouts", 1, "--device", "cpu", *flags)
        assert code == 0, err
        lengths = {y.shape[1] for _, x, _ in seen for y in x}
        errors = {}
        for n in (2, K):
            with torch.no_grad():
                alone = [policy(*(y[:, -n:] for y in x))[0][:, -1] for policy, x, _ in seen]
            errors[n] = max(float((y - action).abs().max()) for y, (_, _, action) in zip(alone, seen))
        return json.loads((tmp_path / f"{file}.json").read_text())["context"], lengths, errors

    monkeypatch.setattr(stage3.Policy, "act", listen)
    for flags, file in (((), "high_targets"), (("--context", K), f"high_targets_context_{K}")):
        context, lengths, errors = ask(*flags, file=file)
        assert (context, lengths) == (K if flags else None, {K}) and errors[K] < 1e-5 and errors[2] > 1e-2
    context, lengths, _ = ask("--context", 2, "--compare", pipeline.dt, file="alignment_context_2")
    assert (context, lengths) == (2, {2}) and K > 2 and all(x[4][:, -1].all() for _, x, _ in seen)
    content["config"]["eval_context_len"] = 2  # what stage 2 said holds, unless --context does
    torch.save(content, own)
    context, lengths, errors = ask()
    assert (context, lengths) == (None, {K}) and errors[2] < 1e-5 and errors[K] > 1e-2
    assert json.loads((tmp_path / "high_targets.json").read_text())["eval_context_len"] == 2
    context, _, errors = ask("--context", K, file=f"high_targets_context_{K}")
    assert context == K and errors[K] < 1e-5 and errors[2] > 1e-2
    code, _, err = run_main(stage3, "--checkpoint", own, "--context", K + 1)
    assert code == 2 and f"trained on windows of K = {K}" in error_line(err)
    code, _, err = run_main(stage3, "--checkpoint", own, "--context", 2, "--high-targets", "--inference", "best")
    assert code == 2 and "no --video, --export, --context" in " ".join(err.replace("│", " ").split())


def test_a_dt_starts_without_stage_1(tmp_path, run_main, hopper_file, monkeypatch):
    monkeypatch.setattr(stage2, "pretrained", None)  # would raise if it were called
    code, out, err = run_main(stage2, *argv(hopper_file, tmp_path, *TINY2, "--lambda-e", 0, "--total-steps", 2))
    assert code == 0 and set(os.listdir(tmp_path)) == {f"{ENV}__data", f"{ENV}__train_qalign_dt__1"}, err
    assert "critic" not in out and "-inf" not in out  # neither a critic nor, without evaluations, a best score


def test_a_fixed_critic_does_not_move(pipeline, run_main, hopper_file, tmp_path):
    flags = ["--no-update-q", "--critic", pipeline.critic, "--total-steps", 5]
    code, _, err = run_main(stage2, *argv(hopper_file, tmp_path, *TINY2, *flags))
    assert code == 0, err
    critic = load(pipeline.critic)["critic"]
    for path, moved in ((tmp_path / f"{ENV}__train_qalign_dt__1" / "policy.pt", False), (pipeline.policy, True)):
        policy = load(path)
        assert any(not torch.equal(value, policy["critic"][key]) for key, value in critic.items()) == moved


def test_another_critic_is_another_run(pipeline, run_main, hopper_file, tmp_path):
    """By its content, not by its name; by default it is the one of the env and the seed."""
    same, other = shutil.copy(pipeline.critic, tmp_path / "same.pt"), tmp_path / "other.pt"
    content = load(pipeline.critic)
    torch.save(content | {"critic": {name: x + 1 for name, x in content["critic"].items()}}, other)

    def go(critic):
        flags = [*TINY2, "--total-steps", 2, *(["--critic", critic] if critic else [])]
        return run_main(stage2, *argv(hopper_file, tmp_path / "runs", *flags))

    assert go(pipeline.critic)[0] == 0
    assert "is finished" in go(same)[1]
    (tmp_path / "link").symlink_to(tmp_path)
    stage_1 = tmp_path / "runs" / FOLDER1 / "critic.pt"
    stage_1.parent.mkdir()
    shutil.copy(other, stage_1)
    before = tree(tmp_path / "runs")
    for critic in (other, None, stage_1):
        code, _, err = go(critic)
        assert code == 2 and "policy.pt is of another run (critic " in error_line(err), critic
    assert tree(tmp_path / "runs") == before
    shutil.rmtree(tmp_path / "runs" / FOLDER2)
    assert go(None)[0] == 0 and "is finished" in go(stage_1)[1]  # the default, by its name
    assert "is finished" in go(tmp_path / "link" / stage_1.relative_to(tmp_path))[1]


def test_what_was_finished_on_another_device_is_finished(pipeline, run_main, hopper_file, tmp_path):
    """It is what a run goes on with that belongs to a device."""
    runs = shutil.copytree(pipeline.runs, tmp_path / "runs")
    flags2 = [*TINY2, "--eval-every", 15]
    for stage, name, flags in ((stage1, f"{FOLDER1}/critic.pt", TINY1), (stage2, f"{FOLDER2}/policy.pt", flags2)):
        content = load(runs / name)
        torch.save(content | {"config": content["config"] | {"device": "cuda"}}, runs / name)
        code, out, err = run_main(stage, *argv(hopper_file, runs, *flags))
        assert code == 0 and "nothing to do" in out, err
    (runs / FOLDER2 / "policy.pt").unlink()
    resume = load(runs / FOLDER2 / "resume.pt")
    torch.save(resume | {"config": resume["config"] | {"device": "cuda"}}, runs / FOLDER2 / "resume.pt")
    code, _, err = run_main(stage2, *argv(hopper_file, runs, *flags2))
    assert code == 2 and "device cuda there, cpu here" in error_line(err)


@pytest.mark.parametrize("stage", [stage2, train_radt], ids=["train_qalign_dt", "train_radt"])
def test_what_another_process_finished_before_the_lock_is_finished(stage, run_main, hopper_file, tmp_path, monkeypatch):
    flags = argv(hopper_file, tmp_path / "runs", "--preset", "small", "--total-steps", 2, "--device", "cpu")
    flags += ["--lambda-e", "0"] if stage is stage2 else []
    assert run_main(stage, *flags)[0] == 0
    folder = next((tmp_path / "runs").rglob("policy.pt")).parent
    before, away = tree(folder), folder.rename(tmp_path / "away")

    def late(path, claim=stage.claim):
        away.rename(path)
        return claim(path)

    monkeypatch.setattr(stage, "claim", late)
    code, out, err = run_main(stage, *flags)
    assert code == 0 and out.endswith("is finished; nothing to do (another run: --exp-name)\n"), err
    assert tree(folder) == before


def test_an_untrained_policy_can_be_saved(tmp_path, run_main, hopper_file):
    flags = ["--total-steps", 0, "--lambda-e", 0]
    assert run_main(stage2, *argv(hopper_file, tmp_path, *TINY2, *flags))[0] == 0
    assert load(tmp_path / f"{ENV}__train_qalign_dt__1" / "policy.pt")["step"] == 0


def test_stage_2_trains_a_missing_critic_first(tmp_path, run_main, hopper_file, monkeypatch):
    """With the env, seed, data, folder, device, preset and width of its own flags; then it uses the critic's gamma."""
    outcome = {}

    def in_this_process(command, **options):
        assert Path(command[1]) == ROOT / "pretrain_q.py" and not options.get("check")
        outcome["stage 1"] = run_main(stage1, *command[2:], "--total-steps", 5, "--gamma", 0.9)
        return subprocess.CompletedProcess(command, outcome["stage 1"][0])

    monkeypatch.setattr(stage2.subprocess, "run", in_this_process)
    flags = ["--seed", 3, "--total-steps", 2, "--preset", "small"]
    code, out, err = run_main(stage2, *argv(hopper_file, tmp_path, *TINY2, *flags))
    assert code == 0 and "starting pretrain_q.py" in out, (err, outcome)
    critic = load(tmp_path / f"{ENV}__pretrain_q__3" / "critic.pt")["config"]
    assert [critic[name] for name in ("seed", "critic_width", "device", "lr")] == [3, 16, "cpu", 3e-4]  # small: 3e-4
    assert load(tmp_path / f"{ENV}__train_qalign_dt__3" / "policy.pt")["gamma"] == critic["gamma"] == 0.9


def test_a_failing_stage_1_speaks_for_itself(tmp_path, run_main, hopper_file, monkeypatch):
    """Its exit code becomes stage 2's, which adds nothing and has made nothing but the data."""
    runs = tmp_path / "runs"
    for theirs, ours in ((2, 2), (1, 1), (130, 130), (-9, 137)):
        answer = subprocess.CompletedProcess([], theirs)
        monkeypatch.setattr(stage2.subprocess, "run", lambda command, answer=answer: answer)
        code, _, err = run_main(stage2, *argv(hopper_file, runs, *TINY2))
        assert (code, err) == (ours, "") and os.listdir(runs) == [f"{ENV}__data"]
    monkeypatch.setattr(stage2, "__file__", str(tmp_path / "train_qalign_dt.py"))
    code, out, err = run_main(stage2, *argv(hopper_file, runs, *TINY2))
    assert code == 2 and "critic.pt" in err and err.count("\n") == 1 and os.listdir(runs) == [f"{ENV}__data"]


@pytest.mark.slow
def test_quickstart_from_another_folder(tmp_path):
    """Real processes, stage 1 started by stage 2, data/hopper-mini.hdf5 found beside the scripts."""
    sizes = [*TINY2, "--total-steps", "200", "--eval-every", "100", "--runs-dir", "here"]
    for stage, flags in (
        ("train_qalign_dt.py", sizes),
        ("evaluate_alignment.py", ["--runs-dir", "here", "--rollouts", "2"]),
    ):
        command = [sys.executable, ROOT / stage, *flags]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert not [x for x in ("out of date", "settotalmass", "Traceback", "Warning") if x in result.stderr]
    assert os.listdir(tmp_path) == ["here"]  # and no MUJOCO_LOG.TXT
    assert (tmp_path / "here" / "hopper-mini__train_qalign_dt__1" / "alignment.png").is_file()


# ---- Algorithm 1 ----


@pytest.mark.parametrize("average", (0, 0.4))
def test_three_steps_of_main_are_algorithm_1(average, run_main, hopper_file, tmp_path, monkeypatch):
    """Weights after three steps, against a loop written out from the equations: order, targets, clipping, schedules."""
    assert stage2.descend.__defaults__ == (stage2.MAX_GRAD_NORM,) == (15.0,)
    monkeypatch.setattr(stage2.descend, "__defaults__", (0.05,))  # low enough to act in every step
    monkeypatch.setattr(stage2, "TAU", 0.1)
    assert run_main(stage1, *argv(hopper_file, tmp_path, *TINY1, "--gamma", 0.9))[0] == 0  # stage 2 takes it over
    papers = ["--sigma-e", 10, "--lambda-e", 0.3, "--delta-rtg", 1, "--max-push", 0, "--batch-size", B := 32]
    papers += ["--action-noise", 0, "--dropout", 0.1, "--average", average, "--eval-every", 3]
    evaluated = []
    evaluate = lambda policy, *_: evaluated.append(policy.embed_obs.weight.clone()) or [0.0, 0.0]  # noqa: E731
    monkeypatch.setattr(stage2, "evaluate", evaluate)
    assert run_main(stage2, *argv(hopper_file, tmp_path, *TINY2, "--total-steps", 3, *papers))[0] == 0
    got = load(tmp_path / f"{ENV}__train_qalign_dt__1" / "resume.pt")
    config, data = got["config"], data_of(ENV, hopper_file)
    assert got["progress"]["gamma"] == 0.9 and [config[k] for k in ("sigma_e", "lambda_e", "delta_rtg")] == [10, 0.3, 1]

    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    windows = stage2.Windows(data, 4, CPU)
    policy, critic = stage2.make_policy(data.task, config, False), stage2.Ensemble(2, 11 + 3, 16)
    dropout = torch.get_rng_state()  # the masks of the three steps come next
    stage_1 = load(tmp_path / f"{ENV}__pretrain_q__1" / "critic.pt")
    critic.load_state_dict(stage_1["critic"])
    q_scale = stage_1["report"]["q_abs_mean"]
    target_policy = stage2.make_policy(data.task, config, False).eval()
    target_critic = stage2.Ensemble(2, 11 + 3, 16)
    target_policy.load_state_dict(policy.state_dict())
    target_critic.load_state_dict(critic.state_dict())
    torch.set_rng_state(dropout)

    def shift(batch, delta):  # Eq. 2, all valid tokens by one scalar, which keeps the first one in the data's range
        moved, applied = batch.rtg.clone(), []
        for row, valid, d in zip(moved, batch.valid, delta.flatten().tolist()):
            first = row[valid][0].item()
            applied.append(min(max(first + d, config["rtg_range"][0]), config["rtg_range"][1]) - first)
            row[valid] += applied[-1]
        return moved, torch.tensor(applied)[:, None]

    average_policy = {}
    for step in range(3):
        decay = 0.5 * (1 + np.cos(np.pi * step / 3))
        if step == 0:
            critic_opt = torch.optim.Adam(critic.parameters(), lr=3e-4)
            actor_opt = torch.optim.Adam(policy.parameters(), lr=3e-4, weight_decay=1e-4)
        critic_opt.param_groups[0]["lr"] = 3e-4 * decay
        actor_opt.param_groups[0]["lr"] = 3e-4 * (1 if average else decay)
        batch = windows.sample(B, generator)
        rest = (batch.obs, batch.act, batch.timestep, batch.valid)
        with torch.no_grad():  # Eq. 7; a window's last step has no successor, and counts where the MDP ended
            raised, _ = shift(batch, torch.full((B, 1), 1.0))
            q_next = target_critic(batch.obs, target_policy(raised, *rest)[0]).amin(0)
            y = batch.reward.clone()
            y[:, :-1] += 0.9 * torch.where(batch.terminal, 0, 1)[:, :-1] * q_next[:, 1:]
            mask = batch.valid.clone()
            mask[:, -1] &= batch.terminal[:, -1]
        assert 0 < batch.terminal.sum() and not batch.valid.all()
        critic_opt.zero_grad()
        sum(((q - y)[mask] ** 2).mean() for q in critic(batch.obs, batch.act)).backward()
        assert torch.nn.utils.clip_grad_norm_(critic.parameters(), 0.05) > 0.05
        critic_opt.step()
        delta = 10.0 * torch.randn(B, 1, generator=generator)  # Eq. 5, 6, against the critic just updated
        perturbed, applied = shift(batch, delta)
        a, s = policy(torch.cat([batch.rtg, perturbed]), *(torch.cat([x, x]) for x in rest))
        q, q_delta = critic(batch.obs, a[:B]).detach(), critic(batch.obs, a[B:])
        align = (-applied.sign() * (q_delta - q)).relu().amin(0)[batch.valid].mean()
        supervised = ((a[:B] - batch.act)[batch.valid] ** 2).mean() + ((s[:B] - batch.obs)[batch.valid] ** 2).mean()
        actor_opt.zero_grad()
        (supervised + 0.3 * align / q_scale).backward()  # Q in units of its mean |Q| over the data
        assert torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.05) > 0.05
        actor_opt.step()
        rate = max(average, 1 / (step + 1))
        average_policy = {k: (1 - rate) * average_policy.get(k, x) + rate * x for k, x in policy.state_dict().items()}
        for target, online in ((target_policy, policy), (target_critic, critic)):
            for p, o in zip(target.parameters(), online.parameters()):
                p.data = 0.9 * p.data + 0.1 * o.data
    networks = dict(policy=policy, critic=critic, target_policy=target_policy, target_critic=target_critic)
    assert set(got) >= {*networks} and ("average" in got) == bool(average)
    for name, module in networks.items():
        for key, value in module.state_dict().items():
            close = torch.isclose(got[name][key], value, rtol=1e-4, atol=2e-6)
            assert close.all(), f"{name} {key}: {(got[name][key] - value).abs().max()}"
    saved = load(tmp_path / f"{ENV}__train_qalign_dt__1" / "policy.pt")["policy"]
    for key, value in (average_policy if average else got["policy"]).items():
        torch.testing.assert_close(saved[key], value, rtol=1e-4, atol=2e-6)
    assert torch.equal(saved["embed_obs.weight"], got["policy"]["embed_obs.weight"]) == (not average)
    assert len(evaluated) == 2 and torch.equal(evaluated[1], saved["embed_obs.weight"])


# ---- configuration ----


def test_table_d8_and_the_papers_sizes_are_the_defaults():
    def task(env):
        one = replace(task_of("hopper-mixed-own"), name=env, tag="minari") if "/" in env else task_of(env)
        return replace(one, rtg_range=(-0.5, 2.5))

    def config(env, **flags):
        data = SimpleNamespace(task=task(env), lengths=np.array([5]))
        return stage2.resolve(stage2.Args(env=env, **flags), data, CPU)

    def row(env):
        return tuple(getattr(config(env), name) for name in stage2.OTHER_DATA)

    long = SimpleNamespace(task=task("hopper-medium-v2"), lengths=np.array([5, 1500]))
    assert stage2.resolve(stage2.Args(), long, CPU).max_timestep == 1500
    paper = config("hopper-medium-v2")
    assert paper.max_timestep == 1000
    sizes = ("embed_dim", "n_layer", "n_head", "context_len", "batch_size", "critic_width", "total_steps", "actor_lr")
    assert [getattr(paper, name) for name in sizes] == [256, 4, 4, 20, 256, 256, 100_000, 3e-4]
    assert (stage2.CRITIC_LR, stage2.L2, stage2.TAU, paper.eval_every) == (3e-4, 1e-4, 0.005, 10_000)
    table = {
        "hopper-medium-replay": (10, 0.3, 0.5),
        "hopper-medium": (10, 0.3, 1),
        "hopper-medium-expert": (10, 0.3, 5),
        "walker2d-medium-replay": (10, 0.3, 2),
        "walker2d-medium": (10, 0.3, 1),
        "walker2d-medium-expert": (10, 0.3, 10),
        "halfcheetah-medium-replay": (15, 5, 5),
        "halfcheetah-medium": (15, 5, 10),
        "halfcheetah-medium-expert": (15, 1, 10),
        "antmaze-umaze": (5, 100, 1),
        "antmaze-medium-play": (5, 100, 1),
        "antmaze-large-diverse": (5, 100, 1),
    }
    for name, values in table.items():
        assert row(f"{name}-v2") == (*values, 0, 0, 0.1, 0, 0), name
    ours = {"hopper-expert": "hopper-medium-expert", "hopper-random": "hopper-medium"}
    ours |= {"ant-medium-replay": "halfcheetah-medium-replay"}
    for name, like in ours.items():
        assert row(f"{name}-v2") == (*table[like], 0, 0, 0.1, 0, 0), name
    for name in (
        "hopper-mini",
        "halfcheetah-mini",
        "hopper-mixed-zoo",
        "walker2d-medium-own",
        "mujoco/hopper/medium-v0",
    ):
        # one set of numbers for all data that are not D4RL's; the first and the third in units of the RTGs' range, 3
        assert row(name) == (9, 100, 1, 0.3, 0.3, 0.0, 0.002, 2), name
    assert config("hopper-mini").embed_dim == 64 and config("hopper-medium-own").embed_dim == 256
    small = config("hopper-medium-v2", preset="small", n_layer=3)
    assert vars(small) | dict(preset=None, n_layer=4) == vars(paper) | stage2.SMALL | dict(n_layer=4, eval_every=500)
    assert config("hopper-mini", preset="paper").embed_dim == 256
    assert config("hopper-medium-v2", delta_rtg=0.0).delta_rtg == 0  # given, though it is false
    iql, sarsa = (stage1.resolve(stage1.Args(env=e), task_of(e), CPU) for e in ("antmaze-umaze-v2", "ant-medium-v2"))
    assert (iql.method, sarsa.method) == ("iql", "sarsa") and (sarsa.lr, sarsa.gamma) == (1e-4, 0.99)
    assert (sarsa.total_steps, sarsa.critic_width, sarsa.warm_start_steps, stage1.EXPECTILE) == (2_000_000, 256, 0, 0.8)
    sarsa = stage1.resolve(stage1.Args(preset="small"), task_of("ant-medium-v2"), CPU)
    assert (sarsa.total_steps, sarsa.critic_width, sarsa.warm_start_steps, sarsa.lr) == (10_000, 128, 9_000, 3e-4)


def test_units_are_the_datas_own_unless_the_data_is_d4rls(pipeline, tmp_path, hopper_file, monkeypatch):
    """The bounds of the RTG, and the mean |Q| that Q is divided by."""
    low, high = load(pipeline.policy)["config"]["rtg_range"]
    tokens = data_of(ENV, hopper_file).returns_to_go()
    assert (low * 1000, high * 1000) == pytest.approx((tokens.min(), tokens.max()))
    shutil.copy(hopper_file, tmp_path / "hopper_medium-v2.hdf5")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    args, data = stage2.Args(env="hopper-medium-v2"), data_of("hopper-medium-v2")
    assert data.task.is_d4rl and stage2.resolve(args, data, CPU).rtg_range == (-1.0, 4.0)
    args = stage2.Args(env="hopper-medium-v2", rtg_range=(-9.0, 9.0))
    assert stage2.resolve(args, data, CPU).rtg_range == (-9.0, 9.0)
    own, config = data_of(ENV, hopper_file), SimpleNamespace(critic_width=16)
    mean = load(pipeline.critic)["report"]["q_abs_mean"]
    assert stage2.pretrained(stage2.Args(critic=str(pipeline.critic)), config, own)[2] == mean
    assert load(pipeline.policy)["q_scale"] == load(pipeline.resume)["progress"]["q_scale"] == mean != 1
    for body, expected in (("hopper", 1.0), ("antmaze", mean)):  # Table D.8's 100 is of Q divided by its mean
        v2 = SimpleNamespace(task=replace(own.task, tag="v2", body=body))
        assert stage2.pretrained(stage2.Args(critic=str(pipeline.critic)), config, v2)[2] == expected


# ---- kill, resume, refuse ----


def start(stage, *flags) -> subprocess.Popen:
    """The stage in a process of its own, with a row of metrics.csv every 10 steps."""
    program = f"import {stage.__name__} as stage; stage.LOG_EVERY = 10; stage.run(stage.main)"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", program, *map(str, flags)], cwd=ROOT, **pipes)


def read_until(process: subprocess.Popen, text: str) -> list[str]:
    """The lines that a process prints, up to the one with this text."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError((lines, process.stderr and process.stderr.read()))


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_same_run(a: Path, b: Path, final: str, networks: tuple[str, ...]) -> None:
    """Final weights and tables of two run folders are equal, bit for bit."""
    one, two = load(a / final), load(b / final)
    for name in networks:
        assert one[name].keys() == two[name].keys()
        assert all(torch.equal(one[name][key], two[name][key]) for key in one[name]), name
    for table in ("metrics.csv", "evaluations.csv", "report.json"):
        assert (a / table).exists() == (b / table).exists()
        if (a / table).exists():
            assert (a / table).read_text() == (b / table).read_text().replace(b.name, a.name), table
    ours, theirs = load(a / "resume.pt"), load(b / "resume.pt")
    assert all(torch.equal(x, y) for x, y in zip(ours["random"], theirs["random"]))


@pytest.fixture(autouse=True, scope="module")
def a_row_every_10_steps():
    with pytest.MonkeyPatch.context() as patch:
        for stage in (stage1, stage2):
            patch.setattr(stage, "LOG_EVERY", 10)
        yield


@pytest.fixture(scope="module")
def whole(pipeline, run_main, hopper_file, tmp_path_factory):
    """Flags of a run of each stage, which tests below repeat with interruptions, and the folders of the whole runs."""
    runs, critic = tmp_path_factory.mktemp("whole"), ["--critic", pipeline.critic]
    flags = {
        stage1: [*TINY1, "--total-steps", 95],
        stage2: [*TINY2, *critic, "--total-steps", 95, "--eval-every", 20],
    }
    for stage in flags:
        assert run_main(stage, *argv(hopper_file, runs, *flags[stage]))[0] == 0
    return flags, {stage: runs / f"{ENV}__{stage.__name__}__1" for stage in flags}


@pytest.mark.parametrize(
    "stage, final, networks",
    [(stage1, "critic.pt", ("critic",)), (stage2, "policy.pt", ("policy", "critic"))],
    ids=["pretrain_q", "train_qalign_dt"],
)
def test_killed_and_resumed_ends_with_the_same_bits(stage, final, networks, whole, run_main, hopper_file, tmp_path):
    flags, folders = whole
    command = argv(hopper_file, tmp_path, *flags[stage])
    folder = tmp_path / folders[stage].name
    process = FORK.Process(target=run_main, args=(stage, *command, "--checkpoint-minutes", 0))
    process.start()
    while not (folder / "resume.pt").exists() or step_of(folder / "resume.pt") < 12:
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    step = step_of(folder / "resume.pt")
    assert 12 <= step < 95
    (folder / "metrics.csv").write_bytes(b"\0torn,")  # no run reads it
    code, out, err = run_main(stage, *command)
    assert code == 0 and f"step {step:,}\n" in out, err
    assert_same_run(folders[stage], folder, final, networks)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [stage1, stage2], ids=["pretrain_q", "train_qalign_dt"])
def test_killed_again_and_again_ends_with_the_same_bits(stage, whole, hopper_file, tmp_path):
    flags, folders = whole
    command = argv(hopper_file, tmp_path, *flags[stage], "--checkpoint-minutes", 0)
    rng, folder = np.random.default_rng(0), tmp_path / folders[stage].name
    for _ in range(6):
        process = start(stage, *command)
        before = (folder / "resume.pt").stat().st_mtime_ns if (folder / "resume.pt").exists() else 0
        while process.poll() is None:
            if (folder / "resume.pt").exists() and (folder / "resume.pt").stat().st_mtime_ns > before:
                time.sleep(rng.uniform(0, 0.3))
                break
            time.sleep(0.001)
        process.kill()
        process.communicate()
    process = start(stage, *command)
    process.communicate()
    assert process.returncode == 0
    final, networks = ("critic.pt", ("critic",)) if stage is stage1 else ("policy.pt", ("policy", "critic"))
    assert_same_run(folders[stage], folder, final, networks)


@pytest.mark.parametrize("stage", [stage1, stage2], ids=["pretrain_q", "train_qalign_dt"])
def test_ctrl_c_is_one_line_that_names_the_last_good_state(stage, whole, run_main, hopper_file, tmp_path, monkeypatch):
    flags, folders = whole
    command, folder = argv(hopper_file, tmp_path, *flags[stage]), tmp_path / folders[stage].name
    learner, calls = {stage1: stage1.Pretraining, stage2: stage2.CoTraining}[stage], []
    real = learner.step

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) in (1, 25):
            signal.raise_signal(signal.SIGINT)
        return real(self, *args)

    monkeypatch.setattr(learner, "step", interrupted)
    code, _, err = run_main(stage, *command)
    assert code == 130 and "error: interrupted; nothing was saved; the same command starts anew" in error_line(err)
    code, _, err = run_main(stage, *command, "--checkpoint-minutes", 0)
    assert code == 130 and f"{folder}/resume.pt" in error_line(err) and "the same command continues" in error_line(err)
    assert step_of(folder / "resume.pt") == 23
    code, out, err = run_main(stage, *command)
    assert code == 0 and "step 23\n" in out, err
    assert_same_run(folders[stage], folder, "critic.pt" if stage is stage1 else "policy.pt", ("critic",))


def test_ctrl_c_sent_to_stage_2_alone_ends_its_stage_1(tmp_path, hopper_file):
    shutil.copy(ROOT / "train_qalign_dt.py", tmp_path)
    stub = "import os, sys, time\nopen('pid', 'w').write(f'{os.getpid()} {sys.argv[1:]}')\ntime.sleep(300)\n"
    (tmp_path / "pretrain_q.py").write_text(stub)
    command = [sys.executable, tmp_path / "train_qalign_dt.py", *argv(hopper_file, "runs", *TINY2)]
    prepare.prepare(ENV, (str(hopper_file),), tmp_path / "runs")  # which is not beside the copied stage
    process = Forked(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("]"), process)
    pid, _, flags = (tmp_path / "pid").read_text().partition(" ")
    assert ENV in flags and str(hopper_file) in flags and "'--critic-width', '16'" in flags
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    deadline = time.monotonic() + 20  # it has been killed; who reaps it may take a moment
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(int(pid), 0)
            time.sleep(0.05)
    assert process.returncode == 130 and err.count("\n") == 1 and "interrupted" in err, err
    assert os.listdir(tmp_path / "runs") == [f"{ENV}__data"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the child in /proc")
def test_stage_1_survives_a_killed_stage_2_and_is_waited_for(tmp_path, hopper_file):
    """SIGKILL reaches stage 2 alone; its stage 1 goes on, and the same command's own one waits until it has ended."""
    command = [sys.executable, ROOT / "train_qalign_dt.py", *argv(hopper_file, tmp_path, *TINY2)]
    stage_1 = f"{ENV}__pretrain_q__1"

    def children():
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # some other process has ended meanwhile
                line = file.read_bytes()
                found += [int(file.parent.name)] * (b"pretrain_q.py" in line and str(tmp_path).encode() in line)
        return found

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / stage_1 / "metrics.csv").exists(), process)  # of its 2,000,000 steps
    process.kill()
    process.wait()
    (child,) = children()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    read_until(process, f"{stage_1}: waiting for another process")  # says the second stage 1
    assert child in children() and len(children()) == 2
    os.kill(child, signal.SIGINT)  # it saves nothing of the last minutes, and frees its lock
    read_until(process, "training transitions")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130 and not children()


# ---- two runs of one seed share stage 1's critic ----


def test_a_run_waits_for_the_critic_that_another_one_trains(pipeline, run_main, hopper_file, tmp_path, monkeypatch):
    """Then it uses it; of another width it is refused as ever."""
    folder = tmp_path / f"{ENV}__pretrain_q__1"
    folder.mkdir()

    def in_this_process(command, **_):
        held = open(folder / ".lock", "w")  # as the other run's stage 1 holds it
        fcntl.flock(held, fcntl.LOCK_EX)

        def end():
            shutil.copy(pipeline.critic, folder)
            held.close()

        threading.Timer(0.3, end).start()
        answers.append(run_main(stage1, *command[2:], "--total-steps", 30, "--batch-size", 32))
        return subprocess.CompletedProcess(command, answers[0][0])

    monkeypatch.setattr(stage2.subprocess, "run", in_this_process)
    for width, name, expected in ((16, "b", 0), (17, "c", 2)):
        answers = []
        (folder / "critic.pt").unlink(missing_ok=True)
        flags = [*TINY2, "--exp-name", name, "--critic-width", width, "--total-steps", 2]
        code, out, err = run_main(stage2, *argv(hopper_file, tmp_path, *flags))
        ((theirs, said, problem),) = answers
        assert (code, theirs, err) == (expected, expected, ""), (err, problem)
        assert said.count("\n") == 2 - (theirs == 2) and "waiting for another process that writes it (Ctrl-C" in said
        assert "is finished; nothing to do" in said or "critic_width 16 there, 17 here" in error_line(problem)
    assert load(tmp_path / f"{ENV}__b__1" / "policy.pt")["step"] == 2 and not (tmp_path / f"{ENV}__c__1").exists()


def test_ctrl_c_ends_a_waiting_run_and_a_killed_holder_leaves_the_critic_to_the_next(tmp_path, hopper_file):
    command = argv(hopper_file, tmp_path / "runs", *TINY1, "--total-steps", 10**6)
    prepare.prepare(ENV, (str(hopper_file),), tmp_path / "runs")
    texts, processes = [tmp_path / name for name in ("holder", "interrupted", "next")], []

    def child(text):
        with open(text, "w") as sys.stdout, open(text.with_suffix(".err"), "w") as sys.stderr:
            sys.argv = ["pretrain_q.py", *command]
            stage1.run(stage1.main)

    def says(text, expected):
        return lambda: text.exists() and expected in text.read_text()

    try:
        for text in texts:
            processes.append(FORK.Process(target=child, args=(text,)))
            processes[-1].start()
            wait_for(says(text, "waiting for another process" if processes[1:] else "step 0\n"), None)
        assert all(text.read_text().count("\n") == 1 and f"{ENV}__pretrain_q__1" in text.read_text() for text in texts)
        os.kill(processes[1].pid, signal.SIGINT)
        processes[1].join(30)
        assert processes[1].exitcode == 130 and texts[1].with_suffix(".err").read_text() == "error: interrupted\n"
        assert processes[0].is_alive() and processes[2].is_alive() and texts[2].read_text().count("\n") == 1
        processes[0].kill()
        wait_for(says(texts[2], "training transitions, sarsa, on cpu, step 0\n"), None)
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True], ids=["both end", "a is killed"])
def test_two_experiments_of_one_seed_started_together_share_stage_1(killed, tmp_path, hopper_file):
    """Real processes; stage 1's paper size, 2,000,000 steps, is the only thing that differs."""
    for name in ("train_qalign_dt.py", "pretrain_q.py"):
        text = (ROOT / name).read_text()
        assert name != "pretrain_q.py" or text.count("total_steps=2_000_000") == 1
        (tmp_path / name).write_text(text.replace("total_steps=2_000_000", "total_steps=4_000"))
    prepare.prepare(ENV, (str(hopper_file),), tmp_path / "runs")
    command = [sys.executable, tmp_path / "train_qalign_dt.py", *argv(hopper_file, tmp_path / "runs", *TINY2)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    a = subprocess.Popen([*command, "--exp-name", "a"], **pipes)
    wait_for((tmp_path / "runs" / f"{ENV}__pretrain_q__1" / "metrics.csv").exists, a)
    b = subprocess.Popen([*command, "--exp-name", "b"], **pipes)
    said = read_until(b, "waiting for another process")
    if killed:
        os.killpg(a.pid, signal.SIGKILL)
    out = "".join(said) + b.communicate(timeout=120)[0]
    a.communicate(timeout=120)
    assert (a.returncode, b.returncode) == (-signal.SIGKILL if killed else 0, 0)
    assert ("critic.pt is finished; nothing to do" in out) == (not killed) == ("training transitions" not in out)
    policies = [tmp_path / "runs" / f"{ENV}__{name}__1" / "policy.pt" for name in "ab"]
    assert [path.exists() for path in policies] == [not killed, True]
    if not killed:
        one, two = (load(path)["policy"] for path in policies)
        assert all(torch.equal(one[key], two[key]) for key in one)


# ---- another machine ----


def test_a_run_goes_on_in_the_arithmetic_it_began_with(pipeline, run_main, hopper_file, tmp_path, monkeypatch):
    """bfloat16 begun where the hardware has it, continued where it has not; and the other way round."""
    flags = [*TINY2, "--critic", pipeline.critic, "--total-steps", 12]
    real, calls = stage2.CoTraining.step, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(self)

    def go(runs, precision, *more):
        return run_main(stage2, *argv(hopper_file, tmp_path / runs, *flags, "--precision", precision, *more))

    final = {}
    for began, other in (("bf16", "fp32"), ("fp32", "bf16")):
        assert go(f"{began} whole", began)[0] == 0
        with monkeypatch.context() as patch:
            calls.clear()
            patch.setattr(stage2.CoTraining, "step", interrupted)
            assert go(began, began, "--checkpoint-minutes", 0)[0] == 130
        with monkeypatch.context() as patch:  # a machine whose `auto` is the other one
            patch.setattr(stage2, "use_bf16", lambda x, _, other=other: (other if x == "auto" else x) == "bf16")
            before = tree(tmp_path / began)
            code, out, err = go(began, other)
            assert code == 2 and f"bf16 {began == 'bf16'} there, {other == 'bf16'} here" in error_line(err)
            assert tree(tmp_path / began) == before
            shutil.copytree(tmp_path / began, tmp_path / f"{began} named")
            for runs, precision in ((began, "auto"), (f"{began} named", began)):
                code, out, err = go(runs, precision)
                assert code == 0 and "step 7\n" in out, err
                name = {"bf16": "bfloat16", "fp32": "float32"}[began]
                assert (f"began with {name} blocks and continues with them\n" in out) == (precision == "auto")
                assert_same_run(*(tmp_path / x / FOLDER2 for x in (f"{began} whole", runs)), "policy.pt", ("policy",))
            (tmp_path / began / FOLDER2 / "resume.pt").unlink()  # then policy.pt says it
            assert "is finished" in go(began, "auto")[1]
        code, out, err = go(f"{began} named", "auto" if stage2.use_bf16("auto", CPU) == (began == "bf16") else began)
        assert code == 0 and "is finished" in out and "continues" not in out  # where nothing differs, nothing is said
        final[began] = load(tmp_path / began / FOLDER2 / "policy.pt")
        assert final[began]["config"]["bf16"] == (began == "bf16")
    assert not torch.equal(*(content["policy"]["blocks.0.qkv.weight"] for content in final.values()))


def test_a_finished_run_says_so_and_changes_nothing(pipeline, run_main, hopper_file):
    before = tree(pipeline.runs)
    for stage, sizes in ((stage1, TINY1), (stage2, [*TINY2, "--eval-every", 15])):
        code, out, err = run_main(stage, *argv(hopper_file, pipeline.runs, *sizes))
        assert (code, err) == (0, "") and "finished" in out and out.count("\n") == 1
    assert tree(pipeline.runs) == before


@pytest.mark.parametrize(
    "change, named",
    [
        (["--lambda-e", 3], "lambda_e 100.0 there, 3.0 here"),
        (["--total-steps", 31], "total_steps"),
        (["--no-conv"], "conv"),
        (["--no-state-loss", "--lambda-e", 0], "state_loss"),
        (["--rtg-range", 0, 1], "rtg_range"),
    ],
)
def test_another_configuration_in_the_same_folder_is_refused(pipeline, run_main, hopper_file, change, named):
    before = tree(pipeline.runs)
    code, out, err = run_main(stage2, *argv(hopper_file, pipeline.runs, *TINY2, "--eval-every", 15, *change))
    assert (
        (code, out) == (2, "") and named in err.replace("10 ", "10.0 ") and "--exp-name" in err and err.count("\n") == 1
    )
    assert tree(pipeline.runs) == before


def test_other_data_in_the_same_folder_and_a_critic_of_other_data_are_refused(
    pipeline, run_main, tmp_path, hopper_arrays
):
    """By the name of the file, by its content, and, where dataset.pt is made anew, by each checkpoint's own digest."""
    observations, actions, rewards, *flags = hopper_arrays
    (tmp_path / "same").mkdir()
    files = [tmp_path / "other.hdf5", tmp_path / "same" / "hopper_tiny.hdf5"]
    for file in files:
        write_hdf5(file, observations, actions, rewards + 1, *flags)
    names = "holds data of hopper_tiny.hdf5, not other.hdf5; choose another --runs-dir", "has changed since"
    runs = [(stage1, TINY1), (stage2, [*TINY2, "--eval-every", 15]), (stage2, [*TINY2, "--exp-name", "new"])]
    before = tree(pipeline.runs)
    for file, says in zip(files, names):
        for stage, sizes in runs:
            code, out, err = run_main(stage, *argv(file, pipeline.runs, *sizes))
            assert (code, out) == (2, "") and says in err and err.count("\n") == 1, err
    assert tree(pipeline.runs) == before
    copy = shutil.copytree(pipeline.runs, tmp_path / "runs")
    (copy / f"{ENV}__data" / "dataset.pt").unlink()
    prepare.prepare(ENV, (str(files[0]),), copy)
    before, changes = tree(copy), ["--rtg-range", 0, 1]  # which else differs first
    for (stage, sizes), says in zip(runs, ("data", "of another run", "critic of other data (hopper data, not D4RL")):
        code, out, err = run_main(stage, *argv(files[0], copy, *sizes, *(changes if stage is stage2 else ())))
        assert (code, out) == (2, "") and says in err and err.count("\n") == 1, err
    assert tree(copy) == before


def test_a_run_resumes_without_stage_1s_critic(whole, run_main, hopper_file, tmp_path, monkeypatch):
    """resume.pt has the critic; only the folder of stage 2 was kept."""
    flags, folders = whole
    folder = tmp_path / folders[stage2].name
    folder.mkdir()
    content = load(folders[stage2] / "resume.pt")
    begun = dict(config=content["config"] | {"critic": None}, progress=content["progress"] | {"step": 80})
    torch.save(content | begun, folder / "resume.pt")
    monkeypatch.setattr(stage2, "pretrained", None)  # would raise if it were called
    flags = [x for x in flags[stage2] if x != "--critic" and "critic.pt" not in str(x)]
    code, out, err = run_main(stage2, *argv(hopper_file, tmp_path, *flags))
    assert code == 0 and "step 80\n" in out, err
    assert load(folder / "policy.pt")["step"] == 95


def test_tensorboard_has_the_rows_of_the_tables(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, folders = whole
    for name in ("metrics", "evaluations"):
        rows = read_csv(folders[stage2] / f"{name}.csv")
        events = EventAccumulator(str(folders[stage2] / "tensorboard" / name)).Reload()
        for column in rows[0]:
            scalars = events.Scalars(column)
            assert [x.step for x in scalars] == [int(row["step"]) for row in rows]
            assert [x.value for x in scalars] == pytest.approx([float(row[column]) for row in rows], rel=1e-4)
