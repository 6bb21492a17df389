"""torch's DataLoader over .npy files, with 0 or N workers, whose canvases are made by the project's kernels."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.bench_data import snippet_paths
from benchmarks.peers.dataloader import Epochs, loader_options
from benchmarks.peers.kernels import KernelImages
from benchmarks.peers.ours import CANVAS, DRAWS
from benchmarks.peers.spec import Loading, Spec


@dataclass
class KernelBatches:
    """Makes a whole batch at once, as a pair of CutMix partners is one call of a kernel."""

    paths: list[Path]
    spec: Spec
    images: KernelImages

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: list[int]) -> tuple[list[str], Tensor]:
        paths = [self.paths[index] for index in indices]
        if self.spec.workload == "train":
            images, _ = self.images.training_images(paths, np.zeros(len(paths), np.int8), DRAWS)
        else:
            views = CANVAS.views if self.spec.workload == "tta" else CANVAS.views[:1]
            images = self.images.evaluation_images(paths, views)
        return [path.stem for path in paths], images


def take_batch(batch: Any) -> Any:
    """Collate nothing: the data set has made a whole batch."""
    return batch


def build(spec: Spec, workers: int) -> Loading:
    """In training the kernels do CutMix too, so that nothing is left to do to a finished batch."""
    dataset = KernelBatches(snippet_paths(spec.data), spec, KernelImages(CANVAS, spec.shape))
    options = {"shuffle": spec.shuffles, "collate_fn": take_batch, **loader_options(spec, workers)}
    loader: Any = DataLoader(cast(Any, dataset), spec.batch_size, **options)
    return Loading(Epochs(loader, replace(spec, workload="canvas")))
