"""The arithmetic of the graphs for one sample on one CPU core: values in, canvas out.

It computes what pipeline/graph.py describes for DALI. DALI's CPU operators widen float16, bend and resize value by
value; these kernels use the whole width of the CPU, and take a third to a tenth of the time (docs/performance.md).

Axes: P positions, t time bins before summing, N planes, T time bins, F frequency channels; C, H, W canvas; V views.
"""

import threading
from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn.functional import layer_norm

from pipeline.canvas import NORMALISE_EPSILON, CanvasConfig
from pipeline.draws import Draws, Float32s


class CpuCanvas:
    """The steps from a snippet to its canvas. May be used by many threads at once."""

    def __init__(self, canvas: CanvasConfig, shape: tuple[int, int, int]) -> None:
        """`shape` is a snippet's (P, t, F)."""
        self.canvas, self.planes = canvas, canvas.plane_shape(shape)
        count, time_bins, channels = self.planes
        self._panel = shape[1:]
        self._stack = (canvas.channels, count // canvas.channels * time_bins, channels)
        self._vertical = resize_weights(self._stack[1], canvas.height)
        self._horizontal = resize_weights(channels, canvas.width)
        self._scratch = threading.local()

    def to_planes(self, snippet: Tensor) -> Float32s:
        """(P, t, F) float16 to normalised planes (N, T, F), in memory that the thread's next call uses again."""
        canvas, planes, wide = self.canvas, *self._buffers()
        for plane, position in enumerate(canvas.positions):  # one by one: 0.3 MB stay in the core's cache, 1.7 do not
            if canvas.sum_time_bins == 1:
                planes[plane].copy_(snippet[position])
            else:
                wide.copy_(snippet[position])
                torch.sum(wide.view(-1, canvas.sum_time_bins, wide.shape[-1]), 1, out=planes[plane])
        values = planes
        if canvas.sum_time_bins > 1:
            values *= canvas.sum_time_bins**-0.5  # so that white noise keeps its standard deviation
        if canvas.subtract != "none":
            values -= values.mean((0, 1), keepdim=True)
        if canvas.subtract == "lines_bursts":
            values -= values.mean(2, keepdim=True)
        if canvas.normalise:
            values = layer_norm(values, self.planes[1:], eps=NORMALISE_EPSILON)
        found: Float32s = values.numpy()
        return np.arcsinh(found, out=found) if canvas.compress == "asinh" else found

    def augment(self, planes: Float32s, draws: Draws, slot: int) -> Float32s:
        """Flip, roll, shift, scale and erase planes (N, T, F) as a slot's draws say; leaves `planes` as they are."""
        count, time_bins, channels = self.planes
        # ON and OFF stacks reversed each as a whole: the order of panels turns round and no panel changes its slot.
        stacks = 1 if self.canvas.canvas == "on" or not self.canvas.flips_time else 2
        source = planes.reshape(stacks, count // stacks, time_bins, channels)
        if draws.flip_frequency[slot]:
            source = source[..., ::-1]
        if draws.flip_time[slot]:
            source = source[:, ::-1, ::-1]
        roll, shift = int(draws.roll[slot]), int(draws.shift[slot])
        kept = np.s_[max(shift, 0) : time_bins + min(shift, 0)]
        target = np.s_[max(-shift, 0) : time_bins + min(-shift, 0)]
        values = np.full_like(planes, draws.offset[slot])
        shifted = values.reshape(source.shape)
        for to, of in ((np.s_[: channels - roll], np.s_[roll:]), (np.s_[channels - roll :], np.s_[:roll])):
            np.multiply(source[:, :, kept, of], draws.gain[slot], out=shifted[:, :, target, to])
        shifted[:, :, target] += draws.offset[slot]
        start, extent = draws.erase_start[slot].astype(int), draws.erase_shape[slot].astype(int)
        values[tuple(slice(first, first + length) for first, length in zip(start, extent, strict=True))] = 0
        return values

    def write_canvas(self, planes: Float32s, image: Float32s) -> None:
        """Planes (N, T, F) into an image (C, H, W), resized by antialiased bilinear interpolation."""
        stack = planes.reshape(self._stack)
        if self._vertical is not None:
            stack = np.stack([self._vertical @ each for each in stack])
        if self._horizontal is None:
            image[:] = stack
            return
        channels, height, width = stack.shape
        turned = self._horizontal @ np.ascontiguousarray(stack.reshape(-1, width).T)
        image.reshape(channels * height, -1)[:] = turned.T

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """A thread's memory for planes (N, T, F) and one wide panel (t, F): fresh memory would cost more."""
        if not hasattr(self._scratch, "buffers"):
            self._scratch.buffers = torch.zeros(self.planes), torch.zeros(self._panel)
        buffers: tuple[Tensor, Tensor] = self._scratch.buffers
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
    pasted = {}
    for slot, partner in ((first, second), (second, first)):
        if draws.partner[slot] == partner:  # one that was read for its partner alone stays as it is
            start, end, left, right = draws.cutmix_box[slot].tolist()
            box = np.s_[:, start:end, left:right]
            pasted[slot] = box, planes[partner][box].copy()
    for slot, (box, values) in pasted.items():
        planes[slot][box] = values


def resize_weights(old: int, new: int) -> csr_array | None:
    """(new, old) weights of a bilinear resize with antialiasing, along one axis; None where there is none to do.

    A triangle as wide as an output pixel around its centre, edge pixels repeated outwards: DALI's antialiased linear
    interpolation, and torch's but for the outermost pixels. Nearly all weights are 0: as a sparse product the resize
    of 1638 rows to 224 costs a tenth of the general routines'.
    """
    if old == new:
        return None
    scale = old / new
    reach = max(scale, 1.0)
    margin = int(np.ceil(reach))
    centre = (np.arange(new) + 0.5)[:, None] * scale
    pixel = np.arange(-margin, old + margin)
    triangle = np.maximum(0, 1 - np.abs(pixel + 0.5 - centre) / reach)
    weights = np.zeros((new, old))
    np.add.at(weights.T, pixel.clip(0, old - 1), triangle.T)
    return csr_array((weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))
