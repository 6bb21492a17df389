"""What feeds a peer's loop: a data set of .npy files, how its batches are collated, and how they are mixed after that.

Axes: B batch, V views, C channels, H height, W width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from benchmarks.loops.spec import Feed, LoopSpec
from benchmarks.loops.torch_canvas import TorchCanvas
from benchmarks.peers.dataloader import one_thread
from benchmarks.peers.kernels import KernelImages
from benchmarks.peers.spec import BATCHES_AHEAD
from benchmarks.peers.torch_kernels import take_batch
from benchmarks.peers.transforms import load_npy
from shard_tools.manifest import Manifest, read_manifest
from training.accelerator import pick_precision
from training.config import TrainConfig
from training.model import build_model


@dataclass
class TorchSnippets:
    """A sample for each file: its image (C, H, W) in training, its views (V, C, H, W) in prediction; and its target."""

    paths: list[Path]
    targets: npt.NDArray[np.int8]
    canvas: TorchCanvas
    views: tuple[str, ...] | None
    """None in training."""
    transform: Any = None
    """timm sets it; it is not used."""

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        planes = self.canvas.planes(torch.from_numpy(load_npy(self.paths[index])))
        target = torch.tensor(float(self.targets[index]))
        if self.views is None:
            return self.canvas.image(self.canvas.augmented(planes)), target
        return self.canvas.views(self.canvas.image(planes), self.views), target


@dataclass
class KernelSnippets:
    """The same by our kernels, a whole batch at once; in training with our draws, CutMix included."""

    paths: list[Path]
    targets: npt.NDArray[np.int8]
    images: KernelImages
    plan: TrainConfig
    views: tuple[str, ...] | None
    """None in training."""
    transform: Any = None
    """timm sets it; it is not used."""

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        paths, targets = [self.paths[index] for index in indices], self.targets[indices]
        if self.views is None:
            return self.images.training_images(paths, targets, self.plan.draws)
        return self.images.evaluation_images(paths, self.views), torch.from_numpy(targets.astype(np.float32))


@dataclass(frozen=True)
class Job:
    """What one loop has to do, and what it is fed with."""

    spec: LoopSpec
    feed: Feed
    workers: int

    @property
    def plan(self) -> TrainConfig:
        """The configuration of model, canvas, draws and optimiser."""
        return self.spec.plan

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return torch.device(self.spec.device)

    @property
    def precision(self) -> str:
        """Precision of the forward pass, in Accelerate's words: no, bf16 or fp16."""
        asked = self.plan.precision
        return {"auto": pick_precision(self.device), "float32": "no"}.get(asked, asked)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of the forward pass."""
        is_mixed = self.precision != "no"
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype) if is_mixed else nullcontext()

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest of the shards, which names the cadences for every loop."""
        return read_manifest(self.plan.shards[0])

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """The cadences that are trained on, or predicted: all folds but the held-out one."""
        return self.manifest.rows("train", self.plan.held_out)

    @property
    def views(self) -> tuple[str, ...] | None:
        """The TTA views of prediction; None in training."""
        return None if self.spec.what == "train" else self.plan.model.views(self.plan.canvas.views)

    @cached_property
    def dataset(self) -> Any:
        """The cadences as .npy files."""
        keys = self.manifest.keys_of(self.rows)
        paths = [self.spec.files / "train" / key[0] / f"{key}.npy" for key in keys]
        targets = self.manifest.targets(self.rows)
        if self.feed == "kernels":
            images = KernelImages(self.plan.canvas, self.manifest.shape)
            return KernelSnippets(paths, targets, images, self.plan, self.views)
        return TorchSnippets(paths, targets, TorchCanvas(self.plan.canvas, self.plan.draws), self.views)

    @property
    def collate(self) -> Callable[[Any], Any]:
        """The DataLoader's `collate_fn`."""
        return take_batch if self.feed == "kernels" else default_collate

    def mixed(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What the main process does to a training batch: CutMix, unless the kernels have done it."""
        return (images, targets) if self.feed == "kernels" else self.dataset.canvas.mixed(images, targets)

    def build_loader(self) -> Any:
        """A DataLoader with its fastest options; its workers stay from one epoch of training to the next."""
        options: dict[str, Any] = {"num_workers": self.workers, "pin_memory": self.device.type == "cuda"}
        if self.workers:
            options |= {"prefetch_factor": BATCHES_AHEAD, "worker_init_fn": one_thread}
            options |= {"multiprocessing_context": "fork", "persistent_workers": self.spec.what == "train"}
        is_shuffled = self.spec.what == "train"
        return DataLoader(self.dataset, self.plan.batch_size, is_shuffled, collate_fn=self.collate, **options)

    def build_model(self) -> nn.Module:
        """The model with the weights that ours starts from, on the device."""
        canvas = self.plan.canvas
        set_seed(self.plan.seed)
        return build_model(self.plan.model, canvas.channels, canvas.height, canvas.width).to(self.device)


def mean_logits(model: nn.Module, images: Tensor) -> Tensor:
    """(B,) float32, averaged over the views of images (B, V, C, H, W)."""
    logits: Tensor = model(images.flatten(0, 1)).float().view(images.shape[:2])
    return logits.mean(1)
