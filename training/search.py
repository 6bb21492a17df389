"""Candidates: the lines on which a cadence's ON panels stand out, and a network that looks along them.

A needle is a thousandth of its cadence's pixels, so that a network that sees all of them learns slowly. Here an
incoherent de-Doppler sum, as in turboSETI (Enriquez et al. 2017, arXiv:1709.03491), tries every line and proposes the
best few; the network sees what lies along each, turned upright, and says whether it is a needle.

Axes: B cadence, P panel (ON ones first: A A A B C D), T time bin of a panel, F frequency channel; R drift rate,
K candidate, W channel of a cut-out.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, max_pool1d, max_pool2d, pad, softplus

from shard_tools.cadence import OFF_POSITIONS, ON_POSITIONS, PANELS
from training.dedoppler import CLIP, EXCUSED, FAINTEST, VETO

EVIDENCE = 8  # numbers about each candidate
CUTOUT_CHANNELS = 28  # seven patches of a Swin, the line in the middle of the fourth
CUTOUT_PLANES = PANELS + 1
_ORDER = (*ON_POSITIONS, *OFF_POSITIONS)  # positions in the cadence of the panels of an image
_ON = len(ON_POSITIONS)
_RATES = 121
_STEEPEST = 137.0  # channels that the steepest line crosses in a panel
_CROWDING = 1.3  # slow rates are sampled more densely, as most needles are slow
_FREQUENCIES_KEPT = 0.75  # share of the frequencies in a line's profile across the channels: finer ones are noise
_BAND = 21  # channels: lines are narrower
# Drift rates around a line, and channels to both sides (to twice as many), where a signal in an OFF panel counts.
_NEAR_RATES, _BLOCK = 11, 16
_APART = 17  # channels: the window in which there is one candidate at most
_TYPICAL = 2.9  # asinh of a score that is as likely interference as a needle
# Normal noise's standard deviation divided by the square of the mean of sqrt(abs(x)): pi / (2^(1/2) Gamma(3/4)^2).
_ROOT_TO_SIGMA = math.pi / (math.sqrt(2) * math.gamma(0.75) ** 2)


def upright_shape(time_bins: int) -> tuple[int, int]:
    """Height and width of a cut-out of panels of `time_bins`; a Swin halves them several times."""
    return -(-time_bins // 8) * 8, CUTOUT_CHANNELS


def flatten(panels: Tensor) -> Tensor:
    """Panels (B, P, T, F) without persistent lines, bands and bursts, in standard deviations of the noise.

    ON and OFF panels are treated alike: exchanging them exchanges the values. A channel's level is that of the fainter
    half, ON or OFF, so that a signal in the other is kept whole. Means of roots and clipped means are hardly affected
    by interference, and cost less than medians.
    """
    panels = panels - panels.mean((2, 3), keepdim=True)
    halves = [panels[:, :_ON].flatten(1, 2), panels[:, _ON:].flatten(1, 2)]
    (on_level, on_noise), (off_level, off_noise) = (_level(half) for half in halves)
    noise = ((on_noise + off_noise) / 2).clamp_min(FAINTEST)
    values = (panels - torch.minimum(on_level, off_level)[:, None]) / noise[:, None]
    # Each panel has its own normalisation and bands: remove what is too wide to be a line.
    rows = values.clamp(-CLIP, CLIP).flatten(0, 2)[:, None]
    around = avg_pool1d(rows, _BAND, 1, _BAND // 2, count_include_pad=False)
    values = values - around.view_as(values)
    return values / _noise(values, 3).clamp_min(1)


def _level(half: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel's level and noise, (B, 1, F), in three panels end to end (B, 3 T, F)."""
    middle = half.mean(1, keepdim=True)
    noise = _noise(half - middle, 1)
    return middle + (half - middle).clamp(-2 * noise, 2 * noise).mean(1, keepdim=True), noise


def _noise(values: Tensor, axis: int) -> Tensor:
    return values.abs().sqrt().mean(axis, keepdim=True).square() * _ROOT_TO_SIGMA


class Candidates(nn.Module):
    """Proposes lines through panels of one shape (T, F). Has no weights."""

    rates: Tensor
    rows: Tensor
    turn: Tensor
    panel_turn: Tensor

    def __init__(self, time_bins: int, channels: int, count: int) -> None:
        super().__init__()
        self.count, self.channels = count, channels
        spread = torch.linspace(-1, 1, _RATES, dtype=torch.float64)
        rates = spread.sign() * spread.abs() ** _CROWDING * _STEEPEST / time_bins  # channels a time bin
        middle = (PANELS * time_bins - 1) / 2
        rows = torch.tensor(_ORDER)[:, None] * time_bins + torch.arange(time_bins) - middle  # (P, T), from the middle
        # Shifting a row by c channels turns the phase of its Fourier coefficient k by 2 pi k c / n, so shifting all
        # rows by all rates and summing them is a matrix product. Rows are padded to twice the channels, as a line may
        # leave the band by half of it on either side. One further out wraps around, and so do the cut-outs.
        kept = int(_FREQUENCIES_KEPT * (channels + 1))
        cycles = torch.arange(kept, dtype=torch.float64) * 2 * math.pi / (2 * channels)
        within = cycles[:, None, None] * rates[:, None] * (torch.arange(time_bins) - (time_bins - 1) / 2)
        real, imaginary = within.cos(), within.sin()
        turn = torch.cat([torch.cat([real, -imaginary], 2), torch.cat([imaginary, real], 2)], 1) / math.sqrt(time_bins)
        between = cycles * rates[:, None] * rows.mean(1)[:, None, None]
        for name, values in (("rates", rates), ("rows", rows), ("turn", turn)):
            self.register_buffer(name, values.float(), persistent=False)
        panel_turn = torch.stack([between.cos(), between.sin()], 3).float()
        self.register_buffer("panel_turn", panel_turn, persistent=False)

    def sums(self, values: Tensor) -> Tensor:
        """Sums along lines of every rate (B, P, R, 2 F), over sqrt(T): white noise keeps its standard deviation of 1.

        The last axis is a line's channel in the middle of the cadence, from -F / 2: a line that is in the band for one
        panel may be far outside it there.
        """
        batch, channels = len(values), values.shape[3]
        waves = torch.fft.rfft(values, n=2 * channels, dim=3)[..., : len(self.turn)]
        rows = torch.cat([waves.real, waves.imag], 2).permute(3, 2, 0, 1).flatten(2)  # (k, 2 T, B P)
        turned = (self.turn @ rows).float().reshape(len(rows), -1, batch, PANELS).permute(2, 3, 1, 0)  # (B, P, 2 R, k)
        lines = torch.complex(turned[:, :, :_RATES].contiguous(), turned[:, :, _RATES:].contiguous())
        found = torch.fft.irfft(lines * torch.view_as_complex(self.panel_turn.contiguous()), n=2 * channels, dim=3)
        return torch.cat([found[..., -(channels // 2) :], found[..., : -(channels // 2)]], 3)

    def forward(self, panels: Tensor) -> tuple[Tensor, Tensor]:
        """Of panels (B, P, T, F), ON ones first: cut-outs (2 B, K, CUTOUT_PLANES, T', W), evidence (2 B, K, EVIDENCE).

        The second half is a control, the same search with ON and OFF exchanged: it shows what in this sky looks like a
        needle and is none.
        """
        values = flatten(panels.float())
        lines = self.sums(values.clamp(-CLIP, CLIP))
        on, off = lines[:, :_ON], lines[:, _ON:]
        needles = self._propose(values, self.rows, on, off)
        controls = self._propose(values.roll(_ON, 1), self.rows.roll(_ON, 0), off, on)
        return torch.cat([needles[0], controls[0]]), torch.cat([needles[1], controls[1]])

    def _propose(self, values: Tensor, rows: Tensor, on: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
        """Cut-outs and evidence of the K lines whose sums `on` (B, 3, R, 2 F) stand out most from `off`."""
        off_near = _near(off)
        score, rate = _score(on, off_near).max(1)  # (B, 2 F)
        is_peak = score == max_pool1d(score[:, None], _APART, 1, _APART // 2)[:, 0]
        top, channel = torch.where(is_peak, score, -torch.inf).topk(self.count, 1)
        rate = rate.gather(1, channel)
        cadence = torch.arange(len(values), device=values.device)[:, None]
        # Sums along it in the ON panels, near it in the OFF panels, along it there: (B, K, 3), (B, K, 1), (B, K, 3).
        found = [part.permute(0, 2, 3, 1)[cadence, rate, channel] for part in (on, off_near[:, None], off)]
        top = top.clamp_min(-100.0)[..., None]  # fewer peaks than candidates
        ordered = [part.sort(2, descending=True).values for part in found]
        evidence = torch.cat([top, *ordered], 2)
        return self._cut_out(values.asinh(), rows, channel - self.channels // 2, rate), evidence.asinh()

    def _cut_out(self, values: Tensor, rows: Tensor, channel: Tensor, rate: Tensor) -> Tensor:
        """(B, K, P + 1, T', W): the channels around each line, which becomes upright; 0 outside of the snippet."""
        centre = channel[..., None, None] + self.rates[rate][..., None, None] * rows  # (B, K, P, T)
        centre = (centre + self.channels / 2).remainder(2 * self.channels) - self.channels / 2  # as the sums wrap
        offset = torch.arange(CUTOUT_CHANNELS, device=values.device) - (CUTOUT_CHANNELS - 1) / 2
        place = centre[..., None] + offset
        below = place.floor()
        share, lower = place - below, below.long()
        inside = (lower >= 0) & (lower < self.channels - 1)
        lower = lower.clamp(0, self.channels - 2)
        each = values[:, None].expand(-1, self.count, -1, -1, -1)
        found = (each.gather(4, lower) * (1 - share) + each.gather(4, lower + 1) * share) * inside
        # A Swin sees only relative positions: the last plane marks where in the image the line is.
        nearness = torch.exp(-offset.square() / 8).expand_as(found[:, :, :1])
        height = upright_shape(values.shape[2])[0]
        return pad(torch.cat([found, nearness], 2), (0, 0, 0, height - values.shape[2]))


def _near(panels: Tensor) -> Tensor:
    """Sums (B, 3, R, 2 F) to the largest magnitude around each line (B, R, 2 F); not across the ends of the last axis.

    A line close to interference may cross it in an ON panel but miss it in the OFF panels. Sums below 0 count as much:
    where a steady line is fainter than usual in one panel, it may be brighter in another.
    """
    best = panels.abs().amax(1, keepdim=True)
    # In blocks of channels, with their neighbours: a window around each channel would cost ten times as much.
    blocks = max_pool2d(best, (1, _BLOCK), ceil_mode=True)
    around = max_pool2d(blocks, (_NEAR_RATES, 3), 1, (_NEAR_RATES // 2, 1))
    return around.repeat_interleave(_BLOCK, 3)[:, 0, :, : panels.shape[3]]


def _score(panels: Tensor, others: Tensor) -> Tensor:
    """Score of sums in three panels (B, 3, R, 2 F): the best of one, two or all, less what `others` have nearby."""
    first, second, third = panels.unbind(1)
    best = torch.maximum(torch.maximum(first, second), third)
    least = torch.minimum(torch.minimum(first, second), third)
    total = first + second + third
    together = torch.maximum(torch.maximum(best, (total - least) / math.sqrt(2)), total / math.sqrt(3))
    return together - VETO * (others - EXCUSED).clamp_min(0)


class CandidateModel(nn.Module):
    """Scores the candidates of an image (B, P, T, F) by a backbone on their cut-outs, and combines these scores."""

    def __init__(self, backbone: nn.Module, time_bins: int, channels: int, count: int) -> None:
        """`backbone` takes cut-outs (B K, CUTOUT_PLANES, *upright_shape) to (B K, 1)."""
        super().__init__()
        self.candidates = Candidates(time_bins, channels, count)
        # The same on every rank, and large: torch's DDP would send them before each step.
        self._ddp_params_and_buffers_to_ignore = [f"candidates.{name}" for name, _ in self.candidates.named_buffers()]
        self.backbone = backbone
        self.weigh = nn.Sequential(nn.Linear(EVIDENCE, 32), nn.GELU(), nn.Linear(32, 1))
        self.slope, self.control_share = (nn.Parameter(torch.tensor(value)) for value in (4.0, 0.75))
        # It starts close to the classical search, and learns to correct it.
        last = cast(nn.Linear, self.weigh[2])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def no_weight_decay(self) -> set[str]:
        """Its own scalars, whose initial values are meaningful; the backbone names its own weights."""
        return {"slope", "control_share"}

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1) logits: a soft maximum over the candidates, as one needle is enough, raised where the control is low.

        What the same network finds in the OFF panels is no needle: a sky with much of it scores lower. But a loud
        control costs no more than a typical one: a bright line in the OFF panels says nothing about the ON panels.
        """
        with torch.no_grad():
            cutouts, evidence = self.candidates(image)
        seen = cast(Tensor, self.backbone(cutouts.flatten(0, 1))).float().view(evidence.shape[:2])
        logit = seen + self.weigh(evidence).float()[..., 0] + self.slope * (evidence[..., 0] - _TYPICAL)
        needle, control = torch.logsumexp(logit, 1, keepdim=True).chunk(2)
        return needle + self.control_share * softplus(-control)
