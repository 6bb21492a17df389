"""Scores for turboSETI's hits: each gets the score of the best line near it, in the snippets that hold it."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shard_tools.atomic_files import write_whole
from shard_tools.cadence import PANELS
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from shard_tools.observation.candidates_table import Candidate
from shard_tools.observation.header import SECONDS_A_DAY
from training.metrics import sigmoid
from training.observation.events import Event
from training.observation.observed import Observed

Int64s = npt.NDArray[np.int64]

EVENT, INTERFERENCE, FAINT, NOTHING, OUTSIDE = "candidate", "interference", "faint", "nothing", "outside"
"""What lies near a hit, in this order: a row of candidates.csv; a line in ON and OFF panels; a line too faint for the
table; no line. OUTSIDE: no snippet holds the hit."""
ADDED = ("found", "score", "false_alarm_rate", "rank", "line_mhz", "line_drift_rate_hz_s", "line_snr", "snippet")
LEAST_SNR = 3.0
"""Least SNR of lines in the snippets that hold hits."""
_NEAR = 8.0  # channels
_COLUMNS = ("Freq", "MJD")  # of a table of events or hits
_DAT_COLUMNS = ("TopHitNum", "DriftRate", "SNR", "Freq", "Corrected_Frequency", "ChanIndx", "FreqStart", "FreqEnd")


@dataclass(frozen=True)
class Hits:
    """A table of turboSETI's."""

    columns: list[str]
    rows: list[list[str]]
    mhz: list[float]
    """Frequency of each hit at the start of the file in which it was found."""
    mjd: list[float]
    """Start of that file, for each hit."""


def read_hits(path: Path) -> Hits:
    """Read a table of events (.csv, with columns Freq and MJD) or of hits (.dat). Raises InputError naming the line."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--hits {path}: cannot be read ({error}); expected a .dat or .csv of turboSETI") from None
    return _read_dat(path, lines) if lines and lines[0].startswith("#") else _read_csv(path, lines)


def _read_csv(path: Path, lines: Sequence[str]) -> Hits:
    try:
        numbered = [(number, row) for number, row in enumerate(csv.reader(lines), start=1) if row]
    except csv.Error as error:
        raise InputError(f"--hits {path}: not a CSV table ({error}); expected turboSETI's table of events") from None
    columns = numbered[0][1] if numbered else []
    if missing := [name for name in _COLUMNS if name not in columns]:
        raise InputError(f"--hits {path}: lacks the columns {missing}; expected turboSETI's table of events, or a .dat")
    _check_widths(path, numbered[1:], len(columns))
    mhz, mjd = (
        [_to_number(path, number, row, columns.index(name)) for number, row in numbered[1:]] for name in _COLUMNS
    )
    return Hits(columns, [row for _, row in numbered[1:]], mhz, mjd)


def _read_dat(path: Path, lines: Sequence[str]) -> Hits:
    heads = [line for line in lines if line.startswith("# MJD:")]
    if not heads:
        raise InputError(f"--hits {path}: lacks a line '# MJD:', expected a .dat of turboSETI")
    start = _to_number(path, lines.index(heads[0]) + 1, heads[0].split()[2:3], 0)
    numbered = [(number, line.split()) for number, line in enumerate(lines, start=1) if line and line[0] != "#"]
    numbered = [(number, cells[: len(_DAT_COLUMNS)]) for number, cells in numbered if cells]
    rows = [cells for _, cells in numbered]
    _check_widths(path, numbered, len(_DAT_COLUMNS))
    mhz = [_to_number(path, number, cells, _DAT_COLUMNS.index("Freq")) for number, cells in numbered]
    return Hits([*_DAT_COLUMNS, "MJD"], [[*row, str(start)] for row in rows], mhz, [start] * len(rows))


def _check_widths(path: Path, numbered: Sequence[tuple[int, list[str]]], columns: int) -> None:
    """Raise InputError naming the first row that has not as many cells as the table has columns."""
    for number, row in numbered:
        if len(row) != columns:
            raise InputError(f"--hits {path}, line {number}: {len(row)} cells, expected {columns}; is it cut short?")


def _to_number(path: Path, line: int, cells: Sequence[str], place: int) -> float:
    cell = cells[place] if place < len(cells) else ""
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"--hits {path}, line {line}: {cell!r}, expected a number; is it a table of turboSETI?")
    return number


@dataclass(frozen=True)
class PlacedHits:
    """Which snippets hold each hit, and in which panel it was found."""

    table: Hits
    panels: list[tuple[int, int] | None]
    """Cadence and panel; None if no snippet holds the hit."""
    rows: list[Int64s]
    """The snippets' rows in the data set; first the one in which the hit is farthest from the edges."""


def place_hits(hits: Hits, observed: Observed) -> PlacedHits:
    """Find the snippets that hold each hit."""
    first = np.array([origin.first_mhz for origin in observed.origins])
    width = np.array([origin.axes.channel_width_hz / 1e6 for origin in observed.origins])
    channels = np.array([origin.axes.channels for origin in observed.origins])
    cadence = np.array([origin.cadence for origin in observed.origins])
    panels: list[tuple[int, int] | None] = []
    rows = []
    for mhz, mjd in zip(hits.mhz, hits.mjd, strict=True):
        begun = _find_panels(mjd, observed)
        channel = (mhz - first) / width
        margin = np.minimum(channel, channels - 1 - channel)
        margin[~np.isin(cadence, list(begun))] = -np.inf
        falling = np.argsort(-margin, kind="stable")
        holding = falling[margin[falling] >= -0.5]
        # Cadences of several bands may have begun then: the hit belongs to the one whose snippets hold it.
        number = int(cadence[holding[0]]) if len(holding) else None
        panels.append(None if number is None else (number, begun[number]))
        rows.append(holding[cadence[holding] == number])
    return PlacedHits(hits, panels, rows)


def _find_panels(mjd: float, observed: Observed) -> dict[int, int]:
    """For each cadence with a panel that began within half a panel's length of that time: the panel."""
    found = {}
    for number, files in enumerate(observed.cadences):
        since_s = np.abs((mjd - files.start_mjd) * SECONDS_A_DAY - np.array(files.axes.panel_starts_s))
        if since_s.min() <= files.axes.time_bins * files.axes.bin_length_s / 2:
            found[number] = int(since_s.argmin())
    return found


@dataclass(frozen=True)
class Known:
    """The lines that a hit may be near."""

    ranked: Sequence[tuple[Candidate, Event]]
    interference: Sequence[Event]
    faint: Sequence[Event]
    """Lines with a score that are too faint for the table."""
    trained: bool
    """Whether scores are logits."""


class _Frequencies:
    """The frequencies of lines in all panels, computed once for all hits."""

    def __init__(self, events: Sequence[Event]) -> None:
        mhz = [[event.panel_mhz(panel) for panel in range(PANELS)] for event in events]
        self._mhz = np.array(mhz).reshape(-1, PANELS)
        self._cadence = np.array([event.origin.cadence for event in events], np.int64)
        self._within_hz = _NEAR * np.array([event.origin.axes.channel_width_hz for event in events])

    def near(self, mhz: float, panel: tuple[int, int]) -> list[int]:
        """The numbers of the lines that are near a frequency in a panel (cadence and panel)."""
        is_near = np.abs(self._mhz[:, panel[1]] - mhz) * 1e6 <= self._within_hz
        found: list[int] = np.flatnonzero(is_near & (self._cadence == panel[0])).tolist()
        return found


def write_scored_hits(path: Path, placed: PlacedHits, known: Known, manifest: Manifest) -> None:
    """Write the table with what lies near each hit; cells are empty if nothing is known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*placed.table.columns, *ADDED])
    groups = [event for _, event in known.ranked], known.interference, known.faint
    frequencies = [_Frequencies(events) for events in groups]
    for number, row in enumerate(placed.table.rows):
        rows, panel = placed.rows[number], placed.panels[number]
        if panel is None or not len(rows):
            added: tuple[object, ...] = (OUTSIDE, *[""] * (len(ADDED) - 1))
        else:
            near = (each.near(placed.table.mhz[number], panel) for each in frequencies)
            added = (*_cells_near(known, *near), manifest.key(int(rows[0])))
        writer.writerow([*row, *added])
    write_whole(path, text.getvalue())


def _cells_near(
    known: Known, ranked: Sequence[int], interference: Sequence[int], faint: Sequence[int]
) -> tuple[object, ...]:
    """The cells of ADDED except the snippet, from the numbers of the lines near a hit."""
    if ranked:
        candidate, event = min((known.ranked[n] for n in ranked), key=lambda each: each[0].rank)
        return EVENT, candidate.score, f"{candidate.false_alarm_rate:.4f}", candidate.rank, *_line_cells(event)
    if interference:
        both = [known.interference[n] for n in interference]
        return INTERFERENCE, "", "", "", *_line_cells(max(both, key=lambda event: event.line.snr))
    if faint:
        best = max((known.faint[n] for n in faint), key=lambda event: event.line.score)
        score = float(sigmoid(np.array(best.line.score))) if known.trained else best.line.score
        return FAINT, score, "", "", *_line_cells(best)
    return NOTHING, *[""] * (len(ADDED) - 2)


def _line_cells(event: Event) -> tuple[str, ...]:
    return f"{event.start_mhz:.6f}", f"{event.drift_rate_hz_s:.4f}", f"{event.line.snr:.2f}"
