"""The metrics' promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from training.metrics import (
    allowed_false_positives,
    average_precision,
    mean_score,
    recall_at_fpr,
    roc_auc,
    sigmoid,
    snr_at_half_recall,
    unique_rows,
)


@given(st.lists(st.tuples(st.booleans(), st.integers(-20, 20)), min_size=2, max_size=60))
def test_roc_auc_is_the_share_of_pairs_in_the_right_order(pairs: list[tuple[bool, int]]) -> None:
    target, score = np.array([t for t, _ in pairs], int), np.array([s for _, s in pairs], float)
    positive, negative = score[target == 1], score[target == 0]
    if not len(positive) or not len(negative):
        assert np.isnan(roc_auc(target, score))
        return
    difference = positive[:, None] - negative[None, :]
    assert roc_auc(target, score) == pytest.approx(((difference > 0) + 0.5 * (difference == 0)).mean(), abs=1e-12)


def test_average_precision_of_no_positive_is_not_a_number() -> None:
    assert np.isnan(average_precision(np.zeros(3, int), np.arange(3.0)))
    assert average_precision(np.array([0, 1]), np.array([0.1, 0.9])) == 1


@given(st.lists(st.integers(0, 30), min_size=1))
def test_repeats_count_once(rows: list[int]) -> None:
    values = np.array(rows) * 10.0
    unique, found = unique_rows(np.array(rows), values)
    assert unique.tolist() == sorted(set(rows)) and (found == unique * 10).all()


def test_scores_of_large_logits_stay_apart_and_inside() -> None:
    score = sigmoid(np.array([-800.0, -30, 0, 20, 25, 800]))
    assert (np.diff(score) >= 0).all() and score[0] == 0 and score[2] == 0.5 and score[3] < score[4] < 1 == score[5]


@given(st.integers(1, 4), st.lists(st.integers(-5, 5), min_size=1, max_size=40), st.data())
def test_the_mean_of_ranks_is_the_mean_share_of_those_below(models: int, first: list[int], data: st.DataObject) -> None:
    """A rank counts all that are lower, half of the others that are equal, and itself."""
    numbers = st.lists(st.integers(-5, 5), min_size=len(first), max_size=len(first))
    each = [np.array(first, float), *(np.array(data.draw(numbers), float) for _ in range(models - 1))]
    expected = []
    for place in range(len(first)):
        ranks = [sum(v < x[place] for v in x) + (sum(v == x[place] for v in x) + 1) / 2 for x in each]
        expected.append(sum(ranks) / len(first) / models)
    found = mean_score(each, "ranks")
    assert found == pytest.approx(expected, abs=1e-12) and (found > 0).all() and (found <= 1 + 1e-12).all()


def test_ranks_do_not_depend_on_the_scale_and_logits_do() -> None:
    one, other = np.array([0.0, 1, 2, 3]), np.array([0.0, 3, 2, 1])
    assert (mean_score([one, other], "ranks") == mean_score([one, 1000 * other], "ranks")).all()
    assert (mean_score([one, other], "logits") != mean_score([one, 1000 * other], "logits")).any()
    assert (mean_score([one, other], "logits") == sigmoid((one + other) / 2)).all()


def test_a_logit_that_is_not_a_number_leaves_no_rank() -> None:
    assert np.isnan(mean_score([np.array([0.0, np.nan, 1.0]), np.arange(3.0)], "ranks")).all()


SCORES = st.lists(st.integers(-9, 9), min_size=1, max_size=25)


@given(SCORES, SCORES, st.sampled_from([0.1, 0.3, 1.0]))
def test_recall_at_a_false_positive_rate_is_the_best_of_all_thresholds(
    positive: list[int], negative: list[int], rate: float
) -> None:
    target, score = np.repeat([1, 0], [len(positive), len(negative)]), np.array([*positive, *negative], float)
    found = recall_at_fpr(target, score, rate)
    if int(rate * len(negative) + 1e-9) < 1 or len(negative) == 1:
        assert np.isnan(found)
    elif rate < 1:
        allowed = [t for t in range(-11, 11) if sum(n > t for n in negative) <= int(rate * len(negative) + 1e-9)]
        assert found == max(sum(p > t for p in positive) / len(positive) for t in allowed)


@given(st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=40))
def test_recall_reaches_one_half_where_isotonic_regression_does(needles: list[tuple[int, bool]]) -> None:
    snr, found = np.array([s for s, _ in needles], float), np.array([f for _, f in needles])
    values = np.unique(snr)
    fitted = IsotonicRegression().fit(snr, found).predict(values)
    reached = np.flatnonzero(fitted >= 0.5 - 1e-9)
    if not len(reached):
        expected = np.inf
    elif reached[0] == 0:
        expected = values[0]
    else:
        expected = np.sqrt(values[reached[0] - 1] * values[reached[0]])
    assert snr_at_half_recall(snr, found) == pytest.approx(expected)


def test_of_no_samples_there_is_no_number() -> None:
    none = np.zeros(0)
    assert np.isnan([snr_at_half_recall(none, none.astype(bool)), recall_at_fpr(none.astype(int), none, 0.1)]).all()


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_without_negatives_none_may_be_a_false_positive_and_recall_is_not_a_number(rate: float) -> None:
    assert allowed_false_positives(rate, 0) == 0
    assert np.isnan(recall_at_fpr(np.ones(3, int), np.arange(3.0), rate))
