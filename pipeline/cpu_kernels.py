"""The steps of the CPU's images as loops over pixels, compiled by Numba without Python's lock.

One call takes a snippet all the way to its image, so that threads do not wait for each other: with many short NumPy or
torch calls they do, and several are slower than one alone (docs/performance.md). All steps are in this file because
Numba's cache does not notice when a function that is called from another file changes.

No step assigns to a whole slice or calls a NumPy reduction. Numba compiles a general function for each of these, error
messages included, and the kernels then take nearly three times as long to compile.

Axes: P positions, t time bins before summing, N planes, T time bins, F frequency channels; C, H, W canvas.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.inlining import inlined
from pipeline.kernel_cache import kernel
from pipeline.signals import LORENTZIAN_END, LORENTZIAN_REACH, NEIGHBOUR_ROOT

Float32s = npt.NDArray[np.float32]
UInt16s = npt.NDArray[np.uint16]
UInt32s = npt.NDArray[np.uint32]
Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Weights = tuple[Int64s, Float32s]
"""A resize along one axis: for each new pixel the first old pixel that it uses, and the weights (K, new) of that pixel
and the next K - 1. K is 1 where the size stays the same, else a multiple of 3."""


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
    """Resize from time bins to H."""
    columns: Weights
    """Resize from channels to W."""
    stacks: int
    """Number of stacks of planes; time is reversed over each of them as a whole."""


SAMPLE_DRAWS = np.dtype(
    [
        ("flip_frequency", np.bool_),
        ("flip_time", np.bool_),
        ("roll", np.int64),
        ("shift", np.int64),
        ("gain", np.float32),
        ("offset", np.float32),
        ("mixed", np.float32),  # weight of the partner in mixup
        ("erase_box", np.int64, 6),  # what becomes 0: its first plane, time bin and channel, then the number of each
        ("cutmix_box", np.int64, 4),  # from the partner: start and end time bin, start and end channel; ends excluded
    ],
    align=True,
)
"""What is drawn for one training sample, except signals; see Draws. Numba compiles faster for a record than for a
tuple."""
SampleDraws = Any  # one such record, or an array of them: no type that mypy knows has its fields


class SampleSignals(NamedTuple):
    """The signals that are added to the samples of a batch; see Draws."""

    path: Float32s
    """(n, S, N, t) channel of each signal in each plane."""
    level: Float32s
    """(n, S, N, t) its brightness, in standard deviations of the plane's noise."""
    is_in_plane: Bools
    """(n, S, N) whether its brightness is above 0 in any time bin of the plane."""
    width: Float32s
    """(n, S) its standard deviation, or half width at half maximum, in channels."""
    lorentzian: Bools
    """(n, S) whether its profile is a Lorentzian, not a Gaussian."""
    normalised: Bools
    """(n,) whether signals are added before time bins are summed, and panels that hold one normalised again."""


class Scratch(NamedTuple):
    """Memory of one thread, with any content: fresh memory would cost more than the work done in it."""

    planes: Float32s
    """(2, N + 1, T, F): the planes of two samples, and one more for each."""
    sums: Float32s
    """(2, C, H, F): their images before the columns are resized."""
    panel: Float32s
    """(t, F): a panel before its time bins are summed."""


# Sums may be in any order, so that they can be vectorised; infinity and NaN keep their meaning.
_FASTMATH = {"reassoc", "contract", "nsz", "arcp"}
_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": _FASTMATH, "error_model": "numpy", "no_cfunc_wrapper": True}
_TO_FLOAT32 = np.float32(2.0**112)  # the exponents' biases are 127 and 15
_SQRT_HALF = np.uint32(0x3F3504F3)  # as bits of a float32
_REACH = 5.0  # standard deviations out to which a profile is added; 4e-6 of its peak remains there
_kernel = kernel(**_OPTIONS)
# A function that is not inlined exists twice, compiled alone and with its caller, with sums in different orders. Which
# of the two runs depends on whether this process compiled them or found them in the cache. Wrappers are left out: they
# are for calls from Python and C.
_step = inlined(**_OPTIONS, forceinline=True, no_cpython_wrapper=True)


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
    draws: SampleDraws,
    signals: SampleSignals | None,
    slots: Int64s,
    scratch: Scratch,
    images: tuple[Float32s, Float32s],
) -> None:
    """Snippets (1 or 2, P, t, F) of float16 bits to their images (C, H, W), augmented and mixed with each other.

    `draws` (n,) and `signals` are those of a batch, and `slots` (1 or 2,) the samples' places in it. Numba compiles
    this once with signals and once for None, which takes two thirds of the time.
    """
    work, sums = scratch.planes, scratch.sums
    together, planes = steps.subtract > 0, work.shape[1] - 1
    in_channel = planes // images[0].shape[0]
    for sample in range(len(panels)):
        _clear(sums[sample])
    for plane in range(planes):
        for sample in range(len(panels)):
            drawn = draws[slots[sample]]
            size = planes // steps.stacks
            source = plane // size * size + size - 1 - plane % size if drawn.flip_time else plane
            first, last = _planes_to_sum(together, plane == 0, source, planes)
            for summed in range(first, last):
                values = work[sample, summed if together else 0]
                _sum_and_add_signals(panels[sample], steps, signals, slots[sample], summed, scratch.panel, values)
            if together and plane == 0:
                _subtract_means(work[sample, :planes], steps.subtract > 1)
            values = work[sample, source if together else 0]
            _normalise_and_compress(values, steps)
            _augment(values, drawn, plane, work[sample, planes])
        if len(panels) == 2:
            _mix(work[0, planes], work[1, planes], draws[slots[0]], draws[slots[1]])
        for sample in range(len(panels)):
            augmented = work[sample, planes]
            start = plane % in_channel * len(augmented)
            _resize_rows(augmented, start, steps.rows, sums[sample, plane // in_channel])
    for sample in range(len(panels)):
        _resize_columns(sums[sample], steps.columns, images[sample])


@_step
def _planes_to_sum(together: bool, is_first: bool, source: int, planes: int) -> tuple[int, int]:
    """The first plane to sum before plane `source` is used, and the one after the last.

    `together`: all planes are summed before the first is used, since they depend on each other. Otherwise one at a
    time: one stays in the core's cache, six do not. Both cases share one loop, since a step that is called in two
    places is compiled twice.
    """
    if together:
        return 0, planes if is_first else 0
    return source, source + 1


@_step
def _sum_and_add_signals(
    panels: UInt16s,
    steps: Steps,
    signals: SampleSignals | None,
    slot: int,
    plane: int,
    wide: Float32s,
    values: Float32s,
) -> None:
    """Plane number `plane` (T, F) of panels (P, t, F), with the signals that are added to it.

    `wide` is scratch memory for a panel (t, F).
    """
    if signals is None:  # known by type: Numba compiles only one of the two cases
        _sum_time_bins(panels[steps.positions[plane]], steps.sum_time_bins, values)
        return
    has_signal = _has_signal(signals, slot, plane)
    # Each step is called in one place only: it is inlined, and would be compiled once for each place.
    is_wide = has_signal and signals.normalised[slot]
    target, time_bins = (wide, 1) if is_wide else (values, steps.sum_time_bins)
    _sum_time_bins(panels[steps.positions[plane]], time_bins, target)
    if has_signal:
        _add_signals(target, time_bins, signals, slot, plane)
    if is_wide:
        _normalise(wide, steps.epsilon)
        _sum_rows(wide, steps.sum_time_bins, values)


@_step
def _has_signal(signals: SampleSignals, slot: int, plane: int) -> bool:
    found = False
    for signal in range(signals.is_in_plane.shape[1]):
        found |= signals.is_in_plane[slot, signal, plane]
    return found


@_step
def _clear(sums: Float32s) -> None:
    """Fill (C, H, F) with 0."""
    for channel in range(sums.shape[0]):
        for row in range(sums.shape[1]):
            _fill(sums[channel, row], np.float32(0))


@_step
def _fill(of: Float32s, value: np.float32) -> None:
    for place in range(len(of)):
        of[place] = value


@_step
def _sum_time_bins(panel: UInt16s, time_bins: int, plane: Float32s) -> None:
    """A panel (t, F) of float16 bits to a plane (T, F): sums of `time_bins` rows, divided by sqrt(time_bins).

    float16 becomes float32 by its bits: exponent and fraction move to their new places, and a multiplication corrects
    the exponent's bias, for subnormal numbers too. Infinities and NaN come out wrong, but snippets have none.
    """
    factor = np.float32(1 / np.sqrt(time_bins))  # so that white noise keeps its standard deviation
    for row in range(len(plane)):
        total = plane[row]
        for part in range(time_bins):
            halves = panel[row * time_bins + part]
            if part == 0:
                for channel in range(len(total)):
                    total[channel] = _to_float32(halves[channel]) * factor
            else:
                for channel in range(len(total)):
                    total[channel] += _to_float32(halves[channel]) * factor


@_step
def _to_float32(half: np.uint16) -> np.float32:
    bits = np.uint32(half)
    wide = ((bits & np.uint32(0x8000)) << np.uint32(16)) | ((bits & np.uint32(0x7FFF)) << np.uint32(13))
    return np.uint32(wide).view(np.float32) * _TO_FLOAT32


@_step
def _sum_rows(panel: Float32s, time_bins: int, plane: Float32s) -> None:
    """A panel (t, F) to a plane (T, F), like `_sum_time_bins`."""
    factor = np.float32(1 / np.sqrt(time_bins))
    for row in range(plane.shape[0]):
        total = plane[row]
        _fill(total, np.float32(0))
        for part in range(time_bins):
            values = panel[row * time_bins + part]
            for channel in range(len(total)):
                total[channel] += values[channel] * factor


@_step
def _add_signals(values: Float32s, time_bins: int, signals: SampleSignals, slot: int, plane: int) -> None:
    """Add the signals of plane number `plane` to its values (T, F), sums of `time_bins` rows, as in dali_graph.py."""
    noise = _noise(values) / np.sqrt(time_bins)
    for signal in range(signals.is_in_plane.shape[1]):
        if signals.is_in_plane[slot, signal, plane]:
            path, level = signals.path[slot, signal, plane], signals.level[slot, signal, plane]
            width = signals.width[slot, signal]
            if signals.lorentzian[slot, signal]:
                _add_lorentzian(values, time_bins, path, level, noise, width)
            else:
                _add_gaussian(values, time_bins, path, level, noise, width)


@_step
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


@_step
def _add_gaussian(plane: Float32s, time_bins: int, path: Float32s, level: Float32s, noise: float, width: float) -> None:
    """Add a Gaussian profile along a path (t,) to a plane (T, F); its peak is `level` (t,) times `noise`.

    The ratio of neighbouring channels' values falls by a constant factor from channel to channel: each time bin takes
    two exponentials, not one per channel.
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


@_step
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


@_step
def _subtract_means(planes: Float32s, of_rows: bool) -> None:
    """Subtract each channel's mean over all planes (N, T, F), then with `of_rows` each time bin's over the channels."""
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


@_step
def _normalise_and_compress(plane: Float32s, steps: Steps) -> None:
    """The steps that are the same in training and evaluation, on a plane (T, F)."""
    if steps.normalise:
        _normalise(plane, steps.epsilon)
    if steps.compress:
        _compress(plane)


@_step
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


@_step
def _compress(plane: Float32s) -> None:
    """The asinh of a plane (T, F), to 1e-6: sign(x) log(|x| + sqrt(x^2 + 1)).

    The logarithm is that of Cephes (Moshier 1992, logf.c): the exponent, and a polynomial of the fraction. NumPy's and
    the C library's work on one value at a time here, which takes ten times as long.
    """
    for row in range(len(plane)):
        values = plane[row]
        for channel in range(len(values)):
            size = abs(values[channel])
            sum_of_both = size + np.sqrt(size * size + np.float32(1))
            above = np.uint32(np.float32(sum_of_both).view(np.uint32) - _SQRT_HALF)  # all values are at least 1
            power = np.float32(above >> np.uint32(23))
            # Into sqrt(1/2) to sqrt(2).
            x = np.uint32((above & np.uint32(0x007FFFFF)) + _SQRT_HALF).view(np.float32) - np.float32(1)
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
            values[channel] = y if values[channel] >= 0 else -y


@_step
def _augment(of: Float32s, draws: SampleDraws, plane: int, to: Float32s) -> None:
    """Flip, roll, shift, scale and erase a plane (T, F) into `to`, the canvas's plane number `plane`."""
    time_bins, channels = of.shape
    gain, offset = np.float32(draws.gain), np.float32(draws.offset)
    kept = channels - draws.roll
    for row in range(time_bins):
        values = to[row]
        place = row + draws.shift
        if place < 0 or place >= time_bins:
            _fill(values, offset)  # what is shifted in is 0, plus the offset
            continue
        source = of[time_bins - 1 - place if draws.flip_time else place]
        if draws.flip_frequency:
            _scale_reversed(source[:kept], gain, offset, values[:kept])
            _scale_reversed(source[kept:], gain, offset, values[kept:])
        else:
            _scale(source[draws.roll :], gain, offset, values[:kept])
            _scale(source[: draws.roll], gain, offset, values[kept:])
    box = draws.erase_box
    if box[0] <= plane < box[0] + box[3]:
        for row in range(box[1], box[1] + box[4]):
            _fill(to[row, box[2] : box[2] + box[5]], np.float32(0))


@_step
def _scale(of: Float32s, gain: np.float32, offset: np.float32, to: Float32s) -> None:
    for channel in range(len(to)):
        to[channel] = of[channel] * gain + offset


@_step
def _scale_reversed(of: Float32s, gain: np.float32, offset: np.float32, to: Float32s) -> None:
    last = len(to) - 1
    for channel in range(len(to)):
        # Unsigned: an index that might be negative costs a comparison per value, and prevents vectorising.
        to[channel] = of[np.uintp(last - channel)] * gain + offset


@_step
def _mix(first: Float32s, second: Float32s, of_first: SampleDraws, of_second: SampleDraws) -> None:
    """CutMix or mixup of two planes (T, F), each with the other as it was before this step."""
    box_1, box_2 = of_first.cutmix_box, of_second.cutmix_box
    is_mixed = of_first.mixed > 0 or of_second.mixed > 0
    for row in range(len(first)):
        in_1, in_2 = box_1[0] <= row < box_1[1], box_2[0] <= row < box_2[1]
        if in_1 or in_2 or is_mixed:
            # A row outside of a box takes no channel from the partner.
            ends = box_1[2], box_1[3] if in_1 else 0, box_2[2], box_2[3] if in_2 else 0
            _mix_rows(first[row], second[row], ends, of_first.mixed, of_second.mixed)


@_step
def _mix_rows(
    first: Float32s, second: Float32s, ends: tuple[int, int, int, int], share_1: np.float32, share_2: np.float32
) -> None:
    """Mix rows (F,) of two partners: start and end of the channels that each takes from the other, then of mixup.

    One loop over all channels with a choice in each: it is vectorised, and copies of parts of rows are no faster.
    """
    left_1, right_1 = np.uint32(ends[0]), np.uint32(ends[1])
    left_2, right_2 = np.uint32(ends[2]), np.uint32(ends[3])
    for channel in range(len(first)):
        place = np.uint32(channel)
        a, b = first[channel], second[channel]
        first[channel] = b if left_1 <= place < right_1 else a + share_1 * (b - a)
        second[channel] = a if left_2 <= place < right_2 else b + share_2 * (a - b)


@_step
def _copy(of: Float32s, to: Float32s) -> None:
    # Numba copies one slice into another value by value; this loop is vectorised.
    for place in range(len(to)):
        to[place] = of[place]


@_step
def _resize_rows(plane: Float32s, start: int, weights: Weights, sums: Float32s) -> None:
    """Add the share of a plane (T, F) to the resized rows (H, F) of its stack; `start` is its first row in the stack.

    Four old rows at a time: reading and writing the sums once per old row takes twice as long.
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


@_step
def _resize_columns(sums: Float32s, weights: Weights, image: Float32s) -> None:
    """Images (C, H, F) to (C, H, W)."""
    first, weight = weights
    if len(weight) == 1:
        for channel in range(image.shape[0]):
            for row in range(image.shape[1]):
                _copy(sums[channel, row], image[channel, row])
        return
    of = np.zeros(sums.shape[2] + len(weight), np.float32)  # zeros after the end, which have weight 0
    start = first.astype(np.uint32)
    for channel in range(image.shape[0]):
        for row in range(image.shape[1]):
            _copy(sums[channel, row], of[: sums.shape[2]])
            to = image[channel, row]
            _fill(to, np.float32(0))
            for tap in range(0, len(weight), 3):
                for column in range(len(to)):
                    place = start[column] + np.uint32(tap)
                    to[column] += (
                        weight[tap, column] * of[place]
                        + weight[tap + 1, column] * of[place + np.uint32(1)]
                        + weight[tap + 2, column] * of[place + np.uint32(2)]
                    )
