"""Stage 3 of Q-Align DT: does the policy achieve the return it is conditioned on? The RTG sweep (Sec. 6.2, App. D.6).

    python evaluate_alignment.py --env hopper-medium-v2

Conditions a trained policy on every return from the dataset's lowest to its highest in steps of 100, rolls each target
out --rollouts times, and reports the alignment error, Eq. 8: the root mean square, over the targets, of (mean achieved
score - target score). Reads a policy.pt; writes alignment.json, .csv and .png beside it.
--trajectories adds the forward velocity against the target and over time (Figures 3 and 4), --percentiles the error
that RADT's authors report, --video a GIF. Policies of baselines/ are evaluated in the same way.
"""

import csv
import importlib
import io
import json
import math
import os
import re
import signal
import sys
import timeit
import typing
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # while modules load
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"error: interrupted\n"), os._exit(130)))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch's waiting threads keep the cores busy beside other work

import gymnasium
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

HINT = tyro.conf.arg(help_behavior_hint="")  # the help text names the default itself, or there is none
Int, Text = (Annotated[kind | None, HINT] for kind in (int, str))
Texts, Floats = (Annotated[tuple[kind, ...], HINT] for kind in (str, float))


@dataclass(frozen=True)
class Args:
    env: Text = None  # task, as in stage 2 (default: the checkpoint's, or hopper-mini without --checkpoint)
    checkpoint: Text = ""  # a policy.pt (default: of the run that --env, --seed and --exp-name name)
    compare: Texts = ()  # further checkpoints of the same environment, swept into the same plot
    seed: int = 1  # seed of the run to evaluate, and of the episodes
    runs_dir: str = "runs"  # folder of all runs
    exp_name: str = "train_qalign_dt"  # experiment to evaluate; the run folder is <runs-dir>/<env>__<exp-name>__<seed>
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the policy runs; auto takes CUDA if there is one
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # arithmetic of the blocks; auto: bf16 if the hardware has it
    # the paper's protocol: only the score at high target returns (the release's; own data: its best return, and 20%
    # more); writes high_targets.json and .csv. AntMaze, whose returns are 0 and 1, is always evaluated so
    high_targets: bool = False
    # with --high-targets, how actions are chosen; request: by the target return; the others: a baseline's own modes,
    # which ignore the target (plan: VDT's Algorithm 3; best, softmax: QT's choice by Q)
    inference: Literal["request", "plan", "best", "softmax"] = "request"
    # how many of the last steps the policy sees when it acts (default: stage 2's --eval-context-len); also in the
    # files' names: alignment_context_<n>
    context: Int = None
    rollouts: Int = None  # episodes per target (default: 30; --high-targets: 50; mazes, and --percentiles on CUDA: 100)
    target_step: float = 100.0  # distance between two target returns, raw; 12 targets where this gives fewer
    # also RADT's protocol: the mean absolute error of seven targets, evenly spaced from the 5th to the 95th percentile
    # of the data's returns, the number of parameters, and the time per action
    percentiles: bool = False
    trajectories: bool = False  # also the forward velocity against the target, and over time for five of the targets
    export: Text = ""  # only write the policy to this file (.pt2), for torch.export.load: raw numbers in, an action out
    video: Floats = ()  # also a GIF: up to 10 s at each of these target returns (raw; needs OpenGL)

    def __post_init__(self):
        check_args(self, {"rollouts": 1, "target_step": 1e-6, "video": -1e9, "context": 1})
        if self.inference != "request" and (not self.high_targets or self.video or self.export or self.context):
            text = "its answer does not depend on the target: with --high-targets only, no --video, --export, --context"
            raise ValueError(f"--inference {self.inference}: {text}")


# ======== shared: data ========
@dataclass(frozen=True)
class Task:
    """What dataset.pt, and with it every policy.pt, says of the environment. Returns are raw unless noted."""

    name: str  # --env
    env_id: str  # Gymnasium's, or a maze of data/qalign_mazes.py
    env_kwargs: dict
    body: str  # hopper, halfcheetah, walker2d, ant, antmaze, maze2d; "" for other environments
    quality: str  # medium, mini, umaze, ...
    tag: str  # v2, mazes also v0 and v1: D4RL's names; mini; minari; anything else: your own data
    obs_dim: int
    act_dim: int
    horizon: int  # steps after which a rollout is cut
    ref_min: float  # reference returns, of a random and of an expert policy; 0 and 100: the score is the return
    ref_max: float
    rtg_scale: float  # a normalised return-to-go is the raw one divided by it
    rtg_range: tuple[float, float]  # normalised: the release's for D4RL's files (but Maze2D's), else the data's own
    targets: tuple[float, ...]  # high target returns to report a score at
    sweep: tuple[float, ...]  # target returns of stage 3's sweep; (): the data's own returns
    reward_shift: float  # AntMaze: the critic sees r - 1, as in IQL
    label: str  # what plots, logs and JSON call the data
    is_d4rl: bool
    digest: str  # of the arrays
    sources: list  # the files: name, size, time, sha256

    def __post_init__(self):
        sizes, texts = (self.obs_dim, self.act_dim, self.horizon), (self.name, self.env_id, self.label, self.digest)
        possible = self.ref_min < self.ref_max and self.rtg_scale > 0 and len(self.targets) > 0
        readable = all(text.isprintable() and len(text) <= 400 for text in texts)
        if not possible or not readable or not all(0 < n <= 10**6 for n in sizes):
            raise ValueError("a number or a text of the task is impossible")

    def score(self, returns):
        """D4RL score: 0 for a random policy's return, 100 for an expert's."""
        return 100 * (returns - self.ref_min) / (self.ref_max - self.ref_min)


# ======== end of shared: data ========


# ======== shared: policy ========
class Block(nn.Module):
    """Pre-LN transformer block: causal attention, then a GELU MLP of four times the width."""

    def __init__(self, width: int, heads: int, conv: bool, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        # groups=3: q, k and v each have a dense convolution of their own, over 6 tokens
        self.conv = nn.Conv2d(3 * width, 3 * width, (1, 6), groups=3) if conv else None
        hidden = nn.Linear(width, 4 * width)
        self.mlp = nn.Sequential(hidden, nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout))

    def causal_conv(self, qkv):  # (B, T, 3 D) -> (B, T, 3 D)
        """App. D.1: every q, k and v token becomes a mixture of itself and its five predecessors."""
        # in two dimensions and padded first, the tensor is channels-last in memory: the fastest layout
        return self.conv(F.pad(qkv, (0, 0, 5, 0)).transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)

    def attend(self, x, keep, bias):  # (B, T, D), (B, T, 1), (B, 1, T, T) -> (B, T, D)
        # Padding must not leak: W_q, W_k, W_v have biases, so padded tokens are zeroed again before the convolution,
        # which then sees to the left of a short window the same zeros as it would without any padding.
        qkv = self.qkv(x) * keep
        if self.conv:
            qkv = self.causal_conv(qkv)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv.chunk(3, dim=-1))  # (B, H, T, D / H)
        # written out: with dropout and 60 tokens this is faster than scaled_dot_product_attention
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        weights = torch.softmax(logits.float().add_(bias), dim=-1)
        y = self.dropout(weights.to(logits.dtype)) @ v
        return self.dropout(self.out(y.transpose(1, 2).flatten(-2)))

    def forward(self, x, keep, bias):
        x = x + self.attend(self.norm1(x), keep, bias)
        return x + self.mlp(self.norm2(x))


class Policy(nn.Module):
    """Decision Transformer over tokens (rtg_0, s_0, a_0, rtg_1, ...); heads rtg -> state, state -> action (App. D.1).

    Call with rtg (B, K) normalised, obs (B, K, obs_dim) standardised, act (B, K, act_dim) in [-1, 1], timestep (B, K)
    int64 in [0, max_timestep) and valid (B, K) bool, False on the left padding; returns a_hat (B, K, act_dim) and
    s_hat (B, K, obs_dim), both float32. The action at step t depends on no token after s_t, and on no padding.
    """

    def __init__(
        self, obs_dim, act_dim, embed_dim, n_layer, n_head, max_timestep, conv=True, dropout=0.1, recent=0, bf16=False
    ):
        super().__init__()
        self.recent, self.bf16, self.dropout = recent, bf16, nn.Dropout(dropout)
        self.embed_rtg, self.embed_obs, self.embed_act = (nn.Linear(n, embed_dim) for n in (1, obs_dim, act_dim))
        self.embed_time = nn.Embedding(max_timestep, embed_dim)
        self.norm_in, self.norm_out = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, n_head, conv, dropout) for _ in range(n_layer))
        self.action_head, self.state_head = nn.Linear(embed_dim, act_dim), nn.Linear(embed_dim, obs_dim)
        for module in self.modules():  # GPT-2's initialisation; the convolution keeps torch's
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, rtg, obs, act, timestep, valid):
        x = self.hidden(rtg, obs, act, timestep, valid)
        return torch.tanh(self.action_head(x[:, :, 1])), self.state_head(x[:, :, 0])

    def hidden(self, rtg, obs, act, timestep, valid):  # -> (B, K, 3, D) float32: of each step's rtg, state, action
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
            for block in self.blocks:
                x = block(x, keep[..., None], bias)
        return self.norm_out(x.float()).unflatten(1, (-1, 3))

    def act(self, rtg, obs, act, timestep, valid):
        """a_hat (B, act_dim) at the windows' last step, for rollouts: from the last `recent` steps (0: all of them)."""
        windows = (x[:, -self.recent :].contiguous() for x in (rtg, obs, act, timestep, valid))
        return torch.tanh(self.action_head(self.hidden(*windows)[:, -1, 1]))


def make_policy(task: Task, config: dict, bf16: bool) -> Policy:
    """The policy that a checkpoint's configuration describes (randomly initialised from torch's global generator)."""
    sizes = (config[name] for name in ("embed_dim", "n_layer", "n_head", "max_timestep", "conv", "dropout"))
    return Policy(task.obs_dim, task.act_dim, *sizes, recent=config.get("eval_context_len", 0), bf16=bf16)


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether the blocks run in bfloat16; `auto`: where the hardware multiplies it, as CUDA, AMX and AVX-512 can."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("amx_bf16", "avx512_bf16"))


# ======== end of shared: policy ========


# ======== shared: critic ========
class Ensemble(nn.Module):
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
    velocities: np.ndarray  # (n, T) forward, m/s; NaN without a MuJoCo model; T: the horizon in steps
    first_obs: torch.Tensor  # (n, obs_dim) standardised
    first_act: torch.Tensor  # (n, act_dim)
    qpos: np.ndarray | None  # (n, T, nq) MuJoCo's positions after each step, if asked for

    @property
    def velocity(self) -> np.ndarray:
        """(n,) mean forward velocity, m/s."""
        return np.nansum(self.velocities, axis=1) / np.where(np.isnan(self.velocities[:, 0]), np.nan, self.lengths)


@torch.no_grad()
def rollout(trained, targets, seeds, horizon: int, what: str, reward_function=None, keep_qpos=False) -> Rollouts:
    """Roll the policy out once per (raw target return, seed), all in lockstep as one batch.

    The context is the last K steps, padded and masked as in training; the RTG token starts at target / rtg_scale and
    falls by every reward, RTG_{t+1} = RTG_t - r_t: the environment's, or reward_function(velocities (m,), actions (m,
    act_dim)). A rollout that has ended leaves the batch.
    """
    policy, task, content = trained.policy, trained.task, trained.content
    n, K, device = len(targets), trained.context, next(policy.parameters()).device
    make_env(task.env_id, task.env_kwargs, (task.obs_dim, task.act_dim))  # exits 2 where the file's task is another
    simulator, targets = simulate(task, seeds), np.asarray(targets, dtype=np.float64)
    obs_mean, obs_std = content["obs_mean"].to(device), content["obs_std"].to(device)
    # histories start with K - 1 steps of padding, so that the context of step t is always [t, t + K)
    sizes = ((), obs_mean.shape, (task.act_dim,))
    rtg, obs, act = (torch.zeros(n, horizon + K - 1, *size, device=device) for size in sizes)
    timestep = torch.arange(1 - K, horizon, device=device)
    alive, returns, lengths = np.arange(n), np.zeros(n), np.zeros(n, dtype=np.int64)
    rewards, velocities = np.full((2, n, horizon), np.nan)
    qpos = np.full((n, horizon, simulator.qpos.shape[1]), np.nan) if keep_qpos else None
    last_time = content["config"]["max_timestep"] - 1
    observation = simulator.observe(alive)
    for t in (bar := tqdm(range(horizon), unit="step", desc=what, dynamic_ncols=True, disable=None)):
        rows, now, window = torch.as_tensor(alive, device=device), t + K - 1, slice(t, t + K)
        obs[rows, now] = (torch.as_tensor(observation, dtype=torch.float32, device=device) - obs_mean) / obs_std
        rtg_now = (targets[alive] - returns[alive]) / task.rtg_scale
        rtg[rows, now] = torch.as_tensor(rtg_now, dtype=torch.float32, device=device)
        times = timestep[window].expand(len(alive), K)
        context = (rtg[rows, window], obs[rows, window], act[rows, window], times.clamp(0, last_time), times >= 0)
        act[rows, now] = action = policy.act(*context)
        action = action.cpu().numpy().astype(np.float64)
        observation, reward, ended, velocity = simulator.step(alive, action)
        if reward_function:
            reward = reward_function(velocity, action)
        returns[alive] += reward
        lengths[alive] += 1
        rewards[alive, t], velocities[alive, t] = reward, velocity
        if keep_qpos:
            qpos[alive, t] = simulator.qpos[alive]
        alive, observation = alive[~ended], observation[~ended]
        bar.set_postfix_str(f"{len(alive)} of {n} rollouts alive")
        if len(alive) == 0:
            break
    return Rollouts(returns, lengths, rewards, velocities, obs[:, K - 1], act[:, K - 1], qpos)


# ======== end of shared: rollout ========


def load_critic(trained: "Trained") -> Ensemble | None:
    """The critic that was trained with the policy, on its device; None where there was none (a DT)."""
    task, config, weights = trained.task, trained.content["config"], trained.content.get("critic")
    if weights is None:
        return None
    try:
        critic = Ensemble(2, task.obs_dim + task.act_dim, config["critic_width"])
        check_same(weights, critic.state_dict(), "critic")
        critic.load_state_dict(weights)
        if not (fits(trained.content["gamma"], float) and 0 < trained.content["gamma"] < 1):
            raise ValueError("its discount is impossible")
    except Exception as error:  # an edited file can break in any way
        fail(f"{trained.path}: its critic is not whole ({one_line(error)}); train it again")
    return critic.to(next(trained.policy.parameters()).device)


MOST_TARGETS = 500  # of a sweep


def target_returns(task: Task, returns: np.ndarray, step: float) -> np.ndarray:
    """The dataset's lowest return, + step, ... up to its highest (raw); 12 evenly spaced ones if that gives fewer.

    A task may name its own targets (mazes, where no episode of the data has a high return). Exits 2 above MOST_TARGETS.
    """
    if task.sweep:
        return np.array(task.sweep)
    if (n := np.ptp(returns) / step) > MOST_TARGETS:
        limit = f"more than {MOST_TARGETS}"
        fail(f"--target-step {step:g} makes {n:,.0f} target returns, {limit}; {np.ptp(returns) / 50:.2g} makes 50")
    targets = np.arange(returns.min(), returns.max() + 1e-9, step)
    return targets if len(targets) >= 12 else np.linspace(returns.min(), returns.max(), 12)


def alignment_rmse(scores: np.ndarray, target_scores: np.ndarray) -> float:
    """Eq. 8, in D4RL-score units: mean achieved score per target (n,), target scores (n,)."""
    return float(np.sqrt(np.mean((scores - target_scores) ** 2)))


def absolute_error(achieved, targets, span: float) -> tuple[float, float | None]:
    """RADT's error: mean over the targets of |mean return - target|, raw, and divided by a span of returns if not 0."""
    error = float(np.abs(np.asarray(achieved) - np.asarray(targets)).mean())
    return error, error / span if span > 0 else None


@torch.no_grad()
def seconds_per_action(trained: "Trained") -> float:
    """Median time of one action for one window, on the policy's device (s)."""
    K, task, device = trained.context, trained.task, next(trained.policy.parameters()).device
    rtg, obs, act = (torch.zeros(1, K, *size, device=device) for size in ((), (task.obs_dim,), (task.act_dim,)))
    timestep = torch.arange(K, device=device)[None]
    window = rtg, obs, act, timestep, timestep >= 0
    return float(np.median(timeit.repeat(lambda: trained.policy.act(*window).cpu(), number=1, repeat=20)))


def mean_per_target(trained: "Trained", targets, rollouts: int, seed: int) -> tuple[list[dict], Rollouts]:
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
        velocity = float(result.velocity[one].mean())
        row |= {"length_mean": float(result.lengths[one].mean())}
        row |= {"velocity_mean": velocity if math.isfinite(velocity) else None}
        rows.append(row)
    return rows, result


@torch.no_grad()
def q_and_outcome(trained: "Trained", result: Rollouts) -> tuple[np.ndarray, np.ndarray]:
    """What the critic predicts at each rollout's first step, min_m Q_m, and the discounted return that came: (n,) each.

    Both are of the rewards as the critic saw them (AntMaze's are shifted, VDT's scaled). NaN without a critic.
    """
    if not (critic := load_critic(trained)):
        return np.full((2, len(result.returns)), np.nan)
    q = critic(result.first_obs, result.first_act).amin(dim=0).cpu().numpy()
    discounts = trained.content["gamma"] ** np.arange(result.rewards.shape[1])
    rewards = (result.rewards + trained.task.reward_shift) * trained.content["config"].get("reward_scale", 1.0)
    return q, np.nansum(rewards * discounts, axis=1)


def sweep(trained: "Trained", targets: np.ndarray, rollouts: int, seed: int, percentiles=()) -> tuple[dict, np.ndarray]:
    """The record that alignment.json holds (without targets: high_targets.json), and the forward velocity of every step
    (targets, rollouts, horizon) in m/s, NaN after a rollout's end.
    """
    task, high, record = trained.task, trained.task.targets, trained.identity()
    every_row, result = mean_per_target(trained, np.concatenate([targets, high, percentiles]), rollouts, seed)
    q, discounted = q_and_outcome(trained, result)
    for row, *own in zip(every_row, q.reshape(-1, rollouts), discounted.reshape(-1, rollouts)):
        means = [None if np.isnan(x[0]) else float(x.mean()) for x in own]
        row |= dict(zip(("q_mean", "discounted_return_mean"), means))
    velocities = result.velocities.reshape(-1, rollouts, task.horizon)[: len(targets)]
    rows, others = every_row[: len(targets)], every_row[len(targets) :]
    if not len(targets):
        record["high_targets"] = others
        if fits(trained.content.get("model_r2"), list[float]):  # of VDT's planner
            record["model_r2"] = trained.content["model_r2"]
        return record, velocities
    scores, target_scores = (np.array([row[k] for row in rows]) for k in ("score_mean", "target_score"))
    record["alignment_rmse"] = alignment_rmse(scores, target_scores)
    record["best_score"] = float(scores.max())
    record["spearman_target_vs_real"] = rank_correlation(target_scores, scores)
    if trained.content.get("critic"):  # Table E.19, over the sweep's rollouts (stage 1's report.json: over the data)
        q, discounted = (x[: len(targets) * rollouts] for x in (q, discounted))
        record["spearman_q_vs_return"] = rank_correlation(q, result.returns[: len(q)])
        record["spearman_q_vs_discounted_return"] = rank_correlation(q, discounted)
    record |= {"high_targets": others[: len(high)], "sweep": rows}
    if len(percentiles):
        record["percentiles"] = others[len(high) :]
        achieved = [row["return_mean"] for row in record["percentiles"]]
        errors = absolute_error(achieved, percentiles, percentiles[-1] - percentiles[0])
        record |= dict(zip(("absolute_error", "absolute_error_of_range"), errors))
        record["parameters"] = sum(weight.numel() for weight in trained.policy.parameters())
        record["seconds_per_action"] = seconds_per_action(trained)
    return record, velocities


def behaviour(record: dict, velocities: np.ndarray, handful: int = 5) -> list[dict]:
    """Figure 4: for a handful of targets, velocity at every step, mean and std over the rollouts still alive."""
    curves = []
    for j in np.unique(np.linspace(0, len(record["sweep"]) - 1, handful).round().astype(int)):
        alive = (~np.isnan(velocities[j])).sum(axis=0)  # (horizon,)
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


def plot(records: list[dict], task: Task, returns: np.ndarray, title: str):
    """Achieved against target score, with the diagonal and a band of one std; below, the dataset's returns."""
    figure, (top, bottom) = new_figure(2, 1, sharex=True, figsize=(7, 6.5), height_ratios=[4, 1])
    asked = [row["target_score"] for row in records[0]["sweep"]]
    top.plot([asked[0], asked[-1]], [asked[0], asked[-1]], "--", color="0.5", linewidth=1, label="achieved = target")
    methods = list(dict.fromkeys(record["method"] for record in records))  # seeds of one method share a colour
    for record in records:
        x, y, std = (np.array([row[k] for row in record["sweep"]]) for k in ("target_score", "score_mean", "score_std"))
        label, color = f"{label_of(record)}: RMSE {record['alignment_rmse']:.1f}", f"C{methods.index(record['method'])}"
        top.plot(x, y, marker="o", markersize=3, color=color, label=label)
        top.fill_between(x, y - std, y + std, color=color, alpha=0.3 / (1 + len(records)), linewidth=0)
    raw = (task.ref_min, task.ref_max) == (0, 100)
    xlabel = "target return" if raw else "target score (0: random, 100: expert)"
    top.set(ylabel="achieved score (mean, band: one std)", xlabel=xlabel)
    top.legend(fontsize="small")
    bottom.hist(task.score(returns), bins=30, color="0.6")
    bottom.set(ylabel="episodes of the data", xlabel=xlabel)
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
    if context is None:
        return trained
    if context > trained.context:
        fail(f"--context {context}: {trained.path} was trained on windows of K = {trained.context} steps")
    trained.policy.recent = 0  # all of the shorter window
    return trained._replace(context=context)


def with_inference(trained: "Trained", name: str) -> "Trained":
    """The checkpoint with its policy wrapped in a mode of its baseline's own; exits 2 if it has none of that name.

    The one target left is the data's best return, as the answer does not depend on it.
    """
    stage, content, task = trained.content["stage"], trained.content, trained.task
    modes = getattr(baseline(stage), "INFERENCE", {}) if stage in BASELINES else {}
    if name not in modes:
        fail(f"{trained.path}: {stage}.py has no --inference {name}")
    try:
        once = replace(task, targets=(float(content["episode_returns"].max()),))
        return trained._replace(policy=modes[name](task, content, trained.policy), task=once)
    except Exception as error:  # an edited file can break in any way
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
    if path.exists() and trained.path.exists() and path.samefile(trained.path):
        fail(f"--export {path}: that is the checkpoint itself; name another file")
    K, task, file = trained.context, trained.task, io.BytesIO()
    example = (torch.zeros(2, K), torch.zeros(2, K, task.obs_dim), torch.zeros(2, K, task.act_dim))
    example += (torch.zeros(2, K, dtype=torch.int64), torch.ones(2, K, dtype=torch.bool))
    batch = [{0: torch.export.Dim.DYNAMIC}] * len(example)
    torch.export.save(torch.export.export(Raw(trained).eval(), example, dynamic_shapes=batch), file)
    write_file(path, file.getvalue())
    how = "rtg, obs, act, timestep and valid, as in class Raw of evaluate_alignment.py"
    print(f"{path}: call with {K} steps of {how}; it returns actions from -1 to 1, to be scaled to the environment's")


def main() -> None:
    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.DisallowNone,))
    device, path = pick_device(args.device), policy_path(args, "hopper-mini")
    if args.export:
        trained = load_policy(path, "fp32", torch.device("cpu"))
        export(with_context(trained, args.context), Path(args.export))
        return
    policies = [with_context(load_policy(Path(p), args.precision, device), args.context) for p in (path, *args.compare)]
    trained, task = policies[0], policies[0].task
    if args.env and args.env != task.name:
        fail(f"{path} was trained on --env {task.name}, not {args.env}")
    for other in policies:
        same = ("env_id", "env_kwargs", "horizon", "ref_min", "ref_max")
        if any(getattr(other.task, x) != getattr(task, x) for x in same):
            what = "--compare needs one environment, horizon and pair of reference returns"
            fail(f"{other.path} is a policy of {other.task.name}, not {task.name}; {what}")
    if not os.access(path.parent, os.W_OK):
        fail(f"{path.parent}: cannot write there; copy the checkpoint to a folder of your own")
    high_only = args.high_targets or task.body == "antmaze"
    if high_only and (args.trajectories or args.percentiles):
        fail("--trajectories, --percentiles: both need the RTG sweep, which --high-targets and AntMaze do not have")
    renderer = make_renderer(task) if args.video else None  # before the first environment, which switches OpenGL off
    if args.trajectories and not hasattr(make_env(task.env_id, task.env_kwargs).unwrapped, "model"):
        fail(f"--trajectories: {task.env_id} has no MuJoCo model")

    many = task.body in ("antmaze", "maze2d") or args.percentiles and device.type == "cuda"
    rollouts = args.rollouts or (100 if many else 50 if high_only else 30)
    title = f"{task.label}\n{rollouts} rollouts per target" + f", context {args.context}" * bool(args.context)
    returns = trained.content["episode_returns"].numpy()
    targets = () if high_only else target_returns(task, returns, args.target_step)
    # RADT's seven target returns (raw)
    percentiles = np.linspace(*np.percentile(returns, (5, 95)), 7) if args.percentiles else ()
    if args.inference != "request":
        policies = [with_inference(one, args.inference) for one in policies]
    for one in policies:
        load_critic(one)  # exits before the first rollout
    sweeps = [sweep(one, targets, rollouts, args.seed, percentiles) for one in policies]
    records = [record for record, _ in sweeps]
    rows = [
        {"checkpoint": record["checkpoint"], "seed": record["seed"], "kind": kind} | row
        for record in records
        for kind in ("sweep", "high_targets", "percentiles")
        for row in record.get(kind, ())
    ]
    setting = {"rollouts": rollouts, "episode_seed": args.seed, "device": device.type}
    setting |= {"inference": args.inference, "context": args.context}
    mode = "" if args.inference == "request" else f"_{args.inference}"
    suffix = f"_context_{args.context}" if args.context else ""
    stem = path.parent / f"{'high_targets' if high_only else 'alignment'}{mode}{suffix}"
    compare = {"compare": records[1:]} if args.compare else {}
    figure = None if high_only else lambda: plot(records, task, returns, title)
    write_results(stem, setting | records[0] | compare, rows, figure)
    for record in records:
        print(summary(record))
    print(f"{task.label}: {stem}.json, .csv{', .png' if figure else ''}")
    if args.trajectories:
        write_behaviour(path.parent / f"behaviour{suffix}", setting, records, sweeps[0][1], task, title)
    if args.video:
        captions = [f"target {target:g}" for target in args.video]
        gif = video(trained, args.video, captions, [args.seed] * len(args.video), task.horizon, renderer)
        write_file(path.parent / f"video{suffix}.gif", gif)
        print(f"one episode per target: {path.parent}/video{suffix}.gif")


def summary(record: dict) -> str:
    """A record's line on the screen."""
    error = f"alignment RMSE {record['alignment_rmse']:.2f}, " if "alignment_rmse" in record else ""
    if "absolute_error" in record:
        share = record["absolute_error_of_range"]
        share = "" if share is None else f" ({share:.1%} of the targets' range)"
        error += f"absolute error {record['absolute_error']:.0f}{share}, "
    high = (f"{row['score_mean']:.1f} at target {row['target_return']:g}" for row in record["high_targets"])
    return f"{record['checkpoint']}: {error}score {', '.join(high)}"


def write_behaviour(stem: Path, setting: dict, records: list[dict], velocities: np.ndarray, task: Task, title: str):
    """Figures 3 and 4 of the first checkpoint."""
    curves, seconds_per_step = behaviour(records[0], velocities), make_env(task.env_id, task.env_kwargs).unwrapped.dt
    lines = [{k: row[k] for k in ("target_return", "velocity_mean", "length_mean")} for row in records[0]["sweep"]]
    identity = {k: x for k, x in records[0].items() if k not in ("sweep", "high_targets", "percentiles")}
    result = setting | identity | {"seconds_per_step": seconds_per_step, "targets": lines, "over_time": curves}
    write_results(stem, result, lines, lambda: plot_behaviour(records, curves, seconds_per_step, title))
    print(f"forward velocity: {stem}.json, .csv, .png")


# ======== shared: results ========
BASELINES = ("train_radt", "train_vdt", "tune_vdt", "train_qt", "train_rvdt")  # in baselines/, with policies as here
REPORTED = ("lambda_e", "sigma_e", "delta_rtg", "max_push", "action_noise", "dropout", "average", "eval_context_len")
REPORTED += ("alignment", "conv", "state_loss", "update_q", "q_noise")  # what result files say of a Q-Align DT


class Trained(NamedTuple):
    """A policy.pt of stage 2 or of a baseline, ready to roll out."""

    path: Path
    task: Task
    policy: nn.Module
    content: dict  # everything that the file holds
    context: int  # steps of a rollout's windows

    def identity(self) -> dict:
        """What result files say of a checkpoint."""
        config = self.content["config"]
        names = ("seed", "total_steps", *(() if "method" in config else REPORTED))
        method = config.get("method") or method_of(config["lambda_e"], config["conv"], config["state_loss"])
        about = {"checkpoint": str(self.path), "method": method, "step": self.content["step"], "env": self.task.name}
        data = {name: getattr(self.task, name) for name in ("label", "is_d4rl", "digest")}
        return about | {"trained_on": data} | {name: config[name] for name in names}


def method_of(lambda_e: float, conv: bool, state_loss: bool) -> str:
    """The project's name of a variant; "DT" is Chen et al.'s Decision Transformer."""
    if lambda_e > 0 and conv:
        return "Q-Align DT"
    return "DT" + " + state loss" * state_loss + " + conv" * conv + " + alignment" * (lambda_e > 0)


def label_of(record: dict) -> str:
    """A legend's text: with what makes two runs of one method differ."""
    names = ("max_push", "action_noise", "average", "q_noise") if record.get("lambda_e") else ("average",)
    text = "".join(f", {name} {record[name]:g}" for name in names if record.get(name))
    if record.get("lambda_e"):
        text += f", {record['alignment']}" * (record["alignment"] != "one-sided")
        text += ", fixed critic" * (not record["update_q"])
    return f"{record['method']}, seed {record['seed']}{text}"


def policy_path(args, default: str) -> Path:
    """The policy.pt that --checkpoint, or --env, --exp-name and --seed name; exits 2 and lists the runs there are."""
    if args.checkpoint:
        return Path(args.checkpoint)
    env = (args.env or default).replace("/", "--")
    path = Path(args.runs_dir) / f"{env}__{args.exp_name}__{args.seed}" / "policy.pt"
    if not os.path.lexists(path):
        there = ", ".join(sorted(p.parent.name for p in Path(args.runs_dir).glob("*/policy.pt"))) or "none"
        fail(f"no policy at {path}; train it first; runs there: {there}")
    return path


@torch.no_grad()
def load_policy(path: Path, precision: str, device: torch.device) -> Trained:
    """Read a checkpoint of stage 2 or of a baseline; exits 2 if it is anything else."""
    content = load_checkpoint(path, "train_qalign_dt", *BASELINES)
    make = make_policy if content["stage"] == "train_qalign_dt" else baseline(content["stage"]).make_policy
    try:
        task, config, returns = build(Task, content["task"]), content["config"], content["episode_returns"]
        steps, K = [content["step"], config["total_steps"]], config["context_len"]
        if not fits(config, CONFIG) or not fits(steps, list[int]) or not 0 < K <= 10_000:
            raise ValueError("a number of its configuration is impossible")
        policy = make(task, config, use_bf16(precision, device))
        expected = dict(policy=policy.state_dict(), episode_returns=torch.zeros(len(returns), dtype=torch.float64))
        expected |= dict.fromkeys(("obs_mean", "obs_std"), torch.zeros(task.obs_dim))
        check_same({name: content[name] for name in expected}, expected, "policy.pt")
        policy.load_state_dict(content["policy"])
        if content["obs_std"].min() <= 0 or not len(returns):
            raise ValueError("its standardisation or returns are impossible")
        found = Trained(path, task, policy.to(device).eval(), content, K)
        label_of(found.identity())  # it has a name, and acts on a window
        sizes = ((), (task.obs_dim,), (task.act_dim,))
        window = [torch.zeros(1, K, *size, device=device) for size in sizes]
        policy.act(*window, window[0].long(), window[0] == 0)
    except Exception as error:  # an edited file can break in any way
        reason = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        fail(f"{path}: not a whole checkpoint ({reason}); train it again")
    if content["step"] < config["total_steps"]:
        print(f"note: {path} is at step {content['step']:,} of {config['total_steps']:,}")
    return found


def baseline(name: str):
    """The module baselines/<name>.py, for a name of BASELINES."""
    script = Path(__file__).resolve().parent / "baselines" / f"{name}.py"
    if not script.is_file():
        fail(f"{script} is missing; the policy's network is defined there")
    return load_module(script)


def new_figure(*shape, figsize, **options):
    """Matplotlib's figure and axes, without a screen; a $ in a file's name begins no mathematics."""
    import matplotlib.figure  # imported here: it takes a while

    matplotlib.rcParams.update({"text.parse_math": False, "axes.grid": True, "grid.alpha": 0.3})
    figure = matplotlib.figure.Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(*shape, **options)


def write_results(stem: Path, result: dict, rows: list[dict], figure=None) -> None:
    """<stem>.json, .csv (of rows) and, if there is a function that draws it, .png: numbers before pictures."""
    write_file(stem.with_suffix(".json"), (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
    table = csv.writer(sheet := io.StringIO(), lineterminator="\n")
    table.writerows([rows[0], *(row.values() for row in rows)])
    write_file(stem.with_suffix(".csv"), sheet.getvalue().encode(errors="surrogateescape"))
    if figure:
        figure().savefig(picture := io.BytesIO(), format="png", dpi=120)
        write_file(stem.with_suffix(".png"), picture.getvalue())


def make_renderer(task: Task):
    """MuJoCo's offscreen renderer; exits 2 where no OpenGL works, and for an environment without a MuJoCo model."""
    try:
        import mujoco

        if not (model := getattr(make_env(task.env_id, task.env_kwargs).unwrapped, "model", None)):
            fail(f"--video: {task.env_id} has no MuJoCo model")
        with warnings.catch_warnings(action="ignore"):
            return mujoco.Renderer(model, 200, 240)
    except Exception as error:  # each OpenGL backend has kinds of its own
        fail(f"--video: MuJoCo finds no OpenGL here ({one_line(error):.80}); without a screen, set MUJOCO_GL=egl")


def video(trained: Trained, targets, captions, seeds, steps: int, renderer, **options) -> bytes:
    """A GIF of one episode per raw target return, side by side, up to 10 s at 12 frames a second in real time."""
    import mujoco
    from PIL import Image, ImageDraw

    result = rollout(trained, targets, seeds, steps, "video", keep_qpos=True, **options)
    env = make_env(trained.task.env_id, trained.task.env_kwargs).unwrapped
    cameras = [env.model.camera(i).name for i in range(env.model.ncam)]
    camera = next((name for name in ("above", "track") if name in cameras), -1)  # -1: MuJoCo's free one
    stride, steps = max(1, round(0.08 / env.dt)), min(int(result.lengths.max()), round(10 / env.dt))
    frames = []
    for t in range(0, steps, stride):
        panels = []
        for i, caption in enumerate(captions):
            now = min(t, int(result.lengths[i]) - 1)
            env.data.qpos[:], env.data.qvel[:] = result.qpos[i, now], 0
            mujoco.mj_forward(env.model, env.data)
            renderer.update_scene(env.data, camera=camera)
            panel = Image.fromarray(renderer.render())
            state = f"ended at step {now + 1}" if t > now else f"{result.velocities[i, now]:.1f} m/s"
            ImageDraw.Draw(panel).multiline_text((6, 4), f"{caption}\n{state}", fill=(255, 255, 255))
            panels.append(np.asarray(panel))
        frames.append(Image.fromarray(np.concatenate(panels, axis=1)).quantize(48))
    gif, duration = io.BytesIO(), round(1000 * stride * env.dt)  # ms
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
    return gif.getvalue()


# ======== end of shared: results ========


def simulate(task: Task, seeds):
    """One simulation for each seed: MuJoCo's bodies in lockstep, every other environment as Gymnasium steps it."""
    if task.body and task.env_id in BODY_IDS and not task.env_kwargs:
        return Simulator(task.env_id, seeds)
    return Environments(task, seeds)


# v5 (Minari) differs from v4 in the model of Walker2d, and in that a fall earns no bonus of 1 for being healthy.
BODY_IDS = {f"{body}-{v}": body.lower() for body in ("Hopper", "HalfCheetah", "Walker2d") for v in ("v4", "v5")}
BODY_IDS["Ant-v4"] = "ant"


class Simulator:
    """n copies of an environment of BODY_IDS, advanced in lockstep by torch's threads.

    Initial states are those of env.reset(seed); observations, rewards and terminations those of env.step, without its
    time limit. Ant's observation is padded with zeros to D4RL's 111 numbers.
    """

    def __init__(self, env_id: str, seeds):
        env, self.body, self.bonus_after_fall = make_env(env_id), BODY_IDS[env_id], env_id.endswith("v4")
        import mujoco  # after make_env, which sees to a bad MUJOCO_GL
        from mujoco.batch import Batch

        inner = env.unwrapped
        self.model, self.frame_skip, self.dt = inner.model, inner.frame_skip, inner.dt
        self.batch = Batch(self.model, len(seeds), nthread=torch.get_num_threads())
        self.qpos, self.qvel, self.ctrl, self.xpos = map(self.batch.bind, ("qpos", "qvel", "ctrl", "xpos"))
        for i, seed in enumerate(seeds):
            env.reset(seed=int(seed))
            mujoco.mj_getState(self.model, inner.data, self.batch.state[i], mujoco.mjtState.mjSTATE_INTEGRATION)
        if self.body == "ant":  # of which x_position needs the torso's frame
            self.batch.forward(np.arange(len(seeds)), stage=mujoco.mjtStage.mjSTAGE_POS)

    def observe(self, index) -> np.ndarray:
        """(m, obs_dim) float64: the observations of some of the simulations."""
        qpos, qvel = self.qpos[index], self.qvel[index]
        if self.body == "ant":
            return np.concatenate([qpos[:, 2:], qvel, np.zeros((len(qpos), 111 - 27))], axis=1)
        return np.concatenate([qpos[:, 1:], qvel if self.body == "halfcheetah" else qvel.clip(-10, 10)], axis=1)

    def x_position(self, index) -> np.ndarray:
        """(m,) whose difference is the forward velocity; Gymnasium's Ant reads it before the last substep."""
        return self.xpos[index, self.model.body("torso").id, 0] if self.body == "ant" else self.qpos[index, 0].copy()

    def step(self, index, actions):
        """One env.step of the simulations `index` (m,), given actions (m, act_dim).

        Returns observations (m, obs_dim), rewards, which of them ended, and forward velocities in m/s, each (m,).
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
        else:  # ant
            reward = velocity + 1.0 - 0.5 * effort
            healthy = np.isfinite(state).all(axis=1) & (state[:, 2] >= 0.2) & (state[:, 2] <= 1.0)
        return self.observe(index), reward, ~healthy, velocity


class Environments:
    """The same interface for every other environment: Gymnasium's own, stepped one after the other."""

    def __init__(self, task: Task, seeds):
        self.envs = [make_env(task.env_id, task.env_kwargs) for _ in seeds]
        self.last = [env.reset(seed=int(seed))[0] for env, seed in zip(self.envs, seeds)]
        self.dt = getattr(self.envs[0].unwrapped, "dt", 1.0)

    def observe(self, index) -> np.ndarray:
        """(m, obs_dim): the observations of some of the simulations."""
        return np.stack([self.last[i] for i in index])

    @property
    def qpos(self) -> np.ndarray:
        """(n, nq): MuJoCo's positions; (n, 1) NaN where there is no MuJoCo."""
        inner = [env.unwrapped for env in self.envs]
        return np.stack([env.data.qpos if hasattr(env, "data") else [np.nan] for env in inner])

    def step(self, index, actions):
        """As Simulator.step; an episode ends where the environment terminates or truncates it."""
        before, rewards, ended = self.qpos[index, 0], np.zeros(len(index)), np.zeros(len(index), bool)
        for j, i in enumerate(index):
            self.last[i], rewards[j], terminated, truncated, _ = self.envs[i].step(actions[j])
            ended[j] = terminated or truncated
        return self.observe(index), rewards, ended, (self.qpos[index, 0] - before) / self.dt


# ======== shared: setup ========
FORMAT = 6  # of the checkpoint files


def fail(message: str, code: int = 2):
    """One line on stderr that says what is wrong, where, and what to do; then exit."""
    print(f"error: {printable(message, 2000)}", file=sys.stderr)
    sys.exit(code)


def printable(text: str, length: int = 300) -> str:
    """Text from outside (file names, labels) without line breaks and terminal escapes, cut to a length."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"{text:.{length}}")


def one_line(error: BaseException) -> str:
    return printable(" ".join(str(error).split()) or type(error).__name__)


def run(main) -> None:
    """main(); Ctrl-C (exit 130), NaN and errors of the system (exit 1: disk, memory, ...) end in one line on stderr."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(line_buffering=True, errors="replace")
    try:
        main()
    except (KeyboardInterrupt, OSError, MemoryError, FloatingPointError, RuntimeError) as error:
        # torch raises RuntimeError for want of memory, threads or a compiler; any other is a bug
        wants = r"(out of|allocate|enough) memory|ALLOC_FAILED|busy or unavailable|new thread|compiler"
        if isinstance(error, RuntimeError) and not re.search(wants, str(error)):
            raise
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else one_line(error)
        fail("; ".join([reason, *getattr(error, "__notes__", ())]), code=130 if reason == "interrupted" else 1)


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
    """Read a checkpoint of one of the stages onto the CPU; no code in a file is run; exits 2 on anything else."""
    if path.exists() and not path.is_file():
        fail(f"{path}: not a regular file")
    try:
        with open(path, "rb") as f, warnings.catch_warnings(action="ignore"):  # torch warns about foreign pickles
            if zipfile.ZipFile(f).testzip():  # torch itself does not verify the checksums
                raise ValueError("damaged")
            content = torch.load(path, map_location="cpu", weights_only=True)
        stage, version = content["stage"], content["format"]
        if stage not in stages or version != FORMAT:
            other = "; another version wrote it: use that version, or remove the file" * (stage in stages)
            fail(f"{path}: of {stage:.40s}.py in format {version:d}, not of {stages[0]}.py in {FORMAT}{other}")
        return content
    except OSError as error:
        fail(f"{path}: {error.strerror or one_line(error)}")
    except Exception:  # zipfile and torch raise a dozen kinds for truncated, foreign and pickled files
        fail(f"{path}: damaged, or not a checkpoint of {stages[0]}.py")


def load_module(script: Path):
    """One of our own files, as a module."""
    if script.stem not in sys.modules:
        sys.path.insert(0, str(script.parent))
    return importlib.import_module(script.stem)


PLAIN = str | int | float | bool | None
CONFIG = dict[str, PLAIN | tuple[PLAIN, ...]]  # a checkpoint's configuration


def fits(x, hint) -> bool:
    """Whether a value read from a file has the plain type `hint`: an int is a float, too; NaN and infinity are not."""
    kind, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type(PLAIN)):
        return any(fits(x, arg) for arg in args)
    if kind is dict:
        return isinstance(x, dict) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in x.items())
    if kind in (tuple, list):  # of one type; tuple[float, float] also says how many
        any_length = kind is list or args[-1] is ...
        return isinstance(x, kind) and (any_length or len(x) == len(args)) and all(fits(y, args[0]) for y in x)
    if hint is float:
        return type(x) in (int, float) and math.isfinite(x)
    return type(x) is hint


def build(cls, values: dict):
    """A dataclass from a checkpoint's values; an exception where a field is missing, unknown or of another type."""
    for name, hint in typing.get_type_hints(cls).items():
        if not fits(values[name], hint):
            raise ValueError(f"{name} is not of type {hint}")
    return cls(**values)


def check_same(found, expected, name: str) -> None:
    """ValueError unless a checkpoint's nested dicts and tensors have the keys, shapes and types of those we built."""
    if isinstance(expected, dict):
        if not isinstance(found, dict) or set(found) != set(expected):
            raise ValueError(f"{name} has other entries")
        for key in expected:
            check_same(found[key], expected[key], f"{name}.{key}")
    elif torch.is_tensor(expected):
        same = torch.is_tensor(found) and (found.shape, found.dtype) == (expected.shape, expected.dtype)
        plain = same and found.device.type == "cpu" and not found.requires_grad
        if not plain or not found.is_contiguous() or not found.isfinite().all():  # a view could be larger than the file
            raise ValueError(f"{name} has another shape or type, or is not finite")
    elif type(found) is not type(expected) or found != expected:
        raise ValueError(f"{name} differs")


def check_args(args, lowest: dict) -> None:
    """ValueError, which tyro reports, for a number outside lowest.get(name, 0) .. 1e9 or a bad --exp-name."""
    if not re.fullmatch(r"\w[\w.-]*", args.exp_name, re.ASCII):
        raise ValueError(f"--exp-name {args.exp_name!r}: letters, digits and . _ - only, a letter or digit first")
    for name, value in vars(args).items():
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, int | float) and not lowest.get(name, 0) <= x <= 1e9:
                raise ValueError(f"--{name.replace('_', '-')} {x}: must be between {lowest.get(name, 0):g} and 1e9")


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Switches TF32 off: float32 is float32, for the critic above all."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if name == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch finds no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


# ======== end of shared: setup ========


# ======== shared: environment ========
def make_env(env_id: str, kwargs: dict | None = None, sizes: tuple[int, int] | None = None):
    """Gymnasium's environment without time limit: vector observations, actions in [-1, 1]. Exits 2 otherwise, and
    where the environment's (obs_dim, act_dim) are not `sizes`; Ant-v4 may be D4RL's (111, 8).
    """
    if "mujoco" not in sys.modules:  # make_renderer imports it first: nothing will be rendered, so look for no OpenGL
        os.environ["MUJOCO_GL"] = "disable"
    import mujoco

    known = "'settotalmass' is deprecated"  # a remark on Gymnasium's half_cheetah.xml
    mujoco.set_mju_user_warning(lambda text: None if known in text else warnings.warn(f"MuJoCo: {text}", stacklevel=2))
    try:
        if any(isinstance(x, int) and abs(x) > 10_000 for x in (kwargs or {}).values()):  # such as frame_skip
            raise ValueError("a whole number among its arguments is above 10,000")
        if env_id.startswith("qalign_mazes:"):
            load_module(Path(__file__).resolve().parent / "data" / "qalign_mazes.py")  # registers them
        elif ":" not in env_id and env_id not in gymnasium.registry:
            import gymnasium_robotics

            gymnasium.register_envs(gymnasium_robotics)
        entry = gymnasium.spec(env_id.removeprefix("qalign_mazes:")).entry_point
        # env_id may come from a file, which must not choose other code
        if not f"{entry}".startswith(("gymnasium.envs.", "gymnasium_robotics.", "qalign_mazes:")):
            raise ValueError("not one of Gymnasium's, gymnasium_robotics' or this project's")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date. You should consider upgrading to version `v")
            env = gymnasium.make(env_id, max_episode_steps=-1, disable_env_checker=True, **(kwargs or {}))
        if isinstance(env.observation_space, gymnasium.spaces.Dict):
            env = gymnasium.wrappers.FlattenObservation(env)
        low, high = (np.asarray(getattr(env.action_space, name, np.nan)) for name in ("low", "high"))
        if len(env.observation_space.shape) != 1 or low.ndim != 1 or not np.isfinite([low, high]).all():
            raise ValueError("observations must be a vector, and actions a bounded vector")
        found, padded = env.observation_space.shape + low.shape, ("Ant-v4", False, (111, 8))  # by D4RL, with zeros
        if sizes not in (None, found) and (env_id, bool(kwargs), sizes) != padded:
            raise ValueError(f"obs_dim and act_dim are {found}, not {sizes}")
        if (low != -1).any() or (high != 1).any():
            env = gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
        return env
    except Exception as error:  # an unknown name, other spaces or arguments, a package that is missing
        fail(f"environment {env_id}: {one_line(error)}")


# ======== end of shared: environment ========


if __name__ == "__main__":
    run(main)
