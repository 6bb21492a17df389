"""The sky without a needle: receiver, persistent bands and lines, and broadband interference.

Axes: T time bin of the whole cadence (the panels end to end), F frequency channel. Brightness is in units of the quiet
receiver's mean power.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from shard_tools.cadence import KAGGLE_SHAPE, OFF_POSITIONS, PANELS

Floats = npt.NDArray[np.float32]

PANEL_BINS, CHANNELS = KAGGLE_SHAPE[1:]
TIME_BINS = PANELS * PANEL_BINS
# For each kind: share of cadences with it (times their busyness), most pieces, least and greatest brightness.
Broad = Literal["lines", "bands", "comb", "blocks", "bursts"]
BROAD_INTERFERENCE: dict[Broad, tuple[float, int, float, float]] = {
    "lines": (0.55, 4, 0.3, 12.0),
    "bands": (0.35, 2, 0.5, 10.0),
    "comb": (0.35, 1, 0.5, 8.0),
    "blocks": (0.3, 1, 0.2, 5.0),
    "bursts": (0.4, 1, 0.7, 1.5),
}


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number whose logarithm is uniform between those of `low` and `high`."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _flicker(rng: np.random.Generator, strength: float, bins: float) -> Floats:
    """(T,) positive series around 1: log-normal, correlated over about `bins` time bins."""
    knots = rng.standard_normal(int(TIME_BINS / bins) + 2)
    return np.exp(strength * np.interp(np.arange(TIME_BINS) / bins, np.arange(knots.size), knots)).astype(np.float32)


def _switch(rng: np.random.Generator) -> Floats:
    """(T,) 1 where on, 0 where off, by period, by panel or both; never off in all OFF panels, as a needle would be."""
    period, duty = log_uniform(rng, 8, 200), rng.uniform(0.35, 1.3)  # at most 130 bins dark: less than a panel
    periodic = (np.arange(TIME_BINS) + rng.uniform(0, period)) % period < duty * period
    panels = rng.random(PANELS) < (0.6 if rng.random() < 0.3 else 1)
    panels[rng.choice(OFF_POSITIONS)] = True
    return (periodic & np.repeat(panels, PANEL_BINS)).astype(np.float32)


def _hump(center: Any, width: float) -> Floats:
    """Gaussian around channel `center`, a number or (T, 1), `width` channels in standard deviation: (F,) or (T, F)."""
    offset = (np.arange(CHANNELS, dtype=np.float32) - np.asarray(center, np.float32)) / np.float32(width)
    return np.exp(np.float32(-0.5) * offset * offset)


def _draw_emission(rng: np.random.Generator, kind: str) -> tuple[Floats, Floats]:
    """One piece of interference: its level (T,) and its shape (F,), or (T, F) where it wanders; both around 1."""
    channels: Floats = np.arange(CHANNELS, dtype=np.float32)
    center = rng.uniform(0, CHANNELS)
    if kind == "lines":
        return _flicker(rng, rng.uniform(0, 0.2), 20), _hump(center, rng.uniform(0.4, 1.2))
    if kind == "bands":
        path = center + rng.uniform(0, 6) * np.log(_flicker(rng, 1, rng.uniform(40, 400)))
        level = _flicker(rng, rng.uniform(0.1, 0.9), log_uniform(rng, 4, 120))
        return level, _hump(path[:, None], rng.uniform(3, 14))
    if kind == "bursts":
        level = np.zeros(TIME_BINS, np.float32)
        for _ in range(int(log_uniform(rng, 1, 50))):
            start = rng.integers(TIME_BINS)
            level[start : start + int(log_uniform(rng, 1, 40))] += log_uniform(rng, 0.1, 4)
        return level, 1 + np.float32(rng.uniform(-0.9, 0.9)) * (channels / np.float32(CHANNELS / 2) - 1)
    level = _flicker(rng, rng.uniform(0, 1.2), log_uniform(rng, 2, 80)) * _switch(rng)
    if kind == "comb":
        teeth = 0.5 + 0.5 * np.cos((channels - center) * 2 * np.pi / rng.uniform(7, 24))
        return level, (teeth ** rng.uniform(2, 8) * _hump(center, rng.uniform(15, 90))).astype(np.float32)
    width = log_uniform(rng, 8, 60)
    box = (np.abs(channels - center) < width).astype(np.float32)
    return level, box if rng.random() < 0.5 else _hump(center, width)


def draw_sky(rng: np.random.Generator, without: Sequence[Broad] = ()) -> tuple[Floats, list[str]]:
    """(T, F) brightness of the background, 0.2 or more, and the kinds of interference in it, none of `without`."""
    # The receiver's bandpass: a slope, ripple and a few broad humps.
    bandpass = 1 + rng.normal(0, 0.15) * np.linspace(-1, 1, CHANNELS) + rng.normal(0, rng.random() ** 3 / 3, CHANNELS)
    for _ in range(rng.integers(1, 4)):
        bandpass += log_uniform(rng, 0.05, 1.5) * _hump(rng.uniform(-40, CHANNELS + 40), rng.uniform(20, 90))
    # Its gain: stripes over all channels, mostly faint.
    gain = _flicker(rng, log_uniform(rng, 0.005, 0.4), log_uniform(rng, 1, 60))
    sky = np.outer(gain, bandpass.astype(np.float32))
    busyness, present = rng.choice((0.2, 1.0, 1.5), p=(0.45, 0.4, 0.15)), list[str]()
    for kind, (share, most, faintest, brightest) in BROAD_INTERFERENCE.items():
        if rng.random() >= share * busyness or kind in without:
            continue
        present.append(kind)
        for _ in range(rng.integers(1, most + 1)):
            level, shape = _draw_emission(rng, kind)
            sky += (level * np.float32(log_uniform(rng, faintest, brightest)))[:, None] * shape
    return np.maximum(sky, np.float32(0.2), out=sky), present
