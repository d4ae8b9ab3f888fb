"""The paper's claims as lists of runs (Sec. 6, App. E): which variants are compared, on what data, with which seeds.

    python results/run_studies.py components loss --workers 2

The stage scripts train and sweep each variant per seed, as processes. Nothing finished is run again, what was killed
resumes, a failing run stops no other. Writes records/<dataset>/<run>.json and studies/<dataset>/<study>.md, .csv, .png.
--list prints the commands, to be run on other machines; the same study without --list then writes its table. --ray
sends them to a cluster.
"""

import contextlib
import csv
import hashlib
import importlib
import io
import json
import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent  # where the stage scripts are
sys.path[:0] = [str(ROOT), str(ROOT / "baselines"), str(ROOT / "data")]
import prepare

from train_qalign_dt import Files, Int, Str, fail, pick_device, write_file
from train_qalign_dt import run as run_script


class Variant(NamedTuple):
    """One line of a study; studies with the same line share its runs."""

    label: str  # evaluate_alignment.py's name of the method, or what differs from Q-Align DT
    exp_name: str
    flags: str = ""  # of the training script
    script: str = "train_qalign_dt.py"
    critic: str | None = "pretrain_q"  # experiment name of stage 1, shared likewise; None: no stage 1
    critic_flags: str = ""
    base: "Variant | None" = None  # what --checkpoint tunes further; it trains first, and alone gets --train-flags
    inference: tuple[str, ...] = ()  # the method's own ways to act, evaluated at the high targets beside the sweep
    sweep: bool = True  # False: only the score at the high targets, which the paper's Tables 1 and 2 report

    def but(self, label: str, exp_name: str, flags: str, **other) -> "Variant":
        """The same method with other flags; it acts in one way only."""
        return self._replace(label=label, exp_name=exp_name, flags=flags, inference=(), **other)


MODES = ("plan", "best", "softmax")  # evaluate_alignment.py --inference, but for the default
CLAIMS = {
    "components": "alignment loss and convolution: both are best, the loss matters most (Tables 4, E.17)",
    "critic": "a fixed critic, or one whose targets raise no RTG, fails at low target returns (Table E.10, Figure 2)",
    "loss": "the symmetric penalty is unstable, the squared one changes little (Table E.11)",
    "sigma": "sigma_e is uncritical above a small value (Table E.12)",
    "lambda": "without the alignment loss the score is low; above some lambda_e it hardly depends on it (Table E.14)",
    "default": "Q-Align DT and a DT with the same additions, on seeds that no choice was made on",
    "additions": "not the paper's: the default, and what each of our additions does",
    "time": "a DT that trains as long as Q-Align DT does not catch up (small preset: three times its 5,000 steps)",
    "neighbours": "not this paper's: which method follows the target return; RADT: 44.6% less absolute error than a DT",
    "radt": "RADT's: SeqRA and StepRA each beat a DT, both together are best, alpha helps",
    "tuning": "three settings of each neighbour, on hopper_mixed-zoo (RVDT takes QT's eta)",
    "vdt": "VDT's: weights and Q term beat each alone (Table 3)",
    "vdt_context": "VDT's: K from 20 to 60 is best, 8 and 120 are worse (Table 5)",
    "qt_eta": "QT: more of the Q term, more score, less obedience",
    "vdt_online": "VDT's: tuning in the simulator (20,000 steps) helps VDT, and helps it more than a DT",
    "low_data": "RVDT's: on mixtures with few or unequal episodes RVDT beats QT (data/mix_returns.py)",
    "rvdt": "RVDT's: rebalancing, a stochastic policy and Q each help; all three are best",
    "noise": "noise on the target critic is tolerated (Table E.13)",
    "discount": "it does no harm that Q is discounted and the target return is not (App. D.2)",
    "spearman": "Q ranks realised returns (Table E.19)",
    "table1": "scores on nine data sets of D4RL (Table 1)",
    "table2": "scores on AntMaze (Table 2)",
    "maze2d": "not the paper's: scores on Maze2D, beside those of QT, VDT and RVDT",
}
SEEDS = dict.fromkeys(CLAIMS, (1, 2)) | dict.fromkeys(("lambda", "tuning"), (1,))
SEEDS["default"] = SEEDS["additions"] = (5, 6, 7)  # the default was chosen on 1 to 4
SEEDS |= dict.fromkeys(("maze2d", "components", "spearman", "time", "neighbours", "radt"), (1, 2, 3))
SEEDS |= dict.fromkeys(("table1", "table2"), (1, 2, 3, 4, 5))
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())  # study -> its data sets, with numbers
Q_ALIGN = Variant("Q-Align DT", "train_qalign_dt")
DT_STATE = Variant("DT + state loss", "dt_state", "--lambda-e 0 --no-conv", critic=None)
DT_ALIGNMENT = Variant("DT + state loss + alignment", "dt_alignment", "--no-conv")
DT_STATE_CONV = Variant("DT + state loss + conv", "dt_state_conv", "--lambda-e 0", critic=None)
DELTAS = [Variant(f"Delta_RTG {x}", f"delta_rtg_{x}", f"--delta-rtg {x}") for x in (0, 10)]
LAMBDAS = [Variant(f"lambda_e {x}", f"lambda_{x}", f"--lambda-e {x}") for x in (30, 300, 1000)]  # of 100
WHOLE = Variant("Q-Align DT, whole window", "whole_window", "--eval-context-len 0")
LAST = Variant("Q-Align DT, last weights", "last_weights", "--average 0 --eval-context-len 0")
LIMIT = Variant("no noise, dropout 0.1", "limit", "--action-noise 0 --dropout 0.1")
NO_LIMIT = Variant("no limit", "no_limit", "--max-push 0")
LOSS = Variant("the paper's loss", "neither", f"{LIMIT.flags} {NO_LIMIT.flags}")
PAPERS = Variant("nothing of ours", "papers", f"{LOSS.flags} {LAST.flags}")
SMALL = Variant("a small perturbation", "small_perturbation", "--sigma-e 1 --delta-rtg 0.5 --lambda-e 25")
DT = Variant("DT", "dt", "--lambda-e 0 --no-conv --no-state-loss", critic=None)
DT_WHOLE = DT.but("DT, whole window", "dt_whole_window", f"{DT.flags} {WHOLE.flags}")
DT_LAST = DT.but("DT, last weights", "dt_last_weights", f"{DT.flags} {LAST.flags}")
DT_LONG = DT.but("DT, 15,000 steps", "dt_15000", f"{DT.flags} --total-steps 15000")
RADT = Variant("RADT", "train_radt", "", "baselines/train_radt.py", None)
RADTS = [
    RADT.but("RADT, SeqRA only", "radt_seqra", "--no-stepra"),
    RADT.but("RADT, StepRA only", "radt_stepra", "--no-seqra"),
    RADT.but("RADT, without alpha", "radt_no_alpha", "--no-alpha"),
    RADT.but("DT in RADT's setting", "radt_dt", "--no-seqra --no-stepra --rtg-tokens"),
]
RADT_RATES = [RADT.but(f"RADT, lr {x}", f"radt_lr_{x}", f"--lr {x}") for x in (3e-4, 3e-3)]
VDT = Variant("VDT", "train_vdt", "", "baselines/train_vdt.py", None, inference=("plan",))
VDTS = [
    VDT.but("VDT, without weights", "vdt_q", "--model-steps 0 --eta 0"),
    VDT.but("VDT, without Q term", "vdt_weights", "--model-steps 0 --q-weight 0"),
    VDT.but("VDT, without either", "vdt_dt", "--model-steps 0 --eta 0 --q-weight 0"),
]
VDT_KS = [VDT.but(f"VDT, K {k}", f"vdt_k_{k}", f"--model-steps 0 --context-len {k}") for k in (3, 20, 40)]
VDT_ETAS = [VDT.but(f"VDT, eta {x}", f"vdt_eta_{x}", f"--model-steps 0 --eta {x}") for x in (1, 3)]
QT = Variant("QT", "train_qt", "", "baselines/train_qt.py", inference=("best", "softmax"))
QT_ETAS = {x: QT.but(f"QT, eta {x}", f"qt_eta_{x}", f"--eta {x}") for x in (0.1, 0.3, 5)}
QT_ETAS[0] = QT.but("QT, eta 0", "qt_eta_0", "--eta 0", critic=None)
RVDT = Variant("RVDT", "train_rvdt", "", "baselines/train_rvdt.py")
RVDTS = [
    RVDT.but("RVDT-Dup", "rvdt_dup", "--rebalance dup"),
    RVDT.but("RVDT-Determ", "rvdt_determ", "--std none"),
    RVDT.but("VDT of RVDT's poster", "vdt_of_rvdt_s_poster", "--rebalance none"),
    RVDT.but("RDT", "rdt", "--eta 0", critic=None),
    RVDT.but("DT-Dup", "dt_dup", "--eta 0 --rebalance dup", critic=None),
]
TUNED_VDT = Variant("VDT, tuned online", "tune_vdt", "", "baselines/tune_vdt.py", None, base=VDT)
TUNED_DT = TUNED_VDT._replace(label="DT, tuned online", exp_name="tune_dt", base=DT_LAST)
GAMMA = Variant("gamma 0.997", "gamma_0.997", critic="pretrain_q_gamma_0.997", critic_flags="--gamma 0.997")
COLOURS = {"Q-Align DT": "#0072B2", "DT": "#000000", "RADT": "#009E73", "VDT": "#E69F00", "QT": "#D55E00"}
COLOURS |= dict.fromkeys(("RVDT", "RDT"), "#CC79A7")  # Okabe and Ito's; by a label's beginning, else Q-Align DT's
STUDIES = {
    "components": [Q_ALIGN, DT, DT_STATE, DT_STATE_CONV, DT_ALIGNMENT],
    "critic": [Q_ALIGN, Variant("fixed critic", "fixed_critic", "--no-update-q"), *DELTAS],
    "loss": [Q_ALIGN, *(Variant(x, x, f"--alignment {x}") for x in ("symmetric", "squared"))],
    "sigma": [Q_ALIGN, *(Variant(f"sigma_e {x}", f"sigma_{x}", f"--sigma-e {x}") for x in (0.1, 0.5, 2, 10))],
    "lambda": [Q_ALIGN, DT_STATE_CONV, *LAMBDAS],
    "default": [Q_ALIGN, DT],
    "additions": [Q_ALIGN, WHOLE, LAST, LIMIT, NO_LIMIT, LOSS, PAPERS, SMALL, DT, DT_WHOLE, DT_LAST],
    "time": [Q_ALIGN, DT, DT_STATE_CONV, DT_LONG],
    "neighbours": [Q_ALIGN, DT, DT_LAST, RADT, VDT, QT, RVDT],
    "radt": [RADT, *RADTS],
    "tuning": [RADT, *RADT_RATES, VDT, *VDT_ETAS, QT, QT_ETAS[0.1], QT_ETAS[0.3]],
    "vdt": [VDT, *VDTS, DT_LAST],
    "vdt_context": [VDT, *VDT_KS],
    "vdt_online": [VDT, TUNED_VDT, DT_LAST, TUNED_DT],
    "low_data": [QT, RVDT, DT_LAST],
    "qt_eta": [QT, *(QT_ETAS[x] for x in (0, 0.1, 5))],
    "rvdt": [RVDT, *RVDTS, QT, DT_LAST],
    "noise": [Q_ALIGN, *(Variant(f"sigma_n {x}", f"noise_{x}", f"--q-noise {x}") for x in (1, 10, 50))],
    "discount": [Q_ALIGN, GAMMA],
    "spearman": [Q_ALIGN],
}
STUDIES |= {table: [Q_ALIGN, DT, RADT, QT] for table in ("table1", "table2")}
STUDIES["maze2d"] = [Q_ALIGN, DT, RADT, VDT, QT, RVDT]
STUDIES |= {table: [one._replace(sweep=False) for one in STUDIES[table]] for table in PUBLISHED}


@dataclass(frozen=True)
class Args:
    # names of STUDIES: components, lambda, time, neighbours, ...; runs that several share are run once
    studies: tyro.conf.Positional[tuple[str, ...]]
    env: Str = (
        ""  # the dataset, as in the stages (default: hopper-mini; table1, table2, maze2d: all that were published)
    )
    dataset_path: Files = ()  # its HDF5 file(s), as in the stages
    seeds: tuple[int, ...] = ()  # seeds instead of the study's own
    only: tuple[str, ...] = ()  # only these variants, by experiment name; then no table is written
    workers: int = 1  # runs at a time, which share the CPU cores, and the CUDA devices in turn; 0: only write tables
    list: bool = False  # print the commands, in waves that follow each other, and run nothing
    ray: Str = ""  # run on this Ray cluster: auto, local, or an address; folders must be shared by its machines
    num_cpus: float = 1  # cores of a Ray task
    num_gpus: float = 0  # GPUs of a Ray task; with 0.25 four runs share one
    # further flags of pretrain_q.py for every run, as one string: --critic-flags='--critic-width 128'
    critic_flags: Str = ""
    train_flags: Str = ""  # further flags of the training scripts for every run, in the same way
    rollouts: int = 10  # episodes per target return of the sweep (App. D.6: 30; fewer add noise to the alignment error)
    target_step: float = 100.0  # distance between two target returns of the sweep, raw
    score_rollouts: Int = None  # episodes per high target in table1, table2, maze2d (default: 50, Sec. 6.2; mazes: 100)
    runs_dir: str = "runs"  # folder of all runs; those of a --dataset-path lie in one of its own in it
    results_dir: str = str(Path(__file__).resolve().parent)  # folder of records, tables and figures


def dataset_of(args: Args) -> str:
    """What the data are called in results: by their files, or by --env."""
    return "+".join(Path(file).stem for file in args.dataset_path) or (args.env or "hopper-mini").replace("/", "--")


def presets(script: str) -> dict[str, float]:
    """The defaults by which `script` trains small data that are not D4RL's."""
    module = vars(importlib.import_module(Path(script).stem))
    return module.get("SMALL", {}) | module.get("OTHER_DATA", {})


class Run:
    """One variant with one seed, on the given data (file name -> hash); its record has the same definition."""

    def __init__(self, variant: Variant, seed: int, args: Args, data: dict[str, str]):
        self.args = args = replace(args, env=args.env or "hopper-mini")
        runs_dir, env = Path(args.runs_dir), args.env.replace("/", "--")  # Minari's names have slashes
        self.name = f"{env}__{variant.exp_name}__{seed}"
        folder, critic = runs_dir / self.name, runs_dir / f"{env}__{variant.critic}__{seed}"
        self.result = "alignment" if variant.sweep else "high_targets"  # stage 3's file and the record's key
        train_flags = variant.flags if variant.base else f"{args.train_flags} {variant.flags}"
        critic_flags = f"{args.critic_flags} {variant.critic_flags}"
        own = ["--env", args.env, "--seed", str(seed), "--runs-dir", args.runs_dir]
        own_data = ["--dataset-path", *args.dataset_path] if args.dataset_path else []
        train = [variant.script, *shlex.split(train_flags), *own, *own_data, "--exp-name", variant.exp_name]
        self.prepare = args.env, ["data/prepare.py", "--env", args.env, "--runs-dir", args.runs_dir, *own_data]
        rollouts, step = (args.rollouts, args.target_step) if variant.sweep else (args.score_rollouts, None)
        evaluate = ["evaluate_alignment.py", *own, "--checkpoint", str(folder / "policy.pt")]
        evaluate += ["--rollouts", str(rollouts)] if rollouts is not None else []
        sweep = ["--target-step", str(step), "--percentiles"] if variant.sweep else ["--high-targets"]
        self.stages = {"training": (folder, train), "sweep": (folder, evaluate + sweep)}  # folder; script, flags
        if variant.critic:
            pretrain = ["pretrain_q.py", *shlex.split(critic_flags), *own, *own_data, "--exp-name", variant.critic]
            self.stages = {"critic": (critic, pretrain)} | self.stages
            train += ["--critic", str(critic / "critic.pt")]
        if variant.base:
            base_folder, base = Run(variant.base, seed, args, data).stages["training"]
            self.stages = {"base": (base_folder, base)} | self.stages
            train += ["--checkpoint", str(base_folder / "policy.pt")]
        for mode in variant.inference:
            self.stages[mode] = folder, [*evaluate, "--high-targets", "--inference", mode]
        self.name += "" if variant.sweep else "__high_targets"  # another record, of the same policy
        self.log = runs_dir / "logs" / f"{self.name}.log"
        self.record_file = Path(args.results_dir) / "records" / dataset_of(args) / f"{self.name}.json"
        self.definition = dict(run=self.name, data=data, flags=variant.flags, train_flags=args.train_flags)
        self.definition |= dict(critic_flags=critic_flags.strip(), rollouts=rollouts, target_step=step)
        self.definition["presets"] = presets(variant.script)
        if variant.base:
            self.definition["presets"] = self.definition["presets"] | presets(variant.base.script)


def read_record(run: Run) -> dict | None:
    """A run's record and what tables say of it; None if there is none yet; ValueError if the file is another's."""
    if not os.path.lexists(run.record_file):
        return None
    try:
        record = json.loads(run.record_file.read_text())
        both, alignment = (run.definition, record["definition"]), record[run.result]
        ours, theirs = ({k: v for k, v in one.items() if k != "presets"} | one["presets"] for one in both)
        if not ours["data"]:  # not at hand: the record's are taken as they are
            ours["data"] = theirs["data"]
        differs = [k for k in ours | theirs if ours.get(k) != theirs.get(k)]
        differs = [f"{k} {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in differs]
        rows = alignment["sweep" if run.result == "alignment" else run.result]
        data, steps, targets = alignment["trained_on"], alignment["total_steps"], len(rows)
        record["setting"] = f"{data['label']} ({data['digest']}), {steps:,} gradient steps, {targets} target returns"
        average = alignment.get("average")  # absent where the method has none
        record["weights"] = f"averaged (--average {average})" if average else "of the last step"
        values = quantities(record) if run.result == "alignment" else scores(record)
        record |= {"commands": list(map(str, record["commands"])), "quantities": values}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{run.record_file}: not a record of this program ({error!r:.80}); remove it") from None
    if differs:
        raise ValueError(f"{run.record_file}: {'; '.join(differs)}; choose another --results-dir, or remove it")
    return record


def check(runs: list[Run], args: Args) -> None:
    """Exits 2 on what would make every run fail, before anything is written; then makes the data ready."""
    for run in runs:
        if run.result == "alignment" and prepare.parse_env(run.args.env)["body"] == "antmaze":
            fail(f"--env {run.args.env}: AntMaze's returns are 0 and 1: there is no RTG sweep to study")
    for script, *flags in (command for run in runs for _, command in run.stages.values()):
        names = [flag.partition("=")[0].replace("_", "-") for flag in flags]
        for name in ("--env", "--seed", "--runs-dir", "--dataset-path", "--exp-name", "--critic"):
            if names.count(name) > 1:
                fail(f"{script}: {name} cannot be passed on, this program sets it")
        try:
            with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
                stage_args = importlib.import_module(Path(script).stem).Args
                parsed = tyro.cli(stage_args, args=flags, config=(tyro.conf.DisallowNone,))
        except SystemExit as exit:  # tyro has said a title, a rule of dashes, the reason, a rule; or it has helped
            reason = re.split("-{9,}", said.getvalue())[1] if exit.code else "--help and the like cannot be passed on"
            fail(f"{script}: {' '.join(reason.split())}")
        if not args.list and not args.ray:  # else other machines have other devices
            pick_device(parsed.device)
    for one in {} if args.list else {run.args.env: run.args for run in runs}.values():
        prepare.prepare(one.env, one.dataset_path, one.runs_dir)  # once, not by every run


def perform(run: Run, environment: dict, busy: set[Path]):
    """A generator: runs the stages and yields what it does, then returns the record. Closing it ends the process."""
    seconds = {}
    run.log.parent.mkdir(parents=True, exist_ok=True)
    for stage, (folder, (script, *flags)) in run.stages.items():
        # a seed's variants share their critic; and a stage may have outlived a run_studies.py that was killed
        while folder in busy or is_locked(folder / ".lock"):
            yield f"waits for {folder}"
        resumes = any((folder / name).exists() for name in ("resume.pt", "critic.pt", "policy.pt"))
        with open(run.log, "ab") as log:
            start, end_of_log = time.monotonic(), log.tell()
            options = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True)
            process = subprocess.Popen([sys.executable, str(ROOT / script), *flags], **options)  # gets no Ctrl-C
        busy.add(folder)
        try:
            while process.poll() is None:
                yield stage
        finally:
            process.terminate()
            code = process.wait()
            busy.remove(folder)
        resumable = stage in ("base", "critic", "training")
        seconds[stage] = None if resumes and resumable else round(time.monotonic() - start, 1)
        if code:
            said = run.log.read_bytes()[end_of_log:].decode(errors="replace").strip() or "no output"
            raise ChildProcessError(f"{stage} ended with code {code}: {said.splitlines()[-1]} (log: {run.log})")
    record = dict(definition=run.definition, seconds=seconds, threads=environment["OMP_NUM_THREADS"], critic=None)
    record["commands"] = [shlex.join(["python", *command]) for _, command in run.stages.values()]
    record["made_with"] = made_with()
    record[run.result] = json.loads((folder / f"{run.result}.json").read_text())
    modes = [mode for mode in MODES if mode in run.stages]
    record["inference"] = {mode: json.loads((folder / f"high_targets_{mode}.json").read_text()) for mode in modes}
    if "critic" in run.stages:
        record["critic"] = json.loads((run.stages["critic"][0] / "report.json").read_text())
    run.record_file.parent.mkdir(parents=True, exist_ok=True)
    if not run.record_file.exists():  # else another process has been faster
        write_file(run.record_file, (json.dumps(record, allow_nan=False) + "\n").encode())
    return read_record(run)


def made_with() -> dict[str, str]:
    """What times and rounding depend on, which a record keeps (its tables do not show it)."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    commit = model = None
    with contextlib.suppress(OSError):
        commit = subprocess.run(git, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout.strip()
    with contextlib.suppress(OSError):
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    processor = model[1] if model else platform.processor()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return dict(commit=commit or "unknown", torch=torch.__version__, processor=processor, gpu=gpu)


def is_locked(file: Path) -> bool:
    with contextlib.suppress(filelock.Timeout), filelock.FileLock(file, timeout=0):
        return False
    return True


def shares(workers: int) -> list[dict[str, str]]:
    """Environment variables of each worker: CPU cores shared out, CUDA devices in turn."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    every = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // workers))}
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = gpus.split(",") if gpus else []
    return [every | ({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {}) for i in range(workers)]


def perform_all(runs: list[Run], workers: int) -> dict[str, dict]:
    """All runs, `workers` at a time: their records by name, except for those that fail."""
    free, queue, active, busy, records = shares(workers), list(runs), {}, set(), {}
    bar = tqdm(total=len(runs), unit="run", dynamic_ncols=True, disable=not sys.stdout.isatty())
    with bar, contextlib.ExitStack() as stack:  # which ends all processes when it is left, by Ctrl-C too
        while queue or active:
            while queue and free:
                run, share = queue.pop(0), free.pop(0)
                generator = stack.enter_context(contextlib.closing(perform(run, os.environ | share, busy)))
                active[generator] = run, share
                bar.write(f"{run.name}: starts")
            states = []
            for generator, (run, share) in list(active.items()):
                try:
                    states.append(f"{run.name} {next(generator)}")
                    continue
                except StopIteration as end:
                    records[run.name] = end.value
                    bar.write(f"{run.name}: finished")
                except Exception as error:  # whatever it is, it concerns this run only
                    bar.write(f"{run.name}: {error or repr(error)}", file=sys.stderr)
                del active[generator]
                free.append(share)
                bar.update()
            bar.set_postfix_str(", ".join(states))
            time.sleep(0.1)
    return records


def waves(runs: list[Run]) -> list[dict[str, list[str]]]:
    """The commands that make the records, by name: data, critics, policies to tune, runs; each after the one before."""
    shared = [[run.stages[name] for run in runs if name in run.stages] for name in ("critic", "base")]
    every = [[run.prepare for run in runs], *shared, [(run.name, run.command) for run in runs]]
    return [{str(k): [os.path.relpath(ROOT / file), *flags] for k, (file, *flags) in one} for one in every if one]


def execute(command: list[str], folder: str, *_) -> None:
    """A Ray task: one of the commands."""
    done = subprocess.run([sys.executable, *command], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        raise ChildProcessError(" ".join(done.stderr.decode(errors="replace").split())[-500:])


def perform_on_ray(runs: list[Run], args: Args) -> dict[str, dict]:
    """All runs as tasks of a Ray cluster: their records by name. Ray itself repeats what a lost worker interrupts."""
    try:
        import ray
    except ImportError:
        fail("--ray needs Ray: pip install -r results/requirements-cluster.txt")
    host, _, port = args.ray.rpartition(":")
    if host:  # Ray itself would wait for ever where nobody answers
        try:
            socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            fail(f"--ray {args.ray}: no cluster answers there ({error}); give auto, local, or host:port", code=1)
    ray.init(address=args.ray, log_to_driver=False, logging_level="error")
    task, refs = ray.remote(num_cpus=args.num_cpus, num_gpus=args.num_gpus)(execute), {}
    folders = {run.name: [str(folder) for folder, _ in run.stages.values()] for run in runs}
    for name, command in [pair for wave in waves(runs)[1:] for pair in wave.items()]:  # the data are there
        refs[name] = task.remote(command, os.getcwd(), *(refs[x] for x in folders.get(name, ()) if x in refs))
    for name, ref in refs.items():
        try:
            ray.get(ref)
            print(f"{name}: finished")
        except ray.exceptions.RayError as error:
            print(f"{name}: {getattr(error, 'cause', None) or error}", file=sys.stderr)
    return {run.name: record for run in runs if (record := read_record(run))}


def scores(record: dict) -> dict[str, dict[float, float]]:
    """How the method acts -> target return -> score, of a record of high targets."""
    every = {"request": record["high_targets"]} | record["inference"]
    found = {k: {row["target_return"]: row["score_mean"] for row in x["high_targets"]} for k, x in every.items()}
    if not all(one and np.isfinite([*one, *one.values()]).all() for one in found.values()):
        raise ValueError("a score is missing or not finite")
    return found


def quantities(record: dict) -> dict[str, float | None]:
    """The rows of the tables; None where a value is unknown."""
    from scipy.stats import spearmanr  # imported here: it takes a while

    alignment, critic, training = record["alignment"], record["critic"] or {}, record["seconds"].get("training")
    columns = ("target_return", "velocity_mean", "target_score", "score_mean")
    target, velocity, wanted, achieved = (np.array([row[name] for row in alignment["sweep"]]) for name in columns)
    squares, n = (achieved - wanted) ** 2, len(target) // 3
    low, middle, high = (float(np.sqrt(np.mean(part))) for part in (squares[:n], squares[n:-n], squares[-n:]))
    # the first high target of own data is their highest return; a sweep of D4RL's ends less than a step below theirs
    at_highest = alignment["sweep"][-1] if alignment["trained_on"]["is_d4rl"] else alignment["high_targets"][0]
    beyond = record["definition"]["run"].startswith("maze2d")  # both go on above the data's returns
    modes = {mode: result["high_targets"][0]["score_mean"] for mode, result in record.get("inference", {}).items()}

    def times(factor: float, x: float | None) -> float | None:
        return x and factor * x

    found = {
        "alignment RMSE": alignment["alignment_rmse"],
        "RMSE at the lowest third of the targets": low,
        "RMSE at the middle third of the targets": middle,
        "RMSE at the highest third of the targets": high,
        "score at the data's highest return": None if beyond else at_highest["score_mean"],
        **{f"score, --inference {mode}": modes.get(mode) for mode in MODES},
        "slope of achieved by target score": float(np.polyfit(wanted, achieved, 1)[0]),
        "Spearman of target and return": alignment["spearman_target_vs_real"],
        "Spearman of target and velocity": float(spearmanr(target, velocity)[0]) if np.ptp(velocity) > 0 else None,
        "Spearman of Q and return": alignment.get("spearman_q_vs_return"),
        "Spearman of Q and discounted return": alignment.get("spearman_q_vs_discounted_return"),
        "data: Spearman of discounted and plain return": critic.get("spearman_discounted_vs_plain_return"),
        "critic: mean Q / mean return": critic["q_mean"] / critic["return_mean"] if critic.get("return_mean") else None,
        "absolute error of seven targets, in % of their range": times(100, alignment.get("absolute_error_of_range")),
        "minutes of training": training and training / 60,  # None if it was resumed
        "parameters of the policy": alignment.get("parameters"),
        "milliseconds per action": times(1000, alignment.get("seconds_per_action")),
    }
    if not np.isfinite([x for x in found.values() if x is not None]).all():
        raise ValueError("a value is not finite")
    return found


def cell(values: list[float | None], digits: int = 2) -> str:
    """Mean over the seeds and its 95% percentile bootstrap interval, if two values differ."""
    from scipy.stats import bootstrap

    known = [x for x in values if x is not None]
    if not known:
        return "-"
    numbers = [np.mean(known)]
    if np.ptp(known) > 0:
        numbers += bootstrap((known,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    mean, *interval = (f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.{digits}f}" for x in numbers)
    return f"{mean} [{', '.join(interval)}]" if interval else mean


def plot(records: dict[tuple[str, int], dict], dataset: str) -> bytes:
    """Achieved against requested score, one panel per variant: the mean of its seeds in their range."""
    from matplotlib.figure import Figure

    every = {label: [record for (other, _), record in records.items() if other == label] for label, _ in records}
    few, many = (extreme(map(len, every.values())) for extreme in (min, max))
    seeds = f"{many} seed{'s' * (many > 1)}" if few == many else f"{few} to {many} seeds"
    rows = -(-len(every) // 4)
    columns = -(-len(every) // rows)
    figure, picture = Figure(figsize=(10, 1.1 + rows * min(10.5 / columns, 4)), layout="constrained"), io.BytesIO()
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for panel in panels[len(every) :]:
        panel.set_axis_off()
    for i, (panel, (label, runs)) in enumerate(zip(panels, every.items())):
        sweeps = [record["alignment"]["sweep"] for record in runs]
        x, y = (np.array([[row[k] for row in one] for one in sweeps]).T for k in ("target_score", "score_mean"))
        colour = next((value for name, value in COLOURS.items() if label.startswith(name)), COLOURS["Q-Align DT"])
        panel.plot(x[[0, -1], 0], x[[0, -1], 0], "--", color="0.5", linewidth=1.2)
        panel.fill_between(x[:, 0], y.min(axis=1), y.max(axis=1), color=colour, alpha=0.25, linewidth=0)
        panel.plot(x[:, 0], y.mean(axis=1), color=colour, linewidth=2)
        rmse = cell([record["alignment"]["alignment_rmse"] for record in runs], digits=1)
        panel.set_title(f"{label}\nRMSE {rmse}", fontsize=12)
        panel.tick_params(labelsize=11, labelbottom=i + columns >= len(every))
    figure.suptitle(f"Achieved against requested return, {dataset}, {seeds}", fontsize=15)
    figure.supxlabel("requested score (dashed: achieved = requested; band: all seeds)", fontsize=13)
    figure.supylabel("achieved score", fontsize=13)
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def summarise(study: str, args: Args, records: dict[tuple[str, int], dict], missing: list[str]) -> None:
    """Write a study's .md, .csv and .png from (label, seed) -> record; exits 1 if its runs are not comparable."""
    own = [r["setting"] for r in records.values() if "--total-steps" in r["definition"]["flags"]]  # labels say so
    if len(settings := {r["setting"] for r in records.values()} - set(own)) > 1:
        fail(f"{study}: cannot compare {' with '.join(sorted(settings))}; remove the old records", code=1)
    setting = f"{(*settings, *own)[0]}, {args.rollouts} rollouts each"
    file = Path(args.results_dir, "studies", dataset_of(args), f"{study}.md")
    seeds = {label: [seed for other, seed in records if other == label] for label, _ in records}
    names = list(next(iter(records.values()))["quantities"])
    rows = [["quantity", *(f"{label} (seeds {', '.join(map(str, every))})" for label, every in seeds.items())]]
    rows += [["---"] * len(rows[0])]
    weights = [{records[label, seed]["weights"] for seed in every} for label, every in seeds.items()]
    rows += [["weights", *(" or ".join(sorted(each)) for each in weights)]]
    for name in names:
        values = [[records[label, seed]["quantities"][name] for seed in every] for label, every in seeds.items()]
        rows += [[name, *map(cell, values)]]
    rows = [row for row in rows if set(row[1:]) != {"-"}] + [[]]
    rows += [["variant", "seed", *(ours := ("alignment RMSE", "score at the data's highest return"))], ["---"] * 4]
    rows += [[label, f"{seed}", *(cell([r["quantities"][x]]) for x in ours)] for (label, seed), r in records.items()]
    text = [
        f"# {study}: {CLAIMS[study]}\n",
        f"{setting}; scores in D4RL points. Cells: mean [95% percentile bootstrap interval]; with two or three",
        f"seeds that interval is little more than their range. Every value of each seed: [{study}.csv]({study}.csv).\n",
        *([f"Missing: {', '.join(missing)}.\n"] if missing else []),
        f"![achieved against requested return]({study}.png)\n",
        *(f"| {' | '.join(row)} |" if row else "" for row in rows),
        "\nThe commands, for one seed of each variant:\n\n```",
        *dict.fromkeys(command for label, every in seeds.items() for command in records[label, every[0]]["commands"]),
        "```\n",
    ]
    table = [["variant", "seed", *names], *([*key, *r["quantities"].values()] for key, r in records.items())]
    csv.writer(sheet := io.StringIO(), lineterminator="\n").writerows(table)  # quotes names with commas; None is ""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file.with_suffix(".png"), plot(records, dataset_of(args)))
    write_file(file.with_suffix(".csv"), sheet.getvalue().encode())
    write_file(file, "\n".join(text).encode())
    print(f"{study}: {file}")


def standard_error(x) -> float:
    return float(np.std(x, ddof=1)) / len(x) ** 0.5


def compare(x: list[float], published: float | None = None, deviation: float = 0.0) -> str:
    """Scores, one per seed, beside a published mean: within two standard errors of the difference they agree."""
    if published is None or len(x) < 2:
        return "-"
    gap = np.mean(x) - published
    return "agrees" if abs(gap) <= 2 * np.hypot(standard_error(x), deviation) else "above" if gap > 0 else "below"


def tabulate(table: str, args: Args, runs: dict[tuple[str, str, int], Run], records: dict[str, dict]) -> None:
    """Write one of the paper's tables: its numbers beside ours; exits 1 if seeds are not comparable."""
    rows = [
        ["data set", "method", "published", "here, at target return", "verdict", "seeds", "data, steps"],
        ["---"] * 7,
    ]
    for env, label in dict.fromkeys(key[:2] for key in runs):
        own = {str(k[2]): run.name for k, run in runs.items() if k[:2] == (env, label) and run.name in records}
        every = [records[name] for name in own.values()]
        if len(settings := {record["setting"].rpartition(",")[0] for record in every}) > 1:
            fail(f"{table}: cannot compare {' with '.join(sorted(settings))}; remove the old records", code=1)
        data_set = dataset_of(args) if args.dataset_path else env
        published = PUBLISHED[table]["values"].get(data_set, {}).get(label, [])
        for mode in every[0]["quantities"] if every else ["request"]:
            cells, scores = [], {}
            for pairs in zip(*(record["quantities"][mode].items() for record in every)):  # of one target, by seed
                target, x = pairs[0][0], [score for _, score in pairs]
                scores[float(target)] = x
                error = f" ± {standard_error(x):.2f}" if len(x) > 1 else ""
                cells += [f"{np.mean(x):.1f}{error} at {target:g}"]
            verdict = compare(scores[max(scores)], *published) if scores else "-"
            name = label if mode == "request" else f"{label}, --inference {mode}"
            row = [data_set, name, " ± ".join(map(str, published)) or "-", "; ".join(cells) or "-", verdict]
            rows += [[*row, ", ".join(own) or "-", *(settings or "-")]]
    missing = [run.name for run in runs.values() if run.name not in records]
    text = [
        f"# {table}: {CLAIMS[table]}\n",
        "Here: the score after the last step at every high target, mean ± standard error over seeds. Verdict: whether",
        "that at the highest target differs from the published mean by over two standard errors of the difference.",
        f"Published: {PUBLISHED[table]['source']}. More methods: published.json.\n",
        *([f"Missing: {', '.join(missing)}.\n"] if missing else []),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    file = Path(args.results_dir, "studies", dataset_of(args) if args.env or args.dataset_path else "", f"{table}.md")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, ("\n".join(text) + "\n").encode())
    print(f"{table}: {file}")


def runs_of(study: str, args: Args) -> dict[tuple[str, str, int], Run]:
    """(data set, label, seed) -> run, with the command line of this program that performs it alone."""
    own_list = study in PUBLISHED and not args.env and not args.dataset_path
    runs = {}
    for env in PUBLISHED[study]["values"] if own_list else [args.env or "hopper-mini"]:
        folder = str(Path(args.runs_dir, dataset_of(args))) if args.dataset_path else args.runs_dir
        files = [Path(p) for p in args.dataset_path] or [ROOT / "data" / f"{env}.hdf5"]  # D4RL's files do not change
        data = {p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in files if p.is_file()}
        for variant in [x for x in STUDIES[study] if not args.only or x.exp_name in args.only]:
            for seed in args.seeds or SEEDS[study]:
                run = runs[env, variant.label, seed] = Run(variant, seed, replace(args, env=env, runs_dir=folder), data)
                line = vars(args) | dict(env=env, seeds=(seed,), only=(variant.exp_name,), list=False, ray="")
                run.command = ["results/run_studies.py", study]
                for name, value in line.items():
                    if value != getattr(Args, name, value) and name not in ("workers", "num_cpus", "num_gpus"):
                        flag = f"--{name.replace('_', '-')}"
                        run.command += [flag, *map(str, value)] if isinstance(value, tuple) else [f"{flag}={value}"]
    return runs


def main() -> None:
    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.DisallowNone,))
    if not args.studies or set(args.studies) - set(STUDIES):
        fail(f"unknown study {' '.join(args.studies) or '(none named)'}: choose from {', '.join(STUDIES)}")
    if args.workers < 0:
        fail(f"--workers {args.workers}: must be at least 0")
    known = {variant.exp_name for study in args.studies for variant in STUDIES[study]}
    if unknown := set(args.only) - known:
        fail(f"--only {' '.join(sorted(unknown))}: choose from {', '.join(sorted(known))}")
    for folder in (Path(args.runs_dir, "logs").absolute(), Path(args.results_dir, "records").absolute()):
        existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            fail(f"cannot write to {existing}; choose another --runs-dir or --results-dir")
    try:
        wanted = {study: runs_of(study, args) for study in args.studies}
        every = {run.name: run for runs in wanted.values() for run in runs.values()}
        records = {name: record for name, run in every.items() if (record := read_record(run))}
    except ValueError as error:  # of shlex or read_record
        fail(f"{error}")
    before = f"{len(records)} of them finished before (another --results-dir runs them again)"
    print(f"{'# ' * args.list}{len(every)} runs, {before}")
    missing = [run for name, run in every.items() if name not in records]
    if args.list:
        check(missing, args)
        for wave in waves(missing):
            print("# wave", *(shlex.join(["python", *command]) for command in wave.values()), sep="\n")
        return
    if missing and args.workers:
        check(missing, args)
        try:
            records |= perform_on_ray(missing, args) if args.ray else perform_all(missing, args.workers)
        except KeyboardInterrupt as error:
            error.add_note("the same command continues")
            raise
    for study, runs in wanted.items() if not args.only else ():
        found = {key[1:]: records[run.name] for key, run in runs.items() if run.name in records}
        if study in PUBLISHED and found:  # without a record the table there is, of other runs, stays
            tabulate(study, args, runs, records)
        elif found:
            summarise(study, args, found, [run.name for run in runs.values() if run.name not in records])
    if len(records) < len(every):
        fail(f"{len(every) - len(records)} of {len(every)} runs are missing; the same command continues", code=1)


if __name__ == "__main__":
    for name in ("stdout", "stderr"):
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))  # None where it was closed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_script(main)
