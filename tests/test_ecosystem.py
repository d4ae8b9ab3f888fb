"""What other tools see: Weights & Biases, an exported policy, the score at high targets, output that is no terminal."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ENV, ROOT, TINY1, TINY2, Forked, argv, data_of

import evaluate_alignment as stage3
import pretrain_q as stage1
import train_qalign_dt as stage2

CPU = torch.device("cpu")


# ---- an exported policy ----


def test_an_exported_policy_acts_as_ours_on_raw_numbers_with_any_batch_size(pipeline, run_main, tmp_path):
    file = tmp_path / "policy.pt2"
    code, out, err = run_main(stage3, "--checkpoint", pipeline.policy, "--export", file, "--device", "cpu")
    assert code == 0 and str(file) in out and [*tmp_path.iterdir()] == [file], err
    exported, g = torch.export.load(file).module(), torch.Generator().manual_seed(0)
    ours = stage3.load_policy(pipeline.policy, "fp32", CPU)
    K, content = ours.content["config"]["context_len"], ours.content
    for B in (1, 5):
        valid = torch.arange(K) >= torch.randint(K, (B, 1), generator=g)
        rtg, obs = 3000 * torch.rand(B, K, generator=g), torch.randn(B, K, 11, generator=g)  # padded with nonsense
        act, timestep = torch.rand(B, K, 3, generator=g), torch.arange(K).expand(B, K).clone()
        action = exported(rtg, obs, act, timestep, valid)
        standard = (obs - content["obs_mean"]) / content["obs_std"]
        rtg, standard = (rtg / 1000).masked_fill(~valid, 0), standard.masked_fill(~valid[..., None], 0)
        expected = ours.policy.act(rtg, standard, act, timestep, valid)
        torch.testing.assert_close(action, expected, rtol=0, atol=1e-6)
        assert action.shape == (B, 3) and len({*action[:, 0].tolist()}) == B


def test_the_readmes_python_acts_and_rates(pipeline, run_main, hopper_file, tmp_path, monkeypatch):
    sizes = [*TINY2, "--context-len", 10, "--total-steps", 1, "--critic", pipeline.critic]
    code, _, err = run_main(stage2, *argv(hopper_file, tmp_path, *sizes))
    assert code == 0, err
    monkeypatch.chdir(next(tmp_path.glob("*__train_qalign_dt__1")))
    assert run_main(stage3, "--checkpoint", "policy.pt", "--export", "policy.pt2")[0] == 0
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        exec(block, names)
    assert names["action"].shape == (1, 3) and names["action"].abs().max() <= 1
    critic = torch.load("policy.pt", weights_only=True)["critic"]
    assert names["q"].shape == (5,) and critic and names["q"].unique().numel() == 1


# ---- the score at high targets ----


def test_high_targets_alone_take_50_rollouts_of_two_targets_for_ones_own_data(
    pipeline, run_main, tmp_path, hopper_file
):
    assert run_main(stage2, *argv(hopper_file, tmp_path, *TINY2, "--lambda-e", 0))[0] == 0
    folder = tmp_path / f"{ENV}__train_qalign_dt__1"
    code, out, err = run_main(stage3, "--checkpoint", folder / "policy.pt", "--high-targets")
    result = json.loads((folder / "high_targets.json").read_text())
    best = data_of(ENV, hopper_file).returns.max()
    assert code == 0 and "alignment RMSE" not in out and not [*folder.glob("alignment*")], err
    assert [row["target_return"] for row in result["high_targets"]] == pytest.approx([best, 1.2 * best])
    assert result["rollouts"] == 50 and "sweep" not in result
    lines = (folder / "high_targets.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("checkpoint,seed,kind,target_return")


# ---- output ----


def test_where_stdout_and_stderr_are_no_terminal_there_is_a_line_per_evaluation_and_no_bar(tmp_path, hopper_file):
    flags = argv(hopper_file, tmp_path, *TINY2, "--lambda-e", 0, "--eval-every", 15)
    command = [sys.executable, ROOT / "train_qalign_dt.py", *flags]
    out, err = Forked(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE).communicate()
    assert err == "" and "\r" not in out
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in lines] == ["step 0", "step 15", "step 30"]


# ---- Weights & Biases ----


def test_track_without_wandb_says_what_to_install(tmp_path, hopper_file, run_main, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = run_main(stage1, *argv(hopper_file, tmp_path, *TINY1, "--track"))
    assert code == 2 and "error: --track: pip install wandb\n" in err
    assert [path.name for path in tmp_path.rglob("*.pt")] == ["dataset.pt"]


@pytest.mark.oracle
def test_track_gives_wandb_what_tensorboard_gets_and_changes_no_result(tmp_path, hopper_file):
    pytest.importorskip("wandb", reason="pip install -r tests/requirements-oracle.txt")
    weights, surroundings = [], os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for runs, track in (("tracked", ["--track"]), ("plain", [])):
        flags = argv(hopper_file, tmp_path / runs, *TINY2, "--lambda-e", 0, "--eval-every", 15, *track)
        command = [sys.executable, ROOT / "train_qalign_dt.py", *flags]
        subprocess.run(command, env=surroundings, capture_output=True, text=True, check=True, cwd=tmp_path)
        policy = torch.load(tmp_path / runs / f"{ENV}__train_qalign_dt__1" / "policy.pt", weights_only=True)
        weights.append(policy["policy"])
        assert "track" not in policy["config"]
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name])
    (run,) = (tmp_path / "tracked" / "wandb").glob("offline-run-*")
    (record,) = run.glob("*.wandb")
    content = record.read_bytes()
    assert f"{ENV}__train_qalign_dt__1".encode() in content and b"action_loss" in content and b"score_at" in content
    assert not (tmp_path / "plain" / "wandb").exists()
