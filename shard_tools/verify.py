"""Check that every byte of a data set is as it was packed."""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shard_tools.cadence import check_finite
from shard_tools.errors import InputError, StoreError
from shard_tools.manifest import Manifest, has_repeated_keys, read_manifest
from shard_tools.manifest_rows import only_rows
from shard_tools.sample import read_snippet_of
from shard_tools.sample_table import SAMPLES
from shard_tools.storage.base import Store, StoreConfig
from shard_tools.tasks.base import TaskConfig, Work
from shard_tools.tasks.local import InTurn
from shard_tools.tasks.opening import open_tasks, run_shown


def verify(
    root: Path | str,
    config: StoreConfig = StoreConfig(),  # noqa: B008 (immutable)
    where: TaskConfig = TaskConfig(),  # noqa: B008
) -> Iterator[str]:
    """Yield one line for every fault: in the manifest, a shard's size or bytes, an index or a snippet."""
    try:
        manifest = read_manifest(where.absolute(root), config)
        repeated = has_repeated_keys(manifest)  # slow for a large table
    except InputError as error:
        yield str(error)
        return
    store = manifest.store
    if repeated:
        yield f"{store.where(SAMPLES)}: a key is in both splits"
    for name, expected in manifest.files.items():
        yield from _verify_file(store, name, expected)
    calls = _OfShards(manifest)
    names = [store.where(shard.name) for shard in manifest.shards]
    # Faults are yielded in the order of the shards: on a cluster, those of a shard wait for the shards before it.
    ended: dict[int, list[str]] = {}
    following = 0
    with open_tasks(where, InTurn()) as tasks:
        look = functools.partial(verify_shard, elsewhere=where.on == "ray")
        for done in run_shown(tasks, Work(look, calls, "verifying", "shards", names)):
            # What no node could read is read here: it is a fault only if this machine cannot read it either.
            unread = isinstance(done.error, OSError)
            ended[done.number] = verify_shard(*calls[done.number]) if unread else done.result()
            while following in ended:
                yield from ended.pop(following)
                following += 1


class _OfShards(Sequence[tuple[Manifest]]):
    """For each shard, a manifest of that shard alone, made on request."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._rows = np.argsort(manifest.shard, kind="stable")
        self._ends = np.searchsorted(manifest.shard[self._rows], np.arange(len(manifest.shards) + 1))

    def __len__(self) -> int:
        return len(self._manifest.shards)

    def __getitem__(self, number: Any) -> Any:
        if number >= len(self):
            raise IndexError
        rows = self._rows[self._ends[number] : self._ends[number + 1]]
        return (only_rows(self._manifest, rows),)


def verify_shard(contents: Manifest, elsewhere: bool = False) -> list[str]:
    """The faults of the one shard in `contents`, of its index and of its snippets.

    An unreadable file is a fault; with `elsewhere`, OSError is raised instead, as another machine may be able to read
    it.
    """
    (shard,) = contents.shards
    verify_file = _find_faults if elsewhere else _verify_file
    faults = list(verify_file(contents.store, shard.name, shard.sha256, shard.bytes))
    of_index = list(verify_file(contents.store, shard.name.removesuffix(".tar") + ".idx", shard.index_sha256))
    return [*faults, *of_index, *([] if faults else _verify_samples(contents))]


def _verify_file(store: Store, name: str, sha256: str, size: int | None = None) -> Iterator[str]:
    """At most one fault of one file. A file that cannot be read is a fault."""
    try:
        yield from _find_faults(store, name, sha256, size)
    except OSError as error:
        yield f"{store.where(name)}: {error.strerror}"


def _find_faults(store: Store, name: str, sha256: str, size: int | None = None) -> Iterator[str]:
    """At most one fault of the bytes of one file. Raises OSError where they cannot be read."""
    where = store.where(name)
    found = store.size(name) if size is not None else None
    if found != size and found is not None:
        yield f"{where}: {found} bytes, expected {size}"
        return
    digest = hashlib.sha256()
    for chunk in store.chunks(name):
        digest.update(chunk)
    if digest.hexdigest() != sha256:
        yield f"{where}: its bytes changed after packing (SHA-256 differs)"


def _verify_samples(contents: Manifest) -> Iterator[str]:
    """The faults of the samples of an intact shard: the manifest's offsets may still be wrong."""
    where = contents.store.where(contents.shards[0].name)
    for row in range(len(contents)):
        try:
            check_finite(read_snippet_of(contents, row), f"{where}, {contents.key(row)}")
        except StoreError:
            raise  # not a fault of the data set
        except InputError as error:
            yield str(error)
