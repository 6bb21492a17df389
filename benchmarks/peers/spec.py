"""What a contestant has to load, and the list of contestants.

Axes: B batch, P panels, T time bins, F frequency channels; V views, C channels, H height, W width.
"""

from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

Workload = Literal["raw", "canvas", "train", "tta"]
Source = Literal["page-cache", "cold", "s3"]
Kind = Literal["ours", "peer", "kernels", "ceiling"]
"""kernels: a peer that makes its canvases with our kernels, so that only its reading is its own."""

HEIGHT = WIDTH = 224
BATCHES_AHEAD = 4  # prepared batches, for every loader with such a setting; as many as ours
COMPUTED: tuple[Workload, ...] = ("canvas", "train", "tta")  # the workloads in which canvases are made
LOCAL: tuple[Source, ...] = ("page-cache", "cold")
ANYWHERE: tuple[Source, ...] = (*LOCAL, "s3")


@dataclass(frozen=True)
class Spec:
    """What to load, and with how much of the machine."""

    workload: Workload
    """raw: float16 (B, P, T, F). canvas, train: float32 (B, 1, H, W). tta: float32 (B, V, 1, H, W)."""
    data: Path
    """Folder that `benchmarks.bench_data` filled."""
    shape: tuple[int, int, int]
    """(P, T, F) of a snippet."""
    batch_size: int
    threads: int
    """Threads, or worker processes, of a loader that has any."""
    source: Source = "page-cache"
    device: str = "cpu"

    @property
    def shuffles(self) -> bool:
        """Evaluation reads in the stored order, training in a random one."""
        return self.workload == "train"

    def words(self, name: str) -> list[str]:
        """The command line of a contestant's process."""
        words = [name, "--workload", self.workload, "--data", str(self.data), "--shape", *map(str, self.shape)]
        words += ["--batch-size", str(self.batch_size), "--threads", str(self.threads)]
        return [*words, "--source", self.source, "--device", self.device]


@dataclass(frozen=True)
class Loading:
    """A loader, ready to be iterated."""

    epochs: Iterable[tuple[Any, Tensor]]
    """Each iteration is an epoch of pairs: what `to_keys` takes, and the batch, which is valid until the next one."""
    _: KW_ONLY
    to_keys: Callable[[Any], list[str]] = list
    """Turns the first of a pair into the batch's keys; unset: it is a sequence of keys."""
    settle: Callable[[], None] = lambda: None
    """Called before a timed round: use up the batches that were prepared during the others' turns."""
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Contestant:
    """One loader in one configuration."""

    name: str
    module: str
    """A module of benchmarks.peers with `build(spec, workers) -> Loading`."""
    kind: Kind = "peer"
    packages: tuple[str, ...] = ()
    """What it needs beyond the project's own packages, by the names that pip knows."""
    parallel: Literal["none", "threads", "workers"] = "workers"
    reads: str = "bucket/input"
    """The part of the data folder that it reads."""
    sources: tuple[Source, ...] = LOCAL
    by_default: bool = True
    """Whether `--peers default` includes it."""
    in_all: bool = True
    """Whether `--peers all` includes it."""
    workloads: tuple[Workload, ...] = ("raw", "canvas", "train", "tta")
    """Those in which it takes part."""
    checked: bool = True
    """Whether its batches are compared with the reference before it is timed."""

    def workers(self, threads: int) -> int:
        """The number of its threads or processes besides the main one."""
        return 0 if self.parallel == "none" else threads

    @property
    def tries_threads(self) -> bool:
        """Whether torch does all its work in the main process, so that the number of torch's threads matters."""
        return self.kind == "peer" and self.parallel == "none"

    def label(self, threads: int) -> str:
        """Its threads or workers in a table: 2t for two threads, 2w for two worker processes."""
        return "-" if self.parallel == "none" else f"{threads}{self.parallel[0]}"

    def missing(self) -> str | None:
        """The first of its packages that is not installed; None if all are."""
        return first_missing(self.packages)


def first_missing(packages: Iterable[str]) -> str | None:
    """The first package that is not installed; None if all are."""
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError:
            return package
    return None


CONTESTANTS = (
    Contestant("ours", "ours", kind="ours", reads="bucket/shards", parallel="threads", sources=ANYWHERE),
    Contestant("torch", "torch_dataloader", parallel="none", sources=ANYWHERE),
    Contestant("torch-workers", "torch_dataloader", sources=ANYWHERE),
    Contestant("kernels", "torch_kernels", kind="kernels", parallel="none", workloads=COMPUTED),
    Contestant("kernels-workers", "torch_kernels", kind="kernels", workloads=COMPUTED),
    Contestant("original", "original", parallel="none"),
    Contestant("webdataset", "webdataset_loader", reads="bucket/shards", packages=("webdataset",), sources=ANYWHERE),
    Contestant("dali", "dali_reader", reads="bucket/shards", parallel="threads"),
    Contestant("original-workers", "original", by_default=False),
    Contestant("streaming", "mosaic_streaming", reads="mds", packages=("mosaicml-streaming",), by_default=False),
    Contestant("litdata", "lit_data", reads="litdata", packages=("litdata",), by_default=False),
    Contestant("spdl", "spdl_pipeline", packages=("spdl",), parallel="threads", by_default=False),
    Contestant("datasets", "hf_datasets", reads="datasets", packages=("datasets",), by_default=False),
    Contestant("grain", "grain_dataset", packages=("grain",), parallel="threads", by_default=False),
    Contestant("grain-workers", "grain_workers", packages=("grain",), by_default=False),
    Contestant("plain-loop", "plain_loop", parallel="none", by_default=False, in_all=False),
    Contestant("memory-copy", "ceilings", kind="ceiling", parallel="threads", sources=ANYWHERE, checked=False),
    Contestant("resident", "ceilings", kind="ceiling", parallel="none", sources=ANYWHERE, checked=False),
)
BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}
