"""Several data sets read as one: their samples one after the other, each from its own store.

A row of the whole is a row of one data set. Rows keep their data set's order, and data sets keep theirs, so that a plan
over all rows is as resumable as a plan over one data set.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shard_tools.errors import InputError
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.storage.base import Bytes, Check, Store, StoreConfig

Roots = str | Path | Sequence[str | Path]
_COLUMNS = ("split", "target", "fold", "shard", "offset", "size")
_MUST_AGREE = ("folds", "time_bin")  # of what the manifests say about packing
_NAMED = 3  # repeated keys in a message
_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing (Fibonacci hashing)


class JoinedStore:
    """The stores of several data sets. A file of the data set number n is named "n/name"."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self._stores = tuple(stores)
        self.root = ", ".join(str(store.root) for store in stores)
        self.is_remote = any(store.is_remote for store in stores)

    def where(self, name: str) -> str:
        """The file as messages name it: in its own data set's folder."""
        store, own_name = self._place(name)
        return store.where(own_name)

    def identify(self, identity: str) -> None:
        """Nothing: each store already knows its data set."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is no such file."""
        store, own_name = self._place(name)
        return store.size(own_name)

    def read_record(self, name: str, offset: int, parts: Sequence[Bytes], check: Check) -> None:
        """As a store of one data set."""
        store, own_name = self._place(name)
        store.read_record(own_name, offset, parts, check)

    def chunks(self, name: str) -> Iterator[bytes]:
        """A whole file, piece by piece."""
        store, own_name = self._place(name)
        return store.chunks(own_name)

    def _place(self, name: str) -> tuple[Store, str]:
        number, own_name = name.split("/", 1)
        return self._stores[int(number)], own_name


def read_manifests(roots: Roots, config: StoreConfig = StoreConfig()) -> Manifest:  # noqa: B008 (immutable)
    """Read one data set, or several as one, each a folder or a URL; several are opened side by side.

    Raises InputError as `read_manifest`, and where data sets have snippets of other shapes, another number of folds,
    other sums of time bins, or a key in common.
    """
    listed = [roots] if isinstance(roots, str | Path) else list(roots)
    if not listed:
        raise InputError("--shards: expected at least one folder or URL")
    if len(listed) == 1:
        return read_manifest(listed[0], config)
    with ThreadPoolExecutor(len(listed)) as pool:
        return join_manifests(list(pool.map(lambda root: read_manifest(root, config), listed)))


def join_manifests(manifests: list[Manifest]) -> Manifest:
    """The manifest of several data sets as one, in their order; takes them out of the list as it goes.

    Raises InputError where they do not fit together.
    """
    _check_alike(manifests)
    _check_keys(manifests)
    first = manifests[0]
    shards = tuple(
        replace(shard, name=f"{number}/{shard.name}")
        for number, manifest in enumerate(manifests)
        for shard in manifest.shards
    )
    before = np.cumsum([0, *(len(manifest.shards) for manifest in manifests)])
    made: dict[str, Any] = {name: first.made[name] for name in _MUST_AGREE if name in first.made}
    whole: dict[str, Any] = {
        "store": JoinedStore([manifest.store for manifest in manifests]),
        "shape": first.shape,
        "shards": shards,
        "splits": {
            split: {count: sum(manifest.splits[split][count] for manifest in manifests) for count in counts}
            for split, counts in first.splits.items()
        },
        "made": made,
        "files": {
            f"{number}/{name}": digest
            for number, manifest in enumerate(manifests)
            for name, digest in manifest.files.items()
        },
        "identity": hashlib.sha256("\n".join(manifest.identity for manifest in manifests).encode()).hexdigest(),
        "keys": pa.chunked_array([chunk for manifest in manifests for chunk in manifest.keys.chunks]),
    }
    # A column of each data set is let go of when the whole column is made: the table is large.
    parts = [{name: getattr(manifest, name) for name in _COLUMNS} for manifest in manifests]
    manifests.clear()
    for name in _COLUMNS:
        columns = [part.pop(name) for part in parts]
        if name == "shard":
            columns = [(column + start).astype(np.int32) for column, start in zip(columns, before, strict=False)]
        whole[name] = np.concatenate(columns)
    assert whole.keys() == {field.name for field in fields(Manifest)}
    return Manifest(**whole)


def _check_alike(manifests: Sequence[Manifest]) -> None:
    """Raise InputError naming two data sets that were packed in ways that do not go together."""
    first = manifests[0]
    looks: list[tuple[str, Callable[[Manifest], Any], str]] = [
        ("snippets of shape", lambda manifest: manifest.shape, "leave one of them out"),
        ("a number of folds of", lambda manifest: manifest.made.get("folds"), "pack one of them again with --folds"),
        ("summed time bins of", lambda manifest: manifest.made.get("time_bin", 1), "pack one of them again"),
    ]
    for manifest in manifests[1:]:
        for what, of, remedy in looks:
            if of(manifest) != of(first):
                raise InputError(
                    f"--shards: {first.root} has {what} {of(first)}, {manifest.root} {of(manifest)}; {remedy}"
                )


def _check_keys(manifests: Sequence[Manifest]) -> None:
    """Raise InputError naming a key that two data sets have in common.

    By sorted hashes of the keys, which takes a fraction of the time and memory of a set of strings; the few keys
    whose hashes are equal are compared themselves.
    """
    hashes = [hash_keys(manifest.keys) for manifest in manifests]
    together = np.sort(np.concatenate(hashes))
    repeated = np.unique(together[1:][together[1:] == together[:-1]])
    del together
    if not len(repeated):
        return
    owner: dict[str, Manifest] = {}
    found: dict[str, tuple[Manifest, Manifest]] = {}
    for manifest, hashed in zip(manifests, hashes, strict=True):
        for key in manifest.keys_of(np.flatnonzero(np.isin(hashed, repeated))):
            if owner.setdefault(key, manifest) is not manifest:
                found[key] = owner[key], manifest
    if found:
        key, (one, other) = next(iter(found.items()))
        more = f" and {len(found) - 1:,} more" if len(found) > 1 else ""
        raise InputError(
            f"--shards: {one.root} and {other.root} both hold {key}{more}; a key names one cadence: leave one data "
            "set out, or pack it again without them"
        )


def hash_keys(keys: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each key; equal keys have equal hashes, whatever array they come from."""
    return np.concatenate([np.zeros(0, np.uint64), *(_hash_chunk(chunk) for chunk in keys.chunks)])


def _hash_chunk(keys: pa.StringArray) -> npt.NDArray[np.uint64]:
    longest = pc.max(pc.binary_length(keys)).as_py() or 1
    words = -(-longest // 8)
    padded = pc.ascii_rpad(keys, width=8 * words, padding="\0")
    start, stop = (8 * words * place for place in (padded.offset, padded.offset + len(padded)))
    columns = np.frombuffer(padded.buffers()[2], np.uint8)[start:stop].view("<u8").reshape(len(keys), words)
    hashed = np.zeros(len(keys), np.uint64)
    for word in range(words):
        # Words of zeros behind a key leave its hash as it is, however long the longest key of its chunk is.
        step = (hashed ^ columns[:, word]) * _HASH_FACTOR
        hashed = np.where(columns[:, word] == 0, hashed, step ^ (step >> np.uint64(29)))
    return hashed
