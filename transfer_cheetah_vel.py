"""Zero-shot transfer of Q-Align DT to HalfCheetah-Vel (Sec. 7, App. C, App. E.2).

    python transfer_cheetah_vel.py --env halfcheetah-medium-expert-v2

HalfCheetah-Vel asks for a velocity v: 200 steps, reward -|v_t - v| + c_t with c_t = -0.05 |a_t|^2. The policy was trained
for HalfCheetah's return and is not trained further; the only thing that tells it v is its return-to-go:

    calibrate         RTG_min, RTG_max: of some requests around 1000 v, the best at the lowest and at the highest velocity
    rtg_of            RTG(v): linear between the two
    training_reward   what the return-to-go falls by: v_t + c_t, the kind of reward that the policy was trained on

Writes transfer.json, .csv and .png beside the checkpoint: return, realised velocity and tracking error per velocity.
Order of the file: Args, policy, checkpoints, the task, calibration, plot, main; then blocks shared with the other stages.
"""

import copy
import csv
import ctypes
import difflib
import hashlib
import json
import math
import os
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm


@dataclass
class Args:
    env: str | None = None
    """name of the task, as in stage 2 (default: the checkpoint's, or halfcheetah-medium-expert-v2 without --checkpoint)"""
    checkpoint: str = ""
    """a policy.pt or policy_best.pt of stage 2 (default: policy.pt of the run that --env, --seed and --exp-name name)"""
    compare: tuple[str, ...] = ()
    """further HalfCheetah checkpoints, each calibrated by itself in the same way, in the same table and picture"""
    seed: int = 1
    """seed of the run to transfer, and of the episodes"""
    runs_dir: str = "runs"
    """folder of all runs"""
    exp_name: str = "train_qalign_dt"
    """name of the experiment to transfer; the run folder is <runs-dir>/<env>__<exp-name>__<seed>"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the policy runs; auto takes CUDA if there is one. The simulator uses all CPU cores"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """the transformer's arithmetic; auto: bfloat16 where the hardware has it"""
    velocities: Literal["held-out", "grid"] | tuple[float, ...] = "held-out"
    """targets, m/s: the benchmark's five held-out tasks, all its 40, or a list (outside 0.075 to 3 RTG is extrapolated)"""
    rollouts: int = 30
    """episodes per target velocity, none of them used for the calibration"""
    calibration_budget: int = 40
    """requests tried at the lowest and at the highest velocity each"""
    calibration_width: float = 2000.0
    """they are evenly spaced in 1000 v -+ this, raw return"""
    calibration_rollouts: int = 5
    """episodes per request tried"""
    budgets: tuple[int, ...] = ()
    """several calibration budgets instead, Table C.6: the same interval on coarser grids"""
    extended: bool = False
    """Table E.15: velocities 1, 2, ..., 12 m/s unless a list is given, calibrated at 1 and 12, in episodes of 1,000 steps"""


# ======== shared: policy (the same text in train_qalign_dt.py, evaluate_alignment.py, transfer_cheetah_vel.py) ========


class CausalConv(nn.Module):
    """Convolution over the token axis, window 6, left-padded by 5 zeros, one each for q, k and v (App. D.1)."""

    def __init__(self, width: int, window: int = 6):
        super().__init__()
        self.window = window
        self.conv = nn.Conv1d(3 * width, 3 * width, window, groups=3)  # holds the weights of forward's three conv2d

    def forward(self, qkv, last: int):  # (B, T, 3D) -> q of the last tokens (B, last, D), k and v (B, T, D)
        # (B, 3D, 1, T + 5) in memory is channels-last, the layout for which convolution libraries are fastest
        x = F.pad(qkv, (0, 0, self.window - 1, 0)).transpose(1, 2).unsqueeze(2)
        q, k, v = x.chunk(3, dim=1)
        q = q[..., qkv.shape[1] - last :]
        weights, biases = self.conv.weight.unsqueeze(2).chunk(3), self.conv.bias.chunk(3)
        return [F.conv2d(*part).squeeze(2).transpose(1, 2) for part in zip((q, k, v), weights, biases)]


class Block(nn.Module):
    """Pre-LN transformer block: causal attention, then a GELU MLP of four times the width."""

    def __init__(self, width: int, heads: int, conv: bool, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.conv = CausalConv(width) if conv else None
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), Dropout(dropout))

    def attend(self, x, keep, bias, last: int):  # (B, T, D), (B, T, 1), (B, 1, T, T) -> (B, last, D)
        # Padding must not leak: W_q, W_k, W_v have biases, so padded tokens are zeroed again before the convolution,
        # which then sees the same zeros to the left of a short window as it would without any padding.
        qkv = self.qkv(x) * keep
        q, k, v = self.conv(qkv, last) if self.conv else qkv.chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q[:, -last:], k, v))  # (B, H, T, D / H)
        # written out: with dropout and 60 tokens, faster than scaled_dot_product_attention
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        weights = torch.softmax(logits.float().add_(bias[..., -last:, :]), dim=-1)
        y = self.dropout(weights.to(logits.dtype)) @ v
        return self.dropout(self.out(y.transpose(1, 2).flatten(-2)))

    def forward(self, x, keep, bias, last: int):
        x = x[:, -last:] + self.attend(self.norm1(x), keep, bias, last)
        return x + self.mlp(self.norm2(x))


class Policy(nn.Module):
    """Decision Transformer over tokens (rtg_0, s_0, a_0, rtg_1, ...); heads rtg -> state, state -> action (App. D.1).
    (The release predicts the next state from the action token instead, and does not mask padding.)

    Call with rtg (B, K) normalised, obs (B, K, obs_dim) standardised, act (B, K, act_dim) in [-1, 1], timestep (B, K)
    int64 in [0, max_timestep) and valid (B, K) bool, False on the left padding; returns a_hat (B, K, act_dim) and
    s_hat (B, K, obs_dim), both float32. The action at step t depends on no token after s_t, and on no padding.
    """

    def __init__(self, obs_dim, act_dim, embed_dim, n_layer, n_head, max_timestep, conv=True, dropout=0.1, bf16=False):
        super().__init__()
        self.bf16, self.dropout = bf16, Dropout(dropout)
        self.embed_rtg, self.embed_obs, self.embed_act = (nn.Linear(n, embed_dim) for n in (1, obs_dim, act_dim))
        self.embed_time = nn.Embedding(max_timestep, embed_dim)
        self.norm_in, self.norm_out = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, n_head, conv, dropout) for _ in range(n_layer))
        self.action_head, self.state_head = nn.Linear(embed_dim, act_dim), nn.Linear(embed_dim, obs_dim)
        for module in self.modules():  # GPT-2's initialisation
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, rtg, obs, act, timestep, valid):
        x = self.hidden(rtg, obs, act, timestep, valid, last=3 * rtg.shape[1]).unflatten(1, (-1, 3))  # (B, K, 3, D)
        return torch.tanh(self.action_head(x[:, :, 1])), self.state_head(x[:, :, 0])

    def act(self, rtg, obs, act, timestep, valid):
        """Only a_hat of the windows' last step (B, act_dim), for rollouts: the last block computes nothing else."""
        s_t, _ = self.hidden(rtg, obs, act, timestep, valid, last=2).unbind(dim=1)
        return torch.tanh(self.action_head(s_t))

    def hidden(self, rtg, obs, act, timestep, valid, last: int):  # -> (B, last, D) float32, of the last tokens
        T, device = 3 * rtg.shape[1], rtg.device
        keep = valid.repeat_interleave(3, dim=1)  # (B, T)
        causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        # a padded query looks at itself, so that no row of the softmax is empty; no valid query looks at padding
        mask = causal & (keep[:, None, None, :] | torch.eye(T, dtype=torch.bool, device=device))  # (B, 1, T, T)
        bias = torch.zeros(mask.shape, device=device).masked_fill(~mask, -math.inf)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            time = self.embed_time(timestep)
            tokens = (self.embed_rtg(rtg[..., None]) + time, self.embed_obs(obs) + time, self.embed_act(act) + time)
            x = self.norm_in(torch.stack(tokens, dim=2).flatten(1, 2))  # rtg_0, s_0, a_0, rtg_1, ...
            x = self.dropout(x)
            for i, block in enumerate(self.blocks, 1):
                x = block(x, keep[..., None], bias, last if i == len(self.blocks) else T)
        # the heads run in float32: Eq. 5 looks at small differences between actions
        return self.norm_out(x.float())


def make_policy(task: "Task", cfg: dict, bf16: bool) -> Policy:
    """The policy that a resolved configuration describes (randomly initialised from torch's global generator)."""
    return Policy(
        task.obs_dim,
        task.act_dim,
        cfg["embed_dim"],
        cfg["n_layer"],
        cfg["n_head"],
        cfg["max_timestep"],
        cfg["conv"],
        bf16=bf16,
    )


def use_bf16(precision: str, device: torch.device) -> bool:
    """`auto` is bfloat16 where the hardware multiplies it: on CUDA and on CPUs with AMX or AVX-512's bf16."""
    if precision == "auto" and device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        return cpu.get("amx_bf16", False) or cpu.get("avx512_bf16", False)
    return precision == "bf16"


# ======== end of shared: policy ========

# ======== shared: results (the same text in evaluate_alignment.py, transfer_cheetah_vel.py) ========


class Trained(NamedTuple):
    """One of stage 2's checkpoints, ready to roll out."""

    path: Path
    task: "Task"
    policy: Policy
    content: dict  # everything that the file holds

    def identity(self) -> dict:
        """What result files say of a checkpoint."""
        cfg = self.content["config"]
        return {
            "checkpoint": str(self.path), "env": self.task.name, "trained_on": self.content["data"], "seed": cfg["seed"],
            "step": self.content["step"], "total_steps": cfg["total_steps"], "lambda_e": cfg["lambda_e"], "conv": cfg["conv"],
        }  # fmt: skip


def load_policy(path: Path, precision: str, device: torch.device) -> Trained:
    """Read a stage 2 checkpoint; exits 2 if it is anything else."""
    content = load_checkpoint(path, "train_qalign_dt")
    try:
        task, cfg = parse_env(content["env"]), content["config"]
        policy = make_policy(task, cfg, use_bf16(precision, device))
        policy.load_state_dict(content["policy"])
    except (KeyError, TypeError, RuntimeError):
        fail(f"{path}: its weights do not have the shapes its configuration says; train it again")
    return Trained(path, task, policy.to(device).eval(), content)


def curve_label(record: dict) -> str:
    """How a curve is called: method and seed."""
    method = {
        (True, True): "Q-Align DT",
        (True, False): "DT + alignment",
        (False, True): "DT + conv",
        (False, False): "DT",
    }[record["lambda_e"] > 0, record["conv"]]
    best = ", best checkpoint" if Path(record["checkpoint"]).name == "policy_best.pt" else ""
    return f"{method}, seed {record['seed']}{best}"


def write_results(folder: Path, stem: str, result: dict, rows: list[dict], draw) -> list[Path]:
    """Write <stem>.json, .csv (of rows) and .png (by draw(file)) into folder: all whole, or none."""
    files = [folder / f"{stem}.{kind}" for kind in ("json", "csv", "png")]
    temporary = [f"{file}.{os.getpid()}.tmp" for file in files]
    with open(temporary[0], "w") as f:
        f.write(json.dumps(result, indent=2, allow_nan=False) + "\n")
    with open(temporary[1], "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    draw(temporary[2])
    for name, file in zip(temporary, files):
        os.replace(name, file)
    return files


# ======== end of shared: results ========


COST = 0.05  # of |a|^2 in HalfCheetah-Vel; HalfCheetah-v4 has 0.1
GRID = tuple(round(0.075 * k, 3) for k in range(1, 41))  # the benchmark's 40 tasks, 0.075 to 3 m/s
HELD_OUT = (0.225, 0.6, 1.2, 1.8, 2.025)  # Prompt-DT's and MACAW's test tasks
STEPS = 200  # of an episode
EXTENDED, EXTENDED_STEPS = tuple(float(v) for v in range(1, 13)), 1000


def training_reward(velocity: np.ndarray, action: np.ndarray) -> np.ndarray:
    """r_bar = v_t + c_t (App. C): velocities (m,) in m/s, actions (m, act_dim) -> (m,)."""
    return velocity - COST * np.square(action).sum(axis=1)


def vel_returns(rollouts: "Rollouts", target: np.ndarray) -> np.ndarray:
    """Return of HalfCheetah-Vel, the sum of -|v_t - v| + c_t, for each rollout (n,) and its target v (n,)."""
    cost = rollouts.rewards - rollouts.velocities  # c_t, as r_bar = v_t + c_t
    return (cost - np.abs(rollouts.velocities - target[:, None])).sum(axis=1)


def rtg_of(velocity, v_range: tuple[float, float], rtg_range: tuple[float, float]):
    """RTG(v) of App. C: linear through (v_min, RTG_min) and (v_max, RTG_max); raw return."""
    (v_min, v_max), (rtg_min, rtg_max) = v_range, rtg_range
    return rtg_min + (np.asarray(velocity) - v_min) / (v_max - v_min) * (rtg_max - rtg_min)


def track(trained: Trained, rtg: np.ndarray, seeds: np.ndarray, steps: int, what: str) -> "Rollouts":
    """One episode of `steps` steps for each raw initial return-to-go (n,) and reset seed (n,), all as one batch."""
    content = trained.content
    K, obs_stats = content["config"]["context_len"], (content["obs_mean"], content["obs_std"])
    with tqdm(total=steps, unit="step", desc=what, dynamic_ncols=True) as bar:
        return rollout(
            trained.policy, trained.task, rtg, seeds, K, *obs_stats, bar=bar, horizon=steps, reward_function=training_reward
        )  # fmt: skip


def calibrate(
    trained: Trained, budgets, v_range, width: float, rollouts: int, seeds: np.ndarray, steps: int
) -> list[list[dict]]:
    """For each budget, at v_min and at v_max: the requests tried, their mean returns in HalfCheetah-Vel, and the best one.

    Every request is tried in the same episodes, seeds (rollouts,). The requests of all budgets run as one batch.
    """
    tried = [(v, np.linspace(1000 * v - width, 1000 * v + width, budget)) for budget in budgets for v in v_range]
    rtg = np.repeat(np.concatenate([candidates for _, candidates in tried]), rollouts)
    target = np.repeat(np.concatenate([np.full(len(candidates), v) for v, candidates in tried]), rollouts)
    result = track(trained, rtg, np.tile(seeds, len(rtg) // rollouts), steps, f"calibration, {len(rtg)} rollouts")
    means = vel_returns(result, target).reshape(-1, rollouts).mean(axis=1)
    curves = []
    for v, candidates in tried:
        mine, means = means[: len(candidates)], means[len(candidates) :]
        best = float(candidates[mine.argmax()])
        curves.append({"velocity": v, "rtg": candidates.tolist(), "return_mean": mine.tolist(), "best_rtg": best})
    return [curves[i : i + 2] for i in range(0, len(curves), 2)]


def transfer(trained: Trained, velocities: np.ndarray, v_range, steps: int, args: Args) -> dict:
    """Calibrate one checkpoint and measure it in fresh episodes: the record that transfer.json holds."""
    budgets = args.budgets or (args.calibration_budget,)
    seeds = np.random.SeedSequence(args.seed).generate_state(args.calibration_rollouts + args.rollouts) >> 1
    calibration, fresh = seeds[: args.calibration_rollouts], seeds[args.calibration_rollouts :]
    curves = calibrate(trained, budgets, v_range, args.calibration_width, args.calibration_rollouts, calibration, steps)
    asked = np.stack([rtg_of(velocities, v_range, (low["best_rtg"], high["best_rtg"])) for low, high in curves])
    rtg = np.repeat(asked.ravel(), args.rollouts)  # (budgets * velocities * rollouts,)
    target = np.repeat(np.tile(velocities, len(budgets)), args.rollouts)
    shape = (len(budgets), len(velocities), args.rollouts)
    result = track(trained, rtg, np.tile(fresh, shape[0] * shape[1]), steps, f"transfer, {len(rtg)} rollouts")
    returns, realised = vel_returns(result, target).reshape(shape), result.velocity.reshape(shape)
    error = np.abs(result.velocities - target[:, None]).mean(axis=1).reshape(shape)
    record = trained.identity() | {"budgets": []}
    for b, (budget, (low, high)) in enumerate(zip(budgets, curves)):
        rows = [
            {
                "velocity": float(v), "rtg": float(asked[b, i]), "return_mean": float(returns[b, i].mean()),
                "return_std": float(returns[b, i].std()), "return_max": float(returns[b, i].max()),
                "velocity_mean": float(realised[b, i].mean()), "velocity_std": float(realised[b, i].std()),
                "tracking_error": float(error[b, i].mean()),
            }
            for i, v in enumerate(velocities)
        ]  # fmt: skip
        record["budgets"].append({
            "budget": budget, "rtg_min": low["best_rtg"], "rtg_max": high["best_rtg"], "calibration": [low, high],
            "return_mean": float(returns[b].mean()), "tracking_error": float(error[b].mean()), "velocities": rows,
        })  # fmt: skip
    return record


def plot(records: list[dict], title: str, file: str) -> None:
    """Realised against target velocity with the diagonal; the calibration curves of both ends. Of the largest budget."""
    import matplotlib  # imported here: it takes a while

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for i, record in enumerate(records):
        largest, label = max(record["budgets"], key=lambda one: one["budget"]), curve_label(record)
        v, mean, std = (
            np.array([row[k] for row in largest["velocities"]]) for k in ("velocity", "velocity_mean", "velocity_std")
        )
        left.errorbar(v, mean, std, marker="o", markersize=4, capsize=2, color=f"C{i}", label=label)
        for curve, style in zip(largest["calibration"], ("--", "-")):
            right.plot(
                curve["rtg"], curve["return_mean"], style, color=f"C{i}", marker=".", label=f"{label}, {curve['velocity']:g} m/s"
            )  # fmt: skip
            right.plot(curve["best_rtg"], max(curve["return_mean"]), "*", markersize=12, color=f"C{i}")
    span = [v.min(), v.max()]
    left.plot(span, span, "--", color="0.5", linewidth=1, label="realised = target")
    left.set_xlabel("target velocity (m/s)")
    left.set_ylabel("realised velocity (m/s; bar: one std over episodes)")
    right.set_xlabel("requested return (raw), star: the best")
    right.set_ylabel(f"return in HalfCheetah-Vel, {largest['budget']} requests tried per end")
    for axes in (left, right):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize="small")
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def check(args: Args) -> np.ndarray:
    """The target velocities; exits 2 on a value that cannot work."""
    check_seed(args.seed)
    for budget in (args.calibration_budget, *args.budgets):
        if budget < 2:
            fail(
                f"a calibration budget of {budget}: at least 2 requests must be tried (--calibration-budget, --budgets)"
            )
    if args.rollouts < 1 or args.calibration_rollouts < 1:
        fail("--rollouts and --calibration-rollouts must be at least 1")
    if not 0 < args.calibration_width < np.inf:
        fail(f"--calibration-width {args.calibration_width:g}: must be positive and finite")
    named = {"held-out": EXTENDED if args.extended else HELD_OUT, "grid": EXTENDED if args.extended else GRID}
    velocities = named[args.velocities] if isinstance(args.velocities, str) else args.velocities
    for v in velocities:
        if not 0 <= v < np.inf:
            fail(f"--velocities {v:g}: a target velocity must be finite and not negative")
    if not velocities:
        fail("--velocities: name at least one, or held-out, or grid")
    return np.array(velocities, dtype=np.float64)


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    args = tyro.cli(Args, description=__doc__)
    keep_freed_memory()
    velocities, device = check(args), pick_device(args.device)
    task = parse_env(args.env or "halfcheetah-medium-expert-v2") if args.env or not args.checkpoint else None
    path = (
        Path(args.checkpoint)
        if args.checkpoint
        else Path(args.runs_dir) / f"{task.name}__{args.exp_name}__{args.seed}" / "policy.pt"
    )
    trained = [load_policy(Path(p), args.precision, device) for p in (path, *args.compare)]
    if task and task.name != trained[0].task.name:
        fail(f"{path} was trained on --env {trained[0].task.name}, not {task.name}")
    for one in trained:
        if one.task.body != "halfcheetah":
            fail(f"{one.path}: a policy of {one.task.body}; HalfCheetah-Vel needs one of halfcheetah")
    folder, stem = path.parent, "transfer" + "_extended" * args.extended + "_best" * (path.name == "policy_best.pt")
    if not os.access(folder, os.W_OK):
        fail(f"{folder}: cannot write {stem}.json there; copy the checkpoint to a folder of your own")
    for one in trained:
        if not one.content.get("finished", True):
            print(f"note: {one.path} is at step {one.content['step']:,} and not finished")

    steps = EXTENDED_STEPS if args.extended else STEPS
    v_range = (EXTENDED[0], EXTENDED[-1]) if args.extended else (GRID[0], GRID[-1])
    records = [transfer(one, velocities, v_range, steps, args) for one in trained]
    result = {
        "steps": steps, "v_min": v_range[0], "v_max": v_range[1], "rollouts": args.rollouts,
        "calibration_rollouts": args.calibration_rollouts, "calibration_width": args.calibration_width,
        "episode_seed": args.seed, "device": device.type, "precision": "bf16" if trained[0].policy.bf16 else "fp32",
    } | records[0]  # fmt: skip
    if len(records) > 1:
        result["compare"] = records[1:]
    rows = [
        {"checkpoint": record["checkpoint"], "seed": record["seed"], "budget": one["budget"]} | row
        for record in records
        for one in record["budgets"]
        for row in one["velocities"]
    ]
    label = result["trained_on"]["label"]
    title = f"HalfCheetah-Vel, {steps} steps, zero-shot; trained on {label}\n{args.rollouts} rollouts per velocity"
    files = write_results(folder, stem, result, rows, lambda file: plot(records, title, file))
    for record in records:
        for one in record["budgets"]:
            print(
                f"\n{record['checkpoint']}, {one['budget']} requests tried per end: RTG {one['rtg_min']:.0f} at {v_range[0]:g} m/s, "
                f"{one['rtg_max']:.0f} at {v_range[1]:g} m/s; mean return {one['return_mean']:.1f}, "
                f"tracking error {one['tracking_error']:.2f} m/s"
            )
            print("  target m/s      RTG   realised m/s    return (highest)   tracking error")
            for row in one["velocities"]:
                print(
                    f"  {row['velocity']:10.3f} {row['rtg']:8.0f}   {row['velocity_mean']:5.2f} +- {row['velocity_std']:4.2f}"
                    f"   {row['return_mean']:8.1f} ({row['return_max']:7.1f})   {row['tracking_error']:14.2f}"
                )
    print(f"\n{files[0]}, {files[1].name}, picture {files[2]}")


# ======== shared: setup (the same text in collect_dataset.py, pretrain_q.py, train_qalign_dt.py, evaluate_alignment.py, transfer_cheetah_vel.py) ========

FORMAT = 3  # of the checkpoint files
HORIZON = 1000  # steps after which Gymnasium and D4RL cut an episode


def fail(message: str, code: int = 2):
    """One line on stderr that says what is wrong, where, and what to do; then exit."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**31:
        fail(f"--seed {seed}: must be between 0 and 2**31 - 1")


def save_checkpoint(path: Path, payload: dict) -> None:
    """Write a checkpoint whole or not at all."""
    torch.save(payload, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_checkpoint(path: Path, stage: str) -> dict:
    """Read a checkpoint of one stage onto the CPU, without unpickling; exits 2 on anything else."""
    if not path.is_file():
        fail(f"{path}: no such checkpoint")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch comments on foreign pickles; the line below is enough
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises a dozen kinds for truncated, foreign and pickled files
        fail(f"{path}: not a readable checkpoint (truncated, or not written by {stage}.py)")
    if not isinstance(checkpoint, dict) or checkpoint.get("stage") != stage:
        found = checkpoint.get("stage") if isinstance(checkpoint, dict) else None
        fail(f"{path}: a checkpoint of {found or 'something else'}, not of {stage}.py")
    if checkpoint.get("format") != FORMAT:
        fail(f"{path}: checkpoint format {checkpoint.get('format')}, this version reads {FORMAT}; train it again")
    return checkpoint


# ======== end of shared: setup ========

# ======== shared: task (the same text in pretrain_q.py, train_qalign_dt.py, evaluate_alignment.py, transfer_cheetah_vel.py) ========


@dataclass(frozen=True)
class Task:
    """What a name <body>-<quality>-<tag> stands for. RTG ranges are normalised, targets and references raw returns."""

    name: str
    body: str
    quality: str
    tag: str
    env_id: str | None  # Gymnasium's simulator; None: there is none, training only
    obs_dim: int
    act_dim: int
    ref_min: float  # D4RL's reference returns, of a random and of an expert policy
    ref_max: float
    rtg_scale: float
    rtg_range: tuple[float, float]  # the release's, for D4RL data
    high_targets: tuple[float, ...]  # the release's evaluation targets, for D4RL data
    critic_reward_shift: float = 0.0  # AntMaze: the critic sees r - 1, as in IQL

    def score(self, returns):
        """D4RL score: 0 for a random policy's return, 100 for an expert's."""
        return 100 * (returns - self.ref_min) / (self.ref_max - self.ref_min)


BODIES = {
    "hopper": ("Hopper-v4", 11, 3, -20.272305, 3234.3, 1000.0, (-1.0, 4.0), (1800.0, 3600.0, 4000.0)),
    "halfcheetah": ("HalfCheetah-v4", 17, 6, -280.178953, 12135.0, 1000.0, (-1.0, 25.0), (12000.0, 24000.0)),
    "walker2d": ("Walker2d-v4", 17, 6, 1.629008, 4592.3, 1000.0, (-1.0, 20.0), (5000.0, 6000.0, 10000.0)),
    "ant": ("Ant-v4", 111, 8, -325.6, 3879.7, 1000.0, (-1.0, 10.0), (5000.0, 10000.0)),
    "antmaze": (None, 29, 8, 0.0, 1.0, 1.0, (0.0, 1.0), (0.8, 0.9, 1.0, 100.0), -1.0),
}
QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "expert")
MAZES = {  # D4RL's file names
    "umaze": "u-maze_noisy_multistart_False_multigoal_False",
    "umaze-diverse": "u-maze_noisy_multistart_True_multigoal_True",
    "medium-play": "big-maze_noisy_multistart_True_multigoal_False",
    "medium-diverse": "big-maze_noisy_multistart_True_multigoal_True",
    "large-play": "hardest-maze_noisy_multistart_True_multigoal_False",
    "large-diverse": "hardest-maze_noisy_multistart_True_multigoal_True",
}


def parse_env(name: str) -> Task:
    """The task of an --env name; exits 2 on an unknown one, naming the closest."""
    body, _, rest = name.partition("-")
    quality, _, tag = rest.rpartition("-")
    known = MAZES if body == "antmaze" else (*QUALITIES, "mixed")  # "mixed": medium-replay's name before v2
    names = [f"{b}-{q}-v2" for b in BODIES for q in (MAZES if b == "antmaze" else QUALITIES)] + ["hopper-mini"]
    if rest == "mini" and body in BODIES and body != "antmaze":  # collect_dataset.py's, with the small preset
        return Task(name, body, "mini", "mini", *BODIES[body])
    # hopper-medium-expert would be quality medium, tag expert: the tag was forgotten
    if (
        body in BODIES
        and f"{name}-v2" not in names
        and re.fullmatch(r"[A-Za-z0-9_.]+", tag)
        and quality in known
        and (quality, tag) != ("mixed", "v2")
    ):
        return Task(name, body, quality, tag, *BODIES[body])
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
    fail(
        f"unknown --env {name!r}: did you mean {', '.join(close)}? "
        "(<body>-<quality>-<tag>; any tag but v2 stands for your own data)"
    )


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; exits 2 where CUDA is asked for and missing. Switches TF32 off."""
    torch.set_float32_matmul_precision("highest")  # float32 is float32, for the critic above all
    warnings.filterwarnings("ignore", message=".*TensorFloat32")  # torch.compile's advice to have it
    warnings.filterwarnings("ignore", message=".*capturable=True")  # Adam's, on the steps before a CUDA graph
    torch.backends.cudnn.allow_tf32 = False
    if name == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch finds no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def tensor_hash(tensors) -> str:
    """First 16 hex digits of the SHA-256 of some arrays' or tensors' shapes and bytes."""
    digest = hashlib.sha256()
    for x in tensors:
        x = np.ascontiguousarray(x)
        digest.update(f"{x.shape}{x.dtype}".encode())
        digest.update(x.view(np.uint8).data if x.size else b"")
    return digest.hexdigest()[:16]


# ======== end of shared: task ========

# ======== shared: speed (the same text in pretrain_q.py, train_qalign_dt.py, evaluate_alignment.py, transfer_cheetah_vel.py) ========


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU with 16 random bits an element instead of torch's 64, in a third to a half of its time."""

    def forward(self, x):
        if not self.training or x.is_cuda or torch.compiler.is_compiling():
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        dropped = round(2**16 * self.p)  # of 65,536 values
        keep = bits[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * (keep.to(x.dtype) / (1 - dropped / 2**16))


class CPUMish(torch.autograd.Function):
    """x tanh(softplus(x)) as x m / (2 - m) with m = s (2 - s), s = sigmoid(x): on a CPU 2 to 3 times torch's speed."""

    @staticmethod
    def forward(ctx, x):
        s = torch.sigmoid(x)
        m = s * (2 - s)
        r = (2 - m).reciprocal_()
        t = m.mul_(r)  # tanh(softplus(x)), whose derivative is s (2 (1 - s) r)^2
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.addcmul(t, x, (1 - s).mul_(r).mul_(2).square_().mul_(s)))
        return x * t

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


def mish(x: torch.Tensor) -> torch.Tensor:
    """F.mish, of which CUDA and compilers make one kernel."""
    return F.mish(x) if x.is_cuda or torch.compiler.is_compiling() else CPUMish.apply(x)


def keep_freed_memory() -> None:
    """Have glibc reuse freed memory: it returns large blocks to the kernel, and every step would fault them in again."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        # an older glibc refuses more than 32 MiB; the second setting alone would make things worse
        if libc.mallopt(m_mmap_threshold, 2**30) or libc.mallopt(m_mmap_threshold, 2**25):
            libc.mallopt(m_trim_threshold, 2**31 - 1)


# ======== end of shared: speed ========

# ======== shared: simulator (the same text in collect_dataset.py, train_qalign_dt.py, evaluate_alignment.py, transfer_cheetah_vel.py) ========

BODY_IDS = {"Hopper-v4": "hopper", "HalfCheetah-v4": "halfcheetah", "Walker2d-v4": "walker2d", "Ant-v4": "ant"}


def make_env(env_id: str):
    """Gymnasium's v4 environment without its known warnings, and without MuJoCo's MUJOCO_LOG.TXT about them."""
    known = "'settotalmass' is deprecated"  # a remark on Gymnasium's half_cheetah.xml
    mujoco.set_mju_user_warning(
        lambda message: None if known in message else warnings.warn(f"MuJoCo: {message}", stacklevel=2)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of date. You should consider upgrading to version `v5`")
        return gymnasium.make(env_id).unwrapped


class Simulator:
    """n copies of a body in BODY_IDS (Gymnasium's v4), advanced in lockstep by as many threads as torch uses.

    Initial states are those of env.reset(seed); observations, rewards and terminations those of env.step, without its
    time limit. Ant's observation is padded with zeros to D4RL's 111 numbers.
    """

    def __init__(self, env_id: str, seeds):
        self.env = env = make_env(env_id)
        self.body, self.model, self.frame_skip, self.dt = BODY_IDS[env_id], env.model, env.frame_skip, env.dt
        self.sims = [None] * len(seeds)
        self.qpos, self.qvel = np.zeros((len(seeds), self.model.nq)), np.zeros((len(seeds), self.model.nv))
        self.reset(range(len(seeds)), seeds)
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.threads)

    def reset(self, index, seeds) -> None:
        """Start some of the simulations anew, each with its seed."""
        for i, seed in zip(index, seeds):
            self.env.reset(seed=int(seed))
            self.sims[i] = copy.copy(self.env.data)  # MjData copies itself whole
            self.qpos[i], self.qvel[i] = self.sims[i].qpos, self.sims[i].qvel

    def close(self) -> None:
        self.pool.shutdown()
        self.env.close()

    def observe(self, index) -> np.ndarray:
        """(m, obs_dim) float64: the observations of some of the simulations."""
        qpos, qvel = self.qpos[index], self.qvel[index]
        if self.body == "ant":
            return np.concatenate([qpos[:, 2:], qvel, np.zeros((len(qpos), 111 - 27))], axis=1)
        return np.concatenate([qpos[:, 1:], qvel if self.body == "halfcheetah" else qvel.clip(-10, 10)], axis=1)

    def x_position(self, index) -> np.ndarray:
        """(m,) what each environment's forward velocity is the difference of."""
        if self.body == "ant":  # Gymnasium reads the torso's frame, which MuJoCo computed before its last substep
            torso = self.model.body("torso").id
            return np.array([self.sims[i].xpos[torso, 0] for i in index])
        return self.qpos[index, 0]

    def advance(self, index, actions) -> None:
        for i, action in zip(index, actions):
            sim = self.sims[i]
            sim.ctrl[:] = action
            mujoco.mj_step(self.model, sim, self.frame_skip)
            self.qpos[i], self.qvel[i] = sim.qpos, sim.qvel

    def step(self, index, actions):
        """One env.step of the simulations `index` (m,), given actions (m, act_dim).

        Returns observations (m, obs_dim), rewards, terminated and forward velocities in m/s, each (m,).
        """
        before = self.x_position(index)
        n = min(self.threads, len(index))
        list(self.pool.map(self.advance, np.array_split(index, n), np.array_split(actions, n)))
        velocity = (self.x_position(index) - before) / self.dt
        effort = np.square(actions).sum(axis=1)
        state = np.concatenate([self.qpos[index], self.qvel[index]], axis=1)
        z, angle = state[:, 1], state[:, 2]
        if self.body == "halfcheetah":
            reward, healthy = velocity - 0.1 * effort, np.ones(len(index), bool)
        elif self.body == "hopper":
            reward = velocity + 1.0 - 1e-3 * effort
            healthy = (np.abs(state[:, 2:]) < 100).all(axis=1) & (z > 0.7) & (np.abs(angle) < 0.2)
        elif self.body == "walker2d":
            reward = velocity + 1.0 - 1e-3 * effort
            healthy = (z > 0.8) & (z < 2.0) & (np.abs(angle) < 1.0)
        else:  # ant
            reward = velocity + 1.0 - 0.5 * effort
            healthy = np.isfinite(state).all(axis=1) & (state[:, 2] >= 0.2) & (state[:, 2] <= 1.0)
        return self.observe(index), reward, ~healthy, velocity


# ======== end of shared: simulator ========

# ======== shared: rollout (the same text in train_qalign_dt.py, evaluate_alignment.py, transfer_cheetah_vel.py) ========


class Rollouts(NamedTuple):
    """One entry per rollout (n); what is per step (T) is NaN after a rollout's end."""

    returns: np.ndarray  # raw, undiscounted
    lengths: np.ndarray  # environment steps
    rewards: np.ndarray  # (n, T)
    velocities: np.ndarray  # (n, T) forward, m/s
    first_obs: torch.Tensor  # (n, obs_dim) standardised
    first_act: torch.Tensor  # (n, act_dim)
    qpos: np.ndarray | None  # (n, T, nq) MuJoCo's positions after each step, if asked for

    @property
    def velocity(self) -> np.ndarray:
        """(n,) mean forward velocity, m/s."""
        return np.nanmean(self.velocities, axis=1)


@torch.no_grad()
def rollout(
    policy: Policy, task: Task, targets, seeds, context_len: int, obs_mean, obs_std, bar=None, stop=None,
    horizon: int = HORIZON, reward_function=None, keep_qpos: bool = False,
) -> Rollouts | None:  # fmt: skip
    """Roll the policy out once per (raw target return, seed), all in lockstep as one batch.

    The context is the last context_len steps, padded and masked as in training; the RTG token starts at target /
    rtg_scale and falls by every reward, the environment's or reward_function(velocities (m,), actions (m, act_dim)). A
    rollout that has ended leaves the batch. None if `stop` was requested.
    """
    n, K, device = len(targets), context_len, next(policy.parameters()).device
    was_training = policy.training
    policy.eval()
    simulator = Simulator(task.env_id, seeds)
    obs_mean, obs_std = obs_mean.to(device), obs_std.to(device)
    # histories start with K - 1 steps of padding, so that the context of step t is always [t, t + K)
    history = horizon + K - 1
    rtg, obs, act = (torch.zeros(n, history, *size, device=device) for size in ((), (task.obs_dim,), (task.act_dim,)))
    timestep = torch.arange(1 - K, horizon, device=device)
    alive = np.arange(n)
    returns, lengths = np.zeros(n), np.zeros(n, dtype=np.int64)
    rewards, velocities = np.full((n, horizon), np.nan), np.full((n, horizon), np.nan)
    qpos = np.full((n, horizon, simulator.model.nq), np.nan) if keep_qpos else None
    observation = simulator.observe(alive)
    for t in range(horizon):
        rows, now, window = torch.as_tensor(alive, device=device), t + K - 1, slice(t, t + K)
        obs[rows, now] = (torch.as_tensor(observation, dtype=torch.float32, device=device) - obs_mean) / obs_std
        remaining = (np.asarray(targets, dtype=np.float64)[alive] - returns[alive]) / task.rtg_scale
        rtg[rows, now] = torch.as_tensor(remaining, dtype=torch.float32, device=device)
        times = timestep[window].expand(len(alive), K)
        action = policy.act(rtg[rows, window], obs[rows, window], act[rows, window], times.clamp(min=0), times >= 0)
        act[rows, now] = action
        action = action.cpu().numpy().astype(np.float64)
        observation, reward, terminated, velocity = simulator.step(alive, action)
        if reward_function is not None:
            reward = reward_function(velocity, action)
        returns[alive] += reward
        lengths[alive] += 1
        rewards[alive, t], velocities[alive, t] = reward, velocity
        if keep_qpos:
            qpos[alive, t] = simulator.qpos[alive]
        alive, observation = alive[~terminated], observation[~terminated]
        if bar is not None:
            bar.update()
            bar.set_postfix_str(f"{len(alive)} of {n} rollouts alive")
        if len(alive) == 0 or (stop is not None and stop.requested):
            break
    simulator.close()
    policy.train(was_training)
    if stop is not None and stop.requested:
        return None
    return Rollouts(returns, lengths, rewards, velocities, obs[:, K - 1].clone(), act[:, K - 1].clone(), qpos)


# ======== end of shared: rollout ========


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; nothing was written", code=130)
