"""The search for candidates: the lines on which a cadence's ON panels stand out. It has no weights.

An incoherent de-Doppler sum, as in turboSETI (Enriquez et al. 2017, arXiv:1709.03491), tries every line and proposes
the best few. What the network sees of them is in candidates.py.

Axes: B cadence, P panel (ON ones first: A A A B C D), T time bin of a panel, F frequency channel; R drift rate,
C channel of a line in the middle of the cadence, K candidate.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.fft import next_fast_len
from torch import Tensor, nn
from torch.nn.functional import max_pool1d, pad

from shard_tools.axes import Axes
from shard_tools.cadence import OFF_POSITIONS, ON_POSITIONS
from training.float32_linear import float32_only
from training.search.dedoppler import CLIP, EXCUSED, FAINTEST, VETO

EVIDENCE = 8  # numbers about each candidate
RATES = 121
ON = len(ON_POSITIONS)  # ON panels, which come first
_ORDER = (*ON_POSITIONS, *OFF_POSITIONS)  # positions in the cadence of the panels of an image
_CROWDING = 1.3  # slow rates are sampled more densely, as most needles are slow
_FREQUENCIES_KEPT = 0.75  # share of the frequencies in a line's profile across the channels: finer ones are noise
_BAND = 21  # channels: lines are narrower
# A signal in an OFF panel counts if it lies within this many drift rates around a line, and within this many channels
# (up to twice as many) to either side.
_NEAR_RATES, _BLOCK = 11, 16
_APART = 17  # channels: the window in which there is one candidate at most
# Normal noise's standard deviation divided by the square of the mean of sqrt(abs(x)): pi / (2^(1/2) Gamma(3/4)^2).
_ROOT_TO_SIGMA = math.pi / (math.sqrt(2) * math.gamma(0.75) ** 2)


def flatten(panels: Tensor) -> Tensor:
    """Panels (B, P, T, F) without persistent lines, bands and bursts, in standard deviations of the noise.

    ON and OFF panels are treated alike: exchanging them exchanges the values. A channel's level is that of the fainter
    half, ON or OFF, so that a signal in the other is kept whole. Means of roots and clipped means are hardly affected
    by interference, and cost less than medians.
    """
    panels = panels - panels.mean((2, 3), keepdim=True)
    halves = [panels[:, :ON].flatten(1, 2), panels[:, ON:].flatten(1, 2)]
    (on_level, on_noise), (off_level, off_noise) = (_level(half) for half in halves)
    noise = ((on_noise + off_noise) / 2).clamp_min(FAINTEST)
    values = (panels - torch.minimum(on_level, off_level)[:, None]) / noise[:, None]
    # Each panel has its own normalisation and bands: remove what is too wide to be a line.
    values = values - _around(values.clamp(-CLIP, CLIP))
    return values / _noise(values, 3).clamp_min(1)


def whiten(panels: Tensor) -> Tensor:
    """Panels (B, P, T, F) without bands, bursts and persistent lines, in standard deviations of each time bin's noise.

    As `flatten`, but the noise is measured in each time bin, from the steps between neighbouring channels: if the
    receiver's noise varies, that of a whole cadence says little about the noise around a line.
    """
    steps = panels.diff(dim=3) / math.sqrt(2)
    values = panels / _noise(steps, 3).clamp_min(FAINTEST)
    values = values - _around(values)
    values = values - _around(values.clamp(-CLIP, CLIP))
    on, off = (_level(half) for half in (values[:, :ON].flatten(1, 2), values[:, ON:].flatten(1, 2)))
    noise = ((on[1] + off[1]) / 2).clamp_min(1)
    return (values - torch.minimum(on[0], off[0])[:, None]) / noise[:, None]


def _around(values: Tensor) -> Tensor:
    """The mean of the channels around each: anything that varies so slowly is no line."""
    channels, half = values.shape[-1], _BAND // 2
    place = torch.arange(channels, device=values.device)
    known = (place + half).clamp_max(channels - 1) - (place - half).clamp_min(0) + 1  # channels in the band
    return _windows(pad(values, (half, half)), _BAND, -1, torch.add) / known


def _windows(values: Tensor, width: int, axis: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What `combine` makes of each `width` neighbours on an axis, which becomes shorter by `width` - 1.

    Put together from windows of 1, 2, 4, ... neighbours: torch's pooling takes ten times as long.
    """
    places = values.shape[axis] - width + 1
    found, start = None, 0
    for power in range(width.bit_length()):
        size = 1 << power
        if power:
            length = values.shape[axis] - size // 2
            values = combine(values.narrow(axis, 0, length), values.narrow(axis, size // 2, length))
        if width & size:
            part = values.narrow(axis, start, places)
            found, start = part if found is None else combine(found, part), start + size
    assert found is not None
    return found


def asinh(values: Tensor) -> Tensor:
    """As torch.asinh, which takes four times as long on a CPU, as it works on one value at a time.

    For float32 values below 1e19 (larger ones give NaN), and not for gradients.
    """
    size = values.abs()
    square = size.square()
    return torch.log1p(size + square / (1 + torch.sqrt(square + 1))).copysign(values)


def _level(half: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel's level and noise, (B, 1, F), in three panels end to end (B, 3 T, F)."""
    middle = half.mean(1, keepdim=True)
    noise = _noise(half - middle, 1)
    return middle + (half - middle).clamp(-2 * noise, 2 * noise).mean(1, keepdim=True), noise


def _noise(values: Tensor, axis: int) -> Tensor:
    return values.abs().sqrt().mean(axis, keepdim=True).square() * _ROOT_TO_SIGMA


class Lines(NamedTuple):
    """The K lines that stand out most in each cadence."""

    channel: Tensor
    """(B, K) in the middle of the cadence, as an index into the sums' last axis."""
    rate: Tensor
    """(B, K) index of its drift rate."""
    evidence: Tensor
    """(B, K, EVIDENCE) asinh of: the score, the sums in the three ON panels in descending order, the largest sum near
    the line in the OFF panels, and the sums in the three OFF panels."""


class Search(nn.Module):
    """Finds lines in panels of one shape (T, F) that were observed at the same times."""

    rates: Tensor
    """(R,) in channels a time bin."""
    rows: Tensor
    """(P, T) in time bins from the middle of the cadence."""
    turn: Tensor
    """(k, R, 2 T') cosines and sines of the phases by which Fourier coefficient k of the T' later rows turns."""
    panel_turn: Tensor
    """(P, R, k, 2) cosines and sines of the phases by which all rows of a panel turn together."""

    def __init__(self, axes: Axes, count: int, outside: int | None = None) -> None:
        """Find `count` lines.

        In the middle of the cadence they may lie up to `outside` channels beyond either edge of the panels; None: half
        the panels' channels.
        """
        super().__init__()
        self.axes, self.count, self.channels = axes, count, axes.channels
        self.outside = axes.channels // 2 if outside is None else outside
        self.places = axes.channels + 2 * self.outside
        spread = torch.linspace(-1, 1, RATES, dtype=torch.float64)
        rates = spread.sign() * spread.abs() ** _CROWDING * axes.steepest / axes.time_bins
        rows = torch.tensor(axes.rows)[list(_ORDER)]
        # Shifting a row by c channels turns the phase of its Fourier coefficient k by 2 pi k c / n, so shifting all
        # rows by all rates and summing them is a matrix product. Rows are padded to twice the channels, as a line may
        # lie outside by half the channels on either side. A line further out wraps around, and so does its cut-out.
        # Less padding is enough if lines must be inside in the middle of the cadence.
        self._length = 2 * axes.channels
        if self.outside < axes.channels // 2:
            furthest = axes.channels + self.outside + int(rates.max() * rows.abs().max()) + 1
            self._length = min(next_fast_len(furthest, real=True), self._length)
        kept = int(_FREQUENCIES_KEPT * (self._length // 2 + 1))
        cycles = torch.arange(kept, dtype=torch.float64) * 2 * math.pi / self._length
        # A row and its mirror image in the panel turn by opposite phases, so for their sum and their difference the
        # factors are real: cosines and sines.
        after = torch.arange(axes.time_bins // 2, axes.time_bins) - (axes.time_bins - 1) / 2
        within = cycles[:, None, None] * rates[:, None] * after
        # The first place of the sums is the channel -`outside`.
        between = cycles * (rates[:, None] * rows.mean(1)[:, None, None] - self.outside)
        for name, values in (
            ("rates", rates),
            ("rows", rows),
            ("turn", torch.cat([within.cos(), within.sin()], 2) / math.sqrt(axes.time_bins)),
            ("panel_turn", torch.stack([between.cos(), between.sin()], 3)),
        ):
            self.register_buffer(name, values.float(), persistent=False)

    def observe(self, axes: Axes) -> None:
        """From now on search panels with other axes, but of the same shape."""
        if axes == self.axes:
            return
        if (axes.time_bins, axes.channels) != (self.axes.time_bins, self.axes.channels):
            raise ValueError(f"panels of {axes.time_bins} x {axes.channels}, for a search of {self.axes}")
        # In place: they are on the model's device, and a compiled model holds them.
        for name, buffer in Search(axes, self.count, self.outside).named_buffers():
            self.get_buffer(name).copy_(buffer)
        self.axes = axes

    def sums(self, values: Tensor) -> Tensor:
        """Sums along lines of every rate (B, P, R, C), divided by sqrt(T): white noise keeps a standard deviation of 1.

        The last axis is a line's channel in the middle of the cadence, from -`outside` on: a line that is inside during
        one panel may be far outside there. The sums are made in float32 under autocast too.
        """
        with float32_only(values):
            middle = values.shape[2] // 2
            earlier, later = values[:, :, :middle].flip(2), values[:, :, middle:]
            if later.shape[2] > middle:  # the row in the middle, which is its own mirror image
                earlier = pad(earlier, (0, 0, 1, 0))
            even, odd = (
                torch.fft.rfft(rows, n=self._length, dim=3)[..., : len(self.turn)]
                for rows in (later + earlier, later - earlier)
            )
            rows = torch.view_as_real(torch.cat([even, 1j * odd], 2)).permute(3, 2, 0, 1, 4)  # (k, 2 T', B, P, 2)
            products = (self.turn @ rows.flatten(2)).view(len(rows), -1, *values.shape[:2], 2)
            lines = torch.view_as_complex(products).permute(2, 3, 1, 0)  # (B, P, R, k)
            turned = lines.new_empty(lines.shape)
            torch.mul(lines, torch.view_as_complex(self.panel_turn), out=turned)
            summed: Tensor = torch.fft.irfft(turned, n=self._length, dim=3)
            return summed[..., : self.places]

    def find(self, on: Tensor, off: Tensor, off_near: Tensor) -> Lines:
        """The lines whose sums `on` (B, 3, R, C) stand out most from `off`; `off_near` is `near(off)`."""
        return self.find_best(best_sums(on), on, off, off_near)

    def find_best(self, best: Tensor, on: Tensor, off: Tensor, off_near: Tensor) -> Lines:
        """As `find`, if `best_sums(on)` is known."""
        # What is near the line in the other panels counts against it.
        of_all = best.sub((off_near - EXCUSED).clamp_min_(0), alpha=VETO)
        score = of_all.amax(1)  # (B, C)
        is_peak = score == max_pool1d(score[:, None], _APART, 1, _APART // 2)[:, 0]
        top, channel = torch.where(is_peak, score, -torch.inf).topk(self.count, 1)
        rate = of_all.gather(2, channel[:, None].expand(-1, RATES, -1)).argmax(1)
        cadence = torch.arange(len(on), device=on.device)[:, None]
        # Sums along a line in ON panels, near it in OFF panels, and along it there: (B, K, 3), (B, K, 1), (B, K, 3).
        found = [part.permute(0, 2, 3, 1)[cadence, rate, channel] for part in (on, off_near[:, None], off)]
        top = top.clamp_min(-100.0)[..., None]  # -inf if there are fewer peaks than candidates
        ordered = [part.sort(2, descending=True).values for part in found]
        return Lines(channel, rate, torch.cat([top, *ordered], 2).asinh())


def near(panels: Tensor) -> Tensor:
    """Sums (B, 3, R, C) to the largest magnitude around each line (B, R, C); not across the ends of the last axis.

    A line close to interference may cross it in an ON panel but miss it in the OFF panels. Sums below 0 count as much
    as those above: a steady line that is fainter than usual in one panel may be brighter in another.
    """
    channels = panels.shape[3]
    first, second, third = panels.abs().unbind(1)
    best = torch.maximum(torch.maximum(first, second), third)
    # Maxima of blocks of channels and their neighbours: a window around each channel would cost ten times as much.
    blocks = pad(best, (0, -channels % _BLOCK)).view(*best.shape[:2], -1, _BLOCK).amax(3)
    # Magnitudes are at least 0, so that rows and columns of 0 around them change nothing.
    around = pad(blocks, (1, 1, _NEAR_RATES // 2, _NEAR_RATES // 2))
    around = _windows(_windows(around, 3, 2, torch.maximum), _NEAR_RATES, 1, torch.maximum)
    return around.repeat_interleave(_BLOCK, 2)[..., :channels]


def best_sums(panels: Tensor) -> Tensor:
    """Sums of lines (B, 3, R, C) in the best one, two or all of three panels together, (B, R, C)."""
    first, second, third = panels.unbind(1)
    total = first + second
    total += third
    least = torch.minimum(torch.minimum(first, second), third)
    two = torch.sub(total, least, out=least).mul_(1 / math.sqrt(2))
    best = torch.maximum(first, second)
    for each in (third, two, total.mul_(1 / math.sqrt(3))):
        torch.maximum(best, each, out=best)
    return best
