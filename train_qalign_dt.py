"""Stage 2 of Q-Align DT: co-train a return-conditioned policy and its critic (Algorithm 1).

    python train_qalign_dt.py --env hopper-medium-v2

Equations, tables and appendices are those of "Return-to-Go Is More Than a Number" (ICML 2026); "the release" is its
authors' code. What is where:

    shift_rtg          Eq. 2   all return-to-go (RTG) tokens of a window are moved by one scalar
    critic_loss        Eq. 7   TD targets take the target policy's action at an RTG raised by Delta_RTG
    alignment_loss     Eq. 5   an RTG raised (lowered) by a random delta must not lower (raise) Q
    actor_loss         Eq. 6   the supervised loss on actions and states + lambda_e times the alignment loss
    CoTraining.step    Algorithm 1
    add_noise, limit_push, update_average   ours; off for D4RL's -v2 names and AntMaze

Reads <runs-dir>/<env>__data/dataset.pt (data/prepare.py makes it; class Dataset lists what is in it) and stage 1's
critic.pt; both are made first where they are missing. Writes <runs-dir>/<env>__<exp-name>__<seed>/ with policy.pt,
resume.pt, metrics.csv, evaluations.csv and TensorBoard events. Stop it at any time, even with kill -9: the same command
resumes. The paper's size wants a GPU.
"""

import contextlib
import copy
import hashlib
import importlib
import io
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import typing
import warnings
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # while modules load
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"error: interrupted\n"), os._exit(130)))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch's waiting threads keep the cores busy beside other work

import filelock
import gymnasium
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

BY_DATA = tyro.conf.arg(help_behavior_hint="")  # the help text names the default, which depends on other things
Int, Float, Str = (Annotated[kind | None, BY_DATA] for kind in (int, float, str))
Files = Annotated[tuple[str, ...], BY_DATA]


@dataclass(frozen=True)
class Args:
    env: str = "hopper-mini"  # a D4RL name, your own data's <body>-<quality>-<tag>, or a Minari id (README, "Data")
    seed: int = 1  # seed of the initial weights, the windows, the perturbations and the evaluation episodes
    dataset_path: Files = ()  # HDF5 files in D4RL's or Minari's layout to use as --env's data; they are concatenated
    runs_dir: str = "runs"  # folder of all runs
    exp_name: str = "train_qalign_dt"  # the run folder is <runs-dir>/<env>__<exp-name>__<seed>
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train; auto takes CUDA if there is one
    # arithmetic of the transformer's blocks, the rest is always float32; auto: bf16 where the hardware has it
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False  # torch.compile the networks and, on CUDA, replay each step as one CUDA graph
    critic: Str = None  # stage 1's critic.pt (default: the one of this env and seed)
    track: bool = False  # log to Weights & Biases, too: pip install wandb
    checkpoint_minutes: float = 2.0  # wall-clock time between resume.pt files; no result on a CPU depends on it

    # sizes and steps: the paper's, or small ones that take minutes on a CPU (default: paper; mini: small)
    preset: Annotated[Literal["paper", "small"] | None, BY_DATA] = None
    # gradient steps (default: 100,000; small: 5,000), over which the learning rates decay to 0; with --average only the
    # critic's does
    total_steps: Int = None
    embed_dim: Int = None  # width of the transformer (default: 256; small: 64)
    n_layer: Int = None  # number of transformer blocks (default: 4; small: 2)
    n_head: Int = None  # attention heads per block (default: 4; small: 2)
    context_len: Int = None  # K, the window length in environment steps of three tokens (default: 20; small: 10)
    batch_size: Int = None  # windows per gradient step (default: 256; small: 64)
    critic_width: Int = None  # hidden width of the critic, that of --critic (default: 256; small: 128)
    actor_lr: Float = None  # Adam learning rate of the policy, with L2 1e-4 (default: 3e-4; small: 1e-3)

    # weight of the alignment loss, Eq. 6; 0: no critic (default: Table D.8, for -v2 names and AntMaze; other data:
    # 100, its value for AntMaze; AntMaze and other data first divide Q by its mean |min Q| over the data)
    lambda_e: Float = None
    # std of Eq. 5's delta, in normalised RTG (default: Table D.8; other data: 3 times the range of its RTGs)
    sigma_e: Float = None
    # by which Eq. 7's targets raise the RTG, normalised (default: Table D.8; other data: a third of that range)
    delta_rtg: Float = None
    # bounds of a shifted window's first RTG, normalised (default: the release's for D4RL's files but Maze2D's, else the
    # data's own)
    rtg_range: Annotated[tuple[float, float] | None, BY_DATA] = None
    # ours: limit on Eq. 5's push on the actions, as a multiple of imitation's pull (default: 0, none; other data: 0.3)
    max_push: Float = None
    # ours: std of the noise on the actions in Eq. 5, in units of the policy's RMS error (default: 0; other data: 0.3)
    action_noise: Float = None
    dropout: Float = None  # dropout rate of the policy in training (default: 0.1; other data: 0)
    # ours: rate of a moving average of the weights, at a constant actor_lr (default: 0, none; other data: 0.002)
    average: Float = None
    eval_context_len: Int = None  # ours: rollouts act on this many last steps; 0: on all K (default: 0; other data: 2)
    alignment: Literal["one-sided", "symmetric", "squared"] = "one-sided"  # penalty: Eq. 5, or a variant of Table E.11
    conv: bool = True  # causal convolution after W_q, W_k, W_v (App. D.1)
    state_loss: bool = True  # reconstruct states too; a Decision Transformer: --lambda-e 0 --no-conv --no-state-loss
    update_q: bool = True  # co-train the critic; --no-update-q keeps stage 1's (Table E.10)
    q_noise: float = 0.0  # std sigma_n, in raw Q units, of the noise added to the target critic (Table E.13)

    # gradient steps between evaluations at high targets, the first before training; 0: never (default: a tenth of them)
    eval_every: Int = None
    eval_rollouts: int = 5  # episodes per target return in those evaluations

    def __post_init__(self):
        sizes = ("embed_dim", "n_layer", "n_head", "context_len", "batch_size", "critic_width", "eval_rollouts")
        check_args(self, dict.fromkeys(sizes, 1) | {"rtg_range": -1e6, "delta_rtg": -1e6})
        if self.lambda_e != 0 and not self.state_loss:
            raise ValueError("--no-state-loss is for a Decision Transformer: add --lambda-e 0")
        if self.embed_dim and self.n_head and self.embed_dim % self.n_head:
            raise ValueError(f"--embed-dim {self.embed_dim} is not a multiple of --n-head {self.n_head}")
        if self.dropout and self.dropout >= 1:
            raise ValueError(f"--dropout {self.dropout}: must be below 1")
        if self.average and self.average > 1:
            raise ValueError(f"--average {self.average}: must not exceed 1")
        if self.context_len == 1 and self.lambda_e and self.update_q:
            raise ValueError("--context-len 1: Eq. 7's targets need two steps; take 2, or --no-update-q")
        if self.rtg_range and self.rtg_range[0] > self.rtg_range[1]:
            raise ValueError(f"--rtg-range {self.rtg_range}: the first must be the smaller one")


@dataclass(frozen=True)
class Config(Args):
    """Args with every default resolved, and what the hardware and the data decide; checkpoints hold it."""

    bf16: bool = False
    max_timestep: int = 1000  # entries of the timestep embedding
    half_normal: bool = False  # delta = |eps| (App. D.5, AntMaze)


# Table D.8. Ours, where it has no row: `expert` as medium-expert, `random` as medium, Ant as HalfCheetah, the large
# mazes as the others.
TABLE_D8 = {  # sigma_e, lambda_e, delta_rtg
    "walker2d": {"medium-replay": (10, 0.3, 2), "medium": (10, 0.3, 1), "medium-expert": (10, 0.3, 10)},
    "halfcheetah": {"medium-replay": (15, 5, 5), "medium": (15, 5, 10), "medium-expert": (15, 1, 10)},
    "hopper": {"medium-replay": (10, 0.3, 0.5), "medium": (10, 0.3, 1), "medium-expert": (10, 0.3, 5)},
    "antmaze": {"all": (5, 100, 1)},
}
SAME_QUALITY = {"expert": "medium-expert", "random": "medium"}
D4RL_DATA = dict(max_push=0.0, action_noise=0.0, dropout=0.1, average=0.0, eval_context_len=0)  # nothing of ours
# For all other data than D4RL's -v2 sets and AntMaze: one set of numbers in units of the data, as large as in Table D.8
# (results/pages/robust_alignment.md). sigma_e and delta_rtg are multiples of the range of the data's returns-to-go.
OTHER_DATA = dict(sigma_e=3.0, lambda_e=100.0, delta_rtg=1 / 3, max_push=0.3, action_noise=0.3)
OTHER_DATA |= dict(dropout=0.0, average=0.002, eval_context_len=2)
PAPER = dict(total_steps=100_000, embed_dim=256, n_layer=4, n_head=4, context_len=20)
PAPER |= dict(batch_size=256, critic_width=256, actor_lr=3e-4)
SMALL = dict(total_steps=5_000, embed_dim=64, n_layer=2, n_head=2, context_len=10)  # small data, minutes on a CPU
SMALL |= dict(batch_size=64, critic_width=128, actor_lr=1e-3)
CRITIC_LR, L2, MAX_GRAD_NORM, TAU = 3e-4, 1e-4, 15.0, 0.005  # the release's
LOG_EVERY = 100  # gradient steps per row of metrics.csv
MAX_TIMESTEP = 1000


def preset(args, task: "Task") -> str:
    """`paper` or `small`: --preset, else what suits the data."""
    return args.preset or ("small" if task.quality == "mini" else "paper")


def resolve(args: Args, data: "Dataset", device: torch.device) -> Config:
    """Fill in the defaults that depend on the task, the data and the hardware."""
    task, (low, high) = data.task, data.task.rtg_range
    loss = OTHER_DATA | {name: OTHER_DATA[name] * (high - low) for name in ("sigma_e", "delta_rtg")}
    if task.tag == "v2" or task.body == "antmaze":
        quality = "all" if task.body == "antmaze" else SAME_QUALITY.get(task.quality, task.quality)
        row = TABLE_D8["halfcheetah" if task.body == "ant" else task.body][quality]
        loss = D4RL_DATA | dict(zip(("sigma_e", "lambda_e", "delta_rtg"), row))
    defaults = loss | (SMALL if preset(args, task) == "small" else PAPER) | dict(rtg_range=task.rtg_range)
    given = {name: value for name, value in vars(args).items() if value is not None}
    values = vars(args) | defaults | given  # later ones win
    values["device"] = device.type  # the random streams of CPU and CUDA differ, so a run stays on one kind
    values["bf16"] = use_bf16(args.precision, device)
    values["max_timestep"] = max(MAX_TIMESTEP, int(data.lengths.max()))
    values["half_normal"] = task.body == "antmaze"
    if values["eval_every"] is None:
        values["eval_every"] = max(values["total_steps"] // 10, 1)
    return checked(Config, **values)


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


# ======== shared: dataset ========
class Dataset:
    """The content of dataset.pt: whole episodes one after the other, N transitions in E episodes."""

    def __init__(self, content: dict):
        self.task = task = build(Task, content["task"])
        N, E = len(content["rewards"]), len(content["ends"])
        with torch.device("meta"):  # shapes and types without content
            expected = dict(
                observations=torch.empty(N, task.obs_dim),  # raw
                actions=torch.empty(N, task.act_dim),  # in [-1, 1]
                rewards=torch.empty(N),  # raw
                terminals=torch.empty(N, dtype=torch.bool),  # the MDP ended; the other episodes end by timeout
                ends=torch.empty(E, dtype=torch.int64),  # exclusive
                obs_mean=torch.empty(task.obs_dim),
                obs_std=torch.empty(task.obs_dim),
            )
        check_same({name: content[name] for name in expected}, expected, "dataset.pt")
        arrays = (content[name].numpy() for name in ("observations", "actions", "rewards", "terminals", "ends"))
        self.observations, self.actions, self.rewards, self.terminals, self.ends = arrays
        self.obs_mean, self.obs_std = content["obs_mean"], content["obs_std"]
        self.starts = np.concatenate([[0], self.ends[:-1]])
        self.lengths = self.ends - self.starts
        if not E or self.ends[-1] != N or self.lengths.min() < 1 or self.obs_std.min() <= 0:
            raise ValueError("episodes or standard deviations are impossible")
        self.returns = np.add.reduceat(self.rewards, self.starts, dtype=np.float64)  # (E,) undiscounted

    def returns_to_go(self) -> np.ndarray:
        """(N,) raw, undiscounted: sum of r_i from each transition to the end of its episode."""
        total = np.cumsum(self.rewards, dtype=np.float64)
        return total[np.repeat(self.ends, self.lengths) - 1] - total + self.rewards


def load_data(args) -> Dataset:
    """The data of --env; data/prepare.py makes dataset.pt where it is missing. Exits 2 on any other file."""
    path = Path(args.runs_dir) / f"{args.env.replace('/', '--')}__data" / "dataset.pt"
    script = Path(__file__).resolve().parent / "data" / "prepare.py"
    if script.is_file():
        content = load_module(script).prepare(args.env, args.dataset_path, args.runs_dir)
    else:  # this file was copied away: it takes dataset.pt as it is
        if not os.path.lexists(path):
            fail(f"{path} is missing: copy it here; data/prepare.py, which makes it, is not beside this file")
        content = load_checkpoint(path, "prepare")
    try:
        return Dataset(content)
    except Exception as error:  # an edited file can break in any way
        fail(f"{path}: not a whole dataset ({one_line(error)}); remove it, and it is made again")


# ======== end of shared: dataset ========


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


class Batch(NamedTuple):
    """B windows of K steps, left-padded: all zero where not valid."""

    rtg: torch.Tensor  # (B, K) normalised return-to-go
    obs: torch.Tensor  # (B, K, obs_dim) standardised
    act: torch.Tensor  # (B, K, act_dim)
    timestep: torch.Tensor  # (B, K) index in the episode
    valid: torch.Tensor  # (B, K) bool
    reward: torch.Tensor  # (B, K) as the critic sees it
    terminal: torch.Tensor  # (B, K) bool: the MDP ended here (a timeout is not one)

    @property
    def inputs(self) -> tuple:
        return self[:5]  # what the policy takes


class Windows:
    """The whole dataset on the training device; a batch of windows is index arithmetic on it."""

    def __init__(self, data: Dataset, context_len: int, device: torch.device):
        self.K, self.offsets = context_len, torch.arange(context_len, device=device)
        self.obs = torch.as_tensor(data.observations).to(device)
        self.obs = (self.obs - data.obs_mean.to(device)).div_(data.obs_std.to(device))
        self.act = torch.as_tensor(data.actions).to(device)
        self.rtg = torch.as_tensor(data.returns_to_go() / data.task.rtg_scale, dtype=torch.float32).to(device)
        self.reward = torch.as_tensor(data.rewards).to(device) + data.task.reward_shift
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


def shift_rtg(batch: Batch, shift, rtg_range):
    """Eq. 2: move all RTG tokens of a window by one scalar, such that its first valid RTG stays in rtg_range (release).

    shift (B, 1) or a number -> the shifted windows' inputs to the policy, and the shift really applied (B, 1): bounds
    that exclude the window's own RTG can reverse it, and Eq. 5 goes by its sign.
    """
    first = batch.rtg.gather(1, batch.valid.int().argmax(dim=1, keepdim=True))
    applied = (first + shift).clamp(*rtg_range) - first
    rtg = torch.where(batch.valid, batch.rtg + applied, batch.rtg)
    return (rtg, *batch.inputs[1:]), applied


def critic_target(batch: Batch, q_raised, gamma: float):
    """Eq. 7's y_i = r_i + gamma q_{i+1} (it omits 1 - terminal_i), and the mask of the steps where it is defined.

    q_raised (B, K): min_m Q'_m(s_i, a'_i) at every step of the window -> y (B, K), mask (B, K). A window's last step
    has no s_{i+1} in it, so it counts only where it is a true terminal.
    """
    y = batch.reward + gamma * ~batch.terminal * F.pad(q_raised[:, 1:], (0, 1))
    K = batch.valid.shape[1]
    last = torch.arange(K, device=y.device) == K - 1  # (K,)
    return y, batch.valid & (~last | batch.terminal)


def critic_loss(critic, target_critic, target_policy, batch: Batch, gamma: float, config: Config, generator):
    """L_q of Eq. 7: MSE(Q_1, y) + MSE(Q_2, y)."""
    with torch.no_grad():
        raised, _ = shift_rtg(batch, config.delta_rtg, config.rtg_range)
        a_raised, _ = target_policy(*raised)
        q_raised = target_critic(batch.obs, a_raised).amin(dim=0)  # (B, K)
        if config.q_noise:
            q_raised += config.q_noise * torch.randn(q_raised.shape, generator=generator, device=q_raised.device)
        y, mask = critic_target(batch, q_raised, gamma)
    q_1, q_2 = critic(batch.obs, batch.act)  # (B, K) each
    return masked_mean((q_1 - y) ** 2, mask) + masked_mean((q_2 - y) ** 2, mask)


def supervised_loss(a_hat, s_hat, batch: Batch):
    """The two halves of L_SL, Eq. 6, as means (release; the paper writes sums) over valid steps and dimensions."""
    action_loss = masked_mean(((a_hat - batch.act) ** 2).mean(dim=-1), batch.valid)
    state_loss = masked_mean(((s_hat - batch.obs) ** 2).mean(dim=-1), batch.valid)
    return action_loss, state_loss


def alignment_loss(q_shifted, q, sign, valid, kind: str):
    """L_align, Eq. 5: a penalty where Q moved against the shift of the RTG. Also returns the share of such steps.

    q_shifted, q (2, B, K): Q_m at the policy's actions in the shifted and the clean windows; sign (B, 1): the shift's.
    Eq. 5 sums over the steps for one Q; the mean, and how two critics are combined, are the release's.
    """
    violation = -sign * (q_shifted - q.detach())  # (2, B, K)
    if kind == "one-sided":
        penalty = F.relu(violation).amin(dim=0)  # the smaller of the two penalties
    elif kind == "squared":
        penalty = F.relu(violation).square().mean(dim=0)
    else:  # symmetric
        penalty = violation.mean(dim=0)
    return masked_mean(penalty, valid), masked_mean((violation > 0).all(dim=0).float(), valid)


def limit_push(a_shifted, a_hat, batch: Batch, ratio: float) -> None:
    """Not the paper's: limit the norm of the gradient that reaches a_shifted (B, K, act_dim), which is Eq. 5's.

    It is at most ratio times that of the action loss's gradient in a_hat: Q's slope, lambda_e and the share of violated
    steps no longer decide whether the policy still imitates.
    """
    with torch.no_grad():
        pull = 2 * (a_hat - batch.act) * batch.valid[..., None] / (batch.valid.sum() * a_hat.shape[-1])  # d action_loss
        limit = ratio * pull.norm()
    a_shifted.register_hook(lambda push: push * (limit / push.norm().clamp(min=1e-12)).clamp(max=1))


def add_noise(a_shifted, a_hat, batch: Batch, ratio: float, generator: torch.Generator):
    """Not the paper's: both actions (B, K, act_dim) with independent noise, its std ratio times the RMS of a_hat - a.

    Any change of Q in the right direction satisfies Eq. 5. Between noisy actions it must stand out from the policy's
    own errors: a margin, whatever Q's scale. (The release's two dropout masks have the same effect by chance.)
    """
    error = masked_mean(((a_hat.detach() - batch.act) ** 2).mean(dim=-1), batch.valid).sqrt()
    noise = ratio * error * torch.randn((2, *a_hat.shape), generator=generator, device=a_hat.device)
    return a_shifted + noise[0], a_hat.detach() + noise[1]


def actor_loss(policy, critic, batch: Batch, q_scale: float, config: Config, generator: torch.Generator):
    """L_SL + lambda_e L_align, Eq. 6, and the values to log by their names in METRICS."""
    # drawn for a DT as well: its windows are then those of a Q-Align DT with the same seed and no noise of any kind
    delta = config.sigma_e * torch.randn(len(batch.rtg), 1, generator=generator, device=batch.rtg.device)  # per window
    metrics, align = {}, 0.0
    if config.lambda_e == 0:
        a_hat, s_hat = policy(*batch.inputs)
    else:
        perturbed, applied = shift_rtg(batch, delta.abs() if config.half_normal else delta, config.rtg_range)
        # clean and perturbed windows in one forward pass; dropout draws an independent mask for each
        a_both, s_both = policy(*(torch.cat(pair) for pair in zip(batch.inputs, perturbed)))
        a_hat, a_shifted = a_both.chunk(2)
        s_hat, _ = s_both.chunk(2)
        a_plus, a_base = a_shifted, a_hat  # where Q is compared
        if config.action_noise:
            a_plus, a_base = add_noise(a_shifted, a_hat, batch, config.action_noise, generator)
        if config.max_push:
            limit_push(a_shifted, a_hat, batch, config.max_push)
        with torch.no_grad():
            q = critic(batch.obs, a_base)
        critic.requires_grad_(False)  # Eq. 5 differentiates Q in the action a_shifted only, not in its own weights
        q_shifted = critic(batch.obs, a_plus)
        critic.requires_grad_(True)
        sign = applied.sign()
        align, violated = alignment_loss(q_shifted / q_scale, q / q_scale, sign, batch.valid, config.alignment)
        metrics = dict(align_loss=align.detach(), violated=violated, q_mean=masked_mean(q[0], batch.valid))
    action_loss, state_loss = supervised_loss(a_hat, s_hat, batch)
    loss = action_loss + config.lambda_e * align
    if config.state_loss:
        loss = loss + state_loss
    return loss, metrics | dict(action_loss=action_loss.detach(), state_loss=state_loss.detach())


METRICS = ("loss", "action_loss", "state_loss", "align_loss", "violated", "q_mean")
METRICS += ("actor_grad_norm", "q_loss", "critic_grad_norm")


class CoTraining:
    """All that Algorithm 1 updates, and one step of it, without any CPU-GPU synchronisation."""

    def __init__(self, task: Task, windows: Windows, config: Config, stage_1: tuple | None = None):
        """Line 1. stage_1: what pretrained() returns; None: a random critic. Sets torch's global seed."""
        self.windows, self.config, device = windows, config, windows.rtg.device
        torch.manual_seed(config.seed)  # of the weights and of dropout
        self.generator = torch.Generator(device).manual_seed(config.seed)  # of windows, deltas and noise
        self.policy = make_policy(task, vars(config), config.bf16).to(device)
        self.critic = Ensemble(2, task.obs_dim + task.act_dim, config.critic_width).to(device)
        weights, self.gamma, self.q_scale = stage_1 or (None, 0.99, 1.0)
        if weights:
            self.critic.load_state_dict(weights)
        self.target_policy = copy.deepcopy(self.policy).requires_grad_(False).eval()  # no dropout in targets
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        lr = torch.zeros(2, device=device)  # tensors, which a CUDA graph reads anew
        adam = dict(fused=True, capturable=device.type == "cuda")
        self.actor_opt = torch.optim.Adam(self.policy.parameters(), lr[0], weight_decay=L2, **adam)
        self.critic_opt = torch.optim.Adam(self.critic.parameters(), lr[1], **adam)
        nets = dict(policy=self.policy, target_policy=self.target_policy)
        nets |= dict(critic=self.critic, target_critic=self.target_critic)
        self.compiled = {k: torch.compile(net, dynamic=False) for k, net in nets.items()} if config.compile else nets
        self.saved_state = nets | dict(actor_opt=self.actor_opt, critic_opt=self.critic_opt)  # what resume.pt holds
        self.eval_policy = self.policy  # what is evaluated and saved
        if config.average:
            self.eval_policy = copy.deepcopy(self.policy).requires_grad_(False).eval()
            self.saved_state["average"] = self.eval_policy

    def set_learning_rates(self, step: int) -> float:
        """Both decay to 0 along a cosine, except the actor's where its weights are averaged; returns the actor's."""
        factor = 0.5 * (1 + math.cos(math.pi * step / self.config.total_steps))
        actor_lr = self.config.actor_lr * (1 if self.config.average else factor)
        self.actor_opt.param_groups[0]["lr"].fill_(actor_lr)
        self.critic_opt.param_groups[0]["lr"].fill_(CRITIC_LR * factor)
        return actor_lr

    def step(self) -> torch.Tensor:
        """Algorithm 1, lines 3 to 11; returns the values of METRICS (9,), on the device."""
        config, nets = self.config, self.compiled
        batch = self.windows.sample(config.batch_size, self.generator)  # lines 3-4
        metrics, co_trained = {}, config.lambda_e > 0 and config.update_q
        if co_trained:  # lines 5-6
            targets = nets["target_critic"], nets["target_policy"]
            q_loss = critic_loss(nets["critic"], *targets, batch, self.gamma, config, self.generator)
            metrics = dict(q_loss=q_loss.detach(), critic_grad_norm=descend(self.critic_opt, q_loss))
        loss, more = actor_loss(nets["policy"], nets["critic"], batch, self.q_scale, config, self.generator)  # 7-9
        norm = descend(self.actor_opt, loss)  # line 10
        if co_trained:  # line 11; nothing else uses the targets
            ema_update(self.target_policy, self.policy, TAU)
            ema_update(self.target_critic, self.critic, TAU)
        metrics |= more | dict(loss=loss.detach(), actor_grad_norm=norm)
        zero = torch.zeros((), device=batch.rtg.device)
        return torch.stack([metrics.get(name, zero) for name in METRICS])

    def update_average(self, step: int) -> None:
        """Not the paper's: move the average after the step-th step; up to step 1 / average it is the plain mean."""
        if self.config.average:
            ema_update(self.eval_policy, self.policy, max(self.config.average, 1 / step))


def descend(opt: torch.optim.Optimizer, loss: torch.Tensor, max_norm: float = MAX_GRAD_NORM) -> torch.Tensor:
    """One gradient step with the norm clipped; returns the norm before clipping."""
    opt.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], max_norm)
    opt.step()
    return norm


@torch.no_grad()
def evaluate(policy: Policy, data: Dataset, config: Config) -> list[float]:
    """Mean D4RL score at each high target return (Sec. 6.2), over eval_rollouts episodes, the same ones every time."""
    task, training = data.task, policy.training
    policy.eval()
    n, K, device = len(task.targets) * config.eval_rollouts, config.context_len, next(policy.parameters()).device
    first_seed, sizes = 1_000_000 + 1_000 * config.seed, (task.obs_dim, task.act_dim)
    envs = [make_env(task.env_id, task.env_kwargs, sizes) for _ in range(n)]  # they advance together, as one batch
    observations = [env.reset(seed=first_seed + i % config.eval_rollouts)[0] for i, env in enumerate(envs)]
    left = np.repeat(np.array(task.targets, dtype=np.float64), config.eval_rollouts)  # (n,) raw return-to-go
    returns, alive = np.zeros(n), np.ones(n, bool)
    rtg, obs, act = torch.zeros(n, K), torch.zeros(n, K, task.obs_dim), torch.zeros(n, K, task.act_dim)
    for t in range(task.horizon):
        rtg, obs, act = (x.roll(-1, dims=1) for x in (rtg, obs, act))  # the last K steps, padded on the left
        rtg[:, -1] = torch.as_tensor(left / task.rtg_scale)
        act[:, -1] = 0
        raw = torch.as_tensor(np.stack(observations), dtype=torch.float32)
        obs[:, -1] = (F.pad(raw, (0, task.obs_dim - raw.shape[1])) - data.obs_mean) / data.obs_std  # Ant: D4RL's zeros
        times = torch.arange(t + 1 - K, t + 1).expand(n, K)
        context = (rtg, obs, act, times.clamp(0, config.max_timestep - 1), times >= 0)
        act[:, -1] = policy.act(*(x.to(device) for x in context)).cpu()
        for i in np.flatnonzero(alive):
            observations[i], reward, ended, cut, _ = envs[i].step(act[i, -1].numpy().astype(np.float64))
            returns[i], left[i], alive[i] = returns[i] + reward, left[i] - reward, not (ended or cut)
        if not alive.any():
            break
    for env in envs:
        env.close()
    policy.train(training)
    return task.score(returns).reshape(len(task.targets), -1).mean(axis=1).tolist()


STAGE = "train_qalign_dt"
NOT_OF_THE_RUN = ("dataset_path", "runs_dir", "critic", "preset", "track", "checkpoint_minutes", "precision")


def main() -> None:
    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.DisallowNone,))
    device = pick_device(args.device)
    data = load_data(args)
    task, config = data.task, resolve(args, data, device)
    folder = run_folder(args, args.exp_name)
    config = replace(config, bf16=saved_bf16(folder, STAGE, args.precision, config.bf16))
    identity = {name: value for name, value in vars(config).items() if name not in NOT_OF_THE_RUN}
    identity |= dict(data=task.digest, critic=other_critic(args) if config.lambda_e else None)

    def look() -> dict | None:
        """The state to go on from, if there is one; exits 0 where the run is finished."""
        finished = load_own(folder / "policy.pt", STAGE, identity)
        if finished and fits(finished.get("step"), int) and finished["step"] == config.total_steps:
            print(f"{folder}/policy.pt is finished; nothing to do (another run: --exp-name)")
            sys.exit()
        return load_own(folder / "resume.pt", STAGE, identity)

    state, stage_1 = look(), None
    if config.lambda_e > 0 and not state:  # resume.pt holds the critic: stage 1's is no longer needed
        stage_1 = pretrained(args, config, data)

    with claim(folder):
        state = look() or state  # another process may have gone on, or have finished
        if args.track:
            track(args, folder)
        learner = CoTraining(task, Windows(data, config.context_len, device), config, stage_1)
        train_step = cuda_graph(learner) if config.compile and device.type == "cuda" else learner.step
        sums = torch.zeros(len(METRICS), device=device)  # since the last row of metrics.csv
        done = Progress(gamma=learner.gamma, q_scale=learner.q_scale)
        if state:
            done = restore(state, folder / "resume.pt", learner, sums, config.total_steps, Progress)
            learner.gamma, learner.q_scale = done.gamma, done.q_scale
        size = f"{len(data.rewards):,} transitions, {len(data.ends):,} episodes"
        print(f"{folder}: {task.label}, {size}, on {device.type}, step {done.step:,}")
        co_trained = config.lambda_e > 0 and config.update_q
        if task.body == "maze2d" and co_trained and config.total_steps > SMALL["total_steps"]:
            print("note: co-training has ruined a longer run in Maze2D (results/pages/maze2d.md); see --no-update-q")
        metrics, evaluations = Log(folder, "metrics", done.rows), Log(folder, "evaluations", done.scores)

        def save() -> None:
            save_resume(folder, dict(stage=STAGE, config=identity), learner, sums, done)
            content = dict(stage=STAGE, config=identity, gamma=done.gamma, step=done.step, task=vars(task))
            content |= dict(obs_mean=data.obs_mean, obs_std=data.obs_std, policy=learner.eval_policy.state_dict())
            content |= dict(critic=learner.critic.state_dict() if config.lambda_e > 0 else None, q_scale=done.q_scale)
            save_checkpoint(folder / "policy.pt", content | {"episode_returns": torch.as_tensor(data.returns)})

        def evaluate_if_due(step: int) -> None:
            due = config.eval_every and (step % config.eval_every == 0 or step == config.total_steps)
            if due and (not done.scores or done.scores[-1]["step"] < step):
                achieved = evaluate(learner.eval_policy, data, config)
                at = dict(zip((f"{target:g}" for target in task.targets), achieved))
                evaluations.write({"step": step} | {f"score_at_{target}": y for target, y in at.items()})
                bar.write(f"step {step:,}: score {', '.join(f'{y:.1f} at target return {x}' for x, y in at.items())}")

        saved = time.monotonic()
        with progress_bar(config.total_steps, done.step, "training") as bar:
            evaluate_if_due(done.step)
            for step in range(done.step + 1, config.total_steps + 1):  # Algorithm 1, line 2
                actor_lr = learner.set_learning_rates(step - 1)
                sums += train_step()
                learner.update_average(step)
                done.step = step
                bar.update()
                if step % LOG_EVERY == 0 or step == config.total_steps:
                    check_finite(learner, sums, step)
                    means = (sums / ((step - 1) % LOG_EVERY + 1)).tolist()  # over the steps since the last row
                    metrics.write({"step": step, **dict(zip(METRICS, means)), "actor_lr": actor_lr})
                    shown = ("action_loss", "state_loss", "align_loss", "violated", "q_mean")
                    bar.set_postfix_str(" ".join(f"{name} {done.rows[-1][name]:.3g}" for name in shown))
                    sums.zero_()
                evaluate_if_due(step)
                if time.monotonic() - saved > args.checkpoint_minutes * 60:
                    save()
                    saved = time.monotonic()
        save()
    print(f"{folder}/policy.pt: {done.step:,} steps")


@dataclass
class Progress:
    """How far a run is: what resume.pt holds beside networks, optimisers and random streams."""

    step: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)  # of metrics.csv
    scores: list[dict[str, float]] = field(default_factory=list)  # of evaluations.csv
    gamma: float = 0.99
    q_scale: float = 1.0


def other_critic(args: Args) -> str | None:
    """The hash of a --critic that is not stage 1's of this env and seed, and so makes another run; else None."""
    own = run_folder(args, "pretrain_q") / "critic.pt"
    if not args.critic or os.path.realpath(args.critic) == os.path.realpath(own):
        return None
    load_checkpoint(Path(args.critic), "pretrain_q")  # exits 2 on anything else
    return hashlib.sha256(Path(args.critic).read_bytes()).hexdigest()[:16]


def pretrained(args: Args, config: Config, data: Dataset) -> tuple[dict, float, float]:
    """Stage 1's critic, trained if it is missing: weights, discount, Eq. 5's divisor of Q. Exits 2 on an unfit one."""
    task = data.task
    path = Path(args.critic or run_folder(args, "pretrain_q") / "critic.pt")
    script = Path(__file__).resolve().parent / "pretrain_q.py"
    if not args.critic and not os.path.lexists(path) and script.is_file():
        print(f"{path} is missing: starting pretrain_q.py, with its own number of steps", flush=True)
        command = [sys.executable, script, "--env", args.env, "--seed", args.seed, "--runs-dir", args.runs_dir]
        command += ["--device", args.device, "--preset", preset(args, task), "--critic-width", config.critic_width]
        command += ["--dataset-path", *args.dataset_path] if args.dataset_path else []
        command += ["--track"] * args.track
        if code := subprocess.run([str(part) for part in command]).returncode:
            sys.exit(code if code > 0 else 128 - code)  # it has said why
    content = load_checkpoint(path, "pretrain_q")
    try:
        if content["config"]["data"] != task.digest:
            label = printable(content["data"]["label"])
            fail(f"{path}: a critic of other data ({label}); use that data, or another --runs-dir")
        reference = Ensemble(2, task.obs_dim + task.act_dim, config.critic_width).state_dict()
        check_same(content["critic"], reference, "critic")
        # the mean |min Q| over the data, by which the release divides Q for AntMaze: lambda_e = 100 belongs to it
        q_scale = 1.0 if task.tag == "v2" and task.body != "antmaze" else content["report"]["q_abs_mean"]
        gamma = content["config"]["gamma"]
        if not (fits(gamma, float) and 0 < gamma < 1 and fits(q_scale, float) and q_scale > 0):
            raise ValueError("its discount or its scale is impossible")
        return content["critic"], gamma, q_scale
    except Exception as error:  # an edited file can break in any way
        fail(f"{path}: not a critic for this run ({one_line(error)}); check --critic-width, or train it again")


def cuda_graph(learner: CoTraining):
    """learner.step, recorded as a CUDA graph after three calls: a hundred kernels then cost the CPU one launch."""
    stream, graph, calls, result = torch.cuda.Stream(), torch.cuda.CUDAGraph(), 0, None

    def step() -> torch.Tensor:
        nonlocal calls, result
        calls += 1
        if calls <= 3:  # warm-up on a stream of its own, as torch asks for
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = learner.step()
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if calls == 4:
            graph.register_generator_state(learner.generator)  # torch's own one is registered already
            with torch.cuda.graph(graph):
                result = learner.step()
        graph.replay()
        return result

    return step


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


# ======== shared: run ========
def run_folder(args, exp_name: str) -> Path:
    return Path(args.runs_dir) / f"{args.env.replace('/', '--')}__{exp_name}__{args.seed}"


def checked(make, *args, **values):
    """make(*args, **values); exits 2 on its ValueError, as of a flag that does not fit the preset's other values."""
    try:
        return make(*args, **values)
    except ValueError as error:
        fail(str(error))


@contextlib.contextmanager
def claim(folder: Path, wait: bool = False):
    """Make the run folder and hold its lock; if another process does, exit 2 or wait. Removes our leftover files."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        held = lock.acquire(timeout=0.1)  # run_studies.py holds it for a moment, to see whether it is free
    except filelock.Timeout:
        if not wait:
            fail(f"{folder}: another process is writing this run; wait, or choose another --exp-name or --seed")
        print(f"{folder}: waiting for another process that writes it (Ctrl-C ends this one)", flush=True)
        held = lock.acquire()
    with held:
        ours = r"(dataset|resume|critic|policy(_\d+)?|metrics|evaluations|online|report)\.(pt|csv|json)\.\d+\.tmp"
        for left in folder.iterdir():
            if re.fullmatch(ours, left.name):
                left.unlink()
        try:
            yield
        except BaseException as error:
            path = folder / "resume.pt"
            saved, then = f"{path} is the last good state", "the same command continues"
            if not path.exists():
                saved, then = "nothing was saved", "the same command starts anew"
            ruined = isinstance(error, FloatingPointError)  # and would be again
            error.add_note(saved if ruined else f"{saved}; {then}")
            raise


def load_own(path: Path, stage: str, identity: dict) -> dict | None:
    """The run's own checkpoint, None if there is none; exits 2 if it is of another configuration or other data."""
    if not os.path.lexists(path):
        return None
    content = load_checkpoint(path, stage)
    theirs = content["config"] if fits(content.get("config"), CONFIG) else {}
    if path.name != "resume.pt":  # a run stays on the device of its random streams, but may end anywhere
        identity = {k: x for k, x in identity.items() if k != "device"}
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
    weights = [p for part in learner.saved_state.values() if isinstance(part, nn.Module) for p in part.parameters()]
    if not all(x.isfinite().all() for x in (sums, *weights)):
        why = "a loss or weight is NaN or infinite; try another run with a lower learning rate"
        raise FloatingPointError(f"step {step:,}: {why}")


def save_resume(folder: Path, content: dict, learner, sums: torch.Tensor, done) -> None:
    """What a killed run needs to continue (on a CPU bit for bit): networks, optimisers, random streams, progress."""
    check_finite(learner, sums, done.step)
    cuda = torch.cuda.get_rng_state() if sums.is_cuda else torch.zeros(0)
    content |= dict(random=(learner.generator.get_state(), torch.get_rng_state(), cuda), sums=sums, progress=vars(done))
    state = {name: part.state_dict() for name, part in learner.saved_state.items()}
    save_checkpoint(folder / "resume.pt", content | state)


def restore(content: dict, path: Path, learner, sums: torch.Tensor, total_steps: int, progress):
    """The reverse of save_resume; returns the progress. Exits 2 on a state that cannot be of this run."""
    try:
        for name, part in learner.saved_state.items():
            found, expected = content[name], part.state_dict()
            if isinstance(part, torch.optim.Optimizer):
                (group,), (ours,) = found["param_groups"], expected["param_groups"]
                check_same(group | {"lr": 0}, ours | {"lr": 0}, f"{name}.param_groups")
                group["lr"] = ours["lr"]  # it follows from the flags and the step; stage 2's is on the device
                weights = enumerate(part.param_groups[0]["params"])
                moments = {i: dict(step=torch.zeros(()), exp_avg=p, exp_avg_sq=p) for i, p in weights}
                expected = {i: moments[i] for i in found["state"]}  # none for weights without a gradient
                check_same(found["state"], expected, f"{name}.state")
            else:
                check_same(found, expected, name)
            part.load_state_dict(found)
        check_same(content["sums"], sums, "sums")
        sums.copy_(content["sums"])
        generator, cpu, cuda = content["random"]
        learner.generator.set_state(generator)
        torch.set_rng_state(cpu)
        if sums.is_cuda:
            torch.cuda.set_rng_state(cuda)
        done = build(progress, content["progress"])
        steps = [done.step, *(row["step"] for row in (*done.rows, *getattr(done, "scores", ())))]
        if not all(fits(step, int) and 0 <= step <= total_steps for step in steps):
            raise ValueError("a step is outside of the run")
        return done
    except Exception as error:  # an edited file can break in any way
        fail(f"{path}: not a state of this run ({one_line(error)}); remove it to start anew")


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau online (Algorithm 1, line 11)."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


def progress_bar(total: int, done: int, what: str) -> tqdm:
    return tqdm(total=total, initial=done, unit="step", desc=what, dynamic_ncols=True, disable=None)


class Log:
    """Rows that resume.pt keeps, written to <name>.csv and as TensorBoard scalars."""

    def __init__(self, folder: Path, name: str, rows: list[dict]):
        from torch.utils.tensorboard import SummaryWriter  # imported here: it takes a second

        # a full disk ends TensorBoard's thread; our own next file fails for the same reason, and says so in one line
        threading.excepthook = lambda a: isinstance(a.exc_value, OSError) or threading.__excepthook__(a)
        self.file, self.rows, purge_step = folder / f"{name}.csv", rows, rows[-1]["step"] + 1 if rows else None
        try:
            self.tensorboard = SummaryWriter(folder / "tensorboard" / name, purge_step=purge_step)
        except UnicodeEncodeError:
            fail(f"{folder}: TensorBoard cannot write that name in this locale; PYTHONUTF8=1, or another --runs-dir")

    def write(self, row: dict) -> None:
        self.rows.append(row)
        # written whole each time: a resumed run drops the rows after its checkpoint, and a kill leaves no half row
        lines = [",".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in row.values()) for row in self.rows]
        write_file(self.file, "\n".join([",".join(row), *lines, ""]).encode())
        for name, value in row.items():
            self.tensorboard.add_scalar(name, value, row["step"])


def track(args, folder: Path) -> None:
    """Weights & Biases gets what TensorBoard gets (its own WANDB_* variables choose project, mode and account)."""
    try:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "q-align-dt")
        wandb.init(project=project, name=folder.name, config=vars(args), sync_tensorboard=True, dir=args.runs_dir)
    except ImportError:
        fail("--track: pip install wandb")
    except wandb.Error as error:  # no login, no network
        fail(f"--track: {one_line(error)}")


# ======== end of shared: run ========


def saved_bf16(folder: Path, stage: str, precision: str, ours: bool) -> bool:
    """The arithmetic that a run began with: with --precision auto it stays, on other hardware too."""
    for path in (folder / "resume.pt", folder / "policy.pt") if precision == "auto" else ():
        config = load_checkpoint(path, stage).get("config") if os.path.lexists(path) else None
        if isinstance(config, dict) and config.get("bf16") is (not ours):
            print(f"{path}: the run began with {'float32' if ours else 'bfloat16'} blocks and continues with them")
            return not ours
    return ours


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
