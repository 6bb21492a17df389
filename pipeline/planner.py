"""The plan of one batch: which samples it holds and what happens to each. Pure."""

from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from pipeline.augment import DrawConfig, Draws, Int32s, draw, partner_positions
from pipeline.canvas import CanvasConfig
from pipeline.observed_times import ObservedCadences
from pipeline.plan import Order, Share
from pipeline.randomness import EpochPart, Int64s
from shard_tools.errors import InputError

EXTRA = 2  # a contiguous batch of odd size has at most a partner before its start and one after its end
_AT_ONCE = 256  # samples that are planned together: NumPy's calls take hardly longer for them than for 32


@dataclass(frozen=True)
class Planned:
    """One batch. Its slots are the samples of the batch, then their CutMix partners from outside it."""

    positions: Int64s
    """Position in the epoch of each slot."""
    counts: npt.NDArray[np.bool_]
    """(B,) without the added partners; False for the repeats that fill up the last batch."""
    draws: Draws | None
    """Draws of each slot; partners are given as slots. None in evaluation."""
    rows: Int64s
    """Of each slot, its row of the manifest; changed where a bad sample is replaced (bad_samples.py)."""
    failed: dict[int, InputError] = field(default_factory=dict)
    """Why a slot's sample could not be read."""

    def panels(self, slot: int) -> list[int] | None:
        """Which of its sample's panels a slot shows at each position; None where their order is unchanged."""
        order = [] if self.draws is None else self.draws.panel_order[slot].tolist()
        return None if order == sorted(order) else order


@dataclass(frozen=True)
class Planner:
    """Plans the batches of one rank."""

    order: Order
    share: Share
    draws: DrawConfig | None
    canvas: CanvasConfig | None
    planes: tuple[int, int, int]
    """(N, T, F) of the canvas; only needed for draws."""
    observed: ObservedCadences | None = None
    """When the cadence of each row was observed; only needed for signals in snippets of an observation."""

    def plan(self, epoch: int, micro: int) -> Planned:
        """Batch `micro` of this rank's share of an epoch."""
        return self.plan_batches(epoch, range(micro, micro + 1))[0]

    def plan_batches(self, epoch: int, micros: range) -> list[Planned]:
        """Several batches of this rank's share of an epoch, each as `plan` gives it."""
        shared = [self.share.positions(*divmod(micro, self.share.accumulate)) for micro in micros]
        if self.draws is None or self.canvas is None:
            return [Planned(own, counts, None, self.order.rows_at(epoch, own)) for own, counts in shared]
        length = len(self.order)
        slots, partners = zip(*(batch_slots(own, counts, length) for own, counts in shared), strict=True)
        part = EpochPart(self.order.seed, epoch, np.concatenate(slots), length)
        rows = self.order.rows_at(epoch, part.positions)
        observed = None if self.observed is None else self.observed.of(rows)
        draws = draw(self.draws, self.canvas, self.planes, part, observed)
        planned, end = [], 0
        for (_, counts), positions, partner in zip(shared, slots, partners, strict=True):
            own = slice(end, end := end + len(positions))
            planned.append(Planned(positions, counts, replace(draws.at(own), partner=partner), rows[own]))
        return planned


class UpcomingBatches:
    """The batches of one rank, planned several at once and handed out one by one."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._count = max(1, _AT_ONCE // planner.share.batch_size)
        self._next = (0, 0)  # epoch and number of the first in `_planned`
        self._planned: deque[Planned] = deque()

    def take(self, epoch: int, micro: int) -> Planned:
        """Batch `micro` of an epoch. It belongs to the caller, who may change it."""
        if not self._planned or self._next != (epoch, micro):
            share = self._planner.share
            end = min(micro + self._count, share.steps * share.accumulate)
            self._planned = deque(self._planner.plan_batches(epoch, range(micro, end)))
        self._next = epoch, micro + 1
        return self._planned.popleft()


def batch_slots(positions: Int64s, counts: npt.NDArray[np.bool_], length: int) -> tuple[Int64s, Int32s]:
    """The positions that a training batch has to hold, and for each of them the slot of its CutMix partner.

    The batch's own positions come first. The positions that count follow each other, so only the first and the last can
    have a partner elsewhere. They are added as extra slots; with an even batch size there are none. Repeats, and
    partners that were added, are their own partners.
    """
    own = positions[counts]
    places = np.arange(len(positions), dtype=np.int32)
    if not len(own):
        return positions, places
    partners = partner_positions(own, length)
    outside = (partners < own[0]) | (partners > own[-1])
    added = partners[outside]
    places = np.arange(len(positions) + len(added), dtype=np.int32)
    places[: len(own)] = np.where(outside, len(positions) - 1 + np.cumsum(outside), partners - own[0])
    return np.concatenate([positions, added]), places
