"""With --on-bad-sample skip, every image is that of the sample that its batch names, whichever read fails."""

import dataclasses
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.augment import DrawConfig
from pipeline.loader import Engine, Loader, LoaderConfig
from pipeline.plan import Order, Sampling, Share
from pipeline.planner import Planned
from shard_tools.errors import InputError
from shard_tools.manifest import TAR_BLOCK, Manifest
from shard_tools.storage.base import Bytes, Check, Store
from tests.tiny import CANVAS, pack_tiny

BUSY = DrawConfig(cutmix=0.7, mixup=0.3, inject=0.5)
MOST_READS = 3
Failures = dict[int, set[int]]
"""For each row, the reads that fail, counted from 1."""
ALWAYS = set(range(1, 1000))
Found = dict[int, tuple[int, float, Tensor]]
"""For each position of an epoch: row, target and image."""

on_each_engine = pytest.mark.parametrize("engine", ["cpu", "dali"])


class FailingStore:
    """A real store, some of whose reads come out short."""

    def __init__(self, store: Store, manifest: Manifest, failures: Failures) -> None:
        self._store, self._failures = store, failures
        self._row_at = {
            (manifest.shards[int(shard)].name, int(offset) - TAR_BLOCK): row
            for row, (shard, offset) in enumerate(zip(manifest.shard, manifest.offset, strict=True))
        }
        self._reads: Counter[int] = Counter()
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read_record(self, name: str, offset: int, parts: Sequence[Bytes], check: Check) -> None:
        row = self._row_at[name, offset]
        with self._lock:
            self._reads[row] += 1
            fails = self._reads[row] in self._failures.get(row, ())
        if not fails:
            return self._store.read_record(name, offset, parts, check)
        for part in parts:
            part[:] = 0x3C  # 1.06 as float16
        return check(0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("skipping"), train=40)


def order_of(manifest: Manifest, length: int, sampling: Sampling) -> Order:
    """The order of the first training rows. Weighted, one row is half of all that is drawn, so that rows repeat."""
    rows = manifest.rows("train")[:length]
    return Order(rows, (np.arange(length) > 0).astype(np.int8), sampling, seed=3)


def read_epoch(manifest: Manifest, order: Order, engine: Engine, policy: str = "skip", **share: int) -> Found:
    """The samples that count in a loader's share of an epoch."""
    config = LoaderConfig(engine, loader_threads=2, on_bad_sample=policy, max_bad=len(manifest))  # type: ignore[arg-type]
    loader = Loader(manifest, order, Share(len(order), **share), CANVAS, BUSY, config=config)
    found = {}
    try:
        for batch in loader:
            for slot in batch.counts.nonzero().flatten().tolist():
                position = int(batch.position[slot])
                assert position not in found
                found[position] = (int(batch.row[slot]), float(batch.target[slot]), batch.image[slot].clone())
    finally:
        loader.close()
    return found


def check_healthy(found: Found, manifest: Manifest, engine: Engine) -> None:
    """Check images and targets against a loader without failures that plans these rows."""
    rows = np.array([found[position][0] for position in range(len(found))])
    expected = read_epoch(manifest, Order(rows, rows, "sequential", seed=3), engine, "fail", batch_size=len(found))
    for position, (row, target, image) in found.items():
        assert (row, target) == expected[position][:2], position
        assert torch.equal(image, expected[position][2]), position


def check_replacements(found: Found, order: Order, failures: Failures) -> None:
    """Check that good samples keep their places, and that none is replaced by its own partner or by a bad sample."""
    planned = order.rows_at(0, np.arange(len(order)))
    for position, (row, _, _) in found.items():
        assert row == planned[position] or planned[position] in failures
        assert failures.get(row) != ALWAYS
        partner = found.get(position ^ 1)
        if partner and row != planned[position]:
            assert row != partner[0]


@on_each_engine
@settings(max_examples=25)
@given(data=st.data(), length=st.integers(1, 12), sampling=st.sampled_from(["uniform", "weighted"]))
def test_every_image_is_that_of_the_sample_its_row_names_whichever_read_fails(
    manifest: Manifest, engine: Engine, data: st.DataObject, length: int, sampling: Sampling
) -> None:
    order = order_of(manifest, length, sampling)
    when = st.one_of(st.just(ALWAYS), st.sets(st.integers(1, MOST_READS), min_size=1))
    failures = data.draw(st.dictionaries(st.sampled_from(order.rows.tolist()), when, max_size=6))
    batch_size = 2 * data.draw(st.integers(1, 7))  # even, so that a row is read for only one batch
    store: Any = FailingStore(manifest.store, manifest, failures)
    failing = dataclasses.replace(manifest, store=store)
    try:
        found = read_epoch(failing, order, engine, batch_size=batch_size)
    except InputError:
        planned = set(order.rows_at(0, np.arange(length)).tolist())
        assert len(planned - failures.keys()) < 2  # one of them may be the partner
        return
    assert sorted(found) == list(range(length))
    check_healthy(found, manifest, engine)
    check_replacements(found, order, failures)


@on_each_engine
@settings(max_examples=15)
@given(
    data=st.data(),
    length=st.integers(3, 14),
    batch_size=st.integers(1, 6),
    world_size=st.integers(1, 3),
    sampling=st.sampled_from(["uniform", "weighted"]),
)
def test_bad_samples_are_replaced_alike_on_any_number_of_ranks_and_never_by_what_they_are_mixed_with(
    manifest: Manifest,
    engine: Engine,
    data: st.DataObject,
    length: int,
    batch_size: int,
    world_size: int,
    sampling: Sampling,
) -> None:
    """Also with batches of an odd size, where a pair of partners may be read for two batches."""
    order = order_of(manifest, length, sampling)
    read = sorted(set(order.rows_at(0, np.arange(length)).tolist()))
    bad = data.draw(st.sets(st.sampled_from(read), max_size=len(read) - 2)) if len(read) > 2 else set()
    failures = dict.fromkeys(bad, ALWAYS)
    store: Any = FailingStore(manifest.store, manifest, failures)
    failing = dataclasses.replace(manifest, store=store)
    found: Found = {}
    for rank in range(world_size):
        found |= read_epoch(failing, order, engine, batch_size=batch_size, rank=rank, world_size=world_size)
    alone = read_epoch(failing, order, engine, batch_size=length)
    assert sorted(found) == list(range(length))
    assert {place: each[:2] for place, each in found.items()} == {place: each[:2] for place, each in alone.items()}
    check_healthy(found, manifest, engine)
    check_replacements(found, order, failures)


@on_each_engine
@pytest.mark.parametrize("read", range(1, MOST_READS + 1))
@pytest.mark.parametrize("bad", [0, 1])
def test_a_partner_whose_later_read_fails_is_replaced_too(
    manifest: Manifest, engine: Engine, bad: int, read: int
) -> None:
    """After a bad sample its pair is read again, and that read of the partner may fail."""
    order = order_of(manifest, 8, "uniform")
    pair = order.rows_at(0, np.arange(2)).tolist()
    failures = {pair[bad]: ALWAYS, pair[1 - bad]: {read}}
    store: Any = FailingStore(manifest.store, manifest, failures)
    found = read_epoch(dataclasses.replace(manifest, store=store), order, engine, batch_size=8)
    check_healthy(found, manifest, engine)
    check_replacements(found, order, failures)


@on_each_engine
@pytest.mark.parametrize(("length", "bad"), [(1, [0]), (2, [0]), (2, [1]), (3, [0, 1]), (4, [0, 1, 2, 3])])
def test_where_none_is_left_to_take_its_place_a_bad_sample_is_an_error(
    manifest: Manifest, engine: Engine, length: int, bad: list[int]
) -> None:
    order = order_of(manifest, length, "uniform")
    failures = dict.fromkeys(order.rows_at(0, np.array(bad)).tolist(), ALWAYS)
    store: Any = FailingStore(manifest.store, manifest, failures)
    with pytest.raises(InputError, match=r"train-000000\.tar.*no other sample of the epoch can take its place"):
        read_epoch(dataclasses.replace(manifest, store=store), order, engine, batch_size=4)


@pytest.mark.parametrize("engine", ["cpu", "dali", "no canvas"])
@pytest.mark.parametrize("read", range(1, MOST_READS + 1))
def test_what_is_not_training_fails_at_the_read_that_fails(manifest: Manifest, engine: str, read: int) -> None:
    """Raw snippets are never replaced either, with draws or without. Each read of a row here is in another epoch."""
    order = dataclasses.replace(order_of(manifest, 8, "uniform"), sampling="sequential")
    row = int(order.rows[5])
    store: Any = FailingStore(manifest.store, manifest, {row: {read}})
    config = LoaderConfig("cpu" if engine == "no canvas" else engine, on_bad_sample="skip")  # type: ignore[arg-type]
    canvas, draws = (None, BUSY) if engine == "no canvas" else (CANVAS, None)
    failing = dataclasses.replace(manifest, store=store)
    loader = Loader(failing, order, Share(8, 4), canvas, draws, config=config)
    for _ in range(read - 1):
        assert len(list(loader)) == 2
    with pytest.raises(InputError, match=f"train-000000.tar, {manifest.key(row)}"):
        list(loader)
    loader.close()


class Forgetful:
    """An engine that notes a failed read, and still returns the batch."""

    def start(self, planned: Planned, epoch: int) -> None:
        planned.failed[0] = InputError("not read")
        self._planned = planned

    def next(self) -> tuple[Planned, Tensor]:
        return self._planned, torch.zeros(1)

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_no_engine_can_forget_what_could_not_be_read(manifest: Manifest) -> None:
    order = order_of(manifest, 8, "uniform")
    loader = Loader(manifest, order, Share(8, 8), CANVAS, BUSY, config=LoaderConfig("cpu"))
    loader.close()
    loader._images = Forgetful()
    with pytest.raises(InputError, match="not read"):
        next(iter(loader))
