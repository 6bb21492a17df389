"""Images on the CPU, one sample or pair of partners at a time: a snippet's values in, its image out.

These are the steps of pipeline/dali_graph.py in a tenth of the time of DALI's CPU operators, which convert float16,
take the asinh and resize one value at a time (docs/performance.md). The loops are in pipeline/cpu_kernels.py.

Axes: P positions, t time bins before summing, N planes, T time bins, F frequency channels; C, H, W canvas; V views.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline import cpu_kernels as kernels
from pipeline.augment import Draws, Float32s
from pipeline.canvas import NORMALISE_EPSILON, CanvasConfig

Float16s = npt.NDArray[np.float16]


@dataclass(frozen=True)
class DrawnBatch:
    """The decisions for a batch, in types that Numba takes."""

    draws: npt.NDArray[np.void]
    """(n,) of `kernels.SAMPLE_DRAWS`."""
    signals: kernels.SampleSignals | None
    """None where none are added."""


def to_kernel_types(draws: Draws) -> DrawnBatch:
    """The decisions for a batch, converted at once: for each sample by itself they would take as long as a kernel."""
    # A slot that was added to the batch as a partner is its own partner: its image is not used.
    is_alone = draws.partner == np.arange(len(draws.partner))
    values = np.empty(len(draws.partner), kernels.SAMPLE_DRAWS)
    for name in ("flip_frequency", "flip_time", "roll", "shift", "gain", "offset"):
        values[name] = getattr(draws, name)
    values["mixed"] = np.where(is_alone, 0, draws.mixed)
    values["erase_box"][:, :3], values["erase_box"][:, 3:] = draws.erase_start, draws.erase_shape
    values["cutmix_box"] = np.where(is_alone[:, None], 0, draws.cutmix_box)
    if not draws.signal_level.shape[1]:
        return DrawnBatch(values, None)
    signals = kernels.SampleSignals(
        path=draws.signal_path,
        level=draws.signal_level,
        is_in_plane=np.any(draws.signal_level > 0, axis=3),
        width=draws.signal_width,
        lorentzian=draws.signal_lorentzian,
        normalised=draws.signal_normalised,
    )
    return DrawnBatch(values, signals)


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
            stacks=canvas.stacks,
        )
        self._of_thread = threading.local()

    def write_eval_image(self, snippet: Float16s, image: Float32s) -> None:
        """A snippet (P, t, F) to its image (C, H, W)."""
        kernels.write_eval_image(snippet.view(np.uint16), self._steps, self._scratch(), image)

    def write_train_images(
        self, snippets: Float16s, drawn: DrawnBatch, slots: Sequence[int], images: Sequence[Float32s]
    ) -> None:
        """A sample's snippet, or those of two partners, (1 or 2, P, t, F) to images (C, H, W), augmented and mixed."""
        kernels.write_train_images(
            snippets.view(np.uint16),
            self._steps,
            drawn.draws,
            drawn.signals,
            np.array(slots),
            self._scratch(),
            (images[0], images[-1]),
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
    # ON and OFF channels, or the one channel of all panels.
    stacked = image.reshape(min(2, len(image)), -1, *image.shape[1:])
    for view, place in zip(views, out, strict=True):
        # Along both axes on which time runs: the channels of a stack, where it has several, and their rows.
        time = slice(None, None, -1 if view in ("flip_time", "flip_both") else 1)
        frequency = slice(None, None, -1 if view in ("flip_frequency", "flip_both") else 1)
        place[:] = stacked[:, time, time, frequency].reshape(image.shape)


def resize_weights(old: int, new: int) -> kernels.Weights:
    """The weights of a bilinear resize with antialiasing, along one axis.

    The weights of an output pixel are a triangle around its centre that reaches one output pixel, or one old pixel if
    that is larger; edge pixels are repeated outwards. This equals DALI's antialiased linear interpolation, and torch's
    except at the outermost pixels.
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
    taps = 1 if old == new else -(-most // 3) * 3
    padded = np.pad(dense / dense.sum(axis=1, keepdims=True), ((0, 0), (0, taps)))
    weights = np.take_along_axis(padded, first[:, None] + np.arange(taps), axis=1)
    return first, np.ascontiguousarray(weights.T, np.float32)
