"""Whether every byte of a data set is as it was packed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shard_tools.cadence import check_finite
from shard_tools.errors import InputError
from shard_tools.files import file_sha256
from shard_tools.manifest import TAR_BLOCK, Manifest, check_record, read_manifest


def verify(root: Path) -> Iterator[str]:
    """Yield one line for every fault: of the manifest, of a shard's size or bytes, of an index, of a snippet."""
    try:
        manifest = read_manifest(root)
    except InputError as error:
        yield str(error)
        return
    for name, expected in manifest.files.items():
        yield from _verify_file(root / name, expected)
    for number, shard in enumerate(manifest.shards):
        faults = list(_verify_file(root / shard.name, shard.sha256, shard.bytes))
        yield from faults
        yield from _verify_file((root / shard.name).with_suffix(".idx"), shard.index_sha256)
        if not faults:
            yield from _verify_samples(manifest, number)


def _verify_file(path: Path, sha256: str, size: int | None = None) -> Iterator[str]:
    """At most one fault of one file."""
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            yield f"{path}: {found} bytes, expected {size}"
        elif file_sha256(path) != sha256:
            yield f"{path}: its bytes changed after packing (SHA-256 differs)"
    except OSError as error:
        yield f"{path}: {error.strerror}"


def _verify_samples(manifest: Manifest, number: int) -> Iterator[str]:
    """The faults of the samples of one shard whose bytes are as packed: the manifest may still point wrongly."""
    path = manifest.root / manifest.shards[number].name
    with path.open("rb") as file:
        for row in np.flatnonzero(manifest.shard == number).tolist():
            key, size = manifest.key(row), int(manifest.size[row])
            file.seek(int(manifest.offset[row]) - TAR_BLOCK)
            record = file.read(TAR_BLOCK + size)
            try:
                check_record(record, key, size, manifest.shape, f"{path}, {key}")
                array_bytes = 2 * int(np.prod(manifest.shape))
                array = np.frombuffer(record, "<f2", offset=len(record) - array_bytes).reshape(manifest.shape)
                check_finite(array, f"{path}, {key}")
            except InputError as error:
                yield str(error)
