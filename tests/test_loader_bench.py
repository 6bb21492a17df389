"""The loader benchmark compares equal work, hides no failure, and says what was measured."""

import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

from benchmarks import loader_bench
from benchmarks.bench_data import DataConfig, make_data, snippet_paths
from benchmarks.loader_bench import LoaderBenchConfig
from benchmarks.peers import ours
from benchmarks.peers.contest import Contest, difference
from benchmarks.peers.figures import GOALS, Round, Row, missed_goals, ratios, verdict
from benchmarks.peers.kernels import KernelImages
from benchmarks.peers.spec import BY_NAME, CONTESTANTS, Source, Spec, Workload
from benchmarks.peers.table import table
from pipeline.augment import DrawConfig
from shard_tools.errors import InputError

TINY = DataConfig(cadences=64, shape=(6, 40, 232))  # larger than the canvas, as real snippets are
NO_DRAWS = DrawConfig(
    flip_frequency=0, flip_time=0, roll_frequency=0, shift_time=0, erase=0, gain=0, offset=0, cutmix=0
)  # fmt: skip
DEFAULT = [contestant for contestant in CONTESTANTS if contestant.by_default]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "data"
    make_data(folder, TINY)
    return folder


def spec_of(data: Path, workload: Workload) -> Spec:
    return Spec(workload, data, TINY.shape, batch_size=16, threads=2)


@pytest.fixture(scope="module")
def raw_contest(data: Path) -> Iterator[Contest]:
    with Contest(DEFAULT, spec_of(data, "raw"), lambda _: None) as contest:
        contest.compare(at_once=2)
        yield contest


def made_up(name: str, workload: Workload, rate: float, cores: float = 1.0, source: Source = "page-cache") -> Row:
    rounds = [Round(int(10 * rate * factor), 10.0, 10.0 * cores, 0.01) for factor in (1.0, 0.9, 1.1)]
    return Row(BY_NAME[name], workload, source, peak_mb=300.0, rounds=rounds)


def test_every_default_peer_loads_every_cadence_once_and_with_our_bytes(raw_contest: Contest) -> None:
    assert {row.contestant.name: row.failed for row in raw_contest.rows if row.failed} == {}
    assert {"ours", "torch", "torch-workers", "original", "webdataset", "dali"} <= raw_contest.processes.keys()


def test_every_default_peer_makes_our_canvas(data: Path) -> None:
    """In the training workload draws are random, so the canvas without them is compared."""
    with Contest(DEFAULT, spec_of(data, "train"), lambda _: None) as contest:
        contest.compare(at_once=2)
        contest.play(0, 0.0, before=lambda _: None)
    assert {row.contestant.name: row.failed for row in contest.rows if row.failed} == {}
    assert all(
        len(row.rounds) == 1 and row.rounds[0].cadences == TINY.cadences
        for row in contest.rows
        if row.contestant.checked
    )


@pytest.mark.parametrize("workload", ["raw", "tta"])
def test_the_peer_to_copy_for_a_new_one_takes_part_and_only_when_named(data: Path, workload: Workload) -> None:
    name = "plain-loop"
    with Contest([BY_NAME[name]], spec_of(data, workload), lambda _: None) as contest:
        contest.compare(at_once=1)
        contest.play(0, 0.0, before=lambda _: None)
    (row,) = contest.rows
    assert not row.failed and row.rounds[0].cadences == TINY.cadences
    for peers, takes_part in ((("all",), False), (("default",), False), ((name,), True)):
        named = [contestant.name for contestant in LoaderBenchConfig(peers=peers).contestants()]
        assert (name in named) == takes_part


def test_peers_with_our_kernels_take_part_only_where_canvases_are_made_and_are_no_ordinary_peers(data: Path) -> None:
    kernels = [contestant for contestant in CONTESTANTS if contestant.kind == "kernels"]
    assert [contestant.name for contestant in kernels] == ["kernels", "kernels-workers"]
    with Contest(kernels, spec_of(data, "raw"), lambda _: None) as contest:
        assert not contest.rows and not contest.processes
    rows = [made_up("ours", "canvas", 900), made_up("torch", "canvas", 300), made_up("kernels", "canvas", 600)]
    assert ratios(rows, None) == {
        "best peer": (pytest.approx(3.0), "torch"), "best peer with our kernels": (pytest.approx(1.5), "kernels")
    }  # fmt: skip


def test_kernels_of_a_torch_dataloader_make_the_images_of_our_loader(data: Path) -> None:
    """Bit for bit without draws. With draws, each batch has other ones, and targets are mixed like the images."""
    paths, images = snippet_paths(data)[:15], KernelImages(ours.CANVAS, TINY.shape)
    found = images.evaluation_images(paths, ours.CANVAS.views)
    loading = ours.build(spec_of(data, "tta"), 2)
    expected = next(iter(loading.epochs))[1][: len(paths)].clone()
    loading.close()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    targets = (np.arange(len(paths)) % 2).astype(np.int8)
    still, unmixed = images.training_images(paths, targets, NO_DRAWS)
    torch.testing.assert_close(still, expected[:, 0])
    assert unmixed.tolist() == targets.tolist()
    (first, mixed), (second, _) = (images.training_images(paths, targets, ours.DRAWS) for _ in range(2))
    assert not torch.equal(first, second) and first.shape == still.shape
    assert ((mixed[:14] > 0) & (mixed[:14] < 1)).any() and mixed[14] == targets[14]  # the last has no partner


def test_files_that_hold_other_values_are_refused_by_a_peer_with_our_kernels(data: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.zeros(TINY.shape, np.float32))
    with pytest.raises(ValueError, match=r"wide.npy: expected float16 \(6, 40, 232\)"):
        KernelImages(ours.CANVAS, TINY.shape).evaluation_images([tmp_path / "wide.npy"], ("identity",))


@pytest.mark.parametrize("name", ["grain", "grain-workers"])
def test_grain_loads_every_cadence_once_and_makes_our_canvas(data: Path, name: str) -> None:
    pytest.importorskip("grain")
    for workload in ("raw", "train"):
        with Contest([BY_NAME[name]], spec_of(data, workload), lambda _: None) as contest:
            contest.compare(at_once=1)
            contest.play(0, 0.0, before=lambda _: None)
        (row,) = contest.rows
        assert not row.failed and row.rounds[0].cadences == TINY.cadences


def test_a_peer_that_dies_is_shown_as_failed_and_the_others_are_timed(raw_contest: Contest) -> None:
    os.kill(raw_contest.processes["dali"].pid, signal.SIGKILL)
    raw_contest.warm_up()
    for number in range(2):
        raw_contest.play(number, 0.01, before=lambda _: None)
    rows = {row.contestant.name: row for row in raw_contest.rows}
    assert rows.pop("dali").failed == "failed: SIGKILL, most often for lack of memory"
    for row in rows.values():
        assert not row.failed and len(row.rounds) == 2 and row.rate > 0 and row.peak_mb > 0 and row.first_batch_s > 0
    assert "failed: SIGKILL" in table(raw_contest.rows, 2, TINY.cadence_bytes)


def test_a_peer_that_cannot_take_part_says_why(data: Path) -> None:
    absent = replace(BY_NAME["torch"], packages=("no-such-package",))
    with Contest([absent, BY_NAME["dali"]], replace(spec_of(data, "raw"), source="s3"), lambda _: None) as contest:
        assert [row.failed for row in contest.rows] == ["not installed: no-such-package", "no such source: s3"]
        assert not contest.processes


def test_what_is_not_the_reference_is_not_timed() -> None:
    snippet, canvas = np.ones((6, 4, 8), np.float16), np.ones((1, 1, 8, 8), np.float32)
    assert difference({"a": snippet.astype(np.float32)}, {"a": snippet}) == ""
    assert difference({"a": canvas + 1e-5}, {"a": canvas}) == ""
    changed = snippet.copy()
    changed[5, 3, 7] += np.float16(1e-3)
    assert "differs" in difference({"a": changed}, {"a": snippet})
    assert "differs" in difference({"a": canvas + 1e-2}, {"a": canvas})
    assert "differs" in difference({"a": canvas * np.nan}, {"a": canvas})
    assert "other keys" in difference({"b": canvas}, {"a": canvas})
    assert "shape" in difference({"a": canvas[..., :-1]}, {"a": canvas})


def rates(**changed: float) -> list[Row]:
    """Rows that reach every goal, except for the rates that are changed."""
    found = {"raw": 16_000.0, "canvas": 8_000.0, "train": 5_000.0, **changed}
    rows = [made_up("ours", workload, found[workload]) for workload in ("raw", "canvas", "train")]
    for workload in ("raw", "canvas", "train"):
        rows += [made_up("torch-workers", workload, 1_500), made_up("dali", workload, 1_600)]
        rows.append(made_up("memory-copy", workload, 30_000))
    return rows


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"raw": 14_900.0}, ["raw: ours / best peer with workers", "raw: ours / memory copy"]),
        ({"raw": 15_000.0}, []),
        ({"canvas": 6_300.0}, ["canvas: ours / best peer"]),
        ({"train": 4_700.0}, ["train: ours / our canvas"]),
    ],
)
def test_check_fails_below_a_goal(
    changed: dict[str, float],
    missed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    data: Path,
) -> None:
    monkeypatch.setattr(loader_bench, "measure", lambda config, folder: rates(**changed))
    config = LoaderBenchConfig(data=TINY, data_dir=data, batch_size=16, check=True, history=False)
    assert loader_bench.main(config) == int(bool(missed))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("reached", "MISSED"))]
    assert len(lines) == len(GOALS)
    assert [
        line[8:].split(": ours")[0] + ": ours" + line.split(": ours")[1].split(": ")[0]
        for line in lines
        if "MISSED" in line
    ] == missed


def test_a_goal_that_could_not_be_measured_is_missed_and_a_margin_widens_it() -> None:
    rows = [row for row in rates() if row.workload == "raw"]
    without = [row for row in rows if row.contestant.name != "memory-copy"]
    assert not missed_goals({"raw": ratios(rows, None)}, 1.0)[1]
    lines, missed = missed_goals({"raw": ratios(without, None)}, 1.0)
    assert missed and any("memory copy: not measured" in line for line in lines)
    assert missed_goals({"raw": {"best peer with workers": (6.0, "x"), "memory copy": (0.3, "x")}}, 1.0)[1]
    assert not missed_goals({"raw": {"best peer with workers": (2.0, "x"), "memory copy": (0.3, "x")}}, 0.5)[1]
    assert missed_goals({"raw": {"best peer with workers": (1.0, "x"), "memory copy": (0.3, "x")}}, 0.5)[1]


def test_the_verdict_follows_from_what_was_measured() -> None:
    copy = made_up("memory-copy", "raw", 30_000)
    assert verdict([made_up("ours", "raw", 20_000, 1.9), copy], 2).startswith("memory: 67%")
    assert verdict([made_up("ours", "canvas", 5_000, 1.9), copy], 2).startswith("the CPU: 95%")
    assert verdict([made_up("ours", "raw", 500, 0.4, "cold"), copy], 2).startswith("waiting for the disk")
    assert verdict([made_up("ours", "raw", 500, 0.4, "s3"), copy], 2).startswith("waiting for the store")
    assert verdict([made_up("ours", "raw", 20_000, 0.4, "s3"), copy], 2).startswith("waiting for the store")
    assert verdict([replace(made_up("ours", "raw", 500), failed="failed: x"), copy], 2).startswith("none")


def test_figures_are_medians_and_every_line_fits_80_columns() -> None:
    row = made_up("torch-workers", "raw", 1_000, 1.5)
    found = row.figures(2, 838_656)
    assert (found["cadences_per_s"], found["lowest"], found["highest"]) == (1_000, 900, 1_100)
    assert found["cpu_ms"] == pytest.approx(1.5) and found["gb_per_s"] == pytest.approx(0.838656)
    assert (found["workers"], found["loader"]) == (2, "torch-workers")
    long = replace(made_up("dali", "raw", 5), failed="failed: " + "x" * 200)
    rows = [
        made_up("ours", "raw", 123_456, 1.9),
        row,
        long,
        made_up("resident", "raw", 4e7),
        made_up("memory-copy", "raw", 99_999),
    ]
    assert max(map(len, table(rows, 128, 838_656).splitlines())) <= 80


def test_all_cadences_are_different_and_data_made_otherwise_is_refused(data: Path) -> None:
    assert len({path.read_bytes() for path in snippet_paths(data)}) == TINY.cadences
    make_data(data, TINY)
    with pytest.raises(InputError, match="--data-dir"):
        make_data(data, replace(TINY, cadences=128))


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(InputError, match="--peers ffcv"):
        LoaderBenchConfig(peers=("ffcv",))
    with pytest.raises(InputError, match="multiple of 48"):
        LoaderBenchConfig(batch_size=48)
    asked_for = LoaderBenchConfig(peers=("spdl",), quick=True).asked_for
    names = [contestant.name for contestant in asked_for.contestants()]
    assert names == ["ours", "spdl", "memory-copy", "resident"]
    assert (asked_for.data.cadences, asked_for.rounds) == (128, 2)


def test_the_help_of_peers_names_every_peer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(LoaderBenchConfig, args=["--help"], console_outputs=True)
    words = set(re.findall(r"[\w-]+", capsys.readouterr().out.partition("--peers")[2].partition("--source")[0]))
    assert words >= {contestant.name for contestant in CONTESTANTS if contestant.kind in ("peer", "kernels")}
