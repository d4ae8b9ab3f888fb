"""Attacks on every script: python tests/attacks.py [N=300] [--all] [--seed 0] [--only KIND:INDEX]

Each runs a script as __main__ in a forked process and a folder of its own, on edited checkpoints, data, metadata, flags
and names, or after SIGKILL. It has held if the script ends within LIMIT seconds with exit code 0, or with 1, 2 or 130
and one line of error (or tyro's box), prints no control character from a file, and changes only files of its run.
"""

import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import unicodedata
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ |= dict(OMP_NUM_THREADS="1", MINARI_DATASETS_PATH="minari", D4RL_DATASET_DIR="d4rl", HOME="home")
os.environ.setdefault("MPLCONFIGDIR", tempfile.gettempdir())  # not below HOME

import h5py
import numpy as np
import torch
import tyro
from conftest import ENV, FORK, ROOT, TINY1, TINY2, Forked, record, write_hdf5

torch.set_num_threads(1)
LIMIT, MINARI, ID = 60, "minari/tests/hopper/mixed-v0/data", "tests/hopper/mixed-v0"
RUN1, RUN2 = f"runs/{ENV}__pretrain_q__1", f"runs/{ENV}__train_qalign_dt__1"
DATASET, CRITIC, RESUME1 = f"runs/{ENV}__data/dataset.pt", f"{RUN1}/critic.pt", f"{RUN1}/resume.pt"
POLICY, RESUME2, VDT = f"{RUN2}/policy.pt", f"{RUN2}/resume.pt", f"runs/{ENV}__train_vdt__1/policy.pt"
CHEETAH, DATA = "runs/halfcheetah-medium-tiny__train_qalign_dt__1/policy.pt", f"--env {ENV} --dataset-path hopper.hdf5"
SMALL = f"{DATA} --device cpu --embed-dim 16 --n-layer 1 --n-head 2 --context-len 4 --batch-size 8 --total-steps 5"
RUN = {  # the flags with which each script ends soon
    "pretrain_q.py": f"{DATA} {' '.join(TINY1)}",
    "train_qalign_dt.py": f"{DATA} {' '.join(TINY2)} --critic {CRITIC}",
    "evaluate_alignment.py": f"--checkpoint {POLICY} --rollouts 1 --device cpu",
    "transfer_cheetah_vel.py": f"--checkpoint {CHEETAH} --rollouts 1 --budgets 2 --calibration-rollouts 1",
    "data/prepare.py": DATA,
    "data/collect_dataset.py": "--format minari",
    "data/collect_maze2d.py": "maze2d-umaze-v1 --transitions 50 --out out.hdf5",
    "data/mix_returns.py": "hopper.hdf5 --out out.hdf5",
    "results/run_studies.py": f"components --workers 0 --results-dir results --runs-dir runs {DATA}",
    "results/diagnose_alignment.py": f"{POLICY} --windows 10 --dataset-path hopper.hdf5",
    "baselines/train_radt.py": f"{SMALL} --warmup-steps 2",
    "baselines/train_vdt.py": f"{SMALL} --value-steps 5 --model-steps 5 --critic-width 16",
    "baselines/train_qt.py": f"{SMALL} --critic {CRITIC} --critic-width 16",
    "baselines/train_rvdt.py": f"{SMALL} --critic {CRITIC} --critic-width 16 --expert-steps 5",
    "baselines/tune_vdt.py": f"{DATA} --checkpoint {VDT} --env-steps 20 --updates 1 --eval-rollouts 1",
}
RUN = {script: argv.split() for script, argv in RUN.items()}
READERS = {
    DATASET: "pretrain_q.py train_qalign_dt.py data/prepare.py baselines/train_vdt.py",
    CRITIC: "train_qalign_dt.py baselines/train_qt.py",
    POLICY: "evaluate_alignment.py results/diagnose_alignment.py baselines/tune_vdt.py train_qalign_dt.py",
    VDT: "evaluate_alignment.py baselines/tune_vdt.py baselines/train_vdt.py",
    CHEETAH: "transfer_cheetah_vel.py",
    RESUME1: "pretrain_q.py",
    RESUME2: "train_qalign_dt.py",
}
NAN, INF = float("nan"), float("inf")
NAMES = ["\x1b[31mred", "a\nb", "a$x_$", os.fsdecode(b"\xff\xfe"), "\u202e\x85\x9b1m", "x" * 120, "'%s{}", "\rerror: b"]
PLAIN = [None, True, "x", "", -1, 0, 1.5, 10**30, -(10**12), 1e308, NAN, INF, [], {}, (), [[]], {"a": 1}, "9" * 5000]
PLAIN += ["a\x1b[31m\nb" * 99, {"1": [2]}, [None] * 3]
VALUES = [*PLAIN, *NAMES, "Hopper-v5", "os:system", b"\xff", [1, 2], 1, 10**9, np.uint64(2**64 - 1), h5py.Empty("f")]
FLAGS = ["0", "-1", "nan", "inf", "1e40", "", "../x", "a\nb\x1b[31m", "x" * 5000, "9" * 5000, str(10**18), "1e-300"]
FLAGS += ["\udcff$x_$", ".", "/dev/null", "None", "-", "precious", "a" * 250]
DTYPES = (torch.float16, torch.float64, torch.int8, torch.bool, torch.complex64)
TENSOR = {f"all {v}": lambda x, v=v: torch.full(x.shape, v) for v in (NAN, INF, 1e38, -1.0, 0.0)}
TENSOR |= {f"{d}": lambda x, d=d: x.to(d) for d in DTYPES}
TENSOR |= {
    "zeros(3)": lambda x: torch.zeros(3),
    "rank": lambda x: x[None],
    "empty": lambda x: x.reshape(-1)[:0],
    "half": lambda x: x.flatten()[: x.numel() // 2],
    "reversed": lambda x: x.flip(0) if x.ndim else x,
    "expanded": lambda x: x.new_zeros(()).expand(x.shape or 9),
    "vast": lambda x: x.new_zeros(()).expand(10**11),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x[None].to_sparse(),
    "parameter": lambda x: torch.nn.Parameter(x.float()),
}


def play(script: str, argv, here: Path, before=lambda: None, seconds: float | None = LIMIT, kill=os.killpg):
    """A script's exit code, or minus the signal that ended it; None where it was killed after so many seconds.

    It runs in `here`; its output goes to here/../out and err. seconds None: it may take its time.
    """

    def limited():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 2**30,) * 2)
        before()

    with open(here.parent / "out", "wb") as out, open(here.parent / "err", "wb") as err:
        child = Forked(["python", ROOT / script, *argv], out, err, limited, cwd=here, start_new_session=True)
    if (code := child.wait(seconds)) is None:
        kill(child.pid, signal.SIGKILL)
        child.wait()
    return code


def make_base(here: Path) -> None:
    """Tiny data in both layouts, and a run of every kind."""
    here.mkdir()
    arrays = record("Hopper-v4", episodes=30, limit=20)
    write_hdf5(here / "hopper.hdf5", *arrays)
    write_hdf5(here / "cheetah.hdf5", *record("HalfCheetah-v4", episodes=6, limit=20))
    (here / MINARI).mkdir(parents=True)
    with h5py.File(here / MINARI / "main_data.hdf5", "w") as f:
        for i, end in enumerate(ends := np.flatnonzero(arrays[3] | arrays[4]) + 1):
            for key, x in zip(("observations", "actions", "rewards", "terminations", "truncations"), arrays):
                f[f"episode_{i}/{key}"] = x[ends[i - 1] if i else 0 : end]
    metadata = dict(env_spec=dict(id="Hopper-v5", kwargs={}, max_episode_steps=20, additional_wrappers=[]))
    (here / MINARI / "metadata.json").write_text(json.dumps(metadata))
    (here / "precious").write_text("precious")
    with zipfile.ZipFile(here / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(400 * 2**20))
    cheetah = "--lambda-e 0 --env halfcheetah-medium-tiny --dataset-path cheetah.hdf5".split()
    stage2 = "train_qalign_dt.py"
    for script, *more in (["pretrain_q.py"], ["baselines/train_vdt.py"], [stage2], [stage2, *cheetah]):
        if code := play(script, [*RUN[script], *more], here, seconds=None):
            sys.exit(f"{script} ended with {code}: {(here.parent / 'err').read_text()}")


def files(folder: Path) -> dict:
    """What lies in a folder: contents, targets of links, what else is no folder."""

    def content(p: Path):
        return os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else p.lstat().st_mode

    return {str(p.relative_to(folder)): content(p) for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}


def verdict(code: int | None, kind: str, script: str, argv, here: Path, before: dict) -> str:
    """What is wrong with the end of a script; "" if it has held."""
    out, err = ((here.parent / name).read_bytes().decode(errors="surrogateescape") for name in ("out", "err"))
    text, now = f"\n{out}\n{err}", files(here)
    errors = text.count("\nerror:")
    if code is None:
        return "runs for too long"
    box = code == 2 and "For full helptext" in err and not errors  # tyro's
    if "Traceback" in text or code not in (0, 1, 2, 130) or not (box or errors == (code > 0)):
        return f"exit code {code}, {errors} lines of error: {err[-600:].strip()}"
    if odd := {c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c != "\n"} - set("".join(argv)):
        return f"prints {odd}: {text[-400:]!r}"
    for name in {*now, *before}:
        mine = (f"__{Path(script).stem}__", "__data/", "__new__", *["__pretrain_q__"] * (kind == "kills"))
        own = name.startswith("runs/") and any(x in name for x in mine)
        free = own and (code == 0 or not name.endswith(".pt")) or name.endswith((".lock", ".tmp"))
        if not free and now.get(name) != before.get(name) and (name in before or kind != "flags" and code > 0):
            return f"exit code {code}, and {name} has changed"
    return ""


# ---- the kinds: each changes the current folder, and returns script, command line, how it was made ----


def places(x, at=()):
    """Every value in nested dicts and lists: what holds it, its key, and the path."""
    for key, y in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield from ((x, key, [*at, key]), *(places(y, (*at, key)) if len(at) < 5 else ()))


class Code:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def damage(rng, path: Path) -> str:
    """Damage a file as a whole; returns how."""
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    links = (Path("precious").absolute(), "nowhere", path.name, "/dev/zero", "/proc/self/mem")
    ways = {f"link to {x}": lambda x=x: path.unlink() or path.symlink_to(x) for x in links}
    ways |= {"a bit": lambda: path.write_bytes(raw), "cut": lambda: path.write_bytes(raw[: rng.randrange(len(raw))])}
    ways |= {"longer": lambda: path.write_bytes(raw * 2), "pickle": lambda: path.write_bytes(pickle.dumps(Code()))}
    ways |= {"torch's pickle": lambda: torch.save(dict(stage="x", format=6, x=Code()), path)}
    ways |= {"FIFO": lambda: path.unlink() or os.mkfifo(path), "folder": lambda: path.unlink() or path.mkdir()}
    ways |= {"bomb": lambda: os.replace("bomb", path)}
    ways |= {"link to its copy": lambda: path.symlink_to(Path(shutil.move(path, "copy")).absolute())}
    ways[way := rng.choice(list(ways))]()
    return way


def checkpoints(rng):
    name = rng.choice([RESUME2, POLICY, *READERS])
    script, path, hows = rng.choice(READERS[name].split()), Path(name), []
    argv = RUN[script] + ["--checkpoint", name] * script.startswith(("eval", "baselines/tune"))
    argv += ["--trajectories", "--percentiles"] * (script[0] == "e" and rng.random() < 0.3)
    argv += ["--exp-name", "new"] * (name in (CRITIC, DATASET) and script != "data/prepare.py")
    if name in (RESUME1, RESUME2):  # is read where the run is not finished
        Path(CRITIC if name == RESUME1 else POLICY).unlink()
    if rng.random() < 0.2:
        return script, argv, f"{name}: {damage(rng, path)}"
    content = torch.load(path, weights_only=True)
    for _ in range(rng.choice((1, 1, 2))):
        top = rng.choice(list(content))
        x, key, at = rng.choice([place for place in places(content) if place[2][0] == top])
        (cycle := []).append(cycle)
        edits = {f"{x!r:.30}": lambda _, x=x: x for x in (..., cycle, *PLAIN, *NAMES * isinstance(x[key], str))}
        edits = TENSOR if torch.is_tensor(x[key]) and rng.random() < 0.7 else edits
        x[key] = edits[how := rng.choice(list(edits))](x[key])
        if x[key] is ...:
            del x[key]
        hows.append(f"{at}: {how}")
    torch.save(content, path)
    return script, argv, f"{name}: {', '.join(hows)}"


def hdf5(rng):
    d4rl = rng.random() < 0.7
    file, at = ("hopper.hdf5", "/") if d4rl else (f"{MINARI}/main_data.hdf5", rng.choice(("episode_0", "episode_29")))
    env = rng.choice((ENV, ENV, "walker2d-medium-x", "maze2d-mini", "antmaze-umaze-x")) if d4rl else ID
    argv = ["--env", env, *["--dataset-path", file] * (d4rl or rng.random() < 0.5), "--runs-dir", "runs/new"]
    if rng.random() < 0.1:
        return "data/prepare.py", argv, f"{file}: {damage(rng, Path(file))}"
    with h5py.File(file, "a") as f:
        g, key = f[at], rng.choice(sorted(f[at]))
        x, virtual = g[key][()], h5py.VirtualLayout(g[key].shape, g[key].dtype)
        virtual[...] = h5py.VirtualSource(rng.choice(("nowhere", "cheetah.hdf5")), key, x.shape)
        new = {f"{v}": np.full(x.shape, v) for v in (NAN, INF, -1e308, 1e30, -1e8, 1, 0)}
        new |= {d: np.ones(x.shape).astype(d) for d in ("S3", "f2", "f8", "c8", "i8", "u1", "V4", "f4,i4")}
        new |= {"scalar": x.flat[0], "empty": x[:0], "short": x[:-1], "long": np.append(x, x, 0), "rank": x[None, None]}
        new |= {"column": x[..., None], "text": ["a"] * len(x), "null": h5py.Empty("f"), "type": np.dtype("f4")}
        new |= {"outer link": h5py.ExternalLink("cheetah.hdf5", key), "loop": h5py.SoftLink(f"{at}/{key}")}
        vast = {f"{n} rows": dict(shape=(n, *x.shape[1:]), chunks=(99, *x.shape[1:])) for n in (10**12, 10**9)}
        vast |= {"external": dict(shape=x.shape, external=[("precious", 0, h5py.h5f.UNLIMITED)])}
        how = rng.choice([*new, *vast, "missing", "virtual", "group", *["attribute"] * 20 * d4rl])
        if how == "attribute":
            name, value = rng.choice(("env_id", "max_episode_steps", "seed")), rng.choice(VALUES)
            how = f"{name} = {value!r:.40}"
            with contextlib.suppress(TypeError, ValueError, UnicodeError, OSError):  # HDF5 itself has no such value
                f.attrs[name] = value
        else:
            del g[key]
        if how in new:
            g[key] = new[how]
        elif how in vast:
            g.create_dataset(key, dtype="i1", **vast[how])
        elif how == "virtual":
            g.create_virtual_dataset(key, virtual)
        elif how == "group":
            g.create_group(key)
    return "data/prepare.py", argv, f"{file}: {at}/{key}: {how}"


def minari(rng):
    file, texts = Path(MINARI, "metadata.json"), [x for x in VALUES if isinstance(x, str)]
    ids = "HalfCheetah-v4 CartPole-v1 Pendulum-v1 os:system gymnasium.envs.mujoco:Hopper-v5 -v0 a/b/c-v0 FrozenLake-v1"
    ids += " qalign_mazes:maze2d-umaze-v1 tests.attacks:Hopper-v5 GymV26Environment-v0 PointMaze_UMaze-v3"
    keys = "xml_file frame_skip reset_noise_scale render_mode id max_episode_steps width default_camera_config"
    keys += " exclude_current_positions_from_observation healthy_reward"
    some = [*PLAIN, "/etc/passwd", "../here/precious", "human", 10**9, 3, 0.0]
    spec = {"id": ids.split(), "kwargs": [{k: x} for k in (*keys.split(), *texts) for x in some]}
    spec |= {"additional_wrappers": [[{"name": x, "kwargs": k}] for x in ("TimeLimit", *texts) for k in some]}
    spec |= {"max_episode_steps": some, "entry_point": texts}
    key, metadata = rng.choice(("id", "kwargs", "kwargs", *spec)), json.loads(file.read_text())
    value = rng.choice(spec[key] if rng.random() < 0.8 else PLAIN)
    metadata["env_spec"] |= {key: value}
    metadata |= dict(ref_min_score=rng.choice([0, None, NAN, 10**400]), ref_max_score=rng.choice([1, -1, [], 1e308]))
    whole = [json.dumps(metadata).encode(), b"[]", b"3", b"[" * 10**6, b"\xff", b"9" * 10**5, b'{"env_spec": "{"}']
    file.write_bytes(text := rng.choice(whole[:1] * 50 + whole))
    how = f"env_spec.{key} = {value!r:.60}" if text == whole[0] else f"{text[:20]}"
    how = how if rng.random() < 0.95 else damage(rng, file)
    script = rng.choice(("data/prepare.py", "data/prepare.py", "pretrain_q.py"))
    return script, ["--env", ID, *TINY1 * (script == "pretrain_q.py")], f"{file}: {how}"


def flags(rng):
    script = rng.choice(list(RUN))
    field = rng.choice(dataclasses.fields(importlib.import_module(Path(script).stem).Args))
    flag, count = f"--{field.name.replace('_', '-')}", {"rtg_range": 2, "ratio": 3}.get(field.name, 1)
    value = rng.choice(FLAGS)
    if field.name in ("out", "out_dir"):  # "" is their default, a folder of the code
        value = value or "."
    if "Positional" in str(field.type):
        return script, [value, *RUN[script][1:]], "nothing"
    new = ["--exp-name", "new"] * script.startswith(("pre", "train", "base"))
    return script, RUN[script] + new + ([f"{flag}={value}"] if count == 1 else [flag, *[value] * count]), "nothing"


def names(rng):
    name, way, script = rng.choice(NAMES), rng.choice(("data", "runs", "label", "compare")), rng.choice(list(RUN)[:5])
    if way in ("data", "runs"):
        old, new = ("hopper.hdf5", "runs/new") if way == "data" else ("runs", name)
        os.rename(old, name)
        argv = [x.replace(old, name, 1) if x.startswith(old) else x for x in RUN[script]]
        return script, [*argv, "--runs-dir", new], f"{way}: {name!r}"
    script, path = rng.choice((("evaluate_alignment.py", POLICY), ("transfer_cheetah_vel.py", CHEETAH)))
    content = torch.load(path, weights_only=True)
    content["task"]["label"], content["config"]["exp_name"] = rng.choice((("x", name), (name, "x")))
    torch.save(content, path)
    return script, RUN[script] + ["--compare", shutil.copy(path, name)] * (way == "compare"), f"{way}: {name!r}"


def short() -> None:
    """The stage 1 that this process will start takes 30 steps."""
    real = subprocess.run
    subprocess.run = lambda command: real([*command, "--total-steps", "30", "--batch-size", "32"])


def kills(rng):
    """The first process is killed here; the same command again, which is `short`, too, is what is judged."""
    command = "train_qalign_dt.py", [*DATA.split(), *TINY2]
    preparing, where, count = rng.random() < 0.5, rng.choice(("replace", "fsync", "mkdir")), rng.choice((1, 1, 2))
    for name in (POLICY, RESUME1, RESUME2, DATASET if preparing else CRITIC):
        Path(name).unlink()

    def deadly():
        calls, real = itertools.count(1), getattr(os, where)
        kill = lambda *args: os.kill(os.getpid(), 9) if next(calls) == count else real(*args)  # noqa: E731
        setattr(os, where, kill)

    if preparing:
        play(*command, Path.cwd(), deadly)
        return *command, f"SIGKILL at call {count} of os.{where}", short
    delay, kill = rng.uniform(0.5, 8), rng.choice((os.kill, os.killpg))
    play(*command, Path.cwd(), short, delay, kill)
    return *command, f"os.{kill.__name__} {delay:.1f} s after the start, while stage 1 runs", short


KINDS = {kills: 0.013, names: 0.07, flags: 0.3, minari: 0.12, hdf5: 0.16, checkpoints: 0.34}  # shares of N


def attack(make, index: int, seed: int, base: Path) -> tuple[str, str, str]:
    """The kind; what is wrong, or ""; and how to do it again."""
    kind = make.__name__
    with tempfile.TemporaryDirectory() as folder:
        here = Path(shutil.copytree(base, Path(folder, "here")))
        os.chdir(here)
        try:
            script, argv, how, *before = make(random.Random(f"{seed} {kind} {index}"))
        except Exception:
            return kind, f"cannot be made: {traceback.format_exc()}", f"--only {kind}:{index}"
        found = files(here)
        code = play(script, argv, here, *before)
        wrong = verdict(code, kind, script, argv, here, found)
        if make is kills and not wrong:
            whole, ours = (code == 0 and torch.load(x / POLICY, weights_only=True)["policy"] for x in (base, here))
            wrong = "" if ours and all(torch.equal(x, ours[key]) for key, x in whole.items()) else "other weights"
    return kind, wrong, f"--only {kind}:{index}: {how}; python {script} {' '.join(f'{x!r:.90}' for x in argv)}"


def main(n: tyro.conf.Positional[int] = 300, all: bool = False, seed: int = 0, only: str = "") -> None:
    """As this file's first lines say."""
    kind, _, index = only.partition(":")
    todo = [(make, i) for make, share in KINDS.items() for i in range(round((1000 if all else n) * share))]
    if only:
        todo = [(make, int(index or i)) for make, i in todo if kind == make.__name__][: 1 if index else None]
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(mp_context=FORK) as pool:
        make_base(base := Path(folder, "here"))
        jobs, held = [pool.submit(attack, make, i, seed, base) for make, i in todo], {}
        for job in jobs:
            kind, wrong, how = job.result()
            held.setdefault(kind, []).append(not wrong)
            print(f"BROKE {how}\n    {wrong!r}\n" * bool(wrong), end="", flush=True)
    for kind, results in held.items():
        print(f"{kind}: {len(results)} tried, {sum(results)} held")
    sys.exit(any(False in results for results in held.values()))


if __name__ == "__main__":
    tyro.cli(main)
