"""The promises of a data set's axes: those of an observation come from its files, for each cadence its own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shard_tools.axes import kaggle_axes
from shard_tools.joined_manifest import read_manifests
from shard_tools.observation.ingest import ingest
from shard_tools.observation.ingest_config import IngestConfig
from shard_tools.observation.observed_axes import axes_of, cadence_of
from shard_tools.observation.simulate import BIN_LENGTH_S, CHANNEL_MHZ
from tests.observation_files import SECONDS_APART, write_cadence
from tests.tiny import pack_tiny


def test_axes_of_an_observation_are_those_of_its_files(tmp_path: Path) -> None:
    files = tuple(write_cadence(tmp_path / "files"))
    manifest = ingest(IngestConfig(tmp_path / "shards", files, workers=1, max_drift=3.0))
    (axes,) = axes_of(manifest)
    assert (6, axes.time_bins, axes.channels) == manifest.shape
    assert axes.bin_length_s == pytest.approx(BIN_LENGTH_S)
    assert axes.channel_width_hz == pytest.approx(8e6 * CHANNEL_MHZ)
    assert axes.panel_starts_s == pytest.approx([panel * SECONDS_APART for panel in range(6)], abs=1e-5)
    assert axes.max_drift_hz_s == 3.0
    assert axes.rows[1, 0] - axes.rows[0, 0] == pytest.approx(SECONDS_APART / BIN_LENGTH_S)
    assert not cadence_of(manifest).any()


def test_axes_of_what_pack_made_are_the_competitions(tmp_path: Path) -> None:
    manifest = pack_tiny(tmp_path, 20, 2)
    assert axes_of(manifest) == [kaggle_axes(*manifest.shape[1:])]
    assert not cadence_of(manifest).any()


def test_each_row_of_joined_observations_has_the_axes_of_its_own_cadence(tmp_path: Path) -> None:
    roots = []
    for number, max_drift in enumerate((4.0, 2.0)):
        files = tuple(write_cadence(tmp_path / f"files{number}", fch1=8420.0 + 80 * number))
        config = IngestConfig(tmp_path / f"shards{number}", files, workers=1, max_drift=max_drift)
        roots.append(ingest(config).root)
    joined = read_manifests(roots)
    first, second = axes_of(joined)
    assert replace(first, max_drift_hz_s=2.0) == second and first.max_drift_hz_s == 4.0
    expected = np.repeat([0, 1], [len(each.rows) for each in joined.data_sets])
    assert np.array_equal(cadence_of(joined), expected)
