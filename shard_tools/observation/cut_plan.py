"""Which snippets are cut from a cadence: how wide, how far apart, and in which shard. Decided from headers alone.

A column is a frequency channel of a snippet: `channel_bin` neighbouring channels of the file, summed.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from shard_tools.cadence import KAGGLE_SHAPE, PANELS
from shard_tools.errors import InputError
from shard_tools.observation.agreement import Cadence
from shard_tools.observation.header import Header
from shard_tools.observation.lines import Line

FINE_COLUMNS, FINE_CHANNEL_BIN = 1024, 8
MID_TIME_BINS, MID_COLUMNS = KAGGLE_SHAPE[1:]
# Where coarse channels are not known, the bandpass is fitted to pieces of the band of this width.
PIECE_COLUMNS = 1 << 17
# Fewest columns of a coarse channel: with fewer, a signal would raise the medians that it is divided by.
FEWEST_COARSE_COLUMNS = 64
_MOST_OVERLAP = 0.75  # share of a snippet; the larger it is, the more snippets hold each channel
_MAX_SOURCE = 40  # letters of a source's name in a key


@dataclass(frozen=True)
class CutOptions:
    """The options of the command line that decide the cuts."""

    channel_bin: int | None
    """Channels of the file in one channel of a snippet; None: as suits the product."""
    max_drift_hz_s: float
    exclude_mhz: tuple[tuple[float, float], ...] = ()
    """(lowest, highest) of each range that is blanked."""
    feed: int = 0


@dataclass(frozen=True)
class CutPlan:
    """The cuts of one cadence."""

    cadence: Cadence
    channel_bin: int
    time_bins: int
    columns: int
    """Of one snippet."""
    overlap: int
    """Columns that neighbouring snippets share: as many as the steepest drift crosses."""
    borders: npt.NDArray[np.int64]
    """First column of each coarse channel, or piece, and the end of the last."""
    starts: npt.NDArray[np.int64]
    """First column of each snippet."""
    exclude_mhz: tuple[tuple[float, float], ...]
    feed: int
    needles: tuple[Line, ...] = ()
    """Simulated lines that are added to the files' power when it is read."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(P, T, F) of a snippet."""
        return PANELS, self.time_bins, self.columns

    @property
    def column_width_hz(self) -> float:
        """Width of a column."""
        return self.channel_bin * self.cadence.first.channel_width_hz

    def column_mhz(self, column: float) -> float:
        """Centre of a column, counted from the lowest of the band."""
        header = self.cadence.first
        return header.lowest_mhz + (column * self.channel_bin + (self.channel_bin - 1) / 2) * abs(header.foff_mhz)

    def key(self, cut: int) -> str:
        """The key of a snippet: source, tstart (MJD) of the first file, lowest frequency (MHz), first channel x bin.

        Keys of one cadence sort by frequency. They differ between bands and channel bins of one observation.
        """
        header, start = self.cadence.first, int(self.starts[cut])
        source = re.sub("[^A-Za-z0-9]+", "_", header.source)[:_MAX_SOURCE].strip("_") or "unknown"
        mjd, mhz = f"{header.start_mjd:013.6f}", f"{self.column_mhz(start):013.6f}"
        return f"{source}-{mjd}-{mhz}-{start * self.channel_bin:09d}x{self.channel_bin}".replace(".", "_")


def plan_cuts(cadence: Cadence, options: CutOptions) -> CutPlan:
    """Plan the cuts of a cadence. Raises InputError naming the option that makes them impossible."""
    header = cadence.first
    channel_bin = options.channel_bin or (FINE_CHANNEL_BIN if header.is_fine else 1)
    borders = _find_borders(cadence, channel_bin)
    columns = FINE_COLUMNS if header.is_fine else MID_COLUMNS
    time_bins = cadence.spectra if header.is_fine else min(cadence.spectra, MID_TIME_BINS)
    width = channel_bin * header.channel_width_hz
    overlap = _find_overlap(cadence, options.max_drift_hz_s, width, columns)
    band = int(borders[-1])
    if band < columns:
        smaller = "a smaller --channel-bin, or " if channel_bin > 1 else ""
        raise InputError(
            f"{header.path}: {header.layout.channels} channels are {band} columns with --channel-bin {channel_bin}, "
            f"expected at least a snippet's {columns}; give {smaller}a file with more channels"
        )
    _check_coarse_width(header, channel_bin)
    # The last snippet ends where the band does.
    starts = np.minimum(np.arange(0, band - overlap, columns - overlap), band - columns)
    plan = CutPlan(
        cadence,
        channel_bin,
        time_bins,
        columns,
        overlap,
        borders,
        np.unique(starts),
        options.exclude_mhz,
        options.feed,
    )
    return _without_excluded(plan)


def _find_borders(cadence: Cadence, channel_bin: int) -> npt.NDArray[np.int64]:
    """First column of each coarse channel, or of each piece of the band where coarse channels are not known."""
    header = cadence.first
    if header.nfpc:
        if header.nfpc % channel_bin:
            raise InputError(
                f"--channel-bin {channel_bin}: does not divide the {header.nfpc} channels of a coarse channel of "
                f"{header.path}; choose one that does, such as {math.gcd(header.nfpc, 64)}"
            )
        coarse = header.layout.channels // header.nfpc
        return np.arange(coarse + 1) * (header.nfpc // channel_bin)
    band = header.layout.channels // channel_bin
    # The last piece is half to one and a half times as wide: a shorter one would be divided by its own signals.
    pieces = max(1, round(band / PIECE_COLUMNS))
    return np.append(np.arange(pieces) * PIECE_COLUMNS, band)


def _check_coarse_width(header: Header, channel_bin: int) -> None:
    """Raise InputError where a coarse channel has too few columns to tell its bandpass from a signal."""
    nfpc, columns = header.nfpc, header.nfpc // channel_bin
    if not nfpc or columns >= FEWEST_COARSE_COLUMNS:
        return
    coarse = header.layout.channels // nfpc
    joined = next((n for n in range(2, coarse) if coarse % n == 0 and n * columns >= FEWEST_COARSE_COLUMNS), coarse)
    most = nfpc // FEWEST_COARSE_COLUMNS
    smaller = f", or a --channel-bin of at most {most}" if most else ""
    raise InputError(
        f"{header.path}: a coarse channel of {nfpc} channels is {columns} columns with --channel-bin {channel_bin}, "
        f"expected at least {FEWEST_COARSE_COLUMNS}; give the true --nfpc, or --nfpc {joined * nfpc} to take several "
        f"coarse channels as one{smaller}"
    )


def _find_overlap(cadence: Cadence, max_drift_hz_s: float, width_hz: float, columns: int) -> int:
    """Columns that the steepest drift crosses in the cadence. Raises InputError unless they fit a snippet."""
    crossed = max_drift_hz_s * cadence.length_s / width_hz
    most = _MOST_OVERLAP * columns
    if crossed > most:
        raise InputError(
            f"--max-drift {max_drift_hz_s:g}: crosses {crossed:.0f} channels of {width_hz:.4g} Hz in the "
            f"{cadence.length_s:.0f} s of {cadence.first.path} and the files after it, expected at most {most:.0f} of "
            f"a snippet's {columns}; give a smaller --max-drift or a larger --channel-bin"
        )
    return math.ceil(crossed)


def _without_excluded(plan: CutPlan) -> CutPlan:
    """The plan without snippets that are excluded from end to end. Raises InputError where none remains."""
    kept = [start for start in plan.starts.tolist() if not excluded_columns(plan, start, start + plan.columns).all()]
    if not kept:
        raise InputError(f"{plan.cadence.first.path}: --exclude-mhz leaves nothing of its band; give smaller ranges")
    return replace(plan, starts=np.array(kept, np.int64))


def excluded_columns(plan: CutPlan, start: int, stop: int) -> npt.NDArray[np.bool_]:
    """Which of the columns `start` to `stop` touch an excluded range."""
    half = plan.column_width_hz / 2e6
    centres = plan.column_mhz(start) + 2 * half * np.arange(stop - start)
    excluded = np.zeros(stop - start, bool)
    for low, high in plan.exclude_mhz:
        excluded |= (centres + half > low) & (centres - half < high)
    return excluded


@dataclass(frozen=True)
class CutShard:
    """The snippets of one shard: neighbouring cuts of one cadence."""

    name: str
    cadence: int
    """Number of its cadence."""
    plan: CutPlan
    first: int
    last: int
    """The cuts `first` to `last`, which is excluded."""

    @property
    def columns(self) -> tuple[int, int]:
        """The columns from the start of the first cut to the end of the last."""
        starts = self.plan.starts
        return int(starts[self.first]), int(starts[self.last - 1]) + self.plan.columns


def plan_cut_shards(plans: Sequence[CutPlan], per_shard: int) -> list[CutShard]:
    """Divide the cuts of all cadences, in order, into shards of at most `per_shard` snippets of one cadence."""
    return list(_cut_shards(plans, per_shard))


def _cut_shards(plans: Sequence[CutPlan], per_shard: int) -> Iterator[CutShard]:
    number = 0
    for cadence, plan in enumerate(plans):
        for first in range(0, len(plan.starts), per_shard):
            last = min(first + per_shard, len(plan.starts))
            yield CutShard(f"test-{number:06d}.tar", cadence, plan, first, last)
            number += 1
