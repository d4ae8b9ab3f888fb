"""Stage 0 of Q-Align DT: make a dataset by D4RL's recipe where D4RL's own cannot be had.

    python data/collect_dataset.py --env-id Hopper-v4

Trains soft actor-critic (SAC, Haarnoja et al. 2018), one gradient step per environment step, keeps every evaluated
policy, and records, as <body>-<quality>-local.hdf5 (mini: <body>-mini.hdf5), which other stages take as --env:
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
import sys
import tempfile
import threading
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import filelock
import gymnasium
import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

Quality = Literal["random", "medium-replay", "medium", "expert", "medium-expert", "mini"]


@dataclass(frozen=True)
class Args:
    env_id: str = "Hopper-v4"  # of Gymnasium; the other stages know v4 of Hopper, HalfCheetah, Walker2d and Ant
    seed: int = 1  # seed of the networks, the actions and the episodes
    # which files to write; the training is the same for all
    qualities: tuple[Quality, ...] = ("random", "medium-replay", "medium", "expert", "medium-expert")
    transitions: int = 1_000_000  # at least so many per policy, in whole episodes (mini: at most so many in the file)
    total_steps: int = 1_000_000  # environment steps of training; raise it to continue a finished run
    medium_return: float | None = None  # raw return that makes a policy "medium" (default: a third of the expert's)
    eval_every: int | None = None  # training steps between two evaluations, whose policies are kept (default: 5,000)
    # mini: of each bin of returns, the episodes of the steadiest reward come first: a return then means one speed, and
    # not as well a sprint and a fall
    steady: bool = False
    num_envs: int = 8  # environments that train in lockstep
    # D4RL's files, or Minari's datasets local/<body>/<quality>-v0 where Minari keeps them (pip install 'minari[hdf5]')
    format: Literal["hdf5", "minari"] = "hdf5"
    out_dir: str = ""  # folder of the datasets (default: this script's own, where the other stages look for them)
    runs_dir: str = "runs"  # folder of all runs
    exp_name: str = "collect_dataset"  # name of this experiment; the run is in <runs-dir>/<env-id>__<exp-name>__<seed>

    def __post_init__(self):
        check_args(self, {"transitions": 1, "total_steps": START + EVAL_EVERY, "num_envs": 1, "medium_return": -1e9})
        if self.eval_every is not None and self.eval_every < self.num_envs:
            raise ValueError(f"--eval-every {self.eval_every}: must be at least --num-envs, {self.num_envs}")
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
    """n environments, each playing one episode after the other; number k, as they begin, starts from first_seed + k."""

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
        self.parts = nets | {f"{k}_opt": opt for k, opt in self.opts.items()} | {"target_critic": self.target_critic}

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
        descend(self.opts["critic"], q_loss)

        self.critic.requires_grad_(False)
        act, log_pi = self.actor(obs, self.generator)
        actor_loss = (self.log_alpha.exp().detach() * log_pi - q_values(self.critic, obs, act).amin(dim=0)).mean()
        descend(self.opts["actor"], actor_loss)
        self.critic.requires_grad_(True)

        # raises alpha while the policy's entropy is below its target, -act_dim
        descend(self.opts["alpha"], -self.log_alpha.exp() * (log_pi.detach().mean() - act.shape[1]))
        ema_update(self.target_critic, self.critic, TAU)
        return torch.stack((q_loss, actor_loss, q[0].mean(), self.log_alpha.exp(), torch.ones(()))).detach()


def descend(opt: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    opt.zero_grad()
    loss.backward()
    opt.step()


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
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

    with claim(folder) as stack:
        learner = SAC(envs.obs.shape[1], envs.low, envs.high, args.seed)
        sums = torch.zeros(len(learner.metrics) + 1)  # of learner.step() since the last row of metrics.csv
        step, rows, returns, checksum = 0, [], [], 0  # rows: of metrics.csv; returns: of evaluations.csv
        if state := load_own(folder / "resume.pt", "collect_dataset", identity):
            names = ("step", "rows", "returns", "checksum")
            step, rows, returns, checksum = restore(state, folder / "resume.pt", learner, sums, 10**9, names)
        replay = np.zeros(max(args.total_steps, step) + n, envs.row)
        load_replay(folder / "replay.bin", replay[:step], checksum)
        if 0 < step < args.total_steps:
            envs.replay(replay[:step].reshape(-1, n))
        print(f"{folder}: SAC on {args.env_id}, {n} environments in lockstep, step {step:,} of {args.total_steps:,}")
        metrics, evaluations = Log(folder, "metrics", rows), Log(folder, "evaluations", returns)
        bar = tqdm(
            total=args.total_steps,
            initial=step,
            unit="step",
            desc=f"SAC {args.env_id}",
            dynamic_ncols=True,
            disable=None,
        )
        stack.enter_context(bar)
        every = args.eval_every or EVAL_EVERY
        while True:
            if step % every < n and (not returns or returns[-1]["step"] < step):  # first the untrained policy
                episodes = record(learner.actor, args, None, episodes=EVAL_EPISODES)
                evaluations.write({"step": step, "return": float(episode_returns(episodes).mean())})
                policy = dict(stage="collect_dataset", config=identity, actor=learner.actor.state_dict())
                save_checkpoint(folder / f"policy_{step}.pt", policy)
                bar.set_postfix_str(f"return {returns[-1]['return']:.0f}, best {max(r['return'] for r in returns):.0f}")
            if step % every < n or step >= args.total_steps:
                checksum = save_replay(folder / "replay.bin", replay[:step])
                counters = dict(step=step, rows=rows, returns=returns, checksum=checksum)
                save_resume(folder, dict(stage="collect_dataset", config=identity, counters=counters), learner, sums)
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
        bar.close()

        known = {row["step"]: row["return"] for row in returns if row["step"] < args.total_steps + n}
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
            else:
                problems.append(f"{path}: no whole episode; try a larger --transitions or a smaller --num-envs")
    if problems:
        fail("; ".join(problems), code=1)


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
    each = -(-MINI_POOL * args.transitions // len(steps)) if quality == "mini" else args.transitions
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
    n, keep_next = episodes or min(RECORD_ENVS, -(-transitions // HORIZON)), args.format == "minari"
    envs = Episodes(args.env_id, n, seed, keep_next)
    generator = None if step is None else torch.Generator().manual_seed(seed % 2**63)
    blocks, lengths, whole, total = [], {}, 0, 0  # the first `whole` episodes have ended and hold `total` transitions
    bar = tqdm(
        total=transitions, desc=f"policy of step {step}", disable=step is None or None, leave=False, dynamic_ncols=True
    )
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
    """D4RL's keys and some attributes. Says what is in it."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as f:
        for key in D4RL_KEYS:
            f.create_dataset(key, data=rows[key], compression="gzip", shuffle=True)
        f.attrs.update(attributes | {"command": shlex.join(["python", "data/collect_dataset.py", *sys.argv[1:]])})
    if os.path.lexists(path):  # it was not when this process began
        fail(f"{path} is there by now: another process has written it; choose another --out-dir")
    for left in path.parent.glob(f"{path.name}.*.tmp"):  # of a killed process
        left.unlink()
    write_file(path, buffer.getbuffer())
    describe(path, rows)


def write_minari(path: Path, rows: np.ndarray, attributes: dict) -> None:
    """Minari's layout, by Minari, and the same attributes. Says what is in it."""
    from minari import create_dataset_from_buffers
    from minari.data_collector import EpisodeBuffer

    buffers = []
    for i, episode in enumerate(np.split(rows, np.flatnonzero(rows["terminals"] | rows["timeouts"])[:-1] + 1)):
        observations = np.append(episode["observations"], episode["next_observations"][-1:], axis=0)
        flags = dict(terminations=episode["terminals"], truncations=episode["timeouts"], rewards=episode["rewards"])
        buffers.append(EpisodeBuffer(id=i, observations=observations, actions=episode["actions"], **flags))
    root, name = path.parents[4], Path(*path.parts[-5:-2])
    with (
        tempfile.TemporaryDirectory(dir=root) as folder,
        warnings.catch_warnings(action="ignore"),
    ):  # about authors, links
        os.environ["MINARI_DATASETS_PATH"] = folder
        options = dict(env=gymnasium.make(attributes["env_id"]), algorithm_name="SAC", data_format="hdf5")
        create_dataset_from_buffers(name.as_posix(), buffers, **options)
        os.environ["MINARI_DATASETS_PATH"] = str(root)
        with h5py.File(folder / name / "data" / path.name, "a") as f:
            f.attrs.update(attributes)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, root / name)  # whole or not at all
    describe(path, rows)


def describe(path: Path, rows: np.ndarray) -> None:
    returns = episode_returns(rows)
    counts, edges = np.histogram(returns)
    print(f"{path}: {len(rows):,} transitions, {len(returns):,} episodes, mean return {returns.mean():.0f}")
    print(f"  episodes per tenth of the range {edges[0]:.0f} .. {edges[-1]:.0f}: {' '.join(map(str, counts))}")


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

# ======== shared: environment ========


def make_env(env_id: str):
    """Gymnasium's environment without its time limit, its known warnings, and MuJoCo's MUJOCO_LOG.TXT about them."""
    if "mujoco" not in sys.modules:  # make_renderer imports it first: nothing will be rendered, so look for no OpenGL
        os.environ["MUJOCO_GL"] = "disable"
    import mujoco

    known = "'settotalmass' is deprecated"  # a remark on Gymnasium's half_cheetah.xml
    mujoco.set_mju_user_warning(lambda text: None if known in text else warnings.warn(f"MuJoCo: {text}", stacklevel=2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of date. You should consider upgrading to version `v5`")
        return gymnasium.make(env_id).unwrapped


# ======== end of shared: environment ========


if __name__ == "__main__":
    run(main)
