"""Large columns in little memory: on a fresh machine its first touch costs more than reading what goes there."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int32] | Int64s
_SLICE = 1 << 16  # few enough for a core's cache


@dataclass(frozen=True)
class Places:
    """The shard and the offset of each sample, as runs of samples that lie in one shard at equal distances.

    `pack` writes samples of one shape one after the other, so a run is a shard as a rule; at worst it is a sample.
    """

    starts: Int64s
    """The first sample of each run."""
    shards: npt.NDArray[np.int32]
    """Of each run."""
    offsets: Int64s
    """Of each run's first sample."""
    steps: Int64s
    """Bytes from each sample of a run to the next."""

    @classmethod
    def join(cls, parts: "Iterable[Places]") -> "Places":
        """One after the other."""
        columns = zip(*((part.starts, part.shards, part.offsets, part.steps) for part in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns))

    def at(self, row: int) -> tuple[int, int]:
        """Shard and offset of one sample."""
        run = int(self.starts.searchsorted(row, "right")) - 1
        return int(self.shards[run]), int(self.offsets[run] + (row - self.starts[run]) * self.steps[run])

    def spread(self, length: int) -> tuple[npt.NDArray[np.int32], Int64s]:
        """Shards and offsets of all samples, each an array of this length."""
        lengths = np.diff(self.starts, append=length)
        within = np.arange(length) - np.repeat(self.starts, lengths)
        offsets = np.repeat(self.offsets, lengths) + within * np.repeat(self.steps, lengths)
        return np.repeat(self.shards, lengths), offsets


def find_places(start: int, shard: npt.NDArray[np.int32], offset: Int64s) -> Places:
    """The runs of some samples, of which the first has the number `start`; offsets are not negative."""
    moves = shard[1:] != shard[:-1]
    steps = np.diff(offset)
    begins = np.ones(len(shard), np.bool_)
    begins[1:] = moves
    begins[2:] |= (steps[1:] != steps[:-1]) & ~moves[:-1]  # the first step in a shard is like none before it
    first = np.flatnonzero(begins)
    # A run of a single sample takes no step, so that any will do.
    return Places(start + first, shard[first], offset[first], np.append(steps, 0)[first])


def numbers_where(mask_of: Callable[[slice], npt.NDArray[np.bool_]], length: int) -> Numbers:
    """As np.flatnonzero of a mask of this length, which is made slice by slice; of 32 bits where they suffice."""
    numbers: Any = np.empty(length, np.int32 if length <= 2**31 else np.int64)
    found = 0
    for start in range(0, length, _SLICE):
        new = np.flatnonzero(mask_of(slice(start, min(start + _SLICE, length))))
        numbers[found : found + len(new)] = new + start
        found += len(new)
    return numbers[:found]  # type: ignore[no-any-return]  # what lies behind was never touched, so takes no memory
