"""The inner loops of the CPU's canvases, compiled by Numba: each call lets other threads run from its start to its end.

Many small NumPy or torch calls did not: threads that take turns at Python's lock every 20 microseconds are slower
together than one alone (docs/performance.md).

Axes: P positions, t time bins before summing, N planes, T time bins, F frequency channels; C, H, W canvas.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

Float32s = npt.NDArray[np.float32]
UInt16s = npt.NDArray[np.uint16]
UInt32s = npt.NDArray[np.uint32]
Int64s = npt.NDArray[np.int64]
Weights = tuple[UInt32s, Float32s]
"""A resize along one axis: the first old pixel of each new one, and the weights (K, new) of it and the next K - 1,
where K is a multiple of 4."""
Box = tuple[int, int, int, int]
"""First and last time bin, first and last channel; ends excluded."""


class Recipe(NamedTuple):
    """How a snippet becomes planes; see CanvasConfig."""

    positions: Int64s
    """(N,) that the planes show."""
    time_bins: int
    """That are summed."""
    subtract: int
    """0 nothing, 1 each channel's mean, 2 each time bin's too."""
    normalises: bool
    epsilon: float
    """Added to the variance."""
    bends: bool
    """By asinh."""


class Move(NamedTuple):
    """What happens to the planes of one sample; see Draws."""

    stacks: int
    """Over each of which time is reversed as a whole."""
    flip_frequency: bool
    flip_time: bool
    roll: int
    shift: int
    gain: float
    offset: float


# Sums in any order, as vectors need; infinity and NaN keep their meaning.
_kernel = njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy")
_TO_FLOAT32 = np.float32(2.0**112)  # the exponents' biases are 127 and 15
_SQRT_HALF = np.uint32(0x3F3504F3)  # as bits of a float32


@_kernel
def to_planes(panels: UInt16s, recipe: Recipe, planes: Float32s) -> None:  # pragma: no cover
    """Snippet (P, t, F) of float16 bits to planes (N, T, F)."""
    for plane in range(len(planes)):
        _widen(panels[recipe.positions[plane]], recipe.time_bins, planes[plane])
    if recipe.subtract > 0:
        _subtract_means(planes, recipe.subtract > 1)
    for plane in range(len(planes)):
        _finish(planes[plane], recipe)


@_kernel
def to_moved_planes(
    panels: UInt16s, recipe: Recipe, move: Move, work: Float32s, planes: Float32s
) -> None:  # pragma: no cover
    """Snippet (P, t, F) of float16 bits to augmented planes (N, T, F); `work` is as large, with anything in it."""
    together = recipe.subtract > 0
    if together:
        for plane in range(len(planes)):
            _widen(panels[recipe.positions[plane]], recipe.time_bins, work[plane])
        _subtract_means(work, recipe.subtract > 1)
    size = len(planes) // move.stacks
    for plane in range(len(planes)):
        # Where planes do not need each other they are done one by one: one stays in the core's cache, six do not.
        values = work[plane if together else 0]
        if not together:
            _widen(panels[recipe.positions[plane]], recipe.time_bins, values)
        _finish(values, recipe)
        to = plane // size * size + size - 1 - plane % size if move.flip_time else plane
        _move(values, move, planes[to])


@_kernel
def _widen(panel: UInt16s, time_bins: int, plane: Float32s) -> None:  # pragma: no cover
    """A panel (t, F) of float16 bits to a plane (T, F) of sums of `time_bins` rows, over the square root of it.

    By bits: exponent and fraction move to their new places, and a multiplication mends the bias; subnormal numbers
    come out right too. Infinities and NaN don't, and snippets have none.
    """
    channels = panel.shape[1]
    bits = np.empty(channels, np.uint32)
    values = bits.view(np.float32)
    factor = _TO_FLOAT32 / np.float32(np.sqrt(time_bins))  # so that white noise keeps its standard deviation
    for row in range(plane.shape[0]):
        total = plane[row]
        total[:] = 0
        for part in range(time_bins):
            halves = panel[row * time_bins + part]
            for channel in range(channels):
                half = np.uint32(halves[channel])
                bits[channel] = ((half & np.uint32(0x8000)) << np.uint32(16)) | (
                    (half & np.uint32(0x7FFF)) << np.uint32(13)
                )
            for channel in range(channels):
                total[channel] += values[channel] * factor


@_kernel
def _subtract_means(planes: Float32s, of_rows: bool) -> None:  # pragma: no cover
    """Take each channel's mean over all planes (N, T, F) away; `of_rows`: then each time bin's over the channels."""
    count, time_bins, channels = planes.shape
    mean = np.zeros(channels, np.float32)
    for plane in range(count):
        for row in range(time_bins):
            for channel in range(channels):
                mean[channel] += planes[plane, row, channel]
    mean /= np.float32(count * time_bins)
    for plane in range(count):
        for row in range(time_bins):
            values = planes[plane, row]
            total = np.float32(0)
            for channel in range(channels):
                values[channel] -= mean[channel]
                total += values[channel]
            if of_rows:
                values -= total / np.float32(channels)


@_kernel
def _finish(plane: Float32s, recipe: Recipe) -> None:  # pragma: no cover
    """Normalise and bend a plane (T, F)."""
    if recipe.normalises:
        _normalise(plane, recipe.epsilon)
    if recipe.bends:
        _bend(plane)


@_kernel
def _normalise(plane: Float32s, epsilon: float) -> None:  # pragma: no cover
    """Bring a plane (T, F) to mean 0 and standard deviation 1."""
    total = np.float64(0)
    for row in range(plane.shape[0]):
        part = np.float32(0)
        for channel in range(plane.shape[1]):
            part += plane[row, channel]
        total += part
    mean = np.float32(total / plane.size)
    total = np.float64(0)
    for row in range(plane.shape[0]):
        part = np.float32(0)
        for channel in range(plane.shape[1]):
            part += (plane[row, channel] - mean) ** 2
        total += part
    factor = np.float32(1 / np.sqrt(total / plane.size + epsilon))
    for row in range(plane.shape[0]):
        for channel in range(plane.shape[1]):
            plane[row, channel] = (plane[row, channel] - mean) * factor


@_kernel
def _bend(plane: Float32s) -> None:  # pragma: no cover
    """The asinh of a plane (T, F), to 1e-6: sign(x) log(|x| + sqrt(x^2 + 1)).

    The logarithm as Cephes has it (Moshier 1992, logf.c): the exponent, and a polynomial of the fraction. NumPy's and
    the C library's go value by value here, which takes ten times as long.
    """
    channels = plane.shape[1]
    values, exponent = np.empty(channels, np.float32), np.empty(channels, np.float32)
    bits = values.view(np.uint32)
    for row in range(plane.shape[0]):
        of = plane[row]
        for channel in range(channels):
            size = abs(of[channel])
            values[channel] = size + np.sqrt(size * size + np.float32(1))
        for channel in range(channels):
            above = bits[channel] - _SQRT_HALF  # all values are at least 1
            exponent[channel] = np.float32(above >> np.uint32(23))
            bits[channel] = (above & np.uint32(0x007FFFFF)) + _SQRT_HALF  # into sqrt(1/2) to sqrt(2)
        for channel in range(channels):
            x, power = values[channel] - np.float32(1), exponent[channel]
            y = np.float32(7.0376836292e-2)
            y = y * x - np.float32(1.1514610310e-1)
            y = y * x + np.float32(1.1676998740e-1)
            y = y * x - np.float32(1.2420140846e-1)
            y = y * x + np.float32(1.4249322787e-1)
            y = y * x - np.float32(1.6668057665e-1)
            y = y * x + np.float32(2.0000714765e-1)
            y = y * x - np.float32(2.4999993993e-1)
            y = y * x + np.float32(3.3333331174e-1)
            y = y * x * x * x - np.float32(0.5) * x * x + x + np.float32(0.6931471806) * power
            of[channel] = y if of[channel] >= 0 else -y


@_kernel
def _move(of: Float32s, move: Move, to: Float32s) -> None:  # pragma: no cover
    """Flip, roll, shift and scale one plane (T, F) into another."""
    time_bins, channels = of.shape
    gain, offset = np.float32(move.gain), np.float32(move.offset)
    kept = channels - move.roll
    for row in range(time_bins):
        values = to[row]
        place = row + move.shift
        if place < 0 or place >= time_bins:
            values[:] = offset  # what comes in is 0
            continue
        source = of[time_bins - 1 - place if move.flip_time else place]
        if move.flip_frequency:
            for channel in range(kept):
                values[channel] = source[kept - 1 - channel] * gain + offset
            for channel in range(kept, channels):
                values[channel] = source[channels + kept - 1 - channel] * gain + offset
        else:
            for channel in range(kept):
                values[channel] = source[move.roll + channel] * gain + offset
            for channel in range(kept, channels):
                values[channel] = source[channel - kept] * gain + offset


@_kernel
def swap_boxes(first: Float32s, second: Float32s, of_first: Box, of_second: Box) -> None:  # pragma: no cover
    """CutMix of two planes (N, T, F): into each, its own box out of the other as that was before."""
    start, end = of_second[2], of_second[3]
    kept = np.empty(end - start, np.float32)
    for plane in range(first.shape[0]):
        for row in range(min(of_first[0], of_second[0]), max(of_first[1], of_second[1])):
            mine, theirs = first[plane, row], second[plane, row]
            in_second = of_second[0] <= row < of_second[1]
            if in_second:
                kept[:] = mine[start:end]
            if of_first[0] <= row < of_first[1]:
                mine[of_first[2] : of_first[3]] = theirs[of_first[2] : of_first[3]]
            if in_second:
                theirs[start:end] = kept


@_kernel
def resize(stack: Float32s, rows: Weights, columns: Weights, image: Float32s) -> None:  # pragma: no cover
    """(C, h, w) to (C, H, W) as short weighted sums, along time and then along frequency.

    Four old pixels at a time: a sum that goes to memory and back for each takes twice as long.
    """
    row_of, row_weight = rows
    column_of, column_weight = columns
    last = stack.shape[1] - 1
    total = np.zeros(stack.shape[2] + column_weight.shape[0], np.float32)  # zeros behind the end, of weight 0
    for channel in range(stack.shape[0]):
        of = stack[channel]
        for row in range(image.shape[1]):
            total[:] = 0
            for place in range(0, row_weight.shape[0], 4):
                first = row_of[row] + place
                a, b = of[min(first, last)], of[min(first + 1, last)]
                c, d = of[min(first + 2, last)], of[min(first + 3, last)]
                a_weight, b_weight = row_weight[place, row], row_weight[place + 1, row]
                c_weight, d_weight = row_weight[place + 2, row], row_weight[place + 3, row]
                for column in range(a.size):
                    total[column] += (
                        a_weight * a[column] + b_weight * b[column] + c_weight * c[column] + d_weight * d[column]
                    )
            to = image[channel, row]
            to[:] = 0
            for place in range(0, column_weight.shape[0], 4):
                for column in range(to.size):
                    first_column = column_of[column] + np.uint32(place)
                    to[column] += (
                        column_weight[place, column] * total[first_column]
                        + column_weight[place + 1, column] * total[first_column + np.uint32(1)]
                        + column_weight[place + 2, column] * total[first_column + np.uint32(2)]
                        + column_weight[place + 3, column] * total[first_column + np.uint32(3)]
                    )
