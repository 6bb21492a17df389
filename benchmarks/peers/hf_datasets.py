"""Hugging Face datasets: an Arrow file, mapped, behind a torch DataLoader."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import Tensor

from benchmarks.bench_data import made_once, snippet_paths
from benchmarks.peers.dataloader import build_dataloader
from benchmarks.peers.spec import Loading, Spec
from benchmarks.peers.transforms import load_npy, transformed


def build(spec: Spec, workers: int) -> Loading:
    """Store bytes, not Array3D: lists of halves go through Arrow's extension types, which take many times as long."""
    folder = made_once(spec.data / "datasets", lambda out: _write(out, spec))
    table = datasets.load_from_disk(str(folder)).with_format("arrow")
    return build_dataloader(_Snippets(table, spec), spec, workers, shuffle=spec.shuffles)


@dataclass
class _Snippets:
    table: Any
    spec: Spec

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[str, Tensor]]:
        """A batch's rows in one go, in Arrow's own format: views of the mapped file until the values are copied."""
        rows = self.table[list(indices)]
        pairs = zip(rows["key"], rows["snippet"], strict=True)
        return [(key.as_py(), transformed(self._snippet(value), self.spec.workload)) for key, value in pairs]

    def _snippet(self, value: Any) -> np.ndarray[Any, np.dtype[np.float16]]:
        return np.frombuffer(value.as_buffer(), np.float16).reshape(self.spec.shape)


def _write(out: Path, spec: Spec) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        for path in snippet_paths(spec.data):
            yield {"key": path.stem, "snippet": load_npy(path).tobytes()}

    features = datasets.Features({"key": datasets.Value("string"), "snippet": datasets.Value("large_binary")})
    with tempfile.TemporaryDirectory(dir=spec.data) as cache:
        datasets.Dataset.from_generator(rows, features=features, cache_dir=cache).save_to_disk(str(out))
