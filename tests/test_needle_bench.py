"""The needle benchmark's promises: rows are judged alike, twins have needles in OFF panels, goals can be missed."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from benchmarks import needle_bench
from benchmarks.needles.config import NeedleBenchConfig
from benchmarks.needles.data import TWIN, NeedleSet, pack_real, simulate_set, snippet_path
from benchmarks.needles.recipes import CLASSICAL, OURS, RECIPES, Form
from benchmarks.needles.rows import RowFailedError, epochs_in, run_program, split_sizes
from benchmarks.needles.scores import ahead_figure, missed_goals, print_tables, real_figure, simulated_figure
from shard_tools.cadence import OFF_POSITIONS, ON_POSITIONS, read_snippet
from shard_tools.errors import InputError
from shard_tools.manifest import read_manifest
from shard_tools.simulate import KINDS, SimulateConfig, plan_tasks, simulate_cadence
from tests.conftest import MakeData
from tests.tiny import pack_tiny
from training.presets import parse_train_config

POSITIVE, NEGATIVE = 40, 200


@pytest.fixture
def needles(tmp_path: Path) -> NeedleSet:
    """A table of truth without data: SNRs from 1 to 40, every kind equally often."""
    keys = pd.Index([f"k{number}" for number in range(POSITIVE + NEGATIVE)], name="id")
    truth = pd.DataFrame({"target": np.repeat([1, 0], [POSITIVE, NEGATIVE])}, index=keys)
    truth["snr"] = pd.Series(np.arange(1.0, POSITIVE + 1), index=keys[:POSITIVE])
    truth["kind"] = pd.Series(np.resize(KINDS, POSITIVE), index=keys[:POSITIVE])
    return NeedleSet(tmp_path, truth)


def scores_of(needles: NeedleSet, positive: Any, twin: Any) -> pd.Series:
    """Scores in which negatives have 0 to 1."""
    keys = [*needles.truth.index, *(f"{key}{TWIN}" for key in needles.twins)]
    negative = np.linspace(0, 1, NEGATIVE)
    return pd.Series(np.concatenate((np.resize(positive, POSITIVE), negative, np.resize(twin, POSITIVE))), index=keys)


def test_a_row_that_ignores_the_off_panels_drops_by_nothing_and_one_that_uses_them_by_much(needles: NeedleSet) -> None:
    blind = simulated_figure(needles, [scores_of(needles, 2.0, 2.0)], seed=0)
    seeing = simulated_figure(needles, [scores_of(needles, 2.0, 0.5)], seed=0)
    assert (blind["auc"], blind["drop"]) == (1, 0)
    assert (seeing["auc"], seeing["drop"]) == (1, pytest.approx(0.5, abs=0.01))


def test_the_snr_of_one_half_and_the_recall_are_told_for_all_and_by_kind(needles: NeedleSet) -> None:
    positive = np.where(np.arange(1, POSITIVE + 1) > 20, 2.0, 0.5)
    figure = simulated_figure(needles, [scores_of(needles, positive, 0.0)], seed=0)
    assert figure["recall_1e2"] == 0.5 and figure["half_snr"] == pytest.approx(np.sqrt(20 * 21))
    assert all(figure[f"recall_{kind}"] == 0.5 and 16 < figure[f"half_snr_{kind}"] < 25 for kind in KINDS)
    assert figure["recall_1e3"] is None  # at this rate none of 200 negatives may be a false positive


def test_a_row_that_never_reaches_one_half_has_no_snr_and_is_shown_all_the_same(
    needles: NeedleSet, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = {"row": "weak", **simulated_figure(needles, [scores_of(needles, 0.5, 0.5)], seed=0)}
    assert figure["half_snr"] is None
    print_tables([figure, {"row": "broken", "failed": "no such flag"}])
    shown = capsys.readouterr().out
    assert "broken" in shown and "failed: no such flag" in shown and "weak" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_real_needles_are_compared_with_their_own_twins(needles: NeedleSet) -> None:
    alone = NeedleSet(needles.shards, needles.truth.iloc[:POSITIVE])
    positive = np.arange(POSITIVE, dtype=float)
    figure = real_figure(alone, [scores_of(needles, positive, positive - 0.5)], seed=0)
    assert figure["real_above"] == 1 and figure["real_above_low"] < 1
    assert figure["real"] == POSITIVE and 0.5 < figure["real_auc"] < 0.55


def test_another_row_is_compared_on_the_same_cadences(needles: NeedleSet) -> None:
    """A small difference that every cadence shows is significant, though each row's own interval is far wider."""
    rng = np.random.default_rng(0)
    positive = np.where(np.arange(POSITIVE) % 4 == 0, 0.3, 1.5) + rng.uniform(0, 0.2, POSITIVE)
    ours, theirs = ({"simulated": [scores_of(needles, positive + more, 0.0)]} for more in (0.1, 0.0))
    ahead = ahead_figure(needles, None, ours, theirs, seed=0)
    assert 0 < ahead["ahead_auc_low"] < ahead["ahead_auc"] < ahead["ahead_auc_high"] < 0.1
    alone = simulated_figure(needles, theirs["simulated"], seed=0)
    assert alone["auc"] + ahead["ahead_auc"] < alone["auc_high"]
    assert ahead_figure(needles, None, ours, ours, seed=0)["ahead_auc"] == 0


def test_the_runs_of_a_recipe_are_shown_as_their_mean_and_their_spread_widens_the_interval(needles: NeedleSet) -> None:
    low, high = (scores_of(needles, value, 0.0) for value in (0.6, 0.9))
    each, both = (simulated_figure(needles, runs, seed=0) for runs in ([low, low], [low, high]))
    assert both["auc"] == pytest.approx((each["auc"] + simulated_figure(needles, [high], seed=0)["auc"]) / 2)
    assert both["auc_high"] - both["auc_low"] > 2 * (each["auc_high"] - each["auc_low"])


def figure(row: str, ahead: float = 0.0, snr: float | None = 100) -> dict[str, Any]:
    return {"row": row, "ahead_auc_low": ahead, "half_snr": snr}


@pytest.mark.parametrize(
    ("rows", "missed"),
    [
        ([figure(OURS), figure(CLASSICAL, 0.01, 150)], 0),
        ([figure(OURS), figure(CLASSICAL, 0.01, None)], 0),
        ([figure(OURS), figure(CLASSICAL, -0.01, 150)], 1),
        ([figure(OURS), figure(CLASSICAL, 0.01, 149)], 1),
        ([figure(OURS, snr=None), figure(CLASSICAL, 0.01, None)], 1),
        ([figure(OURS), figure(CLASSICAL, 0.01, 150), {"row": "seed", "failed": "so"}], 1),
        ([figure(CLASSICAL, 0.01, 150)], 1),
        ([figure(OURS), figure(f"{OURS}, otherwise", -1), figure(CLASSICAL, 0.01, 150)], 0),
    ],
)
def test_goals_are_missed_where_chance_may_have_put_ours_ahead_or_the_search_is_as_sensitive(
    rows: list[dict[str, Any]], missed: int
) -> None:
    assert len(missed_goals(rows)) == missed


def test_epochs_fill_the_time_and_a_recipe_too_slow_for_one_is_refused(tmp_path: Path) -> None:
    few, shards = (Path(pack_tiny(tmp_path / str(count), train=count).root) for count in (50, 100))
    assert (split_sizes(few), split_sizes(shards)) == ((40, 10), (80, 20))
    history = pd.DataFrame({"cadences_per_s": [1.0, 20.0], "validation_s": [9.0, 0.5]})  # 2.5 s per short epoch
    assert [epochs_in(seconds, history, few, few) for seconds in (1.3, 12.4, 26)] == [1, 4, 10]
    assert [epochs_in(seconds, history, few, shards) for seconds in (2.6, 24.8, 52)] == [1, 4, 10]
    with pytest.raises(RowFailedError, match="an epoch would take 2 s"):
        epochs_in(1.0, history, few, few)


@pytest.mark.parametrize("form", RECIPES)
def test_every_recipe_is_a_command_line_of_train_py_that_is_unlike_the_others(form: Form) -> None:
    given = ["--shards", "shards", "--run-dir", "run", "--epochs", "5"]
    configs = [parse_train_config([*recipe.command(5).split(), *given]) for recipe in RECIPES[form]]
    trained = [(config, recipe.uses_backgrounds) for config, recipe in zip(configs, RECIPES[form], strict=True)]
    assert all(one != other for one, other in itertools.combinations(trained, 2))
    (competition,) = (c for c, r in zip(configs, RECIPES[form], strict=True) if r.name.startswith("competition"))
    assert competition.canvas.layout == "on" and competition.sampling == "uniform"
    assert (competition.draws.mixup_epochs, competition.draws.mix_target) == (4, "or")  # 4 of the five epochs


def test_a_program_that_refuses_its_command_line_says_why() -> None:
    with pytest.raises(RowFailedError, match="--no-such-flag"):
        run_program("-m", "shard_tools", "info", "somewhere", "--no-such-flag", "1")


def test_simulated_positives_are_packed_beside_twins_that_were_drawn_anew(tmp_path: Path) -> None:
    config = SimulateConfig(out=tmp_path, train=20, test=6, positive_share=0.5, workers=1)
    simulated = simulate_set(tmp_path / "simulated", config)
    tasks = {task.key: task for task in plan_tasks(config) if task.split == "test" and task.target}
    assert set(simulated.twins) == set(tasks) and len(tasks) == 3
    manifest = read_manifest(simulated.shards)
    expected = {*simulated.truth.index, *(f"{key}{TWIN}" for key in tasks)}
    assert set(manifest.keys_of(manifest.rows("test"))) == expected
    for key, task in tasks.items():
        twin = read_snippet(snippet_path(tmp_path / "simulated" / "data", f"{key}{TWIN}"))[1]
        assert np.array_equal(twin, simulate_cadence(config, task, twin=True)[0])


def test_real_positives_are_packed_beside_twins_whose_on_and_off_panels_changed_places(
    make_data: MakeData, tmp_path: Path
) -> None:
    source = make_data(train=9, test=2)
    missing = next(key for key in source.train if source.target(key))
    source.path(missing).unlink()
    real = pack_real(tmp_path / "real", source.root)
    expected = {key for key in source.train if source.target(key)} - {missing}
    assert set(real.twins) == expected
    manifest = read_manifest(real.shards)
    assert set(manifest.keys_of(manifest.rows("test"))) == expected | {f"{key}{TWIN}" for key in expected}
    for key in expected:
        original = read_snippet(source.path(key))[1]
        twin = read_snippet(snippet_path(tmp_path / "real" / "data", f"{key}{TWIN}"))[1]
        assert np.array_equal(twin[list(ON_POSITIONS)], original[list(OFF_POSITIONS)])
        assert np.array_equal(twin[list(OFF_POSITIONS)], original[list(ON_POSITIONS)])


def test_options_that_cannot_work_are_refused() -> None:
    for values in (
        {"rows": (OURS,), "check": True},
        {"quick": True, "check": True},
        {"rows": ("nobody",)},
        {"minutes": -1.0},
        {"runs": 0},
        {"test": 1},
        {"train": 19},
        {"positive_share": 0.015},  # fewer positives in the calibration than folds
        *({"positive_share": share} for share in (0.0, 1e-4, 1.0, float("nan"))),
    ):
        with pytest.raises(InputError, match=r"^--"):
            NeedleBenchConfig(**values)


def test_a_run_with_other_rows_data_or_times_is_a_part_of_the_benchmark(tmp_path: Path) -> None:
    assert not NeedleBenchConfig(real=tmp_path, out=tmp_path, work_dir=tmp_path, check=True).is_part
    for values in (
        {"rows": (OURS,)},
        {"runs": 1},
        {"minutes": 1.0},
        {"test": 100},
        {"snr_min": 30.0},
        {"more": "--ema 0.9"},
    ):
        assert NeedleBenchConfig(**values).is_part


def test_the_quick_form_goes_all_the_way_and_records_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[object] = []
    monkeypatch.setattr(needle_bench, "record", lambda *arguments: recorded.append(arguments))
    config = NeedleBenchConfig(
        quick=True, rows=(OURS,), out=tmp_path / "out", work_dir=tmp_path, train=40, test=24, runs=2
    )
    assert needle_bench.main(dataclasses.replace(config, seed=1, runs=1)) == 0
    shown = capsys.readouterr().out
    assert "failed" not in shown
    for row in (OURS, CLASSICAL, "trivial"):
        assert any(line.startswith(row) and "0." in line for line in shown.splitlines()), row
    assert not recorded  # figures of the quick form are not kept
    for name in ("roc", "recall", "scores"):
        assert matplotlib.image.imread(tmp_path / "out" / f"needle_{name}.png").std() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
