"""Local cache of a remote store's samples: bounded, shared by the ranks of one machine, checked when read."""

import contextlib
import errno
import fcntl
import logging
import os
import uuid
import zlib
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path

from shard_tools.errors import InputError
from shard_tools.storage.base import Bytes, Check

_SUFFIX = ".sample"
_UNFINISHED = ".tmp"
_LEDGER_BYTES = 29  # a count of 20 digits, a space, its CRC-32
_SUM_BYTES = 4  # a CRC-32 after the record: a power cut can leave a file of the right size with pages of zeros
_KEEP_SHARE = 0.9  # share of the bound that is kept when it is reached: the folder is scanned once in many samples
_log = logging.getLogger(__name__)


class SampleCache:
    """Records (a tar header and an npy) by shard and offset, one file each."""

    def __init__(self, folder: Path, max_bytes: float, identity: str) -> None:
        """`identity` is the manifest's: data sets share a folder, and the data set at a URL may be replaced."""
        # A subfolder, so that no other files are ever deleted.
        self._root = folder / "needlestream-samples"
        self._folder = self._root / identity[:32]
        self._max_bytes = max_bytes
        self._works = True
        self._folder.mkdir(parents=True, exist_ok=True)

    def read_record(self, name: str, offset: int, parts: Sequence[Bytes], check: Check) -> bool:
        """Fill `parts` with a record; False where it is not cached, or damaged."""
        path = self._path(name, offset)
        try:
            with path.open("rb", buffering=0) as file:
                found = os.readv(file.fileno(), [part.data for part in parts])
                rest = file.read(_SUM_BYTES + 1)
            if found != _size(parts) or rest != _sum(parts):
                raise InputError(f"{path}: damaged")
            check(found)
        except OSError:
            return False  # absent, or a disk error: it is read from the store
        except InputError:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return False
        with contextlib.suppress(OSError):  # another rank evicted it, or the folder is read-only
            os.utime(path)  # marks it as most recently used
        return True

    def write_record(self, name: str, offset: int, parts: Sequence[Bytes]) -> None:
        """Keep a record, evicting the least recently used ones; never beyond the bound."""
        size = _size(parts) + _SUM_BYTES
        if not self._works or size > self._max_bytes:
            return
        path = self._path(name, offset)
        try:
            path.parent.mkdir(exist_ok=True)
            temporary = self._reserve(path, size)
            if temporary is not None:
                # Outside the lock: ranks and threads write at the same time.
                _fill(temporary, [*(part.data for part in parts), _sum(parts)], path)
        except OSError as error:
            # Nothing is lost but time: training goes on from the store.
            _log.warning(
                "%s: %s; keeping no further samples there, so each epoch reads them from the store again: choose a "
                "--cache-dir on a local disk with room",
                self._root, error.strerror,
            )  # fmt: skip
            self._works = False

    def _reserve(self, path: Path, size: int) -> FileIO | None:
        """An open file of `size` bytes to be filled and renamed to `path`; None where `path` is there already."""
        with self._lock() as ledger:
            if path.exists():  # another rank was faster
                return None
            held = _read_ledger(ledger)
            if held is None or held + size > self._max_bytes:
                held = self._make_room(size)
            # Counted first: if we are killed now, the count is too high until the next scan corrects it.
            _write_ledger(ledger, held + size)
            file = FileIO(path.with_suffix(f".{uuid.uuid4().hex}{_UNFINISHED}"), "x")
            # Its whole size from the start, so that a scan of the folder counts bytes still to be written.
            os.truncate(file.fileno(), size)
            # Locked while this process lives, which tells the file from one that a killed process left.
            fcntl.flock(file, fcntl.LOCK_EX)
            return file

    def _make_room(self, size: int) -> int:
        """Evict the least recently used records if there is no room; return the bytes that remain. Needs the lock."""
        kept: list[tuple[float, int, Path]] = []
        held = 0
        for parent, _, names in os.walk(self._root):
            for path in (Path(parent, name) for name in names):
                if path.suffix == _UNFINISHED:
                    try:
                        held += _unfinished_bytes(path)
                        continue
                    except FileNotFoundError:  # finished just now
                        path = path.with_suffix("").with_suffix(_SUFFIX)
                with contextlib.suppress(FileNotFoundError):  # just deleted as damaged by another rank
                    if path.suffix == _SUFFIX:
                        about = path.stat()
                        kept.append((about.st_mtime, about.st_size, path))
        held += sum(bytes_of for _, bytes_of, _ in kept)
        if held + size > self._max_bytes:
            goal = min(_KEEP_SHARE * self._max_bytes, self._max_bytes - size)
            for _, bytes_of, path in sorted(kept):
                if held <= goal:
                    break
                path.unlink(missing_ok=True)
                held -= bytes_of
        return held

    @contextlib.contextmanager
    def _lock(self) -> Iterator[int]:
        """The ledger, open and locked."""
        with FileIO(os.open(self._root / "held", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+") as ledger:
            # The lock belongs to this open file, not to the process: it excludes threads and ranks alike.
            fcntl.flock(ledger, fcntl.LOCK_EX)
            yield ledger.fileno()

    def _path(self, name: str, offset: int) -> Path:
        return self._folder / name.removesuffix(".tar") / f"{offset}{_SUFFIX}"


def _fill(file: FileIO, parts: Sequence[bytes | memoryview], path: Path) -> None:
    """Write an unfinished record and give it its name."""
    temporary = Path(str(file.name))
    with file:
        try:
            if os.writev(file.fileno(), parts) != temporary.stat().st_size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def _read_ledger(ledger: int) -> int | None:
    """The bytes that the folder holds or has reserved; None where the ledger is new, damaged or of an older version."""
    text = os.pread(ledger, _LEDGER_BYTES + 1, 0)
    count = text[:20]
    return int(count) if text == _ledger_line(count) and count.isdigit() else None


def _write_ledger(ledger: int, held: int) -> None:
    line = _ledger_line(b"%020d" % held)
    os.pwrite(ledger, line, 0)
    os.ftruncate(ledger, len(line))


def _ledger_line(count: bytes) -> bytes:
    return b"%s %08x" % (count, zlib.crc32(count))


def _unfinished_bytes(path: Path) -> int:
    """The final size of an unfinished record; 0 where its process was killed, in which case it is deleted.

    Raises FileNotFoundError where it has been finished.
    """
    with path.open("r+b") as file:  # NFS locks only files opened for writing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return path.stat().st_size
        path.unlink()
        return 0


def _size(parts: Sequence[Bytes]) -> int:
    return sum(len(part) for part in parts)


def _sum(parts: Sequence[Bytes]) -> bytes:
    total = 0
    for part in parts:
        total = zlib.crc32(part.data, total)
    return total.to_bytes(_SUM_BYTES, "little")
