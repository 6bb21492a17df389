"""One sample of a data set: its checked bytes."""

import functools

import numpy as np
import numpy.typing as npt

from shard_tools.cadence import check_npy_header, npy_header
from shard_tools.errors import InputError
from shard_tools.manifest import TAR_BLOCK, Manifest
from shard_tools.store import Bytes


def read_record(manifest: Manifest, row: int, buffer: Bytes | None = None) -> Bytes:
    """Read one sample, tar header and npy, into `buffer` (or a new one) and check it. Raises InputError."""
    size, key = int(manifest.size[row]), manifest.key(row)
    record = np.empty(TAR_BLOCK + size, np.uint8) if buffer is None else buffer
    name = manifest.shards[int(manifest.shard[row])].name
    where = f"{manifest.store.where(name)}, {key}"

    def check(found: int) -> None:
        check_record(record[:found].data, key, size, manifest.shape, where)

    manifest.store.read_record(name, int(manifest.offset[row]) - TAR_BLOCK, record, check)
    return record


def read_snippet_of(manifest: Manifest, row: int) -> npt.NDArray[np.float16]:
    """Read the array (P, T, F) of one sample."""
    record = read_record(manifest, row)
    array_bytes = 2 * int(np.prod(manifest.shape))
    return np.frombuffer(record, "<f2", offset=len(record) - array_bytes).reshape(manifest.shape)


def check_record(record: bytes | memoryview, key: str, size: int, shape: tuple[int, int, int], where: str) -> None:
    """Check one sample as it lies in a shard: a tar header block of `key`.npy, then `size` bytes of npy.

    Raises InputError where the member's name, its size, the npy header or the shape is another.
    """
    name = f"{key}.npy".encode().ljust(100, b"\0")  # the name field of a USTAR header
    if len(record) != TAR_BLOCK + size:
        raise InputError(f"{where}: {max(len(record) - TAR_BLOCK, 0)} bytes, expected {size}; pack again")
    if bytes(record[: len(name)]) != name:
        raise InputError(f"{where}: another sample lies there; the shard changed after packing: pack again")
    expected = _header_of(shape)
    head = record[TAR_BLOCK : TAR_BLOCK + len(expected)]
    if bytes(head) == expected and size == len(expected) + 2 * int(np.prod(shape)):
        return  # the header NumPy writes, as nearly every file has it
    header_bytes, found = check_npy_header(record[TAR_BLOCK:], where)
    if found != shape or size != header_bytes + 2 * int(np.prod(shape)):
        raise InputError(f"{where}: shape {found} in {size} bytes, expected {shape}; pack again")


@functools.lru_cache(maxsize=8)
def _header_of(shape: tuple[int, int, int]) -> bytes:
    return npy_header(shape)
