"""A time limit for each read of a file, which the system enforces: HDF5 may hang on damaged data and hold the GIL.

A process that reads for too long is ended. Like one that crashes, it leaves a note that names the file.
"""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SECONDS = 300.0
"""Longest that one read may take; usually it is of 64 MB of one file."""
_seconds: float | None = None  # one for the whole process, which has only one alarm


def watch_reads(seconds: float) -> None:
    """Limit each read of this process from now on, if it is a child process, which does a part of the work."""
    global _seconds
    if multiprocessing.parent_process() is not None:
        _seconds = seconds
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process, whatever holds the GIL


@contextlib.contextmanager
def watched(path: Path) -> Iterator[None]:
    """Limit one read of `path`, the body of the `with` statement."""
    if _seconds is None:
        yield
        return
    note = Path(tempfile.gettempdir(), f"{_prefix(os.getppid())}{os.getpid()}")
    note.write_text(str(path))
    signal.setitimer(signal.ITIMER_REAL, _seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        note.unlink(missing_ok=True)


def collect_notes() -> tuple[list[str], list[str]]:
    """The files that this process's children were reading when they ended: the slow ones, and all of them.

    The notes are removed.
    """
    slow, files = set(), set()
    for note in Path(tempfile.gettempdir()).glob(f"{_prefix(os.getpid())}*"):
        with contextlib.suppress(OSError):
            files.add(note.read_text())
            if time.time() - note.stat().st_mtime > 0.9 * SECONDS:
                slow.add(note.read_text())
            note.unlink()
    return sorted(slow), sorted(files)


def _prefix(parent: int) -> str:
    """How the notes of the processes of one parent begin."""
    return f"needlestream-reading-{os.getuid()}-{parent}-"
