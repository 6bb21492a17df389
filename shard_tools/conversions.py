"""Counts of what packing converted, and how much rounding lost."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from shard_tools.cadence import Snippet
from shard_tools.float16 import Rounding

_log = logging.getLogger(__name__)


@dataclass
class Conversions:
    """The conversions of some files, and their largest rounding."""

    differences: dict[str, int] = field(default_factory=dict)
    """Number of files for each kind of difference from our form."""
    largest_rounding: float = 0.0
    rounding_of_noise: float = 0.0
    empty: int = 0
    """Number of snippets with nothing but zeros."""

    def add(self, snippet: Snippet) -> None:
        """Count one snippet."""
        rounding = snippet.rounding or Rounding(0.0, 0.0)
        # The first time bin usually decides, which spares a second pass over the snippet.
        empty = not snippet.values[0, 0].any() and not snippet.values.any()
        self.join(Conversions(dict.fromkeys(snippet.differences, 1), rounding.largest, rounding.of_noise, int(empty)))

    def join(self, other: "Conversions") -> None:
        """Add the conversions of other files."""
        for name, count in other.differences.items():
            self.differences[name] = self.differences.get(name, 0) + count
        self.largest_rounding = max(self.largest_rounding, other.largest_rounding)
        self.rounding_of_noise = max(self.rounding_of_noise, other.rounding_of_noise)
        self.empty += other.empty


def report_conversions(each: Iterable[Conversions]) -> None:
    """Log what was converted, and warn of snippets of nothing but zeros."""
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
