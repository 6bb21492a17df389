"""The inner loops of the CPU's canvases, compiled by Numba: each call lets other threads run from its start to its end.

Many small NumPy or torch calls did not: threads that take turns at Python's lock after every 20 microseconds are
slower together than one alone (docs/performance.md).

Axes: t time bins before summing, N planes, T time bins, F frequency channels; C, H, W canvas.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

Float32s = npt.NDArray[np.float32]
UInt16s = npt.NDArray[np.uint16]
Int32s = npt.NDArray[np.int32]
Weights = tuple[Int32s, Int32s, Float32s]
"""A resize along one axis: for each new pixel where its weights begin, the old pixels, their weights."""

# Sums in any order, as vectors need; NaN and infinity keep their meaning.
_kernel = njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy")
_TO_FLOAT32 = np.float32(2.0**112)  # the exponents' biases are 127 and 15


@_kernel
def widen_and_sum(panel: UInt16s, time_bins: int, scale: np.float32, plane: Float32s) -> None:  # pragma: no cover
    """A panel (t, F) of float16 bits to a plane (T, F): sums of `time_bins` rows, times `scale`.

    Half to single precision by bits: exponent and fraction move to their new places, and a multiplication mends the
    bias; subnormal numbers come out right too. Infinities and NaN don't, and snippets have none.
    """
    channels = panel.shape[1]
    bits = np.empty(channels, np.uint32)
    values = bits.view(np.float32)
    factor = scale * _TO_FLOAT32
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
def subtract_means(planes: Float32s, of_rows: bool) -> None:  # pragma: no cover
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
def normalise(planes: Float32s, epsilon: float) -> None:  # pragma: no cover
    """Bring each plane of (N, T, F) to mean 0 and standard deviation 1; `epsilon` is added to the variance."""
    for plane in range(planes.shape[0]):
        values = planes[plane]
        total = 0.0
        for row in range(values.shape[0]):
            part = np.float32(0)
            for channel in range(values.shape[1]):
                part += values[row, channel]
            total += part
        mean = np.float32(total / values.size)
        total = 0.0
        for row in range(values.shape[0]):
            part = np.float32(0)
            for channel in range(values.shape[1]):
                part += (values[row, channel] - mean) ** 2
            total += part
        factor = np.float32(1 / np.sqrt(total / values.size + epsilon))
        for row in range(values.shape[0]):
            for channel in range(values.shape[1]):
                values[row, channel] = (values[row, channel] - mean) * factor


@_kernel
def augment(
    planes: Float32s,
    out: Float32s,
    stacks: int,
    flip_frequency: bool,
    flip_time: bool,
    roll: int,
    shift: int,
    gain: np.float32,
    offset: np.float32,
) -> None:  # pragma: no cover
    """Flip, roll, shift and scale planes (N, T, F) into `out`; time is reversed over each of `stacks` as a whole."""
    count, time_bins, channels = planes.shape
    size = count // stacks
    for plane in range(count):
        of_plane = plane
        if flip_time:
            of_plane = plane // size * size + size - 1 - plane % size
        for row in range(time_bins):
            to = out[plane, row]
            of_row = row + shift
            if of_row < 0 or of_row >= time_bins:
                to[:] = offset  # what comes in is 0
                continue
            if flip_time:
                of_row = time_bins - 1 - of_row
            of = planes[of_plane, of_row]
            kept = channels - roll
            if flip_frequency:
                for channel in range(kept):
                    to[channel] = of[channels - 1 - roll - channel] * gain + offset
                for channel in range(roll):
                    to[kept + channel] = of[channels - 1 - channel] * gain + offset
            else:
                for channel in range(kept):
                    to[channel] = of[roll + channel] * gain + offset
                for channel in range(roll):
                    to[kept + channel] = of[channel] * gain + offset


@_kernel
def resize(stack: Float32s, rows: Weights, columns: Weights, image: Float32s) -> None:  # pragma: no cover
    """(C, h, w) to (C, H, W) as sparse weighted sums, along time and then along frequency."""
    row_start, row_of, row_weight = rows
    column_start, column_of, column_weight = columns
    total = np.empty(stack.shape[2], np.float32)
    for channel in range(stack.shape[0]):
        for row in range(image.shape[1]):
            total[:] = 0
            for place in range(row_start[row], row_start[row + 1]):
                weight, of = row_weight[place], stack[channel, row_of[place]]
                for column in range(total.size):
                    total[column] += weight * of[column]
            to = image[channel, row]
            for column in range(to.size):
                value = np.float32(0)
                for place in range(column_start[column], column_start[column + 1]):
                    value += column_weight[place] * total[column_of[place]]
                to[column] = value
