"""Grain, JAX's loader, over the .npy files: a MapDataset that threads read."""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.bench_data import snippet_paths
from benchmarks.peers.spec import BATCHES_AHEAD, Loading, Spec
from benchmarks.peers.transforms import finished, load_npy, transformed

KeyedBatch = tuple[list[str], npt.NDArray[Any]]


def build(spec: Spec, workers: int) -> Loading:
    """Load with threads of this process, each of which makes whole batches."""
    torch.set_num_threads(1)  # the threads share the cores; torch's own would compete with them
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=BATCHES_AHEAD)
    epochs = Epochs(batches_of(spec).to_iter_dataset(options), spec, BATCHES_AHEAD)
    return Loading(epochs, settle=epochs.settle, close=epochs.close)


def batches_of(spec: Spec) -> Any:
    """An endless MapDataset of pairs of keys and batch, shuffled anew in each epoch of training."""
    paths: Any = grain.MapDataset.source(snippet_paths(spec.data)).seed(0)
    paths = paths.shuffle() if spec.shuffles else paths
    samples = paths.map(lambda path: (path.stem, transformed(load_npy(path), spec.workload).numpy()))
    return samples.batch(spec.batch_size, batch_fn=to_batch).repeat()


def to_batch(samples: list[tuple[str, npt.NDArray[Any]]]) -> KeyedBatch:
    """Stack samples; grain's own function would make an array of the keys too."""
    return [key for key, _ in samples], np.stack([image for _, image in samples])


class Epochs:
    """Epochs of an iterator that never ends, as grain starts new processes for each iterator."""

    def __init__(self, batches: Any, spec: Spec, ahead: int) -> None:
        """`batches` is an IterDataset, `ahead` the number of batches that it prepares."""
        self._batches, self._spec, self._ahead = iter(batches), spec, ahead
        self._length = len(snippet_paths(spec.data)) // spec.batch_size

    def __iter__(self) -> Iterator[tuple[list[str], Tensor]]:
        for _ in range(self._length):
            keys, batch = next(self._batches)
            yield keys, finished(torch.from_numpy(batch), self._spec.workload, self._spec.device)

    def settle(self) -> None:
        """Use up the batches that it prepared after its last epoch, since their making was not timed."""
        for _ in range(self._ahead):
            next(self._batches)

    def close(self) -> None:
        """Stop the threads or processes."""
        self._batches.close()
