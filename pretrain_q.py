"""Stage 1 of Q-Align DT: pretrain the critic on the dataset (App. D.2).

    python pretrain_q.py --env hopper-medium-v2

Gym tasks: double-Q SARSA on the dataset's own actions,  y = r + gamma (1 - terminal) min_m Q'_m(s', a').
AntMaze:   IQL with expectile 0.8,                       y = r + gamma (1 - terminal) V(s').

Reads <runs-dir>/<env>__data/dataset.pt (data/prepare.py makes it; class Dataset lists what is in it). Writes
<runs-dir>/<env>__<exp-name>__<seed>/critic.pt, which stage 2 (train_qalign_dt.py) starts from, and report.json: whether
Q has converged to the level of the data's discounted returns, and ranks the data by them (Table E.19).
Stop it at any time, even with kill -9: the same command resumes.
"""

import contextlib
import copy
import importlib
import io
import json
import math
import os
import re
import signal
import sys
import threading
import time
import typing
import warnings
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # while modules load
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"error: interrupted\n"), os._exit(130)))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch's waiting threads keep the cores busy beside other work

import filelock
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

BY_DATA = tyro.conf.arg(help_behavior_hint="")  # the help text names the default, which depends on other things
Int, Float = (Annotated[kind | None, BY_DATA] for kind in (int, float))
Files = Annotated[tuple[str, ...], BY_DATA]


@dataclass(frozen=True)
class Args:
    env: str = "hopper-mini"  # a D4RL name, your own data's <body>-<quality>-<tag>, or a Minari id (README, "Data")
    seed: int = 1  # seed of the initial weights and the batches
    dataset_path: Files = ()  # HDF5 files in D4RL's or Minari's layout to use as --env's data; they are concatenated
    runs_dir: str = "runs"  # folder of all runs
    exp_name: str = "pretrain_q"  # the run folder is <runs-dir>/<env>__<exp-name>__<seed>
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train; auto takes CUDA if there is one
    track: bool = False  # log to Weights & Biases, too: pip install wandb
    checkpoint_minutes: float = 2.0  # wall-clock time between resume.pt files; no result on a CPU depends on it

    # how the critic is trained (default: iql for AntMaze, sarsa for everything else)
    method: Annotated[Literal["sarsa", "iql"] | None, BY_DATA] = None
    # sizes and steps: the paper's, or small ones that take minutes on a CPU (default: paper; mini: small)
    preset: Annotated[Literal["paper", "small"] | None, BY_DATA] = None
    total_steps: Int = None  # gradient steps (default: 2,000,000; small: 10,000)
    # steps that first regress on discounted returns (default: 0; 9/10 of a SARSA run too short for Q to converge)
    warm_start_steps: Int = None
    batch_size: int = 512  # transitions per gradient step
    critic_width: Int = None  # hidden width of the critic (default: 256; small: 128)
    lr: Float = None  # Adam learning rate (default: 1e-4; small: 3e-4)
    gamma: float = 0.99  # discount of Q (App. D.2), which stage 2 takes from the critic

    def __post_init__(self):
        check_args(self, {"total_steps": 1, "batch_size": 1, "critic_width": 1})
        if not 0 < self.gamma < 1:
            raise ValueError(f"--gamma {self.gamma}: must be between 0 and 1")
        if self.total_steps and self.warm_start_steps and self.warm_start_steps > self.total_steps:
            raise ValueError(f"--warm-start-steps {self.warm_start_steps}: more than --total-steps {self.total_steps}")


PAPER = dict(total_steps=2_000_000, critic_width=256, lr=1e-4)
SMALL = dict(total_steps=10_000, critic_width=128, lr=3e-4)  # small data, minutes on a CPU
EXPECTILE, TAU, TARGET_EVERY, LOG_EVERY = 0.8, 0.005, 2, 1000


def resolve(args: Args, task: "Task", device: torch.device) -> Args:
    """Fill in the defaults that depend on the task."""
    preset = args.preset or ("small" if task.quality == "mini" else "paper")
    defaults = (SMALL if preset == "small" else PAPER) | {"method": "iql" if task.body == "antmaze" else "sarsa"}
    args = checked(replace, args, device=device.type, **{k: v for k, v in defaults.items() if getattr(args, k) is None})
    if args.warm_start_steps is None:
        # Q' climbs to its level with time constant 1 / (tau per step (1 - gamma)): 40,000 steps. A SARSA run shorter
        # than three of them begins with regression: in so few steps, min_m of two critics that still disagree keeps Q
        # too low (measured: 257 fell to 220 in 15,000 steps).
        too_short = args.method == "sarsa" and args.total_steps < 3 * TARGET_EVERY / (TAU * (1 - args.gamma))
        args = replace(args, warm_start_steps=args.total_steps * 9 // 10 if too_short else 0)
    return args


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


class Transitions:
    """The whole dataset on the training device; the s' and a' of row i are row i + 1 of the same episode."""

    def __init__(self, data: Dataset, device: torch.device, gamma: float):
        self.gamma, rewards = gamma, data.rewards + data.task.reward_shift
        self.obs = torch.as_tensor(data.observations).to(device)
        self.obs = (self.obs - data.obs_mean.to(device)).div_(data.obs_std.to(device))
        self.act, self.reward = torch.as_tensor(data.actions).to(device), torch.as_tensor(rewards).to(device)
        self.terminal = torch.as_tensor(data.terminals).to(device)
        self.ends = torch.as_tensor(np.repeat(data.ends, data.lengths)).to(device)  # (N,) of its episode, exclusive
        returns, to_last = discounted_returns(rewards, data.ends, gamma)
        self.episode_returns = returns[data.starts], data.returns  # of each episode: discounted, and plain
        self.returns, self.to_last = (torch.as_tensor(x, dtype=torch.float32).to(device) for x in (returns, to_last))
        # A timeout's last transition has neither s' nor a' in the dataset: leave it out (the release: a terminal).
        usable = np.ones(len(rewards), bool)
        usable[data.ends - 1] = data.terminals[data.ends - 1]
        self.usable = torch.as_tensor(np.flatnonzero(usable)).to(device)
        # the return is known where the episode's end is the MDP's own, or what comes after it has a weight below 1%
        terminal_episode = np.repeat(data.terminals[data.ends - 1], data.lengths)
        self.known = torch.as_tensor(np.flatnonzero(terminal_episode | (to_last * gamma < 0.01))).to(device)


def discounted_returns(rewards: np.ndarray, ends: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """(N,) sum of gamma^k r over the rest of a transition's episode, and (N,) gamma^(steps to its last transition)."""
    lengths = np.diff(ends, prepend=0)
    returns = rewards.astype(np.float64)
    for k in range(1, lengths.max()):  # all episodes at once, k steps before their last transition
        i = ends[lengths > k] - 1 - k
        returns[i] += gamma * returns[i + 1]
    return returns, gamma ** (np.repeat(ends, lengths) - 1 - np.arange(len(rewards)))


def sarsa_target(target_critic: Ensemble, data: Transitions, i: torch.Tensor) -> torch.Tensor:
    """y = r + gamma (1 - terminal) min_m Q'_m(s', a') for rows i (B,) -> (B,)."""
    following = (i + 1).clamp(max=len(data.reward) - 1)  # a terminal row has no successor, and its factor is 0
    q_next = target_critic(data.obs[following], data.act[following]).amin(dim=0)
    return data.reward[i] + data.gamma * ~data.terminal[i] * q_next


def return_target(target_critic: Ensemble, data: Transitions, i: torch.Tensor) -> torch.Tensor:
    """The discounted return-to-go of rows i (B,); where a timeout cut it, min_m Q'_m stands in from the last row on."""
    last = data.ends[i] - 1
    q_last = target_critic(data.obs[last], data.act[last]).amin(dim=0)
    return data.returns[i] + data.to_last[i] * ~data.terminal[last] * (q_last - data.reward[last])


def iql_target(value: Ensemble, data: Transitions, i: torch.Tensor) -> torch.Tensor:
    """y = r + gamma (1 - terminal) V(s') for rows i (B,) -> (B,)."""
    following = (i + 1).clamp(max=len(data.reward) - 1)
    return data.reward[i] + data.gamma * ~data.terminal[i] * value(data.obs[following]).squeeze(0)


def value_loss(value: Ensemble, target_critic: Ensemble, data: Transitions, i: torch.Tensor) -> torch.Tensor:
    """IQL's L_V = mean |0.8 - 1{u < 0}| u^2 with u = min_m Q'_m(s, a) - V(s), at rows i."""
    with torch.no_grad():
        q = target_critic(data.obs[i], data.act[i]).amin(dim=0)
    u = q - value(data.obs[i]).squeeze(0)
    return ((EXPECTILE - (u < 0).float()).abs() * u**2).mean()


def td_loss(critic: Ensemble, data: Transitions, i: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MSE(Q_1, y) + MSE(Q_2, y) at rows i, and the mean of Q_1."""
    q = critic(data.obs[i], data.act[i])
    return ((q - y) ** 2).mean(dim=1).sum(), q[0].detach().mean()


class Pretraining:
    """The networks of stage 1, and one gradient step, without any CPU-GPU synchronisation."""

    metrics = ("q_loss", "q_mean", "v_loss")

    def __init__(self, task: Task, data: Transitions, args: Args):
        self.data, self.args, device = data, args, data.obs.device
        torch.manual_seed(args.seed)
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.critic = Ensemble(2, task.obs_dim + task.act_dim, args.critic_width).to(device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.value = Ensemble(1, task.obs_dim, args.critic_width).to(device)  # V(s), used by IQL only
        self.opt = torch.optim.Adam([*self.critic.parameters(), *self.value.parameters()], lr=args.lr, fused=True)
        self.saved_state = dict(critic=self.critic, target_critic=self.target_critic, value=self.value, opt=self.opt)

    def step(self, step: int) -> torch.Tensor:
        """Gradient step number `step`; returns the values of `metrics` (3,), on the device."""
        data, device = self.data, self.data.obs.device
        rows = torch.randint(len(data.usable), (self.args.batch_size,), generator=self.generator, device=device)
        i, v_loss = data.usable[rows], torch.zeros((), device=device)
        with torch.no_grad():
            if step < self.args.warm_start_steps:
                y = return_target(self.target_critic, data, i)
            elif self.args.method == "sarsa":
                y = sarsa_target(self.target_critic, data, i)
            else:
                y = iql_target(self.value, data, i)
        if self.args.method == "iql":
            v_loss = value_loss(self.value, self.target_critic, data, i)
        q_loss, q_mean = td_loss(self.critic, data, i, y)
        self.opt.zero_grad()
        (q_loss + v_loss).backward()
        self.opt.step()
        if step % TARGET_EVERY == 0:
            ema_update(self.target_critic, self.critic, TAU)
        return torch.stack([q_loss.detach(), q_mean, v_loss.detach()])


@torch.no_grad()
def report(learner: Pretraining) -> dict:
    """On up to 100,000 transitions: Q against known returns, their rank correlation (Table E.19), and Q's scale."""
    data = learner.data

    def q_of(rows):
        rows = rows[:: max(1, math.ceil(len(rows) / 100_000))]  # a fixed, even choice
        parts = [learner.critic(data.obs[i], data.act[i]).amin(dim=0) for i in rows.split(4096)]
        return torch.cat(parts).cpu().double(), data.returns[rows].cpu().double()

    q, returns = q_of(data.known)
    q_of_all, _ = q_of(torch.arange(len(data.reward), device=data.obs.device))
    return {
        "q_mean": float(q.mean()) if len(q) else None,
        "return_mean": float(returns.mean()) if len(q) else None,
        "spearman_q_vs_return": rank_correlation(q, returns),
        # what an exact critic could reach: Q ranks by discounted returns, stage 2 conditions on plain ones
        "spearman_discounted_vs_plain_return": rank_correlation(*data.episode_returns),
        "q_abs_mean": float(q_of_all.abs().mean()),
    }


# ======== shared: correlation ========
def rank_correlation(x, y) -> float | None:
    """Spearman's; None where it is undefined: fewer than two values, or constant ones."""
    from scipy.stats import spearmanr  # imported here: it takes a while

    x, y = np.asarray(x), np.asarray(y)
    return float(spearmanr(x, y).statistic) if len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0 else None


# ======== end of shared: correlation ========


STAGE = "pretrain_q"
NOT_OF_THE_RUN = ("dataset_path", "runs_dir", "preset", "track", "checkpoint_minutes")


def main() -> None:
    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.DisallowNone,))
    device = pick_device(args.device)
    dataset = load_data(args)
    task, args = dataset.task, resolve(args, dataset.task, device)
    identity = {name: x for name, x in vars(args).items() if name not in NOT_OF_THE_RUN} | {"data": task.digest}
    folder = run_folder(args, args.exp_name)
    data = Transitions(dataset, device, args.gamma)
    if not len(data.usable):
        fail(f"{task.label}: no transition has a successor or is a terminal; the critic needs longer episodes")

    with claim(folder, wait=True):  # runs of one seed share it
        learner, done = Pretraining(task, data, args), Progress()
        if finished := load_own(folder / "critic.pt", STAGE, identity):
            try:
                check_same(finished.get("critic"), learner.critic.state_dict(), "critic")
            except ValueError as error:
                fail(f"{folder}/critic.pt: not whole ({error}); remove it, and it is made again")
            print(f"{folder}/critic.pt is finished; nothing to do (another run: --exp-name)")
            return
        if args.track:
            track(args, folder)
        sums = torch.zeros(len(learner.metrics), device=device)  # since the last row of metrics.csv
        if state := load_own(folder / "resume.pt", STAGE, identity):
            done = restore(state, folder / "resume.pt", learner, sums, args.total_steps, Progress)
        size = f"{len(data.usable):,} training transitions"
        print(f"{folder}: {task.label}, {size}, {args.method}, on {device.type}, step {done.step:,}")
        if args.warm_start_steps:
            print(f"the first {args.warm_start_steps:,} steps regress on discounted returns, unlike the paper's")
        metrics, saved = Log(folder, "metrics", done.rows), time.monotonic()
        with progress_bar(args.total_steps, done.step, args.method) as bar:
            for step in range(done.step, args.total_steps):
                sums += learner.step(step)
                done.step += 1
                bar.update()
                if done.step % LOG_EVERY == 0 or done.step == args.total_steps:
                    check_finite(learner, sums, done.step)
                    means = (sums / ((done.step - 1) % LOG_EVERY + 1)).tolist()  # over the steps since the last row
                    row = dict(zip(learner.metrics, means))
                    metrics.write({"step": done.step} | row)
                    bar.set_postfix_str(" ".join(f"{name} {x:.3g}" for name, x in row.items()))
                    sums.zero_()
                if time.monotonic() - saved > args.checkpoint_minutes * 60:
                    save_resume(folder, dict(stage=STAGE, config=identity), learner, sums, done)
                    saved = time.monotonic()
        save_resume(folder, dict(stage=STAGE, config=identity), learner, sums, done)
        data_set = dict(label=task.label, is_d4rl=task.is_d4rl, digest=task.digest)
        about, result = dict(data=data_set, config=identity), report(learner)
        write_file(folder / "report.json", (json.dumps({"env": args.env} | about | result, indent=2) + "\n").encode())
        critic = learner.critic.state_dict()
        save_checkpoint(folder / "critic.pt", about | dict(stage=STAGE, report=result, critic=critic))
    if result["q_mean"] is not None:
        mean_q, mean_return = result["q_mean"], result["return_mean"]
        print(f"mean Q {mean_q:.2f}, mean discounted return of the same transitions {mean_return:.2f}")
    else:
        print("all episodes are cut by a time limit too soon for any transition's return to be known: Q is not checked")
    print(f"{folder}/critic.pt; rank correlations in {folder}/report.json")


@dataclass
class Progress:
    """How far a run is: what resume.pt holds beside networks, optimiser and random streams."""

    step: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)  # of metrics.csv


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


if __name__ == "__main__":
    run(main)
