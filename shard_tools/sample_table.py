"""Read and check samples.parquet, which says where each sample is."""

import hashlib
import string
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shard_tools.cadence import MAX_KEY_LENGTH
from shard_tools.errors import InputError
from shard_tools.kaggle_layout import SPLITS
from shard_tools.storage.base import Bytes

SAMPLES = "samples.parquet"
_KEY_BYTES = (string.ascii_letters + string.digits + "_-").encode()

SAMPLES_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "split": pa.int8(),  # an index into SPLITS
        "target": pa.int8(),  # 0, 1, or -1 where unknown
        "fold": pa.int8(),  # or -1 for test
        "shard": pa.int32(),  # an index into the manifest's shards
        "offset": pa.int64(),  # bytes from the start of the shard to the npy header
        "size": pa.int32(),  # bytes of the npy file
    }
)


Columns = dict[str, npt.NDArray[Any]]

_BATCH_ROWS = 1 << 20  # the size of the row groups that `pack` writes
# Bytes of keys that are checked at a time: few enough to stay in the processor's cache.
_LETTERS = 1 << 18


def empty_columns(rows: int) -> Columns:
    """Arrays to decode samples.parquet into, by name: one for each column but the keys."""
    # Not to_numpy, which imports pandas.
    return {field.name: np.empty(rows, field.type.to_pandas_dtype()) for field in list(SAMPLES_SCHEMA)[1:]}


def read_columns(table: Bytes, where: str, content: dict[str, Any], columns: Columns) -> pa.ChunkedArray:
    """Decode samples.parquet into `columns`, which have a row for each sample of the shards; return the keys.

    Raises InputError where the table is not the one that was packed, has empty cells, or unsafe or repeated keys.
    """
    if hashlib.sha256(table.data).hexdigest() != content["files"].get(SAMPLES):
        raise InputError(f"{where}: missing or not the one that was packed with its manifest; pack again")
    try:
        file = pq.ParquetFile(pa.BufferReader(pa.py_buffer(table)))
        _check_footer(file, where, content)
        keys = _decode(file, where, columns)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: not a table of samples ({reason}); pack again") from None
    _check_keys(keys, columns["split"], where)
    return keys


def _check_footer(file: pq.ParquetFile, where: str, content: dict[str, Any]) -> None:
    """Raise InputError where the footer contradicts the manifest, before anything is decoded."""
    samples = sum(shard.samples for shard in content["shards"])
    in_splits = sum(content["splits"][split]["samples"] for split in SPLITS)
    names, rows = file.schema_arrow, file.metadata.num_rows
    if not names.equals(SAMPLES_SCHEMA) or not rows == in_splits == samples > 0:
        raise InputError(
            f"{where}: {rows} samples with columns {names.names}, expected {samples} (shards) and "
            f"{in_splits} (splits) with {SAMPLES_SCHEMA.names}; pack again"
        )


def _decode(file: pq.ParquetFile, where: str, columns: Columns) -> pa.ChunkedArray:
    """Fill `columns` and return the keys, batch by batch, so that no column is held twice."""
    rows, found = file.metadata.num_rows, 0
    keys: list[pa.StringArray] = []
    for batch in file.iter_batches(_BATCH_ROWS, use_threads=False):
        if any(column.null_count for column in batch.columns):
            raise InputError(f"{where}: empty cells; pack again")
        keys.append(batch["key"])
        for name, column in columns.items():
            column[found : found + len(batch)] = np.from_dlpack(batch[name])
        found += len(batch)
    if found != rows:
        raise InputError(f"{where}: holds {found} samples, but its footer says {rows}; pack again")
    return pa.chunked_array(keys, pa.string())


def _check_keys(keys: pa.ChunkedArray, split: npt.NDArray[np.int8], where: str) -> None:
    """Raise InputError unless each key would pass `check_key` and none is repeated in its split.

    Only `verify` checks that no key is in both splits: no read depends on it.
    """
    lengths = pc.binary_length(keys)
    in_limits = pc.min(lengths).as_py() >= 1 and pc.max(lengths).as_py() <= MAX_KEY_LENGTH
    safe = in_limits and not any(block.translate(None, _KEY_BYTES) for block in _letters(keys))
    # `pack` sorts each split by key, so repeats are neighbours. Only a table in another order needs a
    # set of all keys, which is slow and large.
    descents = np.from_dlpack(pc.indices_nonzero(pc.greater_equal(keys.slice(0, len(keys) - 1), keys.slice(1))))
    steps = np.diff(split)
    in_order = steps.min(initial=0) >= 0 and (steps[descents] > 0).all()
    if not safe or (not in_order and has_repeats(keys)):
        raise InputError(f"{where}: unsafe or repeated keys; pack again")


def _letters(keys: pa.ChunkedArray) -> Iterator[bytes]:
    """The bytes of all keys, block by block."""
    for chunk in keys.chunks:
        letters = memoryview(chunk.buffers()[2] or b"")
        for start in range(0, len(letters), _LETTERS):
            yield letters[start : start + _LETTERS].tobytes()


def has_repeats(keys: pa.ChunkedArray) -> bool:
    """Whether any key appears twice; holds a set of all of them in memory."""
    return bool(pc.count_distinct(keys).as_py() != len(keys))
