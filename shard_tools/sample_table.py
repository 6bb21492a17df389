"""samples.parquet: where each sample lies; read whole, and checked for its form."""

import hashlib
import string
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shard_tools.cadence import MAX_KEY_LENGTH
from shard_tools.errors import InputError
from shard_tools.kaggle_layout import SPLITS

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


def read_columns(table: bytes, where: str, content: dict[str, Any]) -> dict[str, Any]:
    """The columns of samples.parquet, which has to hold as many rows as the shards and the splits.

    `keys` is an Arrow array, the others are NumPy's. Raises InputError where the table is not the one that was packed,
    has empty cells, or unsafe or repeated keys.
    """
    if hashlib.sha256(table).hexdigest() != content["files"].get(SAMPLES):
        raise InputError(f"{where}: missing or not the one that was packed with its manifest; pack again")
    found = _to_arrow(table, where, content)
    if any(column.null_count for column in found.columns):
        raise InputError(f"{where}: empty cells; pack again")
    # Not to_numpy, which imports pandas.
    columns: dict[str, Any] = {
        name: np.concatenate([np.from_dlpack(chunk) for chunk in found[name].chunks])
        for name in SAMPLES_SCHEMA.names[1:]
    }
    _check_keys(found["key"], columns["split"], where)
    return {"keys": found["key"], **columns}


def _to_arrow(table: bytes, where: str, content: dict[str, Any]) -> pa.Table:
    """Raises InputError where it is no such table, or not as long as the manifest says."""
    samples = sum(shard.samples for shard in content["shards"])
    in_splits = sum(content["splits"][split]["samples"] for split in SPLITS)
    try:
        # The footer first: what it claims is not decoded before it agrees with the manifest.
        file = pq.ParquetFile(pa.BufferReader(table))
        names, rows = file.schema_arrow, file.metadata.num_rows
        if not names.equals(SAMPLES_SCHEMA) or not rows == in_splits == samples > 0:
            raise InputError(
                f"{where}: {rows} samples with columns {names.names}, expected {samples} (shards) and "
                f"{in_splits} (splits) with {SAMPLES_SCHEMA.names}; pack again"
            )
        found = file.read()
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: not a table of samples ({reason}); pack again") from None
    if len(found) != rows:
        raise InputError(f"{where}: holds {len(found)} samples, but its footer says {rows}; pack again")
    return found


def _check_keys(keys: pa.ChunkedArray, split: npt.NDArray[np.int8], where: str) -> None:
    """Raise InputError unless `check_key` would let each key pass and none is repeated in its split.

    That no key is in both splits is left to `verify`: no read rests on it.
    """
    lengths = pc.binary_length(keys)
    letters = [memoryview(chunk.buffers()[2] or b"").tobytes().translate(None, _KEY_BYTES) for chunk in keys.chunks]
    safe = pc.min(lengths).as_py() >= 1 and pc.max(lengths).as_py() <= MAX_KEY_LENGTH and not any(letters)
    # `pack` writes each split in the order of its keys, where neighbours tell. Only a table in another order needs a
    # set of all keys, which is slow and large.
    descents = np.from_dlpack(pc.indices_nonzero(pc.greater_equal(keys.slice(0, len(keys) - 1), keys.slice(1))))
    steps = np.diff(split)
    in_order = steps.min(initial=0) >= 0 and (steps[descents] > 0).all()
    if not safe or (not in_order and has_repeats(keys)):
        raise InputError(f"{where}: unsafe or repeated keys; pack again")


def has_repeats(keys: pa.ChunkedArray) -> bool:
    """Whether any key appears twice; keeps a set of all of them while it looks."""
    return bool(pc.count_distinct(keys).as_py() != len(keys))
