"""How every peer that ends in a torch DataLoader drives it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.peers.spec import BATCHES_AHEAD, Loading, Spec
from benchmarks.peers.transforms import finished


def loader_options(spec: Spec, workers: int) -> dict[str, Any]:
    """The keywords that make a DataLoader fast, for any data set."""
    if not workers:
        return {"num_workers": 0}
    return {
        "num_workers": workers,
        # Else every epoch starts its workers anew.
        "persistent_workers": True,
        "prefetch_factor": BATCHES_AHEAD,
        "multiprocessing_context": "fork",
        "worker_init_fn": one_thread,
        "pin_memory": spec.device != "cpu",
    }


@dataclass(frozen=True)
class Epochs:
    """Iterate over a DataLoader, and do to its batches what is left to the main process."""

    loader: Any
    spec: Spec

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for keys, batch in self.loader:
            yield keys, finished(batch, self.spec.workload, self.spec.device)


def one_thread(_: int) -> None:
    """What a worker begins with: more threads of torch's would fight for the cores that other workers have."""
    torch.set_num_threads(1)


def build_dataloader(dataset: Any, spec: Spec, workers: int, **options: Any) -> Loading:
    """A plain DataLoader over samples (key, tensor); default_collate stacks in the worker, into shared memory."""
    words = {"batch_size": spec.batch_size, **loader_options(spec, workers), **options}
    return Loading(Epochs(DataLoader(dataset, **words), spec))
