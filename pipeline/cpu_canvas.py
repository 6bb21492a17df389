"""The arithmetic of the graphs for one sample on one CPU core: values in, canvas out.

It computes what pipeline/graph.py describes for DALI, whose CPU operators widen float16, bend and resize value by
value: here it takes a tenth of the time (docs/performance.md).

Axes: P positions, t time bins before summing, N planes, T time bins, F frequency channels; C, H, W canvas; V views.
"""

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from pipeline import kernels
from pipeline.canvas import NORMALISE_EPSILON, CanvasConfig
from pipeline.draws import Draws, Float32s


class CpuCanvas:
    """The steps from a snippet to its canvas. May be used by many threads at once."""

    def __init__(self, canvas: CanvasConfig, shape: tuple[int, int, int]) -> None:
        """`shape` is a snippet's (P, t, F)."""
        self.canvas, self.planes = canvas, canvas.plane_shape(shape)
        count, time_bins, channels = self.planes
        self._stack = (canvas.channels, count // canvas.channels * time_bins, channels)
        self._rows = resize_weights(self._stack[1], canvas.height)
        self._columns = resize_weights(channels, canvas.width)
        self._scratch = threading.local()

    def to_planes(self, snippet: npt.NDArray[np.float16]) -> Float32s:
        """(P, t, F) to normalised planes (N, T, F), in memory that the thread's next call uses again."""
        canvas, planes = self.canvas, self._buffer("planes")
        bits = snippet.view(np.uint16)
        scale = np.float32(canvas.sum_time_bins**-0.5)  # so that white noise keeps its standard deviation
        for plane, position in zip(planes, canvas.positions, strict=True):
            kernels.widen_and_sum(bits[position], canvas.sum_time_bins, scale, plane)
        if canvas.subtract != "none":
            kernels.subtract_means(planes, canvas.subtract == "lines_bursts")
        if canvas.normalise:
            kernels.normalise(planes, NORMALISE_EPSILON)
        # NumPy's own, which has vectors for it.
        return np.arcsinh(planes, out=planes) if canvas.compress == "asinh" else planes

    def augment(self, planes: Float32s, draws: Draws, slot: int) -> Float32s:
        """Flip, roll, shift, scale and erase planes (N, T, F) as a slot's draws say; leaves `planes` as they are."""
        # ON and OFF stacks reversed each as a whole: the order of panels turns round and no panel changes its slot.
        stacks = 1 if self.canvas.canvas == "on" or not self.canvas.flips_time else 2
        values = np.empty_like(planes)
        kernels.augment(
            planes,
            values,
            stacks,
            bool(draws.flip_frequency[slot]),
            bool(draws.flip_time[slot]),
            int(draws.roll[slot]),
            int(draws.shift[slot]),
            draws.gain[slot],
            draws.offset[slot],
        )
        start, extent = draws.erase_start[slot].astype(int), draws.erase_shape[slot].astype(int)
        values[tuple(slice(first, first + length) for first, length in zip(start, extent, strict=True))] = 0
        return values

    def write_canvas(self, planes: Float32s, image: Float32s) -> None:
        """Planes (N, T, F) into an image (C, H, W), resized by antialiased bilinear interpolation."""
        stack = planes.reshape(self._stack)
        if stack.shape == image.shape:
            image[:] = stack
        else:
            kernels.resize(stack, self._rows, self._columns, image)

    def _buffer(self, name: str) -> Float32s:
        """A thread's memory for planes (N, T, F): fresh memory would cost more than what is done in it."""
        if not hasattr(self._scratch, name):
            setattr(self._scratch, name, np.zeros(self.planes, np.float32))
        buffer: Float32s = getattr(self._scratch, name)
        return buffer


def write_views(image: Float32s, views: tuple[str, ...], out: Float32s) -> None:
    """The TTA views of an image (C, H, W) into (V, C, H, W)."""
    for view, place in zip(views, out, strict=True):
        rows = slice(None, None, -1 if view in ("flip_time", "flip_both") else 1)
        columns = slice(None, None, -1 if view in ("flip_frequency", "flip_both") else 1)
        place[:] = image[:, rows, columns]


def mix_pair(planes: dict[int, Float32s], draws: Draws, pair: Sequence[int]) -> None:
    """CutMix of two slots' augmented planes (N, T, F) with each other: the same box in each panel."""
    first, second = pair
    pasted = {}
    for slot, partner in ((first, second), (second, first)):
        if draws.partner[slot] == partner:  # one that was read for its partner alone stays as it is
            start, end, left, right = draws.cutmix_box[slot].tolist()
            box = np.s_[:, start:end, left:right]
            pasted[slot] = box, planes[partner][box].copy()
    for slot, (box, values) in pasted.items():
        planes[slot][box] = values


def resize_weights(old: int, new: int) -> kernels.Weights:
    """The weights of a bilinear resize with antialiasing, along one axis.

    A triangle as wide as an output pixel around its centre, edge pixels repeated outwards: DALI's antialiased linear
    interpolation, and torch's but for the outermost pixels. Few of the weights are not 0: as a sparse product the
    resize of 1638 rows to 224 costs a tenth of the general routines'.
    """
    scale = old / new
    reach = max(scale, 1.0)
    margin = int(np.ceil(reach))
    centre = (np.arange(new) + 0.5)[:, None] * scale
    pixel = np.arange(-margin, old + margin)
    triangle = np.maximum(0, 1 - np.abs(pixel + 0.5 - centre) / reach)
    dense = np.zeros((new, old))
    np.add.at(dense.T, pixel.clip(0, old - 1), triangle.T)
    weights = csr_array((dense / dense.sum(axis=1, keepdims=True)).astype(np.float32))
    return weights.indptr.astype(np.int32), weights.indices.astype(np.int32), weights.data
