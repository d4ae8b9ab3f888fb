"""results/run_studies.py: what is compared, what is run and shared, resuming, failing runs, bad input, tables."""

import csv
import importlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import filelock
import h5py
import numpy as np
import pytest
import run_studies as studies
import torch
from conftest import ROOT, Forked, call

ENV = "hopper-medium-tiny"
CRITIC = "--device cpu --critic-width 8 --total-steps 5"
TRAIN = (
    "--device cpu --precision fp32 --critic-width 8 --embed-dim 8 --n-layer 1 --n-head 1 --context-len 2 "
    "--batch-size 4 --total-steps 5 --eval-every 0"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """20 episodes of noise in Hopper's dimensions."""
    rng, path, end = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "noise.hdf5", np.arange(240) % 12 == 11
    with h5py.File(path, "w") as f:
        f["observations"], f["actions"] = rng.normal(size=(240, 11)), rng.uniform(-1, 1, (240, 3))
        f["rewards"], f["terminals"], f["timeouts"] = rng.uniform(0, 2, 240), end, np.zeros(240, bool)
    return path


@pytest.fixture
def main(monkeypatch, tmp_path):
    """run_studies.py's main() in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    return lambda *argv: call(studies, *argv)


def make_args(folder, **values) -> studies.Args:
    return studies.Args(("spearman",), runs_dir=str(folder / "runs"), results_dir=str(folder / "results"), **values)


def make_record(run, errors=(2.0,) * 12, **values) -> dict:
    """A record as a finished run leaves it; errors: achieved minus target score at each of its targets."""
    sweep = [
        dict(target_return=100.0 * i, target_score=10.0 * i, score_mean=10.0 * i + error, velocity_mean=0.1 * i)
        for i, error in enumerate(errors)
    ]
    alignment = {
        "trained_on": {"label": "hopper data, not D4RL: noise.hdf5", "is_d4rl": False, "digest": "0123"},
        "total_steps": 5000,
        "alignment_rmse": float(np.sqrt(np.mean(np.square(errors)))),
        "best_score": 99.0,
        "spearman_target_vs_real": 0.5,
        "spearman_q_vs_return": 0.25,
        "absolute_error_of_range": 0.125,
        "parameters": 1000,
        "seconds_per_action": 0.004,
        "high_targets": [dict(target_return=1150.0, score_mean=70.0), dict(target_return=1380.0, score_mean=80.0)],
        "sweep": sweep,
    }
    return {
        "definition": run.definition,
        "commands": [f"python train_qalign_dt.py --exp-name {run.name}"],
        "seconds": {"critic": None, "training": 90.0, "sweep": 3.0},
        "threads": "1",
        "critic": {"q_mean": 27.0, "return_mean": 30.0, "spearman_discounted_vs_plain_return": 0.7},
        "alignment": alignment | values,
        "alignment_best": None,  # of the records before the redesign
    }


def write_record(run, record=None) -> None:
    run.record_file.parent.mkdir(parents=True, exist_ok=True)
    run.record_file.write_text(json.dumps(record or make_record(run)))


def runs_of(study, args, data=None):
    seeds = args.seeds or studies.SEEDS[study]
    return [studies.Run(variant, seed, args, data or {}) for variant in studies.STUDIES[study] for seed in seeds]


# ---- what is compared


def test_names_that_studies_share_have_one_meaning():
    variants = {variant._replace(sweep=True) for every in studies.STUDIES.values() for variant in every}
    assert (
        len({variant.exp_name for variant in variants}) == len({variant.label for variant in variants}) == len(variants)
    )
    critics = {(variant.critic, variant.critic_flags) for variant in variants if variant.critic}
    assert len(critics) == len({name for name, _ in critics}) == 2
    first = {name: every[0] for name, every in studies.STUDIES.items()}
    own = {
        "radt": studies.RADT,
        "vdt": studies.VDT,
        "qt": studies.QT,
        "rvdt": studies.RVDT,
        "low": studies.QT,
        "tuning": studies.RADT,
    }
    assert all(one == own.get(name.partition("_")[0], studies.Q_ALIGN) for name, one in first.items() if one.sweep)
    published = ["table1", "table2", "maze2d"]
    assert [name for name, one in first.items() if not one.sweep] == published == list(studies.PUBLISHED)
    assert set(studies.STUDIES) == set(studies.CLAIMS) == set(studies.SEEDS)
    assert studies.SEEDS["components"] == (1, 2, 3) and studies.SEEDS["loss"] == (1, 2)


def test_components_are_labelled_as_in_the_sweep():
    import tyro

    import evaluate_alignment
    import train_qalign_dt

    for variant in studies.STUDIES["components"]:
        args = tyro.cli(train_qalign_dt.Args, args=variant.flags.split())
        lambda_e = 0.1 if args.lambda_e is None else args.lambda_e
        assert evaluate_alignment.method_of(lambda_e, args.conv, args.state_loss) == variant.label
        assert (variant.critic is None) == (lambda_e == 0)
    assert len(studies.STUDIES["components"]) == 5 and studies.STUDIES["lambda"][1] in studies.STUDIES["components"]


def test_definition_of_a_run_is_that_of_earlier_records():
    args = studies.Args(("loss",), critic_flags="--lr 1e-3")
    run = studies.Run(studies.STUDIES["loss"][1], 2, args, {"hopper-mini.hdf5": "b8c036218f3244d3"})
    presets = run.definition.pop("presets")  # a record says which defaults it was trained with
    assert presets["total_steps"] == 5000 and presets["lambda_e"] == 100 and presets["average"] == 0.002
    assert all(isinstance(value, int | float) for value in presets.values())
    assert run.definition == {
        "run": "hopper-mini__symmetric__2",
        "data": {"hopper-mini.hdf5": "b8c036218f3244d3"},
        "flags": "--alignment symmetric",
        "train_flags": "",
        "critic_flags": "--lr 1e-3",
        "rollouts": 10,
        "target_step": 100.0,
    }


def test_presets_are_the_values_that_the_script_has():
    for name in ("train_qalign_dt", "train_qt", "train_rvdt", "train_radt", "train_vdt"):
        module = importlib.import_module(name)
        assert studies.presets(f"{name}.py") == module.SMALL | (module.OTHER_DATA if name == "train_qalign_dt" else {})
    assert studies.presets("baselines/tune_vdt.py") == {}


def test_results_lie_under_the_name_of_their_data(tmp_path):
    for env, files, name in (
        ("hopper-mini", (), "hopper-mini"),
        ("hopper-mini", ("far/hopper_mixed-zoo.hdf5",), "hopper_mixed-zoo"),
        ("halfcheetah-medium-expert-zoo", ("a.hdf5", "b.hdf5"), "a+b"),
        ("mujoco/hopper/medium-v0", (), "mujoco--hopper--medium-v0"),
    ):
        args = make_args(tmp_path, env=env, dataset_path=files)
        assert studies.dataset_of(args) == name
        run = studies.Run(studies.Q_ALIGN, 1, args, {})
        assert run.record_file == tmp_path / "results/records" / name / f"{run.name}.json"


def test_commands_of_a_run(tmp_path):
    args = make_args(tmp_path, env=ENV, dataset_path=("a", "b"), critic_flags="--lr 0.1", train_flags="--actor-lr 0.2")
    runs, where = tmp_path / "runs", f"--env {ENV} --seed 2 --runs-dir {tmp_path}/runs"
    stages = studies.Run(studies.STUDIES["discount"][1], 2, args, {}).stages
    commands = {name: (folder.name, " ".join(command)) for name, (folder, command) in stages.items()}
    critic = f"{ENV}__pretrain_q_gamma_0.997__2"
    assert list(commands.items()) == [
        (
            "critic",
            (
                critic,
                f"pretrain_q.py --lr 0.1 --gamma 0.997 {where} --dataset-path a b --exp-name pretrain_q_gamma_0.997",
            ),
        ),
        (
            "training",
            (
                f"{ENV}__gamma_0.997__2",
                f"train_qalign_dt.py --actor-lr 0.2 {where} --dataset-path a b --exp-name gamma_0.997 "
                f"--critic {runs}/{critic}/critic.pt",
            ),
        ),
        (
            "sweep",
            (
                f"{ENV}__gamma_0.997__2",
                f"evaluate_alignment.py {where} --checkpoint {runs}/{ENV}__gamma_0.997__2/policy.pt "
                "--rollouts 10 --target-step 100.0 --percentiles",
            ),
        ),
    ]
    dt = studies.Run(studies.STUDIES["components"][1], 1, args, {}).stages
    assert list(dt) == ["training", "sweep"] and "--critic" not in dt["training"][1]
    qt = studies.Run(studies.QT, 2, args, {}).stages
    assert list(qt) == ["critic", "training", "sweep", "best", "softmax"] and qt["best"][0] == qt["training"][0]
    assert " ".join(qt["best"][1]) == (
        f"evaluate_alignment.py {where} --checkpoint {runs}/{ENV}__train_qt__2/policy.pt "
        "--rollouts 10 --high-targets --inference best"
    )
    tuned = studies.Run(studies.STUDIES["vdt_online"][3], 2, args, {}).stages
    assert list(tuned) == ["base", "training", "sweep"]
    DT = studies.DT_LAST
    assert tuned["base"] == studies.Run(DT, 2, args, {}).stages["training"]  # shared with the DT's own line
    assert " ".join(tuned["training"][1]) == (
        f"baselines/tune_vdt.py {where} --dataset-path a b --exp-name tune_dt "
        f"--checkpoint {runs}/{ENV}__dt_last_weights__2/policy.pt"
    )
    presets = [studies.Run(studies.TUNED_DT._replace(base=x), 2, args, {}).definition["presets"] for x in (None, DT)]
    assert presets == [{}, studies.Run(DT, 2, args, {}).definition["presets"]]  # a tuned run's are its base's
    radt = studies.Run(studies.RADT._replace(flags="--x 1"), 1, args, {}).stages
    assert radt["training"][1][:5] == "baselines/train_radt.py --actor-lr 0.2 --x 1".split()


# ---- runs


def make_run(folder, name, source, **stages):
    """A run whose training is a script of a few lines; `folder` and `alignment` (the file to write) are known to it."""
    run = studies.Run(studies.Variant(name, name, critic=None), 1, make_args(folder), {})
    script, run_folder = folder / f"{name}.py", stages.get("run_folder", run.stages["training"][0])
    record = folder / f"{name}.json"
    record.write_text(json.dumps(make_record(run)["alignment"]))
    prelude = f"import os, shutil, sys, time\nfolder = {str(run_folder)!r}\nos.makedirs(folder, exist_ok=True)\n"
    script.write_text(f"{prelude}{source}\nshutil.copy({str(record)!r}, folder + '/alignment.json')\n")
    run.stages = {"training": (run_folder, [str(script)])}
    return run


def test_a_failing_run_shows_its_line_and_stops_no_other(tmp_path, capfd):
    long = "print('step 1', end='\\r', file=sys.stderr); sys.exit('error: no space left')"
    runs = [
        make_run(tmp_path, "long", long),
        make_run(tmp_path, "silent", "os._exit(3)"),
        make_run(tmp_path, "killed", "os.kill(os.getpid(), 9)"),
        make_run(tmp_path, "empty", "os._exit(0)"),
        make_run(tmp_path, "good", ""),
    ]
    start = time.monotonic()
    records = studies.perform_all(runs, workers=2)
    assert list(records) == ["hopper-mini__good__1"] and time.monotonic() - start < 30
    assert records["hopper-mini__good__1"]["alignment"]["alignment_rmse"] == 2.0
    assert [file.stem for file in (tmp_path / "results/records/hopper-mini").iterdir()] == list(records)
    out, err = capfd.readouterr()
    empty, log = tmp_path / "runs/hopper-mini__empty__1", f"(log: {tmp_path}/runs/logs/hopper-mini__"
    assert sorted(err.splitlines()) == [
        f"hopper-mini__empty__1: [Errno 2] No such file or directory: '{empty}/alignment.json'",
        f"hopper-mini__killed__1: training ended with code -9: no output {log}killed__1.log)",
        f"hopper-mini__long__1: training ended with code 1: error: no space left {log}long__1.log)",
        f"hopper-mini__silent__1: training ended with code 3: no output {log}silent__1.log)",
    ]
    said = [f"hopper-mini__{name}__1: starts" for name in ("long", "silent", "killed", "empty", "good")]
    assert sorted(out.splitlines()) == sorted([*said, "hopper-mini__good__1: finished"])


def test_the_line_of_a_failure_is_of_the_last_attempt(tmp_path, capfd):
    run = make_run(tmp_path, "silent", "sys.exit(3)")
    run.log.parent.mkdir(parents=True)
    run.log.write_text("error: of yesterday\n")
    assert studies.perform_all([run], workers=1) == {}
    assert "no output" in capfd.readouterr().err and run.log.read_text("utf-8") == "error: of yesterday\n"


def test_a_terminal_gets_a_status_line(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    studies.perform_all([make_run(tmp_path, "good", "time.sleep(0.3)")], workers=1)
    assert "hopper-mini__good__1 training" in capfd.readouterr().err


def test_workers_share_cores_and_cuda_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert {share["OMP_NUM_THREADS"] for share in studies.shares(3)} == {os.environ["OMP_NUM_THREADS"]}  # the user's
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert [share["CUDA_VISIBLE_DEVICES"] for share in studies.shares(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [share["CUDA_VISIBLE_DEVICES"] for share in studies.shares(3)] == ["5", "7", "5"]
    assert {share["OMP_NUM_THREADS"] for share in studies.shares(3)} == {"2"}
    assert {share["OMP_NUM_THREADS"] for share in studies.shares(20)} == {"1"}
    ask = "print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'], os.getsid(0) == os.getpid())"
    runs = [make_run(tmp_path, f"ask_{i}", ask) for i in range(2)]
    assert [record["threads"] for record in studies.perform_all(runs, workers=2).values()] == ["3", "3"]
    assert sorted(run.log.read_text("utf-8") for run in runs) == [
        "5 3 True\n",
        "7 3 True\n",
    ]  # in sessions of their own
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert not any("CUDA_VISIBLE_DEVICES" in share for share in studies.shares(2))


def test_a_shared_folder_has_one_process_at_a_time(tmp_path):
    """As stage 1's, which several variants of a seed name."""
    source = "open(folder + '/alone', 'x').close(); time.sleep(0.3); os.remove(folder + '/alone')"
    runs = [make_run(tmp_path, name, source, run_folder=tmp_path / "shared") for name in ("one", "two", "three")]
    assert len(studies.perform_all(runs, workers=3)) == 3


def test_a_run_waits_for_a_process_that_holds_its_folder(tmp_path):
    run, environment = make_run(tmp_path, "one", ""), {**os.environ, "OMP_NUM_THREADS": "1"}
    folder, generator = run.stages["training"][0], studies.perform(run, environment, set())
    folder.mkdir(parents=True)
    with filelock.FileLock(folder / ".lock"):
        assert [next(generator) for _ in range(3)] == [f"waits for {folder}"] * 3 and not run.log.exists()
    assert next(generator) == "training"
    generator.close()


def test_a_record_of_another_process_stays(tmp_path):
    """The same command started twice: the second waits, and keeps the first one's record with its time of training."""
    run = make_run(tmp_path, "one", "")
    generator = studies.perform(run, {**os.environ, "OMP_NUM_THREADS": "1"}, set())
    assert next(generator) == "training"
    write_record(run)
    with pytest.raises(StopIteration) as end:
        while True:
            next(generator)
    assert end.value.value["seconds"]["training"] == 90.0


@pytest.mark.parametrize("git", [True, False])
def test_a_record_says_what_it_was_made_with(git, tmp_path, monkeypatch):
    if not git:
        monkeypatch.setenv("PATH", str(tmp_path))
    run = make_run(tmp_path, "one", "")
    studies.perform_all([run], workers=1)
    made = json.loads(run.record_file.read_text("utf-8"))["made_with"]
    assert made["torch"] == torch.__version__ and made["gpu"] == "none"
    cpuinfo = Path("/proc/cpuinfo")
    assert made["processor"] in platform.processor() + (cpuinfo.read_text("utf-8") if cpuinfo.exists() else "")
    found = git and shutil.which("git") and subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"]).returncode == 0
    expected = r"[0-9a-f]{7,40}(-dirty)?" if found else "unknown"
    assert re.fullmatch(expected, made["commit"])


@pytest.mark.parametrize("left", [None, "resume.pt", "policy.pt"])
def test_the_time_of_a_resumed_stage_is_unknown(left, tmp_path):
    run = make_run(tmp_path, "one", "")
    folder = run.stages["training"][0]
    run.stages["sweep"] = run.stages["training"]
    folder.mkdir(parents=True)
    if left:
        (folder / left).touch()
    record = studies.perform_all([run], workers=1)[run.name]
    assert (record["seconds"]["training"] is None) == bool(left) and record["seconds"]["sweep"] > 0
    assert (record["quantities"]["minutes of training"] is None) == bool(left)


def test_ctrl_c_ends_the_processes_and_the_same_runs_continue(tmp_path):
    source = (
        "open(folder + '/pid', 'a').write(f'{os.getpid()}\\n')\nif not os.path.exists(folder + '/go'): time.sleep(60)"
    )
    runs = [make_run(tmp_path, name, source) for name in ("one", "two", "three")]
    files = [run.stages["training"][0] / "pid" for run in runs]

    def interrupt():
        while not all(file.exists() and file.read_text("utf-8") for file in files[:2]):  # made, and written
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        studies.perform_all(runs, workers=2)
    signal.signal(signal.SIGINT, previous)
    assert time.monotonic() - start < 40 and not files[2].exists() and not (tmp_path / "results").exists()
    for file in files[:2]:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text("utf-8")), 0)
    for run in runs:
        run.stages["training"][0].mkdir(exist_ok=True)
        (run.stages["training"][0] / "go").touch()
    assert len(studies.perform_all(runs, workers=2)) == 3
    assert [len(file.read_text("utf-8").split()) for file in files] == [2, 2, 1]


def test_a_study_that_is_stopped_says_that_it_continues(tmp_path, monkeypatch):
    argv = ["run_studies.py", "spearman", "--results-dir", str(tmp_path), "--runs-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(studies, "check", lambda *_: None)
    monkeypatch.setattr(studies, "perform_all", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt) as raised:
        studies.main()
    assert raised.value.__notes__ == ["the same command continues"]


def test_interrupted_or_unreadable_is_one_line(tmp_path, patience):
    """The program itself, stopped while it reads a record that never comes; then with a folder in its place."""
    argv = [sys.executable, ROOT / "results/run_studies.py", "spearman", "--results-dir", tmp_path, "--seeds", "1"]
    argv += ["--runs-dir", tmp_path / "runs"]
    record = tmp_path / "records/hopper-mini/hopper-mini__train_qalign_dt__1.json"
    record.parent.mkdir(parents=True)
    os.mkfifo(record)
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, restore_signals=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(argv, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)
        writer = os.open(record, os.O_WRONLY)  # waits until it reads
        process.send_signal(number)
        assert process.communicate() == ("", "error: interrupted\n")
        assert process.returncode == 130
        os.close(writer)
    record.unlink()
    record.mkdir()
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "Is a directory" in done.stderr


# ---- a whole study


@pytest.fixture
def forked(monkeypatch):
    """Scripts start at once; the slow tests, and those of runs that fail, start Python itself."""
    monkeypatch.setattr(studies, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Forked}))


def test_a_study_from_data_to_table(data, main, forked, monkeypatch):
    """Q-Align DT as it is, and a DT whose folder holds something else, which fails."""
    monkeypatch.setitem(studies.STUDIES, "components", studies.STUDIES["components"][:2])
    name, bad = f"{ENV}__train_qalign_dt__1", f"{ENV}__dt__1"
    Path("runs/noise", bad).mkdir(parents=True)
    Path("runs/noise", bad, "resume.pt").write_text("not a checkpoint")
    argv = f"components --env {ENV} --dataset-path {data} --seeds 1 --workers 2 --rollouts 1".split()
    argv += ["--results-dir", "results", f"--critic-flags={CRITIC}", f"--train-flags={TRAIN}"]
    code, out, err = main(*argv)
    said = f"runs/noise/{bad}/resume.pt: damaged, or not a checkpoint of train_qalign_dt.py"
    said += f" (log: runs/noise/logs/{bad}.log)"
    assert (code, err.splitlines()) == (
        1,
        [
            f"{bad}: training ended with code 2: error: {said}",
            "error: 1 of 2 runs are missing; the same command continues",
        ],
    )
    assert out.startswith("2 runs, 0 of them finished before")
    (data_line,) = [line for line in out.splitlines() if "dataset.pt" in line]
    assert "240 transitions, 20 episodes" in data_line
    assert sorted(set(out.splitlines()[1:]) - {data_line}) == sorted(
        [f"{name}: starts", f"{bad}: starts", f"{name}: finished", "components: results/studies/noise/components.md"]
    )
    record = json.loads(Path(f"results/records/noise/{name}.json").read_text("utf-8"))
    assert record["alignment"] == json.loads(Path(f"runs/noise/{name}/alignment.json").read_text("utf-8"))
    assert record["critic"] == json.loads(Path(f"runs/noise/{ENV}__pretrain_q__1/report.json").read_text("utf-8"))
    assert all(record["seconds"][stage] > 0 for stage in ("critic", "training", "sweep"))
    scripts = [command.split()[1] for command in record["commands"]]
    assert scripts == ["pretrain_q.py", "train_qalign_dt.py", "evaluate_alignment.py"]
    text = Path("results/studies/noise/components.md").read_text("utf-8")
    assert "| quantity | Q-Align DT (seeds 1) |\n" in text and "hopper data, not D4RL: noise.hdf5" in text
    assert f"Missing: {bad}." in text and record["commands"][1] in text
    rows = list(csv.DictReader(open("results/studies/noise/components.csv")))
    assert [(row["variant"], row["seed"]) for row in rows] == [("Q-Align DT", "1")]
    assert float(rows[0]["alignment RMSE"]) == record["alignment"]["alignment_rmse"]
    assert Path("results/studies/noise/components.png").read_bytes()[:4] == b"\x89PNG"

    again = []  # the same command runs only what is missing
    monkeypatch.setattr(studies, "perform_all", lambda runs, workers: again.extend(runs) or {})
    code, out, err = main(*argv)
    assert code == 1 and out.startswith("2 runs, 1 of them finished before") and [run.name for run in again] == [bad]
    assert Path("results/studies/noise/components.md").read_text("utf-8") == text
    code, out, err = main(*argv, "--target-step", 50)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "target_step 100.0 there, 50.0 here; choose another --results-dir" in err


@pytest.mark.slow
def test_a_tuned_method_and_one_with_its_own_inference(data, main, tmp_path, monkeypatch):
    """A DT that trains first and is then tuned in the simulator, and QT, which also acts by its critic."""
    base = studies.DT._replace(flags=f"{studies.DT.flags} --eval-every 0")
    tune = "--env-steps 30 --updates 1 --eval-every 0 --eval-rollouts 1"
    variants = [studies.TUNED_DT._replace(base=base, flags=tune), studies.QT._replace(inference=("best",))]
    monkeypatch.setitem(studies.STUDIES, "vdt_online", variants)
    argv = f"vdt_online --env {ENV} --dataset-path {data} --seeds 1 --workers 2 --rollouts 1 --results-dir r".split()
    argv += [f"--critic-flags={CRITIC}", f"--train-flags={TRAIN.removesuffix(' --eval-every 0')}"]
    code, _, err = main(*argv)
    assert (code, err) == (0, "")
    tuned, qt = (
        json.loads(Path(f"r/records/noise/{ENV}__{x}__1.json").read_text("utf-8")) for x in ("tune_dt", "train_qt")
    )
    assert list(tuned["seconds"]) == ["base", "training", "sweep"]
    assert list(qt["seconds"]) == ["critic", "training", "sweep", "best"]
    assert all(x > 0 for record in (tuned, qt) for x in record["seconds"].values())
    best = json.loads(Path(f"runs/noise/{ENV}__train_qt__1/high_targets_best.json").read_text("utf-8"))
    assert (tuned["inference"], qt["inference"]) == ({}, {"best": best}) and best["inference"] == "best"
    rows = list(csv.DictReader(open("r/studies/noise/vdt_online.csv")))
    scores = [row["score, --inference best"] for row in rows]
    assert scores == ["", str(best["high_targets"][0]["score_mean"])]


def test_missing_runs_are_named_and_the_others_tabulated(main, tmp_path, monkeypatch):
    first, second = runs_of("spearman", replace(make_args(tmp_path), seeds=(1, 2)))
    write_record(first)
    monkeypatch.setattr(studies, "check", lambda *_: None)
    monkeypatch.setattr(studies, "perform_all", lambda runs, workers: {})
    shutil.copy(ROOT / "train_qalign_dt.py", tmp_path)
    monkeypatch.setattr(studies, "ROOT", tmp_path)  # where there is no data
    code, out, err = main("spearman", "--seeds", 1, 2, "--results-dir", "results")
    assert code == 1 and err == "error: 1 of 2 runs are missing; the same command continues\n"
    text = Path("results/studies/hopper-mini/spearman.md").read_text("utf-8")
    assert f"Missing: {second.name}." in text and "Q-Align DT (seeds 1) |" in text


# ---- the paper's tables, and lists of commands for other machines


def parsed(line):
    """A line of --list as its script takes it: the module and its Args."""
    import tyro

    python, script, *flags = shlex.split(line)
    assert python == "python" and Path(script).is_file()
    module = importlib.import_module(Path(script).stem)
    with pytest.MonkeyPatch.context() as patch:  # Args check themselves
        patch.setattr(sys, "argv", [script, *flags])
        return module, tyro.cli(module.Args, args=flags)


def timeless(x):
    """A record without what a clock said."""
    if isinstance(x, dict):
        return {key: timeless(value) for key, value in x.items() if "second" not in key}
    return [timeless(one) for one in x] if isinstance(x, list) else x


def test_table_1_as_commands_without_network_or_data(main, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "perform_all", None)
    code, out, err = main("table1", "--list", "--seeds", 1, 2, "--runs-dir", "of mine", "--train-flags=--device cpu")
    assert (code, err) == (0, "") and not os.listdir()  # nothing was looked for or written
    first, *waves = out.split("# wave\n")
    assert first.startswith("# 72 runs, 0 of them finished before")
    data, critics, runs = (wave.splitlines() for wave in waves)
    assert (len(data), len(critics), len(runs)) == (9, 18, 72) and len({*data, *critics, *runs}) == 99
    envs = list(studies.PUBLISHED["table1"]["values"])
    for lines, n in ((data, 1), (critics, 2), (runs, 8)):
        every = [parsed(line)[1] for line in lines[: 2 * n] + lines[-n:]]
        assert [one.env for one in every] == [env for env in (*envs[:2], envs[-1]) for _ in range(n)]
        assert {one.runs_dir for one in every} == {"of mine"}
    module, args = parsed(runs[-1])
    assert module is studies and (args.only, args.seeds, args.train_flags) == (("train_qt",), (2,), "--device cpu")
    assert not args.list and args.workers == 1
    (run,) = studies.runs_of("table1", args).values()
    scripts = [command[0] for _, command in run.stages.values()]
    assert scripts == ["pretrain_q.py", "baselines/train_qt.py"] + 3 * ["evaluate_alignment.py"]
    assert run.stages["critic"][1][1:] == shlex.split(critics[-1])[2:]  # one stage 1 for all that name it


def test_the_lines_one_after_the_other_make_the_records(data, main, forked, tmp_path, monkeypatch):
    """By --list, whose last line is a run, and by --workers: the same records; then the study writes its table."""
    monkeypatch.setitem(studies.STUDIES, "table1", studies.STUDIES["table1"][:1])
    argv = f"table1 --env {ENV} --dataset-path {data} --seeds 1 --score-rollouts 2 --results-dir results".split()
    argv += [f"--critic-flags={CRITIC}", f"--train-flags={TRAIN}"]
    record, name = {}, f"{ENV}__train_qalign_dt__1__high_targets"
    for how in ("workers", "list"):
        (tmp_path / how).mkdir()
        monkeypatch.chdir(tmp_path / how)
        if how == "list":
            _, out, _ = main(*argv, "--list")
            lines = [line for line in out.splitlines() if not line.startswith("#")]
            assert [shlex.split(line)[1] for line in lines] == [
                os.path.relpath(ROOT / file) for file in ("data/prepare.py", "pretrain_q.py", "results/run_studies.py")
            ]
            for line in lines[:2]:
                assert call(parsed(line)[0], *shlex.split(line)[2:])[0] == 0
            assert main(*shlex.split(lines[2])[2:])[0] == 0 and not Path("results/studies").exists()
            assert main(*argv, "--list")[1].splitlines()[1:] == []  # nothing is left to do
        code, out, err = main(*argv, *(["--workers", 0] if how == "list" else []))
        assert (code, err) == (0, "") and out.splitlines()[-1] == "table1: results/studies/noise/table1.md"
        record[how] = json.loads(Path(f"results/records/noise/{name}.json").read_text("utf-8"))
    assert timeless(record["list"]) == timeless(record["workers"]) and record["list"]["critic"]
    rows = record["list"]["high_targets"]["high_targets"]
    text = Path("results/studies/noise/table1.md").read_text("utf-8")
    scores = "; ".join(f"{row['score_mean']:.1f} at {row['target_return']:g}" for row in rows)
    assert len(rows) == 2 and f"| noise | Q-Align DT | - | {scores} | - | 1 | hopper data, not D4RL: noise.hdf5" in text


def test_published_numbers_stand_beside_ours(main, tmp_path, monkeypatch):
    args = replace(make_args(tmp_path), studies=("table1",), results_dir="results", runs_dir="runs")
    monkeypatch.setattr(studies, "check", None)
    runs = studies.runs_of("table1", args)
    for seed, (score, other) in enumerate(((100.0, 90.0), (104.0, 80.0)), 1):
        run = runs["hopper-medium-v2", "Q-Align DT", seed]
        rows = [dict(target_return=x, score_mean=y) for x, y in ((1800.0, score), (3600.0, other))]
        about = dict(trained_on=dict(label="hopper-medium-v2 (D4RL)", digest="0123", is_d4rl=True), total_steps=100_000)
        record = make_record(run) | {"high_targets": about | {"high_targets": rows}, "inference": {}}
        write_record(run, {key: value for key, value in record.items() if key != "alignment"})
    code, out, err = main("table1", "--workers", 0, "--results-dir", "results")
    assert code == 1 and err == "error: 178 of 180 runs are missing; the same command continues\n"
    text = Path("results/studies/table1.md").read_text("utf-8")
    ours = "102.0 ± 2.00 at 1800; 85.0 ± 5.00 at 3600 | below | 1, 2"
    data = "hopper-medium-v2 (D4RL) (0123), 100,000 gradient steps"
    assert f"| hopper-medium-v2 | Q-Align DT | 102.1 ± 0.74 | {ours} | {data} |\n" in text
    assert "| walker2d-medium-expert-v2 | DT | 108.1 | - | - | - | - |\n" in text and text.count("\n| ") == 2 + 36
    (missing,) = [line for line in text.splitlines() if line.startswith("Missing: ")]
    assert missing.count(",") == 177 and "hopper-medium-v2__train_qalign_dt__3__high_targets" in missing
    assert "| maze2d-umaze-v1 | QT | 105.4 ± 4.8 | - |" in maze2d(main, "--dataset-path", "maze2d-umaze-v1.hdf5")
    assert "| maze2d-mini | QT | - | - |" in maze2d(main)
    record["high_targets"]["total_steps"] = 5
    write_record(run, record)
    code, out, err = main("table1", "--workers", 0, "--results-dir", "results")
    assert code == 1 and "cannot compare" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "127.0.0.1:x"])
def test_a_cluster_that_does_not_answer_is_one_line(address, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())  # which is asked for nothing before
    with pytest.raises(SystemExit) as exit:
        studies.perform_on_ray([], studies.Args(("spearman",), ray=address))
    err = capsys.readouterr().err
    assert exit.value.code == 1 and err.startswith(f"error: --ray {address}: no cluster") and err.count("\n") == 1


def test_a_table_stays_where_no_run_of_it_is_found(main, tmp_path, monkeypatch):
    """Its runs may have other names: maze2d-mini's with a --dataset-path."""
    monkeypatch.setattr(studies, "check", None)
    table = tmp_path / "results/studies/maze2d-umaze-v1/maze2d.md"
    table.parent.mkdir(parents=True)
    table.write_text("of other runs")
    code, out, err = main("maze2d", "--env", "maze2d-umaze-v1", "--workers", 0, "--results-dir", "results")
    assert code == 1 and "18 of 18 runs are missing" in err and table.read_text("utf-8") == "of other runs"


def test_records_of_data_that_are_not_at_hand_make_their_table(main, tmp_path):
    args = replace(make_args(tmp_path), env="walker2d-mini")
    for seed in (1, 2):
        write_record(studies.Run(studies.Q_ALIGN, seed, args, {"walker2d-mini.hdf5": "0123"}))
    code, _, err = main(
        "spearman", "--env", "walker2d-mini", "--seeds", 1, 2, "--workers", 0, "--results-dir", "results"
    )
    assert (code, err) == (0, "")
    assert "| Q-Align DT | 2 | 2.00 |" in Path("results/studies/walker2d-mini/spearman.md").read_text("utf-8")


def test_what_agrees_with_a_published_number():
    """By hand: of 90 and 80 the mean is 85 and its standard error 5; with a deviation of 12 both have 13."""
    found = [
        studies.compare([90.0, 80.0], *published) for published in ((95,), (74.9,), (95.1,), (110.9, 12), (111.1, 12))
    ]
    assert found == ["agrees", "above", "below", "agrees", "below"]
    assert studies.compare([90.0, 80.0]) == studies.compare([90.0], 90.0) == "-"


def maze2d(main, *flags: str) -> str:
    """The table of Maze2D with one run: the small preset, and the published number of the data's name."""
    args = studies.Args(("maze2d",), "maze2d-mini", flags[1:], results_dir="results")
    run = studies.runs_of("maze2d", args)["maze2d-mini", "Q-Align DT", 1]
    about = dict(trained_on=dict(label="maze2d", digest="0123", is_d4rl=False), total_steps=5000)
    record = make_record(run) | {"high_targets": about | {"high_targets": [dict(target_return=300.0, score_mean=9.0)]}}
    write_record(run, record | {"inference": {}})
    code, out, _ = main("maze2d", "--env", "maze2d-mini", *flags, "--workers", 0, "--results-dir", "results")
    assert code == 1
    return Path(out.splitlines()[-1].partition(": ")[2]).read_text("utf-8")


def test_published_numbers_add_up():
    """Table 1's own sums; no number of Table 2 but the one that is quoted."""
    sums = {"IQL": 688.8, "TD3+BC": 677.4, "DT": 685.4, "CGDT": 741.4, "LSDT": 738, "DC": 739.8, "DM": 764.3}
    sums |= {"QT": 808.6, "QCS": 812.3, "Q-Align DT": 856.9}
    table = studies.PUBLISHED["table1"]["values"]
    for method, total in sums.items():
        assert round(sum(row[method][0] for row in table.values()), 1) == total
    assert sum("RADT" in row for row in table.values()) == 6 and len(table) == 9
    assert [len(row) for row in studies.PUBLISHED["table2"]["values"].values()] == [0, 0, 1, 0]


def test_one_version_of_each_tool():
    """What .ci/run takes is what a cluster and a commit take."""
    pins = dict(re.findall(r"^(\w+)==([\d.]+)", (ROOT / "tests/requirements-oracle.txt").read_text("utf-8"), re.M))
    assert f"\nray=={pins['ray']}\n" in (ROOT / "results/requirements-cluster.txt").read_text("utf-8")
    assert f"rev: v{pins['ruff']}\n" in (ROOT / ".pre-commit-config.yaml").read_text("utf-8")


def test_without_ray_it_says_what_to_install(main, monkeypatch):
    monkeypatch.setattr(studies, "check", lambda *_: None)
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = main("spearman", "--ray", "auto", "--seeds", 1, "--results-dir", "results")
    assert (code, err) == (2, "error: --ray needs Ray: pip install -r results/requirements-cluster.txt\n")


# ---- bad input


@pytest.mark.parametrize(
    "flags, message",
    [
        ("colours", "unknown study colours: choose from components, "),
        ("", "unknown study (none named)"),
        ("loss --workers -1", "--workers -1: must be at least 0"),
        ("loss --only dt", "--only dt: choose from squared, symmetric, train_qalign_dt"),
        ("loss --list --critic-flags=--lamda\t1", "pretrain_q.py: Unrecognized options: --lamda"),
        ("table2 --list --score-rollouts 0", "--rollouts 0: must be between 1"),
        ("loss --rollouts 0", "--rollouts 0: must be between 1"),
        ("loss --target-step nan", "--target-step nan: must be between"),
        ("loss --seeds -1", "--seed -1: must be between 0"),
        ("loss --env hoper-mini", "did you mean hopper-mini"),
        ("loss --env antmaze-umaze-v2", "there is no RTG sweep to study"),
        ("loss --dataset-path none.hdf5", "none.hdf5"),
        ("loss --results-dir {file}/x", "cannot write to {file}"),
        ("loss --runs-dir {file}/x", "cannot write to {file}"),
        ("loss --train-flags='x", "No closing quotation"),
        ("loss --critic-flags='x", "No closing quotation"),
        ("loss --train-flags=--help", "train_qalign_dt.py: --help and the like cannot be passed on"),
        ("loss --critic-flags=-h", "pretrain_q.py: --help and the like cannot be passed on"),
        ("loss --train-flags=--seed=3", "--seed cannot be passed on"),
        ("loss --train-flags=--exp_name\tx", "--exp-name cannot be passed on"),
        ("loss --train-flags=--critic\tx", "--critic cannot be passed on"),
        ("loss --critic-flags=--lamda\t1", "pretrain_q.py: Unrecognized options: --lamda"),
        ("loss --train-flags=--total-steps\tmany", "train_qalign_dt.py: Error parsing --total-steps"),
        ("components --train-flags=--no-state-loss", "--no-state-loss is for a Decision Transformer"),
        ("loss --train-flags=--device\tcuda", "no CUDA device"),
        ("loss --train-flags=--lambda-e\tNone", "train_qalign_dt.py: Error parsing --lambda-e"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(flags, message, main, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(studies, "perform_all", None)
    file = tmp_path_factory.mktemp("other") / "file"
    file.touch(0o777)
    argv = [word.replace("\t", " ").format(file=file) for word in flags.split(" ") if word]
    code, _, err = main(*argv, *([] if "--results-dir" in flags else ["--results-dir", "results"]))
    assert code == 2 and message.format(file=file) in err and len(err.splitlines()) == 1 and not os.listdir()
    assert not file.stat().st_size


@pytest.mark.parametrize(
    "change",
    [
        lambda record: "",
        lambda record: "\x00",
        lambda record: "[]",
        lambda record: "null",
        lambda record: "{}",
        lambda record: record | {"alignment": None},
        lambda record: record | {"definition": []},
        lambda record: record | {"critic": [1]},
        lambda record: record | {"commands": None},
        lambda record: record | {"seconds": {"training": "long"}},
        lambda record: record | {"alignment": record["alignment"] | {"alignment_rmse": float("nan")}},
        lambda record: record | {"alignment": record["alignment"] | {"alignment_rmse": "2"}},
        lambda record: record | {"alignment": record["alignment"] | {"sweep": []}},
        lambda record: record | {"alignment": record["alignment"] | {"high_targets": []}},
        lambda record: record | {"alignment": record["alignment"] | {"trained_on": "data"}},
        lambda record: record | {"alignment": record["alignment"] | {"total_steps": "5"}},
    ],
)
@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
def test_a_foreign_record_is_one_line(change, main, tmp_path):
    run = studies.Run(studies.Q_ALIGN, 1, make_args(tmp_path), {})
    content = change(make_record(run))
    run.record_file.parent.mkdir(parents=True)
    run.record_file.write_text(content if isinstance(content, str) else json.dumps(content))
    code, out, err = main("spearman", "--seeds", 1, "--results-dir", tmp_path / "results")
    assert code == 2 and "not a record of this program" in err and len(err.splitlines()) == 1 and not out
    assert run.record_file.name in err and not (tmp_path / "runs").exists()


# ---- tables


def test_quantities_of_a_record(tmp_path):
    run = studies.Run(studies.Q_ALIGN, 1, make_args(tmp_path), {})
    errors = [1.0, -1, 1, -1] + [2.0, 2, -2, -2, 2] + [3.0, 4, 3, -4]
    record = make_record(run, errors)
    velocities = (0, 1, 2, 3, 4, 5, 8, 7, 6, 9, 10, 11, 12)
    for row, velocity in zip(record["alignment"]["sweep"], velocities):
        row["velocity_mean"] = float(velocity)
    record["inference"] = {"best": {"high_targets": [{"score_mean": 65.0}, {"score_mean": 3.0}]}}
    wanted = np.array([row["target_score"] for row in record["alignment"]["sweep"]])
    found = studies.quantities(record)
    assert found == {
        "alignment RMSE": record["alignment"]["alignment_rmse"],
        "RMSE at the lowest third of the targets": 1.0,
        "RMSE at the middle third of the targets": 2.0,
        "RMSE at the highest third of the targets": 12.5**0.5,
        "score at the data's highest return": 70.0,  # the first of the high targets, not the best
        "score, --inference plan": None,
        "score, --inference best": 65.0,
        "score, --inference softmax": None,
        "slope of achieved by target score": pytest.approx(np.polyfit(wanted, wanted + errors, 1)[0]),
        "Spearman of target and return": 0.5,
        "Spearman of target and velocity": pytest.approx(1 - 6 * (2**2 + 2**2) / (13 * (13**2 - 1))),
        "Spearman of Q and return": 0.25,
        "Spearman of Q and discounted return": None,
        "data: Spearman of discounted and plain return": 0.7,
        "critic: mean Q / mean return": 0.9,
        "absolute error of seven targets, in % of their range": 12.5,
        "minutes of training": 1.5,
        "parameters of the policy": 1000,
        "milliseconds per action": 4.0,
    }
    record |= {"critic": None, "seconds": {"training": None}}
    for name in ("absolute_error_of_range", "parameters", "seconds_per_action"):  # of records before --percentiles
        del record["alignment"][name]
    for row in record["alignment"]["sweep"]:
        row["velocity_mean"] = 1.0
    unknown = {name for name, value in studies.quantities(record).items() if value is None}
    gone = ("critic", "data:", "minutes", "absolute", "parameters", "milliseconds", "plan", "softmax")
    assert unknown == {name for name in found if any(part in name for part in gone)} | {
        "Spearman of target and velocity",
        "Spearman of Q and discounted return",
    }
    record["critic"] = {"q_mean": None, "return_mean": None}  # no return of the data is known
    assert studies.quantities(record)["critic: mean Q / mean return"] is None


def test_the_score_at_the_datas_highest_return(tmp_path):
    """On D4RL's data, whose high targets are the release's, it is the end of the sweep; in a maze there is none."""
    run, name = studies.Run(studies.Q_ALIGN, 1, make_args(tmp_path), {}), "score at the data's highest return"
    high = [dict(target_return=x, score_mean=x / 10) for x in (500.0, 1300.0, 4000.0)]  # the sweep ends at 1100
    trained_on = {"label": "hopper-medium-v2 (D4RL)", "is_d4rl": True, "digest": "0"}
    record = make_record(run, high_targets=high, trained_on=trained_on)
    assert studies.quantities(record)[name] == record["alignment"]["sweep"][-1]["score_mean"] not in (50, 130, 400)
    record["alignment"]["trained_on"]["is_d4rl"] = False
    assert studies.quantities(record)[name] == 50.0
    record["definition"]["run"] = "maze2d-mini__train_qalign_dt__1"
    assert studies.quantities(record)[name] is None


def test_cells_have_the_mean_and_scipys_interval():
    assert studies.cell([2.0, 4.0]) == "3.00 [2.00, 4.00]" and studies.cell([2.0, 4.0], digits=1) == "3.0 [2.0, 4.0]"
    assert studies.cell([1.0]) == "1.00" and studies.cell([2.0, 2.0]) == "2.00" and studies.cell([None, 1.5]) == "1.50"
    assert studies.cell([314126.0]) == "314,126" and studies.cell([None, None]) == "-"
    values, rng = [1.0, 2.0, 4.0, 8.0, 16.0], np.random.default_rng(1)
    means = rng.choice(values, (100_000, 5)).mean(axis=1)
    low, high = map(float, studies.cell(values).partition("[")[2].partition("]")[0].split(", "))
    assert abs(low - np.quantile(means, 0.025)) < 0.2 and abs(high - np.quantile(means, 0.975)) < 0.3


def test_finished_runs_are_tabulated_without_running_anything(main, tmp_path, monkeypatch):
    """Two studies that share runs, from records alone; from another folder than the runs'."""
    monkeypatch.setattr(studies, "check", None)
    shutil.copy(ROOT / "train_qalign_dt.py", tmp_path)
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    for i, run in enumerate(runs_of("loss", make_args(tmp_path)) + runs_of("spearman", make_args(tmp_path))[2:]):
        write_record(run, make_record(run, [i + 1.0] * 12))
    code, out, err = main("loss", "spearman", "--results-dir", "results")
    assert code == 0 and not err and out.startswith("7 runs, 7 of them finished before")
    assert out.splitlines()[1:] == [
        f"{study}: results/studies/hopper-mini/{study}.md" for study in ("loss", "spearman")
    ]
    text = Path("results/studies/hopper-mini/loss.md").read_text("utf-8")
    assert text.startswith("# loss: the symmetric penalty is unstable") and "12 target returns, 10 rollouts" in text
    heads = "| quantity | Q-Align DT (seeds 1, 2) | symmetric (seeds 1, 2) | squared (seeds 1, 2) |"
    assert f"\n\n{heads}\n| --- | --- | --- | --- |\n| weights | of the last step |" in text
    row = next(line for line in text.splitlines() if line.startswith("| alignment RMSE |"))
    assert row.split(" | ")[1:3] == ["1.50 [1.00, 2.00]", "3.50 [3.00, 4.00]"]
    assert "\n| Q-Align DT | 2 | 2.00 | 70.00 |\n| symmetric | 1 | 3.00 | 70.00 |\n" in text  # seed by seed
    assert "Spearman of Q and discounted return" not in text  # no record has it
    assert "best score" not in text and "hopper-mini__squared__1\n" in text and "squared__2\n" not in text
    rows = list(csv.reader(open("results/studies/hopper-mini/loss.csv")))
    assert len({len(row) for row in rows}) == 1 and "score, --inference plan" in rows[0]  # commas in names are quoted
    assert [row[:3] for row in rows][:3] == [["variant", "seed", "alignment RMSE"], ["Q-Align DT", "1", "1.0"]] + [
        ["Q-Align DT", "2", "2.0"]
    ]
    for flags in (["--rollouts", 5], ["--train-flags=--actor-lr 1"], ["--critic-flags=--lr 1"]):
        code, out, err = main("loss", "--results-dir", "results", *flags)
        assert (code, out, len(err.splitlines())) == (2, "", 1) and "here; choose another --results-dir" in err
    assert "(seeds 1, 2, 3)" in Path("results/studies/hopper-mini/spearman.md").read_text("utf-8")


def test_runs_of_other_data_or_length_are_not_put_into_one_table(main, tmp_path, monkeypatch):
    shutil.copy(ROOT / "train_qalign_dt.py", tmp_path)
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    first, second = runs_of("spearman", replace(make_args(tmp_path), seeds=(1, 2)))
    other_data = make_record(first)["alignment"]["trained_on"] | {"digest": "4567"}
    for change in ({"total_steps": 6000}, {"trained_on": other_data}):
        write_record(first)
        write_record(second, make_record(second, **change))
        code, _, err = main("spearman", "--seeds", 1, 2, "--results-dir", "results")
        assert code == 1 and "cannot compare" in err and len(err.splitlines()) == 1
    assert os.listdir("results") == ["records"]


def test_whose_weights_were_evaluated_is_said(main, tmp_path, monkeypatch):
    shutil.copy(ROOT / "train_qalign_dt.py", tmp_path)
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    first, second = runs_of("spearman", replace(make_args(tmp_path), seeds=(1, 2)))
    for average, said in ((0.002, "averaged (--average 0.002)"), (0, "averaged (--average 0.002) or of the last step")):
        write_record(first, make_record(first, average=0.002))
        write_record(second, make_record(second, average=average))
        assert main("spearman", "--seeds", 1, 2, "--results-dir", "results")[0] == 0
        assert f"| weights | {said} |\n" in Path("results/studies/hopper-mini/spearman.md").read_text("utf-8")


def test_plot_has_a_panel_per_variant_with_mean_range_and_diagonal(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    args = replace(make_args(tmp_path), seeds=(1, 2))
    first, again, second = runs_of("loss", args)[:3]  # two seeds of the first, one of the second
    records = {("Q-Align DT", 1): make_record(first, [1.0] * 12), ("Q-Align DT", 2): make_record(again, [2.0] * 12)}
    records |= {(f"DT, {i}", 1): make_record(second, [4.0] * 12) for i in range(4)}
    assert studies.plot(records, "noise")[:4] == b"\x89PNG"
    (figure,) = figures
    assert figure.get_suptitle() == "Achieved against requested return, noise, 1 to 2 seeds"
    assert figure.get_size_inches()[0] * 100 == 1000 and len(figure.axes) == 6 and not figure.axes[5].axison
    panel, other = figure.axes[:2]
    assert panel.get_title() == "Q-Align DT\nRMSE 1.5 [1.0, 2.0]" and other.get_title() == "DT, 0\nRMSE 4.0"
    diagonal, mean = panel.get_lines()
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 110]
    assert list(mean.get_xdata())[:2] == [0, 10] and list(mean.get_ydata())[:2] == [1.5, 11.5]
    band = panel.collections[0].get_paths()[0].vertices
    assert {y for x, y in band if x == 50} == {51, 52}
    assert mean.get_color() == studies.COLOURS["Q-Align DT"] and other.get_lines()[1].get_color() == "#000000"
    assert panel.get_xlim() == other.get_xlim() and panel.get_ylim() == other.get_ylim()


def test_a_method_has_one_colour_everywhere():
    assert len(set(studies.COLOURS.values())) == 6  # RDT is a variant of RVDT
    labels = [variant.label for variant in studies.STUDIES["neighbours"] if variant != studies.DT_LAST]
    assert [*labels, "RDT"] == list(studies.COLOURS)  # and one order
