"""samples.parquet: where each sample lies; read whole, in one pass, and checked for its form."""

import hashlib
import itertools
import os
import string
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shard_tools.cadence import MAX_KEY_LENGTH
from shard_tools.catalog import SPLITS
from shard_tools.errors import InputError
from shard_tools.store import Bytes, Store

SAMPLES = "samples.parquet"
_DECODED = 1 << 16  # samples that are decoded together: few enough that Arrow uses the same memory for the next
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


def read_table(store: Store, sha256: str | None) -> Bytes:
    """The bytes of samples.parquet, if they are those that were packed."""
    # Into one array, hashed on the way: joined from its chunks, a table of a gigabyte would be in memory twice.
    table, digest, found = np.empty(store.size(SAMPLES) or 0, np.uint8), hashlib.sha256(), 0
    for chunk in store.chunks(SAMPLES) if len(table) else ():
        digest.update(chunk)
        part = table[found : found + len(chunk)]
        part[:] = np.frombuffer(chunk, np.uint8)[: len(part)]
        found += len(chunk)
    if found != len(table) or digest.hexdigest() != sha256:
        where = store.where(SAMPLES)
        raise InputError(f"{where}: missing or not the one that was packed with its manifest; pack again")
    return table


def read_columns(table: Bytes, content: dict[str, Any], where: str) -> dict[str, Any]:
    """The columns of samples.parquet, which has to hold as many rows as the shards and the splits."""
    samples = sum(shard.samples for shard in content["shards"])
    try:
        metadata = pq.read_metadata(pa.BufferReader(pa.py_buffer(table)))
        names = metadata.schema.to_arrow_schema()
        in_splits = sum(content["splits"][split]["samples"] for split in SPLITS)
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        if not names.equals(SAMPLES_SCHEMA) or not sum(sizes) == in_splits == samples > 0 or min(sizes) < 0:
            raise InputError(
                f"{where}: {sum(sizes)} samples with columns {names.names}, expected {samples} and {in_splits} "
                f"with {SAMPLES_SCHEMA.names}; pack again"
            )
        ends = list(itertools.accumulate(sizes))
        columns = {name: np.empty(samples, str(SAMPLES_SCHEMA.field(name).type)) for name in SAMPLES_SCHEMA.names[1:]}

        def read_group(group: int) -> list[pa.StringArray]:
            file = pq.ParquetFile(pa.BufferReader(pa.py_buffer(table)), metadata=metadata)
            start, keys = ends[group] - sizes[group], []
            for batch in file.iter_batches(_DECODED, [group], use_threads=False):
                if any(column.null_count for column in batch.columns):
                    raise InputError(f"{where}: empty cells; pack again")
                for name, column in columns.items():
                    # Not to_numpy, which imports pandas.
                    column[start : start + len(batch)] = np.from_dlpack(batch[name])
                keys.append(_own_keys(batch["key"], where))
                start += len(batch)
            if start != ends[group]:
                raise InputError(f"{where}: a row group without all of its rows; pack again")
            return keys

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            keys = pa.chunked_array(itertools.chain(*pool.map(read_group, range(len(ends)))), pa.string())
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: not a table of samples ({reason}); pack again") from None
    return {"keys": keys, **columns}


def _own_keys(keys: pa.StringArray, where: str) -> pa.StringArray:
    """A copy of these keys, if `check_key` would let each of them pass."""
    _, ends, text = keys.buffers()
    ends = np.frombuffer(ends, np.int32)[keys.offset : keys.offset + len(keys) + 1]
    lengths = np.diff(ends)
    letters = np.frombuffer(text or b"", np.uint8)[ends[0] : ends[-1]].copy()
    if lengths.min() < 1 or lengths.max() > MAX_KEY_LENGTH or letters.tobytes().translate(None, _KEY_BYTES):
        raise InputError(f"{where}: unsafe or repeated keys; pack again")
    # A copy as small as can be: what Arrow decoded into is larger, and is free for the next keys.
    return pa.StringArray.from_buffers(len(keys), pa.py_buffer(ends - ends[0]), pa.py_buffer(letters))
