"""The paper's claims, each tested by a list of runs (Sec. 6, App. E): which, on what, with which seeds.

    python benchmark.py components --workers 2

A study is a set of variants (flags of stages 1 and 2), each trained and swept once per seed by the stage scripts, as processes.
What is finished is never run again, what was killed goes on where it was, and a run that fails stops no other. Writes
<results-dir>/records/<run>.json per run and, per study, <study>__<env>.md, .csv and .png: every seed's value, the mean and
SciPy's percentile bootstrap interval. Order of the file: Args, studies, one run, all runs, tables, main.
"""

import csv
import ctypes
import hashlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import tyro
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


class Variant(NamedTuple):
    """One entry of a study."""

    exp_name: str  # of stage 2, with these flags
    flags: str = ""
    critic: str = "pretrain_q"  # experiment name of stage 1, with these flags; variants that name the same one share it
    critic_flags: str = ""


Q_ALIGN = Variant("train_qalign_dt")  # the method itself; every study shares its runs


@dataclass(frozen=True)
class Study:
    """Labelled variants; the first is what the others are compared with."""

    claim: str
    variants: dict[str, Variant]
    seeds: tuple[int, ...]


STUDIES = {
    "components": Study(
        "alignment loss and convolution: both are best, the loss matters most (Tables 4, E.17)",
        {
            "Q-Align DT": Q_ALIGN,
            "DT + alignment": Variant("dt_alignment", "--no-conv"),
            "DT + conv": Variant("dt_conv", "--lambda-e 0"),
            "DT": Variant("dt", "--lambda-e 0 --no-conv"),
        },
        (1, 2, 3),
    ),
    "critic": Study(
        "a fixed critic, or one without raised requests, fails at low targets (Table E.10, Figure 2)",
        {
            "Q-Align DT": Q_ALIGN,
            "fixed critic": Variant("fixed_critic", "--no-update-q"),
            "Delta_RTG 0": Variant("delta_rtg_0", "--delta-rtg 0"),
            "Delta_RTG 10": Variant("delta_rtg_10", "--delta-rtg 10"),
        },
        (1, 2),
    ),
    "loss": Study(
        "the symmetric penalty is unstable, the squared one changes little (Table E.11)",
        {
            "one-sided": Q_ALIGN,
            "symmetric": Variant("symmetric", "--alignment symmetric"),
            "squared": Variant("squared", "--alignment squared"),
        },
        (1, 2),
    ),
    "sigma": Study(
        "sigma_e is uncritical above a small value (Table E.12)",
        {"Q-Align DT": Q_ALIGN}
        | {f"sigma_e {x:g}": Variant(f"sigma_{x:g}", f"--sigma-e {x:g}") for x in (0.1, 0.5, 2, 10)},
        (1, 2),
    ),
    "lambda": Study(
        "without the alignment loss the score is low, above some lambda_e it no longer depends on it (Table E.14)",
        {"Q-Align DT": Q_ALIGN, "lambda_e 0": Variant("dt_conv", "--lambda-e 0")}
        | {f"lambda_e {x:g}": Variant(f"lambda_{x:g}", f"--lambda-e {x:g}") for x in (0.005, 0.05, 0.3)},
        (1, 2),
    ),
    "noise": Study(
        "noise on the target critic is tolerated (Table E.13)",
        {"Q-Align DT": Q_ALIGN} | {f"sigma_n {x:g}": Variant(f"noise_{x:g}", f"--q-noise {x:g}") for x in (1, 10, 50)},
        (1, 2),
    ),
    "discount": Study(
        "that Q is discounted and the request is not does no harm (App. D.2)",
        {  # at one lambda_e, although Q, and with it Eq. 5's penalty, is larger at 0.997 (hopper_mixed: mean Q 527, not 245)
            "gamma 0.99": Q_ALIGN,
            "gamma 0.997": Variant("gamma_0.997", "", "pretrain_q_gamma_0.997", "--gamma 0.997"),
        },
        (1, 2),
    ),
    "spearman": Study("Q ranks realised returns (Table E.19)", {"Q-Align DT": Q_ALIGN}, (1, 2, 3)),
}


@dataclass
class Args:
    studies: tyro.conf.Positional[tuple[str, ...]]
    """which of components, critic, loss, sigma, lambda, noise, discount, spearman; runs that several share are run once"""
    env: str = "hopper-mini"
    """the dataset, as in the stages"""
    dataset_path: tuple[str, ...] = ()
    """its HDF5 file(s), as in the stages"""
    seeds: tuple[int, ...] = ()
    """seeds instead of the study's own"""
    workers: int = 1
    """runs at a time; the CPU cores are shared out among them, and CUDA devices in turn"""
    critic_flags: str = ""
    """further flags of pretrain_q.py for every run, as one string: --critic-flags='--critic-width 128'"""
    train_flags: str = ""
    """further flags of train_qalign_dt.py for every run, in the same way"""
    rollouts: int = 10
    """episodes per target return of the sweep (App. D.6: 30; fewer add noise to the alignment error)"""
    target_step: float = 100.0
    """distance of two target returns of the sweep, raw"""
    runs_dir: str = "runs"
    """folder of all runs"""
    results_dir: str = "results"
    """folder of records, tables and figures"""
    ray: str = ""
    """address of a Ray cluster ("local" starts one here) that shares this folder; needs the package ray"""


def fail(message: str, code: int = 2):
    """One line on stderr that says what is wrong, where, and what to do; then exit."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


@dataclass(frozen=True)
class Run:
    """One variant with one seed: stages 1 to 3 as commands, and the record they leave."""

    variant: Variant
    seed: int
    args: Args

    @property
    def name(self) -> str:
        return f"{self.args.env}__{self.variant.exp_name}__{self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.args.runs_dir) / self.name

    @property
    def critic(self) -> Path:
        """Stage 1's folder."""
        return Path(self.args.runs_dir) / f"{self.args.env}__{self.variant.critic}__{self.seed}"

    @property
    def record_file(self) -> Path:
        return Path(self.args.results_dir) / "records" / f"{self.name}.json"

    def definition(self) -> dict:
        """What makes a record the one of this run; stored in it."""
        a = self.args
        paths = [Path(p) for p in a.dataset_path] or [HERE / "data" / f"{a.env}.hdf5"]  # D4RL's files do not change
        data = {p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in paths if p.is_file()}
        critic_flags = f"{a.critic_flags} {self.variant.critic_flags}".strip()
        flags = dict(flags=self.variant.flags, train_flags=a.train_flags, critic_flags=critic_flags)
        return dict(run=self.name, data=data, **flags, rollouts=a.rollouts, target_step=a.target_step)

    def record(self) -> dict | None:
        """The record, if the run is finished; exits 2 on one of another definition, which would be lost."""
        if not self.record_file.exists():
            return None
        try:
            record = json.loads(self.record_file.read_text())
            theirs, ours = record["definition"], self.definition()
        except (ValueError, KeyError, TypeError):
            fail(f"{self.record_file}: not a record of this program; remove it")
        if differs := [key for key in ours if theirs.get(key) != ours[key]]:
            said = "; ".join(f"{key} {theirs.get(key)!r} there, {ours[key]!r} here" for key in differs)
            trained = " and --runs-dir" if set(differs) - {"rollouts", "target_step"} else ""
            fail(f"{self.record_file}: {said}; choose another --results-dir{trained}, or remove it")
        return record

    def stage(self, script: str, *flags: str) -> list[str]:
        a = self.args
        where = ["--env", a.env, "--seed", str(self.seed), "--runs-dir", a.runs_dir]
        return [sys.executable, str(HERE / script), *where, *flags]

    def stages(self) -> list[tuple[str, list[str]]]:
        """Name and command of each, in order. A run without alignment loss (lambda_e 0) has no critic."""
        a, variant = self.args, self.variant
        data = ["--dataset-path", *a.dataset_path] if a.dataset_path else []
        train = [*shlex.split(a.train_flags), *shlex.split(variant.flags), "--exp-name", variant.exp_name]
        pretrain = [*shlex.split(a.critic_flags), *shlex.split(variant.critic_flags)]
        if variant.critic != Q_ALIGN.critic:  # else stage 2 finds it by itself
            pretrain += ["--exp-name", variant.critic]
            train += ["--critic", str(self.critic / "critic.pt")]
        weights = [float(value) for flag, value in zip(train, train[1:]) if flag == "--lambda-e"]
        stages = [
            ("critic", self.stage("pretrain_q.py", *data, *pretrain)),
            ("training", self.stage("train_qalign_dt.py", *data, *train)),
        ]
        for what, policy in (("sweep", "policy.pt"), ("sweep of the best checkpoint", "policy_best.pt")):
            sweep = ["--rollouts", str(a.rollouts), "--target-step", str(a.target_step)]
            stages.append(
                (what, self.stage("evaluate_alignment.py", "--checkpoint", str(self.folder / policy), *sweep))
            )
        return stages[1:] if weights and weights[-1] == 0 else stages


def die_with_parent() -> None:
    """In a new process: end with this one, even if it is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Pool:
    """The processes that are running, so that all can be asked to stop."""

    def __init__(self):
        self.stopped, self.processes, self.lock = False, set(), threading.Lock()

    def call(self, command: list[str], log: Path, environment: dict) -> int:
        with self.lock:
            if self.stopped:
                return 130
            with open(log, "ab") as f:
                process = subprocess.Popen(
                    command, stdout=f, stderr=f, env=environment, start_new_session=True, preexec_fn=die_with_parent
                )
            self.processes.add(process)
        try:
            return process.wait()
        finally:
            self.processes.discard(process)

    def stop(self, *_) -> None:
        """The stages save and end; what has not begun does not begin."""
        with self.lock:  # held by other threads only, and briefly
            self.stopped = True
            for process in list(self.processes):
                process.send_signal(signal.SIGINT)

    def hold(self, file: Path) -> filelock.AcquireReturnProxy:
        """`with` this: the lock, as soon as no other process has it; raises filelock.Timeout once stopped."""
        file.parent.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(file).acquire(cancel_check=lambda: self.stopped)


def perform(run: Run, pool: Pool, environment: dict, say=lambda text: None) -> dict:
    """Run the stages of one run, which go on where they were, and write its record. Returns it, or {"failed": why}."""
    runs_dir = Path(run.args.runs_dir)
    logs, critic, seconds, stages = runs_dir / "logs", run.critic, {}, run.stages()
    log = logs / f"{run.name}.log"
    try:
        with pool.hold(logs / f"{run.name}.lock"):
            if record := run.record():  # another process has just finished it
                return record
            for what, command in stages:
                folder = critic if what == "critic" else run.folder
                if what == "sweep of the best checkpoint" and not (folder / "policy_best.pt").exists():
                    continue  # there were no evaluations in training
                say(what)
                # stage 1 is shared by a seed's variants that name the same critic: one of them trains it, the others wait
                with pool.hold(logs / f"{folder.name}__{what.split()[0]}.lock"):
                    with pool.hold(folder / ".lock"):
                        pass  # a stage whose benchmark was killed may still have been saving
                    start, began = time.monotonic(), (folder / "resume.pt").exists()
                    code = pool.call(command, log, environment)
                    took = round(time.monotonic() - start, 1)
                    seconds[what] = None if began and "sweep" not in what else took  # the time of a part says nothing
                if pool.stopped:
                    return {"failed": "stopped"}
                if code:
                    lines = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines() or ["no output"]
                    return {"failed": f"{what} ended with code {code}: {lines[-1]} (log: {log})"}
            files = run.folder / "alignment.json", run.folder / "alignment_best.json", critic / "report.json"
            alignment, best, report = (json.loads(file.read_text()) if file.exists() else None for file in files)
            record = {
                "definition": run.definition(),
                "commands": [shlex.join(["python", Path(command[1]).name, *command[2:]]) for _, command in stages],
                "seconds": seconds,
                "threads": environment.get("OMP_NUM_THREADS"),
                "critic": report if stages[0][0] == "critic" else None,
                "alignment": alignment,
                "alignment_best": best,
            }
            run.record_file.parent.mkdir(parents=True, exist_ok=True)
            write(run.record_file, json.dumps(record, allow_nan=False) + "\n")
            return record
    except filelock.Timeout:
        return {"failed": "stopped"}


def write(file: Path, text: str) -> None:
    """Whole, or not at all."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, file)


def steps_done(run: Run) -> int:
    """Gradient steps of stage 2 so far, as its metrics.csv tells."""
    try:
        last = (run.folder / "metrics.csv").read_text().splitlines()[-1]
        return int(last.split(",")[0])
    except (OSError, ValueError, IndexError):
        return 0


def perform_all(runs: list[Run], workers: int) -> dict[str, dict]:
    """All runs that have no record yet, `workers` at a time, with one progress line each; name -> record or failure."""
    pool, environments = Pool(), []
    gpus = [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x] or cuda_devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for i in range(workers):
        share = {"OMP_NUM_THREADS": str(max(1, cores // workers))}
        environments.append(os.environ | share | ({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {}))
    free, state = list(range(workers)), {run.name: "waiting" for run in runs}
    previous = [signal.signal(n, pool.stop) for n in (signal.SIGINT, signal.SIGTERM)]

    def work(run: Run) -> dict:
        slot = free.pop()
        try:
            return perform(run, pool, environments[slot], lambda what: state.update({run.name: what}))
        except (Exception, SystemExit) as error:  # a full disk, say, concerns this run only
            return {"failed": f"{type(error).__name__}: {error}"}
        finally:
            free.append(slot)

    with ThreadPoolExecutor(workers) as executor:
        futures = {run.name: executor.submit(work, run) for run in runs}
        bars, ended = {}, set()
        while len(ended) < len(runs):
            time.sleep(0.5)
            for run in runs:
                name, future = run.name, futures[run.name]
                if name in ended or state[name] == "waiting":
                    continue
                if name not in bars:
                    bars[name] = tqdm(
                        unit="step", desc=name, dynamic_ncols=True, bar_format="{desc}: {n} steps, {elapsed}{postfix}"
                    )
                bars[name].n = steps_done(run)
                bars[name].set_postfix_str(state[name])
                if future.done():
                    ended.add(name)
                    bars[name].set_postfix_str(future.result().get("failed") or "done")
                    bars[name].close()
            if pool.stopped and all(future.done() for future in futures.values()):
                break
        results = {name: future.result() for name, future in futures.items()}
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), previous):
        signal.signal(number, handler)
    return results


def cuda_devices() -> list[str]:
    """Their numbers, asked of a process of its own: this one needs no torch."""
    command = [sys.executable, "-c", "import torch; print(*range(torch.cuda.device_count()))"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split()


def perform_on_ray(runs: list[Run], address: str) -> dict[str, dict]:
    """The same on a Ray cluster whose machines share this folder: one CPU slot a run; Ray places and restarts them."""
    try:
        import ray
    except ImportError:
        fail("--ray needs the package ray: pip install ray")
    ray.init(address=address)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0

    @ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)
    def remote(run: Run, folder: str) -> dict:
        os.chdir(folder)
        return perform(run, Pool(), os.environ | {"OMP_NUM_THREADS": "1"})

    waiting, results = {remote.remote(run, os.getcwd()): run for run in runs}, {}
    with tqdm(total=len(runs), unit="run", dynamic_ncols=True) as bar:
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            run = waiting.pop(done)
            try:
                results[run.name] = ray.get(done)
            except Exception as error:  # whatever happened there concerns this run only
                results[run.name] = {"failed": str(error).splitlines()[-1]}
            bar.write(f"{run.name}: {results[run.name].get('failed') or 'done'}")
            bar.update()
    ray.shutdown()
    return results


def best_at_high_targets(alignment: dict | None) -> float | None:
    """The release's reading of performance: the best of the high targets."""
    return alignment and max(row["score_mean"] for row in alignment["high_targets"])


def rmse_at_low_targets(alignment: dict) -> float:
    """Eq. 8 over the lowest third of the targets, where a critic that stays near the data's is said to fail (App. E.5)."""
    rows = alignment["sweep"][: len(alignment["sweep"]) // 3]
    return float(np.sqrt(np.mean([(row["score_mean"] - row["target_score"]) ** 2 for row in rows])))


def target_vs_velocity(alignment: dict) -> float | None:
    """Spearman correlation of target return and mean forward velocity over the sweep (Figure 3); None if one is constant."""
    from scipy.stats import spearmanr  # imported here: it takes a while

    x, y = ([row[key] for row in alignment["sweep"]] for key in ("target_return", "velocity_mean"))
    return float(spearmanr(x, y).statistic) if np.ptp(x) > 0 and np.ptp(y) > 0 else None


QUANTITIES = {  # of the tables: name -> value of a record
    "alignment RMSE": lambda r: r["alignment"]["alignment_rmse"],
    "RMSE at the lowest third of the targets": lambda r: rmse_at_low_targets(r["alignment"]),
    "best score of the sweep": lambda r: r["alignment"]["best_score"],
    "best score at a high target": lambda r: best_at_high_targets(r["alignment"]),
    "best checkpoint: RMSE": lambda r: r["alignment_best"] and r["alignment_best"]["alignment_rmse"],
    "best checkpoint: best score at a high target": lambda r: best_at_high_targets(r["alignment_best"]),
    "Spearman of target and return": lambda r: r["alignment"]["spearman_target_vs_real"],
    "Spearman of target and velocity": lambda r: target_vs_velocity(r["alignment"]),
    "Spearman of Q and return": lambda r: r["alignment"]["spearman_q_vs_return"],
    "Spearman of Q and discounted return": lambda r: r["alignment"].get("spearman_q_vs_discounted_return"),
    "data: Spearman of discounted and plain return": lambda r: (
        r["critic"] and r["critic"].get("spearman_discounted_vs_plain_return")
    ),
    "critic: mean Q / mean return": lambda r: (
        r["critic"] and r["critic"]["return_mean"] and r["critic"]["q_mean"] / r["critic"]["return_mean"]
    ),
    "minutes of training": lambda r: r["seconds"].get("training") and r["seconds"]["training"] / 60,
}


def interval(values: list[float]) -> str:
    """SciPy's 95% percentile bootstrap interval of the mean, for two values or more."""
    from scipy.stats import bootstrap  # imported here: it takes a while

    if len(values) < 2 or np.ptp(values) == 0:
        return ""
    ci = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return f" [{ci.low:.2f}, {ci.high:.2f}]"


def table(baseline: str, records: dict[str, dict[int, dict]]) -> list[str]:
    """Markdown: a column per variant, each cell with all seeds' values, their mean and its interval; pairs with the baseline."""
    heads = [f"{label} (seeds {', '.join(map(str, by_seed))})" for label, by_seed in records.items()]
    lines = ["| | " + " | ".join(heads) + " |", "|" + "---|" * (len(heads) + 1)]
    for quantity, value in QUANTITIES.items():
        cells = []
        for by_seed in records.values():
            every = [value(record) for record in by_seed.values()]
            values = [x for x in every if x is not None]
            each = ", ".join("-" if x is None else f"{x:.2f}" for x in every)
            cells.append(f"**{np.mean(values):.2f}**{interval(values)} ({each})" if values else "-")
        if set(cells) != {"-"}:
            lines.append(f"| {quantity} | " + " | ".join(cells) + " |")
    for label in [label for label in records if label != baseline and baseline in records]:
        pairs = [(records[baseline][s], records[label][s]) for s in records[label] if s in records[baseline]]
        if not pairs:
            continue
        worse = sum(QUANTITIES["alignment RMSE"](b) > QUANTITIES["alignment RMSE"](a) for a, b in pairs)
        lower = sum(
            QUANTITIES["best score of the sweep"](b) < QUANTITIES["best score of the sweep"](a) for a, b in pairs
        )
        lines += [
            "",
            f"{label} against {baseline}: RMSE higher in {worse}, best score lower in {lower} of {len(pairs)} seeds.",
        ]
    return lines


def plot(records: dict[str, dict[int, dict]], title: str, file: Path) -> None:
    """Achieved against target score: every seed of every variant thin, their mean thick."""
    import matplotlib  # imported here: it takes a while

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5.5), layout="constrained")
    for i, (label, by_seed) in enumerate(records.items()):
        sweeps = [record["alignment"]["sweep"] for record in by_seed.values()]
        x, curves = [row["target_score"] for row in sweeps[0]], [[row["score_mean"] for row in rows] for rows in sweeps]
        axes.plot(x, np.transpose(curves), color=f"C{i}", linewidth=0.8, alpha=0.4)
        axes.plot(x, np.mean(curves, axis=0), color=f"C{i}", linewidth=2.2, label=label)
    axes.plot([min(x), max(x)], [min(x), max(x)], "--", color="0.5", linewidth=1, label="achieved = target")
    axes.set_xlabel("target score (0: random, 100: expert)")
    axes.set_ylabel("achieved score (thin: each seed; thick: their mean)")
    axes.set_title(title, fontsize="small")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    temporary = f"{file}.{os.getpid()}.tmp"
    figure.savefig(temporary, format="png", dpi=110)
    os.replace(temporary, file)
    plt.close(figure)


def summarise(name: str, args: Args, records: dict[str, dict[int, dict]], missing: list[str]) -> Path:
    """Write a study's .md, .csv and .png; exits 1 if its runs are not of the same data and length."""
    study, stem = STUDIES[name], f"{name}__{args.env}"
    alignments = [record["alignment"] for by_seed in records.values() for record in by_seed.values()]
    kinds = {(alignment["trained_on"]["hash"], alignment["total_steps"]) for alignment in alignments}
    if len(kinds) > 1:
        fail(
            f"{name}: its runs are of different data or gradient steps: {sorted(kinds)}; remove the old records", code=1
        )
    data, steps, targets = (
        alignments[0]["trained_on"]["label"],
        alignments[0]["total_steps"],
        len(alignments[0]["sweep"]),
    )
    baseline = next(iter(study.variants))
    text = [
        f"# {name}: {study.claim}\n",
        f"{data}. {steps:,} gradient steps; {targets} target returns, {args.rollouts} rollouts each; policies of the last step where",
        "nothing else is said; scores in D4RL points. Cells: **mean** [95% percentile bootstrap interval] (each seed). With two or",
        "three seeds that interval is little more than their range.\n",
        *([f"Missing: {', '.join(missing)}.\n"] if missing else []),
        *table(baseline, records),
        f"\n![curves]({stem}.png)\n",
        "Its commands, for the first seed of each variant, every one once:\n\n```",
        *dict.fromkeys(command for by_seed in records.values() for command in next(iter(by_seed.values()))["commands"]),
        "```\n",
    ]
    rows = [["variant", "seed", *QUANTITIES]]
    for label, by_seed in records.items():
        rows += [[label, seed, *(value(record) for value in QUANTITIES.values())] for seed, record in by_seed.items()]
    sheet = io.StringIO()
    csv.writer(sheet, lineterminator="\n").writerows(rows)
    folder = Path(args.results_dir)
    plot(records, f"{name}: {data}, {steps:,} steps, {args.rollouts} rollouts per target", folder / f"{stem}.png")
    write(folder / f"{stem}.csv", sheet.getvalue())
    write(folder / f"{stem}.md", "\n".join(text))
    return folder / f"{stem}.md"


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    args = tyro.cli(Args, description=__doc__)
    if not args.studies or (unknown := set(args.studies) - set(STUDIES)):
        fail(
            f"unknown study {', '.join(sorted(unknown)) if args.studies else '(none named)'}: choose of {', '.join(STUDIES)}"
        )
    if args.workers < 1 or args.rollouts < 1 or not 0 < args.target_step < np.inf:
        fail("--workers and --rollouts must be at least 1 and --target-step positive")
    if args.env.startswith("antmaze"):
        fail(f"--env {args.env}: AntMaze has no simulator here, so there is nothing to sweep")
    wanted = {
        name: {
            label: {seed: Run(variant, seed, args) for seed in args.seeds or STUDIES[name].seeds}
            for label, variant in STUDIES[name].variants.items()
        }
        for name in args.studies
    }
    runs = {run.name: run for variants in wanted.values() for seeds in variants.values() for run in seeds.values()}
    results = {name: record for name, run in runs.items() if (record := run.record())}
    missing = [run for name, run in runs.items() if name not in results]
    print(f"{len(runs)} runs, {len(results)} of them finished before (to run them again, name another --results-dir)")
    if missing:
        results |= perform_on_ray(missing, args.ray) if args.ray else perform_all(missing, args.workers)
    failed = {name: result["failed"] for name, result in results.items() if "failed" in result}
    for name, variants in wanted.items():
        records = {
            label: {seed: results[run.name] for seed, run in seeds.items() if run.name not in failed}
            for label, seeds in variants.items()
        }
        records = {label: by_seed for label, by_seed in records.items() if by_seed}
        if records:
            lost = [run.name for seeds in variants.values() for run in seeds.values() if run.name in failed]
            print(f"{name}: {summarise(name, args, records, lost)}")
    for name, why in failed.items():
        print(f"{name}: {why}", file=sys.stderr)
    if failed:
        stopped = all(why == "stopped" for why in failed.values())
        fail(f"{len(failed)} of {len(runs)} runs are missing; the same command goes on", code=130 if stopped else 1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on", code=130)
