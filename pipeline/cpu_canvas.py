"""Images on the CPU, one sample or pair of partners at a time: a snippet's values in, its image out.

These are the steps of pipeline/dali_graph.py in a tenth of the time of DALI's CPU operators, which convert float16,
take the asinh and resize one value at a time (docs/performance.md). The loops are in pipeline/cpu_kernels.py.

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
    """The steps from a snippet to its image. May be used by many threads at once."""

    def __init__(self, canvas: CanvasConfig, shape: tuple[int, int, int]) -> None:
        """`shape` is a snippet's (P, t, F)."""
        self.canvas, self.planes = canvas, canvas.plane_shape(shape)
        count, time_bins, channels = self.planes
        self.image_shape = (canvas.channels, canvas.height, canvas.width)
        self._steps = kernels.Steps(
            positions=np.array(canvas.positions),
            sum_time_bins=canvas.sum_time_bins,
            subtract=("none", "lines", "lines_bursts").index(canvas.subtract),
            normalise=canvas.normalise,
            epsilon=NORMALISE_EPSILON,
            compress=canvas.compress == "asinh",
            rows=resize_weights(count // canvas.channels * time_bins, canvas.height),
            columns=resize_weights(channels, canvas.width),
        )
        self._of_thread = threading.local()

    def write_eval_image(self, snippet: Float16s, image: Float32s) -> None:
        """A snippet (P, t, F) to its image (C, H, W)."""
        kernels.write_eval_image(snippet.view(np.uint16), self._steps, self._scratch(), image)

    def write_train_images(
        self, snippets: Float16s, draws: Draws, slots: Sequence[int], images: Sequence[Float32s]
    ) -> None:
        """A sample's snippet, or those of two partners, (1 or 2, P, t, F) to images (C, H, W), augmented and mixed."""
        drawn = [self._sample_draws(draws, slot, slots) for slot in slots]
        kernels.write_train_images(
            snippets.view(np.uint16), self._steps, (drawn[0], drawn[-1]), self._scratch(), (images[0], images[-1])
        )

    def _sample_draws(self, draws: Draws, slot: int, slots: Sequence[int]) -> kernels.SampleDraws:
        # A slot that was added to the batch as a partner is its own partner: its image is not used.
        is_mixed = draws.partner[slot] != slot and draws.partner[slot] in slots
        start, extent = draws.erase_start[slot].astype(int), draws.erase_shape[slot].astype(int)
        return kernels.SampleDraws(
            stacks=self.canvas.stacks,
            flip_frequency=bool(draws.flip_frequency[slot]),
            flip_time=bool(draws.flip_time[slot]),
            roll=int(draws.roll[slot]),
            shift=int(draws.shift[slot]),
            gain=float(draws.gain[slot]),
            offset=float(draws.offset[slot]),
            erase_box=(*start.tolist(), *extent.tolist()),
            cutmix_box=tuple(draws.cutmix_box[slot].tolist()) if is_mixed else (0, 0, 0, 0),
            mixed=float(draws.mixed[slot]) if is_mixed else 0.0,
            signal_path=draws.signal_path[slot],
            signal_level=draws.signal_level[slot],
            signal_width=draws.signal_width[slot],
            signal_lorentzian=draws.signal_lorentzian[slot],
            signal_normalised=bool(draws.signal_normalised[slot]),
        )

    def _scratch(self) -> kernels.Scratch:
        """This thread's memory."""
        if not hasattr(self._of_thread, "scratch"):
            count, time_bins, channels = self.planes
            stacks, height, _ = self.image_shape
            self._of_thread.scratch = kernels.Scratch(
                planes=np.zeros((2, count + 1, time_bins, channels), np.float32),
                sums=np.zeros((2, stacks, height, channels), np.float32),
                panel=np.zeros((time_bins * self.canvas.sum_time_bins, channels), np.float32),
            )
        scratch: kernels.Scratch = self._of_thread.scratch
        return scratch


def make_views(image: Float32s, views: tuple[str, ...], out: Float32s) -> None:
    """The TTA views of an image (C, H, W) into (V, C, H, W)."""
    stacked = image.reshape(min(2, len(image)), -1, *image.shape[1:])  # ON and OFF channels, or the one of all
    for view, place in zip(views, out, strict=True):
        # Along both axes on which time runs: the channels of a stack, where it has several, and their rows.
        time = slice(None, None, -1 if view in ("flip_time", "flip_both") else 1)
        frequency = slice(None, None, -1 if view in ("flip_frequency", "flip_both") else 1)
        place[:] = stacked[:, time, time, frequency].reshape(image.shape)


def resize_weights(old: int, new: int) -> kernels.Weights:
    """The weights of a bilinear resize with antialiasing, along one axis.

    The weights of an output pixel are a triangle around its centre that reaches one output pixel, or one old pixel if
    that is larger; edge pixels are repeated outwards. This equals DALI's antialiased linear interpolation, and torch's
    but for the outermost pixels.
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
