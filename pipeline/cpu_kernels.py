"""The inner loops of the CPU's canvases, compiled by Numba: each call lets other threads run from its start to its end.

Many small NumPy or torch calls did not: threads that take turns at Python's lock every 20 microseconds are slower
together than one alone (docs/performance.md). They stand in one file, since Numba's cache of a function does not notice
that one which it calls has changed in another.

Axes: P positions, t time bins before summing, N planes, T time bins, F frequency channels; C, H, W canvas.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from pipeline.signals import NEIGHBOUR_ROOT

Float32s = npt.NDArray[np.float32]
UInt16s = npt.NDArray[np.uint16]
UInt32s = npt.NDArray[np.uint32]
Int64s = npt.NDArray[np.int64]
Weights = tuple[Int64s, Float32s]
"""A resize along one axis: the first old pixel of each new one, and the weights (K, new) of it and the next K - 1. K is
1 where nothing is to be done, else a multiple of 4."""


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
    """What happens to one sample in training; see Draws."""

    stacks: int
    """Over each of which time is reversed as a whole."""
    flip_frequency: bool
    flip_time: bool
    roll: int
    shift: int
    gain: float
    offset: float
    erased: tuple[int, int, int, int, int, int]
    """A box that becomes 0: plane, time bin, channel; planes, time bins, channels."""
    pasted: tuple[int, int, int, int]
    """What is taken from the other: first and last time bin, first and last channel, ends excluded."""
    mixed: float
    """Weight of the other in the mean with it."""
    path: Float32s
    """(N, t) channel of the added signal in each plane; empty where none is added."""
    level: Float32s
    """(N, t) its brightness, in standard deviations of the plane's noise."""
    width: float
    """Its standard deviation in channels."""


# Sums in any order, as vectors need; infinity and NaN keep their meaning.
_kernel = njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy")
_TO_FLOAT32 = np.float32(2.0**112)  # the exponents' biases are 127 and 15
_SQRT_HALF = np.uint32(0x3F3504F3)  # as bits of a float32
_REACH = 5.0  # standard deviations of a signal's profile, where 4e-6 of its peak is left


@_kernel
def make_image(
    panels: UInt16s,
    recipe: Recipe,
    rows: Weights,
    columns: Weights,
    work: Float32s,
    sums: Float32s,
    image: Float32s,
) -> None:
    """A snippet (P, t, F) of float16 bits to its canvas (C, H, W).

    `work` (N, T, F) and `sums` (C, H, F) may hold anything: fresh memory would cost more than what is done in it.
    """
    together = recipe.subtract > 0
    if together:
        for plane in range(len(work)):
            _widen(panels[recipe.positions[plane]], recipe.time_bins, work[plane])
        _subtract_means(work, recipe.subtract > 1)
    sums[:] = 0
    in_channel = len(work) // len(image)
    for plane in range(len(work)):
        # Where planes do not need each other they are done one by one: one stays in the core's cache, six do not.
        values = work[plane if together else 0]
        if not together:
            _widen(panels[recipe.positions[plane]], recipe.time_bins, values)
        _finish(values, recipe)
        _add_rows(values, plane % in_channel * len(values), rows, sums[plane // in_channel])
    _resize_columns(sums, columns, image)


@_kernel
def make_pair(
    panels: UInt16s,
    recipe: Recipe,
    moves: tuple[Move, Move],
    rows: Weights,
    columns: Weights,
    work: Float32s,
    sums: Float32s,
    images: tuple[Float32s, Float32s],
) -> None:
    """Snippets (1 or 2, P, t, F) of float16 bits to their canvases, augmented and mixed with each other.

    `work` (2, N + 1, T, F) and `sums` (2, C, H, F) may hold anything.
    """
    together = recipe.subtract > 0
    sums[:] = 0
    planes = work.shape[1] - 1
    in_channel = planes // images[0].shape[0]
    for sample in range(len(panels)):
        if together:
            for plane in range(planes):
                _widen_with_signal(panels[sample], recipe, moves[sample], plane, work[sample, plane])
            _subtract_means(work[sample, :planes], recipe.subtract > 1)
    for plane in range(planes):
        for sample in range(len(panels)):
            move = moves[sample]
            size = planes // move.stacks
            source = plane // size * size + size - 1 - plane % size if move.flip_time else plane
            values = work[sample, source if together else 0]
            if not together:
                _widen_with_signal(panels[sample], recipe, move, source, values)
            _finish(values, recipe)
            _move(values, move, plane, work[sample, planes])
        if len(panels) == 2:
            _mix(work[0, planes], work[1, planes], moves)
        for sample in range(len(panels)):
            moved = work[sample, planes]
            _add_rows(moved, plane % in_channel * len(moved), rows, sums[sample, plane // in_channel])
    for sample in range(len(panels)):
        _resize_columns(sums[sample], columns, images[sample])


@_kernel
def _widen_with_signal(panels: UInt16s, recipe: Recipe, move: Move, plane: int, values: Float32s) -> None:
    """Number `plane` of the planes (T, F) of panels (P, t, F), with what is added to it."""
    _widen(panels[recipe.positions[plane]], recipe.time_bins, values)
    if len(move.level):
        _add_signal(values, recipe.time_bins, move.path[plane], move.level[plane], move.width)


@_kernel
def _widen(panel: UInt16s, time_bins: int, plane: Float32s) -> None:
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
def _add_signal(plane: Float32s, time_bins: int, path: Float32s, level: Float32s, width: float) -> None:
    """Add a Gaussian profile along a path (t,) to a plane (T, F) of sums of `time_bins` rows (dali_graph.py)."""
    if level.max() == 0:
        return
    channels = plane.shape[1]
    total = np.float64(0)
    for row in range(len(plane)):
        part = np.float32(0)
        for channel in range(channels - 1):
            part += np.sqrt(abs(plane[row, channel + 1] - plane[row, channel]))
        total += part
    noise = (total / (len(plane) * (channels - 1)) / NEIGHBOUR_ROOT) ** 2
    for time in range(len(path)):
        if level[time] == 0:
            continue
        peak = level[time] * noise / np.sqrt(time_bins)
        first = max(0, int(np.floor(path[time] - _REACH * width)))
        last = min(channels - 1, int(np.ceil(path[time] + _REACH * width)))
        for channel in range(first, last + 1):
            offset = (channel - path[time]) / width
            plane[time // time_bins, channel] += np.float32(peak * np.exp(-0.5 * offset * offset))


@_kernel
def _subtract_means(planes: Float32s, of_rows: bool) -> None:
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
def _finish(plane: Float32s, recipe: Recipe) -> None:
    """Normalise and bend a plane (T, F)."""
    if recipe.normalises:
        _normalise(plane, recipe.epsilon)
    if recipe.bends:
        _bend(plane)


@_kernel
def _normalise(plane: Float32s, epsilon: float) -> None:
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
def _bend(plane: Float32s) -> None:
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
def _move(of: Float32s, move: Move, plane: int, to: Float32s) -> None:
    """Flip, roll, shift, scale and erase one plane (T, F) into another, which becomes number `plane`."""
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
            _scale_reversed(source[:kept], gain, offset, values[:kept])
            _scale_reversed(source[kept:], gain, offset, values[kept:])
        else:
            _scale(source[move.roll :], gain, offset, values[:kept])
            _scale(source[: move.roll], gain, offset, values[kept:])
    first, time_bin, channel, count, height, width = move.erased
    if first <= plane < first + count:
        to[time_bin : time_bin + height, channel : channel + width] = 0


@_kernel
def _scale(of: Float32s, gain: np.float32, offset: np.float32, to: Float32s) -> None:
    for channel in range(len(to)):
        to[channel] = of[channel] * gain + offset


@_kernel
def _scale_reversed(of: Float32s, gain: np.float32, offset: np.float32, to: Float32s) -> None:
    last = len(to) - 1
    for channel in range(len(to)):
        # Unsigned: a place that might be negative costs a comparison each, and the vectors.
        to[channel] = of[np.uintp(last - channel)] * gain + offset


@_kernel
def _mix(first: Float32s, second: Float32s, moves: tuple[Move, Move]) -> None:
    """CutMix and mixup of two planes (T, F), each with the other as it was before."""
    if moves[0].mixed == 0 and moves[1].mixed == 0:
        _swap_boxes(first, second, moves[0].pasted, moves[1].pasted)
        return
    before = np.empty(first.shape[1], np.float32)
    for row in range(len(first)):
        _copy(first[row], before)
        _mix_row(first[row], second[row], row, moves[0])
        _mix_row(second[row], before, row, moves[1])


@_kernel
def _mix_row(values: Float32s, others: Float32s, row: int, move: Move) -> None:
    """Mixup, or else CutMix, of a row (F,) of one sample with that of another."""
    if move.mixed > 0:
        share = np.float32(move.mixed)
        for channel in range(len(values)):
            values[channel] += share * (others[channel] - values[channel])
        return
    start, end, left, right = move.pasted
    if start <= row < end:
        _copy(others[left:right], values[left:right])


@_kernel
def _swap_boxes(
    first: Float32s, second: Float32s, of_first: tuple[int, int, int, int], of_second: tuple[int, int, int, int]
) -> None:
    """CutMix of two planes (T, F): into each, its own box out of the other as that was before."""
    left, right, start, end = of_first[2], of_first[3], of_second[2], of_second[3]
    kept = np.empty(end - start, np.float32)
    for row in range(min(of_first[0], of_second[0]), max(of_first[1], of_second[1])):
        mine, theirs = first[row], second[row]
        in_second = of_second[0] <= row < of_second[1]
        if in_second:
            _copy(mine[start:end], kept)
        if of_first[0] <= row < of_first[1]:
            _copy(theirs[left:right], mine[left:right])
        if in_second:
            _copy(kept, theirs[start:end])


@_kernel
def _copy(of: Float32s, to: Float32s) -> None:
    # Numba copies one slice into another value by value; this loop becomes vectors.
    for place in range(len(to)):
        to[place] = of[place]


@_kernel
def _add_rows(plane: Float32s, start: int, weights: Weights, sums: Float32s) -> None:
    """Add what the rows of a plane (T, F), of which the first is row `start` of the old image, give to (H, F).

    Four old rows at a time: a sum that goes to memory and back for each takes twice as long.
    """
    first, weight = weights
    for row in range(len(sums)):
        place = max(first[row], start)
        end = min(first[row] + len(weight), start + len(plane))
        to = sums[row]
        while place + 4 <= end:
            a, b, c, d = (
                plane[place - start],
                plane[place + 1 - start],
                plane[place + 2 - start],
                plane[place + 3 - start],
            )
            tap = place - first[row]
            a_weight, b_weight, c_weight, d_weight = (
                weight[tap, row],
                weight[tap + 1, row],
                weight[tap + 2, row],
                weight[tap + 3, row],
            )
            for column in range(len(to)):
                to[column] += a_weight * a[column] + b_weight * b[column] + c_weight * c[column] + d_weight * d[column]
            place += 4
        while place < end:
            a, a_weight = plane[place - start], weight[place - first[row], row]
            for column in range(len(to)):
                to[column] += a_weight * a[column]
            place += 1


@_kernel
def _resize_columns(sums: Float32s, weights: Weights, image: Float32s) -> None:
    """(C, H, F) to (C, H, W)."""
    first, weight = weights
    if len(weight) == 1:
        image[:] = sums
        return
    of = np.zeros(sums.shape[2] + len(weight), np.float32)  # zeros behind the end, of weight 0
    start = first.astype(np.uint32)
    for channel in range(image.shape[0]):
        for row in range(image.shape[1]):
            _copy(sums[channel, row], of[: sums.shape[2]])
            to = image[channel, row]
            to[:] = 0
            for tap in range(0, len(weight), 4):
                for column in range(len(to)):
                    place = start[column] + np.uint32(tap)
                    to[column] += (
                        weight[tap, column] * of[place]
                        + weight[tap + 1, column] * of[place + np.uint32(1)]
                        + weight[tap + 2, column] * of[place + np.uint32(2)]
                        + weight[tap + 3, column] * of[place + np.uint32(3)]
                    )
