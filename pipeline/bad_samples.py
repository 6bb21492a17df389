"""What happens to a sample that cannot be read: the run stops, or a sample that the plan determines takes its place."""

import logging
from collections.abc import Callable
from typing import Literal

import numpy as np

from pipeline.plan import Order
from pipeline.planner import Planned
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest

Policy = Literal["fail", "skip"]
_log = logging.getLogger(__name__)


class BadSamples:
    """The policy of one loader, and the bad samples that it has met."""

    def __init__(self, manifest: Manifest, order: Order, policy: Policy, max_bad: int) -> None:
        self._manifest, self._order, self._policy, self._max_bad = manifest, order, policy, max_bad
        self.skipped: dict[str, str] = {}
        """Key and reason of every sample that was replaced."""

    def settle(self, planned: Planned, epoch: int, read: Callable[[list[int]], object]) -> None:
        """Replace samples that could not be read, until every slot of the batch was read.

        `read` reads the given slots again and notes in `planned.failed` which of them could not be read. Raises
        InputError naming shard and key if the policy is to fail (always in evaluation), if more samples are bad than
        are allowed, or if no other sample is left.
        """
        replaced: dict[int, InputError] = {}
        bad_rows: set[int] = set()
        while planned.failed:
            if planned.draws is None or self._policy == "fail":
                raise planned.failed[min(planned.failed)]
            for slot in sorted(planned.failed):
                self._note(planned, slot)
                bad_rows.add(int(planned.rows[slot]))
            replaced |= planned.failed
            planned.failed.clear()
            read(self._replace(planned, epoch, replaced, bad_rows))

    def _note(self, planned: Planned, slot: int) -> None:
        reason, key = planned.failed[slot], self._manifest.key(int(planned.rows[slot]))
        if key not in self.skipped:
            self.skipped[key] = str(reason)
            _log.warning("skipped %s: %s", key, reason)
        if len(self.skipped) > self._max_bad:
            raise InputError(f"more than --max-bad {self._max_bad} samples could not be read; last: {reason}")

    def _replace(self, planned: Planned, epoch: int, replaced: dict[int, InputError], bad_rows: set[int]) -> list[int]:
        """Choose a sample for each slot in `replaced`; return the slots whose sample has changed.

        All of them are chosen anew each time, in the order of the epoch. So the result depends on which samples are bad
        and not on when each was found to be, and it is the same on any number of ranks.
        """
        before, mates = planned.rows.copy(), _mates(planned)
        left = sorted(replaced, key=lambda slot: int(planned.positions[slot]))
        while left:
            slot = left.pop(0)
            refused, mate = set(bad_rows), mates.get(slot)
            if mate is not None and mate not in left:
                refused.add(int(planned.rows[mate]))  # else it would be mixed with itself
            row = self._next_row(epoch, int(planned.positions[slot]), refused)
            if row is None:
                raise InputError(f"{replaced[slot]}; no other sample of the epoch can take its place")
            planned.rows[slot] = row
        return [int(slot) for slot in np.flatnonzero(planned.rows != before)]

    def _next_row(self, epoch: int, position: int, refused: set[int]) -> int | None:
        """The next row that the epoch reads after a position and that is not refused; None if there is none."""
        for after in range(1, len(self._order)):
            (row,) = self._order.rows_at(epoch, np.array([(position + after) % len(self._order)])).tolist()
            if row not in refused:
                return int(row)
        return None


def _mates(planned: Planned) -> dict[int, int]:
    """For each slot that may be mixed with another, that other slot."""
    mates: dict[int, int] = {}
    for slot, partner in enumerate([] if planned.draws is None else planned.draws.partner.tolist()):
        if slot != partner:
            mates |= {slot: partner, partner: slot}  # also where the partner was only added to the batch
    return mates
