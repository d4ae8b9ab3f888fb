"""Zero-shot transfer of Q-Align DT to HalfCheetah-Vel (Sec. 7, App. C, App. E.2).

    python transfer_cheetah_vel.py --env halfcheetah-medium-expert-v2

HalfCheetah-Vel gives a target velocity v: 200 steps, reward -|v_t - v| + c_t with c_t = -0.05 |a_t|^2. The policy was
trained on HalfCheetah's return and is not trained further; only its return-to-go (RTG) tells it v:

    calibrate         RTG_min, RTG_max: of 40 candidates around 1000 v, the best at the lowest and at the highest v
    two_point         RTG(v), the paper's: linear between the two
    monotone          RTG(v), ours: a curve through the velocities that all those candidates realised
    training_reward   what the RTG falls by: v_t + c_t, the kind of reward that the policy was trained on

Writes transfer.json, .csv and .png beside the checkpoint: return, realised velocity and tracking error per target
velocity (of every step, where the gait counts, and of an episode's mean velocity), and the return of standing still.
--video adds a GIF.
"""

import ctypes
import difflib
import importlib.util
import io
import json
import math
import os
import re
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    # name of the task, as in stage 2 (default: the checkpoint's, or halfcheetah-mini without --checkpoint)
    env: str | None = None
    # a policy.pt or policy_best.pt (default: policy.pt of the run that --env, --seed and --exp-name name)
    checkpoint: str = ""
    # further HalfCheetah checkpoints, each calibrated by itself, in the same table and plot
    compare: tuple[str, ...] = ()
    seed: int = 1  # seed of the run to transfer, and of the episodes
    runs_dir: str = "runs"  # folder of all runs
    # name of the experiment to transfer; the run folder is <runs-dir>/<env>__<exp-name>__<seed>
    exp_name: str = "train_qalign_dt"
    # where the policy runs; auto takes CUDA if there is one. The simulator uses all CPU cores
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # arithmetic of the transformer's blocks; auto: bf16 where the hardware has it
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # target velocities, m/s: the benchmark's five held-out tasks, all its 40 from 0.075 to 3, or a list
    velocities: Literal["held-out", "grid"] | tuple[float, ...] = "held-out"
    # Table E.15: 1,000 steps, calibrated at 1 and 12 m/s; velocities 1, 2, ..., 12 unless a list is given
    extended: bool = False
    rollouts: int = 30  # episodes per target velocity, none of them used for the calibration
    # RTG(v): the paper's line, our curve, or both, from the same candidates (video: the first)
    calibration: tuple[Literal["two-point", "monotone"], ...] = ("two-point",)
    # candidate RTGs at each end, evenly spaced; several are Table C.6 (plot and video: the first)
    budgets: tuple[int, ...] = (40,)
    calibration_width: float = 2000.0  # the candidates' interval is 1000 v -+ this, raw return
    calibration_rollouts: int = 5  # episodes per candidate
    # also render up to 10 s of an episode for each of these target velocities, side by side (needs OpenGL)
    video: tuple[float, ...] = ()

    def __post_init__(self):
        check_args(self, {"rollouts": 1, "budgets": 2, "calibration_width": 1, "calibration_rollouts": 1})
        if not (self.velocities and self.calibration and self.budgets):
            raise ValueError("--velocities, --calibration, --budgets: name at least one")


# ======== shared: policy ========


class Block(nn.Module):
    """Pre-LN transformer block: causal attention, then a GELU MLP of four times the width."""

    def __init__(self, width: int, heads: int, conv: bool, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        # App. D.1: a convolution over the token axis, window 6, one each for q, k and v
        self.conv = nn.Conv2d(3 * width, 3 * width, (1, 6), groups=3) if conv else None
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def attend(self, x, keep, bias, last: int):  # (B, T, D), (B, T, 1), (B, 1, T, T) -> (B, last, D)
        # Padding must not leak: W_q, W_k, W_v have biases, so padded tokens are zeroed again before the convolution,
        # which then sees to the left of a short window the same zeros as it would without any padding.
        qkv = self.qkv(x) * keep
        if self.conv:  # in two dimensions and padded first, it is channels-last in memory: the fastest layout
            qkv = self.conv(F.pad(qkv, (0, 0, 5, 0)).transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv.chunk(3, dim=-1))  # (B, H, T, D / H)
        # written out: with dropout and 60 tokens this is faster than scaled_dot_product_attention
        logits = (q[:, :, -last:] * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        weights = torch.softmax(logits.float().add_(bias[..., -last:, :]), dim=-1)
        y = self.dropout(weights.to(logits.dtype)) @ v
        return self.dropout(self.out(y.transpose(1, 2).flatten(-2)))

    def forward(self, x, keep, bias, last: int):
        x = x[:, -last:] + self.attend(self.norm1(x), keep, bias, last)
        return x + self.mlp(self.norm2(x))


class Policy(nn.Module):
    """Decision Transformer over tokens (rtg_0, s_0, a_0, rtg_1, ...); heads rtg -> state, state -> action (App. D.1).

    Call with rtg (B, K) normalised, obs (B, K, obs_dim) standardised, act (B, K, act_dim) in [-1, 1], timestep (B, K)
    int64 in [0, max_timestep) and valid (B, K) bool, False on the left padding; returns a_hat (B, K, act_dim) and
    s_hat (B, K, obs_dim), both float32. The action at step t depends on no token after s_t, and on no padding.
    """

    eval_context_len = 0  # act depends on the last so many steps; 0: on all

    def __init__(self, obs_dim, act_dim, embed_dim, n_layer, n_head, max_timestep, conv=True, dropout=0.1, bf16=False):
        super().__init__()
        self.bf16, self.dropout = bf16, nn.Dropout(dropout)
        self.embed_rtg, self.embed_obs, self.embed_act = (nn.Linear(n, embed_dim) for n in (1, obs_dim, act_dim))
        self.embed_time = nn.Embedding(max_timestep, embed_dim)
        self.norm_in, self.norm_out = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, n_head, conv, dropout) for _ in range(n_layer))
        self.action_head, self.state_head = nn.Linear(embed_dim, act_dim), nn.Linear(embed_dim, obs_dim)
        for module in self.modules():  # GPT-2's initialisation
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, rtg, obs, act, timestep, valid):
        x = self.hidden(rtg, obs, act, timestep, valid, last=3 * rtg.shape[1]).unflatten(1, (-1, 3))  # (B, K, 3, D)
        return torch.tanh(self.action_head(x[:, :, 1])), self.state_head(x[:, :, 0])

    def act(self, rtg, obs, act, timestep, valid):
        """Only a_hat of the windows' last step (B, act_dim), for rollouts: the last block computes nothing else."""
        recent = (x[:, -self.eval_context_len :] for x in (rtg, obs, act, timestep, valid))
        s_t, _ = self.hidden(*recent, last=2).unbind(dim=1)
        return torch.tanh(self.action_head(s_t))

    def hidden(self, rtg, obs, act, timestep, valid, last: int):  # -> (B, last, D) float32, of the last tokens
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
            for i, block in enumerate(self.blocks, 1):
                x = block(x, keep[..., None], bias, last if i == len(self.blocks) else T)
        return self.norm_out(x.float())


def make_policy(task: "Task", config: dict, bf16: bool) -> Policy:
    """The policy that a checkpoint's configuration describes (randomly initialised from torch's global generator)."""
    sizes = (config[name] for name in ("embed_dim", "n_layer", "n_head", "max_timestep", "conv", "dropout"))
    policy = Policy(task.obs_dim, task.act_dim, *sizes, bf16=bf16)
    policy.eval_context_len = config.get("eval_context_len") or 0  # a baseline has none
    return policy


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether the blocks run in bfloat16; `auto`: where the hardware multiplies it, as CUDA, AMX and AVX-512 can."""
    if precision == "auto" and device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        cpu = torch.cpu.get_capabilities()
        return cpu.get("amx_bf16", False) or cpu.get("avx512_bf16", False)
    return precision == "bf16"


# ======== end of shared: policy ========


# ======== shared: rollout ========


class Rollouts(NamedTuple):
    """n finished episodes, in the order of their targets; after an episode's end the per-step arrays hold NaN."""

    returns: np.ndarray  # (n,) raw
    lengths: np.ndarray  # (n,)
    rewards: np.ndarray  # (n, T)
    velocities: np.ndarray  # (n, T) forward, m/s
    first_obs: torch.Tensor  # (n, obs_dim) standardised
    first_act: torch.Tensor  # (n, act_dim)
    qpos: np.ndarray | None  # (n, T, nq) MuJoCo's positions after each step, if asked for

    @property
    def velocity(self) -> np.ndarray:
        """(n,) mean forward velocity, m/s."""
        return np.nanmean(self.velocities, axis=1)


@torch.no_grad()
def rollout(trained, targets, seeds, horizon: int, what: str, reward_function=None, keep_qpos=False) -> Rollouts:
    """Roll the policy out once per (raw target return, seed), all in lockstep as one batch.

    The context is the last K steps, padded and masked as in training; the RTG token starts at target / rtg_scale and
    falls by every reward, RTG_{t+1} = RTG_t - r_t: the environment's, or reward_function(velocities (m,), actions (m,
    act_dim)). A rollout that has ended leaves the batch.
    """
    policy, task, content = trained.policy, trained.task, trained.content
    n, K, device = len(targets), content["config"]["context_len"], next(policy.parameters()).device
    simulator, targets = Simulator(task.env_id, seeds), np.asarray(targets, dtype=np.float64)
    obs_mean, obs_std = content["obs_mean"].to(device), content["obs_std"].to(device)
    # histories start with K - 1 steps of padding, so that the context of step t is always [t, t + K)
    sizes = ((), obs_mean.shape, (task.act_dim,))
    rtg, obs, act = (torch.zeros(n, horizon + K - 1, *size, device=device) for size in sizes)
    timestep = torch.arange(1 - K, horizon, device=device)
    alive, returns, lengths = np.arange(n), np.zeros(n), np.zeros(n, dtype=np.int64)
    rewards, velocities = np.full((2, n, horizon), np.nan)
    qpos = np.full((n, horizon, simulator.model.nq), np.nan) if keep_qpos else None
    observation = simulator.observe(alive)
    for t in (bar := tqdm(range(horizon), unit="step", desc=what, dynamic_ncols=True, disable=None)):
        rows, now, window = torch.as_tensor(alive, device=device), t + K - 1, slice(t, t + K)
        obs[rows, now] = (torch.as_tensor(observation, dtype=torch.float32, device=device) - obs_mean) / obs_std
        rtg_now = (targets[alive] - returns[alive]) / task.rtg_scale
        rtg[rows, now] = torch.as_tensor(rtg_now, dtype=torch.float32, device=device)
        times = timestep[window].expand(len(alive), K)
        action = policy.act(rtg[rows, window], obs[rows, window], act[rows, window], times.clamp(min=0), times >= 0)
        act[rows, now] = action
        action = action.cpu().numpy().astype(np.float64)
        observation, reward, terminated, velocity = simulator.step(alive, action)
        if reward_function is not None:
            reward = reward_function(velocity, action)
        returns[alive] += reward
        lengths[alive] += 1
        rewards[alive, t], velocities[alive, t] = reward, velocity
        if keep_qpos:
            qpos[alive, t] = simulator.qpos[alive]
        alive, observation = alive[~terminated], observation[~terminated]
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
    candidates = np.linspace(1000 * v - width, 1000 * v + width, budget)  # 1000: steps of a training episode
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
    figure, (left, right) = new_figure(1, 2, figsize=(11, 4.6))
    for i, record in enumerate(records):
        ends, budget = record["results"][0]["ends"], record["results"][0]["budget"]
        for result in (one for one in record["results"] if one["budget"] == budget):
            style = dict(color=f"C{i}", linestyle={"two-point": "-", "monotone": ":"}[result["calibration"]])
            columns = ("velocity", "rtg", "velocity_mean", "velocity_std")
            v, rtg, mean, std = ([row[name] for row in result["velocities"]] for name in columns)
            label = f"{label_of(record)}, {result['calibration']}"
            left.errorbar(v, mean, std, marker="o", capsize=2, label=label, **style)
            right.plot(rtg, v, **style)
        for end in ends:
            right.plot(end["rtg"], end["velocity_mean"], ".", color=f"C{i}")
            right.plot(end["best_rtg"], end["velocity"], "*", markersize=12, color=f"C{i}")
    v = [row["velocity"] for row in records[0]["results"][0]["velocities"]]
    left.plot(v, v, "--", color="0.5", linewidth=1, label="realised = target")
    left.set(xlabel="target velocity (m/s)", ylabel="realised velocity (m/s; bar: one std over episodes)")
    left.legend(fontsize="small")
    right.axvspan(*records[0]["data_returns"], color="0.92", zorder=0)
    right.set(xlabel="RTG (raw; grey: returns of the data, outside it is extrapolation)", ylabel="velocity (m/s)")
    right.set_title("lines: RTG(v); dots: realised by the candidates; stars: best candidates", fontsize="small")
    figure.suptitle(title, fontsize="small")
    return figure


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    device = pick_device(args.device)
    name = args.env or ("" if args.checkpoint else "halfcheetah-mini")
    run_folder = f"{parse_env(name).folder if name else ''}__{args.exp_name}__{args.seed}"
    path = Path(args.checkpoint or Path(args.runs_dir) / run_folder / "policy.pt")
    policies = [load_policy(Path(p), args.precision, device) for p in (path, *args.compare)]
    if name and name != policies[0].task.name:
        fail(f"{path} was trained on --env {policies[0].task.name}, not {name}")
    for one in policies:
        if one.task.body != "halfcheetah":
            fail(f"{one.path} is a policy of {one.task.body}; HalfCheetah-Vel needs one of halfcheetah")
    if not os.access(path.parent, os.W_OK):
        fail(f"{path.parent}: cannot write there; copy the checkpoint to a folder of your own")
    renderer = make_renderer(policies[0].task.env_id) if args.video else None

    tasks, steps = (EXTENDED, EXTENDED_STEPS) if args.extended else (GRID, STEPS)
    named = {"held-out": EXTENDED if args.extended else HELD_OUT, "grid": tasks}
    velocities = np.array(named.get(args.velocities, args.velocities))
    records = [
        transfer(one, velocities, (tasks[0], tasks[-1]), steps, args) for one in policies
    ]  # calibrated at the grid's ends
    rows = []
    for record in records:
        for result in record["results"]:
            which = {k: record[k] for k in ("checkpoint", "seed")} | {k: result[k] for k in ("calibration", "budget")}
            rows += [which | row for row in result["velocities"]]
            ends = ", ".join(f"RTG {end['best_rtg']:.0f} at {end['velocity']:g} m/s" for end in result["ends"])
            print(f"\n{record['checkpoint']}: best of {result['budget']} candidates {ends}")
            error = f"{result['tracking_error']:.2f} m/s per step, {result['velocity_error']:.2f} m/s per episode"
            still = f"standing still {result['standing_still']:.1f}"
            print(f"{result['calibration']}: mean return {result['return_mean']:.1f} ({still}), tracking error {error}")
            columns = [k for k in result["velocities"][0] if not k.endswith("std")]
            print("".join(f"{k:>15}" for k in columns))
            for row in result["velocities"]:
                print("".join(f"{row[k]:15.3f}" for k in columns))
    setting = {"steps": steps, "rollouts": args.rollouts, "episode_seed": args.seed, "device": device.type}
    setting |= {"calibration_rollouts": args.calibration_rollouts, "calibration_width": args.calibration_width}
    result = setting | records[0] | ({"compare": records[1:]} if args.compare else {})
    stem = path.parent / f"transfer{'_extended' * args.extended}{'_best' * (path.name == 'policy_best.pt')}"
    title = f"HalfCheetah-Vel, {steps} steps, zero-shot; trained on {policies[0].content['data']['label']}"
    write_results(stem, result, rows, plot(records, f"{title}\n{args.rollouts} rollouts per target velocity"))
    print(f"\n{stem}.json, .csv, .png")
    if args.video:
        first = records[0]["results"][0]
        rtg = RTG_OF[first["calibration"]](args.video, *first["ends"])
        captions = [f"target {v:g} m/s" for v in args.video]
        seeds = [args.seed] * len(rtg)
        gif = video(policies[0], rtg, captions, seeds, steps, renderer, reward_function=training_reward)
        write_file(stem.with_suffix(".gif"), gif)
        print(f"one episode per target velocity: {stem}.gif")


# ======== shared: results ========


BASELINES = ("train_radt", "train_vdt", "tune_vdt", "train_qt", "train_rvdt")  # in baselines/, with policies as here


class Trained(NamedTuple):
    """A policy.pt of stage 2 or of a baseline, ready to roll out."""

    path: Path
    task: "Task"
    policy: Policy
    content: dict  # everything that the file holds

    def identity(self) -> dict:
        """What result files say of a checkpoint."""
        config, step = {"average": 0.0, "eval_context_len": 0} | self.content["config"], self.content["step"]
        names = ("seed", "total_steps", "lambda_e", "max_push", "action_noise", "dropout", "average")
        names += ("eval_context_len", "alignment", "conv", "state_loss")
        names = {name: config[name] for name in names[: 2 if "method" in config else None]}
        method = config.get("method") or method_of(config["lambda_e"], config["conv"], config["state_loss"])
        trained_on = {"env": self.task.name, "trained_on": self.content["data"]}
        return {"checkpoint": str(self.path), "method": method, "step": step} | trained_on | names


def method_of(lambda_e: float, conv: bool, state_loss: bool) -> str:
    """The project's name of a variant; "DT" is Chen et al.'s Decision Transformer."""
    if lambda_e > 0 and conv:
        return "Q-Align DT"
    return "DT" + " + state loss" * state_loss + " + conv" * conv + " + alignment" * (lambda_e > 0)


def label_of(record: dict) -> str:
    best = ", best checkpoint" if Path(record["checkpoint"]).name == "policy_best.pt" else ""
    ours = ("max_push", "action_noise", "average") if record.get("lambda_e") else ("average",)
    ours = "".join(f", {name} {record[name]:g}" for name in ours if record.get(name))
    return f"{record['method']}, seed {record['seed']}{ours}{best}"


def load_policy(path: Path, precision: str, device: torch.device) -> Trained:
    """Read a checkpoint of stage 2 or of a baseline; exits 2 if it is anything else."""
    content = load_checkpoint(path, "train_qalign_dt", *BASELINES)
    make = make_policy if content["stage"] == "train_qalign_dt" else baseline(content["stage"]).make_policy
    try:
        task, config = parse_env(content["env"]), content["config"]
        policy = make(task, config, use_bf16(precision, device))
        policy.load_state_dict(content["policy"])
        found = Trained(path, task, policy.to(device).eval(), content)
        # a KeyError now, not after a sweep
        _ = found.identity(), content["data"]["label"], content["data"]["is_d4rl"], content["obs_mean"]
        _ = content["obs_std"], config["context_len"], content["critic"] and (config["gamma"], config["critic_width"])
        if not (len(content["episode_returns"]) and all(p.isfinite().all() for p in policy.parameters())):
            raise ValueError("weights that are not finite")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        fail(f"{path}: not a whole checkpoint ({one_line(error)}); train it again")
    if content["step"] < config["total_steps"]:
        print(f"note: {path} is at step {content['step']:,} of {config['total_steps']:,}")
    return found


def baseline(name: str):
    """The module baselines/<name>.py, for a name of BASELINES."""
    script = Path(__file__).resolve().parent / "baselines" / f"{name}.py"
    if not script.is_file():
        fail(f"{script} is missing; the policy's network is defined there")
    spec = importlib.util.spec_from_file_location(name, script)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def new_figure(*shape, figsize, **options):
    """Matplotlib's figure and axes, without a screen."""
    from matplotlib.figure import Figure  # imported here: it takes a while

    figure = Figure(figsize=figsize, layout="constrained")
    axes = figure.subplots(*shape, **options)
    for one in np.ravel(axes):
        one.grid(alpha=0.3)
    return figure, axes


def write_results(stem: Path, result: dict, rows: list[dict], figure) -> None:
    """<stem>.json, .csv (of rows) and, if there is a figure, .png."""
    lines = [",".join(f'"{x}"' if isinstance(x, str) else f"{x}" for x in row.values()) for row in rows]
    write_file(stem.with_suffix(".csv"), "\n".join([",".join(rows[0]), *lines, ""]).encode())
    if figure:
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        write_file(stem.with_suffix(".png"), picture.getvalue())
    write_file(stem.with_suffix(".json"), (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())


def make_renderer(env_id: str):
    """MuJoCo's offscreen renderer; exits 2 where no OpenGL works."""
    try:
        import mujoco

        with warnings.catch_warnings(action="ignore"):
            return mujoco.Renderer(make_env(env_id).model, 200, 240)
    except Exception as error:  # each OpenGL backend has kinds of its own
        fail(f"--video: MuJoCo finds no OpenGL here ({one_line(error):.80}); without a screen, set MUJOCO_GL=egl")


def video(trained: Trained, targets, captions, seeds, steps: int, renderer, **options) -> bytes:
    """A GIF of one episode per raw target return, side by side, up to 10 s at 12 frames a second in real time."""
    import mujoco
    from PIL import Image, ImageDraw

    result = rollout(trained, targets, seeds, steps, "video", keep_qpos=True, **options)
    env = make_env(trained.task.env_id)
    stride, steps = max(1, round(0.08 / env.dt)), min(int(result.lengths.max()), round(10 / env.dt))
    frames = []
    for t in range(0, steps, stride):
        panels = []
        for i, caption in enumerate(captions):
            now = min(t, int(result.lengths[i]) - 1)
            env.data.qpos[:], env.data.qvel[:] = result.qpos[i, now], 0
            mujoco.mj_forward(env.model, env.data)
            renderer.update_scene(env.data, camera="above" if trained.task.body == "antmaze" else "track")
            panel = Image.fromarray(renderer.render())
            state = f"ended at step {now + 1}" if t > now else f"{result.velocities[i, now]:.1f} m/s"
            ImageDraw.Draw(panel).multiline_text((6, 4), f"{caption}\n{state}", fill=(255, 255, 255))
            panels.append(np.asarray(panel))
        frames.append(Image.fromarray(np.concatenate(panels, axis=1)).quantize(48))
    gif, duration = io.BytesIO(), round(1000 * stride * env.dt)  # ms
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
    return gif.getvalue()


# ======== end of shared: results ========

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

# ======== shared: simulator ========

# v5 (Minari) differs from v4 in the model of Walker2d, and in that a fall earns no bonus of 1 for being healthy.
BODY_IDS = {f"{body}-{v}": body.lower() for body in ("Hopper", "HalfCheetah", "Walker2d") for v in ("v4", "v5")}
BODY_IDS["Ant-v4"] = "ant"


class Simulator:
    """n copies of an environment (of BODY_IDS, Gymnasium's; or an AntMaze), advanced in lockstep by torch's threads.

    Initial states are those of env.reset(seed); observations, rewards and terminations those of env.step, without its
    time limit. Ant's observation is padded with zeros to D4RL's 111 numbers.
    """

    def __init__(self, env_id: str, seeds):
        self.env, self.body = make_env(env_id), BODY_IDS.get(env_id, "antmaze")
        self.bonus_after_fall = env_id.endswith("v4")
        from mujoco.batch import Batch  # after make_env, which sees to a bad MUJOCO_GL

        self.model, self.frame_skip, self.dt = self.env.model, self.env.frame_skip, self.env.dt
        self.batch = Batch(self.model, len(seeds), nthread=torch.get_num_threads())
        self.qpos, self.qvel, self.ctrl, self.xpos = map(self.batch.bind, ("qpos", "qvel", "ctrl", "xpos"))
        self.goals = np.zeros((len(seeds), 2))  # AntMaze's
        self.reset(np.arange(len(seeds)), seeds)

    def reset(self, index, seeds) -> None:
        """Start some of the simulations anew, each with its seed."""
        import mujoco

        for i, seed in zip(index, seeds):
            self.env.reset(seed=int(seed))
            mujoco.mj_getState(self.model, self.env.data, self.batch.state[i], mujoco.mjtState.mjSTATE_INTEGRATION)
            if self.body == "antmaze":
                self.goals[i] = self.env.goal
        if self.body == "ant":  # of which x_position needs the torso's frame
            self.batch.forward(index, stage=mujoco.mjtStage.mjSTAGE_POS)

    def observe(self, index) -> np.ndarray:
        """(m, obs_dim) float64: the observations of some of the simulations."""
        qpos, qvel = self.qpos[index], self.qvel[index]
        if self.body == "ant":
            return np.concatenate([qpos[:, 2:], qvel, np.zeros((len(qpos), 111 - 27))], axis=1)
        if self.body == "antmaze":
            return np.concatenate([qpos, qvel], axis=1)
        return np.concatenate([qpos[:, 1:], qvel if self.body == "halfcheetah" else qvel.clip(-10, 10)], axis=1)

    def x_position(self, index) -> np.ndarray:
        """(m,) whose difference is the forward velocity; Gymnasium's Ant reads it before the last substep."""
        return self.xpos[index, self.model.body("torso").id, 0] if self.body == "ant" else self.qpos[index, 0].copy()

    def step(self, index, actions):
        """One env.step of the simulations `index` (m,), given actions (m, act_dim).

        Returns observations (m, obs_dim), rewards, terminated and forward velocities in m/s, each (m,).
        """
        before = self.x_position(index)
        self.ctrl[index] = actions
        self.batch.step(index, nstep=self.frame_skip)
        velocity, effort = (self.x_position(index) - before) / self.dt, np.square(actions).sum(axis=1)
        state = np.concatenate([self.qpos[index], self.qvel[index]], axis=1)
        z, angle = state[:, 1], state[:, 2]
        if self.body == "halfcheetah":
            reward, healthy = velocity - 0.1 * effort, np.ones(len(state), bool)
        elif self.body == "hopper":
            healthy = (np.abs(state[:, 2:]) < 100).all(axis=1) & (z > 0.7) & (np.abs(angle) < 0.2)
            reward = velocity + (healthy | self.bonus_after_fall) - 1e-3 * effort
        elif self.body == "walker2d":
            healthy = (z > 0.8) & (z < 2.0) & (np.abs(angle) < 1.0)
            reward = velocity + (healthy | self.bonus_after_fall) - 1e-3 * effort
        elif self.body == "antmaze":
            reward = (np.linalg.norm(state[:, :2] - self.goals[index], axis=1) <= 0.5).astype(np.float64)
            healthy = reward == 0
        else:  # ant
            reward = velocity + 1.0 - 0.5 * effort
            healthy = np.isfinite(state).all(axis=1) & (state[:, 2] >= 0.2) & (state[:, 2] <= 1.0)
        return self.observe(index), reward, ~healthy, velocity


# ======== end of shared: simulator ========


if __name__ == "__main__":
    run(main)
