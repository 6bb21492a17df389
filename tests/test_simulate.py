"""The promises of the simulator. Axes: P panel, T time bin, F frequency channel."""

import csv
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from sklearn.metrics import roc_auc_score

from shard_tools.cadence import CHANNEL_WIDTH_HZ, KAGGLE_SHAPE, OFF_POSITIONS, ON_POSITIONS, TIME_BIN_SECONDS
from shard_tools.cadence import read_snippet as read_checked_snippet
from shard_tools.errors import InputError
from shard_tools.simulate import (
    KINDS,
    SimulateConfig,
    draw_cadence,
    draw_interference_panels,
    draw_needle_panels,
    plan_tasks,
    simulate,
    simulate_cadence,
)
from tests.conftest import ROOT

TRAIN, TEST, SHARE = 21, 9, 0.4


def small_config(out: Path, workers: int = 1, seed: int = 3) -> SimulateConfig:
    return SimulateConfig(out=out, train=TRAIN, test=TEST, seed=seed, workers=workers, positive_share=SHARE)


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("simulated") / "data"
    simulate(small_config(out))
    return out


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_workers_end_with_a_killed_command(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "shard_tools",
        "simulate",
        "--out",
        tmp_path,
        "--workers",
        "2",
        "--train",
        "100000",
    ]
    process = psutil.Popen(command, cwd=ROOT)
    while not list(tmp_path.rglob("*.npy")):
        time.sleep(0.1)
        assert process.poll() is None
    children = process.children(recursive=True)
    process.kill()
    process.wait()
    assert len(children) >= 2 and not psutil.wait_procs(children, timeout=20)[1]


def test_two_workers_write_the_same_bytes_as_one(data_set: Path, tmp_path: Path) -> None:
    simulate(small_config(tmp_path / "data", workers=2))
    assert file_bytes(tmp_path / "data") == file_bytes(data_set)


def test_a_cadence_does_not_depend_on_those_before_it(data_set: Path) -> None:
    config = small_config(data_set)
    for task in reversed(plan_tasks(config)[:4]):
        assert np.array_equal(simulate_cadence(config, task)[0], np.load(task.path(data_set)))


def test_another_seed_gives_other_keys_and_other_bytes(tmp_path: Path) -> None:
    first, second = (small_config(tmp_path, seed=seed) for seed in (3, 4))
    assert not {task.key for task in plan_tasks(first)} & {task.key for task in plan_tasks(second)}
    one, other = (simulate_cadence(config, plan_tasks(config)[0])[0] for config in (first, second))
    assert not np.array_equal(one, other)


def test_the_folder_has_the_layout_of_the_competition_and_nothing_else(data_set: Path) -> None:
    tables = {name: read_rows(data_set / name) for name in ("train_labels.csv", "sample_submission.csv")}
    expected = {"train_labels.csv", "sample_submission.csv", "truth.csv"}
    for split, name, count in (("train", "train_labels.csv", TRAIN), ("test", "sample_submission.csv", TEST)):
        keys = [row["id"] for row in tables[name]]
        assert len(keys) == count and keys == sorted(set(keys))
        assert all(re.fullmatch("[0-9a-f]{15}", key) for key in keys)
        assert list(tables[name][0]) == ["id", "target"]
        expected |= {f"{split}/{key[0]}/{key}.npy" for key in keys}
    assert {row["target"] for row in tables["sample_submission.csv"]} == {"0.5"}
    assert set(file_bytes(data_set)) == expected


def test_keys_are_unique_over_a_data_set_of_the_competitions_size(tmp_path: Path) -> None:
    tasks = plan_tasks(SimulateConfig(out=tmp_path, train=60_000, test=39_995))
    assert len({task.key for task in tasks}) == 99_995


def test_every_snippet_is_valid_and_every_panel_has_mean_0_and_deviation_1(data_set: Path) -> None:
    paths = sorted(data_set.rglob("*.npy"))
    assert len(paths) == TRAIN + TEST
    for path in paths:
        snippet = read_checked_snippet(path).values
        assert snippet.shape == KAGGLE_SHAPE
        panels = snippet.astype(np.float64)
        np.testing.assert_allclose(panels.mean(axis=(1, 2)), 0, atol=2e-3)
        np.testing.assert_allclose(panels.std(axis=(1, 2)), 1, atol=2e-3)


@pytest.mark.parametrize(("share", "train", "test"), [(0.0, 0, 0), (0.1, 10, 3), (0.5, 50, 16), (1.0, 100, 33)])
def test_the_share_of_needles_is_exact_in_each_split(share: float, train: int, test: int, tmp_path: Path) -> None:
    tasks = plan_tasks(SimulateConfig(out=tmp_path, train=100, test=33, positive_share=share))
    assert sum(task.target for task in tasks if task.split == "train") == train
    assert sum(task.target for task in tasks if task.split == "test") == test


def test_the_truth_agrees_with_the_labels_and_tells_of_needles_only_where_there_are_some(data_set: Path) -> None:
    truth = read_rows(data_set / "truth.csv")
    assert [row["id"] for row in truth] == sorted(row["id"] for row in truth)
    labels = {row["id"]: row["target"] for row in read_rows(data_set / "train_labels.csv")}
    assert {row["id"]: row["target"] for row in truth if row["split"] == "train"} == labels
    assert {row["id"] for row in truth if row["split"] == "test"} == {
        row["id"] for row in read_rows(data_set / "sample_submission.csv")
    }
    for row in truth:
        needle = [row[name] for name in ("kind", "snr", "drift_rate_hz_s", "width_hz", "panels", "start_channel")]
        if row["target"] == "1":
            assert row["kind"] in KINDS and all(needle)
            assert set(map(int, row["panels"].split(";"))) <= set(ON_POSITIONS)
            assert 100 <= float(row["snr"]) <= 800
        else:
            assert not any(needle)


def test_needles_are_in_on_panels_only_and_interference_never_is() -> None:
    rng = np.random.default_rng(0)
    needles = [draw_needle_panels(rng) for _ in range(2000)]
    assert all(panels and set(panels) <= set(ON_POSITIONS) for panels in needles)
    assert 0.65 < np.mean([len(panels) == 3 for panels in needles]) < 0.75
    for name, panels in [draw_interference_panels(rng) for _ in range(2000)]:
        assert set(panels) & set(OFF_POSITIONS), name
        assert len(set(panels)) == len(panels)


def test_a_twin_differs_from_its_original_only_in_the_needle_which_is_in_off_panels(tmp_path: Path) -> None:
    config = SimulateConfig(out=tmp_path, train=20, test=20, positive_share=1)
    for task in plan_tasks(config):
        (original, row), (twin, about) = (draw_cadence(config, task, twin=twin) for twin in (False, True))
        background = np.minimum(original, twin)  # signals only add power, and the two never to the same panel
        needle, moved = original - background, twin - background
        panels = [int(panel) for panel in row["panels"].split(";")]
        assert np.flatnonzero(needle.any(axis=(1, 2))).tolist() == panels
        assert np.flatnonzero(moved.any(axis=(1, 2))).tolist() == [panel + 1 for panel in panels]
        brightest = [part.max(axis=(1, 2))[part.any(axis=(1, 2))] for part in (needle, moved)]
        np.testing.assert_allclose(*brightest, rtol=0.5)
        assert (about["target"], "panels" in about) == (0, False)
        assert "narrowband_off" in about["interference"]


def path_excess(snippet: npt.NDArray[np.float16], row: dict[str, str]) -> float:
    """Mean on a straight needle's path less that of the channels beside it, in its panels less in the OFF panels."""
    rate = float(row["drift_rate_hz_s"]) * TIME_BIN_SECONDS / CHANNEL_WIDTH_HZ  # channels a time bin
    time_bins, panel_bins = np.arange(6 * 273), 273
    channels = np.rint(float(row["start_channel"]) + rate * time_bins).astype(int)
    inside = (channels >= 8) & (channels < 248)
    power = snippet.reshape(-1, 256).astype(np.float64)
    rows, centers = time_bins[inside], channels[inside]
    beside = np.median([power[rows, centers + k] for k in (-8, -7, -6, 6, 7, 8)], axis=0)
    excess = power[rows, centers] - beside
    lit = np.isin(rows // panel_bins, [int(panel) for panel in row["panels"].split(";")])
    off = np.isin(rows // panel_bins, OFF_POSITIONS)
    return float(excess[lit].mean() - (excess[off].mean() if off.any() else 0))


def test_a_needle_is_brighter_on_its_path_in_its_panels_than_in_off_panels(tmp_path: Path) -> None:
    config = SimulateConfig(out=tmp_path, train=80, test=1, positive_share=1, snr_min=200, snr_max=400)
    simulated = [simulate_cadence(config, task) for task in plan_tasks(config)]
    excess = [path_excess(snippet, row) for snippet, row in simulated if row["kind"] in ("straight", "broadened")]
    assert len(excess) > 20
    assert np.mean(np.array(excess) > 0.2) > 0.85


# With 7 time bins summed, a needle stands out more from the noise.
@pytest.mark.parametrize(("snr_max", "binnings"), [(800.0, (1, 7)), (2000.0, (1,))])
def test_trivial_statistics_of_on_less_off_hardly_tell_needles_apart(
    snr_max: float, binnings: tuple[int, ...], tmp_path: Path
) -> None:
    config = SimulateConfig(out=tmp_path, train=240, test=1, positive_share=0.5, snr_min=snr_max / 8, snr_max=snr_max)
    scores: dict[int, list[list[float]]] = {binned: [] for binned in binnings}
    targets = []
    for task in plan_tasks(config)[:240]:
        snippet = simulate_cadence(config, task)[0].astype(np.float32)
        targets.append(task.target)
        for binned in binnings:
            panels = snippet.reshape(6, -1, binned, 256).mean(axis=2)
            on, off = panels[list(ON_POSITIONS)], panels[list(OFF_POSITIONS)]
            scores[binned].append([statistic(on) - statistic(off) for statistic in (np.mean, np.max, np.var)])
    for binned in binnings:
        for name, score in zip(("mean", "maximum", "variance"), np.array(scores[binned]).T, strict=True):
            auc = roc_auc_score(targets, score)
            assert max(auc, 1 - auc) <= 0.75, (binned, name)


def test_the_train_split_lacks_what_it_is_told_to_and_the_test_split_stays_the_same(
    data_set: Path, tmp_path: Path
) -> None:
    config = SimulateConfig(
        out=tmp_path, train=60, test=3, seed=3, positive_share=SHARE, train_kinds=("pulsed",), train_without=("bands",)
    )
    rows = [simulate_cadence(config, task)[1] for task in plan_tasks(config)[:60]]
    assert {row["kind"] for row in rows if row["target"]} == {"pulsed"}
    broad = {name for row in rows for name in row["interference"].split(";")}
    assert "bands" not in broad and {"lines", "bursts"} <= broad
    plain = small_config(data_set)
    for task in plan_tasks(plain)[-3:]:
        assert np.array_equal(simulate_cadence(config, task)[0], np.load(task.path(data_set)))


def test_a_finished_data_set_is_never_written_over(data_set: Path) -> None:
    before = file_bytes(data_set)
    with pytest.raises(InputError, match="already holds a data set"):
        simulate(small_config(data_set))
    assert file_bytes(data_set) == before


def test_an_interrupted_simulation_goes_on_to_the_same_bytes(data_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    shutil.copytree(data_set, out)
    for name in ("truth.csv", "train_labels.csv", "sample_submission.csv"):
        (out / name).unlink()
    paths = sorted(out.rglob("*.npy"))
    paths[0].unlink()
    paths[1].write_bytes(b"cut short")
    simulate(small_config(out))
    assert file_bytes(out) == file_bytes(data_set)


@pytest.mark.parametrize("name", ["notes.txt", "train/0/0123456789abcde.npy", "truth.csv/part"])
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=re.escape(f"--out {tmp_path}: holds {name}")):
        simulate(small_config(tmp_path))
    assert file_bytes(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--train", {"train": 0}),
        ("--test", {"test": -1}),
        ("--seed", {"seed": -1}),
        ("--workers", {"workers": 0}),
        ("--positive-share", {"positive_share": 1.5}),
        ("--positive-share", {"positive_share": float("nan")}),
        ("--snr-min", {"snr_min": 0.0}),
        ("--snr-max", {"snr_min": 50.0, "snr_max": 40.0}),
        ("--snr-max", {"snr_max": float("inf")}),
        ("--train-kinds:", {"train_kinds": ()}),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_the_name_of_its_flag(
    flag: str, values: dict[str, float], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"^{flag} "):
        SimulateConfig(out=tmp_path, **values)  # type: ignore[arg-type]
