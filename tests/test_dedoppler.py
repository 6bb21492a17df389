"""The promises of the classical search."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import maximum_filter

from shard_tools.cadence import CHANNEL_WIDTH_HZ, OFF_POSITIONS, ON_POSITIONS, PANELS, TIME_BIN_SECONDS
from shard_tools.errors import InputError
from training.search.dedoppler import find_drift
from training.search.dedoppler_kernels import largest_nearby

BINS, CHANNELS = 91, 128


def noise(seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((PANELS, BINS, CHANNELS)).astype(np.float32)


def with_line(
    seed: int, middle: float, rate: float, panels: tuple[int, ...], level: float = 2.0
) -> npt.NDArray[np.float32]:
    """Noise with a line through `middle` at the middle of the cadence, `rate` channels a time bin, in `panels`."""
    snippet = noise(seed)
    bins = np.arange(PANELS * BINS).reshape(PANELS, BINS)
    path = middle + rate * (bins - (PANELS * BINS - 1) / 2)
    for panel in panels:
        offset = np.arange(CHANNELS) - path[panel][:, None]
        snippet[panel] += level * np.exp(-0.5 * offset**2).astype(np.float32)
    return snippet


@given(st.integers(0, 99), st.floats(24, 104), st.floats(-0.5, 0.5), st.sampled_from([(0, 2, 4), (0, 2), (2, 4), (2,)]))
@settings(max_examples=30, deadline=None)
def test_a_straight_needle_is_found_where_it_is(seed: int, middle: float, rate: float, panels: tuple[int, ...]) -> None:
    lit = max(abs(panel - 2.5) + 0.5 for panel in panels) * BINS
    rate = float(np.clip(rate, -20 / lit, 20 / lit))  # so that the line stays among the channels while it lasts
    found = find_drift(with_line(seed, middle, rate, panels))
    assert found.score > 10
    # Judged at the middle of its panels: far from a line's only panel, its place is known less well.
    center = np.mean([(panel + 0.5) * BINS for panel in panels])
    channels_a_bin = found.drift_rate * TIME_BIN_SECONDS / CHANNEL_WIDTH_HZ
    assert abs(channels_a_bin - rate) < 3 / BINS
    there = middle + rate * (center - PANELS * BINS / 2)
    assert abs(found.start_channel + channels_a_bin * center - there) < 3
    assert found.end_channel - found.start_channel == pytest.approx(channels_a_bin * (PANELS * BINS - 1), abs=1e-6)


@pytest.mark.parametrize("panels", [tuple(range(PANELS)), OFF_POSITIONS, (0, 1, 2, 3, 4), (1,)])
@pytest.mark.parametrize("rate", [0.0, 0.11])
def test_a_signal_that_off_panels_have_too_is_worth_no_more_than_noise(panels: tuple[int, ...], rate: float) -> None:
    level = np.quantile([find_drift(noise(seed)).score for seed in range(40)], 0.99)
    scores = [find_drift(with_line(seed, 64, rate, panels)).score for seed in range(8)]
    assert np.median(scores) < level


def test_the_drift_rate_is_above_zero_where_the_channel_rises() -> None:
    rising, falling = (find_drift(with_line(1, 64, rate, ON_POSITIONS)) for rate in (0.08, -0.08))
    assert rising.drift_rate > 0 > falling.drift_rate
    assert rising.end_channel > rising.start_channel
    assert falling.end_channel < falling.start_channel


def test_a_burst_over_all_channels_and_a_persistent_line_change_little() -> None:
    plain, disturbed = noise(5), noise(5)
    disturbed[2, 30:50] += 8
    disturbed[:, :, 70] += 20
    assert abs(find_drift(disturbed).score - find_drift(plain).score) < 2


@pytest.mark.parametrize("value", [0.0, -3.5, 6e4])
def test_a_snippet_that_does_not_vary_has_a_finite_score(value: float) -> None:
    found = find_drift(np.full((PANELS, 14, 16), value, np.float16))
    assert np.isfinite(found).all()


def test_a_snippet_of_another_number_of_panels_is_refused() -> None:
    with pytest.raises(InputError, match="expected \\(6, time bins, frequency channels\\)"):
        find_drift(np.zeros((5, 14, 16), np.float16))


@given(st.integers(0, 99), st.integers(0, 6), st.integers(0, 24))
@settings(max_examples=25, deadline=None)
def test_the_largest_value_near_each_line_is_that_of_a_maximum_filter(seed: int, rows: int, columns: int) -> None:
    values = np.random.default_rng(seed).standard_normal((11, 30)).astype(np.float32)
    found = np.empty_like(values)
    largest_nearby(values, rows, columns, found)
    expected = maximum_filter(values, (2 * rows + 1, 2 * columns + 1), mode="constant", cval=-np.inf)
    assert np.array_equal(found, expected)
