"""The promises of the simulated sky. Axes: P panel, T time bin of the whole cadence, F frequency channel."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import ks_2samp, kurtosis

from shard_tools.axes import kaggle_axes
from shard_tools.cadence import KAGGLE_SHAPE, OFF_POSITIONS, ON_POSITIONS
from shard_tools.sky import CHANNELS, NOISE, PANEL_BINS, TIME_BINS, Broad, draw_sky
from training.search.candidates import Candidates

KINDS = get_args(Broad)
Floats = npt.NDArray[np.float32]


def draw_alone(kind: str, count: int) -> Iterator[Floats]:
    """What one kind of interference adds to each of `count` skies: (T, F), in standard deviations of the noise."""
    others = [name for name in KINDS if name != kind]
    for seed in range(1000):
        sky, present = draw_sky(np.random.default_rng(seed), others)
        assert present in ([], [kind])
        if present:
            # The random numbers of the receiver come first.
            yield (sky - draw_sky(np.random.default_rng(seed), KINDS)[0]) / NOISE
            count -= 1
            if not count:
                return


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_interference_adds_power_and_is_absent_from_skies_without_it(kind: str) -> None:
    for added in draw_alone(kind, 5):
        assert added.shape == (TIME_BINS, CHANNELS)
        assert added.min() > -1e-3 and added.max() > 0.1


@pytest.mark.parametrize("kind", ["lines", "bands", "comb", "blocks", "stripes", "hops"])
def test_interference_that_lasts_is_never_in_on_panels_alone(kind: str) -> None:
    for added in draw_alone(kind, 20):
        of_panels = added.reshape(6, PANEL_BINS, CHANNELS // 32, 32).mean(axis=(1, 3))
        on, off = (of_panels[list(positions)].max(axis=0) for positions in (ON_POSITIONS, OFF_POSITIONS))
        assert (off > 0.1 * on - 0.01).all()


def to_panels(sky: Floats, rng: np.random.Generator) -> Floats:
    """(6, T, F) as observed: with noise, and each panel normalised to mean 0 and standard deviation 1."""
    power = sky * (1 + NOISE * rng.standard_normal(sky.shape, np.float32))
    panels = power.reshape(KAGGLE_SHAPE)
    panels -= panels.mean(axis=(1, 2), keepdims=True)
    return np.asarray(panels / panels.std(axis=(1, 2), keepdims=True))


def summarise(panels: Floats, search: Candidates) -> dict[str, float]:
    """Statistics of the OFF panels of (6, T, F), and of what the search finds in them, so that needles do not count."""
    off = panels[list(OFF_POSITIONS)].astype(np.float32)
    noise = np.median(np.abs(np.diff(np.diff(off, axis=1), axis=2)), axis=(1, 2)) / 2 * 1.4826
    with torch.no_grad():
        evidence = search(torch.from_numpy(panels[[*ON_POSITIONS, *OFF_POSITIONS]].astype(np.float32))[None])[1]
    return {
        "noise": float(np.median(noise)),
        "noise of the noisiest panel over the least": float(np.log(noise.max() / noise.min())),
        "spread of channel levels": float(off.mean(axis=1).std(axis=1).mean()),
        "spread of time bins": float(off.mean(axis=2).std(axis=1).mean()),
        "kurtosis": float(kurtosis(off, axis=None)),
        "best control": float(evidence[1, 0, 0]),
        "second control": float(evidence[1, 1, 0]),
    }


@pytest.mark.kaggle
def test_simulated_skies_have_the_statistics_of_real_ones(kaggle_seti: Path) -> None:
    search, rng = Candidates(kaggle_axes(PANEL_BINS, CHANNELS), 2), np.random.default_rng(0)
    real = [summarise(np.load(path), search) for path in sorted(kaggle_seti.glob("t*/*/*.npy"))]
    simulated = [summarise(to_panels(draw_sky(rng)[0], rng), search) for _ in range(120)]
    for name in real[0]:
        distance = ks_2samp([one[name] for one in real], [one[name] for one in simulated]).statistic
        assert distance < 0.3, name


def test_structure_is_several_times_the_noise_and_the_noise_hardly_depends_on_it() -> None:
    rng, ratios, contrasts = np.random.default_rng(0), [], []
    for _ in range(40):
        sky = draw_sky(rng)[0]
        contrasts.append(sky.reshape(6, -1).std(axis=1).mean() / NOISE)
        ratios.append(np.quantile(sky, 0.9) / np.quantile(sky, 0.1))
    assert 3 < np.median(contrasts) < 8
    assert np.median(ratios) < 1.2
