"""Signals added to snippets of an observation drift in Hz/s, and go on through the pauses of their cadence.

Axes: n samples, S signals, P panels, t time bins, F frequency channels. Plane n is panel `CANVAS.positions[n]`.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.augment import DrawConfig, Draws, draw
from pipeline.canvas import CanvasConfig
from pipeline.observed_times import ObservedCadences, to_times
from pipeline.plan import Order, Share
from pipeline.planner import Planner
from pipeline.randomness import EpochPart
from shard_tools.axes import Axes
from tests.test_symmetries import QUIET

T, F, SAMPLES = 16, 1024, 400
CANVAS = CanvasConfig("panels", T, F, normalise=False)
ORDER = np.argsort(CANVAS.positions)
EVEN = Axes(T, F, 18.25, 22.35, (0.0, 320.0, 640.0, 960.0, 1280.0, 1600.0), 4.0)
UNEVEN = replace(EVEN, panel_starts_s=(0.0, 317.0, 650.0, 1200.0, 1530.0, 1850.0), max_drift_hz_s=2.0)
NEEDLES = replace(QUIET, needles=0.5, signal_snr_min=10.0, signal_snr_max=400.0)


def drawn(axes: Axes, seed: int = 0, config: DrawConfig = NEEDLES) -> Draws:
    part = EpochPart(seed, 0, np.arange(SAMPLES), SAMPLES)
    observed = to_times([axes]).at(np.zeros(SAMPLES, np.int64))
    return draw(config, CANVAS, (6, T, F), part, observed)


def straight(draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Paths (m, P, t) in the order of the cadence, and levels, of the needles that do not bend."""
    path, level = draws.signal_path[:, 0][:, ORDER].astype(np.float64), draws.signal_level[:, 0][:, ORDER]
    steps = np.diff(path, axis=2).reshape(len(path), -1)
    is_straight = (steps.max(1) - steps.min(1) < 1e-3) & draws.has_needle
    return path[is_straight], level[is_straight]


@given(seed=st.integers(0, 2**31), axes=st.sampled_from([EVEN, UNEVEN]))
def test_a_straight_signal_keeps_its_drift_rate_through_the_pauses(seed: int, axes: Axes) -> None:
    path, _ = straight(drawn(axes, seed))
    assert len(path) > SAMPLES / 5
    within = (path[:, :, -1] - path[:, :, 0]) / ((T - 1) * axes.bin_length_s)  # channels per second
    between = np.diff(path[:, :, 0], axis=1) / np.diff(axes.panel_starts_s)
    np.testing.assert_allclose(within, within[:, :1].repeat(6, 1), atol=1e-5)
    np.testing.assert_allclose(between, within[:, :1].repeat(5, 1), atol=1e-5)


@given(seed=st.integers(0, 2**31), axes=st.sampled_from([EVEN, UNEVEN]))
def test_drift_rates_have_either_sign_and_reach_the_steepest_that_was_cut_for(seed: int, axes: Axes) -> None:
    path, _ = straight(drawn(axes, seed))
    rate = (path[:, 0, -1] - path[:, 0, 0]) / ((T - 1) * axes.bin_length_s) * axes.channel_width_hz
    assert abs(rate).max() <= axes.max_drift_hz_s + 1e-3
    assert rate.min() < -0.8 * axes.max_drift_hz_s and rate.max() > 0.8 * axes.max_drift_hz_s
    assert np.median(abs(rate)) == pytest.approx(axes.max_drift_hz_s / 2, rel=0.35)


@given(seed=st.integers(0, 2**31), axes=st.sampled_from([EVEN, UNEVEN, replace(EVEN, max_drift_hz_s=40.0)]))
def test_a_signal_stays_among_the_channels_while_it_is_on(seed: int, axes: Axes) -> None:
    draws = drawn(axes, seed)
    on = draws.signal_level > 0
    assert on.any() and draws.signal_path[on].min() > 0 and draws.signal_path[on].max() < F - 1


def test_a_steep_signal_is_as_bright_over_its_width_as_a_steady_one() -> None:
    """Its power is shared among the channels that it crosses in a time bin."""
    config = replace(NEEDLES, signal_snr_min=100.0, signal_snr_max=100.0)
    steady, steep = (drawn(replace(EVEN, max_drift_hz_s=drift), config=config) for drift in (1e-6, 4.0))
    alike = steady.signal_level[:, 0].max((1, 2)) > 0
    for draws in (steady, steep):
        power = draws.signal_level[alike, 0].max((1, 2)) * draws.signal_width[alike, 0]
        np.testing.assert_allclose(power, 100 / np.sqrt(6 * T) * steady.signal_width[alike, 0], rtol=1e-5)
    assert (steep.signal_width[alike, 0] / steady.signal_width[alike, 0]).max() > 1.5


def test_each_row_is_drawn_with_the_times_of_its_own_cadence() -> None:
    rows = np.arange(SAMPLES)
    observed = ObservedCadences(to_times([EVEN, UNEVEN]), rows % 2)
    order = Order(rows, np.zeros(SAMPLES, np.int8), "sequential")
    planner = Planner(order, Share(SAMPLES, SAMPLES), NEEDLES, CANVAS, (6, T, F), observed)
    planned = planner.plan(0, 0)
    assert planned.draws is not None
    for number, axes in enumerate((EVEN, UNEVEN)):
        expected = drawn(axes)
        np.testing.assert_array_equal(
            planned.draws.signal_path[rows % 2 == number], expected.signal_path[rows % 2 == number]
        )
