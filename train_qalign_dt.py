"""Stage 2 of Q-Align DT: co-train a return-conditioned policy and its critic (Algorithm 1).

    python train_qalign_dt.py --env hopper-medium-v2

Reads the dataset and stage 1's critic.pt; writes runs/<env>__<exp-name>__<seed>/ with policy.pt (last step),
policy_best.pt (best periodic evaluation), resume.pt, metrics.csv, evaluations.csv and TensorBoard events.

    critic_loss   Eq. 7   the critic regresses on what the target policy answers to a request raised by Delta_RTG
    actor_loss    Eq. 5   asking for more (less) return by a random delta must not lower (raise) Q
                  Eq. 6   ... beside the supervised loss on states and actions, weighted by lambda_e
    CoTraining.step       Algorithm 1

Equations, tables and appendices are those of "Return-to-Go Is More Than a Number" (ICML 2026). Order of the file:
Args, policy, critic, windows, losses, one step of the co-training, main; then the blocks that this file shares with the other stages.
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import difflib
import hashlib
import http.client
import importlib.util
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import filelock
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
    env: str = "hopper-mini"
    """<body>-<quality>-<tag>: a D4RL name (tag v2) or your own data's tag; hopper-mini is this project's small data"""
    seed: int = 1
    """seed of the initial weights, the windows, the perturbations and the evaluation episodes"""
    dataset_path: tuple[str, ...] = ()
    """HDF5 file(s) in D4RL's layout to use instead of the download; several are concatenated"""
    runs_dir: str = "runs"
    """folder of all runs"""
    exp_name: str = "train_qalign_dt"
    """name of this experiment; the run folder is <runs-dir>/<env>__<exp-name>__<seed>"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; auto takes CUDA if there is one"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """the transformer's arithmetic; auto: bfloat16 where the hardware has it. The critic is always float32"""
    compile: bool = False
    """torch.compile the networks and, on CUDA, replay a step as one CUDA graph; without the flag: with CUDA only"""
    critic: str = ""
    """stage 1's critic.pt, whose gamma is taken over (default: this env's and seed's, trained first if it is missing)"""
    critic_steps: int | None = None
    """--total-steps of stage 1 if this script has to start it (default: stage 1's own)"""
    total_steps: int = 100_000
    """gradient steps N of the run; both learning rates fall to 0 over them; 0 saves the untrained policy"""

    embed_dim: int = 256
    """width of the transformer"""
    n_layer: int = 4
    """number of transformer blocks"""
    n_head: int = 4
    """attention heads per block"""
    context_len: int = 20
    """K, the window length in environment steps, three tokens each"""
    batch_size: int = 256
    """windows per gradient step"""
    critic_width: int = 256
    """hidden width of the critic; must be that of --critic"""

    lambda_e: float = 0.3
    """weight of the alignment loss, Eq. 6; 0 trains a DT with convolution, without any critic"""
    sigma_e: float = 10.0
    """std of the RTG perturbation delta, Eq. 5, normalised RTG (raw return / 1000; AntMaze / 1)"""
    delta_rtg: float = 1.0
    """Delta_RTG, by how much the critic's target raises the request, Eq. 7, normalised RTG"""
    alignment: Literal["one-sided", "symmetric", "squared"] = "one-sided"
    """form of the penalty: Eq. 5, or one of the two variants of Table E.11"""
    conv: bool = True
    """causal convolution after W_q, W_k, W_v (App. D.1); --no-conv --lambda-e 0 is the vanilla Decision Transformer"""
    update_q: bool = True
    """co-train the critic; --no-update-q keeps stage 1's (Table E.10)"""
    q_noise: float = 0.0
    """std sigma_n, in raw Q units, of the noise added to the target critic (Table E.13)"""
    rtg_range: tuple[float, float] | Literal["off"] | None = None
    """LO HI, normalised: bounds of a perturbed window's first RTG (None: the release's for D4RL, else the data's own)"""

    actor_lr: float = 3e-4
    """Adam learning rate of the policy, with L2 1e-4"""
    critic_lr: float = 3e-4
    """Adam learning rate of the critic"""
    tau: float = 0.005
    """step of both moving averages, the target policy and the target critic"""
    eval_every: int | None = None
    """gradient steps between evaluations at high targets; 0: never (None: a tenth of the run)"""
    eval_rollouts: int = 5
    """episodes per target in those evaluations"""
    checkpoint_minutes: float = 2.0
    """wall-clock time between resume.pt files; on a CPU no bit of a run's result depends on it"""


# Table D.8: sigma_e, lambda_e, Delta_RTG. `expert` is trained with medium-expert's row, `random` with medium's, Ant with
# HalfCheetah's; every maze of AntMaze shares one row, and the large mazes, which the table lacks, get it too.
TABLE_D8 = {
    "walker2d-medium-replay": (10.0, 0.3, 2.0),
    "walker2d-medium": (10.0, 0.3, 1.0),
    "walker2d-medium-expert": (10.0, 0.3, 10.0),
    "halfcheetah-medium-replay": (15.0, 5.0, 5.0),
    "halfcheetah-medium": (15.0, 5.0, 10.0),
    "halfcheetah-medium-expert": (15.0, 1.0, 10.0),
    "hopper-medium-replay": (10.0, 0.3, 0.5),
    "hopper-medium": (10.0, 0.3, 1.0),
    "hopper-medium-expert": (10.0, 0.3, 5.0),
    "antmaze": (5.0, 100.0, 1.0),
}
SAME_ROW = {"ant": "halfcheetah", "expert": "medium-expert", "random": "medium", "mixed": "medium-replay"}
# hopper-mini's preset, for ten minutes on two CPU cores: every entry deviates from the paper. So few steps need a faster
# actor and a gentler alignment than Table D.8's, or high requests collapse (results/README.md).
MINI = dict(
    **dict(total_steps=5_000, embed_dim=64, n_layer=2, n_head=2, context_len=10, batch_size=64, critic_width=128),
    **dict(actor_lr=1e-3, sigma_e=1.0, lambda_e=0.02, delta_rtg=0.5),
)
L2, MAX_GRAD_NORM, LOG_EVERY = 1e-4, 15.0, 100
# The release also has, and we leave out: |delta| floored at 0.2 (AntMaze 1); sigma_e annealed by a cosine to 1 from
# 3 / 3 / 6 (expert 15) / 10 / 5 (hopper / walker2d / halfcheetah / ant / antmaze); LayerNorm in the critic of
# halfcheetah-medium-expert; a target policy that moves every 5th step only; attention to padding.


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


class Batch(NamedTuple):
    """B windows of K steps, left-padded: all zero where not valid."""

    rtg: torch.Tensor  # (B, K) normalised return-to-go
    obs: torch.Tensor  # (B, K, obs_dim) standardised
    act: torch.Tensor  # (B, K, act_dim)
    reward: torch.Tensor  # (B, K) as the critic sees it
    terminal: torch.Tensor  # (B, K) bool: the MDP ended here (a timeout is not one)
    timestep: torch.Tensor  # (B, K) index in the episode
    valid: torch.Tensor  # (B, K) bool


class Windows:
    """The whole dataset on the training device; a batch of windows is index arithmetic on it."""

    def __init__(self, data: "Dataset", task: "Task", context_len: int, device: torch.device):
        ends = np.repeat(data.ends, data.lengths)  # (N,) where the episode of each transition ends (exclusive)
        self.K = context_len
        self.obs = (torch.as_tensor(data.observations).to(device) - data.obs_mean.to(device)).div_(
            data.obs_std.to(device)
        )
        self.act = torch.as_tensor(data.actions).to(device)
        self.rtg = torch.as_tensor(data.returns_to_go() / task.rtg_scale, dtype=torch.float32).to(device)
        self.reward = torch.as_tensor(data.rewards).to(device) + task.critic_reward_shift
        self.terminal = torch.as_tensor(data.terminals).to(device)
        self.end = torch.as_tensor(ends).to(device)
        self.timestep = torch.as_tensor(np.arange(len(ends)) - np.repeat(data.starts, data.lengths)).to(device)
        self.offsets = torch.arange(context_len, device=device)

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Windows [i, min(i + K, T)) of one episode each, i uniform over all transitions."""
        start = torch.randint(len(self.rtg), (batch_size,), generator=generator, device=self.rtg.device)
        padding = self.K - torch.clamp(self.end[start] - start, max=self.K)  # (B,)
        valid = self.offsets >= padding[:, None]  # (B, K)
        index = torch.where(valid, start[:, None] + self.offsets - padding[:, None], start[:, None])
        zero = ~valid
        return Batch(
            self.rtg[index].masked_fill(zero, 0), self.obs[index].masked_fill(zero[..., None], 0),
            self.act[index].masked_fill(zero[..., None], 0), self.reward[index].masked_fill(zero, 0),
            self.terminal[index] & valid, self.timestep[index].masked_fill(zero, 0), valid,
        )  # fmt: skip


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of x over the positions where mask is True (0 if there is none)."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def shift_rtg(rtg, valid, shift, rtg_range):
    """Move all RTG tokens of a window by one scalar, Eq. 2, such that its first valid RTG stays in rtg_range (release).

    rtg (B, K), valid (B, K), shift (B, 1) -> shifted rtg (B, K) and the shift that was really applied (B, 1).
    """
    first = rtg.gather(1, valid.int().argmax(dim=1, keepdim=True))
    applied = (first + shift).clamp(*rtg_range) - first
    return torch.where(valid, rtg + applied, rtg), applied


def critic_target(batch: Batch, q_next, gamma: float):
    """Eq. 7's y_i = r_i + gamma q_{i+1}, and where it is defined. (The factor 1 - terminal_i goes without saying there.)

    q_next (B, K): min_m Q'_m(s_i, a'_i) at every step of the window -> y (B, K), mask (B, K). A window's last step has no
    s_{i+1} in it, so it counts only as a true terminal.
    """
    after = F.pad(q_next[:, 1:], (0, 1))
    y = batch.reward + gamma * ~batch.terminal * after
    K = batch.valid.shape[1]
    last = torch.arange(K, device=after.device) == K - 1  # (K,)
    return y, batch.valid & (~last | batch.terminal)


def critic_loss(critic, target_critic, target_policy, batch: Batch, cfg: dict, generator: torch.Generator):
    """L_q of Eq. 7, as the sum of the two critics' means."""
    with torch.no_grad():
        shift = torch.full_like(batch.rtg[:, :1], cfg["delta_rtg"])
        raised, _ = shift_rtg(batch.rtg, batch.valid, shift, cfg["rtg_range"])
        a_raised, _ = target_policy(raised, batch.obs, batch.act, batch.timestep, batch.valid)
        q_next = target_critic(batch.obs, a_raised).amin(dim=0)  # (B, K)
        if cfg["q_noise"]:
            q_next = q_next + cfg["q_noise"] * torch.randn(q_next.shape, generator=generator, device=q_next.device)
        y, mask = critic_target(batch, q_next, cfg["gamma"])
    q = critic(batch.obs, batch.act)  # (2, B, K)
    return sum(masked_mean((q_m - y) ** 2, mask) for q_m in q)


def supervised_loss(a_hat, s_hat, batch: Batch):
    """The two halves of L_SL as means over valid steps and dimensions.

    (The paper writes sums; its lambda_e belongs to the means that the release takes.)
    """
    return (
        masked_mean(((a_hat - batch.act) ** 2).mean(dim=-1), batch.valid),
        masked_mean(((s_hat - batch.obs) ** 2).mean(dim=-1), batch.valid),
    )


def alignment_loss(q_delta, q, sign, valid, kind: str):
    """L_align, Eq. 5: a penalty where Q moved against the request. Also returns the share of such pairs.

    Eq. 5 sums over the steps of one Q; the minimum over two critics and the mean are the release's.
    q_delta, q (2, B, K): Q_m(s_i, a_hat_delta_i) and Q_m(s_i, a_hat_i); sign (B, 1): of the shift really applied.
    """
    against = -sign * (q_delta - q.detach())  # (2, B, K)
    penalty = {"one-sided": F.relu, "symmetric": lambda x: x, "squared": lambda x: F.relu(x) ** 2}[kind](against)
    return masked_mean(penalty.amin(dim=0), valid), masked_mean((against > 0).all(dim=0).float(), valid)


def actor_loss(policy, critic, batch: Batch, cfg: dict, generator: torch.Generator):
    """L_SL + lambda_e L_align, Eq. 6, and: action, state and alignment loss, share of violated pairs, mean of Q_1.

    L_align's gradient reaches the policy through a_hat_delta only, and no weight of Q.
    """
    windows = (batch.rtg, batch.obs, batch.act, batch.timestep, batch.valid)
    if cfg["lambda_e"] == 0:
        action_loss, state_loss = supervised_loss(*policy(*windows), batch)
        nothing = torch.zeros((), device=batch.rtg.device)
        return action_loss + state_loss, action_loss.detach(), state_loss.detach(), nothing, nothing, nothing
    delta = torch.randn(len(batch.rtg), 1, generator=generator, device=batch.rtg.device)  # one per window
    delta = cfg["sigma_e"] * (delta.abs() if cfg["half_normal"] else delta)
    perturbed, applied = shift_rtg(batch.rtg, batch.valid, delta, cfg["rtg_range"])
    # clean and perturbed windows in one forward pass; dropout draws an independent mask for each row
    both = (torch.cat([batch.rtg, perturbed]), *(torch.cat([x, x]) for x in windows[1:]))
    (a_hat, a_delta), (s_hat, _) = (x.chunk(2) for x in policy(*both))
    action_loss, state_loss = supervised_loss(a_hat, s_hat, batch)
    with torch.no_grad():
        q = critic(batch.obs, a_hat)
    critic.requires_grad_(False)  # Eq. 5 differentiates Q with respect to the action, not to its own weights
    q_delta = critic(batch.obs, a_delta)
    critic.requires_grad_(True)
    scale = cfg["q_scale"]  # 1 but for AntMaze
    align, violated = alignment_loss(q_delta / scale, q / scale, applied.sign(), batch.valid, cfg["alignment"])
    loss = action_loss + state_loss + cfg["lambda_e"] * align
    return loss, action_loss.detach(), state_loss.detach(), align.detach(), violated, masked_mean(q[0], batch.valid)


def adam(net: nn.Module, weight_decay: float = 0.0) -> torch.optim.Adam:
    """Adam whose learning rate is a tensor, which a replayed CUDA graph reads anew at every step."""
    device = next(net.parameters()).device
    lr = torch.zeros((), device=device)
    return torch.optim.Adam(
        net.parameters(), lr, weight_decay=weight_decay, fused=True, capturable=device.type == "cuda"
    )


def set_lr(opt: torch.optim.Optimizer, lr: float) -> None:
    for group in opt.param_groups:
        group["lr"] = group["lr"].to(group["params"][0].device)  # a checkpoint's comes on the CPU
        group["lr"].fill_(lr)


class CoTraining:
    """All that Algorithm 1 updates, and one step of it, in which nothing waits for the device."""

    metrics = "loss action_loss state_loss align_loss violated q_mean actor_grad_norm q_loss critic_grad_norm".split()

    def __init__(self, task: "Task", windows: Windows, cfg: dict, critic_weights: dict | None = None, compile=False):
        """cfg as prepare() completes it; without critic_weights the critic is random. Sets torch's global seed."""
        self.windows, self.cfg, device = windows, cfg, windows.rtg.device
        self.aligned, self.update_q = cfg["lambda_e"] > 0, cfg.get("update_q", False)
        torch.manual_seed(cfg["seed"])  # of the weights and of dropout
        self.generator = torch.Generator(device).manual_seed(cfg["seed"])  # windows, deltas and noise
        self.policy = make_policy(task, cfg, cfg["precision"] == "bf16").to(device)
        self.actor_opt = adam(self.policy, L2)
        self.parts = dict(policy=self.policy, actor_opt=self.actor_opt)  # all that a resumed run needs
        self.critic = self.target_critic = self.target_policy = None
        if self.aligned:
            self.critic = DoubleQ(task.obs_dim, task.act_dim, cfg["critic_width"]).to(device)
            if critic_weights:
                self.critic.load_state_dict(critic_weights)
            self.critic_opt = adam(self.critic)
            self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
            self.target_policy = copy.deepcopy(self.policy).requires_grad_(False).eval()  # no dropout in targets
            self.parts |= dict(target_policy=self.target_policy, critic=self.critic)
            self.parts |= dict(target_critic=self.target_critic, critic_opt=self.critic_opt)
        nets = (self.policy, self.critic, self.target_policy, self.target_critic)
        self.nets = [compiled(net) if compile and net else net for net in nets]

    def schedule(self, step: int) -> float:
        """Set both learning rates for this step; returns the actor's. They fall to 0 along a cosine."""
        factor = 0.5 * (1 + math.cos(math.pi * step / self.cfg["total_steps"]))
        set_lr(self.actor_opt, self.cfg["actor_lr"] * factor)
        if self.update_q:
            set_lr(self.critic_opt, self.cfg["critic_lr"] * factor)
        return self.cfg["actor_lr"] * factor

    def step(self) -> torch.Tensor:
        """Algorithm 1, lines 3 to 11; returns the values of `metrics` (9,), on the device."""
        policy, critic, target_policy, target_critic = self.nets
        batch = self.windows.sample(self.cfg["batch_size"], self.generator)  # lines 3-4
        q_metrics = torch.zeros(2, device=batch.rtg.device)
        if self.update_q:  # lines 5-6
            q_loss = critic_loss(critic, target_critic, target_policy, batch, self.cfg, self.generator)
            self.critic_opt.zero_grad()
            q_loss.backward()
            q_norm = nn.utils.clip_grad_norm_(self.critic.parameters(), MAX_GRAD_NORM)
            self.critic_opt.step()
            q_metrics = torch.stack([q_loss.detach(), q_norm])
        loss, *actor_metrics = actor_loss(policy, critic, batch, self.cfg, self.generator)  # lines 7-9
        self.actor_opt.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), MAX_GRAD_NORM)
        self.actor_opt.step()  # line 10
        if self.update_q:  # line 11; with a fixed critic no target is ever used
            ema_update(self.target_policy, self.policy, self.cfg["tau"])
            ema_update(self.target_critic, self.critic, self.cfg["tau"])
        return torch.cat([torch.stack([loss.detach(), *actor_metrics, norm]), q_metrics])


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    args = parse_args()
    keep_freed_memory()
    task, device, data, cfg, folder, stage1, lock = prepare(args)  # refuses what cannot work before anything is made
    windows = Windows(data, task, cfg["context_len"], device)
    learner = CoTraining(task, windows, cfg, stage1 and stage1["critic"], args.compile)
    train_step = learner.step
    if args.compile:
        print("compiling: the first step takes a minute or more (--no-compile starts at once)")
    if args.compile and device.type == "cuda":
        train_step = CudaGraph(learner.step, learner.generator)
    meters = Meters(learner.metrics, device)
    step, evaluated, best = 0, -1, -math.inf  # gradient steps; last step evaluated at; best score there was
    if state := check_same_run(folder, "resume.pt", "train_qalign_dt", cfg, data.hash):
        step, evaluated, best = state["step"], state["evaluated"], state["best"]
        restore(state, learner.parts, meters, learner.generator)
    high_targets = task.high_targets if data.is_d4rl else tuple(float(data.returns.max()) * x for x in (1.0, 1.2))
    metrics = MetricsLog(folder / "metrics.csv", ["step", *learner.metrics, "actor_lr"], step)
    columns = [f"score_at_{t:g}" for t in high_targets]
    evaluations = MetricsLog(folder / "evaluations.csv", ["step", *columns], evaluated)

    def save_policy(name: str, **extra) -> None:  # all that later stages need
        save_checkpoint(folder / name, dict(
            stage="train_qalign_dt", format=FORMAT, env=args.env, config=cfg, step=step, data=data.summary(),
            obs_mean=data.obs_mean, obs_std=data.obs_std, episode_returns=torch.as_tensor(data.returns),
            policy=learner.policy.state_dict(), critic=learner.critic and learner.critic.state_dict(), **extra,
        ))  # fmt: skip

    def save(finished: bool = False) -> None:
        meters.check(bar, folder, "--actor-lr or --lambda-e")  # never overwrite a good checkpoint with a bad one
        counters = dict(step=step, evaluated=evaluated, best=best)
        save_resume(folder, "train_qalign_dt", cfg, data.summary(), learner.parts, meters, learner.generator, counters)
        save_policy("policy.pt", finished=finished)

    stop, saved = StopSignal(), time.monotonic()
    bar = tqdm(total=cfg["total_steps"], initial=step, unit="step", desc="training", dynamic_ncols=True)
    while True:
        due = cfg["eval_every"] and (step % cfg["eval_every"] == 0 or step == cfg["total_steps"])
        if due and evaluated < step and task.env_id:
            save()  # an evaluation can take minutes
            scores = evaluate(learner.policy, task, high_targets, cfg, data, args.seed, stop)
            if scores is None:
                break
            evaluated = step
            if max(scores) > best:
                best = max(scores)
                save_policy("policy_best.pt", score=best)
            evaluations.write({"step": step} | dict(zip(columns, scores)))
            text = ", ".join(f"{score:.1f} at target {target:g}" for score, target in zip(scores, high_targets))
            bar.write(f"step {step:,}: score {text}")
        if step == cfg["total_steps"] or stop.requested:
            break
        actor_lr = learner.schedule(step)
        meters.add(train_step(), step)
        step += 1
        bar.update()
        if step % LOG_EVERY == 0 or step == cfg["total_steps"]:
            meters.check(bar, folder, "--actor-lr or --lambda-e")
            row = meters.means()
            metrics.write({"step": step, **row, "actor_lr": actor_lr})
            shown = ("action_loss", "state_loss") + ("align_loss", "violated", "q_mean", "q_loss") * learner.aligned
            bar.set_postfix_str(" ".join(f"{name} {row[name]:.3g}" for name in shown))
        if time.monotonic() - saved > args.checkpoint_minutes * 60:
            save()
            saved = time.monotonic()
    bar.close()
    save(finished=not stop.requested)
    metrics.close()
    evaluations.close()
    lock.release()
    if stop.requested:
        print(f"stopped at step {step:,} of {cfg['total_steps']:,}; the same command continues from there")
        sys.exit(130)
    print(f"{folder}/policy.pt: {step:,} steps")
    if best > -math.inf:
        print(f"{folder}/policy_best.pt: score {best:.1f} at a high target, {cfg['eval_rollouts']} rollouts")


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

# ======== shared: run (the same text in collect_dataset.py, pretrain_q.py, train_qalign_dt.py) ========


def check_same_run(folder: Path, file: str, stage: str, cfg: dict, data_hash: str | None) -> dict | None:
    """A run is what its configuration says: the checkpoint `file` in folder if it is of this run, None if there is none.

    Exits 2 if the folder holds another configuration or other data. A key that only one side knows is not compared.
    """
    for name in (file, "resume.pt"):
        if not (folder / name).exists():
            continue
        found = load_checkpoint(folder / name, stage)
        theirs, ours = found["config"] | {"data": found["data"].get("hash")}, cfg | {"data": data_hash}
        if differs := [f"{k} {theirs[k]} there, {ours[k]} here" for k in ours if k in theirs and theirs[k] != ours[k]]:
            fail(f"{folder} holds another run ({'; '.join(differs)}); choose another --exp-name, or remove the folder")
        if name == file:
            return found
    return None


def claim(folder: Path) -> filelock.FileLock:
    """Make the run folder and lock it until this process ends in whatever way; exits 2 if another one writes there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        fail(f"{folder}: another process is writing this run; wait for it, or choose another --exp-name or --seed")
    except OSError as error:
        fail(f"{folder}: cannot write there ({error.strerror or error}); choose another --runs-dir")
    return lock


def save_resume(
    folder: Path, stage: str, cfg: dict, data: dict, parts: dict, meters: "Meters", generator, counters: dict
) -> None:
    """What a killed run needs to go on (on a CPU bit for bit), random streams (dropout's is torch's) included."""
    cuda = torch.cuda.get_rng_state() if generator.device.type == "cuda" else None
    save_checkpoint(folder / "resume.pt", dict(
        stage=stage, format=FORMAT, config=cfg, data=data, meters=meters.sums, meters_count=meters.count,
        rng={"generator": generator.get_state(), "torch": torch.get_rng_state(), "cuda": cuda},
        **{name: part.state_dict() for name, part in parts.items()}, **counters,
    ))  # fmt: skip


def restore(state: dict, parts: dict, meters: "Meters", generator: torch.Generator) -> None:
    """The reverse of save_resume, but for the counters."""
    for name, part in parts.items():
        part.load_state_dict(state[name])
    meters.sums.copy_(state["meters"])
    meters.count = state["meters_count"]
    generator.set_state(state["rng"]["generator"])
    torch.set_rng_state(state["rng"]["torch"])
    if state["rng"]["cuda"] is not None:
        torch.cuda.set_rng_state(state["rng"]["cuda"])
    print(f"continuing at step {state['step']:,}")


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau online (Algorithm 1, line 11)."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


class Meters:
    """Sums of named values on the device, so that no step waits for it, and the first step that was not finite."""

    def __init__(self, names: list[str], device: torch.device):
        self.names, self.count = names, 0
        self.sums = torch.zeros(len(names), device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, values: torch.Tensor, step: int) -> None:  # (len(names),)
        self.sums += values
        self.count += 1
        self.first_bad = torch.where((self.first_bad < 0) & ~values.isfinite().all(), step, self.first_bad)

    def means(self) -> dict[str, float]:
        """Mean of each value since the last call."""
        row = dict(zip(self.names, (self.sums / max(self.count, 1)).tolist()))
        self.sums.zero_()
        self.count = 0
        return row

    def check(self, bar: tqdm, folder: Path, lower: str) -> None:
        """Exit 1 if a value was NaN or infinite; resume.pt then still is the last good state."""
        if self.first_bad >= 0:
            bar.close()
            kept = (
                f"{folder}/resume.pt is the last good state" if (folder / "resume.pt").exists() else "nothing was saved"
            )
            bad = f"step {int(self.first_bad) + 1}: a loss or its gradient became NaN or infinite"
            fail(f"{bad}; stopped, {kept}; try a lower {lower}", code=1)


class StopSignal:
    """Makes the first Ctrl-C or SIGTERM a flag that is read between two steps; a second one stops at once."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.request)

    def request(self, number, frame):
        self.requested = True
        signal.signal(number, signal.SIG_DFL)


class MetricsLog:
    """A CSV file and TensorBoard scalars. On resuming, rows after the step that the checkpoint knows are dropped."""

    def __init__(self, path: Path, fields: list[str], last_step: int):
        from torch.utils.tensorboard import SummaryWriter  # imported here: it takes a second

        rows = []
        if path.exists():
            with open(path, newline="") as f:
                rows = [row for row in csv.DictReader(f) if int(row["step"]) <= last_step]
        with open(f"{path}.tmp", "w", newline="") as f:
            writer = csv.DictWriter(f, fields)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(f"{path}.tmp", path)
        self.file = open(path, "a", newline="")
        self.csv = csv.DictWriter(self.file, fields)
        self.tensorboard = SummaryWriter(
            path.parent / "tensorboard" / path.stem, purge_step=last_step + 1 if last_step > 0 else None
        )

    def write(self, row: dict) -> None:
        self.csv.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self.file.flush()
        for name, value in row.items():
            if name != "step":
                self.tensorboard.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.file.close()
        self.tensorboard.close()


# ======== end of shared: run ========

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

# ======== shared: graph (the same text in pretrain_q.py, train_qalign_dt.py) ========


def can_compile(device: str) -> bool:
    """Whether torch.compile finds its tools: a compiler and, for CUDA, Triton."""
    compilers = ("cc", "gcc", "clang") if device == "cuda" else ("g++", "clang++", "c++")
    return any(map(shutil.which, compilers)) and (device == "cpu" or importlib.util.find_spec("triton") is not None)


def compiled(net: nn.Module) -> nn.Module:
    """torch.compile, sharing the weights, for the fixed shapes of a training step (symbolic ones cost convolutions speed)."""
    return torch.compile(net, dynamic=False)


class CudaGraph:
    """Calls `step` as one CUDA graph: a hundred kernels a step then cost the host one launch.

    All that changes between two calls must be in tensors that are changed in place; an argument is part of what is
    recorded, one graph for each. The first three calls with an argument run as they are, on a stream of their own, as
    torch asks for; the fourth records. The result is overwritten by the next call.
    """

    def __init__(self, step, generator: torch.Generator):
        self.step, self.generator, self.stream = step, generator, torch.cuda.Stream()
        self.calls, self.graphs, self.results = {}, {}, {}

    def __call__(self, *args):
        self.calls[args] = self.calls.get(args, 0) + 1
        if self.calls[args] <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.step(*args)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if args not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)  # torch's own one is registered already
            with torch.cuda.graph(graph):
                self.results[args] = self.step(*args)
            self.graphs[args] = graph
        self.graphs[args].replay()
        return self.results[args]


# ======== end of shared: graph ========

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


def parse_args() -> Args:
    """The command line, with the defaults of its --env: Table D.8's row, or hopper-mini's preset. --help shows them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--env", nargs="?", default=Args.env)
    parser.add_argument("--device", nargs="?")
    given, _ = parser.parse_known_args()
    task = parse_env(given.env or "")
    if task.quality == "mini":
        preset = MINI
    else:
        row = f"{SAME_ROW.get(task.body, task.body)}-{SAME_ROW.get(task.quality, task.quality)}"
        preset = dict(zip(("sigma_e", "lambda_e", "delta_rtg"), TABLE_D8["antmaze" if task.body == "antmaze" else row]))
    compile = given.device != "cpu" and torch.cuda.is_available() and can_compile("cuda")
    return tyro.cli(Args, default=replace(Args(env=task.name, compile=compile), **preset), description=__doc__)


def resolve(args: Args, task: Task) -> dict:
    """The configuration that defines a run and that checkpoints store; exits 2 on a value that cannot work.

    What depends on the data or the critic is left to prepare: rtg_range's default, the length of the timestep embedding,
    gamma, q_scale.
    """
    cfg = asdict(args)
    for name in ("dataset_path", "runs_dir", "critic", "critic_steps", "checkpoint_minutes"):
        cfg.pop(name)  # where things are and how often they are saved do not define a run
    if cfg["eval_every"] is None:
        cfg["eval_every"] = max(args.total_steps // 10, 1)
    if cfg["rtg_range"] == "off":
        cfg["rtg_range"] = (-math.inf, math.inf)
    cfg["half_normal"] = task.body == "antmaze"  # D.5: delta = |eps| there
    for name in ("embed_dim", "n_layer", "n_head", "context_len", "batch_size", "critic_width", "eval_rollouts"):
        if cfg[name] < 1:
            fail(f"--{name.replace('_', '-')} {cfg[name]}: must be at least 1")
    for name in ("total_steps", "eval_every", "lambda_e", "sigma_e", "q_noise", "actor_lr", "critic_lr"):
        if not 0 <= cfg[name] < math.inf:
            fail(f"--{name.replace('_', '-')} {cfg[name]}: must be finite and not negative")
    if not math.isfinite(args.delta_rtg) or not 0 < args.tau <= 1:
        fail(f"--delta-rtg {args.delta_rtg} must be finite and --tau {args.tau} in (0, 1]")
    if args.embed_dim % args.n_head:
        fail(f"--embed-dim {args.embed_dim} is not a multiple of --n-head {args.n_head}")
    if args.critic_steps is not None and args.critic_steps < 1:
        fail(f"--critic-steps {args.critic_steps}: must be at least 1")
    low, high = cfg["rtg_range"] or (0, 1)
    if not low < high:
        fail(f"--rtg-range {low:g} {high:g}: the first must be the smaller one")
    if args.lambda_e == 0:  # a DT: nothing that concerns the critic defines the run
        for name in ("sigma_e", "delta_rtg", "alignment", "update_q", "q_noise", "rtg_range", "half_normal"):
            cfg.pop(name)
        for name in ("critic_lr", "critic_width", "tau"):
            cfg.pop(name)
    return cfg


class Setup(NamedTuple):
    task: Task
    device: torch.device
    data: Dataset
    cfg: dict
    folder: Path
    stage1: dict | None  # stage 1's checkpoint; None for a DT, and where resume.pt has to do
    lock: filelock.FileLock


def prepare(args: Args) -> Setup:
    """Check everything, find or train the critic, and claim the run folder. Exits 0 if the run is already finished."""
    task, device = parse_env(args.env), pick_device(args.device)
    check_seed(args.seed)
    if args.compile and not can_compile(device.type):
        fail("--compile: torch.compile finds no C++ compiler here, or no Triton for CUDA; use --no-compile")
    cfg = resolve(args, task)
    aligned = cfg["lambda_e"] > 0
    data = read_dataset(task, args.dataset_path)
    if aligned and cfg["rtg_range"] is None:
        rtg = data.returns_to_go()
        own = (float(rtg.min()) / task.rtg_scale, float(rtg.max()) / task.rtg_scale)
        cfg["rtg_range"] = task.rtg_range if data.is_d4rl else own
    cfg["max_timestep"] = max(HORIZON, int(data.lengths.max()))
    cfg["precision"] = "bf16" if use_bf16(args.precision, device) else "fp32"
    cfg["device"] = device.type  # the random streams of CPU and CUDA differ, so a run stays on one kind
    folder = Path(args.runs_dir) / f"{args.env}__{args.exp_name}__{args.seed}"
    critic_path = Path(args.critic or Path(args.runs_dir) / f"{args.env}__pretrain_q__{args.seed}" / "critic.pt")
    stage1 = None
    if aligned and (args.critic or critic_path.exists()):
        stage1 = load_critic(critic_path, args, cfg, task, data)
    found = check_same_run(folder, "policy.pt", "train_qalign_dt", cfg, data.hash)
    if found and found["finished"]:
        print(f"{folder}/policy.pt is finished ({found['step']:,} steps); nothing to do (another run: --exp-name)")
        sys.exit(0)
    resumed = check_same_run(folder, "resume.pt", "train_qalign_dt", cfg, data.hash)
    if resumed and aligned and stage1 is None:  # resume.pt holds the critic: stage 1's is no longer needed
        cfg |= {key: resumed["config"][key] for key in ("gamma", "q_scale", "critic_hash")}
    needs_critic = aligned and stage1 is None and not resumed
    announce_duration(args, cfg, task, device, needs_critic)
    if needs_critic:
        pretrain(critic_path, args, cfg)
        stage1 = load_critic(critic_path, args, cfg, task, data)
    lock = claim(folder)
    returns = f"returns {data.returns.min():.0f} .. {data.returns.max():.0f}"
    print(f"{folder}: {data.label}, {len(data.rewards):,} transitions, {len(data.ends):,} episodes, {returns}")
    if data.clipped and not needs_critic:  # else stage 1 has just said so
        print(f"warning: clipped {data.clipped:,} actions to [-1, 1]", file=sys.stderr)
    if task.env_id is None:
        print("there is no simulator for AntMaze here yet: no periodic evaluation")
    return Setup(task, device, data, cfg, folder, stage1, lock)


def load_critic(path: Path, args: Args, cfg: dict, task: Task, data: Dataset) -> dict:
    """Stage 1's checkpoint, checked against this run; adds what of it defines the run to cfg."""
    checkpoint = load_checkpoint(path, "pretrain_q")
    theirs = checkpoint["config"]
    if checkpoint["data"]["hash"] != data.hash:
        fail(f"{path}: a critic of other data ({checkpoint['data']['label']}); use that data, or another --runs-dir")
    if theirs["critic_width"] != cfg["critic_width"]:
        fail(f"{path}: a critic of width {theirs['critic_width']}, not --critic-width {cfg['critic_width']}")
    if not args.critic and args.critic_steps not in (None, theirs["total_steps"]):
        fail(
            f"{path}: a critic of {theirs['total_steps']:,} steps, not --critic-steps {args.critic_steps:,}; "
            "remove it, or name another with --critic"
        )
    if not {"critic", "report"} <= checkpoint.keys():
        fail(f"{path}: not a whole checkpoint of pretrain_q.py; train it again")
    expected = DoubleQ(task.obs_dim, task.act_dim, cfg["critic_width"]).state_dict()
    if {k: v.shape for k, v in checkpoint["critic"].items()} != {k: v.shape for k, v in expected.items()}:
        fail(f"{path}: a critic of other dimensions than {task.name}'s {task.obs_dim} + {task.act_dim}")
    cfg["gamma"] = theirs["gamma"]
    # AntMaze: the release divides Q by its mean |min Q| over the data, the scale that lambda_e = 100 belongs to
    cfg["q_scale"] = checkpoint["report"]["q_abs_mean"] if task.body == "antmaze" else 1.0
    cfg["critic_hash"] = tensor_hash(checkpoint["critic"].values())
    return checkpoint


def pretrain(critic_path: Path, args: Args, cfg: dict) -> None:
    """Stage 1 as a child process; its stderr and exit code are its own."""
    script = Path(__file__).resolve().parent / "pretrain_q.py"
    if not script.is_file():
        fail(f"{critic_path}: no such critic, and no pretrain_q.py beside this script to train it; name one: --critic")
    print(f"{critic_path} is missing: starting pretrain_q.py", flush=True)
    command = [
        sys.executable,
        str(script),
        "--env",
        args.env,
        "--seed",
        str(args.seed),
        "--runs-dir",
        args.runs_dir,
        "--device",
        args.device,
    ]
    command += ["--critic-width", str(cfg["critic_width"]), "--compile" if args.compile else "--no-compile"]
    command += ["--dataset-path", *args.dataset_path] if args.dataset_path else []
    command += ["--total-steps", str(args.critic_steps)] if args.critic_steps else []

    def die_with_parent():  # or a killed stage 2 would leave a stage 1 behind, and its lock
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is the child's to handle: it saves and says how to go on
    code = subprocess.run(command, preexec_fn=die_with_parent if os.name == "posix" else None).returncode
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def announce_duration(args: Args, cfg: dict, task: Task, device: torch.device, needs_critic: bool) -> None:
    """A run that will take over an hour says so first: its arithmetic over half of this machine's measured rate."""

    def rate(dtype) -> float:  # operations per second of a plain matrix product
        a = torch.randn(4096 if device.type == "cuda" else 1024, device=device).to(dtype).expand(1024, -1).contiguous()
        (a @ a.T).sum().item()  # not timed: the first product loads the library
        start = time.perf_counter()
        sum(a @ a.T for _ in range(8)).sum().item()
        return 8 * 2 * a.shape[0] ** 2 * a.shape[1] / (time.perf_counter() - start)

    aligned, D, K = cfg["lambda_e"] > 0, cfg["embed_dim"], cfg["context_len"]
    forward = 2 * cfg["batch_size"] * 3 * K * cfg["n_layer"] * D * (12 * D + 18 * D * cfg["conv"] + 6 * K)
    # the target policy forward; clean and perturbed windows forward and backward
    policy_work = (7 if aligned else 3) * forward * cfg["total_steps"]
    seconds = 2 * policy_work / rate(torch.bfloat16 if cfg["precision"] == "bf16" else torch.float32)
    if aligned:
        width = cfg["critic_width"]
        q_forward = 4 * width * (task.obs_dim + task.act_dim + 1 + 2 * width)  # one state-action pair, both critics
        q_work = 8 * q_forward * cfg["batch_size"] * K * cfg["total_steps"]
        if needs_critic:
            q_work += 4 * q_forward * 512 * (args.critic_steps or (10_000 if task.quality == "mini" else 2_000_000))
        seconds += 2 * q_work / rate(torch.float32)
    if seconds > 3600:
        hours = seconds / 3600
        print(f"about {hours:.0f} hours on this {device.type}; README's quickstart, --env hopper-mini, takes minutes")


def evaluate(
    policy: Policy, task: Task, targets, cfg: dict, data: Dataset, seed: int, stop: StopSignal
) -> list[float] | None:
    """Mean D4RL score at each target return, over cfg["eval_rollouts"] episodes each, the same ones every time."""
    n = cfg["eval_rollouts"]
    seeds = 1_000_000 + 1_000 * seed + np.tile(np.arange(n), len(targets))
    result = rollout(
        policy, task, np.repeat(targets, n), seeds, cfg["context_len"], data.obs_mean, data.obs_std, stop=stop
    )
    return None if result is None else [float(x) for x in task.score(result.returns).reshape(-1, n).mean(axis=1)]


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", code=130)
