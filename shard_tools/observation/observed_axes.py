"""The axes of a data set's cadences: as observed for snippets of `ingest`, else those of the competition."""

import numpy as np
import numpy.typing as npt

from shard_tools.axes import Axes, kaggle_axes
from shard_tools.manifest import DataSet, Manifest
from shard_tools.manifest_writer import CUTS
from shard_tools.observation.cadence_tables import Observations, ObservedCadence, read_observations


def is_observed(manifest: Manifest) -> bool:
    """Whether `ingest` cut any of a manifest's data sets from a telescope's files."""
    return any(CUTS in data_set.files for data_set in manifest.data_sets)


def axes_of(manifest: Manifest) -> list[Axes]:
    """The axes of each observed cadence, in the order of cadences.parquet, data set after data set.

    A data set that was not cut by `ingest` has one entry, `kaggle_axes` of its shape. `cadence_of` gives the entry of
    each row. Raises InputError naming a table that is missing or was changed.
    """
    return [axes for data_set in manifest.data_sets for axes in _axes_of_one(manifest, data_set)]


def cadence_of(manifest: Manifest) -> npt.NDArray[np.int64]:
    """(rows,) the place in `axes_of` of each row's axes. Raises as `axes_of` does."""
    found = np.zeros(len(manifest), np.int64)
    first = 0
    for data_set in manifest.data_sets:
        observations = read_observations(data_set)
        found[data_set.rows.start : data_set.rows.stop] = first + (0 if observations is None else observations.cadence)
        first += 1 if observations is None else len(observations.cadences)
    return found


def _axes_of_one(manifest: Manifest, data_set: DataSet) -> list[Axes]:
    observations = read_observations(data_set)
    if observations is None:
        return [kaggle_axes(*manifest.shape[1:])]
    return cadence_axes(observations, data_set, manifest.shape)


def cadence_axes(observations: Observations, data_set: DataSet, shape: tuple[int, int, int]) -> list[Axes]:
    """The axes of each cadence of an observed data set; (P, T, F) is the shape of its snippets."""
    max_drift = data_set.made["observation"]["max_drift_hz_s"]
    return [_axes_of_cadence(cadence, *shape[1:], max_drift) for cadence in observations.cadences]


def _axes_of_cadence(cadence: ObservedCadence, time_bins: int, channels: int, max_drift_hz_s: float) -> Axes:
    starts = tuple(cadence.panel_start_s.tolist())
    return Axes(time_bins, channels, cadence.bin_length_s, cadence.channel_width_hz, starts, max_drift_hz_s)
