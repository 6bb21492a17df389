"""Simulated lines, how they are added to spectra, and the table that lists them.

Axes: T spectrum, F channel.
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from shard_tools.atomic_files import write_whole
from shard_tools.cadence import ON_POSITIONS
from shard_tools.csv_table import read_table
from shard_tools.errors import InputError

TRUTH_TABLE = "truth.csv"
TRUTH = ("kind", "frequency_mhz", "drift_rate_hz_s", "snr", "panels", "tstart_mjd", "place")
Seconds = TypeVar("Seconds", float, npt.NDArray[np.float64])
_STEPS = 32  # times in each spectrum at which a line's place is computed


class Line(NamedTuple):
    """A narrowband signal of constant drift."""

    kind: str
    frequency_mhz: float
    """At the start of the first panel."""
    drift_rate_hz_s: float
    snr: float
    """In one panel, if it stays in one channel: its sum over the spectra, in standard deviations of the noise's sum."""
    panels: tuple[int, ...]

    def mhz_at(self, seconds: Seconds) -> Seconds:
        """Its frequency `seconds` after the start of the first panel."""
        return self.frequency_mhz + self.drift_rate_hz_s * seconds / 1e6


def check_snr_range(snr_min: float, snr_max: float) -> None:
    """Raise InputError naming --snr-min and --snr-max unless SNRs can be drawn between them."""
    if not 0 < snr_min <= snr_max <= 1e6:
        raise InputError(f"--snr-min {snr_min} --snr-max {snr_max}: expected 0 < min <= max <= 1e6")


class Grid(NamedTuple):
    """Where the values of one panel lie in frequency and time."""

    first_mhz: float
    """Centre of the first channel."""
    step_mhz: float
    """From one channel to the next; negative where frequencies fall."""
    start_s: float
    """Start of the first spectrum, in seconds since the start of the first panel."""
    bin_length_s: float


def add_line(values: npt.NDArray[np.float32], grid: Grid, line: Line, power: float | npt.NDArray[np.float32]) -> None:
    """Add a line to (T, F), in place: in each spectrum its `power` is divided among the channels that it crosses.

    `power` may be (F,), one for each channel. What lies outside the channels is left out.
    """
    channels = values.shape[1]
    by_channel = np.broadcast_to(np.asarray(power, np.float64), channels) / _STEPS
    within = (np.arange(_STEPS) + 0.5) / _STEPS
    for spectrum in range(len(values)):
        seconds = grid.start_s + (spectrum + within) * grid.bin_length_s
        channel = np.rint((line.mhz_at(seconds) - grid.first_mhz) / grid.step_mhz).astype(np.int64)
        channel = channel[(channel >= 0) & (channel < channels)]
        np.add.at(values[spectrum], channel, by_channel[channel])


@dataclass(frozen=True)
class TrueLine:
    """A simulated line, as truth.csv lists it."""

    signal: Line
    start_mjd: float
    """Of the first panel; NaN where the table does not say."""
    place: float
    """Where it starts in its coarse channel, from 0 at the lowest frequency to 1; NaN where that is not known."""

    @property
    def is_needle(self) -> bool:
        """Whether it is in the ON panels alone."""
        return self.signal.panels == ON_POSITIONS


def write_truth(path: Path, lines: Iterable[TrueLine]) -> None:
    """Write a table of lines, whole or not at all."""
    text = io.StringIO()
    rows: list[Sequence[object]] = [TRUTH]
    for line, start_mjd, place in ((each.signal, each.start_mjd, each.place) for each in lines):
        rows.append((*line[:-1], " ".join(map(str, line.panels)), start_mjd, "" if np.isnan(place) else place))
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_whole(path, text.getvalue())


def read_truth(path: Path) -> list[TrueLine]:
    """Read a table of lines. Raises InputError naming the file, and the line of a bad cell."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; `inject` and `simulate-observation` write it")
    with path.open("rb") as file:
        return [_to_true_line(where, cells) for where, cells in read_table(file, str(path), TRUTH)]


def _to_true_line(where: str, cells: dict[str, str]) -> TrueLine:
    numbers = {name: to_number(where, name, cells[name]) for name in TRUTH if name not in ("kind", "panels")}
    panels = cells["panels"].split()
    if not all(panel in "012345" for panel in panels):
        raise InputError(f"{where}: panels {cells['panels']!r}, expected numbers from 0 to 5")
    line = Line(
        cells["kind"],
        numbers["frequency_mhz"],
        numbers["drift_rate_hz_s"],
        numbers["snr"],
        tuple(int(panel) for panel in panels),
    )
    return TrueLine(line, numbers["tstart_mjd"], numbers["place"])


def to_number(where: str, name: str, text: str) -> float:
    """A cell's number; NaN where it is empty. Raises InputError naming the place and the column."""
    if not text:
        return math.nan
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{where}: {name} {text!r}, expected a number") from None
