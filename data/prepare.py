"""Data for every stage: checked once, and written as the first of the checkpoint files that stages share.

    python data/prepare.py --env hopper-medium-v2

finds the data of an --env (--dataset-path, this folder, D4RL's cache or server, Minari's folder), checks them, and
writes <runs-dir>/<env>__data/dataset.pt: whole episodes one after the other (N transitions, E episodes) as

    observations (N, obs_dim), actions (N, act_dim) in [-1, 1], rewards (N,)   float32, raw
    terminals (N,) bool: the MDP ended here; ends (E,) int64: where episodes end, exclusive (no terminal: a timeout)
    obs_mean, obs_std (obs_dim,) float32; task: a dict of plain values, class Task

The stages that train call `prepare` themselves where that file is missing. Bad data end in a one-line error, and no
file is written.
"""

import difflib
import glob
import hashlib
import http.client
import json
import math
import os
import re
import signal
import sys
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # while modules load
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"error: interrupted\n"), os._exit(130)))

import gymnasium
import h5py
import numpy as np
import torch
import tyro
from tqdm import tqdm

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # this folder, and stage 2's
import collect_maze2d
import qalign_mazes

from train_qalign_dt import FORMAT, Files, Task, claim, fail, load_checkpoint, make_env, one_line, printable, run


@dataclass(frozen=True)
class Args:
    env: str = "hopper-mini"  # what to prepare: a D4RL name, your own data's, or a Minari id (README, "Data")
    dataset_path: Files = ()  # HDF5 file(s) in D4RL's or Minari's layout to use instead, joined
    runs_dir: str = "runs"  # folder of all runs


HORIZON = 1000  # steps after which Gymnasium and D4RL cut an episode, unless the data or the maze say otherwise
RTG_SCALE = 1000.0  # of the Gym tasks
BODIES = dict(  # ref_min, ref_max: D4RL's
    hopper=dict(env_id="Hopper-v4", obs_dim=11, act_dim=3, ref_min=-20.272305, ref_max=3234.3),
    halfcheetah=dict(env_id="HalfCheetah-v4", obs_dim=17, act_dim=6, ref_min=-280.178953, ref_max=12135.0),
    walker2d=dict(env_id="Walker2d-v4", obs_dim=17, act_dim=6, ref_min=1.629008, ref_max=4592.3),
    ant=dict(env_id="Ant-v4", obs_dim=111, act_dim=8, ref_min=-325.6, ref_max=3879.7),
    antmaze=dict(obs_dim=29, act_dim=8, ref_min=0.0, ref_max=1.0),
)
RELEASE = dict(  # for D4RL's own data: the release's range of RTGs (normalised) and its high targets (raw)
    hopper=dict(rtg_range=(-1.0, 4.0), targets=(1800.0, 3600.0, 4000.0)),
    halfcheetah=dict(rtg_range=(-1.0, 25.0), targets=(12000.0, 24000.0)),
    walker2d=dict(rtg_range=(-1.0, 20.0), targets=(5000.0, 6000.0, 10000.0)),
    ant=dict(rtg_range=(-1.0, 10.0), targets=(5000.0, 10000.0)),
    antmaze=dict(rtg_range=(0.0, 1.0), targets=(0.8, 0.9, 1.0, 100.0)),
)
# v5, which Minari records, has v4's observations, but for Ant's
BODY_OF = {f"{name}-{v}": name.lower() for name in ("Hopper", "HalfCheetah", "Walker2d") for v in ("v4", "v5")}
QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "expert")
MAZES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
MINIS = ("hopper-mini", "halfcheetah-mini", "maze2d-mini")  # come with the code; the last is made when it is asked for
MINI_ROWS = 100_000  # of maze2d-mini: umaze, seed 0
# QT's targets and scale; no episode of the data has a return above 100, so a sweep over the data's own would say little
MAZE2D = dict(body="maze2d", obs_dim=4, act_dim=2, rtg_scale=10.0, targets=(300.0, 200.0, 150.0, 100.0, 50.0, 20.0))
MAZE2D |= dict(sweep=tuple(20.0 * k for k in range(16)))
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")  # of D4RL's layout
HARMLESS = ("Monitor", "OrderEnforcing", "PassiveEnvChecker", "RecordEpisodeStatistics", "RecordVideo", "TimeLimit")
DRAWING_ONLY = ("render", "width", "height", "camera", "default_camera")  # how keyword arguments start that only draw

D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
MIRROR_URL = "https://huggingface.co/datasets/imone/D4RL/resolve/main"  # the same names in one folder
READ_TIMEOUT = 30  # seconds without a byte
D4RL_RETURNS = dict(  # lowest and highest return of an episode of D4RL's own -v2 files, in the order of QUALITIES
    hopper=((2.93, 292.55), (315.87, 3222.36), (-1.44, 3192.93), (315.87, 3759.08), (1645.28, 3759.08)),
    halfcheetah=((-525.96, -85.36), (-310.23, 5309.38), (-638.49, 4985.14), (-310.23, 11252.04), (2045.83, 11252.04)),
    walker2d=((-17.01, 75.03), (-6.61, 4226.94), (-50.2, 4132.0), (-6.61, 5011.69), (763.42, 5011.69)),
    ant=((-450.51, 106.18), (-529.61, 4186.98), (-698.47, 3734.88), (-1708.24, 5670.89), (-1708.24, 5670.89)),
)


# ---- which data a name stands for ----


def parse_env(name: str) -> dict:
    """What an --env name alone says of its task: fields of Task. Exits 2 on an unknown name, naming the closest."""
    if len(name) > 200:
        fail(f"--env {name:.40}...: a name has at most 200 characters")
    base = dict(name=name, env_kwargs={}, reward_shift=0.0, sweep=())
    if "/" in name:  # Minari's; its metadata say the rest
        if not re.fullmatch(r"([\w-][\w.-]*/)*[\w-][\w.-]*-v\d+", name, re.ASCII):
            fail(f"unknown --env {name!r}: Minari's ids look like mujoco/hopper/expert-v0 (your own set: me/mine-v0)")
        base |= dict(body="", quality=name.rpartition("/")[2], tag="minari")
        return base | dict(ref_min=0.0, ref_max=100.0)  # scores are returns
    if name == "maze2d-mini" or name in qalign_mazes.MAZE2D:
        quality, _, tag = name.removeprefix("maze2d-").rpartition("-")
        return base | maze_task("maze2d-umaze-v1" if tag == "mini" else name) | dict(quality=quality or "mini", tag=tag)
    body, _, rest = name.partition("-")
    quality, _, tag = rest.rpartition("-") if rest != "mini" else ("mini", "", "mini")
    known = [f"{b}-{q}-v2" for b in BODIES for q in (MAZES if b == "antmaze" else QUALITIES)] + [*qalign_mazes.MAZE2D]
    qualities = MAZES if body == "antmaze" else (*QUALITIES, "mixed")  # and mini, as of data that come with the code
    # "hopper-medium-replay" is D4RL's name without its -v2, not data of your own that are tagged "replay"
    own = re.fullmatch(r"\w[\w.]*", tag, re.ASCII) and tag != "v2" and f"{name}-v2" not in known
    if own and re.fullmatch(r"v\d+", tag):
        fail(f"--env {name}: of D4RL's data only -v2 is known here; for a file of your own take another tag")
    allowed = qualities if body == "antmaze" else (*qualities, "mini")
    if body not in BODIES or quality not in allowed or not (own or name in known):
        close = difflib.get_close_matches(name, [*known, *MINIS], n=3, cutoff=0.0)
        own = f"<body>-<quality>-<tag>, bodies {', '.join(BODIES)}, qualities {', '.join(qualities)}, a tag without -"
        fail(f"unknown --env {name!r}: did you mean {', '.join(close)}? (your own: {own}; other bodies: me/mine-v0)")
    task = base | BODIES[body] | RELEASE[body] | dict(body=body, quality=quality, tag=tag)
    if body != "antmaze":
        return task | dict(horizon=HORIZON, rtg_scale=RTG_SCALE)
    maze = quality.partition("-")[0]
    task |= dict(env_id=f"qalign_mazes:AntMaze-{maze}-v0", horizon=700 if maze == "umaze" else HORIZON, rtg_scale=1.0)
    return task | dict(reward_shift=-1.0)  # IQL's: the critic sees r - 1


def maze_task(name: str) -> dict:
    """Fields of Task of a maze2d-...; quality and tag are the name's."""
    maze, env_id = qalign_mazes.MAZE2D[name], f"qalign_mazes:{name}"
    return MAZE2D | dict(env_id=env_id, horizon=maze["horizon"], ref_min=maze["min"], ref_max=maze["max"])


def local_file(task: dict) -> Path:
    """Where the data of a name lie on this machine, if they are here: this folder, D4RL's cache, or Minari's."""
    if "/" in task["name"]:
        return home("MINARI_DATASETS_PATH", ".minari") / task["name"] / "data" / "main_data.hdf5"
    own = Path(__file__).resolve().parent / f"{task['name']}.hdf5"
    if not of_d4rl(task):
        return own
    cached = home("D4RL_DATASET_DIR", ".d4rl") / d4rl_name(task).rpartition("/")[2]
    return own if task["body"] == "maze2d" and own.is_file() and not cached.is_file() else cached


def of_d4rl(task: dict) -> bool:
    """Whether the name is one of D4RL's own data sets."""
    return task["tag"] == "v2" or task["body"] == "maze2d" and task["tag"] != "mini"


def home(variable: str, folder: str) -> Path:
    """The folder that an environment variable names, or ~/<folder>/datasets."""
    try:
        return Path(os.environ.get(variable) or Path.home() / folder / "datasets")
    except RuntimeError:
        fail(f"this user has no home folder; set {variable} to the folder of the data sets")


def d4rl_name(task: dict) -> str:
    """D4RL's file of a name, below its server's root."""
    if task["body"] == "maze2d":
        kind = "dense" if task["quality"].endswith("-dense") else "sparse"
        maze, version = task["quality"].removesuffix("-dense"), "" if task["tag"] == "v0" else f"-{task['tag']}"
        return f"maze2d/maze2d-{maze}-{kind}{version}.hdf5"
    if task["body"] != "antmaze":
        return f"gym_mujoco_v2/{task['body']}_{task['quality'].replace('-', '_')}-v2.hdf5"
    size, _, kind = task["quality"].partition("-")
    maze = {"umaze": "u-maze", "medium": "big-maze", "large": "hardest-maze"}[size]
    return f"ant_maze_v2/Ant_maze_{maze}_noisy_multistart_{kind != ''}_multigoal_{kind == 'diverse'}_sparse_fixed.hdf5"


def fetch(task: dict, path: Path) -> None:
    """Download D4RL's missing file; for any other name exit 2 and say how to get it."""
    if "/" in task["name"]:
        metadata = path.parent / "metadata.json"
        if metadata.is_file() and "arrow" in metadata.read_text(errors="replace"):
            fail(f"{path.parent} is stored as Arrow files; only Minari's HDF5 format is read: make the set again in it")
        how = f"pip install 'minari[hdf5,hf]' && minari download {task['name']}"
        fail(f"{path} is missing: {how} (data of your own: --dataset-path FILE)")
    if not of_d4rl(task):
        fail(f"{path} is missing; give --dataset-path FILE, or make it with data/collect_dataset.py")
    url, tried = f"{D4RL_URL}/{d4rl_name(task)}", []
    with claim(path.parent, wait=True):
        for address in (url, url, f"{MIRROR_URL}/{path.name}"):  # a server that stumbles gets a second chance
            try:
                return None if path.is_file() else download(address, path)  # another process has been faster
            except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
                tried.append(f"{address} ({one_line(error)})")
    quality = "simple" if task["quality"] == "random" else task["quality"].partition("-")[0]
    other = f"Minari's re-recorded set: --env mujoco/{task['body']}/{quality}-v0"
    if task["body"] == "antmaze":
        other = f"Minari's re-recorded set: --env D4RL/antmaze/{task['quality']}-v1"
    if task["body"] == "maze2d":
        other = f"or make it here: python data/collect_maze2d.py {task['name']}"
    fail(f"cannot download {', '.join(tried)}; put the file at {path}, or give --dataset-path FILE; {other}")


def download(url: str, path: Path) -> None:
    """Download one HDF5 file, whole or not at all."""
    for left in path.parent.glob(f"{path.name}.*.part"):  # of a run that was killed
        left.unlink()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    print(f"downloading {url} to {path}", flush=True)
    try:
        with urllib.request.urlopen(url, timeout=READ_TIMEOUT) as response, open(part, "wb") as f:
            size = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                while block := response.read(1 << 20):
                    f.write(block)
                    bar.update(len(block))
        if size and part.stat().st_size != size:
            raise ValueError(f"{part.stat().st_size:,} of {size:,} bytes arrived")
        with h5py.File(part, "r") as f:
            if missing := [key for key in KEYS if key not in f]:
                raise ValueError(f"no {missing[0]!r} in the file")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ---- reading and checking ----


def read_hdf5(path: Path, task: dict) -> tuple[dict, list[np.ndarray]]:
    """One file in D4RL's or Minari's layout: the task as the file completes it, and its arrays from check_arrays."""
    try:
        with open(path, "rb") as raw:
            if raw.read(15).lstrip().lower().startswith((b"<!doctype", b"<html")):
                fail(f"{path} is a web page, not data (a failed download?): remove it")
        with h5py.File(os.fsencode(path), "r") as f:
            if link := f.visititems_links(lambda name, link: name if isinstance(link, h5py.ExternalLink) else None):
                raise ValueError(f"{link!r} lies in another file, which is not read")
            minari = next((key for key in f if re.fullmatch(r"episode_\d+", key)), None)
            task = as_recorded(task, path, minari_spec(path, f) if minari else d4rl_spec(f))
            arrays = read_minari(f, task) if minari else [read_array(f, key) for key in KEYS]
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        fail(f"{path}: {one_line(error)}; check --env and --dataset-path, or make it with data/collect_dataset.py")
    return task, check_arrays(task, path, arrays)


def check_arrays(task: dict, path: Path, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """From the arrays of KEYS, without the rows after the last end of an episode: observations, actions, rewards
    (float32), terminals, and where episodes end (bool).
    """
    N = arrays[0].shape[0] if arrays[0].ndim else 0
    shapes = ((N, task["obs_dim"]), (N, task["act_dim"]), (N,), (N,), (N,))
    for i, (key, shape) in enumerate(zip(KEYS, shapes)):
        if key == "observations" and task["body"] == "ant" and arrays[0].shape == (N, 27):
            fail(f"{path}: 27 observations are Ant's without contact forces; D4RL's 111 end in 84 zeros: append them")
        if arrays[i].shape not in (shape, (*shape, 1)):  # flags may be columns
            needs = f"{task['env_id']} with {N:,} observations needs numbers of shape {shape}"
            fail(f"{path}: {key} has shape {arrays[i].shape}, {needs}")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
            arrays[i] = arrays[i].reshape(shape).astype(np.float32)
        if not np.isfinite(arrays[i]).all():
            row = int(np.argwhere(~np.isfinite(arrays[i]))[0][0])
            fail(f"{path}: {key} has a NaN or infinite value, first in row {row:,}")
    observations, actions, rewards = arrays[:3]
    terminals, episode_end = arrays[3] > 0, (arrays[3] > 0) | (arrays[4] > 0)
    if task["body"] == "antmaze":
        rows, episode_end = until_first_success(observations, terminals, arrays[4] > 0)
        observations, actions, rewards, terminals = (x[rows] for x in (observations, actions, rewards, terminals))
        print(f"{path}: {len(rows) - rows.sum():,} of {len(rows):,} transitions come after a first success: left out")
    if task["body"] == "ant" and observations[:, 27:].any():
        fail(f"{path}: the last 84 of Ant's 111 observations, contact forces, must be zero as in D4RL: Ant-v4 has none")
    if task["body"] == "maze2d":
        maze = qalign_mazes.MAZE2D[task["env_id"].rpartition(":")[2]]["maze"]
        if not qalign_mazes.in_maze(maze, observations[:, :2]).all():
            fail(f"{path}: positions outside the free cells of {maze}: a file of another maze?")
    n = int(np.flatnonzero(episode_end)[-1]) + 1 if episode_end.any() else 0
    tail = f"{len(episode_end) - n:,} of {len(episode_end):,} rows after the last end of an episode"
    if n == 0:
        fail(f"{path}: no complete episode (terminals and timeouts are all False)")
    if 2 * n < len(episode_end):
        fail(f"{path}: {tail} would be left out; are terminals and timeouts set?")
    if n < len(episode_end):
        print(f"{path}: {tail} are left out")
    return [x[:n] for x in (observations, actions, rewards, terminals, episode_end)]


def read_array(f: h5py.Group, key: str) -> np.ndarray:
    """A plain array of numbers, stored in this very file; ValueError on anything else."""
    x = f.get(key) if isinstance(f, h5py.Group) else None
    if key == "observations" and isinstance(x, h5py.Group):
        raise ValueError("observations are a dict: take the Minari set's id as --env, such as D4RL/pointmaze/umaze-v2")
    if x is None and key == "timeouts" and "terminals" in f:
        raise ValueError("no 'timeouts' (older D4RL files): add them, True where the time limit cut an episode")
    if not isinstance(x, h5py.Dataset) or x.is_virtual or x.dtype.kind not in "biuf" or x.shape is None:
        raise ValueError(f"no array of numbers {key!r} in {f.name if f.name != '/' else 'this file'}")
    if x.external:
        raise ValueError(f"{key!r} lies in another file (HDF5's external raw data), which is not read")
    if x.nbytes > 10**8 + 2000 * x.id.get_storage_size():  # no compression saves as much
        raise ValueError(f"{key!r} has {x.size:,} numbers, most of which were never written")
    return np.asarray(x)


def read_minari(f: h5py.File, task: dict) -> list[np.ndarray]:
    """The arrays of D4RL's layout from Minari's groups episode_0, episode_1, ... (each with T + 1 observations)."""

    def flat(group, key: str, space) -> np.ndarray:  # as Gymnasium's flatten
        if isinstance(space, gymnasium.spaces.Dict):
            return np.concatenate([flat(group[key], name, sub) for name, sub in space.spaces.items()], axis=1)
        x = read_array(group, key)
        return x.reshape(len(x), -1)

    names, parts, space = [key for key in f if re.fullmatch(r"episode_\d+", key)], [], task.get("space")
    for name in sorted(names, key=lambda key: int(key[8:])):
        columns = [read_array(f[name], key) for key in ("actions", "rewards", "terminations", "truncations")]
        T = columns[1].size
        observations = flat(f[name], "observations", space) if space else read_array(f[name], "observations")
        if {len(x) if x.ndim else -1 for x in columns} != {T} or len(observations) not in (T, T + 1):
            found = ", ".join(f"{len(x) if x.ndim else 1}" for x in columns)
            raise ValueError(f"{name}: {len(observations)} observations, but {found} actions, rewards and flags")
        if T:
            columns[3] = np.arange(T) == T - 1  # an episode ends where its group does
            parts.append([observations[:T], *columns])
    if not parts:
        raise ValueError("no episode with a step in it")
    return [np.concatenate(arrays) for arrays in zip(*parts)]


def d4rl_spec(f: h5py.File) -> dict:
    """What a file in D4RL's layout says of its environment: attributes that our collecting scripts write."""
    env_id, limit, seed = (f.attrs.get(key) for key in ("env_id", "max_episode_steps", "seed"))
    env_id = env_id.decode() if isinstance(env_id, bytes) else env_id
    if not isinstance(seed, int | np.integer | None):
        raise TypeError("the attribute seed is no number")
    return {"id": env_id, "kwargs": {}, "max_episode_steps": limit, "seed": seed}


def minari_spec(path: Path, f: h5py.File) -> dict:
    """What the metadata.json beside a Minari file says of its environment."""
    file = path.parent / "metadata.json"
    try:
        if "env_spec" in f.attrs and not file.exists():
            raise ValueError("an older Minari kept it in the HDF5 file")
        if file.exists() and not file.is_file():
            raise ValueError("not a regular file")
        metadata = json.loads(file.read_text(encoding="utf-8"))
        spec = metadata["env_spec"]
        spec = json.loads(spec) if isinstance(spec, str) else spec
        if spec is None:
            raise ValueError("env_spec is null")
        found = {"id": spec["id"], "kwargs": spec.get("kwargs") or {}, "max_episode_steps": spec["max_episode_steps"]}
        found |= {key: metadata.get(key) for key in ("ref_min_score", "ref_max_score")}
        for wrapper in spec.get("additional_wrappers") or ():
            if wrapper["name"] not in HARMLESS:
                fail(f"{path} was recorded through the wrapper {wrapper['name']}: evaluation would see other numbers")
            if wrapper["name"] == "TimeLimit":
                found["max_episode_steps"] = (wrapper["kwargs"] or {}).get("max_episode_steps")
        return found
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        example = '{"env_spec": {"id": "Pendulum-v1", "max_episode_steps": 200}}'
        fail(f"{file} names no environment ({reason}); write {example} there, or download the data with a newer Minari")


def as_recorded(task: dict, path: Path, spec: dict) -> dict:
    """The task with the environment that its data were recorded in; exits 2 where that is another one."""
    found, kwargs, limit = spec["id"], spec["kwargs"], spec["max_episode_steps"]
    if not isinstance(found, str | None) or not isinstance(kwargs, dict):
        fail(f"{path}: the environment's id or arguments are not plain values")
    kwargs = {k: v for k, v in kwargs.items() if not k.startswith(DRAWING_ONLY)}
    if limit is not None:
        if not isinstance(limit, int | np.integer) or limit is True or not 0 < limit <= 10**6:
            fail(f"{path}: max_episode_steps {limit!r:.40} is no number of steps")
        task = task | dict(horizon=int(limit), horizon_is_recorded=True)
    if "/" in task["name"]:
        return generic(task, path, found, kwargs, spec)
    expected = task["env_id"].rpartition(":")[2]
    if task["body"] == "maze2d":
        task = task | dict(seed=spec.get("seed"))
        if task["tag"] == "mini" and found in qalign_mazes.MAZE2D:  # the file's maze
            return task | maze_task(found)
    if found in (None, expected) and not kwargs:
        return task
    if BODY_OF.get(found) == task["body"] and not kwargs:
        print(f"{path} was recorded in {found}, and is evaluated there")
        return task | dict(env_id=found)
    fail(f"{path} was recorded in {found} {kwargs or ''}; --env {task['name']} is {expected}; take --env me/mine-v0")


def generic(task: dict, path: Path, env_id: str | None, kwargs: dict, spec: dict) -> dict:
    """The task of an --env with a slash: environment, sizes and limit as the file, its metadata and Gymnasium say."""
    if env_id is None:
        fail(f"{path} does not say in which environment it was recorded: set its attribute env_id, such as Pendulum-v1")
    env = make_env(env_id, kwargs)  # exits 2 on anything that is not Gymnasium's, ours or gymnasium_robotics'
    try:  # with arguments of another type some fail only here
        env.reset(seed=0)
        env.step(env.action_space.sample())
    except Exception as error:
        fail(f"{path}: {env_id} does not run with {kwargs} ({one_line(error)})")
    space, inner = env.unwrapped.observation_space, env.unwrapped.action_space
    limit = gymnasium.spec(env_id.rpartition(":")[2]).max_episode_steps or HORIZON
    task = dict(horizon=limit) | task | dict(env_id=env_id, env_kwargs=kwargs)
    task |= dict(obs_dim=env.observation_space.shape[0], act_dim=env.action_space.shape[0])
    task |= dict(space=space if isinstance(space, gymnasium.spaces.Dict) else None)
    if (inner.low != -1).any() or (inner.high != 1).any():
        task |= dict(low=inner.low, high=inner.high)
    if env_id in BODY_OF and not kwargs:
        task |= dict(body=BODY_OF[env_id], rtg_scale=RTG_SCALE)
    low, high = spec.get("ref_min_score"), spec.get("ref_max_score")
    if all(isinstance(x, int | float) and abs(x) <= 1e9 for x in (low, high)) and low < high:
        task |= dict(ref_min=float(low), ref_max=float(high))
    return task


def until_first_success(observations, terminals, timeouts) -> tuple[np.ndarray, np.ndarray]:
    """AntMaze: (N,) which rows come up to the first success of their trajectory; and which of those end an episode.

    D4RL marks every step near the goal as terminal while the trajectory goes on; cut at each, as the release does, it
    falls apart into one-step episodes of return 1. A trajectory ends by timeout, or where the ant jumps by a metre.
    """
    end = timeouts.copy()
    end[:-1] |= np.linalg.norm(np.diff(observations[:, :2], axis=0), axis=1) > 1
    first = np.append(0, np.flatnonzero(end) + 1)  # rows of the trajectories
    before = np.cumsum(terminals) - terminals  # successes in earlier rows
    lengths = np.diff(np.append(first, len(end)))
    rows = before == np.repeat(np.append(before, 0)[first], lengths)
    return rows, (end | terminals)[rows]


def maze2d_mini(task: dict) -> dict:
    """The content of dataset.pt for maze2d-mini: the collector's rows, without a file in between."""
    name = "maze2d-umaze-v1"
    arrays = collect_maze2d.collect(name, MINI_ROWS, seed=0)
    label = f"{name} (regenerated, {MINI_ROWS:,} rows, seed 0)"
    *parts, end = check_arrays(task, Path(task["name"]), [arrays[key] for key in KEYS])
    found = content(task, *parts, np.flatnonzero(end) + 1, label, False, [])
    found["task"]["sources"] = [dict(name=label, size=0, time=0, sha256=found["task"]["digest"])]
    return found


def dataset(task: dict, paths: list[Path]) -> dict:
    """The content of dataset.pt, read from files and checked; exits 2 on impossible data."""
    if not paths:
        return maze2d_mini(task)
    sources = [source(path) for path in paths]
    parts = []
    for path in paths:
        found, arrays = read_hdf5(path, task)
        if parts and any(found[name] != parts[0][0][name] for name in ("env_id", "env_kwargs")):
            here, there = (f"{x['env_id']} {x['env_kwargs'] or ''}" for x in (found, parts[0][0]))
            fail(f"{path} was recorded in {here}, {paths[0]} in {there}; give files of one environment")
        parts.append((found, arrays))
    task = max((found for found, _ in parts), key=lambda found: found["horizon"])
    observations, actions, rewards, terminals, episode_end = map(np.concatenate, zip(*(arrays for _, arrays in parts)))
    if "low" in task:  # to [-1, 1], which RescaleAction reverses
        actions = (2 * (actions - task["low"]) / (task["high"] - task["low"]) - 1).astype(np.float32)
    outside = int((np.abs(actions) > 1 + 1e-6).any(axis=1).sum())
    if 10 * outside > len(actions):
        fail(f"{paths[0]}: {outside:,} of {len(actions):,} actions lie outside [-1, 1]: are they on another scale?")
    if outside:
        print(f"warning: clipped {outside:,} actions to [-1, 1]", file=sys.stderr)
    actions, ends = actions.clip(-1, 1), np.flatnonzero(episode_end) + 1
    at_home = [path.resolve() for path in paths] == [local_file(task).resolve()]
    is_d4rl = of_d4rl(task) and at_home and task.get("seed") is None
    names = printable(" + ".join(path.name for path in paths))[:300]
    label = f"{task['body'] or task['env_id']} data, not D4RL: {names}"
    if task.get("seed") is not None:
        label = f"{task['env_id'].rpartition(':')[2]} (regenerated, seed {int(task['seed'])})"
    elif is_d4rl or "/" in task["name"] and at_home:
        label = f"{task['name']} ({'D4RL' if is_d4rl else 'Minari'})"
    return content(task, observations, actions, rewards, terminals, ends, label, is_d4rl, sources)


def content(task, observations, actions, rewards, terminals, ends, label: str, is_d4rl: bool, sources: list) -> dict:
    """dataset.pt from NumPy arrays, with what is computed from them: horizon, returns, standardisation, digest."""
    starts = np.concatenate([[0], ends[:-1]])
    returns, total = np.add.reduceat(rewards, starts, dtype=np.float64), np.cumsum(rewards, dtype=np.float64)
    to_go = total[np.repeat(ends, ends - starts) - 1] - total + rewards
    cut = (ends - starts)[~terminals[ends - 1]]  # lengths of the episodes that a time limit ended; two must agree
    one = len(cut) > 1 and np.ptp(cut) == 0 and cut[0] == (ends - starts).max()
    if not task.pop("horizon_is_recorded", False) and not is_d4rl and one and cut[0] < task["horizon"]:
        task["horizon"] = int(cut[0])
    if task["horizon"] != HORIZON and task["body"] != "maze2d":
        print(f"{label}: rollouts are episodes of at most {task['horizon']:,} steps")
    if (longest := int((ends - starts).max())) > task["horizon"]:
        print(f"warning: {label}: episodes of up to {longest:,} steps, rollouts of fewer", file=sys.stderr)
    if len(ends) > 1 and np.ptp(returns) == 0:
        print(f"warning: {label}: all returns are {returns[0]:g}: there is nothing to align", file=sys.stderr)
    if "rtg_scale" not in task:
        task["rtg_scale"] = 10.0 ** max(0, math.floor(math.log10(max(np.abs(returns).max(), 1))))
    own_range = (float((to_go / task["rtg_scale"]).min()), float((to_go / task["rtg_scale"]).max()))
    if max(map(abs, own_range)) > 1e6:
        fail(f"{label}: returns-to-go of up to {max(map(abs, own_range)):.3g} x {task['rtg_scale']:g} are too large")
    if not is_d4rl or task["body"] == "maze2d":
        task["rtg_range"] = own_range
        if task["body"] not in ("antmaze", "maze2d"):
            best = float(returns.max())
            task["targets"] = (best, best + 0.2 * abs(best)) if best else (best,)
    elif known := dict(zip(QUALITIES, D4RL_RETURNS.get(task["body"], ()))).get(task["quality"]):
        if not np.allclose(known, (returns.min(), returns.max()), atol=0.02):
            ours = f"returns from {returns.min():.2f} to {returns.max():.2f}, D4RL's from {known[0]} to {known[1]}"
            print(f"warning: {label}: {ours}: is this another file?", file=sys.stderr)
            label = f"{task['name']} (other returns than D4RL's)"
    mean, std = observations.mean(axis=0, dtype=np.float64), observations.std(axis=0, dtype=np.float64)
    scale = np.where(std < 1e-6 * np.maximum(1, np.abs(mean)), 1.0, std + 1e-6)  # a constant column stays as it is
    arrays = dict(observations=observations, actions=actions, rewards=rewards, terminals=terminals, ends=ends)
    digests = [hashlib.sha256(np.ascontiguousarray(x)).digest() for x in arrays.values()]
    digest = hashlib.sha256(b"".join(digests)).hexdigest()[:16]
    fields = {name: task[name] for name in Task.__dataclass_fields__ if name in task}
    task = Task(**fields, label=label, is_d4rl=is_d4rl, digest=digest, sources=sources)
    arrays |= dict(obs_mean=mean.astype(np.float32), obs_std=scale.astype(np.float32))
    tensors = {name: torch.from_numpy(x).contiguous() for name, x in arrays.items()}
    return dict(stage="prepare", format=FORMAT, task=asdict(task)) | tensors


# ---- dataset.pt ----


def source(path: Path) -> dict:
    """What dataset.pt remembers of a file it was made from."""
    if not path.is_file():
        fail(f"{path}: {'not a regular file' if path.exists() else 'No such file'}; check --env and --dataset-path")
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    status = path.stat()
    return dict(name=printable(path.name, 100), size=status.st_size, time=status.st_mtime_ns, sha256=digest)


def prepare(env: str, dataset_path: tuple[str, ...] = (), runs_dir: str = "runs") -> dict:
    """The content of --env's dataset.pt, made if it is missing or if its files have changed; exits 2 on bad data."""
    task = parse_env(env)
    folder = Path(runs_dir) / f"{env.replace('/', '--')}__data"
    path, paths = folder / "dataset.pt", [Path(p) for p in dataset_path]
    if not paths and env != "maze2d-mini" and (local_file(task).is_file() or not path.exists()):
        paths = [local_file(task)]
    if os.path.lexists(path) and (there := current(path, paths)):
        return there
    if not dataset_path and paths and not paths[0].is_file():
        fetch(task, paths[0])
    found = dataset(task, paths)
    with claim(folder, wait=True):
        if path.exists() and (there := current(path, paths)):  # another process has been faster
            return there
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as f:
                torch.save(found, f)  # streamed: the file is not built in memory
            os.replace(temporary, path)
        except RuntimeError as error:  # torch's for a full disk
            raise OSError(f"{temporary}: {one_line(error.__context__ or error)}") from error
        finally:
            temporary.unlink(missing_ok=True)
    rows, episodes, sha = len(found["rewards"]), len(found["ends"]), found["task"]["sources"][0]["sha256"][:16]
    print(f"{path}: {found['task']['label']}, {rows:,} transitions, {episodes:,} episodes, sha256 {sha}...")
    return found


def current(path: Path, paths: list[Path]) -> dict | None:
    """The content of dataset.pt if it holds the data of these files (none at hand: it is taken as it is).

    None where they have changed. Exits 2 if it holds other data, or if runs made from the old data are in the folder.
    """
    content = load_checkpoint(path, "prepare")
    try:
        sources = Task(**content["task"]).sources
        there = [{k: x for k, x in old.items() if isinstance(x, str | int)} for old in sources]
    except (ArithmeticError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        fail(f"{path}: not a whole dataset ({one_line(error)}); remove it, and it is made again")
    names = [printable(p.name, 100) for p in paths]
    if paths and names != [old.get("name") for old in there]:
        other = " + ".join(str(old.get("name")) for old in there) or content["task"]["label"]
        fail(f"{path} holds data of {other}, not {' + '.join(names)}; choose another --runs-dir, or remove it")
    for p, old in zip(paths, there):
        if p.is_file() and (p.stat().st_size, p.stat().st_mtime_ns) == (old.get("size"), old.get("time")):
            continue
        if source(p)["sha256"] != old.get("sha256"):
            runs = f"{glob.escape(path.parent.name.removesuffix('data'))}*/*.pt"
            if files := [x for x in path.parents[1].glob(runs) if x != path]:
                fail(f"{p} has changed since {path} was made, and {files[0]} is of the old data; another --runs-dir?")
            return None
    return content


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    task = prepare(args.env, args.dataset_path, args.runs_dir)["task"]
    print(f"{task['name']}: {task['env_id']}, {task['horizon']:,} steps, ready")


if __name__ == "__main__":
    run(main)
