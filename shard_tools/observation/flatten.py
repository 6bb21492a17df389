"""From raw power to multiples of the radiometer noise: remove DC spikes, sum channels, divide by the bandpass.

Axes: T time bin, F column. NaN marks blanked values: not finite in the file, 0, or far above all signals.
"""

import warnings

import numpy as np
import numpy.typing as npt

Float32s = npt.NDArray[np.float32]
MOST_POWER = 1e4
"""In multiples of the bandpass. A value above it is a fault, not a signal, and would dwarf the rest of its panel."""
# At most so many blocks of a coarse channel, and at least so many columns and values in a block: the median of 512
# values is known to 6 % of a value's noise. A line that crosses a whole block while it drifts raises the median by a
# few percent of its own height; one in fewer than half of the columns does not raise it at all.
_MOST_BLOCKS, _FEWEST_COLUMNS, _FEWEST_VALUES = 512, 8, 512


def remove_dc_spikes(values: Float32s, nfpc: int) -> None:
    """Interpolate the two channels in the middle of each coarse channel, in (T, coarse channels x nfpc), in place.

    Each becomes the mean of a clean channel on either side. There are two because the spike is in the upper or the
    lower one, depending on the sign of foff.
    """
    upper = nfpc // 2
    for channel, below, above in ((upper, upper - 3, upper + 1), (upper - 1, upper - 2, upper + 2)):
        if below >= 0 and above < nfpc:
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is blanked later
                values[:, channel::nfpc] = (values[:, below::nfpc] + values[:, above::nfpc]) / 2


def sum_channels(values: Float32s, channel_bin: int) -> Float32s:
    """Sum neighbouring channels: (T, F) to (T, F / channel_bin); what is not finite becomes NaN.

    Whole arrays are added in a fixed order, so that the sums do not depend on the processor.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        while channel_bin % 2 == 0:
            values = values[:, 0::2] + values[:, 1::2]
            channel_bin //= 2
        total = values[:, 0::channel_bin].copy()
        for channel in range(1, channel_bin):
            total += values[:, channel::channel_bin]
    total[~np.isfinite(total)] = np.nan
    return total


def block_count(time_bins: int, columns: int) -> int:
    """Into how many blocks the columns of a coarse channel are divided for its bandpass."""
    return max(1, min(_MOST_BLOCKS, columns // max(_FEWEST_COLUMNS, _FEWEST_VALUES // time_bins)))


def block_medians(values: Float32s, blocks: int) -> Float32s:
    """The bandpass at the middle of each block: the median over the block of the mean over time; NaN where dead.

    `values` is (T, F) of one coarse channel. The blocks are of equal width, to one column.
    """
    borders = np.arange(blocks + 1) * values.shape[1] // blocks
    columns = borders[:-1, None] + np.arange(np.diff(borders).max())  # of each block
    outside = columns >= borders[1:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # blocks that are all blanked
        spectrum = np.asarray(np.nanmean(values, axis=0, dtype=np.float64))
        in_blocks = np.where(outside, np.nan, spectrum[np.where(outside, 0, columns)])
        medians = np.nanmedian(in_blocks, axis=1).astype(np.float32)
    medians[~(medians > 0)] = np.nan
    return medians


def to_bandpass(medians: Float32s, columns: int) -> Float32s:
    """The bandpass of each column: straight lines through the medians at the middles of blocks, out to the borders.

    Never below half of the nearer block's median: on a steep edge the line could reach 0. NaN in dead blocks; a line
    towards a dead block uses the median of the nearest live one.
    """
    live = np.flatnonzero(np.isfinite(medians))
    if not len(live):
        return np.full(columns, np.nan, np.float32)
    borders = np.arange(len(medians) + 1) * columns // len(medians)
    dead = np.repeat(~np.isfinite(medians), np.diff(borders))
    medians = medians[live[np.abs(np.arange(len(medians))[:, None] - live).argmin(axis=1)]]
    width = columns / len(medians)
    place = (np.arange(columns) + 0.5) / width - 0.5
    if len(medians) == 1:
        return np.repeat(medians, columns)
    lower = np.clip(np.floor(place), 0, len(medians) - 2).astype(np.int64)
    share = (place - lower).astype(np.float32)
    line = medians[lower] * (1 - share) + medians[lower + 1] * share
    nearest = medians[np.clip(np.rint(place), 0, len(medians) - 1).astype(np.int64)]
    bandpass: Float32s = np.maximum(line, nearest / 2)
    bandpass[dead] = np.nan
    return bandpass


def to_radiometer_noise(values: Float32s, bandpass: Float32s, samples: float) -> Float32s:
    """(T, F) relative to the bandpass, in standard deviations of the noise of `samples` independent samples.

    The radiometer equation: power averaged over width x time has a relative standard deviation of 1 / sqrt(width x
    time).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (values / bandpass - np.float32(1)) * np.float32(np.sqrt(samples))
    scaled[~np.isfinite(scaled)] = np.nan
    return scaled
