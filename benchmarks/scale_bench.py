"""How planning scales: simulated tables of up to 60 million samples, without their bytes.

    python benchmarks/scale_bench.py

For each size, and for several data sets opened as one, it measures: the time from opening the table to the first
planned batch (rows and draws, without imports); a rank's peak memory until then, beyond that of the imports; the cost
of planning a step. Each measurement is a fresh process.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shard_tools.system.allocator  # noqa: F401  as in train.py; before pyarrow is loaded

# isort: split
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from pipeline.augment import DrawConfig, draw
from pipeline.canvas import CanvasConfig
from pipeline.plan import Order, Sampling, Share
from pipeline.randomness import EpochPart, Int64s
from shard_tools.atomic_files import file_sha256
from shard_tools.cadence import KAGGLE_SHAPE, npy_header
from shard_tools.joined_manifest import read_manifests
from shard_tools.manifest import MANIFEST, TAR_BLOCK, Shard, canonical_json, manifest_content
from shard_tools.sample_table import SAMPLES, SAMPLES_SCHEMA
from shard_tools.tar_shard import padded

_KEY_DIGITS = 15  # hexadecimal digits of the longest Kaggle key
_ROW_GROUP = 1 << 20  # pyarrow's row groups if a table is written at once, as by `pack`
_TRAIN_SHARE = 0.6  # the Kaggle data's share: 60,000 of 99,995
_BATCH = 32
_COLUMNS = (("first_batch_s", 3), ("first_batch_cpu_s", 2), ("memory_mb", 0), ("step_us", 0))
_RANKS = 8


@dataclass(frozen=True)
class ScaleConfig:
    """Measure planning on simulated tables."""

    samples: tuple[int, ...] = (60_000, 6_000_000)
    """Sizes of the tables."""
    data_sets: tuple[int, int] | None = (6, 10_000_000)
    """How many data sets to open side by side as one, and the samples of each; None: leave this row out."""
    repeats: int = 3
    """Fresh processes for each size and order."""
    steps: int = 500
    """Steps to plan; their median is the cost of one."""
    shard_mb: int = 256
    """Size of a shard, in MB (10^6 bytes): sets the number of shards in manifest.json."""
    measure: tuple[Path, ...] = ()
    """Measure these folders as one data set, once, in this process, and print JSON. The benchmark starts its
    processes with this option."""
    sampling: Sampling = "uniform"
    """The order that `measure` plans."""


def write_simulated_tables(
    folder: Path, samples: int, shard_mb: int, row_group: int = _ROW_GROUP, seed: int = 0
) -> None:
    """manifest.json and samples.parquet of a data set of the Kaggle shape, without its shards.

    Keys are random 60-bit numbers, which depend on `seed`.
    """
    size = len(npy_header(KAGGLE_SHAPE)) + 2 * int(np.prod(KAGGLE_SHAPE))
    member = TAR_BLOCK + padded(size) + 2 * TAR_BLOCK
    per_shard = max(1, shard_mb * 10**6 // member)
    rng = np.random.default_rng(seed)
    # Random, and sorted within each split, as `pack` writes the keys of the Kaggle data.
    numbers = np.unique(rng.integers(0, 16**_KEY_DIGITS, samples + samples // 1000 + 100, np.int64))
    numbers = rng.permutation(numbers)[:samples]
    train = round(samples * _TRAIN_SHARE)
    numbers[:train].sort()
    numbers[train:].sort()
    counts = np.zeros((2, 2), np.int64)
    shard_of_train = -(-train // per_shard)
    with pq.ParquetWriter(folder / SAMPLES, SAMPLES_SCHEMA) as writer:
        for start in range(0, samples, row_group):
            place = np.arange(start, min(start + row_group, samples))
            is_test = (place >= train).astype(np.int8)
            within = np.where(is_test, place - train, place)
            target = np.where(is_test, -1, rng.random(len(place)) < 0.1).astype(np.int8)
            counts += [[(is_test == split).sum(), ((is_test == split) & (target == 1)).sum()] for split in (0, 1)]
            columns = {
                "key": _hexadecimal(numbers[place]),
                "split": is_test,
                "target": target,
                "fold": np.where(is_test, -1, rng.integers(0, 5, len(place))).astype(np.int8),
                "shard": (within // per_shard + np.where(is_test, shard_of_train, 0)).astype(np.int32),
                "offset": TAR_BLOCK + within % per_shard * member,
                "size": np.full(len(place), size, np.int32),
            }
            writer.write_table(pa.table(columns, schema=SAMPLES_SCHEMA))
    shards = []
    for split, total in (("train", train), ("test", samples - train)):
        for number, first in enumerate(range(0, total, per_shard)):
            held = min(per_shard, total - first)
            digest = hashlib.sha256(f"{split}{number}".encode()).hexdigest()
            shards.append(Shard(f"{split}-{number:06d}.tar", held * member + 2 * TAR_BLOCK, digest, digest, held))
    splits = {
        name: {"samples": int(counts[k, 0]), "positive": int(counts[k, 1]), "missing": 0, "quarantined": 0}
        for k, name in enumerate(("train", "test"))
    }
    made = {"folds": 5, "seed": 0, "time_bin": 1, "shard_mb": shard_mb, "catalog_sha256": ""}
    content = manifest_content(KAGGLE_SHAPE, shards, splits, made, {SAMPLES: file_sha256(folder / SAMPLES)})
    (folder / MANIFEST).write_text(canonical_json(content))


def _hexadecimal(numbers: Int64s) -> pa.Array:
    """Numbers as strings of hexadecimal digits."""
    digits = np.empty((len(numbers), _KEY_DIGITS), np.uint8)
    for column in range(_KEY_DIGITS):
        nibble = (numbers >> (4 * (_KEY_DIGITS - 1 - column))) & 15
        digits[:, column] = np.frombuffer(b"0123456789abcdef", np.uint8)[nibble]
    ends = np.arange(len(numbers) + 1, dtype=np.int32) * _KEY_DIGITS
    return pa.StringArray.from_buffers(len(numbers), pa.py_buffer(ends), pa.py_buffer(digits))


def plan_step(order: Order, share: Share, step: int) -> tuple[Int64s, Any]:
    """Rows and draws of one batch, as the loader plans them."""
    positions, _ = share.positions(step)
    rows = order.rows_at(0, positions)
    canvas, planes = CanvasConfig(), (2, *KAGGLE_SHAPE[1:])
    return rows, draw(DrawConfig(), canvas, planes, EpochPart(0, 0, positions, len(order)))


def measure(config: ScaleConfig, *folders: Path) -> dict[str, float]:
    """Time to the first planned batch (s), memory beyond the imports (MB), a step's cost (us)."""
    # The first use loads SciPy's lookup tables and starts Arrow's threads: which counts as importing.
    few = Order(np.arange(100), np.arange(100, dtype=np.int8) % 2, config.sampling)
    plan_step(few, Share(100, _BATCH), 0)
    before = _peak_mb()
    began, cpu = time.perf_counter(), time.process_time()
    manifest = read_manifests(folders)
    opened = time.perf_counter()
    rows = manifest.rows("train", 0)
    order = Order(rows, manifest.targets(rows), config.sampling)
    share = Share(len(order), _BATCH, rank=3, world_size=_RANKS)
    plan_step(order, share, 0)
    first, cpu = time.perf_counter(), time.process_time() - cpu
    costs = []
    for step in np.random.default_rng(0).integers(0, share.steps, config.steps).tolist():
        start = time.perf_counter()
        plan_step(order, share, step)
        costs.append(time.perf_counter() - start)
    return {
        "open_s": opened - began,
        "first_batch_s": first - began,
        "first_batch_cpu_s": cpu,
        "memory_mb": _peak_mb() - before,
        "step_us": 1e6 * statistics.median(costs),
    }


def _peak_mb() -> float:
    # Not getrusage: a process inherits its parent's peak there.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def main(config: ScaleConfig) -> None:
    """Print a table of medians and ranges."""
    if config.measure:
        print(json.dumps(measure(config, *config.measure)))
        return
    print("samples        order     first batch, s; its CPU, s; memory, MB; planning a step, us: median (range)")
    for samples in config.samples:
        _print_rows(config, f"{samples:,}", 1, samples)
    if config.data_sets:
        count, samples = config.data_sets
        _print_rows(config, f"{count} x {samples:,}", count, samples)


def _print_rows(config: ScaleConfig, label: str, count: int, samples: int) -> None:
    """Simulate `count` data sets and print a row for each order."""
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, str(number)) for number in range(count)]
        for seed, folder in enumerate(folders):
            folder.mkdir()
            write_simulated_tables(folder, samples, config.shard_mb, seed=seed)
        os.sync()  # otherwise writing these tables to the disk would take cores from the measured processes
        for sampling in ("uniform", "weighted"):
            words = [sys.executable, __file__, "--measure", *map(str, folders), "--sampling", sampling]
            found = [
                json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
                for _ in range(config.repeats)
            ]
            cells = [_with_range([line[key] for line in found], digits) for key, digits in _COLUMNS]
            print(f"{label:<14} {sampling:<9} " + "  ".join(cells), flush=True)


def _with_range(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main(tyro.cli(ScaleConfig))
