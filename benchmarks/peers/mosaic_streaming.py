"""MosaicML Streaming over MDS shards of its own."""

from pathlib import Path
from typing import Any

from streaming import MDSWriter, StreamingDataset
from torch import Tensor

from benchmarks.bench_data import made_once, snippet_paths
from benchmarks.peers.dataloader import build_dataloader
from benchmarks.peers.spec import Loading, Spec
from benchmarks.peers.transforms import load_npy, transformed

_SHARD_BYTES = 1 << 26  # its default


def build(spec: Spec, workers: int) -> Loading:
    """Local shards, uncompressed, read in place: no copy to a cache; values of a fixed shape need no parsing."""
    folder = made_once(spec.data / "mds", lambda out: _write(out, spec))
    dataset = _Snippets(local=str(folder), shuffle=spec.shuffles, batch_size=spec.batch_size)
    dataset.spec = spec
    return build_dataloader(dataset, spec, workers)


class _Snippets(StreamingDataset):  # type: ignore[misc]
    spec: Spec

    def __getitem__(self, index: Any) -> tuple[str, Tensor]:
        sample: Any = super().__getitem__(index)
        return sample["key"], transformed(sample["snippet"], self.spec.workload)


def _write(out: Path, spec: Spec) -> None:
    encoding = f"ndarray:float16:{','.join(map(str, spec.shape))}"
    with MDSWriter(
        out=str(out), columns={"key": "str", "snippet": encoding}, size_limit=_SHARD_BYTES, progress_bar=False
    ) as writer:
        for path in snippet_paths(spec.data):
            writer.write({"key": path.stem, "snippet": load_npy(path)})
