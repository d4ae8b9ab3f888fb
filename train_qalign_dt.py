"""Stage 2 of Q-Align DT: co-train a return-conditioned policy and its critic (Algorithm 1).

    python train_qalign_dt.py --env hopper-medium-v2

Equations, tables and appendices are those of "Return-to-Go Is More Than a Number" (ICML 2026), "the release" is its
authors' code:

    shift_rtg         Eq. 2   all return-to-go (RTG) tokens of a window are moved by one scalar
    critic_loss       Eq. 7   TD targets take the target policy's action at an RTG raised by Delta_RTG
    alignment_loss    Eq. 5   an RTG raised (lowered) by a random delta must not lower (raise) Q
    actor_loss        Eq. 6   the supervised loss on actions and states + lambda_e times the alignment loss
    add_noise         ours    gives Eq. 5 a margin: Q is compared at noisy actions; off for D4RL's names
    limit_push        ours    keeps the alignment loss from outweighing imitation; off for D4RL's names
    CoTraining.follow ours    the result is a moving average of the policy's weights; off for D4RL's names
    CoTraining.step   Algorithm 1

Reads the dataset and stage 1's critic.pt (trained first if it is missing). Writes runs/<env>__<exp-name>__<seed>/ with
policy.pt (last step), policy_best.pt (best periodic evaluation), resume.pt, metrics.csv, evaluations.csv, TensorBoard
events. Stop it at any time, even with kill -9: the same command resumes. The paper's size wants a GPU.
The method ends with `evaluate`; what follows `main` is plumbing: files, resuming, task table and data.
"""

import contextlib
import copy
import ctypes
import difflib
import hashlib
import http.client
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import filelock
import gymnasium
import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    # <body>-<quality>-<tag>: a D4RL name (tag v2) or your own data's tag; or Minari's mujoco/<body>/<quality>-v0;
    # hopper-mini and halfcheetah-mini come with the code
    env: str = "hopper-mini"
    seed: int = 1  # seed of the initial weights, the windows, the perturbations and the evaluation episodes
    # HDF5 file(s) in D4RL's or Minari's layout to use instead; several are concatenated
    dataset_path: tuple[str, ...] = ()
    runs_dir: str = "runs"  # folder of all runs
    exp_name: str = "train_qalign_dt"  # name of this experiment; the run folder is <runs-dir>/<env>__<exp-name>__<seed>
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train; auto takes CUDA if there is one
    # arithmetic of the transformer's blocks; auto: bf16 where the hardware has it. All else is always float32
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False  # torch.compile the networks and, on CUDA, replay each step as one CUDA graph
    critic: str = ""  # stage 1's critic.pt (default: the one of this env and seed)
    # log to Weights & Biases, too: pip install wandb (its own WANDB_* variables choose the project)
    track: bool = False
    # wall-clock time between resume.pt files; on a CPU no bit of a run's result depends on it
    checkpoint_minutes: float = 2.0

    # gradient steps; the learning rates fall to 0 over them, but the policy's with --average (default: 100,000;
    # <body>-mini: 5,000)
    total_steps: int | None = None
    embed_dim: int | None = None  # width of the transformer (default: 256; <body>-mini: 64)
    n_layer: int | None = None  # number of transformer blocks (default: 4; <body>-mini: 2)
    n_head: int | None = None  # attention heads per block (default: 4; <body>-mini: 2)
    # K, the window length in environment steps of three tokens (default: 20; <body>-mini: 10)
    context_len: int | None = None
    batch_size: int | None = None  # windows per gradient step (default: 256; <body>-mini: 64)
    critic_width: int | None = None  # hidden width of the critic, that of --critic (default: 256; <body>-mini: 128)
    actor_lr: float | None = None  # Adam learning rate of the policy, with L2 1e-4 (default: 3e-4; <body>-mini: 1e-3)

    # weight of the alignment loss, Eq. 6 (default: Table D.8's row; own data: 0.1); 0 trains without a critic
    lambda_e: float | None = None
    # std of the RTG perturbation delta, Eq. 5, normalised RTG (default: Table D.8's row; own data: 1)
    sigma_e: float | None = None
    # Delta_RTG, by which the critic's target raises the RTG, Eq. 7 (default: Table D.8's row; own data: 0.5)
    delta_rtg: float | None = None
    # not the paper's: the alignment loss may push the actions at most so many times as hard as the action loss pulls
    # them; 0: no limit (default: 0 where Table D.8's row is taken, 0.3 for own data and Minari's)
    max_push: float | None = None
    # not the paper's: std of the noise on the actions at which Eq. 5 compares Q, in units of the policy's root mean
    # square error of actions (default: 0 where Table D.8's row is taken, 0.3 for own data and Minari's)
    action_noise: float | None = None
    # dropout rate of the policy in training (default: the release's 0.1 where Table D.8's row is taken, else 0)
    dropout: float | None = None
    # not the paper's: rate of the moving average of the policy's weights that is evaluated and saved, at a constant
    # learning rate; 0: the last weights (default: 0 where Table D.8's row is taken, 0.002 for own data and Minari's)
    average: float | None = None
    # not the paper's: a rollout's policy acts on the last so many steps of its window; 0: on all K of them
    # (default: 0 where Table D.8's row is taken, 5 for own data and Minari's)
    eval_context_len: int | None = None
    # form of the penalty: Eq. 5, or one of the two variants of Table E.11
    alignment: Literal["one-sided", "symmetric", "squared"] = "one-sided"
    conv: bool = True  # causal convolution after W_q, W_k, W_v (App. D.1)
    state_loss: bool = True  # reconstruct states too; a Decision Transformer is --lambda-e 0 --no-conv --no-state-loss
    update_q: bool = True  # co-train the critic; --no-update-q keeps stage 1's (Table E.10)
    q_noise: float = 0.0  # std sigma_n, in raw Q units, of the noise added to the target critic (Table E.13)
    # bounds of a shifted window's first RTG, normalised (default: the release's for D4RL data, else the data's own)
    rtg_range: tuple[float, float] | None = None

    # gradient steps between evaluations at high target returns; 0: never (default: a tenth of the run)
    eval_every: int | None = None
    eval_rollouts: int = 5  # episodes per target return in those evaluations

    def __post_init__(self):
        at_least_1 = dict.fromkeys(("embed_dim", "n_layer", "n_head", "context_len", "batch_size"), 1)
        check_args(self, at_least_1 | {"critic_width": 1, "eval_rollouts": 1, "rtg_range": -1e6, "delta_rtg": -1e6})
        if self.lambda_e != 0 and not self.state_loss:
            raise ValueError("--no-state-loss is for a Decision Transformer: add --lambda-e 0")
        if self.embed_dim and self.n_head and self.embed_dim % self.n_head:
            raise ValueError(f"--embed-dim {self.embed_dim} is not a multiple of --n-head {self.n_head}")
        if self.dropout and self.dropout >= 1:
            raise ValueError(f"--dropout {self.dropout}: must be below 1")
        if self.average and self.average > 1:
            raise ValueError(f"--average {self.average}: must not exceed 1")
        if self.rtg_range and self.rtg_range[0] > self.rtg_range[1]:
            raise ValueError(f"--rtg-range {self.rtg_range}: the first must be the smaller one")


@dataclass(frozen=True)
class Config(Args):
    """Args with every default resolved, and what the hardware, the data and the critic decide; checkpoints hold it."""

    bf16: bool = False
    max_timestep: int = 1000  # entries of the timestep embedding
    half_normal: bool = False  # delta = |eps| (App. D.5, AntMaze)
    gamma: float = 0.99  # stage 1's
    q_scale: float = 1.0  # Q is divided by it in Eq. 5; 1 except for AntMaze


# Table D.8: sigma_e, lambda_e, Delta_RTG. Ours, where it has no row: `expert` as medium-expert, `random` as medium,
# Ant as HalfCheetah, the large mazes as the others.
TABLE_D8 = {
    "walker2d": {"medium-replay": (10, 0.3, 2), "medium": (10, 0.3, 1), "medium-expert": (10, 0.3, 10)},
    "halfcheetah": {"medium-replay": (15, 5, 5), "medium": (15, 5, 10), "medium-expert": (15, 1, 10)},
    "hopper": {"medium-replay": (10, 0.3, 0.5), "medium": (10, 0.3, 1), "medium-expert": (10, 0.3, 5)},
    "antmaze": {"all": (5, 100, 1)},
}
SAME_QUALITY = {"expert": "medium-expert", "random": "medium"}
SIZES = ("total_steps", "embed_dim", "n_layer", "n_head", "context_len", "batch_size", "critic_width", "actor_lr")
PAPER = dict(zip(SIZES, (100_000, 256, 4, 4, 20, 256, 256, 3e-4)))
SMALL = dict(zip(SIZES, (5_000, 64, 2, 2, 10, 64, 128, 1e-3)))  # for small data and minutes on a CPU
# For all data that are neither D4RL's nor AntMaze: one set of numbers (results/README.md, "Robust alignment").
LOSS = ("sigma_e", "lambda_e", "delta_rtg", "max_push", "action_noise", "dropout", "average", "eval_context_len")
OTHER_DATA = dict(zip(LOSS, (1.0, 0.1, 0.5, 0.3, 0.3, 0.0, 0.002, 5)))
CRITIC_LR, L2, MAX_GRAD_NORM, TAU = 3e-4, 1e-4, 15.0, 0.005  # the release's
LOG_EVERY = 100  # gradient steps per row of metrics.csv


def resolve(args: Args, task: "Task", data: "Dataset", device: torch.device) -> Config:
    """Fill in the defaults that depend on the task, the data and the hardware."""
    loss = OTHER_DATA
    if task.tag == "v2" or task.body == "antmaze":
        quality = "all" if task.body == "antmaze" else SAME_QUALITY.get(task.quality, task.quality)
        row = TABLE_D8["halfcheetah" if task.body == "ant" else task.body][quality]
        loss = dict(zip(OTHER_DATA, (*row, 0.0, 0.0, 0.1, 0.0, 0)))
    defaults = loss | (SMALL if task.quality == "mini" else PAPER)
    rtg = data.returns_to_go() / task.rtg_scale
    defaults = defaults | {"rtg_range": task.rtg_range if data.is_d4rl else (float(rtg.min()), float(rtg.max()))}
    values = vars(args) | defaults | {name: value for name, value in vars(args).items() if value is not None}
    values["device"] = device.type  # the random streams of CPU and CUDA differ, so a run stays on one kind
    values["bf16"] = use_bf16(args.precision, device)
    values["max_timestep"] = max(HORIZON, int(data.lengths.max()))
    values["half_normal"] = task.body == "antmaze"
    if values["eval_every"] is None:
        values["eval_every"] = max(values["total_steps"] // 10, 1)
    return Config(**values)


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


# ======== shared: windows ========


class Batch(NamedTuple):
    """B windows of K steps, left-padded: all zero where not valid. The first five are the policy's inputs."""

    rtg: torch.Tensor  # (B, K) normalised return-to-go
    obs: torch.Tensor  # (B, K, obs_dim) standardised
    act: torch.Tensor  # (B, K, act_dim)
    timestep: torch.Tensor  # (B, K) index in the episode
    valid: torch.Tensor  # (B, K) bool
    reward: torch.Tensor  # (B, K) as the critic sees it
    terminal: torch.Tensor  # (B, K) bool: the MDP ended here (a timeout is not one)


class Windows:
    """The whole dataset on the training device; a batch of windows is index arithmetic on it."""

    def __init__(self, data: "Dataset", task: "Task", context_len: int, device: torch.device):
        self.K, self.offsets = context_len, torch.arange(context_len, device=device)
        self.obs = torch.as_tensor(data.observations).to(device)
        self.obs = (self.obs - data.obs_mean.to(device)).div_(data.obs_std.to(device))
        self.act = torch.as_tensor(data.actions).to(device)
        self.rtg = torch.as_tensor(data.returns_to_go() / task.rtg_scale, dtype=torch.float32).to(device)
        self.reward = torch.as_tensor(data.rewards).to(device) + task.critic_reward_shift
        self.terminal = torch.as_tensor(data.terminals).to(device)
        self.end = torch.as_tensor(np.repeat(data.ends, data.lengths)).to(device)  # (N,) of the episode, exclusive
        self.timestep = torch.as_tensor(np.arange(len(self.rtg)) - np.repeat(data.starts, data.lengths)).to(device)

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Windows that start at transitions drawn uniformly."""
        return self.at(torch.randint(len(self.rtg), (batch_size, 1), generator=generator, device=self.rtg.device))

    def at(self, start: torch.Tensor) -> Batch:
        """Windows [i, min(i + K, end of the episode)) for the transitions i of start (B, 1)."""
        padding = self.K - torch.clamp(self.end[start] - start, max=self.K)  # (B, 1)
        valid = self.offsets >= padding  # (B, K)
        index = torch.where(valid, start + self.offsets - padding, start)

        def window(x):
            return x[index].masked_fill(~valid if x.dim() == 1 else ~valid[..., None], 0)

        context = (window(x) for x in (self.rtg, self.obs, self.act, self.timestep))
        return Batch(*context, valid, window(self.reward), window(self.terminal))


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of x over the positions where mask is True (0 if there is none)."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


# ======== end of shared: windows ========


def shift_rtg(batch: Batch, shift, rtg_range):
    """Eq. 2: move all RTG tokens of a window by one scalar, such that its first valid RTG stays in rtg_range (release).

    shift (B, 1) or a number -> the shifted windows' inputs to the policy, and the shift really applied (B, 1). (Bounds
    that exclude the window's own RTG can turn the shift round; Eq. 5 goes by the applied one.)
    """
    first = batch.rtg.gather(1, batch.valid.int().argmax(dim=1, keepdim=True))
    applied = (first + shift).clamp(*rtg_range) - first
    rtg = torch.where(batch.valid, batch.rtg + applied, batch.rtg)
    return (rtg, batch.obs, batch.act, batch.timestep, batch.valid), applied


def critic_target(batch: Batch, q_raised, gamma: float):
    """Eq. 7's y_i = r_i + gamma q_{i+1} (it omits 1 - terminal_i), and the mask of the steps where it is defined.

    q_raised (B, K): min_m Q'_m(s_i, a'_i) at every step of the window -> y (B, K), mask (B, K). A window's last step
    has no s_{i+1} in it, so it counts only as a true terminal.
    """
    y = batch.reward + gamma * ~batch.terminal * F.pad(q_raised[:, 1:], (0, 1))
    K = batch.valid.shape[1]
    last = torch.arange(K, device=y.device) == K - 1  # (K,)
    return y, batch.valid & (~last | batch.terminal)


def critic_loss(critic, target_critic, target_policy, batch: Batch, config: Config, generator: torch.Generator):
    """L_q of Eq. 7: MSE(Q_1, y) + MSE(Q_2, y)."""
    with torch.no_grad():
        raised, _ = shift_rtg(batch, config.delta_rtg, config.rtg_range)
        a_raised, _ = target_policy(*raised)
        q_raised = target_critic(batch.obs, a_raised).amin(dim=0)  # (B, K)
        if config.q_noise:
            q_raised += config.q_noise * torch.randn(q_raised.shape, generator=generator, device=q_raised.device)
        y, mask = critic_target(batch, q_raised, config.gamma)
    q_1, q_2 = critic(batch.obs, batch.act)  # (B, K) each
    return masked_mean((q_1 - y) ** 2, mask) + masked_mean((q_2 - y) ** 2, mask)


# ======== shared: supervised ========


def supervised_loss(a_hat, s_hat, batch: Batch):
    """The two halves of L_SL, Eq. 6, as means over valid steps and dimensions.

    (The paper writes sums; its lambda_e belongs to the means that the release takes.)
    """
    action_loss = masked_mean(((a_hat - batch.act) ** 2).mean(dim=-1), batch.valid)
    state_loss = masked_mean(((s_hat - batch.obs) ** 2).mean(dim=-1), batch.valid)
    return action_loss, state_loss


# ======== end of shared: supervised ========


def alignment_loss(q_delta, q, sign, valid, kind: str):
    """L_align, Eq. 5: a penalty where Q moved against the shift of the RTG. Also returns the share of such steps.

    q_delta, q (2, B, K): Q_m(s_i, a_hat_delta_i) and Q_m(s_i, a_hat_i); sign (B, 1): of the shift really applied.
    Eq. 5 sums over the steps for one Q; the mean, and how two critics are combined, are the release's.
    """
    violation = -sign * (q_delta - q.detach())  # (2, B, K)
    if kind == "one-sided":
        penalty = F.relu(violation).amin(dim=0)  # the smaller of the two penalties
    elif kind == "squared":
        penalty = F.relu(violation).square().mean(dim=0)
    else:  # symmetric
        penalty = violation.mean(dim=0)
    return masked_mean(penalty, valid), masked_mean((violation > 0).all(dim=0).float(), valid)


def limit_push(a_hat_delta, a_hat, batch: Batch, ratio: float) -> None:
    """Not the paper's: scale down the gradient that reaches a_hat_delta, Eq. 5's, where it is too large for imitation.

    Its norm over the batch (B, K, act_dim) is limited to ratio times that of the action loss's gradient by a_hat: Q's
    slope, lambda_e and the share of violated steps no longer decide whether the policy still imitates.
    """
    with torch.no_grad():
        pull = 2 * (a_hat - batch.act) * batch.valid[..., None] / (batch.valid.sum() * a_hat.shape[-1])  # d action_loss
        limit = ratio * pull.norm()
    a_hat_delta.register_hook(lambda push: push * (limit / push.norm().clamp(min=1e-12)).clamp(max=1))


def add_noise(a_hat_delta, a_hat, batch: Batch, ratio: float, generator: torch.Generator):
    """Not the paper's: both actions (B, K, act_dim) with independent noise, its std ratio times the RMS of a_hat - a.

    Eq. 5 is content with any change of Q in the right direction. Between noisy actions the change must stand out from
    the policy's own errors: a margin in units of actions, whatever Q's scale. (In the release the two windows have
    dropout masks of their own, which has the same effect by chance.)
    """
    error = masked_mean(((a_hat.detach() - batch.act) ** 2).mean(dim=-1), batch.valid).sqrt()
    noise = ratio * error * torch.randn((2, *a_hat.shape), generator=generator, device=a_hat.device)
    return a_hat_delta + noise[0], a_hat.detach() + noise[1]


def actor_loss(policy, critic, batch: Batch, config: Config, generator: torch.Generator):
    """L_SL + lambda_e L_align, Eq. 6, and for the log: action, state, alignment loss, share of violations, mean Q_1.

    L_align's gradient reaches the policy through a_hat_delta only; Q's weights get none.
    """
    delta = config.sigma_e * torch.randn(len(batch.rtg), 1, generator=generator, device=batch.rtg.device)  # per window
    perturbed, applied = shift_rtg(batch, delta.abs() if config.half_normal else delta, config.rtg_range)
    if config.lambda_e == 0:
        a_hat, s_hat = policy(*batch[:5])
        align = violated = q_mean = torch.zeros((), device=batch.rtg.device)
    else:
        # clean and perturbed windows in one forward pass; dropout draws an independent mask for each
        both = [torch.cat(pair) for pair in zip(batch[:5], perturbed)]
        (a_hat, a_hat_delta), (s_hat, _) = (x.chunk(2) for x in policy(*both))
        a_delta, a = a_hat_delta, a_hat  # where Q is compared
        if config.action_noise:
            a_delta, a = add_noise(a_hat_delta, a_hat, batch, config.action_noise, generator)
        if config.max_push:
            limit_push(a_hat_delta, a_hat, batch, config.max_push)
        with torch.no_grad():
            q = critic(batch.obs, a)
            q_mean = masked_mean(q[0], batch.valid)
        critic.requires_grad_(False)  # Eq. 5 differentiates Q with respect to the action, not to its own weights
        q_delta = critic(batch.obs, a_delta)
        critic.requires_grad_(True)
        scale = config.q_scale
        align, violated = alignment_loss(q_delta / scale, q / scale, applied.sign(), batch.valid, config.alignment)
    action_loss, state_loss = supervised_loss(a_hat, s_hat, batch)
    loss = action_loss + config.lambda_e * align
    if config.state_loss:
        loss = loss + state_loss
    return loss, (action_loss.detach(), state_loss.detach(), align.detach(), violated, q_mean)  # CoTraining.metrics


class CoTraining:
    """All that Algorithm 1 updates, and one step of it, without any CPU-GPU synchronisation."""

    metrics = ("loss", "action_loss", "state_loss", "align_loss", "violated", "q_mean")
    metrics += ("actor_grad_norm", "q_loss", "critic_grad_norm")

    def __init__(self, task: "Task", windows: Windows, config: Config, critic_weights: dict | None = None):
        """Line 1. critic_weights: stage 1's (None: a random critic). Sets torch's global seed."""
        self.windows, self.config, device = windows, config, windows.rtg.device
        torch.manual_seed(config.seed)  # of the weights and of dropout
        self.generator = torch.Generator(device).manual_seed(config.seed)  # of windows, deltas and noise
        self.policy = make_policy(task, vars(config), config.bf16).to(device)
        self.critic = MLP(2, task.obs_dim + task.act_dim, config.critic_width).to(device)
        if critic_weights:
            self.critic.load_state_dict(critic_weights)
        self.target_policy = copy.deepcopy(self.policy).requires_grad_(False).eval()  # no dropout in targets
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        adam = dict(fused=True, capturable=device.type == "cuda")  # lr as a tensor, which a CUDA graph reads anew
        lr = torch.zeros(2, device=device)
        self.actor_opt = torch.optim.Adam(self.policy.parameters(), lr[0], weight_decay=L2, **adam)
        self.critic_opt = torch.optim.Adam(self.critic.parameters(), lr[1], **adam)
        # what is evaluated and saved
        self.result = copy.deepcopy(self.target_policy) if config.average else self.policy
        self.nets = dict(policy=self.policy, target_policy=self.target_policy)
        self.nets |= dict(critic=self.critic, target_critic=self.target_critic)
        self.parts = self.nets | dict(actor_opt=self.actor_opt, critic_opt=self.critic_opt)  # what resume.pt holds
        if config.average:
            self.parts["average"] = self.result
        if config.compile:
            self.nets = {name: torch.compile(net, dynamic=False) for name, net in self.nets.items()}

    def set_learning_rates(self, step: int) -> float:
        """Both fall to 0 along a cosine, but the actor's where its weights are averaged; returns the actor's."""
        factor = 0.5 * (1 + math.cos(math.pi * step / self.config.total_steps))
        actor_lr = self.config.actor_lr * (1 if self.config.average else factor)
        self.actor_opt.param_groups[0]["lr"].fill_(actor_lr)
        self.critic_opt.param_groups[0]["lr"].fill_(CRITIC_LR * factor)
        return actor_lr

    def step(self) -> torch.Tensor:
        """Algorithm 1, lines 3 to 11; returns the values of `metrics` (9,), on the device."""
        config, nets = self.config, self.nets
        batch = self.windows.sample(config.batch_size, self.generator)  # lines 3-4
        q_metrics = torch.zeros(2, device=batch.rtg.device)
        co_trained = config.lambda_e > 0 and config.update_q
        if co_trained:  # lines 5-6
            targets = nets["target_critic"], nets["target_policy"]
            q_loss = critic_loss(nets["critic"], *targets, batch, config, self.generator)
            q_norm = descend(self.critic_opt, q_loss)
            q_metrics = torch.stack([q_loss.detach(), q_norm])
        loss, metrics = actor_loss(nets["policy"], nets["critic"], batch, config, self.generator)  # lines 7-9
        norm = descend(self.actor_opt, loss)  # line 10
        if co_trained:  # line 11; nothing else uses the targets
            ema_update(self.target_policy, self.policy, TAU)
            ema_update(self.target_critic, self.critic, TAU)
        return torch.cat([torch.stack([loss.detach(), *metrics, norm]), q_metrics])

    def follow(self, step: int) -> None:
        """Not the paper's: move the average after the step-th step; up to step 1 / average it is the plain mean."""
        if self.config.average:
            ema_update(self.result, self.policy, max(self.config.average, 1 / step))


def descend(opt: torch.optim.Optimizer, loss: torch.Tensor) -> torch.Tensor:
    """One gradient step with the norm clipped; returns the norm before clipping."""
    opt.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], MAX_GRAD_NORM)
    opt.step()
    return norm


@torch.no_grad()
def evaluate(policy: Policy, task: "Task", targets, config: Config, data: "Dataset") -> list[float]:
    """Mean D4RL score at each raw target return (Sec. 6.2), over eval_rollouts episodes, the same ones every time.

    All episodes advance together, the policy sees them as one batch; after each step rtg <- rtg - r / rtg_scale.
    """
    training = policy.training
    policy.eval()
    n, K, device = len(targets) * config.eval_rollouts, config.context_len, next(policy.parameters()).device
    envs, first_seed = [make_env(task.env_id) for _ in range(n)], 1_000_000 + 1_000 * config.seed
    observations = [env.reset(seed=first_seed + i % config.eval_rollouts)[0] for i, env in enumerate(envs)]
    left = np.repeat(np.array(targets, dtype=np.float64), config.eval_rollouts)  # (n,) raw return-to-go
    returns, alive = np.zeros(n), np.ones(n, bool)
    rtg, obs, act = torch.zeros(n, K), torch.zeros(n, K, task.obs_dim), torch.zeros(n, K, task.act_dim)
    for t in range(task.horizon):
        rtg, obs, act = (x.roll(-1, dims=1) for x in (rtg, obs, act))  # the last K steps, padded on the left
        rtg[:, -1], act[:, -1] = torch.as_tensor(left / task.rtg_scale), 0
        raw = torch.as_tensor(np.stack(observations), dtype=torch.float32)
        obs[:, -1] = (F.pad(raw, (0, task.obs_dim - raw.shape[1])) - data.obs_mean) / data.obs_std  # Ant: D4RL's zeros
        times = torch.arange(t + 1 - K, t + 1).expand(n, K)
        context = (rtg, obs, act, times.clamp(min=0), times >= 0)
        act[:, -1] = policy.act(*(x.to(device) for x in context)).cpu()
        for i in np.flatnonzero(alive):
            observations[i], reward, terminated, _, _ = envs[i].step(act[i, -1].numpy().astype(np.float64))
            returns[i], left[i], alive[i] = returns[i] + reward, left[i] - reward, not terminated
        if not alive.any():
            break
    for env in envs:
        env.close()
    policy.train(training)
    return task.score(returns).reshape(len(targets), -1).mean(axis=1).tolist()


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    task, device = parse_env(args.env), pick_device(args.device)
    data = read_dataset(task, args.dataset_path)
    config = resolve(args, task, data, device)
    identity = {name: value for name, value in vars(config).items() if name not in NOT_OF_THE_RUN}
    identity["data"] = data.digest
    folder = Path(args.runs_dir) / f"{task.folder}__{args.exp_name}__{args.seed}"
    finished = load_own(folder / "policy.pt", "train_qalign_dt", identity)
    if finished and finished.get("step") == config.total_steps:
        return print(f"{folder}/policy.pt is finished; nothing to do (another run: --exp-name)")
    state, critic_weights = load_own(folder / "resume.pt", "train_qalign_dt", identity), None
    if config.lambda_e > 0 and not state:  # resume.pt holds the critic: stage 1's is no longer needed
        config, critic_weights = stage_1(args, config, task, data, device)
    high_targets = task.targets(data.is_d4rl, float(data.returns.max()))

    with claim(folder) as stack:
        if args.track:
            track(args, folder)
        learner = CoTraining(task, Windows(data, task, config.context_len, device), config, critic_weights)
        train_step = learner.step
        if config.compile and device.type == "cuda":
            train_step = cuda_graph(learner.step, learner.generator).__next__
        sums = torch.zeros(len(learner.metrics), device=device)  # of the metrics since the last row of metrics.csv
        step, best, rows, scores = 0, -math.inf, [], []  # of metrics.csv and of evaluations.csv
        if state:
            names = ("step", "best", "rows", "scores", "gamma", "q_scale")
            counters = restore(state, folder / "resume.pt", learner, sums, config.total_steps, names)
            step, best, rows, scores, gamma, q_scale = counters
            config = learner.config = replace(config, gamma=gamma, q_scale=q_scale)
        print(f"{folder}: {data.label}, {len(data.rewards):,} transitions, {len(data.ends):,} episodes, step {step:,}")
        metrics, evaluations = Log(folder, "metrics", rows), Log(folder, "evaluations", scores)
        bar = tqdm(
            total=config.total_steps, initial=step, unit="step", desc="training", dynamic_ncols=True, disable=None
        )
        stack.enter_context(bar)

        def save_policy(name: str, **extra) -> None:  # all that later stages need
            check_finite(learner, sums, step)
            content = dict(stage="train_qalign_dt", env=args.env, config=identity | {"gamma": config.gamma}, step=step)
            content |= dict(data=data.summary(), obs_mean=data.obs_mean, obs_std=data.obs_std)
            critic = learner.critic.state_dict() if config.lambda_e > 0 else None
            content |= dict(policy=learner.result.state_dict(), critic=critic)
            save_checkpoint(folder / name, content | {"episode_returns": torch.as_tensor(data.returns)} | extra)

        def save() -> None:
            counters = dict(step=step, best=best, rows=rows, scores=scores, gamma=config.gamma, q_scale=config.q_scale)
            save_resume(folder, dict(stage="train_qalign_dt", config=identity, counters=counters), learner, sums)
            save_policy("policy.pt")

        saved = time.monotonic()
        while True:
            due = config.eval_every and (step % config.eval_every == 0 or step == config.total_steps)
            if due and (not scores or scores[-1]["step"] < step):
                achieved = evaluate(learner.result, task, high_targets, config, data)
                evaluations.write({"step": step} | {f"score_at_{x:g}": y for x, y in zip(high_targets, achieved)})
                shown = (f"{y:.1f} at target return {x:g}" for x, y in zip(high_targets, achieved))
                bar.write(f"step {step:,}: score {', '.join(shown)}")
                if max(achieved) > best:
                    best = max(achieved)
                    save_policy("policy_best.pt", score=best)
            if step == config.total_steps:
                break
            actor_lr = learner.set_learning_rates(step)
            sums += train_step()
            step += 1
            learner.follow(step)
            bar.update()
            if step % LOG_EVERY == 0 or step == config.total_steps:
                check_finite(learner, sums, step)
                means = (sums / ((step - 1) % LOG_EVERY + 1)).tolist()  # over the steps since the last row
                metrics.write({"step": step, **dict(zip(learner.metrics, means)), "actor_lr": actor_lr})
                shown = ("action_loss", "state_loss", "align_loss", "violated", "q_mean")
                bar.set_postfix_str(" ".join(f"{name} {rows[-1][name]:.3g}" for name in shown))
                sums.zero_()
            if time.monotonic() - saved > args.checkpoint_minutes * 60:
                save()
                saved = time.monotonic()
        save()
    print(f"{folder}/policy.pt: {step:,} steps")
    if scores:
        print(f"{folder}/policy_best.pt: score {best:.1f} at a high target return")


NOT_OF_THE_RUN = ("dataset_path", "runs_dir", "critic", "track", "checkpoint_minutes", "gamma", "q_scale")  # of Config


def stage_1(args: Args, config: Config, task: "Task", data: "Dataset", device) -> tuple[Config, dict]:
    """The configuration with stage 1's discount, and the weights of its critic, which is trained if it is missing."""
    path = Path(args.critic or Path(args.runs_dir) / f"{task.folder}__pretrain_q__{args.seed}" / "critic.pt")
    script = Path(__file__).resolve().parent / "pretrain_q.py"
    if not args.critic and not os.path.lexists(path) and script.is_file():
        CoTraining(task, Windows(data, task, config.context_len, device), config).step()  # out of memory? better now
        print(f"{path} is missing: starting pretrain_q.py", flush=True)
        command = [sys.executable, script, "--env", args.env, "--seed", args.seed, "--runs-dir", args.runs_dir]
        command += ["--device", args.device, "--critic-width", config.critic_width]
        command += ["--dataset-path", *args.dataset_path] if args.dataset_path else []
        command += ["--track"] * args.track
        if code := subprocess.run([str(part) for part in command]).returncode:
            sys.exit(code if code > 0 else 128 - code)  # it has said why
    content = load_checkpoint(path, "pretrain_q")
    try:
        if content["config"]["data"] != data.digest:
            fail(f"{path}: a critic of other data ({content['data']['label']}); use that data, or another --runs-dir")
        MLP(2, task.obs_dim + task.act_dim, config.critic_width).load_state_dict(content["critic"])
        if not all(weight.isfinite().all() for weight in content["critic"].values()):
            raise ValueError("weights that are not finite")
        # AntMaze: the release divides Q by its mean |min Q| over the data, the scale that lambda_e = 100 belongs to
        q_scale = content["report"]["q_abs_mean"] if task.body == "antmaze" else 1.0
        return replace(config, gamma=content["config"]["gamma"], q_scale=q_scale), content["critic"]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        fail(f"{path}: not a critic for this run ({one_line(error)}); check --critic-width, or train it again")


def cuda_graph(step, generator: torch.Generator):
    """Yields the result of step() forever: three times called, then recorded as a CUDA graph, then replayed.

    A hundred kernels then cost the CPU one launch. All state must be in tensors that `step` changes in place.
    """
    stream = torch.cuda.Stream()
    for _ in range(3):  # warm-up on a stream of its own, as torch asks for
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = step()
        torch.cuda.current_stream().wait_stream(stream)
        yield result
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)  # torch's own one is registered already
    with torch.cuda.graph(graph):
        result = step()
    while True:
        graph.replay()
        yield result


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

# ======== shared: run ========


@contextlib.contextmanager
def claim(folder: Path):
    """Make the run folder and hold its lock; exits 2 if another process does. Removes leftover temporary files."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            for left in folder.glob("*.tmp"):
                left.unlink()
            with contextlib.ExitStack() as stack:  # closes the progress bar before an error is printed
                yield stack
    except filelock.Timeout:
        fail(f"{folder}: another process is writing this run; wait for it, or choose another --exp-name or --seed")
    except BaseException as error:
        saved = f"{folder}/resume.pt is the last good state" if (folder / "resume.pt").exists() else "nothing was saved"
        error.add_note(f"{saved}; the same command continues")
        raise


def load_own(path: Path, stage: str, identity: dict) -> dict | None:
    """The run's own checkpoint, None if there is none; exits 2 if it is of another configuration or other data."""
    if not os.path.lexists(path):
        return None
    content = load_checkpoint(path, stage)
    theirs = content.get("config", {})
    differs = [f"{k} {theirs.get(k)} there, {ours} here" for k, ours in identity.items() if theirs.get(k) != ours]
    if differs:
        fail(f"{path} is of another run ({'; '.join(differs[:3])}); choose another --exp-name, or remove {path.parent}")
    return content


def save_checkpoint(path: Path, content: dict) -> None:
    buffer = io.BytesIO()
    torch.save(content | {"format": FORMAT}, buffer)
    write_file(path, buffer.getbuffer())


def check_finite(learner, sums: torch.Tensor, step: int) -> None:
    """FloatingPointError on NaN and infinity: a bad state never replaces a good one."""
    weights = [p for part in learner.parts.values() if isinstance(part, nn.Module) for p in part.parameters()]
    if not all(x.isfinite().all() for x in (sums, *weights)):
        raise FloatingPointError(f"step {step:,}: a loss or weight is NaN or infinite; try a lower learning rate")


def save_resume(folder: Path, content: dict, learner, sums: torch.Tensor) -> None:
    """What a killed run needs to continue (on a CPU bit for bit): networks, optimisers, random streams, counters."""
    check_finite(learner, sums, content["counters"]["step"])
    cuda = torch.cuda.get_rng_state() if sums.is_cuda else torch.zeros(0)
    content["random"], content["sums"] = (learner.generator.get_state(), torch.get_rng_state(), cuda), sums
    save_checkpoint(folder / "resume.pt", content | {name: part.state_dict() for name, part in learner.parts.items()})


def restore(content: dict, path: Path, learner, sums: torch.Tensor, total_steps: int, names: tuple) -> list:
    """The reverse of save_resume; returns the named counters. Exits 2 on a state that cannot be of this run."""
    try:
        for name, part in learner.parts.items():
            part.load_state_dict(content[name])
            for group in getattr(part, "param_groups", ()):
                if torch.is_tensor(group["lr"]):  # loaded onto the CPU
                    group["lr"] = group["lr"].to(sums.device)
        sums.copy_(content["sums"])
        generator, cpu, cuda = content["random"]
        learner.generator.set_state(generator)
        torch.set_rng_state(cpu)
        if sums.is_cuda:
            torch.cuda.set_rng_state(cuda)
        check_finite(learner, sums, content["counters"]["step"])
        if content["counters"]["step"] not in range(total_steps + 1):
            raise ValueError(f"step {content['counters']['step']}")
        return [content["counters"][name] for name in names]
    except (ArithmeticError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        fail(f"{path}: not a state of this run ({one_line(error)}); remove it to start anew")


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau online (Algorithm 1, line 11)."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


class Log:
    """Rows that resume.pt keeps, written to <name>.csv and as TensorBoard scalars."""

    def __init__(self, folder: Path, name: str, rows: list[dict]):
        from torch.utils.tensorboard import SummaryWriter  # imported here: it takes a second

        # a full disk, say, ends the writer's thread; our own next file fails for the same reason, and says so
        threading.excepthook = lambda a: isinstance(a.exc_value, OSError) or threading.__excepthook__(a)
        self.file, self.rows, purge_step = folder / f"{name}.csv", rows, rows[-1]["step"] + 1 if rows else None
        self.tensorboard = SummaryWriter(folder / "tensorboard" / name, purge_step=purge_step)

    def write(self, row: dict) -> None:
        self.rows.append(row)
        lines = [",".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in row.values()) for row in self.rows]
        write_file(self.file, "\n".join([",".join(row), *lines, ""]).encode())
        for name, value in row.items():
            self.tensorboard.add_scalar(name, value, row["step"])


# ======== end of shared: run ========

# ======== shared: track ========


def track(args, folder: Path) -> None:
    """Weights & Biases gets what TensorBoard gets; a run that resumes goes on there, too."""
    try:
        import wandb

        if not (file := folder / "wandb_id").exists():
            write_file(file, os.urandom(4).hex().encode())
        options = dict(id=file.read_text(), resume="allow", sync_tensorboard=True, save_code=True, dir=args.runs_dir)
        project = os.environ.get("WANDB_PROJECT", "q-align-dt")
        wandb.init(project=project, name=folder.name, config=vars(args), **options)
    except ImportError:
        fail("--track: pip install wandb")
    except wandb.Error as error:  # no login, no network
        fail(f"--track: {one_line(error)}")


# ======== end of shared: track ========

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

# ======== shared: dataset ========

D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl"


@dataclass
class Dataset:
    """Transitions of complete episodes, one episode after the other (N transitions, E episodes)."""

    observations: np.ndarray  # (N, obs_dim) float32, raw
    actions: np.ndarray  # (N, act_dim) float32, in [-1, 1]
    rewards: np.ndarray  # (N,) float32, raw
    terminals: np.ndarray  # (N,) bool: the MDP ended; the other episodes end by timeout
    ends: np.ndarray  # (E,) int64, exclusive
    label: str  # how plots, logs and JSON call the data
    is_d4rl: bool  # D4RL's own file; False for everything given with --dataset-path or found in data/

    def __post_init__(self):
        self.starts = np.concatenate([[0], self.ends[:-1]])
        self.lengths = self.ends - self.starts
        self.returns = np.add.reduceat(self.rewards, self.starts, dtype=np.float64)  # (E,) undiscounted
        self.obs_mean = torch.as_tensor(self.observations.mean(axis=0, dtype=np.float64), dtype=torch.float32)
        self.obs_std = torch.as_tensor(self.observations.std(axis=0, dtype=np.float64) + 1e-6, dtype=torch.float32)
        arrays = (self.observations, self.actions, self.rewards, self.terminals, self.ends)
        digests = [hashlib.sha256(np.ascontiguousarray(x)).digest() for x in arrays]
        self.digest = hashlib.sha256(b"".join(digests)).hexdigest()[:16]

    def returns_to_go(self) -> np.ndarray:
        """(N,) raw, undiscounted: sum of r_i from each transition to the end of its episode."""
        total = np.cumsum(self.rewards, dtype=np.float64)
        return total[np.repeat(self.ends, self.lengths) - 1] - total + self.rewards

    def summary(self) -> dict:
        return {"label": self.label, "is_d4rl": self.is_d4rl, "digest": self.digest}


def read_dataset(task: Task, dataset_path: tuple[str, ...]) -> Dataset:
    """The data of a task: --dataset-path, data/<env>.hdf5, or D4RL's (downloaded once); exits 2 on impossible data."""
    is_d4rl = not dataset_path and task.tag == "v2"
    here = Path(__file__).resolve().parent
    own = (here.parent if here.name == "baselines" else here) / "data" / f"{task.name}.hdf5"
    if "/" in task.name and not dataset_path:
        own = minari_file(task)
    paths = [Path(p) for p in dataset_path] or [d4rl_file(task) if is_d4rl else own]
    parts = [read_hdf5(path, task) for path in paths]
    observations, actions, rewards, terminals, episode_end = (np.concatenate(arrays) for arrays in zip(*parts))
    if outside := int((np.abs(actions) > 1).any(axis=1).sum()):
        print(f"warning: clipped {outside:,} actions to [-1, 1]", file=sys.stderr)
        actions = actions.clip(-1, 1)
    label = f"{task.name} (D4RL)" if is_d4rl else f"{task.body} data, not D4RL: {' + '.join(p.name for p in paths)}"
    if "/" in task.name and not dataset_path:
        label = f"{task.name} (Minari)"
    return Dataset(observations, actions, rewards, terminals, np.flatnonzero(episode_end) + 1, label, is_d4rl)


def read_hdf5(path: Path, task: Task) -> list[np.ndarray]:
    """One file in D4RL's or Minari's layout, checked, without its incomplete last episode.

    Returns observations, actions, rewards, terminals, and where episodes end; shapes as in Dataset, the last (N,) bool.
    """
    keys = ("observations", "actions", "rewards", "terminals", "timeouts")
    try:
        with open(path, "rb"), h5py.File(path, "r") as f:
            if minari := "episode_0" in f:
                check_recorded(path, task)
            for key in () if minari else keys:
                if not isinstance(f.get(key), h5py.Dataset) or f[key].is_virtual or f[key].dtype.kind not in "biuf":
                    fail(f"{path}: no array of numbers {key!r} in this file; D4RL's layout has {', '.join(keys)}")
            arrays = minari_arrays(f) if minari else [np.asarray(f[key]) for key in keys]
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        fail(f"{path}: {one_line(error)}; check --env and --dataset-path, or make it with data/collect_dataset.py")
    N = arrays[0].shape[0] if arrays[0].ndim else 0
    shapes = ((N, task.obs_dim), (N, task.act_dim), (N,), (N,), (N,))
    for i, (key, shape) in enumerate(zip(keys, shapes)):
        if arrays[i].shape not in (shape, (*shape, 1)) or arrays[i].dtype.kind not in "biuf":  # flags may be columns
            found = f"shape {arrays[i].shape} and type {arrays[i].dtype}"
            fail(f"{path}: {key} has {found}, {task.body} with {N:,} observations needs numbers of shape {shape}")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
            arrays[i] = arrays[i].reshape(shape).astype(np.float32)
        if not np.isfinite(arrays[i]).all():
            row = int(np.argwhere(~np.isfinite(arrays[i]))[0][0])
            fail(f"{path}: {key} has a NaN or infinite value, first in row {row:,}")
    observations, actions, rewards = arrays[:3]
    terminals, episode_end = arrays[3] > 0, (arrays[3] > 0) | (arrays[4] > 0)
    if task.body == "antmaze":
        rows, episode_end = until_first_success(observations, terminals, arrays[4] > 0)
        observations, actions, rewards, terminals = (x[rows] for x in (observations, actions, rewards, terminals))
        print(f"{path}: {len(rows) - rows.sum():,} of {len(rows):,} transitions come after a first success: left out")
    if task.body == "ant" and observations[:, 27:].any():
        fail(f"{path}: the last 84 of Ant's 111 observations, contact forces, must be zero as in D4RL: Ant-v4 has none")
    if not episode_end.any():
        fail(f"{path}: no complete episode (terminals and timeouts are all False)")
    n = int(np.flatnonzero(episode_end)[-1]) + 1
    return [x[:n] for x in (observations, actions, rewards, terminals, episode_end)]


def minari_arrays(f: h5py.File) -> list[np.ndarray]:
    """The arrays of D4RL's layout from Minari's groups episode_0, episode_1, ... (each with T + 1 observations)."""
    episodes = [f[f"episode_{i}"] for i in range(len(f)) if len(f[f"episode_{i}/rewards"])]
    lengths = [len(episode["rewards"]) for episode in episodes]
    keys = ("observations", "actions", "rewards", "terminations", "truncations")
    arrays = [np.concatenate([e[key][:n] for e, n in zip(episodes, lengths)]) for key in keys]
    arrays[4][np.cumsum(lengths) - 1] = True  # an episode ends where its group does
    return arrays


def minari_file(task: Task) -> Path:
    """Minari's local copy of a dataset; exits 2 if there is none."""
    root = os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets"
    path = Path(root) / task.name / "data" / "main_data.hdf5"
    if not path.is_file():
        fail(f"{path} is missing: pip install 'minari[hdf5,hf]' && minari download {task.name}")
    return path


def check_recorded(path: Path, task: Task) -> None:
    """Exits 2 unless the metadata.json beside a Minari file names the task's own environment."""
    try:
        spec = json.loads(json.loads((path.parent / "metadata.json").read_text())["env_spec"])
        recorded_in, kwargs = spec["id"], spec.get("kwargs") or {}
    except (OSError, KeyError, TypeError, ValueError) as error:
        fail(f"{path.parent}/metadata.json names no environment ({one_line(error)}); download the dataset again")
    options = {k: v for k, v in kwargs.items() if k.partition("_")[0] not in ("render", "width", "height", "camera")}
    if recorded_in != task.env_id or options:
        fail(f"{path} was recorded in {recorded_in} {options or ''}; --env {task.name} is evaluated in {task.env_id}")


def until_first_success(observations, terminals, timeouts) -> tuple[np.ndarray, np.ndarray]:
    """AntMaze: (N,) which rows come up to the first success of their trajectory; and which of those end an episode.

    D4RL marks every step near the goal as terminal while the trajectory goes on; cut at each, as the release does, it
    falls apart into one-step episodes of return 1. A trajectory ends by timeout, or where the ant jumps by a metre.
    """
    end = timeouts.copy()
    end[:-1] |= np.linalg.norm(np.diff(observations[:, :2], axis=0), axis=1) > 1
    first = np.append(0, np.flatnonzero(end) + 1)  # rows of the trajectories
    before = np.cumsum(terminals) - terminals  # successes in earlier rows
    lengths = np.diff(np.append(first, len(end)))
    rows = before == np.repeat(np.append(before, 0)[first], lengths)
    return rows, (end | terminals)[rows]


def d4rl_file(task: Task) -> Path:
    """D4RL's file of a -v2 name in D4RL's cache folder; downloaded if it is missing, renamed only when it is whole."""
    url = f"{D4RL_URL}/gym_mujoco_v2/{task.body}_{task.quality.replace('-', '_')}-v2.hdf5"
    if task.body == "antmaze":
        size, _, kind = task.quality.partition("-")
        maze = {"umaze": "u-maze", "medium": "big-maze", "large": "hardest-maze"}[size]
        multi = f"multistart_{kind != ''}_multigoal_{kind == 'diverse'}"
        url = f"{D4RL_URL}/ant_maze_v2/Ant_maze_{maze}_noisy_{multi}_sparse_fixed.hdf5"
    path = Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets") / url.rpartition("/")[2]
    if path.is_file():
        return path
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    print(f"downloading {url} to {path}", flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        urllib.request.urlretrieve(url, part)
        h5py.File(part, "r").close()
        os.replace(part, path)
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and h5py's errors are OSErrors
        fail(f"cannot download {url} ({one_line(error)}); put the file at {path}, or give --dataset-path FILE")
    finally:
        part.unlink(missing_ok=True)
    return path


# ======== end of shared: dataset ========

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


if __name__ == "__main__":
    run(main)
