"""Folds of an observation: its snippets have no labels, and are divided by their place in the band.

Neighbours share channels, and interference keeps to certain bands, so a fold is made of blocks of neighbours.
"""

import numpy as np
import numpy.typing as npt

from shard_tools.manifest import DataSet, Manifest
from shard_tools.observation.cadence_tables import Observations, read_observations

FOLDS = 5
_LARGEST_BLOCK = 32  # snippets
_LEAST_BLOCKS = 4  # per fold in each cadence, where there are enough snippets
Rows = npt.NDArray[np.int64]


def band_folds(manifest: Manifest) -> npt.NDArray[np.int8]:
    """(rows,) the fold of each row, 0 to FOLDS - 1; -1 for rows that `ingest` did not cut.

    A fold depends on the row's own data set alone. Raises InputError naming a table that is missing or was changed.
    """
    fold = np.full(len(manifest), -1, np.int8)
    for data_set in manifest.data_sets:
        if observations := read_observations(data_set):
            for rows in _by_cadence(observations):
                size = max(1, min(_LARGEST_BLOCK, len(rows) // (FOLDS * _LEAST_BLOCKS)))
                fold[data_set.rows.start + rows] = np.arange(len(rows)) // size % FOLDS
    return fold


def rows_beside(manifest: Manifest, data_set: DataSet, held_out: Rows) -> Rows:
    """The rows of an observed data set that share channels with any of its rows `held_out`, and these themselves.

    Rows are numbered as in the manifest. Raises as `band_folds` does.
    """
    observations = read_observations(data_set)
    assert observations is not None, f"{data_set.store.root}: not observed"
    found = []
    is_held_out = np.isin(np.arange(data_set.rows.start, data_set.rows.stop), held_out)
    for rows in _by_cadence(observations):
        width_mhz = observations.cadences[observations.cadence[rows[0]]].channel_width_hz / 1e6 * manifest.shape[2]
        mhz, held = observations.first_mhz[rows], observations.first_mhz[rows[is_held_out[rows]]]
        # The first held-out one that ends above a row's lowest channel; they overlap if it begins below the highest.
        place = np.searchsorted(held, mhz - width_mhz, "right")
        begins = np.append(held, np.inf)[place]
        found.append(rows[begins < mhz + width_mhz])
    return np.sort(np.concatenate(found)) + data_set.rows.start


def _by_cadence(observations: Observations) -> list[Rows]:
    """The rows of each cadence, from the lowest frequency to the highest."""
    cadences = range(len(observations.cadences))
    of_each = [np.flatnonzero(observations.cadence == cadence) for cadence in cadences]
    return [rows[np.argsort(observations.first_mhz[rows], kind="stable")] for rows in of_each if len(rows)]
