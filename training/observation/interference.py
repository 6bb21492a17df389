"""Signs of interference: lines in ON and OFF panels, combs, crowded bands, and lines that several targets share."""

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shard_tools.atomic_files import write_whole
from shard_tools.cadence import OFF_POSITIONS, ON_POSITIONS
from training.observation.events import Event

Float64s = npt.NDArray[np.float64]

CROWDED, COMB, CROSSED, REPEATED = "crowded", "comb", "crossed", "repeated"
"""Flags of a line: many lines of interference are near it; it is one of a row of lines at equal distances with equal
drift; a brighter line crosses it in an ON panel and may be the source of some of its power; another target has a line
at its frequency."""
COLUMNS = ("frequency_mhz", "drift_rate_hz_s", "snr_on", "snr_off", "bandwidth_hz", "snippets", "source", "tstart_mjd")
_BESIDE_HZ, _CROWD = 12e3, 8  # to both sides of a line; the number of lines of interference there that make a crowd
_COMB_LINES = 5  # Voyager's carrier has two side bands: three lines at equal distances may well be a transmitter's
_SAME_DISTANCE, _SAME_RATE = 3.0, 2.0  # channels; channels in the cadence
_TOUCHING = 3.0  # channels, plus half of both widths
_REPEATED = 4.0  # channels to both sides, at the start of each cadence


def is_crowded(events: Sequence[Event], interference: Sequence[Event]) -> npt.NDArray[np.bool_]:
    """Whether each event lies among many lines of interference of its cadence; (events,)."""
    others: dict[int, list[float]] = defaultdict(list)
    for each in interference:
        others[each.origin.cadence].append(each.start_mhz * 1e6)
    rising = {cadence: np.sort(hertz) for cadence, hertz in others.items()}
    found = np.zeros(len(events), bool)
    for number, event in enumerate(events):
        here = event.start_mhz * 1e6
        low, high = np.searchsorted(rising.get(event.origin.cadence, []), (here - _BESIDE_HZ, here + _BESIDE_HZ))
        found[number] = high - low >= _CROWD
    return found


def in_comb(events: Sequence[Event]) -> npt.NDArray[np.bool_]:
    """Whether each event is one of several neighbours in frequency at equal distances, with equal drift; (events,).

    Another line between two teeth splits a comb, which may then be too short to be recognised.
    """
    found = np.zeros(len(events), bool)
    cadence = np.array(_cadences(events))
    start = np.array([event.start_mhz for event in events])
    for number in np.unique(cadence):
        of_cadence = np.flatnonzero(cadence == number)
        rising = of_cadence[np.argsort(start[of_cadence], kind="stable")]
        axes = events[rising[0]].origin.axes
        distance = np.diff(start[rising]) * 1e6 / axes.channel_width_hz
        drift = np.array([events[each].line.fit.rate for each in rising]) * np.ptp(axes.rows)
        even = (np.abs(np.diff(distance)) <= _SAME_DISTANCE) & (np.ptp(_triples(drift), axis=1) <= _SAME_RATE)
        for first, last in _runs(even):
            if last - first + 2 >= _COMB_LINES:
                found[rising[first : last + 2]] = True
    return found


def is_crossed(events: Sequence[Event], others: Sequence[Event]) -> npt.NDArray[np.bool_]:
    """Whether a brighter line of `others` crosses or touches each event in an ON panel; (events,)."""
    found = np.zeros(len(events), bool)
    for number in sorted(set(_cadences(events))):
        of_cadence = [other for other in others if other.origin.cadence == number]
        ends = np.array([_on_ends(other) for other in of_cadence]).reshape(-1, len(ON_POSITIONS), 2)
        snr = np.array([other.line.snr for other in of_cadence])
        half = np.array([other.line.fit.width / 2 for other in of_cadence])
        for place, event in enumerate(events):
            if event.origin.cadence == number:
                apart = ends - _on_ends(event)
                touch = np.abs(apart).min(axis=2) <= (_TOUCHING + half + event.line.fit.width / 2)[:, None]
                cross = (apart[..., 0] * apart[..., 1] < 0) | touch
                found[place] = bool((cross.any(axis=1) & (snr > event.line.snr)).any())
    return found


def is_repeated(events: Sequence[Event], others: Sequence[Event], sources: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Whether a cadence of another target starts with a line at the frequency at which each event starts; (events,).

    A transmitter on Earth, which shows in the ON panels alone by chance, keeps its frequency from target to target.
    `others` are lines of any kind, `sources` the target of each cadence.
    """
    hertz = np.array([other.start_mhz * 1e6 for other in others])
    rising = np.argsort(hertz)
    source = np.array([sources[cadence] for cadence in _cadences(others)])[rising]
    here = np.array([event.start_mhz * 1e6 for event in events])
    own = np.array([sources[cadence] for cadence in _cadences(events)])
    reach = _REPEATED * np.array([event.origin.axes.channel_width_hz for event in events])
    found = np.zeros(len(events), bool)
    for name in np.unique(own):
        elsewhere, mine = hertz[rising][source != name], own == name
        low, high = (np.searchsorted(elsewhere, (here + sign * reach)[mine]) for sign in (-1, 1))
        found[mine] = high > low
    return found


def _on_ends(event: Event) -> Float64s:
    """(3, 2) channels at the start and the end of each ON panel, counted from 0 MHz."""
    axes = event.origin.axes
    ends = axes.rows[list(ON_POSITIONS)][:, [0, -1]] + np.array([-0.5, 0.5])
    return np.asarray(event.origin.first_mhz * 1e6 / axes.channel_width_hz + event.line.fit.channels(ends))


def _cadences(events: Sequence[Event]) -> list[int]:
    return [event.origin.cadence for event in events]


def _triples(values: Float64s) -> Float64s:
    """Every three neighbours (n - 2, 3); none if there are fewer than three values."""
    if len(values) < 3:
        return np.empty((0, 3))
    return np.lib.stride_tricks.sliding_window_view(values, 3)


def _runs(marks: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and end of each run of marks."""
    steps = np.diff(np.concatenate([[0], marks.astype(np.int8), [0]]))
    return list(zip(np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist(), strict=True))


def write_interference(path: Path, interference: Sequence[Event], sources: Sequence[tuple[str, float]]) -> None:
    """Write lines that are in ON and OFF panels as CSV, from lower to higher frequencies, at once or not at all.

    `sources` has the name and the start (MJD) of each cadence.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for event in sorted(interference, key=lambda each: each.start_mhz):
        fit = event.line.fit
        source, start_mjd = sources[event.origin.cadence]
        snrs = (f"{fit.best_snr(positions):.2f}" for positions in (ON_POSITIONS, OFF_POSITIONS))
        numbers = f"{event.start_mhz:.6f}", f"{event.drift_rate_hz_s:.4f}", *snrs, f"{event.bandwidth_hz:.1f}"
        writer.writerow([*numbers, event.snippets, source, f"{start_mjd:.8f}"])
    write_whole(path, text.getvalue())
