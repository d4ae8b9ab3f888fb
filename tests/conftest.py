"""What the tests share: tiny data, tiny runs (made once), and a stage's command line called in this process."""

import contextlib
import importlib
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

# whatever the user's shell says: a pool of threads does not survive a fork, and tiny sizes gain nothing from one
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
if "cuda" not in sys.argv:  # as in -m cuda; it survives no fork, and torch's optimisers open it on the CPU, too
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
for name in ("COLUMNS", "PYTHONWARNINGS"):  # they break the lines that scripts print, and add to them
    os.environ.pop(name, None)

import gymnasium
import h5py
import numpy as np
import pytest
import torch

try:
    import mujoco  # noqa: F401
except Exception:  # MUJOCO_GL names a renderer that is not here: nothing but --video needs one
    os.environ["MUJOCO_GL"] = "disable"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background, where children then ignore Ctrl-C, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
FORK = multiprocessing.get_context("fork")
ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [str(ROOT / name) for name in (".", "data", "results", "baselines", "tests")]
sys.path[:0] = FOLDERS

ENV = "hopper-medium-tiny"
TINY1 = "--device cpu --critic-width 16 --total-steps 30 --batch-size 32".split()
TINY2 = (
    "--device cpu --precision fp32 --critic-width 16 --embed-dim 16 --n-layer 1 --n-head 2 --context-len 4 "
    "--batch-size 8 --total-steps 30 --eval-rollouts 1 --eval-every 0"
).split()


def argv(data, runs, *extra) -> list[str]:
    """A command line for stage 1 or 2 on hopper_file; a flag given twice counts where it is last."""
    return [str(x) for x in ("--env", ENV, "--dataset-path", data, "--runs-dir", runs, *extra)]


def data_of(env: str, *files):
    """The data of an --env, through a runs folder of their own, as stage 2 holds them."""
    import prepare

    import train_qalign_dt as stage2

    with tempfile.TemporaryDirectory() as runs:
        return stage2.Dataset(prepare.prepare(env, tuple(map(str, files)), runs))


def task_of(env: str):
    """The task that an --env name alone stands for; digest, label and what the data decide are stand-ins."""
    import prepare

    import train_qalign_dt as stage2

    known = prepare.parse_env(env)
    known |= dict(rtg_range=(0.0, 4.0), targets=(1.0, 2.0), label="test", is_d4rl=False, digest="0", sources=[])
    return stage2.Task(**{name: known[name] for name in stage2.Task.__dataclass_fields__})


def by_hand(obs, act, rewards, terminals, ends, **task):
    """A Dataset of NumPy arrays, standardised as data/prepare.py does; task: fields that differ from hopper-mini's."""
    import train_qalign_dt as stage2

    task = vars(task_of("hopper-mini")) | dict(obs_dim=obs.shape[1], act_dim=act.shape[1], label="by hand") | task
    arrays = dict(observations=obs, actions=act, rewards=rewards, terminals=terminals, ends=ends)
    tensors = {name: torch.as_tensor(x) for name, x in arrays.items()}
    tensors |= dict(obs_mean=torch.as_tensor(obs.mean(axis=0, dtype=np.float64)).float())
    tensors |= dict(obs_std=torch.as_tensor(obs.std(axis=0, dtype=np.float64) + 1e-6).float())
    return stage2.Dataset(tensors | {"task": task})


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def tree(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder with its content."""
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def call(stage, *argv) -> tuple[int, str, str]:
    """A script's run(main), or main, with a command line, in this process: exit code, stdout, stderr."""
    run = getattr(stage, "run", lambda main: main())
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    code = 0
    with mock.patch.object(sys, "argv", [f"{stage.__name__}.py", *map(str, argv)]):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                run(stage.main)
            except SystemExit as exit:
                code = exit.code or 0
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return code, *texts


class Forked:
    """As subprocess.Popen([python, script, *flags], ...), forked from this process, which has imported torch already.

    The script is __main__ and finds none of this project's modules imported or on sys.path.
    """

    def __init__(self, command, stdout=None, stderr=None, before=lambda: None, **options):
        for name in ("matplotlib.figure", "scipy.stats", "torch.utils.tensorboard"):  # what scripts import late
            importlib.import_module(name)
        self.files = [tempfile.TemporaryFile() if x == subprocess.PIPE else x for x in (stdout, stderr)]
        self.process = FORK.Process(target=self.run, args=([str(x) for x in command[1:]], before), kwargs=options)
        self.process.start()
        self.pid, self.kill, self.terminate = self.process.pid, self.process.kill, self.process.terminate

    def run(self, argv, before, cwd=".", env=None, start_new_session=False, **_):
        if start_new_session:
            os.setsid()
        for number, file in enumerate(self.files, 1):
            os.dup2(file.fileno() if file else os.open(os.devnull, os.O_WRONLY), number)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")
        for name, module in list(sys.modules.items()):
            if os.path.dirname(getattr(module, "__file__", None) or "") in FOLDERS:
                del sys.modules[name]
        for name in [name for name, spec in gymnasium.registry.items() if "qalign_mazes" in f"{spec.entry_point}"]:
            del gymnasium.registry[name]
        sys.path[:] = [str(Path(argv[0]).parent), *(x for x in sys.path if x not in FOLDERS)]
        os.chdir(cwd)
        os.environ.update(env or {})
        sys.argv = argv
        before()
        runpy.run_path(argv[0], run_name="__main__")

    def poll(self) -> int | None:
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout=None) -> int | None:
        self.process.join(timeout)
        return self.poll()

    def communicate(self, timeout=None) -> list[str | None]:
        assert self.wait(timeout) is not None
        return [file and (file.seek(0), file.read().decode())[1] for file in self.files]

    def send_signal(self, number) -> None:
        os.kill(self.pid, number)


def write_hdf5(path, observations, actions, rewards, terminals, timeouts):
    columns = dict(observations=observations, actions=actions, rewards=rewards, terminals=terminals, timeouts=timeouts)
    with h5py.File(path, "w") as f:
        for key, x in columns.items():
            f[key] = x
    return path


def record(env_id: str, episodes: int, limit: int, seed: int = 0) -> tuple:
    """Random actions in Gymnasium's environment, in D4RL's layout; episodes longer than `limit` end by timeout."""
    import train_qalign_dt as stage2

    env = stage2.make_env(env_id)
    rng, rows = np.random.default_rng(seed), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        for t in range(limit):
            action = rng.uniform(-1, 1, env.action_space.shape[0]).astype(np.float32)
            following, reward, terminated, _, _ = env.step(action)
            rows.append((obs, action, reward, terminated, t == limit - 1 and not terminated))
            obs = following
            if terminated:
                break
    columns = [np.array(x) for x in zip(*rows)]
    return tuple(x.astype(np.float32) for x in columns[:3]) + tuple(columns[3:])


@pytest.fixture
def patience():
    """What waits for ever fails after a minute."""

    def hang(*_):
        pytest.fail("waits for ever")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def hopper_arrays():
    return record("Hopper-v4", episodes=60, limit=20)


@pytest.fixture(scope="session")
def hopper_file(tmp_path_factory, hopper_arrays):
    assert hopper_arrays[3].any() and hopper_arrays[4].any()  # both kinds of episode end are in it
    return write_hdf5(tmp_path_factory.mktemp("data") / "hopper_tiny.hdf5", *hopper_arrays)


@pytest.fixture(scope="session")
def antmaze_arrays():
    """A point that walks to a goal, in AntMaze's dimensions; up to 30 steps, reward 1 and terminal at the goal."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(40):
        x = rng.uniform(0, 2, 2)
        for t in range(30):
            action = rng.uniform(-1, 1, 8)
            obs = np.concatenate([x, rng.normal(size=27)])
            x = x + 0.3 * np.abs(action[:2])
            goal = bool((x > 4).all())
            rows.append((obs, action, float(goal), goal, t == 29 and not goal))
            if goal:
                break
    columns = [np.array(x) for x in zip(*rows)]
    return tuple(x.astype(np.float32) for x in columns[:3]) + tuple(columns[3:])


@pytest.fixture(scope="session")
def antmaze_file(tmp_path_factory, antmaze_arrays):
    return write_hdf5(tmp_path_factory.mktemp("data") / "antmaze_tiny.hdf5", *antmaze_arrays)


@pytest.fixture(scope="session")
def run_main():
    """Run a stage's run(main) with a command line; returns exit code, stdout, stderr."""
    return call


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory, hopper_file):
    """The three stages, one after the other, and a DT to compare with. Tests read these runs, and never write them."""
    import evaluate_alignment as stage3
    import pretrain_q as stage1
    import train_qalign_dt as stage2

    runs = tmp_path_factory.mktemp("runs")
    dt = ["--lambda-e", 0, "--no-conv", "--no-state-loss", "--exp-name", "dt"]
    outputs = {
        "stage 1": call(stage1, *argv(hopper_file, runs, *TINY1)),
        "stage 2": call(stage2, *argv(hopper_file, runs, *TINY2, "--eval-every", 15)),
        "stage 3": call(stage3, "--env", ENV, "--runs-dir", runs, "--rollouts", 2, "--device", "cpu"),
        "dt": call(stage2, *argv(hopper_file, runs, *TINY2, *dt)),
    }
    for stage, (code, _, err) in outputs.items():
        assert code == 0, f"{stage}: {err}"
    folder = runs / f"{ENV}__train_qalign_dt__1"
    files = dict(folder=folder, policy=folder / "policy.pt", resume=folder / "resume.pt")
    files |= dict(critic=runs / f"{ENV}__pretrain_q__1" / "critic.pt", dt=runs / f"{ENV}__dt__1" / "policy.pt")
    return SimpleNamespace(runs=runs, outputs=outputs, **files)
