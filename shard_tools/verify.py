"""Check that every byte of a data set is as it was packed."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shard_tools.cadence import check_finite
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest, has_repeated_keys, read_manifest
from shard_tools.sample import read_snippet_of
from shard_tools.sample_table import SAMPLES
from shard_tools.storage.base import Store, StoreConfig


def verify(root: Path | str, config: StoreConfig = StoreConfig()) -> Iterator[str]:  # noqa: B008 (immutable)
    """Yield one line for every fault: of the manifest, of a shard's size or bytes, of an index, of a snippet."""
    try:
        manifest = read_manifest(root, config)
        repeated = has_repeated_keys(manifest)  # slow for a large table
    except InputError as error:
        yield str(error)
        return
    store = manifest.store
    if repeated:
        yield f"{store.where(SAMPLES)}: a key is in both splits"
    for name, expected in manifest.files.items():
        yield from _verify_file(store, name, expected)
    for number, shard in enumerate(manifest.shards):
        faults = list(_verify_file(store, shard.name, shard.sha256, shard.bytes))
        yield from faults
        yield from _verify_file(store, shard.name.removesuffix(".tar") + ".idx", shard.index_sha256)
        if not faults:
            yield from _verify_samples(manifest, number)


def _verify_file(store: Store, name: str, sha256: str, size: int | None = None) -> Iterator[str]:
    """At most one fault of one file."""
    where = store.where(name)
    try:
        found = store.size(name) if size is not None else None
        if found != size and found is not None:
            yield f"{where}: {found} bytes, expected {size}"
            return
        digest = hashlib.sha256()
        for chunk in store.chunks(name):
            digest.update(chunk)
        if digest.hexdigest() != sha256:
            yield f"{where}: its bytes changed after packing (SHA-256 differs)"
    except OSError as error:
        yield f"{where}: {error.strerror}"


def _verify_samples(manifest: Manifest, number: int) -> Iterator[str]:
    """The faults of the samples of one shard whose bytes are as packed: the manifest's offsets may still be wrong."""
    where = manifest.store.where(manifest.shards[number].name)
    for row in np.flatnonzero(manifest.shard == number).tolist():
        try:
            check_finite(read_snippet_of(manifest, row), f"{where}, {manifest.key(row)}")
        except InputError as error:
            yield str(error)
