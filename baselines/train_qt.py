"""QT: Q-value regularised Transformer (Hu et al., ICML 2024), one of Q-Align DT's neighbours and what it was built on.

    python pretrain_q.py --env hopper-medium-v2 && python baselines/train_qt.py --env hopper-medium-v2

A Decision Transformer that is pulled towards actions of higher Q, whatever return it is asked for, with a critic that
is trained on the policy's own last action:

    window_target     y_i = r_i + ... + gamma^{l-i} min_m Q'_m(s_l, a'_l), l the window's last step
    q_term            - mean Q_i(s, a_hat) / mean |Q_j(s, a_hat)|, (i, j) by a fair coin; eta times it joins L_SL
    Candidates        at test time: one action per candidate return, and the one of the highest Q acts

The paper's text was not at hand: its authors' code ("the release", charleshsc/QT) stands in for it. Ours: stage 1's
critic to start from, a true terminal's reward counts, dropout is off in targets, and the state loss is Q-Align DT's (a
return token predicts its own state; in the release an action token predicts the next one). See README.md for the rest.

Writes runs/<env>__<exp-name>__<seed>/ with policy.pt, resume.pt, metrics.csv and TensorBoard events; the same command
resumes (train_radt.py has the loop around the steps). train_rvdt.py imports the critic's half.
"""

import copy
import functools
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and stage 2's
from train_radt import RunArgs, fill_in, find_run, train

from train_qalign_dt import (
    Batch,
    Ensemble,
    Float,
    Int,
    Policy,
    Str,
    Windows,
    checked,
    descend,
    ema_update,
    make_policy,
    masked_mean,
    other_critic,
    pretrained,
    run,
    supervised_loss,
)


@dataclass(frozen=True)
class Args(RunArgs):
    exp_name: str = "train_qt"  # name of this experiment; the run folder is <runs-dir>/<env>__<exp-name>__<seed>
    # arithmetic of the transformer's blocks; auto: bf16 where the hardware has it. All else is always float32
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # stage 1's critic.pt to start from (default: the one of this env and seed, trained if it is missing); none: random
    # weights, as in the release
    critic: Str = ""

    # gradient steps; both learning rates fall to 0 over them (default: 100,000; small: 5,000)
    total_steps: Int = None
    embed_dim: Int = None  # width of the transformer (default: 256; small: 64)
    n_layer: Int = None  # number of transformer blocks (default: 4; small: 2)
    n_head: Int = None  # attention heads per block (default: 4; small: 2)
    # K, the window length in steps (default: 20; halfcheetah-medium and -medium-replay: 5; small: 10)
    context_len: Int = None
    batch_size: Int = None  # windows per gradient step (default: 256; small: 64)
    critic_width: Int = None  # hidden width of the critic, that of --critic (default: 256; small: 128)
    actor_lr: Float = None  # Adam learning rate of the policy, with L2 1e-4 (default: 3e-4; small: 1e-3)
    # weight of the Q term; 0 leaves a DT (default: the release's; ours where it has no value: expert and random as
    # medium-expert, AntMaze's play as diverse, Ant and own data 1)
    eta: Float = None
    gamma: float = 0.99  # discount of a random critic; stage 1's has its own

    def __post_init__(self):
        self.check(best_return=-1e9)
        if self.context_len == 1 and self.eta:
            raise ValueError("--context-len 1: Q's targets need two steps; take 2, or --eta 0")
        if not 0 < self.gamma < 1:
            raise ValueError(f"--gamma {self.gamma}: must be between 0 and 1")


@dataclass(frozen=True)
class Config(Args):
    """Args with every default resolved, and what the hardware, the data and the critic decide; checkpoints hold it."""

    bf16: bool = False
    conv: bool = False  # the shared policy without Q-Align DT's convolution
    dropout: float = 0.1  # of the policy in training; small: 0
    max_timestep: int = 1000  # entries of the timestep embedding
    max_grad_norm: float = 15.0  # of both networks
    best_return: float = 0.0  # of the data, raw
    method: str = "QT"  # what tables and figures call it


PAPER = dict(total_steps=100_000, embed_dim=256, n_layer=4, n_head=4, context_len=20, batch_size=256)
PAPER |= dict(critic_width=256, actor_lr=3e-4, dropout=0.1)
SMALL = dict(total_steps=5_000, embed_dim=64, n_layer=2, n_head=2, context_len=10, batch_size=64)
SMALL |= dict(critic_width=128, actor_lr=1e-3, dropout=0.0)
# The release's (run.sh): eta, and K where it is not 20, by <body>-<quality>; the gradient norm by body, or in the row
RELEASE = {
    "halfcheetah-medium": dict(eta=5.0, context_len=5),
    "halfcheetah-medium-replay": dict(eta=5.0, context_len=5),
    "halfcheetah-medium-expert": dict(eta=0.4),
    "hopper-medium": dict(eta=1.0),
    "hopper-medium-replay": dict(eta=3.0),
    "hopper-medium-expert": dict(eta=1.0),
    "walker2d-medium": dict(eta=2.0),
    "walker2d-medium-replay": dict(eta=2.0),
    "walker2d-medium-expert": dict(eta=2.0),
    "antmaze-umaze": dict(eta=0.05),
    "antmaze-umaze-diverse": dict(eta=0.01),
    "antmaze-medium-diverse": dict(eta=0.01),
    "antmaze-large-diverse": dict(eta=0.005),
    "maze2d-open": dict(eta=0.01),
    "maze2d-open-dense": dict(eta=0.01),
    "maze2d-umaze": dict(eta=5.0, max_grad_norm=20.0),
    "maze2d-umaze-dense": dict(eta=3.0, max_grad_norm=5.0),
    "maze2d-medium": dict(eta=5.0),
    "maze2d-medium-dense": dict(eta=5.0),
    "maze2d-large": dict(eta=4.0),
    "maze2d-large-dense": dict(eta=4.0),
}
GRAD_NORM = {"halfcheetah": 15.0, "hopper": 9.0, "walker2d": 5.0, "antmaze": 9.0, "maze2d": 9.0}
# ours, where it has no row: another quality's
STAND_IN = {"expert": "medium-expert", "random": "medium-expert"}
STAND_IN |= {"medium-play": "medium-diverse", "large-play": "large-diverse"}
FIXED_RETURNS = ("antmaze", "maze2d")  # a return means the same in all data, so own data take the release's row, too
CANDIDATES = {  # the release's evaluation targets, raw
    "halfcheetah": (12000, 9000, 6000),
    "hopper": (3600, 1800),
    "walker2d": (5000, 4000, 2500),
    "antmaze": (1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3),
    "maze2d": (300, 200, 150, 100, 50, 20),
}
OWN_CANDIDATES = (0.5, 0.75, 1.0, 1.2)  # of own data: times the best return (1.2 of -100 means -80)
CRITIC_LR, L2, TAU = 3e-4, 1e-4, 0.005
POLICY_EVERY, POLICY_AFTER = 5, 1000  # the target policy moves every 5th step, once 1,000 are done


def release_settings(task) -> dict:
    """The release's eta, gradient norm and K for a task; ours (eta 1, norm 15) where it has none."""
    name = f"{task.body}-{STAND_IN.get(task.quality, task.quality)}"
    row = RELEASE.get(name, {}) if task.tag == "v2" or task.body in FIXED_RETURNS else {}
    return dict(eta=1.0, max_grad_norm=GRAD_NORM.get(task.body, 15.0)) | row


def resolve(args: Args, task, data, device: torch.device) -> Config:
    """Fill in the defaults that depend on the task, the data and the hardware."""
    release = release_settings(task)
    values = fill_in(args, task, data, device, PAPER | release, release | SMALL)
    values["best_return"] = float(data.returns.max())
    values["critic"] = "none" if args.critic == "none" else other_critic(args) or "stage 1"
    return checked(Config, **values)


def window_target(batch: Batch, q_last, gamma: float):
    """y_i = sum_{k=i}^{l-1} gamma^{k-i} r_k + gamma^{l-i} q_last, l the window's last step, and where it is defined.

    q_last (B,): min_m Q'_m(s_l, a'_l) -> y (B, K), mask (B, K). If l is a true terminal, y_i sums through r_l without
    q_last, and y_l = r_l; otherwise step l has no target.
    """
    terminal = batch.terminal[:, -1]
    y = torch.where(terminal, batch.reward[:, -1], q_last)
    columns = [y]
    for i in reversed(range(batch.reward.shape[1] - 1)):
        y = batch.reward[:, i] + gamma * y
        columns.append(y)
    last = torch.arange(batch.valid.shape[1], device=y.device) == batch.valid.shape[1] - 1  # (K,)
    return torch.stack(columns[::-1], dim=1), batch.valid & (~last | terminal[:, None])


def q_term(q_pair, valid, coin):
    """-mean Q_i(s, a_hat) / mean |Q_j(s, a_hat)|: q_pair (2, B, K), coin (): 0 takes i = 1, 1 takes i = 2."""
    q_i, q_j = torch.where(coin == 0, q_pair, q_pair.flip(0))
    return -masked_mean(q_i, valid) / masked_mean(q_j.detach().abs(), valid).clamp(min=1e-6)


class Training:
    """The networks and their targets, and one step of both."""

    metrics = ("q_loss", "q_mean", "loss", "action_loss", "state_loss", "q_term")

    def __init__(self, task, windows: Windows, config, critic_weights: dict | None = None, make=make_policy):
        """critic_weights: stage 1's (None: a random critic); make: the policy. Sets torch's global seed."""
        self.windows, self.config, device = windows, config, windows.rtg.device
        torch.manual_seed(config.seed)  # of the weights and of dropout
        self.generator = torch.Generator(device).manual_seed(config.seed)  # of the windows and the coin
        self.policy = make(task, vars(config), config.bf16).to(device)
        self.critic = Ensemble(2, task.obs_dim + task.act_dim, config.critic_width).to(device)
        if critic_weights:
            self.critic.load_state_dict(critic_weights)
        self.target_policy = copy.deepcopy(self.policy).requires_grad_(False).eval()
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        adam = torch.optim.Adam
        self.actor_opt = adam(self.policy.parameters(), lr=config.actor_lr, weight_decay=L2, fused=True)
        self.critic_opt = adam(self.critic.parameters(), lr=CRITIC_LR, fused=True)
        nets = dict(policy=self.policy, target_policy=self.target_policy)
        nets |= dict(critic=self.critic, target_critic=self.target_critic)
        self.saved_state = nets | dict(actor_opt=self.actor_opt, critic_opt=self.critic_opt)  # what resume.pt holds

    def step(self, step: int) -> torch.Tensor:
        """Returns the values of `metrics` (6,), on the device."""
        config = self.config
        self.set_learning_rates(step)
        batch = self.windows.sample(config.batch_size, self.generator)
        coin = torch.randint(2, (), generator=self.generator, device=batch.rtg.device)
        q_loss = q_mean = term = torch.zeros((), device=batch.rtg.device)
        if config.eta:
            with torch.no_grad():
                a_last = self.target_policy.act(*batch.inputs)
            q_loss, q_mean = self.critic_step(batch, a_last)
        a_hat, s_hat = self.policy(*batch.inputs)
        action_loss, state_loss = supervised_loss(a_hat, s_hat, batch)
        loss = action_loss + state_loss
        if config.eta:
            term = self.q_term_at(a_hat, batch, coin)
            loss = loss + config.eta * term
        descend(self.actor_opt, loss, config.max_grad_norm)
        if config.eta:
            self.move_targets(step)
        return torch.stack([q_loss, q_mean, loss, action_loss, state_loss, term]).detach()

    def set_learning_rates(self, step: int) -> None:
        """Both fall to 0 along a cosine."""
        factor = 0.5 * (1 + math.cos(math.pi * step / self.config.total_steps))
        self.actor_opt.param_groups[0]["lr"] = self.config.actor_lr * factor
        self.critic_opt.param_groups[0]["lr"] = CRITIC_LR * factor

    def critic_step(self, batch: Batch, a_last) -> tuple[torch.Tensor, torch.Tensor]:
        """a_last (B, act_dim): the target policy's at the windows' last step. Returns the loss, and the mean of Q_1."""
        with torch.no_grad():
            q_last = self.target_critic(batch.obs[:, -1], a_last).amin(dim=0)
            y, mask = window_target(batch, q_last, self.config.gamma)
        q = self.critic(batch.obs, batch.act)  # (2, B, K)
        q_loss = sum(masked_mean((q_m - y) ** 2, mask) for q_m in q)
        descend(self.critic_opt, q_loss, self.config.max_grad_norm)
        return q_loss, masked_mean(q[0], mask)

    def q_term_at(self, action, batch: Batch, coin) -> torch.Tensor:
        """q_term of actions (B, K, act_dim); the critic's weights get no gradient."""
        self.critic.requires_grad_(False)
        term = q_term(self.critic(batch.obs, action), batch.valid, coin)
        self.critic.requires_grad_(True)
        return term

    def move_targets(self, step: int) -> None:
        ema_update(self.target_critic, self.critic, TAU)
        if step > POLICY_AFTER and step % POLICY_EVERY == 0:
            ema_update(self.target_policy, self.policy, TAU)

    def content(self, step: int) -> dict:
        """Its own part of policy.pt."""
        critic = self.target_critic.state_dict() if self.config.eta else None  # without eta nothing has trained it
        return {"policy": self.policy.state_dict(), "critic": critic}


class Candidates(nn.Module):
    """QT at test time: one action per candidate return, of which Q chooses one, whatever return is requested.

    offsets (m,): candidate returns minus the requested one, normalised. All candidates share the executed actions and
    lose the real rewards, so each one's RTG history is the given one plus its offset. draw: by a softmax of Q.
    """

    def __init__(self, policy, critic, offsets, draw: bool):
        super().__init__()
        self.policy, self.critic, self.offsets, self.draw = policy, critic, torch.as_tensor(offsets), draw
        self.generator = torch.Generator().manual_seed(0)

    def act(self, rtg, obs, act, timestep, valid):
        m, B = len(self.offsets), len(rtg)
        rtg, obs, act, timestep, valid = (x.repeat_interleave(m, dim=0) for x in (rtg, obs, act, timestep, valid))
        action = self.policy.act(rtg + self.offsets.to(rtg).repeat(B)[:, None] * valid, obs, act, timestep, valid)
        q = self.critic(obs[:, -1], action).amin(dim=0).view(B, m)
        chosen = q.argmax(dim=1)
        if self.draw:
            chosen = torch.multinomial(q.softmax(dim=1).cpu(), 1, generator=self.generator)[:, 0].to(q.device)
        return action.view(B, m, -1)[torch.arange(B, device=q.device), chosen]


def make_candidates(task, content: dict, policy: Policy, draw: bool = False) -> Candidates:
    """A checkpoint's policy with its target critic, for rollouts that ask for the data's best return.

    ValueError if it has no critic.
    """
    config, device = content["config"], next(policy.parameters()).device
    if not content["critic"]:
        raise ValueError("trained with --eta 0, so there is no Q to choose by")
    critic, best = Ensemble(2, task.obs_dim + task.act_dim, config["critic_width"]), config["best_return"]
    critic.load_state_dict(content["critic"])
    of_release = CANDIDATES.get(task.body) if task.is_d4rl or task.body in FIXED_RETURNS else None
    candidates = of_release or [best + (x - 1) * abs(best) for x in OWN_CANDIDATES]
    offsets = [(x - best) / task.rtg_scale for x in candidates]
    return Candidates(policy, critic, offsets, draw).to(device).eval()


# what evaluate_alignment.py --high-targets --inference can ask for
INFERENCE = {"best": make_candidates, "softmax": functools.partial(make_candidates, draw=True)}


def from_stage_1(found) -> tuple:
    """A run's configuration, and stage 1's critic to start from, whose discount it then has; None where there is none.

    (A run that goes on has the critic in resume.pt.)
    """
    config = found.config
    if not config.eta or config.critic == "none" or found.state:
        return config, None
    weights, gamma, _ = pretrained(found.args, config, found.data)
    return replace(config, gamma=gamma), weights


def main() -> None:
    found = find_run("train_qt", Args, resolve, __doc__)
    config, critic_weights = from_stage_1(found)
    train(found, Training(found.data.task, found.windows(), config, critic_weights), config.total_steps)


if __name__ == "__main__":
    run(main)
