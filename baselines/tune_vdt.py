"""VDT online: tunes a Value-Guided Decision Transformer, or a DT, in the simulator.

    python baselines/train_vdt.py --env hopper-mini && python baselines/tune_vdt.py --env hopper-mini

Each round collects one whole episode, asked for more than the data's best return and with noise on the actions, and
takes gradient steps on a buffer of whole trajectories:

    Buffer            first the best offline episodes; a new one overwrites the oldest; the worst offline one goes first
    Windows.sample    a trajectory by its length, then a start in it: every stored transition is equally likely
    returns_to_go     RTG alignment: what a trajectory collected is what its tokens say, whatever was asked for
    ValueGuided       train_vdt.py's steps of Q, V and policy; a DT is tuned by imitation alone

Ours: the request (1.2 x the best offline return), the noise (0.1), 300 steps of each kind per round.

Writes runs/<env>__<exp-name>__<seed>/ with policy.pt, resume.pt (buffer included), online.csv and TensorBoard events;
the same command resumes, with the same bits, even after kill -9. The environment model is not tuned, so it is left out:
`--inference plan` needs train_vdt.py's own policy.pt.
"""

import hashlib
import math
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and stage 2's
from train_radt import NOT_OF_THE_RUN, RunArgs
from train_vdt import Transitions, ValueGuided

from train_qalign_dt import (
    Dataset,
    Ensemble,
    Int,
    Log,
    Str,
    Windows,
    check_args,
    check_finite,
    check_same,
    claim,
    fail,
    load_checkpoint,
    load_data,
    load_own,
    make_env,
    make_policy,  # by this name stages 3 and 4 ask for a baseline's policy, too
    one_line,
    pick_device,
    preset,
    progress_bar,
    restore,
    run,
    run_folder,
    save_checkpoint,
    save_resume,
    track,
)


@dataclass(frozen=True)
class Args(RunArgs):
    exp_name: str = "tune_vdt"  # name of this experiment; the run folder is <runs-dir>/<env>__<exp-name>__<seed>
    # policy.pt of train_vdt.py, or of a DT of train_qalign_dt.py (default: train_vdt.py's of this env and seed)
    checkpoint: Str = ""

    env_steps: Int = None  # environment steps to collect, in whole episodes (default: 200,000; small: 20,000)
    capacity: int = 1000  # trajectories in the buffer
    updates: int = 300  # gradient steps of Q and V, and of the policy, after each episode
    request: float = 1.2  # return to ask for, as a multiple of the best offline return (1.2 of -100 means -80)
    noise: float = 0.1  # std of the noise on the actions
    policy_lr: float = 1e-4  # Adam learning rate of the policy; that of Q and V stays 3e-4
    eval_every: int = 10  # episodes between two evaluations; 0: only before and after
    eval_rollouts: int = 10  # episodes of an evaluation, without noise, asked for the best offline return

    def __post_init__(self):
        check_args(self, {"env_steps": 1, "capacity": 1, "eval_rollouts": 1})


class Buffer:
    """Whole trajectories, each (obs (T, obs_dim) raw, act, reward (T,), terminal): first in, first out."""

    def __init__(self, data, capacity: int):
        """The best of the offline episodes, in ascending order of return: the worst is the oldest."""
        self.capacity, self.next, self.slots = capacity, 0, []
        for i in np.argsort(data.returns, kind="stable")[-capacity:]:
            rows = slice(data.starts[i], data.ends[i])
            episode = data.observations[rows], data.actions[rows], data.rewards[rows], data.terminals[rows][-1]
            self.slots.append(episode)

    def add(self, trajectory: tuple) -> None:
        if len(self.slots) < self.capacity:
            self.slots.append(trajectory)
        else:
            self.slots[self.next] = trajectory
            self.next = (self.next + 1) % self.capacity

    def dataset(self, offline) -> Dataset:
        """What is in it, standardised as the offline data were."""
        obs, act, reward, terminal = zip(*self.slots)
        ends = np.cumsum([len(x) for x in reward])
        terminals = np.zeros(ends[-1], bool)
        terminals[ends - 1] = terminal
        arrays = dict(observations=np.concatenate(obs), actions=np.concatenate(act), rewards=np.concatenate(reward))
        tensors = {name: torch.from_numpy(x) for name, x in (arrays | dict(terminals=terminals, ends=ends)).items()}
        tensors |= dict(obs_mean=offline.obs_mean, obs_std=offline.obs_std)
        return Dataset(tensors | {"task": vars(offline.task)})

    def state(self) -> dict:
        """For resume.pt."""
        parts = [[torch.as_tensor(x) for x in slot[:3]] + [bool(slot[3])] for slot in self.slots]
        return {"slots": parts, "next": self.next}

    def load(self, state: dict) -> None:
        self.slots = [(*(x.numpy() for x in slot[:3]), slot[3]) for slot in state["slots"]]
        self.next = state["next"]


@torch.no_grad()
def run_episode(policy, config, request: float, offline, seed: int, noise=0.0, generator=None) -> tuple:
    """One episode, asked for a raw return: its trajectory as in Buffer. The RTG falls by every reward."""
    policy.eval()
    task, K = offline.task, config.context_len
    env, device = make_env(task.env_id, task.env_kwargs, (task.obs_dim, task.act_dim)), next(policy.parameters()).device
    observation, left, rows = env.reset(seed=seed)[0], request, []
    rtg, obs, act = torch.zeros(1, K), torch.zeros(1, K, task.obs_dim), torch.zeros(1, K, task.act_dim)
    for t in range(task.horizon):
        rtg, obs, act = (x.roll(-1, dims=1) for x in (rtg, obs, act))  # the last K steps, padded on the left
        raw = F.pad(torch.as_tensor(observation, dtype=torch.float32), (0, task.obs_dim - len(observation)))
        rtg[:, -1], act[:, -1], obs[:, -1] = left / task.rtg_scale, 0, (raw - offline.obs_mean) / offline.obs_std
        times = torch.arange(t + 1 - K, t + 1)[None]
        context = (rtg, obs, act, times.clamp(0, config.max_timestep - 1), times >= 0)
        action = policy.act(*(x.to(device) for x in context)).cpu()
        if noise:
            action = (action + noise * torch.randn(action.shape, generator=generator)).clamp(-1, 1)
        act[:, -1] = action
        observation, reward, terminated, truncated, _ = env.step(action[0].numpy().astype(np.float64))
        rows.append((raw.numpy(), action[0].numpy(), np.float32(reward)))
        left -= reward
        if terminated or truncated:
            break
    env.close()
    policy.train()
    return (*(np.stack(x) for x in zip(*rows)), terminated)  # cut at the horizon is a timeout, never a terminal


@dataclass(frozen=True)
class Config:
    """What the gradient steps go by: the checkpoint's settings, and defaults for a DT, which has neither Q nor V."""

    seed: int  # this run's, not the checkpoint's
    bf16: bool
    embed_dim: int
    n_layer: int
    n_head: int
    context_len: int
    batch_size: int
    critic_width: int
    actor_lr: float
    max_timestep: int
    conv: bool
    dropout: float
    eval_context_len: int = 0  # a DT's own
    eta: float = 0.0  # these two leave imitation alone
    q_weight: float = 0.0
    expectile: float = 0.7
    n_step: int = 1
    gamma: float = 0.99
    reward_scale: float = 1.0


class Tuning(ValueGuided):
    """What is tuned, and the gradient steps of one round."""

    def __init__(self, task, config: Config, content: dict, device: torch.device):
        """content: the checkpoint's. Sets torch's global seed."""
        super().__init__(task, config, device)
        self.noise = torch.Generator().manual_seed(config.seed)
        self.policy.load_state_dict(content["policy"])
        self.is_vdt = content["stage"] == "train_vdt"
        if self.is_vdt:
            self.target_critic.load_state_dict(content["critic"])
            self.critic.load_state_dict(content["critic"])
            self.value.load_state_dict(content["value"])

    def round(self, data, updates: int, lr: float) -> None:
        windows = Windows(data, self.config.context_len, self.generator.device)
        windows.timestep.clamp_(max=self.config.max_timestep - 1)  # a rollout may outlast every offline episode
        if self.is_vdt:
            rows = Transitions(data, windows, self.config)
            for _ in range(updates):
                self.value_step(rows, rows.n_step)
        for _ in range(updates):
            self.policy_step(windows, lr)


def asked_return(best: float, request: float) -> float:
    """`request` times the best offline return; as far above a negative one, where a multiple would lie below."""
    return best + (request - 1) * abs(best)


def main() -> None:
    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.DisallowNone,))
    device = pick_device(args.device)
    path = Path(args.checkpoint or run_folder(args, "train_vdt") / "policy.pt")
    content = load_checkpoint(path, "train_vdt", "train_qalign_dt")
    offline = load_data(args)
    task = offline.task
    config = tuned_config(path, content, args, offline)
    env_steps = args.env_steps or (20_000 if preset(args, task) == "small" else 200_000)
    identity = {name: value for name, value in vars(args).items() if name not in (*NOT_OF_THE_RUN, "checkpoint")}
    weights = hashlib.sha256(b"".join(x.cpu().numpy().tobytes() for x in content["policy"].values())).hexdigest()[:16]
    identity |= {"env_steps": env_steps, "device": device.type, "data": task.digest, "tuned": weights}
    folder = run_folder(args, args.exp_name)
    best, label = float(offline.returns.max()), content["config"].get("method", "DT")

    with claim(folder):
        state = load_own(folder / "resume.pt", "tune_vdt", identity)
        if args.track:
            track(args, folder)
        learner, buffer = Tuning(task, config, content, device), Buffer(offline, args.capacity)
        sums, done = torch.zeros(1, device=device), Progress()
        if state:
            done = restore(state, folder / "resume.pt", learner, sums, 10**9, Progress)
            buffer.load(state["buffer"])
            learner.noise.set_state(state["noise"])
        print(f"{folder}: {label} of {path}, {len(buffer.slots):,} buffered trajectories, {done.step:,} steps used")
        log, policy, rows = Log(folder, "online", done.rows), learner.policy, done.rows

        def evaluate() -> float:
            seeds = (2_000_000 + 1_000 * args.seed + i for i in range(args.eval_rollouts))
            episodes = (run_episode(policy, config, best, offline, seed) for seed in seeds)
            return float(np.mean([task.score(reward.sum(dtype=np.float64)) for _, _, reward, _ in episodes]))

        def save() -> None:
            own = dict(buffer=buffer.state(), noise=learner.noise.get_state())
            save_resume(folder, dict(stage="tune_vdt", config=identity) | own, learner, sums, done)
            tuned = content["config"] | {"method": f"{label}, tuned online", "seed": args.seed}
            new = content | dict(stage="tune_vdt", config=tuned, policy=policy.state_dict(), model=None)
            if learner.is_vdt:
                new |= dict(critic=learner.target_critic.state_dict(), value=learner.value.state_dict())
            save_checkpoint(folder / "policy.pt", new)

        saved = time.monotonic()
        if not rows:
            log.write({"step": 0, "episodes": 0, "collected_score": math.nan, "score": evaluate()})
        with progress_bar(env_steps, done.step, "tuning") as bar:
            while done.step < env_steps:
                episode = rows[-1]["episodes"] + 1
                seed, request = 10**6 * args.seed + episode, asked_return(best, args.request)
                trajectory = run_episode(policy, config, request, offline, seed, args.noise, learner.noise)
                buffer.add(trajectory)
                learner.round(buffer.dataset(offline), args.updates, args.policy_lr)
                check_finite(learner, sums, done.step)
                rewards = trajectory[2]
                done.step = used = done.step + len(rewards)
                bar.update(len(rewards))
                due = args.eval_every and episode % args.eval_every == 0 or used >= env_steps
                row = {"step": used, "episodes": episode, "collected_score": float(task.score(rewards.sum()))}
                log.write(row | {"score": evaluate() if due else math.nan})
                if due:
                    bar.write(f"{used:,} environment steps, {episode:,} episodes: score {rows[-1]['score']:.1f}")
                if time.monotonic() - saved > args.checkpoint_minutes * 60:
                    save()
                    saved = time.monotonic()
        save()
    before, after = rows[0]["score"], rows[-1]["score"]
    print(f"score at the best offline return, {best:.0f}: {before:.1f} before, {after:.1f} after {done.step:,} steps")
    print(f"{folder}/policy.pt")


@dataclass
class Progress:
    """How far a run is: what resume.pt holds beside networks, optimisers, random streams and the buffer."""

    step: int = 0  # environment steps
    rows: list[dict] = field(default_factory=list)  # of online.csv; NaN: not evaluated


def tuned_config(path: Path, content: dict, args: Args, offline) -> Config:
    """What the checkpoint's gradient steps go by; exits 2 if it cannot be tuned on these data."""
    try:
        found, there, is_vdt = content["config"], content["task"], content["stage"] == "train_vdt"
        if there["name"] != args.env:
            fail(f"{path} was trained on --env {there['name']}, not {args.env}")
        if found["data"] != offline.task.digest:
            fail(f"{path} was trained on {there['label']}, not on {offline.task.label}; --dataset-path?")
        if not is_vdt and found["lambda_e"] > 0:
            fail(f"{path}: a policy of Q-Align DT; only VDT's own policies and DTs (--lambda-e 0) can be tuned")
        check_same(content["policy"], make_policy(offline.task, found, False).state_dict(), "policy")
        if is_vdt:
            obs_dim, act_dim, width = offline.task.obs_dim, offline.task.act_dim, found["critic_width"]
            check_same(content["critic"], Ensemble(2, obs_dim + act_dim, width).state_dict(), "critic")
            check_same(content["value"], Ensemble(1, obs_dim, width).state_dict(), "value")
        values = {x.name: found[x.name] for x in fields(Config) if x.name in found}
        return Config(**values | {"seed": args.seed})
    except Exception as error:  # an edited file can break in any way
        fail(f"{path}: not a whole checkpoint ({one_line(error)}); train it again")


if __name__ == "__main__":
    run(main)
