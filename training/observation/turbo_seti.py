"""Write what was found in turboSETI's formats: a .dat file for each file of a cadence, and a table of events.

They are those of turboSETI 2.3.2 (find_doppler/file_writers.py, find_event/find_event.py), so that its `find_event` and
`plot_event` read them. Channels are counted as there: in the order of the file, from 0. The first line of a .dat file,
which turboSETI skips, names Needlestream.
"""

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shard_tools.atomic_files import write_whole
from shard_tools.cadence import OFF_POSITIONS, ON_POSITIONS, PANEL_NAMES, PANELS
from shard_tools.errors import InputError
from shard_tools.observation.candidates_table import Candidate
from shard_tools.observation.header import SECONDS_A_DAY
from training.observation.events import Event
from training.observation.observed import CadenceFiles, Observed
from training.observation.search_observation import Findings

EVENTS = "events.csv"
# Lower than --min-snr: a line that is already known is measured in one more panel, not searched for.
_LEAST_SNR = 3.0
_OURS = "# -------------------------- o -------------------------- Needlestream\n"
"""First line of a .dat file; turboSETI's own lacks the name at the end."""
_RULE, _LINE = "# -------------------------- o --------------------------\n", "# --------------------------\n"
_HIT_COLUMNS = (
    "Top_Hit_#",
    "Drift_Rate",
    "SNR",
    "Uncorrected_Frequency",
    "Corrected_Frequency",
    "Index",
    "freq_start",
    "freq_end",
    "SEFD",
    "SEFD_freq",
    "Coarse_Channel_Number",
    "Full_number_of_hits",
)
EVENT_COLUMNS = (
    "TopHitNum",
    "DriftRate",
    "SNR",
    "Freq",
    "ChanIndx",
    "FreqStart",
    "FreqEnd",
    "CoarseChanNum",
    "FullNumHitsInRange",
    "FileID",
    "Source",
    "MJD",
    "RA",
    "DEC",
    "DELTAT",
    "DELTAF",
    "max_drift_rate",
    "obs_length",
    "Hit_ID",
    "status",
    "in_n_ons",
    "RFI_in_range",
    "delta_t",
    "rank",
    "score",
    "false_alarm_rate",
)
"""Those of turboSETI's table, and three more."""
_TABLE_HEAD = ",".join(["", *EVENT_COLUMNS]) + "\n"


@dataclass(frozen=True)
class _Hit:
    """One event in one panel."""

    event: Event
    panel: int
    number: int
    """Its number in its file, from 1."""

    @property
    def mhz(self) -> float:
        """Frequency at the start of the panel."""
        return self.event.panel_mhz(self.panel)

    @property
    def snr(self) -> float:
        """SNR in the panel."""
        return float(self.event.line.fit.panel_snr[self.panel])


def write_turbo_seti(
    folder: Path, findings: Findings, ranked: Sequence[tuple[Candidate, Event]], observed: Observed
) -> list[Path]:
    """Write the .dat files of all cadences and the table of the ranked events; return their paths.

    Several cadences get a folder each, cadence-0000 and so on. A .dat file has a hit for each line that its panel
    shows. Lines in the ON panels alone are only in their files, lines in the OFF panels alone only in theirs, and
    interference in all.
    """
    written: list[Path] = []
    for number, (files, paths) in enumerate(_plan_paths(folder, observed)):
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        hits = [_hits_of(findings, number, panel) for panel in range(PANELS)]
        for panel, found in enumerate(hits):
            write_whole(paths[panel], _to_dat(files, panel, found))
        write_whole(
            paths[PANELS], _to_table(files, [each for each in ranked if each[1].origin.cadence == number], hits)
        )
        written += paths
    return written


def check_replaced(folder: Path, observed: Observed) -> None:
    """Raise InputError if `write_turbo_seti` would replace a file that it did not write."""
    for _, paths in _plan_paths(folder, observed):
        for path in paths:
            if path.exists() and not _is_ours(path):
                raise InputError(
                    f"--turbo-seti {folder}: {path} would be replaced, but its first line is not one of infer.py's; "
                    "choose another folder, or remove the file if an earlier version of infer.py wrote it"
                )


def _plan_paths(folder: Path, observed: Observed) -> Iterator[tuple[CadenceFiles, list[Path]]]:
    """Each cadence, with the paths of its six .dat files and of its table of events."""
    for number, files in enumerate(observed.cadences):
        place = folder if len(observed.cadences) == 1 else folder / f"cadence-{number:04d}"
        yield files, [*(place / _dat_name(files, panel) for panel in range(PANELS)), place / EVENTS]


def _is_ours(path: Path) -> bool:
    """Whether a file begins as those written here; a table of events begins with more columns than turboSETI's."""
    expected = (_TABLE_HEAD if path.name == EVENTS else _OURS).encode()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(expected)) == expected


def _dat_name(files: CadenceFiles, panel: int) -> str:
    """The name that turboSETI gives the file; its panel goes in front if two files of a cadence share that name."""
    names = [Path(name).with_suffix(".dat").name for name in files.names]
    return names[panel] if names.count(names[panel]) == 1 else f"{PANEL_NAMES[panel]}_{names[panel]}"


def _hits_of(findings: Findings, cadence: int, panel: int) -> list[_Hit]:
    """The hits of a file, from lower to higher frequencies."""
    alone = findings.events if panel in ON_POSITIONS else findings.controls
    shown = [
        event
        for event in [*alone, *findings.interference]
        if event.origin.cadence == cadence and event.line.fit.panel_snr[panel] >= _LEAST_SNR  # False for NaN
    ]
    shown.sort(key=lambda event: event.panel_mhz(panel))
    return [_Hit(event, panel, number) for number, event in enumerate(shown, start=1)]


def _to_dat(files: CadenceFiles, panel: int, hits: Sequence[_Hit]) -> str:
    """The text of a .dat file."""
    ra, dec = _position(files, panel)
    head = (
        f"{_OURS}# File ID: {files.names[panel]} \n{_RULE}# Source:{files.sources[panel]}\n"
        f"# MJD: {_start_mjd(files, panel):18.12f}\tRA: {ra}\tDEC: {dec}\n"
        f"# DELTAT: {files.axes.bin_length_s:10.6f}\tDELTAF(Hz): {files.foff_mhz * 1e6:10.6f}\t"
        f"max_drift_rate: {files.axes.max_drift_hz_s:10.6f}\tobs_length: {_length_s(files):10.6f}\n{_LINE}"
        f"# {''.join(f'{name} ' + chr(9) for name in _HIT_COLUMNS)}\n{_LINE}"
    )
    return head + "".join(_to_hit_line(files, hit, len(hits)) for hit in hits)


def _to_hit_line(files: CadenceFiles, hit: _Hit, total: int) -> str:
    coarse, index = _file_channel(files, hit.mhz)
    start, end = _range_mhz(files, hit.mhz)
    return (
        f"{hit.number:06d}\t{hit.event.drift_rate_hz_s:10.6f}\t{hit.snr:10.6f}\t{hit.mhz:14.6f}\t{hit.mhz:14.6f}\t"
        f"{index:d}\t{start:14.6f}\t{end:14.6f}\t0.0\t{0:14.6f}\t{coarse:d}\t{total:d}\t\n"
    )


def _to_table(files: CadenceFiles, ranked: Iterable[tuple[Candidate, Event]], hits: Sequence[Sequence[_Hit]]) -> str:
    """The text of the table of events: a row for each ON panel that shows an event."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    text.write(_TABLE_HEAD)
    by_event: dict[int, list[_Hit]] = defaultdict(list)
    for hit in (hit for panel in ON_POSITIONS for hit in hits[panel]):
        by_event[id(hit.event)].append(hit)
    rows = 0
    for candidate, event in ranked:
        shown = by_event[id(event)]
        for hit in shown:
            writer.writerow([rows, *_event_row(files, candidate, hit, len(hits[hit.panel]), len(shown))])
            rows += 1
    return text.getvalue()


def _event_row(files: CadenceFiles, candidate: Candidate, hit: _Hit, total: int, shown: int) -> tuple[object, ...]:
    """The cells of a row, in the order of EVENT_COLUMNS."""
    coarse, index = _file_channel(files, hit.mhz)
    start, end = _range_mhz(files, hit.mhz)
    source, mjd = files.sources[hit.panel].upper(), f"{_start_mjd(files, hit.panel):.12f}"
    return (
        *(hit.number, f"{hit.event.drift_rate_hz_s:.6f}", f"{hit.snr:.6f}", f"{hit.mhz:.6f}", index),
        *(f"{start:.6f}", f"{end:.6f}", coarse, total, files.names[hit.panel], source, mjd),
        *(*_position(files, hit.panel), f"{files.axes.bin_length_s:.6f}", f"{files.foff_mhz * 1e6:.6f}"),
        *(f"{files.axes.max_drift_hz_s:.6f}", f"{_length_s(files):.6f}", f"{source}_{candidate.rank}"),
        *(f"on_table_{ON_POSITIONS.index(hit.panel) + 1}", shown - 1, 0, f"{files.axes.panel_starts_s[hit.panel]:.6f}"),
        *(candidate.rank, candidate.score, f"{candidate.false_alarm_rate:.4f}"),
    )


def _file_channel(files: CadenceFiles, mhz: float) -> tuple[int, int]:
    """Coarse channel and the channel in it, in the order of the file; coarse channel 0 if these are unknown."""
    channel = round((mhz - files.fch1_mhz) / files.foff_mhz)
    return divmod(channel, files.nfpc) if files.nfpc else (0, channel)


def _range_mhz(files: CadenceFiles, mhz: float) -> tuple[float, float]:
    """The range that the steepest drift may reach within a panel, in the order of the file."""
    reach = math.copysign(files.axes.max_drift_hz_s * _length_s(files) / 1e6, files.foff_mhz)
    return mhz - reach, mhz + reach


def _length_s(files: CadenceFiles) -> float:
    return files.axes.time_bins * files.axes.bin_length_s


def _start_mjd(files: CadenceFiles, panel: int) -> float:
    return files.start_mjd + files.axes.panel_starts_s[panel] / SECONDS_A_DAY


def _position(files: CadenceFiles, panel: int) -> tuple[str, str]:
    """Right ascension and declination as turboSETI writes them; unknown for OFF panels, which the tables lack."""
    if panel in OFF_POSITIONS or files.ra_hours is None or files.dec_degrees is None:
        return "unknown", "unknown"
    return _sexagesimal(files.ra_hours, "h", 3), _sexagesimal(files.dec_degrees, "d", 1)


def _sexagesimal(value: float, unit: str, decimals: int) -> str:
    """12.5 as 12d30m00.0s."""
    whole = round(abs(value) * 3600 * 10**decimals)
    minutes, seconds = divmod(whole, 60 * 10**decimals)
    units, minutes = divmod(minutes, 60)
    sign = "-" if value < 0 else ""
    return f"{sign}{units:02d}{unit}{minutes:02d}m{seconds / 10**decimals:0{decimals + 3}.{decimals}f}s"
