"""What the axes of a cadence are: time bins and channels in seconds and Hz, and when each panel began."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from shard_tools.cadence import CHANNEL_WIDTH_HZ, KAGGLE_SHAPE, PANELS, TIME_BIN_SECONDS

_KAGGLE_STEEPEST = 137.0  # channels per panel of the competition's data: half a channel per time bin


@dataclass(frozen=True)
class Axes:
    """The axes of a cadence's six panels, each of `time_bins` x `channels`."""

    time_bins: int
    channels: int
    bin_length_s: float
    channel_width_hz: float
    panel_starts_s: tuple[float, ...]
    """(6,) seconds since the start of the first panel, in the order of observation."""
    max_drift_hz_s: float
    """The steepest drift that is searched for."""

    @property
    def steepest(self) -> float:
        """Channels that the steepest line crosses in a panel."""
        return self.max_drift_hz_s * self.time_bins * self.bin_length_s / self.channel_width_hz

    @property
    def rows(self) -> npt.NDArray[np.float64]:
        """(6, T) the middle of each time bin, in time bins from the middle of the cadence."""
        starts = np.array(self.panel_starts_s) / self.bin_length_s
        rows = starts[:, None] + np.arange(self.time_bins)
        return np.asarray(rows - (rows[0, 0] + rows[-1, -1]) / 2)

    def hertz_per_second(self, rate: float) -> float:
        """The drift rate of a line that moves by `rate` channels a time bin."""
        return rate * self.channel_width_hz / self.bin_length_s

    def summed(self, time_bins: int) -> "Axes":
        """The axes after summing every `time_bins` neighbouring time bins."""
        return replace(self, time_bins=self.time_bins // time_bins, bin_length_s=self.bin_length_s * time_bins)


def kaggle_axes(time_bins: int = KAGGLE_SHAPE[1], channels: int = KAGGLE_SHAPE[2]) -> Axes:
    """The axes of the competition's snippets: the panels lie end to end, each divided into `time_bins`.

    The steepest line crosses the same number of channels in a panel, whatever `time_bins` and `channels` are.
    """
    length_s = KAGGLE_SHAPE[1] * TIME_BIN_SECONDS
    starts = tuple(length_s * panel for panel in range(PANELS))
    max_drift = _KAGGLE_STEEPEST * CHANNEL_WIDTH_HZ / length_s
    return Axes(time_bins, channels, length_s / time_bins, CHANNEL_WIDTH_HZ, starts, max_drift)
