"""Snippets as they are: the reader alone, for those who make their own images."""

from torch import Tensor

from pipeline.bad_samples import BadSamples
from pipeline.planner import Planned
from pipeline.reader import ReadAhead, Reader


class RawSnippets:
    """Hands out the snippets of planned batches as they are, float16 (B, P, t, F)."""

    def __init__(self, reader: Reader, bad: BadSamples) -> None:
        self._blocks = ReadAhead(reader, bad)

    def start(self, planned: Planned, epoch: int) -> None:
        """Begin to read a batch, and return at once."""
        self._blocks.start(planned, epoch)

    def next(self) -> tuple[Planned, Tensor]:
        """The oldest batch that was begun and not yet handed out; raises InputError for a sample that is bad."""
        block = self._blocks.next()
        return block.planned, block.snippets

    def reset(self) -> None:
        """Let go of all that was begun."""
        self._blocks.reset()

    def close(self) -> None:
        """Stop the reader's threads."""
        self._blocks.close()
