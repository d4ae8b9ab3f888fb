"""VDT: Value-Guided Decision Transformer, one of Q-Align DT's neighbours: its offline training and its planner.

    python baselines/train_vdt.py --env hopper-medium-v2

A Decision Transformer whose imitation is weighted by advantages, and which is pulled towards higher Q; and a planner
that rolls several return requests out in a learned model and takes the best one's first action (Algorithm 3):

    n_step_sums       y = r_t + ... + gamma^m V(s_{t+m}); never over an episode's end
    value_loss        V is the expectile of min_i Q'_i(s, a)
    policy_loss       mean(w (a - a_hat)^2) - lambda / nu mean(min_i Q'_i(s, a_hat)), w = min(exp(eta adv), 100)
    Model             (s, a) -> the change of s, and r
    Plan              sum of gamma^i min_i Q'_i(s_i, a_i) over E imagined steps, for each candidate return

Three phases, one after the other: Q and V (which never see the policy), the policy, the model. The poster decides;
its authors' code (ruthless-man/VDT) trains another loss, with n = 1, and plans in a second simulator. Ours: n, the
model, lambda's normalisation by nu, the mean over dimensions, and eta at the small preset. Otherwise eta is IQL's, and
so is the rewards' scale in Q and V.

Writes runs/<env>__<exp-name>__<seed>/ with policy.pt, resume.pt, metrics.csv and TensorBoard events; the same command
resumes (train_radt.py has the loop around the steps). tune_vdt.py imports ValueGuided.
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and stage 2's
from train_radt import RunArgs, fill_in, find_run, train

from train_qalign_dt import (
    Ensemble,
    Float,
    Int,
    Policy,
    Windows,
    checked,
    descend,
    ema_update,
    fail,
    make_policy,
    masked_mean,
    run,
)


@dataclass(frozen=True)
class Args(RunArgs):
    exp_name: str = "train_vdt"  # name of this experiment; the run folder is <runs-dir>/<env>__<exp-name>__<seed>
    # arithmetic of the transformer's blocks; auto: bf16 where the hardware has it. All else is always float32
    precision: Literal["auto", "bf16", "fp32"] = "auto"

    total_steps: Int = None  # gradient steps of the policy (default: 100,000; small: 5,000)
    embed_dim: Int = None  # width of the transformer (default: 256; small: 64)
    n_layer: Int = None  # number of transformer blocks (default: 6; small: 2)
    n_head: Int = None  # attention heads per block (default: 4; small: 2)
    # K, the window length in environment steps of three tokens (default: 20; small: 10)
    context_len: Int = None
    batch_size: Int = None  # windows per gradient step (default: 256; small: 64)
    actor_lr: Float = None  # Adam learning rate of the policy, cosine to 0 (default: 3e-4; small: 1e-3)

    value_steps: Int = None  # gradient steps of Q and V (default: 1,000,000; small: 10,000)
    # the first of --value-steps, whose targets are whole discounted returns, as n = infinity (default: 0; small: 9,000)
    warm_start_steps: Int = None
    critic_width: Int = None  # hidden width of Q and V (default: 256; small: 128)
    n_step: int = 5  # n of Q's targets
    expectile: Float = None  # epsilon of V (default: 0.7; AntMaze: 0.9)
    gamma: float = 0.99  # discount of Q and V
    # eta of the imitation's weights exp(eta * advantage); 0: none, as in Table 3 (default: 3, IQL's; small: 0.3)
    eta: Float = None
    q_weight: float = 1.0  # lambda, the weight of the Q term; 0: none (Table 3)
    # gradient steps of the environment model, which only `--inference plan` uses (default: 50,000; small: 5,000)
    model_steps: Int = None
    plan_steps: int = 5  # E, the number of Q terms that the planner sums; 1 is greedy

    def __post_init__(self):
        self.check(n_step=1, value_steps=1, plan_steps=1, best_return=-1e9)
        for name, x in (("gamma", self.gamma), ("expectile", self.expectile)):
            if x is not None and not 0 < x < 1:
                raise ValueError(f"--{name} {x}: must be between 0 and 1")


@dataclass(frozen=True)
class Config(Args):
    """Args with every default resolved; checkpoints hold it."""

    bf16: bool = False
    conv: bool = False  # the shared policy without Q-Align DT's convolution
    dropout: float = 0.1  # of the policy in training; small: 0
    max_timestep: int = 1000  # entries of the timestep embedding
    reward_scale: float = 1.0  # of the rewards that Q and V see: only so does eta mean the same for every task
    best_return: float = 0.0  # of the data, raw: the planner's candidates are multiples of it
    method: str = "VDT"  # what tables and figures call it


PAPER = dict(total_steps=100_000, embed_dim=256, n_layer=6, n_head=4, context_len=20, batch_size=256, actor_lr=3e-4)
PAPER |= dict(value_steps=1_000_000, warm_start_steps=0, critic_width=256, model_steps=50_000, dropout=0.1, eta=3.0)
SMALL = dict(total_steps=5_000, embed_dim=64, n_layer=2, n_head=2, context_len=10, batch_size=64, actor_lr=1e-3)
SMALL |= dict(value_steps=10_000, warm_start_steps=9_000, critic_width=128, model_steps=5_000, dropout=0.0, eta=0.3)
CRITIC_LR, CRITIC_BATCH, TAU, MAX_WEIGHT, MAX_GRAD_NORM = 3e-4, 256, 0.005, 100.0, 15.0
CANDIDATES, MODEL_WIDTH, MAX_STATE = (0.5, 0.75, 1.0, 1.2, 1.5), 256, 10.0  # of the planner: times the best return
HELD_OUT = 10  # every tenth episode only tests the model


def resolve(args: Args, task, data, device: torch.device) -> Config:
    """Fill in the defaults that depend on the task, the data and the hardware."""
    expectile = {"expectile": 0.9 if task.body == "antmaze" else 0.7}
    values = fill_in(args, task, data, device, PAPER | expectile, SMALL | expectile)
    values["warm_start_steps"] = min(values["warm_start_steps"], values["value_steps"])
    span = float(np.ptp(data.returns))
    values["reward_scale"] = 1000 / span if span and task.body != "antmaze" else 1.0  # IQL's
    values["best_return"] = float(data.returns.max())
    off = [name for name, x in (("without weights", values["eta"]), ("without Q term", args.q_weight)) if not x]
    values["method"] = ", ".join(["VDT", *off])
    return checked(Config, **values)


class Targets(NamedTuple):
    """n-step targets of Q, (N,) each: y = sums + discount * V(the state of row `boot`), where `usable`."""

    sums: torch.Tensor  # sum_{k<m} gamma^k r_{t+k}; m is n, or less at an episode's end
    boot: torch.Tensor  # the row t + m
    discount: torch.Tensor  # gamma^m, or 0 where V is dropped
    usable: torch.Tensor  # m > 0


class Transitions:
    """All rows of the dataset as Q, V and the model see them; reward scaled, observations standardised."""

    def __init__(self, data, windows: Windows, config):
        device = windows.rtg.device
        self.obs, self.act, rewards = windows.obs, windows.act, windows.reward.cpu().numpy() * config.reward_scale
        ended = data.terminals[data.ends - 1]
        self.whole, self.n_step = (  # targets with the whole return, and with n steps; the same rows have one
            Targets(*(torch.as_tensor(x).to(device) for x in n_step_sums(rewards, data.ends, ended, n, config.gamma)))
            for n in (len(rewards), config.n_step)
        )
        self.usable = torch.as_tensor(np.flatnonzero(self.whole.usable.cpu())).to(device)
        # the model learns from rows with a successor; whole episodes are held out
        last, episode = np.zeros(len(rewards), bool), np.repeat(np.arange(len(data.ends)), data.lengths)
        last[data.ends - 1] = True
        held_out = episode % HELD_OUT == HELD_OUT - 1
        self.learn, self.test = (torch.as_tensor(np.flatnonzero(~last & x)).to(device) for x in (~held_out, held_out))
        self.raw_reward = torch.as_tensor(data.rewards).to(device)


def n_step_sums(rewards, ends, ended, n: int, gamma: float) -> tuple[np.ndarray, ...]:
    """What Targets holds, from rewards (N,), ends (E,) of the episodes (exclusive) and ended (E,): by a terminal.

    m is n, or less: up to and with a terminal; after a timeout up to the last observed state.
    """
    starts = np.append(0, ends[:-1])
    lengths, row = ends - starts, np.arange(len(rewards))
    end, terminal = np.repeat(ends, lengths), np.repeat(ended, lengths)
    counted = np.where((row == end - 1) & ~terminal, 0, rewards).astype(np.float64)  # a timeout's last reward is not
    rest = np.zeros(len(rewards) + 1)  # discounted sum of the counted rewards to the end of the episode
    for j in range(lengths.max()):  # steps before the end, all episodes at once
        i = (ends - 1 - j)[lengths > j]
        rest[i] = counted[i] + gamma * np.where(j > 0, rest[i + 1], 0)
    m = np.minimum(n, end - row - ~terminal)
    over = row + m == end  # only after a terminal
    discount = np.where(over, 0, gamma**m)
    boot = np.where(over, row, row + m)
    return (rest[:-1] - discount * rest[boot]).astype(np.float32), boot, discount.astype(np.float32), m > 0


def value_loss(v, target_q, expectile: float) -> torch.Tensor:
    """L_V = mean |eps - 1{u < 0}| u^2, u = min_i Q'_i(s, a) - V(s): v (B,), target_q (2, B)."""
    u = target_q.amin(dim=0) - v
    return ((expectile - (u < 0).float()).abs() * u**2).mean()


def policy_loss(a_hat, act, adv, q_hat, valid, eta: float, q_weight: float):
    """mean(w (a - a_hat)^2) - lambda / nu mean(min_i Q'_i(s, a_hat)); also the action loss, mean and clipped w, nu.

    a_hat, act (B, K, act_dim); adv (B, K): min_i Q'_i(s, a) - V(s); q_hat (2, B, K): Q'_i(s, a_hat); valid (B, K).
    """
    with torch.no_grad():
        w = torch.exp(eta * adv).clamp(max=MAX_WEIGHT)
    error = ((act - a_hat) ** 2).mean(dim=-1)  # (B, K)
    q = q_hat.amin(dim=0)
    nu = masked_mean(q.detach().abs(), valid)
    loss = masked_mean(w * error, valid) - q_weight / nu.clamp(min=1e-6) * masked_mean(q, valid)
    clipped = masked_mean((w == MAX_WEIGHT).float(), valid)
    return loss, (masked_mean(error, valid).detach(), masked_mean(w, valid), clipped, nu)


class ValueGuided:
    """Policy, twin Q and V, and one gradient step of each."""

    def __init__(self, task, config, device: torch.device):
        """Sets torch's global seed."""
        self.config = config
        torch.manual_seed(config.seed)  # of the weights and of dropout
        self.generator = torch.Generator(device).manual_seed(config.seed)  # of all batches
        self.policy = make_policy(task, vars(config), config.bf16).to(device)
        self.critic = Ensemble(2, task.obs_dim + task.act_dim, config.critic_width).to(device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.value = Ensemble(1, task.obs_dim, config.critic_width).to(device)
        self.value_opt = torch.optim.Adam([*self.critic.parameters(), *self.value.parameters()], CRITIC_LR, fused=True)
        self.actor_opt = torch.optim.Adam(self.policy.parameters(), config.actor_lr, fused=True)
        nets = dict(policy=self.policy, critic=self.critic, target_critic=self.target_critic, value=self.value)
        self.saved_state = nets | dict(value_opt=self.value_opt, actor_opt=self.actor_opt)  # what resume.pt holds

    def draw(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[torch.randint(len(rows), (CRITIC_BATCH,), generator=self.generator, device=rows.device)]

    def value_step(self, rows: Transitions, targets: Targets) -> dict:
        """Q and V; returns what to log."""
        i = self.draw(rows.usable)
        with torch.no_grad():
            y = targets.sums[i] + targets.discount[i] * self.value(rows.obs[targets.boot[i]]).squeeze(0)
            target_q = self.target_critic(rows.obs[i], rows.act[i])
        v_loss = value_loss(self.value(rows.obs[i]).squeeze(0), target_q, self.config.expectile)
        q = self.critic(rows.obs[i], rows.act[i])  # (2, B)
        q_loss = ((q - y) ** 2).mean(dim=1).sum()
        descend(self.value_opt, q_loss + v_loss, math.inf)
        ema_update(self.target_critic, self.critic, TAU)
        return {"q_loss": q_loss, "v_loss": v_loss, "q_mean": q[0].mean()}

    def policy_step(self, windows: Windows, lr: float) -> dict:
        """The policy; returns what to log."""
        self.actor_opt.param_groups[0]["lr"] = lr
        batch = windows.sample(self.config.batch_size, self.generator)
        a_hat, _ = self.policy(*batch.inputs)
        with torch.no_grad():
            adv = self.target_critic(batch.obs, batch.act).amin(dim=0) - self.value(batch.obs).squeeze(0)
        q_hat = self.target_critic(batch.obs, a_hat)
        loss, found = policy_loss(a_hat, batch.act, adv, q_hat, batch.valid, self.config.eta, self.config.q_weight)
        descend(self.actor_opt, loss, MAX_GRAD_NORM)
        return dict(zip(("loss", "action_loss", "weight", "clipped", "nu"), (loss, *found)))


# ---- the planner


class Model(nn.Module):
    """(s, a) -> s', r: one MLP for the change of the standardised state and the raw reward, both standardised."""

    def __init__(self, obs_dim: int, act_dim: int, width: int):
        super().__init__()
        sizes = (obs_dim + act_dim, width, width, width)
        layers = [layer for i, o in zip(sizes, sizes[1:]) for layer in (nn.Linear(i, o), nn.Mish())]
        self.net = nn.Sequential(*layers, nn.Linear(width, obs_dim + 1))
        self.register_buffer("mean", torch.zeros(obs_dim + 1))  # of change and reward
        self.register_buffer("std", torch.ones(obs_dim + 1))

    def fit_scale(self, change_and_reward: torch.Tensor) -> None:
        """From (N, obs_dim + 1). (Changes are divided by their std only, as their mean is almost 0.)"""
        self.std.copy_(change_and_reward.std(dim=0) + 1e-6)
        self.mean[-1] = change_and_reward[:, -1].mean()

    def loss(self, obs, act, change_and_reward) -> torch.Tensor:
        target = (change_and_reward - self.mean) / self.std
        return ((self.net(torch.cat([obs, act], dim=-1)) - target) ** 2).mean()

    def forward(self, obs, act):  # (B, obs_dim) standardised, (B, act_dim) -> (B, obs_dim), raw reward (B,)
        out = self.net(torch.cat([obs, act], dim=-1)) * self.std + self.mean
        return (obs + out[:, :-1]).clamp(-MAX_STATE, MAX_STATE), out[:, -1]


class Plan(nn.Module):
    """Algorithm 3 as a policy: `act` takes the first action of the best of several imagined futures.

    offsets (m,): candidate returns minus the one that the rollout asked for (the data's best), normalised. All
    candidates share the executed actions and lose the real rewards, so each one's RTG history is the given one plus
    its offset.
    """

    def __init__(self, policy, critic, model, offsets, rtg_scale: float, gamma: float, steps: int, max_timestep: int):
        super().__init__()
        self.policy, self.critic, self.model = policy, critic, model
        self.offsets, self.rtg_scale, self.gamma, self.steps = torch.as_tensor(offsets), rtg_scale, gamma, steps
        self.last_time = max_timestep - 1

    def act(self, rtg, obs, act, timestep, valid):
        m, (B, K) = len(self.offsets), rtg.shape
        rtg, obs, act, timestep, valid = (x.repeat_interleave(m, dim=0) for x in (rtg, obs, act, timestep, valid))
        rtg = rtg + self.offsets.to(rtg).repeat(B)[:, None] * valid
        action = first = self.policy.act(rtg, obs, act, timestep, valid)  # (B m, act_dim)
        total = self.critic(obs[:, -1], action).amin(dim=0)
        for i in range(1, self.steps):
            state, reward = self.model(obs[:, -1], action)
            act = torch.cat([act[:, 1:-1], action[:, None], torch.zeros_like(action)[:, None]], dim=1)[:, -K:]
            rtg = torch.cat([rtg[:, 1:], rtg[:, -1:] - reward[:, None] / self.rtg_scale], dim=1)
            obs = torch.cat([obs[:, 1:], state[:, None]], dim=1)
            timestep = torch.cat([timestep[:, 1:], (timestep[:, -1:] + 1).clamp(max=self.last_time)], dim=1)
            valid = torch.cat([valid[:, 1:], torch.ones_like(valid[:, :1])], dim=1)
            action = self.policy.act(rtg, obs, act, timestep, valid)
            total = total + self.gamma**i * self.critic(state, action).amin(dim=0)
        best = total.view(B, m).argmax(dim=1)
        return first.view(B, m, -1)[torch.arange(B, device=best.device), best]


def make_planner(task, content: dict, policy: Policy) -> Plan:
    """The planner of a checkpoint, for rollouts that ask for the data's best return; ValueError if it has no model."""
    config, device = content["config"], next(policy.parameters()).device
    if not content["model"]:
        why = "its training ended before the model's" if config["model_steps"] else "trained with --model-steps 0"
        raise ValueError(f"{why}, so there is no model to plan in")
    critic = Ensemble(2, task.obs_dim + task.act_dim, config["critic_width"])
    model = Model(task.obs_dim, task.act_dim, MODEL_WIDTH)
    critic.load_state_dict(content["critic"])
    model.load_state_dict(content["model"])
    offsets = [(x - 1) * abs(config["best_return"]) / task.rtg_scale for x in CANDIDATES]
    how = (task.rtg_scale, config["gamma"], config["plan_steps"], config["max_timestep"])
    return Plan(policy, critic, model, offsets, *how).to(device).eval()


INFERENCE = {"plan": make_planner}  # what evaluate_alignment.py --high-targets --inference can ask for


# ---- training


class Training(ValueGuided):
    """The networks with the environment model, and one gradient step of whichever phase it is in."""

    metrics = ("q_loss", "v_loss", "q_mean", "loss", "action_loss", "weight", "clipped", "nu", "model_loss")

    def __init__(self, task, data, windows: Windows, config: Config):
        device = windows.rtg.device
        super().__init__(task, config, device)
        self.windows, self.rows = windows, Transitions(data, windows, config)
        self.model = Model(task.obs_dim, task.act_dim, MODEL_WIDTH).to(device)
        if len(self.rows.learn):
            self.model.fit_scale(self.change_and_reward(self.rows.learn))
        self.model_opt = torch.optim.Adam(self.model.net.parameters(), CRITIC_LR, fused=True)
        self.saved_state |= dict(model=self.model, model_opt=self.model_opt)

    def change_and_reward(self, i: torch.Tensor) -> torch.Tensor:
        rows = self.rows
        return torch.cat([rows.obs[i + 1] - rows.obs[i], rows.raw_reward[i, None]], dim=1)

    def step(self, step: int) -> torch.Tensor:
        """Gradient step number `step` of all phases; returns the values of `metrics` (9,), 0 where not computed."""
        config, rows = self.config, self.rows
        if step < config.value_steps:
            values = self.value_step(rows, rows.whole if step < config.warm_start_steps else rows.n_step)
        elif (step := step - config.value_steps) < config.total_steps:
            cosine = 0.5 * (1 + math.cos(math.pi * step / config.total_steps))
            values = self.policy_step(self.windows, config.actor_lr * cosine)
        else:
            i = self.draw(rows.learn)
            values = {"model_loss": self.model.loss(rows.obs[i], rows.act[i], self.change_and_reward(i))}
            descend(self.model_opt, values["model_loss"], math.inf)
        zero = torch.zeros((), device=self.windows.rtg.device)
        return torch.stack([values.get(name, zero).detach() for name in self.metrics])

    def content(self, step: int) -> dict:
        """Its own part of policy.pt; `step` there counts the policy's."""
        config = self.config
        done = config.model_steps > 0 and step == config.value_steps + config.total_steps + config.model_steps
        nets = dict(policy=self.policy.state_dict(), critic=self.target_critic.state_dict())
        nets |= dict(value=self.value.state_dict(), model=self.model.state_dict() if done else None)
        r2 = self.model_r2() if done else None
        return nets | dict(step=min(max(step - config.value_steps, 0), config.total_steps), model_r2=r2)

    @torch.no_grad()
    def model_r2(self) -> list[float]:
        """R^2 of each dimension of the change of state, and of the reward, on the held-out episodes."""
        i = self.rows.test
        state, reward = self.model(self.rows.obs[i], self.rows.act[i])
        true, error = self.change_and_reward(i), torch.cat([state - self.rows.obs[i], reward[:, None]], dim=1)
        error = ((error - true) ** 2).mean(dim=0) / true.var(dim=0, correction=0).clamp(min=1e-12)
        return (1 - error).tolist()


def main() -> None:
    found = find_run("train_vdt", Args, resolve, __doc__)
    task, config = found.data.task, found.config
    learner = Training(task, found.data, found.windows(), config)
    if not len(learner.rows.usable) or config.model_steps and not (len(learner.rows.learn) and len(learner.rows.test)):
        fail(f"{task.label}: too few episodes of more than one step; the model needs {HELD_OUT} (or --model-steps 0)")
    phases = (config.value_steps, config.total_steps, config.model_steps)
    print(f"{phases[0]:,} steps of Q and V, {phases[1]:,} of the policy, {phases[2]:,} of the model")
    train(found, learner, sum(phases))
    if config.model_steps:
        *r2, reward = learner.model_r2()
        print(f"model: R^2 on held-out episodes {np.mean(r2):.3f} (lowest {min(r2):.3f}), reward {reward:.3f}")


if __name__ == "__main__":
    run(main)
