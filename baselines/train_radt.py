"""RADT: Return-Aligned Decision Transformer (Tanaka et al., TMLR 2025), one of Q-Align DT's neighbours.

    python baselines/train_radt.py --env hopper-medium-v2

Alignment by architecture instead of by a loss: returns are a sequence of their own, beside that of states and actions,
and reach it in two ways in every block:

    StepRA    each step's return scales and shifts what its state and action tokens become (adaptive LayerNorm)
    SeqRA     state and action tokens attend to all returns so far (cross-attention, masked by step)
    Block     both, after self-attention; `1 + alpha` is adaptive scaling: how much of SeqRA enters

Trained by imitation alone (no critic, no state loss). "The release" is its authors' code, CyberAgentAILab/radt, folder
gym/. One difference matters: in training its padding mask is inverted (where a window has padding, valid tokens attend
to nothing else); here padded keys are masked.

Writes runs/<env>__<exp-name>__<seed>/ with policy.pt, resume.pt, metrics.csv and TensorBoard events; the same command
resumes. `evaluate_alignment.py --checkpoint`, `--compare` and `transfer_cheetah_vel.py --checkpoint` read policy.pt.
What follows `main` is the loop around the steps, which VDT, QT and RVDT use, too.
"""

import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and stage 2's
from train_qalign_dt import (
    BY_DATA,
    MAX_TIMESTEP,
    Batch,
    Files,
    Float,
    Int,
    Log,
    Windows,
    check_args,
    check_finite,
    checked,
    claim,
    descend,
    load_data,
    load_own,
    masked_mean,
    pick_device,
    preset,
    progress_bar,
    restore,
    run,
    run_folder,
    save_checkpoint,
    save_resume,
    saved_bf16,
    track,
    use_bf16,
)


@dataclass(frozen=True)
class RunArgs:
    """Flags of every script here."""

    env: str = "hopper-mini"  # as in train_qalign_dt.py: the task, and the data to train on
    seed: int = 1  # seed of all that is random in a run
    # HDF5 file(s) in D4RL's or Minari's layout to use instead; several are concatenated
    dataset_path: Files = ()
    runs_dir: str = "runs"  # folder of all runs
    exp_name: str = ""  # name of this experiment; the run folder is <runs-dir>/<env>__<exp-name>__<seed>
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train; auto takes CUDA if there is one
    # sizes and steps: the method's own, or small ones that take minutes on a CPU (default: paper; mini: small)
    preset: Annotated[Literal["paper", "small"] | None, BY_DATA] = None
    track: bool = False  # log to Weights & Biases, too: pip install wandb
    checkpoint_minutes: float = 2.0  # wall-clock time between resume.pt files

    def check(self, **lowest: float) -> None:
        """ValueError, which tyro reports, for a number out of its range, or heads that do not divide the width."""
        sizes = ("embed_dim", "n_layer", "n_head", "context_len", "batch_size", "critic_width")
        check_args(self, dict.fromkeys(sizes, 1) | lowest)
        if self.embed_dim and self.n_head and self.embed_dim % self.n_head:
            raise ValueError(f"--embed-dim {self.embed_dim} is not a multiple of --n-head {self.n_head}")


@dataclass(frozen=True)
class Args(RunArgs):
    exp_name: str = "train_radt"  # name of this experiment; the run folder is <runs-dir>/<env>__<exp-name>__<seed>

    total_steps: Int = None  # gradient steps (default: 100,000; small: 5,000)
    # width of the network (default: 128; 256 for halfcheetah-medium, ant-medium-expert, antmaze-umaze, -umaze-diverse;
    # small: 64)
    embed_dim: Int = None
    n_layer: Int = None  # number of blocks (default: 3; hopper-medium and small: 2)
    n_head: Int = None  # attention heads per block (default: 1; small: 2)
    context_len: Int = None  # K, the window length in environment steps (default: 20; small: 10)
    batch_size: Int = None  # windows per gradient step (default: 64; antmaze: 256)
    lr: Float = None  # AdamW learning rate after the warm-up (default: 1e-4; small: 1e-3)
    warmup_steps: Int = None  # gradient steps in which --lr rises from 0 (default: 10,000; small: 500)

    seqra: bool = True  # cross-attention to the returns
    stepra: bool = True  # return-dependent LayerNorms; without, they have weights of their own
    alpha: bool = True  # adaptive scaling of SeqRA's output; without, it is added as it is
    # a DT in RADT's setting: with --no-seqra --no-stepra, the returns stand in the token sequence instead
    rtg_tokens: bool = False

    def __post_init__(self):
        self.check(warmup_steps=1)
        if (self.seqra or self.stepra) == self.rtg_tokens:
            raise ValueError("--no-seqra --no-stepra and --rtg-tokens go together: a DT in RADT's setting")


@dataclass(frozen=True)
class Config(Args):
    """Args with every default resolved; checkpoints hold it."""

    max_timestep: int = 1000  # rows of the timestep table
    method: str = "RADT"  # what tables and figures call it


PAPER = dict(total_steps=100_000, embed_dim=128, n_layer=3, n_head=1, context_len=20, batch_size=64)
PAPER |= dict(lr=1e-4, warmup_steps=10_000)
SMALL = dict(total_steps=5_000, embed_dim=64, n_layer=2, n_head=2, context_len=10, batch_size=64)
SMALL |= dict(lr=1e-3, warmup_steps=500)
EXCEPTIONS = {  # to PAPER, the release's conf/
    "hopper-medium-v2": {"n_layer": 2},
    "halfcheetah-medium-v2": {"embed_dim": 256},
    "ant-medium-expert-v2": {"embed_dim": 256},
    "antmaze-umaze-v2": {"embed_dim": 256},
    "antmaze-umaze-diverse-v2": {"embed_dim": 256},
}
WEIGHT_DECAY, MAX_GRAD_NORM, DROPOUT = 1e-4, 0.25, 0.1
LOG_EVERY = 100  # gradient steps per row of metrics.csv


def resolve(args: Args, task, data, device: torch.device) -> Config:
    """Fill in the defaults that depend on the task, the data and the hardware."""
    batch = {"batch_size": 256} if task.body == "antmaze" else {}
    paper = PAPER | EXCEPTIONS.get(task.name, {})
    values = fill_in(args, task, data, device, paper | batch, SMALL | batch)
    values["max_timestep"] += values["context_len"]
    if args.rtg_tokens:
        values["method"] = "DT in RADT's setting"
    elif not (args.seqra and args.stepra):
        values["method"] = f"RADT, {'SeqRA' if args.seqra else 'StepRA'} only"
    if args.seqra and not args.alpha:
        values["method"] = f"{values.get('method', 'RADT')}, without alpha"
    return checked(Config, **values)


class StepNorm(nn.Module):
    """StepRA: LayerNorm without weights of its own, then x * (1 + scale) + shift, which the step's return decides."""

    def __init__(self, width: int, stepra: bool):
        super().__init__()
        self.stepra, self.norm = stepra, nn.LayerNorm(width, eps=1e-6, elementwise_affine=not stepra)

    def forward(self, x, scale, shift):  # (B, T, D) each
        return self.norm(x) * (1 + scale) + shift if self.stepra else self.norm(x)


class Attention(nn.Module):
    """softmax(q k^T (D / heads)^-0.5 + mask) v: no bias in W_q, W_k, W_v; dropout on weights and output."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(DROPOUT)
        self.W_q, self.W_k, self.W_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, queries, keys, values, mask):  # (B, Q, D), (B, L, D), (B, L, D), (B, Q, L) bool -> (B, Q, D)
        projected = self.W_q(queries), self.W_k(keys), self.W_v(values)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)  # (B, H, ., D / H)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        weights = torch.softmax(logits.masked_fill(~mask[:, None], -math.inf), dim=-1)
        return self.dropout(self.out((self.dropout(weights) @ v).transpose(1, 2).flatten(-2)))


class SeqRA(nn.Module):
    """Tokens attend to the returns c_t: keys LN_k(c + e), values LN_v(c). Time e enters the keys only."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_k, self.norm_v = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)

    def forward(self, x, c, e, mask):  # (B, T, D), (B, K, D), (B, K, D), (B, T, K) -> (B, T, D)
        return self.attention(x, self.norm_k(c + e), self.norm_v(c), mask)


class Block(nn.Module):
    """Post-norm: x <- StepRA(x + SA(x)); x <- StepRA(x + (1 + alpha) SeqRA(x)); x <- StepRA(x + MLP(x))."""

    def __init__(self, width: int, heads: int, seqra: bool, stepra: bool, alpha: bool):
        super().__init__()
        self.sa, self.norms = Attention(width, heads), nn.ModuleList(StepNorm(width, stepra) for _ in range(2 + seqra))
        self.seqra = SeqRA(width, heads) if seqra else None
        self.alpha = nn.Linear(2 * width, width) if seqra and alpha else None
        # (scale, shift) of each norm from the step's return; zero at first, so that the norms are plain
        self.modulation = nn.Linear(width, 2 * len(self.norms) * width) if stepra else None
        hidden = nn.Linear(width, 4 * width)
        self.mlp = nn.Sequential(hidden, nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(DROPOUT))

    def forward(self, x, c, e, causal, by_step):  # (B, T, D), (B, K, D), (B, K, D), (B, T, T), (B, T, K)
        modulation = [(None, None)] * len(self.norms)
        if self.modulation:  # (B, K, 2 D) per norm -> (B, T, D) twice; a step's tokens share them
            tokens = x.shape[1] // c.shape[1]
            per_token = self.modulation(F.silu(c)).repeat_interleave(tokens, dim=1)
            modulation = [both.chunk(2, dim=-1) for both in per_token.chunk(len(self.norms), dim=-1)]
        x = self.norms[0](x + self.sa(x, x, x, causal), *modulation[0])
        if self.seqra:
            o = self.seqra(x, c, e, by_step)
            alpha = self.alpha(torch.cat([o, x], dim=-1)) if self.alpha else 0
            x = self.norms[1](x + (1 + alpha) * o, *modulation[1])
        return self.norms[-1](x + self.mlp(x), *modulation[-1])


class Policy(nn.Module):
    """RADT over tokens (s_0, a_0, s_1, ...) beside the returns (rtg_0, rtg_1, ...).

    Call with rtg (B, K) normalised, obs (B, K, obs_dim) standardised, act (B, K, act_dim) in [-1, 1], timestep (B, K)
    int64 in [0, max_timestep) and valid (B, K) bool, False on the left padding; returns a_hat (B, K, act_dim). The
    action at step t depends on no token after s_t, on no later return, and on no padding. Always float32: in bfloat16
    an RTG of 3.000 and one of 3.005 would be the same number.
    """

    def __init__(self, obs_dim, act_dim, embed_dim, n_layer, n_head, max_timestep, seqra, stepra, alpha, rtg_tokens):
        super().__init__()
        self.rtg_tokens, rows, columns = rtg_tokens, torch.arange(max_timestep)[:, None], torch.arange(embed_dim)
        angle = rows / 10_000 ** (2 * (columns // 2) / embed_dim)
        self.register_buffer("table", torch.where(columns % 2 == 0, angle.sin(), angle.cos()), persistent=False)
        self.time = nn.Linear(embed_dim, embed_dim)
        self.embed_rtg, self.embed_obs, self.embed_act = (nn.Linear(n, embed_dim) for n in (1, obs_dim, act_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, n_head, seqra, stepra, alpha) for _ in range(n_layer))
        self.head = nn.Linear(embed_dim, act_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            for layer in filter(None, (block.alpha, block.modulation)):
                nn.init.zeros_(layer.weight)

    def forward(self, rtg, obs, act, timestep, valid):
        c, e = self.embed_rtg(rtg[..., None]), self.time(self.table[timestep])  # (B, K, D) each
        tokens = [self.embed_obs(obs) + e, self.embed_act(act) + e]
        x = torch.stack([c + e, *tokens] if self.rtg_tokens else tokens, dim=2)  # (B, K, 2 or 3, D)
        n, K = x.shape[2], rtg.shape[1]  # tokens per step
        step = torch.arange(K, device=rtg.device).repeat_interleave(n)  # (T,) of each token
        # a padded query attends to its own step, so that no row of the softmax is empty
        keys = valid[:, None, :] | (step[:, None] == torch.arange(K, device=rtg.device))  # (B, T, K)
        by_step = keys & (step[:, None] >= torch.arange(K, device=rtg.device))  # returns 0 .. t for all tokens of t
        causal = keys.repeat_interleave(n, dim=2) & torch.ones(n * K, n * K, dtype=torch.bool, device=rtg.device).tril()
        x = x.flatten(1, 2)
        for block in self.blocks:
            x = block(x, c, e, causal, by_step)
        return torch.tanh(self.head(x[:, n - 2 :: n]))  # the state tokens

    def act(self, rtg, obs, act, timestep, valid):
        """Only a_hat of the windows' last step (B, act_dim), for rollouts."""
        return self(rtg, obs, act, timestep, valid)[:, -1]


def make_policy(task, config: dict, bf16: bool = False) -> Policy:
    """The policy that a checkpoint's configuration describes, always float32 (randomly initialised)."""
    names = ("embed_dim", "n_layer", "n_head", "max_timestep", "seqra", "stepra", "alpha", "rtg_tokens")
    return Policy(task.obs_dim, task.act_dim, *(config[name] for name in names))


def action_loss(a_hat, batch: Batch) -> torch.Tensor:
    """RADT's only loss: mean of (a - a_hat)^2 over valid steps and dimensions."""
    return masked_mean(((a_hat - batch.act) ** 2).mean(dim=-1), batch.valid)


def learning_rate(step: int, config: Config) -> float:
    """Rises linearly over the warm-up, then stays."""
    return config.lr * min(1.0, (step + 1) / config.warmup_steps)


class Imitation:
    """The policy, its optimiser, and one gradient step."""

    metrics = ("action_loss", "grad_norm")

    def __init__(self, task, windows: Windows, config: Config):
        """Sets torch's global seed."""
        self.windows, self.config, device = windows, config, windows.rtg.device
        torch.manual_seed(config.seed)  # of the weights and of dropout
        self.generator = torch.Generator(device).manual_seed(config.seed)  # of the windows
        self.policy = make_policy(task, vars(config)).to(device)
        self.opt = torch.optim.AdamW(self.policy.parameters(), config.lr, weight_decay=WEIGHT_DECAY, fused=True)
        self.saved_state = dict(policy=self.policy, opt=self.opt)  # what resume.pt holds

    def step(self, step: int) -> torch.Tensor:
        """Returns the values of `metrics` (2,), on the device."""
        self.opt.param_groups[0]["lr"] = learning_rate(step, self.config)
        batch = self.windows.sample(self.config.batch_size, self.generator)
        loss = action_loss(self.policy(*batch.inputs), batch)
        return torch.stack([loss.detach(), descend(self.opt, loss, MAX_GRAD_NORM)])

    def content(self, step: int) -> dict:
        """Its own part of policy.pt."""
        return {"policy": self.policy.state_dict(), "critic": None}

    def columns(self, step: int) -> dict:
        """What metrics.csv says beside the metrics."""
        return {"lr": learning_rate(step - 1, self.config), "rtg_effect": self.rtg_effect()}

    @torch.no_grad()
    def rtg_effect(self) -> float:
        """Mean |a_hat(1.5 rtg) - a_hat(rtg)| on 256 windows spread evenly over the data, without dropout."""
        start = torch.linspace(0, len(self.windows.rtg) - 1, 256, device=self.windows.rtg.device).long()[:, None]
        batch = self.windows.at(start)
        self.policy.eval()
        moved = (self.policy(1.5 * batch.rtg, *batch.inputs[1:]) - self.policy(*batch.inputs)).abs().mean(dim=-1)
        self.policy.train()
        return masked_mean(moved, batch.valid).item()


def main() -> None:
    found = find_run("train_radt", Args, resolve, __doc__)
    learner = Imitation(found.data.task, found.windows(), found.config)
    train(found, learner, found.config.total_steps, learner.columns)


# ---- a run of this script, and of train_vdt.py, train_qt.py and train_rvdt.py


# of a configuration: they change no result (--precision does, but as bf16, which counts)
NOT_OF_THE_RUN = ("dataset_path", "runs_dir", "preset", "track", "checkpoint_minutes", "precision")


def fill_in(args: RunArgs, task, data, device: torch.device, paper: dict, small: dict) -> dict:
    """A configuration's values: flags, else the preset's, and what the data and the hardware decide."""
    defaults = small if preset(args, task) == "small" else paper
    values = vars(args) | defaults | {name: value for name, value in vars(args).items() if value is not None}
    values["device"] = device.type  # the random streams of CPU and CUDA differ, so a run stays on one kind
    values["max_timestep"] = max(MAX_TIMESTEP, int(data.lengths.max()))
    if "precision" in values:
        values["bf16"] = use_bf16(args.precision, device)
    return values


@dataclass
class Progress:
    """How far a run is: what resume.pt holds beside networks, optimisers and random streams."""

    step: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)  # of metrics.csv
    gamma: float = 0.99  # of stage 1's critic, where one is used


class Run(NamedTuple):
    """A run as it is found: new, or to be continued."""

    stage: str  # file name of the script
    args: RunArgs
    data: object  # a Dataset
    config: object  # with the arithmetic that the run began with
    folder: Path
    identity: dict  # the configuration and the data; what is found in the folder must have the same
    gamma_is_late: bool  # it is not in the identity, as only stage 1's critic decides it
    state: dict | None = None  # of resume.pt

    def look(self) -> dict | None:
        """The state to go on from, if there is one; exits 0 where the run is finished."""
        policy = load_own(self.folder / "policy.pt", self.stage, self.identity)
        whole = policy and (policy.get("model") or not getattr(self.config, "model_steps", 0))  # VDT's model comes last
        if whole and policy.get("step") == self.config.total_steps:
            print(f"{self.folder}/policy.pt is finished; nothing to do (another run: --exp-name)")
            sys.exit()
        return load_own(self.folder / "resume.pt", self.stage, self.identity)

    def windows(self) -> Windows:
        return Windows(self.data, self.config.context_len, torch.device(self.config.device))


def find_run(stage: str, args_class, resolve, description: str) -> Run:
    """Reads flags and data, and looks into the run's folder; exits 0 if it is finished, 2 if it is another run's."""
    args = tyro.cli(args_class, description=description, config=(tyro.conf.DisallowNone,))
    device, data = pick_device(args.device), load_data(args)
    config = resolve(args, data.task, data, device)
    folder = run_folder(args, args.exp_name)
    if hasattr(config, "bf16"):
        config = replace(config, bf16=saved_bf16(folder, stage, args.precision, config.bf16))
    identity = {name: x for name, x in vars(config).items() if name not in NOT_OF_THE_RUN}
    gamma_is_late = getattr(config, "critic", "none") != "none"
    if gamma_is_late:
        del identity["gamma"]
    identity["data"] = data.task.digest
    found = Run(stage, args, data, config, folder, identity, gamma_is_late)
    return found._replace(state=found.look())


def train(found: Run, learner, steps: int, columns=None) -> None:
    """Claims the folder, resumes, and goes on to `steps` gradient steps; logs and saves on the way.

    learner: has `metrics`, names; step(i), their values at the i-th step; `saved_state`, what resume.pt holds;
    content(i), its own part of policy.pt after i steps. columns(i): what metrics.csv says besides.
    """
    folder, data = found.folder, found.data
    with claim(folder):
        state = found.look() or found.state  # another process may have gone on, or have finished
        if found.args.track:
            track(found.args, folder)
        task, done = data.task, Progress(gamma=getattr(learner.config, "gamma", 0.99))
        sums = torch.zeros(len(learner.metrics), device=learner.generator.device)  # of the metrics since the last row
        if state:
            done = restore(state, folder / "resume.pt", learner, sums, steps, Progress)
            if found.gamma_is_late:
                learner.config = replace(learner.config, gamma=done.gamma)
        size = f"{len(data.rewards):,} transitions, {len(data.ends):,} episodes"
        print(f"{folder}: {task.label}, {size}, on {learner.config.device}, step {done.step:,}")
        metrics = Log(folder, "metrics", done.rows)

        def save() -> None:
            save_resume(folder, dict(stage=found.stage, config=found.identity), learner, sums, done)
            config = found.identity | ({"gamma": done.gamma} if found.gamma_is_late else {})
            content = dict(stage=found.stage, config=config, step=done.step, task=vars(task))
            content |= dict(obs_mean=data.obs_mean, obs_std=data.obs_std, gamma=done.gamma)
            content |= {"episode_returns": torch.as_tensor(data.returns)}
            save_checkpoint(folder / "policy.pt", content | learner.content(done.step))

        saved = time.monotonic()
        with progress_bar(steps, done.step, "training") as bar:
            for i in range(done.step, steps):
                sums += learner.step(i)
                done.step = step = i + 1
                bar.update()
                if step % LOG_EVERY == 0 or step == steps:
                    check_finite(learner, sums, step)
                    means = (sums / ((step - 1) % LOG_EVERY + 1)).tolist()  # over the steps since the last row
                    row = dict(zip(learner.metrics, means)) | (columns(step) if columns else {})
                    metrics.write({"step": step} | row)
                    bar.set_postfix_str(" ".join(f"{name} {x:.3g}" for name, x in row.items() if x))
                    sums.zero_()
                if time.monotonic() - saved > found.args.checkpoint_minutes * 60:
                    save()
                    saved = time.monotonic()
        save()
    print(f"{folder}/policy.pt: {steps:,} steps; python evaluate_alignment.py --checkpoint {folder}/policy.pt")


if __name__ == "__main__":
    run(main)
