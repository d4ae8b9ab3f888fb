"""VDT: Value-Guided Decision Transformer, one of Q-Align DT's neighbours: its offline training and its planner.

    python baselines/train_vdt.py --env hopper-medium-v2

A Decision Transformer whose imitation is weighted by advantages, and which is pulled towards higher Q; and a planner
that rolls several return requests out in a learned model and takes the best one's first action (Algorithm 3):

    n_step_sums       y = r_t + ... + gamma^m V(s_{t+m}); never over an episode's end
    value_loss        V is the expectile of min_i Q'_i(s, a)
    policy_loss       mean(w (a - a_hat)^2) - lambda / nu mean(min_i Q'_i(s, a_hat)), w = min(exp(eta adv), 100)
    Model             (s, a) -> the change of s, and r
    Plan              sum of gamma^i min_i Q'_i(s_i, a_i) over E imagined steps, for each candidate return

Three phases, one after the other: Q and V (which never see the policy), the policy, the model. The poster decides;
its authors' code (ruthless-man/VDT) trains another loss, with n = 1, and plans in a second simulator. Ours: n, the
model, lambda's normalisation by nu, the mean over dimensions, eta at the small preset; else eta, and the rewards' scale
in Q and V, are IQL's.

Writes runs/<env>__<exp-name>__<seed>/ with policy.pt, resume.pt, metrics.csv and TensorBoard events; the same command
resumes. What follows `main` is plumbing, the same text as in train_qalign_dt.py.
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
import sys
import threading
import time
import urllib.request
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import filelock
import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    env: str = "hopper-mini"  # as in train_qalign_dt.py: the task, and the data to train on
    seed: int = 1  # seed of the initial weights, dropout and all batches
    # HDF5 file(s) in D4RL's or Minari's layout to use instead; several are concatenated
    dataset_path: tuple[str, ...] = ()
    runs_dir: str = "runs"  # folder of all runs
    exp_name: str = "train_vdt"  # name of this experiment; the run folder is <runs-dir>/<env>__<exp-name>__<seed>
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train; auto takes CUDA if there is one
    # arithmetic of the transformer's blocks; auto: bf16 where the hardware has it. All else is always float32
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    checkpoint_minutes: float = 2.0  # wall-clock time between resume.pt files

    total_steps: int | None = None  # gradient steps of the policy (default: 100,000; <body>-mini: 5,000)
    embed_dim: int | None = None  # width of the transformer (default: 256; <body>-mini: 64)
    n_layer: int | None = None  # number of transformer blocks (default: 6; <body>-mini: 2)
    n_head: int | None = None  # attention heads per block (default: 4; <body>-mini: 2)
    # K, the window length in environment steps of three tokens (default: 20; <body>-mini: 10)
    context_len: int | None = None
    batch_size: int | None = None  # windows per gradient step (default: 256; <body>-mini: 64)
    actor_lr: float | None = None  # Adam learning rate of the policy, cosine to 0 (default: 3e-4; <body>-mini: 1e-3)

    value_steps: int | None = None  # gradient steps of Q and V (default: 1,000,000; <body>-mini: 10,000)
    # so many of them take whole discounted returns as targets, as n = infinity does (default: 0; <body>-mini: 9,000)
    warm_start_steps: int | None = None
    critic_width: int | None = None  # hidden width of Q and V (default: 256; <body>-mini: 128)
    n_step: int = 5  # n of Q's targets
    expectile: float | None = None  # epsilon of V (default: 0.7; AntMaze: 0.9)
    gamma: float = 0.99  # discount of Q and V
    # of the weights exp(eta * advantage); 0: none, as in Table 3 (default: 3, IQL's; <body>-mini: 0.3)
    eta: float | None = None
    q_weight: float = 1.0  # lambda, the weight of the Q term; 0: none (Table 3)
    # gradient steps of the environment model, which only `--inference plan` uses (default: 50,000; <body>-mini: 5,000)
    model_steps: int | None = None
    plan_steps: int = 5  # E, the number of Q terms that the planner sums; 1 is greedy

    def __post_init__(self):
        at_least_1 = dict.fromkeys(("embed_dim", "n_layer", "n_head", "context_len", "batch_size", "critic_width"), 1)
        check_args(self, at_least_1 | {"n_step": 1, "value_steps": 1, "plan_steps": 1})
        if self.embed_dim and self.n_head and self.embed_dim % self.n_head:
            raise ValueError(f"--embed-dim {self.embed_dim} is not a multiple of --n-head {self.n_head}")
        for name, x in (("gamma", self.gamma), ("expectile", self.expectile)):
            if x is not None and not 0 < x < 1:
                raise ValueError(f"--{name} {x}: must be between 0 and 1")


@dataclass(frozen=True)
class Config(Args):
    """Args with every default resolved; checkpoints hold it."""

    bf16: bool = False
    conv: bool = False  # the shared policy without Q-Align DT's convolution
    dropout: float = 0.1  # of the policy in training; <body>-mini: 0
    max_timestep: int = 1000  # entries of the timestep embedding
    reward_scale: float = 1.0  # of the rewards that Q and V see: only so does eta mean the same for every task
    best_return: float = 0.0  # of the data, raw: the planner's candidates are multiples of it
    method: str = "VDT"  # how tables and figures call it


SIZES = ("total_steps", "embed_dim", "n_layer", "n_head", "context_len", "batch_size", "actor_lr")
SIZES += ("value_steps", "warm_start_steps", "critic_width", "model_steps", "dropout", "eta")
PAPER = dict(zip(SIZES, (100_000, 256, 6, 4, 20, 256, 3e-4, 1_000_000, 0, 256, 50_000, 0.1, 3.0)))
SMALL = dict(zip(SIZES, (5_000, 64, 2, 2, 10, 64, 1e-3, 10_000, 9_000, 128, 5_000, 0.0, 0.3)))
CANDIDATES, MODEL_WIDTH, MAX_STATE = (0.5, 0.75, 1.0, 1.2, 1.5), 256, 10.0  # of the planner: times the best return
LOG_EVERY = 100  # gradient steps per row of metrics.csv


def resolve(args: Args, task: "Task", data: "Dataset", device: torch.device) -> Config:
    """Fill in the defaults that depend on the task, the data and the hardware."""
    defaults = (SMALL if task.quality == "mini" else PAPER) | {"expectile": 0.9 if task.body == "antmaze" else 0.7}
    values = vars(args) | defaults | {name: value for name, value in vars(args).items() if value is not None}
    values["warm_start_steps"] = min(values["warm_start_steps"], values["value_steps"])
    values["device"] = device.type  # the random streams of CPU and CUDA differ, so a run stays on one kind
    values["bf16"] = use_bf16(args.precision, device)
    values["max_timestep"] = max(HORIZON, int(data.lengths.max()))
    span = float(np.ptp(data.returns))
    values["reward_scale"] = 1000 / span if span and task.body != "antmaze" else 1.0  # IQL's
    values["best_return"] = float(data.returns.max())
    off = [name for name, x in (("without weights", values["eta"]), ("without Q term", args.q_weight)) if not x]
    values["method"] = ", ".join(["VDT", *off])
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


# ======== shared: vdt ========

CRITIC_LR, CRITIC_BATCH, TAU, MAX_WEIGHT, MAX_GRAD_NORM = 3e-4, 256, 0.005, 100.0, 15.0
HELD_OUT = 10  # every tenth episode only tests the model


class Transitions:
    """All rows of the dataset as Q, V and the model see them; reward scaled, observations standardised."""

    def __init__(self, data: "Dataset", windows: Windows, config):
        device = windows.rtg.device
        self.obs, self.act, rewards = windows.obs, windows.act, windows.reward.cpu().numpy() * config.reward_scale
        ended = data.terminals[data.ends - 1]
        self.targets = [  # with the whole return, and with n steps
            [torch.as_tensor(x).to(device) for x in n_step_sums(rewards, data.ends, ended, n, config.gamma)]
            for n in (len(rewards), config.n_step)
        ]
        self.usable = torch.as_tensor(np.flatnonzero(self.targets[0][3].cpu())).to(device)
        # the model learns from rows with a successor; whole episodes are held out
        last, episode = np.zeros(len(rewards), bool), np.repeat(np.arange(len(data.ends)), data.lengths)
        last[data.ends - 1] = True
        held_out = episode % HELD_OUT == HELD_OUT - 1
        self.learn, self.test = (torch.as_tensor(np.flatnonzero(~last & x)).to(device) for x in (~held_out, held_out))
        self.raw_reward = torch.as_tensor(data.rewards).to(device)


def n_step_sums(rewards, ends, ended, n: int, gamma: float) -> tuple[np.ndarray, ...]:
    """The parts of n-step targets: rewards (N,), ends (E,) of the episodes (exclusive), ended (E,): by a terminal.

    Returns, (N,) each: sum_{k<m} gamma^k r_{t+k}; the row t + m; gamma^m, or 0 where V is dropped; whether m > 0.
    m is n, or less: up to and with a terminal; after a timeout up to the last observed state.
    """
    starts = np.append(0, ends[:-1])
    lengths, row = ends - starts, np.arange(len(rewards))
    end, terminal = np.repeat(ends, lengths), np.repeat(ended, lengths)
    counted = np.where((row == end - 1) & ~terminal, 0, rewards).astype(np.float64)  # a timeout's last reward is not
    rest = np.zeros(len(rewards) + 1)  # discounted sum of the counted rewards to the end of the episode
    for j in range(lengths.max()):  # steps before the end, all episodes at once
        i = (ends - 1 - j)[lengths > j]
        rest[i] = counted[i] + gamma * np.where(j > 0, rest[i + 1], 0)
    m = np.minimum(n, end - row - ~terminal)
    over = row + m == end  # only after a terminal
    discount = np.where(over, 0, gamma**m)
    boot = np.where(over, row, row + m)
    return (rest[:-1] - discount * rest[boot]).astype(np.float32), boot, discount.astype(np.float32), m > 0


def value_loss(v, target_q, expectile: float) -> torch.Tensor:
    """L_V = mean |eps - 1{u < 0}| u^2, u = min_i Q'_i(s, a) - V(s): v (B,), target_q (2, B)."""
    u = target_q.amin(dim=0) - v
    return ((expectile - (u < 0).float()).abs() * u**2).mean()


def policy_loss(a_hat, act, adv, q_hat, valid, eta: float, q_weight: float):
    """mean(w (a - a_hat)^2) - lambda / nu mean(min_i Q'_i(s, a_hat)); also the action loss, mean and clipped w, nu.

    a_hat, act (B, K, act_dim); adv (B, K): min_i Q'_i(s, a) - V(s); q_hat (2, B, K): Q'_i(s, a_hat); valid (B, K).
    """
    with torch.no_grad():
        w = torch.exp(eta * adv).clamp(max=MAX_WEIGHT)
    error = ((act - a_hat) ** 2).mean(dim=-1)  # (B, K)
    q = q_hat.amin(dim=0)
    nu = masked_mean(q.detach().abs(), valid)
    loss = masked_mean(w * error, valid) - q_weight / nu.clamp(min=1e-6) * masked_mean(q, valid)
    clipped = masked_mean((w == MAX_WEIGHT).float(), valid)
    return loss, (masked_mean(error, valid).detach(), masked_mean(w, valid), clipped, nu)


class ValueGuided:
    """Policy, twin Q and V, and one gradient step of each."""

    def __init__(self, task: "Task", config, device: torch.device):
        """Sets torch's global seed."""
        self.config = config
        torch.manual_seed(config.seed)  # of the weights and of dropout
        self.generator = torch.Generator(device).manual_seed(config.seed)  # of all batches
        self.policy = make_policy(task, vars(config), config.bf16).to(device)
        self.critic = MLP(2, task.obs_dim + task.act_dim, config.critic_width).to(device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.value = MLP(1, task.obs_dim, config.critic_width).to(device)
        self.value_opt = torch.optim.Adam([*self.critic.parameters(), *self.value.parameters()], CRITIC_LR, fused=True)
        self.actor_opt = torch.optim.Adam(self.policy.parameters(), config.actor_lr, fused=True)
        nets = dict(policy=self.policy, critic=self.critic, target_critic=self.target_critic, value=self.value)
        self.parts = nets | dict(value_opt=self.value_opt, actor_opt=self.actor_opt)  # what resume.pt holds

    def draw(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[torch.randint(len(rows), (CRITIC_BATCH,), generator=self.generator, device=rows.device)]

    def value_step(self, rows: Transitions, whole: bool) -> dict:
        """Q and V, with whole returns or n steps as Q's targets; returns what to log."""
        i, (sums, boot, discount, _) = self.draw(rows.usable), rows.targets[not whole]
        with torch.no_grad():
            y = sums[i] + discount[i] * self.value(rows.obs[boot[i]]).squeeze(0)
            target_q = self.target_critic(rows.obs[i], rows.act[i])
        v_loss = value_loss(self.value(rows.obs[i]).squeeze(0), target_q, self.config.expectile)
        q = self.critic(rows.obs[i], rows.act[i])  # (2, B)
        q_loss = ((q - y) ** 2).mean(dim=1).sum()
        descend(self.value_opt, q_loss + v_loss)
        ema_update(self.target_critic, self.critic, TAU)
        return {"q_loss": q_loss, "v_loss": v_loss, "q_mean": q[0].mean()}

    def policy_step(self, windows: Windows, lr: float) -> dict:
        """The policy; returns what to log."""
        self.actor_opt.param_groups[0]["lr"] = lr
        batch = windows.sample(self.config.batch_size, self.generator)
        a_hat, _ = self.policy(*batch[:5])
        with torch.no_grad():
            adv = self.target_critic(batch.obs, batch.act).amin(dim=0) - self.value(batch.obs).squeeze(0)
        q_hat = self.target_critic(batch.obs, a_hat)
        loss, found = policy_loss(a_hat, batch.act, adv, q_hat, batch.valid, self.config.eta, self.config.q_weight)
        descend(self.actor_opt, loss, MAX_GRAD_NORM)
        return dict(zip(("loss", "action_loss", "weight", "clipped", "nu"), (loss, *found)))


def descend(opt: torch.optim.Optimizer, loss: torch.Tensor, max_norm: float = math.inf) -> None:
    """One gradient step with the norm clipped."""
    opt.zero_grad()
    loss.backward()
    if max_norm < math.inf:
        nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], max_norm)
    opt.step()


# ======== end of shared: vdt ========


# ---- the planner


class Model(nn.Module):
    """(s, a) -> s', r: one MLP for the change of the standardised state and the raw reward, both standardised."""

    def __init__(self, obs_dim: int, act_dim: int, width: int):
        super().__init__()
        sizes = (obs_dim + act_dim, width, width, width)
        layers = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o), nn.Mish())]
        self.net = nn.Sequential(*layers, nn.Linear(width, obs_dim + 1))
        self.register_buffer("mean", torch.zeros(obs_dim + 1))  # of change and reward
        self.register_buffer("std", torch.ones(obs_dim + 1))

    def fit_scale(self, change_and_reward: torch.Tensor) -> None:
        """From (N, obs_dim + 1). (Changes are divided by their std only, as their mean is almost 0.)"""
        self.std.copy_(change_and_reward.std(dim=0) + 1e-6)
        self.mean[-1] = change_and_reward[:, -1].mean()

    def loss(self, obs, act, change_and_reward) -> torch.Tensor:
        target = (change_and_reward - self.mean) / self.std
        return ((self.net(torch.cat([obs, act], dim=-1)) - target) ** 2).mean()

    def forward(self, obs, act):  # (B, obs_dim) standardised, (B, act_dim) -> (B, obs_dim), raw reward (B,)
        out = self.net(torch.cat([obs, act], dim=-1)) * self.std + self.mean
        return (obs + out[:, :-1]).clamp(-MAX_STATE, MAX_STATE), out[:, -1]


class Plan(nn.Module):
    """Algorithm 3 as a policy: `act` takes the first action of the best of several imagined futures.

    offsets (m,): candidate returns minus the one that the rollout asked for (the data's best), normalised. All
    candidates share the executed actions and lose the real rewards, so each one's RTG history is the given one plus
    its offset.
    """

    def __init__(self, policy, critic, model, offsets, rtg_scale: float, gamma: float, steps: int):
        super().__init__()
        self.policy, self.critic, self.model = policy, critic, model
        self.offsets, self.rtg_scale, self.gamma, self.steps = torch.as_tensor(offsets), rtg_scale, gamma, steps

    def act(self, rtg, obs, act, timestep, valid):
        m, (B, K) = len(self.offsets), rtg.shape
        rtg, obs, act, timestep, valid = (x.repeat_interleave(m, dim=0) for x in (rtg, obs, act, timestep, valid))
        rtg = rtg + self.offsets.to(rtg).repeat(B)[:, None] * valid
        action = first = self.policy.act(rtg, obs, act, timestep, valid)  # (B m, act_dim)
        total = self.critic(obs[:, -1], action).amin(dim=0)
        for i in range(1, self.steps):
            state, reward = self.model(obs[:, -1], action)
            act = torch.cat([act[:, 1:-1], action[:, None], torch.zeros_like(action)[:, None]], dim=1)[:, -K:]
            rtg = torch.cat([rtg[:, 1:], rtg[:, -1:] - reward[:, None] / self.rtg_scale], dim=1)
            obs = torch.cat([obs[:, 1:], state[:, None]], dim=1)
            timestep = torch.cat([timestep[:, 1:], (timestep[:, -1:] + 1).clamp(max=HORIZON - 1)], dim=1)
            valid = torch.cat([valid[:, 1:], torch.ones_like(valid[:, :1])], dim=1)
            action = self.policy.act(rtg, obs, act, timestep, valid)
            total = total + self.gamma**i * self.critic(state, action).amin(dim=0)
        best = total.view(B, m).argmax(dim=1)
        return first.view(B, m, -1)[torch.arange(B, device=best.device), best]


def make_planner(task: "Task", content: dict, policy: Policy) -> Plan:
    """The planner of a checkpoint, for rollouts that ask for the data's best return; ValueError if it has no model."""
    config, device = content["config"], next(policy.parameters()).device
    if not content["model"]:
        unfinished = (
            "its training ended before the model's" if config["model_steps"] else "trained with --model-steps 0"
        )
        raise ValueError(f"{unfinished}, so there is no model to plan in")
    critic = MLP(2, task.obs_dim + task.act_dim, config["critic_width"])
    model = Model(task.obs_dim, task.act_dim, MODEL_WIDTH)
    critic.load_state_dict(content["critic"])
    model.load_state_dict(content["model"])
    offsets = [(x - 1) * config["best_return"] / task.rtg_scale for x in CANDIDATES]
    how = (task.rtg_scale, config["gamma"], config["plan_steps"])
    return Plan(policy, critic, model, offsets, *how).to(device).eval()


INFERENCE = {"plan": make_planner}  # what evaluate_alignment.py --high-targets --inference can ask for


# ---- training


class Training(ValueGuided):
    """The networks with the environment model, and one gradient step of whichever phase it is in."""

    metrics = ("q_loss", "v_loss", "q_mean", "loss", "action_loss", "weight", "clipped", "nu", "model_loss")

    def __init__(self, task: "Task", data: "Dataset", windows: Windows, config: Config):
        device = windows.rtg.device
        super().__init__(task, config, device)
        self.windows, self.rows = windows, Transitions(data, windows, config)
        self.model = Model(task.obs_dim, task.act_dim, MODEL_WIDTH).to(device)
        if len(self.rows.learn):
            self.model.fit_scale(self.change_and_reward(self.rows.learn))
        self.model_opt = torch.optim.Adam(self.model.net.parameters(), CRITIC_LR, fused=True)
        self.parts |= dict(model=self.model, model_opt=self.model_opt)

    def change_and_reward(self, i: torch.Tensor) -> torch.Tensor:
        rows = self.rows
        return torch.cat([rows.obs[i + 1] - rows.obs[i], rows.raw_reward[i, None]], dim=1)

    def step(self, step: int) -> torch.Tensor:
        """Gradient step number `step` of all phases; returns the values of `metrics` (9,), 0 where not computed."""
        config, rows = self.config, self.rows
        if step < config.value_steps:
            values = self.value_step(rows, whole=step < config.warm_start_steps)
        elif (step := step - config.value_steps) < config.total_steps:
            cosine = 0.5 * (1 + math.cos(math.pi * step / config.total_steps))
            values = self.policy_step(self.windows, config.actor_lr * cosine)
        else:
            i = self.draw(rows.learn)
            values = {"model_loss": self.model.loss(rows.obs[i], rows.act[i], self.change_and_reward(i))}
            descend(self.model_opt, values["model_loss"])
        zero = torch.zeros((), device=self.windows.rtg.device)
        return torch.stack([values.get(name, zero).detach() for name in self.metrics])

    @torch.no_grad()
    def model_r2(self) -> list[float]:
        """R^2 of each dimension of the change of state, and of the reward, on the held-out episodes."""
        i = self.rows.test
        state, reward = self.model(self.rows.obs[i], self.rows.act[i])
        true, error = self.change_and_reward(i), torch.cat([state - self.rows.obs[i], reward[:, None]], dim=1)
        error = ((error - true) ** 2).mean(dim=0) / true.var(dim=0, correction=0).clamp(min=1e-12)
        return (1 - error).tolist()


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    task, device = parse_env(args.env), pick_device(args.device)
    data = read_dataset(task, args.dataset_path)
    config = resolve(args, task, data, device)
    identity = {name: value for name, value in vars(config).items() if name not in NOT_OF_THE_RUN}
    identity["data"] = data.digest
    phases = (config.value_steps, config.total_steps, config.model_steps)
    folder = Path(args.runs_dir) / f"{task.folder}__{args.exp_name}__{args.seed}"
    finished = load_own(folder / "policy.pt", "train_vdt", identity)
    if finished and finished.get("step") == config.total_steps and (finished["model"] or not config.model_steps):
        return print(f"{folder}/policy.pt is finished; nothing to do (another run: --exp-name)")
    state = load_own(folder / "resume.pt", "train_vdt", identity)
    learner = Training(task, data, Windows(data, task, config.context_len, device), config)
    if not len(learner.rows.usable) or config.model_steps and not (len(learner.rows.learn) and len(learner.rows.test)):
        fail(f"{data.label}: too few episodes of more than one step; the model needs {HELD_OUT} (or --model-steps 0)")

    with claim(folder) as stack:
        sums, step, rows = torch.zeros(len(learner.metrics), device=device), 0, []  # since the last row; of metrics.csv
        if state:
            step, rows = restore(state, folder / "resume.pt", learner, sums, sum(phases), ("step", "rows"))
        print(f"{folder}: {data.label}, {len(data.rewards):,} transitions, {len(data.ends):,} episodes, step {step:,}")
        print(f"{phases[0]:,} steps of Q and V, {phases[1]:,} of the policy, {phases[2]:,} of the model")
        metrics = Log(folder, "metrics", rows)
        bar = tqdm(total=sum(phases), initial=step, unit="step", desc="training", dynamic_ncols=True, disable=None)
        stack.enter_context(bar)

        def save() -> None:
            counters = dict(step=step, rows=rows)
            save_resume(folder, dict(stage="train_vdt", config=identity, counters=counters), learner, sums)
            content = dict(stage="train_vdt", env=args.env, config=identity, data=data.summary())
            content |= dict(obs_mean=data.obs_mean, obs_std=data.obs_std, step=min(max(step - phases[0], 0), phases[1]))
            done = config.model_steps and step == sum(phases)
            content |= dict(model=learner.model.state_dict() if done else None)
            content |= dict(model_r2=learner.model_r2() if done else None, value=learner.value.state_dict())
            content |= dict(policy=learner.policy.state_dict(), critic=learner.target_critic.state_dict())
            save_checkpoint(folder / "policy.pt", content | {"episode_returns": torch.as_tensor(data.returns)})

        saved = time.monotonic()
        while step < sum(phases):
            sums += learner.step(step)
            step += 1
            bar.update()
            if step % LOG_EVERY == 0 or step == sum(phases):
                check_finite(learner, sums, step)
                means = (sums / ((step - 1) % LOG_EVERY + 1)).tolist()
                metrics.write({"step": step, **dict(zip(learner.metrics, means))})
                bar.set_postfix_str(" ".join(f"{name} {x:.3g}" for name, x in zip(learner.metrics, means) if x))
                sums.zero_()
            if time.monotonic() - saved > args.checkpoint_minutes * 60:
                save()
                saved = time.monotonic()
        save()
    if config.model_steps:
        r2 = learner.model_r2()
        print(
            f"model: R^2 on held-out episodes {np.mean(r2[:-1]):.3f} (lowest {min(r2[:-1]):.3f}), reward {r2[-1]:.3f}"
        )
    print(f"{folder}/policy.pt: {config.total_steps:,} steps")


NOT_OF_THE_RUN = ("dataset_path", "runs_dir", "checkpoint_minutes")  # of Config

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


if __name__ == "__main__":
    run(main)
