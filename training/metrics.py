"""ROC AUC and other metrics, each sample counted once; and averages of several models' scores.

Modules that are slow to import are imported where they are used: scores of cadences without labels do not need them.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import expit

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]
Average = Literal["logits", "ranks"]


def unique_rows(rows: Ints, *columns: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.generic], ...]:
    """`rows` sorted and without repeats, and `columns` likewise: padding and uneven ranks repeat samples."""
    unique, first = np.unique(rows, return_index=True)
    return unique, *(column[first] for column in columns)


def roc_auc(target: Ints, score: Floats) -> float:
    """Area under the ROC curve, unrounded; NaN if there is only one class."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(target, score)) if len(np.unique(target)) == 2 else float("nan")


def average_precision(target: Ints, score: Floats) -> float:
    """Area under the precision-recall curve as scikit-learn sums it; NaN if there is no positive."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(target, score)) if (target == 1).any() else float("nan")


def sigmoid(logit: Floats) -> npt.NDArray[np.float64]:
    """Scores in 0 to 1, in float64: logits of -745 to -37 stay distinct, but those above 37 all give 1."""
    return np.asarray(expit(logit.astype(np.float64)))


def mean_score(logits: Sequence[npt.NDArray[np.float64]], average: Average) -> npt.NDArray[np.float64]:
    """Scores (n,) in 0 to 1 of several models' logits, each (n,).

    logits: the sigmoid of their mean, kept distinct by `apart`. ranks: the mean of rank / n, equal logits sharing the
    mean of their ranks.
    """
    if average == "ranks":
        from scipy.stats import rankdata

        return np.asarray(sum(rankdata(each) / len(each) for each in logits) / len(logits))
    return apart(mean_logit(logits))


def mean_logit(logits: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """The mean (n,) of several models' logits, each (n,)."""
    return np.asarray(sum(logits) / len(logits))


# The least gap between scores whose logits differ. _STEP is a share of the higher score: eight times what float64 can
# resolve, since some readers of CSV get the last digits wrong. _LEAST is the gap near 0.
_STEP, _LEAST = 2.0**-50, 1e-300


def apart(logit: Floats) -> npt.NDArray[np.float64]:
    """The sigmoid (n,) in 0 to 1, with a different score for each different logit, in their order.

    From 37 on the sigmoid is 1, which would lose the order of the best candidates in a ROC AUC. Scores that are too
    close are moved down, in 40,000 scores by 4e-11 at most.
    """
    values, place = np.unique(logit, return_inverse=True)
    score = (sigmoid(values) + _LEAST * np.arange(len(values))).clip(max=1).tolist()
    for number in range(len(score) - 2, -1, -1):
        score[number] = min(score[number], score[number + 1] * (1 - _STEP))
    return np.array(score, np.float64)[place]


def calibration(target: Ints, score: Floats, bins: int = 10) -> tuple[Floats, Floats, Ints]:
    """Mean score, share of positives and count in each of the equally wide bins of scores that holds any."""
    number = np.minimum((score * bins).astype(np.int64), bins - 1)
    count = np.bincount(number, minlength=bins)
    filled = count > 0
    means = [np.bincount(number, values, minlength=bins)[filled] / count[filled] for values in (score, target)]
    return means[0], means[1], count[filled]


def recall_at_fpr(target: Ints, score: Floats, rate: float) -> float:
    """Share of positives above the lowest threshold that at most a share `rate` of the negatives exceeds.

    NaN if there is no positive, or so few negatives that `rate` is less than one of them.
    """
    positive, negative = score[target == 1], np.sort(score[target == 0])[::-1]
    allowed = allowed_false_positives(rate, len(negative))
    return float((positive > negative[allowed]).mean()) if len(positive) and allowed else math.nan


def allowed_false_positives(rate: float, negatives: int) -> int:
    """How many of `negatives` negatives may be false positives at `rate`; 0 if none."""
    most = math.floor(rate * negatives + 1e-9)  # 0.29 * 100 is 28.999999999999996, not 29
    return max(0, min(most, negatives - 1))


def snr_at_half_recall(snr: Floats, found: npt.NDArray[np.bool_]) -> float:
    """The SNR at which recall reaches one half, assuming only that it never falls as the SNR rises.

    That is where isotonic regression of `found` on the SNR crosses one half: the threshold that splits found from
    missed needles with the fewest errors (Barlow et al. 1972). Of several such thresholds it is the lowest, placed at
    the geometric mean of the two needles' SNRs around it. Infinite if recall never reaches one half, the lowest SNR if
    it does from the start, NaN without needles.
    """
    if not len(snr):
        return math.nan
    values, place = np.unique(snr, return_inverse=True)
    # Errors of each threshold, up to a constant: found needles below it, less missed ones below it.
    excess = np.bincount(place, np.where(found, 1.0, -1.0), len(values))
    errors = np.concatenate(([0.0], np.cumsum(excess)))
    first = int(np.argmin(errors))
    if first == len(values):
        return math.inf
    return float(values[0] if first == 0 else math.sqrt(values[first - 1] * values[first]))
