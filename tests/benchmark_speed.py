"""How fast the stages are, against what this machine's matrix units can do. Not collected by pytest.

    python tests/benchmark_speed.py              # under 5 minutes on two CPU cores
    python tests/benchmark_speed.py --full       # also torch.compile, more repeats and a whole sweep

Measures the training step of stage 2 at paper size and at hopper-mini's sizes, stage 1's step, the RTG sweep of stage 3
split into policy and simulator, start-up times and peak memory. The ceiling is a plain matrix product, measured before
and after in the same run. Appends one JSON object to --out and prints it as a table.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import prepare  # noqa: E402

import evaluate_alignment as stage3  # noqa: E402
import pretrain_q as stage1  # noqa: E402
import train_qalign_dt as stage2  # noqa: E402

PAPER = dict(embed_dim=256, n_layer=4, n_head=4, context_len=20, batch_size=256, critic_width=256, total_steps=100_000)
TARGETS, ROLLOUTS = 33, 30  # of the sweep that is timed
# a policy's forward passes worth of arithmetic in one step: the target's, and two windows forward (1) and backward (2)
FORWARDS = 1 + 2 * 3


@dataclass(frozen=True)
class Args:
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to measure; auto takes CUDA if there is one
    # also torch.compile (on CUDA: without a graph, too), more repeats, a whole sweep of HalfCheetah (about an hour on
    # two CPU cores), and on CUDA start-up times and memory
    full: bool = False
    out: str = str(ROOT / "results" / "speed.jsonl")  # file that the result is appended to


def hardware(device: torch.device) -> dict:
    cpu, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    units = [x for x in ("amx_bf16", "avx512_bf16") if torch.cpu.get_capabilities().get(x)]
    return {
        "cpu": f"{cpu} ({', '.join(units) or 'no bfloat16 units'})",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def seconds(call, device: torch.device, repeats: int, warm_up: int = 1) -> list[float]:
    """The time of each repeat; on CUDA, where calls return at once, one number: that of all repeats, divided."""
    for _ in range(warm_up):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        return [(time.perf_counter() - start) / repeats]
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a plain matrix product: on a CPU the best of ten, on CUDA the best of three means of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(min(seconds(lambda: a @ b, device, 10)) for _ in range(3 if device.type == "cuda" else 1))


def forward_flop(sizes: dict, windows: int) -> float:
    """Of the transformer's blocks, App. D.1: projections, convolution, attention, MLP; two for each multiplication."""
    D, T = sizes["embed_dim"], 3 * sizes["context_len"]
    return 2 * windows * T * D * (30 * D + 2 * T) * sizes["n_layer"]


def training_step(data, device, sizes: dict, precision, compiled, graph, repeats) -> tuple[float, float]:
    """Median seconds of one step of Algorithm 1 with its metrics, and the transformer's arithmetic in FLOP."""
    torch._dynamo.reset()  # an earlier variant's shapes must not make this one's symbolic
    config = stage2.resolve(stage2.Args(precision=precision, compile=compiled, **sizes), data, device)
    learner = stage2.CoTraining(data.task, stage2.Windows(data, config.context_len, device), config)
    step = stage2.cuda_graph(learner) if graph else learner.step
    sums = torch.zeros(len(stage2.METRICS), device=device)

    def call():
        learner.set_learning_rates(0)
        sums.add_(step())

    times = seconds(call, device, repeats, warm_up=10 if device.type == "cuda" else 1)
    return statistics.median(times), FORWARDS * forward_flop(vars(config), config.batch_size)


def pretraining_step(data, device, repeats) -> tuple[float, float]:
    """Median seconds of one step of stage 1's SARSA, width 256, and its arithmetic: one pass of Q', three of Q."""
    args = stage1.resolve(stage1.Args(critic_width=256, warm_start_steps=0), data.task, device)
    learner = stage1.Pretraining(data.task, stage1.Transitions(data, device, args.gamma), args)
    sums = torch.zeros(len(learner.metrics), device=device)

    def two_steps():  # of which one moves the target
        for step in range(2):
            sums.add_(learner.step(step))

    times = seconds(two_steps, device, repeats, warm_up=10)
    return statistics.median(times) / 2, 4 * 2 * args.batch_size * sum(p.numel() for p in learner.critic.weights)


def make_policy(task, sizes: dict, precision: str, device):
    config = sizes | dict(max_timestep=stage2.MAX_TIMESTEP, conv=True, dropout=0.1)
    return stage3.make_policy(task, config, precision == "bf16").to(device).eval()


def sweep_step(task, device, precision, sizes: dict, repeats: int) -> dict:
    """Seconds of one lockstep step of the sweep, all rollouts alive: the policy's share and the simulator's."""
    n, K = TARGETS * ROLLOUTS, sizes["context_len"]
    policy = make_policy(task, sizes, precision, device)
    rtg, obs = torch.randn(n, K, device=device), torch.randn(n, K, task.obs_dim, device=device)
    act, timestep = torch.zeros(n, K, task.act_dim, device=device), torch.arange(K, device=device).expand(n, K)
    context = rtg, obs, act, timestep, torch.ones(n, K, dtype=torch.bool, device=device)
    with torch.no_grad():
        policy_time = statistics.median(seconds(lambda: policy.act(*context).cpu(), device, repeats))
    simulator, everyone = stage3.Simulator(task.env_id, range(n)), np.arange(n)
    actions = np.random.default_rng(0).uniform(-0.3, 0.3, (n, task.act_dim))
    simulator_time = statistics.median(seconds(lambda: simulator.step(everyone, actions), torch.device("cpu"), 20))
    return dict(policy=policy_time, simulator=simulator_time)


def whole_sweep(device, precision) -> float:
    """Seconds of 33 x 30 rollouts of HalfCheetah, which never falls, 1,000 steps each, by an untrained policy."""
    with tempfile.TemporaryDirectory() as folder:
        task = stage2.Dataset(prepare.prepare("halfcheetah-mini", (), folder)).task
    content = dict(config=dict(max_timestep=stage2.MAX_TIMESTEP))
    content |= dict(obs_mean=torch.zeros(task.obs_dim), obs_std=torch.ones(task.obs_dim))
    policy = make_policy(task, PAPER, precision, device)
    trained = stage3.Trained(Path(), task, policy, content, PAPER["context_len"])
    targets, start = np.repeat(np.linspace(0, 1e4, TARGETS), ROLLOUTS), time.perf_counter()
    stage3.rollout(trained, targets, range(len(targets)), task.horizon, "whole sweep")
    return time.perf_counter() - start


def child(*command) -> str:
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        stage2.fail(f"{' '.join(command)}: {result.stderr.strip().splitlines()[-1]}", code=1)
    return result.stdout


def start_up(device: torch.device, folder: str) -> dict:
    """Seconds: importing the packages, each stage's --help, and a one-step DT at the small sizes."""

    def wall(*command) -> float:
        return min(seconds(lambda: child(*command), torch.device("cpu"), 3))

    once = ["train_qalign_dt.py", "--lambda-e", "0", "--total-steps", "1", "--eval-every", "0"]
    start = time.perf_counter()
    child(*once, "--device", device.type, "--runs-dir", folder)
    first_step = time.perf_counter() - start
    stages = "data/collect_dataset.py", "pretrain_q.py", "train_qalign_dt.py", "evaluate_alignment.py"
    imports = wall("-c", "import torch, gymnasium, mujoco, h5py")
    return dict(imports=imports, help=max(wall(stage, "--help") for stage in stages), first_step=first_step)


def memory(device: torch.device, folder: str) -> dict:
    """Bytes, with a file of 2,000,000 transitions.

    Its arrays; what preparing it adds to the host's peak (Linux's VmHWM), and what reading dataset.pt and laying it out
    adds in another process; on CUDA also the device's peak in training steps at paper size.
    """
    n, rng, path = 2_000_000, np.random.default_rng(0), Path(folder) / "two_million.hdf5"
    env, runs = "hopper-medium-benchmark", str(Path(folder) / "runs")
    with h5py.File(path, "w") as f:
        for key, width in dict(observations=11, actions=3).items():
            f[key] = rng.uniform(-1, 1, (n, width)).astype(np.float32)
        f["rewards"] = rng.uniform(size=n).astype(np.float32)
        f["terminals"], f["timeouts"] = np.zeros(n, bool), np.arange(n) % 1000 == 999
        size = sum(x.nbytes for x in (f[key][()] for key in f))
    program = (
        "import re, sys, torch, train_qalign_dt as s; sys.path.insert(0, 'data'); import prepare;"
        "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]);"
        "env, runs, paths = sys.argv[1], sys.argv[2], tuple(sys.argv[3:]); before = peak();"
        "content = prepare.prepare(env, paths, runs);"
        "w = None if paths else s.Windows(s.Dataset(content), 20, torch.device('cpu'));"
        "print(f'\\n{peak() - before}')"
    )
    peaks = [int(child("-c", program, env, runs, *paths).split()[-1]) for paths in ([str(path)], [])]
    result = dict(arrays=size, prepare=peaks[0], host=peaks[1], cuda=None)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        training_step(stage2.Dataset(prepare.prepare(env, (), runs)), device, PAPER, "bf16", True, True, 5)
        result["cuda"] = torch.cuda.max_memory_reserved()
    return result


def measure(args: Args, device: torch.device, say) -> dict:
    cuda, precision = device.type == "cuda", "bf16" if stage2.use_bf16("auto", device) else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        data = stage2.Dataset(prepare.prepare("hopper-mini", (), folder))
    small = {name: size for name, size in stage2.SMALL.items() if name in PAPER}
    sizes_of = {"paper size": PAPER, "hopper-mini": small}
    result = hardware(device) | {"device": device.type, "full": args.full}
    if shutil.which("git"):
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "*.py"], cwd=ROOT, capture_output=True, text=True)
        result["commit"] = commit.stdout.strip() + "+" * bool(changed.stdout)
    rates = {name: ceiling(device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    say(f"{result['gpu'] or result['cpu']}, {result['threads']} CPU threads, torch {result['torch']}")

    variants = [("eager float32", "fp32", False, False), ("bfloat16", "bf16", False, False)]  # name ..., compile, graph
    if cuda:
        variants += [("bfloat16, CUDA graph", "bf16", False, True)]
        variants += [("bfloat16, torch.compile, CUDA graph", "bf16", True, True)]
    if args.full:
        variants += [("torch.compile", "fp32", True, False), ("bfloat16, torch.compile", "bf16", True, False)]
    steps, critics, sweeps = [], [], []
    for size, sizes in sizes_of.items():
        for name, *variant in variants:
            repeats = 100 if cuda else 20 if sizes is small else 5 if args.full else 2
            try:
                time_, flop = training_step(data, device, sizes, *variant, repeats)
            except Exception as error:  # such as no compiler: the others still count
                say(f"training step, {size}, {name}: {stage2.one_line(error)}")
                continue
            steps.append(dict(size=size, variant=name, ms=1e3 * time_, flop=flop, precision=variant[0]))
            say(f"training step, {size}, {name}: {1e3 * time_:.1f} ms")
    time_, flop = pretraining_step(data, device, 2000 if cuda else 100)
    critics.append(dict(variant="eager", ms=1e3 * time_, flop=flop, precision="fp32"))
    say(f"critic pretraining, batch 512, width 256: {1e3 * time_:.2f} ms")
    for size, sizes in sizes_of.items():
        times = sweep_step(data.task, device, precision, sizes, repeats=20 if cuda else 3)
        flop = forward_flop(sizes, TARGETS * ROLLOUTS)
        sweeps.append({"size": size, "flop": flop} | {f"{name}_ms": 1e3 * x for name, x in times.items()})
        say(f"sweep, {size}: policy {1e3 * times['policy']:.0f} ms, simulator {1e3 * times['simulator']:.0f} ms a step")
    if args.full or not cuda:
        with tempfile.TemporaryDirectory() as folder:
            result |= dict(start=start_up(device, folder), memory=memory(device, folder))
    if args.full:
        result["whole_sweep_s"] = whole_sweep(device, precision)
    for name in rates:
        rates[name] = max(rates[name], ceiling(device, getattr(torch, name)))
    for row in (*steps, *critics, *sweeps):
        rate = rates["bfloat16" if row.get("precision", precision) == "bf16" else "float32"]
        row["share"] = row["flop"] / row.get("ms", row.get("policy_ms")) * 1e3 / rate
    return result | dict(ceiling=rates, training=steps, pretraining=critics, sweep=sweeps)


def table(result: dict) -> str:
    lines = ["| what | ms | TFLOP/s | share of the ceiling |", "|---|---|---|---|"]
    for name, rate in result["ceiling"].items():
        lines.append(f"| ceiling: matrix product, {name} | | {rate / 1e12:.3g} | |")
    rows = [(f"training step, {row['size']}, {row['variant']}", row) for row in result["training"]]
    rows += [
        (f"critic pretraining, {row['variant']}: {1e3 / row['ms']:.0f} steps/s", row) for row in result["pretraining"]
    ]
    for name, row in rows:
        lines.append(f"| {name} | {row['ms']:.3g} | {row['flop'] / row['ms'] / 1e9:.3g} | {row['share']:.0%} |")
    for row in result["sweep"]:
        name = f"sweep of {TARGETS} x {ROLLOUTS} rollouts, {row['size']}, one step"
        rate = row["flop"] / row["policy_ms"] / 1e9
        lines.append(f"| {name}, policy | {row['policy_ms']:.0f} | {rate:.3g} | {row['share']:.0%} |")
        lines.append(f"| {name}, simulator | {row['simulator_ms']:.0f} | | |")
    if "start" in result:
        start, peak = result["start"], result["memory"]
        lines += ["", f"start: --help {start['help']:.2f} s at most, its imports {start['imports']:.2f} s; "]
        lines[-1] += f"a DT of one step {start['first_step']:.1f} s"
        arrays = f"the file's arrays ({peak['arrays'] / 1e6:.0f} MB)"
        lines.append(f"peak host memory: {peak['host'] / peak['arrays']:.2f} x {arrays}")
        lines[-1] += f", and {peak['prepare'] / peak['arrays']:.2f} x in data/prepare.py"
        if peak["cuda"]:
            lines.append(f"peak device memory, 2,000,000 transitions, paper size: {peak['cuda'] / 2**30:.2f} GiB")
    if result["full"]:
        lines.append(f"whole sweep of HalfCheetah, paper size: {result['whole_sweep_s']:.0f} s")
    return "\n".join(lines)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    result = measure(args, stage2.pick_device(args.device), lambda text: print(text, flush=True))
    print(f"\n{table(result)}")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a") as f:
        f.write(json.dumps(result | {"date": time.strftime("%Y-%m-%d"), "load": os.getloadavg()[0]}) + "\n")
    print(f"appended to {args.out}")


if __name__ == "__main__":
    main()
