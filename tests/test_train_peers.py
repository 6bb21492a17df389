"""train_bench compares equal work: every loop trains on the same cadences, and predicts what ours predicts.

Axes: P positions, t time bins before summing; N planes, T time bins, F frequency channels; B batch; C, H, W canvas.
"""

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import train_bench
from benchmarks.history_tables import other_tables
from benchmarks.loops.contest import Contest, difference, training_fault
from benchmarks.loops.feed import Job
from benchmarks.loops.our_loop import open_loader
from benchmarks.loops.rows import Row, loop_figures, table
from benchmarks.loops.spec import BY_NAME, LOOPS, Loop, LoopSpec, Turn
from benchmarks.loops.torch_canvas import TorchCanvas
from benchmarks.rates import What
from benchmarks.train_bench_config import TrainBenchConfig, make_shards, name_of, train_config
from pipeline.augment import DrawConfig
from pipeline.canvas import CanvasConfig
from pipeline.cpu_canvas import CpuCanvas, make_views
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from tests.tiny import CANVAS, SHAPE, tiny_config
from training.presets import PRESETS

CADENCES = 32
STILL = DrawConfig(flip_frequency=0, flip_time=0, roll_frequency=0, shift_time=0, erase=0, gain=0, offset=0, cutmix=0)
CANVASES = [preset.canvas for preset in PRESETS.values()] + [CANVAS]
each_loop = pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peers")


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return train_bench.make_shards(folder, CADENCES, shape=SHAPE)


def spec_of(manifest: Manifest, what: What) -> LoopSpec:
    root = Path(manifest.root)
    plan = tiny_config(root, root.parent / "unused", ema=0.9)
    return LoopSpec(what, plan, root.parent / "data", workers=1, device="cpu")


def job_of(loop: Loop, spec: LoopSpec) -> tuple[Any, Job]:
    for package in loop.packages:
        pytest.importorskip(package)
    return import_module(f"benchmarks.loops.{loop.module}"), Job(spec, loop.feed, loop.workers(spec.workers))


@pytest.fixture(scope="module")
def our_logits(manifest: Manifest) -> Any:
    module, job = job_of(BY_NAME["ours"], spec_of(manifest, "infer"))
    return module.predictor(job)()


@each_loop
def test_every_loop_trains_on_every_cadence_in_our_shape_with_a_finite_loss(loop: Loop, manifest: Manifest) -> None:
    module, job = job_of(loop, spec_of(manifest, "train"))
    turns = [Turn(), Turn()]
    module.train(job, iter(turns))
    for turn in turns:
        assert (turn.cadences, turn.shape) == (CADENCES, (8, CANVAS.channels, CANVAS.height, CANVAS.width))
        assert 0 < turn.loss < 10
    assert turns[0].loss != turns[1].loss


@each_loop
def test_every_loop_predicts_our_logits_in_our_order(loop: Loop, manifest: Manifest, our_logits: Any) -> None:
    module, job = job_of(loop, spec_of(manifest, "infer"))
    predict = module.predictor(job)
    for _ in range(2):
        logits = predict()
        np.testing.assert_allclose(logits, our_logits[: len(logits)], atol=2e-3)
    assert len(logits) == (8 if loop.feed == "held" else CADENCES) and logits.std() > 0.01


def test_our_kernels_give_a_peer_exactly_our_images(manifest: Manifest) -> None:
    spec = spec_of(manifest, "infer")
    with open_loader(Job(spec, "shards", 0)) as loader:
        ours = torch.cat([batch.image.clone() for batch in loader])
    theirs = torch.cat([images for images, _ in Job(spec, "kernels", 0).build_loader()])
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


@pytest.mark.parametrize("canvas", CANVASES, ids=lambda canvas: f"{canvas.layout}-{canvas.height}")
def test_torchs_canvas_is_ours_but_for_the_outermost_pixels(canvas: CanvasConfig) -> None:
    snippet = np.random.default_rng(0).standard_normal((6, 42, 256)).astype(np.float16)
    kernels, torchs = CpuCanvas(canvas, snippet.shape), TorchCanvas(canvas, STILL)
    image = np.empty(kernels.image_shape, np.float32)
    kernels.write_eval_image(snippet, image)
    views = np.empty((len(canvas.views), *image.shape), np.float32)
    make_views(image, canvas.views, views)
    planes = torchs.planes(torch.from_numpy(snippet))
    found = torchs.views(torchs.image(torchs.augmented(planes)), canvas.views).numpy()
    assert found.shape == views.shape
    # At the edge a resize that enlarges affects more pixels than one that reduces.
    np.testing.assert_allclose(found[..., 4:-4, 4:-4], views[..., 4:-4, 4:-4], atol=2e-4)


def augmented(changes: dict[str, float], planes: torch.Tensor) -> torch.Tensor:
    return TorchCanvas(CANVAS, dataclasses.replace(STILL, **changes)).augmented(planes)  # type: ignore[arg-type]


def test_torchs_augmentations_do_what_the_draws_ask_for() -> None:
    torch.manual_seed(0)
    planes = torch.randn(6, 20, 30)
    assert torch.equal(augmented({}, planes), planes)
    assert torch.equal(augmented({"flip_frequency": 1}, planes), planes.flip(2))
    # Each stack is reversed as a whole: ON panels stay ON.
    assert torch.equal(augmented({"flip_time": 1}, planes), planes[[2, 1, 0, 5, 4, 3]].flip(1))
    rolled = [augmented({"roll_frequency": 0.1}, planes) for _ in range(30)]
    amounts = [next(k for k in range(-3, 4) if torch.equal(each, planes.roll(k, 2))) for each in rolled]
    assert set(amounts) == set(range(-3, 4))
    shifted = torch.cat([augmented({"shift_time": 0.1}, planes)[None] for _ in range(30)])
    for bins in (-2, 2):
        moved = planes.roll(-bins, 1)
        gap = slice(-bins, None) if bins > 0 else slice(None, -bins)
        moved[:, gap] = 0
        assert any(torch.equal(each, moved) for each in shifted)
    brighter = augmented({"gain": 0.5, "offset": 0.5}, planes)
    gain = (brighter[0, 0, 1] - brighter[0, 0, 0]) / (planes[0, 0, 1] - planes[0, 0, 0])
    assert 0.5 < gain < 1.5 and torch.allclose(brighter - gain * planes, (brighter - gain * planes).mean(), atol=1e-5)
    erased = augmented({"erase": 1, "erase_size": 0.25}, planes) != planes
    assert 0 < erased.sum() <= 6 * 8 and erased.flatten(1).any(1).sum() == 1


def test_cutmix_of_torchs_canvas_weighs_targets_by_the_pixels_that_are_kept() -> None:
    torch.manual_seed(1)
    canvas = TorchCanvas(CANVAS, dataclasses.replace(STILL, cutmix=1.0))
    for _ in range(5):
        images, targets = (
            torch.arange(4.0)[:, None, None, None].expand(4, 2, 20, 30).clone(),
            torch.tensor([1.0, 0, 0, 0]),
        )
        mixed, weights = canvas.mixed(images, targets)
        kept = [float((mixed[number] == number).float().mean()) for number in range(4)]
        assert weights.tolist() == pytest.approx([kept[0], 0, 0, 1 - kept[3]])
    unmixed = TorchCanvas(CANVAS, STILL).mixed(images, targets)
    assert unmixed[0] is images and unmixed[1] is targets


def test_the_process_of_a_loop_is_told_the_whole_plan(manifest: Manifest) -> None:
    """All but the store, which is a local folder here."""
    spec = spec_of(manifest, "train")
    for plan in (spec.plan, *PRESETS.values()):
        changed = dataclasses.replace(spec, plan=plan)
        told = LoopSpec.from_json(changed.to_json())
        assert dataclasses.asdict(told) == dataclasses.asdict(changed)


@pytest.fixture(scope="module")
def rows(manifest: Manifest) -> list[Row]:
    """Rows of a loop that works, of one that finds no files, and of one whose package is missing."""
    absent = dataclasses.replace(BY_NAME["timm-kernels"], packages=("no-such-package",))
    loops, steps = [BY_NAME["ours"], BY_NAME["accelerate-main"], absent], []
    spec = dataclasses.replace(spec_of(manifest, "infer"), files=Path("nowhere"))
    with Contest(loops, spec, CADENCES, steps.append) as contest:
        contest.check()
        for number in range(2):
            contest.play(number)
    names = [loop.name for loop in loops]
    assert steps == [*names, *names, *names[::-1]]
    return contest.rows


def test_a_loop_that_fails_says_why_and_the_others_are_timed(rows: list[Row]) -> None:
    ours, fails, absent = rows
    assert len(ours.rates) == len(ours.cpu_ms) == 2 and min(ours.rates + ours.cpu_ms) > 0 and not ours.failed
    assert fails.failed.startswith("failed: FileNotFoundError") and not fails.rates
    assert absent.failed == "not installed: no-such-package"


def test_figures_and_table_show_every_loop_and_what_it_does_otherwise(rows: list[Row]) -> None:
    rows = [*rows, Row(BY_NAME["accelerate-kernels-main"], rates=[9_876.5, 12_345.6], cpu_ms=[1_234.5, 1_234.5])]
    figures = loop_figures(rows, 16, workload="train peers", preset="demo")
    assert [figure["loop"] for figure in figures] == [row.loop.name for row in rows]
    assert figures[0]["ours_times"] == 1 and figures[3]["ours_times"] == pytest.approx(rows[0].rate / rows[3].rate)
    assert ["failed" in figure for figure in figures] == [False, True, True, False]
    assert figures[2]["workers"] == 16 and figures[1]["workers"] == figures[0]["workers"] == 0
    lines = table(figures).splitlines()
    assert max(map(len, lines)) <= 80 and "not installed: no-such-package" in lines[3]
    assert [line.split(":")[0] for line in lines if ": " in line[:12]] == ["all others", "accelerate", "timm"]


def test_the_report_keeps_the_last_peers_of_each_model(rows: list[Row]) -> None:
    base = {"benchmark": "train", "time": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef", "versions": {}}
    base |= {"machine": {"cpu": "A CPU", "cores": 2}, "config": {}}
    entries = [
        {**base, "figures": loop_figures(rows[:count], 2, workload="infer peers", preset=preset)}
        for preset, count in (("demo", 1), ("demo", 3), ("seed, swin_nano", 1))
    ]
    assert [[row[:2] for row in table.rows] for table in other_tables(entries)] == [
        [["demo", "ours"], ["demo", "accelerate-main"], ["demo", "timm-kernels"]], [["seed, swin_nano", "ours"]]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({"cadences": 25}, ""),
        ({"cadences": 24}, "an epoch of 24 cadences, expected 32"),
        ({"cadences": 40}, "an epoch of 40 cadences, expected 32"),
        ({"loss": float("nan")}, "its loss is nan"),
        ({"shape": [8, 2, 28, 55]}, "images of shape"),
    ],
)
def test_an_epoch_of_other_cadences_or_images_is_not_timed(changed: dict[str, Any], reason: str) -> None:
    answer = {"cadences": CADENCES, "loss": 0.7, "shape": [8, 2, 28, 56], **changed}
    found = training_fault(tiny_config(Path("shards"), Path("run")), CADENCES, answer)
    assert found.startswith(reason) and bool(found) == bool(reason)


def test_logits_of_another_model_or_order_are_not_timed() -> None:
    logits = np.random.default_rng(0).standard_normal(100)
    few = np.where(np.arange(100) < 4, logits + 1, logits + 1e-3)
    assert difference(logits, logits) == difference(few, logits) == ""
    assert difference(logits[::-1], logits) and "shape" in difference(logits[:-1], logits)
    assert "not finite" in difference(np.where(np.arange(100) < 1, np.nan, logits), logits)


def test_train_bench_prints_and_records_the_peers_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recorded: list[Any] = []
    monkeypatch.setattr(train_bench, "record", lambda *entry: recorded.append(entry))
    monkeypatch.setattr(train_bench, "make_shards", lambda *made: make_shards(*made, shape=SHAPE))
    monkeypatch.setattr(train_bench, "train_config", lambda _, __, shards, **changes: tiny_config(shards, tmp_path))
    config = TrainBenchConfig(peers=("accelerate-main",), cadences=CADENCES, rounds=1, workers=1, work_dir=tmp_path)
    assert train_bench.main(config) == 0
    (_, _, alone), (name, _, figures) = recorded
    assert len(alone) == 4 and name == "train"
    assert [figure["loop"] for figure in figures] == ["ours", "accelerate-main", "held"]
    assert all(figure["workload"] == "train peers" and figure["cadences_per_s"] > 0 for figure in figures)
    assert "\naccelerate-main" in capsys.readouterr().out


def test_peers_that_cannot_be_measured_are_refused() -> None:
    with pytest.raises(InputError, match="--peers keras: expected all, none, or some of ours, timm"):
        TrainBenchConfig(peers=("keras",))
    with pytest.raises(InputError, match="leave --shards out"):
        TrainBenchConfig(peers=("all",), shards=Path("shards"))
    assert not TrainBenchConfig(shards=Path("shards")).loops
    assert TrainBenchConfig(peers=("all",)).loops == list(LOOPS)
    assert [loop.name for loop in TrainBenchConfig(peers=("timm",)).loops] == ["ours", "timm", "held"]


def test_another_model_than_the_presets_is_named_beside_it() -> None:
    config = TrainBenchConfig(model="swin_nano")
    plans = [train_config(each, "seed", Path("shards")) for each in (config, TrainBenchConfig())]
    assert [name_of(plan) for plan in plans] == ["seed, swin_nano", "seed"]
    assert train_config(config, "seed", Path("shards"), batch_size=3).batch_size == 3
    assert plans[0].canvas == plans[1].canvas and plans[0].model.pretrained == plans[1].model.pretrained == "none"
