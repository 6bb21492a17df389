"""The best path through each panel: a line that may bend, begin and end anywhere, and lie elsewhere in the next panel.

The lines of lines.py are straight and continue from panel to panel. A signal that wanders, or comes back at another
frequency, has no such line, but it has a path in each panel: the chain of neighbouring pixels with the largest sum. It
is found as local alignments are (Smith & Waterman 1981, J. Mol. Biol. 147:195): a sum below 0 starts again at 0.

Axes: B cadence, P panel (ON ones first), T time bin of a panel, F frequency channel, W channel of a cut-out.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from training.search.dedoppler import CLIP
from training.search.lines import asinh

PATH_CHANNELS = 16  # of a cut-out, with the path in the middle
PATH_PLANES = 2  # the values, and where the path is
PATH_EVIDENCE = 2  # numbers about each path
_EXPECTED = 1.5  # standard deviations taken off each pixel: about the mean along the best path through noise
_STEP = 0.2  # cost of moving to the next channel
_SQRT_6 = 6**0.5
_ONE_THREAD = (1 << 15) - 1  # most values of an operation that torch does not share among its threads


def path_shape(time_bins: int) -> tuple[int, int]:
    """Height and width of a cut-out of panels of `time_bins`; the network halves both twice."""
    return -(-time_bins // 4) * 4, PATH_CHANNELS


class Paths(NamedTuple):
    """The best path of each panel."""

    score: Tensor
    """(B, P) sum along the path of what its pixels have above _EXPECTED, less the cost of its steps."""
    channel: Tensor
    """(B, P, T) the path's channel; before it begins and after it ends, the channel of that end."""
    inside: Tensor
    """(B, P, T) whether the path has begun and not ended."""


def path_evidence(paths: Paths) -> Tensor:
    """(B, P, PATH_EVIDENCE) the logarithm of 1 + the score, and the path's share of the panel's time."""
    return torch.stack([paths.score.clamp_min(0).log1p(), paths.inside.float().mean(2)], 2)


def find_paths(values: Tensor) -> Paths:
    """The best path through each panel of `values` (B, P, T, F), which are in standard deviations of white noise.

    From one time bin to the next a path moves by one channel at most.
    """
    gain = pad(values, (1, 1))
    # Smoothed over three channels, the width of a narrow signal.
    gain = ((gain[..., :-2] + 2 * gain[..., 1:-1] + gain[..., 2:]) / _SQRT_6).clamp(-CLIP, CLIP) - _EXPECTED
    # Waking torch's threads for steps as short as these takes longer than the steps (docs/performance.md).
    is_shared = values.is_cuda or torch.compiler.is_compiling()
    few = len(gain) if is_shared else max(1, _ONE_THREAD // (gain.shape[1] * (gain.shape[3] + 2)))
    return _trace(torch.cat([_add_up(part) for part in torch.split(gain, few)]))


def _add_up(gain: Tensor) -> Tensor:
    """Sums along the best paths up to each pixel of `gain` (B, P, T, F): (B, P, 1 + T, 1 + F + 1), with borders of 0.

    A path may begin at a border, but none continues from there.
    """
    totals = [gain.new_zeros((*gain.shape[:2], gain.shape[3] + 2))]
    for here in gain.unbind(2):
        before = totals[-1]
        aside = torch.maximum(before[..., :-2], before[..., 2:]).sub_(_STEP)
        totals.append(pad(torch.maximum(before[..., 1:-1], aside).clamp_min_(0).add_(here), (1, 1)))
    return torch.stack(totals, 2)


def _trace(totals: Tensor) -> Paths:
    """Follow the largest sum of each panel back, in `totals` (B, P, 1 + T, 1 + F + 1), whose borders are 0."""
    sums = totals[:, :, 1:, 1:-1]
    time_bins, channels = sums.shape[2:]
    score, end = sums.flatten(2).max(2)
    channel, end = end % channels, end // channels
    begun = torch.zeros_like(score, dtype=torch.bool)
    # The moves by which a path may have come, and their costs; of equal sums the straight move is taken.
    moves = torch.arange(3, device=totals.device)
    moves = torch.where(moves == 2, 1, -moves)  # 0, -1, 1: a tensor made of a list would wait for the device
    cost = moves.abs() * _STEP
    places, inside = [], []
    for row in reversed(range(time_bins)):
        on = ~begun & (end >= row)
        places.append(channel)
        inside.append(on)
        before, came = (totals[:, :, row].gather(2, channel[..., None] + 1 + moves) - cost).max(2)
        begun = begun | (on & (before <= 0))
        channel = torch.where(on & ~begun, channel + moves[came], channel)
    return Paths(score, torch.stack(places[::-1], 2), torch.stack(inside[::-1], 2))


def cut_out_paths(values: Tensor, paths: Paths, sign: int = 1) -> Tensor:
    """The asinh of the channels around each path, 0 outside of the panel, and where the path is.

    (B, P, PATH_PLANES, T', W) of values (B, P, T, F); T' is T filled up with zeros (path_shape). `sign` -1 gives the
    cut-outs of a cadence whose channels are reversed.
    """
    offset = torch.arange(PATH_CHANNELS, device=values.device) - PATH_CHANNELS // 2
    place = paths.channel[..., None] + sign * offset
    known = (place >= 0) & (place < values.shape[3])
    found = asinh(values.gather(3, place.clamp(0, values.shape[3] - 1))) * known
    on = paths.inside[..., None].expand_as(found).to(found.dtype)
    return pad(torch.stack([found, on], 2), (0, 0, 0, path_shape(values.shape[2])[0] - values.shape[2]))
