"""The lines of each snippet of a cadence, fitted one after another: each is blanked before the next is fitted.

Axes: B snippet, P panel, T time bin, F frequency channel; K line.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shard_tools.axes import Axes
from shard_tools.cadence import OFF_POSITIONS, ON_POSITIONS
from training.observation.line_fit import Fit, FitValues, Float32s, blank_line, fit_line, to_noise_units
from training.observation.line_scores import FoundLines, LineScorer, ScoredLines

_ROUNDS = 4  # searches of a snippet at most: it is searched again as long as each search finds something
_BRIGHT = 5.0  # standard deviations, which noise seldom reaches: lines without a score are fitted from here up
_IN_OTHERS = 4.0  # standard deviations in the other panels, which noise does not reach along a given line
_SHARE_IN_OTHERS = 1 / 3  # of a line's own SNR: the other panels' beams see far less of what is on the target
_SAME_LINE = 3.0  # channels
_LEAST_OWN = 2  # panels
_IMAGE_ORDER = (*ON_POSITIONS, *OFF_POSITIONS)


@dataclass(frozen=True)
class SnippetLine:
    """A line in one snippet."""

    row: int
    """The snippet's row in the data set."""
    on: bool
    """Whether it was looked for in the ON panels; else it is a control, found in the OFF panels."""
    score: float
    """NaN for interference that has none."""
    fit: Fit

    @property
    def positions(self) -> tuple[int, ...]:
        """The panels in which it was looked for."""
        return ON_POSITIONS if self.on else OFF_POSITIONS

    @property
    def snr(self) -> float:
        """SNR in the panels in which it was looked for, together."""
        return self.fit.snr(self.positions)

    @property
    def can_be_judged(self) -> bool:
        """Whether enough of it lies in the band: two of its own panels, and one that could show interference."""
        known = np.isfinite(self.fit.panel_snr)
        own = int(known[list(self.positions)].sum())
        return own >= _LEAST_OWN and int(known.sum()) - own >= 1

    @property
    def is_interference(self) -> bool:
        """Whether the other panels show it too: brighter than noise, and with at least a third of its own SNR."""
        others = OFF_POSITIONS if self.on else ON_POSITIONS
        own, other = (_brightest(self.fit, positions) for positions in (self.positions, others))
        return bool(other >= max(_IN_OTHERS, _SHARE_IN_OTHERS * own))


def _brightest(fit: Fit, positions: Sequence[int]) -> float:
    """SNR in these panels together, or in the best of them."""
    return float(np.fmax(fit.snr(positions), fit.best_snr(positions)))


def find_lines(
    scorer: LineScorer,
    rows: npt.NDArray[np.int64],
    snippets: npt.NDArray[np.float16],
    min_snr: npt.NDArray[np.float64],
) -> Iterator[SnippetLine]:
    """Yield the lines of snippets (B, P, T, F) with an SNR of at least `min_snr` (B,); `rows` are the snippets' rows.

    A snippet in which lines were found is searched again without them, a few times.
    """
    values = np.stack([to_noise_units(snippet) for snippet in snippets])
    left = np.arange(len(rows))
    for _ in range(_ROUNDS):
        found = scorer.score(np.ascontiguousarray(values[left][:, list(_IMAGE_ORDER)]))
        again = []
        for place, number in enumerate(left.tolist()):
            lines = _fit_lines(
                int(rows[number]), values[number], scorer.axes, _of_snippet(found, place), float(min_snr[number])
            )
            if lines:
                again.append(number)
            yield from lines
        left = np.array(again, np.int64)
        if not len(left):
            return


@dataclass(frozen=True)
class _Start:
    """Where a fit begins, and what is known of the line."""

    channel: float
    rate: float
    score: float
    on: bool


def _of_snippet(found: FoundLines, place: int) -> list[_Start]:
    """All lines of one snippet, those with a score first."""
    groups: list[tuple[ScoredLines, bool]] = list(zip(found, (True, False, True, False), strict=True))
    return [
        _Start(float(lines.channel[place, k]), float(lines.rate[place, k]), float(lines.score[place, k]), on)
        for lines, on in groups
        for k in range(lines.channel.shape[1])
        if np.isfinite(lines.score[place, k]) or lines.searched[place, k] >= _BRIGHT
    ]


def _fit_lines(row: int, values: Float32s, axes: Axes, starts: list[_Start], min_snr: float) -> list[SnippetLine]:
    """Fit the lines of a snippet from high to low SNR; each one is blanked before the next is fitted."""
    lines: list[SnippetLine] = []
    fitted = _fit_each(row, values, axes, starts, min_snr)
    while fitted:
        best = max(fitted, key=lambda line: line.snr)
        # The same line may have been proposed twice: with a score, and without one because it is bright.
        same = [line for line in fitted if line.on == best.on and _is_same(line.fit, best.fit, axes)]
        chosen = next((line for line in same if np.isfinite(line.score)), best)
        rest = [line for line in fitted if all(line is not each for each in same)]
        if np.isfinite(chosen.score) or chosen.is_interference:
            lines.append(chosen)
            blank_line(values, axes, chosen.fit)
            rest = _fit_each(row, values, axes, [_start_of(line) for line in rest], min_snr)
        # Else it waits for the next round, where it may be among the lines with a score.
        fitted = rest
    return lines


def _fit_each(row: int, values: Float32s, axes: Axes, starts: Sequence[_Start], min_snr: float) -> list[SnippetLine]:
    lines = []
    snippet = FitValues.of(values, axes)
    for start in starts:
        positions = ON_POSITIONS if start.on else OFF_POSITIONS
        fit = fit_line(snippet, start.channel, start.rate, positions)
        if fit.snr(positions) >= min_snr:
            lines.append(SnippetLine(row, start.on, start.score, fit))
    return lines


def _start_of(line: SnippetLine) -> _Start:
    return _Start(line.fit.middle, line.fit.rate, line.score, line.on)


def _is_same(first: Fit, second: Fit, axes: Axes) -> bool:
    ends = axes.rows[[0, -1], [0, -1]]
    apart = np.abs(first.channels(ends) - second.channels(ends)).max()
    return bool(apart <= _SAME_LINE + max(first.width, second.width) / 2)
