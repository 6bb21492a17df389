"""What the learning curve and the comparison of recipes promise: all rows are judged on the same cadences."""

import functools
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import learning_curve, recipe_changes
from benchmarks.history import record
from benchmarks.learning_curve import Curve, CurveConfig, Point, Trained, cores_shared, print_table
from benchmarks.needles.data import TWIN
from benchmarks.needles.recipes import CLASSICAL, UNTRAINED
from benchmarks.recipe_changes import CHANGES, ChangesConfig
from shard_tools.errors import InputError
from training.presets import parse_train_config

SMALL = "--preset demo --sum-time-bins 13 --height 28 --width 56 --batch-size 8"


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "history.jsonl"
    for module in (learning_curve, recipe_changes):
        monkeypatch.setattr(module, "record", functools.partial(record, path=path))
    return path


def test_a_small_curve_has_a_row_for_each_point_and_keeps_the_last_weights(
    tmp_path: Path, history: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CurveConfig((16,), 16, (1,), 2, SMALL, test=40, labelled=40, keep=tmp_path / "kept", work_dir=tmp_path)
    assert learning_curve.main(config) == 0
    (entry,) = map(json.loads, history.read_text().splitlines())
    rows = {figure["row"]: figure for figure in entry["figures"]}
    assert list(rows) == [CLASSICAL, UNTRAINED, "16"]
    assert [figure.get("cadences") for figure in rows.values()] == [None, 0, 16]
    assert "ahead_auc" in rows["16"] and "ahead_auc" not in rows[UNTRAINED]
    assert entry["config"]["is_part"] and (tmp_path / "kept").is_file()
    assert "ahead of untrained" in capsys.readouterr().out


def test_a_changed_recipe_is_compared_with_the_recipe_over_all_its_trainings(
    tmp_path: Path, history: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainings work as in the curve, so here scores are drawn at random, better ones for the changed recipe."""
    name, words = next(iter(CHANGES.items()))
    trained = []

    def draw_scores(curve: Curve, point: Point, seed: int) -> Trained:
        trained.append((point.more, seed))
        noise = 1.0 if point.more else 3.0
        target = pd.concat(
            [curve.needles.truth["target"], pd.Series(0, [f"{key}{TWIN}" for key in curve.needles.twins])]
        )
        scores = 2 * target + np.random.default_rng(seed).normal(scale=noise, size=len(target))
        return Trained({"cadences": 16, "train_s": 1.0}, {"simulated": scores}, tmp_path)

    monkeypatch.setattr(learning_curve, "train_point", draw_scores)
    assert recipe_changes.main(ChangesConfig(16, 2, (name,), 40, at_once=1, labelled=40, work_dir=tmp_path)) == 0
    assert sorted(trained) == [("", 0), ("", 1), (words, 0), (words, 1)]
    (entry,) = map(json.loads, history.read_text().splitlines())
    recipe, changed = entry["figures"]
    assert changed["row"] == name and "ahead_auc" not in recipe
    assert [figure["runs"] for figure in entry["figures"]] == [2, 2]
    assert changed["ahead_auc"] == pytest.approx(changed["auc"] - recipe["auc"]) and changed["ahead_auc"] > 0


@pytest.mark.parametrize("words", CHANGES.values(), ids=CHANGES)
def test_each_change_is_one_that_train_takes_and_changes_something(words: str) -> None:
    given = ["--preset", "demo", "--shards", ".", "--run-dir", "."]
    assert parse_train_config([*given, *words.split()]) != parse_train_config(given)


def test_trainings_at_the_same_time_have_cores_of_their_own() -> None:
    cores = sorted(os.sched_getaffinity(0))
    with cores_shared(len(cores)) as pool:
        # Each thread answers at least once, as the others are busy at the same time.
        found = list(pool.map(lambda _: os.sched_getaffinity(0), cores * 20))
    assert all(len(each) == 1 for each in found)
    assert sorted(os.sched_getaffinity(0)) == cores
    with pytest.raises(InputError, match="--at-once"):
        CurveConfig(at_once=len(cores) + 1)


def test_long_names_stand_above_their_figures_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    figure = {"auc": 0.9, "recall_1e2": 0.5, "recall_1e3": None, "real_auc": 0.7, "train_s": 74.2}
    ahead = {"ahead_auc": 0.01, "ahead_auc_low": -0.01, "ahead_auc_high": 0.02}
    print_table([{"row": "10,000", **figure}, {"row": max(CHANGES, key=len), **figure, **ahead}], "demo")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    short, long = (line for line in lines if "0.9000" in line)
    assert short.index("0.9000") == long.index("0.9000")
