"""Three tables beside the manifest: where each snippet was cut, from which cadence, and through which bandpass."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shard_tools.atomic_files import write_whole
from shard_tools.cadence import PANELS
from shard_tools.errors import InputError
from shard_tools.manifest import DataSet
from shard_tools.manifest_writer import BANDPASS, CADENCES, CUTS
from shard_tools.observation.cut_plan import CutPlan, CutShard
from shard_tools.storage.base import read_file
from shard_tools.tar_shard import PackedShard

_SIX = pa.list_(pa.float32(), PANELS)

CADENCES_SCHEMA = pa.schema(
    {
        "source": pa.string(),
        "sources": pa.list_(pa.string(), PANELS),  # of all six panels
        "files": pa.list_(pa.string(), PANELS),  # names without folders
        "start_mjd": pa.float64(),  # of the first spectrum of the first file
        # Since start_mjd; row r of panel p begins bin_length_s x r later.
        "panel_start_s": pa.list_(pa.float64(), PANELS),
        "bin_length_s": pa.float64(),
        "channel_width_hz": pa.float64(),  # of a snippet: channel_bin channels of the file
        "channel_bin": pa.int32(),
        "fch1_mhz": pa.float64(),  # of the file, like the next four
        "foff_mhz": pa.float64(),
        "channels": pa.int64(),
        "nfpc": pa.int64(),  # 0 where it is not known
        "telescope": pa.int32(),  # telescope_id; null where it is not known, like the next two
        "ra_hours": pa.float64(),
        "dec_degrees": pa.float64(),
    }
)
CUTS_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "cadence": pa.int32(),  # row of cadences.parquet
        "first_mhz": pa.float64(),  # centre of the snippet's channel 0, the lowest
        "first_channel": pa.int64(),  # the file's lowest channel in it, counted from the band's lowest
        "coarse_channel": pa.int32(),  # of its middle, counted from the band's lowest; -1 where nfpc is not known
        "level": _SIX,  # mean of each panel, in standard deviations of the radiometer noise above the bandpass
        "scale": _SIX,  # standard deviation of each panel, in the same unit
        "flags": pa.string(),  # words, separated by spaces
    }
)
BANDPASS_SCHEMA = pa.schema(
    {
        "cadence": pa.int32(),
        "coarse_channel": pa.int32(),  # counted from the band's lowest; or number of the piece, where nfpc is not known
        "panel": pa.int8(),
        # At the middles of blocks of equal width; the file's power, summed over a snippet's channel.
        "medians": pa.list_(pa.float32()),
    }
)


def write_observation_tables(
    folder: Path, plans: Sequence[CutPlan], shards: Sequence[CutShard], packed: Sequence[PackedShard]
) -> None:
    """Write the three tables, from what was noted in each shard's `about`."""
    cuts = [row for shard, done in zip(shards, packed, strict=True) for row in _cut_rows(shard, done.about["cuts"])]
    bandpass: dict[tuple[int, int, int], Any] = {}
    for shard, done in zip(shards, packed, strict=True):
        for coarse, medians in done.about["bandpass"]:  # a coarse channel in two shards has equal medians in both
            bandpass.update({(shard.cadence, coarse, panel): each for panel, each in enumerate(medians)})
    rows = [(*place, medians) for place, medians in sorted(bandpass.items())]
    _write_table(folder / CADENCES, CADENCES_SCHEMA, map(_cadence_row, plans))
    _write_table(folder / CUTS, CUTS_SCHEMA, cuts)
    _write_table(folder / BANDPASS, BANDPASS_SCHEMA, rows)


def _write_table(path: Path, schema: pa.Schema, rows: Iterable[Sequence[Any]]) -> None:
    columns = [list(column) for column in zip(*rows, strict=True)]
    parquet = io.BytesIO()
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    pq.write_table(pa.table(arrays, schema=schema), parquet)
    write_whole(path, parquet.getvalue())


def _cadence_row(plan: CutPlan) -> tuple[Any, ...]:
    """In the order of CADENCES_SCHEMA."""
    cadence, first = plan.cadence, plan.cadence.first
    return (
        first.source,
        [header.source for header in cadence.headers],
        [header.path.name for header in cadence.headers],
        first.start_mjd,
        list(cadence.panel_starts_s),
        first.bin_length_s,
        plan.column_width_hz,
        plan.channel_bin,
        first.fch1_mhz,
        first.foff_mhz,
        first.layout.channels,
        first.nfpc,
        first.telescope,
        first.ra_hours,
        first.dec_degrees,
    )


def _cut_rows(shard: CutShard, cuts: Iterable[Sequence[Any]]) -> Iterable[tuple[Any, ...]]:
    """In the order of CUTS_SCHEMA."""
    plan = shard.plan
    for number, level, scale, flags in cuts:
        start = int(plan.starts[number])
        coarse = int(np.searchsorted(plan.borders, start + plan.columns // 2, "right")) - 1
        yield (
            plan.key(number),
            shard.cadence,
            float(plan.column_mhz(start)),
            start * plan.channel_bin,
            coarse if plan.cadence.first.nfpc else -1,
            level,
            scale,
            " ".join(flags),
        )


@dataclass(frozen=True)
class ObservedCadence:
    """Source and times of one cadence; the columns of cadences.parquet that most readers need."""

    source: str
    start_mjd: float
    panel_start_s: npt.NDArray[np.float64]
    """(P,) since start_mjd."""
    bin_length_s: float
    channel_width_hz: float

    def row_starts_s(self, time_bins: int) -> npt.NDArray[np.float64]:
        """(P, T) start of each time bin, in seconds since the start of the first panel."""
        return self.panel_start_s[:, None] + self.bin_length_s * np.arange(time_bins)


@dataclass(frozen=True)
class Observations:
    """What the three tables hold, in the order of a data set's samples."""

    cadences: list[ObservedCadence]
    cadence: npt.NDArray[np.int32]
    """Of each sample, its index in `cadences`."""
    first_mhz: npt.NDArray[np.float64]
    """Centre of each sample's channel 0, the lowest."""
    level: npt.NDArray[np.float32]
    """(samples, P)"""
    scale: npt.NDArray[np.float32]
    """(samples, P)"""
    flags: list[str]
    tables: dict[str, pa.Table]
    """The whole tables, by file name."""

    def describe(self, channels: int) -> str:
        """One line for users; `channels` is how many channels a snippet has."""
        sources = sorted({cadence.source or "unnamed sources" for cadence in self.cadences})
        named = ", ".join(sources[:3]) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")
        first = self.cadences[0]
        width_mhz = np.array([cadence.channel_width_hz for cadence in self.cadences])[self.cadence] / 1e6
        last_mhz = (self.first_mhz + (channels - 1) * width_mhz).max()
        return (
            f"{len(self.cadences)} cadence{'' if len(self.cadences) == 1 else 's'} of {named}, channels of "
            f"{first.channel_width_hz:.4g} Hz, time bins of {first.bin_length_s:.4g} s, "
            f"{self.first_mhz.min():.4f} to {last_mhz:.4f} MHz"
        )


def read_observations(data_set: DataSet) -> Observations | None:
    """Where the samples of a data set were observed; None where they were not cut by `ingest`.

    Raises InputError naming the table that is missing or was changed after it was written.
    """
    if CUTS not in data_set.files:
        return None
    tables = {name: _read_table(data_set, name) for name in (CADENCES, CUTS, BANDPASS)}
    cuts = tables[CUTS]
    if len(cuts) != len(data_set.rows):
        raise InputError(f"{data_set.store.where(CUTS)}: {len(cuts)} rows, expected {len(data_set.rows)}; ingest again")
    cadences = [
        ObservedCadence(
            row["source"],
            row["start_mjd"],
            np.array(row["panel_start_s"]),
            row["bin_length_s"],
            row["channel_width_hz"],
        )
        for row in tables[CADENCES].to_pylist()
    ]
    six = {name: np.array(cuts[name].to_pylist(), np.float32).reshape(-1, PANELS) for name in ("level", "scale")}
    return Observations(
        cadences,
        np.array(cuts["cadence"].to_pylist(), np.int32),
        np.array(cuts["first_mhz"].to_pylist()),
        six["level"],
        six["scale"],
        cuts["flags"].to_pylist(),
        tables,
    )


def _read_table(data_set: DataSet, name: str) -> pa.Table:
    where, data = data_set.store.where(name), read_file(data_set.store, name)
    if data is None or hashlib.sha256(data).hexdigest() != data_set.files.get(name):
        raise InputError(f"{where}: missing or not the one that was written with its manifest; ingest again")
    return pq.read_table(pa.BufferReader(data))
