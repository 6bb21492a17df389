"""The inner loops of the de-Doppler search, compiled by Numba.

They are in one file, since Numba's cache does not notice changes to functions called from another file.

Axes: P panel, T time bin of a panel, F frequency channel, R drift rate, C channel where a path crosses the middle of
its panel, with `pad` more on either side of the panel's own.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.kernel_cache import kernel

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]

BLOCK = 13  # time bins that are summed along a few slopes first
STEEPEST = 0.5  # channels a time bin
_kernel = kernel(nogil=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy")


@_kernel
def sum_paths(panel: Float32s, rates: Float64s, pad: int, sums: Float32s) -> None:
    """Sum a panel (T, F) along every straight line into `sums` (R, C); `rates` are in channels a time bin.

    Blocks of time bins are first summed along 2 S + 1 slopes, of which the nearest is at most half a channel off at a
    block's ends; then the blocks are summed along each line. Values outside the panel count as 0.
    """
    time_bins, channels = panel.shape
    blocks, slopes = -(-time_bins // BLOCK), int(np.ceil(STEEPEST * BLOCK))
    sheared = np.zeros((2 * slopes + 1, blocks, channels + 4 * pad), np.float32)
    for slope in range(2 * slopes + 1):
        for row in range(time_bins):
            place = (slope - slopes) / BLOCK * (row % BLOCK - (BLOCK - 1) / 2)
            to = sheared[slope, row // BLOCK, 2 * pad - int(np.rint(place)) :]
            of = panel[row]
            for channel in range(channels):
                to[channel] += of[channel]
    for number in range(len(rates)):
        slope = int(np.rint(rates[number] * BLOCK)) + slopes
        to = sums[number]
        to[:] = 0
        for block in range(blocks):
            place = rates[number] * (block * BLOCK + (BLOCK - 1) / 2 - (time_bins - 1) / 2)
            of = sheared[slope, block, pad + int(np.rint(place)) :]
            for channel in range(len(to)):
                to[channel] += of[channel]


@_kernel
def sum_channels(of: Float32s, width: int, to: Float32s) -> None:
    """Sum `width` neighbouring channels of (R, C) around each."""
    channels = of.shape[1]
    to[:] = 0
    for row in range(len(of)):
        for offset in range(-(width // 2), width - width // 2):
            first, last = max(0, -offset), min(channels, channels - offset)
            for channel in range(first, last):
                to[row, channel] += of[row, channel + offset]


@_kernel
def largest_nearby(of: Float32s, rows: int, columns: int, to: Float32s) -> None:
    """The largest value of (R, C) within `rows` and `columns` of each."""
    # Maxima over windows that double in length are many times faster than looking at every neighbour.
    lines, places = of.shape
    tall = np.full((lines + 2 * rows, places), -np.inf, np.float32)
    tall[rows : rows + lines] = of
    span = 1
    while span < 2 * rows + 1:
        step = min(span, 2 * rows + 1 - span)
        for row in range(len(tall) - step):
            for place in range(places):
                tall[row, place] = max(tall[row, place], tall[row + step, place])
        span += step
    wide = np.full(places + 2 * columns, -np.inf, np.float32)
    for row in range(lines):
        wide[columns : columns + places] = tall[row]
        wide[:columns] = -np.inf
        wide[columns + places :] = -np.inf
        span = 1
        while span < 2 * columns + 1:
            step = min(span, 2 * columns + 1 - span)
            for place in range(len(wide) - step):
                wide[place] = max(wide[place], wide[place + step])
            span += step
        to[row] = wide[:places]


class Grid(NamedTuple):
    """The lines that are tried; rates in channels a time bin."""

    rates: Float64s
    """(R,) drift rates within a panel."""
    drifts: Float64s
    """Drift rates over the whole cadence."""
    pad: int
    """Channels to either side of a panel's own."""
    time_bins: int
    """T."""


@_kernel
def search(levels: Float32s, grid: Grid, veto: float, excused: float, best: Float64s) -> None:
    """Try every line through the six panels; leave score, drift rate and middle channel of the best one in `best` (3,).

    `levels` (P, R, C) are signal-to-noise ratios of the lines of each panel. A line's score is its ON panels' combined
    level, less `veto` times the excess of its largest OFF panel over `excused`.
    """
    rates, drifts, pad, time_bins = grid
    panels, _, columns = levels.shape
    channels, zero = columns - 2 * pad, len(rates) // 2
    reach = int(np.ceil(STEEPEST * time_bins * panels / 2))
    line = np.empty((panels, channels + 2 * reach), np.float32)
    score = np.empty(channels + 2 * reach, np.float32)
    for drift in drifts:
        number = zero + int(np.rint(drift * time_bins))
        outside = int(np.ceil(abs(drift) * time_bins * panels / 2))
        lines = channels + 2 * outside
        for panel in range(panels):
            # Line `k` is at channel `k - outside` in the middle of the cadence, and at `k + moved` in this panel's.
            moved = int(np.rint(drift * (panel - (panels - 1) / 2) * time_bins)) + pad - outside
            first, last = max(0, -moved), min(lines, columns - moved)
            line[panel, :lines] = 0
            for place in range(first, last):
                line[panel, place] = levels[panel, number, place + moved]
        for place in range(lines):
            a, b, c = line[0, place], line[2, place], line[4, place]
            most = max(a, b, c)
            three = (a + b + c) * np.float32(3**-0.5)
            two = (a + b + c - min(a, b, c)) * np.float32(2**-0.5)
            off = max(line[1, place], line[3, place], line[5, place], np.float32(excused)) - np.float32(excused)
            score[place] = max(most, two, three) - np.float32(veto) * off
        highest = np.float32(-np.inf)
        for place in range(lines):
            highest = max(highest, score[place])
        if highest > best[0]:
            place = int(np.argmax(score[:lines]))
            best[0], best[1], best[2] = highest, drift, place - outside
