"""Shards in a folder."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from shard_tools.atomic_files import NOT_SUPPORTED, say_once
from shard_tools.errors import AbsentError
from shard_tools.storage.base import CHUNK_BYTES, Bytes, Check


class LocalStore:
    """A folder."""

    is_remote = False

    def __init__(self, root: Path) -> None:
        self.root = root
        self._base = f"{root}{os.sep}"  # joined as text: a Path for every sample takes as long as its checks

    def where(self, name: str) -> str:
        """The file's path."""
        return self._base + name

    def identify(self, identity: str) -> None:
        """See Store; nothing to do, since a folder needs no cache."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is no such file."""
        path = self.root / name
        return path.stat().st_size if path.is_file() else None

    def read_record(self, name: str, offset: int, parts: Sequence[Bytes], check: Check) -> None:
        """See Store."""
        check(read_into(self._base + name, offset, parts))

    def chunks(self, name: str) -> Iterator[bytes]:
        """A whole file, piece by piece."""
        with (self.root / name).open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk


def read_into(path: str, offset: int, parts: Sequence[Bytes]) -> int:
    """Fill `parts`, one after the other, from a file's `offset` on; return how many bytes there were."""
    try:
        # Opened for every sample: that takes a few microseconds, the copy a hundred, and few files are open at once.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise AbsentError(f"{path}: no such shard; it was there when the data set was packed: pack again") from None
    try:
        left, done = [part.data for part in parts], 0
        while left:
            count = _read_some(descriptor, left, offset + done)
            if count == 0:
                break
            done += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if left:
                left[0] = left[0][count:]
        return done
    except OSError as error:
        error.filename = error.filename or path
        raise
    finally:
        os.close(descriptor)


def _read_some(descriptor: int, parts: Sequence[memoryview], offset: int) -> int:
    """Fill `parts` from an offset on, as far as one call goes; return how many bytes there were."""
    try:
        return os.preadv(descriptor, parts, offset)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        say_once("preadv", f"no reads into several buffers (preadv: {error.strerror}); samples are read more slowly")
        found = os.pread(descriptor, len(parts[0]), offset)
        parts[0][: len(found)] = found
        return len(found)
