"""The engine without a canvas: snippets as they are, for programs that make their own images."""

from torch import Tensor

from pipeline.bad_samples import BadSamples
from pipeline.planner import Planned
from pipeline.reader import ReadAhead, Reader


class RawSnippets:
    """Hands out the snippets of planned batches as they are, float16 (B, P, t, F)."""

    def __init__(self, reader: Reader, bad: BadSamples) -> None:
        self._blocks = ReadAhead(reader, bad)

    def start(self, planned: Planned, epoch: int) -> None:
        """Begin to read a batch and return at once."""
        self._blocks.start(planned, epoch)

    def next(self) -> tuple[Planned, Tensor]:
        """Wait for the oldest batch that was begun. Raises InputError if a sample is bad and is not replaced."""
        block = self._blocks.next()
        return block.planned, block.snippets

    def reset(self) -> None:
        """Drop all batches that were begun."""
        self._blocks.reset()

    def close(self) -> None:
        """Stop the reader's threads."""
        self._blocks.close()
