"""Which added needles are among the candidates: recall by drift rate, SNR and place in the coarse channel."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tyro

from shard_tools.errors import InputError
from shard_tools.observation.candidates_table import Candidate, read_candidates
from shard_tools.observation.lines import TrueLine, read_truth

_SAME_START_DAYS = 1e-5  # about a second
_PARTS = 4
# Borders of the groups by place in the coarse channel. Its edges pass less power: a needle there is fainter than its
# SNR says.
_PLACES = (0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)


@dataclass(frozen=True)
class RecallConfig:
    """Count which needles of truth.csv are in a table of candidates, and how exact their measured values are."""

    candidates: tyro.conf.Positional[Path]
    """The table that `infer.py --candidates` wrote."""
    truth: tyro.conf.Positional[Path]
    """The needles, as `inject` and `simulate-observation` write them."""
    within_hz: float = 200.0
    """A candidate matches a needle if their frequencies at the start differ by at most this, in Hz, and their drift
    rates by at most --within-hz-s."""
    within_hz_s: float = 0.2
    """Largest difference of the drift rates, in Hz/s."""
    most_false_alarms: float = 1.0
    """Count only candidates of at most this false alarm rate; 1 counts all."""
    each: bool = False
    """Print a line for each needle, too."""

    def __post_init__(self) -> None:
        for flag, value in (("--within-hz", self.within_hz), ("--within-hz-s", self.within_hz_s)):
            if not value > 0:
                raise InputError(f"{flag} {value}: expected more than 0")
        if not 0 <= self.most_false_alarms <= 1:
            raise InputError(f"--most-false-alarms {self.most_false_alarms}: expected 0 to 1")


@dataclass(frozen=True)
class Found:
    """A needle, and the candidate that matches it."""

    needle: TrueLine
    candidate: Candidate | None
    """The best-ranked match; None where there is none."""

    @property
    def error_hz(self) -> float:
        """The candidate's frequency at the start minus the needle's."""
        if self.candidate is None:
            return math.nan
        return 1e6 * (self.candidate.frequency_mhz - self.needle.signal.frequency_mhz)

    @property
    def error_hz_s(self) -> float:
        """The candidate's drift rate minus the needle's."""
        if self.candidate is None:
            return math.nan
        return self.candidate.drift_rate_hz_s - self.needle.signal.drift_rate_hz_s


@dataclass(frozen=True)
class Group:
    """Needles that are alike in one respect."""

    name: str
    needles: int
    found: int


def find_needles(candidates: Sequence[Candidate], truth: Sequence[TrueLine], config: RecallConfig) -> list[Found]:
    """For each needle of `truth` (a line in the ON panels alone), the best-ranked candidate that matches it."""
    counted = [each for each in candidates if not each.false_alarm_rate > config.most_false_alarms]
    counted.sort(key=lambda each: each.rank)
    mhz, drift, start = (
        np.array([getattr(each, name) for each in counted], np.float64)
        for name in ("frequency_mhz", "drift_rate_hz_s", "tstart_mjd")
    )
    found = []
    for needle in (each for each in truth if each.is_needle):
        is_it = np.abs(mhz - needle.signal.frequency_mhz) * 1e6 <= config.within_hz
        is_it &= np.abs(drift - needle.signal.drift_rate_hz_s) <= config.within_hz_s
        is_it &= ~(np.abs(start - needle.start_mjd) > _SAME_START_DAYS)  # NaN matches any cadence
        first = np.flatnonzero(is_it)[:1].tolist()
        found.append(Found(needle, counted[first[0]] if first else None))
    return found


def group_needles(found: Sequence[Found]) -> dict[str, list[Group]]:
    """Needles in groups of about equal number by drift rate and by SNR, and by their place in the coarse channel."""
    lines = [each.needle.signal for each in found]
    drift = np.array([abs(line.drift_rate_hz_s) for line in lines])
    snr = np.array([line.snr for line in lines])
    place = np.array([each.needle.place for each in found])
    parts = np.linspace(0, 1, _PARTS + 1)
    groups = {
        "drift rate (Hz/s, either sign)": _group(found, drift, np.quantile(drift, parts)),
        "SNR in a panel": _group(found, snr, np.quantile(snr, parts)),
        "place in the coarse channel": _group(found, place, np.array(_PLACES)),
    }
    return {name: each for name, each in groups.items() if each}


def _group(found: Sequence[Found], values: npt.NDArray[np.float64], edges: npt.NDArray[np.float64]) -> list[Group]:
    """Groups between neighbouring edges, without the empty ones; none where a value is not known."""
    if not np.isfinite(values).all():
        return []
    edges = np.unique(edges)
    edges = edges if len(edges) > 1 else np.repeat(edges, 2)
    number = np.clip(np.searchsorted(edges, values, "right") - 1, 0, len(edges) - 2)
    is_found = np.array([each.candidate is not None for each in found])
    return [
        Group(f"{edges[n]:.3g} to {edges[n + 1]:.3g}", int((number == n).sum()), int(is_found[number == n].sum()))
        for n in np.unique(number).tolist()
    ]


def recall_lines(config: RecallConfig) -> Iterator[str]:
    """What `python -m shard_tools recall` prints. Raises InputError naming the file that cannot be read."""
    found = find_needles(read_candidates(config.candidates), read_truth(config.truth), config)
    if not found:
        raise InputError(f"{config.truth}: holds no needle, expected a line in the panels 0 2 4 alone")
    if config.each:
        yield f"{'':10} {'MHz':>14} {'Hz/s':>8} {'SNR':>7}   rank"
        for each in found:
            line = each.needle.signal
            rank = "not found" if each.candidate is None else str(each.candidate.rank)
            yield f"{line.kind:10} {line.frequency_mhz:14.6f} {line.drift_rate_hz_s:+8.3f} {line.snr:7.1f}   {rank}"
    hits = [each for each in found if each.candidate is not None]
    yield f"needles found: {len(hits)} of {len(found)}"
    if hits:
        hertz = np.abs([each.error_hz for each in hits])
        rates = np.abs([each.error_hz_s for each in hits])
        yield f"errors, median and largest: {np.median(hertz):.1f} and {hertz.max():.1f} Hz in frequency at the start,"
        yield f"  {np.median(rates):.4f} and {rates.max():.4f} Hz/s in drift rate"
    for name, groups in group_needles(found).items():
        yield f"by {name}:"
        for group in groups:
            yield f"  {group.name:20} {group.found:5} of {group.needles:5}  {group.found / group.needles:6.0%}"
