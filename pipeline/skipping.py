"""What happens to a sample that cannot be read: the run stops, or another takes its place in a planned way."""

import logging
from collections.abc import Callable
from typing import Literal

import numpy as np

from pipeline.batches import Planned
from pipeline.plan import Order
from shard_tools.errors import InputError, StoreError
from shard_tools.manifest import Manifest

Policy = Literal["fail", "skip"]
_log = logging.getLogger(__name__)


class BadSamples:
    """The policy of one loader, and the samples that it has met."""

    def __init__(self, manifest: Manifest, order: Order, policy: Policy, max_bad: int) -> None:
        self._manifest, self._order, self._policy, self._max_bad = manifest, order, policy, max_bad
        self.skipped: dict[str, str] = {}
        """Key and reason of every sample that was replaced."""

    def settle(self, planned: Planned, epoch: int, read: Callable[[int, int], object]) -> list[int]:
        """Deal with what could not be read; return the slots that hold another sample now.

        `read` reads a row into a slot. Raises InputError naming shard and key where the policy is to fail (which it
        always is in evaluation), or where more samples are bad than are allowed.
        """
        if not planned.failed:
            return []
        slots = sorted(planned.failed)
        if planned.draws is None or self._policy == "fail":
            raise planned.failed[slots[0]]
        for slot in slots:
            self._note(planned, slot)
            planned.rows[slot] = self._read_next(planned, epoch, slot, read)
            del planned.failed[slot]
        return slots

    def _note(self, planned: Planned, slot: int) -> None:
        reason, key = planned.failed[slot], self._manifest.key(int(planned.rows[slot]))
        if key not in self.skipped:
            self.skipped[key] = str(reason)
            _log.warning("skipped %s: %s", key, reason)
        if len(self.skipped) > self._max_bad:
            raise InputError(f"more than --max-bad {self._max_bad} samples could not be read; last: {reason}")

    def _read_next(self, planned: Planned, epoch: int, slot: int, read: Callable[[int, int], object]) -> int:
        """The next sample of the epoch that can be read: of the plan alone, so the same on any number of ranks."""
        position = int(planned.positions[slot])
        for after in range(1, len(self._order)):
            (row,) = self._order.rows_at(epoch, np.array([(position + after) % len(self._order)])).tolist()
            if self._manifest.key(row) in self.skipped:
                continue
            try:
                read(slot, row)
                return int(row)
            except StoreError:
                raise
            except InputError:
                continue  # it is counted where the plan has it
        raise planned.failed[slot]
