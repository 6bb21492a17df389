"""Signals added to backgrounds: where they lie, how bright they are, and that everything else stays as it was.

Axes: n samples, S signals, P panels, N planes, t time bins, F frequency channels. On the canvas of these tests plane n
is panel `canvas.positions[n]`, and no pixel is resized.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.augment import DrawConfig, Draws, draw
from pipeline.canvas import CanvasConfig
from pipeline.randomness import EpochPart
from pipeline.simulated_signals import draw_interference_panels, draw_needle_panels
from shard_tools.cadence import KAGGLE_SHAPE
from tests.test_dali_graph import SAMPLES, Snippets, draws_for, train_images
from tests.test_symmetries import QUIET
from tests.tiny import SHAPE

NEEDLES = replace(QUIET, needles=0.5)
SHAPES = [KAGGLE_SHAPE, SHAPE]
IS_ON = np.arange(6) % 2 == 0
Panels = npt.NDArray[np.float32]
"""(n, P, t, F)"""

on_each_engine = pytest.mark.parametrize("maker", ["cpu", "dali"])


def plain_canvas(shape: tuple[int, int, int]) -> CanvasConfig:
    return CanvasConfig("panels", shape[1], shape[2], normalise=False)


def white_noise(shape: tuple[int, int, int], seed: int = 0) -> Snippets:
    return np.random.default_rng(seed).normal(size=(SAMPLES, *shape)).astype(np.float16)


def rendered(snippets: Snippets, draws: Draws, maker: str = "cpu") -> Panels:
    """The panels of each sample with its signals, in the order of the cadence."""
    shape = (snippets.shape[1], snippets.shape[2], snippets.shape[3])
    canvas = plain_canvas(shape)
    return train_images(snippets, canvas, draws, maker)[:, np.argsort(canvas.positions)]


def one_signal(draws: Draws, signal: int) -> Draws:
    """The draws with only this signal."""
    level = np.zeros_like(draws.signal_level)
    level[:, signal] = draws.signal_level[:, signal]
    return replace(draws, signal_level=level)


def added(snippets: Snippets, panels: Panels) -> Panels:
    """What was added before each panel was normalised again; its quieter half is linear in the old values."""
    found = np.empty_like(panels)
    for place in np.ndindex(panels.shape[:2]):
        old, new = snippets[place].astype(np.float64), panels[place].astype(np.float64)
        slope, start = np.polyfit(old.ravel(), new.ravel(), 1)
        for _ in range(20):
            residual = np.abs(new - slope * old - start)
            quiet = residual <= np.median(residual)
            slope, start = np.polyfit(old[quiet], new[quiet], 1)
        found[place] = (new - start) / slope - old
    return found


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000), shape=st.sampled_from(SHAPES))
def test_a_needle_shows_in_on_panels_alone_and_interference_never_does(
    seed: int, epoch: int, shape: tuple[int, int, int]
) -> None:
    canvas = plain_canvas(shape)
    drawn = draw(NEEDLES, canvas, canvas.plane_shape(shape), EpochPart(seed, epoch, np.arange(SAMPLES), 10**6))
    snippets = white_noise(shape, seed % 2**32)
    for signal in range(2):
        alone = one_signal(replace(drawn, partner=np.arange(SAMPLES)), signal)
        # A pixel of the faintest signal has 2.5 standard deviations, and more in a smaller cadence.
        difference = np.abs(rendered(snippets, alone) - snippets)
        shows = (difference > 0.02).any(axis=(2, 3))
        is_there = alone.signal_level.max(axis=(1, 2, 3)) > 0
        assert np.array_equal(shows.any(axis=1), is_there)
        is_needle = drawn.has_needle & (signal == 0)
        assert not shows[is_needle][:, ~IS_ON].any() and is_there[is_needle].all()
        assert shows[is_there & ~is_needle][:, ~IS_ON].any(axis=1).all()


@given(seed=st.integers(0, 2**63 - 1), shape=st.sampled_from([*SHAPES, (6, 7, 28)]))
def test_interference_lasts_in_an_off_panel_among_the_channels(seed: int, shape: tuple[int, int, int]) -> None:
    """So no interference looks like a needle. Checked on many draws, without rendering them."""
    canvas = plain_canvas(shape)
    drawn = draw(NEEDLES, canvas, canvas.plane_shape(shape), EpochPart(seed, 0, np.arange(300), 300))
    is_seen = (drawn.signal_level > 0) & (drawn.signal_path >= -0.5) & (drawn.signal_path <= shape[2] - 0.5)
    in_panel = is_seen.any(axis=3)[:, :, np.argsort(canvas.positions)]
    interference = np.concatenate([in_panel[:, 1], in_panel[~drawn.has_needle, 0]])
    assert (interference[:, ~IS_ON].any(axis=1) == interference.any(axis=1)).all()
    needles = in_panel[drawn.has_needle, 0]
    assert not needles[:, ~IS_ON].any() and needles.any(axis=1).all()


@on_each_engine
def test_panels_with_a_signal_have_mean_0_and_standard_deviation_1_and_others_stay(maker: str) -> None:
    snippets = white_noise(KAGGLE_SHAPE) * np.float16(1.2) + np.float16(0.1)
    canvas = plain_canvas(KAGGLE_SHAPE)
    draws = replace(draws_for(canvas, KAGGLE_SHAPE, NEEDLES, seed=3), partner=np.arange(SAMPLES, dtype=np.int32))
    panels = rendered(snippets, draws, maker)
    has_signal = (draws.signal_level.max(axis=(1, 3)) > 0)[:, np.argsort(canvas.positions)]
    assert has_signal.any() and not has_signal.all()
    np.testing.assert_allclose(panels.mean(axis=(2, 3))[has_signal], 0, atol=1e-4)
    np.testing.assert_allclose(panels.std(axis=(2, 3))[has_signal], 1, atol=1e-4)
    np.testing.assert_array_equal(panels[~has_signal], snippets[~has_signal].astype(np.float32))


@on_each_engine
def test_summed_time_bins_are_those_of_the_normalised_panel(maker: str) -> None:
    """Time bins are summed after the panel with its signal is normalised, as in a data set that holds the signal."""
    snippets = white_noise(KAGGLE_SHAPE)
    draws = replace(draws_for(plain_canvas(KAGGLE_SHAPE), KAGGLE_SHAPE, NEEDLES, seed=3), partner=np.arange(SAMPLES))
    whole = train_images(snippets, plain_canvas(KAGGLE_SHAPE), draws, "cpu")
    canvas = CanvasConfig("panels", 39, 256, sum_time_bins=7, normalise=False)
    summed = train_images(snippets, canvas, replace(draws, partner=draws.partner.astype(np.int32)), maker)
    expected = whole.reshape(SAMPLES, 6, 39, 7, 256).sum(axis=3) / np.sqrt(7)
    np.testing.assert_allclose(summed, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("snr", [150.0, 600.0])
def test_the_snr_of_a_needle_is_setigens(snr: float) -> None:
    setigen = pytest.importorskip("setigen")
    frame = setigen.Frame(shape=(6 * KAGGLE_SHAPE[1], KAGGLE_SHAPE[2]), df=2.7, dt=18.25, fch1=6e9)
    frame.rng = np.random.default_rng(1)
    frame.add_noise(10, 1, noise_type="normal")
    snippets = ((frame.data - 10).reshape(KAGGLE_SHAPE) * np.ones((SAMPLES, 1, 1, 1))).astype(np.float16)
    config = replace(NEEDLES, needles=1.0, signal_snr_min=snr, signal_snr_max=snr)
    draws = one_signal(draws_for(plain_canvas(KAGGLE_SHAPE), KAGGLE_SHAPE, config, seed=1), 0)
    found = added(snippets, rendered(snippets, draws))
    order = np.argsort(plain_canvas(KAGGLE_SHAPE).positions)
    path, level = (values[:, 0][:, order] for values in (draws.signal_path, draws.signal_level))
    for sample, panel in np.argwhere((level > 0).any(axis=2)):
        # A pixel whose centre the path passes has the peak.
        channel = np.rint(path[sample, panel])
        is_central = (level[sample, panel] > 0) & (np.abs(channel - path[sample, panel]) < 0.1)
        is_central &= (channel >= 0) & (channel < KAGGLE_SHAPE[2])
        peaks = found[sample, panel][np.flatnonzero(is_central), channel[is_central].astype(int)]
        if len(peaks) > 5:
            assert np.median(peaks) == pytest.approx(frame.get_intensity(snr), rel=0.05)


def test_counts_and_panels_are_as_frequent_as_in_simulated_data() -> None:
    simulate = pytest.importorskip("shard_tools.simulate")
    count, rng, canvas = 20_000, np.random.default_rng(5), plain_canvas((6, 14, 8))
    drawn = draw(replace(NEEDLES, needles=0.3), canvas, (6, 14, 8), EpochPart(5, 1, np.arange(count), count))
    in_panel = (drawn.signal_level > 0).any(axis=3)[:, :, np.argsort(canvas.positions)]
    is_there = in_panel.any(axis=2)
    assert drawn.has_needle.mean() == pytest.approx(0.3, abs=0.01)
    others = is_there.sum(axis=1) - drawn.has_needle
    for needle, shares in ((True, (0.85, 0.15, 0.0)), (False, (0.6, 0.32, 0.08))):
        found = np.bincount(others[drawn.has_needle == needle], minlength=3) / (drawn.has_needle == needle).sum()
        np.testing.assert_allclose(found, shares, atol=0.015)
    part = EpochPart(5, 1, np.arange(count), count)
    for ours, theirs in (
        (draw_needle_panels(part.uniform), lambda: simulate.draw_needle_panels(rng)),
        (draw_interference_panels(part.uniform), lambda: simulate.draw_interference_panels(rng)[1]),
    ):
        mine = Counter(tuple(np.flatnonzero(row).tolist()) for row in ours)
        yours = Counter(theirs() for _ in range(count))
        for panels in mine.keys() | yours.keys():
            assert mine[panels] / count == pytest.approx(yours[panels] / count, abs=0.01), panels


def test_snr_is_log_uniform_and_profiles_are_as_wide_as_in_simulated_data() -> None:
    count, canvas = 20_000, plain_canvas((6, 14, 256))
    config = replace(NEEDLES, needles=1.0, signal_snr_min=50, signal_snr_max=5000)
    drawn = draw(config, canvas, (6, 14, 256), EpochPart(0, 0, np.arange(count), count))
    snr = drawn.signal_level[:, 0].max(axis=(1, 2)) * np.sqrt(6 * 14)
    exponent = np.log(snr / 50) / np.log(100)
    assert exponent.min() > -1e-6 and exponent.max() < 1 + 1e-6
    np.testing.assert_allclose(np.histogram(exponent, 5, (0, 1))[0] / count, 0.2, atol=0.015)
    width, lorentzian = drawn.signal_width[:, 0], drawn.signal_lorentzian[:, 0]
    assert lorentzian.mean() == pytest.approx(1 / 12, abs=0.01)  # half of a sixth
    full = np.where(lorentzian, 2 * width, 2.355 * width)
    assert full.min() >= 1.2 and full.max() <= 10 and not ((full > 2.51) & (full < 3.99)).any()
    assert (full > 3).mean() == pytest.approx(1 / 6, abs=0.01) and full[lorentzian].min() >= 4


def test_a_sixth_of_the_signals_hop_to_other_channels_in_each_panel_and_are_on_for_a_part_of_it() -> None:
    count, canvas = 10_000, plain_canvas((6, 39, 256))
    drawn = draw(replace(NEEDLES, needles=1.0), canvas, (6, 39, 256), EpochPart(0, 0, np.arange(count), count))
    path, level = drawn.signal_path[:, 0], drawn.signal_level[:, 0]
    steps = np.diff(path.reshape(count, 6, 39)[:, np.argsort(canvas.positions)].reshape(count, -1), axis=1)
    between = np.abs(steps[:, 38::39])
    within = np.abs(np.delete(steps, np.s_[38::39], axis=1)).max(axis=1, keepdims=True)
    hops = (between > 2 * within + 3).any(axis=1)
    assert hops.mean() == pytest.approx(1 / 6, abs=0.01)
    assert within[hops].max() < 4 and path[hops].min() > 0 and path[hops].max() < 255
    lasts = (level[hops] > 0).sum(axis=2)
    assert lasts[lasts > 0].min() >= 10 and np.ptp(lasts[lasts > 0]) > 20
    assert np.histogram(path[hops][:, :, 19], 4, (0, 256))[0].min() > 0.15 * 6 * hops.sum()


def test_two_epochs_and_two_positions_have_other_signals() -> None:
    canvas = plain_canvas(KAGGLE_SHAPE)
    config = replace(NEEDLES, needles=1.0)
    first, second = (
        draw(config, canvas, (6, 273, 256), EpochPart(7, epoch, np.arange(8), 8)).signal_path[:, 0] for epoch in (0, 1)
    )
    paths = [path.tobytes() for path in (*first, *second)]
    assert len(set(paths)) == 16


def test_permuted_panels_stay_on_or_off_and_come_in_every_order() -> None:
    canvas = plain_canvas((6, 4, 8))
    drawn = draw(replace(QUIET, permute_panels=0.5), canvas, (6, 4, 8), EpochPart(1, 0, np.arange(4000), 4000))
    order = drawn.panel_order
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(6), (4000, 1)))
    assert np.array_equal(order % 2, np.tile(np.arange(6) % 2, (4000, 1)))
    assert len({tuple(row) for row in order.tolist()}) == 36
    assert (order == np.arange(6)).all(axis=1).mean() == pytest.approx(0.5 + 0.5 / 36, abs=0.03)
    assert (DrawConfig().permuted, DrawConfig(needles=0.1).permuted) == (0.0, 0.5)
