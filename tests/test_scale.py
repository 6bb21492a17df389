"""Planning costs the same at any size: it makes no table of an epoch, and meets no place twice."""

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scale_bench import ScaleConfig, measure, plan_step, write_simulated_tables
from pipeline.plan import Order, Sampling, Share
from pipeline.randomness import permute
from shard_tools.joined_manifest import read_manifests
from shard_tools.manifest import read_manifest

BILLION = 10**9


class Range:
    """Rows 0 to `size` - 1, without storing them."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        assert ((positions >= 0) & (positions < self.size)).all()
        return positions


def peak_of_a_step(order: Order, share: Share, step: int) -> int:
    """The most bytes that planning a step holds at once."""
    plan_step(order, share, step)  # the first use allocates what is kept
    tracemalloc.start()
    try:
        plan_step(order, share, step)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("sampling", ["uniform", "sequential"])
def test_a_step_among_a_billion_takes_the_memory_of_one_among_thousands(sampling: Sampling) -> None:
    peaks = []
    for size in (10_000, 60_000_000, BILLION):
        order = Order(Range(size), np.zeros(0, np.int8), sampling)  # type: ignore[arg-type]
        share = Share(size, 32, rank=5, world_size=8)
        peaks.append(max(peak_of_a_step(order, share, step) for step in (0, share.steps // 2, share.steps - 1)))
    assert max(peaks) < 200_000
    assert max(peaks) < 2 * min(peaks)


def test_a_weighted_step_among_millions_takes_the_memory_of_one_among_thousands() -> None:
    peaks = []
    for size in (10_000, 5_000_000):
        targets = (np.arange(size) % 10 == 0).astype(np.int8)
        peaks.append(peak_of_a_step(Order(np.arange(size), targets, "weighted"), Share(size, 32), 7))
    assert max(peaks) < 200_000


@settings(max_examples=20)
@given(size=st.integers(10**6, 10**12), seed=st.integers(0, 2**63 - 1), start=st.floats(0, 1))
def test_a_window_of_a_huge_permutation_has_no_repeats(size: int, seed: int, start: float) -> None:
    first = int(start * (size - 10_000))
    places = permute(seed, 3, np.arange(first, first + 10_000), size)
    assert len(np.unique(places)) == 10_000
    assert places.min() >= 0 and places.max() < size


@pytest.mark.parametrize("size", [10**9, 10**12])
def test_windows_of_an_epoch_do_not_overlap_and_spread_over_all_of_it(size: int) -> None:
    windows = [permute(1, 0, np.arange(start, start + 5000), size) for start in (0, size // 3, size - 5000)]
    assert len(np.unique(np.concatenate(windows))) == 15_000
    for places in windows:
        tenths = np.bincount(places * 10 // size, minlength=10)
        assert ((tenths - 500) ** 2 / 500).sum() < 9 + 6 * np.sqrt(18)


def test_ranks_share_a_step_of_a_huge_epoch_without_overlap() -> None:
    order = Order(Range(BILLION), np.zeros(0, np.int8), seed=2)  # type: ignore[arg-type]
    world_size = 512
    shares = [Share(BILLION, 32, rank=rank, world_size=world_size) for rank in range(world_size)]
    step = shares[0].steps // 2
    rows = np.concatenate([order.rows_at(0, share.positions(step)[0]) for share in shares])
    assert len(np.unique(rows)) == 32 * world_size
    one = Share(BILLION, 32 * world_size)
    assert set(rows.tolist()) == set(order.rows_at(0, one.positions(step)[0]).tolist())


def test_a_simulated_table_is_one_that_is_read(tmp_path: Path) -> None:
    """The benchmark's table is like those of `pack`, with more than one row group and shard."""
    write_simulated_tables(tmp_path, 20_000, shard_mb=50, row_group=3000)
    manifest = read_manifest(tmp_path)
    assert len(manifest) == 20_000 and len(manifest.shards) > 100
    table = pq.read_table(tmp_path / "samples.parquet")
    assert manifest.keys.to_pylist() == table["key"].to_pylist()
    for name in table.column_names[1:]:
        assert getattr(manifest, name).tolist() == table[name].to_pylist()
    assert len(set(manifest.keys_of(np.arange(20_000)))) == 20_000
    assert sum(shard.samples for shard in manifest.shards) == 20_000
    found = measure(ScaleConfig(steps=5), tmp_path)
    assert found["first_batch_s"] >= found["open_s"] > 0 and found["step_us"] > 0


def test_several_simulated_tables_are_opened_as_one(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(3)]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        write_simulated_tables(folder, 2000, shard_mb=50, row_group=700, seed=seed)
    assert len(read_manifests(folders)) == 6000
    assert measure(ScaleConfig(steps=5), *folders)["open_s"] > 0
