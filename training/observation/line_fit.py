"""The fit of one line to a snippet: its channel, drift rate, width, and signal to noise ratio in each panel.

The search (training/search/lines.py) says where to look, to a few channels. Here every line near it is tried on the
snippet's own values, at the times when its panels were observed.

Axes: P panel, in the order of the observation; T time bin; F frequency channel; W channel beside the line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shard_tools.axes import Axes
from shard_tools.cadence import PANELS
from training.observation import line_kernels as kernels
from training.search.lines import RATES

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]

_STEP = 0.5  # channels between the lines that are tried, in the middle and at the ends of the cadence
_FINER = 4  # the second pass takes steps so many times finer
_CHANNELS = 9.0  # channels tried to both sides of where the search found the line
_RATE_STEPS = 3.0  # rates tried to both sides, in steps of the search
_SEARCH_STEP = 1.3 / (RATES // 2)  # the widest step between the search's rates, as a share of the steepest rate
_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # channels
_BESIDE = 64  # channels to both sides of the line, in which the noise is measured
_GUARD = 26  # channels to both sides of the line that may be part of it
_LEAST_BESIDE = 32  # values: from fewer the noise is not measured
_FOR_NOISE = 4096  # values of a panel: enough to measure its noise to 2 %; a line's SNR uses the noise beside it
_OUTLIER = 4.0  # standard deviations; values beyond are left out when noise is measured
_FIRST_NOISE, _CLIPPINGS = 2.0, 3  # first guess of the noise beside a line, relative to the panel's; clipping rounds
_MADS = 1.4826  # median absolute deviations in a standard deviation of Gaussian noise
_VISIBLE = 4.0  # standard deviations: how far to both sides of its middle a line is blanked


@dataclass(frozen=True)
class Fit:
    """A line in one snippet."""

    middle: float
    """Channel of the snippet that its centre crosses in the middle of the cadence; it may lie outside."""
    rate: float
    """Channels a time bin."""
    width: int
    """Channels that hold the line, with its drift within a time bin."""
    panel_snr: Float64s
    """(P,) NaN where more than half of the line lies outside the snippet or on blank values."""
    inside: float
    """Share of the time bins of all panels in which the line lies inside the snippet and not on blank values."""

    def channels(self, rows: Float64s) -> Float64s:
        """The channel at each of `rows`, in time bins from the middle of the cadence."""
        return self.middle + self.rate * rows

    def snr(self, positions: Sequence[int]) -> float:
        """Signal to noise ratio in these panels together; NaN if it is known in none."""
        known = self.panel_snr[list(positions)]
        known = known[np.isfinite(known)]
        return float(known.sum() / np.sqrt(len(known))) if len(known) else float("nan")

    def best_snr(self, positions: Sequence[int]) -> float:
        """The highest SNR of these panels; NaN if it is known in none."""
        known = self.panel_snr[list(positions)]
        return float(np.nanmax(known)) if np.isfinite(known).any() else float("nan")


def to_noise_units(snippet: npt.NDArray[np.floating]) -> Float32s:
    """A snippet (P, T, F) in standard deviations of each panel's noise above its median; blank values stay 0.

    The snippet's own normalisation is not enough: a bright line raises a panel's standard deviation.
    """
    values = snippet.astype(np.float32)
    blank = values == 0
    for panel in range(len(values)):
        known = values[panel][~blank[panel]]
        level, noise = _median_and_noise(known[:: 1 + len(known) // _FOR_NOISE])
        values[panel] = (values[panel] - level) / noise if noise else 0
    values[blank] = 0
    return values


def _median_and_noise(values: Float32s) -> tuple[float, float]:
    """Median, and standard deviation of the noise by the median absolute deviation; 0 if there is none."""
    if len(values) < _LEAST_BESIDE:
        return 0.0, 0.0
    level = np.median(values)
    return float(level), float(_MADS * np.median(np.abs(values - level)))


def cumulate(values: Float32s) -> Float64s:
    """(P, T, F + 1) the sum of the channels below each channel's lower edge, of `values` (P, T, F)."""
    cumulated = np.zeros((*values.shape[:2], values.shape[2] + 1))
    np.cumsum(values, axis=2, out=cumulated[:, :, 1:], dtype=np.float64)
    return cumulated


class FitValues(NamedTuple):
    """The values of a snippet that lines are fitted to."""

    values: Float32s
    """(P, T, F) of `to_noise_units`."""
    cumulated: Float64s
    """What `cumulate` makes of them."""
    axes: Axes

    @classmethod
    def of(cls, values: Float32s, axes: Axes) -> "FitValues":
        """Cumulate `values`, which must not change while lines are fitted."""
        return cls(values, cumulate(values), axes)


def fit_line(snippet: FitValues, channel: float, rate: float, positions: Sequence[int]) -> Fit:
    """Fit a line near `channel` in the middle of the cadence and near `rate`.

    `positions` are the panels in which it is looked for: the ON ones, or the OFF ones for a control.
    """
    values, cumulated, axes = snippet
    chosen = list(positions)
    rows = np.ascontiguousarray(axes.rows[chosen])
    steepest = axes.steepest / axes.time_bins
    rate_step = _STEP / np.abs(rows).max()
    width = max(1.0, abs(rate))  # of a line without a width of its own: its drift within a time bin
    reach = max(rate_step, _RATE_STEPS * _SEARCH_STEP * steepest)
    panels = _Panels(cumulated, np.array(chosen), rows)
    near = _best_lines(panels, width, (rate, reach, rate_step), (channel, _CHANNELS, _STEP))
    # If the true line lies between two steps, two panels may seem to show more than all three. So besides the brightest
    # line, the best lines of larger numbers of panels are refined.
    steps = rate_step / _FINER, _STEP / _FINER
    finer = [
        line
        for rate, middle in dict.fromkeys((line.rate, line.middle) for line in near[_brightest(near) :])
        for line in _best_lines(panels, width, (rate, rate_step, steps[0]), (middle, _STEP, steps[1]))
    ]
    best = _choose(panels, finer) if width == 1 else finer[_brightest(finer)]
    return _measure(values, axes, best.middle, best.rate, chosen)


Range = tuple[float, float, float]
"""A middle, how far to both sides of it, and the step."""


class _Panels(NamedTuple):
    """The panels that a line is fitted to."""

    cumulated: Float64s
    """(P, T, F + 1) of all panels."""
    chosen: npt.NDArray[np.int64]
    """(N,) which of them."""
    rows: Float64s
    """(N, T) their times, in time bins from the middle of the cadence."""


class _Line(NamedTuple):
    together: float
    """Its sum in the panels in which it stands out, in standard deviations."""
    rate: float
    middle: float


def _best_lines(panels: _Panels, width: float, rates: Range, middles: Range) -> list[_Line]:
    """The line that stands out most in one of the panels, in two together, and so on up to all."""
    rate, middle = _spread(*rates), _spread(*middles)
    sums = np.empty((len(panels.chosen), len(rate), len(middle)))
    kernels.sum_lines(*panels, rate, middle, width, sums)
    falling = -np.sort(-sums, axis=0)
    together = falling.cumsum(axis=0).reshape(len(sums), -1) / np.sqrt(np.arange(1, len(sums) + 1))[:, None]
    lines = []
    for each, best in zip(together, together.argmax(axis=1).tolist(), strict=True):
        place = divmod(best, len(middle))
        lines.append(_Line(float(each[best]), float(rate[place[0]]), float(middle[place[1]])))
    return lines


def _choose(panels: _Panels, lines: Sequence[_Line]) -> _Line:
    """The line that stands out most, or one more than a channel away whose nearest channels sum to more.

    The box around a slow line misses half of its power where it passes between two channels. So two panels in which a
    wrong line meets the middle of a channel may show more than all three panels of the true line.
    """
    best, reach = lines[_brightest(lines)], np.abs(panels.rows).max()
    others = [line for line in lines if abs(line.middle - best.middle) + abs(line.rate - best.rate) * reach > 1]
    return max([best, *others], key=lambda line: _nearest_channels(panels, line)) if others else best


def _brightest(lines: Sequence[_Line]) -> int:
    """Index of the line that stands out most."""
    return int(np.argmax([line.together for line in lines]))


def _nearest_channels(panels: _Panels, line: _Line) -> float:
    """The sum of the channels nearest to a line in all panels."""
    channel = np.floor(line.middle + line.rate * panels.rows + 0.5).astype(np.int64)
    last = panels.cumulated.shape[2] - 2
    inside = (channel >= 0) & (channel <= last)
    channel = np.clip(channel, 0, last)
    of_panels = panels.chosen[:, None], np.arange(channel.shape[1])
    sums = panels.cumulated[(*of_panels, channel + 1)] - panels.cumulated[(*of_panels, channel)]
    return float(sums[inside].sum())


def _spread(middle: float, reach: float, step: float) -> Float64s:
    count = int(np.ceil(reach / step))
    return np.asarray(middle + step * np.arange(-count, count + 1), np.float64)


def _measure(values: Float32s, axes: Axes, middle: float, rate: float, chosen: list[int]) -> Fit:
    """A line's width and SNR: its sum over the root of the number of values, in units of the noise beside it.

    The width is the one with the highest ratio in the `chosen` panels together.
    """
    upright = _turn_upright(values, axes, middle, rate)
    offset = np.arange(-_BESIDE, _BESIDE + 1)
    standard = _to_standard(upright, np.abs(offset) > _GUARD + abs(rate) / 2)
    known = np.isfinite(standard)
    sums = np.where(known, standard, 0).sum(axis=1)
    counts = known.sum(axis=1)
    first, width = _best_box(sums[chosen].sum(axis=0), counts[chosen].sum(axis=0))
    box = slice(first, first + width)
    total, count = sums[:, box].sum(axis=1), counts[:, box].sum(axis=1)
    full = width * axes.time_bins
    snr = np.where(count >= full / 2, total / np.sqrt(np.maximum(count, 1)), np.nan)
    centre = offset[first] + (width - 1) / 2
    return Fit(middle + centre, rate, width, snr, float(count.sum() / (PANELS * full)))


def _turn_upright(values: Float32s, axes: Axes, middle: float, rate: float) -> Float32s:
    """The channels (P, T, W) beside a line, which is in the middle; NaN outside the snippet and for blank values."""
    channel = np.floor(middle + rate * axes.rows + 0.5).astype(np.int64)[..., None] + np.arange(-_BESIDE, _BESIDE + 1)
    inside = (channel >= 0) & (channel < axes.channels)
    found = np.take_along_axis(values, np.clip(channel, 0, axes.channels - 1), axis=2)
    return np.where(inside & (found != 0), found, np.float32(np.nan))


def _to_standard(upright: Float32s, beside: npt.NDArray[np.bool_]) -> Float32s:
    """Panels (P, T, W) in standard deviations of the noise in the channels `beside` (W,) the line.

    A panel whose noise is not known becomes NaN. The level is the mean and not the median, as a sum of skewed noise has
    the mean's level.
    """
    values = upright[:, :, beside]
    finite = np.isfinite(values)
    values = np.where(finite, values, 0)
    level, noise = np.zeros((len(values), 1, 1)), np.full((len(values), 1, 1), _FIRST_NOISE)
    for _ in range(_CLIPPINGS):
        kept = finite & (np.abs(values - level) < _OUTLIER * noise)
        count = np.maximum(kept.sum(axis=(1, 2), keepdims=True), 1)
        level = np.where(kept, values, 0).sum(axis=(1, 2), keepdims=True) / count
        noise = np.sqrt((np.where(kept, values - level, 0) ** 2).sum(axis=(1, 2), keepdims=True) / count)
    noise[(count < _LEAST_BESIDE) | (noise == 0)] = np.nan
    return np.asarray((upright - level) / noise, np.float32)


def _best_box(sums: Float64s, counts: npt.NDArray[np.int64]) -> tuple[int, int]:
    """First place and width of the neighbouring channels (W,) around the middle that stand out most together."""
    best = (-np.inf, _BESIDE, 1)
    total, count = (np.concatenate([[0], np.cumsum(each)]) for each in (sums, counts))
    for width in _WIDTHS:
        # A fitted line is in the middle, to within two channels or a quarter of its width.
        reach = max(2.0, width / 4)
        firsts = np.arange(np.ceil(_BESIDE - (width - 1) / 2 - reach), _BESIDE - (width - 1) / 2 + reach + 0.1)
        firsts = firsts.astype(np.int64)
        ratio = (total[firsts + width] - total[firsts]) / np.sqrt(np.maximum(count[firsts + width] - count[firsts], 1))
        place = int(ratio.argmax())
        best = max(best, (float(ratio[place]), int(firsts[place]), width))
    return best[1], best[2]


def blank_line(values: Float32s, axes: Axes, fit: Fit) -> None:
    """Blank a line in `values` (P, T, F), in place: in all panels, as wide as any panel's sum over time shows it."""
    upright = _turn_upright(values, axes, fit.middle, fit.rate)
    known = np.isfinite(upright)
    profile = np.where(known, upright, 0).sum(axis=1) / np.sqrt(np.maximum(known.sum(axis=1), 1))
    visible = (profile > _VISIBLE).any(axis=0)
    half = fit.width // 2 + 2
    while half < _BESIDE and (visible[_BESIDE - half] or visible[_BESIDE + half]):
        half += 1
    channel = np.floor(fit.channels(axes.rows) + 0.5).astype(np.int64)[..., None] + np.arange(-half, half + 1)
    inside = (channel >= 0) & (channel < axes.channels)
    panel, row, _ = np.nonzero(inside)
    values[panel, row, channel[inside]] = 0
