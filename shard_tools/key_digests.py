"""Find repeated keys among many millions, by 64-bit numbers instead of strings.

A set of 60 million Python strings takes minutes and 6 GB. A number takes 8 bytes a key, and NumPy processes numbers
without holding the GIL. There are two kinds. Leading words are a key's first bytes: in a table that is sorted by key
they are sorted already, but different keys may share one. Digests are equal for different keys by chance only, but have
to be sorted.
"""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

UInt64s = npt.NDArray[np.uint64]

_RANGES = 16  # of numbers, each searched by itself: threads share the work, and little memory is needed
_SAMPLES = 1024  # numbers of each run that say where the ranges end
_MOST_RUNS = 16  # with more, a table is not sorted by key
_BLOCK = 1 << 15  # keys at a time: few enough to stay in the processor's cache
_WORD = 8
# The multipliers and the shift of SplitMix64's finaliser (Steele, Lea, Flood 2014).
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def sorted_digests(keys: pa.ChunkedArray) -> UInt64s:
    """The 64-bit digests of the keys, in ascending order; equal keys have equal digests."""
    digests = np.empty(len(keys), np.uint64)
    for start, block in _blocks(keys):
        digests[start : start + len(block)] = _digest_block(block)
    digests.sort()
    return digests


def leading_words(keys: pa.ChunkedArray, skip: int) -> UInt64s:
    """The eight bytes of each key that follow its first `skip`, as numbers that compare as the bytes do.

    They are in the order of the keys. Shorter keys are filled up with zeros.
    """
    words = np.empty(len(keys), np.uint64)
    for start, block in _blocks(keys):
        letters, _ = _to_words(block, skip, 1)
        words[start : start + len(block)] = letters[:, 0].byteswap() if sys.byteorder == "little" else letters[:, 0]
    return words


def tell_apart(words: UInt64s) -> bool:
    """Whether leading words are worth comparing: most differ, and they are in a few ascending runs."""
    sample = words[:: len(words) // _SAMPLES + 1]
    return 2 * len(np.unique(sample)) > len(sample) and int((words[1:] < words[:-1]).sum()) < _MOST_RUNS


def ascending_runs(numbers: UInt64s) -> list[UInt64s]:
    """The numbers as ascending runs, which are parts of `numbers`."""
    return np.split(numbers, np.flatnonzero(numbers[1:] < numbers[:-1]) + 1)


def find_repeated(runs: Sequence[UInt64s], pool: Executor) -> UInt64s:
    """The numbers that occur more than once over all `runs`, ascending; each run is ascending too."""
    sample = np.sort(np.concatenate([run[:: len(run) // _SAMPLES + 1] for run in runs]))
    ends = np.unique(sample[len(sample) // _RANGES :: len(sample) // _RANGES + 1])
    ranges = list(pairwise([None, *ends, None]))
    return np.concatenate(list(pool.map(lambda each: _repeated_between(runs, *each), ranges)))


def _repeated_between(runs: Sequence[UInt64s], first: np.uint64 | None, end: np.uint64 | None) -> UInt64s:
    """The repeated numbers from `first` to below `end`; None: no such limit."""

    def place(run: UInt64s, limit: np.uint64 | None) -> int | None:
        return None if limit is None else int(np.searchsorted(run, limit))

    numbers = np.concatenate([run[place(run, first) : place(run, end)] for run in runs])
    # A stable sort merges runs that are already sorted instead of sorting them again.
    numbers.sort(kind="stable")
    return np.unique(numbers[1:][numbers[1:] == numbers[:-1]])


def indices_of(numbers: UInt64s, wanted: UInt64s) -> npt.NDArray[np.int64]:
    """The indices of the numbers that are among the `wanted`, which are ascending."""
    found = [np.zeros(0, np.int64)]
    for start in range(0, len(numbers), _BLOCK):
        block = numbers[start : start + _BLOCK]
        order = None if (block[1:] >= block[:-1]).all() else np.argsort(block)
        ascending = block if order is None else block[order]
        # In a sorted table a block is a small part of the range, and so are the numbers that it may hold.
        near = wanted[np.searchsorted(wanted, ascending[0]) : np.searchsorted(wanted, ascending[-1], "right")]
        first, end = (
            np.bincount(np.searchsorted(ascending, near, side), minlength=len(block) + 1) for side in ("left", "right")
        )
        inside = np.flatnonzero(np.cumsum(first - end))
        found.append(start + (inside if order is None else np.sort(order[inside])))
    return np.concatenate(found)


def rows_with(keys: pa.ChunkedArray, wanted: UInt64s) -> npt.NDArray[np.int64]:
    """The rows whose keys have one of the `wanted` digests, which are ascending."""
    found = [np.zeros(0, np.int64)]
    for start, block in _blocks(keys):
        found.append(start + np.flatnonzero(np.isin(_digest_block(block), wanted)))
    return np.concatenate(found)


def take(keys: pa.ChunkedArray, rows: npt.NDArray[np.int64]) -> pa.ChunkedArray:
    """The keys of some rows, which are ascending.

    Chunk by chunk: pyarrow's own `take` copies all chunks into one first, which fails above 2 GiB of text.
    """
    starts = np.cumsum([0, *(len(chunk) for chunk in keys.chunks)])
    limits = np.searchsorted(rows, starts)
    taken = []
    for chunk, start, (first, end) in zip(keys.chunks, starts, pairwise(limits), strict=False):
        inside = np.ascontiguousarray(rows[first:end] - start)
        # Not pa.array, which imports pandas: that takes time, and on two threads at once it may never end.
        taken.append(chunk.take(pa.Array.from_buffers(pa.int64(), len(inside), [None, pa.py_buffer(inside)])))
    return pa.chunked_array(taken, pa.string())


def _blocks(keys: pa.ChunkedArray) -> Iterator[tuple[int, pa.StringArray]]:
    start = 0
    for chunk in keys.chunks:
        for first in range(0, len(chunk), _BLOCK):
            block = chunk.slice(first, _BLOCK)
            yield start, block
            start += len(block)


def _digest_block(block: pa.StringArray) -> UInt64s:
    words, lengths = _to_words(block)
    digests = lengths.astype(np.uint64)
    for column in range(words.shape[1]):
        mixed = _mix(digests * _MULTIPLIERS[0] + words[:, column])
        # Only the key's own words: a longer key beside it in the block must not change its digest.
        digests = np.where(lengths > column * _WORD, mixed, digests)
    return digests


def _to_words(block: pa.StringArray, skip: int = 0, most: int | None = None) -> tuple[UInt64s, npt.NDArray[np.int32]]:
    """(keys, words): each key after its first `skip` bytes as zero-padded 64-bit words; and the keys' lengths in bytes.

    `most` is the number of words, which cuts longer keys; None: as many as the longest key needs.
    """
    _, ends, letters = block.buffers()
    offsets = np.frombuffer(ends, np.int32)[block.offset : block.offset + len(block) + 1]
    data = np.frombuffer(letters, np.uint8)
    lengths = np.diff(offsets)
    longest = int(lengths.max())
    words = max(1, -(-(longest - skip) // _WORD)) if most is None else most
    padded = np.zeros((len(block), words * _WORD), np.uint8)

    def copy(chosen: Any, rows: npt.NDArray[np.uint8]) -> None:
        part = rows[:, skip : skip + padded.shape[1]]
        padded[chosen, : part.shape[1]] = part

    if int(lengths.min()) == longest:  # as in the Kaggle data
        copy(slice(None), data[offsets[0] : offsets[-1]].reshape(len(block), longest))
    else:
        for length in np.unique(lengths).tolist():
            chosen = np.flatnonzero(lengths == length)
            copy(chosen, data[offsets[chosen][:, None] + np.arange(length)])
    return padded.view(np.uint64), lengths


def _mix(values: UInt64s) -> UInt64s:
    values = (values ^ (values >> _SHIFTS[0])) * _MULTIPLIERS[0]
    values = (values ^ (values >> _SHIFTS[1])) * _MULTIPLIERS[1]
    return values ^ (values >> _SHIFTS[2])
