"""Stage 0 of Q-Align DT: make a dataset by D4RL's recipe where D4RL's own cannot be had.

    python collect_dataset.py --env-id Hopper-v4 --out-dir data

Trains soft actor-critic online (SAC, Haarnoja et al. 2018), one gradient step per environment step, keeps the policy of
every evaluation, and records
    random         the untrained policy
    medium-replay  the replay buffer up to the medium policy
    medium         the first evaluated policy above a third of the expert's return (or --medium-return)
    expert         the best evaluated policy: mean return of 10 episodes without noise
    medium-expert  both, one after the other
    mini           episodes of all evaluated policies whose returns spread evenly from the lowest to the highest

as <out-dir>/<body>-<quality>-local.hdf5 (mini: <body>-mini.hdf5), which the other stages take as --env hopper-medium-local.
Recorded policies act by sampling, as D4RL's do. This is your own data, not D4RL's. It runs on the CPU: the networks are small.
Order of the file: Args, the environments, SAC, main, recording; then the blocks this file shares with the other stages.
"""

import copy
import csv
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

Quality = Literal["random", "medium-replay", "medium", "expert", "medium-expert", "mini"]


@dataclass
class Args:
    env_id: str = "Hopper-v4"
    """Gymnasium's name; v4 of Hopper, HalfCheetah, Walker2d and Ant is what the other stages know, and fast"""
    seed: int = 1
    """seed of the networks, the actions and the episodes"""
    qualities: tuple[Quality, ...] = ("random", "medium-replay", "medium", "expert", "medium-expert")
    """which files to write; the training is the same for all"""
    transitions: int = 1_000_000
    """at least so many per file, in whole episodes (medium-expert: of each; mini: at most; medium-replay: as there are)"""
    total_steps: int = 1_000_000
    """environment steps of training; a finished run goes on where this is raised (new levels need a new --out-dir)"""
    medium_return: float | None = None
    """raw return that makes a policy "medium" (None: a third of the expert's)"""
    num_envs: int = 8
    """environments that train in lockstep"""
    out_dir: str = "data"
    """folder of the datasets; the other stages look into data/ beside them"""
    runs_dir: str = "runs"
    """folder of all runs: networks, replay buffer, policies"""
    exp_name: str = "collect_dataset"
    """name of this experiment; the run folder is <runs-dir>/<env-id>__<exp-name>__<seed>"""


# CleanRL's settings of SAC for MuJoCo. With the SAC paper's 3e-4 for the critic and alpha as well, seed 1 of Hopper still
# made one hop and fell (return 320) after 110,000 steps; with these it was at 1,800 after 65,000.
GAMMA, TAU, WIDTH, BATCH = 0.99, 0.005, 256, 256
ACTOR_LR, CRITIC_LR, ALPHA_LR = 3e-4, 1e-3, 1e-3
START = 5_000  # steps of uniformly random actions, before the first gradient step
EVAL_EVERY, EVAL_EPISODES, LOG_EVERY = 5_000, 10, 1_000  # in environment steps; an evaluation acts without noise
RECORD_ENVS = 64  # episodes recorded in lockstep
D4RL_KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")
MINI_POOL, MINI_BINS = 10, 20  # mini records MINI_POOL times --transitions, and draws from MINI_BINS bins of return


class Episodes:
    """n environments in lockstep, each playing one episode after the other.

    Episodes are numbered in the order they begin, and number k starts from env.reset(seed=first_seed + k): with these two
    rules a run can be continued from its recorded actions. Bodies that the other stages know run in Simulator, every other
    environment in gymnasium.vector.
    """

    def __init__(self, env_id: str, n: int, first_seed: int):
        self.first_seed, self.begun = first_seed, n
        self.number, self.t = np.arange(n), np.zeros(n, np.int64)  # of the running episodes; steps played so far
        self.lockstep = env_id in BODY_IDS
        if self.lockstep:
            self.envs = Simulator(env_id, [first_seed + k for k in range(n)])
            self.obs, space = self.envs.observe(range(n)), self.envs.env.action_space  # (n, obs_dim)
        else:
            manual = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED}
            self.envs = gymnasium.make_vec(env_id, n, "sync", manual)
            self.obs, space = None, self.envs.single_action_space
            self.reset(range(n))
        self.low, self.high = np.float32(space.low), np.float32(space.high)  # (act_dim,)
        columns = [("observations", np.float32, self.obs.shape[1:]), ("actions", np.float32, space.shape)]
        columns += [("rewards", np.float32), ("terminals", bool), ("timeouts", bool), ("episode", np.int32)]
        self.row = np.dtype(columns)  # a transition, under D4RL's keys

    def reset(self, index) -> None:
        seeds = [self.first_seed + int(k) for k in self.number]
        if self.lockstep:
            self.envs.reset(index, [seeds[i] for i in index])
            self.obs[index] = self.envs.observe(index)
        else:
            mask = np.isin(np.arange(len(seeds)), index)
            self.obs, _ = self.envs.reset(seed=seeds, options={"reset_mask": mask})

    def play(self, actions: np.ndarray):
        """env.step of each environment with actions (n, act_dim): rewards, terminated, truncated, each (n,)."""
        if not self.lockstep:
            self.obs, *result, _ = self.envs.step(actions)
            return result
        self.obs, reward, terminated, _ = self.envs.step(range(len(actions)), actions.astype(np.float64))
        return reward, terminated, self.t + 1 == HORIZON

    def step(self, actions: np.ndarray) -> np.ndarray:
        """The n transitions of actions (n, act_dim) float32. Where an episode has ended the next one is begun."""
        rows = np.empty(len(actions), self.row)
        rows["observations"], rows["actions"], rows["episode"] = self.obs, actions, self.number
        rows["rewards"], terminated, truncated = self.play(actions)
        rows["terminals"], rows["timeouts"] = terminated, truncated & ~terminated
        self.t += 1
        self.begin(np.flatnonzero(terminated | truncated))
        return rows

    def begin(self, index) -> None:
        """The next episodes, in the environments `index`."""
        self.number[index] = self.begun + np.arange(len(index))
        self.begun += len(index)
        self.t[index] = 0
        if len(index):
            self.reset(index)

    def replay(self, rows: np.ndarray) -> None:
        """Bring the environments to where they were after rows (T, n), by playing what of them belongs to running episodes."""
        self.number = rows["episode"][-1].astype(np.int64)
        self.begun = int(self.number.max()) + 1
        self.reset(range(len(self.number)))
        self.t = (rows["episode"] == self.number).sum(axis=0)
        for k in range(self.t.max(), 0, -1):  # the k-th last step
            self.play(np.where((self.t >= k)[:, None], rows["actions"][-k], self.low))
            if len(waiting := np.flatnonzero(self.t < k)):  # episodes that begin later are held at their start
                self.reset(waiting)
        self.begin(np.flatnonzero(rows["terminals"][-1] | rows["timeouts"][-1]))

    def close(self) -> None:
        self.envs.close()


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, outputs)
    )


class Actor(nn.Module):
    """pi(a | s): a Gaussian squashed by tanh, stretched to the environment's bounds. Observations are raw."""

    def __init__(self, obs_dim: int, low: np.ndarray, high: np.ndarray):
        super().__init__()
        self.net = mlp(obs_dim, 2 * len(low))
        self.register_buffer("scale", torch.as_tensor((high - low) / 2, dtype=torch.float32))
        self.register_buffer("middle", torch.as_tensor((high + low) / 2, dtype=torch.float32))

    def forward(self, obs, generator):
        """Sampled actions (B, act_dim) and the log-density (B,) of their unstretched values."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        log_std = log_std.clamp(-20, 2)
        noise = torch.randn(mean.shape, generator=generator)
        u = mean + log_std.exp() * noise
        log_density = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_jacobian = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2), without cancellation
        return self.middle + self.scale * torch.tanh(u), (log_density - log_jacobian).sum(dim=-1)

    @torch.no_grad()
    def act(self, obs: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        """(n, act_dim) float32 actions for raw observations (n, obs_dim): sampled, or without noise if generator is None."""
        obs = torch.as_tensor(obs, dtype=torch.float32)
        if generator:
            return self(obs, generator)[0].numpy()
        return (self.middle + self.scale * torch.tanh(self.net(obs).chunk(2, dim=-1)[0])).numpy()


class TwinQ(nn.Module):
    """Two independent Q(s, a); returns (2, B)."""

    def __init__(self, obs_dim: int, act_dim: int):
        super().__init__()
        self.q1, self.q2 = mlp(obs_dim + act_dim, 1), mlp(obs_dim + act_dim, 1)

    def forward(self, obs, act):
        x = torch.cat([obs, act], dim=-1)
        return torch.stack([self.q1(x), self.q2(x)]).squeeze(-1)


class Agent(nn.Module):
    def __init__(self, obs_dim: int, low: np.ndarray, high: np.ndarray):
        super().__init__()
        self.actor, self.critic = Actor(obs_dim, low, high), TwinQ(obs_dim, len(low))
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))  # of the entropy's weight
        self.target_entropy = -len(low)


class Batch(NamedTuple):
    obs: torch.Tensor  # (B, obs_dim)
    act: torch.Tensor  # (B, act_dim)
    reward: torch.Tensor  # (B,)
    terminal: torch.Tensor  # (B,) bool
    timeout: torch.Tensor  # (B,) bool
    next_obs: torch.Tensor  # (B, obs_dim); of another episode where terminal or timeout


def sample_batch(replay: np.ndarray, step: int, num_envs: int, generator: torch.Generator) -> Batch:
    """Uniform from the first `step` transitions, which interleave num_envs environments: the next row is num_envs on."""
    i = torch.randint(step - num_envs, (BATCH,), generator=generator).numpy()
    rows, following = replay[i], replay["observations"][i + num_envs]
    columns = [np.ascontiguousarray(rows[key]) for key in D4RL_KEYS]
    return Batch(*map(torch.from_numpy, (*columns, following)))


def critic_loss(agent: Agent, batch: Batch, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """MSE of both Q to r + gamma (1 - terminal) (min_m Q'_m(s', a') - alpha log pi(a' | s')), and the mean of Q_1.

    A transition cut by the time limit has no s' in the buffer and is left out.
    """
    with torch.no_grad():
        next_act, log_pi = agent.actor(batch.next_obs, generator)
        q_next = agent.target_critic(batch.next_obs, next_act).amin(dim=0) - agent.log_alpha.exp() * log_pi
        y = batch.reward + GAMMA * ~batch.terminal * q_next
    q = agent.critic(batch.obs, batch.act)
    return (~batch.timeout * (q - y) ** 2).mean(dim=1).sum(), q[0].detach().mean()


def actor_loss(agent: Agent, batch: Batch, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of alpha log pi(a | s) - min_m Q_m(s, a) over sampled actions a, and the mean of log pi."""
    act, log_pi = agent.actor(batch.obs, generator)
    loss = agent.log_alpha.exp().detach() * log_pi - agent.critic(batch.obs, act).amin(dim=0)
    return loss.mean(), log_pi.detach().mean()


def temperature_loss(agent: Agent, log_pi: torch.Tensor) -> torch.Tensor:
    """Raises alpha while the policy's entropy is below its target, -act_dim."""
    return -agent.log_alpha.exp() * (log_pi + agent.target_entropy)


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    args = tyro.cli(Args, description=__doc__)
    check(args)
    n, files = args.num_envs, {quality: dataset_file(args, quality) for quality in args.qualities}
    cfg = dict(env_id=args.env_id, seed=args.seed, num_envs=n, exp_name=args.exp_name)
    cfg |= dict(gymnasium=gymnasium.__version__, mujoco=mujoco.__version__)  # another simulator is another run
    for quality, path in files.items():
        is_there(path, cfg | attributes_of(args, quality))  # refuses another run's file before the training, not after
    folder = Path(args.runs_dir) / f"{args.env_id.replace('/', '_')}__{args.exp_name}__{args.seed}"
    lock = claim(folder)
    state = check_same_run(folder, "resume.pt", "collect_dataset", cfg, None)
    envs = Episodes(args.env_id, n, args.seed * 10**18)

    torch.manual_seed(args.seed)
    agent = Agent(envs.obs.shape[1], envs.low, envs.high)
    actor_opt = torch.optim.Adam(agent.actor.parameters(), lr=ACTOR_LR, fused=True)
    critic_opt = torch.optim.Adam(agent.critic.parameters(), lr=CRITIC_LR, fused=True)
    alpha_opt = torch.optim.Adam([agent.log_alpha], lr=ALPHA_LR, fused=True)
    parts = dict(agent=agent, actor_opt=actor_opt, critic_opt=critic_opt, alpha_opt=alpha_opt)
    generator = torch.Generator().manual_seed(args.seed)
    meters = Meters(["q_loss", "actor_loss", "q_mean", "alpha"], torch.device("cpu"))
    step, evaluations = 0, {}  # environment steps; step -> mean return of the policy without noise
    try:
        replay = np.zeros(max(args.total_steps, state["step"] if state else 0) + n, envs.row)
    except MemoryError:
        fail(f"--total-steps {args.total_steps:,}: a replay buffer of so many transitions does not fit into memory")
    how = "in lockstep" if envs.lockstep else f"in gymnasium.vector (slower than {', '.join(BODY_IDS)})"
    print(f"{folder}: SAC on {args.env_id}, {args.total_steps:,} steps, {n} environments {how}")
    if state:
        restore(state, parts, meters, generator)
        step, evaluations = state["step"], state["evaluations"]
        read_replay(folder, replay[:step])
        if 0 < step < args.total_steps:
            envs.replay(replay[:step].reshape(-1, n))
    saved = step  # so many rows are in replay.bin
    metrics = MetricsLog(folder / "metrics.csv", ["step", *meters.names], step)
    returns = MetricsLog(folder / "evaluations.csv", ["step", "return"], max(evaluations, default=-1))
    stop = StopSignal()
    bar = tqdm(total=args.total_steps, initial=step, unit="step", desc=f"SAC {args.env_id}", dynamic_ncols=True)

    def save() -> None:
        nonlocal saved
        append_replay(folder, replay, saved, step)
        saved = step
        counters = dict(step=step, evaluations=evaluations)
        save_resume(folder, "collect_dataset", cfg, {}, parts, meters, generator, counters)

    while True:
        if step % EVAL_EVERY < n and step not in evaluations:  # the untrained policy is the first
            rows = record(agent.actor, args, None, stop, episodes=EVAL_EPISODES)
            if rows is None:
                break
            evaluations[step] = float(episode_returns(rows).mean())
            returns.write({"step": step, "return": evaluations[step]})
            (folder / "policies").mkdir(exist_ok=True)
            policy = dict(stage="collect_dataset", format=FORMAT, config=cfg, actor=agent.actor.state_dict())
            save_checkpoint(folder / "policies" / f"{step}.pt", policy)
            save()
            bar.set_postfix_str(f"return {evaluations[step]:.0f}, best {max(evaluations.values()):.0f}")
        if step >= args.total_steps or stop.requested:
            break
        if step < START:
            uniform = torch.rand(n, len(envs.low), generator=generator).numpy()
            actions = envs.low + (envs.high - envs.low) * uniform
        else:
            actions = agent.actor.act(envs.obs, generator)
        replay[step : step + n] = envs.step(actions)
        step += n
        bar.update(n)
        for _ in range(n if step > START else 0):
            batch = sample_batch(replay, step, n, generator)
            q_loss, q_mean = critic_loss(agent, batch, generator)
            descend(critic_opt, q_loss)
            agent.critic.requires_grad_(False)
            pi_loss, log_pi = actor_loss(agent, batch, generator)
            descend(actor_opt, pi_loss)
            agent.critic.requires_grad_(True)
            descend(alpha_opt, temperature_loss(agent, log_pi))
            ema_update(agent.target_critic, agent.critic, TAU)
            meters.add(torch.stack([q_loss.detach(), pi_loss.detach(), q_mean, agent.log_alpha.detach().exp()]), step)
        meters.check(bar, folder, "ACTOR_LR or CRITIC_LR in this file, under another --exp-name")
        if step % LOG_EVERY < n and meters.count:
            metrics.write({"step": step, **meters.means()})
    bar.close()
    save()
    metrics.close()
    returns.close()
    envs.close()
    jobs, problems = [], []
    if not stop.requested:
        # what is known at --total-steps; a policy that has made no gradient step is of no level
        known = {k: v for k, v in evaluations.items() if (k == 0 or k > START) and k < args.total_steps + n}
        jobs, problems = plan(args, cfg, files, known)
    for path, steps, attributes in jobs:
        quality = attributes["quality"]
        if quality == "medium-replay":
            rows = whole_episodes(replay[: steps[0]])
        else:
            rows = record_policies(folder, steps, args, quality == "mini", path.stem, stop)
        if rows is None:
            break
        if len(rows):
            write_hdf5(path, rows, attributes)
        else:
            few = "--num-envs is too large" if quality == "medium-replay" else "--transitions is too small"
            problems.append(f"{path}: no whole episode; {few}")
    else:  # not stopped while recording
        if step >= args.total_steps:
            lock.release()
            return fail("; ".join(problems), code=1) if problems else None
    print(f"stopped at step {step:,} of {args.total_steps:,}; the same command continues from there")
    sys.exit(130)


def descend(opt: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    opt.zero_grad()
    loss.backward()
    opt.step()


def choose_levels(evaluations: dict[int, float], medium_return: float | None) -> dict[str, int]:
    """The training steps of the random, medium and expert policy, from the evaluated return at each step.

    Medium is left out if no policy reached medium_return. Its default is a third of the expert's return, counted from the
    untrained policy's where that is negative.
    """
    trained = [step for step in evaluations if step > 0]
    expert = max(trained, key=evaluations.get)
    if medium_return is None:
        base, best = min(evaluations[0], evaluations[expert], 0), evaluations[expert]
        medium_return = base + (best - base) / 3
    medium = [step for step in trained if evaluations[step] >= medium_return][:1]
    return dict(random=0, expert=expert, **({"medium": medium[0]} if medium else {}))


def attributes_of(args: Args, quality: str) -> dict:
    """What of a file is known before the training."""
    return dict(quality=quality) | ({} if quality == "medium-replay" else dict(transitions=args.transitions))


def plan(args: Args, cfg: dict, files: dict, evaluations: dict[int, float]) -> tuple[list, list[str]]:
    """What to record: (path, training steps of its policies, attributes) of each file that is not there yet.

    And a line if there is no medium policy for some. Exits 2 if a file is there and of other policies.
    """
    levels, jobs, missing = choose_levels(evaluations, args.medium_return), [], []
    for quality, path in files.items():
        needs = {"medium-replay": ["medium"], "medium-expert": ["medium", "expert"]}.get(quality, [quality])
        if quality != "mini" and not set(needs) <= levels.keys():
            missing.append(quality)
            continue
        steps = list(evaluations) if quality == "mini" else [levels[level] for level in needs]
        policies = dict(policy_step=steps, policy_return=[evaluations[k] for k in steps])
        attributes = cfg | attributes_of(args, quality) | policies
        if is_there(path, attributes):
            print(f"{path} is there already")
        else:
            jobs.append((path, steps, attributes))
    if not missing:
        return jobs, []
    best = levels["expert"]
    return jobs, [
        f"--medium-return {args.medium_return:g} was never reached (best: {evaluations[best]:.0f} at step {best:,}), so "
        f"{', '.join(missing)} could not be made; all else is kept, and a larger --total-steps trains on from here"
    ]


def episode_returns(rows: np.ndarray) -> np.ndarray:
    """(E,) raw return of each episode, of rows that hold whole episodes one after the other."""
    ends = np.flatnonzero(rows["terminals"] | rows["timeouts"]) + 1
    return np.add.reduceat(rows["rewards"], np.append(0, ends[:-1]), dtype=np.float64)


def whole_episodes(rows: np.ndarray) -> np.ndarray:
    """Interleaved rows, put into episodes in the order they began; those that have not ended are dropped."""
    ended = rows["episode"][rows["terminals"] | rows["timeouts"]]
    rows = rows[np.isin(rows["episode"], ended)]
    return rows[np.argsort(rows["episode"], kind="stable")]


def record(
    actor: Actor, args: Args, step: int | None, stop: "StopSignal", episodes=0, transitions=0, bar=None
) -> np.ndarray | None:
    """Whole episodes of the policy of training step `step`, acting by sampling; None: an evaluation, without noise.

    They are the first in the order they begin (not: end, those would be the short ones) that are at least so many and
    hold at least so many transitions. None if `stop` was requested.
    """
    # the training's episodes have the seeds 10**18 seed + 0, 1, ...; those of an evaluation and of each policy follow
    seed = args.seed * 10**18 + (1 if step is None else step + 2) * 10**9
    n = episodes or min(RECORD_ENVS, -(-transitions // HORIZON))
    envs = Episodes(args.env_id, n, seed)
    generator = None if step is None else torch.Generator().manual_seed(seed % 2**63)
    blocks, lengths, whole, total = [], {}, 0, 0
    while whole < episodes or total < transitions:
        played = envs.t + 1
        rows = envs.step(actor.act(envs.obs, generator))
        blocks.append(rows)
        ended = rows["terminals"] | rows["timeouts"]
        lengths.update(zip(rows["episode"][ended].tolist(), played[ended].tolist()))
        while whole in lengths and (whole < episodes or total < transitions):
            total += lengths[whole]
            whole += 1
            if bar is not None:
                bar.update(lengths[whole - 1])
        if stop.requested:
            return None
    envs.close()
    rows = np.concatenate(blocks)
    return whole_episodes(rows[rows["episode"] < whole])


def record_policies(folder: Path, steps: list[int], args: Args, spread: bool, name: str, stop) -> np.ndarray | None:
    """Rows of the policies of some training steps, one after the other; `spread`: chosen from MINI_POOL times as many."""
    each = -(-MINI_POOL * args.transitions // len(steps)) if spread else args.transitions
    parts = []
    with tqdm(total=each * len(steps), unit="transition", desc=name, dynamic_ncols=True) as bar:
        for step in steps:
            actor = load_actor(folder / "policies" / f"{step}.pt")
            parts.append(record(actor, args, step, stop, transitions=each, bar=bar))
            if stop.requested:
                return None
    return spread_evenly(np.concatenate(parts), args.transitions) if spread else np.concatenate(parts)


def spread_evenly(rows: np.ndarray, transitions: int) -> np.ndarray:
    """At most so many of the rows: whole episodes drawn in turn from MINI_BINS equal bins of return, until full."""
    ends, returns = np.flatnonzero(rows["terminals"] | rows["timeouts"]) + 1, episode_returns(rows)
    lengths = np.diff(ends, prepend=0)
    order = np.random.default_rng(0).permutation(len(ends))
    bin_of = np.digitize(returns[order], np.linspace(returns.min(), returns.max(), MINI_BINS + 1)[1:-1])
    turn = np.empty(len(order), np.int64)  # how many of the same bin come before
    for k in range(MINI_BINS):
        turn[bin_of == k] = np.arange((bin_of == k).sum())
    order = order[np.argsort(turn, kind="stable")]
    chosen = order[np.cumsum(lengths[order]) <= transitions]
    return rows[np.repeat(np.isin(np.arange(len(ends)), chosen), lengths)]


def append_replay(folder: Path, replay: np.ndarray, start: int, stop: int) -> None:
    """Write rows start to stop of the replay buffer to their place in replay.bin: whatever comes after them is cut off."""
    with open(folder / "replay.bin", "r+b" if start else "wb") as f:
        f.truncate(start * replay.itemsize)
        f.seek(0, os.SEEK_END)
        f.write(replay[start:stop].tobytes())


def read_replay(folder: Path, replay: np.ndarray) -> None:
    """Fill the rows of `replay` from replay.bin; exits 2 if it has fewer."""
    path = folder / "replay.bin"
    found = np.fromfile(path, replay.dtype, len(replay)) if path.exists() else ()
    if len(found) < len(replay):
        fail(f"{path}: {len(found):,} rows, resume.pt needs {len(replay):,}; remove the folder to train anew")
    replay[:] = found


def load_actor(path: Path) -> Actor:
    state = load_checkpoint(path, "collect_dataset")["actor"]
    bounds = np.zeros(len(state["scale"]))  # the real ones are in the state
    actor = Actor(state["net.0.weight"].shape[1], bounds, bounds)
    actor.load_state_dict(state)
    return actor


def dataset_file(args: Args, quality: str) -> Path:
    name = BODY_IDS.get(args.env_id) or re.sub(r"[^a-z0-9]+", "_", args.env_id.lower())
    return Path(args.out_dir) / (f"{name}-mini.hdf5" if quality == "mini" else f"{name}-{quality}-local.hdf5")


def is_there(path: Path, attributes: dict) -> bool:
    """Whether the file is there, with these attributes; exits 2 if it is there with others: nothing is overwritten."""
    if not path.exists():
        return False
    try:
        with h5py.File(path, "r") as f:
            found = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in f.attrs.items()}
    except OSError:
        found = {}
    differs = [f"{k} {found.get(k)!s:.60} there, {v!s:.60} here" for k, v in attributes.items() if found.get(k) != v]
    if differs:
        fail(f"{path} is there and was made otherwise ({differs[0]}); remove it, or choose another --out-dir")
    return True


def write_hdf5(path: Path, rows: np.ndarray, attributes: dict) -> None:
    """D4RL's keys and some attributes; the file appears when it is whole. Says what is in it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with h5py.File(part, "w") as f:
        for key in D4RL_KEYS:
            f.create_dataset(key, data=rows[key], compression="gzip", shuffle=True)
        f.attrs.update(attributes)
        f.attrs["command"] = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    if path.exists():  # it was not when this process began
        part.unlink()
        fail(f"{path} is there by now: another process has written it; choose another --out-dir")
    os.replace(part, path)
    found = episode_returns(rows)
    print(f"{path}: {len(rows):,} transitions, {len(found):,} episodes, mean return {found.mean():.0f}")
    counts, edges = np.histogram(found)
    print(f"  episodes per tenth of the range {edges[0]:.0f} .. {edges[-1]:.0f}: {' '.join(map(str, counts))}")


def check(args: Args) -> None:
    """Exits 2 on arguments that cannot work, with one line."""
    check_seed(args.seed)
    if not args.qualities:
        fail("--qualities: name at least one")
    if args.transitions < 1:
        fail(f"--transitions {args.transitions}: must be at least 1")
    if not 1 <= args.num_envs <= LOG_EVERY:
        fail(f"--num-envs {args.num_envs}: must be between 1 and {LOG_EVERY:,}")
    first = (START // EVAL_EVERY + 1) * EVAL_EVERY
    if args.total_steps < first:
        fail(
            f"--total-steps {args.total_steps}: must be at least {first:,}, where the first trained policy is evaluated"
        )
    try:
        Path(args.out_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out_dir).close()
    except OSError as error:
        fail(f"--out-dir {args.out_dir}: cannot write there ({error.strerror}); choose another")
    try:
        with warnings.catch_warnings(action="ignore"):
            env, limit = make_env(args.env_id), gymnasium.spec(args.env_id).max_episode_steps
    except Exception as error:  # an unknown name, a package that is missing, an XML file MuJoCo no longer reads
        fail(f"--env-id {args.env_id}: {' '.join(str(error).split())}")
    obs, act = env.observation_space, env.action_space
    box = gymnasium.spaces.Box
    if not isinstance(obs, box) or not isinstance(act, box) or len(obs.shape) != 1 or len(act.shape) != 1:
        fail(f"--env-id {args.env_id}: observations {obs} and actions {act}; SAC here needs a vector of each, in R")
    if not np.isfinite([act.low, act.high]).all():
        fail(f"--env-id {args.env_id}: actions {act} are unbounded")
    if not limit:
        fail(f"--env-id {args.env_id}: no time limit, so episodes may never end; register it with max_episode_steps")
    env.close()


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


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", code=130)
