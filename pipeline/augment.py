"""What happens to each training sample: pure functions of (seed, epoch, position).

The weight of a mixed target is computed here: `draw` gives the share of the pixels that a sample keeps, measured on the
clipped box in whole bins (`Draws.kept`), and `mixed_targets` weighs its target and its partner's by it.

Axes: n samples; boxes are (time start, time end, channel start, channel end) in bins of the planes, ends excluded.
"""

import itertools
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv

from pipeline.canvas import CanvasConfig
from pipeline.observed_times import ObservedPanels
from pipeline.randomness import EpochPart, Int64s, Stream
from pipeline.signals import Bools, Float64s, Numbers, SignalConfig, Signals, draw_signals, no_signals
from pipeline.simulated_signals import MOST_SIGNALS, SimulatedConfig, draw_simulated
from shard_tools.cadence import OFF_POSITIONS, ON_POSITIONS, PANELS
from shard_tools.errors import InputError

Int32s = npt.NDArray[np.int32]
Float32s = npt.NDArray[np.float32]

_ORDERS = np.array(list(itertools.permutations(range(PANELS // 2))))  # of three panels; the first changes nothing
_PERMUTED = 0.5  # default of --permute-panels where needles are added


@dataclass(frozen=True)
class DrawConfig:
    """How strongly training samples are augmented."""

    flip_frequency: float = 0.5
    """Probability of reversing frequency (0 to 1)."""
    flip_time: float = 0.5
    """Probability of reversing time (0 to 1). Never done on stack6, where it would turn ON into OFF."""
    roll_frequency: float = 0.1
    """Largest roll along frequency, as a share of the channels; wraps around."""
    shift_time: float = 0.05
    """Largest shift along time, the same in each panel, as a share of its time bins; the gap is filled with 0."""
    erase: float = 0.1
    """Probability of setting a box in one panel to 0 (0 to 1)."""
    erase_size: float = 0.25
    """Largest side of that box, as a share of the panel's side."""
    gain: float = 0.1
    """Largest relative change of the brightness: a factor of 1 - gain to 1 + gain."""
    offset: float = 0.1
    """Largest brightness added or subtracted, in standard deviations of a panel."""
    cutmix: float = 0.5
    """Probability of CutMix with the neighbour in the shuffled epoch (0 to 1)."""
    cutmix_alpha: float = 1.0
    """The share to keep is drawn from Beta(alpha, alpha); a box that is clipped at an edge keeps more."""
    cutmix_box: Literal["box", "band"] = "box"
    """box: the same box of time and frequency in each panel. band: all time bins of a band of channels."""
    mixup: float = 0.0
    """Probability of mixup, a weighted mean with the same neighbour, instead of CutMix (0 to 1)."""
    mixup_alpha: float = 1.0
    """A weight w is drawn from Beta(alpha, alpha); the sample's own pixels keep max(w, 1 - w)."""
    mixup_epochs: int = 0
    """Number of epochs with mixup, from the first one on; 0: all."""
    mix_target: Literal["area", "or"] = "area"
    """Target after CutMix or mixup. area: both targets, weighted by the share of the pixels. or: the larger one."""
    inject: float = 0.0
    """Probability of adding a narrowband signal to the snippet (0 to 1): a needle, whose target is then 1, or
    interference, which leaves the target as it is."""
    inject_interference: float = 0.35
    """Share of the added signals that are interference: in OFF panels only, or in all panels."""
    inject_snr_min: float = 0.3
    """Smallest peak of an added signal, in standard deviations of a pixel's noise in its panel."""
    inject_snr_max: float = 5.0
    """Largest peak that is drawn. Peaks are log-uniform between the two; each pair of an ON and an OFF panel is then
    scaled by 0.58 to 1.73."""
    needles: float | None = None
    """For cadences without needles (--backgrounds): probability of adding a needle (0 to 1), whose target is then 1.
    Narrowband interference is added too, whether or not there is a needle, as `shard_tools simulate` does. In snippets
    of `ingest` signals drift at up to the --max-drift that they were cut for. Unset: 0.5 with --backgrounds, else
    nothing is added."""
    signal_snr_min: float = 100.0
    """With needles, SNR of the faintest added signal, as setigen defines it: its peak in standard deviations of a
    pixel's noise, times the square root of the cadence's time bins. 100 is 2.5 standard deviations with 1638 bins."""
    signal_snr_max: float = 3000.0
    """With needles, SNR of the brightest added signal; they are log-uniform between the two."""
    permute_panels: float | None = None
    """Probability of shuffling the ON panels among themselves, and the OFF panels among themselves, before any signal
    is added (0 to 1). Unset: 0.5 with needles, else 0."""

    def __post_init__(self) -> None:
        shares = ("flip_frequency", "flip_time", "erase", "erase_size", "roll_frequency", "shift_time", "cutmix")
        for name in (*shares, "mixup", "inject", "inject_interference"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected 0 to 1")
        self._check_added()
        if not 0 <= self.gain < 1 or self.offset < 0 or min(self.cutmix_alpha, self.mixup_alpha) <= 0:
            raise InputError(
                f"--gain {self.gain} --offset {self.offset} --cutmix-alpha {self.cutmix_alpha} --mixup-alpha "
                f"{self.mixup_alpha}: expected 0 <= gain < 1, offset >= 0, alphas > 0"
            )
        if self.mixup_epochs < 0:
            raise InputError(f"--mixup-epochs {self.mixup_epochs}: expected 0 or more")
        if not 0 < self.inject_snr_min <= self.inject_snr_max <= 1e4:
            raise InputError(
                f"--inject-snr-min {self.inject_snr_min} --inject-snr-max {self.inject_snr_max}: "
                "expected 0 < min <= max <= 10000"
            )

    def _check_added(self) -> None:
        for name in ("needles", "permute_panels"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected 0 to 1")
        if not 0 < self.signal_snr_min <= self.signal_snr_max <= 1e6:
            raise InputError(
                f"--signal-snr-min {self.signal_snr_min} --signal-snr-max {self.signal_snr_max}: "
                "expected 0 < min <= max <= 1000000"
            )
        if self.needles is not None and self.inject:
            raise InputError(
                f"--needles {self.needles} --inject {self.inject}: expected one of the two; needles are for cadences "
                "without any, inject is for labelled ones"
            )

    @property
    def permuted(self) -> float:
        """Probability of shuffling panels; see `permute_panels`."""
        if self.permute_panels is None:
            return 0.0 if self.needles is None else _PERMUTED
        return self.permute_panels

    @property
    def most_signals(self) -> int:
        """S: the largest number of signals that are added to a sample."""
        return MOST_SIGNALS if self.needles is not None else int(self.inject > 0)


@dataclass(frozen=True)
class Draws:
    """The decisions for n samples."""

    flip_frequency: Int32s
    """(n,) 0 or 1."""
    flip_time: Int32s
    """(n,) 0 or 1."""
    roll: Int32s
    """(n,) channels to roll by, towards channel 0; 0 to F - 1."""
    shift: Int32s
    """(n,) time bins to shift each panel by, towards its start."""
    gain: Float32s
    """(n,)"""
    offset: Float32s
    """(n,)"""
    erase_start: Float32s
    """(n, 3) first plane, time bin and channel of the erased box."""
    erase_shape: Float32s
    """(n, 3) its size in planes, time bins and channels; 0 where nothing is erased."""
    cutmix_box: Int32s
    """(n, 4) the box that is taken from the partner; empty where none is."""
    partner: npt.NDArray[np.integer[Any]]
    """(n,) position of the partner in the epoch; in a planned batch its slot."""
    mixed: Float32s
    """(n,) the weight of the partner in mixup; 0 without mixup."""
    kept: Float64s
    """(n,) the share of the image that is the sample's own after CutMix or mixup."""
    signal_path: Float32s
    """(n, S, N, t) empty where nothing is added; see Signals for this field and the next three."""
    signal_level: Float32s
    """(n, S, N, t)"""
    signal_width: Float32s
    """(n, S)"""
    signal_lorentzian: Bools
    """(n, S)"""
    signal_normalised: Bools
    """(n,) whether signals are added, and panels that hold one normalised again, before time bins are summed."""
    has_needle: Bools
    """(n,) whether a needle was added."""
    panel_order: Int32s
    """(n, P) which of the cadence's panels each position shows."""

    def at(self, samples: slice) -> Self:
        """The decisions for some of the samples."""
        return type(self)(**{name: values[samples] for name, values in vars(self).items()})


def partner_positions(positions: Int64s, length: int) -> Int64s:
    """Positions 2k and 2k + 1 are partners; the last of an odd number of positions is its own partner.

    The order of an epoch is random, and so are these pairs. If the batch size is even, both of a pair are in one batch,
    and no sample has to be read twice.
    """
    partners = positions ^ 1
    return np.where(partners < length, partners, positions)


def draw(
    config: DrawConfig,
    canvas: CanvasConfig,
    planes: tuple[int, int, int],
    part: EpochPart,
    observed: ObservedPanels | None = None,
) -> Draws:
    """Draw for positions of an epoch; `planes` is the shape (N, T, F) before the canvas is resized.

    `observed` has the times of the samples' panels, if they are from an observation and signals are added.
    """
    _, time_bins, channels = planes

    def within(stream: Stream, largest: float) -> Float64s:
        return (2 * part.uniform(stream) - 1) * largest

    largest_roll, largest_shift = int(config.roll_frequency * channels), int(config.shift_time * time_bins)
    erase_shape, erase_start = _draw_erased(config, planes, part.uniform)
    box, mixed = _draw_cutmix_box(config, time_bins, channels, part.uniform), _draw_mixed(config, part)
    partner = partner_positions(part.positions, part.length)
    alone = partner == part.positions
    mixed[alone] = 0
    box[alone | (mixed > 0)] = 0
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    signals = _draw_signals(config, canvas, planes, part, observed)
    return Draws(
        flip_frequency=(part.uniform(Stream.FLIP_FREQUENCY) < config.flip_frequency).astype(np.int32),
        flip_time=((part.uniform(Stream.FLIP_TIME) < config.flip_time) & canvas.flips_time).astype(np.int32),
        roll=(np.rint(within(Stream.ROLL, largest_roll)).astype(np.int32) % channels).astype(np.int32),
        shift=np.rint(within(Stream.SHIFT, largest_shift)).astype(np.int32),
        gain=(1 + within(Stream.GAIN, config.gain)).astype(np.float32),
        offset=within(Stream.OFFSET, config.offset).astype(np.float32),
        erase_start=erase_start,
        erase_shape=erase_shape,
        cutmix_box=box,
        partner=partner,
        mixed=mixed,
        kept=1 - mixed.astype(np.float64) - area / (time_bins * channels),
        signal_path=signals.path,
        signal_level=signals.level,
        signal_width=signals.width,
        signal_lorentzian=signals.lorentzian,
        signal_normalised=np.full(len(part), config.needles is not None),
        has_needle=signals.is_needle,
        panel_order=_draw_panel_order(config, part.uniform),
    )


def mixed_targets(
    config: DrawConfig, draws: Draws, own: npt.NDArray[np.int8], partner: npt.NDArray[np.int8]
) -> Float32s:
    """(n,) targets after CutMix and mixup, from the samples' own targets and their partners'."""
    if config.mix_target == "or":
        return np.where(draws.kept < 1, np.maximum(own, partner), own).astype(np.float32)
    return (draws.kept * own + (1 - draws.kept) * partner).astype(np.float32)


def _draw_signals(
    config: DrawConfig,
    canvas: CanvasConfig,
    planes: tuple[int, int, int],
    part: EpochPart,
    observed: ObservedPanels | None,
) -> Signals:
    if not config.most_signals:
        return no_signals(len(part))
    _, time_bins, channels = planes
    shape = (time_bins * canvas.sum_time_bins, channels)
    if config.needles is not None:
        simulated = SimulatedConfig(config.needles, config.signal_snr_min, config.signal_snr_max)
        return draw_simulated(simulated, canvas.positions, shape, part, observed)
    kinds = SignalConfig(config.inject, config.inject_interference, config.inject_snr_min, config.inject_snr_max)
    return draw_signals(kinds, canvas.positions, shape, part.uniform)


def _draw_panel_order(config: DrawConfig, number: Numbers) -> Int32s:
    """(n, P) an order of the ON panels among themselves, and one of the OFF panels."""
    is_permuted = number(Stream.PERMUTE) < config.permuted
    order = np.empty((len(is_permuted), PANELS), np.int32)
    for positions, stream in ((ON_POSITIONS, Stream.PERMUTE_ON), (OFF_POSITIONS, Stream.PERMUTE_OFF)):
        drawn = _ORDERS[np.floor(len(_ORDERS) * number(stream)).astype(int) * is_permuted]
        order[:, positions] = np.array(positions)[drawn]
    return order


def _draw_mixed(config: DrawConfig, part: EpochPart) -> Float32s:
    """(n,) weights of the partners by Zhang et al. 2018 (arXiv:1710.09412), at most 1/2."""
    if config.mixup_epochs and part.epoch >= config.mixup_epochs:
        return np.zeros(len(part), np.float32)
    weight = betaincinv(config.mixup_alpha, config.mixup_alpha, part.uniform(Stream.MIXUP_KEEP))
    mixed = np.where(part.uniform(Stream.MIXUP) < config.mixup, np.minimum(weight, 1 - weight), 0)
    return mixed.astype(np.float32)


def _draw_erased(config: DrawConfig, planes: tuple[int, int, int], number: Numbers) -> tuple[Float32s, Float32s]:
    panel_count, time_bins, channels = planes
    erased = number(Stream.ERASE) < config.erase
    height = np.ceil(number(Stream.ERASE_TIME_BINS) * config.erase_size * time_bins)
    width = np.ceil(number(Stream.ERASE_CHANNELS) * config.erase_size * channels)
    starts = (
        np.floor(number(Stream.ERASE_PANEL) * panel_count),
        np.floor(number(Stream.ERASE_TIME_START) * (time_bins - height + 1)),
        np.floor(number(Stream.ERASE_CHANNEL_START) * (channels - width + 1)),
    )
    shape = np.stack([np.ones_like(height), height, width], axis=1) * erased[:, None]
    return shape.astype(np.float32), np.stack(starts, axis=1).astype(np.float32)


def _draw_cutmix_box(config: DrawConfig, time_bins: int, channels: int, number: Numbers) -> Int32s:
    """(n, 4) boxes by Yun et al. 2019 (arXiv:1905.04899): of area 1 - kept around a uniform centre, then clipped."""
    cut = 1 - betaincinv(config.cutmix_alpha, config.cutmix_alpha, number(Stream.CUTMIX_KEEP))
    cut = np.where(number(Stream.CUTMIX) < config.cutmix, cut, 0)
    side = np.sqrt(cut) if config.cutmix_box == "box" else cut
    channel_start, channel_end = _clipped(number(Stream.CUTMIX_CHANNEL_CENTRE), side, channels)
    if config.cutmix_box == "box":
        time_start, time_end = _clipped(number(Stream.CUTMIX_TIME_CENTRE), side, time_bins)
    else:
        time_start, time_end = np.zeros_like(channel_start), np.full_like(channel_end, time_bins)
    box = np.stack([time_start, time_end, channel_start, channel_end], axis=1)
    box[(channel_start == channel_end) | (time_start == time_end)] = 0
    return box


def _clipped(centre: Float64s, side: Float64s, size: int) -> tuple[Int32s, Int32s]:
    """Bins of an interval around `centre` that is `side` long, both as shares of `size`; clipped to 0 to `size`."""
    half = np.rint(side * size).astype(np.int32)
    start = np.floor(centre * size).astype(np.int32) - half // 2
    return np.clip(start, 0, size).astype(np.int32), np.clip(start + half, 0, size).astype(np.int32)
