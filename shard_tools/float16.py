"""Conversion of other number types to float16, and what rounding loses.

Axes: P panel, T time bin, F frequency channel.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shard_tools.errors import InputError

# Rounding adds noise. At a tenth of the noise already there, it costs half a percent of a signal's SNR.
MOST_OF_NOISE = 0.1
LARGEST = float(np.finfo(np.float16).max)


class Rounding(NamedTuple):
    """What was lost when values were rounded to float16."""

    largest: float
    """The largest difference between a value and its float16."""
    of_noise: float
    """Root mean square of the differences, divided by the noise, in the worst panel."""


def to_halves(values: npt.NDArray[Any], where: str) -> tuple[npt.NDArray[np.float16], Rounding | None]:
    """(P, T, F) of any real type and order as float16 in C order, and the rounding; None if it was float16 already.

    Raises InputError where a value exceeds float16, or where rounding would add too much noise: to values that are
    tiny, or vary little around a large offset.
    """
    if values.dtype.newbyteorder("=") == np.float16:
        return values.astype("<f2", order="C"), None
    exact = values.astype(np.float64, order="C")
    with np.errstate(over="ignore"):
        halves = exact.astype("<f2")
    _check_range(exact, halves, where)
    with np.errstate(invalid="ignore"):  # check_finite refuses what is not finite
        difference = np.abs(exact - halves)
        shares = [_share_of_noise(*panels) for panels in zip(exact, difference, strict=True)]
    worst = int(np.argmax(shares))
    if shares[worst] > MOST_OF_NOISE:
        gone = np.count_nonzero((halves[worst] == 0) & (exact[worst] != 0))
        raise InputError(
            f"{where}: float16 would lose panel {worst}: rounding adds {shares[worst]:.0%} of its noise, and {gone:,} "
            f"of {halves[worst].size:,} values become 0; subtract the mean and divide by the noise's standard deviation"
        )
    return halves, Rounding(float(difference.max()), shares[worst])


def _check_range(exact: npt.NDArray[np.float64], halves: npt.NDArray[np.float16], where: str) -> None:
    beyond = np.isfinite(exact) & np.isinf(halves)
    if beyond.any():
        panel, time_bin, channel = np.argwhere(beyond)[0].tolist()
        raise InputError(
            f"{where}: {exact[panel, time_bin, channel]:.6g} at panel {panel}, time bin {time_bin}, channel {channel}; "
            f"float16 ends at {LARGEST:.0f}: divide the snippet by its noise's standard deviation first"
        )


def _share_of_noise(exact: npt.NDArray[np.float64], difference: npt.NDArray[np.float64]) -> float:
    """Root mean square of the differences in a panel (T, F) divided by its noise, or without noise by its maximum."""
    lost = float(np.sqrt(np.mean(np.square(difference))))
    # From differences between time bins, so that neither a channel's level nor the band's shape counts as noise.
    noise = float(np.diff(exact, axis=0).std() / np.sqrt(2)) if len(exact) > 1 else 0.0
    scale = noise or float(np.abs(exact).max())
    return lost / scale if lost > 0 else 0.0  # NaN compares as not above 0
