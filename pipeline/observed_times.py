"""When the panels of observed cadences were recorded, and how fast lines may drift in them: for added signals.

Axes: c cadence, n samples, P panel, t time bin.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from pipeline.randomness import Int64s, Stream
from pipeline.signals import Float64s, Numbers, Times
from shard_tools.axes import Axes
from shard_tools.manifest import Manifest
from shard_tools.observation.observed_axes import axes_of, cadence_of, is_observed

_WIDEST = 0.7  # largest share of the channels that a path drifts over while its signal is on


@dataclass(frozen=True)
class ObservedPanels:
    """The times of n samples, or of all cadences."""

    times: Times
    steepest: Float64s
    """(n,) channels that the steepest line crosses over the cadence."""

    def at(self, rows: Int64s) -> Self:
        """The times of the samples `rows`, which may repeat."""
        return type(self)(self.times.at(rows), self.steepest[rows])

    def draw_drifts(self, channels: int, length: Float64s, number: Numbers) -> Float64s:
        """(n,) channels over the cadence, of either sign, all rates equally likely; a signal is on for its `length`."""
        return (2 * number(Stream.SIGNAL_DRIFT) - 1) * np.minimum(self.steepest, _WIDEST * channels / length)


@dataclass(frozen=True)
class ObservedCadences:
    """The times of every cadence of a data set, and the cadence of each row."""

    each: ObservedPanels
    """(c, ...)"""
    cadence: npt.NDArray[np.int64]
    """(rows,)"""

    def of(self, rows: Int64s) -> ObservedPanels:
        """The times of some rows."""
        return self.each.at(self.cadence[rows])


def to_times(axes: Sequence[Axes]) -> ObservedPanels:
    """The times of cadences with these axes, which must all have the same number of time bins."""
    starts = np.array([each.panel_starts_s for each in axes])
    bin_length = np.array([each.bin_length_s for each in axes])[:, None]
    time_bins = axes[0].time_bins
    length = starts[:, -1:] + time_bins * bin_length  # (c, 1) in seconds
    bins = starts[:, :, None] + bin_length[:, None] * np.arange(time_bins)
    times = Times(bins.reshape(len(axes), -1) / length, starts / length, (starts + time_bins * bin_length) / length)
    steepest = [each.max_drift_hz_s / each.channel_width_hz for each in axes] * length[:, 0]
    return ObservedPanels(times, steepest)


def observed_cadences(manifest: Manifest) -> ObservedCadences | None:
    """When the cadences of a data set were observed; None where none was cut by `ingest`.

    Raises InputError naming a table that is missing or was changed.
    """
    return ObservedCadences(to_times(axes_of(manifest)), cadence_of(manifest)) if is_observed(manifest) else None
