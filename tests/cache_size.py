"""The size of a cache of samples; a module of its own, so that a test's processes need not import pytest and torch."""

import fcntl
import os
from pathlib import Path


def held(folder: Path) -> int:
    """Bytes of all records, whole and unfinished, while nobody adds or removes one; a renamed one counts once."""
    root = folder / "needlestream-samples"
    with (root / "held").open("a+") as ledger:
        fcntl.flock(ledger, fcntl.LOCK_EX)
        sizes: dict[int, int] = {}
        for parent, _, names in os.walk(root):
            for name in names:
                if name != "held":
                    try:
                        about = Path(parent, name).stat()
                    except FileNotFoundError:  # it was renamed since: this is its new name
                        about = Path(parent, name.split(".")[0] + ".sample").stat()
                    sizes[about.st_ino] = about.st_size
    return sum(sizes.values())
