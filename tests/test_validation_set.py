"""Training on an observation: which snippets are kept back and validated on, and which weights judge which snippet.

Axes: n snippets, P panels, T time bins, F frequency channels.
"""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from infer import InferConfig, infer
from pipeline.backgrounds import VALIDATION, backgrounds_order, kept_back_rows
from shard_tools.errors import InputError
from shard_tools.joined_manifest import read_manifests
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.observation.band_folds import FOLDS, band_folds, rows_beside
from shard_tools.observation.cadence_tables import read_observations
from shard_tools.observation.ingest import ingest
from shard_tools.observation.ingest_config import IngestConfig
from shard_tools.observation.observed_axes import axes_of, is_observed
from shard_tools.sample import read_snippets
from shard_tools.verify import verify
from tests.conftest import data_set_bytes
from tests.observation_files import write_cadence
from train import train
from training.accelerator import build_accelerator
from training.config import TrainConfig
from training.observation.write_findings import load_judges
from training.prediction import count_trained_on, plan_judges, read_trained
from training.presets import PRESETS
from training.run import build_train_loader, read_backgrounds
from training.validation_set import make_validation_set, with_validation_set
from training.weights import load_weights, save_weights


@pytest.fixture(scope="module")
def observation(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """48 snippets of 16 x 1024, with no channels summed."""
    folder = tmp_path_factory.mktemp("observation")
    files = tuple(write_cadence(folder / "files"))
    return ingest(IngestConfig(folder / "shards", files, workers=1, channel_bin=1, max_drift=0.5, shard_mb=2))


def config_of(observation: Manifest, run_dir: Path, **changes: object) -> TrainConfig:
    where = (str(observation.root),)
    values = {"epochs": 1, "batch_size": 8, "tracker": "none", "report": False, "precision": "float32", **changes}
    return replace(PRESETS["fine"], shards=where, backgrounds=where, run_dir=run_dir, **values)  # type: ignore[arg-type]


def ranges_mhz(manifest: Manifest) -> np.ndarray:
    """(n, 2) lowest and highest frequency of each snippet."""
    found = read_observations(manifest.data_sets[0])
    assert found is not None
    width = found.cadences[0].channel_width_hz / 1e6 * manifest.shape[2]
    return np.stack([found.first_mhz, found.first_mhz + width], 1)


# ---- What is kept back


def test_every_snippet_is_in_one_fold_of_blocks_of_neighbours(observation: Manifest) -> None:
    fold = band_folds(observation)
    assert set(fold.tolist()) == set(range(FOLDS)) and np.bincount(fold).min() > len(fold) / FOLDS / 2
    assert (np.diff(fold) == 0).sum() > 0 and is_observed(observation)
    joined = read_manifests([observation.root])
    assert np.array_equal(band_folds(joined), fold)


@pytest.mark.parametrize("fold", range(FOLDS))
def test_no_snippet_is_trained_on_that_shares_channels_with_one_kept_back(observation: Manifest, fold: int) -> None:
    held_out = np.flatnonzero(band_folds(observation) == fold)
    kept_back = rows_beside(observation, observation.data_sets[0], held_out)
    trained_on = np.setdiff1d(np.arange(len(observation)), kept_back)
    ranges = ranges_mhz(observation)
    overlaps = (ranges[:, None, 0] < ranges[None, :, 1]) & (ranges[None, :, 0] < ranges[:, None, 1])
    assert not overlaps[np.ix_(trained_on, held_out)].any()
    assert np.array_equal(kept_back, np.flatnonzero(overlaps[:, held_out].any(1)))
    assert set(held_out) <= set(kept_back) and len(trained_on) > len(observation) / 3


def test_what_is_kept_back_follows_from_the_validation_set_alone(observation: Manifest, tmp_path: Path) -> None:
    made = make_validation_set(tmp_path / VALIDATION, observation, config_of(observation, tmp_path, fold=2))
    kept_back = kept_back_rows(observation, made, 2)
    assert np.array_equal(
        kept_back, rows_beside(observation, observation.data_sets[0], np.flatnonzero(band_folds(observation) == 2))
    )
    rows = backgrounds_order(observation, 0, kept_back).rows
    assert len(rows) + len(kept_back) == len(observation) and not np.isin(rows, kept_back).any()
    assert not len(kept_back_rows(observation, observation, 2))  # without a validation set nothing is kept back


# ---- The validation set


def test_needles_are_added_to_half_of_what_is_kept_back_and_the_rest_is_as_it_was(
    observation: Manifest, tmp_path: Path
) -> None:
    made = make_validation_set(tmp_path / VALIDATION, observation, config_of(observation, tmp_path, fold="all"))
    verify(made.root)
    rows = [observation.keys_of(np.arange(len(observation))).index(key.removesuffix("-v")) for key in _keys(made)]
    before, after = read_snippets(observation, np.array(rows)), read_snippets(made, np.arange(len(made)))
    assert np.array_equal(made.fold, band_folds(observation)[rows]) and len(set(rows)) == len(rows) == len(observation)
    differs = (before != after).any(axis=(2, 3))  # (n, P)
    assert 0.25 < made.target.mean() < 0.75
    assert differs[made.target == 1][:, ::2].any(axis=1).all()
    # Without a needle, a signal in ON panels is in OFF panels too; without any signal a snippet is unchanged.
    without = differs[made.target == 0]
    assert (without[:, 1::2].any(axis=1) == without.any(axis=1)).all() and not without.any(axis=1).all()
    assert abs(after.astype(np.float32).std(axis=(2, 3)) - 1).max() < 0.02
    assert axes_of(made) == axes_of(observation)
    np.testing.assert_array_equal(ranges_mhz(made), ranges_mhz(observation)[rows])


def _keys(manifest: Manifest) -> list[str]:
    return manifest.keys_of(np.arange(len(manifest)))


def test_a_validation_set_is_the_same_each_time_and_another_one_is_refused(
    observation: Manifest, tmp_path: Path
) -> None:
    first, second = tmp_path / "a" / VALIDATION, tmp_path / "b" / VALIDATION
    config = config_of(observation, tmp_path)
    (tmp_path / "b" / ".validation.tmp").mkdir(parents=True)
    (tmp_path / "b" / ".validation.tmp" / "half").write_text("of one that was killed")
    for folder in (first, second, second):
        make_validation_set(folder, observation, config)
    assert data_set_bytes(first) == data_set_bytes(second)
    with pytest.raises(InputError, match="holds a validation set of other data or options"):
        make_validation_set(first, observation, replace(config, seed=1))


def test_an_observation_alone_is_refused_with_the_remedy(observation: Manifest, tmp_path: Path) -> None:
    draws = replace(PRESETS["fine"].draws, needles=None)
    config = replace(config_of(observation, tmp_path / "run"), backgrounds=(), draws=draws)
    with pytest.raises(
        InputError, match="shards: snippets of an observation, without labels; give it as --backgrounds"
    ):
        train(with_validation_set(config))


# ---- The run and its weights


@pytest.fixture(scope="module")
def run_dir(observation: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the observation, fold 1 kept back."""
    folder = tmp_path_factory.mktemp("run") / "run"
    train(with_validation_set(config_of(observation, folder, fold=1, report=True)))
    return folder


def test_a_run_on_an_observation_leaves_weights_that_score_it(
    observation: Manifest, run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, about = load_weights(run_dir / "best.safetensors")
    assert about["kept_back_of"] == [observation.identity] and about["fold"] == 1
    _, shape = read_trained(run_dir / "best.safetensors")
    assert shape == observation.shape and about["axes"]["panel_starts_s"][1] == pytest.approx(320.0, abs=1e-3)
    with caplog.at_level(logging.WARNING):
        infer(InferConfig((str(observation.root),), (run_dir / "best.safetensors",), tmp_path / "out.csv"))
    for page in (run_dir / "report.html", tmp_path / "out.report.html"):
        if page.exists():
            assert "without the pauses between them" in page.read_text() and "Hz/s assume" not in page.read_text()
    assert (run_dir / "report.html").exists()
    known = int((band_folds(observation) != 1).sum())
    assert f"{known} of {len(observation)} snippets are scored by weights that were trained on them" in caplog.text


def test_a_run_on_an_observation_goes_on(observation: Manifest, run_dir: Path) -> None:
    config = config_of(observation, run_dir, fold=1, resume=True)
    before = (run_dir / "best.safetensors").read_bytes()
    train(with_validation_set(config))
    assert (run_dir / "best.safetensors").read_bytes() == before
    assert len(read_manifest(run_dir / VALIDATION)) == int((band_folds(observation) == 1).sum())


def test_each_snippet_is_judged_by_the_model_that_does_not_know_it(observation: Manifest, run_dir: Path) -> None:
    trained, _ = read_trained(run_dir / "best.safetensors")
    folds = [replace(trained, about={**trained.about, "fold": fold}) for fold in range(FOLDS)]
    other = replace(trained, about={})
    rows, fold = np.arange(len(observation)), band_folds(observation)
    (joined, alone) = plan_judges(observation, [*folds, other], rows)
    assert {part.model: part.rows.tolist() for part in joined} == {n: rows[fold == n].tolist() for n in range(FOLDS)}
    assert [part.rows.tolist() for part in alone] == [rows.tolist()]
    assert count_trained_on(observation, [*folds, other], rows) == 0
    assert count_trained_on(observation, folds[:3], rows) == int((fold > 2).sum())


def test_a_line_is_judged_by_the_weights_that_do_not_know_its_snippet(
    observation: Manifest, run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, about = load_weights(run_dir / "best.safetensors")
    paths = [tmp_path / f"{fold}.safetensors" for fold in range(FOLDS)]
    for fold, path in enumerate(paths):
        save_weights(path, state, {**about, "fold": fold})
    fold, cpu = band_folds(observation), torch.device("cpu")
    with caplog.at_level(logging.WARNING):
        judges = load_judges(paths, observation, "test", cpu)
    assert [fold[judge.rows].tolist() for judge in judges] == [[n] * (fold == n).sum() for n in range(FOLDS)]
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        load_judges(paths[:1], observation, "test", cpu)
    assert f"{(fold > 0).sum()} of {len(fold)} snippets are scored by weights that were trained on them" in caplog.text


def test_a_run_does_not_read_what_is_kept_back(observation: Manifest, tmp_path: Path) -> None:
    config = with_validation_set(config_of(observation, tmp_path / "run", fold=3))
    validated = read_manifests(config.shards)
    backgrounds = read_backgrounds(config, validated)
    assert backgrounds is not None and len(validated) == int((band_folds(observation) == 3).sum())
    kept_back = kept_back_rows(observation, validated, 3)
    with build_train_loader(config, build_accelerator("float32"), validated, backgrounds) as loader:
        read = {int(row) for batch in loader for row in batch.row[batch.counts]}
    assert read == set(range(len(observation))) - set(kept_back.tolist())
