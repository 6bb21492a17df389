"""The smallest peer, to be copied: a loop over the .npy files, one after another. Takes part only when named."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.bench_data import snippet_paths
from benchmarks.peers.spec import Loading, Spec
from benchmarks.peers.transforms import finished, load_npy, transformed


def build(spec: Spec, workers: int) -> Loading:
    """`workers` is 0, since its Contestant has `parallel="none"`."""
    return Loading(Epochs(snippet_paths(spec.data), spec))


@dataclass(frozen=True)
class Epochs:
    """Every iteration is an epoch of keys and batches, in training in another order each time."""

    paths: list[Path]
    spec: Spec

    def __iter__(self) -> Iterator[tuple[list[str], Tensor]]:
        paths = random.sample(self.paths, len(self.paths)) if self.spec.shuffles else self.paths
        for start in range(0, len(paths), self.spec.batch_size):
            chosen = paths[start : start + self.spec.batch_size]
            batch = torch.stack([transformed(load_npy(path), self.spec.workload) for path in chosen])
            yield [path.stem for path in chosen], finished(batch, self.spec.workload, self.spec.device)
