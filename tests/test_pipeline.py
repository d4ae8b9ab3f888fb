"""The command line: three stages end to end, Algorithm 1, the paper's defaults, kill and resume."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENV, ROOT, TINY1, TINY2, argv, tree, write_hdf5

import evaluate_alignment as stage3
import pretrain_q as stage1
import train_qalign_dt as stage2

CPU = torch.device("cpu")


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def read_csv(path: Path) -> list[dict]:
    with open(path) as f:
        return list(csv.DictReader(f))


def step_of(resume: Path) -> int:
    return load(resume)["counters"]["step"]


def last_line(text: str) -> str:
    return text.splitlines()[-1] if text else ""


def error_line(err: str) -> str:
    """The one line of error, with nothing before it on its line; a progress bar may stand above and below."""
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert err.count("error") == 1 and "Traceback" not in err
    return line


# ---- the three stages ----


def test_three_stages_write_what_the_readme_lists(pipeline):
    assert set(os.listdir(pipeline.runs)) == {f"{ENV}__{name}__1" for name in ("pretrain_q", "train_qalign_dt", "dt")}
    alignment = {"alignment.json", "alignment.csv", "alignment.png"}
    files = {"policy.pt", "policy_best.pt", "resume.pt", "metrics.csv", "evaluations.csv", "tensorboard"} | alignment
    assert set(os.listdir(pipeline.folder)) - {".lock"} == files
    critic_files = {"critic.pt", "resume.pt", "report.json", "metrics.csv", "tensorboard"}
    assert set(os.listdir(pipeline.critic.parent)) - {".lock"} == critic_files
    (row,) = read_csv(pipeline.folder / "metrics.csv")
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
    assert result["trained_on"] == policy["data"] and "hopper_tiny.hdf5" in result["trained_on"]["label"]
    assert -1 <= result["spearman_q_vs_return"] <= 1 and result["rollouts"] == 2 and result["env"] == ENV
    assert (result["method"], result["seed"], result["step"]) == ("Q-Align DT", 1, 30)
    rows = read_csv(pipeline.folder / "alignment.csv")
    assert [float(row["target_return"]) for row in rows] == pytest.approx(targets + high)


def test_q_is_ranked_against_plain_and_discounted_returns_of_the_sweep(pipeline, monkeypatch):
    trained = stage3.load_policy(pipeline.policy, "fp32", CPU)
    trained.content["config"]["gamma"] = 0.5
    seen, real = [], stage3.rollout
    monkeypatch.setattr(stage3, "rollout", lambda *args, **kwargs: seen.append(real(*args, **kwargs)) or seen[0])
    record, _ = stage3.sweep(trained, np.array([10.0, 50.0, 90.0]), (100.0,), 4, seed=1)
    rollouts, critic = seen[0], stage3.load_critic(trained)
    q = critic(rollouts.first_obs, rollouts.first_act).amin(0).detach().numpy()[:12]  # not the high target's
    pairs = zip(rollouts.rewards, rollouts.lengths)
    discounted = [sum(0.5**t * r for t, r in enumerate(rewards[:n])) for rewards, n in pairs]

    def ranks(x):  # no two of them are equal
        return np.argsort(np.argsort(x))

    for key, values in (("return", rollouts.returns[:12]), ("discounted_return", discounted[:12])):
        assert record[f"spearman_q_vs_{key}"] == pytest.approx(np.corrcoef(ranks(q), ranks(values))[0, 1])


def test_targets_go_in_steps_from_the_lowest_to_the_highest_return():
    targets = stage3.target_returns(np.array([315.87, 1000.0, 3222.36]), 100.0)
    assert len(targets) == 30 and targets[0] == 315.87 and targets[-1] == pytest.approx(3215.87)  # D.6, hopper-medium
    assert stage3.target_returns(np.array([0.0, 500.0]), 100.0).tolist() == np.linspace(0, 500, 12).tolist()


def test_compare_and_the_best_checkpoint(pipeline, run_main, tmp_path):
    best, dt = tmp_path / "policy_best.pt", pipeline.dt
    shutil.copy(pipeline.best, best)
    code, out, err = run_main(stage3, "--checkpoint", best, "--compare", dt, "--rollouts", 1, "--device", "cpu")
    assert code == 0, err
    assert set(os.listdir(tmp_path)) == {"policy_best.pt", *(f"alignment_best.{x}" for x in ("json", "csv", "png"))}
    result = json.loads((tmp_path / "alignment_best.json").read_text())
    (other,) = result["compare"]
    assert other["checkpoint"] == str(dt) and other["lambda_e"] == 0 and other["method"] == "DT"
    assert "spearman_q_vs_return" in result and other.get("spearman_q_vs_return") is None
    assert [r["target_return"] for r in other["sweep"]] == [r["target_return"] for r in result["sweep"]]
    label = "Q-Align DT, seed 1, max_push 0.3, action_noise 0.3, average 0.002, best checkpoint"
    assert stage3.label_of(result) == label and stage3.label_of(other) == "DT, seed 1, average 0.002"
    assert f"at step {load(best)['step']}" in out or load(best)["step"] == 30


def test_context_is_what_the_policies_act_on(pipeline, run_main, tmp_path, monkeypatch):
    own, seen, real = tmp_path / "policy.pt", [], stage3.Policy.act
    shutil.copy(pipeline.policy, own)
    K = load(own)["config"]["context_len"]
    monkeypatch.setattr(stage3.Policy, "act", lambda self, *x: seen.append(x) or real(self, *x))

    def rmse(*flags, file="alignment"):
        seen.clear()
        code, _, err = run_main(stage3, "--checkpoint", own, "--rollouts", 1, "--device", "cpu", *flags)
        assert code == 0, err
        result = json.loads((tmp_path / f"{file}.json").read_text())
        return result["context"], {len(x[0][0]) for x in seen}, result["alignment_rmse"]

    whole, same = rmse(), rmse("--context", K, file=f"alignment_context_{K}")
    assert whole == (None, {K}, same[2]) and same[:2] == (K, {K})
    short = rmse("--context", 2, "--compare", pipeline.dt, file="alignment_context_2")
    assert short[:2] == (2, {2}) and K > 2 and short[2] != whole[2]
    assert {x.shape[1] for inputs in seen for x in inputs} == {2} and all(inputs[4][:, -1].all() for inputs in seen)
    content = load(own)
    content["config"]["eval_context_len"] = 2  # what stage 2 said holds, unless --context does
    torch.save(content, own)
    assert rmse()[2] == short[2] and rmse("--context", K, file=f"alignment_context_{K}") == same
    assert json.loads((tmp_path / "alignment.json").read_text())["eval_context_len"] == 2
    del content["config"]["eval_context_len"], content["config"]["average"]  # a policy of before they existed
    torch.save(content, own)
    assert rmse() == whole and json.loads((tmp_path / "alignment.json").read_text())["eval_context_len"] == 0
    code, _, err = run_main(stage3, "--checkpoint", own, "--context", K + 1)
    assert code == 2 and f"trained on windows of K = {K}" in error_line(err)
    code, _, err = run_main(stage3, "--checkpoint", own, "--context", 2, "--high-targets", "--inference", "best")
    assert code == 2 and "no --video, --export, --context" in " ".join(err.replace("│", " ").split())


def test_a_dt_starts_without_stage_1(tmp_path, run_main, hopper_file, monkeypatch):
    monkeypatch.setattr(stage2, "stage_1", None)  # would raise if it were called
    code, out, err = run_main(stage2, *argv(hopper_file, tmp_path, *TINY2, "--lambda-e", 0, "--total-steps", 2))
    assert code == 0 and os.listdir(tmp_path) == [f"{ENV}__train_qalign_dt__1"], err
    assert "critic" not in out and "-inf" not in out  # neither a critic nor, without evaluations, a best score


def test_a_fixed_critic_does_not_move(pipeline, run_main, hopper_file, tmp_path):
    flags = ["--no-update-q", "--critic", pipeline.critic, "--total-steps", 5]
    code, _, err = run_main(stage2, *argv(hopper_file, tmp_path, *TINY2, *flags))
    assert code == 0, err
    critic = load(pipeline.critic)["critic"]
    for path, moved in ((tmp_path / f"{ENV}__train_qalign_dt__1" / "policy.pt", False), (pipeline.policy, True)):
        policy = load(path)
        assert any(not torch.equal(value, policy["critic"][key]) for key, value in critic.items()) == moved


def test_an_untrained_policy_can_be_saved(tmp_path, run_main, hopper_file):
    flags = ["--total-steps", 0, "--lambda-e", 0]
    assert run_main(stage2, *argv(hopper_file, tmp_path, *TINY2, *flags))[0] == 0
    assert load(tmp_path / f"{ENV}__train_qalign_dt__1" / "policy.pt")["step"] == 0


def test_stage_2_trains_a_missing_critic_first(tmp_path, run_main, hopper_file, monkeypatch):
    """With the env, seed, data, folder, device and width of its own command line; then it uses the critic's gamma."""
    outcome = {}

    def in_this_process(command, **options):
        assert Path(command[1]) == ROOT / "pretrain_q.py" and not options.get("check")
        outcome["stage 1"] = run_main(stage1, *command[2:], "--total-steps", 5, "--gamma", 0.9)
        return subprocess.CompletedProcess(command, outcome["stage 1"][0])

    monkeypatch.setattr(stage2.subprocess, "run", in_this_process)
    flags = ["--seed", 3, "--total-steps", 2]
    code, out, err = run_main(stage2, *argv(hopper_file, tmp_path, *TINY2, *flags))
    assert code == 0 and "starting pretrain_q.py" in out, (err, outcome)
    critic = load(tmp_path / f"{ENV}__pretrain_q__3" / "critic.pt")["config"]
    assert (critic["seed"], critic["critic_width"], critic["device"]) == (3, 16, "cpu")
    assert load(tmp_path / f"{ENV}__train_qalign_dt__3" / "policy.pt")["config"]["gamma"] == critic["gamma"] == 0.9


def test_a_failing_stage_1_speaks_for_itself(tmp_path, run_main, hopper_file, monkeypatch):
    """Its exit code becomes stage 2's, which adds nothing and has made nothing."""
    for theirs, ours in ((2, 2), (1, 1), (130, 130), (-9, 137)):
        answer = subprocess.CompletedProcess([], theirs)
        monkeypatch.setattr(stage2.subprocess, "run", lambda command, answer=answer: answer)
        code, _, err = run_main(stage2, *argv(hopper_file, tmp_path / "runs", *TINY2))
        assert (code, err) == (ours, "") and not (tmp_path / "runs").exists()
    monkeypatch.setattr(stage2, "__file__", str(tmp_path / "train_qalign_dt.py"))
    code, out, err = run_main(stage2, *argv(hopper_file, tmp_path / "runs", *TINY2))
    assert code == 2 and "critic.pt" in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


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
    monkeypatch.setattr(stage2, "MAX_GRAD_NORM", 0.05)  # low enough to act in every step
    monkeypatch.setattr(stage2, "TAU", 0.1)
    assert run_main(stage1, *argv(hopper_file, tmp_path, *TINY1, "--gamma", 0.9))[0] == 0  # stage 2 takes it over
    papers = ["--sigma-e", 10, "--lambda-e", 0.3, "--delta-rtg", 1, "--max-push", 0, "--batch-size", B := 32]
    papers += ["--action-noise", 0, "--dropout", 0.1, "--average", average, "--eval-every", 3]
    evaluated = []
    evaluate = lambda policy, *_: evaluated.append(policy.embed_obs.weight.clone()) or [0.0, 0.0]  # noqa: E731
    monkeypatch.setattr(stage2, "evaluate", evaluate)
    assert run_main(stage2, *argv(hopper_file, tmp_path, *TINY2, "--total-steps", 3, *papers))[0] == 0
    got = load(tmp_path / f"{ENV}__train_qalign_dt__1" / "resume.pt")
    config, task = got["config"], stage2.parse_env(ENV)
    assert got["counters"]["gamma"] == 0.9 and [config[k] for k in ("sigma_e", "lambda_e", "delta_rtg")] == [10, 0.3, 1]
    data = stage2.read_dataset(task, (str(hopper_file),))

    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    windows = stage2.Windows(data, task, 4, CPU)
    policy, critic = stage2.make_policy(task, config, False), stage2.MLP(2, 11 + 3, 16)
    dropout = torch.get_rng_state()  # the masks of the three steps come next
    critic.load_state_dict(load(tmp_path / f"{ENV}__pretrain_q__1" / "critic.pt")["critic"])
    target_policy, target_critic = stage2.make_policy(task, config, False).eval(), stage2.MLP(2, 11 + 3, 16)
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
        (supervised + 0.3 * align).backward()
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


def test_table_d8_and_the_papers_sizes_are_the_defaults(hopper_file):
    data = stage2.read_dataset(stage2.parse_env(ENV), (str(hopper_file),))

    def config(env, **flags):
        return stage2.resolve(stage2.Args(env=env, **flags), stage2.parse_env(env), data, CPU)

    def row(env):
        return tuple(getattr(config(env), name) for name in stage2.OTHER_DATA)

    paper = config("hopper-medium-v2")
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
        # one set of numbers for all data that are not D4RL's
        assert row(name) == (1.0, 0.1, 0.5, 0.3, 0.3, 0.0, 0.002, 5), name
    assert config("hopper-mini").embed_dim == 64 and config("hopper-medium-own").embed_dim == 256
    assert config("hopper-medium-v2", delta_rtg=0.0).delta_rtg == 0  # given, though it is false
    iql, sarsa = (
        stage1.resolve(stage1.Args(env=e), stage1.parse_env(e), CPU) for e in ("antmaze-umaze-v2", "ant-medium-v2")
    )
    assert (iql.method, sarsa.method) == ("iql", "sarsa") and (sarsa.lr, sarsa.gamma) == (1e-4, 0.99)
    assert (sarsa.total_steps, sarsa.critic_width, sarsa.warm_start_steps, stage1.EXPECTILE) == (2_000_000, 256, 0, 0.8)


def test_rtg_range_is_the_datas_own_unless_the_data_is_d4rls(pipeline, tmp_path, hopper_file, monkeypatch):
    low, high = load(pipeline.policy)["config"]["rtg_range"]
    tokens = stage2.read_dataset(stage2.parse_env(ENV), (str(hopper_file),)).returns_to_go()
    assert (low * 1000, high * 1000) == pytest.approx((tokens.min(), tokens.max()))
    shutil.copy(hopper_file, tmp_path / "hopper_medium-v2.hdf5")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    args = stage2.Args(env="hopper-medium-v2")
    data = stage2.read_dataset(stage2.parse_env(args.env), ())
    assert data.is_d4rl and stage2.resolve(args, stage2.parse_env(args.env), data, CPU).rtg_range == (-1.0, 4.0)
    args = stage2.Args(env="hopper-medium-v2", rtg_range=(-9.0, 9.0))
    assert stage2.resolve(args, stage2.parse_env(args.env), data, CPU).rtg_range == (-9.0, 9.0)


# ---- kill, resume, refuse ----


def start(stage, *flags) -> subprocess.Popen:
    """The stage in a process of its own, with a row of metrics.csv every 10 steps."""
    program = f"import {stage.__name__} as stage; stage.LOG_EVERY = 10; stage.run(stage.main)"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", program, *map(str, flags)], cwd=ROOT, **pipes)


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
        stage2: [*TINY2, *critic, "--total-steps", 95, "--eval-every", 40],
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
    process = start(stage, *command, "--checkpoint-minutes", 0)
    wait_for((folder / "resume.pt").exists, process)
    while step_of(folder / "resume.pt") < 12:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
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
        if len(calls) in (1, 50):
            signal.raise_signal(signal.SIGINT)
        return real(self, *args)

    monkeypatch.setattr(learner, "step", interrupted)
    code, _, err = run_main(stage, *command)
    assert code == 130 and "error: interrupted; nothing was saved" in error_line(err)
    code, _, err = run_main(stage, *command, "--checkpoint-minutes", 0)
    assert code == 130 and f"{folder}/resume.pt" in error_line(err) and "the same command continues" in error_line(err)
    assert step_of(folder / "resume.pt") == 48
    code, out, err = run_main(stage, *command)
    assert code == 0 and "step 48\n" in out, err
    assert_same_run(folders[stage], folder, "critic.pt" if stage is stage1 else "policy.pt", ("critic",))


def test_ctrl_c_sent_to_stage_2_alone_ends_its_stage_1(tmp_path, hopper_file):
    shutil.copy(ROOT / "train_qalign_dt.py", tmp_path)
    stub = "import os, sys, time\nopen('pid', 'w').write(f'{os.getpid()} {sys.argv[1:]}')\ntime.sleep(300)\n"
    (tmp_path / "pretrain_q.py").write_text(stub)
    command = [sys.executable, tmp_path / "train_qalign_dt.py", *argv(hopper_file, "runs", *TINY2)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the child in /proc")
def test_stage_1_survives_a_killed_stage_2_and_is_waited_for(tmp_path, hopper_file):
    """SIGKILL reaches stage 2 alone; its stage 1 goes on, and until it has ended the same command says so."""
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
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and f"{stage_1}: another process is writing this run; wait for it" in again.stderr
    os.kill(child, signal.SIGINT)  # it saves nothing of the last minutes, and frees its lock
    wait_for(lambda: not children(), None)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:  # of both: stage 1 has started again, and stage 2 waits for its end
        if stage_1 in line and "training transitions" in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130 and not children()


def test_a_finished_run_says_so_and_changes_nothing(pipeline, run_main, hopper_file):
    before = tree(pipeline.runs)
    for stage, sizes in ((stage1, TINY1), (stage2, [*TINY2, "--eval-every", 15])):
        code, out, err = run_main(stage, *argv(hopper_file, pipeline.runs, *sizes))
        assert (code, err) == (0, "") and "finished" in out and out.count("\n") == 1
    assert tree(pipeline.runs) == before


@pytest.mark.parametrize(
    "change, named",
    [
        (["--sigma-e", 3], "sigma_e 1.0 there, 3.0 here"),
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
    observations, actions, rewards, *flags = hopper_arrays
    other = write_hdf5(tmp_path / "other.hdf5", observations, actions, rewards + 1, *flags)
    before = tree(pipeline.runs)
    for stage, sizes, says in (
        (stage1, TINY1, "data"),
        (stage2, [*TINY2, "--eval-every", 15, "--rtg-range", 0, 1], "of another run"),
        (stage2, [*TINY2, "--exp-name", "new"], "critic of other data"),
    ):
        code, out, err = run_main(stage, *argv(other, pipeline.runs, *sizes))
        assert (code, out) == (2, "") and says in err and err.count("\n") == 1, err
    assert tree(pipeline.runs) == before


def test_a_run_resumes_without_stage_1s_critic(whole, run_main, hopper_file, tmp_path, monkeypatch):
    """resume.pt has the critic; only the folder of stage 2 was kept."""
    flags, folders = whole
    folder = tmp_path / folders[stage2].name
    folder.mkdir()
    content = load(folders[stage2] / "resume.pt")
    torch.save(content | {"counters": content["counters"] | {"step": 80}}, folder / "resume.pt")
    monkeypatch.setattr(stage2, "stage_1", None)  # would raise if it were called
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
