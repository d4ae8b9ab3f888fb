"""RADT: Return-Aligned Decision Transformer (Tanaka et al., TMLR 2025), one of Q-Align DT's neighbours.

    python baselines/train_radt.py --env hopper-medium-v2

Alignment by architecture instead of by a loss: returns are a sequence of their own, beside that of states and actions,
and reach it in two ways in every block:

    StepRA    each step's return scales and shifts what its state and action tokens become (adaptive LayerNorm)
    SeqRA     state and action tokens attend to all returns so far (cross-attention, masked by step)
    Block     both, after self-attention; `1 + alpha` is adaptive scaling: how much of SeqRA enters

Trained by imitation alone (no critic, no state loss). "The release" is its authors' code, CyberAgentAILab/radt, folder
gym/. One difference matters: in training its padding mask is inverted (where a window has padding, valid tokens attend
to nothing else); here padded keys are masked.

Writes runs/<env>__<exp-name>__<seed>/ with policy.pt, resume.pt, metrics.csv and TensorBoard events; the same command
resumes. `evaluate_alignment.py --checkpoint`, `--compare` and `transfer_cheetah_vel.py --checkpoint` read policy.pt.
What follows `main` is plumbing, the same text as in train_qalign_dt.py.
"""

import contextlib
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
    seed: int = 1  # seed of the initial weights, dropout and the windows
    # HDF5 file(s) in D4RL's or Minari's layout to use instead; several are concatenated
    dataset_path: tuple[str, ...] = ()
    runs_dir: str = "runs"  # folder of all runs
    exp_name: str = "train_radt"  # name of this experiment; the run folder is <runs-dir>/<env>__<exp-name>__<seed>
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train; auto takes CUDA if there is one
    checkpoint_minutes: float = 2.0  # wall-clock time between resume.pt files

    total_steps: int | None = None  # gradient steps (default: 100,000; <body>-mini: 5,000)
    # width of the network (default: 128; 256 for halfcheetah-medium, ant-medium-expert, antmaze-umaze; <body>-mini: 64)
    embed_dim: int | None = None
    n_layer: int | None = None  # number of blocks (default: 3; hopper-medium and <body>-mini: 2)
    n_head: int | None = None  # attention heads per block (default: 1; <body>-mini: 2)
    context_len: int | None = None  # K, the window length in environment steps (default: 20; <body>-mini: 10)
    batch_size: int | None = None  # windows per gradient step (default: 64; antmaze: 256)
    lr: float | None = None  # AdamW learning rate after the warm-up (default: 1e-4; <body>-mini: 1e-3)
    warmup_steps: int | None = None  # gradient steps in which it rises from 0 (default: 10,000; <body>-mini: 500)

    seqra: bool = True  # cross-attention to the returns
    stepra: bool = True  # return-dependent LayerNorms; without, they have weights of their own
    alpha: bool = True  # adaptive scaling of SeqRA's output; without, it is added as it is
    # a DT in RADT's setting: with --no-seqra --no-stepra, the returns stand in the token sequence instead
    rtg_tokens: bool = False

    def __post_init__(self):
        at_least_1 = dict.fromkeys(("embed_dim", "n_layer", "n_head", "context_len", "batch_size"), 1)
        check_args(self, at_least_1 | {"warmup_steps": 1})
        if self.embed_dim and self.n_head and self.embed_dim % self.n_head:
            raise ValueError(f"--embed-dim {self.embed_dim} is not a multiple of --n-head {self.n_head}")
        if (self.seqra or self.stepra) == self.rtg_tokens:
            raise ValueError("--no-seqra --no-stepra and --rtg-tokens go together: a DT in RADT's setting")


@dataclass(frozen=True)
class Config(Args):
    """Args with every default resolved; checkpoints hold it."""

    max_timestep: int = 1000  # rows of the timestep table
    method: str = "RADT"  # how tables and figures call it


SIZES = ("total_steps", "embed_dim", "n_layer", "n_head", "context_len", "batch_size", "lr", "warmup_steps")
PAPER = dict(zip(SIZES, (100_000, 128, 3, 1, 20, 64, 1e-4, 10_000)))
SMALL = dict(zip(SIZES, (5_000, 64, 2, 2, 10, 64, 1e-3, 500)))
EXCEPTIONS = {  # the release's conf/
    "hopper-medium-v2": {"n_layer": 2},
    "halfcheetah-medium-v2": {"embed_dim": 256},
    "ant-medium-expert-v2": {"embed_dim": 256},
    "antmaze-umaze-v2": {"embed_dim": 256},
    "antmaze-umaze-diverse-v2": {"embed_dim": 256},
}
WEIGHT_DECAY, MAX_GRAD_NORM, DROPOUT = 1e-4, 0.25, 0.1
LOG_EVERY = 100  # gradient steps per row of metrics.csv


def resolve(args: Args, task: "Task", data: "Dataset", device: torch.device) -> Config:
    """Fill in the defaults that depend on the task, the data and the hardware."""
    defaults = SMALL if task.quality == "mini" else PAPER | EXCEPTIONS.get(task.name, {})
    if task.body == "antmaze":
        defaults = defaults | {"batch_size": 256}
    values = vars(args) | defaults | {name: value for name, value in vars(args).items() if value is not None}
    values["device"] = device.type  # the random streams of CPU and CUDA differ, so a run stays on one kind
    values["max_timestep"] = max(HORIZON, int(data.lengths.max())) + values["context_len"]
    if args.rtg_tokens:
        values["method"] = "DT in RADT's setting"
    elif not (args.seqra and args.stepra):
        values["method"] = f"RADT, {'SeqRA' if args.seqra else 'StepRA'} only"
    if args.seqra and not args.alpha:
        values["method"] = f"{values.get('method', 'RADT')}, without alpha"
    return Config(**values)


class StepNorm(nn.Module):
    """StepRA: LayerNorm without weights of its own, then x * (1 + scale) + shift, which the step's return decides."""

    def __init__(self, width: int, stepra: bool):
        super().__init__()
        self.stepra, self.norm = stepra, nn.LayerNorm(width, eps=1e-6, elementwise_affine=not stepra)

    def forward(self, x, scale, shift):  # (B, T, D) each
        return self.norm(x) * (1 + scale) + shift if self.stepra else self.norm(x)


class Attention(nn.Module):
    """softmax(q k^T (D / heads)^-0.5 + mask) v: no bias in W_q, W_k, W_v; dropout on weights and output."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(DROPOUT)
        self.W_q, self.W_k, self.W_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, queries, keys, values, mask):  # (B, Q, D), (B, L, D), (B, L, D), (B, Q, L) bool -> (B, Q, D)
        projected = self.W_q(queries), self.W_k(keys), self.W_v(values)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)  # (B, H, ., D / H)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        weights = torch.softmax(logits.masked_fill(~mask[:, None], -math.inf), dim=-1)
        return self.dropout(self.out((self.dropout(weights) @ v).transpose(1, 2).flatten(-2)))


class SeqRA(nn.Module):
    """Tokens attend to the returns c_t: keys LN_k(c + e), values LN_v(c). Time e enters the keys only."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_k, self.norm_v = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)

    def forward(self, x, c, e, mask):  # (B, T, D), (B, K, D), (B, K, D), (B, T, K) -> (B, T, D)
        return self.attention(x, self.norm_k(c + e), self.norm_v(c), mask)


class Block(nn.Module):
    """Post-norm: x <- StepRA(x + SA(x)); x <- StepRA(x + (1 + alpha) SeqRA(x)); x <- StepRA(x + MLP(x))."""

    def __init__(self, width: int, heads: int, seqra: bool, stepra: bool, alpha: bool):
        super().__init__()
        self.sa, self.norms = Attention(width, heads), nn.ModuleList(StepNorm(width, stepra) for _ in range(2 + seqra))
        self.seqra = SeqRA(width, heads) if seqra else None
        self.alpha = nn.Linear(2 * width, width) if seqra and alpha else None
        # (scale, shift) of each norm from the step's return; zero at first, so that the norms are plain
        self.modulation = nn.Linear(width, 2 * len(self.norms) * width) if stepra else None
        hidden = nn.Linear(width, 4 * width)
        self.mlp = nn.Sequential(hidden, nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(DROPOUT))

    def forward(self, x, c, e, causal, by_step):  # (B, T, D), (B, K, D), (B, K, D), (B, T, T), (B, T, K)
        modulation = [(None, None)] * len(self.norms)
        if self.modulation:  # (B, K, 2 D) per norm -> (B, T, D) twice; a step's tokens share them
            tokens = x.shape[1] // c.shape[1]
            per_token = self.modulation(F.silu(c)).repeat_interleave(tokens, dim=1)
            modulation = [both.chunk(2, dim=-1) for both in per_token.chunk(len(self.norms), dim=-1)]
        x = self.norms[0](x + self.sa(x, x, x, causal), *modulation[0])
        if self.seqra:
            o = self.seqra(x, c, e, by_step)
            alpha = self.alpha(torch.cat([o, x], dim=-1)) if self.alpha else 0
            x = self.norms[1](x + (1 + alpha) * o, *modulation[1])
        return self.norms[-1](x + self.mlp(x), *modulation[-1])


class Policy(nn.Module):
    """RADT over tokens (s_0, a_0, s_1, ...) beside the returns (rtg_0, rtg_1, ...).

    Call with rtg (B, K) normalised, obs (B, K, obs_dim) standardised, act (B, K, act_dim) in [-1, 1], timestep (B, K)
    int64 in [0, max_timestep) and valid (B, K) bool, False on the left padding; returns a_hat (B, K, act_dim). The
    action at step t depends on no token after s_t, on no later return, and on no padding. Always float32: in bfloat16
    an RTG of 3.000 and one of 3.005 would be the same number.
    """

    def __init__(self, obs_dim, act_dim, embed_dim, n_layer, n_head, max_timestep, seqra, stepra, alpha, rtg_tokens):
        super().__init__()
        self.rtg_tokens, rows, columns = rtg_tokens, torch.arange(max_timestep)[:, None], torch.arange(embed_dim)
        angle = rows / 10_000 ** (2 * (columns // 2) / embed_dim)
        self.register_buffer("table", torch.where(columns % 2 == 0, angle.sin(), angle.cos()), persistent=False)
        self.time = nn.Linear(embed_dim, embed_dim)
        self.embed_rtg, self.embed_obs, self.embed_act = (nn.Linear(n, embed_dim) for n in (1, obs_dim, act_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, n_head, seqra, stepra, alpha) for _ in range(n_layer))
        self.head = nn.Linear(embed_dim, act_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            for layer in filter(None, (block.alpha, block.modulation)):
                nn.init.zeros_(layer.weight)

    def forward(self, rtg, obs, act, timestep, valid):
        c, e = self.embed_rtg(rtg[..., None]), self.time(self.table[timestep])  # (B, K, D) each
        tokens = [self.embed_obs(obs) + e, self.embed_act(act) + e]
        x = torch.stack([c + e, *tokens] if self.rtg_tokens else tokens, dim=2)  # (B, K, 2 or 3, D)
        n, K = x.shape[2], rtg.shape[1]  # tokens per step
        step = torch.arange(K, device=rtg.device).repeat_interleave(n)  # (T,) of each token
        # a padded query attends to its own step, so that no row of the softmax is empty
        keys = valid[:, None, :] | (step[:, None] == torch.arange(K, device=rtg.device))  # (B, T, K)
        by_step = keys & (step[:, None] >= torch.arange(K, device=rtg.device))  # returns 0 .. t for all tokens of t
        causal = keys.repeat_interleave(n, dim=2) & torch.ones(n * K, n * K, dtype=torch.bool, device=rtg.device).tril()
        x = x.flatten(1, 2)
        for block in self.blocks:
            x = block(x, c, e, causal, by_step)
        return torch.tanh(self.head(x[:, n - 2 :: n]))  # the state tokens

    def act(self, rtg, obs, act, timestep, valid):
        """Only a_hat of the windows' last step (B, act_dim), for rollouts."""
        return self(rtg, obs, act, timestep, valid)[:, -1]


def make_policy(task: "Task", config: dict, bf16: bool = False) -> Policy:
    """The policy that a checkpoint's configuration describes, always float32 (randomly initialised)."""
    names = ("embed_dim", "n_layer", "n_head", "max_timestep", "seqra", "stepra", "alpha", "rtg_tokens")
    return Policy(task.obs_dim, task.act_dim, *(config[name] for name in names))


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


def action_loss(a_hat, batch: Batch) -> torch.Tensor:
    """RADT's only loss: mean of (a - a_hat)^2 over valid steps and dimensions."""
    return masked_mean(((a_hat - batch.act) ** 2).mean(dim=-1), batch.valid)


def learning_rate(step: int, config: Config) -> float:
    """Rises linearly over the warm-up, then stays."""
    return config.lr * min(1.0, (step + 1) / config.warmup_steps)


class Imitation:
    """The policy, its optimiser, and one gradient step."""

    metrics = ("action_loss", "grad_norm")

    def __init__(self, task: "Task", windows: Windows, config: Config):
        """Sets torch's global seed."""
        self.windows, self.config, device = windows, config, windows.rtg.device
        torch.manual_seed(config.seed)  # of the weights and of dropout
        self.generator = torch.Generator(device).manual_seed(config.seed)  # of the windows
        self.policy = make_policy(task, vars(config)).to(device)
        self.opt = torch.optim.AdamW(self.policy.parameters(), config.lr, weight_decay=WEIGHT_DECAY, fused=True)
        self.parts = dict(policy=self.policy, opt=self.opt)  # what resume.pt holds

    def step(self, step: int) -> torch.Tensor:
        """Returns the values of `metrics` (2,), on the device."""
        self.opt.param_groups[0]["lr"] = learning_rate(step, self.config)
        batch = self.windows.sample(self.config.batch_size, self.generator)
        loss = action_loss(self.policy(*batch[:5]), batch)
        self.opt.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), MAX_GRAD_NORM)
        self.opt.step()
        return torch.stack([loss.detach(), norm])

    @torch.no_grad()
    def rtg_effect(self) -> float:
        """Mean |a_hat(1.5 rtg) - a_hat(rtg)| on 256 windows spread evenly over the data, without dropout."""
        start = torch.linspace(0, len(self.windows.rtg) - 1, 256, device=self.windows.rtg.device).long()[:, None]
        batch = self.windows.at(start)
        self.policy.eval()
        moved = (self.policy(1.5 * batch.rtg, *batch[1:5]) - self.policy(*batch[:5])).abs().mean(dim=-1)
        self.policy.train()
        return masked_mean(moved, batch.valid).item()


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    task, device = parse_env(args.env), pick_device(args.device)
    data = read_dataset(task, args.dataset_path)
    config = resolve(args, task, data, device)
    identity = {name: value for name, value in vars(config).items() if name not in NOT_OF_THE_RUN}
    identity["data"] = data.digest
    folder = Path(args.runs_dir) / f"{task.folder}__{args.exp_name}__{args.seed}"
    finished = load_own(folder / "policy.pt", "train_radt", identity)
    if finished and finished.get("step") == config.total_steps:
        return print(f"{folder}/policy.pt is finished; nothing to do (another run: --exp-name)")
    state = load_own(folder / "resume.pt", "train_radt", identity)

    with claim(folder) as stack:
        learner = Imitation(task, Windows(data, task, config.context_len, device), config)
        sums, step, rows = torch.zeros(len(learner.metrics), device=device), 0, []  # since the last row; of metrics.csv
        if state:
            step, rows = restore(state, folder / "resume.pt", learner, sums, config.total_steps, ("step", "rows"))
        print(f"{folder}: {data.label}, {len(data.rewards):,} transitions, {len(data.ends):,} episodes, step {step:,}")
        metrics = Log(folder, "metrics", rows)
        bar = tqdm(
            total=config.total_steps, initial=step, unit="step", desc="training", dynamic_ncols=True, disable=None
        )
        stack.enter_context(bar)

        def save() -> None:
            counters = dict(step=step, rows=rows)
            save_resume(folder, dict(stage="train_radt", config=identity, counters=counters), learner, sums)
            content = dict(
                stage="train_radt", env=args.env, config=identity, step=step, policy=learner.policy.state_dict()
            )
            content |= dict(data=data.summary(), obs_mean=data.obs_mean, obs_std=data.obs_std, critic=None)
            save_checkpoint(folder / "policy.pt", content | {"episode_returns": torch.as_tensor(data.returns)})

        saved = time.monotonic()
        while step < config.total_steps:
            sums += learner.step(step)
            step += 1
            bar.update()
            if step % LOG_EVERY == 0 or step == config.total_steps:
                check_finite(learner, sums, step)
                means = (sums / ((step - 1) % LOG_EVERY + 1)).tolist()
                row = {"step": step, **dict(zip(learner.metrics, means)), "lr": learning_rate(step - 1, config)}
                metrics.write(row | {"rtg_effect": learner.rtg_effect()})
                bar.set_postfix_str(" ".join(f"{name} {rows[-1][name]:.3g}" for name in ("action_loss", "rtg_effect")))
                sums.zero_()
            if time.monotonic() - saved > args.checkpoint_minutes * 60:
                save()
                saved = time.monotonic()
        save()
    print(f"{folder}/policy.pt: {step:,} steps; python evaluate_alignment.py --checkpoint {folder}/policy.pt")


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
