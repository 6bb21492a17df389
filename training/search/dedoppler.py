"""The classical search for a needle: an incoherent de-Doppler sum, as turboSETI does for each spectrogram.

A needle is taken to be a straight line through the cadence. The search tries every drift rate and channel, sums the
brightness along the line in each panel, and counts the OFF panels' brightness on that line against it (Enriquez et al.
2017, arXiv:1709.03491, section 3; blocks of time bins replace the tree of Taylor 1974). A trained network has to beat
this search.

Axes: P panel (6), T time bin of a panel, F frequency channel.
"""

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shard_tools.cadence import CHANNEL_WIDTH_HZ, OFF_POSITIONS, PANELS, TIME_BIN_SECONDS
from shard_tools.errors import InputError

Floats = npt.NDArray[np.float32]

WIDTHS = (2,)  # channels that are summed across the line
# The search for the network's candidates (training/search/lines.py) uses CLIP, VETO, EXCUSED and FAINTEST too.
CLIP = 4.0  # standard deviations a pixel: one bright blip must not pass for a line
VETO = 2.0
EXCUSED = 3.0  # standard deviations that noise alone reaches near a line in an OFF panel
FAINTEST = 1e-3  # least noise to divide by, for channels that do not vary at all
NEAR = (6, 24)  # drift rates (channels a panel) and channels around the line where a signal in an OFF panel counts
_MADS = 1.4826  # median absolute deviations in a standard deviation of Gaussian noise


class Track(NamedTuple):
    """The best line through a cadence."""

    score: float
    """Detection statistic, in standard deviations: the sum along the line in the ON panels, less a penalty for the OFF
    panels."""
    drift_rate: float
    """Hz/s; above 0 if the channel number rises with time."""
    start_channel: float
    """Channel in the first time bin of the cadence; it may lie outside of the snippet."""
    end_channel: float
    """Channel in the last time bin of the cadence, likewise."""


def find_drift(snippet: npt.NDArray[np.floating]) -> Track:
    """The line along which the ON panels of a finite snippet (6, T, F) stand out most from its OFF panels.

    Drift rates go up to half a channel a time bin. Not for snippets of an observation: it assumes that panels follow
    each other without pauses and that bins have the competition's sizes. Raises InputError for another number of
    panels.
    """
    if snippet.ndim != 3 or snippet.shape[0] != PANELS or min(snippet.shape) < 1:
        raise InputError(f"snippet of shape {snippet.shape}: expected ({PANELS}, time bins, frequency channels)")
    from training.search import dedoppler_kernels as kernels  # here, as Numba takes half a second

    _, time_bins, channels = snippet.shape
    plan = _plan_search(time_bins, channels)
    panels = flatten(snippet)
    sums = np.empty((PANELS, len(plan.rates), channels + 2 * plan.pad), np.float32)
    for panel in range(PANELS):
        kernels.sum_paths(panels[panel], plan.rates, plan.pad, sums[panel])
    best = np.array((-np.inf, 0.0, 0.0))
    grid = kernels.Grid(plan.rates, plan.drifts, plan.pad, time_bins)
    wide = np.empty_like(sums)
    for width, weight in zip(WIDTHS, plan.weights, strict=True):
        for panel in range(PANELS):
            kernels.sum_channels(sums[panel], width, wide[panel])
        wide *= weight
        # A line close to interference may cross it in an ON panel but miss it in the OFF panels.
        for panel in OFF_POSITIONS:
            kernels.largest_nearby(wide[panel], *NEAR, wide[panel])
        kernels.search(wide, grid, VETO, EXCUSED, best)
    score, rate, middle = best.tolist()
    half = rate * (PANELS * time_bins - 1) / 2
    return Track(score, rate * CHANNEL_WIDTH_HZ / TIME_BIN_SECONDS, middle - half, middle + half)


def flatten(snippet: npt.NDArray[np.floating]) -> Floats:
    """A snippet as (6, T, F) float32 without its persistent lines and bursts, in standard deviations, clipped.

    Channel levels come from the OFF panels, which hold no needle, so that a needle that hardly drifts is kept.
    """
    panels = snippet.astype(np.float32)
    channels = panels.shape[2]
    off = np.ascontiguousarray(panels[list(OFF_POSITIONS)].reshape(-1, channels).T)
    middle = _median(off)
    panels -= middle
    panels /= np.maximum(_MADS * _median(np.abs(off - middle[:, None])), FAINTEST)
    panels -= _median(panels)[..., None]
    panels /= np.maximum(_MADS * _median(np.abs(panels)), 1)[..., None]
    return np.clip(panels, -CLIP, CLIP, out=panels)


def _median(values: Floats) -> Floats:
    """Median along the last axis; of an even number the upper one, many times faster than the mean of the two."""
    half = values.shape[-1] // 2
    middle: Floats = np.partition(values, half, axis=-1)[..., half]
    return middle


class _Plan(NamedTuple):
    """What is the same for all snippets of a shape; rates in channels a time bin."""

    rates: npt.NDArray[np.float64]
    drifts: npt.NDArray[np.float64]
    pad: int
    weights: tuple[Floats, ...]


@functools.lru_cache(maxsize=4)
def _plan_search(time_bins: int, channels: int) -> _Plan:
    """Rates within panels, one channel per panel apart; finer ones over the cadence; weights that turn sums to SNRs."""
    from training.search import dedoppler_kernels as kernels

    steepest = int(kernels.STEEPEST * time_bins) + 1
    rates = np.arange(-steepest, steepest + 1) / time_bins
    pad = int(np.ceil(kernels.STEEPEST * (time_bins + kernels.BLOCK))) // 2 + kernels.BLOCK
    # Steeper lines stay in the snippet for one or two panels only, so coarser steps are enough.
    slow, step = 0.14 * PANELS * time_bins, np.arange(-steepest * PANELS, steepest * PANELS + 1)
    tried = step[(step % PANELS == 0) | ((abs(step) < slow) & (step % 2 == 0))]
    drifts = tried / (PANELS * time_bins)
    counts = np.empty((len(rates), channels + 2 * pad), np.float32)
    kernels.sum_paths(np.ones((time_bins, channels), np.float32), rates, pad, counts)
    weights = []
    for width in WIDTHS:
        pixels = np.empty_like(counts)
        kernels.sum_channels(counts, width, pixels)
        # A line that leaves the snippet within a panel gets no weight in that panel.
        whole = pixels > 0.9 * width * time_bins
        weights.append(np.where(whole, 1 / np.sqrt(np.maximum(pixels, 1)), 0).astype(np.float32))
    return _Plan(rates, drifts, pad, tuple(weights))
