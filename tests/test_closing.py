"""A closed loader frees its graph, its buffers and all that refers to them at once, without a garbage collection."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.augment import DrawConfig
from pipeline.loader import Loader, LoaderConfig
from pipeline.plan import Order, Share
from shard_tools.manifest import Manifest
from tests.tiny import CANVAS, pack_tiny


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("closing"), train=20, test=2)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Switch garbage collection off: only objects without references are freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def build(manifest: Manifest, engine: str, draws: DrawConfig | None, canvas: object = CANVAS) -> Loader:
    rows = manifest.rows("train")
    order = Order(rows, manifest.target[rows], "sequential")
    share = Share(len(order), 4, 1, 0, 1)
    return Loader(manifest, order, share, canvas, draws, config=LoaderConfig(engine, 2))  # type: ignore[arg-type]


def parts_of(images: Any) -> dict[str, Any]:
    """An engine, and its parts that hold memory."""
    inner = images._blocks._reader if hasattr(images, "_blocks") else images
    found = {"images": images, "pool": inner._pool, "threads": inner._executor}
    return found | ({"graph": images._graph} if hasattr(images, "_graph") else {})


@pytest.mark.parametrize("when", ["unused", "begun", "in the middle", "at the end", "begun again"])
@pytest.mark.parametrize("engine", ["dali", "cpu", "raw"])
@pytest.mark.parametrize("draws", [None, DrawConfig(cutmix=0.5)], ids=["evaluation", "training"])
def test_a_closed_loader_lets_go_of_everything_at_once(
    manifest: Manifest, no_collector: None, engine: str, draws: DrawConfig | None, when: str
) -> None:
    loader = build(manifest, "auto" if engine == "raw" else engine, draws, None if engine == "raw" else CANVAS)
    iterator, is_used = iter(loader), when not in ("unused", "begun")
    if is_used:
        before = next(iterator)
        kept = before.image.clone()
    if when in ("at the end", "begun again"):
        list(iterator)
    if when in ("begun", "begun again"):
        loader.begin()
    parts = {name: weakref.ref(part) for name, part in parts_of(loader._images).items()}
    loader.close()
    assert [name for name, part in parts.items() if part() is not None] == []
    if is_used:
        assert (before.image == kept).all()
    loader.close()  # closing it again changes nothing
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(loader))


def test_a_graph_that_is_let_go_of_without_closing_goes_too(manifest: Manifest, no_collector: None) -> None:
    loader = build(manifest, "dali", None)
    next(iter(loader))
    images: Any = loader._images
    parts = weakref.ref(images), weakref.ref(images._graph)
    del loader, images
    assert [part() for part in parts] == [None, None]


def test_an_iteration_ends_with_its_loader(manifest: Manifest) -> None:
    loader = build(manifest, "cpu", None)
    iterator = iter(loader)
    next(iterator)
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(iterator)
