"""Zero-shot transfer of Q-Align DT to HalfCheetah-Vel (Sec. 7, App. C, App. E.2).

    python transfer_cheetah_vel.py --env halfcheetah-medium-expert-v2

HalfCheetah-Vel gives a target velocity v: 200 steps, reward -|v_t - v| + c_t with c_t = -0.05 |a_t|^2. The policy was
trained on HalfCheetah's return and is not trained further; only its return-to-go (RTG) tells it v:

    calibrate         RTG_min, RTG_max: of 40 candidates around 1000 v, the best at the lowest and at the highest v
    two_point         RTG(v), the paper's: linear between the two
    monotone          RTG(v), ours: a curve through the velocities that all those candidates realised
    training_reward   what the RTG falls by: v_t + c_t, the kind of reward that the policy was trained on

Reads a policy.pt; writes transfer.json, .csv and .png beside it: return, realised velocity and tracking error per
target velocity (of every step, gait included, and of an episode's mean velocity), and the return of standing still.
--video adds a GIF.
"""

import csv
import importlib
import io
import json
import math
import os
import re
import signal
import sys
import typing
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # while modules load
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"error: interrupted\n"), os._exit(130)))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # else torch's waiting threads keep the cores busy beside other work

import gymnasium
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

HINT = tyro.conf.arg(help_behavior_hint="")  # the help text names the default itself, or there is none
Text = Annotated[str | None, HINT]
Texts, Floats = (Annotated[tuple[kind, ...], HINT] for kind in (str, float))


@dataclass(frozen=True)
class Args:
    env: Text = None  # task, as in stage 2 (default: the checkpoint's, or halfcheetah-mini without --checkpoint)
    checkpoint: Text = ""  # a policy.pt (default: of the run that --env, --seed and --exp-name name)
    compare: Texts = ()  # further HalfCheetah checkpoints, each calibrated by itself, in the same plot
    seed: int = 1  # seed of the run to transfer, and of the episodes
    runs_dir: str = "runs"  # folder of all runs
    exp_name: str = "train_qalign_dt"  # experiment to transfer; the run folder is <runs-dir>/<env>__<exp-name>__<seed>
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the policy runs; auto takes CUDA if there is one
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # arithmetic of the blocks; auto: bf16 if the hardware has it
    # target velocities, m/s: the benchmark's five held-out tasks, all its 40 from 0.075 to 3, or a list
    velocities: Literal["held-out", "grid"] | tuple[float, ...] = "held-out"
    # Table E.15: 1,000 steps, calibrated at 1 and 12 m/s; velocities 1, 2, ..., 12 unless a list is given
    extended: bool = False
    rollouts: int = 30  # episodes per target velocity, none of them used for the calibration
    # RTG(v): the paper's line, our curve, or both, from the same candidates (video: the first)
    calibration: tuple[Literal["two-point", "monotone"], ...] = ("two-point",)
    budgets: tuple[int, ...] = (40,)  # candidate RTGs at each end; several are Table C.6 (plot and video: the first)
    calibration_width: float = 2000.0  # the candidates lie at v times an episode's steps (1000) +- this, raw
    calibration_rollouts: int = 5  # episodes per candidate
    video: Floats = ()  # also a GIF: up to 10 s at each of these velocities (needs OpenGL)

    def __post_init__(self):
        check_args(self, {"rollouts": 1, "budgets": 2, "calibration_width": 1, "calibration_rollouts": 1})
        if not (self.velocities and self.calibration and self.budgets):
            raise ValueError("--velocities, --calibration, --budgets: name at least one")


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


# ======== shared: rollout ========
class Rollouts(NamedTuple):
    """n finished episodes, in the order of their targets; after an episode's end the per-step arrays hold NaN."""

    returns: np.ndarray  # (n,) raw
    lengths: np.ndarray  # (n,)
    rewards: np.ndarray  # (n, T)
    velocities: np.ndarray  # (n, T) forward, m/s; NaN without a MuJoCo model; T: the horizon in steps
    first_obs: torch.Tensor  # (n, obs_dim) standardised
    first_act: torch.Tensor  # (n, act_dim)
    qpos: np.ndarray | None  # (n, T, nq) MuJoCo's positions after each step, if asked for

    @property
    def velocity(self) -> np.ndarray:
        """(n,) mean forward velocity, m/s."""
        return np.nansum(self.velocities, axis=1) / np.where(np.isnan(self.velocities[:, 0]), np.nan, self.lengths)


@torch.no_grad()
def rollout(trained, targets, seeds, horizon: int, what: str, reward_function=None, keep_qpos=False) -> Rollouts:
    """Roll the policy out once per (raw target return, seed), all in lockstep as one batch.

    The context is the last K steps, padded and masked as in training; the RTG token starts at target / rtg_scale and
    falls by every reward, RTG_{t+1} = RTG_t - r_t: the environment's, or reward_function(velocities (m,), actions (m,
    act_dim)). A rollout that has ended leaves the batch.
    """
    policy, task, content = trained.policy, trained.task, trained.content
    n, K, device = len(targets), trained.context, next(policy.parameters()).device
    make_env(task.env_id, task.env_kwargs, (task.obs_dim, task.act_dim))  # exits 2 where the file's task is another
    simulator, targets = simulate(task, seeds), np.asarray(targets, dtype=np.float64)
    obs_mean, obs_std = content["obs_mean"].to(device), content["obs_std"].to(device)
    # histories start with K - 1 steps of padding, so that the context of step t is always [t, t + K)
    sizes = ((), obs_mean.shape, (task.act_dim,))
    rtg, obs, act = (torch.zeros(n, horizon + K - 1, *size, device=device) for size in sizes)
    timestep = torch.arange(1 - K, horizon, device=device)
    alive, returns, lengths = np.arange(n), np.zeros(n), np.zeros(n, dtype=np.int64)
    rewards, velocities = np.full((2, n, horizon), np.nan)
    qpos = np.full((n, horizon, simulator.qpos.shape[1]), np.nan) if keep_qpos else None
    last_time = content["config"]["max_timestep"] - 1
    observation = simulator.observe(alive)
    for t in (bar := tqdm(range(horizon), unit="step", desc=what, dynamic_ncols=True, disable=None)):
        rows, now, window = torch.as_tensor(alive, device=device), t + K - 1, slice(t, t + K)
        obs[rows, now] = (torch.as_tensor(observation, dtype=torch.float32, device=device) - obs_mean) / obs_std
        rtg_now = (targets[alive] - returns[alive]) / task.rtg_scale
        rtg[rows, now] = torch.as_tensor(rtg_now, dtype=torch.float32, device=device)
        times = timestep[window].expand(len(alive), K)
        context = (rtg[rows, window], obs[rows, window], act[rows, window], times.clamp(0, last_time), times >= 0)
        act[rows, now] = action = policy.act(*context)
        action = action.cpu().numpy().astype(np.float64)
        observation, reward, ended, velocity = simulator.step(alive, action)
        if reward_function:
            reward = reward_function(velocity, action)
        returns[alive] += reward
        lengths[alive] += 1
        rewards[alive, t], velocities[alive, t] = reward, velocity
        if keep_qpos:
            qpos[alive, t] = simulator.qpos[alive]
        alive, observation = alive[~ended], observation[~ended]
        bar.set_postfix_str(f"{len(alive)} of {n} rollouts alive")
        if len(alive) == 0:
            break
    return Rollouts(returns, lengths, rewards, velocities, obs[:, K - 1], act[:, K - 1], qpos)


# ======== end of shared: rollout ========


COST = 0.05  # of |a|^2 in HalfCheetah-Vel; HalfCheetah-v4 has 0.1
GRID = tuple(round(0.075 * k, 3) for k in range(1, 41))  # the benchmark's 40 tasks
HELD_OUT = (0.225, 0.6, 1.2, 1.8, 2.025)  # its test tasks in Prompt-DT's and MACAW's split
EXTENDED = tuple(float(v) for v in range(1, 13))  # Table E.15
STEPS, EXTENDED_STEPS = 200, 1000  # of an episode


def training_reward(velocity: np.ndarray, action: np.ndarray) -> np.ndarray:
    """r_bar = v_t + c_t (App. C): velocities (m,) in m/s, actions (m, act_dim) -> (m,)."""
    return velocity - COST * np.square(action).sum(axis=1)


def episodes(trained: "Trained", v: np.ndarray, rtg: np.ndarray, seeds: np.ndarray, steps: int, what: str):
    """Roll out n pairs of target velocity (m/s) and initial RTG (raw), each in the same m episodes of HalfCheetah-Vel.

    Returns the episodes' returns, realised velocities and tracking errors (mean |v_t - v|, m/s), each (n, m).
    """
    m, n = len(seeds), len(rtg)
    result = rollout(trained, np.repeat(rtg, m), np.tile(seeds, n), steps, what, training_reward)
    error = np.abs(result.velocities - np.repeat(v, m)[:, None])  # (n m, steps)
    reward = result.rewards - result.velocities - error  # c_t - |v_t - v|, as the rollout's are v_t + c_t
    return (x.reshape(n, m) for x in (reward.sum(axis=1), result.velocity, error.mean(axis=1)))


def calibrate(trained: "Trained", v: float, budget: int, width: float, seeds: np.ndarray, steps: int) -> dict:
    """App. C, at one end v of the velocities: candidate RTGs, what each achieves, and the one of the best mean return.

    (Their grid, the episodes for each, and that the paper's 40 are 40 at each end, are our reading.)
    """
    middle = trained.task.horizon * v  # the paper's 1000 v: of as many steps as a training episode has
    candidates = np.linspace(middle - width, middle + width, budget)
    returns, realised, _ = episodes(trained, np.full(budget, v), candidates, seeds, steps, f"calibration at {v:g} m/s")
    returns, realised = returns.mean(axis=1), realised.mean(axis=1)
    achieved = {"rtg": candidates.tolist(), "return_mean": returns.tolist(), "velocity_mean": realised.tolist()}
    return {"velocity": v, "best_rtg": float(candidates[returns.argmax()])} | achieved


def two_point(v, low: dict, high: dict) -> np.ndarray:
    """App. C: RTG(v), raw, linear through (v_min, RTG_min) and (v_max, RTG_max), also outside of them."""
    slope = (high["best_rtg"] - low["best_rtg"]) / (high["velocity"] - low["velocity"])
    return low["best_rtg"] + slope * (np.asarray(v) - low["velocity"])


def monotone(v, low: dict, high: dict) -> np.ndarray:
    """Not the paper's: RTG(v), raw, where the realised velocity is no straight line in RTG.

    Isotonic regression: the rising step function closest to the realised velocities of all candidates. RTG(v)
    interpolates between the midpoints of its steps, and is constant below the first step and above the last.
    """
    from scipy.optimize import isotonic_regression  # imported here: it takes a while

    rtg, realised = (np.array(low[name] + high[name]) for name in ("rtg", "velocity_mean"))
    order = np.argsort(rtg)
    fit = isotonic_regression(realised[order])
    midpoints = [rtg[step].mean() for step in np.split(order, fit.blocks[1:-1])]
    return np.interp(v, fit.x[fit.blocks[:-1]], midpoints)


MEANS = ("return_mean", "standing_still", "tracking_error", "velocity_error")  # over the velocities
RTG_OF = {"two-point": two_point, "monotone": monotone}


def transfer(trained: "Trained", velocities: np.ndarray, v_range, steps: int, args: Args) -> dict:
    """Calibrate one checkpoint and test it in other episodes: the record that transfer.json holds."""
    seeds = np.random.SeedSequence(args.seed).generate_state(args.calibration_rollouts + args.rollouts) >> 1
    seeds, test_seeds = np.split(seeds, [args.calibration_rollouts])
    results = []
    for budget in args.budgets:
        ends = [calibrate(trained, v, budget, args.calibration_width, seeds, steps) for v in v_range]
        for name in args.calibration:
            rtg, what = RTG_OF[name](velocities, *ends), f"{name} calibration, budget {budget}"
            returns, realised, errors = episodes(trained, velocities, rtg, test_seeds, steps, what)
            columns = {"velocity": velocities, "rtg": rtg, "velocity_mean": realised.mean(axis=1)}
            columns |= {"velocity_std": realised.std(axis=1), "tracking_error": errors.mean(axis=1)}
            columns |= {"velocity_error": np.abs(realised - velocities[:, None]).mean(axis=1)}  # of episodes, not steps
            columns |= {"return_mean": returns.mean(axis=1), "return_std": returns.std(axis=1)}
            columns |= {"return_max": returns.max(axis=1), "standing_still": -steps * velocities}  # v_t and a_t are 0
            rows = [dict(zip(columns, row)) for row in zip(*(x.tolist() for x in columns.values()))]
            means = {k: float(columns[k].mean()) for k in MEANS}
            results.append({"calibration": name, "budget": budget} | means | {"velocities": rows, "ends": ends})
    data = trained.content["episode_returns"]
    return trained.identity() | {"data_returns": [float(data.min()), float(data.max())], "results": results}


def plot(records: list[dict], title: str):
    """Realised against target velocity; RTG(v) through the candidates of the calibration."""
    figure, (left, right) = new_figure(1, 2, figsize=(11, 5))
    for i, record in enumerate(records):
        ends, budget = record["results"][0]["ends"], record["results"][0]["budget"]
        for result in (one for one in record["results"] if one["budget"] == budget):
            style = dict(color=f"C{i}", linestyle={"two-point": "-", "monotone": ":"}[result["calibration"]])
            columns = ("velocity", "rtg", "velocity_mean", "velocity_std")
            v, rtg, mean, std = ([row[name] for row in result["velocities"]] for name in columns)
            label = f"{label_of(record)}, {result['calibration']}"
            left.errorbar(v, mean, std, marker="o", markersize=4, capsize=2, label=label, **style)
            right.plot(rtg, v, **style)
        for end in ends:
            right.plot(end["rtg"], end["velocity_mean"], ".", color=f"C{i}")
            right.plot(end["best_rtg"], end["velocity"], "*", markersize=12, color=f"C{i}")
    v = [row["velocity"] for row in records[0]["results"][0]["velocities"]]
    left.plot(v, v, "--", color="0.5", linewidth=1, label="realised = target")
    left.set(xlabel="target velocity (m/s)", ylabel="realised velocity (m/s; bar: one std over episodes)")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    right.axvspan(*records[0]["data_returns"], color="0.92", zorder=0)
    right.set(xlabel="RTG (raw; grey: returns of the data, outside it is extrapolation)", ylabel="velocity (m/s)")
    right.set_title("lines: RTG(v); dots: realised by the candidates; stars: best candidates", fontsize="small")
    figure.suptitle(title, fontsize="small")
    return figure


def main() -> None:
    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.DisallowNone,))
    device, path = pick_device(args.device), policy_path(args, "halfcheetah-mini")
    policies = [load_policy(Path(p), args.precision, device) for p in (path, *args.compare)]
    task = policies[0].task
    if args.env and args.env != task.name:
        fail(f"{path} was trained on --env {task.name}, not {args.env}")
    for one in policies:
        if one.task.env_id not in ("HalfCheetah-v4", "HalfCheetah-v5") or one.task.env_kwargs:
            fail(f"{one.path} is a policy of {one.task.env_id}; HalfCheetah-Vel needs one of HalfCheetah")
    if not os.access(path.parent, os.W_OK):
        fail(f"{path.parent}: cannot write there; copy the checkpoint to a folder of your own")
    renderer = make_renderer(task) if args.video else None

    tasks, steps = (EXTENDED, EXTENDED_STEPS) if args.extended else (GRID, STEPS)
    named = {"held-out": EXTENDED if args.extended else HELD_OUT, "grid": tasks}
    velocities = np.array(named.get(args.velocities, args.velocities))
    ends = tasks[0], tasks[-1]  # where RTG(v) is calibrated
    records = [transfer(one, velocities, ends, steps, args) for one in policies]
    rows = []
    for record in records:
        for result in record["results"]:
            which = {k: record[k] for k in ("checkpoint", "seed")} | {k: result[k] for k in ("calibration", "budget")}
            rows += [which | row for row in result["velocities"]]
            print(table(record, result))
    setting = {"steps": steps, "rollouts": args.rollouts, "episode_seed": args.seed, "device": device.type}
    setting |= {"calibration_rollouts": args.calibration_rollouts, "calibration_width": args.calibration_width}
    result = setting | records[0] | ({"compare": records[1:]} if args.compare else {})
    stem = path.parent / f"transfer{'_extended' * args.extended}"
    title = f"HalfCheetah-Vel, {steps} steps, zero-shot; trained on {task.label}"
    title += f"\n{args.rollouts} rollouts per target velocity"
    write_results(stem, result, rows, lambda: plot(records, title))
    print(f"\n{stem}.json, .csv, .png")
    if args.video:
        first = records[0]["results"][0]
        rtg = RTG_OF[first["calibration"]](args.video, *first["ends"])
        captions, seeds = [f"target {v:g} m/s" for v in args.video], [args.seed] * len(rtg)
        gif = video(policies[0], rtg, captions, seeds, steps, renderer, reward_function=training_reward)
        write_file(stem.with_suffix(".gif"), gif)
        print(f"one episode per target velocity: {stem}.gif")


def table(record: dict, result: dict) -> str:
    """What the screen shows of one calibration of one checkpoint."""
    ends = ", ".join(f"RTG {end['best_rtg']:.0f} at {end['velocity']:g} m/s" for end in result["ends"])
    error = f"{result['tracking_error']:.2f} m/s per step, {result['velocity_error']:.2f} m/s per episode"
    still = f"standing still {result['standing_still']:.1f}"
    lines = [f"\n{record['checkpoint']}: best of {result['budget']} candidates {ends}"]
    lines += [f"{result['calibration']}: mean return {result['return_mean']:.1f} ({still}), tracking error {error}"]
    columns = [k for k in result["velocities"][0] if not k.endswith("std")]
    lines += ["".join(f"{k:>15}" for k in columns)]
    lines += ["".join(f"{row[k]:15.3f}" for k in columns) for row in result["velocities"]]
    return "\n".join(lines)


# ======== shared: results ========
BASELINES = ("train_radt", "train_vdt", "tune_vdt", "train_qt", "train_rvdt")  # in baselines/, with policies as here
REPORTED = ("lambda_e", "sigma_e", "delta_rtg", "max_push", "action_noise", "dropout", "average", "eval_context_len")
REPORTED += ("alignment", "conv", "state_loss", "update_q", "q_noise")  # what result files say of a Q-Align DT


class Trained(NamedTuple):
    """A policy.pt of stage 2 or of a baseline, ready to roll out."""

    path: Path
    task: Task
    policy: nn.Module
    content: dict  # everything that the file holds
    context: int  # steps of a rollout's windows

    def identity(self) -> dict:
        """What result files say of a checkpoint."""
        config = self.content["config"]
        names = ("seed", "total_steps", *(() if "method" in config else REPORTED))
        method = config.get("method") or method_of(config["lambda_e"], config["conv"], config["state_loss"])
        about = {"checkpoint": str(self.path), "method": method, "step": self.content["step"], "env": self.task.name}
        data = {name: getattr(self.task, name) for name in ("label", "is_d4rl", "digest")}
        return about | {"trained_on": data} | {name: config[name] for name in names}


def method_of(lambda_e: float, conv: bool, state_loss: bool) -> str:
    """The project's name of a variant; "DT" is Chen et al.'s Decision Transformer."""
    if lambda_e > 0 and conv:
        return "Q-Align DT"
    return "DT" + " + state loss" * state_loss + " + conv" * conv + " + alignment" * (lambda_e > 0)


def label_of(record: dict) -> str:
    """A legend's text: with what makes two runs of one method differ."""
    names = ("max_push", "action_noise", "average", "q_noise") if record.get("lambda_e") else ("average",)
    text = "".join(f", {name} {record[name]:g}" for name in names if record.get(name))
    if record.get("lambda_e"):
        text += f", {record['alignment']}" * (record["alignment"] != "one-sided")
        text += ", fixed critic" * (not record["update_q"])
    return f"{record['method']}, seed {record['seed']}{text}"


def policy_path(args, default: str) -> Path:
    """The policy.pt that --checkpoint, or --env, --exp-name and --seed name; exits 2 and lists the runs there are."""
    if args.checkpoint:
        return Path(args.checkpoint)
    env = (args.env or default).replace("/", "--")
    path = Path(args.runs_dir) / f"{env}__{args.exp_name}__{args.seed}" / "policy.pt"
    if not os.path.lexists(path):
        there = ", ".join(sorted(p.parent.name for p in Path(args.runs_dir).glob("*/policy.pt"))) or "none"
        fail(f"no policy at {path}; train it first; runs there: {there}")
    return path


@torch.no_grad()
def load_policy(path: Path, precision: str, device: torch.device) -> Trained:
    """Read a checkpoint of stage 2 or of a baseline; exits 2 if it is anything else."""
    content = load_checkpoint(path, "train_qalign_dt", *BASELINES)
    make = make_policy if content["stage"] == "train_qalign_dt" else baseline(content["stage"]).make_policy
    try:
        task, config, returns = build(Task, content["task"]), content["config"], content["episode_returns"]
        steps, K = [content["step"], config["total_steps"]], config["context_len"]
        if not fits(config, CONFIG) or not fits(steps, list[int]) or not 0 < K <= 10_000:
            raise ValueError("a number of its configuration is impossible")
        policy = make(task, config, use_bf16(precision, device))
        expected = dict(policy=policy.state_dict(), episode_returns=torch.zeros(len(returns), dtype=torch.float64))
        expected |= dict.fromkeys(("obs_mean", "obs_std"), torch.zeros(task.obs_dim))
        check_same({name: content[name] for name in expected}, expected, "policy.pt")
        policy.load_state_dict(content["policy"])
        if content["obs_std"].min() <= 0 or not len(returns):
            raise ValueError("its standardisation or returns are impossible")
        found = Trained(path, task, policy.to(device).eval(), content, K)
        label_of(found.identity())  # it has a name, and acts on a window
        sizes = ((), (task.obs_dim,), (task.act_dim,))
        window = [torch.zeros(1, K, *size, device=device) for size in sizes]
        policy.act(*window, window[0].long(), window[0] == 0)
    except Exception as error:  # an edited file can break in any way
        reason = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        fail(f"{path}: not a whole checkpoint ({reason}); train it again")
    if content["step"] < config["total_steps"]:
        print(f"note: {path} is at step {content['step']:,} of {config['total_steps']:,}")
    return found


def baseline(name: str):
    """The module baselines/<name>.py, for a name of BASELINES."""
    script = Path(__file__).resolve().parent / "baselines" / f"{name}.py"
    if not script.is_file():
        fail(f"{script} is missing; the policy's network is defined there")
    return load_module(script)


def new_figure(*shape, figsize, **options):
    """Matplotlib's figure and axes, without a screen; a $ in a file's name begins no mathematics."""
    import matplotlib.figure  # imported here: it takes a while

    matplotlib.rcParams.update({"text.parse_math": False, "axes.grid": True, "grid.alpha": 0.3})
    figure = matplotlib.figure.Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(*shape, **options)


def write_results(stem: Path, result: dict, rows: list[dict], figure=None) -> None:
    """<stem>.json, .csv (of rows) and, if there is a function that draws it, .png: numbers before pictures."""
    write_file(stem.with_suffix(".json"), (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
    table = csv.writer(sheet := io.StringIO(), lineterminator="\n")
    table.writerows([rows[0], *(row.values() for row in rows)])
    write_file(stem.with_suffix(".csv"), sheet.getvalue().encode(errors="surrogateescape"))
    if figure:
        figure().savefig(picture := io.BytesIO(), format="png", dpi=120)
        write_file(stem.with_suffix(".png"), picture.getvalue())


def make_renderer(task: Task):
    """MuJoCo's offscreen renderer; exits 2 where no OpenGL works, and for an environment without a MuJoCo model."""
    try:
        import mujoco

        if not (model := getattr(make_env(task.env_id, task.env_kwargs).unwrapped, "model", None)):
            fail(f"--video: {task.env_id} has no MuJoCo model")
        with warnings.catch_warnings(action="ignore"):
            return mujoco.Renderer(model, 200, 240)
    except Exception as error:  # each OpenGL backend has kinds of its own
        fail(f"--video: MuJoCo finds no OpenGL here ({one_line(error):.80}); without a screen, set MUJOCO_GL=egl")


def video(trained: Trained, targets, captions, seeds, steps: int, renderer, **options) -> bytes:
    """A GIF of one episode per raw target return, side by side, up to 10 s at 12 frames a second in real time."""
    import mujoco
    from PIL import Image, ImageDraw

    result = rollout(trained, targets, seeds, steps, "video", keep_qpos=True, **options)
    env = make_env(trained.task.env_id, trained.task.env_kwargs).unwrapped
    cameras = [env.model.camera(i).name for i in range(env.model.ncam)]
    camera = next((name for name in ("above", "track") if name in cameras), -1)  # -1: MuJoCo's free one
    stride, steps = max(1, round(0.08 / env.dt)), min(int(result.lengths.max()), round(10 / env.dt))
    frames = []
    for t in range(0, steps, stride):
        panels = []
        for i, caption in enumerate(captions):
            now = min(t, int(result.lengths[i]) - 1)
            env.data.qpos[:], env.data.qvel[:] = result.qpos[i, now], 0
            mujoco.mj_forward(env.model, env.data)
            renderer.update_scene(env.data, camera=camera)
            panel = Image.fromarray(renderer.render())
            state = f"ended at step {now + 1}" if t > now else f"{result.velocities[i, now]:.1f} m/s"
            ImageDraw.Draw(panel).multiline_text((6, 4), f"{caption}\n{state}", fill=(255, 255, 255))
            panels.append(np.asarray(panel))
        frames.append(Image.fromarray(np.concatenate(panels, axis=1)).quantize(48))
    gif, duration = io.BytesIO(), round(1000 * stride * env.dt)  # ms
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
    return gif.getvalue()


# ======== end of shared: results ========


def simulate(task: Task, seeds) -> "HalfCheetah":
    return HalfCheetah(task.env_id, seeds)


class HalfCheetah:
    """n HalfCheetahs, advanced in lockstep by torch's threads.

    Initial states are those of env.reset(seed); observations and rewards those of env.step. It never falls.
    """

    def __init__(self, env_id: str, seeds):
        env = make_env(env_id).unwrapped
        import mujoco
        from mujoco.batch import Batch  # after make_env, which sees to a bad MUJOCO_GL

        self.frame_skip, self.dt = env.frame_skip, env.dt
        self.batch = Batch(env.model, len(seeds), nthread=torch.get_num_threads())
        self.qpos, self.qvel, self.ctrl = map(self.batch.bind, ("qpos", "qvel", "ctrl"))
        for i, seed in enumerate(seeds):
            env.reset(seed=int(seed))
            mujoco.mj_getState(env.model, env.data, self.batch.state[i], mujoco.mjtState.mjSTATE_INTEGRATION)

    def observe(self, index) -> np.ndarray:
        """(m, 17) float64: the observations of some of the simulations."""
        return np.concatenate([self.qpos[index, 1:], self.qvel[index]], axis=1)

    def step(self, index, actions):
        """One env.step of the simulations `index` (m,), given actions (m, 6).

        Returns observations (m, 17), rewards, which of them ended (none), and forward velocities in m/s, each (m,).
        """
        before = self.qpos[index, 0].copy()
        self.ctrl[index] = actions
        self.batch.step(index, nstep=self.frame_skip)
        velocity = (self.qpos[index, 0] - before) / self.dt
        reward = velocity - 0.1 * np.square(actions).sum(axis=1)
        return self.observe(index), reward, np.zeros(len(index), bool), velocity


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
