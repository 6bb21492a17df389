"""What the network sees of the candidates that the searches propose, and how it combines them into one logit.

A needle covers a thousandth of its cadence's pixels, so a network that sees the whole cadence learns slowly. This one
sees only the surroundings of the few best lines (lines.py), as windows of the de-Doppler sums or as cut-outs of the
cadence. With windows it also sees cut-outs along the best path of each panel (panel_paths.py).

Axes: B cadence, P panel (ON ones first: A A A B C D), T time bin of a panel, F frequency channel; R drift rate,
C channel of a line in the middle of the cadence, K candidate, W channel of a cut-out.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from shard_tools.cadence import PANELS
from training.float32_linear import Float32Linear
from training.search.dedoppler import CLIP
from training.search.lines import EVIDENCE, ON, RATES, Lines, Search, asinh, flatten, near, whiten
from training.search.panel_paths import PATH_EVIDENCE, cut_out_paths, find_paths, path_evidence

CUTOUT_CHANNELS = 28  # seven patches of a Swin; the line is in the middle of the fourth
CUTOUT_PLANES = PANELS + 1
WINDOW_RATES, WINDOW_CHANNELS = 16, 32
# The sums of the six panels, `near` (lines.py) of the ON and of the OFF panels, the line's steepness, and nearness.
WINDOW_PLANES = PANELS + 4
FEATURES = 64  # numbers by which the backbone describes a window
_TYPICAL = 2.9  # asinh of the score at which interference is as likely as a needle


def upright_shape(time_bins: int) -> tuple[int, int]:
    """Height and width of a cut-out of panels of `time_bins`; the height is a multiple of 8, as a Swin needs."""
    return -(-time_bins // 8) * 8, CUTOUT_CHANNELS


class Candidates(Search):
    """Cut-outs of the cadence along each line, shifted row by row so that the line is upright."""

    def forward(self, panels: Tensor) -> tuple[Tensor, Tensor]:
        """Cut-outs (2 B, K, CUTOUT_PLANES, T', W), evidence (2 B, K, EVIDENCE) of panels (B, P, T, F), ON ones first.

        The second half is a control: the same search with ON and OFF exchanged. It shows what looks like a needle in
        this sky but is none.
        """
        values = flatten(panels.float())
        sums = self.sums(values.clamp(-CLIP, CLIP))
        on, off = sums[:, :ON], sums[:, ON:]
        needles, controls = self.find(on, off, near(off)), self.find(off, on, near(on))
        values = asinh(values)
        images = [
            self._cut_out(values, self.rows, needles),
            self._cut_out(values.roll(ON, 1), self.rows.roll(ON, 0), controls),
        ]
        return torch.cat(images), torch.cat([needles.evidence, controls.evidence])

    def _cut_out(self, values: Tensor, rows: Tensor, lines: Lines) -> Tensor:
        """(B, K, P + 1, T', W): the channels around each line, which becomes upright; 0 outside the snippet."""
        channel = lines.channel - self.outside
        centre = channel[..., None, None] + self.rates[lines.rate][..., None, None] * rows  # (B, K, P, T)
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


class PanelSums(NamedTuple):
    """Panels (B, P, T, F) in standard deviations of the noise, and their sums along lines."""

    values: Tensor
    on: Tensor
    """(B, 3, R, C) of the ON panels."""
    off: Tensor
    """(B, 3, R, C) of the OFF panels."""
    on_near: Tensor
    """(B, R, C) `near` (lines.py) of the ON panels."""
    off_near: Tensor
    """(B, R, C) `near` of the OFF panels."""


class Seen(NamedTuple):
    """What the network sees of a batch; the second half of 2 B is the control, as in Candidates."""

    windows: Tensor
    """(2 B, K, WINDOW_PLANES, 16, 32) around each line: see SumWindows."""
    evidence: Tensor
    """(2 B, K, EVIDENCE) of each line: see Lines."""
    cutouts: Tensor
    """(B, P, PATH_PLANES, T', PATH_CHANNELS) along the best path of each panel."""
    path_evidence: Tensor
    """(B, P, PATH_EVIDENCE) of each path."""
    channel: Tensor
    """(2 B, K) of each line, in the middle of the cadence: see Lines."""
    rate: Tensor
    """(2 B, K) index of each line's drift rate."""


class SumWindows(Search):
    """Windows of the de-Doppler sums around each line (its neighbours in drift rate and channel), and path cut-outs.

    Windows show every panel. The cut-outs are those along the best path of each panel.
    """

    def forward(self, panels: Tensor) -> Seen:
        """Search panels (B, P, T, F), ON ones first."""
        return next(self.views(self.sum_panels(panels)))

    def sum_panels(self, panels: Tensor) -> PanelSums:
        """The sums of panels (B, P, T, F), ON ones first, along all lines."""
        values = whiten(panels.float())
        sums = self.sums(values.clamp(-CLIP, CLIP))
        on, off = sums[:, :ON], sums[:, ON:]
        return PanelSums(values, on, off, near(on), near(off))

    def views(self, sums: PanelSums) -> Iterator[Seen]:
        """Yield what the network sees of the best lines, then what it would see of them with channels reversed.

        One search is enough for both, as reversing the channels does not change which lines and paths are best.
        """
        values, on, off, on_near, off_near = sums
        needles, controls = self.find(on, off, off_near), self.find(off, on, on_near)
        planes = [on, off, on_near[:, None], off_near[:, None]]
        exchanged = [off, on, off_near[:, None], on_near[:, None]]
        channel, rate, evidence = (torch.cat(halves) for halves in zip(needles, controls, strict=True))
        paths = find_paths(values)
        for sign in (1, -1):
            windows = torch.cat([self._window(planes, needles, sign), self._window(exchanged, controls, sign)])
            cutouts = cut_out_paths(values, paths, sign)
            yield Seen(windows, evidence, cutouts, path_evidence(paths), channel, rate)

    def _window(self, planes: list[Tensor], lines: Lines, sign: int) -> Tensor:
        """Windows (B, K, WINDOW_PLANES, 16, 32) of `planes`, each (B, N, R, C), around each line; 0 outside of them.

        `sign` -1 gives the windows of a cadence whose channels, and so drift rates, are reversed.
        """
        device = lines.rate.device
        rows = torch.arange(WINDOW_RATES, device=device) - WINDOW_RATES // 2
        columns = torch.arange(WINDOW_CHANNELS, device=device) - WINDOW_CHANNELS // 2
        rate = (lines.rate[..., None] + sign * rows)[:, :, None, :, None]
        channel = (lines.channel[..., None] + sign * columns)[:, :, None, None, :]
        inside = (rate >= 0) & (rate < RATES) & (channel >= 0) & (channel < self.places)
        cadence = torch.arange(len(rate), device=device)[:, None, None, None, None]
        place = rate.clamp(0, RATES - 1), channel.clamp(0, self.places - 1)
        found = []
        for plane in planes:
            panel = torch.arange(plane.shape[1], device=device)[None, None, :, None, None]
            found.append(plane[(cadence, panel, *place)])
        steepness = (lines.rate - RATES // 2).abs()[..., None, None, None] / (RATES // 2)
        # A Swin sees only relative positions: the last plane marks where in the window the line is.
        nearness = torch.exp(-(rows[:, None].square() + columns.square()) / 8)
        like = found[0][:, :, :1]
        return torch.cat([asinh(torch.cat(found, 2)) * inside, steepness.expand_as(like), nearness.expand_as(like)], 2)


class _SearchModel(nn.Module):
    """What both models below share: the search, a backbone, and the weight of the search's own scores."""

    def __init__(self, backbone: nn.Module, candidates: Candidates | SumWindows) -> None:
        super().__init__()
        self.candidates = candidates
        # Buffers are large and the same on every rank: DDP would send them before each step.
        self._ddp_params_and_buffers_to_ignore = [f"candidates.{name}" for name, _ in self.candidates.named_buffers()]
        self.backbone = backbone
        self.slope = nn.Parameter(torch.tensor(4.0))

    def no_weight_decay(self) -> set[str]:
        """The model's own scalars: decay would pull them away from meaningful values; the backbone names its own."""
        return {"slope", "control_share"}

    def _searched(self, evidence: Tensor) -> Tensor:
        """The search's own scores (2 B, K), as logits."""
        return self.slope * (evidence[..., 0] - _TYPICAL)


class CandidateModel(_SearchModel):
    """Scores an image (B, P, T, F) by a backbone that sees cut-outs of its candidates, and combines their scores."""

    def __init__(self, backbone: nn.Module, candidates: Candidates) -> None:
        """`backbone` takes cut-outs (B K, CUTOUT_PLANES, *upright_shape) to (B K, 1)."""
        super().__init__(backbone, candidates)
        self.control_share = nn.Parameter(torch.tensor(0.75))
        self.weigh = nn.Sequential(nn.Linear(EVIDENCE, 32), nn.GELU(), nn.Linear(32, 1))
        # It starts close to the classical search and learns to correct it.
        last = cast(nn.Linear, self.weigh[2])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1) logits: a soft maximum over the candidates, as one needle is enough, raised if the control is low.

        What the network finds in the control is no needle, so a sky with much of it scores lower. But a very high
        control costs no more than a typical one: a bright line in the OFF panels says nothing about the ON panels.
        """
        with torch.no_grad():
            images, evidence = self.candidates(image)
        seen = cast(Tensor, self.backbone(images.flatten(0, 1))).float().view(evidence.shape[:2])
        logit = seen + self.weigh(evidence).float()[..., 0] + self._searched(evidence)
        needle, control = torch.logsumexp(logit, 1, keepdim=True).chunk(2)
        return needle + self.control_share * softplus(-control)


class WindowModel(_SearchModel):
    """Compares the candidates of an image (B, P, T, F) with those of the control, and ON paths with OFF paths."""

    candidates: SumWindows
    control_share: Tensor

    def __init__(self, backbone: nn.Module, path_network: nn.Module, candidates: SumWindows) -> None:
        """`backbone` takes windows (B K, WINDOW_PLANES, 16, 32) to features (B K, FEATURES); `path_network` takes
        cut-outs (B P, PATH_PLANES, T', PATH_CHANNELS) to features (B P, FEATURES).
        """
        super().__init__(backbone, candidates)
        # Fixed: when learnt from simulated skies alone it becomes 0.18, but 0.3 to 0.5 best tells needles from the same
        # needles in OFF panels, and does as well on other cadences (docs/recipe.md).
        self.register_buffer("control_share", torch.tensor(0.4))
        self.path_network = path_network
        self.describe, self.describe_path = (
            nn.Sequential(Float32Linear(numbers, 32), nn.GELU(), Float32Linear(32, FEATURES))
            for numbers in (EVIDENCE, PATH_EVIDENCE)
        )
        self.compare = nn.Sequential(Float32Linear(8 * FEATURES, 128), nn.GELU(), Float32Linear(128, 1))
        # It starts close to the classical search and learns to correct it. Not at 0: the first gradient would not reach
        # the layers before it.
        last = cast(nn.Linear, self.compare[2])
        nn.init.normal_(last.weight, std=0.01)
        nn.init.zeros_(last.bias)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1) logits: a score of the ON panels, less a share of the score of the OFF panels.

        Each score is a soft maximum over the candidates, as one needle is enough. The same weights give both.
        """
        with torch.no_grad():
            seen = next(self.candidates.views(self.candidates.sum_panels(image)))
        return self._judge(seen)

    def both_views(self, image: Tensor) -> Tensor:
        """(B, 2) logits of images and of the same images with channels reversed, from one search; for prediction."""
        return torch.cat([self._judge(seen) for seen in self.candidates.views(self.candidates.sum_panels(image))], 1)

    def _judge(self, seen: Seen) -> Tensor:
        """(B, 1) logits."""
        for_on, for_off = torch.logsumexp(self.line_logits(seen), 2, keepdim=True).unbind()
        return for_on - self.control_share * for_off

    def line_logits(self, seen: Seen) -> Tensor:
        """(2, B, K) a logit for each line; the second half is the control's."""
        lines = self._features(self.backbone, seen.windows, self.describe, seen.evidence).chunk(2)
        paths = self._features(self.path_network, seen.cutouts, self.describe_path, seen.path_evidence).chunk(2, 1)
        seen_together = torch.stack([_put_together(lines, paths), _put_together(lines[::-1], paths[::-1])])
        compared = cast(Tensor, self.compare(seen_together)).flatten(2)  # (2, B, K)
        return compared + self._searched(seen.evidence).view_as(compared)

    def _features(self, backbone: nn.Module, images: Tensor, describe: nn.Module, evidence: Tensor) -> Tensor:
        """(N, K, FEATURES) of images (N, K, C, H, W) and the numbers about them (N, K, E)."""
        shape = *evidence.shape[:2], FEATURES
        return cast(Tensor, backbone(images.flatten(0, 1))).float().view(shape) + cast(Tensor, describe(evidence))


def _put_together(lines: Sequence[Tensor], paths: Sequence[Tensor]) -> Tensor:
    """The features (B, K, 8 FEATURES) by which the first of two halves is judged: ON before OFF, or OFF before ON.

    Each line of that half has its own features (B, K, FEATURES). Further ones are the same for all its lines: those of
    the other half's lines, and of the paths (B, 3, FEATURES) in both halves.
    """
    (own, others), (own_paths, other_paths) = lines, paths
    pooled = [part for each in (others, own_paths, other_paths) for part in (each.amax(1), each.mean(1))]
    shared = torch.cat([*pooled, own_paths.amin(1)], 1)[:, None].expand(-1, own.shape[1], -1)
    return torch.cat([own, shared], 2)
