"""The arithmetic of the graphs for one sample on one CPU core: values in, canvas out.

It computes what pipeline/graph.py describes for DALI, whose CPU operators widen float16, bend and resize value by
value: here it takes a tenth of the time (docs/performance.md).

Axes: P positions, t time bins before summing, N planes, T time bins, F frequency channels; C, H, W canvas; V views.
"""

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline import kernels
from pipeline.canvas import NORMALISE_EPSILON, CanvasConfig
from pipeline.draws import Draws, Float32s

Float16s = npt.NDArray[np.float16]


class CpuCanvas:
    """The steps from a snippet to its canvas. May be used by many threads at once."""

    def __init__(self, canvas: CanvasConfig, shape: tuple[int, int, int]) -> None:
        """`shape` is a snippet's (P, t, F)."""
        self.canvas, self.planes = canvas, canvas.plane_shape(shape)
        count, time_bins, channels = self.planes
        self._stack = (canvas.channels, count // canvas.channels * time_bins, channels)
        self._rows = resize_weights(self._stack[1], canvas.height)
        self._columns = resize_weights(channels, canvas.width)
        self._recipe = kernels.Recipe(
            positions=np.array(canvas.positions),
            time_bins=canvas.sum_time_bins,
            subtract=("none", "lines", "lines_bursts").index(canvas.subtract),
            normalises=canvas.normalise,
            epsilon=NORMALISE_EPSILON,
            bends=canvas.compress == "asinh",
        )
        self._scratch = threading.local()

    def to_planes(self, snippet: Float16s) -> Float32s:
        """(P, t, F) to normalised planes (N, T, F), in memory that the thread's next call uses again."""
        planes = self._buffers()[0]
        kernels.to_planes(snippet.view(np.uint16), self._recipe, planes)
        return planes

    def to_augmented_planes(self, snippet: Float16s, draws: Draws, slot: int, place: int = 0) -> Float32s:
        """(P, t, F) to planes (N, T, F) that are flipped, rolled, shifted, scaled and erased as a slot's draws say.

        The result stays until the thread's next call for the same `place`, 0 or 1.
        """
        work, planes = self._buffers()[0], self._buffers()[1 + place]
        move = kernels.Move(
            # ON and OFF stacks reversed each as a whole: the order of panels turns round and none changes its slot.
            stacks=1 if self.canvas.canvas == "on" or not self.canvas.flips_time else 2,
            flip_frequency=bool(draws.flip_frequency[slot]),
            flip_time=bool(draws.flip_time[slot]),
            roll=int(draws.roll[slot]),
            shift=int(draws.shift[slot]),
            gain=float(draws.gain[slot]),
            offset=float(draws.offset[slot]),
        )
        kernels.to_moved_planes(snippet.view(np.uint16), self._recipe, move, work, planes)
        start, extent = draws.erase_start[slot].astype(int), draws.erase_shape[slot].astype(int)
        planes[tuple(slice(first, first + length) for first, length in zip(start, extent, strict=True))] = 0
        return planes

    def write_canvas(self, planes: Float32s, image: Float32s) -> None:
        """Planes (N, T, F) into an image (C, H, W), resized by antialiased bilinear interpolation."""
        stack = planes.reshape(self._stack)
        if stack.shape == image.shape:
            image[:] = stack
        else:
            kernels.resize(stack, self._rows, self._columns, image)

    def _buffers(self) -> list[Float32s]:
        """A thread's memory for planes (N, T, F): fresh memory would cost more than what is done in it."""
        if not hasattr(self._scratch, "buffers"):
            self._scratch.buffers = [np.zeros(self.planes, np.float32) for _ in range(3)]
        buffers: list[Float32s] = self._scratch.buffers
        return buffers


def write_views(image: Float32s, views: tuple[str, ...], out: Float32s) -> None:
    """The TTA views of an image (C, H, W) into (V, C, H, W)."""
    for view, place in zip(views, out, strict=True):
        rows = slice(None, None, -1 if view in ("flip_time", "flip_both") else 1)
        columns = slice(None, None, -1 if view in ("flip_frequency", "flip_both") else 1)
        place[:] = image[:, rows, columns]


def mix_pair(planes: dict[int, Float32s], draws: Draws, pair: Sequence[int]) -> None:
    """CutMix of two slots' augmented planes (N, T, F) with each other: the same box in each panel."""
    first, second = pair
    boxes = [
        # One that was read for its partner alone stays as it is.
        tuple(draws.cutmix_box[slot].tolist()) if draws.partner[slot] == partner else (0, 0, 0, 0)
        for slot, partner in ((first, second), (second, first))
    ]
    kernels.swap_boxes(planes[first], planes[second], *boxes)


def resize_weights(old: int, new: int) -> kernels.Weights:
    """The weights of a bilinear resize with antialiasing, along one axis.

    A triangle as wide as an output pixel around its centre, edge pixels repeated outwards: DALI's antialiased linear
    interpolation, and torch's but for the outermost pixels.
    """
    scale = old / new
    reach = max(scale, 1.0)
    margin = int(np.ceil(reach))
    centre = (np.arange(new) + 0.5)[:, None] * scale
    pixel = np.arange(-margin, old + margin)
    triangle = np.maximum(0, 1 - np.abs(pixel + 0.5 - centre) / reach)
    dense = np.zeros((new, old))
    np.add.at(dense.T, pixel.clip(0, old - 1), triangle.T)
    first = (dense > 0).argmax(axis=1)
    taps = -(-int((dense > 0).sum(axis=1).max()) // 4) * 4
    padded = np.pad(dense / dense.sum(axis=1, keepdims=True), ((0, 0), (0, taps)))
    weights = np.take_along_axis(padded, first[:, None] + np.arange(taps), axis=1)
    return first.astype(np.uint32), np.ascontiguousarray(weights.T, np.float32)
