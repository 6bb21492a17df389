"""The arithmetic of the graphs for one sample on one CPU core: values in, canvas out.

It computes what pipeline/dali_graph.py describes for DALI, whose CPU operators widen float16, bend and resize value by
value: here it takes a tenth of the time (docs/performance.md).

Axes: P positions, t time bins before summing, N planes, T time bins, F frequency channels; C, H, W canvas; V views.
"""

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline import cpu_kernels as kernels
from pipeline.augment import Draws, Float32s
from pipeline.canvas import NORMALISE_EPSILON, CanvasConfig

Float16s = npt.NDArray[np.float16]


class CpuCanvas:
    """The steps from a snippet to its canvas. May be used by many threads at once."""

    def __init__(self, canvas: CanvasConfig, shape: tuple[int, int, int]) -> None:
        """`shape` is a snippet's (P, t, F)."""
        self.canvas, self.planes = canvas, canvas.plane_shape(shape)
        count, time_bins, channels = self.planes
        self.image_shape = (canvas.channels, canvas.height, canvas.width)
        self._rows = resize_weights(count // canvas.channels * time_bins, canvas.height)
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

    def write_image(self, snippet: Float16s, image: Float32s) -> None:
        """A snippet (P, t, F) to its image (C, H, W)."""
        work, sums = self._work()
        kernels.make_image(
            snippet.view(np.uint16), self._recipe, self._rows, self._columns, work[0, :-1], sums[0], image
        )

    def write_train_images(
        self, snippets: Float16s, draws: Draws, slots: Sequence[int], images: Sequence[Float32s]
    ) -> None:
        """A sample's snippet, or those of two CutMix partners, (1 or 2, P, t, F) to images, augmented and mixed."""
        moves = [self._move(draws, slot, slots) for slot in slots]
        kernels.make_pair(
            snippets.view(np.uint16),
            self._recipe,
            (moves[0], moves[-1]),
            self._rows,
            self._columns,
            *self._work(),
            (images[0], images[-1]),
        )

    def _move(self, draws: Draws, slot: int, slots: Sequence[int]) -> kernels.Move:
        # One that was read for its partner alone is not mixed.
        is_mixed = draws.partner[slot] != slot and draws.partner[slot] in slots
        start, extent = draws.erase_start[slot].astype(int), draws.erase_shape[slot].astype(int)
        return kernels.Move(
            stacks=self.canvas.stacks,
            flip_frequency=bool(draws.flip_frequency[slot]),
            flip_time=bool(draws.flip_time[slot]),
            roll=int(draws.roll[slot]),
            shift=int(draws.shift[slot]),
            gain=float(draws.gain[slot]),
            offset=float(draws.offset[slot]),
            erased=(*start.tolist(), *extent.tolist()),
            pasted=tuple(draws.cutmix_box[slot].tolist()) if is_mixed else (0, 0, 0, 0),
            mixed=float(draws.mixed[slot]) if is_mixed else 0.0,
            path=draws.signal_path[slot],
            level=draws.signal_level[slot],
            width=float(draws.signal_width[slot]),
        )

    def _work(self) -> tuple[Float32s, Float32s]:
        """A thread's memory for two samples' planes, and for their stacks with the new number of rows."""
        if not hasattr(self._scratch, "work"):
            count, time_bins, channels = self.planes
            stacks, height, _ = self.image_shape
            work = np.zeros((2, count + 1, time_bins, channels), np.float32)
            self._scratch.work = work, np.zeros((2, stacks, height, channels), np.float32)
        found: tuple[Float32s, Float32s] = self._scratch.work
        return found


def write_views(image: Float32s, views: tuple[str, ...], out: Float32s) -> None:
    """The TTA views of an image (C, H, W) into (V, C, H, W)."""
    stacked = image.reshape(min(2, len(image)), -1, *image.shape[1:])  # ON and OFF channels, or the one of all
    for view, place in zip(views, out, strict=True):
        # Along both axes on which time runs: the channels of a stack, where it has several, and their rows.
        time = slice(None, None, -1 if view in ("flip_time", "flip_both") else 1)
        frequency = slice(None, None, -1 if view in ("flip_frequency", "flip_both") else 1)
        place[:] = stacked[:, time, time, frequency].reshape(image.shape)


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
    most = int((dense > 0).sum(axis=1).max())
    taps = 1 if old == new else -(-most // 4) * 4
    padded = np.pad(dense / dense.sum(axis=1, keepdims=True), ((0, 0), (0, taps)))
    weights = np.take_along_axis(padded, first[:, None] + np.arange(taps), axis=1)
    return first, np.ascontiguousarray(weights.T, np.float32)
