"""Bootstrap intervals of a detector's figures, and of the difference between two detectors.

Positives and negatives are drawn again with replacement, as many of each as there are (stratified bootstrap: Efron and
Tibshirani 1993, chapter 13; Robin et al. 2011, BMC Bioinformatics 12:77). Two detectors are compared on the same draws,
since chance affects both alike. A needle and its twin (the same cadence with ON and OFF panels exchanged) are drawn
together. If a recipe was trained in several runs, these are drawn again too (Owen 2007, Annals of Applied Statistics
1:386): the interval is then rather too wide for the cadences, and too narrow for the runs if these are few.

R draws, n positives, m negatives. Higher scores are more likely needles.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from training.metrics import Floats, Ints, allowed_false_positives

Statistic = Callable[[Ints, Ints], Floats]
"""A function from how often each positive (R, n) and each negative (R, m) was drawn to the figures (R,)."""
RESAMPLES = 1000
_BOUNDS = (0.025, 0.975)
_AT_ONCE = 50  # draws in memory at a time


@dataclass(frozen=True)
class Interval:
    """A figure and the bounds of its 95 % interval; NaN if it is not defined."""

    value: float
    low: float
    high: float


def auc_statistic(positive: Floats, negative: Floats) -> Statistic:
    """The area under the ROC curve of scores (n,) and (m,), a tie counting half (Mann and Whitney 1947)."""
    order = np.argsort(negative, kind="stable")
    below, reached = (np.searchsorted(negative[order], positive, side) for side in ("left", "right"))

    def auc(of_positive: Ints, of_negative: Ints) -> Floats:
        sums = _running_sums(of_negative[:, order])
        higher = (of_positive * (sums[:, below] + sums[:, reached])).sum(axis=1)
        return np.asarray(higher / (2 * len(positive) * len(negative)))

    return auc


def recall_statistic(positive: Floats, negative: Floats, rate: float) -> Statistic:
    """Recall at a false positive rate (metrics.recall_at_fpr); each draw has its own threshold."""
    allowed = allowed_false_positives(rate, len(negative))
    rising, falling = np.argsort(positive, kind="stable"), np.argsort(-negative, kind="stable")
    reached = np.searchsorted(positive[rising], negative[falling], "right")  # positives up to each negative

    def recall(of_positive: Ints, of_negative: Ints) -> Floats:
        if not allowed:
            return np.full(len(of_positive), np.nan)
        threshold = np.argmax(np.cumsum(of_negative[:, falling], axis=1) > allowed, axis=1)
        sums = _running_sums(of_positive[:, rising])
        missed = np.take_along_axis(sums, reached[threshold][:, None], axis=1)[:, 0]
        return np.asarray(1 - missed / len(positive))

    return recall


def share_statistic(successes: npt.NDArray[np.bool_]) -> Statistic:
    """The share of positives whose entry in `successes` (n,) is true."""
    return lambda of_positive, _: np.asarray((of_positive * successes).sum(axis=1) / len(successes))


def interval(
    counts: tuple[int, int],
    ours: Sequence[Statistic],
    others: Sequence[Statistic] = (),
    *,
    pairs: bool = False,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """The mean figure of the runs `ours`, less that of `others` if there are any, and its interval.

    `counts` are the numbers of positives and negatives; with `pairs` positive k and negative k are drawn together.
    """
    if not all(counts) or not ours:
        return Interval(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)

    def difference(of_positive: Ints, of_negative: Ints, draw_runs: bool) -> Floats:
        sides = (_mean_of_runs(runs, of_positive, of_negative, rng if draw_runs else None) for runs in (ours, others))
        return np.asarray(np.subtract(*sides))

    drawn = [difference(*draw, True) for draw in _draws(counts, pairs, resamples, rng)]
    low, high = np.quantile(np.concatenate(drawn), _BOUNDS)
    everything = [np.ones((1, count), np.int64) for count in counts]
    return Interval(float(difference(everything[0], everything[1], False)[0]), float(low), float(high))


def share_interval(successes: int, trials: int) -> tuple[float, float]:
    """Bounds of the 95 % interval of a share (Wilson 1927); NaN without a trial."""
    if not trials:
        return math.nan, math.nan
    bounds = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(bounds.low), float(bounds.high)


def _draws(
    counts: tuple[int, int], pairs: bool, resamples: int, rng: np.random.Generator
) -> Iterator[tuple[Ints, Ints]]:
    for start in range(0, resamples, _AT_ONCE):
        size = min(_AT_ONCE, resamples - start)
        positive, negative = (rng.multinomial(count, np.full(count, 1 / count), size) for count in counts)
        yield positive, positive if pairs else negative


def _mean_of_runs(
    runs: Sequence[Statistic], of_positive: Ints, of_negative: Ints, rng: np.random.Generator | None
) -> Floats:
    """The mean over runs, or with `rng` over as many runs drawn with replacement; 0 if there are none."""
    if not runs:
        return np.zeros(len(of_positive))
    values = np.stack([run(of_positive, of_negative) for run in runs], axis=1)
    if rng is None:
        return np.asarray(values.mean(axis=1))
    return np.asarray((values * rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), len(values))).mean(1))


def _running_sums(counts: Ints) -> Ints:
    return np.pad(np.cumsum(counts, axis=1), ((0, 0), (1, 0)))
