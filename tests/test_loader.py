"""The loader's promises: planned order, checked bytes, stable batches, resumption, clear errors."""

import dataclasses
import itertools
import os
import shutil
import threading
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.augment import DrawConfig
from pipeline.buffers import BufferPool
from pipeline.dali_graph import PREFETCH_DEPTH
from pipeline.loader import Batch, Engine, Loader, LoaderConfig
from pipeline.plan import Order, Share
from shard_tools.errors import InputError
from shard_tools.manifest import TAR_BLOCK, Manifest, read_manifest
from tests.tiny import CANVAS, SHAPE, pack_tiny

SAMPLES = 53
ENGINES: tuple[Engine, ...] = ("cpu", "dali")
on_each_engine = pytest.mark.parametrize("engine", ENGINES)  # DALI's is the GPU's engine, here on a CPU

BUSY = DrawConfig(cutmix=0.6, mixup=0.3, inject=0.6)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("loader"), train=SAMPLES)


def train_loader(manifest: Manifest, batch_size: int = 8, engine: Engine = "auto", **share: int) -> Loader:
    rows = manifest.rows("train")
    order = Order(rows, manifest.target[rows], "uniform", seed=3)
    return Loader(
        manifest,
        order,
        Share(len(rows), batch_size, **share),
        CANVAS,
        BUSY,
        config=LoaderConfig(engine),
    )


def copied(batch: Batch) -> tuple[torch.Tensor, ...]:
    return batch.image.clone(), batch.target.clone(), batch.counts.clone(), batch.row.clone()


def same(ours: list[tuple[torch.Tensor, ...]], theirs: list[tuple[torch.Tensor, ...]]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a, b) for mine, yours in pairs for a, b in zip(mine, yours, strict=True))


def by_row(loader: Loader) -> dict[int, tuple[torch.Tensor, float]]:
    """Image and target of each row of one epoch."""
    found = {}
    for batch in loader:
        for slot in batch.counts.nonzero().flatten().tolist():
            assert int(batch.row[slot]) not in found
            found[int(batch.row[slot])] = (batch.image[slot].clone(), float(batch.target[slot]))
    return found


def test_an_epoch_has_every_row_once_and_epochs_differ(manifest: Manifest) -> None:
    loader = train_loader(manifest)
    epochs = [[row for batch in loader for row in batch.row[batch.counts].tolist()] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == manifest.rows("train").tolist()
    assert epochs[0] != epochs[1]
    loader.close()


@on_each_engine
def test_a_batch_stays_what_it_is_while_others_follow(manifest: Manifest, engine: Engine) -> None:
    loader = train_loader(manifest, engine=engine)
    kept = [(batch, copied(batch)) for _ in range(3) for batch in loader]
    assert same([copied(batch) for batch, _ in kept], [before for _, before in kept])
    loader.close()


def test_memory_is_used_again_when_no_view_of_it_is_left_and_not_before() -> None:
    pool = BufferPool((2, 3), np.float32)
    tensor = pool.take()
    address, view = tensor.data_ptr(), tensor[1]
    del tensor
    assert pool.take().data_ptr() != address
    other = view.numpy()
    del view
    assert pool.take().data_ptr() != address
    del other
    assert address in (pool.take().data_ptr(), pool.take().data_ptr())


@on_each_engine
@settings(max_examples=12)
@given(batch_size=st.integers(1, 20), world_size=st.integers(1, 3), accumulate=st.integers(1, 2))
def test_images_and_targets_do_not_depend_on_batch_size_or_ranks(
    manifest: Manifest, engine: Engine, batch_size: int, world_size: int, accumulate: int
) -> None:
    """That holds for augmentation and CutMix too: partners outside a batch are read for it."""
    whole = train_loader(manifest, batch_size=64, engine=engine)
    expected = by_row(whole)
    found = {}
    for rank in range(world_size):
        loader = train_loader(manifest, batch_size, engine, accumulate=accumulate, rank=rank, world_size=world_size)
        found |= by_row(loader)
        loader.close()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[row][0], expected[row][0]) for row in expected)
    assert {row: value[1] for row, value in found.items()} == {row: value[1] for row, value in expected.items()}
    whole.close()


@on_each_engine
@settings(max_examples=10)
@given(stop=st.integers(0, 13))
def test_a_loader_continues_where_another_stopped(manifest: Manifest, engine: Engine, stop: int) -> None:
    def batches(loader: Loader) -> list[tuple[torch.Tensor, ...]]:
        return [copied(batch) for _ in range(2) for batch in loader]

    first, second = (train_loader(manifest, engine=engine) for _ in range(2))
    expected = batches(train_loader(manifest, engine=engine))
    seen = []
    for batch in (batch for _ in range(2) for batch in first):
        if len(seen) == stop:
            break
        seen.append(copied(batch))
        state = first.state_dict()
    if stop:
        second.load_state_dict(state)
    while len(seen) < len(expected):
        seen += [copied(batch) for batch in second]
    assert same(seen, expected)
    first.close()
    second.close()


@on_each_engine
def test_an_iteration_left_early_is_taken_up_after_its_last_batch(manifest: Manifest, engine: Engine) -> None:
    expected = [copied(batch) for batch in train_loader(manifest, engine=engine)]
    loader = train_loader(manifest, engine=engine)
    seen = []
    while len(seen) < len(expected):
        for batch in loader:
            seen.append(copied(batch))
            if len(seen) % 2 == 0:
                break
    assert same(seen, expected)
    loader.close()


class CountingStore:
    """A store that counts the reads that it is asked for."""

    def __init__(self, store: Any) -> None:
        self._store, self._lock, self.reads = store, threading.Lock(), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read_record(self, *arguments: Any) -> None:
        with self._lock:
            self.reads += 1
        self._store.read_record(*arguments)


def settle(loader: Loader) -> None:
    """Wait until a loader has made everything that it has begun."""
    images: Any = loader._images
    started = [block for block, _ in images._blocks._reading] if hasattr(images, "_blocks") else images._started
    wait([future for work in started for future in work.pending])


@on_each_engine
def test_batches_that_were_begun_are_read_before_they_are_asked_for_and_no_more_than_in_an_iteration(
    manifest: Manifest, engine: Engine
) -> None:
    store: Any = CountingStore(manifest.store)
    loader = train_loader(dataclasses.replace(manifest, store=store), engine=engine)
    read = []
    for _ in range(2):
        for _ in range(3):
            loader.begin()
        settle(loader)
        read.append(store.reads)
        list(loader)
        read.append(store.reads)
    ahead = LoaderConfig().read_ahead + 1 + (PREFETCH_DEPTH if engine == "dali" else 0)
    epoch = 8 * len(loader)
    assert read == [8 * ahead, epoch, epoch + 8 * ahead, 2 * epoch]
    loader.close()


@on_each_engine
@settings(max_examples=10)
@given(begins=st.sets(st.integers(0, 20)), stops=st.sets(st.integers(0, 20)))
def test_what_was_begun_in_advance_changes_neither_batches_nor_state(
    manifest: Manifest, engine: Engine, begins: set[int], stops: set[int]
) -> None:
    plain, loader = (train_loader(manifest, engine=engine) for _ in range(2))
    expected = [copied(batch) for _ in range(3) for batch in plain]
    seen: list[tuple[torch.Tensor, ...]] = []
    while len(seen) < len(expected):
        for batch in loader:
            seen.append(copied(batch))
            if len(seen) in stops:
                break
        if len(seen) in begins:
            state = loader.state_dict()
            loader.begin()
            assert loader.state_dict() == state
    assert same(seen, expected)
    plain.close()
    loader.close()


@on_each_engine
@pytest.mark.parametrize("taken", [0, 3, 7])
def test_a_state_that_is_loaded_drops_what_was_begun(manifest: Manifest, engine: Engine, taken: int) -> None:
    loader = train_loader(manifest, engine=engine)
    expected = [copied(batch) for batch in loader]
    for epoch, batch in ((0, 0), (1, 2), (0, 2), (0, 0)):
        list(itertools.islice(loader, taken))
        loader.begin()
        loader.load_state_dict({"epoch": epoch, "position": 8 * batch})
        loader.begin()
        rest = [copied(each) for each in loader]
        assert len(rest) == len(expected) - batch
        assert same(rest, expected[batch:]) == (epoch == 0)
    loader.close()


@on_each_engine
def test_a_sample_that_breaks_after_its_batch_was_planned_fails_when_it_is_asked_for(
    manifest: Manifest, tmp_path: Path, engine: Engine
) -> None:
    copy = damaged(manifest, tmp_path)
    loader = train_loader(copy, engine=engine)
    first = [copied(batch) for batch in loader]
    key = break_sample(copy, 5)
    loader.begin()
    settle(loader)
    for _ in range(2):  # the second time too
        with pytest.raises(InputError, match=key):
            list(loader)
    shard = copy.shards[int(copy.shard[5])].name
    (copy.root / shard).write_bytes((manifest.root / shard).read_bytes())
    loader.load_state_dict({"epoch": 0, "position": 0})
    assert same([copied(batch) for batch in loader], first)
    loader.close()


def test_a_state_goes_over_to_another_number_of_ranks_but_not_into_the_middle_of_a_step(manifest: Manifest) -> None:
    state = {"epoch": 2, "position": 24}
    loader = train_loader(manifest, batch_size=4, world_size=2)
    loader.load_state_dict(state)
    assert loader.state_dict() == state
    with pytest.raises(InputError, match="position 24"):
        train_loader(manifest, batch_size=7).load_state_dict(state)


def test_evaluation_batches_are_the_plain_canvases_in_order(manifest: Manifest) -> None:
    rows = manifest.rows("test")
    order = Order(rows, manifest.target[rows], "sequential")
    loader = Loader(manifest, order, Share(len(rows), 4), CANVAS, None, CANVAS.views)
    batches = [copied(batch) for batch in loader]
    assert [row for batch in batches for row in batch[3][batch[2]].tolist()] == rows.tolist()
    assert batches[0][0].shape == (4, len(CANVAS.views), 2, 28, 56)
    assert all((batch[1] == -1).all() for batch in batches)
    loader.close()


def test_without_a_canvas_the_snippets_come_as_they_are(manifest: Manifest) -> None:
    rows = manifest.rows("train")
    order = Order(rows, manifest.target[rows], "uniform", seed=3)
    loader = Loader(manifest, order, Share(len(rows), 8), None)
    kept = [batch for _ in range(2) for batch in loader]
    for batch in kept:
        assert batch.image.is_contiguous() and batch.image.dtype == torch.float16
        for row, snippet in zip(batch.row.tolist(), batch.image, strict=True):
            source = next((manifest.root.parent / "data").rglob(f"{manifest.key(row)}.npy"))
            assert np.array_equal(np.load(source), snippet.numpy())
    assert sorted(row for batch in kept for row in batch.row[batch.counts].tolist()) == sorted([*rows, *rows])
    loader.close()


def test_a_sample_to_which_a_needle_was_added_has_target_1_and_another_image(manifest: Manifest) -> None:
    rows = manifest.rows("train")
    order = Order(rows, manifest.target[rows], "uniform", seed=3)
    quiet = {"flip_frequency": 0.0, "flip_time": 0.0, "roll_frequency": 0.0, "shift_time": 0.0, "gain": 0.0}
    plain, with_needles, with_interference = (
        by_row(
            Loader(
                manifest,
                order,
                Share(len(rows), 8),
                CANVAS,
                DrawConfig(**quiet, offset=0, erase=0, cutmix=0, inject=inject, inject_interference=interference),
            )
        )
        for inject, interference in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0))
    )
    for row, (image, target) in plain.items():
        assert target == manifest.target[row]
        assert with_needles[row][1] == 1 and with_interference[row][1] == target
        assert not torch.equal(image, with_needles[row][0]) and not torch.equal(image, with_interference[row][0])


def test_both_engines_make_the_same_batches(manifest: Manifest) -> None:
    """Batches of an odd size, so that some CutMix partners are outside."""
    rows = manifest.rows("train")
    order = Order(rows, manifest.target[rows], "uniform", seed=3)
    for draws in (dataclasses.replace(BUSY, erase=0.5), None):
        engines = [
            Loader(manifest, order, Share(len(rows), 7), CANVAS, draws, config=LoaderConfig(engine=engine))
            for engine in ("cpu", "dali")
        ]
        for ours, theirs in zip(*engines, strict=True):
            torch.testing.assert_close(ours.image, theirs.image, atol=1e-3, rtol=1e-3)
            assert torch.equal(ours.target, theirs.target) and torch.equal(ours.row, theirs.row)
        for loader in engines:
            loader.close()


def damaged(manifest: Manifest, tmp_path: Path) -> Manifest:
    shutil.copytree(manifest.root, tmp_path / "copy")
    return read_manifest(tmp_path / "copy")


@on_each_engine
@pytest.mark.parametrize("damage", ["cut", "missing", "swapped", "header", "shape"])
def test_a_shard_changed_since_packing_is_refused_by_name_and_key(
    manifest: Manifest, tmp_path: Path, damage: str, engine: Engine
) -> None:
    copy = damaged(manifest, tmp_path)
    shard = copy.root / copy.shards[0].name
    offset, size = int(copy.offset[2]), int(copy.size[2])
    data = bytearray(shard.read_bytes())
    if damage == "cut":
        os.truncate(shard, offset + size // 2)
    elif damage == "missing":
        shard.unlink()
    elif damage == "swapped":
        other = int(copy.offset[3])
        data[offset - TAR_BLOCK : offset] = data[other - TAR_BLOCK : other]
        shard.write_bytes(data)
    elif damage == "header":
        data[offset : offset + 6] = b"broken"
        shard.write_bytes(data)
    else:
        turned = str((SHAPE[0], SHAPE[2], SHAPE[1])).encode()
        data[offset : offset + 128] = bytes(data[offset : offset + 128]).replace(str(SHAPE).encode(), turned)
        shard.write_bytes(data)
    loader = train_loader(copy, engine=engine)
    # A cut removes the samples after it too, and any of them may be read first.
    any_key = damage in ("cut", "missing")
    expected = shard.name if any_key else f"{shard.name}, {copy.key(2)}"
    with pytest.raises(InputError, match=expected):
        for _ in loader:
            pass
    loader.close()


def break_sample(manifest: Manifest, row: int) -> str:
    with (manifest.root / manifest.shards[int(manifest.shard[row])].name).open("r+b") as file:
        file.seek(int(manifest.offset[row]))
        file.write(b"broken")
    return manifest.key(row)


def skipping_loader(manifest: Manifest, engine: Engine, max_bad: int = 10, **share: int) -> Loader:
    rows = manifest.rows("train")
    order = Order(rows, manifest.target[rows], "uniform", seed=3)
    config = LoaderConfig(engine, on_bad_sample="skip", max_bad=max_bad)
    shares = Share(len(rows), share.pop("batch_size", 8), **share)
    return Loader(manifest, order, shares, CANVAS, BUSY, config=config)


@on_each_engine
def test_a_bad_sample_is_skipped_named_and_replaced_alike_on_any_number_of_ranks(
    manifest: Manifest, tmp_path: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    copy = damaged(manifest, tmp_path)
    bad = {row: break_sample(copy, row) for row in (4, 17)}
    epochs = []
    for world_size in (1, 2):
        found = {}
        for rank in range(world_size):
            loader = skipping_loader(copy, engine, batch_size=8 // world_size, rank=rank, world_size=world_size)
            for batch in loader:
                for slot in batch.counts.nonzero().flatten().tolist():
                    found[int(batch.position[slot])] = (int(batch.row[slot]), float(batch.target[slot]))
            assert set(loader.skipped) <= set(bad.values())
            loader.close()
        epochs.append(found)
    assert epochs[0] == epochs[1] and sorted(epochs[0]) == list(range(SAMPLES))
    rows = [row for row, _ in epochs[0].values()]
    assert not bad.keys() & set(rows) and len(set(rows)) == SAMPLES - 2
    assert all(f"skipped {key}" in caplog.text for key in bad.values())


@on_each_engine
def test_the_target_of_a_replaced_sample_is_its_replacements(
    manifest: Manifest, tmp_path: Path, engine: Engine
) -> None:
    copy = damaged(manifest, tmp_path)
    without = np.flatnonzero(copy.target == 0).tolist()
    for row in without:
        break_sample(copy, row)
    loader = skipping_loader(copy, engine, max_bad=SAMPLES)
    assert all((batch.target == 1).all() for batch in loader)
    assert set(loader.skipped) == {copy.key(row) for row in without}
    loader.close()


@on_each_engine
def test_more_bad_samples_than_allowed_are_an_error(manifest: Manifest, tmp_path: Path, engine: Engine) -> None:
    copy = damaged(manifest, tmp_path)
    for row in (1, 2, 3):
        break_sample(copy, row)
    loader = skipping_loader(copy, engine, max_bad=2)
    with pytest.raises(InputError, match=r"more than --max-bad 2 samples.*train-000000\.tar"):
        for _ in loader:
            pass
    loader.close()


@on_each_engine
def test_evaluation_never_skips(manifest: Manifest, tmp_path: Path, engine: Engine) -> None:
    copy = damaged(manifest, tmp_path)
    key = break_sample(copy, 5)
    rows = copy.rows("train")
    order = Order(rows, copy.target[rows], "sequential")
    loader = Loader(copy, order, Share(len(rows), 8), CANVAS, config=LoaderConfig(engine, on_bad_sample="skip"))
    with pytest.raises(InputError, match=key):
        for _ in loader:
            pass
    loader.close()


@on_each_engine
def test_memory_stays_flat_over_a_thousand_batches(manifest: Manifest, engine: Engine) -> None:
    rows = manifest.rows("train")
    order = Order(rows, manifest.target[rows], "uniform", seed=3)
    config = LoaderConfig(engine=engine)
    loader = Loader(manifest, order, Share(len(rows), 8), CANVAS, BUSY, config=config)

    def run(batches: int) -> float:
        for _ in itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), batches):
            pass
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6

    before = run(300)
    assert run(1000) - before < 16  # MB; the images of a thousand batches alone take 100
    loader.close()


def test_impossible_loaders_are_refused() -> None:
    with pytest.raises(InputError, match="--read-ahead"):
        LoaderConfig(read_ahead=0)
