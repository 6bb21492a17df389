"""Images by the project's compiled kernels, for peers that read .npy files in their own way.

Such a row and ours do the same arithmetic, so they differ only in reading, in worker processes and in collating.

Axes: B batch; P panels, T time bins, F frequency channels; V views, C channels, H, W canvas.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.augment import DrawConfig, Draws, draw, mixed_targets, partner_positions
from pipeline.canvas import CanvasConfig
from pipeline.cpu_canvas import CpuCanvas, Float16s, make_views, to_kernel_types
from pipeline.randomness import EpochPart


class KernelImages:
    """Makes the images of whole batches, one sample or pair of partners after another, in the calling process."""

    def __init__(self, canvas: CanvasConfig, shape: tuple[int, int, int]) -> None:
        """`shape` is a snippet's (P, T, F). Compiles the kernels, so that forked workers need not."""
        self._canvas = CpuCanvas(canvas, shape)
        self._snippets = np.zeros((2, *shape), np.float16)  # kept, as fresh memory would cost more than the work in it
        images = np.empty((2, *self._canvas.image_shape), np.float32)
        drawn = to_kernel_types(_draw(DrawConfig(), self._canvas, len(images)))
        self._canvas.write_train_images(self._snippets, drawn, [0, 1], list(images))
        self._canvas.write_eval_image(self._snippets[0], images[0])

    def evaluation_images(self, paths: Sequence[Path], views: tuple[str, ...]) -> Tensor:
        """(B, V, C, H, W) float32 of these files."""
        images = np.empty((len(paths), len(views), *self._canvas.image_shape), np.float32)
        image = np.empty(self._canvas.image_shape, np.float32)
        for path, out in zip(paths, images, strict=True):
            read_into(path, self._snippets[0])
            self._canvas.write_eval_image(self._snippets[0], image)
            make_views(image, views, out)
        return torch.from_numpy(images)

    def training_images(
        self, paths: Sequence[Path], targets: npt.NDArray[np.int8], config: DrawConfig
    ) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) float32 of these files, augmented and mixed in pairs of neighbours; and their targets (B,)."""
        draws = _draw(config, self._canvas, len(paths))
        drawn = to_kernel_types(draws)
        images = np.empty((len(paths), *self._canvas.image_shape), np.float32)
        for slot in range(0, len(paths), 2):
            slots = [slot, slot + 1][: len(paths) - slot]
            for place, snippet in zip(slots, self._snippets, strict=False):
                read_into(paths[place], snippet)
            self._canvas.write_train_images(self._snippets[: len(slots)], drawn, slots, list(images[slot : slot + 2]))
        mixed = mixed_targets(config, draws, targets, targets[draws.partner])
        return torch.from_numpy(images), torch.from_numpy(mixed)


def _draw(config: DrawConfig, images: CpuCanvas, count: int) -> Draws:
    """Draws of `count` samples whose partners are their neighbours, seeded by torch, which seeds each worker."""
    # Other positions of the same epoch: for another epoch the draws' hash keys would be computed anew.
    start = 2 * int(torch.randint(2**40, ()))
    part = EpochPart(0, 0, np.arange(start, start + count), start + count)
    draws = draw(config, images.canvas, images.planes, part)
    return replace(draws, partner=partner_positions(np.arange(count), count))


def read_into(path: Path, snippet: Float16s) -> None:
    """Read the values of an npy file into `snippet` (P, T, F). Raises ValueError if it has another shape or type."""
    with path.open("rb", buffering=0) as file:
        np.lib.format.read_magic(file)
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        values = snippet.reshape(-1).view(np.uint8).data
        if (shape, is_fortran, dtype) != (snippet.shape, False, snippet.dtype) or file.readinto(values) != len(values):
            raise ValueError(f"{path}: expected {snippet.dtype} {snippet.shape} in C order, found {dtype} {shape}")
