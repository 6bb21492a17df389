"""The lines of snippets with a score for each: by trained weights, or by the search alone.

Axes: B snippet, P panel (ON ones first), T time bin, F frequency channel; K line.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shard_tools.axes import Axes
from training.search.aiming import started_as
from training.search.candidates import PanelSums, SumWindows, WindowModel
from training.search.lines import Lines, best_sums

Float64s = npt.NDArray[np.float64]


class ScoredLines(NamedTuple):
    """K lines of each of B snippets, from the one that stands out most."""

    channel: Float64s
    """(B, K) channel of the snippet in the middle of the cadence."""
    rate: Float64s
    """(B, K) in channels a time bin."""
    score: Float64s
    """(B, K) a logit by trained weights; standard deviations by the search alone; NaN for lines without one."""
    searched: Float64s
    """(B, K) the search's own score, in standard deviations."""


class FoundLines(NamedTuple):
    """What was found in each snippet of a batch. Exchanging ON and OFF exchanges the first two, and the last two."""

    needles: ScoredLines
    """Lines on which the ON panels stand out from the OFF panels."""
    controls: ScoredLines
    """The same search with ON and OFF exchanged."""
    bright_on: ScoredLines
    """The brightest lines of the ON panels, whatever is in the OFF panels. They have no score."""
    bright_off: ScoredLines
    """The brightest lines of the OFF panels."""


class LineScorer:
    """Finds lines in snippets of one cadence and scores each one."""

    def __init__(
        self, axes: Axes, model: WindowModel | None, count: int, device: torch.device, sum_time_bins: int = 1
    ) -> None:
        """`model` is None to score by the search alone, with `count` lines; a model has its own number of lines.

        A model searches the drift rates of its training, in channels a time bin, at the times of this cadence.
        The search and the model see sums of `sum_time_bins` time bins, divided by its root, as in a canvas.
        """
        self._model = model
        if model is None:
            searched_axes = axes.summed(sum_time_bins)
        else:
            searched_axes, count = started_as(model.candidates.axes, axes), model.candidates.count
        # A line that is outside this snippet in the middle of the cadence is inside a neighbour: snippets overlap.
        self._search = SumWindows(searched_axes, count, outside=0).to(device).eval()
        steepest = searched_axes.steepest / axes.time_bins
        self.axes = replace(axes, max_drift_hz_s=axes.hertz_per_second(steepest))
        """The cadence's axes, with the steepest drift that is searched."""
        self._sum_time_bins, self._device = sum_time_bins, device

    def score(self, snippets: npt.NDArray[np.floating]) -> FoundLines:
        """The lines of snippets (B, P, T, F), which have the ON panels first."""
        with torch.inference_mode():
            panels = torch.from_numpy(snippets).to(self._device)
            if self._sum_time_bins > 1:
                panels = _sum_rows(panels, self._sum_time_bins)
            sums = self._search.sum_panels(panels)
            best_on, best_off = best_sums(sums.on), best_sums(sums.off)
            if self._model is None:
                needles = self._by_search(best_on, sums.on, sums.off, sums.off_near)
                controls = self._by_search(best_off, sums.off, sums.on, sums.on_near)
            else:
                needles, controls = self._by_model(self._model, sums)
            nothing = torch.zeros_like(best_on)
            bright_on = self._search.find_best(best_on, sums.on, sums.off, nothing)
            bright_off = self._search.find_best(best_off, sums.off, sums.on, nothing)
            return FoundLines(needles, controls, self._to_lines(bright_on), self._to_lines(bright_off))

    def _by_search(self, best: Tensor, own: Tensor, others: Tensor, near_others: Tensor) -> ScoredLines:
        lines = self._search.find_best(best, own, others, near_others)
        return self._to_lines(lines, searched(lines))

    def _by_model(self, model: WindowModel, sums: PanelSums) -> tuple[ScoredLines, ScoredLines]:
        """A line's logit is its score less a share of the other panels' score, as the model subtracts it.

        So the soft maximum over the logits of a snippet's lines is the model's own logit.
        """
        seen = next(self._search.views(sums))
        by_line = model.line_logits(seen).float()
        against = model.control_share * torch.logsumexp(by_line, 2, keepdim=True).flip(0)
        logits = (by_line - against).unbind()
        halves = zip(seen.channel.chunk(2), seen.rate.chunk(2), seen.evidence.chunk(2), strict=True)
        needles, controls = (self._to_lines(Lines(*half), logit) for half, logit in zip(halves, logits, strict=True))
        return needles, controls

    def _to_lines(self, lines: Lines, score: Tensor | None = None) -> ScoredLines:
        score = torch.full_like(lines.evidence[..., 0], torch.nan) if score is None else score
        channel = lines.channel - self._search.outside
        rate = self._search.rates[lines.rate] / self._sum_time_bins
        found = (each.double().cpu().numpy() for each in (channel, rate, score, searched(lines)))
        return ScoredLines(*found)


def _sum_rows(panels: Tensor, time_bins: int) -> Tensor:
    """Sum neighbouring time bins of (B, P, T, F), scaled so that the noise stays 1."""
    batch, positions, rows, channels = panels.shape
    summed = panels.view(batch, positions, rows // time_bins, time_bins, channels).sum(3)
    return summed / math.sqrt(time_bins)


def searched(lines: Lines) -> Tensor:
    """(B, K) the search's own score of lines, in standard deviations."""
    return lines.evidence[..., 0].sinh()
