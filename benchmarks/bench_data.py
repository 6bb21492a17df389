"""The data of the loader benchmark: noise in the Kaggle layout, in shards, and in other loaders' own formats.

DIR/bench_data.json         the configuration, so that a kept folder is reused only for the same data
DIR/bucket/input/           train_labels.csv, train/<c>/<key>.npy
DIR/bucket/shards/          tars, indexes and manifest
DIR/<peer>/                 written when that peer first takes part
"""

import csv
import ctypes
import json
import mmap
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.peers.spec import Spec
from shard_tools.cadence import KAGGLE_SHAPE, npy_header
from shard_tools.errors import InputError
from shard_tools.pack import PackConfig, pack

BUCKET = "bucket"  # the part that a store serves
INPUT, SHARDS = "input", "shards"
MADE = "bench_data.json"
_SHARDS = 32  # enough to share out evenly among many workers, which read whole tars
_DISTINCT = 8  # snippets that are drawn; noise is slow to draw, so the others are these, rolled
_STEP = 104_729  # values by which each snippet is rolled further than the one before; prime, so that no two are alike


@dataclass(frozen=True)
class DataConfig:
    """The data that the benchmark makes."""

    cadences: int = 512
    """Number of cadences; a multiple of the batch size, so that no loader has a short batch."""
    shape: tuple[int, int, int] = KAGGLE_SHAPE
    """Panels, time bins and channels of a snippet."""

    def __post_init__(self) -> None:
        if self.cadences < 16:
            raise InputError(f"--data.cadences {self.cadences}: expected at least 16, the number that is compared")

    @property
    def cadence_bytes(self) -> int:
        """Size of one snippet's values."""
        return 2 * int(np.prod(self.shape))


def make_data(folder: Path, config: DataConfig) -> None:
    """Fill `folder`, or reuse its data. Raises InputError if it holds anything else."""
    made = folder / MADE
    wanted = json.loads(json.dumps(asdict(config)))
    if made.is_file():
        if json.loads(made.read_bytes()) != wanted:
            raise InputError(f"{folder}: holds {made.read_text()}, expected {wanted}; give another --data-dir")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: holds something else; expected an empty folder, or what this benchmark made")
    _write_input(folder / BUCKET / INPUT, config)
    shard_mb = max(1, config.cadences * config.cadence_bytes // _SHARDS // 10**6 + 1)
    pack(PackConfig(folder / BUCKET / INPUT, str(folder / BUCKET / SHARDS), shard_mb=shard_mb))
    made.write_text(json.dumps(wanted))


def _write_input(root: Path, config: DataConfig) -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((_DISTINCT, *config.shape), np.float32).astype(np.float16)
    header = npy_header(config.shape)
    rows = []
    for number in range(config.cadences):
        key = f"{number * 40503 % 65536:04x}{number:08x}"
        path = root / "train" / key[0] / f"{key}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        rolled = np.roll(noise[number % _DISTINCT].reshape(-1), number * _STEP)
        path.write_bytes(header + rolled.tobytes())
        rows.append((key, number % 2))
    with (root / "train_labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "target"), *rows])


def made_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """A folder that `write` fills the first time, with a peer's own format; it is complete or absent."""
    if not folder.is_dir():
        unfinished = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        write(unfinished)
        unfinished.rename(folder)
    return folder


def snippet_paths(data: Path) -> list[Path]:
    """Every npy file, in the order of the keys, as in the shards."""
    return sorted((data / BUCKET / INPUT / "train").rglob("*.npy"))


def shards_of(spec: Spec) -> str:
    """Folder or URL of the shards."""
    return f"s3://{BUCKET}/{SHARDS}" if spec.source == "s3" else str(spec.data / BUCKET / SHARDS)


def shard_urls(spec: Spec) -> list[str]:
    """Paths or URLs of the tars, in order."""
    tars = sorted((spec.data / BUCKET / SHARDS).glob("*.tar"))
    if spec.source == "s3":
        return [f"{os.environ['AWS_ENDPOINT_URL']}/{BUCKET}/{SHARDS}/{tar.name}" for tar in tars]
    return [str(tar) for tar in tars]


def drop_from_cache(folder: Path) -> None:
    """Ask the kernel to drop every file of `folder` from the page cache."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only clean pages can be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def cached_bytes(path: Path) -> int:
    """How many bytes of a file are in the page cache, by mincore(2)."""
    size = path.stat().st_size
    if not size:
        return 0
    resident = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as pages:
        values = np.frombuffer(pages, np.uint8)
        start, vector = ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(resident.ctypes.data)
        code = ctypes.CDLL(None, use_errno=True).mincore(start, ctypes.c_size_t(size), vector)
        del values  # it keeps the map from being closed
    if code:
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return min(size, mmap.PAGESIZE * int((resident & 1).sum()))
