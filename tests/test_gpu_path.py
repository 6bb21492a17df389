"""The code path on a GPU, as far as it can be tested without one; and mutants of it, which these tests must catch.

DALI's graphs are checked against its own schemas; train.py and infer.py run on tensors with a device but no values.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from nvidia.dali import Pipeline
from torch import Tensor, nn
from torch._dynamo.utils import counters

import pipeline.dali_graph
import train as train_module
from pipeline.augment import DrawConfig, Draws, draw
from pipeline.canvas import CanvasConfig
from pipeline.dali_graph import GraphPlace
from pipeline.loader import Batch
from pipeline.plan import Share
from pipeline.planner import batch_slots
from pipeline.randomness import EpochPart
from shard_tools.cadence import KAGGLE_SHAPE
from shard_tools.manifest import Manifest
from tests import twin
from tests.dali_schema import faults, moved
from tests.fake_gpu import GPU, FakeLoader, Memory, Watch, fake_batch, fake_run
from tests.test_dali_graph import CANVASES, NEEDLES, WILD, short_name
from tests.tiny import CANVAS, pack_tiny
from training import run as run_module
from training.accelerator import build_accelerator
from training.config import Preset
from training.float32_linear import Float32Linear
from training.prediction import predict_rows
from training.presets import PRESETS
from training.run import Run, build_run
from training.search.lines import Search

ALL_CANVASES = [*(config.canvas for config in PRESETS.values()), *CANVASES]
CPU = torch.device("cpu")
GPU_0 = GraphPlace(max_batch=8, threads=2, device_id=0)
Halves = npt.NDArray[np.float16]


def mutant(module: ModuleType, old: str, new: str) -> ModuleType:
    """A module with one of its lines changed."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, old
    changed = ModuleType(f"{module.__name__}_mutant")
    exec(compile(source.replace(old, new), changed.__name__, "exec"), vars(changed))
    return changed


# ---- DALI's graphs


def graphs_for_a_gpu(graph: ModuleType, canvas: CanvasConfig) -> list[Pipeline]:
    built = [
        graph.build_train_graph(lambda: (), canvas, draws, KAGGLE_SHAPE, GPU_0)
        for draws in (DrawConfig(), WILD, NEEDLES)
    ]
    return [*built, graph.build_eval_graph(lambda: (), canvas, KAGGLE_SHAPE, canvas.views, GPU_0)]


def gpu_faults(graph: ModuleType, canvas: CanvasConfig) -> list[str]:
    try:
        return [fault for built in graphs_for_a_gpu(graph, canvas) for fault in faults(built)]
    except (TypeError, ValueError, RuntimeError) as error:
        return [str(error)]


@pytest.mark.parametrize("canvas", ALL_CANVASES, ids=short_name)
def test_a_gpu_has_every_operator_of_the_graphs_with_the_inputs_it_takes(canvas: CanvasConfig) -> None:
    assert gpu_faults(pipeline.dali_graph, canvas) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("halves = _on(data, on_gpu)", "halves = data"),
        ('box = _on(draws["cutmix_box"], on_gpu)', 'box = draws["cutmix_box"]'),
        ('values[:, :, draws["roll"] :]', 'values[:, :, _on(draws["roll"], on_gpu) :]'),
        ('indices=draws["partner"]', 'indices=_on(draws["partner"], on_gpu)'),
        ('anchor=draws["erase_start"]', 'anchor=_on(draws["erase_start"], on_gpu)'),
        (".reshape(1, -1, 1), device=device)", '.reshape(1, -1, 1), device="cpu")'),
        ("return planes * (", "return fn.zeros_like(planes) + planes * ("),
    ],
)
def test_a_graph_that_only_a_gpu_would_refuse_is_caught(old: str, new: str) -> None:
    assert gpu_faults(mutant(pipeline.dali_graph, old, new), PRESETS["full"].canvas)


def as_inputs(snippets: Halves, draws: Draws, config: DrawConfig) -> tuple[npt.NDArray[Any], ...]:
    return (snippets, *(getattr(draws, name) for name in pipeline.dali_graph.train_inputs(config)))


def images_of_a_batch(
    graph: ModuleType, canvas: CanvasConfig, draws: Draws, snippets: Halves, device_id: int | None
) -> npt.NDArray[np.float32]:
    """Images (n, C, H, W), made by the training graph."""
    inputs = as_inputs(snippets, draws, DrawConfig())
    place = GraphPlace(len(snippets) + 2, 1, device_id)
    built = graph.build_train_graph(lambda: inputs, canvas, DrawConfig(), KAGGLE_SHAPE, place)
    built.build()
    (output,) = built.run()
    return np.array(torch.from_dlpack(output.as_tensor()).cpu())


def draws_with(canvas: CanvasConfig, count: int, rolls: list[int]) -> Draws:
    """The planner's draws for a batch of `count`, with other rolls."""
    planes, positions = canvas.plane_shape(KAGGLE_SHAPE), np.arange(count)
    drawn = draw(DrawConfig(flip_time=0), canvas, planes, EpochPart(1, 0, positions, count))
    _, partner = batch_slots(positions, np.ones(count, bool), count)
    return replace(drawn, partner=partner, roll=np.array(rolls, np.int32))


def roll_faults(graph: ModuleType, canvas: CanvasConfig, rolls: list[int], device_id: int | None = None) -> bool:
    """Whether images with these rolls, one for each sample, differ from the twin's."""
    snippets = np.random.default_rng(2).standard_normal((len(rolls), *KAGGLE_SHAPE)).astype(np.float16)
    draws = draws_with(canvas, len(rolls), rolls)
    planes = [twin.augment(twin.to_planes(each, canvas), canvas, draws, number) for number, each in enumerate(snippets)]
    expected = np.stack([twin.resize(each, canvas) for each in twin.mix(np.stack(planes), draws)])
    try:
        found = images_of_a_batch(graph, canvas, draws, snippets, device_id)
    except RuntimeError:
        return True
    return found.shape != expected.shape or not np.allclose(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("rolls", [[0], [255], [0, 1], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("device_id", [None, pytest.param(0, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("preset", PRESETS)
def test_graphs_take_rolls_of_nothing_and_batches_of_one_sample(
    preset: Preset, device_id: int | None, rolls: list[int]
) -> None:
    assert not roll_faults(pipeline.dali_graph, PRESETS[preset].canvas, rolls, device_id)


@pytest.mark.parametrize(
    ("old", "new", "rolls"),
    [
        ('values[:, :, : draws["roll"]]', 'values[:, :, : math.max(draws["roll"], 1)]', [1, 0]),
        ('indices=draws["partner"]', "indices=[1, 0]", [0]),
    ],
)
def test_a_graph_that_nothing_rolled_or_one_sample_breaks_is_caught(old: str, new: str, rolls: list[int]) -> None:
    assert roll_faults(mutant(pipeline.dali_graph, old, new), PRESETS["demo"].canvas, rolls)


# Bytes that a cadence may move: measured (MB), and that plus a few percent. A GPU that moves 2.5 TB/s makes a batch of
# 64 of `full` in 0.8 ms.
BYTES = {
    ("full", "train"): (30.5, 32e6),
    ("full", "needles"): (141.4, 147e6),
    ("full", "eval"): (22.5, 23.7e6),
    ("seed", "train"): (45.1, 47.5e6),
    ("seed", "eval"): (5.6, 6e6),
    ("demo", "train"): (14.1, 14.9e6),
    ("demo", "eval"): (9.7, 10.3e6),
}


def moved_by(graph: ModuleType, preset: Preset, what: str) -> tuple[float, int]:
    """Bytes that a cadence moves, and bytes of one value of the widest type."""
    config, place = PRESETS[preset], GraphPlace(2, 1, None)
    snippets = np.random.default_rng(3).standard_normal((2, *KAGGLE_SHAPE)).astype(np.float16)
    if what == "eval":
        views = config.model.views(config.canvas.views)
        found = moved(lambda feed: graph.build_eval_graph(feed, config.canvas, KAGGLE_SHAPE, views, place), (snippets,))
        return found.nbytes, found.widest
    planes = config.canvas.plane_shape(KAGGLE_SHAPE)
    drawing = replace(config.draws, needles=0.5) if what == "needles" else config.draws
    draws = draw(drawing, config.canvas, planes, EpochPart(0, 0, np.arange(2), 2))
    draws = replace(draws, partner=np.array([1, 0], np.int32))
    inputs = as_inputs(snippets, draws, drawing)
    found = moved(lambda feed: graph.build_train_graph(feed, config.canvas, drawing, KAGGLE_SHAPE, place), inputs)
    return found.nbytes, found.widest


@pytest.mark.parametrize(("preset", "what"), BYTES)
def test_a_graph_moves_no_more_bytes_than_it_did(preset: Preset, what: str) -> None:
    nbytes, widest = moved_by(pipeline.dali_graph, preset, what)
    assert nbytes < BYTES[preset, what][1] and widest <= 4


@pytest.mark.parametrize(
    ("preset", "old", "new"),
    [
        ("full", "return planes * (", "return planes + 0 * planes * ("),
        ("demo", "fn.cast(inside, dtype=types.FLOAT)", "fn.cast(inside, dtype=types.FLOAT64)"),
    ],
)
def test_a_graph_that_moves_more_is_caught(preset: Preset, old: str, new: str) -> None:
    nbytes, widest = moved_by(mutant(pipeline.dali_graph, old, new), preset, "train")
    assert nbytes >= BYTES[preset, "train"][1] or widest > 4


# ---- The loops


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("path"), train=20, test=2)


class Seen(Exception):  # noqa: N818
    """Ends a prediction before its end, where it waits once for its logits."""


def watched_step(run: Run) -> Watch:
    """Watch a step of train.py."""
    run.bare_model.train()
    losses = torch.zeros((), device=run.accelerator.device, dtype=torch.float64)
    with Watch() as watch:
        losses += train_module.train_step(run, fake_batch(run.config))
    assert losses.device == GPU
    return watch


def watched_prediction(run: Run) -> Watch:
    """Watch a batch of infer.py, in all its views."""
    config = run.config
    batches: Any = [fake_batch(config, len(config.model.views(config.canvas.views)))]

    def stop() -> None:
        raise Seen

    with Watch() as watch, pytest.raises(Seen):
        predict_rows(run.accelerator, run.judged_model, batches, "prediction", stop)
    return watch


def step_faults(run: Run, watched: Callable[[Run], Watch] = watched_step) -> set[str]:
    """What is wrong with a step or a prediction."""
    low = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[run.accelerator.mixed_precision]
    try:
        watch = watched(run)
    except Exception as error:  # tensors without values refuse what would wait or fail on a GPU
        return {f"{type(error).__name__}: {error}"}
    # Heads and the search use float32 in any precision. One search serves both views of a prediction.
    heads = sum(isinstance(each, Float32Linear) for each in run.bare_model.modules())
    searches = sum(isinstance(each, Search) for each in run.bare_model.modules())
    heads = (2 * heads if searches and watched is watched_prediction else heads) + searches
    wide = watch.products[torch.float32] if low != torch.float32 else heads
    dtypes = set() if wide == heads and watch.products[low] > 5 else {f"products in {dict(watch.products)}"}
    state = [*run.bare_model.parameters(), *run.bare_model.buffers(), *run.judged_model.parameters()]
    return watch.faults | dtypes | {f"{each.device} holds weights" for each in state if each.device != GPU}


@pytest.mark.parametrize("precision", ["bf16", "fp16", "float32"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_and_a_prediction_stay_on_their_gpu_and_do_not_wait_for_it(
    manifest: Manifest, preset: Preset, precision: str
) -> None:
    with fake_run(preset, precision, manifest) as run:
        assert step_faults(run) == set()
        assert step_faults(run, watched_prediction) == set()


def change_loss(patch: pytest.MonkeyPatch, loss: Callable[[Tensor, Batch, Share], Tensor]) -> None:
    patch.setattr(train_module, "soft_target_loss", loss)


def target_on_the_cpu(run: Run, patch: pytest.MonkeyPatch) -> None:
    change_loss(patch, lambda logit, batch, share: (logit * torch.zeros(len(logit))).sum())


def number_of_the_loss(run: Run, patch: pytest.MonkeyPatch) -> None:
    change_loss(patch, lambda logit, batch, share: (logit / logit.sum().item()).sum())


def only_what_counts(run: Run, patch: pytest.MonkeyPatch) -> None:
    change_loss(patch, lambda logit, batch, share: logit[batch.counts].sum())


def loss_in_float64(run: Run, patch: pytest.MonkeyPatch) -> None:
    change_loss(patch, lambda logit, batch, share: (logit + batch.image.double().sum()).sum().float())


def no_autocast(run: Run, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run.accelerator, "autocast", contextlib.nullcontext)
    patch.setattr(run.model, "forward", run.model._original_forward)  # Accelerate wraps it too


def buffer_left_behind(run: Run, patch: pytest.MonkeyPatch) -> None:
    buffers = run.bare_model.get_submodule("candidates")._buffers
    patch.setitem(buffers, "panel_turn", torch.empty_like(cast(Tensor, buffers["panel_turn"]), device="cpu"))


def looks_at_logits(run: Run, patch: pytest.MonkeyPatch) -> None:
    both_views = run.judged_model.both_views
    patch.setattr(run.judged_model, "both_views", lambda image: both_views(image).cpu())


STEP_MUTANTS = {
    target_on_the_cpu: "devices",
    number_of_the_loss: "DataDependentOutput",
    only_what_counts: "DynamicOutputShape",
    loss_in_float64: "in float64",
    no_autocast: "products in",
    buffer_left_behind: "devices",
}


def test_a_step_or_a_prediction_that_mixes_devices_or_waits_is_caught(manifest: Manifest) -> None:
    with fake_run("demo", "bf16", manifest) as run:
        for break_it, word in STEP_MUTANTS.items():
            with pytest.MonkeyPatch.context() as patch:
                break_it(run, patch)
                assert word in str(step_faults(run)), break_it.__name__
        assert step_faults(run) == set()
        with pytest.MonkeyPatch.context() as patch:
            looks_at_logits(run, patch)
            assert "on ['cpu', 'cuda:0']" in str(step_faults(run, watched_prediction))


# ---- Memory


# The most bytes that a step's tensors hold at the preset's batch size: measured (GB), and that plus a few percent.
PEAKS = {"full": (7.28, 7.6e9), "demo": (0.231, 0.24e9)}


def peak_bytes(preset: Preset, precision: str, manifest: Manifest, keeps: bool = False) -> int:
    """The peak of two steps on the CPU, where tensors without values have a backward pass; `keeps` layers' outputs."""
    kept: list[Tensor] = []
    with fake_run(preset, precision, manifest, PRESETS[preset].batch_size, CPU, is_whole=True) as run:
        if keeps:
            for module in run.bare_model.modules():
                module.register_forward_hook(lambda _, __, out: kept.append(out) if isinstance(out, Tensor) else None)
        with Memory() as memory:
            for _ in range(2):
                train_module.train_step(run, fake_batch(run.config, device=CPU))
    return memory.peak


@pytest.mark.parametrize("preset", PEAKS)
def test_a_step_holds_no_more_memory_than_it_did(manifest: Manifest, preset: Preset) -> None:
    assert peak_bytes(preset, "bf16", manifest) < PEAKS[preset][1]


# The peak of `demo` is in its search, which uses float32 in any precision.
@pytest.mark.parametrize(("preset", "precision", "keeps"), [("full", "float32", False), ("demo", "bf16", True)])
def test_a_step_that_holds_more_is_caught(manifest: Manifest, preset: Preset, precision: str, keeps: bool) -> None:
    assert peak_bytes(preset, precision, manifest, keeps) >= PEAKS[preset][1]


# ---- --compile


@contextlib.contextmanager
def compiled_run(manifest: Manifest, broken: nn.Module | None = None, preset: Preset = "demo") -> Iterator[Run]:
    """A run with --compile, traced by Dynamo but not compiled; with `broken`, a small model with that broken part."""
    base, compile_module = PRESETS[preset], nn.Module.compile
    model = base.model if preset == "demo" else replace(base.model, model="swin_pico")
    canvas = base.canvas if preset == "demo" else CANVAS
    config = replace(base, shards=str(manifest.root), model=replace(model, pretrained="none"), canvas=canvas,
                     batch_size=2, ema=0.0, compile=True)  # fmt: skip
    torch._dynamo.reset()
    counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda module: compile_module(module, backend="eager"))
        patch.setattr(run_module, "Loader", FakeLoader)
        if broken is not None:
            size = canvas.channels * canvas.height * canvas.width
            small = nn.Sequential(nn.Flatten(), nn.Linear(size, 1), broken)
            patch.setattr(run_module, "build_model", lambda *_: small)
        yield build_run(config, build_accelerator("bf16"), manifest)
    torch._dynamo.reset()


def compile_faults(run: Run) -> list[str]:
    """Graph breaks and recompilations over steps, predictions, and both once more."""
    batch = fake_batch(run.config, device=CPU)
    views = fake_batch(run.config, len(run.config.model.views(run.config.canvas.views)), CPU)
    batch.image.normal_()
    views.image.normal_()
    batch.target.zero_()
    graphs = []
    for _ in range(2):
        run.bare_model.train()
        for _ in range(2):
            train_module.train_step(run, batch)
            graphs.append(counters["stats"]["unique_graphs"])
        evaluated: Any = [views, views]
        predict_rows(run.accelerator, run.judged_model, evaluated, "prediction")
        graphs.append(counters["stats"]["unique_graphs"])
    expected = [graphs[0]] * 2 + [graphs[2]] * 4
    found = [f"graphs after each: {graphs}"] if graphs != expected or graphs[2] > 2 * graphs[0] else []
    return found + [f"break: {reason}" for reason in counters["graph_break"]]


@pytest.mark.parametrize("preset", ["demo", "full"])
def test_a_compiled_model_is_one_graph_and_compiled_once(manifest: Manifest, preset: Preset) -> None:
    with compiled_run(manifest, preset=preset) as run:
        assert compile_faults(run) == []


class LooksAtValues(nn.Module):
    def forward(self, logit: Tensor) -> Tensor:
        return logit if logit.sum().item() < 1e9 else logit * 2


class Counts(nn.Module):
    calls = 0

    def forward(self, logit: Tensor) -> Tensor:
        self.calls += 1
        return logit * self.calls


@pytest.mark.parametrize(("broken", "word"), [(LooksAtValues(), "break"), (Counts(), "graphs after")])
def test_a_model_that_breaks_its_graph_or_is_compiled_again_is_caught(
    manifest: Manifest, broken: nn.Module, word: str
) -> None:
    with compiled_run(manifest, broken) as run:
        assert word in str(compile_faults(run))
