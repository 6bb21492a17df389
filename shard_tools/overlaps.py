"""Find snippets of the same sky: codes of their channels, candidate pairs, and the proof of a pair.

Axes: N snippet, P panel, T time bin, F frequency channel, D pairs of neighbouring channels (F - 1).

Two snippets that were cut from one observation, some channels apart, hold the same noise where they overlap; but each
panel has its own offset and scale, and either snippet may have a needle. So they are compared by the double difference
over time and frequency, x[t+1, f+1] - x[t+1, f] - x[t, f+1] + x[t, f]. It removes the offset, each channel's level
(persistent lines, which unrelated snippets share) and what all channels have in common (the receiver's gain). Its signs
do not depend on the scale, and a needle changes them only where it passes.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shard_tools.cadence import OFF_POSITIONS

Codes = npt.NDArray[np.uint64]
Halves = npt.NDArray[np.float16]

CODE_BITS = 64
CODE_ROWS = 12  # time bins of each panel: eleven differences in each of six panels fill a code
NO_CODE = np.uint64(0)
_MOST_TIES = CODE_BITS // 4  # with more, a code shows constant or blanked channels rather than noise
# Pairs are proved in two panels, far apart in time and without needles. In snippets of 139 or more time bins, no code
# uses the time bins of the proof.
PROOF_POSITIONS = (OFF_POSITIONS[0], OFF_POSITIONS[-1])
PROOF_ROWS = 64
_LEAST_LIVE = 0.25  # least share of a proof's common channels that must vary
_LEAST_VOTES = 2  # channels with the same code at the same shift
_REACH = 8  # each code is paired only with the next few equal ones: a thousand copies must not make a million pairs
_PARTS = 16  # of the codes, sorted one at a time to keep memory low


class Candidates(NamedTuple):
    """Pairs of snippets that share codes; channel c of `second` is channel c + shift of `first`. Each (pairs,)."""

    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    shift: npt.NDArray[np.int64]


def code_rows(time_bins: int) -> slice:
    """The time bins of a panel that its codes are made of: the middle ones."""
    start = max(0, (time_bins - CODE_ROWS) // 2)
    return slice(start, min(time_bins, start + CODE_ROWS))


def proof_rows(time_bins: int) -> slice:
    """The time bins of a panel that prove a pair: the last ones."""
    return slice(max(0, time_bins - PROOF_ROWS), time_bins)


def double_difference(rows: Halves) -> npt.NDArray[np.float32]:
    """(P, T, F) float16 to (P, T - 1, D): the difference of neighbouring time bins and of neighbouring channels."""
    values: npt.NDArray[np.float32] = rows.astype(np.float32)  # in which differences of float16 are almost exact
    over_time = values[:, 1:] - values[:, :-1]
    noise: npt.NDArray[np.float32] = over_time[:, :, 1:] - over_time[:, :, :-1]
    return noise


def to_codes(rows: Halves) -> Codes:
    """(P, T, F) float16 to (D,) codes: the signs of the noise between neighbouring channels; NO_CODE if there is none.

    A code that occurs twice in a snippet comes from structure, not noise, and gives no unique shift: NO_CODE too.
    """
    with np.errstate(invalid="ignore"):  # a snippet that is not finite has no codes there; packing refuses it
        noise = double_difference(rows)
    noise = noise.reshape(-1, noise.shape[2])[:CODE_BITS]
    bits = np.zeros((CODE_BITS, noise.shape[1]), bool)
    bits[: len(noise)] = noise > 0
    codes: Codes = np.ascontiguousarray(np.packbits(bits, axis=0, bitorder="little").T).view("<u8")[:, 0]
    unclear = np.count_nonzero((noise == 0) | ~np.isfinite(noise), axis=0) > _MOST_TIES
    _, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    codes[unclear | (counts[inverse] > 1)] = NO_CODE
    return codes


def find_candidates(codes: Codes, min_overlap: int) -> Candidates:
    """Pairs of snippets whose codes (N, D) agree at a shift that leaves `min_overlap` common channels or more.

    The codes are sorted a part at a time, to save memory. The pairs are sorted by (first, second).
    """
    snippets, width = codes.shape
    flat = codes.reshape(-1)
    lowest_byte = flat.view(np.uint8)[::8]
    found = [
        _count_links(flat, np.flatnonzero(lowest_byte % _PARTS == part), width, snippets) for part in range(_PARTS)
    ]
    links, places = np.unique(np.concatenate([links for links, _ in found]), return_inverse=True)
    votes = np.bincount(places, np.concatenate([votes for _, votes in found]), minlength=len(links))
    pair, shift = np.divmod(links, 2 * width)
    shift -= width
    plausible = (votes >= _LEAST_VOTES) & (width + 1 - np.abs(shift) >= min_overlap)
    pair, shift, votes = pair[plausible], shift[plausible], votes[plausible]
    order = np.lexsort((-votes, pair))  # a pair's best shift comes first, and is the one that unique takes
    pair, best = np.unique(pair[order], return_index=True)
    first, second = np.divmod(pair, snippets)
    return Candidates(first, second, shift[order][best])


def _count_links(
    flat: Codes, where: npt.NDArray[np.int64], width: int, snippets: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pairs of equal codes at the places `where`: distinct (first, second, shift), as one number, and how many of each.

    A code is linked to the next few equal ones only, which is enough to group all of them.
    """
    where = where[flat[where] != NO_CODE]
    where = where[np.argsort(flat[where], kind="stable")]  # equal codes in the order of their snippets
    values = flat[where]
    found = [np.empty(0, np.int64)]
    for reach in range(1, _REACH + 1):
        same = np.flatnonzero(values[reach:] == values[:-reach])
        (first, channel), (second, other) = np.divmod(where[same], width), np.divmod(where[same + reach], width)
        found.append((first * snippets + second) * (2 * width) + (channel - other + width))
    links, votes = np.unique(np.concatenate(found), return_counts=True)
    return links, votes


def correlation(first: Halves, second: Halves, shift: int) -> float:
    """Correlation of the noise of two snippets in their common channels: 0 for unrelated, 1 for the same noise.

    `first` and `second` are (P, T, F) float16, the same panels and time bins of both. The result is the median, over
    panels and common channels, of the normalised correlation over time: a needle in some channels does not matter. It
    is 0 where too few channels vary.
    """
    channels = first.shape[2]
    overlap = channels - abs(shift)
    with np.errstate(invalid="ignore", over="ignore"):
        one = double_difference(first[:, :, max(shift, 0) : max(shift, 0) + overlap])
        other = double_difference(second[:, :, max(-shift, 0) : max(-shift, 0) + overlap])
        product = (one * other).sum(axis=1)
        power = (one * one).sum(axis=1) * (other * other).sum(axis=1)
    live = np.isfinite(product) & np.isfinite(power) & (power > 0)
    if not live.any() or live.mean() < _LEAST_LIVE:
        return 0.0
    return float(np.median(product[live] / np.sqrt(power[live])))
