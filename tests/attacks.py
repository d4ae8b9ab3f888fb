"""Attacks on every script: python tests/attacks.py [N] [--all] [--seed 0] [--only KIND:INDEX]

Each runs a script as `python script.py ...` would, in a forked process with a folder of its own: edited checkpoints,
HDF5 files and metadata, values of flags, names, SIGKILL. One has held if the script ends within LIMIT seconds with exit
code 0, or with 1, 2 or 130 and one line of error (or tyro's box), prints no control character, and changes no file but
those of its run. Prints kind, tried, held, and what broke with its reproduction; exit code 1 if any did.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import pickle
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

os.environ |= dict(OMP_NUM_THREADS="1", MINARI_DATASETS_PATH="minari", D4RL_DATASET_DIR="d4rl", HOME="home")

import h5py
import matplotlib.figure  # noqa: F401  what scripts import late, once for all
import numpy as np
import torch
import torch.utils.tensorboard  # noqa: F401
from conftest import ENV, ROOT, TINY1, TINY2, record, write_hdf5

torch.set_num_threads(1)
LIMIT, MINARI = 20, "minari/tests/hopper/mixed-v0/data"
CRITIC, POLICY = f"runs/{ENV}__pretrain_q__1/critic.pt", f"runs/{ENV}__train_qalign_dt__1/policy.pt"
VDT, CHEETAH = f"runs/{ENV}__train_vdt__1/policy.pt", "runs/halfcheetah-medium-tiny__train_qalign_dt__1/policy.pt"
DATA = ["--env", ENV, "--dataset-path", "hopper.hdf5"]
SIZES = "--embed-dim 16 --n-layer 1 --n-head 2 --context-len 4 --batch-size 8 --total-steps 5".split()
SMALL = [*DATA, "--device", "cpu", *SIZES]
STAGE2, VALUE = [*DATA, *TINY2, "--critic", CRITIC], "--value-steps 5 --model-steps 5 --critic-width 16".split()
RUN = {  # the flags with which each script ends soon
    "pretrain_q.py": [*DATA, *TINY1],
    "train_qalign_dt.py": STAGE2,
    "evaluate_alignment.py": f"--checkpoint {POLICY} --rollouts 1 --device cpu".split(),
    "transfer_cheetah_vel.py": f"--checkpoint {CHEETAH} --rollouts 1 --budgets 2 --calibration-rollouts 1".split(),
    "data/prepare.py": DATA,
    "data/collect_dataset.py": "--format minari".split(),
    "data/collect_maze2d.py": "maze2d-umaze-v1 --transitions 50 --out out.hdf5".split(),
    "data/mix_returns.py": "hopper.hdf5 --out out.hdf5".split(),
    "results/run_studies.py": [*"components --results-dir results --runs-dir runs".split(), *DATA],
    "results/diagnose_alignment.py": f"{POLICY} --windows 10 --dataset-path hopper.hdf5".split(),
    "baselines/train_radt.py": [*SMALL, "--warmup-steps", "2"],
    "baselines/train_vdt.py": [*SMALL, *VALUE],
    "baselines/train_qt.py": [*SMALL, "--critic", CRITIC, "--critic-width", "16"],
    "baselines/train_rvdt.py": [*SMALL, "--critic", CRITIC, "--critic-width", "16", "--expert-steps", "5"],
    "baselines/tune_vdt.py": [*DATA, *f"--checkpoint {VDT} --env-steps 20 --updates 1 --eval-rollouts 1".split()],
}
NAMES = ["\x1b[31mred", "a\nb", "a$x_$", os.fsdecode(b"\xff\xfe"), "\u202e\u0085\x9b1m", "x" * 120, "'\"%s{}", "a\rerror: b"]
PLAIN = [None, True, "x", "", -1, 0, 1.5, 10**30, -(10**12), 1e308, float("nan"), float("inf"), b"x", [], {}, (), [[]], {"a": 1}]
PLAIN += ["a\x1b[31m\nb" * 99, "9" * 5000, {1: 2}, [None] * 3]


# ---- the folder that is attacked, and the process ----


def launch(script: str, argv, here: Path, before=lambda: None) -> int:
    """Start a script as __main__ in a forked process whose output goes to here/../out and err; returns its id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        os.setsid()
        os.chdir(here)
        for number, name in enumerate(("out", "err"), 1):
            os.dup2(os.open(f"../{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 2**30,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        before()
        sys.argv = [script, *argv]
        runpy.run_path(str(ROOT / script), run_name="__main__")
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    os._exit(code)


def wait(child: int, seconds: float) -> int | None:
    """Its exit code, minus the signal that ended it; None, and killed with all it has started, after so long."""
    end = time.monotonic() + seconds
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


def make_base(here: Path) -> None:
    """Tiny data in both layouts, and a run of every kind."""
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
    with zipfile.ZipFile(here / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb, bomb.open("archive/data.pkl", "w") as f:
        for _ in range(400):
            f.write(bytes(2**20))
    cheetah = [*STAGE2, "--lambda-e", "0", "--env", "halfcheetah-medium-tiny", "--dataset-path", "cheetah.hdf5"]
    runs = [("pretrain_q.py", RUN["pretrain_q.py"]), ("train_qalign_dt.py", STAGE2), ("train_qalign_dt.py", cheetah)]
    for script, argv in (*runs, ("baselines/train_vdt.py", RUN["baselines/train_vdt.py"])):
        if code := wait(launch(script, argv, here), 60):
            sys.exit(f"{script} ended with {code}: {(here.parent / 'err').read_text()}")


def files(folder: Path) -> dict[str, str]:
    """What is in a folder: content of files and links by name."""
    def state(p: Path):
        return os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else p.stat().st_mode
    return {str(p.relative_to(folder)): state(p) for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}


def verdict(code: int | None, kind: str, script: str, here: Path, before: dict) -> str:
    """What is wrong with the end of a script; "" if it has held."""
    out, err = ((here.parent / name).read_bytes().decode(errors="surrogateescape") for name in ("out", "err"))
    text = "\n".join(("", out, err))
    errors = [line for line in text.split("\n") if line.startswith("error:")]
    box = code == 2 and "\u256d" in err and not errors  # tyro's
    if code is None:
        return f"runs for {LIMIT} seconds"
    if "Traceback" in text or code not in (0, 1, 2, 130) or not (box or len(errors) == (code > 0)):
        return f"exit code {code}, {len(errors)} lines of error: {err[-600:].strip()}"
    if odd := [c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c != "\n"]:
        if not box:
            return f"prints {odd[0]!r}: {text[max(0, text.index(odd[0]) - 100) :][:200]!r}"
    own = f"__{Path(script).stem}__", "__data/", "__new__"
    for name, x in files(here).items():
        written = name.startswith("runs/") and any(part in name for part in own)
        free = written and (code == 0 or not name.endswith(".pt")) or name.endswith(".lock")
        if not free and (before.get(name) != x if name in before else kind != "flags" and code > 0):
            return f"exit code {code}, and {name} is {'another' if name in before else 'new'}"
    return "" if not (gone := [name for name in before if not os.path.lexists(here / name)]) else f"{gone[0]} is gone"


# ---- the kinds: each changes the folder, and returns script, command line, how it was made ----


def places(x, at=()):
    """The path of every value in nested dicts, lists and tuples."""
    for key, y in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list | tuple) else ():
        yield (*at, key)
        yield from places(y, (*at, key))


def edited(x, at, edit):
    """x with edit(old value) at a path; without it where that is ... (Ellipsis)."""
    new = {k: edited(y, at[1:], edit) if len(at) > 1 else edit(y) for k, y in
           (x.items() if isinstance(x, dict) else enumerate(x)) if k == at[0]}  # fmt: skip
    pairs = [(k, new.get(k, y)) for k, y in (x.items() if isinstance(x, dict) else enumerate(x))]
    pairs = [(k, y) for k, y in pairs if y is not ...]
    return dict(pairs) if isinstance(x, dict) else type(x)(y for _, y in pairs)


def cycle(_):
    x = []
    x.append(x)
    return x


EDITS = {"removed": lambda x: ..., "cycle": cycle, "zeros(3)": lambda x: torch.zeros(3)}
EDITS |= {f"{x!r:.30}": lambda _, x=x: x for x in PLAIN}
TENSOR = {
    **{name: lambda x, name=name: torch.full_like(x, 1).to(torch.float32) * float(name) for name in ("nan", "inf", "1e38")},
    **{f"{d}": lambda x, d=d: x.to(d) for d in (torch.float16, torch.float64, torch.int8, torch.bool, torch.complex64)},
    "negative": lambda x: -x.to(torch.float32) - 1,
    "transposed": lambda x: x[None].transpose(0, -1),
    "empty": lambda x: x.reshape(-1)[:0],
    "half": lambda x: x[: len(x) // 2] if x.ndim else x,
    "expanded": lambda x: torch.zeros((), dtype=x.dtype).expand(x.shape or 9),
    "huge view": lambda x: torch.zeros((), dtype=x.dtype).expand(10**11),
    "sparse": lambda x: x.to_sparse() if x.ndim else torch.ones(3).to_sparse(),
    "meta": lambda x: x.to("meta"),
    "parameter": lambda x: torch.nn.Parameter(x.float()),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 1.0, 0, torch.qint8),
    "reversed": lambda x: x.flip(0) if x.ndim else x,
    "random bytes": lambda x: torch.randint(-(2**30), 2**30, x.shape).to(x.dtype),
}


class Code:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def of_file(rng, path: Path) -> str:
    """Damage a file as a whole; returns how."""
    raw = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 30))):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    content = dict(stage="x", format=6, x=Code())
    ways = {
        "bits flipped": lambda: path.write_bytes(raw),
        "truncated": lambda: path.write_bytes(raw[: rng.randrange(len(raw))]),
        "lengthened": lambda: path.write_bytes(raw + raw[:1000]),
        "pickle": lambda: path.write_bytes(pickle.dumps(content)),
        "torch's pickle": lambda: torch.save(content, path),
        "zip bomb": lambda: os.replace("bomb", path),
        "FIFO": lambda: path.unlink() or os.mkfifo(path),
        "folder": lambda: path.unlink() or path.mkdir(),
        **{f"link to {x}": lambda x=x: path.unlink() or path.symlink_to(x)
           for x in (Path("precious").absolute(), "nowhere", path.name, "/dev/zero", "/dev/stdin", "/proc/self/mem")},
        "link to itself elsewhere": lambda: path.symlink_to(Path(shutil.move(path, "elsewhere.pt")).absolute()),
    }  # fmt: skip
    way = rng.choice(list(ways))
    ways[way]()
    return way


def checkpoints(rng):
    data, run1, run2 = f"runs/{ENV}__data/dataset.pt", CRITIC.replace("critic", "resume"), POLICY.replace("policy", "resume")
    readers = {
        data: "pretrain_q.py train_qalign_dt.py data/prepare.py baselines/train_vdt.py",
        CRITIC: "train_qalign_dt.py baselines/train_qt.py",
        run1: "pretrain_q.py",
        run2: "train_qalign_dt.py",
        POLICY: "evaluate_alignment.py results/diagnose_alignment.py baselines/tune_vdt.py train_qalign_dt.py",
        VDT: "evaluate_alignment.py baselines/tune_vdt.py baselines/train_vdt.py",
        CHEETAH: "transfer_cheetah_vel.py",
    }
    name = rng.choice([run2, run2, POLICY, POLICY, *readers])
    script, path = rng.choice(readers[name].split()), Path(name)
    argv = list(RUN[script])
    if script.startswith(("evaluate", "baselines/tune")):
        argv += ["--checkpoint", name, *(["--trajectories", "--percentiles"] if script[0] == "e" and rng.random() < 0.3 else ())]
    if name in (CRITIC, data):
        argv += ["--exp-name", "new"] * (script != "data/prepare.py")
    if name in (run1, run2):  # is read where the run is not finished
        path.with_name("critic.pt" if name == run1 else "policy.pt").unlink()
    if rng.random() < 0.2:
        return script, argv, f"{name}: {of_file(rng, path)}"
    content, hows = torch.load(path, weights_only=True), []
    for _ in range(rng.choice((1, 1, 2))):
        every = list(places(content))
        top = rng.choice(sorted({at[0] for at in every}, key=str))
        at = rng.choice([at for at in every if at[0] == top])
        old = functools.reduce(lambda x, key: x[key], at, content)
        edits = TENSOR if torch.is_tensor(old) and rng.random() < 0.7 else EDITS
        if isinstance(old, str) and rng.random() < 0.5:
            edits = {repr(x): lambda _, x=x: x for x in NAMES}
        edit = rng.choice(list(edits))
        content = edited(content, at, edits[edit])
        hows.append(f"{list(at)}: {edit}")
    torch.save(content, path)
    return script, argv, f"{name}: {', '.join(hows)}"


SPECIAL = [b"\xff", "", "Hopper-v5", "Walker2d-v4", "os:system", "maze2d-umaze-v1", [1, 2], [], -1, 0, 1, 10**12, 0.5, float("nan")]
SPECIAL += [True, "x" * 9999, *(x for x in NAMES if "\udcff" not in x), np.uint64(2**64 - 1), np.datetime64(0, "s").astype("i8"), h5py.Empty("f"), 1j]


def hdf5(rng):
    layout = rng.choice(("hopper.hdf5", "hopper.hdf5", f"{MINARI}/main_data.hdf5"))
    group = "/" if layout == "hopper.hdf5" else rng.choice(("episode_0", "episode_3", "episode_29"))
    shutil.rmtree(f"runs/{ENV}__data")
    flags = ["--env", rng.choice((ENV, ENV, "walker2d-medium-x", "maze2d-mini", "antmaze-umaze-x"))] if group == "/" else ["--env", "tests/hopper/mixed-v0"]
    flags += ["--dataset-path", layout] if group == "/" or rng.random() < 0.5 else []
    if rng.random() < 0.1:
        return "data/prepare.py", flags, f"{layout}: {of_file(rng, Path(layout))}"
    with h5py.File(layout, "a") as f:
        at = f[group]
        key = rng.choice(sorted(at))
        key = "rewards" if isinstance(at[key], h5py.Group) else key
        x, layout_of = at[key][()], h5py.VirtualLayout(at[key].shape, at[key].dtype)
        layout_of[...] = h5py.VirtualSource(rng.choice(("nowhere", "cheetah.hdf5")), key, at[key].shape)
        external = [("precious", 0, h5py.h5f.UNLIMITED)]
        def put(y=None, **more):
            del at[key]
            at.create_dataset(key, data=y, **more) if y is not None or more else None
        def link(target):
            del at[key]
            at[key] = target
        ways = {
            "missing": put, "group": lambda: put() or at.create_group(key), "virtual": lambda: put() or at.create_virtual_dataset(key, layout_of),
            "external": lambda: put(shape=x.shape, dtype=x.dtype, external=external), "external link": lambda: link(h5py.ExternalLink("cheetah.hdf5", "rewards")),
            "soft link": lambda: link(h5py.SoftLink(f"{group}/{key}")), "scalar": lambda: put(x.flat[0]), "empty": lambda: put(x[:0]),
            "short": lambda: put(x[:-1]), "long": lambda: put(np.concatenate([x, x])), "column": lambda: put(x[..., None]), "transposed": lambda: put(x.T[None]),
            "null": lambda: put(h5py.Empty("f")), "named type": lambda: put() or at.__setitem__(key, np.dtype("f4")),
            "vast": lambda: put(shape=(10**12,) + x.shape[1:], dtype="f4", chunks=(1000,) + x.shape[1:]), "vast in memory": lambda: put(shape=(10**9,), dtype="i1", chunks=(10**6,)),
            **{f"{d}": lambda d=d: put(np.ones(x.shape).astype(d)) for d in ("S3", "f2", "f8", "c8", "i8", "u1", "b1", "O", "V4", "f4,i4")
               if d != "O"}, "text": lambda: put(["a"] * len(x)), "reference": lambda: put(np.full(len(x), f.ref), dtype=h5py.ref_dtype),
            **{f"{v}": lambda v=v: put(np.full(x.shape, v)) for v in (np.nan, np.inf, -1e308, 1e30, -1e8, 1, 0)},
            "one NaN": lambda: put(np.where(np.arange(x.size).reshape(x.shape) == 7, np.nan, x)), "huge episode": lambda: at.copy(at[key], "episode_" + "9" * 5000),
        }  # fmt: skip
        if group == "/" and rng.random() < 0.4:
            name, value = rng.choice(("env_id", "max_episode_steps", "seed")), rng.choice(SPECIAL)
            f.attrs[name], how = value, f"attribute {name} = {value!r:.40}"
        else:
            ways[how := rng.choice(list(ways))]()
            how = f"{group}/{key}: {how}"
    return "data/prepare.py", flags, f"{layout}: {how}"


def minari(rng):
    file = Path(MINARI, "metadata.json")
    ids = ["HalfCheetah-v4", "CartPole-v1", "Pendulum-v1", "Hopper-v5", "os:system", "gymnasium.envs.mujoco:Hopper-v5", "qalign_mazes:maze2d-umaze-v1", "tests.attacks:Hopper-v5", "a/b/c-v0", "-v0", "GymV26Environment-v0", "PointMaze_UMaze-v3", "FrozenLake-v1"]
    kwargs = [{"xml_file": x} for x in ("/etc/passwd", "nowhere.xml", "../here/precious", "", 3, None, "~/x", "a\x1b[31m")] + [{"render_mode": "human"}, {"frame_skip": 0}, {"frame_skip": -1}, {"frame_skip": 10**9}, {"frame_skip": "x"}]
    kwargs += [{"reset_noise_scale": x} for x in (-1, 1e308, "x", [])] + [{"id": "x"}, {"max_episode_steps": 3}, {"disable_env_checker": False}, {"autoreset": True}, {"default_camera_config": 3}, {"width": -1}, {"\x1b[31m": 1}, {"": {}}, {"healthy_reward": {"a": [1]}}, {"exclude_current_positions_from_observation": False}]
    wrappers = [[{"name": x, "entry_point": "os:system", "kwargs": k}] for x in ("TimeLimit", "\x1b[31m", "OrderEnforcing", 3) for k in ({"max_episode_steps": -1}, None, 3, {"max_episode_steps": "x"})]
    values = {"id": ids, "kwargs": kwargs + kwargs, "additional_wrappers": wrappers, "max_episode_steps": [-1, 0, 10**30, 1.5], "entry_point": ["os:system"], "": [0]}
    key, metadata = rng.choice(("id", "kwargs", "kwargs", *values)), json.loads(file.read_text())
    value = rng.choice(values[key] + rng.sample([x for x in PLAIN if not isinstance(x, bytes)] + NAMES[:3], 3))
    metadata["env_spec"] |= {key: value}
    metadata |= {"ref_min_score": rng.choice([0, 0, None, "x", float("nan"), 10**400])} | {"ref_max_score": rng.choice([1, 1, -1, [], 1e308])}
    text = json.dumps(metadata)
    whole = {"text": b"hello", "list": b"[]", "number": b"3", "deep": b"[" * 10**6, "not UTF-8": b"\xff", "huge number": b"9" * 10**5, "env_spec null": b'{"env_spec": null}', "env_spec text": b'{"env_spec": "{"}'}
    how = rng.choice(list(whole)) if key == "" and rng.random() < 0.7 else f"env_spec.{key} = {value!r:.60}"
    file.write_bytes(whole.get(how) or text.encode())
    if key == "" and how not in whole:
        how = of_file(rng, file)
    return rng.choice(("data/prepare.py", "data/prepare.py", "pretrain_q.py")), ["--env", "tests/hopper/mixed-v0", *(["--total-steps", "5"] * 0)], f"{file}: {how}"


FLAG_VALUES = ["0", "-1", "nan", "inf", "1e40", "", "../x", "a\nb\x1b[31m", "x" * 5000, "9" * 5000, str(10**18), "1e-300", "\udcff$x_$", ".", "/dev/null", "None", "-", "precious", "a" * 250]


@functools.cache
def flags_of():
    found = []
    for script, argv in RUN.items():
        module = importlib.import_module(Path(script).stem)
        for field in dataclasses.fields(module.Args):
            if "Positional" in str(field.type):
                found += [(script, [v, *argv[1:]]) for v in FLAG_VALUES]
            elif "bool" not in str(field.type):
                count = {"rtg_range": 2, "ratio": 3}.get(field.name, 1)
                flag, new = f"--{field.name.replace('_', '-')}", ["--exp-name", "new"] if script.startswith(("pre", "train", "base")) else []
                found += [(script, [*argv, *new, *([f"{flag}={v}"] if count == 1 else [flag, *[v] * count])]) for v in FLAG_VALUES
                          if (flag, v) not in (("--out-dir", ""), ("--out", ""), ("--results-dir", ""))]
    return found


def flags(rng):
    script, argv = rng.choice(flags_of())
    return script, argv, "nothing"


def names(rng):
    name, script = rng.choice([x.replace("/", "") for x in NAMES]), "evaluate_alignment.py"
    way, new = rng.choice(("data", "runs", "label", "exp_name", "compare")), ["--exp-name", "new"]
    if way == "data":
        os.rename("hopper.hdf5", name)
        script = rng.choice(("data/prepare.py", "train_qalign_dt.py", "baselines/train_radt.py", "data/mix_returns.py"))
        argv = [name if x == "hopper.hdf5" else x for x in RUN[script]] + ["--runs-dir", "others", *new] * (script != "data/mix_returns.py")
        argv = [x for x in argv if script != "data/prepare.py" or x not in new]
    elif way == "runs":
        os.rename("runs", name)
        script = rng.choice(list(RUN)[:5])
        argv = [x.replace("runs/", f"{name}/") for x in RUN[script]] + ["--runs-dir", name]
    else:
        path = Path(CHEETAH if rng.random() < 0.3 else POLICY)
        script = script if path == Path(POLICY) else "transfer_cheetah_vel.py"
        content = torch.load(path, weights_only=True)
        content["task"]["label"], content["config"]["exp_name"] = (name if name.isprintable() else "a$x_$") if way != "exp_name" else "x", name if way != "label" else "x"
        torch.save(content, path)
        argv = [*RUN[script], *(["--compare", shutil.copy(path, name)] if way == "compare" else [])]
    return script, argv, f"{way}: {name!r}"


def kills(rng):
    """Ends the first process itself, at a point; the same command again is what is judged."""
    here = Path.cwd()
    Path(POLICY).unlink(), Path(POLICY).with_name("resume.pt").unlink()
    real, argv, prepared = subprocess.run, [x for x in STAGE2 if x not in ("--critic", CRITIC)], rng.random() < 0.5
    where, count, delay = rng.choice(("replace", "unlink", "fsync", "mkdir")), rng.choice((1, 1, 2)), rng.uniform(0, 8)
    def short(command, **_):
        return real([*command, "--total-steps", "30", "--batch-size", "32"])
    def before():
        subprocess.run, calls, function = short, [], getattr(os, where)
        def deadly(*args, **kwargs):
            calls.append(1)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        if prepared:
            setattr(os, where, deadly)
    shutil.rmtree(f"runs/{ENV}__data") if prepared else Path(CRITIC).unlink()
    Path(CRITIC).with_name("resume.pt").unlink()
    child = launch("train_qalign_dt.py", argv, here, before)
    if not prepared:
        time.sleep(delay)
        (os.kill if rng.random() < 0.5 else os.killpg)(child, signal.SIGKILL)
    wait(child, LIMIT)
    how = f"SIGKILL {f'at call {count} of os.{where}' if prepared else f'{delay:.1f} s after the start, while stage 1 runs'}, and again"
    return "train_qalign_dt.py", argv, how, lambda: setattr(subprocess, "run", short)


KINDS = {"checkpoints": (checkpoints, 0.34), "hdf5": (hdf5, 0.16), "minari": (minari, 0.12), "flags": (flags, 0.3), "names": (names, 0.07)}
KINDS |= {"kills": (kills, 0.013)}


def attack(kind: str, index: int, seed: int, base: Path) -> tuple[str, str]:
    """What is wrong, or "", and how to do it again."""
    rng, cwd = random.Random(f"{seed} {kind} {index}"), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        here = Path(shutil.copytree(base / "here", Path(folder) / "here"))
        policy = torch.load(here / POLICY, weights_only=True)["policy"]
        os.chdir(here)
        torch.manual_seed(index)
        script, argv, how, *more = KINDS[kind][0](rng)
        os.chdir(cwd)
        before = files(here)
        end = wait(launch(script, argv, here, *more), LIMIT)
        wrong = verdict(end, kind, script, here, before)
        if kind == "kills" and not wrong:
            again = torch.load(here / POLICY, weights_only=True)["policy"]
            wrong = "" if all(torch.equal(x, again[k]) for k, x in policy.items()) else "other weights"
        return wrong, f"--only {kind}:{index}: {how}; python {script} {' '.join(f'{x!r:.90}' for x in argv)}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("n", type=int, nargs="?", default=300)
    parser.add_argument("--all", action="store_true", help="a thousand")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="KIND or KIND:INDEX")
    args = parser.parse_args()
    n, (kind, _, index) = 1000 if args.all else args.n, args.only.partition(":")
    todo = [(k, i) for k, (_, share) in KINDS.items() for i in range(round(n * share)) if not index and kind in ("", k)]
    todo = sorted(todo, key=lambda x: x[0] != "kills") if not index else [(kind, int(index))]
    flags_of()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "here").mkdir()
        if not (worker := os.fork()):  # no thread of autograd's in this process
            make_base(base / "here")
            os._exit(0)
        if os.waitpid(worker, 0)[1]:
            sys.exit(1)
        workers = os.cpu_count() or 1
        for w in range(workers):
            if not os.fork():
                results = [(kind, *attack(kind, i, args.seed, base)) for kind, i in todo[w::workers]]
                (base / f"{w}.json").write_text(json.dumps(results))
                os._exit(0)
        for _ in range(workers):
            os.wait()
        results = [x for w in range(workers) for x in json.loads((base / f"{w}.json").read_text())]
    tried, broke = Counter(kind for kind, _, _ in results), Counter(kind for kind, wrong, _ in results if wrong)
    for kind, wrong, how in sorted(results):
        print(f"BROKE {how}\n    {wrong!r}\n" * bool(wrong), end="")
    for kind in tried:
        print(f"{kind}: {tried[kind]} tried, {tried[kind] - broke[kind]} held")
    sys.exit(bool(broke))


if __name__ == "__main__":
    main()
