"""The plan of one batch: which samples it holds and what happens to each. Pure."""

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


@dataclass(frozen=True)
class Planned:
    """One batch. Its slots are the samples of the batch, then their CutMix partners from outside it."""

    positions: Int64s
    """Of each slot in the epoch."""
    counts: npt.NDArray[np.bool_]
    """(B,) without the added partners; False for the repeats that fill up the last batch."""
    draws: Draws | None
    """Of each slot; partners are given as slots. None in evaluation."""
    rows: Int64s
    """Of each slot, its row of the manifest; changed where a bad sample is replaced (bad_samples.py)."""
    failed: dict[int, InputError] = field(default_factory=dict)
    """Why a slot's sample could not be read."""

    def panels(self, slot: int) -> list[int] | None:
        """Which of its sample's panels a slot shows at each position; None where all are where they were."""
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
    """When the cadences of each row were observed; only needed for signals in snippets of an observation."""

    def plan(self, epoch: int, micro: int) -> Planned:
        """Batch `micro` of this rank's share of an epoch."""
        positions, counts = self.share.positions(*divmod(micro, self.share.accumulate))
        if self.draws is None or self.canvas is None:
            return Planned(positions, counts, None, self.order.rows_at(epoch, positions))
        length = len(self.order)
        slots, partner = batch_slots(positions, counts, length)
        part = EpochPart(self.order.seed, epoch, slots, length)
        rows = self.order.rows_at(epoch, slots)
        observed = None if self.observed is None else self.observed.of(rows)
        draws = draw(self.draws, self.canvas, self.planes, part, observed)
        return Planned(slots, counts, replace(draws, partner=partner), rows)


def batch_slots(positions: Int64s, counts: npt.NDArray[np.bool_], length: int) -> tuple[Int64s, Int32s]:
    """The positions that a training batch has to hold, and for each of them the slot of its CutMix partner.

    The batch's own positions come first. The positions that count follow each other, so only the first and the last can
    have a partner elsewhere. They are added as extra slots; with an even batch size there are none. Repeats, and
    partners that were added, are their own partners.
    """
    own = positions[counts]
    partners = partner_positions(own, length)
    slots = np.concatenate([positions, np.setdiff1d(partners, own)])
    places = np.arange(len(slots), dtype=np.int32)
    place_of = {int(position): place for place, position in reversed(list(enumerate(slots)))}
    places[: len(own)] = [place_of[int(position)] for position in partners]
    return slots, places
