"""One sample of a data set: its checked bytes."""

import numpy as np
import numpy.typing as npt

from shard_tools.manifest import TAR_BLOCK, Manifest, check_record
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
