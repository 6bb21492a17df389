"""Counter-based random numbers: each is a pure function of (seed, epoch, position, stream)."""

import functools
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Self

import numpy as np
import numpy.typing as npt

UInt64s = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]

# Odd constants of SplitMix64 and of its output function (Steele, Lea and Flood 2014; Stafford's variant 13).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_FEISTEL_ROUNDS = 6
_MIN_HALF_BITS = 3  # a Feistel network over fewer bits reaches too few of the permutations


class Stream(IntEnum):
    """What a number is drawn for. One stream for two uses would give both the same numbers."""

    ORDER = 1
    FLIP_FREQUENCY = 2
    FLIP_TIME = 3
    ROLL = 4
    SHIFT = 5
    GAIN = 6
    OFFSET = 7
    ERASE = 8
    ERASE_PANEL = 9
    ERASE_TIME_BINS = 10
    ERASE_CHANNELS = 11
    ERASE_TIME_START = 12
    ERASE_CHANNEL_START = 13
    CUTMIX = 14
    CUTMIX_KEEP = 15
    CUTMIX_TIME_CENTRE = 16
    CUTMIX_CHANNEL_CENTRE = 17
    MIXUP = 18
    MIXUP_KEEP = 19
    SIGNAL = 20
    SIGNAL_PLACE = 21
    SIGNAL_PANELS = 22
    SIGNAL_SNR = 23
    SIGNAL_WIDTH = 24
    SIGNAL_DRIFT = 25
    SIGNAL_CENTRE = 26
    SIGNAL_KIND = 27
    SIGNAL_BEND = 28
    SIGNAL_BEND_PERIOD = 29
    SIGNAL_BEND_PHASE = 30
    SIGNAL_GATE = 31
    SIGNAL_PULSE_PERIOD = 32
    SIGNAL_PULSE_DUTY = 33
    SIGNAL_TURN = 34
    SIGNAL_PAIR_1 = 35
    SIGNAL_PAIR_2 = 36
    SIGNAL_PAIR_3 = 37
    SIGNAL_OTHERS = 38
    SIGNAL_OFF_PANELS = 39
    SIGNAL_PROFILE = 40
    PERMUTE = 41
    PERMUTE_ON = 42
    PERMUTE_OFF = 43
    SIGNAL_HOP = 44


_STREAMS = 1000  # more than there are, so that no two signals of a sample share a stream


@dataclass(frozen=True)
class EpochPart:
    """Some positions of one epoch, and all that their random numbers depend on."""

    seed: int
    epoch: int
    positions: Int64s
    """(n,) in 0 to `length` - 1."""
    length: int
    """Of the epoch."""

    def __len__(self) -> int:
        return len(self.positions)

    def at(self, places: Int64s) -> Self:
        """The positions at these places of this part."""
        return replace(self, positions=self.positions[places])

    def uniform(self, stream: Stream, signal: int = 0) -> npt.NDArray[np.float64]:
        """Uniform numbers in [0, 1), one for each position; different ones for each `signal` of a sample."""
        return uniform(self.seed, self.epoch, self.positions, stream + _STREAMS * signal)


def uniform(seed: int, epoch: int, positions: Int64s, stream: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), one for each position."""
    bits = _hash(_hash_key(seed, epoch, stream) + positions.astype(np.uint64) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(seed: int, epoch: int, positions: Int64s, size: int) -> Int64s:
    """The values of a random permutation of range(size) at these positions; the rest of it is not computed.

    A Feistel network permutes a larger range, of a power of four; applying it again until a value lies below `size`
    permutes range(size) itself (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Memory and time
    depend on the number of positions asked for, not on `size`.
    """
    half_bits = max(_MIN_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
    keys = _hash(_hash_key(seed, epoch, Stream.ORDER) + np.arange(_FEISTEL_ROUNDS, dtype=np.uint64))
    values = _feistel(positions.astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = _feistel(values[outside], half_bits, keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: UInt64s, half_bits: int, keys: UInt64s) -> UInt64s:
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_hash(right + key) & mask)
    return (left << shift) | right


def _hash(values: UInt64s) -> UInt64s:
    """SplitMix64's output function: a bijection of 64-bit integers in which every bit depends on every other."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


@functools.lru_cache(maxsize=256)  # all batches of an epoch use the same few, which are half the cost of its draws
def _hash_key(seed: int, epoch: int, stream: int) -> np.uint64:
    key = np.zeros(1, np.uint64)
    for word in (seed, epoch, int(stream)):
        key = _hash(key + np.array([word & (2**64 - 1)], np.uint64) + _GOLDEN)
    return np.uint64(key[0])
