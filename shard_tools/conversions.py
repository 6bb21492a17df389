"""What packing did to files, beyond copying their bytes."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from shard_tools.cadence import Snippet
from shard_tools.float16 import Rounding

_log = logging.getLogger(__name__)


@dataclass
class Conversions:
    """What was done to files, beyond copying their bytes."""

    differences: dict[str, int] = field(default_factory=dict)
    """Number of files that differed from our form, by how they did."""
    largest_rounding: float = 0.0
    rounding_of_noise: float = 0.0
    empty: int = 0
    """Number of snippets with nothing but zeros."""

    def add(self, snippet: Snippet) -> None:
        """Count one."""
        rounding = snippet.rounding or Rounding(0.0, 0.0)
        # The first values tell as a rule, so that no snippet is looked through twice.
        empty = not snippet.values[0, 0].any() and not snippet.values.any()
        self.join(Conversions(dict.fromkeys(snippet.differences, 1), rounding.largest, rounding.of_noise, int(empty)))

    def join(self, other: "Conversions") -> None:
        """Add what was done to other files."""
        for name, count in other.differences.items():
            self.differences[name] = self.differences.get(name, 0) + count
        self.largest_rounding = max(self.largest_rounding, other.largest_rounding)
        self.rounding_of_noise = max(self.rounding_of_noise, other.rounding_of_noise)
        self.empty += other.empty


def report_conversions(each: Iterable[Conversions]) -> None:
    """Say once what was not packed byte for byte, and what is odd."""
    done = Conversions()
    for conversions in each:
        done.join(conversions)
    if done.differences:
        found = ", ".join(f"{count:,} of {name}" for name, count in sorted(done.differences.items()))
        _log.info("files converted to float16, C order, npy format 1.0: %s", found)
    if done.largest_rounding:
        share = 100 * done.rounding_of_noise
        _log.info(
            "rounding to float16 changed a value by %.2g at most, and added at most %.2g %% of a panel's noise",
            done.largest_rounding,
            share,
        )
    if done.empty:
        _log.warning("snippets of nothing but zeros: %d; were their values too small for float16?", done.empty)
