"""The inner loop of the fit of a line, compiled by Numba.

Axes: N panel, T time bin, F frequency channel; R drift rate, C channel in the middle of the cadence.
"""

import numpy as np
import numpy.typing as npt

from pipeline.kernel_cache import kernel

Float64s = npt.NDArray[np.float64]

_kernel = kernel(nogil=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy")


@_kernel
def sum_lines(
    cumulated: Float64s,
    chosen: npt.NDArray[np.int64],
    rows: Float64s,
    rates: Float64s,
    middles: Float64s,
    width: float,
    sums: Float64s,
) -> None:
    """Sum panels along every line into `sums` (N, R, C), divided by sqrt(T x width): white noise keeps deviation 1.

    `cumulated` (P, T, F + 1) is the sum of the channels below each channel's lower edge, so that a line may have any
    `width`, in channels, and lie anywhere between them. `chosen` (N,) are the panels, `rows` (N, T) the times of their
    time bins, `rates` are in channels per unit of `rows`. Values outside the panels count as 0.
    """
    _, time_bins, edges = cumulated.shape
    channels = edges - 1
    scale = 1 / np.sqrt(time_bins * width)
    for panel in range(len(chosen)):
        for rate in range(len(rates)):
            for middle in range(len(middles)):
                total = 0.0
                for row in range(time_bins):
                    lower = middles[middle] + rates[rate] * rows[panel, row] + 0.5 - width / 2
                    high = min(max(lower + width, 0.0), channels - 1e-9)
                    low = min(max(lower, 0.0), channels - 1e-9)
                    at, below = int(high), int(low)
                    line = cumulated[chosen[panel], row]
                    total += line[at] + (high - at) * (line[at + 1] - line[at])
                    total -= line[below] + (low - below) * (line[below + 1] - line[below])
                sums[panel, rate, middle] = total * scale
