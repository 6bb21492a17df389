"""Signals for backgrounds: a needle, and interference. Pure.

They are drawn as shard_tools/simulate.py draws them, unless the backgrounds were cut from a telescope's files
(`ingest`). There, paths go on through the pauses between panels, and drift rates are those that the snippets were cut
for.

Axes: n samples, S signals of a sample, P panels, N planes of the canvas, t time bins of a snippet's panel, F frequency
channels.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.observed_times import ObservedPanels
from pipeline.randomness import EpochPart, Int64s, Stream
from pipeline.signals import (
    MARGIN,
    SIGMA,
    Bools,
    Curves,
    Float64s,
    Numbers,
    Signals,
    Times,
    draw_snr,
    draw_subsets,
    end_to_end,
    lay_paths,
)
from shard_tools.cadence import KAGGLE_SHAPE, ON_POSITIONS, PANELS

MOST_SIGNALS = 2
"""S: a needle and one signal of interference, or two of interference; see _OTHERS."""
# Probabilities of none, one and two signals of interference beside a needle, and without one.
_OTHERS = {True: (0.85, 0.15, 0.0), False: (0.6, 0.32, 0.08)}
_ALL_THREE = 0.7  # share of the needles that are in all three ON panels
# Shares of the interference in all panels, and in OFF panels alone; the rest is in ON panels and one or two OFF panels.
_EVERYWHERE, _OFF_ALONE = 0.45, 0.30
_KINDS = _STRAIGHT, _S_CURVE, _PULSED, _BROADENED, _INTERMITTENT, _HOPPING = range(6)
_KAGGLE_BINS, _KAGGLE_CHANNELS = PANELS * KAGGLE_SHAPE[1], KAGGLE_SHAPE[2]
_STEEPEST = 0.5 * _KAGGLE_BINS  # channels over the cadence
_WIDEST = 180 / _KAGGLE_CHANNELS  # largest share of the channels that a path drifts over while its signal is on
_STEEPEST_HOP, _LARGEST_SWING = 40.0, 5.0  # channels of a hopping signal within a panel
_FEWEST_BINS = 4  # of a pulse and its pause, so that each pulse has a time bin
# Full width of a narrow line in channels: the least, and how much wider it may be. It is less in an observation, since
# real narrowband signals are about a hertz wide.
_SIMULATED_WIDTH, _OBSERVED_WIDTH = (1.2, 1.3), (1.0, 1.0)
_OBSERVED_KINDS = (0.6, 0.1, 0.1, 0.1, 0.1)  # chance of each of _KINDS but hopping in an observation


@dataclass(frozen=True)
class SimulatedConfig:
    """How often a needle is added, and how bright signals are; see DrawConfig."""

    needles: float
    snr_min: float
    snr_max: float


@dataclass(frozen=True)
class _Drawn:
    """One signal of each of m samples."""

    path: Float64s
    """(m, P t) as Signals has it."""
    level: Float64s
    """(m, P t)"""
    width: Float64s
    """(m,)"""
    lorentzian: Bools
    """(m,)"""


def draw_simulated(
    config: SimulatedConfig,
    positions: tuple[int, ...],
    shape: tuple[int, int],
    part: EpochPart,
    observed: ObservedPanels | None = None,
) -> Signals:
    """Needles and interference for the samples of a part, on the planes that show `positions`; `shape` is (t, F).

    `observed` has the times of the samples' panels, if they are from an observation.
    """
    is_needle = part.uniform(Stream.SIGNAL, 1) < config.needles
    others = _draw_counts(is_needle, part.uniform(Stream.SIGNAL_OTHERS, 1))
    size = (len(part), MOST_SIGNALS)
    path, level = (np.zeros((*size, len(positions), shape[0]), np.float32) for _ in range(2))
    width, lorentzian = np.ones(size, np.float32), np.zeros(size, bool)
    # No sample has a needle and two signals of interference: the second of these takes the needle's place.
    for number, (present, place) in enumerate(((is_needle, 0), (others > 0, 1), (others > 1, 0))):
        rows = np.flatnonzero(present)  # only these are computed
        there = None if observed is None else observed.at(rows)
        drawn = _draw_one(config, shape, part.at(rows), number, there)
        by_panel = (len(rows), PANELS, shape[0])
        path[rows, place] = drawn.path.reshape(by_panel)[:, positions]
        level[rows, place] = drawn.level.reshape(by_panel)[:, positions]
        width[rows, place], lorentzian[rows, place] = drawn.width, drawn.lorentzian
    return Signals(path, level, width, lorentzian, is_needle)


def _draw_counts(is_needle: Bools, which: Float64s) -> Int64s:
    """(n,) how many signals of interference a sample has."""
    steps = np.cumsum([_OTHERS[bool(needle)] for needle in (False, True)], axis=1)[:, :-1]
    return np.asarray((which[:, None] >= steps[is_needle.astype(int)]).sum(axis=1))


def _draw_one(
    config: SimulatedConfig, shape: tuple[int, int], part: EpochPart, signal: int, observed: ObservedPanels | None
) -> _Drawn:
    """Signal number `signal` of each sample: number 0 is the needle."""
    bins, channels = shape
    number = _numbers(part, signal)
    panels = draw_needle_panels(number) if signal == 0 else draw_interference_panels(number)
    time = end_to_end(len(part), bins) if observed is None else observed.times
    first, last = time.first_and_last(panels)
    kind = _draw_kinds(number, observed is not None)
    drift = (
        _draw_drifts(channels, first, last, number)
        if observed is None
        else observed.draw_drifts(channels, last - first, number)
    )
    path = lay_paths(time.bins, channels, first, last, _draw_curves(channels, drift, kind, number))
    # setigen's definition: the peak of the mean over all time bins, in standard deviations of such a mean.
    peak = draw_snr(config.snr_min, config.snr_max, number) / np.sqrt(PANELS * bins)
    level = peak[:, None] * np.repeat(panels, bins, axis=1)
    pulsed, intermittent, hopping = (np.flatnonzero(kind == one) for one in (_PULSED, _INTERMITTENT, _HOPPING))
    level[pulsed] *= _draw_pulses(time.at(pulsed), _numbers(part.at(pulsed), signal))
    numbers = _numbers(part.at(intermittent), signal)
    level[intermittent] *= _draw_presence(time.at(intermittent), panels[intermittent], numbers)
    path[hopping], gate = _draw_hops(part.at(hopping), signal, bins, channels)
    level[hopping] *= gate
    full_width, lorentzian = _draw_profiles(kind, number, observed is not None)
    width = full_width * np.where(lorentzian, 0.5, SIGMA)
    if observed is not None:
        smeared = _smear(width, drift * time.step)
        level, width = level * (width / smeared)[:, None], smeared
    return _Drawn(path, level, width, lorentzian)


def _smear(width: Float64s, drift: Float64s) -> Float64s:
    """(n,) the width of a profile that moves by `drift` channels within a time bin.

    The variance of the box that it passes through is added to its own. The caller lowers its level to keep its power.
    """
    return np.sqrt(width**2 + drift**2 / 12)


def _numbers(part: EpochPart, signal: int) -> Numbers:
    """The random numbers of signal number `signal`; those of number 0 in EpochPart.uniform are for --inject."""
    return lambda stream: part.uniform(stream, 1 + signal)


def draw_needle_panels(number: Numbers) -> Bools:
    """(n, P) all three ON panels, or one or two of them."""
    subset = draw_subsets(number(Stream.SIGNAL_PANELS), _ALL_THREE)
    panels = np.zeros((len(subset), PANELS), bool)
    panels[:, ON_POSITIONS[0] :: 2] = subset
    return panels


def draw_interference_panels(number: Numbers) -> Bools:
    """(n, P) all panels, OFF panels alone, or ON panels and one or two OFF panels: never ON panels alone."""
    place, panels = number(Stream.SIGNAL_PLACE), draw_needle_panels(number)
    off_alone = place < _EVERYWHERE + _OFF_ALONE
    panels[off_alone] = np.roll(panels[off_alone], 1, axis=1)
    with_gaps = np.flatnonzero(~off_alone)
    # One or two OFF panels: the subsets of the three without that of all.
    panels[with_gaps, 1::2] = draw_subsets(number(Stream.SIGNAL_OFF_PANELS)[with_gaps], 0.0)
    panels[place < _EVERYWHERE] = True
    return panels


def _draw_kinds(number: Numbers, is_observed: bool) -> Int64s:
    """(n,) the place of each signal's kind in _KINDS."""
    which = number(Stream.SIGNAL_KIND)
    if not is_observed:
        return np.floor(len(_KINDS) * which).astype(int)
    return np.searchsorted(np.cumsum(_OBSERVED_KINDS[:-1]), which, "right")


def _draw_drifts(channels: int, first: Float64s, last: Float64s, number: Numbers) -> Float64s:
    """(n,) channels over the cadence."""
    which = number(Stream.SIGNAL_DRIFT)
    steepest = np.minimum(_STEEPEST, _WIDEST * channels / (last - first))
    # Squared: most drifts are slow, as in the real data.
    return np.asarray(np.where(which < 0.5, -1, 1) * (2 * which % 1) ** 2 * steepest)


def _draw_curves(channels: int, drift: Float64s, kind: Int64s, number: Numbers) -> Curves:
    bend = np.where(kind == _S_CURVE, 4 + 16 * number(Stream.SIGNAL_BEND), 0) * min(1, channels / _KAGGLE_CHANNELS)
    turns = 1 / (0.4 + 1.1 * number(Stream.SIGNAL_BEND_PERIOD))
    return Curves(drift, bend, turns, number(Stream.SIGNAL_BEND_PHASE), number(Stream.SIGNAL_CENTRE))


def _draw_pulses(time: Times, number: Numbers) -> Bools:
    """(n, P t) when a pulsed signal is on."""
    period = (14 + 76 * number(Stream.SIGNAL_PULSE_PERIOD)) / _KAGGLE_BINS
    period = np.maximum(period, _FEWEST_BINS * time.step)[:, None]
    duty = (0.3 + 0.4 * number(Stream.SIGNAL_PULSE_DUTY))[:, None]
    return np.asarray(time.bins % period < duty * period)


def _draw_presence(time: Times, panels: Bools, number: Numbers) -> Bools:
    """(n, P t) whether an intermittent signal is on: from or until some time. `panels` (n, P) hold it."""
    begins = number(Stream.SIGNAL_GATE) < 0.5
    first, last = time.first_and_last(panels)
    # Not too near either end, or nothing of the signal would remain.
    earliest, latest = first + 0.1 * (last - first), first + 0.9 * (last - first)
    latest = np.minimum(latest, last - time.step)  # where panels are short
    # Interference that is in ON panels too must be on in at least one OFF panel, or it would be a needle.
    is_mixed = panels[:, 0::2].any(axis=1) & panels[:, 1::2].any(axis=1)
    off_end = time.end(1 + 2 * panels[:, 1::2].argmax(axis=1))  # of the first OFF panel that holds it
    off_start = time.begin(5 - 2 * panels[:, 5::-2].argmax(axis=1))  # of the last
    earliest = np.where(is_mixed, np.where(begins, first, off_end), earliest)
    latest = np.where(is_mixed, np.where(begins, off_start, last), latest)
    turn = (earliest + (latest - earliest) * number(Stream.SIGNAL_TURN))[:, None]
    return np.asarray(np.where(begins[:, None], time.bins >= turn, time.bins < turn))


def _draw_hops(part: EpochPart, signal: int, bins: int, channels: int) -> tuple[Float64s, Bools]:
    """(n, P t) the path of a signal that hops to other channels in each panel, and when within a panel it is on."""
    number = _numbers(part, signal)
    time = (np.arange(bins) + 0.5) / bins  # 0 to 1 over the panel
    scale = min(1, channels / _KAGGLE_CHANNELS)
    drift = ((2 * number(Stream.SIGNAL_DRIFT) - 1) ** 3 * _STEEPEST_HOP * scale)[:, None]
    bend = (_LARGEST_SWING * number(Stream.SIGNAL_BEND) * scale)[:, None]
    turns = (0.5 + 1.5 * number(Stream.SIGNAL_BEND_PERIOD))[:, None]
    swing = np.sin(2 * np.pi * (turns * time + number(Stream.SIGNAL_BEND_PHASE)[:, None]))
    half_extent = np.minimum(np.abs(drift) / 2 + bend + MARGIN, channels / 2)
    places = [part.uniform(Stream.SIGNAL_HOP, 1 + signal * PANELS + panel) for panel in range(PANELS)]
    centre = half_extent + np.stack(places, 1) * (channels - 2 * half_extent)
    path = centre[:, :, None] + (drift * (time - 0.5) + bend * swing)[:, None]
    length = 0.3 + 0.7 * number(Stream.SIGNAL_PULSE_DUTY)
    start = (1 - length) * number(Stream.SIGNAL_TURN)
    # At least in the time bin in the middle.
    gate = np.abs(time - (start + length / 2)[:, None]) <= np.maximum(length / 2, 0.5 / bins)[:, None]
    return path.reshape(len(path), PANELS * bins), np.tile(gate, (1, PANELS))


def _draw_profiles(kind: Int64s, number: Numbers, is_observed: bool) -> tuple[Float64s, Bools]:
    """(n,) full widths at half maximum in channels, and whether the profile is a Lorentzian."""
    which, is_broad = number(Stream.SIGNAL_WIDTH), kind == _BROADENED
    least, more = _OBSERVED_WIDTH if is_observed else _SIMULATED_WIDTH
    return np.where(is_broad, 4 + 6 * which, least + more * which), is_broad & (number(Stream.SIGNAL_PROFILE) < 0.5)
