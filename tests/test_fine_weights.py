"""The observations that train and judge the weights for fine products: their lines and their labels."""

import numpy as np
import pytest

from benchmarks.fine_weights import draw_interference, draw_needles, label
from shard_tools.cadence import ON_POSITIONS
from shard_tools.manifest import Manifest
from shard_tools.observation.cadence_tables import read_observations
from shard_tools.observation.ingest import ingest
from shard_tools.observation.ingest_config import IngestConfig
from shard_tools.observation.simulate import Line
from tests.observation_files import write_cadence


@pytest.fixture(scope="module")
def observation(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("observation")
    return ingest(IngestConfig(folder / "shards", tuple(write_cadence(folder / "files")), workers=1))


def test_backgrounds_hold_no_line_in_on_panels_alone() -> None:
    lines = draw_interference(0)
    assert len(lines) > 20 and all(set(line.panels) - set(ON_POSITIONS) for line in lines)
    assert {len(line.panels) for line in lines} == {3, 6}
    assert all(line.panels == ON_POSITIONS and abs(line.drift_rate_hz_s) < 4 for line in draw_needles(0))


def test_a_snippet_is_a_positive_only_where_a_needle_is_whole_in_it(observation: Manifest) -> None:
    found = read_observations(observation.data_sets[0])
    assert found is not None
    low, width = found.first_mhz, found.cadences[0].channel_width_hz * observation.shape[2] / 1e6

    def labels(mhz: float, drift: float) -> list[int]:
        return label(observation, [Line("needle", mhz, drift, 10.0, ON_POSITIONS)]).tolist()

    inside = (low[:, None] < low[1] + width / 2) & (low[:, None] + width > low[1] + width / 2)
    assert labels(low[1] + width / 2, 0.0) == inside.flatten().astype(int).tolist()
    # 4 Hz/s for 1572 s cross 281 channels: the line begins in the first snippet only, and leaves it.
    start = low[1] - 100 * width / 1024
    steep = labels(start, 4.0)
    assert steep[0] == (1 if start + 4 * 1572.06 / 1e6 < low[0] + width else -1) and steep[1] == -1
    assert not np.any(steep[2:])
