"""Images on a GPU: DALI graphs with snippets and draws in, images out; one for training, one for evaluation and TTA.

These are the steps of pipeline/cpu_kernels.py, under the same names, for a whole batch at once.

Axes: N planes, T time bins (t before summing), F frequency channels; C, H, W channels, height, width of the canvas;
V views. Shapes are of one sample. Nothing here is random: every draw comes in as a tensor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline

from pipeline.augment import DrawConfig
from pipeline.canvas import NORMALISE_EPSILON, CanvasConfig
from pipeline.signals import LORENTZIAN_END, NEIGHBOUR_ROOT
from shard_tools.cadence import OFF_POSITIONS, ON_POSITIONS

PREFETCH_DEPTH = 2
DRAW_INPUTS = (
    "flip_frequency", "flip_time", "roll", "shift", "gain", "offset", "erase_start", "erase_shape", "cutmix_box",
    "mixed", "partner",
)  # fmt: skip
SIGNAL_INPUTS = ("signal_path", "signal_level", "signal_width")  # where signals are added
PROFILE_INPUTS = ("signal_lorentzian",)  # where their profiles differ

Feed = Callable[[], Sequence[Any]]


@dataclass(frozen=True)
class GraphPlace:
    """Where a graph runs."""

    max_batch: int
    threads: int
    device_id: int | None
    """None for the CPU."""

    @property
    def on_gpu(self) -> bool:
        """Whether the canvases are made on a GPU."""
        return self.device_id is not None

    def pipeline_def(self, graph: Callable[[], Any]) -> Pipeline:
        """Build the pipeline of a graph function."""
        build = pipeline_def(
            graph,
            batch_size=self.max_batch,
            num_threads=self.threads,
            device_id=self.device_id,
            prefetch_queue_depth=PREFETCH_DEPTH,
        )
        pipeline: Pipeline = build()
        return pipeline


def train_inputs(draws: DrawConfig) -> tuple[str, ...]:
    """What the training graph takes besides the snippets, in order: fields of Draws, with partners as slots."""
    return (*DRAW_INPUTS, *_signal_inputs(draws))


def _signal_inputs(draws: DrawConfig) -> tuple[str, ...]:
    if draws.needles is not None:
        return (*SIGNAL_INPUTS, *PROFILE_INPUTS)
    return SIGNAL_INPUTS if draws.inject else ()


def build_train_graph(
    feed: Feed, canvas: CanvasConfig, draws: DrawConfig, shape: tuple[int, int, int], place: GraphPlace
) -> Pipeline:
    """A pipeline from snippets (P, t, F) float16 and `train_inputs` to images (C, H, W) float32, augmented and mixed.

    `feed` returns a batch of each input and raises StopIteration at the end of an epoch. What it returns must not be
    changed until the batch has left the pipeline. `shape` is a snippet's (P, t, F).
    """
    planes_shape, inputs = canvas.plane_shape(shape), train_inputs(draws)

    def graph() -> DataNode:
        data, *values = fn.external_source(source=feed, num_outputs=1 + len(inputs), batch=True, no_copy=True)
        drawn = dict(zip(inputs, values, strict=True))
        panels = _select_panels(data, canvas, shape, place.on_gpu)
        if draws.needles is not None:
            panels = _add_signals(panels, (canvas.planes, shape[1], 1, shape[2]), draws, drawn, place.on_gpu)
            panels = _normalise_where_added(panels, drawn, place.on_gpu)
        planes = _sum_time_bins(panels, canvas, shape)
        if draws.inject:
            count, time_bins, channels = planes_shape
            sizes = (count, time_bins, canvas.sum_time_bins, channels)
            planes = _add_signals(planes, sizes, draws, drawn, place.on_gpu)
        planes = _compress(_normalise(_subtract_means(planes, canvas), canvas), canvas)
        planes = _augment(planes, canvas, planes_shape, drawn, place.on_gpu)
        planes = _mix(planes, planes_shape, drawn, place.on_gpu)
        return _resize(planes, canvas, planes_shape)

    return place.pipeline_def(graph)


def build_eval_graph(
    feed: Feed, canvas: CanvasConfig, shape: tuple[int, int, int], views: Sequence[str], place: GraphPlace
) -> Pipeline:
    """A pipeline from snippets to the `views` of each image, (V, C, H, W) float32; see `build_train_graph`."""

    def graph() -> DataNode:
        (data,) = fn.external_source(source=feed, num_outputs=1, batch=True, no_copy=True)
        planes = _sum_time_bins(_select_panels(data, canvas, shape, place.on_gpu), canvas, shape)
        planes = _compress(_normalise(_subtract_means(planes, canvas), canvas), canvas)
        return _make_views(_resize(planes, canvas, canvas.plane_shape(shape)), canvas, views)

    return place.pipeline_def(graph)


def _select_panels(data: DataNode, canvas: CanvasConfig, shape: tuple[int, int, int], on_gpu: bool) -> DataNode:
    """Snippets (P, t, F) to the panels (N, t, F) float32 of the canvas, in its order."""
    _, raw_bins, channels = shape
    # Cross PCIe as float16 and widen on the device: half the bytes, nothing lost.
    halves = _on(data, on_gpu)
    if canvas.layout != "stack6":
        # Not halves[0::2]: DALI 2.4 gets strided slices of large arrays wrong on the CPU, silently.
        pairs = fn.reshape(halves, shape=[len(ON_POSITIONS), 2, raw_bins, channels])
        on, off = pairs[:, ON_POSITIONS[0]], pairs[:, OFF_POSITIONS[0]]
        halves = on if canvas.layout == "on" else fn.cat(on, off, axis=0)
    return fn.cast(halves, dtype=types.FLOAT)


def _sum_time_bins(values: DataNode, canvas: CanvasConfig, shape: tuple[int, int, int]) -> DataNode:
    """Panels (N, t, F) to planes (N, T, F) of summed time bins; `shape` is a snippet's."""
    count, time_bins, channels = canvas.plane_shape(shape)
    if canvas.sum_time_bins > 1:
        values = fn.reshape(values, shape=[count, time_bins, canvas.sum_time_bins, channels])
        # Divided by the square root, so that white noise keeps its standard deviation.
        values = fn.reductions.sum(values, axes=[2]) * np.float32(canvas.sum_time_bins**-0.5)
    return values


def _add_signals(
    planes: DataNode, sizes: tuple[int, int, int, int], config: DrawConfig, draws: dict[str, DataNode], on_gpu: bool
) -> DataNode:
    """Add signals to planes (N, T, F): profiles along paths, whose peak is their level times the plane's noise.

    `sizes` is N, T, the number of time bins that were summed, and F. The noise is measured by the mean square root of
    the steps between neighbouring channels, which bright lines hardly change.
    """
    steps = math.sqrt(math.abs(planes[:, :, 1:] - planes[:, :, :-1]))
    noise = fn.reductions.mean(steps, axes=[1, 2], keep_dims=True) * np.float32(1 / NEIGHBOUR_ROOT)
    noise = fn.reshape(noise * noise * np.float32(sizes[2] ** -0.5), shape=[sizes[0], 1, 1, 1])
    inputs = [_on(draws[name], on_gpu) for name in _signal_inputs(config)]
    # One signal after the other: S at once would take S times the memory.
    for signal in range(config.most_signals):
        path, level, width, *lorentzian = (values[signal] for values in inputs)
        # For each time bin of the snippet, since the path moves within a summed one: (N, T, t / T, F).
        path, peak = fn.reshape(path, shape=[*sizes[:3], 1]), fn.reshape(level, shape=[*sizes[:3], 1]) * noise
        column = types.Constant(np.arange(sizes[3], dtype=np.float32).reshape(1, 1, 1, -1), device=_device(on_gpu))
        offset = column - path
        profile = _make_profile(offset * offset, peak, width, lorentzian)
        if sizes[2] > 1:
            planes = planes + fn.reductions.sum(profile, axes=[2])
        else:
            planes = planes + fn.reshape(profile, shape=[*sizes[:2], sizes[3]])
    return planes


def _make_profile(square: DataNode, peak: DataNode, width: DataNode, lorentzian: Sequence[DataNode]) -> DataNode:
    """One signal (N, T, t / T, F), from the squared distances to its path, in channels.

    `peak` has one channel, `width` is one number, and `lorentzian`, if given, says whether it is a Lorentzian. Factors
    with one channel are computed first: each step over all channels moves as many bytes as the whole panels.
    """
    narrow = width * width
    if not lorentzian:
        return math.exp(square * (np.float32(-0.5) / narrow)) * peak
    share = fn.cast(lorentzian[0], dtype=types.FLOAT)
    wings = peak * (share * np.float32(1 / (1 - LORENTZIAN_END)))
    wings = math.max((wings * narrow) / (square + narrow) - wings * np.float32(LORENTZIAN_END), np.float32(0))
    return math.exp(square * (np.float32(-0.5) / narrow)) * (peak * (np.float32(1) - share)) + wings


def _normalise_where_added(panels: DataNode, draws: dict[str, DataNode], on_gpu: bool) -> DataNode:
    """Bring the panels (N, t, F) that hold a signal back to mean 0 and standard deviation 1."""
    level = _on(draws["signal_level"], on_gpu)  # (S, N, t)
    brightest = fn.reductions.max(fn.reductions.max(level, axes=[0]), axes=[1])
    is_added = fn.cast(fn.reshape(brightest, shape=[-1, 1, 1]) > np.float32(0), dtype=types.FLOAT)
    mean = fn.reductions.mean(panels, axes=[1, 2], keep_dims=True)
    variance = fn.reductions.variance(panels, mean, axes=[1, 2], keep_dims=True)
    # Elsewhere 0 is subtracted, and the factor is 1.
    factor = is_added * math.rsqrt(variance + np.float32(NORMALISE_EPSILON)) + (np.float32(1) - is_added)
    return (panels - mean * is_added) * factor


def _subtract_means(values: DataNode, canvas: CanvasConfig) -> DataNode:
    """Subtract the background of planes (N, T, F): each channel's mean, then with lines_bursts each time bin's."""
    if canvas.subtract != "none":
        values = values - fn.reductions.mean(values, axes=[0, 1], keep_dims=True)
    if canvas.subtract == "lines_bursts":
        values = values - fn.reductions.mean(values, axes=[2], keep_dims=True)
    return values


def _normalise(values: DataNode, canvas: CanvasConfig) -> DataNode:
    """Bring each plane to mean 0 and standard deviation 1."""
    return fn.normalize(values, axes=[1, 2], epsilon=NORMALISE_EPSILON) if canvas.normalise else values


def _compress(values: DataNode, canvas: CanvasConfig) -> DataNode:
    """Take the asinh of planes."""
    return math.asinh(values) if canvas.compress == "asinh" else values


def _augment(
    planes: DataNode, canvas: CanvasConfig, shape: tuple[int, int, int], draws: dict[str, DataNode], on_gpu: bool
) -> DataNode:
    """Flip, roll, shift, scale and erase planes (N, T, F): all panels alike, except for the erased box."""
    count, time_bins, channels = shape
    in_stack = count // canvas.stacks * time_bins
    stacked = fn.reshape(planes, shape=[canvas.stacks, in_stack, channels], layout="CHW")
    flipped = fn.flip(stacked, horizontal=draws["flip_frequency"], vertical=draws["flip_time"])
    values = fn.reshape(flipped, shape=[count, time_bins, channels])
    values = fn.cat(values[:, :, draws["roll"] :], values[:, :, : draws["roll"]], axis=2)
    values = fn.slice(
        values,
        start=fn.reshape(draws["shift"], shape=[1]),
        shape=[time_bins],
        axes=[1],
        out_of_bounds_policy="pad",
        fill_values=0.0,
    )
    values = values * _on(draws["gain"], on_gpu) + _on(draws["offset"], on_gpu)
    return fn.erase(values, anchor=draws["erase_start"], shape=draws["erase_shape"], axes=[0, 1, 2], fill_value=0.0)


def _mix(planes: DataNode, shape: tuple[int, int, int], draws: dict[str, DataNode], on_gpu: bool) -> DataNode:
    """CutMix or mixup of planes (N, T, F), the same in each panel, so that ON stays ON."""
    _, time_bins, channels = shape
    device = _device(on_gpu)
    row = types.Constant(np.arange(time_bins, dtype=np.int32).reshape(1, -1, 1), device=device)
    column = types.Constant(np.arange(channels, dtype=np.int32).reshape(1, 1, -1), device=device)
    box = _on(draws["cutmix_box"], on_gpu)
    inside = ((row >= box[0]) & (row < box[1])) & ((column >= box[2]) & (column < box[3]))
    taken = fn.cast(inside, dtype=types.FLOAT) + _on(draws["mixed"], on_gpu)  # one of the two is 0
    partner = fn.permute_batch(planes, indices=draws["partner"])
    return planes * (np.float32(1) - taken) + partner * taken


def _resize(planes: DataNode, canvas: CanvasConfig, shape: tuple[int, int, int]) -> DataNode:
    """Stack planes (N, T, F) and resize the stacks to an image (C, H, W)."""
    count, time_bins, channels = shape
    height = count // canvas.channels * time_bins
    image = fn.reshape(planes, shape=[canvas.channels, height, channels], layout="CHW")
    if (height, channels) == (canvas.height, canvas.width):
        return image
    return fn.resize(image, size=[canvas.height, canvas.width], interp_type=types.INTERP_LINEAR, antialias=True)


def _make_views(image: DataNode, canvas: CanvasConfig, views: Sequence[str]) -> DataNode:
    """An image (C, H, W) to its TTA views (V, C, H, W)."""
    return fn.stack(*(_make_view(image, canvas, view) for view in views))


def _make_view(image: DataNode, canvas: CanvasConfig, view: str) -> DataNode:
    """One TTA view of an image (C, H, W)."""
    if view not in canvas.views:
        raise ValueError(f"view {view!r} of canvas {canvas.layout!r}: expected one of {canvas.views}")
    if view == "identity":
        return image
    # Along both axes on which time runs: the channels of a stack (depth), where it has several, and their rows.
    time, frequency = int(view != "flip_frequency"), int(view != "flip_time")
    size = [canvas.height, canvas.width]
    stacked = fn.reshape(image, shape=[canvas.stacks, canvas.channels // canvas.stacks, *size], layout="CDHW")
    flipped = fn.flip(stacked, depthwise=time, vertical=time, horizontal=frequency)
    return fn.reshape(flipped, shape=[canvas.channels, *size], layout="CHW")


def _device(on_gpu: bool) -> str:
    return "gpu" if on_gpu else "cpu"


def _on(value: DataNode, on_gpu: bool) -> DataNode:
    return value.gpu() if on_gpu else value
