"""The table of candidates: candidates.csv, one row per event, best first."""

import contextlib
import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from shard_tools.atomic_files import write_whole
from shard_tools.csv_table import read_table
from shard_tools.errors import InputError

INTERFERENCE, HITS, PICTURES = "interference.csv", "hits.csv", "candidates"
"""Two tables and the folder of pictures, beside candidates.csv; `beside` gives their places for any table."""
_STEM = "candidates"


@dataclass(frozen=True)
class Candidate:
    """One row; the fields are the columns, in their order. None and NaN are empty cells."""

    rank: int
    """From 1."""
    score: float
    """By trained weights: sigmoid of a logit, 0 to 1. By the search alone: in standard deviations."""
    false_alarm_rate: float
    """Estimated share of false ones among the candidates with at least this score. Never 0: n candidates have 1 / n
    where there is no control (a line in the OFF panels alone)."""
    frequency_mhz: float
    """At the telescope, at the start of the first panel."""
    drift_rate_hz_s: float
    snr: float
    """Of the three ON panels together, in standard deviations; the next six fields are those of each panel."""
    snr_a1: float
    snr_b: float
    snr_a2: float
    snr_c: float
    snr_a3: float
    snr_d: float
    bandwidth_hz: float
    coarse_channel: int | None
    """Counted from the band's lowest, as `channel`; None where coarse channels are not known."""
    channel: int
    """The file's channel at the start of the first panel."""
    source: str
    ra: float
    """Hours."""
    dec: float
    """Degrees."""
    tstart_mjd: float
    flags: str
    """Words, separated by spaces."""
    snippet: str
    """Key of the snippet."""
    picture: str
    """File, relative to the table's folder; empty where there is none."""

    @property
    def panel_snrs(self) -> tuple[float, ...]:
        """(6,) the SNR of each panel, in their order."""
        return self.snr_a1, self.snr_b, self.snr_a2, self.snr_c, self.snr_a3, self.snr_d


COLUMNS = tuple(field.name for field in fields(Candidate))
_DECIMALS = {
    "false_alarm_rate": 4,
    "frequency_mhz": 6,
    "drift_rate_hz_s": 4,
    "bandwidth_hz": 1,
    "ra": 6,
    "dec": 6,
    "tstart_mjd": 8,
} | dict.fromkeys([name for name in COLUMNS if name.startswith("snr")], 2)
_TYPES = {field.name: field.type for field in fields(Candidate)}


def beside(table: Path, name: str) -> Path:
    """The place of INTERFERENCE, HITS or PICTURES for a table.

    Beside X.csv, a table not called candidates.csv, it is X.interference.csv: several tables may share a folder.
    """
    return table.with_name(name if table.stem == _STEM else f"{table.stem}.{name}")


def write_candidates(path: Path, candidates: Sequence[Candidate]) -> None:
    """Write the table, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for candidate in candidates:
        writer.writerow([_to_cell(name, getattr(candidate, name)) for name in COLUMNS])
    write_whole(path, text.getvalue())


def _to_cell(name: str, value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if name in _DECIMALS:
        return f"{value:.{_DECIMALS[name]}f}"
    return str(value)


def remove_pictures(path: Path) -> None:
    """Remove the pictures of an earlier table at `path`."""
    for picture in _pictures_of(path):
        if picture.is_file():
            picture.unlink()


def foreign_pictures(path: Path, most: int) -> list[Path]:
    """Files that the first `most` pictures of a table at `path` would replace and that no earlier table there names."""
    folder = beside(path, PICTURES)
    there = {each for each in folder.iterdir() if _is_picture(each, most)} if folder.is_dir() else set()
    return sorted(there - _pictures_of(path)) if there else []


def _is_picture(path: Path, most: int) -> bool:
    """Whether the name is that of one of the first `most` pictures: 1.png, 2.png and so on."""
    rank = int(path.stem) if path.stem.isdecimal() else 0
    return 1 <= rank <= most and path.name == f"{rank}.png"


def _pictures_of(path: Path) -> set[Path]:
    """What an earlier table at `path` names in its own folder of pictures; of a damaged table, as far as it is read."""
    named: set[Path] = set()
    if path.is_file():
        with path.open("rb") as file, contextlib.suppress(InputError):
            for _, cells in read_table(file, str(path), ["picture"]):
                named.add(path.parent / cells["picture"])
    return {picture for picture in named if picture.parent == beside(path, PICTURES)}


def read_candidates(path: Path) -> list[Candidate]:
    """Read what `write_candidates` wrote. Raises InputError naming the line that does not belong in such a table."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; `infer.py --candidates {path.name}` writes it")
    candidates = []
    with path.open("rb") as file:
        for where, cells in read_table(file, str(path), COLUMNS):
            try:
                candidates.append(Candidate(**{name: _of_cell(name, cell) for name, cell in cells.items()}))  # type: ignore[arg-type]
            except ValueError as error:
                raise InputError(f"{where}: {error}, expected a row of infer.py --candidates") from None
    return candidates


def _of_cell(name: str, cell: str) -> object:
    if _TYPES[name] is str:
        return cell
    if _TYPES[name] is float:
        return float(cell) if cell else math.nan
    return None if _TYPES[name] is not int and not cell else int(cell)
