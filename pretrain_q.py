"""Stage 1 of Q-Align DT: pretrain the critic on the dataset (App. D.2).

    python pretrain_q.py --env hopper-medium-v2

Gym tasks: double-Q SARSA on the dataset's own actions,  y = r + gamma (1 - terminal) min_m Q'_m(s', a').
AntMaze:   IQL with expectile 0.8,                       y = r + gamma (1 - terminal) V(s').
Writes runs/<env>__<exp-name>__<seed>/critic.pt, which stage 2 (train_qalign_dt.py) starts from, and report.json: has Q
reached the level of the data's discounted returns, does it rank the data by them (Table E.19), and do they rank whole
episodes as the undiscounted returns do, which stage 2 asks for?
Order of the file: Args, critic, losses, one step, main; then the blocks this file shares with the other stages.
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
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import urllib.request
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import filelock
import h5py
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
    """seed of the initial weights and the batches"""
    dataset_path: tuple[str, ...] = ()
    """HDF5 file(s) in D4RL's layout to use instead of the download; several are concatenated"""
    runs_dir: str = "runs"
    """folder of all runs"""
    exp_name: str = "pretrain_q"
    """name of this experiment; the run folder is <runs-dir>/<env>__<exp-name>__<seed>"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; auto takes CUDA if there is one"""
    compile: bool = False
    """torch.compile the networks and, on CUDA, replay a step as one CUDA graph; without the flag: with CUDA only"""
    method: Literal["sarsa", "iql"] | None = None
    """how the critic is trained (default: iql for AntMaze, sarsa for everything else)"""
    total_steps: int = 2_000_000
    """gradient steps"""
    warm_start_steps: int | None = None
    """so many steps first regress on discounted returns (None: 0, but 9/10 of a SARSA run too short for Q's level)"""
    batch_size: int = 512
    """transitions per gradient step"""
    critic_width: int = 256
    """hidden width of the critic"""
    lr: float = 1e-4
    """Adam learning rate"""
    tau: float = 0.005
    """step of the target critic's moving average, every 2nd gradient step"""
    gamma: float = 0.99
    """discount of Q (App. D.2); stage 2 takes it over with the critic"""
    checkpoint_minutes: float = 2.0
    """wall-clock time between resume.pt files; on a CPU no bit of a run's result depends on it"""


MINI = dict(total_steps=10_000, critic_width=128, lr=3e-4)  # hopper-mini, for two CPU cores; each entry deviates
EXPECTILE, TARGET_EVERY, HELD_OUT, LOG_EVERY = 0.8, 2, 0.05, 1000


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


class Transitions:
    """The whole dataset on the training device; the s' and a' of row i are row i + 1 of the same episode."""

    def __init__(self, data: "Dataset", task: "Task", device: torch.device, gamma: float):
        self.gamma = gamma
        ends, rewards = np.repeat(data.ends, data.lengths), data.rewards + task.critic_reward_shift
        self.obs = (torch.as_tensor(data.observations).to(device) - data.obs_mean.to(device)).div_(
            data.obs_std.to(device)
        )
        self.act, self.reward, self.terminal = (
            torch.as_tensor(x).to(device) for x in (data.actions, rewards, data.terminals)
        )
        self.ends = torch.as_tensor(ends).to(device)
        returns, to_last = discounted_returns(rewards, data.ends, gamma)
        self.episodes = returns[data.starts], data.returns  # of each: discounted (the critic's rewards), and plain
        self.returns, self.to_last = (torch.as_tensor(x, dtype=torch.float32).to(device) for x in (returns, to_last))
        # A timeout's last transition has neither s' nor a' in the dataset: leave it out (the release calls it terminal).
        usable = np.ones(len(ends), bool)
        usable[data.ends - 1] = data.terminals[data.ends - 1]
        held_out = np.zeros(len(data.ends), bool)
        held_out[np.random.default_rng(0).permutation(len(data.ends))[: int(HELD_OUT * len(data.ends))]] = True
        held_out = np.repeat(held_out, data.lengths)
        self.train, self.held_out = (
            torch.as_tensor(np.flatnonzero(usable & part)).to(device) for part in (~held_out, held_out)
        )
        # where the episode's end cuts less than 1% of the discounting off, or is the MDP's own end, the return is known
        terminal_episode = np.repeat(data.terminals[data.ends - 1], data.lengths)
        self.known = torch.as_tensor(
            np.flatnonzero(terminal_episode | (ends - np.arange(len(ends)) > math.log(0.01) / math.log(gamma)))
        )


def discounted_returns(rewards: np.ndarray, ends: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """(N,) sum of gamma^k r over the rest of each transition's episode, and (N,) gamma^(steps to its last transition)."""
    lengths = np.diff(ends, prepend=0)
    returns = rewards.astype(np.float64)
    for k in range(1, lengths.max()):  # all episodes at once, k steps before their last transition
        i = ends[lengths > k] - 1 - k
        returns[i] += gamma * returns[i + 1]
    return returns, gamma ** (np.repeat(ends, lengths) - 1 - np.arange(len(rewards)))


def sarsa_target(target_critic: DoubleQ, data: Transitions, i: torch.Tensor) -> torch.Tensor:
    """y = r + gamma (1 - terminal) min_m Q'_m(s', a') for rows i (B,) -> (B,)."""
    following = (i + 1).clamp(max=len(data.reward) - 1)  # a terminal row has no successor, and its factor is 0
    q_next = target_critic(data.obs[following], data.act[following]).amin(dim=0)
    return data.reward[i] + data.gamma * ~data.terminal[i] * q_next


def return_target(target_critic: DoubleQ, data: Transitions, i: torch.Tensor) -> torch.Tensor:
    """The discounted return-to-go of rows i (B,); where a timeout cut it, min_m Q'_m of the last transition goes on."""
    last = data.ends[i] - 1
    q_last = target_critic(data.obs[last], data.act[last]).amin(dim=0)
    return data.returns[i] + data.to_last[i] * ~data.terminal[last] * (q_last - data.reward[last])


def iql_target(value: nn.Module, data: Transitions, i: torch.Tensor) -> torch.Tensor:
    """y = r + gamma (1 - terminal) V(s') for rows i (B,) -> (B,)."""
    following = (i + 1).clamp(max=len(data.reward) - 1)
    return data.reward[i] + data.gamma * ~data.terminal[i] * value(data.obs[following]).squeeze(0)


def value_loss(value: nn.Module, target_critic: DoubleQ, data: Transitions, i: torch.Tensor) -> torch.Tensor:
    """IQL's L_V = mean |0.8 - 1{u < 0}| u^2 with u = min_m Q'_m(s, a) - V(s), at rows i."""
    with torch.no_grad():
        q = target_critic(data.obs[i], data.act[i]).amin(dim=0)
    u = q - value(data.obs[i]).squeeze(0)
    return ((EXPECTILE - (u < 0).float()).abs() * u**2).mean()


def td_loss(critic: DoubleQ, data: Transitions, i: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MSE(Q_1, y) + MSE(Q_2, y) at rows i, and the mean of Q_1."""
    q = critic(data.obs[i], data.act[i])
    return ((q - y) ** 2).mean(dim=1).sum(), q[0].detach().mean()


class Pretraining:
    """The networks of stage 1, and one gradient step, in which nothing waits for the device."""

    metrics = ["q_loss", "q_mean", "v_loss"]

    def __init__(self, task: "Task", data: Transitions, cfg: dict, compile: bool = False):
        """cfg as resolve() makes it. Sets torch's global seed."""
        self.data, self.cfg, device = data, cfg, data.obs.device
        torch.manual_seed(cfg["seed"])
        self.generator = torch.Generator(device).manual_seed(cfg["seed"])
        self.critic = DoubleQ(task.obs_dim, task.act_dim, cfg["critic_width"]).to(device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.value = MLP(1, task.obs_dim, cfg["critic_width"]).to(device)  # V(s), used by IQL only
        trained = [*self.critic.parameters(), *(self.value.parameters() if cfg["method"] == "iql" else ())]
        self.opt = torch.optim.Adam(trained, lr=cfg["lr"], fused=True, capturable=device.type == "cuda")
        self.parts = dict(critic=self.critic, target_critic=self.target_critic, value=self.value, opt=self.opt)
        nets = (self.critic, self.target_critic, self.value)
        self.nets = [compiled(net) if compile else net for net in nets]

    def step(self, regress: bool, move_target: bool) -> torch.Tensor:
        """One gradient step, on discounted returns or by the method; returns the values of `metrics` (3,), on the device."""
        critic, target_critic, value = self.nets
        data, device = self.data, self.data.obs.device
        i = data.train[
            torch.randint(len(data.train), (self.cfg["batch_size"],), generator=self.generator, device=device)
        ]
        v_loss = torch.zeros((), device=device)
        with torch.no_grad():
            if regress:
                y = return_target(target_critic, data, i)
            elif self.cfg["method"] == "sarsa":
                y = sarsa_target(target_critic, data, i)
            else:
                y = iql_target(value, data, i)
        if self.cfg["method"] == "iql":
            v_loss = value_loss(value, target_critic, data, i)
        q_loss, q_mean = td_loss(critic, data, i, y)
        self.opt.zero_grad()
        (q_loss + v_loss).backward()
        self.opt.step()
        if move_target:
            ema_update(self.target_critic, self.critic, self.cfg["tau"])
        return torch.stack([q_loss.detach(), q_mean, v_loss.detach()])


@torch.no_grad()
def report(critic, target_critic, value, data: Transitions, cfg: dict) -> dict:
    """On up to 100,000 transitions: held-out TD loss, Q against known returns, their rank correlation (Table E.19)."""

    def some(rows):  # a fixed, even choice
        return rows[:: max(1, -(-len(rows) // 100_000))].to(data.obs.device)

    def q_of(rows):
        return (
            torch.cat([critic(data.obs[i], data.act[i]).amin(dim=0) for i in rows.split(4096)])
            if len(rows)
            else rows.float()
        )

    held_out = some(data.held_out if len(data.held_out) else data.train)
    td = []
    for i in held_out.split(4096):
        y = sarsa_target(target_critic, data, i) if cfg["method"] == "sarsa" else iql_target(value, data, i)
        td.append(td_loss(critic, data, i, y)[0] * len(i))
    known = some(data.known)
    q, returns = q_of(known).cpu().double(), data.returns[known].cpu().double()
    has_known = len(known) > 1
    return {
        "td_loss": float(sum(td) / max(len(held_out), 1)),
        "td_loss_on": "held-out episodes" if len(data.held_out) else "training episodes (too few to hold some out)",
        "q_mean": float(q.mean()) if has_known else None,
        "return_mean": float(returns.mean()) if has_known else None,
        "spearman_q_vs_return": rank_correlation(q, returns),
        # about as well as an exact critic would rank episodes by what stage 2 asks for
        "spearman_discounted_vs_plain_return": rank_correlation(*data.episodes),
        "q_abs_mean": float(q_of(some(torch.arange(len(data.reward)))).abs().mean()),
    }


# ======== shared: correlation (the same text in pretrain_q.py, evaluate_alignment.py) ========


def rank_correlation(x, y) -> float | None:
    """Spearman's; None where it is undefined: fewer than two values, or constant ones."""
    from scipy.stats import spearmanr  # imported here: it takes a while

    x, y = np.asarray(x), np.asarray(y)
    return float(spearmanr(x, y).statistic) if len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0 else None


# ======== end of shared: correlation ========


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    args = parse_args()
    keep_freed_memory()
    task, device = parse_env(args.env), pick_device(args.device)
    check_seed(args.seed)
    if args.compile and not can_compile(device.type):
        fail("--compile: torch.compile finds no C++ compiler here, or no Triton for CUDA; use --no-compile")
    cfg = resolve(args, task)
    dataset = read_dataset(task, args.dataset_path)
    cfg["device"] = device.type  # the random streams of CPU and CUDA differ, so a run stays on one kind
    folder = Path(args.runs_dir) / f"{args.env}__{args.exp_name}__{args.seed}"
    if check_same_run(folder, "critic.pt", "pretrain_q", cfg, dataset.hash):
        return print(
            f"{folder}/critic.pt is finished ({cfg['total_steps']:,} steps); nothing to do (another run: --exp-name)"
        )
    data = Transitions(dataset, task, device, args.gamma)
    if not len(data.train):
        fail(f"{dataset.label}: no transition with a successor or a terminal in it; the critic needs longer episodes")

    lock = claim(folder)
    print(
        f"{folder}: {dataset.label}, {len(data.train):,} training transitions, {cfg['method']}, {cfg['total_steps']:,} steps"
    )
    if dataset.clipped:
        print(f"warning: clipped {dataset.clipped:,} actions to [-1, 1]", file=sys.stderr)
    if cfg["warm_start_steps"]:
        print(f"the first {cfg['warm_start_steps']:,} steps regress on discounted returns-to-go, unlike the paper's")
    learner = Pretraining(task, data, cfg, args.compile)
    train_step = learner.step
    if args.compile:
        print("compiling: the first step takes a minute or more (--no-compile starts at once)")
    if args.compile and device.type == "cuda":
        train_step = CudaGraph(learner.step, learner.generator)
    meters = Meters(learner.metrics, device)
    step = 0
    if state := check_same_run(folder, "resume.pt", "pretrain_q", cfg, dataset.hash):
        step = state["step"]
        restore(state, learner.parts, meters, learner.generator)
    metrics = MetricsLog(folder / "metrics.csv", ["step", *meters.names], step)

    def save() -> None:
        meters.check(bar, folder, "--lr")  # never overwrite a good checkpoint with a bad one
        save_resume(
            folder, "pretrain_q", cfg, dataset.summary(), learner.parts, meters, learner.generator, dict(step=step)
        )

    stop, saved = StopSignal(), time.monotonic()
    bar = tqdm(
        total=cfg["total_steps"], initial=step, unit="step", desc=f"critic ({cfg['method']})", dynamic_ncols=True
    )
    while step < cfg["total_steps"] and not stop.requested:
        meters.add(train_step(step < cfg["warm_start_steps"], step % TARGET_EVERY == 0), step)
        step += 1
        bar.update()
        if step % LOG_EVERY == 0 or step == cfg["total_steps"]:
            meters.check(bar, folder, "--lr")
            row = meters.means()
            metrics.write({"step": step, **row})
            bar.set_postfix_str(
                f"td {row['q_loss']:.3g} q {row['q_mean']:.1f}"
                + (f" v {row['v_loss']:.3g}" if cfg["method"] == "iql" else "")
            )
        if time.monotonic() - saved > args.checkpoint_minutes * 60:
            save()
            saved = time.monotonic()
    bar.close()
    save()
    metrics.close()
    if step < cfg["total_steps"]:
        print(f"stopped at step {step:,} of {cfg['total_steps']:,}; the same command continues from there")
        sys.exit(130)
    result = report(learner.critic, learner.target_critic, learner.value, data, cfg)
    (folder / "report.json").write_text(
        json.dumps({"env": args.env, "data": dataset.summary(), "config": cfg, **result}, indent=2) + "\n"
    )
    save_checkpoint(folder / "critic.pt", dict(
        stage="pretrain_q", format=FORMAT, env=args.env, config=cfg, step=step, data=dataset.summary(),
        obs_mean=dataset.obs_mean, obs_std=dataset.obs_std, critic=learner.critic.state_dict(), report=result,
    ))  # fmt: skip
    lock.release()
    print(f"TD loss {result['td_loss']:.4g} on {result['td_loss_on']}")
    if result["spearman_q_vs_return"] is not None:
        print(
            f"mean Q {result['q_mean']:.2f}, mean discounted return of the same transitions {result['return_mean']:.2f}"
        )
        print(f"Spearman correlation of Q and discounted return {result['spearman_q_vs_return']:.3f}")
    else:
        print(f"no return is known at gamma {args.gamma:g}, or all are equal: whether Q has arrived was not checked")
    if (spearman := result["spearman_discounted_vs_plain_return"]) is not None:
        print(
            f"Spearman correlation of discounted (gamma {args.gamma:g}) and plain return of whole episodes {spearman:.3f}"
        )
    print(f"{folder}/critic.pt")


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


def parse_args() -> Args:
    """The command line, with the defaults of its --env. --help shows them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--env", nargs="?", default=Args.env)
    parser.add_argument("--device", nargs="?")
    given, _ = parser.parse_known_args()
    task = parse_env(given.env or "")
    preset = MINI if task.quality == "mini" else {}
    compile = given.device != "cpu" and torch.cuda.is_available() and can_compile("cuda")
    return tyro.cli(Args, default=replace(Args(env=task.name, compile=compile), **preset), description=__doc__)


def resolve(args: Args, task: Task) -> dict:
    """The configuration that defines a run and that checkpoints store; exits 2 on a value that cannot work."""
    cfg = asdict(args)
    for name in ("dataset_path", "runs_dir", "checkpoint_minutes"):
        cfg.pop(name)  # where things are and how often they are saved do not define a run
    for name in ("total_steps", "batch_size", "critic_width"):
        if cfg[name] < 1:
            fail(f"--{name.replace('_', '-')} {cfg[name]}: must be at least 1")
    if not 0 < args.lr < math.inf or not 0 < args.tau <= 1 or not 0 < args.gamma < 1:
        fail(
            f"--lr {args.lr} must be positive and finite, --tau {args.tau} in (0, 1], --gamma {args.gamma} between 0 and 1"
        )
    cfg["method"] = args.method or ("iql" if task.body == "antmaze" else "sarsa")
    # Q' climbs to its level with time constant 1 / (tau per step (1 - gamma)): 40,000 steps with the release's. A SARSA
    # run shorter than three of them starts by regression, which needs hardly any climbing, and only ends with SARSA: with
    # few steps, min_m of two critics that still disagree costs level (measured: 257 fell to 220 in 15,000 SARSA steps).
    if args.warm_start_steps is None:
        too_short = args.total_steps < 3 * TARGET_EVERY / (args.tau * (1 - args.gamma))
        cfg["warm_start_steps"] = args.total_steps * 9 // 10 if cfg["method"] == "sarsa" and too_short else 0
    if not 0 <= cfg["warm_start_steps"] <= args.total_steps:
        fail(f"--warm-start-steps {args.warm_start_steps}: must be between 0 and --total-steps {args.total_steps}")
    return cfg


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", code=130)
