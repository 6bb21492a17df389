"""Simulate realistic cadences in the Kaggle layout with setigen.

Axes: P panel (6), T time bin of the whole cadence (6 x 273, the panels end to end), F frequency channel (256).
Brightness is in units of the quiet receiver's mean power. A cadence is a pure function of (seed, split, index, target,
SNR range, kinds): the number of workers does not change the bytes.
"""

import functools
import importlib
import logging
import multiprocessing
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from shard_tools.atomic_files import write_whole
from shard_tools.cadence import (
    CHANNEL_WIDTH_HZ,
    KAGGLE_SHAPE,
    OFF_POSITIONS,
    ON_POSITIONS,
    PANELS,
    TIME_BIN_SECONDS,
    npy_header,
)
from shard_tools.errors import InputError
from shard_tools.sky import CHANNELS, NOISE, PANEL_BINS, TIME_BINS, Broad, draw_sky, log_uniform
from shard_tools.snippet_files import clutter_kind
from shard_tools.system.cores import usable_cores
from shard_tools.system.progress import progress
from shard_tools.tasks.local import end_with_parent

Needle = Literal["straight", "s_curve", "pulsed", "broadened"]
KINDS: tuple[Needle, ...] = ("straight", "s_curve", "pulsed", "broadened")
_SIGNAL_COLUMNS = ("kind", "snr", "drift_rate_hz_s", "width_hz", "panels", "start_channel")
TRUTH_COLUMNS = ("id", "split", "target", *_SIGNAL_COLUMNS, "interference")
_BACKGROUND = "background"  # seeds backgrounds, so that none is a cadence of a labelled data set
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SimulateConfig:
    """Simulate cadences with setigen, in the layout of the Kaggle competition's data."""

    out: Path
    """Folder for train/, test/, train_labels.csv, sample_submission.csv and truth.csv; new or empty."""
    train: int = 1500
    """Cadences with a label; each takes 0.84 MB of disk."""
    test: int = 300
    """Cadences without a label (truth.csv has their labels)."""
    backgrounds: int = 0
    """Instead of --train and --test: this many cadences without a needle, narrowband interference or label, all under
    test/; `train.py --backgrounds` adds signals to them."""
    seed: int = 0
    """Same seed, same bytes; 0 or more."""
    workers: int = usable_cores()
    """Processes; the bytes do not depend on their number."""
    positive_share: float = 0.1
    """Share of cadences with a needle, in train and in test alike; 0 to 1."""
    snr_min: float = 100.0
    """SNR of the faintest needle, as setigen defines it: peak power, averaged along the path over the cadence's 1638
    time bins, divided by the quiet noise of such an average. 100 is 2.5 standard deviations of a pixel."""
    snr_max: float = 800.0
    """SNR of the brightest needle; needles and narrowband interference alike are log-uniform between the two."""
    train_kinds: tuple[Needle, ...] = KINDS
    """Kinds of needles, and of narrowband interference, in the train split; test always has all."""
    train_without: tuple[Broad, ...] = ()
    """Kinds of broadband interference that the train split, or the backgrounds, lack; test always has all."""

    def __post_init__(self) -> None:
        for name, least in (("train", 1), ("test", 1), ("backgrounds", 0), ("seed", 0), ("workers", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} {getattr(self, name)}: expected {least} or more")
        if not 0 <= self.positive_share <= 1:
            raise InputError(f"--positive-share {self.positive_share}: expected a share from 0 to 1")
        if not 0 < self.snr_min <= 1e6:
            raise InputError(f"--snr-min {self.snr_min}: expected an SNR above 0, up to 1e6")
        if not self.snr_min <= self.snr_max <= 1e6:
            raise InputError(f"--snr-max {self.snr_max}: expected an SNR from --snr-min ({self.snr_min}) to 1e6")
        if not self.train_kinds:
            raise InputError(f"--train-kinds: expected one or more of {', '.join(KINDS)}")


class Task(NamedTuple):
    """One cadence to simulate."""

    split: str
    number: int  # in its split
    key: str
    target: int

    def path(self, out: Path) -> Path:
        """Where its snippet lies in the data set."""
        return out / self.split / self.key[0] / f"{self.key}.npy"


def plan_tasks(config: SimulateConfig) -> list[Task]:
    """All cadences, with exactly the rounded share of needles in each split, at seeded positions."""
    tasks = []
    if config.backgrounds:
        return [Task("test", *each, 0) for each in enumerate(_keys(config.seed, _BACKGROUND, config.backgrounds))]
    for split, count in (("train", config.train), ("test", config.test)):
        order = _generator(config.seed, split, "targets").permutation(count)
        positive = set(order[: round(config.positive_share * count)].tolist())
        keys = enumerate(_keys(config.seed, split, count))
        tasks += [Task(split, number, key, int(number in positive)) for number, key in keys]
    return tasks


def _keys(seed: int, split: str, count: int) -> list[str]:
    """Keys like those of the competition."""
    return [_digest(seed, split, number).hex()[:15] for number in range(count)]


def _digest(*parts: object) -> bytes:
    return blake2b("/".join(map(str, parts)).encode(), digest_size=16).digest()


def _generator(*parts: object) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(int.from_bytes(_digest("random", *parts))))


def draw_needle_panels(rng: np.random.Generator) -> tuple[int, ...]:
    """All three ON panels (70 %), or one or two of them."""
    count = 3 if rng.random() < 0.7 else rng.integers(1, 3)
    return tuple(sorted(rng.choice(ON_POSITIONS, count, replace=False).tolist()))


def draw_interference_panels(rng: np.random.Generator) -> tuple[str, tuple[int, ...]]:
    """All panels, OFF panels only, or a needle's ON panels and one or two OFF panels: never ON panels only."""
    choice, on_panels = rng.random(), draw_needle_panels(rng)
    if choice < 0.45:
        return "narrowband_all", tuple(range(PANELS))
    if choice < 0.75:
        return "narrowband_off", tuple(panel + 1 for panel in on_panels)
    off_panels = rng.choice(OFF_POSITIONS, rng.integers(1, 3), replace=False).tolist()
    return "narrowband_gaps", tuple(sorted((*on_panels, *off_panels)))


def add_narrowband(
    rng: np.random.Generator, panels: tuple[int, ...], config: SimulateConfig, kinds: Sequence[Needle] = KINDS
) -> dict[str, Any]:
    """Add a narrowband signal of one of `kinds` to `panels` of the frame, and return its columns of truth.csv.

    Its path runs through the whole cadence, from `start_channel` in the first time bin of the cadence, and stays within
    the channels during `panels`. Needles and interference are both drawn here: only their panels differ.
    """
    setigen, frame, panel_frame = _setigen()
    kind = str(rng.choice(kinds))
    first_bin, last_bin = panels[0] * PANEL_BINS, (panels[-1] + 1) * PANEL_BINS
    steepest = min(0.5, 180 / (last_bin - first_bin))  # channels a time bin
    rate = steepest * rng.random() ** 2 * rng.choice((-1, 1))  # squared: most drifts are slow, as in the real data
    bend = rng.uniform(4, 20) if kind == "s_curve" else 0.0
    half_extent = abs(rate) * (last_bin - first_bin) / 2 + bend + 4
    start_channel = rng.uniform(half_extent, CHANNELS - half_extent) - rate * (first_bin + last_bin) / 2
    time_bins = np.arange(TIME_BINS)
    bends = bend * np.sin(2 * np.pi * time_bins / (rng.uniform(0.4, 1.5) * TIME_BINS))
    path = frame.get_frequency(start_channel + rate * time_bins + bends)  # Hz
    period, duty = rng.uniform(14, 90), rng.uniform(0.3, 0.7) if kind == "pulsed" else 1.0
    snr = log_uniform(rng, config.snr_min, config.snr_max)
    level = frame.get_intensity(snr) * (time_bins % period < duty * period)
    width = (rng.uniform(4, 10) if kind == "broadened" else rng.uniform(1.2, 2.5)) * CHANNEL_WIDTH_HZ
    lorentzian = kind == "broadened" and rng.random() < 0.5
    profile = (setigen.lorentzian_f_profile if lorentzian else setigen.gaussian_f_profile)(width)
    reach = (6 if lorentzian else 1.5) * width
    edges = frame.get_frequency(np.array((0, CHANNELS)))
    for panel in panels:
        # A panel at a time, and only the channels within reach: many times faster than on the whole frame.
        rows = slice(panel * PANEL_BINS, (panel + 1) * PANEL_BINS)
        bounds = np.clip((path[rows].min() - reach, path[rows].max() + reach), *edges)
        panel_frame.data = frame.data[rows]
        panel_frame.add_signal(path[rows], level[rows], profile, bounding_f_range=bounds)
    drift_rate = float(rate * CHANNEL_WIDTH_HZ / TIME_BIN_SECONDS)
    numbers = (round(snr, 2), round(drift_rate, 6), round(width, 3))
    values = (kind, *numbers, ";".join(map(str, panels)), round(float(start_channel), 2))
    return dict(zip(_SIGNAL_COLUMNS, values, strict=True))


def add_blip(frame: Any, rng: np.random.Generator, config: SimulateConfig) -> None:
    """Add a short, broad box in one panel, ON or OFF, as bright as a needle, so that brightness reveals nothing."""
    start = rng.integers(PANELS) * PANEL_BINS + rng.integers(PANEL_BINS - 60)
    low, width = rng.integers(CHANNELS - 40), rng.integers(6, 40)
    level = frame.get_intensity(1.5 * log_uniform(rng, config.snr_min, config.snr_max))
    frame.data[start : start + int(log_uniform(rng, 3, 60)), low : low + width] += level


@functools.cache
def _setigen() -> tuple[Any, Any, Any]:
    """setigen, a Frame of six panels and one of a single panel: making a Frame costs as much as its noise."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # setigen imports it; it logs about its fonts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        setigen: Any = importlib.import_module("setigen")  # here, since it takes two seconds
    # fch1 is not that of a real band: at this ratio to df, frequencies are as exact as channels need.
    units = {"df": CHANNEL_WIDTH_HZ, "dt": TIME_BIN_SECONDS, "fch1": 6e9 * 1024, "ascending": True}
    frame, panel_frame = (setigen.Frame(shape=(bins, CHANNELS), **units) for bins in (TIME_BINS, PANEL_BINS))
    return setigen, frame, panel_frame


def draw_cadence(
    config: SimulateConfig, task: Task, *, twin: bool = False
) -> tuple[npt.NDArray[np.float64], dict[str, Any]]:
    """Brightness (6, 273, 256) of one cadence, and its row of truth.csv.

    With `twin` the needle is in the OFF panels that follow its ON panels, as the interference "narrowband_off" is. All
    else is the same to the bit, so a twin is a negative with the background of its original. A task without a needle
    has no twin.
    """
    assert task.target or not twin, f"{task.key}: has no needle, so no twin"
    rng = _generator(config.seed, _BACKGROUND if config.backgrounds else task.split, task.number)
    _, frame, _ = _setigen()
    frame.rng = rng
    frame.zero_data()
    frame.add_noise(1, NOISE, noise_type="gaussian")
    for_training = task.split == "train" or config.backgrounds
    kinds, without = (config.train_kinds, config.train_without) if for_training else (KINDS, ())
    sky, interference = draw_sky(rng, without)
    frame.data *= sky
    # Drifting interference is rarer in real snippets, but teaches what OFF panels are for. A needle replaces one such
    # signal, so that the number of signals reveals little.
    others = rng.choice(3, p=(0.85, 0.15, 0) if task.target else (0.6, 0.32, 0.08)) if not config.backgrounds else 0
    for name, panels in [draw_interference_panels(rng) for _ in range(others)]:
        add_narrowband(rng, panels, config, kinds)
        interference.append(name)
    for _ in range(rng.choice(3, p=(0.7, 0.2, 0.1))):
        add_blip(frame, rng, config)
        interference.append("blip")
    needle: dict[str, Any] = {}
    if twin:
        add_narrowband(rng, tuple(panel + 1 for panel in draw_needle_panels(rng)), config, kinds)
        interference.append("narrowband_off")
    elif task.target:
        needle = add_narrowband(rng, draw_needle_panels(rng), config, kinds)
    about = {"id": task.key, "split": task.split, "target": 0 if twin else task.target}
    return frame.data.reshape(KAGGLE_SHAPE), about | {"interference": ";".join(sorted(interference))} | needle


def simulate_cadence(
    config: SimulateConfig, task: Task, *, twin: bool = False
) -> tuple[npt.NDArray[np.float16], dict[str, Any]]:
    """Like `draw_cadence`, but with each panel brought to mean 0 and standard deviation 1."""
    brightness, row = draw_cadence(config, task, twin=twin)
    panels = brightness.astype(np.float32)
    panels -= panels.mean(axis=(1, 2), keepdims=True)
    panels /= panels.std(axis=(1, 2), keepdims=True)
    return panels.astype(np.float16), row


def write_cadence(config: SimulateConfig, task: Task) -> dict[str, Any]:
    """Simulate one cadence, write its .npy, and return its row of truth.csv."""
    snippet, row = simulate_cadence(config, task)
    # Only the tables, written last, are durable: before that a power cut costs only the time to simulate again.
    write_whole(task.path(config.out), npy_header(snippet.shape) + snippet.tobytes(), durable=False)
    return row


def check_out(out: Path, tasks: Sequence[Task]) -> None:
    """Raise InputError if `out` holds anything but an interrupted run of these very tasks."""
    advice = "choose another --out, or empty this one"
    for name in ("train_labels.csv", "sample_submission.csv"):
        if (out / name).exists():
            raise InputError(f"--out {out}: already holds a data set ({name}); {advice}")
    ours = {task.path(out) for task in tasks} | {out / "truth.csv"}
    for path in out.rglob("*"):
        if path not in ours and not path.is_dir() and clutter_kind(path.name, is_folder=False) is None:
            raise InputError(f"--out {out}: holds {path.relative_to(out)}, not part of this simulation; {advice}")


def simulate(config: SimulateConfig) -> None:
    """Write the data set that `config` describes. Raises InputError where its folder holds something else."""
    tasks = plan_tasks(config)
    check_out(config.out, tasks)
    for folder in {task.path(config.out).parent for task in tasks}:
        folder.mkdir(parents=True, exist_ok=True)
    truth = pd.DataFrame(_write_cadences(config, tasks), columns=TRUTH_COLUMNS).sort_values("id")
    labels = truth.loc[truth["split"] == "train", ["id", "target"]]
    submission = truth.loc[truth["split"] == "test", ["id"]].assign(target=0.5)
    # The folder counts as a data set only once the tables that users read are there: they are written last.
    for name, table in (("truth", truth), ("train_labels", labels), ("sample_submission", submission)):
        if len(table):  # backgrounds have no labels
            write_whole(config.out / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    what = (
        f"{len(submission)} backgrounds"
        if config.backgrounds
        else f"{len(labels)} train and {len(submission)} test cadences"
    )
    _log.info("simulated %s in %s", what, config.out)


def _write_cadences(config: SimulateConfig, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    write = functools.partial(write_cadence, config)
    if config.workers == 1:
        return list(progress(map(write, tasks), len(tasks), "simulate"))
    # Spawned, not forked: the caller may have threads, of torch or DALI, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.workers, context, initializer=end_with_parent) as pool:
        return list(progress(pool.map(write, tasks, chunksize=8), len(tasks), "simulate"))
