"""The sky without a needle: receiver, persistent bands and lines, and broadband interference.

The model follows 66 real snippets of the competition, inspected one by one. A real panel shows structure of some 2 to
15 standard deviations of the noise, plus Gaussian noise that hardly depends on the brightness. In brackets: how many of
the 66 show each kind; many show several kinds.

- receiver: slopes and humps over the channels (all), edges of the band (8), power in all channels that flickers from
  one time bin to the next (20)
- lines: one or two channels wide, steady (21)
- bands: lines 3 to 12 channels wide that fade and return, often several at once (10)
- comb: evenly spaced fringes under an envelope, in pulses of some 30 time bins, moving to and fro by less than their
  spacing (22)
- blocks: 15 to 60 channels with sharp edges, tilted waves within, some switched on or off (7)
- bursts: a few time bins with more power in all channels, with sharp edges or without, up to 300 times the noise (30)
- stripes: each channel has its own level, like the folds of a curtain, steady (9) or drifting (1)
- dashes: single rows of short dashes, or grids of rows that shift from one to the next, as from radar (12)
- hops: a line that jumps between a few channels (3)
- sweeps: a broad hump that drifts along a curve (1)

Axes: T time bin of the whole cadence (the panels end to end), R row: one or several time bins, F frequency channel.
Brightness is in standard deviations of the quiet receiver's noise in a pixel.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from shard_tools.cadence import KAGGLE_SHAPE, OFF_POSITIONS, ON_POSITIONS, PANELS

Floats = npt.NDArray[np.float32]
Emission = tuple[Floats, Floats]
"""A piece of interference: its level (T,), and its shape over the channels, (F,) or (R, F) where it moves."""

PANEL_BINS, CHANNELS = KAGGLE_SHAPE[1:]
TIME_BINS = PANELS * PANEL_BINS
NOISE = 0.005
"""Standard deviation of the noise in a pixel, in units of the quiet receiver's mean power. In real snippets the noise
of pixels that are 20 to 60 standard deviations brighter is 10 to 30 % stronger."""
ROW_BINS = 7  # time bins in a row of a shape that moves slowly; a panel has 39
Broad = Literal["lines", "bands", "comb", "blocks", "bursts", "stripes", "dashes", "hops", "sweeps"]
# For each kind: share of cadences with it (to be multiplied by a cadence's busyness), most pieces, least and greatest
# brightness.
BROAD_INTERFERENCE: dict[Broad, tuple[float, int, float, float]] = {
    "lines": (0.35, 2, 3.0, 150.0),
    "bands": (0.16, 3, 3.0, 60.0),
    "comb": (0.65, 1, 0.8, 15.0),
    "blocks": (0.1, 2, 5.0, 100.0),
    "bursts": (0.5, 2, 3.0, 200.0),
    "stripes": (0.15, 1, 0.7, 5.0),
    "dashes": (0.15, 1, 4.0, 50.0),
    "hops": (0.04, 1, 5.0, 50.0),
    "sweeps": (0.03, 1, 2.0, 10.0),
}
_CHANNELS: Floats = np.arange(CHANNELS, dtype=np.float32)
_RAMP: Floats = np.linspace(-1, 1, CHANNELS, dtype=np.float32)


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number whose logarithm is uniform between those of `low` and `high`."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _wander(rng: np.random.Generator, bins: float, count: int = TIME_BINS) -> Floats:
    """(count,) series around 0, of standard deviation 1 or less, correlated over about `bins` time bins."""
    knots = rng.standard_normal(int(count / bins) + 2)
    return np.interp(np.arange(count) / bins, np.arange(knots.size), knots).astype(np.float32)


def _flicker(rng: np.random.Generator, strength: float, bins: float) -> Floats:
    """(T,) positive series around 1: log-normal, correlated over about `bins` time bins."""
    level: Floats = np.exp(np.float32(strength) * _wander(rng, bins))
    return level


def _switch(rng: np.random.Generator) -> Floats:
    """(T,) 1 where on, 0 where off, by period, panel or both; on in at least one OFF panel, unlike a needle."""
    period, duty = log_uniform(rng, 8, 200), rng.uniform(0.35, 1.3)  # at most 130 bins dark: less than a panel
    periodic = (np.arange(TIME_BINS) + rng.uniform(0, period)) % period < duty * period
    panels = rng.random(PANELS) < (0.6 if rng.random() < 0.3 else 1)
    panels[rng.choice(OFF_POSITIONS)] = True
    return (periodic & np.repeat(panels, PANEL_BINS)).astype(np.float32)


def _by_pointing(rng: np.random.Generator, strength: float) -> Floats:
    """(T,) positive, around 1, constant in a panel: how much is received depends on where the telescope points."""
    return np.repeat(rng.lognormal(0, strength, PANELS), PANEL_BINS).astype(np.float32)


def _hump(center: Any, width: float) -> Floats:
    """Gaussian around channel `center`, a number or (R, 1), `width` channels in standard deviation: (F,) or (R, F)."""
    offset = (_CHANNELS - np.asarray(center, np.float32)) / np.float32(width)
    return np.exp(np.float32(-0.5) * offset * offset)


def _slow_wander(rng: np.random.Generator, bins: float) -> Floats:
    """(R, 1) like `_wander`, with one value for every ROW_BINS time bins."""
    return _wander(rng, bins / ROW_BINS, TIME_BINS // ROW_BINS)[:, None]


def _draw_line(rng: np.random.Generator) -> Emission:
    return _flicker(rng, rng.uniform(0, 0.1), 20), _hump(rng.uniform(0, CHANNELS), rng.uniform(0.3, 0.8))


def _draw_band(rng: np.random.Generator) -> Emission:
    level = _flicker(rng, rng.uniform(0.2, 0.9), log_uniform(rng, 6, 60))
    return level, _hump(rng.uniform(0, CHANNELS), log_uniform(rng, 1, 5))


def _draw_comb(rng: np.random.Generator) -> Emission:
    spacing, center = rng.uniform(18, 32) if rng.random() < 0.7 else rng.uniform(8, 18), rng.uniform(0, CHANNELS)
    wander = rng.uniform(0, 0.15) * spacing * _slow_wander(rng, log_uniform(rng, 40, 400))
    teeth = 0.5 + 0.5 * np.cos((_CHANNELS - np.float32(center) - wander) * np.float32(2 * np.pi / spacing))
    envelope = _hump(center, rng.uniform(12, 50)) + np.float32(rng.choice((0, 0.1, 0.3)))
    level = _flicker(rng, rng.uniform(0.2, 1.0), log_uniform(rng, 10, 150))
    if rng.random() < 0.6:
        period = rng.uniform(15, 60)
        pulses = 0.5 + 0.5 * np.cos(2 * np.pi * np.arange(TIME_BINS) / period + 2 * _wander(rng, 200))
        level *= np.float32(1) - np.float32(rng.uniform(0.2, 1)) * pulses.astype(np.float32)
    if rng.random() < 0.3:
        level *= _switch(rng)
    return level, (teeth ** np.float32(rng.uniform(1, 3))) * envelope


def _draw_block(rng: np.random.Generator) -> Emission:
    center, half, edge = rng.uniform(0, CHANNELS), rng.uniform(8, 30), rng.uniform(0.5, 2)
    box = 1 / (1 + np.exp(np.clip((np.abs(_CHANNELS - center) - half) / edge, -30, 30)))
    tilt = rng.uniform(-1, 1) * _CHANNELS  # time bins
    waves = _wander(rng, log_uniform(rng, 10, 60), TIME_BINS + 2 * CHANNELS)
    rows = (np.arange(0, TIME_BINS, ROW_BINS)[:, None] + ROW_BINS // 2 + tilt).astype(int) + CHANNELS
    level: Floats = _switch(rng) if rng.random() < 0.4 else np.ones(TIME_BINS, np.float32)
    return level, np.exp(np.float32(rng.uniform(0.1, 0.6)) * waves[rows]) * box.astype(np.float32)


def _draw_burst(rng: np.random.Generator) -> Emission:
    level = np.zeros(TIME_BINS, np.float32)
    longest = log_uniform(rng, 2, 80)
    for _ in range(int(log_uniform(rng, 1, 12))):
        start, length = rng.integers(TIME_BINS), int(log_uniform(rng, 1, longest)) + 1
        rise = np.ones(length) if rng.random() < 0.5 else np.hanning(length + 2)[1:-1]
        lit = level[start : start + length]
        lit += log_uniform(rng, 0.1, 1) * rise[: lit.size]
    return level, 1 + np.float32(4 * rng.uniform(-0.6, 0.6) ** 3) * _RAMP


def _draw_stripes(rng: np.random.Generator) -> Emission:
    heights = np.abs(rng.standard_normal(3 * CHANNELS)) ** rng.uniform(0.7, 2)
    if rng.random() < 0.5:
        heights = np.convolve(heights, (0.25, 0.5, 0.25), mode="same")
    level = _flicker(rng, log_uniform(rng, 0.02, 0.5), log_uniform(rng, 1, 300))
    drift = rng.uniform(-0.1, 0.1) if rng.random() < 0.1 else 0.0
    moved = CHANNELS + np.rint(drift * np.arange(0, TIME_BINS, ROW_BINS)[:, None]).astype(int) + np.arange(CHANNELS)
    return level, heights.astype(np.float32)[moved if drift else slice(CHANNELS, 2 * CHANNELS)]


def _draw_dashes(rng: np.random.Generator) -> Emission:
    shape = np.zeros((TIME_BINS, CHANNELS), np.float32)
    spacing, width, length = rng.uniform(7, 24), rng.integers(3, 7), int(log_uniform(rng, 2, 9))
    is_grid = rng.random() < 0.35
    for _ in range(rng.integers(2, 6) if is_grid else int(log_uniform(rng, 1, 8))):
        start, first, teeth = rng.integers(TIME_BINS), rng.uniform(-20, CHANNELS), rng.integers(2, 12)
        drift = rng.uniform(-1, 1)  # channels a row
        for row in range(rng.integers(4, 25) if is_grid else 1):
            begin = start + int(row * length * 1.8)
            for low in first + drift * row + spacing * np.arange(teeth):
                if rng.random() < 0.85 and low >= 0:
                    shape[begin : begin + length, int(low) : int(low) + width] += np.float32(rng.uniform(0.3, 1))
    return np.ones(TIME_BINS, np.float32), shape


def _draw_hops(rng: np.random.Generator) -> Emission:
    places = np.repeat(rng.integers(0, 3, TIME_BINS // 6 + 1), rng.integers(6, 60))[:TIME_BINS]
    path = rng.uniform(0, CHANNELS) + rng.uniform(2, 9) * places
    is_on = np.repeat(rng.random(TIME_BINS // 13) < rng.uniform(0.3, 1), 13)
    return _flicker(rng, 0.3, 20) * is_on.astype(np.float32), _hump(path[:, None], rng.uniform(0.6, 2.5))


def _draw_sweep(rng: np.random.Generator) -> Emission:
    time = np.linspace(-1, 1, TIME_BINS // ROW_BINS)[:, None]
    path = rng.uniform(0, CHANNELS) + rng.uniform(-150, 150) * time + rng.uniform(-150, 150) * time**2
    return _flicker(rng, 0.5, 200), _hump(path, rng.uniform(4, 15))


# What each kind looks like is at the top of this file.
_DRAW: dict[Broad, Callable[[np.random.Generator], Emission]] = {
    "lines": _draw_line,
    "bands": _draw_band,
    "comb": _draw_comb,
    "blocks": _draw_block,
    "bursts": _draw_burst,
    "stripes": _draw_stripes,
    "dashes": _draw_dashes,
    "hops": _draw_hops,
    "sweeps": _draw_sweep,
}


def _add_receiver(rng: np.random.Generator, sky: Floats) -> None:
    """Add the bandpass, slightly different in each panel since its target adds power, and an unsteady gain."""
    bandpass = rng.normal(0, 1) * _RAMP + rng.normal(0, rng.random() ** 6 / 3, CHANNELS).astype(np.float32)
    for _ in range(rng.integers(1, 4)):
        bandpass += np.float32(rng.normal(0, 1.5)) * _hump(rng.uniform(-40, CHANNELS + 40), rng.uniform(20, 90))
    if rng.random() < 0.12:
        bandpass -= np.float32(rng.uniform(2, 6)) * _hump(rng.choice((0, CHANNELS)), rng.uniform(5, 20))
    level, on = _by_pointing(rng, 0.15), np.repeat(np.isin(range(PANELS), ON_POSITIONS), PANEL_BINS)
    level[on] *= np.float32(rng.lognormal(0, 0.1))
    _add(sky, level, np.float32(log_uniform(rng, 0.5, 10)) * bandpass)
    for bins in (log_uniform(rng, 0.5, 20), log_uniform(rng, 20, 300)):
        shape = 1 + np.float32(rng.normal(0, 0.3)) * _RAMP
        level = _by_pointing(rng, 0.5) * _wander(rng, bins)
        _add(sky, np.float32(log_uniform(rng, 0.1, 4)) * level, shape)


def _add(sky: Floats, level: Floats, shape: Floats) -> None:
    """Add level (T,) times shape, (F,) or (R, F), to the sky (T, F), in place."""
    if shape.ndim == 1:
        sky += level[:, None] * shape
        return
    rows = len(shape)
    by_row = sky.reshape(rows, -1, CHANNELS)
    by_row += level.reshape(rows, -1, 1) * shape[:, None]


def draw_sky(rng: np.random.Generator, without: Sequence[Broad] = ()) -> tuple[Floats, list[str]]:
    """(T, F) power of the background, and the kinds of interference in it, none of `without`.

    The power is in units of the quiet receiver's mean power: 1 + NOISE times the brightness, and 0.2 or more.
    """
    sky = np.zeros((TIME_BINS, CHANNELS), np.float32)
    _add_receiver(rng, sky)
    busyness, present = rng.choice((0.6, 1.0, 1.4), p=(0.4, 0.4, 0.2)), list[str]()
    for kind, (share, most, faintest, brightest) in BROAD_INTERFERENCE.items():
        if rng.random() >= share * busyness or kind in without:
            continue
        present.append(kind)
        for _ in range(rng.integers(1, most + 1)):
            level, shape = _DRAW[kind](rng)
            level = level * _by_pointing(rng, rng.uniform(0.05, 0.25))
            _add(sky, level * np.float32(log_uniform(rng, faintest, brightest)), shape)
    sky *= np.float32(NOISE)
    sky += 1
    return np.maximum(sky, np.float32(0.2), out=sky), present
