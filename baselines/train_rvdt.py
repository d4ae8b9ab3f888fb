"""RDT and RVDT: rebalanced returns, one of Q-Align DT's neighbours (return rebalancing by an expert on the best data).

    python pretrain_q.py --env hopper-medium-v2 && python baselines/train_rvdt.py --env hopper-medium-v2

A stochastic Decision Transformer that on the best trajectories D_e is also drawn to an expert policy of the state
alone, and towards higher Q as QT is:

    best_episodes     D_e: best returns first, up to a tenth of all time steps
    nll, kl           of Gaussians; with a fixed std, (2 sigma^2 / A) NLL is the mean squared error
    imitation_loss    (2 sigma^2 / A) NLL, or what stands for it
    expert_loss       alpha mean over D_e of (2 sigma^2 / A) KL(pi || pi^e)
    q_term            QT's, at a sampled action; eta times it

The poster's variants by flags: RDT is --eta 0; DT --eta 0 --rebalance none --std none; DT-Dup --eta 0 --rebalance dup;
QT --rebalance none --std none; VDT (in this poster's sense) --rebalance none; RVDT-Dup --rebalance dup; RVDT-Determ
--std none. None of them has a state loss, so "QT" is not quite train_qt.py's. "The release" is a fork of QT by one of
the authors, chufanchen/QT. Ours: the fixed Gaussian is centred on tanh(mu), the expert is used without dropout.

With a fixed std the KL term is a weighted likelihood (the poster's Proposition): where the expert is D_e's conditional
mean, its gradient is on average that of counting D_e's steps 1 + alpha / p times, p their share of all steps.

Writes runs/<env>__<exp-name>__<seed>/ with policy.pt, resume.pt, metrics.csv and TensorBoard events; the same command
resumes (train_radt.py has the loop around the steps). policy.pt has no expert: acting does not need it.
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and stage 2's
from train_qt import PAPER, SMALL, from_stage_1, release_settings
from train_qt import Args as QTArgs
from train_qt import Training as QTTraining
from train_radt import fill_in, find_run, train

from train_qalign_dt import Float, Int, Policy, Windows, check_args, checked, descend, masked_mean, other_critic, run


@dataclass(frozen=True)
class Args(QTArgs):
    """train_qt.py's, and what follows."""

    exp_name: str = "train_rvdt"  # name of this experiment; the run folder is <runs-dir>/<env>__<exp-name>__<seed>
    # K, the window length in environment steps of three tokens (default: 20; small: 10)
    context_len: Int = None
    eta: Float = None  # weight of the Q term; 0: none, as in RDT (default: train_qt.py's)
    # how the best trajectories count more: by the KL to the expert; by weight; by drawing them more often; not at all
    rebalance: Literal["kl", "weight", "dup", "none"] = "kl"
    alpha: float = 1.0  # weight of the KL term
    alpha_w: float = 4.0  # weight, dup: how much more a step of the best trajectories counts
    expert_fraction: float = 0.1  # share of all time steps that the best trajectories may have
    # std of the policy: 0.1; learned, its actions squashed by tanh; or none, a deterministic policy
    std: Literal["fixed", "learned", "none"] = "fixed"
    expert_steps: int = 20_000  # gradient steps of the expert at most

    def __post_init__(self):
        super().__post_init__()
        check_args(self, {"expert_steps": 1})
        if not 0 < self.expert_fraction <= 1:
            raise ValueError(f"--expert-fraction {self.expert_fraction}: must be between 0 and 1")


@dataclass(frozen=True)
class Config(Args):
    """Args with every default resolved, and what the hardware, the data and the critic decide; checkpoints hold it."""

    bf16: bool = False
    conv: bool = False  # the shared policy without Q-Align DT's convolution
    dropout: float = 0.1  # of the policy in training; small: 0
    max_timestep: int = 1000  # entries of the timestep embedding
    max_grad_norm: float = 15.0  # of both networks
    method: str = "RVDT"  # what tables and figures call it


SIGMA = 0.1  # the fixed std
EXPERT_BATCH, EXPERT_EVERY, EXPERT_PATIENCE = 256, 500, 4  # its held-out loss is looked at every so many steps


def resolve(args: Args, task, data, device: torch.device) -> Config:
    """Fill in the defaults that depend on the task, the data and the hardware."""
    qt = {name: x for name, x in release_settings(task).items() if name != "context_len"}
    values = fill_in(args, task, data, device, PAPER | qt, SMALL | qt)
    values["critic"] = "none" if args.critic == "none" else other_critic(args) or "stage 1"
    values["method"] = method_of(values["eta"], args.rebalance, args.std)
    return checked(Config, **values)


def method_of(eta: float, rebalance: str, std: str) -> str:
    """The poster's name of a variant, or its settings where it has none."""
    names = {
        (False, "none", "none"): "DT", (False, "dup", "fixed"): "DT-Dup", (False, "kl", "fixed"): "RDT",
        (True, "none", "none"): "QT", (True, "none", "fixed"): "VDT of RVDT's poster",
        (True, "dup", "fixed"): "RVDT-Dup", (True, "kl", "none"): "RVDT-Determ", (True, "kl", "fixed"): "RVDT",
    }  # fmt: skip
    return names.get((eta > 0, rebalance, std), f"RVDT, {rebalance}, {std} std, eta {eta:g}")


# ---- distributions


def nll(mu, std, a):
    """-log N(a; mu, std^2), summed over dimensions: (..., A) each -> (...)."""
    return (0.5 * ((a - mu) / std) ** 2 + torch.log(std) + 0.5 * math.log(2 * math.pi)).sum(dim=-1)


def squashed_nll(mu, std, a):
    """-log of the density of tanh(N(mu, std^2)) at a, summed over dimensions."""
    a = a.clamp(-1 + 1e-6, 1 - 1e-6)
    return nll(mu, std, torch.atanh(a)) + torch.log(1 - a**2).sum(dim=-1)


def kl(mu, std, mu_e, std_e):
    """KL(N(mu, std^2) || N(mu_e, std_e^2)), summed over dimensions; squashing both by tanh changes nothing."""
    return (torch.log(std_e / std) + (std**2 + (mu - mu_e) ** 2) / (2 * std_e**2) - 0.5).sum(dim=-1)


class Gaussian(Policy):
    """The shared policy as a distribution: forward returns its means and stds (B, K, act_dim); `act` is its mode.

    learned: mu and std are those before tanh; otherwise the mean is tanh(mu) and the std is SIGMA.
    """

    def __init__(self, obs_dim, act_dim, embed_dim, n_layer, n_head, max_timestep, dropout, learned: bool, bf16=False):
        super().__init__(obs_dim, act_dim, embed_dim, n_layer, n_head, max_timestep, False, dropout, bf16=bf16)
        self.std_head = nn.Linear(embed_dim, act_dim) if learned else None
        if learned:
            nn.init.normal_(self.std_head.weight, std=0.02)
            nn.init.zeros_(self.std_head.bias)

    def forward(self, rtg, obs, act, timestep, valid):
        x = self.hidden(rtg, obs, act, timestep, valid)[:, :, 1]  # of the state tokens
        return distribution(self.action_head(x), self.std_head(x) if self.std_head else None)


def distribution(mu, free):
    """Mean and std from a network's outputs (..., A); free: the std's, before its bounds; None: it is SIGMA."""
    if free is None:
        return torch.tanh(mu), torch.full_like(mu, SIGMA)
    return mu, torch.exp(-5 + 3.5 * (torch.tanh(free) + 1))


def make_policy(task, config: dict, bf16: bool) -> Gaussian:
    """The policy that a checkpoint's configuration describes (randomly initialised from torch's global generator)."""
    sizes = (config[name] for name in ("embed_dim", "n_layer", "n_head", "max_timestep", "dropout"))
    return Gaussian(task.obs_dim, task.act_dim, *sizes, learned=config["std"] == "learned", bf16=bf16)


def sample(mu, std, kind: str, generator: torch.Generator):
    """A reparameterised action; the mode of a deterministic policy."""
    if kind == "none":
        return mu
    a = mu + std * torch.randn(mu.shape, generator=generator, device=mu.device)
    return torch.tanh(a) if kind == "learned" else a.clamp(-1, 1)


# ---- the best trajectories and their expert


def best_episodes(returns: np.ndarray, lengths: np.ndarray, fraction: float) -> np.ndarray:
    """(E,) bool, D_e: whole episodes, best return first, while their steps stay within a fraction; at least one."""
    order = np.argsort(-returns, kind="stable")  # ties by index
    within = np.cumsum(lengths[order]) <= fraction * lengths.sum()
    chosen = np.zeros(len(returns), bool)
    chosen[order[: max(1, int(within.sum()))]] = True
    return chosen


class Expert(nn.Module):
    """pi^e(. | s): two hidden layers of 256, ReLU, dropout 0.1; mean and std as the policy's."""

    def __init__(self, obs_dim: int, act_dim: int, learned: bool):
        super().__init__()
        layers = (nn.Linear(obs_dim, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.1))
        self.learned, self.net = learned, nn.Sequential(*layers, nn.Linear(256, act_dim * (1 + learned)))

    def forward(self, obs):
        return distribution(*self.net(obs).chunk(2, dim=-1)) if self.learned else distribution(self.net(obs), None)

    def loss(self, obs, act):
        mean, std = self(obs)
        return squashed_nll(mean, std, act).mean() if self.learned else ((mean - act) ** 2).mean()


def fit_expert(task, windows: Windows, data, chosen: np.ndarray, config: Config) -> Expert:
    """Imitates D_e, until the loss on its last tenth of episodes (of one episode: of steps) stops falling; frozen."""
    device = windows.obs.device
    torch.manual_seed(config.seed)
    generator = torch.Generator(device).manual_seed(config.seed)
    expert = Expert(task.obs_dim, task.act_dim, config.std == "learned").to(device)
    opt = torch.optim.AdamW(expert.parameters(), lr=3e-4, weight_decay=1e-4, fused=True)
    episodes = [np.arange(data.starts[i], data.ends[i]) for i in np.flatnonzero(chosen)]
    if len(episodes) == 1:
        episodes = np.array_split(episodes[0], min(10, len(episodes[0])))
    test = max(1, len(episodes) // 10)
    parts = episodes[:-test] or episodes, episodes[-test:]  # of a single step: the same
    learn, test = (torch.as_tensor(np.concatenate(x)).to(device) for x in parts)
    best, best_loss, since = copy.deepcopy(expert.state_dict()), math.inf, 0
    for step in range(config.expert_steps):
        i = learn[torch.randint(len(learn), (EXPERT_BATCH,), generator=generator, device=device)]
        descend(opt, expert.loss(windows.obs[i], windows.act[i]), math.inf)
        if (step + 1) % EXPERT_EVERY == 0 or step + 1 == config.expert_steps:
            expert.eval()
            with torch.no_grad():
                loss = expert.loss(windows.obs[test], windows.act[test]).item()
            expert.train()
            since += 1
            if loss < best_loss:
                best, best_loss, since = copy.deepcopy(expert.state_dict()), loss, 0
            if since == EXPERT_PATIENCE:
                break
    opt.zero_grad()  # frees the gradients
    expert.load_state_dict(best)
    print(f"expert: {len(episodes)} parts of the best data, {step + 1:,} steps, held-out loss {best_loss:.4f}")
    return expert.requires_grad_(False).eval()


# ---- losses


def imitation_loss(mu, std, act, valid, in_best, config: Config):
    """(2 sigma^2 / A) NLL (learned std: NLL / A; none: mean squared error), weighted on D_e if asked; up to a constant.

    mu, std, act (B, K, A); valid (B, K); in_best (B,): whether the window is of D_e.
    """
    A = act.shape[-1]
    if config.std == "learned":
        loss = squashed_nll(mu, std, act) / A
    else:  # (2 sigma^2 / A) NLL but for its constant
        loss = ((mu - act) ** 2).mean(dim=-1)
    if config.rebalance == "weight":
        loss = loss * (1 + config.alpha_w * in_best.float()[:, None])
    return masked_mean(loss, valid)


def expert_loss(mu, std, mu_e, std_e, valid, in_best, config: Config):
    """alpha times the mean over the steps of D_e of (2 sigma^2 / A) KL(pi || pi^e) (learned std: KL / A); none: 0."""
    A, mask = mu.shape[-1], valid & in_best[:, None]
    if config.std == "learned":
        return config.alpha * masked_mean(kl(mu, std, mu_e, std_e) / A, mask)
    return config.alpha * masked_mean(((mu - mu_e) ** 2).mean(dim=-1), mask)


class Training(QTTraining):
    """QT's networks and targets with the expert, and one step."""

    metrics = ("q_loss", "q_mean", "loss", "imitation", "expert", "q_term")

    def __init__(self, task, windows: Windows, data, config: Config, critic_weights=None, fit=True):
        """critic_weights: stage 1's (None: a random critic); fit: train the expert. Sets torch's global seed."""
        device = windows.rtg.device
        chosen = best_episodes(data.returns, data.lengths, config.expert_fraction)
        self.in_best = torch.as_tensor(np.repeat(chosen, data.lengths)).to(device)  # (N,) of each transition
        if fit and config.rebalance == "kl":
            self.expert = fit_expert(task, windows, data, chosen, config)
        else:  # resume.pt has it, or nobody asks it
            self.expert = Expert(task.obs_dim, task.act_dim, config.std == "learned").to(device)
            self.expert.requires_grad_(False).eval()
        super().__init__(task, windows, config, critic_weights, make_policy)
        self.saved_state["expert"] = self.expert

    def draw(self) -> torch.Tensor:
        """Window starts (B, 1): uniform over all transitions; dup: those of D_e 1 + alpha_w times as often."""
        device, size = self.in_best.device, self.config.batch_size
        if self.config.rebalance != "dup":
            return torch.randint(len(self.in_best), (size, 1), generator=self.generator, device=device)
        weights = torch.cumsum(1 + self.config.alpha_w * self.in_best.double(), dim=0)
        u = torch.rand(size, generator=self.generator, device=device, dtype=torch.float64) * weights[-1]
        return torch.searchsorted(weights, u, right=True).clamp(max=len(weights) - 1)[:, None]

    def step(self, step: int) -> torch.Tensor:
        """Returns the values of `metrics` (6,), on the device."""
        config = self.config
        self.set_learning_rates(step)
        start = self.draw()
        batch, in_best = self.windows.at(start), self.in_best[start[:, 0]]
        coin = torch.randint(2, (), generator=self.generator, device=batch.rtg.device)
        q_loss = q_mean = term = pull = torch.zeros((), device=batch.rtg.device)
        if config.eta:
            with torch.no_grad():
                mean, std = self.target_policy(*batch.inputs)
                a_last = sample(mean[:, -1], std[:, -1], config.std, self.generator)
            q_loss, q_mean = self.critic_step(batch, a_last)
        mean, std = self.policy(*batch.inputs)
        imitation = imitation_loss(mean, std, batch.act, batch.valid, in_best, config)
        loss = imitation
        if config.rebalance == "kl":
            pull = expert_loss(mean, std, *self.expert(batch.obs), batch.valid, in_best, config)
            loss = loss + pull
        if config.eta:
            term = self.q_term_at(sample(mean, std, config.std, self.generator), batch, coin)
            loss = loss + config.eta * term
        descend(self.actor_opt, loss, config.max_grad_norm)
        if config.eta:
            self.move_targets(step)
        return torch.stack([q_loss, q_mean, loss, imitation, pull, term]).detach()


def main() -> None:
    found = find_run("train_rvdt", Args, resolve, __doc__)
    config, critic_weights = from_stage_1(found)
    fit = not found.state
    learner = Training(found.data.task, found.windows(), found.data, config, critic_weights, fit)
    train(found, learner, config.total_steps)


if __name__ == "__main__":
    run(main)
