"""The promise of the comparison of real skies: no needle is judged by a training that has seen its sky."""

import functools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import learning_curve, real_skies
from benchmarks.history import record
from benchmarks.learning_curve import Curve, Point, Trained
from benchmarks.needles.data import TWIN, NeedleSet
from benchmarks.needles.recipes import UNTRAINED
from benchmarks.real_skies import REAL, SIMULATED, RealSkiesConfig
from shard_tools.cadence import KAGGLE_SHAPE
from shard_tools.errors import InputError
from shard_tools.manifest import read_manifest
from tests.tiny import write_tiny_data


def scores_of(needles: NeedleSet, seed: int, ahead: float) -> pd.Series:
    """Scores of a set, in which those of needles are higher by `ahead`."""
    keys = [*needles.truth.index, *(f"{key}{TWIN}" for key in needles.twins)]
    noise = np.random.default_rng(seed).normal(size=len(keys))
    return pd.Series(noise, keys) + ahead * pd.Series(1.0, needles.twins).reindex(keys, fill_value=0)


def test_no_needle_is_judged_by_a_training_that_has_seen_its_sky(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trainings work as in the learning curve, so here their scores are drawn at random."""
    folder = write_tiny_data(tmp_path / "real", 14, 2, KAGGLE_SHAPE)
    seen: dict[str, set[str]] = {}

    def draw_scores(curve: Curve, point: Point, seed: int) -> Trained:
        size, shards = curve.backgrounds[-1]
        manifest = read_manifest(shards)
        assert len(manifest) == size and sum(size for size, _ in curve.backgrounds) == curve.config.backgrounds
        assert curve.real
        real = scores_of(curve.real, seed, 0.0)
        if point.name.startswith("without"):
            seen[point.name] = {key.partition(TWIN)[0] for key in manifest.keys_of(np.arange(size))}
            # Only needles that this training has not seen get good scores.
            for key in set(curve.real.twins) - seen[point.name]:
                real[key] += 100
        return Trained(
            {"cadences": 16, "train_s": 1.0}, {"simulated": scores_of(curve.needles, seed, 1.0), "real": real}, folder
        )

    history = tmp_path / "history.jsonl"
    monkeypatch.setattr(real_skies, "record", functools.partial(record, path=history))
    monkeypatch.setattr(learning_curve, "train_point", draw_scores)
    monkeypatch.setattr(real_skies, "train_point", draw_scores)
    config = RealSkiesConfig(folder, 3, 2, 16, 16, 2, test=40, labelled=40, at_once=1, work_dir=tmp_path)
    assert real_skies.main(config) == 0
    (entry,) = map(json.loads, history.read_text().splitlines())
    rows = {figure["row"]: figure for figure in entry["figures"]}
    assert list(rows) == [UNTRAINED, SIMULATED, REAL]
    assert len(seen) == 3 and len(set.union(*seen.values())) == 7 and not set.intersection(*seen.values())
    assert rows[REAL]["real_auc"] == 1 and rows[SIMULATED]["real_auc"] < 1
    assert rows[REAL]["ahead_real_auc"] > 0 and "ahead_auc" not in rows[SIMULATED]
    assert "ahead of simulated skies" in capsys.readouterr().out


def test_fewer_needles_than_parts_are_refused(tmp_path: Path) -> None:
    needles = NeedleSet(tmp_path, pd.DataFrame({"target": 1}, index=["a", "b"]))
    with pytest.raises(InputError, match="2 needles, expected at least 5"):
        real_skies.divide(needles, 5, 0)
