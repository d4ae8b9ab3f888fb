"""The blocks that stages share, letter for letter. Run as a script, it copies each from its source into the others."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("train_qalign_dt.py", "evaluate_alignment.py", "pretrain_q.py", "transfer_cheetah_vel.py")
BASELINES = tuple(f"baselines/{name}.py" for name in ("train_radt", "train_vdt", "tune_vdt", "train_qt", "train_rvdt"))
BLOCK = re.compile(r"^# =+ shared: (\w+) =+\n.*?^# =+ end of shared: \1 =+\n", re.M | re.S)


def blocks(file: str) -> dict[str, str]:
    """Name -> text with its markers."""
    return {m[1]: m[0] for m in BLOCK.finditer((ROOT / file).read_text())}


def sources() -> dict[str, str]:
    """Each block as the first of STAGES that has it."""
    return {name: block for file in reversed(STAGES) for name, block in blocks(file).items()}


if __name__ == "__main__":
    for file in STAGES:
        text = (ROOT / file).read_text()
        for name, block in blocks(file).items():
            text = text.replace(block, sources()[name])
        (ROOT / file).write_text(text)
