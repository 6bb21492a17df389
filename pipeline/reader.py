"""Samples to checked bytes: plain reads into reused buffers, on a few threads, ahead of their use.

Plain reads, not mmap: a shard that is cut short under a mapping kills the process (SIGBUS), a short read raises.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from pipeline.randomness import Int64s
from shard_tools.errors import InputError, StoreError
from shard_tools.manifest import TAR_BLOCK, Manifest
from shard_tools.sample import read_record
from shard_tools.store import Bytes


@dataclass
class Block:
    """The samples of one batch while they are read; its buffer is used again `blocks` reads later."""

    rows: Int64s
    buffer: Bytes
    pending: list[Future[None]] = field(default_factory=list)
    failed: dict[int, InputError] = field(default_factory=dict)
    """Why a slot's sample could not be read."""


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
        block = Block(rows.copy(), buffer)
        for part in np.array_split(np.arange(len(rows)), min(self._threads, len(rows))):
            block.pending.append(self._pool.submit(self._read_part, block, part))
        return block

    def finish(self, block: Block) -> None:
        """Wait until a block is read; `block.failed` then tells of samples that are not what the manifest says."""
        for future in block.pending:
            future.result()

    def retry(self, block: Block, slot: int, row: int) -> None:
        """Read another row into a slot that failed. Raises InputError where that fails too."""
        self._read_row(row, self._slot(block, slot, row))
        block.rows[slot] = row
        del block.failed[slot]

    def data(self, block: Block) -> list[Bytes]:
        """The npy bytes of each sample of a block, views of its buffer.

        Raises InputError naming shard and key where a file is missing, cut short or not what the manifest says.
        """
        for slot in sorted(block.failed):
            raise block.failed[slot]
        sizes = self._manifest.size[block.rows]
        return [block.buffer[slot, TAR_BLOCK : TAR_BLOCK + size] for slot, size in enumerate(sizes)]

    def close(self) -> None:
        """Wait for reads that are under way and stop the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _read_part(self, block: Block, slots: Int64s) -> None:
        for slot in slots.tolist():
            row = int(block.rows[slot])
            try:
                self._read_row(row, self._slot(block, slot, row))
            except StoreError:
                raise  # of no sample's own: none could be read in its place
            except InputError as error:
                block.failed[slot] = error

    def _slot(self, block: Block, slot: int, row: int) -> Bytes:
        return block.buffer[slot, : TAR_BLOCK + int(self._manifest.size[row])]

    def _read_row(self, row: int, buffer: Bytes) -> None:
        read_record(self._manifest, row, buffer)
