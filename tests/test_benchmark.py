"""benchmark.py: what is run and shared, resuming, failing runs, tables."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import benchmark
import numpy as np
import pytest
from conftest import TINY1, TINY2

ROOT, ENV = Path(benchmark.__file__).parent, "hopper-medium-tiny"
CRITIC, TRAIN = " ".join(TINY1), " ".join(TINY2)


def command(folder, data, *studies_and_flags, train=TRAIN):
    argv = [*studies_and_flags, "--env", ENV, "--dataset-path", data, "--runs-dir", folder / "runs", "--rollouts", 1]
    argv += ["--results-dir", folder / "results", f"--critic-flags={CRITIC}", f"--train-flags={train}", "--workers", 2]
    return [sys.executable, str(ROOT / "benchmark.py"), *map(str, argv)]


def fake_record(rmse, best, seed, steps=10):
    sweep = [
        {
            "target_return": 320.0 * i,
            "target_score": 10.0 * i,
            "score_mean": 10.0 * i + (rmse if i < 3 else 99.0),
            "velocity_mean": (0, 1, 2, 3, 4, 5, 8, 7, 6)[i],
        }
        for i in range(9)
    ]
    alignment = {
        "alignment_rmse": rmse, "best_score": best, "high_targets": [{"score_mean": best - 9}, {"score_mean": best - 1}], "sweep": sweep, "seed": seed,
        "spearman_target_vs_real": 0.5, "spearman_q_vs_return": None, "trained_on": {"label": "data", "hash": "a"}, "total_steps": steps,
    }  # fmt: skip
    critic = {"q_mean": 270.0, "return_mean": 300.0}
    seconds, commands = {"training": 90.0}, [f"seed {seed}"]
    return {"alignment": alignment, "alignment_best": None, "critic": critic, "seconds": seconds, "commands": commands}


def test_table_has_every_seed_the_mean_an_interval_and_paired_comparisons(tmp_path):
    records = {
        "Q-Align DT": {1: fake_record(2.0, 90.0, 1), 2: fake_record(4.0, 80.0, 2)},
        "DT": {1: fake_record(30.0, 95.0, 1), 2: fake_record(3.0, 70.0, 2), 3: fake_record(9.0, 1.0, 3)},
    }
    lines = benchmark.table("Q-Align DT", records)
    assert lines[0] == "| | Q-Align DT (seeds 1, 2) | DT (seeds 1, 2, 3) |"
    cells = {row.split(" | ")[0].strip("| "): row.strip(" |").split(" | ")[1:] for row in lines[2:]}
    assert cells["alignment RMSE"] == [
        "**3.00** [2.00, 4.00] (2.00, 4.00)",
        "**14.00** [3.00, 30.00] (30.00, 3.00, 9.00)",
    ]
    assert cells["minutes of training"][1] == "**1.50** (1.50, 1.50, 1.50)"
    # seed 3 has no partner; RMSE is higher with seed 1 only, the best score lower with seed 2 only
    assert lines[-1] == "DT against Q-Align DT: RMSE higher in 1, best score lower in 1 of 2 seeds."
    assert benchmark.interval([1.0]) == benchmark.interval([2.0, 2.0]) == ""
    assert cells["best score at a high target"][0].startswith("**84.00**") and "best checkpoint: RMSE" not in cells
    assert cells["critic: mean Q / mean return"][0].startswith("**0.90**")
    assert cells["Spearman of target and velocity"][0].startswith("**0.93**")  # 1 - 6 (2^2 + 2^2) / (9 (9^2 - 1))
    assert cells["RMSE at the lowest third of the targets"] == cells["alignment RMSE"]  # of these made-up records
    del records["Q-Align DT"]  # without the baseline there is nothing to compare with
    assert "against" not in "".join(benchmark.table("Q-Align DT", records | {"DT + conv": records["DT"]}))


def test_unknown_values_keep_their_seeds_place_and_unpaired_seeds_are_not_compared():
    records = {
        "Q-Align DT": {1: fake_record(2.0, 90.0, 1), 2: fake_record(4.0, 80.0, 2)},
        "DT": {3: fake_record(5.0, 70.0, 3)},
    }
    records["Q-Align DT"][1]["seconds"] = {}
    for record in records["DT"].values():  # no return was known: every episode ends by timeout and gamma is near 1
        record["critic"] = {"q_mean": None, "return_mean": None, "spearman_discounted_vs_plain_return": 0.7}
    lines = benchmark.table("Q-Align DT", records)
    assert "| minutes of training | **1.50** (-, 1.50) | **1.50** (1.50) |" in lines
    assert "| data: Spearman of discounted and plain return | - | **0.70** (0.70) |" in lines
    assert "| critic: mean Q / mean return | **0.90** (0.90, 0.90) | - |" in lines
    assert not any("against" in line for line in lines)


def test_pairs_count_the_seeds_in_which_a_variant_is_worse():
    ours = {seed: fake_record(5.0, 90.0, seed) for seed in (1, 2, 3)}
    theirs = {1: fake_record(6.0, 91.0, 1), 2: fake_record(7.0, 80.0, 2), 3: fake_record(4.0, 92.0, 3)}
    lines = benchmark.table("Q-Align DT", {"Q-Align DT": ours, "DT": theirs})
    assert lines[-1] == "DT against Q-Align DT: RMSE higher in 2, best score lower in 1 of 3 seeds."


def test_a_variant_may_have_a_critic_of_its_own():
    args = benchmark.Args(("discount",), critic_flags="--lr 0.001", runs_dir="r")
    run = benchmark.Run(benchmark.STUDIES["discount"].variants["gamma 0.997"], 2, args)
    plain = benchmark.Run(benchmark.Q_ALIGN, 2, args)
    assert run.definition()["critic_flags"] == "--lr 0.001 --gamma 0.997" != plain.definition()["critic_flags"]
    critic, training = (command for what, command in run.stages() if what in ("critic", "training"))
    name = critic[critic.index("--exp-name") + 1]
    assert critic[critic.index("--gamma") + 1] == "0.997" and name != "pretrain_q"
    folder = Path("r", f"hopper-mini__{name}__2")
    assert training[training.index("--critic") + 1] == str(folder / "critic.pt") and run.critic == folder
    assert "--critic" not in plain.stages()[1][1] and plain.critic == Path("r", "hopper-mini__pretrain_q__2")


def test_runs_of_other_data_or_length_are_not_put_into_one_table(tmp_path, capsys):
    records = {"Q-Align DT": {1: fake_record(2.0, 90.0, 1), 2: fake_record(4.0, 80.0, 2, steps=11)}}
    args = benchmark.Args(("spearman",), results_dir=str(tmp_path))
    with pytest.raises(SystemExit):
        benchmark.summarise("spearman", args, records, [])
    assert "different data or gradient steps" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_bootstrap_interval_is_scipys_percentile_one():
    values = [1.0, 2.0, 4.0, 8.0, 16.0]
    rng = np.random.default_rng(1)
    means = rng.choice(values, (100_000, 5)).mean(axis=1)
    low, high = map(float, benchmark.interval(values).strip(" []").split(", "))
    assert abs(low - np.quantile(means, 0.025)) < 0.2 and abs(high - np.quantile(means, 0.975)) < 0.3


def test_a_critic_belongs_to_every_run_but_those_without_alignment_loss():
    args = benchmark.Args(("lambda",), train_flags="--lambda-e 0.3")
    names = lambda flags: [what for what, _ in benchmark.Run(benchmark.Variant("x", flags), 1, args).stages()]  # noqa: E731
    assert names("--lambda-e 0") == names("--lambda-e 0.0 --no-conv") == names("--lambda-e 0.1 --lambda-e 0")
    assert "critic" not in names("--lambda-e 0") and names("--lambda-e 0.005")[0] == names("")[0] == "critic"


def test_runs_that_studies_share_have_one_name_and_every_name_one_meaning():
    meaning = {}
    for study in benchmark.STUDIES.values():
        for variant in study.variants.values():
            assert meaning.setdefault(variant.exp_name, variant) == variant
    critics = {variant.critic: variant.critic_flags for variant in meaning.values()}
    assert all(critics[variant.critic] == variant.critic_flags for variant in meaning.values()) and len(critics) == 2
    assert len(meaning) > 15 and all(
        next(iter(s.variants.values())) == benchmark.Q_ALIGN for s in benchmark.STUDIES.values()
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, hopper_file):
    """The study of the components with one seed; one of its runs is sabotaged: its folder holds something else."""
    folder = tmp_path_factory.mktemp("benchmark")
    bad = folder / "runs" / f"{ENV}__dt__1"
    bad.mkdir(parents=True)
    (bad / "resume.pt").write_bytes(b"not a checkpoint")
    return folder, subprocess.run(
        command(folder, hopper_file, "components", "--seeds", 1), capture_output=True, text=True
    )  # fmt: skip


def test_a_failed_run_is_reported_and_the_others_go_on(finished):
    folder, done = finished
    assert done.returncode == 1, done.stderr
    assert (
        f"{ENV}__dt__1: training ended with code 2: error: " in done.stderr
        and "not a readable checkpoint" in done.stderr
    )
    assert "1 of 4 runs are missing; the same command goes on" in done.stderr.splitlines()[-1]
    records = sorted(p.stem for p in (folder / "results/records").iterdir())
    assert records == [f"{ENV}__dt_alignment__1", f"{ENV}__dt_conv__1", f"{ENV}__train_qalign_dt__1"]
    text = (folder / f"results/components__{ENV}.md").read_text()
    assert "| DT + conv (seeds 1) |" in text and "| DT (seeds" not in text and "hopper_tiny.hdf5" in text
    assert f"Missing: {ENV}__dt__1." in text
    rows = list(csv.DictReader(open(folder / f"results/components__{ENV}.csv")))
    assert [row["variant"] for row in rows] == ["Q-Align DT", "DT + alignment", "DT + conv"]
    record = json.loads((folder / f"results/records/{ENV}__train_qalign_dt__1.json").read_text())
    alignment = json.loads((folder / f"runs/{ENV}__train_qalign_dt__1/alignment.json").read_text())
    assert record["alignment"] == alignment and record["critic"]["spearman_q_vs_return"] is not None
    assert float(rows[0]["alignment RMSE"]) == alignment["alignment_rmse"]
    assert (folder / f"results/components__{ENV}.png").read_bytes()[:4] == b"\x89PNG"
    logs = [(folder / f"runs/logs/{ENV}__{name}__1.log").read_text() for name in ("train_qalign_dt", "dt_alignment")]
    assert sorted("critic.pt is finished" in log for log in logs) == [False, True]  # stage 1 once, for both


def test_the_same_command_runs_only_what_is_missing(finished, hopper_file):
    folder, _ = finished
    (folder / "runs" / f"{ENV}__dt__1" / "resume.pt").unlink(missing_ok=True)
    before = {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("policy.pt")}
    argv = command(folder, hopper_file, "components", "spearman", "--seeds", 1)
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 runs, 3 of them finished before" in done.stdout and f"spearman__{ENV}.md" in done.stdout
    after = {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("policy.pt")}
    assert len(after) == len(before) + 1 and before.items() <= after.items()
    start = time.monotonic()
    again = subprocess.run(argv, capture_output=True, text=True)
    assert (
        again.returncode == 0 and "4 runs, 4 of them finished before" in again.stdout and time.monotonic() - start < 20
    )
    other = subprocess.run([*argv, "--target-step", "50"], capture_output=True, text=True)
    assert (
        other.returncode == 2 and "target_step 100.0 there, 50.0 here; choose another --results-dir, or" in other.stderr
    )
    assert len(other.stderr.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_and_started_again_the_run_goes_on(number, tmp_path, hopper_file):
    train = TRAIN.replace("--total-steps 30", "--total-steps 3000") + " --eval-every 0 --checkpoint-minutes 0.01"
    argv = command(tmp_path, hopper_file, "spearman", "--seeds", 1, train=train)
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, deadline = tmp_path / f"runs/{ENV}__train_qalign_dt__1/metrics.csv", time.monotonic() + 120
    while (not metrics.exists() or len(metrics.read_text().splitlines()) < 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait() == (130 if number == signal.SIGINT else -number)
    assert not (tmp_path / "results/records").exists()
    steps = len(metrics.read_text().splitlines())
    assert 3 <= steps < 30
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / f"results/records/{ENV}__train_qalign_dt__1.json").read_text())
    assert record["seconds"]["training"] is None and record["alignment"]["step"] == 3000
    assert record["alignment_best"] is None  # no evaluation, no best checkpoint


@pytest.mark.parametrize(
    "flags, message",
    [
        (["colours"], "unknown study colours: choose of components, "),
        ([], "unknown study (none named)"),
        (["loss", "--workers", 0], "--workers and --rollouts must be at least 1"),
        (["loss", "--target-step", "nan"], "--target-step positive"),
        (["loss", "--env", "antmaze-umaze-v2"], "AntMaze has no simulator here"),
    ],
)
def test_bad_input_is_one_line(flags, message, run_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_main(benchmark, *flags)
    assert code == 2 and message in err and len(err.splitlines()) == 1 and not os.listdir(tmp_path)


def test_ray_cluster_of_two_workers(tmp_path, hopper_file):
    pytest.importorskip("ray")  # an optional dependency
    argv = [*command(tmp_path, hopper_file, "components", "--seeds", 1), "--ray", "local"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "results/records").iterdir())) == 4
