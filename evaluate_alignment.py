"""Stage 3 of Q-Align DT: does the policy return what it is asked for? The RTG sweep of Sec. 6.2 and App. D.6.

    python evaluate_alignment.py --env hopper-medium-v2

Asks a trained policy for every return from the dataset's lowest to its highest in steps of 100, rolls each request out
--rollouts times in Gymnasium's simulator, and reports the alignment error (Eq. 8): the root mean square, over the
requests, of (mean achieved score - requested score). Writes alignment.json, .csv and .png beside the checkpoint.
--trajectories adds what the body does with a higher request (Figures 3 and 4: behaviour.json and .png), --video shows it.
Order of the file: Args, policy, critic, sweep, plots, main; then the blocks this file shares with the other stages.
"""

import contextlib
import copy
import csv
import ctypes
import difflib
import hashlib
import http.client
import json
import math
import os
import re
import sys
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium
import h5py
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
    """name of the task, as in stage 2 (default: the checkpoint's, or hopper-mini without --checkpoint)"""
    checkpoint: str = ""
    """a policy.pt or policy_best.pt of stage 2 (default: policy.pt of the run that --env, --seed and --exp-name name)"""
    compare: tuple[str, ...] = ()
    """further checkpoints of the same body, swept over the same targets into the same plot"""
    seed: int = 1
    """seed of the run to evaluate, and of the episodes"""
    dataset_path: tuple[str, ...] = ()
    """HDF5 file(s) whose returns to sweep and to show in the histogram (default: those the policy was trained on)"""
    runs_dir: str = "runs"
    """folder of all runs"""
    exp_name: str = "train_qalign_dt"
    """name of the experiment to evaluate; the run folder is <runs-dir>/<env>__<exp-name>__<seed>"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the policy runs; auto takes CUDA if there is one. The simulator uses all CPU cores"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """the transformer's arithmetic; auto: bfloat16 where the hardware has it"""
    rollouts: int = 30
    """episodes per target return"""
    target_step: float = 100.0
    """distance of two target returns, raw; 12 evenly spaced targets are used where this gives fewer"""
    trajectories: bool = False
    """also write behaviour.json and .png: forward velocity against target, and over time for five of the targets"""
    video: tuple[float, ...] = ()
    """also render up to 10 s of an episode for each of these target returns (raw), side by side, as video.gif (OpenGL)"""


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

# ======== shared: critic (the same text in pretrain_q.py, train_qalign_dt.py, evaluate_alignment.py) ========


class MLP(nn.Module):
    """n independent networks, computed side by side: three hidden layers (App. D.1), Mish (release), linear output.

    Call with x (..., inputs); returns (n, ...).
    """

    def __init__(self, n: int, inputs: int, width: int):
        super().__init__()
        sizes = [(inputs, width), (width, width), (width, width), (width, 1)]
        uniform = [(torch.empty(n, i, o), torch.empty(n, 1, o), i**-0.5) for i, o in sizes]  # as in nn.Linear
        self.weights = nn.ParameterList(weight.uniform_(-bound, bound) for weight, _, bound in uniform)
        self.biases = nn.ParameterList(bias.uniform_(-bound, bound) for _, bias, bound in uniform)

    def forward(self, x):
        rows = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1]).expand(len(self.weights[0]), -1, -1)  # (n, rows, inputs)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = torch.baddbmm(bias, x, weight)
            if i < len(self.weights) - 1:
                x = mish(x)
        return x.view(-1, *rows)


class DoubleQ(MLP):
    """Two independent Q networks.

    Call with obs (..., obs_dim) standardised and act (..., act_dim); returns (2, ...): discounted raw return.
    Always float32 with TF32 off: the alignment signal is the sign of a small difference of two large numbers.
    """

    def __init__(self, obs_dim: int, act_dim: int, width: int):
        super().__init__(2, obs_dim + act_dim, width)

    def forward(self, obs, act):
        return super().forward(torch.cat([obs, act], dim=-1))


# ======== end of shared: critic ========


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


def load_critic(trained: Trained) -> DoubleQ | None:
    """The critic in a stage 2 checkpoint, on its policy's device; None for a DT. Exits 2 if it is damaged."""
    task, cfg, weights = trained.task, trained.content["config"], trained.content.get("critic")
    if weights is None:
        return None
    try:
        critic = DoubleQ(task.obs_dim, task.act_dim, cfg["critic_width"])
        critic.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, RuntimeError):
        fail(f"{trained.path}: its weights do not have the shapes its configuration says; train it again")
    return critic.to(next(trained.policy.parameters()).device)


def target_returns(returns: np.ndarray, step: float) -> np.ndarray:
    """The dataset's lowest return, + step, ... up to its highest (raw); 12 evenly spaced ones if that gives fewer."""
    low, high = float(returns.min()), float(returns.max())
    targets = np.arange(low, high + 1e-9, step)
    return targets if len(targets) >= 12 else np.linspace(low, high, 12)


def alignment_rmse(scores: np.ndarray, target_scores: np.ndarray) -> float:
    """Eq. 8, in D4RL-score units: mean achieved score per target (n,), target scores (n,)."""
    return float(np.sqrt(np.mean((scores - target_scores) ** 2)))


def sweep(trained: Trained, targets: np.ndarray, high_targets, rollouts: int, seed: int) -> tuple[dict, np.ndarray]:
    """Roll out every target `rollouts` times, all as one batch, and summarise.

    Returns the record that alignment.json holds, and the forward velocity of every step (targets, rollouts, HORIZON), m/s,
    NaN after a rollout's end.
    """
    task, content, critic = trained.task, trained.content, load_critic(trained)
    every_target = np.repeat(np.concatenate([targets, high_targets]), rollouts)
    # reset seeds: every rollout of the sweep starts differently, every checkpoint in the same states
    seeds = np.random.SeedSequence(seed).generate_state(len(every_target)) >> 1
    with tqdm(
        total=HORIZON,
        unit="step",
        desc=f"{len(targets) + len(high_targets)} targets x {rollouts} rollouts",
        dynamic_ncols=True,
    ) as bar:
        obs_stats = content["obs_mean"], content["obs_std"]
        result = rollout(
            trained.policy, task, every_target, seeds, content["config"]["context_len"], *obs_stats, bar=bar
        )
    rows = []
    for j, target in enumerate(every_target[::rollouts]):
        one = slice(j * rollouts, (j + 1) * rollouts)
        returns, scores = result.returns[one], task.score(result.returns[one])
        rows.append({
            "target_return": float(target), "target_score": float(task.score(target)),
            "return_mean": float(returns.mean()), "return_std": float(returns.std()),
            "score_mean": float(scores.mean()), "score_std": float(scores.std()),
            "length_mean": float(result.lengths[one].mean()), "velocity_mean": float(result.velocity[one].mean()),
        })  # fmt: skip
    rows, high_rows = rows[: len(targets)], rows[len(targets) :]
    scores, target_scores = (np.array([row[k] for row in rows]) for k in ("score_mean", "target_score"))
    q_vs_return = q_vs_discounted = None
    if critic:  # Table E.19, over the rollouts of the whole sweep
        with torch.no_grad():
            q = critic(result.first_obs, result.first_act).amin(dim=0).cpu().numpy()
        swept = len(targets) * rollouts
        discounts = content["config"]["gamma"] ** np.arange(HORIZON)
        q_vs_return = rank_correlation(q[:swept], result.returns[:swept])
        q_vs_discounted = rank_correlation(q[:swept], np.nansum(result.rewards[:swept] * discounts, axis=1))
    record = trained.identity() | {
        "alignment_rmse": alignment_rmse(scores, target_scores),
        "best_score": float(scores.max()),
        "spearman_target_vs_real": rank_correlation(target_scores, scores),
        "spearman_q_vs_return": q_vs_return,
        "spearman_q_vs_discounted_return": q_vs_discounted,  # what Q is trained for
        "gamma": content["config"].get("gamma"),  # None for a DT
        "high_targets": high_rows,
        "sweep": rows,
    }
    return record, result.velocities.reshape(-1, rollouts, HORIZON)[: len(targets)]


def behaviour(record: dict, velocities: np.ndarray, handful: int = 5) -> list[dict]:
    """Figure 4's curves: for a handful of the sweep's targets, velocity at every step, mean and std over the rollouts
    that have not ended; `alive` says how many those are."""
    chosen = np.unique(np.linspace(0, len(record["sweep"]) - 1, handful).round().astype(int))
    curves = []
    for j in chosen:
        alive = (~np.isnan(velocities[j])).sum(axis=0)  # (HORIZON,)
        steps = velocities[j][:, alive > 0]
        curves.append({
            **{key: record["sweep"][j][key] for key in ("target_return", "target_score", "velocity_mean")},
            "alive": alive.tolist(), "velocity": np.nanmean(steps, axis=0).round(5).tolist(), "std": np.nanstd(steps, axis=0).round(5).tolist(),
        })  # fmt: skip
    return curves


# ======== shared: correlation (the same text in pretrain_q.py, evaluate_alignment.py) ========


def rank_correlation(x, y) -> float | None:
    """Spearman's; None where it is undefined: fewer than two values, or constant ones."""
    from scipy.stats import spearmanr  # imported here: it takes a while

    x, y = np.asarray(x), np.asarray(y)
    return float(spearmanr(x, y).statistic) if len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0 else None


# ======== end of shared: correlation ========


def plot(records: list[dict], task: "Task", returns: np.ndarray, title: str, file: str) -> None:
    """Achieved against target score, with the diagonal and a band of one std; below, the dataset's returns."""
    import matplotlib  # imported here: it takes a while

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, sharex=True, figsize=(7, 6.5), height_ratios=[4, 1], layout="constrained"
    )
    span = [task.score(returns.min()), task.score(returns.max())]
    top.plot(span, span, "--", color="0.5", linewidth=1, label="achieved = target")
    experiments = []  # seeds of one experiment share a colour
    for record in records:
        path = Path(record["checkpoint"])
        experiment = (path.parent.name.rpartition("__")[0], path.name)
        experiments += [experiment] * (experiment not in experiments)
        color = f"C{experiments.index(experiment) % 10}"
        x, y, std = (np.array([row[k] for row in record["sweep"]]) for k in ("target_score", "score_mean", "score_std"))
        top.plot(
            x,
            y,
            marker="o",
            markersize=3,
            color=color,
            label=f"{curve_label(record)}: RMSE {record['alignment_rmse']:.1f}",
        )
        top.fill_between(x, y - std, y + std, color=color, alpha=0.3 / (1 + len(records)), linewidth=0)
    top.set_ylabel("achieved score (mean, band: one std)")
    top.set_title(title, fontsize="small")
    top.legend(fontsize="small", loc="best")
    top.grid(alpha=0.3)
    counts, _, _ = bottom.hist(task.score(returns), bins=30, color="0.6")
    if counts.max() > 100:
        bottom.set_yscale("log")
    bottom.set_ylabel("episodes")
    bottom.set_xlabel("target score (0: random, 100: expert)")
    figure.savefig(file, format="png", dpi=130)
    plt.close(figure)


def plot_behaviour(records: list[dict], curves: list[dict], dt: float, title: str, file: str) -> None:
    """Figure 3: mean velocity against target; Figure 4: velocity over time for some targets, with a band of one std."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for record in records:
        x, y = ([row[key] for row in record["sweep"]] for key in ("target_return", "velocity_mean"))
        left.plot(x, y, marker="o", markersize=3, label=curve_label(record))
    left.set_xlabel("target return")
    left.set_ylabel("mean forward velocity (m/s)")
    left.legend(fontsize="small")
    colors = plt.cm.viridis(np.linspace(0, 0.9, len(curves)))
    for curve, color in zip(curves, colors):
        mean, std = np.array(curve["velocity"]), np.array(curve["std"])
        time = dt * np.arange(1, len(mean) + 1)
        right.plot(time, mean, color=color, linewidth=1, label=f"target {curve['target_return']:.0f}")
        right.fill_between(time, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
    right.set_xlabel("time (s), as long as a rollout goes on")
    right.set_ylabel(f"forward velocity (m/s), {curve_label(records[0])}")
    right.legend(fontsize="small")
    figure.suptitle(title, fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def make_renderer(env_id: str, width: int, height: int) -> mujoco.Renderer:
    """MuJoCo's offscreen renderer; exits 2 where no OpenGL works."""
    try:
        with warnings.catch_warnings(action="ignore"):  # GLFW comments on its own; the line below is enough
            return mujoco.Renderer(make_env(env_id).model, height, width)
    except Exception as error:  # each OpenGL backend has kinds of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fail(f"--video: MuJoCo finds no OpenGL here ({reason[:80]}); without a screen, set MUJOCO_GL=egl")


def video(trained: Trained, targets, seed: int, renderer: mujoco.Renderer, file: str) -> None:
    """An episode per raw target return from the same initial state, side by side, as a GIF: up to 10 s, 12 pictures a second."""
    from PIL import Image, ImageDraw

    task, content = trained.task, trained.content
    obs_stats = content["obs_mean"], content["obs_std"]
    K, seeds = content["config"]["context_len"], [seed] * len(targets)
    result = rollout(trained.policy, task, targets, seeds, K, *obs_stats, keep_qpos=True)
    env = make_env(task.env_id)
    stride, steps = max(1, round(0.08 / env.dt)), min(int(result.lengths.max()), round(10 / env.dt))
    pictures = []
    for t in range(0, steps, stride):
        panels = []
        for i, target in enumerate(targets):
            now = min(t, int(result.lengths[i]) - 1)
            env.data.qpos[:], env.data.qvel[:] = result.qpos[i, now], 0
            mujoco.mj_forward(env.model, env.data)
            renderer.update_scene(env.data, camera="track")
            panel = Image.fromarray(renderer.render())
            left = target - result.rewards[i, : now + 1].sum()
            lines = [f"asked for {target:.0f}", f"left {left:.0f}", f"{result.velocities[i, now]:.1f} m/s"]
            if t > now:
                lines[2] = f"ended at step {now + 1}"
            ImageDraw.Draw(panel).multiline_text((6, 4), "\n".join(lines), fill=(255, 255, 255))
            panels.append(np.asarray(panel))
        pictures.append(Image.fromarray(np.concatenate(panels, axis=1)).quantize(48))
    duration = round(1000 * stride * env.dt)  # ms: real time
    pictures[0].save(file, format="GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    args = tyro.cli(Args, description=__doc__)
    keep_freed_memory()
    task = parse_env(args.env or "hopper-mini") if args.env or not args.checkpoint else None
    device = pick_device(args.device)
    check_seed(args.seed)
    if args.rollouts < 1 or not args.target_step > 0:
        fail("--rollouts must be at least 1 and --target-step positive")
    if not np.isfinite(args.video).all():
        fail(f"--video {' '.join(map(str, args.video))}: target returns must be finite")
    path = (
        Path(args.checkpoint)
        if args.checkpoint
        else Path(args.runs_dir) / f"{task.name}__{args.exp_name}__{args.seed}" / "policy.pt"
    )
    trained = load_policy(path, args.precision, device)
    if task and task.name != trained.task.name:
        fail(f"{path} was trained on --env {trained.task.name}, not {task.name}")
    task = trained.task
    others = [load_policy(Path(p), args.precision, device) for p in args.compare]
    for other in others:
        if other.task.body != task.body:
            fail(f"{other.path} is a policy of {other.task.body}, not {task.body}; --compare needs the same body")
    if task.env_id is None:
        fail(f"{task.name}: there is no AntMaze simulator here yet, so its policies cannot be rolled out")
    data, returns = trained.content["data"], trained.content["episode_returns"].numpy()
    if args.dataset_path:
        dataset = read_dataset(task, args.dataset_path)
        data, returns = dataset.summary(), dataset.returns
    folder, suffix = path.parent, "_best" * (path.name == "policy_best.pt")
    stem = f"alignment{suffix}"
    if not os.access(folder, os.W_OK):
        fail(f"{folder}: cannot write {stem}.json there; copy the checkpoint to a folder of your own")

    renderer = make_renderer(task.env_id, 240, 200) if args.video else None
    for one in (trained, *others):
        if not one.content.get("finished", True):
            print(f"note: {one.path} is at step {one.content['step']:,} and not finished")
    targets = target_returns(returns, args.target_step)
    high_targets = task.high_targets if data["is_d4rl"] else tuple(float(returns.max()) * x for x in (1.0, 1.2))
    swept = [sweep(x, targets, high_targets, args.rollouts, args.seed) for x in (trained, *others)]
    records = [record for record, _ in swept]
    result = {
        "dataset": data,
        "rollouts": args.rollouts,
        "episode_seed": args.seed,
        "device": device.type,
        "precision": "bf16" if trained.policy.bf16 else "fp32",
    } | records[0]
    if others:
        result["compare"] = records[1:]
    rows = [
        {"checkpoint": record["checkpoint"], "seed": record["seed"], "kind": kind} | row
        for record in records
        for kind in ("sweep", "high_targets")
        for row in record[kind]
    ]
    title = f"{data['label']}\n{args.rollouts} rollouts per target"
    files = write_results(folder, stem, result, rows, lambda file: plot(records, task, returns, title, file))
    for record in records:
        high = ", ".join(
            f"{row['score_mean']:.1f} at target {row['target_return']:.0f}" for row in record["high_targets"]
        )
        summary = f"alignment RMSE {record['alignment_rmse']:.2f}, best score {record['best_score']:.1f}, {high}"
        print(f"{record['checkpoint']}: {summary}")
    print(f"{data['label']}: {files[0]}, {files[1].name}, picture {files[2]}")
    if args.trajectories:
        curves, dt = behaviour(records[0], swept[0][1]), make_env(task.env_id).dt
        lines = [
            {key: row[key] for key in ("target_return", "velocity_mean", "length_mean")} for row in records[0]["sweep"]
        ]
        result = trained.identity() | {
            "rollouts": args.rollouts,
            "seconds_per_step": dt,
            "targets": lines,
            "over_time": curves,
        }
        stem = stem.replace("alignment", "behaviour")
        files = write_results(
            folder, stem, result, lines, lambda file: plot_behaviour(records, curves, dt, title, file)
        )
        print(f"forward velocity: {files[0]}, {files[1].name}, picture {files[2]}")
    if args.video:
        file = folder / f"video{suffix}.gif"
        video(trained, args.video, args.seed, renderer, f"{file}.{os.getpid()}.tmp")
        os.replace(f"{file}.{os.getpid()}.tmp", file)
        print(f"one episode for each of {len(args.video)} targets: {file}")


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

# ======== shared: dataset (the same text in pretrain_q.py, train_qalign_dt.py, evaluate_alignment.py) ========

D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl"


@dataclass
class Dataset:
    """Transitions of complete episodes, one episode after the other (N transitions, E episodes)."""

    observations: np.ndarray  # (N, obs_dim) float32, raw
    actions: np.ndarray  # (N, act_dim) float32, in [-1, 1]
    rewards: np.ndarray  # (N,) float32, raw
    terminals: np.ndarray  # (N,) bool: the MDP ended; the other episodes end by timeout
    ends: np.ndarray  # (E,) int64, exclusive
    files: list[str]
    is_d4rl: bool  # D4RL's own file; False for everything given with --dataset-path or found in data/
    hash: str
    label: str  # how plots, logs and JSON call the data
    clipped: int  # how many actions the file had outside [-1, 1]

    def __post_init__(self):
        self.starts = np.concatenate([[0], self.ends[:-1]])
        self.lengths = self.ends - self.starts
        self.returns = np.add.reduceat(self.rewards, self.starts, dtype=np.float64)  # (E,) undiscounted
        self.obs_mean = torch.as_tensor(self.observations.mean(axis=0, dtype=np.float64), dtype=torch.float32)
        self.obs_std = torch.as_tensor(self.observations.std(axis=0, dtype=np.float64) + 1e-6, dtype=torch.float32)

    def returns_to_go(self) -> np.ndarray:
        """(N,) raw, undiscounted: sum of r_i from each transition to the end of its episode."""
        total = np.cumsum(self.rewards, dtype=np.float64)
        return total[np.repeat(self.ends, self.lengths) - 1] - total + self.rewards

    def summary(self) -> dict:
        return {"files": self.files, "hash": self.hash, "label": self.label, "is_d4rl": self.is_d4rl}


def read_dataset(task: Task, dataset_path: tuple[str, ...]) -> Dataset:
    """The data of a task, from --dataset-path, data/<env>.hdf5 or D4RL (downloaded once); exits 2 on impossible data."""
    if dataset_path:
        paths = [Path(p) for p in dataset_path]
    elif task.tag == "v2":
        paths = [d4rl_file(task)]
    else:
        paths = [Path(__file__).resolve().parent / "data" / f"{task.name}.hdf5"]
        if not paths[0].is_file():
            fail(
                f"--env {task.name} is not a D4RL v2 name and has no {paths[0]}: make it with collect_dataset.py, "
                "or give data with --dataset-path FILE"
            )
    parts = [read_hdf5(path, task) for path in paths]
    arrays = parts[0] if len(parts) == 1 else [np.concatenate(arrays) for arrays in zip(*parts)]
    observations, actions, rewards, terminals, episode_end = arrays
    clipped = int((np.abs(actions) > 1).any(axis=1).sum())
    if clipped:
        actions = actions.clip(-1, 1)
    ends = np.flatnonzero(episode_end) + 1
    files, is_d4rl = [path.name for path in paths], not dataset_path and task.tag == "v2"
    label = f"{task.name} (D4RL)" if is_d4rl else f"{task.body} data, not D4RL: {' + '.join(files)}"
    hash = tensor_hash([observations, actions, rewards, terminals, ends])
    return Dataset(observations, actions, rewards, terminals, ends, files, is_d4rl, hash, label, clipped)


def read_hdf5(path: Path, task: Task) -> list[np.ndarray]:
    """One file in D4RL's layout, checked, without its incomplete last episode.

    Returns observations, actions, rewards, terminals, and where episodes end; shapes as in Dataset, the last (N,) bool.
    """
    if not path.is_file():
        fail(f"{path}: no such dataset file; check --dataset-path")
    keys = ("observations", "actions", "rewards", "terminals", "timeouts")
    try:
        with h5py.File(path, "r") as f:
            if missing := [k for k in keys if not isinstance(f.get(k), h5py.Dataset)]:
                fail(f"{path}: no array {missing[0]!r}; D4RL's layout has {', '.join(keys)}")
            if odd := [k for k in keys if f[k].dtype.kind not in "biuf" or f[k].ndim == 0]:
                fail(f"{path}: {odd[0]} is not an array of numbers")
            arrays = [f[k][()] for k in keys]
    except OSError:
        fail(f"{path}: truncated, or not an HDF5 file; get it again")
    N = len(arrays[0])
    for key, shape, i in zip(keys, ((N, task.obs_dim), (N, task.act_dim), (N,), (N,), (N,)), range(5)):
        if arrays[i].shape == (*shape, 1):  # rewards and flags may be columns
            arrays[i] = arrays[i].reshape(shape)
        if arrays[i].shape != shape:
            fail(f"{path}: {key} has shape {arrays[i].shape}, {task.body} with {N:,} observations needs {shape}")
    for i, key in enumerate(keys):
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused with the rest
            x = arrays[i].astype(np.float32, copy=False)
        if not np.isfinite(x).all():
            fail(f"{path}: {key} has a NaN or infinite value, first in row {int(np.argwhere(~np.isfinite(x))[0][0]):,}")
        arrays[i] = x if i < 3 else arrays[i].astype(bool, copy=False)
    observations, actions, rewards, terminals, timeouts = arrays
    if task.body == "ant" and observations[:, 27:].any():
        fail(f"{path}: the last 84 of Ant's 111 observations, contact forces, must be zero as in D4RL: Ant-v4 has none")
    episode_end = terminals | timeouts
    if not episode_end.any():
        fail(f"{path}: no complete episode (terminals and timeouts are all False)")
    n = int(np.flatnonzero(episode_end)[-1]) + 1
    return [x[:n] for x in (observations, actions, rewards, terminals, episode_end)]


def d4rl_file(task: Task) -> Path:
    """D4RL's file of a -v2 name in D4RL's cache folder; downloaded if it is missing, renamed only when it is whole."""
    if task.body == "antmaze":
        url = f"{D4RL_URL}/ant_maze_v2/Ant_maze_{MAZES[task.quality]}_sparse_fixed.hdf5"
    else:
        url = f"{D4RL_URL}/gym_mujoco_v2/{task.body}_{task.quality.replace('-', '_')}-v2.hdf5"
    path = Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets") / url.rpartition("/")[2]
    if path.is_file():
        return path
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            path.parent.mkdir(parents=True, exist_ok=True)
            size = int(response.headers.get("Content-Length") or 0)
            with open(part, "wb") as f, tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := response.read(1 << 20):
                    f.write(block)
                    bar.update(len(block))
        if size and part.stat().st_size != size:
            raise OSError(f"{part.stat().st_size:,} of {size:,} bytes arrived")
        h5py.File(part, "r").close()
        os.replace(part, path)
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and h5py's errors are OSErrors
        fail(f"cannot download {url} ({error}); put the file at {path}, or give --dataset-path FILE")
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return path


# ======== end of shared: dataset ========

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
        fail("interrupted; files named above are whole, the others were not written", code=130)
