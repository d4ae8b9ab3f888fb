"""results/: tables and texts say what the records say."""

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
import run_studies as studies  # noqa: E402

RESULTS = ROOT / "results"


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
