"""A file that is hashed as a whole and then read again in parts, each checked to be what was hashed.

So a table of a gigabyte can be checked before any of it is decoded, and need not be kept for that.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from shard_tools.errors import InputError
from shard_tools.store import Bytes, Store

_PIECE_BYTES = 8 << 20  # read, hashed and checked at once
_AHEAD = 4  # pieces that are read while one is hashed
_KEPT_BYTES = 64 << 20  # of a file that is kept and not read again: its memory costs nothing to speak of


class HashedFile:
    """A file's SHA-256, and its pieces. Raises InputError where fewer bytes are found than the file has."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name, self.where = store, name, store.where(name)
        self.size = store.size(name) or 0
        """In bytes; 0 where there is no such file."""
        # What lies in a remote store is kept too: to read it again would be requests.
        self._kept = np.empty(self.size, np.uint8) if store.is_remote or self.size <= _KEPT_BYTES else None
        # The hash before each piece and after the last. A piece that takes one to the next is the one that was hashed:
        # another that does would be a collision of SHA-256.
        self._hashes: list[Any] = [hashlib.sha256()]
        for piece in self._stream():
            after = self._hashes[-1].copy()
            after.update(piece.data)
            self._hashes.append(after)
        self.sha256 = str(self._hashes[-1].hexdigest())

    def piece(self, number: int, buffer: Bytes) -> Bytes:
        """The bytes of a piece, in `buffer` or where they are kept. Raises InputError where they have changed."""
        if self._kept is not None:
            return self._kept[number * _PIECE_BYTES :][:_PIECE_BYTES]
        piece = self._read(number, buffer)
        found = self._hashes[number].copy()
        found.update(piece.data)
        if found.digest() != self._hashes[number + 1].digest():
            raise InputError(f"{self.where}: changed while it was read; start again")
        return piece

    def _stream(self) -> Iterator[Bytes]:
        """All pieces, read ahead. Each is gone with the next, whose memory is its own where nothing is kept."""
        count = -(-self.size // _PIECE_BYTES)
        if self._kept is None:
            buffers = [np.empty(_PIECE_BYTES, np.uint8) for _ in range(_AHEAD + 1)]
        else:
            buffers = [self._kept[start : start + _PIECE_BYTES] for start in range(0, self.size, _PIECE_BYTES)]
        ahead: deque[Future[Bytes]] = deque()
        with ThreadPoolExecutor(_AHEAD, thread_name_prefix="table") as pool:
            for number in range(count):
                ahead.append(pool.submit(self._read, number, buffers[number % len(buffers)]))
                if len(ahead) > _AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _read(self, number: int, buffer: Bytes) -> Bytes:
        start = number * _PIECE_BYTES
        piece = buffer[: min(_PIECE_BYTES, self.size - start)]

        def check(found: int) -> None:
            if found != len(piece):
                raise InputError(f"{self.where}: {start + found} bytes, expected {self.size}; pack again")

        self._store.read_record(self._name, start, (piece,), check)
        return piece


class HashedReader:
    """A HashedFile as Arrow reads files: from a place on. It holds the last piece, where the next read begins."""

    closed = False
    mode = "rb"

    def __init__(self, file: HashedFile) -> None:
        self._file, self._place = file, 0
        self._buffer, self._number, self._piece = np.empty(_PIECE_BYTES, np.uint8), -1, np.empty(0, np.uint8)

    def read(self, count: int = -1) -> bytes:
        """So many bytes, or those up to the end; fewer only there."""
        stop = self._file.size if count < 0 else min(self._place + count, self._file.size)
        parts = []
        while self._place < stop:
            number, start = divmod(self._place, _PIECE_BYTES)
            if number != self._number:
                self._number = -1  # while the buffer is written
                self._piece, self._number = self._file.piece(number, self._buffer), number
            part = self._piece[start : start + stop - self._place]
            parts.append(part.tobytes())
            self._place += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place: from the start, from here or from the end (`whence` 0, 1, 2); return it.

        Raises ValueError where that is before the start.
        """
        place = offset + (0, self._place, self._file.size)[whence]
        if place < 0:
            raise ValueError(f"place {place}, before the start")
        self._place = place
        return place

    def tell(self) -> int:
        """The place where the next read begins."""
        return self._place

    def readable(self) -> bool:
        """As Arrow asks."""
        return True

    def seekable(self) -> bool:
        """As Arrow asks."""
        return True

    def close(self) -> None:
        """As Arrow asks; nothing is open between reads."""
