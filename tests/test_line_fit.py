"""The promises of the fit of a line: where it is, how it drifts, how bright it is in each panel, and how wide.

Axes: P panel, T time bin, F frequency channel.
"""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_tools.axes import Axes, kaggle_axes
from shard_tools.cadence import OFF_POSITIONS, ON_POSITIONS
from training.observation.line_fit import Fit, FitValues, blank_line, fit_line, to_noise_units
from training.observation.line_kernels import sum_lines

STARTS = (0.0, 320.0, 655.0, 975.0, 1290.0, 1610.0)  # with pauses of different lengths
FINE = Axes(16, 1024, 18.253611, 22.3517, STARTS, 4.0)
SHAPES = {
    "fine": FINE,
    "end to end": Axes(16, 512, 18.253611, 22.3517, tuple(292.06 * n for n in range(6)), 4.0),
    "odd": Axes(23, 300, 12.0, 40.0, STARTS, 3.0),
    "competition": kaggle_axes(39, 256),
}
Values = npt.NDArray[np.float32]


def noise(axes: Axes, seed: int = 0) -> Values:
    return np.random.default_rng(seed).standard_normal((6, axes.time_bins, axes.channels)).astype(np.float32)


def add_line(
    values: Values,
    axes: Axes,
    middle: float,
    rate: float,
    level: float,
    panels: tuple[int, ...] = ON_POSITIONS,
    width: int = 1,
) -> None:
    """Add a line whose power is shared among the channels that it crosses within a time bin."""
    steps = (np.arange(32) + 0.5) / 32 - 0.5
    for panel in panels:
        for row in range(axes.time_bins):
            channel = np.floor(middle + rate * (axes.rows[panel, row] + steps) + 0.5).astype(np.int64)
            for offset in range(width):
                at = channel + offset - (width - 1) // 2
                at = at[(at >= 0) & (at < axes.channels)]
                np.add.at(values[panel, row], at, level / 32)


def fitted(values: Values, axes: Axes, middle: float, rate: float, positions: tuple[int, ...] = ON_POSITIONS) -> Fit:
    standard = to_noise_units(values)
    return fit_line(FitValues.of(standard, axes), middle, rate, positions)


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_line_is_fitted_where_it_is_whatever_its_offset_sign_shape_and_pauses(name: str, data: st.DataObject) -> None:
    axes = SHAPES[name]
    steepest = axes.steepest / axes.time_bins
    rate = data.draw(st.floats(-0.6, 0.6)) * steepest
    reach = abs(rate) * np.abs(axes.rows).max() + 2
    middle = data.draw(st.floats(0, 1)) * max(axes.channels - 1 - 2 * reach, 1) + reach
    # Off by the search's own steps: a few channels, and a few hundredths of the steepest rate.
    start = middle + data.draw(st.integers(-5, 5)), rate + data.draw(st.floats(-0.015, 0.015)) * steepest
    values = noise(axes, data.draw(st.integers(0, 2**31)))
    add_line(values, axes, middle, rate, level=4.0 * max(1.0, abs(rate)))
    fit = fitted(values, axes, *start)
    ends = axes.rows[[0, -1], [0, -1]]
    assert np.abs(fit.channels(ends) - (middle + rate * ends)).max() < 2
    if axes is FINE:
        assert abs(axes.hertz_per_second(fit.rate - rate)) < 0.05


@pytest.mark.parametrize("offset", np.arange(0, 1, 0.1).tolist())
def test_a_slow_line_that_two_panels_show_better_without_drift_is_fitted_to_all_three(offset: float) -> None:
    """3 Hz/s in channels of 2.9 kHz cross two channels in the whole cadence, and a third of a channel in a panel."""
    axes = Axes(273, 256, 1.0737, 2861.0, STARTS, 1337.0)  # the rates that weights of the competition's shape search
    middle, rate = 144.0 + offset, 3.0 * axes.bin_length_s / axes.channel_width_hz
    values = noise(axes)
    add_line(values, axes, middle, rate, level=3.6)
    fit, true = (fitted(values, axes, 144.0, start) for start in (0.0, rate))
    assert fit.snr(ON_POSITIONS) > 0.97 * true.snr(ON_POSITIONS) and fit.width <= true.width
    assert axes.hertz_per_second(fit.rate) == pytest.approx(3.0, abs=1.2)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.floats(-2, 2), st.floats(0.5, 30), st.floats(-100, 100))
def test_snr_is_in_standard_deviations_whatever_the_units_of_a_panel(
    seed: int, rate: float, gain: float, level: float
) -> None:
    values = noise(FINE, seed)
    add_line(values, FINE, 500, 0.0, level=3.0)
    snr = fitted(values, FINE, 500, 0.0).panel_snr
    assert np.abs(snr[[0, 2, 4]] - 3.0 * 4).max() < 5 and np.abs(snr[[1, 3, 5]]).max() < 5
    other = values.copy()
    other[2] = other[2] * np.float32(gain) + np.float32(level)
    np.testing.assert_allclose(fitted(other, FINE, 500, 0.0).panel_snr, snr, atol=0.05)


def test_along_a_given_line_noise_has_mean_0_and_standard_deviation_1_even_if_it_is_skewed() -> None:
    """Measured in the OFF panels, which do not affect the choice of the line."""
    axes, rng, found = FINE, np.random.default_rng(3), []
    for _ in range(60):
        values = rng.standard_gamma(4.0, (6, axes.time_bins, axes.channels)).astype(np.float32)
        add_line(values, axes, 500, 0.7, level=40.0)
        found.append(fitted(values, axes, 500, 0.7).panel_snr[[1, 3, 5]])
    assert abs(np.mean(found)) < 4 / np.sqrt(180) and 0.85 < np.std(found) < 1.15


def test_the_noise_is_that_of_the_panel_and_not_raised_by_a_bright_line() -> None:
    faint, values = noise(FINE), noise(FINE)
    for each, level in ((faint, 3.0), (values, 3.0)):
        add_line(each, FINE, 300, 0.5, level)
    add_line(values, FINE, 700, -0.5, level=3000.0)
    values /= values.std(axis=(1, 2), keepdims=True)  # as ingest does
    np.testing.assert_allclose(
        fitted(values, FINE, 300, 0.5).panel_snr, fitted(faint, FINE, 300, 0.5).panel_snr, atol=0.1
    )


def test_a_bright_line_beside_it_does_not_raise_the_noise() -> None:
    alone, values = noise(FINE), noise(FINE)
    for each in (alone, values):
        add_line(each, FINE, 300, 0.5, level=3.0)
    add_line(values, FINE, 340, 0.5, level=40.0)
    np.testing.assert_allclose(
        fitted(values, FINE, 300, 0.5).panel_snr, fitted(alone, FINE, 300, 0.5).panel_snr, atol=0.2
    )


def test_panels_are_looked_at_where_they_were_in_time() -> None:
    """If panels were taken to follow each other without pauses, the third ON panel would be tens of channels off."""
    starts = (0.0, 320.0, 650.0, 975.0, 1700.0, 2020.0)
    paused, end_to_end = (
        Axes(16, 1024, FINE.bin_length_s, FINE.channel_width_hz, each, 4.0)
        for each in (starts, tuple(292.06 * n for n in range(6)))
    )
    values = noise(paused)
    add_line(values, paused, 500, 2.5, level=10.0)
    right, wrong = (fitted(values, axes, 500, 2.5).panel_snr[[0, 2, 4]] for axes in (paused, end_to_end))
    assert right.min() > 8 and wrong.min() < 4


@pytest.mark.parametrize("width", [1, 4, 12])
def test_the_width_is_that_of_the_line(width: int) -> None:
    values = noise(FINE)
    add_line(values, FINE, 500, 0.1, level=5.0, width=width)
    fit = fitted(values, FINE, 500, 0.1)
    assert width <= fit.width <= 1.5 * width + 1
    assert abs(fit.middle - 500) < 2


def test_a_panel_in_which_half_of_the_line_is_outside_or_blank_has_no_snr() -> None:
    rate = 1.0
    values = noise(FINE)
    middle = FINE.channels - 1 - rate * FINE.rows[4, 3]  # the line leaves the snippet early in the fifth panel
    add_line(values, FINE, middle, rate, level=4.0)
    values[1] = 0
    fit = fitted(values, FINE, middle, rate)
    assert np.isfinite(fit.panel_snr).tolist() == [True, False, True, True, False, False]
    assert 0.4 < fit.inside < 0.6
    assert fit.snr(ON_POSITIONS) == pytest.approx(fit.panel_snr[[0, 2]].sum() / np.sqrt(2))
    assert np.isnan(fit.snr((1, 5)))


def test_the_control_is_fitted_to_the_off_panels() -> None:
    values = noise(FINE)
    add_line(values, FINE, 400, -1.2, level=5.0, panels=OFF_POSITIONS)
    fit = fitted(values, FINE, 403, -1.25, OFF_POSITIONS)
    assert abs(fit.middle - 400) < 1 and abs(fit.rate + 1.2) < 0.03
    assert fit.snr(OFF_POSITIONS) > 15 > 5 > abs(fit.snr(ON_POSITIONS))


@pytest.mark.parametrize("level", [5.0, 500.0])
def test_a_blanked_line_is_gone_and_the_rest_stays(level: float) -> None:
    values = noise(FINE)
    add_line(values, FINE, 500, 1.3, level)
    standard = to_noise_units(values)
    fit = fit_line(FitValues.of(standard, FINE), 500, 1.3, ON_POSITIONS)
    blank_line(standard, FINE, fit)
    left = fit_line(FitValues.of(standard, FINE), 500, 1.3, ON_POSITIONS)
    assert not left.snr(ON_POSITIONS) > 6
    assert 0.003 < (standard == 0).mean() < 0.03


def test_the_kernels_sums_are_those_of_whole_channels_added_one_by_one() -> None:
    axes, values = SHAPES["odd"], noise(SHAPES["odd"]).astype(np.float64)
    chosen = np.array([5, 0, 2])
    cumulated = np.concatenate([np.zeros((6, axes.time_bins, 1)), values.cumsum(axis=2)], axis=2)
    rates, middles, width = np.array([0.0, 2.0]), np.array([40.0, 150.0, 299.0]), 3.0
    rows = np.broadcast_to(np.arange(axes.time_bins, dtype=np.float64), (3, axes.time_bins)).copy()
    sums = np.empty((3, 2, 3))
    sum_lines(cumulated, chosen, rows, rates, middles, width, sums)
    for number, panel in enumerate(chosen):
        for r, rate in enumerate(rates):
            for m, middle in enumerate(middles):
                at = [int(middle + rate * row) + each for row in range(axes.time_bins) for each in (-1, 0, 1)]
                rows_of = np.repeat(np.arange(axes.time_bins), 3)
                inside = [0 <= each < axes.channels for each in at]
                expected = sum(values[panel, row, c] for row, c, ok in zip(rows_of, at, inside, strict=True) if ok)
                assert sums[number, r, m] == pytest.approx(expected / np.sqrt(3 * axes.time_bins), abs=1e-6)
