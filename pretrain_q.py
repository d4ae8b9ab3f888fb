"""Stage 1 of Q-Align DT: pretrain the critic on the dataset (App. D.2).

    python pretrain_q.py --env hopper-medium-v2

Gym tasks: double-Q SARSA on the dataset's own actions,  y = r + gamma (1 - terminal) min_m Q'_m(s', a').
AntMaze:   IQL with expectile 0.8,                       y = r + gamma (1 - terminal) V(s').

Writes runs/<env>__<exp-name>__<seed>/critic.pt, which stage 2 (train_qalign_dt.py) starts from, and report.json:
whether Q has converged to the level of the data's discounted returns, and ranks the data by them (Table E.19).
Stop it at any time, even with kill -9: the same command resumes.
"""

import contextlib
import copy
import ctypes
import difflib
import hashlib
import http.client
import io
import json
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
    # <body>-<quality>-<tag>: a D4RL name (tag v2) or your own data's tag; or Minari's mujoco/<body>/<quality>-v0;
    # hopper-mini and halfcheetah-mini come with the code
    env: str = "hopper-mini"
    seed: int = 1  # seed of the initial weights and the batches
    # HDF5 file(s) in D4RL's or Minari's layout to use instead; several are concatenated
    dataset_path: tuple[str, ...] = ()
    runs_dir: str = "runs"  # folder of all runs
    exp_name: str = "pretrain_q"  # name of this experiment; the run folder is <runs-dir>/<env>__<exp-name>__<seed>
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train; auto takes CUDA if there is one
    # log to Weights & Biases, too: pip install wandb (its own WANDB_* variables choose the project)
    track: bool = False
    # wall-clock time between resume.pt files; on a CPU no bit of a run's result depends on it
    checkpoint_minutes: float = 2.0

    # how the critic is trained (default: iql for AntMaze, sarsa for everything else)
    method: Literal["sarsa", "iql"] | None = None
    total_steps: int | None = None  # gradient steps (default: 2,000,000; <body>-mini: 10,000)
    # regress on discounted returns first (default: 0; 9/10 of a SARSA run too short for Q to converge)
    warm_start_steps: int | None = None
    batch_size: int = 512  # transitions per gradient step
    critic_width: int | None = None  # hidden width of the critic (default: 256; <body>-mini: 128)
    lr: float | None = None  # Adam learning rate (default: 1e-4; <body>-mini: 3e-4)
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
    defaults = (SMALL if task.quality == "mini" else PAPER) | {"method": "iql" if task.body == "antmaze" else "sarsa"}
    args = replace(args, device=device.type, **{k: v for k, v in defaults.items() if getattr(args, k) is None})
    if args.warm_start_steps is None:
        # Q' climbs to its level with time constant 1 / (tau per step (1 - gamma)): 40,000 steps. A SARSA run shorter
        # than three of them starts by regression and only ends with SARSA: with few steps, min_m of two critics that
        # still disagree costs level (measured: 257 fell to 220 in 15,000 SARSA steps).
        too_short = args.method == "sarsa" and args.total_steps < 3 * TARGET_EVERY / (TAU * (1 - args.gamma))
        args = replace(args, warm_start_steps=args.total_steps * 9 // 10 if too_short else 0)
    return args


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


class Transitions:
    """The whole dataset on the training device; the s' and a' of row i are row i + 1 of the same episode."""

    def __init__(self, data: "Dataset", task: "Task", device: torch.device, gamma: float):
        self.gamma, rewards = gamma, data.rewards + task.critic_reward_shift
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
        # where the episode's end is the MDP's own, or cuts off less than 1% of the discounted sum, the return is known
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


def sarsa_target(target_critic: MLP, data: Transitions, i: torch.Tensor) -> torch.Tensor:
    """y = r + gamma (1 - terminal) min_m Q'_m(s', a') for rows i (B,) -> (B,)."""
    following = (i + 1).clamp(max=len(data.reward) - 1)  # a terminal row has no successor, and its factor is 0
    q_next = target_critic(data.obs[following], data.act[following]).amin(dim=0)
    return data.reward[i] + data.gamma * ~data.terminal[i] * q_next


def return_target(target_critic: MLP, data: Transitions, i: torch.Tensor) -> torch.Tensor:
    """The discounted return-to-go of rows i (B,), continued by min_m Q'_m of the last transition after a timeout."""
    last = data.ends[i] - 1
    q_last = target_critic(data.obs[last], data.act[last]).amin(dim=0)
    return data.returns[i] + data.to_last[i] * ~data.terminal[last] * (q_last - data.reward[last])


def iql_target(value: MLP, data: Transitions, i: torch.Tensor) -> torch.Tensor:
    """y = r + gamma (1 - terminal) V(s') for rows i (B,) -> (B,)."""
    following = (i + 1).clamp(max=len(data.reward) - 1)
    return data.reward[i] + data.gamma * ~data.terminal[i] * value(data.obs[following]).squeeze(0)


def value_loss(value: MLP, target_critic: MLP, data: Transitions, i: torch.Tensor) -> torch.Tensor:
    """IQL's L_V = mean |0.8 - 1{u < 0}| u^2 with u = min_m Q'_m(s, a) - V(s), at rows i."""
    with torch.no_grad():
        q = target_critic(data.obs[i], data.act[i]).amin(dim=0)
    u = q - value(data.obs[i]).squeeze(0)
    return ((EXPECTILE - (u < 0).float()).abs() * u**2).mean()


def td_loss(critic: MLP, data: Transitions, i: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MSE(Q_1, y) + MSE(Q_2, y) at rows i, and the mean of Q_1."""
    q = critic(data.obs[i], data.act[i])
    return ((q - y) ** 2).mean(dim=1).sum(), q[0].detach().mean()


class Pretraining:
    """The networks of stage 1, and one gradient step, without any CPU-GPU synchronisation."""

    metrics = ("q_loss", "q_mean", "v_loss")

    def __init__(self, task: "Task", data: Transitions, args: Args):
        """args as resolve() makes them. Sets torch's global seed."""
        self.data, self.args, device = data, args, data.obs.device
        torch.manual_seed(args.seed)
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.critic = MLP(2, task.obs_dim + task.act_dim, args.critic_width).to(device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.value = MLP(1, task.obs_dim, args.critic_width).to(device)  # V(s), used by IQL only
        self.opt = torch.optim.Adam([*self.critic.parameters(), *self.value.parameters()], lr=args.lr, fused=True)
        self.parts = dict(critic=self.critic, target_critic=self.target_critic, value=self.value, opt=self.opt)

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
        rows = rows[:: max(1, -(-len(rows) // 100_000))]  # a fixed, even choice
        parts = [learner.critic(data.obs[i], data.act[i]).amin(dim=0) for i in rows.split(4096)]
        return torch.cat(parts).cpu().double(), data.returns[rows].cpu().double()

    q, returns = q_of(data.known)
    q_of_all, _ = q_of(torch.arange(len(data.reward), device=data.obs.device))
    return {
        "q_mean": float(q.mean()) if len(q) else None,
        "return_mean": float(returns.mean()) if len(q) else None,
        "spearman_q_vs_return": rank_correlation(q, returns),
        # about as well as an exact critic would rank episodes by their plain returns, which stage 2 conditions on
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


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    task, device = parse_env(args.env), pick_device(args.device)
    args = resolve(args, task, device)
    dataset = read_dataset(task, args.dataset_path)
    not_of_the_run = ("dataset_path", "runs_dir", "track", "checkpoint_minutes")
    identity = {name: x for name, x in vars(args).items() if name not in not_of_the_run} | {"data": dataset.digest}
    folder = Path(args.runs_dir) / f"{task.folder}__{args.exp_name}__{args.seed}"
    if load_own(folder / "critic.pt", "pretrain_q", identity):
        return print(f"{folder}/critic.pt is finished; nothing to do (another run: --exp-name)")
    state = load_own(folder / "resume.pt", "pretrain_q", identity)
    data = Transitions(dataset, task, device, args.gamma)
    if not len(data.usable):
        fail(f"{dataset.label}: no transition with a successor or a terminal in it; the critic needs longer episodes")

    with claim(folder) as stack:
        if args.track:
            track(args, folder)
        learner = Pretraining(task, data, args)
        sums = torch.zeros(3, device=device)  # of the metrics since the last row of metrics.csv
        step, rows = 0, []  # of metrics.csv
        if state:
            step, rows = restore(state, folder / "resume.pt", learner, sums, args.total_steps, ("step", "rows"))
        print(f"{folder}: {dataset.label}, {len(data.usable):,} training transitions, {args.method}, step {step:,}")
        if args.warm_start_steps:
            print(f"the first {args.warm_start_steps:,} steps regress on discounted returns, unlike the paper's")
        metrics, saved = Log(folder, "metrics", rows), time.monotonic()
        bar = tqdm(
            total=args.total_steps, initial=step, unit="step", desc=args.method, dynamic_ncols=True, disable=None
        )
        stack.enter_context(bar)

        def save() -> None:
            counters = dict(step=step, rows=rows)
            save_resume(folder, dict(stage="pretrain_q", config=identity, counters=counters), learner, sums)

        while step < args.total_steps:
            sums += learner.step(step)
            step += 1
            bar.update()
            if step % LOG_EVERY == 0 or step == args.total_steps:
                check_finite(learner, sums, step)
                steps = (step - 1) % LOG_EVERY + 1  # since the last row
                means = dict(zip(learner.metrics, (sums / steps).tolist()))
                metrics.write({"step": step, **means})
                bar.set_postfix_str(" ".join(f"{name} {x:.3g}" for name, x in means.items()))
                sums.zero_()
            if time.monotonic() - saved > args.checkpoint_minutes * 60:
                save()
                saved = time.monotonic()
        save()
        result = report(learner)
        named = {"env": args.env, "data": dataset.summary(), "config": identity}
        write_file(folder / "report.json", (json.dumps(named | result, indent=2) + "\n").encode())
        content = dict(stage="pretrain_q", config=identity, data=dataset.summary(), report=result)
        save_checkpoint(folder / "critic.pt", content | {"critic": learner.critic.state_dict()})
    if result["q_mean"] is not None:
        returns = f"mean discounted return of the same transitions {result['return_mean']:.2f}"
        print(f"mean Q {result['q_mean']:.2f}, {returns}")
    print(f"{folder}/critic.pt; rank correlations in {folder}/report.json")


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


if __name__ == "__main__":
    run(main)
