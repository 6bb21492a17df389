"""Find repeated keys among many millions: 64-bit digests are sorted, and only keys with equal digests are compared.

A set of 60 million Python strings takes minutes and 6 GB. Digests take 8 bytes a key, and NumPy processes them without
holding the GIL.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

UInt64s = npt.NDArray[np.uint64]

RANGES = 16
"""Equal ranges of digests, each searched alone: on several threads, and with little memory."""

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


def find_repeated(parts: Sequence[UInt64s], number: int) -> UInt64s:
    """The digests that occur more than once in all `parts`, which are sorted; in range `number` of RANGES alone."""
    width = 2**64 // RANGES
    least, largest = np.uint64(number * width), np.uint64((number + 1) * width - 1)
    inside = [slice(np.searchsorted(part, least), np.searchsorted(part, largest, "right")) for part in parts]
    digests = np.concatenate([part[each] for part, each in zip(parts, inside, strict=True)])
    # A stable sort merges parts that are already sorted instead of sorting them again.
    digests.sort(kind="stable")
    return np.unique(digests[1:][digests[1:] == digests[:-1]])


def rows_with(keys: pa.ChunkedArray, wanted: UInt64s) -> npt.NDArray[np.int64]:
    """The rows whose keys have one of the `wanted` digests, which are sorted."""
    found = [np.zeros(0, np.int64)]
    for start, block in _blocks(keys):
        found.append(start + np.flatnonzero(np.isin(_digest_block(block), wanted)))
    return np.concatenate(found)


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


def _to_words(block: pa.StringArray) -> tuple[UInt64s, npt.NDArray[np.int32]]:
    """(keys, words): each key as zero-padded 64-bit words; and the keys' lengths in bytes."""
    _, ends, letters = block.buffers()
    offsets = np.frombuffer(ends, np.int32)[block.offset : block.offset + len(block) + 1]
    data = np.frombuffer(letters, np.uint8)
    lengths = np.diff(offsets)
    longest = int(lengths.max())
    padded = np.zeros((len(block), -(-longest // _WORD) * _WORD), np.uint8)
    if int(lengths.min()) == longest:  # as in the Kaggle data
        padded[:, :longest] = data[offsets[0] : offsets[-1]].reshape(len(block), longest)
    else:
        for length in np.unique(lengths).tolist():
            chosen = np.flatnonzero(lengths == length)
            padded[chosen, :length] = data[offsets[chosen][:, None] + np.arange(length)]
    return padded.view(np.uint64), lengths


def _mix(values: UInt64s) -> UInt64s:
    values = (values ^ (values >> _SHIFTS[0])) * _MULTIPLIERS[0]
    values = (values ^ (values >> _SHIFTS[1])) * _MULTIPLIERS[1]
    return values ^ (values >> _SHIFTS[2])
