"""The steps of the CPU's images as loops over pixels, compiled by Numba without Python's lock.

Each call runs from a snippet to its image, so that threads do not wait for each other: with many short NumPy or torch
calls they did, and were slower together than one alone (docs/performance.md). All steps are in this file because
Numba's cache of a function does not notice a change of a function that it calls from another file.

No step assigns to a whole slice or calls a NumPy reduction. Numba compiles a general function for each of these, error
messages included, and the kernels then take nearly three times as long to compile.

Axes: P positions, t time bins before summing, N planes, T time bins, F frequency channels; C, H, W canvas.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from pipeline.kernel_cache import Function, kernel
from pipeline.signals import LORENTZIAN_END, LORENTZIAN_REACH, NEIGHBOUR_ROOT

Float32s = npt.NDArray[np.float32]
UInt16s = npt.NDArray[np.uint16]
UInt32s = npt.NDArray[np.uint32]
Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Weights = tuple[Int64s, Float32s]
"""A resize along one axis: the first old pixel of each new pixel, and the weights (K, new) of it and the next K - 1. K
is 1 where the size stays the same, else a multiple of 4."""


class Steps(NamedTuple):
    """How a snippet becomes an image: CanvasConfig, in types that Numba takes."""

    positions: Int64s
    """(N,) position in the cadence of each plane."""
    sum_time_bins: int
    subtract: int
    """0: nothing. 1: each channel's mean. 2: then also each time bin's mean."""
    normalise: bool
    epsilon: float
    """Added to the variance."""
    compress: bool
    """Whether to take the asinh."""
    rows: Weights
    """Of the resize from time bins to H."""
    columns: Weights
    """Of the resize from channels to W."""


class SampleDraws(NamedTuple):
    """What is drawn for one training sample; see Draws."""

    stacks: int
    """Number of stacks of planes; time is reversed over each of them as a whole."""
    flip_frequency: bool
    flip_time: bool
    roll: int
    shift: int
    gain: float
    offset: float
    erase_box: tuple[int, int, int, int, int, int]
    """What becomes 0: its first plane, time bin and channel, then the number of each."""
    cutmix_box: tuple[int, int, int, int]
    """What comes from the partner: start and end time bin, start and end channel; ends excluded."""
    mixed: float
    """Weight of the partner in mixup."""
    signal_path: Float32s
    """(S, N, t) channel of each added signal in each plane; empty where none is added."""
    signal_level: Float32s
    """(S, N, t) its brightness, in standard deviations of the plane's noise."""
    signal_width: Float32s
    """(S,) its standard deviation, or half width at half maximum, in channels."""
    signal_lorentzian: Bools
    """(S,) whether its profile is a Lorentzian, not a Gaussian."""
    signal_normalised: bool
    """Whether signals are added before time bins are summed, and the panels that hold one normalised again."""


class Scratch(NamedTuple):
    """Memory of one thread. What is in it does not matter: fresh memory would cost more than the work done in it."""

    planes: Float32s
    """(2, N + 1, T, F): the planes of two samples, and one more for each."""
    sums: Float32s
    """(2, C, H, F): their images before the columns are resized."""
    panel: Float32s
    """(t, F): a panel before its time bins are summed."""


# Sums in any order, as vectors need; infinity and NaN keep their meaning.
_FASTMATH = {"reassoc", "contract", "nsz", "arcp"}
_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": _FASTMATH, "error_model": "numpy", "no_cfunc_wrapper": True}
_STEP_OPTIONS = {**_OPTIONS, "forceinline": True, "no_cpython_wrapper": True}
_TO_FLOAT32 = np.float32(2.0**112)  # the exponents' biases are 127 and 15
_SQRT_HALF = np.uint32(0x3F3504F3)  # as bits of a float32
_REACH = 5.0  # standard deviations of a signal's profile, where 4e-6 of its peak is left
_kernel = kernel(**_OPTIONS)


def _inlined(function: Function) -> Function:
    """For steps of a kernel.

    A function that stays by itself exists twice: compiled alone and with its caller, with sums in another order. Which
    of the two runs depends on whether this process compiled them or found them in the cache. Wrappers are left out:
    they are for calls from Python and C.
    """
    compiled: Function = njit(**_STEP_OPTIONS)(function)
    return compiled


@_kernel
def write_eval_image(panels: UInt16s, steps: Steps, scratch: Scratch, image: Float32s) -> None:
    """A snippet (P, t, F) of float16 bits to its image (C, H, W)."""
    work, sums = scratch.planes[0, :-1], scratch.sums[0]
    _clear(sums)
    together, planes = steps.subtract > 0, len(work)
    in_channel = planes // len(image)
    for plane in range(planes):
        first, last = _planes_to_sum(together, plane == 0, plane, planes)
        for summed in range(first, last):
            values = work[summed if together else 0]
            _sum_time_bins(panels[steps.positions[summed]], steps.sum_time_bins, values)
        if together and plane == 0:
            _subtract_means(work, steps.subtract > 1)
        values = work[plane if together else 0]
        _normalise_and_compress(values, steps)
        _resize_rows(values, plane % in_channel * len(values), steps.rows, sums[plane // in_channel])
    _resize_columns(sums, steps.columns, image)


@_kernel
def write_train_images(
    panels: UInt16s,
    steps: Steps,
    draws: tuple[SampleDraws, SampleDraws],
    scratch: Scratch,
    images: tuple[Float32s, Float32s],
) -> None:
    """Snippets (1 or 2, P, t, F) of float16 bits to their images (C, H, W), augmented and mixed with each other."""
    work, sums = scratch.planes, scratch.sums
    together, planes = steps.subtract > 0, work.shape[1] - 1
    in_channel = planes // images[0].shape[0]
    for sample in range(len(panels)):
        _clear(sums[sample])
    for plane in range(planes):
        for sample in range(len(panels)):
            drawn = draws[sample]
            size = planes // drawn.stacks
            source = plane // size * size + size - 1 - plane % size if drawn.flip_time else plane
            first, last = _planes_to_sum(together, plane == 0, source, planes)
            for summed in range(first, last):
                values = work[sample, summed if together else 0]
                _sum_and_add_signals(panels[sample], steps, drawn, summed, scratch.panel, values)
            if together and plane == 0:
                _subtract_means(work[sample, :planes], steps.subtract > 1)
            values = work[sample, source if together else 0]
            _normalise_and_compress(values, steps)
            _augment(values, drawn, plane, work[sample, planes])
        if len(panels) == 2:
            _mix(work[0, planes], work[1, planes], draws)
        for sample in range(len(panels)):
            augmented = work[sample, planes]
            start = plane % in_channel * len(augmented)
            _resize_rows(augmented, start, steps.rows, sums[sample, plane // in_channel])
    for sample in range(len(panels)):
        _resize_columns(sums[sample], steps.columns, images[sample])


@_inlined
def _planes_to_sum(together: bool, is_first: bool, source: int, planes: int) -> tuple[int, int]:
    """The first plane to sum before plane `source` is used, and the one after the last.

    `together`: all planes are summed before the first is used, as they need each other. Otherwise one at a time: one
    stays in the core's cache, six do not. Both cases share one loop, since a step that is called in two places is
    compiled twice.
    """
    if together:
        return 0, planes if is_first else 0
    return source, source + 1


@_inlined
def _sum_and_add_signals(
    panels: UInt16s, steps: Steps, draws: SampleDraws, plane: int, wide: Float32s, values: Float32s
) -> None:
    """Plane number `plane` (T, F) of panels (P, t, F), with the signals that are added to it; `wide` is memory."""
    has_signal = _has_signal(draws, plane)
    # Each step is called in one place only: it is inlined, and would be compiled once for each place.
    is_wide = has_signal and draws.signal_normalised
    target, time_bins = (wide, 1) if is_wide else (values, steps.sum_time_bins)
    _sum_time_bins(panels[steps.positions[plane]], time_bins, target)
    if has_signal:
        _add_signals(target, time_bins, draws, plane)
    if is_wide:
        _normalise(wide, steps.epsilon)
        _sum_rows(wide, steps.sum_time_bins, values)


@_inlined
def _has_signal(draws: SampleDraws, plane: int) -> bool:
    found = False
    for signal in range(len(draws.signal_level)):
        found |= _is_bright(draws.signal_level[signal, plane])
    return found


@_inlined
def _is_bright(level: Float32s) -> bool:
    """Whether a signal's brightness (t,) is above 0 in any time bin."""
    found = False
    for time in range(len(level)):
        found |= level[time] > 0
    return found


@_inlined
def _clear(sums: Float32s) -> None:
    """Fill (C, H, F) with 0."""
    for channel in range(sums.shape[0]):
        for row in range(sums.shape[1]):
            _fill(sums[channel, row], np.float32(0))


@_inlined
def _fill(of: Float32s, value: np.float32) -> None:
    for place in range(len(of)):
        of[place] = value


@_inlined
def _sum_time_bins(panel: UInt16s, time_bins: int, plane: Float32s) -> None:
    """A panel (t, F) of float16 bits to a plane (T, F): sums of `time_bins` rows, divided by sqrt(time_bins).

    float16 becomes float32 by its bits: exponent and fraction move to their new places, and a multiplication corrects
    the exponent's bias, for subnormal numbers too. Infinities and NaN come out wrong, but snippets have none.
    """
    channels = panel.shape[1]
    bits = np.empty(channels, np.uint32)
    values = bits.view(np.float32)
    factor = _TO_FLOAT32 / np.float32(np.sqrt(time_bins))  # so that white noise keeps its standard deviation
    for row in range(plane.shape[0]):
        total = plane[row]
        _fill(total, np.float32(0))
        for part in range(time_bins):
            halves = panel[row * time_bins + part]
            for channel in range(channels):
                half = np.uint32(halves[channel])
                bits[channel] = ((half & np.uint32(0x8000)) << np.uint32(16)) | (
                    (half & np.uint32(0x7FFF)) << np.uint32(13)
                )
            for channel in range(channels):
                total[channel] += values[channel] * factor


@_inlined
def _sum_rows(panel: Float32s, time_bins: int, plane: Float32s) -> None:
    """A panel (t, F) to a plane (T, F), as `_sum_time_bins`."""
    factor = np.float32(1 / np.sqrt(time_bins))
    for row in range(plane.shape[0]):
        total = plane[row]
        _fill(total, np.float32(0))
        for part in range(time_bins):
            values = panel[row * time_bins + part]
            for channel in range(len(total)):
                total[channel] += values[channel] * factor


@_inlined
def _add_signals(values: Float32s, time_bins: int, draws: SampleDraws, plane: int) -> None:
    """Add the signals of plane number `plane` to its values (T, F), sums of `time_bins` rows (dali_graph.py)."""
    noise = _noise(values) / np.sqrt(time_bins)
    for signal in range(len(draws.signal_level)):
        path, level = draws.signal_path[signal, plane], draws.signal_level[signal, plane]
        if _is_bright(level):
            width = draws.signal_width[signal]
            if draws.signal_lorentzian[signal]:
                _add_lorentzian(values, time_bins, path, level, noise, width)
            else:
                _add_gaussian(values, time_bins, path, level, noise, width)


@_inlined
def _noise(plane: Float32s) -> float:
    """Standard deviation of the noise of a plane (T, F), from the steps between neighbouring channels."""
    channels = plane.shape[1]
    total = np.float64(0)
    for row in range(len(plane)):
        part = np.float32(0)
        for channel in range(channels - 1):
            part += np.sqrt(abs(plane[row, channel + 1] - plane[row, channel]))
        total += part
    return float((total / (len(plane) * (channels - 1)) / NEIGHBOUR_ROOT) ** 2)


@_inlined
def _add_gaussian(plane: Float32s, time_bins: int, path: Float32s, level: Float32s, noise: float, width: float) -> None:
    """Add a Gaussian profile along a path (t,) to a plane (T, F); its peak is `level` (t,) times `noise`.

    The ratio of a channel's value to the one before falls by one factor from channel to channel: two exponentials for
    each time bin, not one for each channel.
    """
    step = 1 / width
    fall = np.exp(-step * step)
    for time in range(len(path)):
        peak = level[time] * noise
        if peak == 0:
            continue
        first = max(0, int(np.floor(path[time] - _REACH * width)))
        last = min(plane.shape[1] - 1, int(np.ceil(path[time] + _REACH * width)))
        offset = (first - path[time]) * step
        value = peak * np.exp(-0.5 * offset * offset)
        ratio = np.exp(-step * (offset + 0.5 * step))
        for channel in range(first, last + 1):
            plane[time // time_bins, channel] += np.float32(value)
            value *= ratio
            ratio *= fall


@_inlined
def _add_lorentzian(
    plane: Float32s, time_bins: int, path: Float32s, level: Float32s, noise: float, width: float
) -> None:
    """Add a Lorentzian profile, as `_add_gaussian`; it ends in 0 at its reach (pipeline/signals.py)."""
    for time in range(len(path)):
        peak = level[time] * noise
        if peak == 0:
            continue
        first = max(0, int(np.ceil(path[time] - LORENTZIAN_REACH * width)))
        last = min(plane.shape[1] - 1, int(np.floor(path[time] + LORENTZIAN_REACH * width)))
        scale = peak / (1 - LORENTZIAN_END)
        for channel in range(first, last + 1):
            offset = (channel - path[time]) / width
            plane[time // time_bins, channel] += np.float32(scale * (1 / (1 + offset * offset) - LORENTZIAN_END))


@_inlined
def _subtract_means(planes: Float32s, of_rows: bool) -> None:
    """Take each channel's mean over all planes (N, T, F) away; `of_rows`: then each time bin's over the channels."""
    count, time_bins, channels = planes.shape
    mean = np.zeros(channels, np.float32)
    for plane in range(count):
        for row in range(time_bins):
            for channel in range(channels):
                mean[channel] += planes[plane, row, channel]
    for channel in range(channels):
        mean[channel] /= np.float32(count * time_bins)
    for plane in range(count):
        for row in range(time_bins):
            values = planes[plane, row]
            total = np.float32(0)
            for channel in range(channels):
                values[channel] -= mean[channel]
                total += values[channel]
            if of_rows:
                shift = total / np.float32(channels)
                for channel in range(channels):
                    values[channel] -= shift


@_inlined
def _normalise_and_compress(plane: Float32s, steps: Steps) -> None:
    """The steps that are the same in training and evaluation, on a plane (T, F)."""
    if steps.normalise:
        _normalise(plane, steps.epsilon)
    if steps.compress:
        _compress(plane)


@_inlined
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


@_inlined
def _compress(plane: Float32s) -> None:
    """The asinh of a plane (T, F), to 1e-6: sign(x) log(|x| + sqrt(x^2 + 1)).

    The logarithm is that of Cephes (Moshier 1992, logf.c): the exponent, and a polynomial of the fraction. NumPy's and
    the C library's take one value at a time here, which takes ten times as long.
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


@_inlined
def _augment(of: Float32s, draws: SampleDraws, plane: int, to: Float32s) -> None:
    """Flip, roll, shift, scale and erase a plane (T, F) into `to`, the canvas's plane number `plane`."""
    time_bins, channels = of.shape
    gain, offset = np.float32(draws.gain), np.float32(draws.offset)
    kept = channels - draws.roll
    for row in range(time_bins):
        values = to[row]
        place = row + draws.shift
        if place < 0 or place >= time_bins:
            _fill(values, offset)  # what comes in is 0
            continue
        source = of[time_bins - 1 - place if draws.flip_time else place]
        if draws.flip_frequency:
            _scale_reversed(source[:kept], gain, offset, values[:kept])
            _scale_reversed(source[kept:], gain, offset, values[kept:])
        else:
            _scale(source[draws.roll :], gain, offset, values[:kept])
            _scale(source[: draws.roll], gain, offset, values[kept:])
    first, time_bin, channel, count, height, width = draws.erase_box
    if first <= plane < first + count:
        for row in range(time_bin, time_bin + height):
            _fill(to[row, channel : channel + width], np.float32(0))


@_inlined
def _scale(of: Float32s, gain: np.float32, offset: np.float32, to: Float32s) -> None:
    for channel in range(len(to)):
        to[channel] = of[channel] * gain + offset


@_inlined
def _scale_reversed(of: Float32s, gain: np.float32, offset: np.float32, to: Float32s) -> None:
    last = len(to) - 1
    for channel in range(len(to)):
        # Unsigned: a place that might be negative costs a comparison each, and the vectors.
        to[channel] = of[np.uintp(last - channel)] * gain + offset


@_inlined
def _mix(first: Float32s, second: Float32s, draws: tuple[SampleDraws, SampleDraws]) -> None:
    """CutMix or mixup of two planes (T, F), each with the other as it was before this step."""
    if draws[0].mixed == 0 and draws[1].mixed == 0:
        _swap_boxes(first, second, draws[0].cutmix_box, draws[1].cutmix_box)
        return
    before = np.empty(first.shape[1], np.float32)
    for row in range(len(first)):
        _copy(first[row], before)
        _mix_row(first[row], second[row], row, draws[0])
        _mix_row(second[row], before, row, draws[1])


@_inlined
def _mix_row(values: Float32s, others: Float32s, row: int, draws: SampleDraws) -> None:
    """Mixup, or else CutMix, of a row (F,) of one sample with the same row of its partner."""
    if draws.mixed > 0:
        share = np.float32(draws.mixed)
        for channel in range(len(values)):
            values[channel] += share * (others[channel] - values[channel])
        return
    start, end, left, right = draws.cutmix_box
    if start <= row < end:
        _copy(others[left:right], values[left:right])


@_inlined
def _swap_boxes(
    first: Float32s, second: Float32s, of_first: tuple[int, int, int, int], of_second: tuple[int, int, int, int]
) -> None:
    """CutMix of two planes (T, F): each takes its own box from the other, as it was before this step."""
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


@_inlined
def _copy(of: Float32s, to: Float32s) -> None:
    # Numba copies one slice into another value by value; this loop becomes vectors.
    for place in range(len(to)):
        to[place] = of[place]


@_inlined
def _resize_rows(plane: Float32s, start: int, weights: Weights, sums: Float32s) -> None:
    """Add the share of a plane (T, F) to the resized rows (H, F) of its stack; `start` is its first row in the stack.

    Four old rows at a time: reading and writing a sum for each of them takes twice as long.
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


@_inlined
def _resize_columns(sums: Float32s, weights: Weights, image: Float32s) -> None:
    """Images (C, H, F) to (C, H, W)."""
    first, weight = weights
    if len(weight) == 1:
        for channel in range(image.shape[0]):
            for row in range(image.shape[1]):
                _copy(sums[channel, row], image[channel, row])
        return
    of = np.zeros(sums.shape[2] + len(weight), np.float32)  # zeros behind the end, of weight 0
    start = first.astype(np.uint32)
    for channel in range(image.shape[0]):
        for row in range(image.shape[1]):
            _copy(sums[channel, row], of[: sums.shape[2]])
            to = image[channel, row]
            _fill(to, np.float32(0))
            for tap in range(0, len(weight), 4):
                for column in range(len(to)):
                    place = start[column] + np.uint32(tap)
                    to[column] += (
                        weight[tap, column] * of[place]
                        + weight[tap + 1, column] * of[place + np.uint32(1)]
                        + weight[tap + 2, column] * of[place + np.uint32(2)]
                        + weight[tap + 3, column] * of[place + np.uint32(3)]
                    )
