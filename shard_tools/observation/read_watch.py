"""A time limit for each read of a file, kept by the system: HDF5 may hang on damaged data while it holds Python's lock.

A process that reads for too long is ended, and leaves a note that names the file.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

SECONDS = 300.0
"""Longest that one read may take: of a coarse channel of one file, 64 MB as a rule."""
_limit: tuple[Path, float] | None = None  # of the whole process, as the alarm is


def watch_reads(note: Path, seconds: float) -> None:
    """Limit each read of this process from now on; `note` holds the name of the file while it is read."""
    global _limit
    _limit = note, seconds
    note.unlink(missing_ok=True)  # of a process that was killed
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process, whatever holds Python's lock


@contextlib.contextmanager
def watched(path: Path) -> Iterator[None]:
    """Around one read of `path`."""
    if _limit is None:
        yield
        return
    note, seconds = _limit
    note.write_text(str(path))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        note.unlink(missing_ok=True)


def read_notes(notes: list[Path]) -> tuple[list[str], list[str]]:
    """The files that were being read when processes ended: those that took too long, and all of them."""
    slow, files = set(), set()
    for note in notes:
        with contextlib.suppress(FileNotFoundError):
            files.add(note.read_text())
            if time.time() - note.stat().st_mtime > 0.9 * SECONDS:
                slow.add(note.read_text())
    return sorted(slow), sorted(files)
