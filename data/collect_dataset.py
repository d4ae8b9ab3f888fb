"""Stage 0 of Q-Align DT: make a dataset by D4RL's recipe where D4RL's own cannot be had.

    python data/collect_dataset.py --env-id Hopper-v4

Trains soft actor-critic (SAC, Haarnoja et al. 2018), one gradient step per environment step, keeps every evaluated
policy, and records, as <body>-<quality>-local.hdf5 (mini: <body>-mini.hdf5; other stages take the name as --env):
    random         the untrained policy
    medium-replay  the replay buffer up to the medium policy
    medium         the first policy with a third of the expert's return (or --medium-return)
    expert         the best policy: mean return of 10 episodes without noise
    medium-expert  both, one after the other
    mini           episodes of all policies whose returns spread evenly from the lowest to the highest
Recorded policies act by sampling, as D4RL's do. This is your own data, not D4RL's. Runs on the CPU: the networks are
small. Stop it at any time, even with kill -9: the same command resumes, at the last evaluated policy.
"""

import contextlib
import copy
import importlib.metadata
import importlib.util
import io
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # while modules load
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"error: interrupted\n"), os._exit(130)))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch's waiting threads keep the cores busy beside other work

import gymnasium
import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # stage 2, for how a run is kept and resumed
from train_qalign_dt import (
    Float,
    Int,
    Log,
    Str,
    check_args,
    check_finite,
    claim,
    ema_update,
    fail,
    load_checkpoint,
    load_own,
    one_line,
    progress_bar,
    restore,
    run,
    save_checkpoint,
    save_resume,
    write_file,
)

HORIZON = 1000  # steps after which Gymnasium cuts an episode
Quality = Literal["random", "medium-replay", "medium", "expert", "medium-expert", "mini"]


@dataclass(frozen=True)
class Args:
    env_id: str = "Hopper-v4"  # a Gymnasium id; v4 of Hopper, HalfCheetah, Walker2d, Ant are other stages' <body>-...
    seed: int = 1  # seed of the networks, the actions and the episodes
    # which files to write; the training is the same for all
    qualities: tuple[Quality, ...] = ("random", "medium-replay", "medium", "expert", "medium-expert")
    transitions: int = 1_000_000  # at least this many per policy, in whole episodes (mini: at most, in the file)
    total_steps: int = 1_000_000  # environment steps of training; raise it to continue a finished run
    medium_return: Float = None  # raw return that makes a policy "medium" (default: a third of the expert's)
    eval_every: Int = None  # training steps between two evaluations, whose policies are kept (default: 5,000)
    # mini: of each bin of returns, the episodes of the steadiest reward first: a return then means one speed, and not a
    # sprint and a fall
    steady: bool = False
    num_envs: int = 8  # environments that train in lockstep
    # D4RL's files, or Minari's datasets local/<body>/<quality>-v0 where Minari keeps them (pip install 'minari[hdf5]')
    format: Literal["hdf5", "minari"] = "hdf5"
    out_dir: Str = ""  # folder of the datasets (default: this script's own, where the other stages look for them)
    runs_dir: str = "runs"  # folder of all runs
    exp_name: str = "collect_dataset"  # names the run's folder: <runs-dir>/<env-id>__<exp-name>__<seed>

    def __post_init__(self):
        check_args(self, {"transitions": 1, "total_steps": 1, "num_envs": 1, "medium_return": -1e9})
        if self.eval_every is not None and self.eval_every < self.num_envs:
            raise ValueError(f"--eval-every {self.eval_every}: must be at least --num-envs, {self.num_envs}")
        every = self.eval_every or EVAL_EVERY
        if self.total_steps < (first := (START // every + 1) * every):
            raise ValueError(
                f"--total-steps {self.total_steps}: the first trained policy is evaluated at step {first:,}"
            )
        if self.num_envs > LOG_EVERY or not self.qualities:
            raise ValueError(f"--num-envs must be at most {LOG_EVERY:,}, and --qualities name at least one")


# CleanRL's settings of SAC for MuJoCo. With the SAC paper's 3e-4 for the critic and alpha too, seed 1 of Hopper still
# made one hop and fell (return 320) after 110,000 steps; with these it was at 1,800 after 65,000.
GAMMA, TAU, WIDTH, BATCH = 0.99, 0.005, 256, 256
LR = {"actor": 3e-4, "critic": 1e-3, "alpha": 1e-3}  # learning rates of Adam
START = 5_000  # environment steps of uniformly random actions, before the first gradient step
EVAL_EVERY, EVAL_EPISODES, LOG_EVERY = 5_000, 10, 1_000  # in environment steps; an evaluation acts without noise
RECORD_ENVS, MINI_POOL, MINI_BINS = 64, 10, 20  # mini draws from MINI_POOL times as much, by MINI_BINS bins of return
BODY_IDS = {"Hopper-v4": "hopper", "HalfCheetah-v4": "halfcheetah", "Walker2d-v4": "walker2d", "Ant-v4": "ant"}
D4RL_KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")


class Episodes:
    """n environments, each playing one episode after another; the k-th episode to begin has the seed first_seed + k."""

    def __init__(self, env_id: str, n: int, first_seed: int, keep_next: bool = False):
        try:
            self.envs, self.limit = [make_env(env_id) for _ in range(n)], gymnasium.spec(env_id).max_episode_steps
        except Exception as error:  # an unknown name, a package that is missing, an XML file MuJoCo no longer reads
            fail(f"--env-id {env_id}: {one_line(error)}")
        obs, act = self.envs[0].observation_space, self.envs[0].action_space
        vectors = all(isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1 for space in (obs, act))
        if not (vectors and np.isfinite([act.low, act.high]).all() and self.limit):
            fail(f"--env-id {env_id}: needs vectors, bounded actions and a time limit; has {obs}, {act}, {self.limit}")
        self.low, self.high = np.float32(act.low), np.float32(act.high)  # (act_dim,)
        self.obs = np.zeros((n, 111 if env_id == "Ant-v4" else obs.shape[0]))  # D4RL's Ant ends in 84 zeros
        scalars = [("rewards", "f4"), ("terminals", "?"), ("timeouts", "?"), ("episode", "i4")]
        scalars += [("next_observations", "f4", self.obs.shape[1])] * keep_next
        self.row = np.dtype([("observations", "f4", self.obs.shape[1]), ("actions", "f4", act.shape), *scalars])
        self.action_type = np.float64 if env_id in BODY_IDS else np.float32  # float64: rewards exactly as in stage 3
        self.first_seed, self.number, self.t = first_seed, *np.zeros((2, n), np.int64)
        for i in range(n):
            self.begin(i, i)

    def begin(self, i: int, number: int) -> None:
        obs, _ = self.envs[i].reset(seed=self.first_seed + int(number))
        self.obs[i, : len(obs)], self.number[i], self.t[i] = obs, number, 0  # t: steps of the episode so far

    def play(self, i: int, action: np.ndarray):
        """env.step of environment i: reward, terminated, cut by the time limit."""
        obs, reward, terminated, truncated, _ = self.envs[i].step(action.astype(self.action_type))
        self.obs[i, : len(obs)], self.t[i] = obs, self.t[i] + 1
        return reward, terminated, (truncated or self.t[i] == self.limit) and not terminated

    def step(self, actions: np.ndarray) -> np.ndarray:
        """The n transitions of actions (n, act_dim) float32. Where an episode has ended the next one begins."""
        rows = np.empty(len(actions), self.row)
        rows["observations"], rows["actions"], rows["episode"] = self.obs, actions, self.number
        for i, row in enumerate(rows):
            row["rewards"], row["terminals"], row["timeouts"] = self.play(i, actions[i])
            if "next_observations" in self.row.names:
                row["next_observations"] = self.obs[i]
            if row["terminals"] or row["timeouts"]:
                self.begin(i, self.number.max() + 1)
        return rows

    def replay(self, rows: np.ndarray) -> None:
        """Bring the environments to where they were after rows (T, n), by playing the running episodes again."""
        for i, last in enumerate(rows[-1]):
            self.begin(i, last["episode"])
            for action in rows["actions"][rows["episode"][:, i] == last["episode"], i]:
                self.play(i, action)
        for i in np.flatnonzero(rows["terminals"][-1] | rows["timeouts"][-1]):
            self.begin(i, self.number.max() + 1)


def mlp(d_in: int, d_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, d_out))


class Actor(nn.Module):
    """pi(a | s): a Gaussian squashed by tanh, stretched to the environment's bounds. Observations are raw."""

    def __init__(self, obs_dim: int, low: np.ndarray, high: np.ndarray):
        super().__init__()
        self.net = mlp(obs_dim, 2 * len(low))
        self.scale, self.middle = torch.as_tensor((high - low) / 2), torch.as_tensor((high + low) / 2)

    def forward(self, obs, generator):
        """Sampled actions (B, act_dim), and the log-density (B,) of the unstretched ones. No generator: no noise."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        log_std = log_std.clamp(-20, 2)
        noise = torch.randn(mean.shape, generator=generator) if generator else torch.zeros(())
        u = mean + log_std.exp() * noise
        log_density = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_jacobian = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2), without cancellation
        return self.middle + self.scale * torch.tanh(u), (log_density - log_jacobian).sum(dim=-1)

    @torch.no_grad()
    def act(self, obs: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        return self(torch.as_tensor(obs, dtype=torch.float32), generator)[0].numpy()


def q_values(critic: nn.ModuleList, obs, act) -> torch.Tensor:  # (2, B)
    return torch.stack([q(torch.cat([obs, act], dim=-1)) for q in critic]).squeeze(-1)


class SAC:
    """The actor, two critics and the temperature alpha, and one gradient step of all."""

    metrics = ("q_loss", "actor_loss", "q_mean", "alpha")

    def __init__(self, obs_dim: int, low: np.ndarray, high: np.ndarray, seed: int):
        torch.manual_seed(seed)  # torch's own generator: of the initial weights
        self.generator = torch.Generator().manual_seed(seed)  # of actions and batches
        self.actor = Actor(obs_dim, low, high)
        self.critic = nn.ModuleList([mlp(obs_dim + len(low), 1) for _ in range(2)])
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        nets = dict(actor=self.actor, critic=self.critic, alpha=nn.ParameterList([self.log_alpha]))
        self.opts = {k: torch.optim.Adam(net.parameters(), lr=LR[k], fused=True) for k, net in nets.items()}
        self.saved_state = nets | {f"{k}_opt": opt for k, opt in self.opts.items()}
        self.saved_state |= {"target_critic": self.target_critic}

    def step(self, replay: np.ndarray, num_envs: int) -> torch.Tensor:
        """One gradient step of all; returns the values of `metrics`, and a 1 that counts them (5,)."""
        # a uniform batch; the buffer interleaves num_envs environments, so next_obs is num_envs rows on
        i = torch.randint(len(replay) - num_envs, (BATCH,), generator=self.generator).numpy()
        rows, following = replay[i], replay["observations"][i + num_envs]
        arrays = map(np.ascontiguousarray, [*(rows[key] for key in D4RL_KEYS), following])
        obs, act, reward, terminal, timeout, next_obs = map(torch.from_numpy, arrays)
        with torch.no_grad():  # y = r + gamma (1 - terminal) (min_m Q'_m(s', a') - alpha log pi(a' | s'))
            next_act, log_pi = self.actor(next_obs, self.generator)
            q_next = q_values(self.target_critic, next_obs, next_act).amin(dim=0) - self.log_alpha.exp() * log_pi
            y = reward + GAMMA * ~terminal * q_next
        q = q_values(self.critic, obs, act)
        q_loss = (~timeout * (q - y) ** 2).mean(dim=1).sum()  # at a timeout the buffer has no s'
        update(self.opts["critic"], q_loss)

        self.critic.requires_grad_(False)
        act, log_pi = self.actor(obs, self.generator)
        actor_loss = (self.log_alpha.exp().detach() * log_pi - q_values(self.critic, obs, act).amin(dim=0)).mean()
        update(self.opts["actor"], actor_loss)
        self.critic.requires_grad_(True)

        # raises alpha while the policy's entropy is below its target, -act_dim
        update(self.opts["alpha"], -self.log_alpha.exp() * (log_pi.detach().mean() - act.shape[1]))
        ema_update(self.target_critic, self.critic, TAU)
        return torch.stack((q_loss, actor_loss, q[0].mean(), self.log_alpha.exp(), torch.ones(()))).detach()


def update(opt: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    opt.zero_grad()
    loss.backward()
    opt.step()


def main() -> None:
    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.DisallowNone,))
    n, out_dir = args.num_envs, Path(args.out_dir or Path(__file__).resolve().parent)
    minari = args.format == "minari"  # whose episodes hold their last observation, too
    envs = Episodes(args.env_id, n, args.seed * 10**18, keep_next=minari)
    body = BODY_IDS.get(args.env_id) or re.sub(r"[^a-z0-9]+", "_", args.env_id.lower())
    files = {q: out_dir / (f"{body}-mini.hdf5" if q == "mini" else f"{body}-{q}-local.hdf5") for q in args.qualities}
    if minari:
        if importlib.util.find_spec("minari") is None:
            fail("--format minari: pip install 'minari[hdf5]'")
        if args.env_id in BODY_IDS:
            fail(f"--format minari: name {args.env_id[:-1]}5; other stages evaluate Minari's datasets in v5")
        out_dir = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")
        body = re.sub(r"[^a-z0-9]+", "_", args.env_id.rpartition("-v")[0].lower())
        files = {q: out_dir / "local" / body / f"{q}-v0" / "data" / "main_data.hdf5" for q in args.qualities}
    identity = dict(env_id=args.env_id, seed=args.seed, num_envs=n, exp_name=args.exp_name)
    identity |= {name: importlib.metadata.version(name) for name in ("gymnasium", "mujoco")}
    identity |= {"format": "minari"} if minari else {}
    identity |= {"eval_every": args.eval_every} if args.eval_every else {}
    attributes = {q: identity | {"quality": q, "transitions": args.transitions} for q in files}
    attributes.get("medium-replay", {}).pop("transitions", None)
    attributes.get("mini", {}).update({"steady": True} if args.steady else {})
    for quality, path in files.items():  # refuses a file that was made otherwise before the training, not after
        is_there(path, attributes[quality])
    out_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(out_dir, os.W_OK):
        fail(f"--out-dir {out_dir}: cannot write there; choose another")
    folder = Path(args.runs_dir) / f"{args.env_id.replace('/', '_')}__{args.exp_name}__{args.seed}"

    with claim(folder):
        learner, done = SAC(envs.obs.shape[1], envs.low, envs.high, args.seed), Progress()
        sums = torch.zeros(len(learner.metrics) + 1)  # of learner.step() since the last row of metrics.csv
        if state := load_own(folder / "resume.pt", "collect_dataset", identity):
            done = restore(state, folder / "resume.pt", learner, sums, 10**9, Progress)
        replay = np.zeros(max(args.total_steps, done.step) + n, envs.row)
        load_replay(folder / "replay.bin", replay[: done.step], done.checksum)
        if 0 < done.step < args.total_steps:
            envs.replay(replay[: done.step].reshape(-1, n))
        print(f"{folder}: SAC on {args.env_id}, {n} environments, step {done.step:,} of {args.total_steps:,}")
        metrics, evaluations = Log(folder, "metrics", done.rows), Log(folder, "evaluations", done.returns)
        every, step = args.eval_every or EVAL_EVERY, done.step
        with progress_bar(args.total_steps, step, f"SAC {args.env_id}") as bar:
            while True:
                if step % every < n and (not done.returns or done.returns[-1]["step"] < step):  # first: untrained
                    episodes = record(learner.actor, args, None, episodes=EVAL_EPISODES)
                    evaluations.write({"step": step, "return": float(episode_returns(episodes).mean())})
                    policy = dict(stage="collect_dataset", config=identity, actor=learner.actor.state_dict())
                    save_checkpoint(folder / f"policy_{step}.pt", policy)
                    best = max(row["return"] for row in done.returns)
                    bar.set_postfix_str(f"return {done.returns[-1]['return']:.0f}, best {best:.0f}")
                if step % every < n or step >= args.total_steps:
                    done.step, done.checksum = step, save_replay(folder / "replay.bin", replay[:step])
                    save_resume(folder, dict(stage="collect_dataset", config=identity), learner, sums, done)
                if step >= args.total_steps:
                    break
                if step < START:
                    uniform = torch.rand(n, len(envs.low), generator=learner.generator).numpy()
                    actions = envs.low + (envs.high - envs.low) * uniform
                else:
                    actions = learner.actor.act(envs.obs, learner.generator)
                replay[step : step + n] = envs.step(actions)
                step += n
                bar.update(n)
                for _ in range(n if step > START else 0):
                    sums += learner.step(replay[:step], n)
                if step % LOG_EVERY < n and sums[-1] > 0:
                    check_finite(learner, sums, step)
                    metrics.write({"step": step, **dict(zip(learner.metrics, (sums / sums[-1]).tolist()))})
                    sums.zero_()

        known = {row["step"]: row["return"] for row in done.returns if row["step"] < args.total_steps + n}
        policies, problems = choose_policies(known, args.medium_return), []  # as of --total-steps, if the run is longer
        for quality, path in files.items():
            steps = policies[quality]
            attributes[quality] |= dict(policy_step=steps, policy_return=[known[k] for k in steps])
            if not steps:
                problems.append(f"{path}: no policy reached --medium-return {args.medium_return:g}")
            elif is_there(path, attributes[quality]):
                print(f"{path} is there already")
            elif len(found := collect(quality, steps, replay, folder, learner.actor, args)):
                (write_minari if minari else write_hdf5)(path, found, attributes[quality])
                describe(path, found)
            else:
                problems.append(f"{path}: no whole episode; try a larger --transitions or a smaller --num-envs")
    if problems:
        fail("; ".join(problems), code=1)


@dataclass
class Progress:
    """How far a run is: what resume.pt holds beside networks, optimisers and random streams."""

    step: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)  # of metrics.csv
    returns: list[dict[str, float]] = field(default_factory=list)  # of evaluations.csv
    checksum: int = 0  # of replay.bin


def choose_policies(returns: dict[int, float], medium_return: float | None) -> dict[str, list[int]]:
    """The training steps of each quality's policies, from the evaluated return at each step; [] if none is medium."""
    trained = [step for step in returns if step > START]
    expert = max(trained, key=returns.get)
    if medium_return is None:  # a third of the expert's, counted from the untrained policy's where that is negative
        base = min(returns[0], returns[expert], 0)
        medium_return = base + (returns[expert] - base) / 3
    medium = [step for step in trained if returns[step] >= medium_return][:1]
    steps = {"random": [0], "medium-replay": medium, "medium": medium, "expert": [expert], "mini": [0, *trained]}
    return steps | {"medium-expert": [*medium, expert] if medium else []}


def collect(quality: str, steps: list[int], replay: np.ndarray, folder: Path, actor: Actor, args: Args) -> np.ndarray:
    """The transitions of a file: of the policies of some training steps, or of the replay buffer."""
    if quality == "medium-replay":
        return whole_episodes(replay[: steps[0]])
    each = math.ceil(MINI_POOL * args.transitions / len(steps)) if quality == "mini" else args.transitions
    parts = []
    for step in steps:
        actor.load_state_dict(load_checkpoint(folder / f"policy_{step}.pt", "collect_dataset")["actor"])
        parts.append(record(actor, args, step, transitions=each))
    rows = np.concatenate(parts)
    return spread_evenly(rows, args.transitions, args.steady) if quality == "mini" else rows


def record(actor: Actor, args: Args, step: int | None, episodes=0, transitions=0) -> np.ndarray:
    """The first whole episodes to begin (not to end: those are short) of one policy; step None: without noise."""
    # the training's episodes have the seeds 10**18 seed + 0, 1, ...; those of an evaluation and of each policy follow
    seed = args.seed * 10**18 + (1 if step is None else step + 2) * 10**9
    n, keep_next = episodes or min(RECORD_ENVS, math.ceil(transitions / HORIZON)), args.format == "minari"
    envs = Episodes(args.env_id, n, seed, keep_next)
    generator = None if step is None else torch.Generator().manual_seed(seed % 2**63)
    blocks, lengths, whole, total = [], {}, 0, 0  # the first `whole` episodes have ended and hold `total` transitions
    shown = dict(desc=f"policy of step {step}", disable=step is None or None, leave=False, dynamic_ncols=True)
    bar = tqdm(total=transitions, **shown)
    while whole < episodes or total < transitions:
        lengths.update(zip(envs.number.tolist(), (envs.t + 1).tolist()))
        blocks.append(envs.step(actor.act(envs.obs, generator)))
        while whole < envs.number.min() and (whole < episodes or total < transitions):
            total += lengths[whole]
            whole += 1
        bar.update(total - bar.n)
    bar.close()
    return whole_episodes(np.concatenate([rows[rows["episode"] < whole] for rows in blocks]))


def whole_episodes(rows: np.ndarray) -> np.ndarray:
    """Interleaved rows, put into episodes in the order they began; those that have not ended are dropped."""
    ended = rows["episode"][rows["terminals"] | rows["timeouts"]]
    rows = rows[np.isin(rows["episode"], ended)]
    return rows[np.argsort(rows["episode"], kind="stable")]


def episode_returns(rows: np.ndarray) -> np.ndarray:
    """(E,) raw return of each episode, of rows that hold whole episodes one after the other."""
    ends = np.flatnonzero(rows["terminals"] | rows["timeouts"]) + 1
    return np.add.reduceat(rows["rewards"], np.append(0, ends[:-1]), dtype=np.float64)


def spread_evenly(rows: np.ndarray, transitions: int, steady: bool = False) -> np.ndarray:
    """At most so many of the rows: whole episodes drawn in turn from MINI_BINS equal bins of return, until full.

    steady: in a bin, first those whose mean reward differs least between the fifths of the episode.
    """
    ends, returns = np.flatnonzero(rows["terminals"] | rows["timeouts"]) + 1, episode_returns(rows)
    lengths = np.diff(ends, prepend=0)
    order = np.random.default_rng(0).permutation(len(ends))
    if steady:
        fifths = [np.array_split(rewards, min(5, len(rewards))) for rewards in np.split(rows["rewards"], ends[:-1])]
        order = np.argsort([np.std([part.mean() for part in parts]) for parts in fifths], kind="stable")
    bin_of = np.digitize(returns[order], np.linspace(returns.min(), returns.max(), MINI_BINS + 1)[1:-1])
    turn = [(bin_of[:j] == bin_of[j]).sum() for j in range(len(bin_of))]  # how many of the same bin come before
    order = order[np.argsort(turn, kind="stable")]
    chosen = order[np.cumsum(lengths[order]) <= transitions]
    return rows[np.repeat(np.isin(np.arange(len(ends)), chosen), lengths)]


def save_replay(path: Path, replay: np.ndarray) -> int:
    """Append what replay.bin does not have yet; returns the checksum of all."""
    with open(path, "ab") as f:
        f.write(replay[f.tell() // replay.itemsize :].tobytes())
        f.flush()
        os.fsync(f.fileno())
    return zlib.crc32(replay)


def load_replay(path: Path, replay: np.ndarray, checksum: int) -> None:
    """Fill the buffer from replay.bin, and cut off what a killed run wrote after its last checkpoint."""
    if path.is_symlink() or path.exists() and not path.is_file():
        fail(f"{path}: a link or no regular file, which would be overwritten; remove it")
    path.touch()
    found = np.fromfile(path, replay.dtype, len(replay))
    if zlib.crc32(found) != checksum:
        fail(f"{path}: damaged, not the {len(replay):,} transitions of resume.pt; remove {path.parent} to start anew")
    os.truncate(path, replay.nbytes)
    replay[:] = found


def is_there(path: Path, attributes: dict) -> bool:
    """Whether the file is there, with these attributes; exits 2 if it has others: nothing is overwritten."""
    found = {}
    with contextlib.suppress(OSError), h5py.File(path) as f:
        found = {k: np.asarray(v).tolist() for k, v in f.attrs.items()}
    differs = [f"{k} {found.get(k)!s:.60} there, {v!s:.60} here" for k, v in attributes.items() if found.get(k) != v]
    if differs and os.path.lexists(path):
        fail(f"{path} is there and was made otherwise ({differs[0]}); remove it, or choose another --out-dir")
    return not differs


def write_hdf5(path: Path, rows: np.ndarray, attributes: dict) -> None:
    """D4RL's keys and some attributes."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as f:
        for key in D4RL_KEYS:
            f.create_dataset(key, data=rows[key], compression="gzip", shuffle=True)
        command = shlex.join(["python", "data/collect_dataset.py", *sys.argv[1:]])
        f.attrs.update(attributes | {"command": command.encode(errors="replace").decode()})  # may not be UTF-8
    if os.path.lexists(path):  # it was not when this process began
        fail(f"{path} is there by now: another process has written it; choose another --out-dir")
    for left in path.parent.glob(f"{path.name}.*.tmp"):  # of a killed process
        left.unlink()
    write_file(path, buffer.getbuffer())


def write_minari(path: Path, rows: np.ndarray, attributes: dict) -> None:
    """Minari's layout, by Minari, and the same attributes."""
    from minari import create_dataset_from_buffers
    from minari.data_collector import EpisodeBuffer

    buffers = []
    for i, episode in enumerate(np.split(rows, np.flatnonzero(rows["terminals"] | rows["timeouts"])[:-1] + 1)):
        observations = np.append(episode["observations"], episode["next_observations"][-1:], axis=0)
        flags = dict(terminations=episode["terminals"], truncations=episode["timeouts"], rewards=episode["rewards"])
        buffers.append(EpisodeBuffer(id=i, observations=observations, actions=episode["actions"], **flags))
    root, name = path.parents[4], Path(*path.parts[-5:-2])
    with tempfile.TemporaryDirectory(dir=root) as folder, warnings.catch_warnings(action="ignore"):  # about authors
        os.environ["MINARI_DATASETS_PATH"] = folder
        options = dict(env=gymnasium.make(attributes["env_id"]), algorithm_name="SAC", data_format="hdf5")
        create_dataset_from_buffers(name.as_posix(), buffers, **options)
        os.environ["MINARI_DATASETS_PATH"] = str(root)
        with h5py.File(folder / name / "data" / path.name, "a") as f:
            f.attrs.update(attributes)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, root / name)  # whole or not at all


def describe(path: Path, rows: np.ndarray) -> None:
    returns = episode_returns(rows)
    counts, edges = np.histogram(returns)
    print(f"{path}: {len(rows):,} transitions, {len(returns):,} episodes, mean return {returns.mean():.0f}")
    print(f"  episodes per tenth of the range {edges[0]:.0f} .. {edges[-1]:.0f}: {' '.join(map(str, counts))}")


def make_env(env_id: str):
    """Gymnasium's environment as it is, without its known warnings and the MUJOCO_LOG.TXT that MuJoCo would write."""
    if "mujoco" not in sys.modules:  # nothing is rendered: look for no OpenGL
        os.environ["MUJOCO_GL"] = "disable"
    import mujoco

    known = "'settotalmass' is deprecated"  # a remark on Gymnasium's half_cheetah.xml
    mujoco.set_mju_user_warning(lambda text: None if known in text else warnings.warn(f"MuJoCo: {text}", stacklevel=2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of date. You should consider upgrading to version `v5`")
        return gymnasium.make(env_id).unwrapped


if __name__ == "__main__":
    run(main)
