"""The metrics' promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metrics import average_precision, roc_auc, sigmoid, unique_rows


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
