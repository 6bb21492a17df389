"""File systems that lack a call, are full or are read-only: what works all the same, and what messages say."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.every_command import AGAIN, LACKS, REFUSED

ROOT = Path(__file__).resolve().parents[1]
SAID = {
    "symlink": "no symbolic links here (Operation not supported); last and best of its checkpoints are files",
    "flock": "no file locks here (No locks available); lock.owner keeps others out instead",
    "fsync": "does not say when data are on the disk (fsync: Invalid argument)",
    "fsync of folders": "does not say when data are on the disk (fsync: Invalid argument)",
    "rename over a file": "files cannot be replaced in one step here (File exists)",
    "preadv": "no reads into several buffers (preadv: Operation not supported)",
}
"""There are no messages about calls that are not used or whose lack costs nothing: links, times, free space, maps."""


def build_lacking(folder: Path) -> Path:
    """Build the library that imitates a file system that lacks something."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler on Linux, to stand for such a file system")
    library = folder / "lacking.so"
    build = [compiler, "-shared", "-fPIC", "-o", library, ROOT / "tests" / "lacking.c", "-ldl"]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip(f"the C compiler cannot build tests/lacking.c: {built.stderr[-300:]}")
    return library


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcomes of every command on each such file system."""
    folder = tmp_path_factory.mktemp("lacking")
    library = build_lacking(folder)
    environment = {**os.environ, "LD_PRELOAD": str(library), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "tests.every_command", str(folder)]
    environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "outcomes.json").read_text())
    return found


@pytest.mark.parametrize("lack", [lack for lack in LACKS if lack != "nothing"])
def test_a_file_system_that_lacks_a_call_gets_the_same_files(outcomes: dict[str, Any], lack: str) -> None:
    """Shards, weights of a resumed run and scores are the same; a missing call is reported once, if it matters."""
    found, expected = outcomes[lack], outcomes["nothing"]
    assert found["failed"] == {} == expected["failed"]
    assert found["weights"] == expected["weights"] and found["submission"] == expected["submission"]
    assert found["left"] == []
    assert expected["said"] == "" and found["said"].count(SAID.get(lack, "\n")) == (lack in SAID)


@pytest.mark.parametrize("lack", REFUSED)
def test_a_full_or_read_only_disk_is_named_at_once_and_nothing_is_lost(outcomes: dict[str, Any], lack: str) -> None:
    found = outcomes[lack]
    places = {"pack": "others", "train": "run", "infer": "submission.csv"}
    for name, (code, said) in found["refused"].items():
        assert code == 1 and f"/{places[name]}" in said and ".tmp" not in said, said
        assert os.strerror(REFUSED[lack]) in said and "Traceback" not in said
        assert (f"free some space and {AGAIN}" in said) == (REFUSED[lack] == errno.ENOSPC)
    assert found["kept"] and not found["partial"] and found["faults"] == []
    assert found["later"] == {"pack": 0, "train": 0, "infer": 0}
