"""LitData over chunks that its `optimize` wrote."""

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import litdata
import torch
from torch import Tensor

from benchmarks.bench_data import made_once, snippet_paths
from benchmarks.peers.dataloader import Epochs, loader_options
from benchmarks.peers.spec import Loading, Spec
from benchmarks.peers.transforms import load_npy, transformed


def build(spec: Spec, workers: int) -> Loading:
    """Uses uncompressed chunks of 64 MB, as its documentation advises, and its DataLoader, which starts epochs anew."""
    folder = made_once(spec.data / "litdata", lambda out: _write(out, spec))
    dataset = litdata.StreamingDataset(
        str(folder), shuffle=spec.shuffles, transform=partial(_transform, spec), drop_last=False
    )
    options = loader_options(spec, workers)
    loader = litdata.StreamingDataLoader(dataset, batch_size=spec.batch_size, shuffle=spec.shuffles, **options)
    return Loading(Epochs(loader, spec))


def _transform(spec: Spec, sample: dict[str, Any]) -> tuple[str, Tensor]:
    return sample["key"], transformed(sample["snippet"], spec.workload)


def _sample(path: str) -> dict[str, Any]:
    return {"key": Path(path).stem, "snippet": torch.from_numpy(load_npy(Path(path)))}


def _write(out: Path, spec: Spec) -> None:
    with tempfile.TemporaryDirectory(dir=spec.data) as cache:
        # By default its cache is /tmp/chunks, which another run may be using.
        os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = cache
        litdata.optimize(
            fn=_sample,
            inputs=[str(path) for path in snippet_paths(spec.data)],
            output_dir=str(out),
            chunk_bytes="64MB",
            num_workers=1,  # one writes them in the given order
            reorder_files=False,
            verbose=False,
        )
