"""Compare every graph and the CPU kernels with their NumPy twin, at full size, on real and simulated snippets."""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline import dali_graph
from pipeline.augment import DrawConfig, Draws, draw
from pipeline.canvas import CanvasConfig, Layout
from pipeline.dali_graph import GraphPlace, build_eval_graph, build_train_graph, train_inputs
from pipeline.randomness import EpochPart
from shard_tools.cadence import KAGGLE_SHAPE
from shard_tools.simulate import SimulateConfig, plan_tasks, simulate_cadence
from tests import twin

SAMPLES = 6
TOLERANCE = 1e-3
WILD = DrawConfig(
    roll_frequency=0.5, shift_time=0.3, erase=0.8, gain=0.5, offset=1.0, cutmix=0.8, mixup=0.4, inject=0.7
)
NEEDLES = dataclasses.replace(WILD, inject=0.0, needles=0.6)
MAKERS = ["cpu", "dali", pytest.param("dali on a GPU", marks=pytest.mark.gpu)]
CANVASES = [
    CanvasConfig("stack6", 224, 224, normalise=False),
    CanvasConfig("stack6", 234, 256, sum_time_bins=7),
    CanvasConfig("on", 224, 224),
    CanvasConfig("on", 117, 256, sum_time_bins=7, compress="asinh"),
    CanvasConfig("on_off", 112, 224, sum_time_bins=7, subtract="lines_bursts", compress="asinh"),
    CanvasConfig("on_off", 300, 300, sum_time_bins=3),
    CanvasConfig("panels", 64, 128, sum_time_bins=3, subtract="lines"),
    CanvasConfig("panels", 273, 256, normalise=False, compress="asinh"),
]
Snippets = npt.NDArray[np.float16]


def short_name(canvas: CanvasConfig) -> str:
    return f"{canvas.layout}-{canvas.height}x{canvas.width}-{canvas.sum_time_bins}-{canvas.subtract}-{canvas.compress}"


def run_once(build: Callable[..., object], inputs: tuple[object, ...], *arguments: object) -> npt.NDArray[np.float32]:
    calls = iter([inputs])
    graph = build(lambda: next(calls), *arguments)
    graph.build()  # type: ignore[attr-defined]
    (output,) = graph.run()  # type: ignore[attr-defined]
    return torch.from_dlpack(output.as_tensor()).cpu().numpy().copy()


def place(maker: str) -> GraphPlace:
    return GraphPlace(max_batch=SAMPLES, threads=2, device_id=0 if maker == "dali on a GPU" else None)


def cpu_canvas() -> ModuleType:
    """The CPU kernels' module; skips without Numba, which a machine that runs the tests marked gpu may lack."""
    pytest.importorskip("numba")
    return importlib.import_module("pipeline.cpu_canvas")


def train_images(snippets: Snippets, canvas: CanvasConfig, draws: Draws, maker: str) -> npt.NDArray[np.float32]:
    """Training images (n, C, H, W), made by `maker`."""
    shape = (snippets.shape[1], snippets.shape[2], snippets.shape[3])
    if maker != "cpu":
        config = {0: DrawConfig(), 1: WILD}.get(draws.signal_level.shape[1], NEEDLES)
        return run_once(build_train_graph, (snippets, *as_inputs(draws, config)), canvas, config, shape, place(maker))
    arithmetic = cpu_canvas().CpuCanvas(canvas, shape)
    images = np.empty((SAMPLES, *arithmetic.image_shape), np.float32)
    drawn = cpu_canvas().to_kernel_types(draws)
    for slot in range(0, SAMPLES, 2):
        pair = slice(slot, slot + 2)
        arithmetic.write_train_images(snippets[pair], drawn, (slot, slot + 1), tuple(images[pair]))
    return images


def eval_images(snippets: Snippets, canvas: CanvasConfig, maker: str) -> npt.NDArray[np.float32]:
    """Evaluation images (n, V, C, H, W), made by `maker`."""
    shape = (snippets.shape[1], snippets.shape[2], snippets.shape[3])
    if maker != "cpu":
        return run_once(build_eval_graph, (snippets,), canvas, shape, canvas.views, place(maker))
    arithmetic = cpu_canvas().CpuCanvas(canvas, shape)
    image = np.empty((canvas.channels, canvas.height, canvas.width), np.float32)
    views = np.empty((SAMPLES, len(canvas.views), *image.shape), np.float32)
    for snippet, out in zip(snippets, views, strict=True):
        arithmetic.write_eval_image(snippet, image)
        cpu_canvas().make_views(image, canvas.views, out)
    return views


def draws_for(canvas: CanvasConfig, shape: tuple[int, int, int], config: DrawConfig = WILD, seed: int = 5) -> Draws:
    positions = np.arange(SAMPLES)
    planes = canvas.plane_shape(shape)
    return draw(config, canvas, planes, EpochPart(seed, 3, positions, SAMPLES))


def as_inputs(draws: Draws, config: DrawConfig) -> list[npt.NDArray[np.generic]]:
    return [
        values.astype(np.int32) if name == "partner" else values
        for name in train_inputs(config)
        for values in [getattr(draws, name)]
    ]


def check_training(snippets: Snippets, canvas: CanvasConfig, draws: Draws, maker: str) -> None:
    found = train_images(snippets, canvas, draws, maker)
    planes = [
        twin.augment(twin.to_planes(snippet, canvas, draws, k), canvas, draws, k) for k, snippet in enumerate(snippets)
    ]
    expected = np.stack([twin.resize(each, canvas) for each in twin.mix(np.stack(planes), draws)])
    assert found.shape == (SAMPLES, canvas.channels, canvas.height, canvas.width)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def check_evaluation(snippets: Snippets, canvas: CanvasConfig, maker: str) -> None:
    found = eval_images(snippets, canvas, maker)
    images = [twin.resize(twin.to_planes(snippet, canvas), canvas) for snippet in snippets]
    expected = np.stack([twin.make_views(image, canvas, canvas.views) for image in images])
    assert found.shape == (SAMPLES, len(canvas.views), canvas.channels, canvas.height, canvas.width)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.fixture(scope="module")
def structured() -> Snippets:
    """Snippets in which each panel, time and channel has its own brightness, so that every mix-up shows."""
    panels, time_bins, channels = np.meshgrid(*(np.arange(length) for length in KAGGLE_SHAPE), indexing="ij")
    rng = np.random.default_rng(0)
    shape = (SAMPLES, *KAGGLE_SHAPE)
    ramp = panels * 3 + np.sin(time_bins / 9) + channels / 64
    values = ramp + rng.normal(size=shape) + np.arange(SAMPLES).reshape(-1, 1, 1, 1)
    return values.astype(np.float16)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Snippets:
    pytest.importorskip("setigen")  # a machine that runs the tests marked gpu may lack it
    config = SimulateConfig(tmp_path_factory.mktemp("unused"), train=SAMPLES, positive_share=0.5)
    return np.stack([simulate_cadence(config, task)[0] for task in plan_tasks(config)[:SAMPLES]])


@pytest.fixture(scope="module")
def real(kaggle_seti: Path) -> Snippets:
    files = sorted(kaggle_seti.glob("train/*/*.npy"))[:SAMPLES]
    return np.stack([np.load(file) for file in files])


STEPS = (
    "sum_time_bins",
    "add_signals",
    "subtract_means",
    "normalise",
    "compress",
    "augment",
    "mix",
    "resize",
    "make_views",
)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_has_the_same_name_in_both_engines_and_in_the_twin(step: str) -> None:
    kernels = cpu_canvas().kernels
    if step == "resize":  # the CPU does it in two halves, so that it never makes the larger image
        assert hasattr(kernels, "_resize_rows") and hasattr(kernels, "_resize_columns")
    else:
        assert hasattr(kernels, f"_{step}") or hasattr(cpu_canvas(), step)
    assert hasattr(dali_graph, f"_{step}") and hasattr(twin, step)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("canvas", CANVASES, ids=short_name)
@pytest.mark.parametrize("config", [WILD, NEEDLES], ids=["inject", "needles"])
def test_training_images_equal_the_twins(
    structured: Snippets, canvas: CanvasConfig, config: DrawConfig, maker: str
) -> None:
    draws = draws_for(canvas, KAGGLE_SHAPE, config, seed=6)
    if config is NEEDLES:  # both profiles occur, and as many signals as there can be
        is_there = draws.signal_level.max(axis=(2, 3)) > 0
        assert (draws.signal_lorentzian & is_there).any() and is_there.all(axis=1).any()
    check_training(structured, canvas, draws, maker)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("canvas", CANVASES, ids=short_name)
def test_evaluation_images_equal_the_twins(structured: Snippets, canvas: CanvasConfig, maker: str) -> None:
    check_evaluation(structured, canvas, maker)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("canvas", CANVASES[::3], ids=short_name)
def test_images_equal_the_twins_on_simulated_snippets(simulated: Snippets, canvas: CanvasConfig, maker: str) -> None:
    for config in (WILD, NEEDLES):
        check_training(simulated, canvas, draws_for(canvas, KAGGLE_SHAPE, config, seed=6), maker)
    check_evaluation(simulated, canvas, maker)


@pytest.mark.kaggle
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("canvas", CANVASES[::3], ids=short_name)
def test_images_equal_the_twins_on_real_snippets(real: Snippets, canvas: CanvasConfig, maker: str) -> None:
    check_training(real, canvas, draws_for(canvas, KAGGLE_SHAPE, seed=7), maker)
    check_evaluation(real, canvas, maker)


@pytest.mark.parametrize(("old", "new"), [(1638, 224), (256, 224), (56, 224), (63, 56), (7, 9)])
def test_inside_its_edges_the_resize_is_torchs_antialiased_one(old: int, new: int) -> None:
    columns = torch.eye(old).reshape(1, 1, old, old)
    theirs = torch.nn.functional.interpolate(columns, (new, old), mode="bilinear", antialias=True)
    first, weight = cpu_canvas().resize_weights(old, new)
    matrix = np.zeros((new, old + len(weight)), np.float32)
    np.put_along_axis(matrix, first[:, None] + np.arange(len(weight)), weight.T, axis=1)
    inside = slice(1, -1)  # at the edge torch cuts the filter's triangle off, and DALI repeats the edge pixels
    np.testing.assert_allclose(matrix[inside, :old], theirs[0, 0].numpy()[inside], atol=1e-4)


@pytest.mark.parametrize("maker", ["cpu", "dali"])
@pytest.mark.parametrize("box", ["box", "band"])
def test_the_weight_of_a_mixed_sample_is_the_share_of_pixels_it_kept(
    structured: Snippets, box: str, maker: str
) -> None:
    canvas = CanvasConfig("on_off", 3 * 39, 256, sum_time_bins=7, normalise=False)
    quiet = {"flip_frequency": 0, "flip_time": 0, "roll_frequency": 0, "shift_time": 0, "gain": 0, "offset": 0}
    config = DrawConfig(**quiet, erase=0, cutmix=1, cutmix_box=box)  # type: ignore[arg-type]
    draws = draws_for(canvas, KAGGLE_SHAPE, config)
    marked = np.ones_like(structured) * np.arange(SAMPLES, dtype=np.float16).reshape(-1, 1, 1, 1)
    images = train_images(marked, canvas, draws, maker)
    own = np.isclose(images, np.arange(SAMPLES).reshape(-1, 1, 1, 1) * np.sqrt(7))
    np.testing.assert_allclose(own.mean(axis=(1, 2, 3)), draws.kept, atol=1e-9)
    assert (draws.kept < 1).any()


@pytest.mark.parametrize("maker", ["cpu", "dali"])
@pytest.mark.parametrize("layout", ["stack6", "on", "on_off", "panels"])
def test_no_flip_moves_an_on_panel_into_an_off_slot(layout: Layout, maker: str) -> None:
    """ON panels are filled with 1 and OFF panels with 0: every view and every draw has to keep them in their places."""
    canvas = CanvasConfig(layout, 6 * 39 if layout == "stack6" else 39 * 3, 256, sum_time_bins=7, normalise=False)
    if layout == "panels":
        canvas = CanvasConfig(layout, 39, 256, sum_time_bins=7, normalise=False)
    marked = np.zeros((SAMPLES, *KAGGLE_SHAPE), np.float16)
    marked[:, [0, 2, 4]] = 1
    views = eval_images(marked, canvas, maker)
    assert (views == views[:, :1]).all()
    config = DrawConfig(flip_frequency=1, flip_time=1, erase=0, gain=0, offset=0, shift_time=0, cutmix=1)
    trained = train_images(marked, canvas, draws_for(canvas, KAGGLE_SHAPE, config), maker)
    np.testing.assert_allclose(trained, views[:, 0], atol=1e-6)
