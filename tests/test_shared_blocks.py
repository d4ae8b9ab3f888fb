"""Stages are standalone files; what two of them share is the same text, letter for letter."""

from shared_blocks import ROOT, blocks

STAGES = (
    "collect_dataset.py", "pretrain_q.py", "train_qalign_dt.py", "evaluate_alignment.py", "transfer_cheetah_vel.py",
)  # fmt: skip


def test_every_copy_of_a_block_is_the_same_text():
    found = {name: blocks((ROOT / name).read_text()) for name in STAGES}
    names = {block for copies in found.values() for block in copies}
    assert {"setup", "task", "dataset", "policy", "critic", "run", "simulator", "rollout", "graph", "results"} <= names
    for name in names:
        texts = {file: copies[name][0] for file, copies in found.items() if name in copies}
        assert len(set(texts.values())) == 1, f"block {name!r} differs between {sorted(texts)}"
        assert sorted(texts) == sorted(next(copies[name][1] for copies in found.values() if name in copies))


def test_no_stage_imports_another():
    for name in STAGES:
        for other in STAGES:
            assert f"import {other[:-3]}" not in (ROOT / name).read_text()
