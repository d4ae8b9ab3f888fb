"""RDT and RVDT: rebalanced returns, one of Q-Align DT's neighbours (return rebalancing by an expert on the best data).

    python pretrain_q.py --env hopper-medium-v2 && python baselines/train_rvdt.py --env hopper-medium-v2

A stochastic Decision Transformer that on the best trajectories D_e is also drawn to an expert policy of the state
alone, and towards higher Q as QT is:

    best_episodes     D_e: best returns first, up to a tenth of all time steps
    nll, kl           of Gaussians; with a fixed std, (2 sigma^2 / A) NLL is the mean squared error
    imitation_loss    (2 sigma^2 / A) NLL, or what stands for it
    expert_loss       alpha mean over D_e of (2 sigma^2 / A) KL(pi || pi^e)
    q_term            QT's, at a sampled action; eta times it

The poster's variants by flags: RDT is --eta 0; DT --eta 0 --rebalance none --std none; DT-Dup --eta 0 --rebalance dup;
QT --rebalance none --std none; VDT (in this poster's sense) --rebalance none; RVDT-Dup --rebalance dup; RVDT-Determ
--std none. "The release" is a fork of QT by one of its authors, chufanchen/QT. Ours: the fixed Gaussian stands around
tanh(mu), the expert serves without dropout.

With a fixed std the KL term is a weighted likelihood (the poster's Proposition): where the expert is D_e's conditional
mean, its gradient is on average that of counting D_e's steps 1 + alpha / p times, p their share of all steps.

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
from dataclasses import dataclass, replace
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
    seed: int = 1  # seed of the initial weights, dropout, the windows, the coin and the samples
    # HDF5 file(s) in D4RL's or Minari's layout to use instead; several are concatenated
    dataset_path: tuple[str, ...] = ()
    runs_dir: str = "runs"  # folder of all runs
    exp_name: str = "train_rvdt"  # name of this experiment; the run folder is <runs-dir>/<env>__<exp-name>__<seed>
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train; auto takes CUDA if there is one
    # arithmetic of the transformer's blocks; auto: bf16 where the hardware has it. All else is always float32
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # stage 1's critic.pt to start from (default: the one of this env and seed); none: random weights, as the release
    critic: str = ""
    checkpoint_minutes: float = 2.0  # wall-clock time between resume.pt files

    # gradient steps; both learning rates fall to 0 over them (default: 100,000; <body>-mini: 5,000)
    total_steps: int | None = None
    embed_dim: int | None = None  # width of the transformer (default: 256; <body>-mini: 64)
    n_layer: int | None = None  # number of transformer blocks (default: 4; <body>-mini: 2)
    n_head: int | None = None  # attention heads per block (default: 4; <body>-mini: 2)
    # K, the window length in environment steps of three tokens (default: 20; <body>-mini: 10)
    context_len: int | None = None
    batch_size: int | None = None  # windows per gradient step (default: 256; <body>-mini: 64)
    critic_width: int | None = None  # hidden width of the critic, that of --critic (default: 256; <body>-mini: 128)
    actor_lr: float | None = None  # Adam learning rate of the policy, with L2 1e-4 (default: 3e-4; <body>-mini: 1e-3)
    eta: float | None = None  # weight of the Q term (default: QT's; own data: 1); 0: none, as in RDT
    # how the best trajectories count more: by the KL to the expert; by weight; by drawing them more often; not at all
    rebalance: Literal["kl", "weight", "dup", "none"] = "kl"
    alpha: float = 1.0  # weight of the KL term
    alpha_w: float = 4.0  # weight, dup: how much more a step of the best trajectories counts
    expert_fraction: float = 0.1  # share of all time steps that the best trajectories may have
    # of the policy: sigma = 0.1; learned, squashed by tanh; or none, a deterministic policy
    std: Literal["fixed", "learned", "none"] = "fixed"
    expert_steps: int = 20_000  # gradient steps of the expert at most
    gamma: float = 0.99  # discount of a random critic; stage 1's has its own

    def __post_init__(self):
        at_least_1 = dict.fromkeys(("embed_dim", "n_layer", "n_head", "context_len", "batch_size", "critic_width"), 1)
        check_args(self, at_least_1 | {"expert_steps": 1})
        if not 0 < self.expert_fraction <= 1:
            raise ValueError(f"--expert-fraction {self.expert_fraction}: must be between 0 and 1")
        if self.embed_dim and self.n_head and self.embed_dim % self.n_head:
            raise ValueError(f"--embed-dim {self.embed_dim} is not a multiple of --n-head {self.n_head}")
        if not 0 < self.gamma < 1:
            raise ValueError(f"--gamma {self.gamma}: must be between 0 and 1")


@dataclass(frozen=True)
class Config(Args):
    """Args with every default resolved, and what the hardware, the data and the critic decide; checkpoints hold it."""

    bf16: bool = False
    conv: bool = False  # the shared policy without Q-Align DT's convolution
    dropout: float = 0.1  # of the policy in training; <body>-mini: 0
    max_timestep: int = 1000  # entries of the timestep embedding
    max_grad_norm: float = 15.0  # of both networks
    method: str = "RVDT"  # how tables and figures call it


SIZES = ("total_steps", "embed_dim", "n_layer", "n_head", "context_len", "batch_size", "critic_width", "actor_lr")
SIZES += ("dropout",)
PAPER = dict(zip(SIZES, (100_000, 256, 4, 4, 20, 256, 256, 3e-4, 0.1)))
SMALL = dict(zip(SIZES, (5_000, 64, 2, 2, 10, 64, 128, 1e-3, 0.0)))
# QT's: eta for medium, medium-replay, and the others; clipping of the gradient's norm
RELEASE = {
    "halfcheetah": ((5.0, 5.0, 0.4), 15.0),
    "hopper": ((1.0, 3.0, 1.0), 9.0),
    "walker2d": ((2.0, 2.0, 2.0), 5.0),
}
SIGMA = 0.1  # the fixed std
CRITIC_LR, L2, TAU = 3e-4, 1e-4, 0.005
POLICY_EVERY, POLICY_AFTER = 5, 1000  # the target policy moves every 5th step, once 1,000 are done
EXPERT_BATCH, EXPERT_EVERY, EXPERT_PATIENCE = 256, 500, 4  # its held-out loss is looked at every so many steps
LOG_EVERY = 100  # gradient steps per row of metrics.csv


def resolve(args: Args, task: "Task", data: "Dataset", device: torch.device) -> Config:
    """Fill in the defaults that depend on the task, the data and the hardware."""
    defaults = (SMALL if task.quality == "mini" else PAPER) | {"eta": 1.0}
    if task.tag == "v2" and task.body in RELEASE:
        column = {"medium": 0, "medium-replay": 1}.get(task.quality, 2)
        defaults = defaults | {"eta": RELEASE[task.body][0][column]}
    values = vars(args) | defaults | {name: value for name, value in vars(args).items() if value is not None}
    values["device"] = device.type  # the random streams of CPU and CUDA differ, so a run stays on one kind
    values["bf16"] = use_bf16(args.precision, device)
    values["max_timestep"] = max(HORIZON, int(data.lengths.max()))
    values["max_grad_norm"] = RELEASE.get(task.body, (0, 15.0))[1]
    values["critic"] = "none" if args.critic == "none" else "stage 1"
    values["method"] = method_of(values["eta"], args.rebalance, args.std)
    return Config(**values)


def method_of(eta: float, rebalance: str, std: str) -> str:
    """The poster's name of a variant, or its settings where it has none."""
    names = {
        (False, "none", "none"): "DT", (False, "dup", "fixed"): "DT-Dup", (False, "kl", "fixed"): "RDT",
        (True, "none", "none"): "QT", (True, "none", "fixed"): "VDT of RVDT's poster",
        (True, "dup", "fixed"): "RVDT-Dup", (True, "kl", "none"): "RVDT-Determ", (True, "kl", "fixed"): "RVDT",
    }  # fmt: skip
    return names.get((eta > 0, rebalance, std), f"RVDT, {rebalance}, {std} std, eta {eta:g}")


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


# ---- distributions


def nll(mu, std, a):
    """-log N(a; mu, std^2), summed over dimensions: (..., A) each -> (...)."""
    return (0.5 * ((a - mu) / std) ** 2 + torch.log(std) + 0.5 * math.log(2 * math.pi)).sum(dim=-1)


def squashed_nll(mu, std, a):
    """-log of the density of tanh(N(mu, std^2)) at a, summed over dimensions."""
    a = a.clamp(-1 + 1e-6, 1 - 1e-6)
    return nll(mu, std, torch.atanh(a)) + torch.log(1 - a**2).sum(dim=-1)


def kl(mu, std, mu_e, std_e):
    """KL(N(mu, std^2) || N(mu_e, std_e^2)), summed over dimensions; squashing both by tanh changes nothing."""
    return (torch.log(std_e / std) + (std**2 + (mu - mu_e) ** 2) / (2 * std_e**2) - 0.5).sum(dim=-1)


class Gaussian(Policy):
    """The shared policy as a distribution: forward returns its means and stds (B, K, act_dim); `act` is its mode.

    learned: mu and std are those before tanh; otherwise the mean is tanh(mu) and the std is SIGMA.
    """

    def __init__(self, obs_dim, act_dim, embed_dim, n_layer, n_head, max_timestep, dropout, learned: bool, bf16=False):
        super().__init__(obs_dim, act_dim, embed_dim, n_layer, n_head, max_timestep, False, dropout, bf16)
        self.std_head = nn.Linear(embed_dim, act_dim) if learned else None
        if learned:
            nn.init.normal_(self.std_head.weight, std=0.02)
            nn.init.zeros_(self.std_head.bias)

    def forward(self, rtg, obs, act, timestep, valid):
        x = self.hidden(rtg, obs, act, timestep, valid, last=3 * rtg.shape[1])[:, 1::3]  # of the state tokens
        return distribution(self.action_head(x), self.std_head(x) if self.std_head else None)


def distribution(mu, free):
    """Mean and std from a network's outputs; free: of the std, None where it is fixed."""
    if free is None:
        return torch.tanh(mu), torch.full_like(mu, SIGMA)
    return mu, torch.exp(-5 + 3.5 * (torch.tanh(free) + 1))


def make_gaussian(task: "Task", config: dict, bf16: bool) -> Gaussian:
    """The policy that a checkpoint's configuration describes (randomly initialised from torch's global generator)."""
    sizes = (config[name] for name in ("embed_dim", "n_layer", "n_head", "max_timestep", "dropout"))
    return Gaussian(task.obs_dim, task.act_dim, *sizes, learned=config["std"] == "learned", bf16=bf16)


make_policy = make_gaussian  # noqa: F811, the name by which stages 3 and 4 ask for it


def sample(mu, std, kind: str, generator: torch.Generator):
    """A reparameterised action; the mode of a deterministic policy."""
    if kind == "none":
        return mu
    a = mu + std * torch.randn(mu.shape, generator=generator, device=mu.device)
    return torch.tanh(a) if kind == "learned" else a.clamp(-1, 1)


# ---- the best trajectories and their expert


def best_episodes(returns: np.ndarray, lengths: np.ndarray, fraction: float) -> np.ndarray:
    """(E,) bool, D_e: whole episodes, best return first, while their steps stay within a fraction; at least one."""
    order = np.argsort(-returns, kind="stable")  # ties by index
    within = np.cumsum(lengths[order]) <= fraction * lengths.sum()
    chosen = np.zeros(len(returns), bool)
    chosen[order[: max(1, int(within.sum()))]] = True
    return chosen


class Expert(nn.Module):
    """pi^e(. | s): two hidden layers of 256, ReLU, dropout 0.1; mean and std as the policy's."""

    def __init__(self, obs_dim: int, act_dim: int, learned: bool):
        super().__init__()
        layers = (nn.Linear(obs_dim, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.1))
        self.learned, self.net = learned, nn.Sequential(*layers, nn.Linear(256, act_dim * (1 + learned)))

    def forward(self, obs):
        return distribution(*self.net(obs).chunk(2, dim=-1)) if self.learned else distribution(self.net(obs), None)

    def loss(self, obs, act):
        mean, std = self(obs)
        return squashed_nll(mean, std, act).mean() if self.learned else ((mean - act) ** 2).mean()


def fit_expert(task: "Task", windows: Windows, data: "Dataset", chosen: np.ndarray, config: Config) -> Expert:
    """Imitates D_e, until the loss on its last tenth of episodes (of one episode: of steps) stops falling; frozen."""
    torch.manual_seed(config.seed)
    generator = torch.Generator(windows.obs.device).manual_seed(config.seed)
    expert = Expert(task.obs_dim, task.act_dim, config.std == "learned").to(windows.obs.device)
    opt = torch.optim.AdamW(expert.parameters(), lr=3e-4, weight_decay=1e-4, fused=True)
    episodes = [np.arange(data.starts[i], data.ends[i]) for i in np.flatnonzero(chosen)]
    if len(episodes) == 1:
        episodes = np.array_split(episodes[0], min(10, len(episodes[0])))
    test = max(1, len(episodes) // 10)
    parts = episodes[:-test] or episodes, episodes[-test:]  # of a single step: the same
    device = windows.obs.device
    learn, test = (torch.as_tensor(np.concatenate(x)).to(device) for x in parts)
    best, best_loss, since = copy.deepcopy(expert.state_dict()), math.inf, 0
    for step in range(config.expert_steps):
        i = learn[torch.randint(len(learn), (EXPERT_BATCH,), generator=generator, device=device)]
        opt.zero_grad()
        expert.loss(windows.obs[i], windows.act[i]).backward()
        opt.step()
        if (step + 1) % EXPERT_EVERY == 0 or step + 1 == config.expert_steps:
            expert.eval()
            with torch.no_grad():
                loss = expert.loss(windows.obs[test], windows.act[test]).item()
            expert.train()
            since += 1
            if loss < best_loss:
                best, best_loss, since = copy.deepcopy(expert.state_dict()), loss, 0
            if since == EXPERT_PATIENCE:
                break
    opt.zero_grad()
    expert.load_state_dict(best)
    print(f"expert: {len(episodes)} parts of the best data, {step + 1:,} steps, held-out loss {best_loss:.4f}")
    return expert.requires_grad_(False).eval()


# ---- losses


def imitation_loss(mu, std, act, valid, in_best, config: Config):
    """(2 sigma^2 / A) NLL (learned std: NLL / A; none: mean squared error), weighted on D_e if asked; up to a constant.

    mu, std, act (B, K, A); valid (B, K); in_best (B,): whether the window is of D_e.
    """
    A = act.shape[-1]
    if config.std == "learned":
        loss = squashed_nll(mu, std, act) / A
    else:  # (2 sigma^2 / A) NLL but for its constant
        loss = ((mu - act) ** 2).mean(dim=-1)
    if config.rebalance == "weight":
        loss = loss * (1 + config.alpha_w * in_best.float()[:, None])
    return masked_mean(loss, valid)


def expert_loss(mu, std, mu_e, std_e, valid, in_best, config: Config):
    """alpha times the mean over the steps of D_e of (2 sigma^2 / A) KL(pi || pi^e) (learned std: KL / A); none: 0."""
    A, mask = mu.shape[-1], valid & in_best[:, None]
    if config.std == "learned":
        return config.alpha * masked_mean(kl(mu, std, mu_e, std_e) / A, mask)
    return config.alpha * masked_mean(((mu - mu_e) ** 2).mean(dim=-1), mask)


# ======== shared: qt ========


def window_target(batch: Batch, q_last, gamma: float):
    """y_i = sum_{k=i}^{l-1} gamma^{k-i} r_k + gamma^{l-i} q_last, l the window's last step, and where it is defined.

    q_last (B,): min_m Q'_m(s_l, a'_l) -> y (B, K), mask (B, K). If l is a true terminal, y_i sums through r_l without
    q_last, and y_l = r_l; otherwise step l has no target.
    """
    terminal = batch.terminal[:, -1]
    y = torch.where(terminal, batch.reward[:, -1], q_last)
    columns = [y]
    for i in reversed(range(batch.reward.shape[1] - 1)):
        y = batch.reward[:, i] + gamma * y
        columns.append(y)
    last = torch.arange(batch.valid.shape[1], device=y.device) == batch.valid.shape[1] - 1  # (K,)
    return torch.stack(columns[::-1], dim=1), batch.valid & (~last | terminal[:, None])


def q_term(q_pair, valid, coin):
    """-mean Q_i(s, a_hat) / mean |Q_j(s, a_hat)|: q_pair (2, B, K), coin (): 0 takes i = 1, 1 takes i = 2."""
    q_i, q_j = torch.where(coin == 0, q_pair, q_pair.flip(0))
    return -masked_mean(q_i, valid) / masked_mean(q_j.detach().abs(), valid).clamp(min=1e-6)


def descend(opt: torch.optim.Optimizer, loss: torch.Tensor, max_norm: float) -> None:
    """One gradient step with the norm clipped."""
    opt.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], max_norm)
    opt.step()


def stage_1(args: Args, config: Config, task: "Task", data: "Dataset") -> tuple[Config, dict]:
    """The configuration with stage 1's discount, and the weights of its critic; exits 2 if it does not fit."""
    path = Path(args.critic or Path(args.runs_dir) / f"{task.folder}__pretrain_q__{args.seed}" / "critic.pt")
    if not path.is_file():
        fail(f"{path} is missing: python pretrain_q.py --env {args.env} --seed {args.seed}, or --critic none")
    content = load_checkpoint(path, "pretrain_q")
    try:
        if content["config"]["data"] != data.digest:
            fail(f"{path}: a critic of other data ({content['data']['label']}); use that data, or another --runs-dir")
        MLP(2, task.obs_dim + task.act_dim, config.critic_width).load_state_dict(content["critic"])
        if not all(weight.isfinite().all() for weight in content["critic"].values()):
            raise ValueError("weights that are not finite")
        return replace(config, gamma=content["config"]["gamma"]), content["critic"]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        fail(f"{path}: not a critic for this run ({one_line(error)}); check --critic-width, or train it again")


# ======== end of shared: qt ========


class Training:
    """The networks and their targets, and one step of both."""

    metrics = ("q_loss", "q_mean", "loss", "imitation", "expert", "q_term")

    def __init__(self, task: "Task", windows: Windows, data: "Dataset", config: Config, critic_weights=None, fit=True):
        """critic_weights: stage 1's (None: a random critic); fit: train the expert. Sets torch's global seed."""
        self.windows, self.config, device = windows, config, windows.rtg.device
        chosen = best_episodes(data.returns, data.lengths, config.expert_fraction)
        self.in_best = torch.as_tensor(np.repeat(chosen, data.lengths)).to(device)  # (N,) of each transition
        self.expert = (
            Expert(task.obs_dim, task.act_dim, config.std == "learned").to(device).requires_grad_(False).eval()
        )
        if fit and config.rebalance == "kl":
            self.expert = fit_expert(task, windows, data, chosen, config)
        torch.manual_seed(config.seed)  # of the weights and of dropout
        self.generator = torch.Generator(device).manual_seed(config.seed)  # of the windows, the coin and the samples
        self.policy = make_gaussian(task, vars(config), config.bf16).to(device)
        self.critic = MLP(2, task.obs_dim + task.act_dim, config.critic_width).to(device)
        if critic_weights:
            self.critic.load_state_dict(critic_weights)
        self.target_policy = copy.deepcopy(self.policy).requires_grad_(False).eval()
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        adam = torch.optim.Adam
        self.actor_opt = adam(self.policy.parameters(), lr=config.actor_lr, weight_decay=L2, fused=True)
        self.critic_opt = adam(self.critic.parameters(), lr=CRITIC_LR, fused=True)
        nets = dict(policy=self.policy, target_policy=self.target_policy, expert=self.expert)
        nets |= dict(critic=self.critic, target_critic=self.target_critic)
        self.parts = nets | dict(actor_opt=self.actor_opt, critic_opt=self.critic_opt)  # what resume.pt holds

    def draw(self) -> torch.Tensor:
        """Window starts (B, 1): uniform over all transitions; dup: those of D_e 1 + alpha_w times as often."""
        device, size = self.in_best.device, self.config.batch_size
        if self.config.rebalance != "dup":
            return torch.randint(len(self.in_best), (size, 1), generator=self.generator, device=device)
        weights = torch.cumsum(1 + self.config.alpha_w * self.in_best.double(), dim=0)
        u = torch.rand(size, generator=self.generator, device=device, dtype=torch.float64) * weights[-1]
        return torch.searchsorted(weights, u, right=True).clamp(max=len(weights) - 1)[:, None]

    def step(self, step: int) -> torch.Tensor:
        """Returns the values of `metrics` (6,), on the device."""
        config = self.config
        factor = 0.5 * (1 + math.cos(math.pi * step / config.total_steps))
        self.actor_opt.param_groups[0]["lr"] = config.actor_lr * factor
        self.critic_opt.param_groups[0]["lr"] = CRITIC_LR * factor
        start = self.draw()
        batch, in_best = self.windows.at(start), self.in_best[start[:, 0]]
        coin = torch.randint(2, (), generator=self.generator, device=batch.rtg.device)
        q_loss = q_mean = term = pull = torch.zeros((), device=batch.rtg.device)
        if config.eta:
            with torch.no_grad():
                mean, std = self.target_policy(*batch[:5])
                a_last = sample(mean[:, -1], std[:, -1], config.std, self.generator)
                q_last = self.target_critic(batch.obs[:, -1], a_last).amin(dim=0)
                y, mask = window_target(batch, q_last, config.gamma)
            q = self.critic(batch.obs, batch.act)  # (2, B, K)
            q_loss, q_mean = sum(masked_mean((q_m - y) ** 2, mask) for q_m in q), masked_mean(q[0], mask)
            descend(self.critic_opt, q_loss, config.max_grad_norm)
        mean, std = self.policy(*batch[:5])
        imitation = imitation_loss(mean, std, batch.act, batch.valid, in_best, config)
        loss = imitation
        if config.rebalance == "kl":
            pull = expert_loss(mean, std, *self.expert(batch.obs), batch.valid, in_best, config)
            loss = loss + pull
        if config.eta:
            self.critic.requires_grad_(False)
            action = sample(mean, std, config.std, self.generator)
            term = q_term(self.critic(batch.obs, action), batch.valid, coin)
            self.critic.requires_grad_(True)
            loss = loss + config.eta * term
        descend(self.actor_opt, loss, config.max_grad_norm)
        if config.eta:
            ema_update(self.target_critic, self.critic, TAU)
            if step > POLICY_AFTER and step % POLICY_EVERY == 0:
                ema_update(self.target_policy, self.policy, TAU)
        return torch.stack([q_loss, q_mean, loss, imitation, pull, term]).detach()


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    task, device = parse_env(args.env), pick_device(args.device)
    data = read_dataset(task, args.dataset_path)
    config = resolve(args, task, data, device)
    identity = {name: value for name, value in vars(config).items() if name not in NOT_OF_THE_RUN}
    identity["data"] = data.digest
    if config.critic == "none":  # otherwise gamma is stage 1's, known when its critic is read
        identity["gamma"] = config.gamma
    folder = Path(args.runs_dir) / f"{task.folder}__{args.exp_name}__{args.seed}"
    finished = load_own(folder / "policy.pt", "train_rvdt", identity)
    if finished and finished.get("step") == config.total_steps:
        return print(f"{folder}/policy.pt is finished; nothing to do (another run: --exp-name)")
    state, critic_weights = load_own(folder / "resume.pt", "train_rvdt", identity), None
    if config.eta and config.critic != "none" and not state:  # resume.pt holds the critic
        config, critic_weights = stage_1(args, config, task, data)

    with claim(folder) as stack:
        windows = Windows(data, task, config.context_len, device)
        learner = Training(task, windows, data, config, critic_weights, fit=not state)
        sums, step, rows = torch.zeros(len(learner.metrics), device=device), 0, []  # since the last row; of metrics.csv
        if state:
            names = ("step", "rows", "gamma")
            step, rows, gamma = restore(state, folder / "resume.pt", learner, sums, config.total_steps, names)
            config = learner.config = replace(config, gamma=gamma)
        print(f"{folder}: {data.label}, {len(data.rewards):,} transitions, {len(data.ends):,} episodes, step {step:,}")
        metrics = Log(folder, "metrics", rows)
        bar = tqdm(
            total=config.total_steps, initial=step, unit="step", desc="training", dynamic_ncols=True, disable=None
        )
        stack.enter_context(bar)

        def save() -> None:
            counters = dict(step=step, rows=rows, gamma=config.gamma)
            save_resume(folder, dict(stage="train_rvdt", config=identity, counters=counters), learner, sums)
            content = dict(stage="train_rvdt", env=args.env, config=identity | {"gamma": config.gamma}, step=step)
            content |= dict(data=data.summary(), obs_mean=data.obs_mean, obs_std=data.obs_std)
            content |= dict(policy=learner.policy.state_dict(), critic=learner.target_critic.state_dict())
            save_checkpoint(folder / "policy.pt", content | {"episode_returns": torch.as_tensor(data.returns)})

        saved = time.monotonic()
        while step < config.total_steps:
            sums += learner.step(step)
            step += 1
            bar.update()
            if step % LOG_EVERY == 0 or step == config.total_steps:
                check_finite(learner, sums, step)
                means = (sums / ((step - 1) % LOG_EVERY + 1)).tolist()
                metrics.write({"step": step, **dict(zip(learner.metrics, means))})
                bar.set_postfix_str(" ".join(f"{name} {x:.3g}" for name, x in zip(learner.metrics, means)))
                sums.zero_()
            if time.monotonic() - saved > args.checkpoint_minutes * 60:
                save()
                saved = time.monotonic()
        save()
    print(f"{folder}/policy.pt: {step:,} steps; python evaluate_alignment.py --checkpoint {folder}/policy.pt")


NOT_OF_THE_RUN = ("dataset_path", "runs_dir", "checkpoint_minutes", "gamma")  # of Config

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
