"""One event of an observation as a waterfall: frequency in MHz, time in s, each panel at its own time.

Axes of a snippet: P position, T time bin, F frequency channel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, MaxNLocator

from reports.plots import OFF_COLOUR, ON_COLOUR

Floats = npt.NDArray[np.floating]

PANEL_NAMES = ("A", "B", "A", "C", "A", "D")
_INCHES = (4.3, 5.4)
_FEWEST_CHANNELS = 96  # of a picture: enough noise on both sides of a steady line to judge it by
_MARGIN = 0.35  # share of the channels that the line crosses, added on either side
_MOST_ROWS, _MOST_CHANNELS = 32, 110  # of a panel: there are no pixels for more, and summing brings out faint lines
# Quantiles; a line fills about 1 % of the picture and must not be cut off.
_DARKEST, _BRIGHTEST = 0.02, 0.998
_SHADES = 24  # as in the other waterfalls: the palette of 128 colours also has to hold marks and labels
_LINE_COLOUR = "#e03131"


@dataclass(frozen=True)
class EventLine:
    """A line as the table of candidates gives it."""

    frequency_mhz: float
    """Frequency at the start of the first panel."""
    drift_rate_hz_s: float

    def mhz_at(self, seconds: float) -> float:
        """Its frequency so many seconds after the start of the first panel."""
        return self.frequency_mhz + self.drift_rate_hz_s * seconds / 1e6


@dataclass(frozen=True)
class Panels:
    """The six panels of a snippet, with their times and frequencies."""

    values: Floats
    """(P, T, F), in standard deviations of the noise."""
    starts_s: Sequence[float]
    """(P,) seconds since the start of the first panel."""
    bin_length_s: float
    first_mhz: float
    """Centre of channel 0, the lowest."""
    channel_width_hz: float

    @property
    def length_s(self) -> float:
        """Length of each panel."""
        return int(self.values.shape[1]) * self.bin_length_s

    @property
    def edges_mhz(self) -> tuple[float, float]:
        """Lower edge of the lowest channel, upper edge of the highest."""
        half = self.channel_width_hz / 2e6
        return self.first_mhz - half, self.first_mhz + (2 * self.values.shape[2] - 1) * half

    def around(self, line: EventLine) -> "Panels":
        """The channels around a line, with noise on both sides of it."""
        end_mhz = line.mhz_at(self.starts_s[-1] + self.length_s)
        width_mhz = self.channel_width_hz / 1e6
        low, high = sorted((line.frequency_mhz, end_mhz))
        crossed = (high - low) / width_mhz
        half = max(_FEWEST_CHANNELS / 2, crossed * (0.5 + _MARGIN))
        middle = ((low + high) / 2 - self.first_mhz) / width_mhz
        channels = self.values.shape[2]
        first = int(np.clip(np.floor(middle - half), 0, max(0, channels - _FEWEST_CHANNELS)))
        last = int(np.clip(np.ceil(middle + half), min(channels, first + _FEWEST_CHANNELS), channels))
        return Panels(
            self.values[:, :, first:last],
            self.starts_s,
            self.bin_length_s,
            self.first_mhz + first * width_mhz,
            self.channel_width_hz,
        )


def draw_event(panels: Panels, line: EventLine, snrs: Sequence[float]) -> Figure:
    """The panels of one event, with arrowheads in the pauses where its line enters and leaves each panel.

    Nothing is drawn over the panels, so that the signal can be judged. `snrs` is one for each panel.
    """
    panels = panels.around(line)
    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.add_subplot()
    tops, is_true = shown_starts(panels.starts_s, panels.length_s)
    shown = _summed(_summed(panels.values, 1, _MOST_ROWS), 2, _MOST_CHANNELS)
    low, high = np.quantile(shown, (_DARKEST, _BRIGHTEST))
    for top, values in zip(tops, shown, strict=True):
        image = axes.imshow(
            values, extent=(*panels.edges_mhz, top + panels.length_s, top), aspect="auto", interpolation="nearest",
            vmin=float(low), vmax=float(high), cmap=matplotlib.colormaps["viridis"].resampled(_SHADES),
        )  # fmt: skip
    _mark_panels(axes, panels, tops, snrs)
    _mark_line(axes, panels, tops, line)
    axes.set_xlim(*panels.edges_mhz)
    pause = panels.length_s * 0.03  # room for the first and the last arrowhead
    axes.set_ylim(tops[-1] + panels.length_s + pause, -pause)
    axes.set_xlabel("frequency (MHz)", fontsize=8)
    axes.set_ylabel(f"time (s){'' if is_true else '; long pauses are shortened'}", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(FormatStrFormatter(f"%.{_decimals(panels)}f"))
    axes.set_yticks(tops, [f"{start:.0f}" for start in panels.starts_s])
    axes.tick_params(labelsize=8)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=40, pad=0.01)
    bar.set_label("power above the band, in standard deviations of the noise", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    return figure


def shown_starts(starts_s: Sequence[float], length_s: float) -> tuple[Floats, bool]:
    """The time (P,) in s at which each panel is drawn, and whether all of these are the true times.

    A pause longer than a panel is drawn as long as a panel: hours between two files would leave no room for the panels.
    """
    pauses = np.diff(starts_s) - length_s
    tops = np.concatenate([[0.0], np.cumsum(length_s + np.clip(pauses, 0.0, length_s))])
    return tops, bool((pauses <= length_s).all())


def _summed(values: Floats, axis: int, most: int) -> Floats:
    """Sums of n neighbours on an axis over sqrt(n), so that about `most` are left: white noise keeps its level."""
    length = values.shape[axis]
    count = max(1, length // most)
    kept = np.asarray(values, np.float32).take(range(length // count * count), axis)
    shape = (*kept.shape[:axis], length // count, count, *kept.shape[axis + 1 :])
    return np.asarray(kept.reshape(shape).sum(axis=axis + 1) / np.sqrt(count))


def _decimals(panels: Panels) -> int:
    """Digits that tell the ticks of the frequency axis apart."""
    low, high = panels.edges_mhz
    return int(np.clip(np.ceil(-np.log10((high - low) / 3)), 0, 6))


def _mark_panels(axes: Axes, panels: Panels, tops: Floats, snrs: Sequence[float]) -> None:
    """Write each panel's name, ON or OFF, and SNR to its right."""
    right = axes.get_yaxis_transform()
    for position, (top, name, snr) in enumerate(zip(tops, PANEL_NAMES, snrs, strict=True)):
        is_on = position % 2 == 0
        colour = ON_COLOUR if is_on else OFF_COLOUR
        edges = (top, top + panels.length_s)
        axes.plot([1, 1], edges, color=colour, linewidth=5, solid_capstyle="butt", transform=right, clip_on=False)
        text = f"{name} {'ON' if is_on else 'OFF'}" + (f"\nSNR {snr:.1f}" if np.isfinite(snr) else "")
        axes.text(
            1.025, sum(edges) / 2, text, color=colour, fontsize=8, va="center", transform=right,
            fontweight="bold" if is_on else "normal",
        )  # fmt: skip


def _mark_line(axes: Axes, panels: Panels, tops: Floats, line: EventLine) -> None:
    """Two arrowheads a panel, whose tips are where the line enters and leaves it."""
    low, high = panels.edges_mhz
    for start, top in zip(panels.starts_s, tops, strict=True):
        for seconds, marker in ((0.0, "caretdown"), (panels.length_s, "caretup")):
            mhz = line.mhz_at(start + seconds)
            if low <= mhz <= high:
                tip = {"caretdown": 7, "caretup": 6}[marker]  # matplotlib's carets whose tip is at their place
                axes.plot(mhz, top + seconds, marker=tip, markersize=5, color=_LINE_COLOUR, clip_on=False, zorder=3)
