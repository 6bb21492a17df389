"""Bootstrap intervals cover the truth, for one detector and for the difference of two."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.intervals import (
    Statistic,
    auc_statistic,
    interval,
    recall_statistic,
    share_interval,
    share_statistic,
)
from training.metrics import recall_at_fpr, roc_auc

Scores = npt.NDArray[np.float64]
INTEGERS = st.lists(st.integers(-9, 9), min_size=1, max_size=25)
BOUNDS = [0.025, 0.975]


def drawn_again(positive: Scores, negative: Scores, figure: Callable[[Scores, Scores], float], seed: int) -> Scores:
    """The `figure` of fifty bootstrap samples, computed one by one from the same random numbers in the same order."""
    rng = np.random.default_rng(seed)
    counts = [
        rng.multinomial(len(scores), np.full(len(scores), 1 / len(scores)), 50) for scores in (positive, negative)
    ]
    return np.array([figure(np.repeat(positive, a), np.repeat(negative, b)) for a, b in zip(*counts, strict=True)])


def labelled(positive: Scores, negative: Scores) -> tuple[npt.NDArray[np.int64], Scores]:
    return np.repeat([1, 0], [len(positive), len(negative)]), np.concatenate((positive, negative))


def auc_of(positive: Scores, negative: Scores) -> float:
    return roc_auc(*labelled(positive, negative))


def recall_of(positive: Scores, negative: Scores) -> float:
    return recall_at_fpr(*labelled(positive, negative), 0.3)


@settings(deadline=None, max_examples=30)
@given(INTEGERS, INTEGERS, st.integers(0, 99), st.sampled_from(["auc", "recall"]))
def test_an_interval_is_that_of_samples_drawn_again(
    positive: list[int], negative: list[int], seed: int, figure: str
) -> None:
    scores = np.array(positive, float), np.array(negative, float)
    of, statistic = (auc_of, auc_statistic(*scores)) if figure == "auc" else (recall_of, recall_statistic(*scores, 0.3))
    found = interval((len(positive), len(negative)), [statistic], seed=seed, resamples=50)
    expected = of(*scores), *np.quantile(drawn_again(*scores, of, seed), BOUNDS)
    np.testing.assert_allclose((found.value, found.low, found.high), expected, atol=1e-12)


def test_a_difference_is_taken_within_each_draw() -> None:
    rng = np.random.default_rng(1)
    positive, negative = rng.standard_normal((2, 40)) + 1, rng.standard_normal((2, 50))

    def difference(drawn: Scores, others: Scores) -> float:
        return auc_of(drawn.real, others.real) - auc_of(drawn.imag, others.imag)

    pairs = [scores[0] + 1j * scores[1] for scores in (positive, negative)]
    values = drawn_again(pairs[0], pairs[1], difference, 3)
    ours, theirs = (auc_statistic(positive[k], negative[k]) for k in (0, 1))
    found = interval((40, 50), [ours], [theirs], seed=3, resamples=50)
    np.testing.assert_allclose((found.low, found.high), np.quantile(values, BOUNDS), atol=1e-12)
    assert found.value == pytest.approx(difference(*pairs))


def delong_deviation(positive: Sequence[Scores], negative: Sequence[Scores]) -> float:
    """Standard deviation of the difference of two AUCs on the same samples (DeLong et al. 1988, Biometrics 44:837)."""
    wins = [(p[:, None] > n) + 0.5 * (p[:, None] == n) for p, n in zip(positive, negative, strict=True)]
    of_positive, of_negative = (wins[0].mean(axis) - wins[1].mean(axis) for axis in (1, 0))
    return float(np.sqrt(of_positive.var(ddof=1) / len(of_positive) + of_negative.var(ddof=1) / len(of_negative)))


def test_a_difference_of_aucs_is_as_sure_as_delong_says() -> None:
    rng = np.random.default_rng(0)
    shared = rng.standard_normal(700)
    scores = [shared + 0.5 * rng.standard_normal(700) + np.repeat([1.0, 0], [300, 400]) * more for more in (1.2, 1.0)]
    positive, negative = [each[:300] for each in scores], [each[300:] for each in scores]
    ours, theirs = (auc_statistic(p, n) for p, n in zip(positive, negative, strict=True))
    found = interval((300, 400), [ours], [theirs], resamples=2000)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(delong_deviation(positive, negative), rel=0.1)
    alone = [interval((300, 400), [each]) for each in (ours, theirs)]
    assert found.high - found.low < 0.7 * min(each.high - each.low for each in alone)


def coverage(of: Callable[[np.random.Generator], tuple[Statistic, Statistic | None]], truth: float, pairs: bool) -> int:
    """How many of a hundred 95 % intervals contain the truth."""
    covered = 0
    for seed in range(100):
        ours, theirs = of(np.random.default_rng(seed))
        others = [theirs] if theirs else []
        found = interval((60, 60), [ours], others, pairs=pairs, seed=seed, resamples=200)
        covered += found.low <= truth <= found.high
    return covered


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    # The AUC of two Gaussians of standard deviation s, d apart, is Phi(d / (s sqrt(2))).
    def one(rng: np.random.Generator) -> tuple[Statistic, None]:
        return auc_statistic(rng.standard_normal(60) + 1, rng.standard_normal(60)), None

    def difference(rng: np.random.Generator) -> tuple[Statistic, Statistic]:
        sky = rng.standard_normal((2, 60))
        noise = rng.standard_normal((2, 2, 60)) * 0.5
        scale = np.sqrt(1.25)
        ours, theirs = (sky + noise[k] + np.array([[d * scale], [0]]) for k, d in enumerate((1.0, 0.5)))
        return auc_statistic(*ours), auc_statistic(*theirs)

    def twins(rng: np.random.Generator) -> tuple[Statistic, None]:
        sky = rng.standard_normal(60)  # common to a needle and its twin
        noise = rng.standard_normal((2, 60)) * 0.5
        return auc_statistic(sky + noise[0] + np.sqrt(1.25), sky + noise[1]), None

    assert 88 <= coverage(one, 0.7602, pairs=False) <= 100
    assert 88 <= coverage(difference, 0.7602 - 0.6382, pairs=False) <= 100
    assert 88 <= coverage(twins, 0.7602, pairs=True) <= 100


def test_needles_and_twins_that_share_a_sky_are_drawn_as_pairs() -> None:
    rng = np.random.default_rng(2)
    sky = rng.standard_normal(200)
    needle, twin = sky + 0.3, sky + 0.1 * rng.standard_normal(200)
    statistic = [auc_statistic(needle, twin)]
    together, apart = (interval((200, 200), statistic, pairs=pairs) for pairs in (True, False))
    assert together.value == apart.value
    assert together.high - together.low < 0.5 * (apart.high - apart.low)


def test_runs_that_differ_widen_the_interval_and_runs_that_do_not_leave_it() -> None:
    rng = np.random.default_rng(4)
    positive, negative = rng.standard_normal(300) + 1, rng.standard_normal(300)
    run, better = (auc_statistic(positive + more, negative) for more in (0, 1.5))
    alone, same, mixed = (interval((300, 300), runs) for runs in ([run], [run] * 3, [run, run, better]))
    assert same.value == pytest.approx(alone.value)
    assert same.high - same.low == pytest.approx(alone.high - alone.low, rel=0.15)
    assert mixed.high - mixed.low > 2 * (alone.high - alone.low)


def test_of_too_few_there_is_no_number() -> None:
    nothing = interval((0, 3), [auc_statistic(np.zeros(0), np.zeros(3))])
    assert np.isnan([nothing.value, nothing.low, nothing.high, *share_interval(0, 0)]).all()
    few = interval((3, 50), [recall_statistic(np.ones(3), np.zeros(50), 1e-2)])  # at this rate no negative may be above
    assert np.isnan([few.value, few.low, few.high]).all()


def test_a_share_is_told_with_its_interval() -> None:
    low, high = share_interval(30, 60)
    assert 0.37 < low < 0.4 and low == pytest.approx(1 - high)
    assert interval((60, 60), [share_statistic(np.arange(60) < 30)], pairs=True).value == 0.5
