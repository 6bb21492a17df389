"""Scoring an observation: the search is aimed at each cadence's own panels, and training at the median of them all."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import infer
from infer import InferConfig
from pipeline import open_loader
from pipeline.canvas import CanvasConfig
from shard_tools.axes import Axes, kaggle_axes
from shard_tools.errors import InputError
from shard_tools.joined_manifest import read_manifests
from shard_tools.manifest import Manifest
from shard_tools.observation.header import SECONDS_A_DAY
from shard_tools.observation.ingest import ingest
from shard_tools.observation.ingest_config import IngestConfig
from shard_tools.observation.observed_axes import axes_of, cadence_of
from tests.observation_files import START_MJD, power, write_cadence, write_h5
from tests.observation_files import fields as header_fields
from training.accelerator import build_accelerator
from training.model import ModelConfig, build_model
from training.prediction import predict
from training.search.aiming import CadenceScorer, aim, aim_at, aimed_axes, median_axes, parse_axes, started_as
from training.search.lines import Search

CANVAS = CanvasConfig("panels", 16, 1024, normalise=False)
EVEN = Axes(16, 1024, 18.25, 22.35, (0.0, 320.0, 640.0, 960.0, 1280.0, 1600.0), 4.0)
APART_S = (320.0, 450.0)


def build() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig("convnext_window", stem="sums"), 6, 16, 1024).eval()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two cadences of noise in one band, whose panels are 320 s and 450 s apart."""
    folder, roots = tmp_path_factory.mktemp("observed"), []
    for number, apart in enumerate(APART_S):
        files = []
        for panel, path in enumerate(write_cadence(folder / f"files{number}")):
            mjd = START_MJD + number + panel * apart / SECONDS_A_DAY
            files.append(write_h5(path, power(panel), header_fields(panel, tstart=mjd)))
        roots.append(ingest(IngestConfig(folder / f"shards{number}", tuple(files), workers=1)).root)
    return read_manifests(roots)


def test_a_search_that_is_aimed_is_the_one_that_is_built() -> None:
    later = replace(EVEN, panel_starts_s=tuple(450.0 * n for n in range(6)), max_drift_hz_s=2.0)
    search = Search(EVEN, 2)
    search.observe(later)
    for name, buffer in Search(later, 2).named_buffers():
        assert torch.equal(search.get_buffer(name), buffer)
    with pytest.raises(ValueError, match="panels of 8 x 1024"):
        search.observe(replace(EVEN, time_bins=8))


def test_each_snippet_is_scored_with_the_panels_of_its_own_cadence(manifest: Manifest) -> None:
    model = build()
    aim(model, EVEN)
    with open_loader(manifest, "test", canvas=CANVAS, batch_size=5) as loader:  # a batch holds both cadences
        found = predict(model, loader, "float32")["logit"].to_numpy()
        assert aimed_axes(model) == aimed_axes(Search(EVEN, 2))
        own, expected = cadence_of(manifest), np.empty(len(manifest))
        for number, axes in enumerate(axes_of(manifest)):
            other = build()
            aim(other, started_as(EVEN, axes))
            images = {
                row: image for batch in loader for row, image in zip(batch.row.tolist(), batch.image, strict=True)
            }
            for row in np.flatnonzero(own == number).tolist():
                with torch.inference_mode():
                    expected[row] = float(other(images[row]))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with open_loader(manifest, "test", canvas=CANVAS) as loader, torch.inference_mode():
        alike = torch.cat([model(batch.image[batch.counts][:, 0]).flatten() for batch in loader]).numpy()
    assert abs(alike - expected).max() > 1e-2  # the pauses matter


def test_a_model_is_aimed_at_the_median_cadence_and_keeps_its_rates_when_it_scores(manifest: Manifest) -> None:
    model = build()
    aim_at(model, manifest, CANVAS)
    aimed = parse_axes(aimed_axes(model) or {})
    first, second = axes_of(manifest)
    assert aimed.panel_starts_s == pytest.approx([385.0 * n for n in range(6)], abs=1e-3)
    assert aimed.steepest == pytest.approx(first.steepest)
    scored = started_as(replace(aimed, max_drift_hz_s=1.0), second)
    assert scored.panel_starts_s == pytest.approx(second.panel_starts_s, abs=1e-3) and scored.max_drift_hz_s == 1.0
    with pytest.raises(InputError, match="--height 8 --width 1024: expected 16 and 1024"):
        aim_at(model, manifest, replace(CANVAS, height=8))


def test_the_median_of_cadences_of_other_units_is_in_time_bins_and_channels() -> None:
    wider = replace(EVEN, bin_length_s=36.5, channel_width_hz=11.175, panel_starts_s=tuple(640.0 * n for n in range(6)))
    middle = median_axes([EVEN, wider])
    np.testing.assert_allclose(middle.rows, EVEN.rows, atol=1e-9)
    assert middle.steepest == pytest.approx(wider.steepest)


def test_snippets_that_were_not_observed_are_scored_as_they_always_were() -> None:
    model = build()
    with CadenceScorer([model], None) as cadences:
        image = torch.randn(2, 6, 16, 1024)
        with torch.inference_mode():
            assert torch.equal(cadences.score(torch.arange(2), image, model), model(image))
    assert parse_axes(aimed_axes(model) or {}) == kaggle_axes(16, 1024)


def test_scores_in_parts_are_refused_for_an_observation(manifest: Manifest, tmp_path: Path) -> None:
    shards = tuple(str(data_set.store.root) for data_set in manifest.data_sets)
    config = InferConfig(shards, (Path("needlestream"),), scores=str(tmp_path))
    with pytest.raises(InputError, match=r"--scores: .* is an observation"):
        infer.predict(config, build_accelerator("no"), manifest, [])
