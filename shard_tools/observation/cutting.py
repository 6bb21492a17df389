"""Cut snippets from six open files, coarse channel by coarse channel, so that memory does not grow with the band.

Axes: P panel, T time bin, F column (cut_plan.py).
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shard_tools.cadence import npy_header
from shard_tools.observation.cut_plan import CutPlan, CutShard, excluded_columns
from shard_tools.observation.filterbank import FilterbankFile, Float32s
from shard_tools.observation.flatten import (
    MOST_POWER,
    block_count,
    block_medians,
    remove_dc_spikes,
    sum_channels,
    to_bandpass,
    to_radiometer_noise,
)
from shard_tools.observation.needles import add_needles
from shard_tools.observation.opening import open_filterbank
from shard_tools.observation.read_watch import watched

# Bytes of one file that are read at a time, unless a single coarse channel is larger.
_READ_BYTES = 1 << 26
_MOST_READS = 4  # times _READ_BYTES may be read, if that completes a block of the file
# A snippet is flagged where its coarse channel passes less than this share of its median.
_ROLL_OFF = 0.5
# In standard deviations of the radiometer noise: a panel that varies by less is constant but for rounding.
_NO_NOISE = 1e-3
DC_SPIKE, BORDER, ROLL_OFF, EXCLUDED, BLANKED, EMPTY = "dc_spike", "border", "roll_off", "excluded", "blanked", "empty"
"""Flags, in this order, for: an interpolated DC spike; a border of coarse channels; the edge of one, where it passes
less than half of its median; channels of --exclude-mhz; values that were not finite, zero or absurdly high; a panel
without noise."""


class Cut(NamedTuple):
    """One snippet, and what undoes its normalisation (`to_power`)."""

    number: int
    """Number among the plan's cuts."""
    values: npt.NDArray[np.float16]
    """(P, T, F), each panel of mean 0 and standard deviation 1; blanked values are 0."""
    level: Float32s
    """(P,) mean of each panel, in standard deviations of the radiometer noise above the bandpass."""
    scale: Float32s
    """(P,) standard deviation of each panel, in those of the radiometer noise; near 1 without signals."""
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """Neighbouring coarse channels of all six panels."""

    first: int
    """Number of its first coarse channel."""
    values: Float32s
    """(P, T, F) in standard deviations of the radiometer noise; NaN where blanked."""
    medians: list[list[Float32s]]
    """`block_medians` of each coarse channel and panel."""


def read_pieces(plan: CutPlan, files: Sequence[FilterbankFile], first: int, last: int) -> Iterator[Piece]:
    """Read the coarse channels `first` to `last` and flatten them, a few at a time."""
    count = _channels_at_once(plan, files[0])
    while first < last:
        # Up to a multiple of `count`, so that reads begin and end with the blocks in which files are stored.
        stop = min(last, (first // count + 1) * count)
        width = int(plan.borders[stop] - plan.borders[first])
        values = np.empty((len(files), plan.time_bins, width), np.float32)
        medians = []
        for number, (panel, file) in enumerate(zip(values, files, strict=True)):
            panel[:] = _read_panel(plan, number, file, first, stop)
            medians.append(_flatten_panel(plan, panel, plan.borders[first : stop + 1]))
        yield Piece(first, values, [list(each) for each in zip(*medians, strict=True)])
        first = stop


def _channels_at_once(plan: CutPlan, file: FilterbankFile) -> int:
    """How many coarse channels to read at a time: whole blocks of the file, where these are not too large."""
    width = int(plan.borders[1]) * plan.channel_bin
    most = max(1, _READ_BYTES // (4 * width * plan.time_bins))
    block = max(1, file.chunk_channels // width)
    return max(1, most // block) * block if block <= _MOST_READS * most else most


def _read_panel(plan: CutPlan, panel: int, file: FilterbankFile, first: int, stop: int) -> Float32s:
    """(T, F) sums of channels of the coarse channels `first` to `stop` of one panel's file, without DC spikes."""
    start, end = (int(plan.borders[each]) * plan.channel_bin for each in (first, stop))
    with watched(file.header.path):
        values = file.read(start, end, plan.time_bins, plan.feed)
    if file.header.layout.dtype == "float32":  # no power is 0, but lost data are
        values[values == 0] = np.nan
    if plan.needles:
        add_needles(plan, panel, values, first, stop)
    if plan.cadence.first.has_dc_spikes:
        remove_dc_spikes(values, plan.cadence.first.nfpc)
    sums = sum_channels(values, plan.channel_bin)
    sums[sums == 0] = np.nan  # where power is stored as integers, a single 0 may be a low power
    return sums


def _flatten_panel(plan: CutPlan, panel: Float32s, borders: npt.NDArray[np.int64]) -> list[Float32s]:
    """Divide (T, F) by its bandpass, in place, coarse channel by coarse channel; return the block medians of each."""
    samples = plan.column_width_hz * plan.cadence.first.bin_length_s
    medians = []
    for low, high in itertools.pairwise((borders - borders[0]).tolist()):
        part = panel[:, low:high]
        medians.append(block_medians(part, block_count(*part.shape)))
        bandpass = to_bandpass(medians[-1], high - low)
        with np.errstate(over="ignore", invalid="ignore"):  # faults in the data
            part[part > MOST_POWER * bandpass] = np.nan
        part[:] = to_radiometer_noise(part, bandpass, samples)
    return medians


def read_cuts(shard: CutShard, about: dict[str, Any]) -> Iterator[Cut]:
    """Yield the snippets of a shard, in order; `about["bandpass"]` collects [coarse channel, medians by panel]."""
    plan, cut = shard.plan, shard.first
    about["bandpass"] = []
    with ExitStack() as opened:
        nfpc = plan.cadence.first.nfpc or None
        files = [opened.enter_context(_open(path, nfpc)) for path in plan.cadence.paths]
        for first, last in _ranges_to_read(plan, plan.starts[shard.first : shard.last]):
            left, left_start = np.empty((*plan.shape[:2], 0), np.float32), int(plan.borders[first])
            edges: dict[int, list[Float32s]] = {}
            for piece in read_pieces(plan, files, first, last):
                for number, medians in enumerate(piece.medians, start=piece.first):
                    about["bandpass"].append([number, [each.tolist() for each in medians]])
                    edges[number] = medians
                left = np.concatenate([left, piece.values], axis=2)
                while cut < shard.last and plan.starts[cut] + plan.columns <= left_start + left.shape[2]:
                    start = int(plan.starts[cut]) - left_start
                    yield _finish(plan, cut, left[:, :, start : start + plan.columns], edges)
                    cut += 1
                if cut < shard.last:
                    # Drop what lies before the next snippet.
                    done = min(int(plan.starts[cut]) - left_start, left.shape[2])
                    left, left_start = left[:, :, done:].copy(), left_start + done


def _open(path: Path, nfpc: int | None) -> FilterbankFile:
    """Open a file, with the time limit of a read."""
    with watched(path):
        return open_filterbank(path, nfpc)


def _ranges_to_read(plan: CutPlan, starts: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """The ranges of coarse channels that the snippets at `starts` need; others, which are excluded, are not read."""
    first = np.searchsorted(plan.borders, starts, "right") - 1
    last = np.searchsorted(plan.borders, starts + plan.columns, "left")
    gaps = np.flatnonzero(first[1:] > last[:-1]) + 1
    firsts, lasts = first[[0, *gaps]].tolist(), last[[*(gaps - 1), -1]].tolist()
    return list(zip(firsts, lasts, strict=True))


def _finish(plan: CutPlan, cut: int, values: Float32s, medians: dict[int, list[Float32s]]) -> Cut:
    """Normalise one snippet and flag it."""
    start = int(plan.starts[cut])
    excluded = excluded_columns(plan, start, start + plan.columns) if plan.exclude_mhz else np.zeros(plan.columns, bool)
    flags = _place_flags(plan, start, medians)
    if excluded.any():
        flags.append(EXCLUDED)
    if not np.isfinite(values[:, :, ~excluded]).all():
        flags.append(BLANKED)
    values = values.copy()
    values[:, :, excluded] = np.nan
    normalised, level, scale = normalise(values)
    if not scale.all():
        flags.append(EMPTY)
    return Cut(cut, normalised, level, scale, tuple(flags))


def normalise(values: Float32s) -> tuple[npt.NDArray[np.float16], Float32s, Float32s]:
    """Bring each panel to mean 0 and standard deviation 1, as in the competition; also return the old ones, (P,) each.

    NaN becomes 0. A panel without noise becomes all 0, and so does its scale.
    """
    kept = np.isfinite(values)
    count = np.maximum(kept.sum(axis=(1, 2)), 1)
    exact = np.where(kept, values, 0)
    level = exact.sum(axis=(1, 2), dtype=np.float64) / count
    centred = np.where(kept, values - level[:, None, None], 0)
    scale = np.sqrt(np.square(centred).sum(axis=(1, 2)) / count)
    scale[scale < _NO_NOISE] = 0
    divisor = np.where(scale > 0, scale, np.inf)
    return (centred / divisor[:, None, None]).astype(np.float16), level.astype(np.float32), scale.astype(np.float32)


def to_power(
    cut_values: npt.NDArray[np.float16], level: Float32s, scale: Float32s, bandpass: Float32s, samples: float
) -> Float32s:
    """Undo what ingest did, except to blanks and DC spikes: return the file's own power, summed over each column.

    Takes (P, T, F), (P,), (P,), the bandpass (P, F) of the same columns, and as `samples` channel width x bin length.
    """
    noise = level[:, None, None] + scale[:, None, None] * cut_values.astype(np.float32)
    return bandpass[:, None] * (1 + noise / np.float32(np.sqrt(samples)))


def _place_flags(plan: CutPlan, start: int, medians: dict[int, list[Float32s]]) -> list[str]:
    """The flags of a snippet's place among the coarse channels."""
    stop = start + plan.columns
    flags: list[str] = []
    if not plan.cadence.first.nfpc:
        return flags
    first = int(np.searchsorted(plan.borders, start, "right")) - 1
    last = int(np.searchsorted(plan.borders, stop, "left"))
    borders = plan.borders[first : last + 1].tolist()
    pieces = list(zip(range(first, last), borders, borders[1:], strict=False))
    # The two interpolated channels are in the columns on both sides of the middle.
    if plan.cadence.first.has_dc_spikes and any(start <= (low + high) // 2 <= stop for _, low, high in pieces):
        flags.append(DC_SPIKE)
    if any(start < border < stop for border in borders):
        flags.append(BORDER)
    if any(_rolls_off(medians[number], start - low, stop - low, high - low) for number, low, high in pieces):
        flags.append(ROLL_OFF)
    return flags


def _rolls_off(medians: list[Float32s], start: int, stop: int, columns: int) -> bool:
    """Whether a coarse channel passes little power, in any panel, anywhere between two of its columns."""
    width = columns / len(medians[0])
    inside = slice(int(max(start, 0) / width), int(np.ceil(min(stop, columns) / width)))
    return any((each[inside] < _ROLL_OFF * np.nanmedian(each)).any() for each in medians if np.isfinite(each).any())


def to_members(shard: CutShard, about: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """The members of a shard, key and npy file; `about["cuts"]` collects [cut, level, scale, flags]."""
    header = npy_header(shard.plan.shape)
    about["cuts"] = []
    for cut in read_cuts(shard, about):
        about["cuts"].append([cut.number, cut.level.tolist(), cut.scale.tolist(), list(cut.flags)])
        yield shard.plan.key(cut.number), header + cut.values.tobytes()
