"""Stage 3 of Q-Align DT: does the policy achieve the return it is conditioned on? The RTG sweep (Sec. 6.2, App. D.6).

    python evaluate_alignment.py --env hopper-medium-v2

Conditions a trained policy on every return from the dataset's lowest to its highest in steps of 100, rolls each target
out --rollouts times, and reports the alignment error, Eq. 8: the root mean square, over the targets, of (mean achieved
score - target score). Writes alignment.json, .csv and .png beside the checkpoint.
--trajectories adds the forward velocity against the target and over time (Figures 3 and 4), --percentiles the error
that RADT's authors report, --video a GIF. Policies of baselines/ are evaluated in the same way.
"""

import ctypes
import difflib
import importlib.util
import io
import json
import math
import os
import re
import sys
import time
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    # name of the task, as in stage 2 (default: the checkpoint's, or hopper-mini without --checkpoint)
    env: str | None = None
    # a policy.pt or policy_best.pt (default: policy.pt of the run that --env, --seed and --exp-name name)
    checkpoint: str = ""
    # further checkpoints of the same body, swept over the same targets into the same plot
    compare: tuple[str, ...] = ()
    seed: int = 1  # seed of the run to evaluate, and of the episodes
    runs_dir: str = "runs"  # folder of all runs
    # name of the experiment to evaluate; the run folder is <runs-dir>/<env>__<exp-name>__<seed>
    exp_name: str = "train_qalign_dt"
    # where the policy runs; auto takes CUDA if there is one. The simulator uses all CPU cores
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # arithmetic of the transformer's blocks; auto: bf16 where the hardware has it
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # only the score at high target returns (the release's; for own data 1.0 and 1.2 times its best return): the paper's
    # protocol, into high_targets.json and .csv. AntMaze, whose returns are 0 and 1, is always evaluated so
    high_targets: bool = False
    # how the policy is asked, with --high-targets: by the return-to-go, or by a mode of the baseline's own, whose
    # answer does not depend on the target (plan: VDT's Algorithm 3; best, softmax: QT's choice by Q)
    inference: Literal["request", "plan", "best", "softmax"] = "request"
    # how many of the last steps the policy sees when it acts (default: stage 2's --eval-context-len). The names of the
    # files then say so: alignment_context_<n>
    context: int | None = None
    # episodes per target return (default: 30; --high-targets: 50; AntMaze, and --percentiles on CUDA: 100)
    rollouts: int | None = None
    # distance between two target returns, raw; 12 evenly spaced targets where this gives fewer
    target_step: float = 100.0
    # also the mean absolute error of seven targets, evenly spaced from the 5th to the 95th percentile of the data's
    # returns (RADT's protocol), the number of parameters, and the time per action
    percentiles: bool = False
    # also write the forward velocity against the target, and over time for five of the targets
    trajectories: bool = False
    # only write the policy for torch.export.load to this file (.pt2): from raw numbers to an action, any batch size
    export: str = ""
    # also render up to 10 s of an episode for each of these target returns (raw), side by side (needs OpenGL)
    video: tuple[float, ...] = ()

    def __post_init__(self):
        check_args(self, {"rollouts": 1, "target_step": 1, "video": -1e9, "context": 1})
        for name in ("trajectories", "percentiles"):
            if self.high_targets and getattr(self, name):
                raise ValueError(f"--{name} needs the whole sweep: leave out --high-targets")
        if self.inference != "request" and (not self.high_targets or self.video or self.export or self.context):
            text = "its answer does not depend on the target: with --high-targets only, no --video, --export, --context"
            raise ValueError(f"--inference {self.inference}: {text}")


# ======== shared: policy ========


class Block(nn.Module):
    """Pre-LN transformer block: causal attention, then a GELU MLP of four times the width."""

    def __init__(self, width: int, heads: int, conv: bool, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        # App. D.1: a convolution over the token axis, window 6, one each for q, k and v
        self.conv = nn.Conv2d(3 * width, 3 * width, (1, 6), groups=3) if conv else None
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def attend(self, x, keep, bias, last: int):  # (B, T, D), (B, T, 1), (B, 1, T, T) -> (B, last, D)
        # Padding must not leak: W_q, W_k, W_v have biases, so padded tokens are zeroed again before the convolution,
        # which then sees to the left of a short window the same zeros as it would without any padding.
        qkv = self.qkv(x) * keep
        if self.conv:  # in two dimensions and padded first, it is channels-last in memory: the fastest layout
            qkv = self.conv(F.pad(qkv, (0, 0, 5, 0)).transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv.chunk(3, dim=-1))  # (B, H, T, D / H)
        # written out: with dropout and 60 tokens this is faster than scaled_dot_product_attention
        logits = (q[:, :, -last:] * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        weights = torch.softmax(logits.float().add_(bias[..., -last:, :]), dim=-1)
        y = self.dropout(weights.to(logits.dtype)) @ v
        return self.dropout(self.out(y.transpose(1, 2).flatten(-2)))

    def forward(self, x, keep, bias, last: int):
        x = x[:, -last:] + self.attend(self.norm1(x), keep, bias, last)
        return x + self.mlp(self.norm2(x))


class Policy(nn.Module):
    """Decision Transformer over tokens (rtg_0, s_0, a_0, rtg_1, ...); heads rtg -> state, state -> action (App. D.1).

    Call with rtg (B, K) normalised, obs (B, K, obs_dim) standardised, act (B, K, act_dim) in [-1, 1], timestep (B, K)
    int64 in [0, max_timestep) and valid (B, K) bool, False on the left padding; returns a_hat (B, K, act_dim) and
    s_hat (B, K, obs_dim), both float32. The action at step t depends on no token after s_t, and on no padding.
    """

    eval_context_len = 0  # act depends on the last so many steps; 0: on all

    def __init__(self, obs_dim, act_dim, embed_dim, n_layer, n_head, max_timestep, conv=True, dropout=0.1, bf16=False):
        super().__init__()
        self.bf16, self.dropout = bf16, nn.Dropout(dropout)
        self.embed_rtg, self.embed_obs, self.embed_act = (nn.Linear(n, embed_dim) for n in (1, obs_dim, act_dim))
        self.embed_time = nn.Embedding(max_timestep, embed_dim)
        self.norm_in, self.norm_out = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, n_head, conv, dropout) for _ in range(n_layer))
        self.action_head, self.state_head = nn.Linear(embed_dim, act_dim), nn.Linear(embed_dim, obs_dim)
        for module in self.modules():  # GPT-2's initialisation
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, rtg, obs, act, timestep, valid):
        x = self.hidden(rtg, obs, act, timestep, valid, last=3 * rtg.shape[1]).unflatten(1, (-1, 3))  # (B, K, 3, D)
        return torch.tanh(self.action_head(x[:, :, 1])), self.state_head(x[:, :, 0])

    def act(self, rtg, obs, act, timestep, valid):
        """Only a_hat of the windows' last step (B, act_dim), for rollouts: the last block computes nothing else."""
        recent = (x[:, -self.eval_context_len :] for x in (rtg, obs, act, timestep, valid))
        s_t, _ = self.hidden(*recent, last=2).unbind(dim=1)
        return torch.tanh(self.action_head(s_t))

    def hidden(self, rtg, obs, act, timestep, valid, last: int):  # -> (B, last, D) float32, of the last tokens
        T, device = 3 * rtg.shape[1], rtg.device
        keep = valid.repeat_interleave(3, dim=1)  # (B, T)
        causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        # a padded query attends to itself, so that no row of the softmax is empty; no valid query attends to padding
        mask = causal & (keep[:, None, None, :] | torch.eye(T, dtype=torch.bool, device=device))  # (B, 1, T, T)
        bias = torch.zeros(mask.shape, device=device).masked_fill(~mask, -math.inf)
        # embeddings and heads in float32: in bfloat16 an RTG of 3.000 and one of 3.005 would be the same number
        time = self.embed_time(timestep)
        tokens = (self.embed_rtg(rtg[..., None]) + time, self.embed_obs(obs) + time, self.embed_act(act) + time)
        x = self.dropout(self.norm_in(torch.stack(tokens, dim=2).flatten(1, 2)))  # rtg_0, s_0, a_0, rtg_1, ...
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            for i, block in enumerate(self.blocks, 1):
                x = block(x, keep[..., None], bias, last if i == len(self.blocks) else T)
        return self.norm_out(x.float())


def make_policy(task: "Task", config: dict, bf16: bool) -> Policy:
    """The policy that a checkpoint's configuration describes (randomly initialised from torch's global generator)."""
    sizes = (config[name] for name in ("embed_dim", "n_layer", "n_head", "max_timestep", "conv", "dropout"))
    policy = Policy(task.obs_dim, task.act_dim, *sizes, bf16=bf16)
    policy.eval_context_len = config.get("eval_context_len") or 0  # a baseline has none
    return policy


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether the blocks run in bfloat16; `auto`: where the hardware multiplies it, as CUDA, AMX and AVX-512 can."""
    if precision == "auto" and device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        cpu = torch.cpu.get_capabilities()
        return cpu.get("amx_bf16", False) or cpu.get("avx512_bf16", False)
    return precision == "bf16"


# ======== end of shared: policy ========

# ======== shared: critic ========


class MLP(nn.Module):
    """n independent networks, computed side by side: three hidden layers (App. D.1), Mish (release), linear output.

    The critic is two of them: call with obs (..., obs_dim) standardised and act (..., act_dim); returns (n, ...), the
    discounted raw return. Always float32, TF32 off: the alignment signal is a small difference of two large numbers.
    """

    def __init__(self, n: int, inputs: int, width: int):
        super().__init__()
        sizes = [(inputs, width), (width, width), (width, width), (width, 1)]
        uniform = [(torch.empty(n, i, o), torch.empty(n, 1, o), i**-0.5) for i, o in sizes]  # as in nn.Linear
        self.weights = nn.ParameterList(weight.uniform_(-bound, bound) for weight, _, bound in uniform)
        self.biases = nn.ParameterList(bias.uniform_(-bound, bound) for _, bias, bound in uniform)

    def forward(self, *inputs):
        x = torch.cat(inputs, dim=-1)
        rows = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1]).expand(len(self.weights[0]), -1, -1)  # (n, rows, inputs)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
            x = F.mish(torch.baddbmm(bias, x, weight))
        return torch.baddbmm(self.biases[-1], x, self.weights[-1]).view(len(x), *rows)


# ======== end of shared: critic ========


# ======== shared: rollout ========


class Rollouts(NamedTuple):
    """n finished episodes, in the order of their targets; after an episode's end the per-step arrays hold NaN."""

    returns: np.ndarray  # (n,) raw
    lengths: np.ndarray  # (n,)
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
def rollout(trained, targets, seeds, horizon: int, what: str, reward_function=None, keep_qpos=False) -> Rollouts:
    """Roll the policy out once per (raw target return, seed), all in lockstep as one batch.

    The context is the last K steps, padded and masked as in training; the RTG token starts at target / rtg_scale and
    falls by every reward, RTG_{t+1} = RTG_t - r_t: the environment's, or reward_function(velocities (m,), actions (m,
    act_dim)). A rollout that has ended leaves the batch.
    """
    policy, task, content = trained.policy, trained.task, trained.content
    n, K, device = len(targets), content["config"]["context_len"], next(policy.parameters()).device
    simulator, targets = Simulator(task.env_id, seeds), np.asarray(targets, dtype=np.float64)
    obs_mean, obs_std = content["obs_mean"].to(device), content["obs_std"].to(device)
    # histories start with K - 1 steps of padding, so that the context of step t is always [t, t + K)
    sizes = ((), obs_mean.shape, (task.act_dim,))
    rtg, obs, act = (torch.zeros(n, horizon + K - 1, *size, device=device) for size in sizes)
    timestep = torch.arange(1 - K, horizon, device=device)
    alive, returns, lengths = np.arange(n), np.zeros(n), np.zeros(n, dtype=np.int64)
    rewards, velocities = np.full((2, n, horizon), np.nan)
    qpos = np.full((n, horizon, simulator.model.nq), np.nan) if keep_qpos else None
    observation = simulator.observe(alive)
    for t in (bar := tqdm(range(horizon), unit="step", desc=what, dynamic_ncols=True, disable=None)):
        rows, now, window = torch.as_tensor(alive, device=device), t + K - 1, slice(t, t + K)
        obs[rows, now] = (torch.as_tensor(observation, dtype=torch.float32, device=device) - obs_mean) / obs_std
        rtg_now = (targets[alive] - returns[alive]) / task.rtg_scale
        rtg[rows, now] = torch.as_tensor(rtg_now, dtype=torch.float32, device=device)
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
        bar.set_postfix_str(f"{len(alive)} of {n} rollouts alive")
        if len(alive) == 0:
            break
    return Rollouts(returns, lengths, rewards, velocities, obs[:, K - 1], act[:, K - 1], qpos)


# ======== end of shared: rollout ========


def load_critic(trained: "Trained") -> MLP | None:
    """The critic of a stage 2 checkpoint, on its policy's device; None where there was no alignment loss."""
    task, config, weights = trained.task, trained.content["config"], trained.content.get("critic")
    if weights is None:
        return None
    try:
        critic = MLP(2, task.obs_dim + task.act_dim, config["critic_width"])
        critic.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        fail(f"{trained.path}: its critic is not whole ({one_line(error)}); train it again")
    return critic.to(next(trained.policy.parameters()).device)


def target_returns(returns: np.ndarray, step: float) -> np.ndarray:
    """The dataset's lowest return, + step, ... up to its highest (raw); 12 evenly spaced ones if that gives fewer."""
    targets = np.arange(returns.min(), returns.max() + 1e-9, step)
    return targets if len(targets) >= 12 else np.linspace(returns.min(), returns.max(), 12)


def alignment_rmse(scores: np.ndarray, target_scores: np.ndarray) -> float:
    """Eq. 8, in D4RL-score units: mean achieved score per target (n,), target scores (n,)."""
    return float(np.sqrt(np.mean((scores - target_scores) ** 2)))


def percentile_targets(returns: np.ndarray) -> np.ndarray:
    """RADT's seven target returns (raw)."""
    return np.linspace(*np.percentile(returns, (5, 95)), 7)


def absolute_error(achieved, targets, span: float) -> tuple[float, float | None]:
    """RADT's error: mean over the targets of |mean return - target|, raw, and divided by a span of returns if not 0."""
    error = float(np.abs(np.asarray(achieved) - np.asarray(targets)).mean())
    return error, error / span if span > 0 else None


@torch.no_grad()
def seconds_per_action(trained: "Trained", repeats: int = 20) -> float:
    """Median time of one action for one window, on the policy's device (s)."""
    K, task, device = trained.content["config"]["context_len"], trained.task, next(trained.policy.parameters()).device
    rtg, obs, act = (torch.zeros(1, K, *size, device=device) for size in ((), (task.obs_dim,), (task.act_dim,)))
    timestep, times = torch.arange(K, device=device)[None], []
    for _ in range(repeats):
        start = time.perf_counter()
        trained.policy.act(rtg, obs, act, timestep, timestep >= 0).cpu()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def roll_out(trained: "Trained", targets, rollouts: int, seed: int) -> tuple[list[dict], "Rollouts"]:
    """Every target `rollouts` times, all as one batch: a row of means per target, and the rollouts themselves."""
    task, every_target = trained.task, np.repeat(targets, rollouts)
    # every rollout starts differently, every checkpoint in the same states
    seeds = np.random.SeedSequence(seed).generate_state(len(every_target)) >> 1
    what = f"{len(targets)} targets x {rollouts} rollouts"
    result, rows = rollout(trained, every_target, seeds, task.horizon, what), []
    for j, target in enumerate(targets):
        one = slice(j * rollouts, (j + 1) * rollouts)
        row = {"target_return": float(target), "target_score": float(task.score(target))}
        for name, x in (("return", result.returns[one]), ("score", task.score(result.returns[one]))):
            row |= {f"{name}_mean": float(x.mean()), f"{name}_std": float(x.std())}
        row |= {"length_mean": float(result.lengths[one].mean()), "velocity_mean": float(result.velocity[one].mean())}
        rows.append(row)
    return rows, result


def sweep(
    trained: "Trained", targets: np.ndarray, high_targets, rollouts: int, seed: int, percentiles=()
) -> tuple[dict, np.ndarray]:
    """The record that alignment.json holds, and the forward velocity of every step (targets, rollouts, horizon) in m/s,
    NaN after a rollout's end.
    """
    task, critic = trained.task, load_critic(trained)
    every_row, result = roll_out(trained, np.concatenate([targets, high_targets, percentiles]), rollouts, seed)
    rows, others = every_row[: len(targets)], every_row[len(targets) :]
    scores, target_scores = (np.array([row[k] for row in rows]) for k in ("score_mean", "target_score"))
    record = trained.identity() | {
        "alignment_rmse": alignment_rmse(scores, target_scores),
        "best_score": float(scores.max()),
        "spearman_target_vs_real": rank_correlation(target_scores, scores),
    }
    if critic:  # Table E.19, over the sweep's rollouts (stage 1's report.json: over the data); Q is a discounted return
        with torch.no_grad():
            q = critic(result.first_obs, result.first_act).amin(dim=0).cpu().numpy()[: len(targets) * rollouts]
        discounts = trained.content["config"]["gamma"] ** np.arange(task.horizon)
        discounted = np.nansum(result.rewards * discounts, axis=1)
        record["spearman_q_vs_return"] = rank_correlation(q, result.returns[: len(q)])
        record["spearman_q_vs_discounted_return"] = rank_correlation(q, discounted[: len(q)])
    record |= {"high_targets": others[: len(high_targets)], "sweep": rows}
    if len(percentiles):
        record["percentiles"] = others[len(high_targets) :]
        achieved = [row["return_mean"] for row in record["percentiles"]]
        errors = absolute_error(achieved, percentiles, percentiles[-1] - percentiles[0])
        record |= dict(zip(("absolute_error", "absolute_error_of_range"), errors))
        record["parameters"] = sum(weight.numel() for weight in trained.policy.parameters())
        record["seconds_per_action"] = seconds_per_action(trained)
    velocities = result.velocities.reshape(-1, rollouts, task.horizon)[: len(targets)]
    return record, velocities


def behaviour(record: dict, velocities: np.ndarray, handful: int = 5) -> list[dict]:
    """Figure 4: for a handful of targets, velocity at every step, mean and std over the rollouts still alive."""
    curves = []
    for j in np.unique(np.linspace(0, len(record["sweep"]) - 1, handful).round().astype(int)):
        alive = (~np.isnan(velocities[j])).sum(axis=0)  # (HORIZON,)
        steps, row = velocities[j][:, alive > 0], record["sweep"][j]
        mean, std = np.nanmean(steps, axis=0).round(5).tolist(), np.nanstd(steps, axis=0).round(5).tolist()
        curves.append({"target_return": row["target_return"], "alive": alive.tolist(), "velocity": mean, "std": std})
    return curves


# ======== shared: correlation ========


def rank_correlation(x, y) -> float | None:
    """Spearman's; None where it is undefined: fewer than two values, or constant ones."""
    from scipy.stats import spearmanr  # imported here: it takes a while

    x, y = np.asarray(x), np.asarray(y)
    return float(spearmanr(x, y).statistic) if len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0 else None


# ======== end of shared: correlation ========


def plot(records: list[dict], task: "Task", returns: np.ndarray, title: str):
    """Achieved against target score, with the diagonal and a band of one std; below, the dataset's returns."""
    figure, (top, bottom) = new_figure(2, 1, sharex=True, figsize=(7, 6.5), height_ratios=[4, 1])
    span = [task.score(returns.min()), task.score(returns.max())]
    top.plot(span, span, "--", color="0.5", linewidth=1, label="achieved = target")
    methods = list(dict.fromkeys(record["method"] for record in records))  # seeds of one method share a colour
    for record in records:
        x, y, std = (np.array([row[k] for row in record["sweep"]]) for k in ("target_score", "score_mean", "score_std"))
        label, color = f"{label_of(record)}: RMSE {record['alignment_rmse']:.1f}", f"C{methods.index(record['method'])}"
        top.plot(x, y, marker="o", markersize=3, color=color, label=label)
        top.fill_between(x, y - std, y + std, color=color, alpha=0.3 / (1 + len(records)), linewidth=0)
    top.set(ylabel="achieved score (mean, band: one std)", xlabel=f"target {task.score_name}")
    top.legend(fontsize="small")
    bottom.hist(task.score(returns), bins=30, color="0.6")
    bottom.set(ylabel="episodes of the data", xlabel=f"target {task.score_name}")
    figure.suptitle(title, fontsize="small")
    return figure


def plot_behaviour(records: list[dict], curves: list[dict], seconds_per_step: float, title: str):
    """Figure 3: mean velocity against target; Figure 4: velocity over time for some targets, with a band of one std."""
    figure, (left, right) = new_figure(1, 2, figsize=(11, 4.2))
    for record in records:
        x, y = ([row[key] for row in record["sweep"]] for key in ("target_return", "velocity_mean"))
        left.plot(x, y, marker="o", markersize=3, label=label_of(record))
    left.set(xlabel="target return", ylabel="mean forward velocity (m/s)")
    for i, curve in enumerate(curves):
        mean, std = np.array(curve["velocity"]), np.array(curve["std"])
        time, color = seconds_per_step * np.arange(1, len(mean) + 1), (0.1 + 0.2 * i, 0.3, 0.9 - 0.2 * i)
        right.plot(time, mean, color=color, linewidth=1, label=f"target {curve['target_return']:.0f}")
        right.fill_between(time, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
    right.set(xlabel="time (s), while any rollout lasts", ylabel="forward velocity (m/s)")
    right.set_title(label_of(records[0]), fontsize="small")
    for axes in (left, right):
        axes.legend(fontsize="small")
    figure.suptitle(title, fontsize="small")
    return figure


def with_context(trained: "Trained", context: int | None) -> "Trained":
    """The checkpoint, its policy acting on the last `context` steps (None: as stage 2 said); exits 2 if K < context."""
    K = trained.content["config"]["context_len"]
    if context and context > K:
        fail(f"--context {context}: {trained.path} was trained on windows of K = {K} steps")
    if context:
        trained.content["config"]["context_len"], trained.policy.eval_context_len = context, 0
    return trained


def with_inference(trained: "Trained", name: str) -> "Trained":
    """The checkpoint with its policy wrapped in a mode of its baseline's own; exits 2 if it has none of that name."""
    stage, content = trained.content["stage"], trained.content
    modes = getattr(baseline(stage), "INFERENCE", {}) if stage in BASELINES else {}
    if name not in modes:
        fail(f"{trained.path}: {stage}.py has no --inference {name}")
    try:
        return trained._replace(policy=modes[name](trained.task, content, trained.policy))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        fail(f"{trained.path}: --inference {name}: {one_line(error)}")


class Raw(nn.Module):
    """The policy from windows of raw returns-to-go, observations and actions to its action (B, act_dim)."""

    def __init__(self, trained: "Trained"):
        super().__init__()
        self.policy, self.rtg_scale = trained.policy, trained.task.rtg_scale
        self.register_buffer("obs_mean", trained.content["obs_mean"])
        self.register_buffer("obs_std", trained.content["obs_std"])

    def forward(self, rtg, obs, act, timestep, valid):  # (B, K), (B, K, obs_dim), (B, K, act_dim), (B, K), (B, K)
        return self.policy.act(rtg / self.rtg_scale, (obs - self.obs_mean) / self.obs_std, act, timestep, valid)


def export(trained: "Trained", path: Path) -> None:
    """Write torch.export's program of a policy that is on the CPU and in float32."""
    K, task, file = trained.content["config"]["context_len"], trained.task, io.BytesIO()
    example = (torch.zeros(2, K), torch.zeros(2, K, task.obs_dim), torch.zeros(2, K, task.act_dim))
    example += (torch.zeros(2, K, dtype=torch.int64), torch.ones(2, K, dtype=torch.bool))
    batch = [{0: torch.export.Dim.DYNAMIC}] * len(example)
    torch.export.save(torch.export.export(Raw(trained).eval(), example, dynamic_shapes=batch), file)
    write_file(path, file.getvalue())


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    device = pick_device(args.device)
    name = args.env or ("" if args.checkpoint else "hopper-mini")
    run_folder = f"{parse_env(name).folder if name else ''}__{args.exp_name}__{args.seed}"
    path = Path(args.checkpoint or Path(args.runs_dir) / run_folder / "policy.pt")
    trained = load_policy(
        path, "fp32" if args.export else args.precision, torch.device("cpu") if args.export else device
    )
    trained, task = with_context(trained, args.context), trained.task
    if args.export:
        export(trained, Path(args.export))
        return print(f"{args.export}: call with rtg, obs, act, timestep and valid, as in class Raw")
    if name and name != task.name:
        fail(f"{path} was trained on --env {task.name}, not {name}")
    others = (load_policy(Path(p), args.precision, device) for p in args.compare)
    policies = [trained, *(with_context(one, args.context) for one in others)]
    for other in policies:
        if (other.task.env_id, other.task.ref_max) != (task.env_id, task.ref_max):
            fail(
                f"{other.path} is a policy of {other.task.name}, not {task.name}; --compare needs the same environment"
            )
    folder, suffix = path.parent, "_best" if path.name == "policy_best.pt" else ""
    if not os.access(folder, os.W_OK):
        fail(f"{folder}: cannot write there; copy the checkpoint to a folder of your own")
    renderer = make_renderer(task.env_id) if args.video else None

    data, returns = trained.content["data"], trained.content["episode_returns"].numpy()
    high_only = args.high_targets or task.body == "antmaze"
    if high_only and (args.trajectories or args.percentiles):
        fail("--trajectories, --percentiles: an AntMaze has no RTG sweep")
    many = task.body == "antmaze" or args.percentiles and device.type == "cuda"
    rollouts = args.rollouts or (100 if many else 50 if high_only else 30)
    targets, high_targets = target_returns(returns, args.target_step), task.targets(data["is_d4rl"], returns.max())
    if high_only:
        asked = [high_targets] * len(policies)
        if args.inference != "request":
            policies = [with_inference(one, args.inference) for one in policies]
            asked = [one.content["episode_returns"].max().reshape(1).tolist() for one in policies]
        rows = [roll_out(one, x, rollouts, args.seed)[0] for one, x in zip(policies, asked)]
        records = [one.identity() | {"high_targets": rows[i]} for i, one in enumerate(policies)]
        for one, record in zip(policies, records):
            record |= {k: one.content[k] for k in ("model_r2",) if one.content.get(k)}
    else:
        percentiles = percentile_targets(returns) if args.percentiles else ()
        sweeps = [sweep(one, targets, high_targets, rollouts, args.seed, percentiles) for one in policies]
        records = [record for record, _ in sweeps]
    setting = {"rollouts": rollouts, "episode_seed": args.seed, "device": device.type}
    setting |= {"inference": args.inference, "context": args.context}
    rows = []
    for record in records:
        for kind in [kind for kind in ("sweep", "high_targets", "percentiles") if kind in record]:
            which = {"checkpoint": record["checkpoint"], "seed": record["seed"], "kind": kind}
            rows += [which | row for row in record[kind]]
    title = f"{data['label']}\n{rollouts} rollouts per target"
    title += f", context {args.context}" if args.context else ""
    result = setting | records[0] | ({"compare": records[1:]} if args.compare else {})
    suffix = (f"_context_{args.context}" if args.context else "") + suffix
    mode = "" if args.inference == "request" else f"_{args.inference}"
    stem = folder / f"{'high_targets' if high_only else 'alignment'}{mode}{suffix}"
    write_results(stem, result, rows, None if high_only else plot(records, task, returns, title))
    for record in records:
        high = (f"{row['score_mean']:.1f} at target {row['target_return']:g}" for row in record["high_targets"])
        error = "" if high_only else f"alignment RMSE {record['alignment_rmse']:.2f}, "
        if args.percentiles:
            share = record["absolute_error_of_range"]
            share = "" if share is None else f" ({share:.1%} of their range)"
            error += f"absolute error {record['absolute_error']:.0f}{share}, "
        print(f"{record['checkpoint']}: {error}score {', '.join(high)}")
    print(f"{data['label']}: {stem}.json, .csv{'' if high_only else ', .png'}")
    if args.trajectories:
        curves, seconds_per_step = behaviour(records[0], sweeps[0][1]), make_env(task.env_id).dt
        lines = [{k: row[k] for k in ("target_return", "velocity_mean", "length_mean")} for row in records[0]["sweep"]]
        result = setting | trained.identity() | {"seconds_per_step": seconds_per_step}
        result |= {"targets": lines, "over_time": curves}
        stem = folder / f"behaviour{suffix}"
        write_results(stem, result, lines, plot_behaviour(records, curves, seconds_per_step, title))
        print(f"forward velocity: {stem}.json, .csv, .png")
    if args.video:
        captions = [f"target {target:g}" for target in args.video]
        gif = video(trained, args.video, captions, [args.seed] * len(args.video), task.horizon, renderer)
        write_file(folder / f"video{suffix}.gif", gif)
        print(f"one episode per target: {folder}/video{suffix}.gif")


# ======== shared: results ========


BASELINES = ("train_radt", "train_vdt", "tune_vdt", "train_qt", "train_rvdt")  # in baselines/, with policies as here


class Trained(NamedTuple):
    """A policy.pt of stage 2 or of a baseline, ready to roll out."""

    path: Path
    task: "Task"
    policy: Policy
    content: dict  # everything that the file holds

    def identity(self) -> dict:
        """What result files say of a checkpoint."""
        config, step = {"average": 0.0, "eval_context_len": 0} | self.content["config"], self.content["step"]
        names = ("seed", "total_steps", "lambda_e", "max_push", "action_noise", "dropout", "average")
        names += ("eval_context_len", "alignment", "conv", "state_loss")
        names = {name: config[name] for name in names[: 2 if "method" in config else None]}
        method = config.get("method") or method_of(config["lambda_e"], config["conv"], config["state_loss"])
        trained_on = {"env": self.task.name, "trained_on": self.content["data"]}
        return {"checkpoint": str(self.path), "method": method, "step": step} | trained_on | names


def method_of(lambda_e: float, conv: bool, state_loss: bool) -> str:
    """The project's name of a variant; "DT" is Chen et al.'s Decision Transformer."""
    if lambda_e > 0 and conv:
        return "Q-Align DT"
    return "DT" + " + state loss" * state_loss + " + conv" * conv + " + alignment" * (lambda_e > 0)


def label_of(record: dict) -> str:
    best = ", best checkpoint" if Path(record["checkpoint"]).name == "policy_best.pt" else ""
    ours = ("max_push", "action_noise", "average") if record.get("lambda_e") else ("average",)
    ours = "".join(f", {name} {record[name]:g}" for name in ours if record.get(name))
    return f"{record['method']}, seed {record['seed']}{ours}{best}"


def load_policy(path: Path, precision: str, device: torch.device) -> Trained:
    """Read a checkpoint of stage 2 or of a baseline; exits 2 if it is anything else."""
    content = load_checkpoint(path, "train_qalign_dt", *BASELINES)
    make = make_policy if content["stage"] == "train_qalign_dt" else baseline(content["stage"]).make_policy
    try:
        task, config = parse_env(content["env"]), content["config"]
        policy = make(task, config, use_bf16(precision, device))
        policy.load_state_dict(content["policy"])
        found = Trained(path, task, policy.to(device).eval(), content)
        # a KeyError now, not after a sweep
        _ = found.identity(), content["data"]["label"], content["data"]["is_d4rl"], content["obs_mean"]
        _ = content["obs_std"], config["context_len"], content["critic"] and (config["gamma"], config["critic_width"])
        if not (len(content["episode_returns"]) and all(p.isfinite().all() for p in policy.parameters())):
            raise ValueError("weights that are not finite")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        fail(f"{path}: not a whole checkpoint ({one_line(error)}); train it again")
    if content["step"] < config["total_steps"]:
        print(f"note: {path} is at step {content['step']:,} of {config['total_steps']:,}")
    return found


def baseline(name: str):
    """The module baselines/<name>.py, for a name of BASELINES."""
    script = Path(__file__).resolve().parent / "baselines" / f"{name}.py"
    if not script.is_file():
        fail(f"{script} is missing; the policy's network is defined there")
    spec = importlib.util.spec_from_file_location(name, script)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def new_figure(*shape, figsize, **options):
    """Matplotlib's figure and axes, without a screen."""
    from matplotlib.figure import Figure  # imported here: it takes a while

    figure = Figure(figsize=figsize, layout="constrained")
    axes = figure.subplots(*shape, **options)
    for one in np.ravel(axes):
        one.grid(alpha=0.3)
    return figure, axes


def write_results(stem: Path, result: dict, rows: list[dict], figure) -> None:
    """<stem>.json, .csv (of rows) and, if there is a figure, .png."""
    lines = [",".join(f'"{x}"' if isinstance(x, str) else f"{x}" for x in row.values()) for row in rows]
    write_file(stem.with_suffix(".csv"), "\n".join([",".join(rows[0]), *lines, ""]).encode())
    if figure:
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        write_file(stem.with_suffix(".png"), picture.getvalue())
    write_file(stem.with_suffix(".json"), (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())


def make_renderer(env_id: str):
    """MuJoCo's offscreen renderer; exits 2 where no OpenGL works."""
    try:
        import mujoco

        with warnings.catch_warnings(action="ignore"):
            return mujoco.Renderer(make_env(env_id).model, 200, 240)
    except Exception as error:  # each OpenGL backend has kinds of its own
        fail(f"--video: MuJoCo finds no OpenGL here ({one_line(error):.80}); without a screen, set MUJOCO_GL=egl")


def video(trained: Trained, targets, captions, seeds, steps: int, renderer, **options) -> bytes:
    """A GIF of one episode per raw target return, side by side, up to 10 s at 12 frames a second in real time."""
    import mujoco
    from PIL import Image, ImageDraw

    result = rollout(trained, targets, seeds, steps, "video", keep_qpos=True, **options)
    env = make_env(trained.task.env_id)
    stride, steps = max(1, round(0.08 / env.dt)), min(int(result.lengths.max()), round(10 / env.dt))
    frames = []
    for t in range(0, steps, stride):
        panels = []
        for i, caption in enumerate(captions):
            now = min(t, int(result.lengths[i]) - 1)
            env.data.qpos[:], env.data.qvel[:] = result.qpos[i, now], 0
            mujoco.mj_forward(env.model, env.data)
            renderer.update_scene(env.data, camera="above" if trained.task.body == "antmaze" else "track")
            panel = Image.fromarray(renderer.render())
            state = f"ended at step {now + 1}" if t > now else f"{result.velocities[i, now]:.1f} m/s"
            ImageDraw.Draw(panel).multiline_text((6, 4), f"{caption}\n{state}", fill=(255, 255, 255))
            panels.append(np.asarray(panel))
        frames.append(Image.fromarray(np.concatenate(panels, axis=1)).quantize(48))
    gif, duration = io.BytesIO(), round(1000 * stride * env.dt)  # ms
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
    return gif.getvalue()


# ======== end of shared: results ========

# ======== shared: setup ========

FORMAT = 5  # of the checkpoint files
HORIZON = 1000  # steps after which Gymnasium and D4RL cut an episode (the small AntMaze: 700)


def fail(message: str, code: int = 2):
    """One line on stderr that says what is wrong, where, and what to do; then exit."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def one_line(error: BaseException) -> str:
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"


def run(main) -> None:
    """main(); Ctrl-C (exit 130), NaN and errors of the system (exit 1: disk, memory, ...) end in one line on stderr."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:  # a closed stream: os.devnull, for child processes as well
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, "w"))
        getattr(sys, name).reconfigure(line_buffering=True, errors="replace")
    try:
        main()
    except (KeyboardInterrupt, OSError, MemoryError, FloatingPointError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("memory|compiler", str(error)):  # torch lacks one of them
            raise  # a bug
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else one_line(error)
        fail("; ".join([reason, *getattr(error, "__notes__", ())]), code=130 if reason == "interrupted" else 1)


def check_args(args, lowest: dict) -> None:
    """ValueError, which tyro reports, for a number outside lowest.get(name, 0) .. 1e9 or a bad --exp-name."""
    if not re.fullmatch(r"\w[\w.-]*", args.exp_name, re.ASCII):
        raise ValueError(f"--exp-name {args.exp_name!r}: letters, digits and . _ - only, a letter or digit first")
    for name, value in vars(args).items():
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, int | float) and not lowest.get(name, 0) <= x <= 1e9:
                raise ValueError(f"--{name.replace('_', '-')} {x}: must be between {lowest.get(name, 0):g} and 1e9")


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path, *stages: str) -> dict:
    """Read a checkpoint of one of the stages onto the CPU, without unpickling; exits 2 on anything else."""
    try:
        with open(path, "rb") as f, warnings.catch_warnings(action="ignore"):  # torch warns about foreign pickles
            if zipfile.ZipFile(f).testzip():  # torch itself does not verify the checksums
                raise ValueError("damaged")
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content["stage"] not in stages or content["format"] != FORMAT:
                found = f"of {content['stage']}.py in format {content['format']}"
                fail(f"{path}: {found}, not of {stages[0]}.py in {FORMAT}")
            return content
    except OSError as error:
        fail(f"{path}: {error.strerror or one_line(error)}")
    except Exception:  # zipfile and torch raise a dozen kinds for truncated, foreign and pickled files
        fail(f"{path}: damaged, or not a checkpoint of {stages[0]}.py")


# ======== end of shared: setup ========

# ======== shared: task ========


class Task(NamedTuple):
    """What <body>-<quality>-<tag>, or Minari's .../<body>/<quality>-v0, stands for; returns are raw unless noted."""

    name: str
    body: str
    quality: str
    tag: str
    env_id: str  # Gymnasium's environment, or an AntMaze
    obs_dim: int
    act_dim: int
    ref_min: float  # D4RL's reference returns, of a random and of an expert policy
    ref_max: float
    rtg_scale: float
    rtg_range: tuple[float, float]  # normalised; the release's, for D4RL data
    high_targets: tuple[float, ...]  # the release's evaluation targets
    critic_reward_shift: float = 0.0  # AntMaze: the critic sees r - 1, as in IQL

    @property
    def folder(self) -> str:
        """What run folders start with."""
        return self.name.replace("/", "--")

    @property
    def horizon(self) -> int:
        """Steps after which an episode is cut."""
        return 700 if self.env_id == "AntMaze-umaze" else HORIZON

    def score(self, returns):
        """D4RL score: 0 for a random policy's return, 100 for an expert's."""
        return 100 * (returns - self.ref_min) / (self.ref_max - self.ref_min)

    def targets(self, is_d4rl: bool, best: float) -> tuple[float, ...]:
        """High target returns to report a score at, raw: the release's; for own data its best, and a fifth more."""
        return self.high_targets if is_d4rl or self.body == "antmaze" else (best, best + 0.2 * abs(best))

    @property
    def score_name(self) -> str:
        return "return" if self.tag == "minari" else "score (0: random, 100: expert)"


BODIES = {
    "hopper": ("Hopper-v4", 11, 3, -20.272305, 3234.3, 1000.0, (-1.0, 4.0), (1800.0, 3600.0, 4000.0)),
    "halfcheetah": ("HalfCheetah-v4", 17, 6, -280.178953, 12135.0, 1000.0, (-1.0, 25.0), (12000.0, 24000.0)),
    "walker2d": ("Walker2d-v4", 17, 6, 1.629008, 4592.3, 1000.0, (-1.0, 20.0), (5000.0, 6000.0, 10000.0)),
    "ant": ("Ant-v4", 111, 8, -325.6, 3879.7, 1000.0, (-1.0, 10.0), (5000.0, 10000.0)),
    "antmaze": ("AntMaze-", 29, 8, 0.0, 1.0, 1.0, (0.0, 1.0), (0.8, 0.9, 1.0, 100.0), -1.0),
}
# Minari's MuJoCo datasets are recorded in v5: the observations of v4, but for Ant's. Their scores here are raw returns.
MINARI_ENVS = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5"}
QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "expert")
MAZES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")


def parse_env(name: str) -> Task:
    """The task of an --env name; exits 2 on an unknown one, naming the closest."""
    if minari := re.fullmatch(r"(?:[\w.-]+/)*([a-z0-9]+)/([\w.-]+)-v\d+", name, re.ASCII):
        body, quality = minari.groups()
        if body not in MINARI_ENVS:
            fail(f"--env {name}: of Minari, datasets named .../{'|'.join(MINARI_ENVS)}/... can be used")
        task = Task(name, body, quality, "minari", *BODIES[body])  # no other name can have a slash
        return task._replace(env_id=MINARI_ENVS[body], ref_min=0.0, ref_max=100.0)
    body, _, rest = name.partition("-")
    quality, _, tag = rest.rpartition("-") if rest != "mini" else ("mini", "", "mini")
    names = [f"{b}-{q}-v2" for b in BODIES for q in (MAZES if b == "antmaze" else QUALITIES)]
    known = name in names or tag != "v2" and f"{name}-v2" not in names and re.fullmatch(r"\w[\w.]*", tag, re.ASCII)
    qualities = MAZES if body == "antmaze" else (*QUALITIES, "mixed", "mini")
    if not known or body not in BODIES or quality not in qualities:
        close = difflib.get_close_matches(name, [*names, "hopper-mini", "halfcheetah-mini"], n=3, cutoff=0.0)
        fail(f"unknown --env {name!r}: did you mean {', '.join(close)}? (any tag but v2 stands for your own data)")
    task = Task(name, body, quality, tag, *BODIES[body])
    return task._replace(env_id="AntMaze-" + quality.partition("-")[0]) if body == "antmaze" else task


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Switches TF32 off: float32 is float32, for the critic above all."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) and mallopt(-3, 2**30):
        mallopt(-1, 2**31 - 1)  # glibc: keep freed memory; given back, large tensors would fault it in at every step
    if name == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch finds no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


# ======== end of shared: task ========

# ======== shared: environment ========


def make_env(env_id: str):
    """Gymnasium's environment without its time limit, its known warnings, and MuJoCo's MUJOCO_LOG.TXT about them."""
    if "mujoco" not in sys.modules:  # make_renderer imports it first: nothing will be rendered, so look for no OpenGL
        os.environ["MUJOCO_GL"] = "disable"
    import mujoco

    known = "'settotalmass' is deprecated"  # a remark on Gymnasium's half_cheetah.xml
    mujoco.set_mju_user_warning(lambda text: None if known in text else warnings.warn(f"MuJoCo: {text}", stacklevel=2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of date. You should consider upgrading to version `v5`")
        return gymnasium.make(env_id).unwrapped


# ======== end of shared: environment ========

# ======== shared: antmaze ========

MAPS = {  # r: start, g: goal, 1: wall; four metres per cell
    "umaze": ("11111", "1r001", "11101", "1g001", "11111"),
    "medium": ("11111111", "1r011001", "10010001", "11000111", "10010001", "10100101", "100010g1", "11111111"),
    "large": ("111111111111", "1r0001000001", "101101010101", "100000010001", "101111011101", "100101000001")
    + ("110101010111", "100100010g01", "111111111111"),
}


class AntMaze(gymnasium.Env):
    """D4RL's antmaze-*-v2 as it is evaluated, on Gymnasium's ant.xml: reward 1 and the end within 0.5 m of the goal.

    The observation (29,) is position and velocity; it does not hold the goal, which is drawn anew in every episode.
    """

    def __init__(self, maze: str):
        import mujoco

        spec = mujoco.MjSpec.from_file(str(Path(gymnasium.__file__).parent / "envs/mujoco/assets/ant.xml"))
        spec.option.timestep = 0.02
        for i, row in enumerate(MAPS[maze]):
            for j, cell in enumerate(row):
                if cell == "1":
                    wall = dict(type=mujoco.mjtGeom.mjGEOM_BOX, size=(2, 2, 1), contype=1, conaffinity=1)
                    spec.worldbody.add_geom(pos=(4 * j - 4, 4 * i - 4, 1), **wall)
                elif cell == "g":
                    self.goal_cell = np.array([4 * j - 4, 4 * i - 4])
        for geom in spec.geoms:
            geom.solimp[:3] = 0.8, 0.8, 0.01
        for actuator in spec.actuators:
            actuator.gear[0] = 30
        rows, columns = len(MAPS[maze]), len(MAPS[maze][0])
        spec.worldbody.add_camera(name="above", pos=(2 * columns - 6, 2 * rows - 6, 5 * max(rows, columns)))
        self.model, self.frame_skip, self.dt = spec.compile(), 5, 0.1
        self.data = mujoco.MjData(self.model)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (29,))
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (8,))

    def reset(self, *, seed=None, options=None):
        import mujoco

        super().reset(seed=seed)
        uniform = self.np_random.uniform
        self.goal = (self.goal_cell + uniform(0, 1, 2) + uniform(0, 0.5, 2)).clip(min=0)
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos += uniform(-0.1, 0.1, 15)
        self.data.qvel[:] = 0.1 * self.np_random.standard_normal(14)
        mujoco.mj_forward(self.model, self.data)
        return np.concatenate([self.data.qpos, self.data.qvel]), {}

    def step(self, action):
        import mujoco

        self.data.ctrl[:] = np.clip(action, -1, 1)
        mujoco.mj_step(self.model, self.data, nstep=self.frame_skip)
        reached = bool(np.linalg.norm(self.data.qpos[:2] - self.goal) <= 0.5)
        return np.concatenate([self.data.qpos, self.data.qvel]), float(reached), reached, False, {}


for maze in MAPS:
    if f"AntMaze-{maze}" not in gymnasium.registry:  # by another stage, in the same process
        gymnasium.register(
            f"AntMaze-{maze}", AntMaze, disable_env_checker=True, order_enforce=False, kwargs={"maze": maze}
        )

# ======== end of shared: antmaze ========

# ======== shared: simulator ========

# v5 (Minari) differs from v4 in the model of Walker2d, and in that a fall earns no bonus of 1 for being healthy.
BODY_IDS = {f"{body}-{v}": body.lower() for body in ("Hopper", "HalfCheetah", "Walker2d") for v in ("v4", "v5")}
BODY_IDS["Ant-v4"] = "ant"


class Simulator:
    """n copies of an environment (of BODY_IDS, Gymnasium's; or an AntMaze), advanced in lockstep by torch's threads.

    Initial states are those of env.reset(seed); observations, rewards and terminations those of env.step, without its
    time limit. Ant's observation is padded with zeros to D4RL's 111 numbers.
    """

    def __init__(self, env_id: str, seeds):
        self.env, self.body = make_env(env_id), BODY_IDS.get(env_id, "antmaze")
        self.bonus_after_fall = env_id.endswith("v4")
        from mujoco.batch import Batch  # after make_env, which sees to a bad MUJOCO_GL

        self.model, self.frame_skip, self.dt = self.env.model, self.env.frame_skip, self.env.dt
        self.batch = Batch(self.model, len(seeds), nthread=torch.get_num_threads())
        self.qpos, self.qvel, self.ctrl, self.xpos = map(self.batch.bind, ("qpos", "qvel", "ctrl", "xpos"))
        self.goals = np.zeros((len(seeds), 2))  # AntMaze's
        self.reset(np.arange(len(seeds)), seeds)

    def reset(self, index, seeds) -> None:
        """Start some of the simulations anew, each with its seed."""
        import mujoco

        for i, seed in zip(index, seeds):
            self.env.reset(seed=int(seed))
            mujoco.mj_getState(self.model, self.env.data, self.batch.state[i], mujoco.mjtState.mjSTATE_INTEGRATION)
            if self.body == "antmaze":
                self.goals[i] = self.env.goal
        if self.body == "ant":  # of which x_position needs the torso's frame
            self.batch.forward(index, stage=mujoco.mjtStage.mjSTAGE_POS)

    def observe(self, index) -> np.ndarray:
        """(m, obs_dim) float64: the observations of some of the simulations."""
        qpos, qvel = self.qpos[index], self.qvel[index]
        if self.body == "ant":
            return np.concatenate([qpos[:, 2:], qvel, np.zeros((len(qpos), 111 - 27))], axis=1)
        if self.body == "antmaze":
            return np.concatenate([qpos, qvel], axis=1)
        return np.concatenate([qpos[:, 1:], qvel if self.body == "halfcheetah" else qvel.clip(-10, 10)], axis=1)

    def x_position(self, index) -> np.ndarray:
        """(m,) whose difference is the forward velocity; Gymnasium's Ant reads it before the last substep."""
        return self.xpos[index, self.model.body("torso").id, 0] if self.body == "ant" else self.qpos[index, 0].copy()

    def step(self, index, actions):
        """One env.step of the simulations `index` (m,), given actions (m, act_dim).

        Returns observations (m, obs_dim), rewards, terminated and forward velocities in m/s, each (m,).
        """
        before = self.x_position(index)
        self.ctrl[index] = actions
        self.batch.step(index, nstep=self.frame_skip)
        velocity, effort = (self.x_position(index) - before) / self.dt, np.square(actions).sum(axis=1)
        state = np.concatenate([self.qpos[index], self.qvel[index]], axis=1)
        z, angle = state[:, 1], state[:, 2]
        if self.body == "halfcheetah":
            reward, healthy = velocity - 0.1 * effort, np.ones(len(state), bool)
        elif self.body == "hopper":
            healthy = (np.abs(state[:, 2:]) < 100).all(axis=1) & (z > 0.7) & (np.abs(angle) < 0.2)
            reward = velocity + (healthy | self.bonus_after_fall) - 1e-3 * effort
        elif self.body == "walker2d":
            healthy = (z > 0.8) & (z < 2.0) & (np.abs(angle) < 1.0)
            reward = velocity + (healthy | self.bonus_after_fall) - 1e-3 * effort
        elif self.body == "antmaze":
            reward = (np.linalg.norm(state[:, :2] - self.goals[index], axis=1) <= 0.5).astype(np.float64)
            healthy = reward == 0
        else:  # ant
            reward = velocity + 1.0 - 0.5 * effort
            healthy = np.isfinite(state).all(axis=1) & (state[:, 2] >= 0.2) & (state[:, 2] <= 1.0)
        return self.observe(index), reward, ~healthy, velocity


# ======== end of shared: simulator ========


if __name__ == "__main__":
    run(main)
