"""The table of candidates of an observation (candidates.csv), read back for the page and for counting recall."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shard_tools.csv_table import read_table
from shard_tools.errors import InputError

PANEL_SNRS = ("snr_a1", "snr_b", "snr_a2", "snr_c", "snr_a3", "snr_d")
COLUMNS = (
    "rank", "score", "false_alarm_rate", "frequency_mhz", "drift_rate_hz_s", "snr", *PANEL_SNRS, "bandwidth_hz",
    "coarse_channel", "channel", "source", "ra", "dec", "tstart_mjd", "flags", "snippet", "picture",
)  # fmt: skip


@dataclass(frozen=True)
class CandidateRow:
    """One event of the table. A number that the table leaves empty is NaN."""

    rank: int
    score: float
    false_alarm_rate: float
    frequency_mhz: float
    """Topocentric, at the start of the first panel."""
    drift_rate_hz_s: float
    snr: float
    bandwidth_hz: float
    coarse_channel: int
    """-1 where it is not known."""
    source: str
    tstart_mjd: float
    flags: str
    """Words between spaces."""
    snippet: str
    """The key of the snippet in which it was found."""
    picture: str
    """The picture's path from the table's folder; empty where none is drawn."""
    panel_snr: tuple[float, ...] = ()
    """(6,) in the order of observation."""


def read_candidates(path: Path) -> list[CandidateRow]:
    """Read a table of candidates, in its order. Raises InputError naming the file, and the line of a bad cell."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; `infer.py --candidates {path.name}` writes it")
    with path.open("rb") as file:
        return [_to_row(where, cells) for where, cells in read_table(file, str(path), COLUMNS)]


def _to_row(where: str, cells: Mapping[str, str]) -> CandidateRow:
    values: dict[str, int | float | str] = {}
    for field in dataclasses.fields(CandidateRow)[:-1]:
        if field.type is str:
            values[field.name] = cells[field.name]
            continue
        number = to_number(where, field.name, cells[field.name])
        if field.type is int:
            if number != number // 1:
                raise InputError(f"{where}: {field.name} {cells[field.name]!r}, expected a whole number")
            number = int(number)
        values[field.name] = number
    snrs = tuple(to_number(where, name, cells[name]) for name in PANEL_SNRS)
    return CandidateRow(**values, panel_snr=snrs)  # type: ignore[arg-type]


def to_number(where: str, name: str, text: str) -> float:
    """A cell's number; NaN where it is empty. Raises InputError naming the place and the column."""
    if not text:
        return math.nan
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{where}: {name} {text!r}, expected a number") from None
