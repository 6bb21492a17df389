"""Which sample comes next, on which rank: pure functions of the settings, epoch, position, rank and world size.

An epoch is a sequence of positions, each of which reads one sample. Step s takes the positions [s G, (s + 1) G), where
G is the global batch; rank r takes a contiguous part of them. So a step has the same samples for every world size that
divides the global batch.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.randomness import Int64s, Stream, permute, uniform
from shard_tools.errors import InputError

Sampling = Literal["uniform", "weighted", "sequential"]


@dataclass(frozen=True)
class Order:
    """Which row each position of an epoch reads.

    uniform: every row once, shuffled anew each epoch. weighted: as many independent draws with replacement as there
    are rows, with a row's chance proportional to its class's weight, as in torch's WeightedRandomSampler. sequential:
    every row once, in the order of `rows`.
    """

    rows: Int64s
    targets: npt.NDArray[np.int8]
    """Of every row; only `weighted` uses them."""
    sampling: Sampling = "uniform"
    seed: int = 0
    class_weights: tuple[float, float] | None = None
    """Weights of targets 0 and 1. None: both classes are drawn equally often."""

    def __post_init__(self) -> None:
        if not len(self.rows):
            raise InputError("no samples to read: the split or fold is empty; choose another")
        if self.sampling == "weighted" and not 0 <= self.targets.min() <= self.targets.max() <= 1:
            raise InputError("weighted sampling needs a target of 0 or 1 for every sample")
        if self.class_weights is not None and (min(self.class_weights) < 0 or sum(self.class_weights) <= 0):
            raise InputError(f"--class-weights {self.class_weights}: expected two numbers >= 0, not both 0")

    def __len__(self) -> int:
        return len(self.rows)

    def rows_at(self, epoch: int, positions: Int64s) -> Int64s:
        """The rows that these positions of an epoch read."""
        places = positions
        if self.sampling == "uniform":
            places = permute(self.seed, epoch, positions, len(self))
        elif self.sampling == "weighted":
            places = self._draw_by_class(uniform(self.seed, epoch, positions, Stream.ORDER))
        return self.rows[places]

    @cached_property
    def _classes(self) -> tuple[Int64s, Int64s]:
        return np.flatnonzero(self.targets == 0), np.flatnonzero(self.targets == 1)

    def _draw_by_class(self, drawn: npt.NDArray[np.float64]) -> Int64s:
        """Turn uniform numbers into places: first the class, then, with the rest of the number, its place."""
        classes = self._classes
        sizes = np.array([len(members) for members in classes])
        weights = np.array(self.class_weights or 1 / np.maximum(sizes, 1))
        share = sizes * weights
        if share.sum() <= 0:
            raise InputError(f"--class-weights {self.class_weights}: the only class in the data has weight 0")
        negative_share = share[0] / share.sum()
        is_positive = drawn >= negative_share
        low = np.where(is_positive, negative_share, 0.0)
        width = np.where(is_positive, 1 - negative_share, negative_share)
        size = sizes[is_positive.astype(np.int64)]
        place = np.minimum(((drawn - low) / width * size).astype(np.int64), size - 1)
        chosen = np.empty(len(drawn), np.int64)
        for target, members in enumerate(classes):
            chosen[is_positive == target] = members[place[is_positive == target]]
        return chosen


@dataclass(frozen=True)
class Share:
    """Which part of an epoch one rank reads."""

    length: int
    """Positions in an epoch."""
    batch_size: int
    """Of one rank in one forward pass."""
    accumulate: int = 1
    """Forward passes (micro-batches) of one step."""
    rank: int = 0
    world_size: int = 1

    @property
    def global_batch(self) -> int:
        """Samples of one step, over all ranks and micro-batches."""
        return self.batch_size * self.accumulate * self.world_size

    @property
    def steps(self) -> int:
        """Steps of an epoch; the same on every rank."""
        return -(-self.length // self.global_batch)

    def positions(self, step: int, micro: int = 0) -> tuple[Int64s, npt.NDArray[np.bool_]]:
        """The positions of one micro-batch, and which of them count.

        The last step is filled up with repeats from the start of the epoch, which do not count: so all batches have one
        size and all ranks one number of steps.
        """
        start = step * self.global_batch + (self.rank * self.accumulate + micro) * self.batch_size
        positions = np.arange(start, start + self.batch_size)
        return positions % self.length, positions < self.length
