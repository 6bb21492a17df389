"""Where and when the snippets of a data set were observed, and what its tables say about each cadence."""

from dataclasses import dataclass
from typing import Any

from shard_tools.axes import Axes
from shard_tools.errors import InputError
from shard_tools.manifest import DataSet, Manifest
from shard_tools.manifest_writer import CADENCES
from shard_tools.observation.cadence_tables import Observations, read_observations
from shard_tools.observation.observed_axes import cadence_axes
from training.observation.events import SnippetOrigin


@dataclass(frozen=True)
class CadenceFiles:
    """The six files of a cadence; a row of cadences.parquet."""

    axes: Axes
    sources: tuple[str, ...]
    names: tuple[str, ...]
    start_mjd: float
    fch1_mhz: float
    foff_mhz: float
    channels: int
    nfpc: int
    """Channels in a coarse channel; 0 if unknown."""
    ra_hours: float | None
    dec_degrees: float | None

    @property
    def source(self) -> str:
        """The target of the first file."""
        return self.sources[0]

    @property
    def lowest_mhz(self) -> float:
        """Centre of the lowest channel of the files."""
        return self.fch1_mhz + min(0.0, self.foff_mhz * (self.channels - 1))

    def channel_of(self, mhz: float) -> int:
        """The files' channel nearest to a frequency, counted from the lowest."""
        return round((mhz - self.lowest_mhz) / abs(self.foff_mhz))


@dataclass(frozen=True)
class Observed:
    """The cadences of a data set, and where in them its snippets lie."""

    cadences: list[CadenceFiles]
    origins: list[SnippetOrigin]
    """One for each row."""


def read_observed(manifest: Manifest) -> Observed:
    """Read cadences and snippets' places. Raises InputError if `ingest` did not cut a data set (no frequencies)."""
    cadences: list[CadenceFiles] = []
    origins: list[SnippetOrigin] = []
    for data_set in manifest.data_sets:
        first = len(cadences)
        observations = _read_one(data_set)
        axes = cadence_axes(observations, data_set, manifest.shape)
        rows = observations.tables[CADENCES].to_pylist()
        cadences += [_to_files(row, each) for row, each in zip(rows, axes, strict=True)]
        origins += [
            SnippetOrigin(first + int(cadence), axes[cadence], float(mhz), flags)
            for cadence, mhz, flags in zip(
                observations.cadence, observations.first_mhz, observations.flags, strict=True
            )
        ]
    return Observed(cadences, origins)


def check_searched_once(observed: Observed) -> None:
    """Raise InputError if the same files were cut twice, into channels of different widths.

    Each of their lines would be two events, but false alarm rates count events.
    """
    widths: dict[tuple[object, ...], float] = {}
    for files in observed.cadences:
        width = files.axes.channel_width_hz
        other = widths.setdefault((files.names, files.start_mjd, files.fch1_mhz), width)
        if other != width:
            raise InputError(
                f"--candidates: {files.names[0]} is in the data twice, in channels of {other:.4g} and {width:.4g} Hz, "
                "expected it once, since each of its lines would be listed twice; search each data set by itself, with "
                "a table of its own"
            )


def _read_one(data_set: DataSet) -> Observations:
    observations = read_observations(data_set)
    if observations is None:
        raise InputError(
            f"--candidates: {data_set.store.root} has no frequencies; expected a data set that `python -m shard_tools "
            "ingest` cut from telescope files. Leave --candidates out for a submission with one score for each snippet"
        )
    return observations


def _to_files(row: dict[str, Any], axes: Axes) -> CadenceFiles:
    return CadenceFiles(
        axes=axes,
        sources=tuple(row["sources"]),
        names=tuple(row["files"]),
        start_mjd=row["start_mjd"],
        fch1_mhz=row["fch1_mhz"],
        foff_mhz=row["foff_mhz"],
        channels=row["channels"],
        nfpc=row["nfpc"],
        ra_hours=row["ra_hours"],
        dec_degrees=row["dec_degrees"],
    )
