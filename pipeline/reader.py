"""Reads samples in advance, on a few threads, into buffers that are reused, and checks them.

Plain reads, not mmap: if a mapped shard is cut short, the process is killed (SIGBUS); a short read raises an error. The
threads read what was planned, and decide nothing.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pipeline.bad_samples import BadSamples
from pipeline.buffers import BufferPool
from pipeline.planner import Planned
from shard_tools.errors import InputError, StoreError
from shard_tools.manifest import Manifest
from shard_tools.sample import read_values


@dataclass
class Block:
    """The samples of one batch while they are read."""

    planned: Planned
    snippets: Tensor
    """(slots, P, T, F) float16; its memory is reused when it is deleted."""
    pending: list[Future[None]] = field(default_factory=list)

    def wait(self) -> None:
        """Wait until all is read. Raises StoreError if the store failed."""
        wait(self.pending)
        for future in self.pending:
            future.result()


class Reader:
    """Reads batches of a manifest's samples."""

    def __init__(self, manifest: Manifest, max_slots: int, threads: int, pinned: bool = False) -> None:
        """`pinned` buffers are copied to a GPU directly."""
        self._manifest, self._threads = manifest, threads
        self._pool = BufferPool((max_slots, *manifest.shape), np.float16, pinned)
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="reader")

    def start(self, planned: Planned) -> Block:
        """Begin to read a batch and return at once."""
        block = Block(planned, self._pool.take()[: len(planned.rows)])
        slots = np.arange(len(planned.rows))
        for part in np.array_split(slots, min(self._threads, len(slots))):
            block.pending.append(self._executor.submit(self.read, block, part.tolist()))
        return block

    def read(self, block: Block, slots: list[int]) -> None:
        """Read slots of a block, and note in its plan which of them could not be read."""
        for slot in slots:
            values = block.snippets[slot].numpy().reshape(-1).view(np.uint8)
            try:
                read_values(self._manifest, int(block.planned.rows[slot]), values, block.planned.panels(slot))
            except StoreError:
                raise  # the store failed, not the sample: no other could be read either
            except InputError as error:
                block.planned.failed[slot] = error

    def close(self) -> None:
        """Wait for reads that are under way and stop the threads."""
        self._executor.shutdown(cancel_futures=True)


class ReadAhead:
    """Reads several batches at once, and hands them out in order and without bad samples."""

    def __init__(self, reader: Reader, bad: BadSamples) -> None:
        self._reader, self._bad = reader, bad
        self._reading: deque[tuple[Block, int]] = deque()

    def __len__(self) -> int:
        """Number of blocks that were begun and not yet handed out."""
        return len(self._reading)

    def start(self, planned: Planned, epoch: int) -> None:
        """Begin to read a batch and return at once."""
        self._reading.append((self._reader.start(planned), epoch))

    def next(self) -> Block:
        """Wait for the oldest block. Raises InputError if a sample is bad and is not replaced."""
        block, epoch = self._reading.popleft()
        block.wait()
        self._bad.settle(block.planned, epoch, lambda slots: self._reader.read(block, slots))
        return block

    def reset(self) -> None:
        """Drop all batches that were begun."""
        while self._reading:
            self._reading.popleft()[0].wait()

    def close(self) -> None:
        """Stop the reader's threads and drop what was begun."""
        self._reader.close()
        self._reading.clear()
