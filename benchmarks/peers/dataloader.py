"""What all peers with a torch DataLoader share."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.peers.spec import BATCHES_AHEAD, Loading, Spec
from benchmarks.peers.transforms import finished


def loader_options(spec: Spec, workers: int) -> dict[str, Any]:
    """The keywords that make a DataLoader fast, whatever the data set."""
    if not workers:
        return {"num_workers": 0}
    return {
        "num_workers": workers,
        # Otherwise every epoch starts new workers.
        "persistent_workers": True,
        "prefetch_factor": BATCHES_AHEAD,
        "multiprocessing_context": "fork",
        "worker_init_fn": one_thread,
        "pin_memory": spec.device != "cpu",
    }


@dataclass(frozen=True)
class Epochs:
    """Iterate over a DataLoader, and finish its batches in the main process."""

    loader: Any
    spec: Spec

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for keys, batch in self.loader:
            yield keys, finished(batch, self.spec.workload, self.spec.device)


def one_thread(*_: int) -> None:
    """Called with its number when a worker starts: with more threads of torch, workers would compete for the cores."""
    torch.set_num_threads(1)


def build_dataloader(dataset: Any, spec: Spec, workers: int, **options: Any) -> Loading:
    """A plain DataLoader over samples (key, tensor); default_collate stacks in the worker, into shared memory."""
    words = {"batch_size": spec.batch_size, **loader_options(spec, workers), **options}
    return Loading(Epochs(DataLoader(dataset, **words), spec))
