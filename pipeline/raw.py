"""Snippets as they are: the reader alone, for those who make their own images."""

from collections import deque

from torch import Tensor

from pipeline.batches import Planned
from pipeline.reader import Block, Reader
from pipeline.skipping import BadSamples


class RawSnippets:
    """Hands out the snippets of planned batches as they are, float16 (B, P, t, F)."""

    def __init__(self, reader: Reader, bad: BadSamples) -> None:
        self._reader, self._bad = reader, bad
        self._reading: deque[tuple[Block, int]] = deque()

    def start(self, planned: Planned, epoch: int) -> None:
        """Begin to read a batch, and return at once."""
        self._reading.append((self._reader.start(planned), epoch))

    def next(self) -> tuple[Planned, Tensor]:
        """The oldest batch that was begun and not yet handed out; raises InputError for a sample that is bad."""
        block, epoch = self._reading.popleft()
        block.wait()
        self._bad.settle(block.planned, epoch, lambda slot, row: self._reader.read(block, slot, row))
        return block.planned, block.snippets

    def reset(self) -> None:
        """Let go of all that was begun."""
        while self._reading:
            self._reading.popleft()[0].wait()

    def close(self) -> None:
        """Stop the reader's threads, and let go of what was begun."""
        self._reader.close()
        self._reading.clear()
