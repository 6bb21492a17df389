"""samples.parquet: where each sample lies; read whole, and checked for its form.

The numbers come first, since they are all that planning needs; the keys of a large table follow in the background.
"""

import contextlib
import itertools
import string
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shard_tools.cadence import MAX_KEY_LENGTH
from shard_tools.catalog import SPLITS
from shard_tools.cores import usable_cores
from shard_tools.errors import InputError
from shard_tools.hashed import HashedFile, HashedReader
from shard_tools.places import Places, find_places
from shard_tools.store import Bytes

SAMPLES = "samples.parquet"
_DECODED = 1 << 16  # samples that are decoded together: few enough that Arrow uses the same memory for the next
_JOINED = 16  # decoded keys that are joined: enough that the system hands out huge pages for them
_AT_ONCE = 1 << 20  # samples whose keys take no time worth a thread in the background
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
_NUMBERS = SAMPLES_SCHEMA.names[1:]
Check = Callable[[int, dict[str, Any]], None]
"""Given the number of a part's first sample and its columns but the keys; raises InputError where they are wrong."""


@dataclass(frozen=True)
class _Undecoded:
    """samples.parquet before it is decoded."""

    file: HashedFile
    metadata: Any
    ends: list[int]
    """Of every row group, the number of samples up to its end."""

    def batches(self, group: int, names: list[str]) -> Iterator[tuple[int, Any]]:
        """Some columns of a row group, a few samples at a time, each part with the number of its first sample."""
        file = pq.ParquetFile(pa.PythonFile(HashedReader(self.file), "r"), metadata=self.metadata)
        start = self.ends[group] - self.metadata.row_group(group).num_rows
        for batch in file.iter_batches(_DECODED, [group], columns=names, use_threads=False):
            if any(column.null_count for column in batch.columns):
                raise InputError(f"{self.file.where}: empty cells; pack again")
            yield start, batch
            start += len(batch)
        if start != self.ends[group]:
            raise InputError(f"{self.file.where}: a row group without all of its rows; pack again")


def read_columns(file: HashedFile, content: dict[str, Any], check: Check) -> dict[str, Any]:
    """The columns of samples.parquet, which has to hold as many rows as the shards and the splits.

    Raises InputError where the table is not the one that was packed, and what `check` raises, which sees every part
    of it. `keys_read` is a future of the keys, which raises InputError where they are unsafe or repeated; `places`, of
    shards and offsets, is Places; the others are arrays.
    """
    if not file.size or file.sha256 != content["files"].get(SAMPLES):
        raise InputError(f"{file.where}: missing or not the one that was packed with its manifest; pack again")
    with _refusing(file.where):
        undecoded = _open_table(file, content)
        columns = _empty_columns(undecoded)

        def read_group(group: int) -> list[Places]:
            places = []
            for start, batch in undecoded.batches(group, _NUMBERS):
                # Not to_numpy, which imports pandas.
                part: dict[str, Any] = {name: np.from_dlpack(batch[name]) for name in _NUMBERS}
                check(start, part)
                places.append(find_places(start, part["shard"], part["offset"]))
                for name, column in columns.items():
                    if column.flags.writeable:
                        column[start : start + len(batch)] = part[name]
                    elif (column[0] != part[name]).any():
                        raise ValueError(f"the column {name} contradicts its statistics")
            return places

        with ThreadPoolExecutor(usable_cores()) as pool:
            groups = pool.map(read_group, range(len(undecoded.ends)))
            places = Places.join(itertools.chain.from_iterable(groups))
    background = ThreadPoolExecutor(1, thread_name_prefix="keys")
    keys = background.submit(_read_keys, undecoded, columns["split"])
    background.shutdown(wait=False)  # it ends when the keys are read
    if undecoded.ends[-1] <= _AT_ONCE:
        keys.result()
    return {"keys_read": keys, "places": places, **columns}


def _empty_columns(table: _Undecoded) -> dict[str, Any]:
    """Arrays to be filled, and a read-only one of a single stored number where all sizes are said to be the same."""
    length = table.ends[-1]
    columns = {name: np.empty(length, np.int8) for name in ("split", "target", "fold")}
    number, sizes = SAMPLES_SCHEMA.get_field_index("size"), set()
    for group in range(len(table.ends)):
        found = table.metadata.row_group(group).column(number).statistics
        sizes |= {found.min, found.max} if found is not None and found.has_min_max else {None}
    if len(sizes) == 1 and None not in sizes:
        return {**columns, "size": np.broadcast_to(np.array(sizes.pop(), np.int32), length)}
    return {**columns, "size": np.empty(length, np.int32)}


def _open_table(file: HashedFile, content: dict[str, Any]) -> _Undecoded:
    samples = sum(shard.samples for shard in content["shards"])
    metadata = pq.read_metadata(pa.PythonFile(HashedReader(file), "r"))
    names = metadata.schema.to_arrow_schema()
    in_splits = sum(content["splits"][split]["samples"] for split in SPLITS)
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if not names.equals(SAMPLES_SCHEMA) or not sum(sizes) == in_splits == samples > 0 or min(sizes) < 0:
        raise InputError(
            f"{file.where}: {sum(sizes)} samples with columns {names.names}, expected {samples} and {in_splits} "
            f"with {SAMPLES_SCHEMA.names}; pack again"
        )
    return _Undecoded(file, metadata, list(itertools.accumulate(sizes)))


@contextlib.contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Turn what Arrow makes of a table that is none into an InputError."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: not a table of samples ({reason}); pack again") from None


def _read_keys(table: _Undecoded, split: npt.NDArray[np.int8]) -> pa.ChunkedArray:
    """The keys, if `check_key` would let each of them pass and none is repeated in its split."""

    def read_group(group: int) -> list[pa.StringArray]:
        batches = (batch["key"] for _, batch in table.batches(group, ["key"]))
        joined = []
        while few := [_own_keys(keys, table.file.where) for keys in itertools.islice(batches, _JOINED)]:
            lengths, letters = (np.concatenate(parts) for parts in zip(*few, strict=True))
            ends = np.zeros(len(lengths) + 1, np.int32)
            np.cumsum(lengths, out=ends[1:])
            joined.append(pa.StringArray.from_buffers(len(lengths), pa.py_buffer(ends), pa.py_buffer(letters)))
        return joined

    # One core is left to whoever plans meanwhile.
    with _refusing(table.file.where), ThreadPoolExecutor(max(1, usable_cores() - 1)) as pool:
        groups = pool.map(read_group, range(len(table.ends)))
        keys = pa.chunked_array(itertools.chain(*groups), pa.string())
    # `pack` writes each split in the order of its keys, where neighbours tell. Only a table in another order needs a
    # set of all keys, which is slow and large. That no key is in both splits is left to `verify`: no read rests on it.
    descents = pc.indices_nonzero(pc.greater_equal(keys.slice(0, len(keys) - 1), keys.slice(1)))
    steps = np.diff(split)
    in_order = steps.min(initial=0) >= 0 and (steps[np.from_dlpack(descents)] > 0).all()
    if not in_order and has_repeats(keys):
        raise InputError(f"{table.file.where}: unsafe or repeated keys; pack again")
    return keys


def has_repeats(keys: pa.ChunkedArray) -> bool:
    """Whether any key stands twice; keeps a set of all of them while it looks."""
    return bool(pc.count_distinct(keys).as_py() != len(keys))


def _own_keys(keys: pa.StringArray, where: str) -> tuple[npt.NDArray[np.int32], Bytes]:
    """Lengths and letters of keys, if `check_key` would let each of them pass."""
    _, ends, text = keys.buffers()
    ends = np.frombuffer(ends, np.int32)[keys.offset : keys.offset + len(keys) + 1]
    lengths = np.diff(ends)
    letters = np.frombuffer(text or b"", np.uint8)[ends[0] : ends[-1]]
    if lengths.min() < 1 or lengths.max() > MAX_KEY_LENGTH or letters.tobytes().translate(None, _KEY_BYTES):
        raise InputError(f"{where}: unsafe or repeated keys; pack again")
    return lengths, letters
