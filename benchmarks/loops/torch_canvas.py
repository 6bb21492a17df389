"""From a snippet to an image with torch's own routines, as a competent user writes it: sample by sample, in workers.

Axes: P positions, t time bins before summing; N planes, T time bins, F frequency channels; B batch; C, H, W canvas.
"""

from dataclasses import dataclass

import numpy as np
import torch
from timm.data.mixup import cutmix_bbox_and_lam
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (as everyone calls it)

from pipeline.augment import DrawConfig
from pipeline.canvas import NORMALISE_EPSILON, CanvasConfig


@dataclass(frozen=True)
class TorchCanvas:
    """The steps of pipeline/cpu_canvas.py, without added signals, mixup and reordered panels, which no preset has.

    Random numbers are torch's, which seeds each worker.
    """

    config: CanvasConfig
    draws: DrawConfig

    def planes(self, snippet: Tensor) -> Tensor:
        """(P, t, F) float16 to (N, T, F) float32: summed, without background, normalised and compressed."""
        config, positions = self.config, list(self.config.positions)
        values = (snippet if positions == list(range(len(snippet))) else snippet[positions]).float()
        if config.sum_time_bins > 1:
            shape = (len(values), -1, config.sum_time_bins, values.shape[2])
            values = values.reshape(shape).sum(2) / config.sum_time_bins**0.5
        if config.subtract != "none":
            values = values - values.mean((0, 1))
        if config.subtract == "lines_bursts":
            values = values - values.mean(2, keepdim=True)
        if config.normalise:
            values = F.layer_norm(values, values.shape[1:], eps=NORMALISE_EPSILON)
        return values.asinh() if config.compress == "asinh" else values

    def augmented(self, planes: Tensor) -> Tensor:
        """(N, T, F) flipped, rolled, shifted, brightened and erased at random."""
        draws, (_, time_bins, channels) = self.draws, planes.shape
        if _happens(draws.flip_frequency):
            planes = planes.flip(2)
        if self.config.flips_time and _happens(draws.flip_time):
            planes = planes.reshape(self.config.stacks, -1, *planes.shape[1:]).flip(1, 2).flatten(0, 1)
        if most := int(draws.roll_frequency * channels):
            planes = planes.roll(_between(-most, most), 2)
        if most := int(draws.shift_time * time_bins):
            planes = _shifted(planes, _between(-most, most))
        if draws.gain or draws.offset:
            gain, offset = (2 * torch.rand(2) - 1).tolist()
            planes = planes * (1 + gain * draws.gain) + offset * draws.offset
        return self._erased(planes) if _happens(draws.erase) else planes

    def image(self, planes: Tensor) -> Tensor:
        """(N, T, F) to (C, H, W): stacked, and resized if the canvas has another size; antialiased bilinear."""
        size = (self.config.height, self.config.width)
        stacked = planes.reshape(self.config.channels, -1, planes.shape[-1])
        if stacked.shape[1:] == size:
            return stacked
        return F.interpolate(stacked[None], size=size, mode="bilinear", antialias=True)[0]

    def views(self, image: Tensor, names: tuple[str, ...]) -> Tensor:
        """(C, H, W) to its TTA views (V, C, H, W)."""
        stacks = image.reshape(min(2, len(image)), -1, *image.shape[1:])
        axes = {"identity": (), "flip_frequency": (3,), "flip_time": (1, 2), "flip_both": (1, 2, 3)}
        return torch.stack([stacks.flip(axes[name]).flatten(0, 1) for name in names])

    def mixed(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """CutMix of a batch (B, C, H, W) with its own reversed order, in place, by timm's boxes; targets (B,) too."""
        if not _happens(self.draws.cutmix):
            return images, targets
        kept = np.random.default_rng(_between(0, 2**40)).beta(self.draws.cutmix_alpha, self.draws.cutmix_alpha)
        (top, bottom, left, right), kept = cutmix_bbox_and_lam(images.shape, kept)
        box = images[..., top:bottom, left:right]
        box.copy_(box.flip(0))
        return images, targets * kept + targets.flip(0) * (1 - kept)

    def _erased(self, planes: Tensor) -> Tensor:
        plane, top, left = (_between(0, size - 1) for size in planes.shape)
        height, width = (int(torch.rand(()) * self.draws.erase_size * size) + 1 for size in planes.shape[1:])
        planes = planes.clone()
        planes[plane, top : top + height, left : left + width] = 0
        return planes


def _happens(probability: float) -> bool:
    return bool(torch.rand(()) < probability) if probability else False


def _between(least: int, most: int) -> int:
    return int(torch.randint(least, most + 1, ()))


def _shifted(planes: Tensor, bins: int) -> Tensor:
    """(N, T, F) moved by so many time bins; the gap is 0."""
    time_bins = planes.shape[1]
    out = torch.zeros_like(planes)
    out[:, max(0, -bins) : time_bins - max(0, bins)] = planes[:, max(0, bins) : time_bins - max(0, -bins)]
    return out
