"""results/: tables and texts say what the records say."""

import csv
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import run_studies as studies  # noqa: E402

RESULTS = ROOT / "results"
TABLES = [f"{path.parent.name}/{path.stem}" for path in sorted(RESULTS.glob("studies/*/*.md"))]


def tabulate(table: str, seeds: list[int], out: Path) -> None:
    """Write the files of `dataset/study` from the committed records alone, without the data."""
    dataset, study = table.split("/")
    variants = studies.STUDIES[study]
    names = {variant.exp_name for variant in variants}
    files = sorted((RESULTS / "records" / dataset).glob("*.json"))
    first = json.loads(next(file for file in files if file.stem.split("__")[1] in names).read_text())["definition"]
    env, own = first["run"].split("__")[0], {key: first[key] for key in ("train_flags", "rollouts", "target_step")}
    paths = () if env == dataset else tuple(first["data"])
    args = studies.Args((study,), env, paths, results_dir=str(RESULTS), **own)
    runs = {(one.label, seed): studies.Run(one, seed, args, first["data"]) for one in variants for seed in seeds}
    records = {key: record for key, run in runs.items() if (record := studies.read_record(run))}
    missing = [run.name for key, run in runs.items() if key not in records]
    studies.summarise(study, replace(args, results_dir=str(out)), records, missing)


@pytest.mark.parametrize("env", ["hopper-mini", "halfcheetah-mini"])
def test_the_command_tabulates_the_records_without_a_run(env, tmp_path, monkeypatch, capsys):
    """Records of earlier commits too: what they say of their defaults equals what the scripts say today."""
    shutil.copytree(RESULTS / "records" / env, tmp_path / "records" / env)
    argv = ["run_studies.py", "neighbours", "--env", env, "--results-dir", str(tmp_path), "--runs-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(studies, "check", None)
    studies.main()
    assert capsys.readouterr().out.startswith("21 runs, 21 of them finished before")
    for kind in ("md", "csv"):
        name = f"studies/{env}/neighbours.{kind}"
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text()


@pytest.mark.parametrize("table", TABLES)
def test_tables_equal_the_records(table, tmp_path, monkeypatch):
    with open(RESULTS / "studies" / f"{table}.csv") as file:
        seeds = sorted({int(row["seed"]) for row in csv.DictReader(file)})
    monkeypatch.setattr(studies, "plot", lambda *_: b"")
    tabulate(table, seeds, tmp_path)
    for kind in ("md", "csv"):
        assert (tmp_path / f"studies/{table}.{kind}").read_text() == (RESULTS / f"studies/{table}.{kind}").read_text()
