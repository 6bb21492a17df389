"""Samples to checked bytes: plain reads into reused buffers, on a few threads, ahead of their use.

Plain reads, not mmap: a shard that is cut short under a mapping kills the process (SIGBUS), a short read raises.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.randomness import Int64s
from shard_tools.errors import InputError
from shard_tools.manifest import TAR_BLOCK, Manifest, check_record

Bytes = npt.NDArray[np.uint8]


@dataclass
class Block:
    """The samples of one batch while they are read; its buffer is used again `blocks` reads later."""

    rows: Int64s
    buffer: Bytes
    pending: list[Future[None]]


class Reader:
    """Reads rows of a manifest; `blocks` batches may be in use or on their way at once."""

    def __init__(
        self,
        manifest: Manifest,
        batch_size: int,
        blocks: int,
        threads: int,
        allocate: Callable[[tuple[int, int]], Bytes] = lambda shape: np.empty(shape, np.uint8),
    ) -> None:
        """`allocate` makes the buffers; on a GPU they come from pinned memory, which copies without a detour."""
        self._manifest = manifest
        self._threads = threads
        # Each sample is read with the tar header before it: its name tells whether the manifest still points right.
        record_bytes = TAR_BLOCK + int(manifest.size.max())
        self._buffers = [allocate((batch_size, record_bytes)) for _ in range(blocks)]
        self._next = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reader")

    def start(self, rows: Int64s) -> Block:
        """Begin to read `rows` (at most `batch_size`) and return at once."""
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        block = Block(rows, buffer, [])
        for part in np.array_split(np.arange(len(rows)), min(self._threads, len(rows))):
            block.pending.append(self._pool.submit(self._read_part, block, part))
        return block

    def finish(self, block: Block) -> list[Bytes]:
        """Wait for a block and return the npy bytes of each of its samples, views of the block's buffer.

        Raises InputError naming shard and key where a file is missing, cut short or not what the manifest says.
        """
        for future in block.pending:
            future.result()
        sizes = self._manifest.size[block.rows]
        return [block.buffer[slot, TAR_BLOCK : TAR_BLOCK + size] for slot, size in enumerate(sizes)]

    def close(self) -> None:
        """Wait for reads that are under way and stop the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _read_part(self, block: Block, slots: Int64s) -> None:
        for slot in slots:
            row = int(block.rows[slot])
            self._read_row(row, block.buffer[slot, : TAR_BLOCK + int(self._manifest.size[row])])

    def _read_row(self, row: int, buffer: Bytes) -> None:
        manifest = self._manifest
        shard = manifest.shards[int(manifest.shard[row])]
        path, key, size = manifest.root / shard.name, manifest.key(row), int(manifest.size[row])
        found = read_into(path, int(manifest.offset[row]) - TAR_BLOCK, buffer)
        check_record(buffer[:found].data, key, size, manifest.shape, f"{path}, {key}")


def read_into(path: Path, offset: int, buffer: Bytes) -> int:
    """Fill `buffer` from a file's `offset` on; return how many bytes there were."""
    try:
        # Opened for every sample: a few microseconds against the hundred of the copy, and no limit on open files.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InputError(f"{path}: no such shard; it was there when the data set was packed: pack again") from None
    try:
        view, done = buffer.data, 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done
    finally:
        os.close(descriptor)
