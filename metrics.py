"""ROC AUC and its companions, each sample counted once; and how several models' scores become one."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]
Average = Literal["logits", "ranks"]


def unique_rows(rows: Ints, *columns: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.generic], ...]:
    """`rows` sorted and without repeats, and `columns` likewise: padding and uneven ranks repeat samples."""
    unique, first = np.unique(rows, return_index=True)
    return unique, *(column[first] for column in columns)


def roc_auc(target: Ints, score: Floats) -> float:
    """Area under the ROC curve, unrounded; NaN where there is only one class to tell apart."""
    return float(roc_auc_score(target, score)) if len(np.unique(target)) == 2 else float("nan")


def average_precision(target: Ints, score: Floats) -> float:
    """Area under the precision-recall curve as scikit-learn sums it; NaN where there is no positive."""
    return float(average_precision_score(target, score)) if (target == 1).any() else float("nan")


def sigmoid(logit: Floats) -> npt.NDArray[np.float64]:
    """Scores in 0 to 1, in float64, so that large logits stay apart."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logit.astype(np.float64))))


def mean_score(logits: Sequence[npt.NDArray[np.float64]], average: Average) -> npt.NDArray[np.float64]:
    """Scores (n,) in 0 to 1 of several models' logits, each (n,).

    logits: the sigmoid of their mean. ranks: the mean of rank / n, equal logits sharing the mean of their ranks.
    """
    if average == "ranks":
        return np.asarray(sum(rankdata(each) / len(each) for each in logits) / len(logits))
    return sigmoid(np.asarray(sum(logits) / len(logits)))


def recall_at(target: Ints, score: Floats, false_positive_rate: float) -> float:
    """The largest recall that a threshold reaches at no more than this false positive rate; NaN with one class."""
    if len(np.unique(target)) < 2:
        return float("nan")
    rates, recalls, _ = roc_curve(target, score, drop_intermediate=False)
    return float(recalls[rates <= false_positive_rate].max())


def calibration(target: Ints, score: Floats, bins: int = 10) -> tuple[Floats, Floats, Ints]:
    """Mean score, share of positives and count in each of the equally wide bins of scores that holds any."""
    number = np.minimum((score * bins).astype(np.int64), bins - 1)
    count = np.bincount(number, minlength=bins)
    filled = count > 0
    means = [np.bincount(number, values, minlength=bins)[filled] / count[filled] for values in (score, target)]
    return means[0], means[1], count[filled]
