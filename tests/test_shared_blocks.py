"""Stages are standalone files; what two of them share is the same text, letter for letter. Baselines import stage 2."""

import ast
import functools
import re
import subprocess
import sys

import pytest
from conftest import Forked
from shared_blocks import BASELINES, ROOT, STAGES, blocks, sources

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
    named = {"data", "dataset", "policy", "critic", "rollout", "results", "setup", "run", "environment"}
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


def name_of(file: str) -> str:
    return file.rpartition("/")[2].removesuffix(".py")


def test_no_stage_imports_another():
    names = {name_of(file) for file in STAGES + BASELINES}
    for file in STAGES:
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not imported & names, f"{file} imports {imported & names}"


# ---- baselines: they import stage 2, and each other

MODULES = {name_of(file): ast.parse((ROOT / file).read_text()) for file in ("train_qalign_dt.py", *BASELINES)}


@functools.cache
def imported(name: str) -> dict[str, tuple[str, str]]:
    """The name in a module -> the module of this project that it comes from, and its name there."""
    nodes = (node for node in ast.walk(MODULES[name]) if isinstance(node, ast.ImportFrom) and node.module in MODULES)
    return {alias.asname or alias.name: (node.module, alias.name) for node in nodes for alias in node.names}


@functools.cache
def defined(name: str) -> dict[str, ast.AST]:
    """What a module defines or assigns at its top level."""
    found = {}
    for node in MODULES[name].body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            names = [x for x in ast.walk(target) if isinstance(x, ast.Name)] if target else []
            found |= {x.id: node for x in names if isinstance(x.ctx, ast.Store)}
    return found


def global_names(node: ast.AST) -> set[str]:
    """The names that a function, or a class's methods, look up in their module whenever they are called.

    Without defaults and annotations, which are looked up once, where the function is defined.
    """
    functions = [x for x in ast.walk(node) if isinstance(x, ast.FunctionDef)]
    names = [x for f in functions for line in f.body for x in ast.walk(line) if isinstance(x, ast.Name)]
    arguments = {x.arg for f in functions for x in ast.walk(f.args) if isinstance(x, ast.arg)}
    return {x.id for x in names} - {x.id for x in names if isinstance(x.ctx, ast.Store)} - arguments


def reads(module: str, name: str, seen: set) -> set[tuple[str, str]]:
    """(module, name) of everything that an imported function reads, by way of other functions, too."""
    module, name = imported(module).get(name, (module, name))
    if (module, name) not in seen and name in defined(module):
        seen.add((module, name))
        for other in global_names(defined(module)[name]):
            reads(module, other, seen)
    return seen


@pytest.mark.parametrize("file", BASELINES)
def test_baselines_import_stage_2_and_each_other_by_explicit_names(file):
    other = {name_of(f) for f in STAGES} - {"train_qalign_dt"}
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & {*MODULES, *other}
        if isinstance(node, ast.ImportFrom):
            assert node.module not in other and "*" not in {alias.name for alias in node.names}
    found = imported(name_of(file))
    assert {module for module, _ in found.values()} >= {"train_qalign_dt"}
    assert all(name in defined(module) for module, name in found.values()), "imported from where it is defined"
    assert not found.keys() & defined(name_of(file)).keys(), "a name that is imported and then defined anew"


@pytest.mark.parametrize("file", BASELINES)
def test_no_baseline_assigns_a_name_that_an_imported_function_reads(file):
    """It would look as if it changed what that function does, and would not."""
    name, own = name_of(file), defined(name_of(file)).keys()
    for module, function in imported(name).values():
        hidden = {other for _, other in reads(module, function, set()) if other != function} & own
        assert not hidden, f"{function} of {module}.py reads that module's {hidden}, not those of {file}"


def test_what_an_imported_function_reads_is_found():
    assert {("train_radt", "LOG_EVERY"), ("train_qalign_dt", "write_file")} <= reads("train_radt", "train", set())
    found = reads("train_qt", "Training", set())
    assert {("train_qt", "window_target"), ("train_qt", "TAU"), ("train_qalign_dt", "ema_update")} <= found
    assert ("train_qalign_dt", "make_policy") not in found  # an argument


def test_stage_3_loads_every_baseline_by_its_path(tmp_path):
    """From another working directory, in a process where nothing else has put folders on sys.path."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import evaluate_alignment as stage3\n"
    program += "print(*(stage3.baseline(name).make_policy.__name__ for name in stage3.BASELINES))"
    (tmp_path / "program.py").write_text(program)
    process = Forked([sys.executable, tmp_path / "program.py"], cwd=tmp_path, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=300)
    assert (process.returncode, out.split()) == (0, ["make_policy"] * len(BASELINES))
