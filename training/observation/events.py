"""Join the lines of snippets to events: a line that several overlapping snippets show is one event."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shard_tools.axes import Axes
from training.observation.snippet_lines import SnippetLine

Float64s = npt.NDArray[np.float64]

_APART = 4.0  # channels, plus half of both widths: lines this close in all panels that show both are one event
_WHOLE = 0.9  # share of a line's time bins that the snippet shows; a line with less is flagged as partial
PARTIAL = "partial"
"""Flag: more than a tenth of the line lies outside the snippet or on blank values."""


@dataclass(frozen=True)
class SnippetOrigin:
    """Where a snippet lies, and when it was observed."""

    cadence: int
    """Index of its cadence among those of the data set."""
    axes: Axes
    first_mhz: float
    """Centre of its channel 0."""
    flags: str
    """The snippet's flags, separated by spaces."""


@dataclass(frozen=True)
class Event:
    """One line, as seen in the snippet in which it lies farthest from the edges."""

    line: SnippetLine
    origin: SnippetOrigin
    snippets: int
    """How many snippets show it."""

    @property
    def start_mhz(self) -> float:
        """Frequency at the start of the first panel."""
        return self.panel_mhz(0)

    def panel_mhz(self, panel: int) -> float:
        """Frequency at the start of a panel."""
        axes = self.origin.axes
        channel = self.line.fit.channels(axes.rows[panel, :1] - 0.5)[0]
        return float(self.origin.first_mhz + channel * axes.channel_width_hz / 1e6)

    @property
    def drift_rate_hz_s(self) -> float:
        """Above 0 if the frequency rises."""
        return self.origin.axes.hertz_per_second(self.line.fit.rate)

    @property
    def bandwidth_hz(self) -> float:
        """Width of the line less its drift within a time bin; at least a channel, as narrower lines look the same."""
        return max(1.0, self.line.fit.width - abs(self.line.fit.rate)) * self.origin.axes.channel_width_hz

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags of its snippet and its own."""
        return (*self.origin.flags.split(), *([PARTIAL] if self.line.fit.inside < _WHOLE else []))


def merge_lines(lines: Iterable[SnippetLine], origins: Sequence[SnippetOrigin]) -> list[Event]:
    """One event for each line, from lower to higher frequencies; `origins` has one entry for each row.

    The score and everything else come from the snippet in which the line is farthest from the edges: another snippet
    may lack the panels that show the line as interference.
    """
    placed = [_Placed.of(line, origins[line.row]) for line in lines]
    placed.sort(key=lambda each: -each.margin)
    by_bin: dict[tuple[int, int], list[_Placed]] = defaultdict(list)
    kept: list[_Placed] = []
    for each in placed:
        cadence, number = each.bin
        near = (other for step in (-1, 0, 1) for other in by_bin[cadence, number + step])
        same = next((other for other in near if other.is_same(each)), None)
        if same is None:
            kept.append(each)
            by_bin[each.bin].append(each)
        else:
            same.snippets.add(each.line.row)
    events = [Event(each.line, each.origin, len(each.snippets)) for each in kept]
    return sorted(events, key=lambda event: (event.origin.cadence, event.start_mhz))


@dataclass(frozen=True)
class _Placed:
    """A line with its channels in all panels, counted from 0 MHz: comparable between the snippets of a cadence."""

    line: SnippetLine
    origin: SnippetOrigin
    channels: Float64s
    """(P,) in the middle of each panel."""
    margin: float
    """Channels from the line to the snippet's nearest edge; negative if it leaves the snippet."""
    snippets: set[int]

    @classmethod
    def of(cls, line: SnippetLine, origin: SnippetOrigin) -> "_Placed":
        axes = origin.axes
        within = line.fit.channels(axes.rows)
        margin = float(min(within.min(), axes.channels - 1 - within.max()))
        channels = origin.first_mhz * 1e6 / axes.channel_width_hz + within.mean(axis=1)
        return cls(line, origin, channels, margin, {line.row})

    @property
    def bin(self) -> tuple[int, int]:
        """Bin of a table in which lines of the same event lie in one bin or in neighbouring ones."""
        # Two such lines are close in a panel that shows both. At the cadence's middle they may have drifted apart, by
        # twice the steepest rate.
        axes = self.origin.axes
        width = 2 * axes.steepest / axes.time_bins * np.abs(axes.rows).max() + 2 * _APART + axes.channels / 8
        return self.origin.cadence, int(self.channels[[0, -1]].mean() // width)

    def is_same(self, other: "_Placed") -> bool:
        """Whether both are close to each other in all panels that show both; in at least one."""
        shown = np.isfinite(self.line.fit.panel_snr) & np.isfinite(other.line.fit.panel_snr)
        apart = np.abs(self.channels - other.channels)[shown]
        most = _APART + (self.line.fit.width + other.line.fit.width) / 2
        return bool(len(apart) and apart.max() <= most)
