"""Samples of a remote store kept in a local folder: bounded, shared by the ranks of one machine, checked when read."""

import contextlib
import errno
import fcntl
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from shard_tools.errors import InputError
from shard_tools.store import Bytes, Check

_SUFFIX = ".sample"
_SUM_BYTES = 4  # a CRC-32 after the record: a power cut can leave a file of the right size with pages of zeros
_KEEP_SHARE = 0.9  # of the bound, when it is reached: so that the folder is looked through once in many samples
_log = logging.getLogger(__name__)


class SampleCache:
    """Records (a tar header and an npy) by shard and offset, one file each."""

    def __init__(self, folder: Path, max_bytes: float, identity: str) -> None:
        """`identity` is the manifest's: data sets share a folder, and one may follow another at the same URL."""
        # Apart from whatever else lies in the folder: only what is here is ever deleted.
        self._root = folder / "needlestream-samples"
        self._folder = self._root / identity[:32]
        self._max_bytes = max_bytes
        self._works = True
        self._folder.mkdir(parents=True, exist_ok=True)

    def read_record(self, name: str, offset: int, parts: Sequence[Bytes], check: Check) -> bool:
        """Fill `parts` with a record; False where it is not here, or damaged."""
        path = self._path(name, offset)
        try:
            with path.open("rb", buffering=0) as file:
                found = os.readv(file.fileno(), [part.data for part in parts])
                rest = file.read(_SUM_BYTES + 1)
            if found != _size(parts) or rest != _sum(parts):
                raise InputError(f"{path}: damaged")
            check(found)
            with contextlib.suppress(OSError):  # where times can't be set, the oldest go first
                os.utime(path)  # used last: the last to go
            return True
        except FileNotFoundError:
            return False
        except InputError:
            with contextlib.suppress(OSError):  # a read-only copy stays, and is read from the store each time
                path.unlink()
            return False

    def write_record(self, name: str, offset: int, parts: Sequence[Bytes]) -> None:
        """Keep a record, in place of those that were not used for longest; never beyond the bound."""
        size = _size(parts) + _SUM_BYTES
        if not self._works or size > self._max_bytes:
            return
        path = self._path(name, offset)
        try:
            path.parent.mkdir(exist_ok=True)
            with self._lock() as ledger:
                if path.exists():  # another rank was faster
                    return
                held = int(ledger.read() or 0)
                if held + size > self._max_bytes:
                    held = self._make_room(size)
                # Counted first: should we be killed now, the count is too high, and mended by the next look.
                ledger.seek(0)
                ledger.write(f"{held + size:020d}")
                ledger.flush()
                temporary = path.with_suffix(".tmp")
                with temporary.open("wb", buffering=0) as file:
                    if os.writev(file.fileno(), [*(part.data for part in parts), _sum(parts)]) != size:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                temporary.replace(path)
        except OSError as error:
            # Nothing is lost but time: training goes on from the store.
            _log.warning("%s: %s; keeping no further samples there", self._root, error.strerror)
            self._works = False

    def _make_room(self, size: int) -> int:
        """Delete the longest unused records; return the bytes that stay. Called under the lock."""
        kept: list[tuple[float, int, Path]] = []
        for parent, _, names in os.walk(self._root):
            for name in names:
                path = Path(parent, name)
                if path.suffix == ".tmp":  # of a process that was killed: who writes holds the lock
                    path.unlink(missing_ok=True)
                elif path.suffix == _SUFFIX:
                    with contextlib.suppress(FileNotFoundError):  # found damaged by another rank just now
                        about = path.stat()
                        kept.append((about.st_mtime, about.st_size, path))
        held = sum(bytes_of for _, bytes_of, _ in kept)
        for _, bytes_of, path in sorted(kept):
            if held <= min(_KEEP_SHARE * self._max_bytes, self._max_bytes - size):
                break
            path.unlink(missing_ok=True)
            held -= bytes_of
        return held

    @contextlib.contextmanager
    def _lock(self) -> Iterator[TextIO]:
        with os.fdopen(os.open(self._root / "held", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+") as ledger:
            # Held by this opening, not by the process: it keeps apart threads and ranks alike.
            fcntl.flock(ledger, fcntl.LOCK_EX)
            yield ledger

    def _path(self, name: str, offset: int) -> Path:
        return self._folder / name.removesuffix(".tar") / f"{offset}{_SUFFIX}"


def _size(parts: Sequence[Bytes]) -> int:
    return sum(len(part) for part in parts)


def _sum(parts: Sequence[Bytes]) -> bytes:
    total = 0
    for part in parts:
        total = zlib.crc32(part.data, total)
    return total.to_bytes(_SUM_BYTES, "little")
