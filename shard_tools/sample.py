"""Read and check one sample of a data set."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shard_tools.cadence import check_npy_header, npy_header
from shard_tools.errors import InputError
from shard_tools.manifest import TAR_BLOCK, Int64s, Manifest
from shard_tools.storage.base import Bytes


def array_bytes(manifest: Manifest) -> int:
    """Bytes of one snippet's values."""
    return 2 * math.prod(manifest.shape)


def read_values(manifest: Manifest, row: int, values: Bytes, panels: Sequence[int] | None = None) -> None:
    """Read one sample's values, C order float16, into `values` and check the headers before them.

    `panels` says which panel to put at each position; None keeps their order. Raises InputError naming shard and key
    where a file is missing, cut short or not what the manifest says.
    """
    # The tar header is read too: its member name shows whether the manifest's offset is still right.
    head = np.empty(TAR_BLOCK + int(manifest.size[row]) - len(values), np.uint8)
    if panels is None:
        _read_parts(manifest, row, head, values)
    else:
        by_position = values.reshape(len(panels), -1)
        _read_parts(manifest, row, head, *(by_position[position] for position in np.argsort(panels)))


def read_record(manifest: Manifest, row: int) -> Bytes:
    """Read one sample, tar header and npy, and check it. Raises InputError."""
    record = np.empty(TAR_BLOCK + int(manifest.size[row]), np.uint8)
    head_bytes = len(record) - array_bytes(manifest)
    _read_parts(manifest, row, record[:head_bytes], record[head_bytes:])
    return record


def read_snippet_of(manifest: Manifest, row: int) -> npt.NDArray[np.float16]:
    """Read the array (P, T, F) of one sample."""
    values = np.empty(array_bytes(manifest), np.uint8)
    read_values(manifest, row, values)
    return values.view("<f2").reshape(manifest.shape)


def read_snippets(manifest: Manifest, rows: Int64s) -> npt.NDArray[np.float16]:
    """Read rows of a data set into one array (rows, P, T, F); for looking at a few, not for training."""
    values = np.empty((len(rows), *manifest.shape), "<f2")
    for number, row in enumerate(rows):
        values[number] = read_snippet_of(manifest, int(row))
    return values


def _read_parts(manifest: Manifest, row: int, head: Bytes, *values: Bytes) -> None:
    size, key = int(manifest.size[row]), manifest.key(row)
    name, offset = manifest.shards[manifest.shard[row]].name, int(manifest.offset[row])
    where, expected = f"{manifest.store.where(name)}, {key}", len(head) + sum(map(len, values))

    def check(found: int) -> None:
        if found != expected:
            raise InputError(f"{where}: {max(found - TAR_BLOCK, 0)} bytes, expected {size}; pack again")
        check_head(head.data, key, size, manifest.shape, where)

    manifest.store.read_record(name, offset - TAR_BLOCK, (head, *values), check)


def check_head(head: bytes | memoryview, key: str, size: int, shape: tuple[int, int, int], where: str) -> None:
    """Check the tar header block and the npy header of a sample whose npy file has `size` bytes.

    Raises InputError where the member's name, the npy header or the shape differs.
    """
    name = f"{key}.npy".encode().ljust(100, b"\0")  # the name field of a USTAR header
    if bytes(head[: len(name)]) != name:
        raise InputError(f"{where}: another sample lies there; the shard changed after packing: pack again")
    expected = _header_of(shape)
    found_header = head[TAR_BLOCK : TAR_BLOCK + len(expected)]
    if bytes(found_header) == expected and size == len(expected) + 2 * math.prod(shape):
        return  # the header that NumPy writes, as in nearly every file
    header_bytes, found = check_npy_header(head[TAR_BLOCK:], where)
    if found != shape or size != header_bytes + 2 * math.prod(shape):
        raise InputError(f"{where}: shape {found} in {size} bytes, expected {shape}; pack again")


@functools.lru_cache(maxsize=8)
def _header_of(shape: tuple[int, int, int]) -> bytes:
    return npy_header(shape)
