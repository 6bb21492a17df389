"""What a cache of samples holds; apart, so that processes of a test need not import pytest and torch for it."""

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
                    except FileNotFoundError:  # renamed: then it is found here, under the name that it has now
                        about = Path(parent, name.split(".")[0] + ".sample").stat()
                    sizes[about.st_ino] = about.st_size
    return sum(sizes.values())
