"""Dataset and DataLoader of the project that Needlestream is based on: one .npy per sample, augmented one by one.

What it did: np.load, astype float32, np.vstack of the six panels, Resize(224, 224) and HorizontalFlip of
albumentations, ToTensor. Its resize had no antialiasing and so made another canvas. Here it uses torch's antialiased
resize, which costs more, so that all canvases are equal. It left its DataLoader's num_workers at 0.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_data import snippet_paths
from benchmarks.peers.dataloader import build_dataloader
from benchmarks.peers.spec import Loading, Spec
from benchmarks.peers.transforms import augmented, load_npy, resized


@dataclass
class ClassificationDataset:
    """One file per sample, in float32 from the start."""

    paths: list[Path]
    spec: Spec

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        path = self.paths[index]
        stacked = np.vstack(list(load_npy(path).astype(np.float32)))
        if self.spec.workload == "raw":
            return path.stem, torch.from_numpy(stacked)
        return path.stem, augmented(resized(torch.from_numpy(stacked)), self.spec.workload)


def build(spec: Spec, workers: int) -> Loading:
    """Its `raw` batch is float32, the only type that it makes."""
    dataset = ClassificationDataset(snippet_paths(spec.data), spec)
    return build_dataloader(dataset, spec, workers, shuffle=spec.shuffles)
