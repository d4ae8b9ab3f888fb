"""The blocks that stages share, letter for letter. `python tests/shared_blocks.py` copies train_qalign_dt.py's into the others."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "train_qalign_dt.py"
BLOCK = re.compile(
    r"^# =+ shared: (\w+) \(the same text in ([\w., ]+)\) =+\n.*?^# =+ end of shared: \1 =+\n", re.M | re.S
)


def blocks(text: str) -> dict[str, tuple[str, list[str]]]:
    """Name -> (text with its markers, the files that the marker says hold it)."""
    return {m[1]: (m[0], m[2].split(", ")) for m in BLOCK.finditer(text)}


if __name__ == "__main__":
    for name, (block, files) in blocks((ROOT / SOURCE).read_text()).items():
        for file in files:
            text = (ROOT / file).read_text()
            old = blocks(text).get(name)
            if old is None:
                raise SystemExit(f"{file} has no block {name}")
            (ROOT / file).write_text(text.replace(old[0], block))
