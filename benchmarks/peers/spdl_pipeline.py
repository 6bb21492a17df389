"""SPDL: a pipeline of threads over the .npy files."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from spdl.io import load_npy as parse_npy
from spdl.pipeline import PipelineBuilder
from torch import Tensor
from torch.utils.data import default_collate

from benchmarks.bench_data import snippet_paths
from benchmarks.peers.spec import BATCHES_AHEAD, Loading, Spec
from benchmarks.peers.transforms import finished, transformed


def build(spec: Spec, workers: int) -> Loading:
    """Threads read, parse and resize, all of which release Python's lock; batches keep the order."""
    # The pipeline's threads share the cores; torch's own would compete with them.
    torch.set_num_threads(1)
    paths = snippet_paths(spec.data)

    def to_sample(path: Path) -> tuple[str, Tensor]:
        # Parsed in place, without a copy and without Python's lock, which np.load needs.
        return path.stem, transformed(parse_npy(path.read_bytes()), spec.workload)

    def to_batch(samples: list[tuple[str, Tensor]]) -> tuple[list[str], Tensor]:
        keys, images = default_collate(samples)
        return list(keys), images

    class Epochs:
        def __iter__(self) -> Iterator[tuple[list[str], Tensor]]:
            order = random.sample(paths, len(paths)) if spec.shuffles else paths
            builder: Any = PipelineBuilder()
            pipeline = (
                builder.add_source(order)
                .pipe(to_sample, concurrency=workers)
                .aggregate(spec.batch_size)
                .pipe(to_batch)
                .add_sink(BATCHES_AHEAD)
                .build(num_threads=workers + 1)  # one more, so that stacking a batch holds up no sample
            )
            with pipeline.auto_stop():
                for keys, batch in pipeline:
                    yield keys, finished(batch, spec.workload, spec.device)

    return Loading(Epochs())
