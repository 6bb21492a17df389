"""Plain torch: a map-style Dataset of .npy files, or of objects in a store, and a DataLoader with 0 or N workers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

from benchmarks.bench_data import BUCKET, snippet_paths
from benchmarks.peers.dataloader import build_dataloader
from benchmarks.peers.spec import Loading, Spec
from benchmarks.peers.transforms import load_npy, snippet_of, transformed


@dataclass
class NpyFiles:
    """One file per sample."""

    paths: list[Path]
    spec: Spec

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        path = self.paths[index]
        return path.stem, transformed(load_npy(path), self.spec.workload)


@dataclass
class Objects:
    """One object of a store per sample; those of a batch are fetched together, so that their latencies overlap."""

    spec: Spec
    names: list[str]
    store: Any = field(default=None)

    def __len__(self) -> int:
        return len(self.names)

    def __getitems__(self, indices: list[int]) -> list[tuple[str, Tensor]]:
        if self.store is None:
            # Each worker makes its own: s3fs has a thread, which does not survive a fork.
            from s3fs import S3FileSystem

            self.store = S3FileSystem(skip_instance_cache=True)
        paths = [self.names[index] for index in indices]
        found = self.store.cat(paths)
        workload = self.spec.workload
        return [(Path(path).stem, transformed(snippet_of(found[path]), workload)) for path in paths]


def build(spec: Spec, workers: int) -> Loading:
    """Uses the default collate, and shuffles in training."""
    paths = snippet_paths(spec.data)
    if spec.source == "s3":
        root = spec.data / BUCKET
        names = [f"{BUCKET}/{path.relative_to(root)}" for path in paths]
        return build_dataloader(Objects(spec, names), spec, workers, shuffle=spec.shuffles, collate_fn=default_collate)
    return build_dataloader(NpyFiles(paths, spec), spec, workers, shuffle=spec.shuffles)
