"""Attacks on every script: python tests/attacks.py [N=300] [--seed 0] [--only KIND:INDEX]

Each runs a script as __main__ in a forked process and a folder of its own, on edited checkpoints, data, metadata, flags
and names, or after SIGKILL. It has held if the script ends within LIMIT seconds with exit code 0, or with 1, 2 or 130
and one line of error (or tyro's box), prints nothing unprintable from a file, and changes only files of its run.
"""

import contextlib
import importlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from math import inf, nan
from pathlib import Path

os.environ |= dict(OMP_NUM_THREADS="1", MINARI_DATASETS_PATH="minari", D4RL_DATASET_DIR="d4rl", HOME="home")
os.environ.setdefault("MPLCONFIGDIR", tempfile.gettempdir())  # not below HOME

import gymnasium
import h5py
import numpy as np
import torch
import tyro
from conftest import ENV, FORK, ROOT, TINY1, TINY2, Forked, record, write_hdf5
from test_prepare import play as episodes_of
from test_prepare import write_minari

torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30,) * 2)  # who asks for more memory gets none, at once
LIMIT, ID = 300, "tests/hopper/mixed-v0"
RUN1, RUN2, VDT = f"runs/{ENV}__pretrain_q__1", f"runs/{ENV}__train_qalign_dt__1", f"runs/{ENV}__train_vdt__1/policy.pt"
DATASET, CRITIC, POLICY = f"runs/{ENV}__data/dataset.pt", f"{RUN1}/critic.pt", f"{RUN2}/policy.pt"
RESUME1, RESUME2 = f"{RUN1}/resume.pt", f"{RUN2}/resume.pt"
CHEETAH, DATA = "runs/halfcheetah-medium-tiny__train_qalign_dt__1/policy.pt", f"--env {ENV} --dataset-path hopper.hdf5"
SMALL = f"{DATA} --device cpu --embed-dim 16 --n-layer 1 --n-head 2 --context-len 4 --batch-size 8 --total-steps 5"
RUN = {  # the flags with which each script ends soon
    "pretrain_q.py": f"{DATA} {' '.join(TINY1)}",
    "train_qalign_dt.py": f"{DATA} {' '.join(TINY2)} --critic {CRITIC}",
    "evaluate_alignment.py": f"--checkpoint {POLICY} --rollouts 1 --device cpu --trajectories --percentiles",
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
READERS = {
    DATASET: "pretrain_q.py train_qalign_dt.py data/prepare.py baselines/train_vdt.py",
    CRITIC: "pretrain_q.py train_qalign_dt.py baselines/train_qt.py",
    POLICY: "evaluate_alignment.py results/diagnose_alignment.py baselines/tune_vdt.py train_qalign_dt.py",
    VDT: "evaluate_alignment.py baselines/tune_vdt.py baselines/train_vdt.py",
    CHEETAH: "transfer_cheetah_vel.py",
    RESUME1: "pretrain_q.py",
    RESUME2: "train_qalign_dt.py",
}

NAMES = ["\x1b[31mred", "a\nb", "a$x_$", os.fsdecode(b"\xff\xfe"), "\u202e\x85\x9b1m", "x" * 120, "'%s{}", "\rerror: b"]
TEXTS = [*NAMES, "", "x", "9" * 5000, "a\x1b[31m\nb" * 99, "Hopper-v5", "HalfCheetah-v4", "os:system"]
PLAIN = [None, True, "x", -1, 0, 1.5, 10**30, -(10**12), 1e308, nan, inf, [], {}, [[]], {"1": [2]}, [None] * 3]
FLAGS = ["0", "-1", "nan", "inf", "1e40", "", "../x", "a\nb\x1b[31m", "x" * 5000, "9" * 5000, str(10**18), "1e-300"]
FLAGS += ["\udcff$x_$", ".", "/dev/null", "None", "-", "precious", "a" * 250]
TENSORS = [f"torch.full(x.shape, {v})" for v in ("nan", "inf", "1e38", "-1.0", "0.0")]
TENSORS += [f"x.to({d})" for d in (torch.float16, torch.float64, torch.int8, torch.bool, torch.complex64, "'meta'")]
TENSORS += ["x[None]", "x.flatten()[:0]", "x.flatten()[: x.numel() // 2]", "x.new_zeros(()).expand(x.shape or 9)"]
TENSORS += ["x.new_zeros(()).expand(10**11)", "x[None].to_sparse()", "torch.nn.Parameter(x.float())"]
HDF5 = [f"np.full(x.shape, {v})" for v in ("nan", "inf", "-1e308", "1e30", "-1e8", "1", "0")]
HDF5 += [f"np.ones(x.shape).astype('{d}')" for d in ("S3", "f2", "f8", "c8", "i8", "u1", "V4", "f4,i4")]
HDF5 += ["x.flat[0]", "x[:0]", "x[:-1]", "np.append(x, x, 0)", "x[None, None]", "x[..., None]", "['a'] * len(x)"]
HDF5 += ["h5py.Empty('f')", "np.dtype('f4')", "h5py.ExternalLink('cheetah.hdf5', key)", "h5py.SoftLink(key)"]
HDF5 = [f"g[key] = {value}" for value in HDF5] + ["", "g.create_group(key)"]
HDF5 += [f"g.create_dataset(key, ({n}, *x.shape[1:]), 'i1', chunks=(99, *x.shape[1:]))" for n in (10**12, 10**9)]
HDF5 += ["g.create_dataset(key, x.shape, 'i1', external=[('precious', 0, h5py.h5f.UNLIMITED)])"]
HDF5 += ["with g.build_virtual_dataset(key, x.shape, 'f4') as y: y[:] = h5py.VirtualSource('nowhere', key, x.shape)"]
FILES = [f"path.unlink(); path.symlink_to('{x}')" for x in ("nowhere", "policy.pt", "/dev/zero", "/proc/self/mem")]
FILES += ["path.unlink(); path.symlink_to(Path('precious').absolute())", "path.unlink(); os.mkfifo(path)"]
FILES += ["path.rename('copy'); path.symlink_to(Path('copy').absolute())", "path.unlink(); path.mkdir()"]
FILES += ["raw[at] ^= 4; path.write_bytes(raw)", "path.write_bytes(raw[:at])", "path.write_bytes(raw * 2)"]
FILES += ["torch.save(dict(stage='x', format=6, x=Code()), path)", "os.replace('bomb', path)"]


class Code:
    def __reduce__(self):
        return open, ("precious", "w")


def play(script: str, argv, before=lambda: None) -> int | None:
    """A script's exit code, or minus the signal that ended it; None where it takes too long. Calls `before` first."""
    with open("../out", "wb") as out, open("../err", "wb") as err:
        child = Forked(["python", ROOT / script, *argv], out, err, before, start_new_session=True)
    if (code := child.wait(LIMIT)) is None:
        os.killpg(child.pid, 9)
    return code


def make_base(here: Path) -> None:
    """Tiny data in both layouts, and a run of every kind."""
    here.mkdir()
    os.chdir(here)
    write_hdf5("hopper.hdf5", *record("Hopper-v4", episodes=30, limit=20))
    write_hdf5("cheetah.hdf5", *record("HalfCheetah-v4", episodes=6, limit=20))
    write_minari(ID, episodes_of(gymnasium.make("Hopper-v5", max_episode_steps=20), 30), id="Hopper-v5")
    Path("precious").write_text("precious")
    zipfile.ZipFile("bomb", "w", zipfile.ZIP_DEFLATED).writestr("archive/data.pkl", bytes(400 * 2**20))
    cheetah = "--lambda-e 0 --env halfcheetah-medium-tiny --dataset-path cheetah.hdf5"
    for command in ("pretrain_q.py", "baselines/train_vdt.py", "train_qalign_dt.py", f"train_qalign_dt.py {cheetah}"):
        script, *more = command.split()
        assert play(script, RUN[script].split() + more) == 0, Path("../err").read_text()


def files() -> dict:
    """What lies in this folder, with the content of regular files."""
    found = [p for p in Path().rglob("*") if not p.is_dir()]
    return {str(p): p.is_file() and not p.is_symlink() and p.read_bytes() for p in found}


def verdict(code: int | None, kind: str, script: str, argv, before: dict) -> str:
    """What is wrong with the end of a script; "" if it has held."""
    out, err = (Path("..", name).read_bytes().decode(errors="surrogateescape") for name in ("out", "err"))
    text, now, box = f"\n{out}\n{err}", files(), code == 2 and "For full helptext" in err  # tyro's
    errors = text.count("\nerror:") + box
    if "Traceback" in text or code not in (0, 1, 2, 130) or errors != (code > 0):
        return f"exit code {code}, {errors} lines of error: {err[-600:].strip()}"
    if odd := {c for c in text if not c.isprintable()} - {"\n", *"".join(argv)}:
        return f"prints {odd}: {text[-400:]!r}"
    mine = (f"__{Path(script).stem}__", "__data/", "__new__", *["__pretrain_q__"] * (kind == "kills"))
    for name in {*now, *before}:
        own = name.startswith("runs/") and any(x in name for x in mine)
        free = own and (code == 0 or not name.endswith(".pt")) or name.endswith((".lock", ".tmp"))
        if not free and now.get(name) != before.get(name) and (name in before or kind != "flags" and code > 0):
            return f"exit code {code}, and {name} has changed"
    return ""


# ---- the kinds: each changes the current folder, and returns script, command line, how it was made ----


def damage(rng, path: Path) -> str:
    raw, how = bytearray(path.read_bytes()), rng.choice(FILES)
    exec(how, globals() | dict(path=path, raw=raw, at=rng.randrange(len(raw))))
    return f"{path}: {how}"


def checkpoints(rng):
    name = rng.choice([RESUME2, POLICY, *READERS])
    script, cycle = rng.choice(READERS[name].split()), []
    argv = RUN[script].split() + ["--checkpoint", name] * script.startswith(("eval", "baselines/tune"))
    argv += ["--exp-name", "new"] * (name == DATASET and script[0] != "d" or name == CRITIC and script[0] != "p")
    if name in (RESUME1, RESUME2):  # is read where the run is not finished
        Path(CRITIC if name == RESUME1 else POLICY).unlink()
    if rng.random() < 0.2:
        return script, argv, damage(rng, Path(name))
    x = content = torch.load(name, weights_only=True)
    at = [rng.choice(list(x))]
    while isinstance(old := x[at[-1]], dict | list) and old and rng.random() < 0.9:
        x, key = old, rng.choice(list(old) if isinstance(old, dict) else range(len(old)))
        at.append(key)
    if torch.is_tensor(old) and rng.random() < 0.7:
        x[at[-1]] = eval(how := rng.choice(TENSORS), globals() | {"x": old})
    elif (how := rng.choice([..., cycle, *PLAIN, *TEXTS * isinstance(old, str)])) is ...:
        del x[at[-1]]
    else:
        x[at[-1]] = how
    cycle.append(cycle)
    torch.save(content, name)
    return script, argv, f"{name}: {at}: {how!r:.40}"


def hdf5(rng):
    d4rl = rng.random() < 0.7
    file = "hopper.hdf5" if d4rl else f"minari/{ID}/data/main_data.hdf5"
    env = rng.choice((ENV, ENV, "walker2d-medium-x", "maze2d-mini", "antmaze-umaze-x")) if d4rl else ID
    argv = ["--env", env, *["--dataset-path", file] * (d4rl or rng.random() < 0.5), "--runs-dir", "runs/new"]
    if rng.random() < 0.1:
        return "data/prepare.py", argv, damage(rng, Path(file))
    value = rng.choice([*PLAIN, *TEXTS, b"\xff", [1, 2], 10**9, np.uint64(2**64 - 1)])
    how = f"g.attrs[{rng.choice(('env_id', 'max_episode_steps', 'seed'))!r}] = {value!r}"
    if not d4rl or rng.random() < 0.7:
        how = f"del g[key]\n{rng.choice(HDF5)}"
    with h5py.File(file, "a") as f, contextlib.suppress(TypeError, ValueError, OSError):  # HDF5 has no such attribute
        g = f if d4rl else f[rng.choice(("episode_0", "episode_29"))]
        key = rng.choice(sorted(g))
        exec(how, globals() | dict(g=g, key=key, x=g[key][()]))
    return "data/prepare.py", argv, f"{file}: {key}: {how!r:.90}"


def minari(rng):
    file, value = Path("minari", ID, "data/metadata.json"), rng.choice([*PLAIN, *TEXTS, "../here/precious", 10**9, 3])
    ids = "HalfCheetah-v4 CartPole-v1 Pendulum-v1 gymnasium.envs.mujoco:Hopper-v5 -v0 a/b/c-v0 FrozenLake-v1"
    ids += " qalign_mazes:maze2d-umaze-v1 tests.attacks:Hopper-v5 GymV26Environment-v0 PointMaze_UMaze-v3"
    keys = "xml_file frame_skip reset_noise_scale render_mode id max_episode_steps width healthy_reward"
    edits = [{"id": rng.choice(ids.split())}, *[{"kwargs": {rng.choice([*keys.split(), *TEXTS]): value}}] * 3]
    edits += [{"additional_wrappers": [dict(name=rng.choice(("TimeLimit", *TEXTS)), kwargs=value)]}]
    edits += [{x: value} for x in ("id", "kwargs", "additional_wrappers", "max_episode_steps", "entry_point")]
    spec = json.loads(json.loads(file.read_text())["env_spec"]) | (how := rng.choice(edits))
    scores = dict(ref_min_score=rng.choice([0, None, nan, 10**400]), ref_max_score=rng.choice([1, -1, [], 1e308]))
    file.write_text(json.dumps(dict(env_spec=rng.choice((spec, json.dumps(spec)))) | scores))
    if rng.random() < 0.1:
        file.write_bytes(how := rng.choice((b"[]", b"3", b"[" * 10**6, b"\xff", b"9" * 10**5, b'{"env_spec": "{"}')))
    elif rng.random() < 0.05:
        how = damage(rng, file)
    return "data/prepare.py", ["--env", ID], f"{how!r:.90}"


def flags(rng):
    script, value = rng.choice(list(RUN)), rng.choice(FLAGS)
    field = rng.choice(list(importlib.import_module(Path(script).stem).Args.__dataclass_fields__.values()))
    value = value or "." * field.name.startswith("out")  # whose default is a folder of the code
    if "Positional" in str(field.type):
        return script, [value, *RUN[script].split()[1:]], "nothing"
    new = ["--exp-name", "new"] * script.startswith(("pre", "train", "base"))
    return script, [*RUN[script].split(), *new, f"--{field.name.replace('_', '-')}={value}"], "nothing"


def names(rng):
    name, old, script = rng.choice(NAMES), rng.choice(("hopper.hdf5", "runs")), rng.choice(list(RUN)[:5])
    os.rename(old, name)
    argv = [x.replace(old, name, 1) if x.startswith(old) else x for x in RUN[script].split()]
    return script, [*argv, "--runs-dir", name if old == "runs" else "runs/new"], f"{old} is called {name!r}"


def short() -> None:
    """The stage 1 that this process will start is a fork, too, and takes 30 steps."""
    subprocess.run = lambda argv: (child := Forked([*argv, *TINY1], sys.stdout, sys.stderr), child.wait())[0]


def kills(rng):
    """The first process, or the stage 1 that it starts, is killed here; the same command again is what is judged."""
    calls = [(where, i) for where in ("replace", "fsync", "mkdir") for i in range(1, 7)]
    (where, count), left = rng.choice([*calls, *[("waitpid", 1)] * 6]), iter(range(1, 10**9))
    for name in (POLICY, CRITIC, RESUME1, RESUME2, *[DATASET] * (rng.random() < 0.5)):
        Path(name).unlink()

    def deadly():
        short()
        real = getattr(os, where)
        setattr(os, where, lambda *args: os.kill(os.getpid(), 9) if next(left) == count else real(*args))

    command = "train_qalign_dt.py", [*DATA.split(), *TINY2]
    play(*command, deadly)
    return *command, f"SIGKILL at call {count} of os.{where}", short


KINDS = {kills: 0.013, names: 0.07, flags: 0.3, minari: 0.12, hdf5: 0.16, checkpoints: 0.34}  # shares of N


def attack(make, index: int, seed: int, base: Path) -> tuple[str, str]:
    """What is wrong, or "", and how to do it again."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(shutil.copytree(base, Path(folder, "here")))
        script, argv, how, *before = make(random.Random(f"{seed} {make.__name__} {index}"))
        found = files()
        code = play(script, argv, *before)
        wrong = verdict(code, make.__name__, script, argv, found)
        if make is kills and not wrong:
            whole, ours = (code == 0 and torch.load(x / POLICY, weights_only=True)["policy"] for x in (base, Path()))
            wrong = "" if ours and all(torch.equal(x, ours[key]) for key, x in whole.items()) else "other weights"
    return wrong, f"--only {make.__name__}:{index}: {how}; python {script} {' '.join(f'{x!r:.90}' for x in argv)}"


def main(n: tyro.conf.Positional[int] = 300, seed: int = 0, only: str = "") -> None:
    """As this file's first lines say."""
    todo = {make: range(round(n * share)) for make, share in KINDS.items()}
    if only:
        kind, _, index = only.partition(":")
        todo = {globals()[kind]: [int(index)]}
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(mp_context=FORK) as pool:
        make_base(base := Path(folder, "here"))
        jobs = {make: [pool.submit(attack, make, i, seed, base) for i in indices] for make, indices in todo.items()}
        for make, own in jobs.items():
            wrong = [job.result() for job in own if job.result()[0]]
            print(*(f"BROKE {how}\n    {what!r}\n" for what, how in wrong), sep="", end="")
            print(f"{make.__name__}: {len(own)} tried, {len(own) - len(wrong)} held", flush=True)
    sys.exit(any(job.result()[0] for own in jobs.values() for job in own))


if __name__ == "__main__":
    tyro.cli(main)
