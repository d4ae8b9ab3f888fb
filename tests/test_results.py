"""results/: tables and texts say what the records say."""

import csv
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import run_studies as studies
from conftest import ROOT

RESULTS = ROOT / "results"
TABLES = [f"{path.parent.name}/{path.stem}" for path in sorted(RESULTS.glob("studies/*/*.md"))]


def tabulate(table: str, seeds: list[int], out: Path) -> None:
    """Write the files of `dataset/study` from the committed records alone, without the data."""
    dataset, study = table.split("/")
    variants = studies.STUDIES[study]
    names = {variant.exp_name for variant in variants}
    files = sorted((RESULTS / "records" / dataset).glob("*.json"))
    first = json.loads(next(file for file in files if file.stem.split("__")[1] in names).read_text("utf-8"))[
        "definition"
    ]
    env, own = first["run"].split("__")[0], {key: first[key] for key in ("train_flags", "critic_flags")}
    own |= dict(rollouts=first["rollouts"], score_rollouts=first["rollouts"], target_step=first["target_step"])
    paths = () if env == dataset else tuple(first["data"])
    args = studies.Args((study,), env, paths, results_dir=str(RESULTS), **own)
    runs = {(env, one.label, seed): studies.Run(one, seed, args, first["data"]) for one in variants for seed in seeds}
    records = {run.name: record for run in runs.values() if (record := studies.read_record(run))}
    missing = [run.name for run in runs.values() if run.name not in records]
    if study in studies.PUBLISHED:
        return studies.tabulate(study, replace(args, results_dir=str(out)), runs, records)
    found = {key[1:]: records[run.name] for key, run in runs.items() if run.name in records}
    studies.summarise(study, replace(args, results_dir=str(out)), found, missing)


def assert_same_table(stem: str, kinds: list[str], out: Path) -> None:
    """In text; a CSV's numbers, which have every digit, up to what LAPACK's kernels for other processors round."""
    for kind in kinds:
        ours, theirs = ((folder / f"{stem}.{kind}").read_text("utf-8") for folder in (out, RESULTS))
        if kind == "md":
            assert ours == theirs
            continue
        for row, expected in zip(*(csv.reader(text.splitlines()) for text in (ours, theirs)), strict=True):
            for x, y in zip(row, expected, strict=True):
                assert x == y or float(x) == pytest.approx(float(y), rel=1e-9)


@pytest.mark.parametrize("env", ["hopper-mini", "halfcheetah-mini"])
def test_the_command_tabulates_the_records_without_a_run(env, tmp_path, monkeypatch, capsys):
    """Records of earlier commits too: what they say of their defaults equals what the scripts say today."""
    shutil.copytree(RESULTS / "records" / env, tmp_path / "records" / env)
    with open(RESULTS / f"studies/{env}/neighbours.csv") as file:
        seeds = sorted({row["seed"] for row in csv.DictReader(file)})
    argv = ["run_studies.py", "neighbours", "--env", env, "--workers", "0", "--seeds", *seeds]
    argv += ["--results-dir", str(tmp_path), "--runs-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(studies, "check", None)
    monkeypatch.setattr(studies, "plot", lambda *_: b"")
    with pytest.raises(SystemExit):  # not every method has every seed
        studies.main()
    names = {variant.exp_name for variant in studies.STUDIES["neighbours"]}
    records = [file.stem.split("__") for file in (RESULTS / "records" / env).glob("*.json")]
    finished = sum(name in names and seed in seeds for _, name, seed in records)  # Q-Align DT has seeds of its own
    assert 19 <= finished < (every := 7 * len(seeds))
    assert capsys.readouterr().out.startswith(f"{every} runs, {finished} of them finished before")
    assert_same_table(f"studies/{env}/neighbours", ("md", "csv"), tmp_path)


@pytest.mark.parametrize("table", TABLES)
def test_tables_equal_the_records(table, tmp_path, monkeypatch):
    kinds = [kind for kind in ("md", "csv") if (RESULTS / f"studies/{table}.{kind}").exists()]
    files = (RESULTS / f"records/{table.partition('/')[0]}").glob("*.json")
    seeds = sorted({int(file.stem.split("__")[2]) for file in files})
    if "csv" in kinds:
        with open(RESULTS / f"studies/{table}.csv") as file:
            seeds = sorted({int(row["seed"]) for row in csv.DictReader(file)})
    monkeypatch.setattr(studies, "plot", lambda *_: b"")
    tabulate(table, seeds, tmp_path)
    assert_same_table(f"studies/{table}", kinds, tmp_path)


LABELS = {variant.label: variant.exp_name for every in studies.STUDIES.values() for variant in every}
ROWS = {  # what a row's name says -> the quantity; else the RMSE
    "lowest third": "RMSE at the lowest third of the targets",
    "highest third": "RMSE at the highest third of the targets",
    "slope": "slope of achieved by target score",
    "score": "score at the data's highest return",
    "absolute error": "absolute error of seven targets, in % of their range",
    "minutes": "minutes of training",
    "parameters": "parameters of the policy",
}


def cells_of(text: str) -> list[tuple[str, str, str, str]]:
    """(dataset, row, method, cell) of the tables that have methods as columns; a row without data is of those above."""
    datasets = "|".join(sorted((path.name for path in RESULTS.glob("records/*")), key=len, reverse=True))
    found, methods, dataset, head = [], None, None, ""
    for line in text.splitlines():
        first, *cells = [cell.strip(" *") for cell in line.split("|")[1:-1]] or [""]
        if not cells:
            methods, dataset = None, None
        elif methods is None:
            methods, head = cells if set(cells) <= LABELS.keys() else [], first
        elif methods and set(first) - set("-: "):
            dataset = named[0] if (named := re.search(datasets, first)) else dataset
            found += [(dataset, f"{first} {head}", *one) for one in zip(methods, cells)]
    return found


def numbers(text: str) -> list[str]:
    return re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text))


PAGES = ["results/pages/neighbours.md", "results/pages/robust_alignment.md"]


@pytest.mark.parametrize("name", ["README.md", "results/README.md", *PAGES])
def test_tables_of_texts_equal_the_records(name):
    """`mean` or `mean [low, high]`, over the seeds that there are, or those that the row names: (seeds 1, 2)."""
    cells = cells_of((ROOT / name).read_text("utf-8"))
    assert cells
    for dataset, row, method, said in cells:
        files = RESULTS.glob(f"records/{dataset}/*__{LABELS[method]}__*.json")
        records = {int(file.stem.split("__")[-1]): json.loads(file.read_text("utf-8")) for file in files}
        named = re.search(r"\(seeds? ([\d, ]+)\)", row)
        records = {seed: one for seed, one in records.items() if not named or str(seed) in numbers(named[1])}
        quantity = next((quantity for part, quantity in ROWS.items() if part in row), "alignment RMSE")
        values = [studies.quantities(records[seed])[quantity] for seed in sorted(records)]
        true = numbers(studies.cell(values, digits=6))
        assert len(numbers(said)) in (len(true), min(1, len(true))), (dataset, row, method)
        for one, other in zip(numbers(said), true):  # may be rounded twice: 99.35 in the study's table is 99.3508
            unit = 10.0 ** -len(one.partition(".")[2])
            assert abs(float(one) - float(other)) <= unit / 2 + 0.005, (dataset, row, method, said, true)


def maze2d_rows(maze: str) -> dict[str, tuple[list[str], list[str]]]:
    """Method -> its cells in the page's table of scores, and in that of the maze's returns."""
    found = {}
    for variant in studies.STUDIES["maze2d"]:
        files = sorted(RESULTS.glob(f"records/maze2d-{maze}-v1/*__{variant.exp_name}__*.json"))
        runs = [json.loads(file.read_text("utf-8"))["high_targets"] for file in files]
        if not runs:
            continue
        first = [one["high_targets"][0] for one in runs]  # asked for 300
        scores = [row["score_mean"] for row in first]
        error = first[0]["score_std"] / runs[0]["rollouts"] ** 0.5  # of the episodes
        each = f"seed {runs[0]['seed']}"
        if len(runs) > 1:
            error, each = studies.standard_error(scores), ", ".join(f"{x:.1f}" for x in scores)
        published = studies.PUBLISHED["maze2d"]["values"][f"maze2d-{maze}-v1"].get(variant.label, "-")
        score = [" ± ".join(map(str, published)), f"{np.mean(scores):.1f} ± {error:.1f} ({each})"]
        asked = np.array([row["target_return"] for row in runs[0]["high_targets"]])
        returns = np.array([[row["return_mean"] for row in one["high_targets"]] for one in runs])
        rmse = ", ".join(f"{x:.0f}" for x in np.sqrt(((returns - asked) ** 2).mean(axis=1)))
        found[variant.label] = score, [f"{x:.0f}" for x in returns.mean(axis=0)[::-1]] + [rmse]
    return found


def test_maze2d_page_equals_the_records():
    page = (RESULTS / "pages/maze2d.md").read_text("utf-8")
    tables = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        for table in re.findall(r"(?:^\|.*\n)+", page, re.M)
    ]
    scores, *returns = [table[2:] for table in tables[:4]]
    for i, maze in enumerate(("umaze", "medium", "large")):
        rows = maze2d_rows(maze)
        assert [row[0] for row in returns[i]] == list(rows)
        assert {row[0]: row[1:] for row in returns[i]} == {label: row for label, (_, row) in rows.items()}
        for label, *cells in scores:
            said = cells[2 * i : 2 * i + 2]
            assert said[1] == "-" if label not in rows else said == rows[label][0], (maze, label)


def test_links_lead_somewhere_and_the_page_is_short():
    for file in (*RESULTS.glob("*.md"), *RESULTS.glob("pages/*.md"), *RESULTS.glob("studies/*/*.md")):
        for link in re.findall(r"\]\((?!http)([^)#]+)", file.read_text("utf-8")):
            assert (file.parent / link).exists(), (file.name, link)
    assert len((RESULTS / "README.md").read_text("utf-8").split()) <= 1800
