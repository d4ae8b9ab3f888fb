"""Stages are standalone files; what two of them share is the same text, letter for letter."""

import ast
import re

from shared_blocks import ROOT, STAGES, blocks, sources

FOUND = {file: blocks(file) for file in STAGES}
OWN = {"Args", "main", "resolve", "plot", "Progress", "simulate"}  # what several files define, each in its own way


def test_every_copy_of_a_block_is_the_same_text():
    for file, found in FOUND.items():
        for name, block in found.items():
            assert block == sources()[name], f"{file}: block {name!r} differs from the others' copy"


def test_every_marker_belongs_to_a_block_that_at_least_two_stages_share():
    for file, found in FOUND.items():
        markers = re.findall(r"^# =+ .*shared: (\w+)", (ROOT / file).read_text(), re.M)
        assert sorted(markers) == sorted(2 * list(found)), f"{file}: a marker without its pair"
    for name in sources():
        assert sum(name in found for found in FOUND.values()) >= 2, f"block {name!r} is in one file only"
    named = {"data", "dataset", "policy", "critic", "rollout", "results", "setup", "checks", "run", "environment"}
    assert set(sources()) == named | {"correlation"}


def test_what_two_stages_define_under_one_name_is_in_a_block():
    """Or a copy could drift unseen."""
    defined = {}
    for file, found in FOUND.items():
        text = (ROOT / file).read_text()
        for block in found.values():
            text = text.replace(block, "")
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                defined.setdefault(node.name, []).append(file)
    assert {name: files for name, files in defined.items() if len(files) > 1 and name not in OWN} == {}


def test_no_stage_imports_another():
    names = {file.rpartition("/")[2].removesuffix(".py") for file in STAGES}
    for file in STAGES:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not imported & names, f"{file} imports {imported & names}"
