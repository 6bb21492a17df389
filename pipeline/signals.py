"""Signals that are added to training samples: needles, and interference that looks like them. Pure.

This file has the signals of --inject, at most one per sample; pipeline/simulated_signals.py has those of --needles.

Axes: n samples, S signals of a sample, N planes of the canvas, t time bins of a snippet's panel, P panels;
F frequency channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pipeline.randomness import Stream
from shard_tools.cadence import ON_POSITIONS, PANELS

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Numbers = Callable[[Stream], Float64s]  # one uniform number for each sample

_SUBSETS = np.array([(1, 1, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)], bool)
"""Which of three panels hold a signal."""
_ALL_THREE = 0.5  # share of the signals that are in all three
# Largest ratio of a signal's levels in the three pairs of an ON and an OFF panel. They differ because each panel of a
# snippet is normalised by itself.
_BALANCE = 3.0
_PAIRS = (Stream.SIGNAL_PAIR_1, Stream.SIGNAL_PAIR_2, Stream.SIGNAL_PAIR_3)
# The mean of sqrt|x - y| of two values of white noise of standard deviation 1: 2^(1/2) Gamma(3/4) / pi^(1/2).
NEIGHBOUR_ROOT = 0.9777412
# Half widths at half maximum from its centre at which a Lorentzian profile ends. Its value there is subtracted from the
# whole profile, so that it ends in 0 and not in a step.
LORENTZIAN_REACH = 15.0
LORENTZIAN_END = 1 / (1 + LORENTZIAN_REACH**2)
MARGIN = 4.0  # channels that a path keeps from the edges
SIGMA = 1 / 2.355  # standard deviation of a Gaussian over its full width at half its maximum


@dataclass(frozen=True)
class SignalConfig:
    """Which signals are added, and how often; see DrawConfig."""

    share: float
    """Share of all samples that get a signal."""
    interference: float
    """Share of the signals that are interference."""
    snr_min: float
    snr_max: float


@dataclass(frozen=True)
class Signals:
    """The signals of each sample; the level is 0 where a sample has fewer than S."""

    path: Float32s
    """(n, S, N, t) channel of its centre in each time bin."""
    level: Float32s
    """(n, S, N, t) its peak there, in standard deviations of the panel's noise."""
    width: Float32s
    """(n, S) of its profile in channels: a Gaussian's standard deviation, a Lorentzian's half width at half maximum."""
    lorentzian: Bools
    """(n, S) whether its profile is a Lorentzian."""
    is_needle: Bools
    """(n,) whether one of them is a needle, so that the target is 1."""


@dataclass(frozen=True)
class Times:
    """When the panels and time bins of cadences were, as shares of the cadence's length, 0 to 1."""

    bins: Float64s
    """(n, P t) start of each time bin."""
    begins: Float64s
    """(n, P) start of each panel."""
    ends: Float64s
    """(n, P) end of each panel."""

    @cached_property
    def step(self) -> Float64s:
        """(n,) length of a time bin."""
        return np.asarray(self.bins[:, 1] - self.bins[:, 0])

    def at(self, rows: npt.NDArray[np.int64]) -> "Times":
        """The times of some samples."""
        return Times(self.bins[rows], self.begins[rows], self.ends[rows])

    def first_and_last(self, panels: Bools) -> tuple[Float64s, Float64s]:
        """Start of the first and end of the last of the panels (n, P) that hold a signal."""
        return self.begin(panels.argmax(axis=1)), self.end(PANELS - 1 - panels[:, ::-1].argmax(axis=1))

    def begin(self, panel: npt.NDArray[np.int64]) -> Float64s:
        """(n,) when a panel (n,) of each sample began."""
        return _of_panel(self.begins, panel)

    def end(self, panel: npt.NDArray[np.int64]) -> Float64s:
        """(n,) when a panel (n,) of each sample ended."""
        return _of_panel(self.ends, panel)


def _of_panel(values: Float64s, panel: npt.NDArray[np.int64]) -> Float64s:
    return np.asarray(values[np.arange(len(panel)), panel])


def end_to_end(count: int, bins: int) -> Times:
    """The times of `count` samples of panels that follow each other without pauses, as the competition's do."""
    time, panel = np.arange(PANELS * bins) / (PANELS * bins), np.arange(PANELS)
    begins, ends = panel / PANELS, 1 - (PANELS - 1 - panel) / PANELS
    return Times(*(np.broadcast_to(each, (count, len(each))) for each in (time, begins, ends)))


@dataclass(frozen=True)
class Curves:
    """What n paths are made of."""

    drift: Float64s
    """(n,) channels over the cadence."""
    bend: Float64s
    """(n,) channels that it swings to either side."""
    turns: Float64s
    """(n,) swings in a cadence."""
    phase: Float64s
    """(n,) of its swing, 0 to 1."""
    centre: Float64s
    """(n,) where it lies among the places that it may take, 0 to 1."""


def no_signals(count: int) -> Signals:
    """Empty signals for `count` samples, so that engines skip the step."""
    nothing, none = np.zeros((count, 0, 0, 0), np.float32), np.zeros((count, 0), bool)
    return Signals(nothing, nothing, none.astype(np.float32), none, np.zeros(count, bool))


def draw_signals(config: SignalConfig, positions: tuple[int, ...], shape: tuple[int, int], number: Numbers) -> Signals:
    """A signal for a share of the samples, on the planes that show `positions`; `shape` is (t, F).

    As in the simulated data (shard_tools/simulate.py) a path is straight or bent, and the signal is steady, pulsed or
    present for part of the time. A needle is in one to three ON panels. Three quarters of the interference is in one to
    three OFF panels, the rest in all six.
    """
    bins, channels = shape
    panels, is_needle = _draw_panels(config.interference, number)
    time = end_to_end(len(panels), bins)
    present = number(Stream.SIGNAL) < config.share
    first, last = time.first_and_last(panels)
    path = lay_paths(time.bins, channels, first, last, _draw_curves(channels, first, last, number))
    levels = draw_snr(config.snr_min, config.snr_max, number) * present
    everywhere = np.asarray(panels.all(axis=1))
    gate = _draw_gates(time.bins, first, last, everywhere, number)
    balance = _BALANCE ** (np.stack([number(pair) for pair in _PAIRS], axis=1) - 0.5)
    level = levels[:, None] * np.repeat(panels * np.repeat(balance, 2, axis=1), bins, axis=1) * gate
    by_panel = (len(path), 1, PANELS, bins)
    return Signals(
        path=path.reshape(by_panel)[:, :, positions].astype(np.float32, order="C"),
        level=level.reshape(by_panel)[:, :, positions].astype(np.float32, order="C"),
        width=(SIGMA * _draw_widths(number)).astype(np.float32)[:, None],
        lorentzian=np.zeros((len(path), 1), bool),
        is_needle=is_needle & present,
    )


def draw_subsets(which: Float64s, all_three: float) -> Bools:
    """(n, 3) all of three panels for a share `all_three` of the numbers `which`, else one or two of them."""
    rest = np.floor((which - all_three) / (1 - all_three) * (len(_SUBSETS) - 1)).astype(int) + 1
    return np.asarray(_SUBSETS[np.where(which < all_three, 0, np.minimum(rest, len(_SUBSETS) - 1))])


def draw_snr(smallest: float, largest: float, number: Numbers) -> Float64s:
    """(n,) log-uniform between the two."""
    return np.asarray(np.exp(np.log(smallest) + number(Stream.SIGNAL_SNR) * np.log(largest / smallest)))


def lay_paths(time: Float64s, channels: int, first: Float64s, last: Float64s, curves: Curves) -> Float64s:
    """(n, P t) centres at the times `time` (n, P t); they stay among the channels from time `first` to `last`."""
    drift, bend = curves.drift, curves.bend
    half_extent = np.minimum(np.abs(drift) * (last - first) / 2 + bend + MARGIN, channels / 2)
    centre = half_extent + curves.centre * (channels - 2 * half_extent)
    path = centre[:, None] + drift[:, None] * (time - (first + last)[:, None] / 2)
    bent = np.flatnonzero(bend)  # few of them, and a sine takes longer than all the rest
    swing = np.sin(2 * np.pi * (curves.turns[bent, None] * time[bent] + curves.phase[bent, None]))
    path[bent] += bend[bent, None] * swing
    return np.asarray(path)


def _draw_panels(interference: float, number: Numbers) -> tuple[Bools, Bools]:
    """(n, P) which panels hold the signal, and (n,) whether only ON panels do."""
    place = number(Stream.SIGNAL_PLACE)
    panels = np.zeros((len(place), PANELS), bool)
    panels[:, ON_POSITIONS[0] :: 2] = draw_subsets(number(Stream.SIGNAL_PANELS), _ALL_THREE)
    panels[place < interference] = panels[place < interference][:, [1, 0, 3, 2, 5, 4]]
    panels[place < interference / 4] = True
    return panels, place >= interference


def _draw_curves(channels: int, first: Float64s, last: Float64s, number: Numbers) -> Curves:
    which = number(Stream.SIGNAL_DRIFT)
    # Squared: most drifts are slow, as in the real data.
    drift = np.where(which < 0.5, -1, 1) * (2 * which % 1) ** 2 * np.minimum(0.7 * channels / (last - first), 800)
    bend = np.where(number(Stream.SIGNAL_KIND) < 0.3, 2 + 18 * number(Stream.SIGNAL_BEND), 0)
    turns = 1 / (0.3 + 1.2 * number(Stream.SIGNAL_BEND_PERIOD))
    return Curves(drift, bend, turns, number(Stream.SIGNAL_BEND_PHASE), number(Stream.SIGNAL_CENTRE))


def _draw_gates(time: Float64s, first: Float64s, last: Float64s, everywhere: Bools, number: Numbers) -> Bools:
    """(n, P t) when a signal is on: always, in pulses, or from or until some time."""
    # Interference in all panels is always on: if it stopped after an ON panel, it would be a needle.
    kind = np.where(everywhere, 1, number(Stream.SIGNAL_GATE))[:, None]
    period = (0.01 + 0.05 * number(Stream.SIGNAL_PULSE_PERIOD))[:, None]
    pulses = time % period < period * (0.3 + 0.4 * number(Stream.SIGNAL_PULSE_DUTY))[:, None]
    # Not too near either end, or nothing of the signal would remain.
    turn = (first + (last - first) * (0.1 + 0.8 * number(Stream.SIGNAL_TURN)))[:, None]
    kinds = [kind < 0.15, kind < 0.25, kind < 0.35]
    return np.asarray(np.select(kinds, [pulses, time >= turn, time < turn], True), bool)


def _draw_widths(number: Numbers) -> Float64s:
    """(n,) full width at half maximum in channels: 1 to 2.5, and for a tenth of them 4 to 10."""
    which = number(Stream.SIGNAL_WIDTH)
    return np.where(which < 0.9, 1 + 1.5 * which / 0.9, 4 + 60 * (which - 0.9))
