"""Why does a policy follow its return-to-go, or collapse? Stage 2's forces, measured on windows of its dataset.

    python results/diagnose_alignment.py runs/hopper-mini__train_qalign_dt__1/policy.pt [further checkpoints]

For the last step of random windows, in ten groups of equal size by timestep:

    slope, range     how Q(s, a_hat) moves with the RTG: per 1,000 of return, and from the lowest RTG to the highest
    loss, chance     the alignment loss, and the share of it that is gone without dropout and without noise on actions
    force            norm of the alignment loss's gradient in the actions, over that of the action loss's; no max_push
    off_data         rms distance of a_hat from the recorded action; off_high: from the action at the highest RTG
    gain             Q of the action at the highest RTG minus Q of the recorded action: far above 0, Q is exploited
    gradient, cosine mean norm of dQ/da, and the cosine between the two critics'
    disagree         |Q_1 - Q_2| at the recorded action; dis_high: at the action at the highest RTG

Reads dataset.pt of the checkpoint's runs folder, as stage 2 did. Writes diagnosis.json, .png and, for the first
checkpoint, .csv beside it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the stages, whose functions are measured
import evaluate_alignment as stage3
import train_qalign_dt as stage2

GROUPS = 10
COLUMNS = dict(slope="q_slope", range="q_range", loss="align_loss", chance="chance_share", force="force")
COLUMNS |= dict(off_data="off_data", off_high="off_clean", gain="gain", gradient="gradient", cosine="cosine")
COLUMNS |= dict(disagree="disagree_data", dis_high="disagree_highest")
PANELS = {
    "q_slope": "dQ / dRTG, per 1,000 of return",
    "q_range": "Q, highest minus lowest RTG",
    "chance_share": "share of the alignment loss by chance",
    "force": "alignment force / imitation force",
    "gain": "Q gained over the recorded action",
    "off_clean": "rms action change, highest RTG",
}


@dataclass(frozen=True)
class Args:
    checkpoints: tyro.conf.Positional[tuple[Path, ...]]  # policy.pt files of stage 2, trained with an alignment loss
    dataset_path: stage2.Files = ()  # the HDF5 file(s) that they were trained on, as in stage 2
    windows: int = 5000  # windows to measure, drawn as in training
    seed: int = 1  # seed of the windows and of delta

    def __post_init__(self):
        if not self.checkpoints:
            raise ValueError("name at least one policy.pt")
        for name, value, lowest in (("windows", self.windows, GROUPS), ("seed", self.seed, 0)):
            if not lowest <= value <= 10**9:
                raise ValueError(f"--{name} {value}: must be between {lowest} and 1e9")


def actions(policy, inputs, seed: int | None) -> torch.Tensor:
    """a_hat (B, act_dim) at the windows' last step; seed of the dropout masks, None: no dropout."""
    policy.train(seed is not None)
    torch.manual_seed(seed or 0)
    return policy(*inputs)[0][:, -1]


def penalties(pair, sign, rows, config, q_scale: float):
    """Eq. 5 over some of the windows, as stage 2 computes it: the mean penalty, and the share of violated pairs."""
    q_delta, q = (x[:, rows, None] for x in pair)  # (2, rows, 1)
    valid = torch.ones(len(rows), 1, dtype=torch.bool)
    return stage2.alignment_loss(q_delta / q_scale, q / q_scale, sign[rows, None], valid, config.alignment)


def gradient(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(y, x, retain_graph=True)[0]


def measure(trained, critic, data, args: Args) -> list[dict]:
    """One row per group of timesteps, from the first to the last."""
    task, policy = trained.task, trained.policy
    try:
        q_scale = trained.content["q_scale"]
        if not (stage2.fits(q_scale, float) and q_scale > 0):
            raise ValueError("its q_scale is impossible")
        config = stage2.Config(**{k: v for k, v in trained.content["config"].items() if k in vars(stage2.Config())})
    except (KeyError, TypeError, ValueError) as error:
        stage2.fail(f"{trained.path}: not a whole checkpoint ({stage2.one_line(error)}); train it again")
    generator = torch.Generator().manual_seed(args.seed)
    batch = stage2.Windows(data, config.context_len, torch.device("cpu")).sample(args.windows, generator)
    obs, act, span = batch.obs[:, -1], batch.act[:, -1], config.rtg_range[1] - config.rtg_range[0]
    inputs = {"clean": (batch.inputs, torch.zeros(args.windows, 1))}
    for name, shift in (("lowest", -2 * span), ("highest", 2 * span), ("lower", -0.05 * span), ("higher", 0.05 * span)):
        inputs[name] = stage2.shift_rtg(batch, shift, config.rtg_range)
    delta = config.sigma_e * torch.randn(args.windows, 1, generator=generator)
    inputs["delta"] = stage2.shift_rtg(batch, delta.abs() if config.half_normal else delta, config.rtg_range)

    with torch.no_grad():
        a = {name: actions(policy, x, None) for name, (x, _) in inputs.items()}
        q = {name: critic(obs, x) for name, x in a.items()} | {"data": critic(obs, act)}  # (2, B) each
        shifts = {name: shift.squeeze(1) for name, (_, shift) in inputs.items()}
    # the two forces on the actions, and the alignment loss, as in training: with dropout and noise
    a_hat, a_delta = actions(policy, batch.inputs, 1).detach(), actions(policy, inputs["delta"][0], 2).detach()
    a_hat.requires_grad_(), a_delta.requires_grad_()
    error = (a["clean"] - act).square().mean().sqrt()  # over all windows, not a batch of them
    noise = config.action_noise * error * torch.randn((2, *act.shape), generator=generator)
    in_training, exact = (critic(obs, a_delta + noise[0]), critic(obs, a_hat + noise[1])), (q["delta"], q["clean"])
    sign = shifts["delta"].sign()
    align, _ = penalties(in_training, sign, torch.arange(args.windows), config, q_scale)
    push = gradient(config.lambda_e * align, a_delta).square().sum(dim=1)
    pull = gradient((a_hat - act).square().mean(), a_hat).square().sum(dim=1)
    slopes = [gradient(q_m.sum(), a_hat) for q_m in critic(obs, a_hat)]

    lowest, highest, data_q = (q[name].amin(dim=0) for name in ("lowest", "highest", "data"))
    moved, shift = q["higher"].amin(dim=0) - q["lower"].amin(dim=0), shifts["higher"] - shifts["lower"]
    rows = []
    for group in batch.timestep[:, -1].argsort().tensor_split(GROUPS):

        def mean(x, group=group) -> float:
            return float(x[group].mean())

        loss, violated = (float(x.detach()) for x in penalties(in_training, sign, group, config, q_scale))
        exact_loss, exact_violated = (float(x) for x in penalties(exact, sign, group, config, q_scale))
        row = {"timestep": [int(f(batch.timestep[group, -1])) for f in (torch.min, torch.max)]}
        row |= {"q_data": mean(data_q), "q_range": mean(highest - lowest)}
        row |= {"q_slope": mean(moved) / mean(shift) / task.rtg_scale * 1000}
        row |= {"align_loss": loss, "align_loss_exact": exact_loss}
        row |= {"chance_share": 1 - exact_loss / loss if loss else 0.0}
        row |= {"violated": violated, "violated_exact": exact_violated, "force": (mean(push) / mean(pull)) ** 0.5}
        row |= {"off_data": mean((a["clean"] - act).square()) ** 0.5}
        row |= {"off_clean": mean((a["highest"] - a["clean"]).square()) ** 0.5, "gain": mean(highest - data_q)}
        row |= {"gradient": mean(torch.stack(slopes).norm(dim=-1).mean(dim=0))}
        row |= {"cosine": mean(torch.cosine_similarity(*slopes, dim=-1))}
        row |= {"disagree_data": mean((q["data"][0] - q["data"][1]).abs())}
        row |= {"disagree_highest": mean((q["highest"][0] - q["highest"][1]).abs())}
        rows.append(row)
    return rows


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    results = []
    for path in args.checkpoints:
        trained = stage3.load_policy(path, "fp32", torch.device("cpu"))
        if trained.content["stage"] != stage2.STAGE:
            stage2.fail(f"{path}: of {trained.content['stage']}.py; only policies of {stage2.STAGE}.py can be measured")
        critic = stage3.load_critic(trained)
        if critic is None:
            stage2.fail(f"{path}: trained without an alignment loss, so it has no critic to ask")
        runs, task = path.absolute().parent.parent, trained.task
        data = stage2.load_data(SimpleNamespace(env=task.name, dataset_path=args.dataset_path, runs_dir=str(runs)))
        if data.task.digest != task.digest:
            stage2.fail(f"{path}: trained on {task.label}, not on {data.task.label} of {runs}; --dataset-path?")
        rows = measure(trained, critic, data, args)
        results.append(trained.identity() | {"windows": args.windows, "groups": rows})
        print(f"\n{path}: {title(results[-1])}; {task.label}")
        print("  timesteps" + "".join(f"{name:>9}" for name in COLUMNS))
        for row in rows:
            print("{:5} -{:4}".format(*row["timestep"]), *(f"{row[name]:8.3g}" for name in COLUMNS.values()))
    stem = args.checkpoints[0].parent / "diagnosis"
    rows = [row | {"timestep": row["timestep"][0]} for row in results[0]["groups"]]
    stage3.write_results(stem, {"results": results}, rows, lambda: plot(results))
    print(f"\n{stem}.json, .csv, .png")


def title(result: dict) -> str:
    return f"{stage3.label_of(result)}, lambda_e {result['lambda_e']:g}"


def plot(results: list[dict]):
    """PANELS against the timestep, a line for each checkpoint."""
    figure, axes = stage3.new_figure(2, 3, figsize=(12, 6))
    for panel, (name, label) in zip(np.ravel(axes), PANELS.items()):
        for result in results:
            middle = [np.mean(row["timestep"]) for row in result["groups"]]
            values = [row[name] for row in result["groups"]]
            panel.plot(middle, values, marker="o", markersize=3, label=title(result))
        panel.set(xlabel="timestep", ylabel=label)
    axes[0][0].legend(fontsize="x-small")
    return figure


if __name__ == "__main__":
    stage2.run(main)
