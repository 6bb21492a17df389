"""What does training on more cadences buy? Trains one recipe on ever more cadences, and scores each training.

    python benchmarks/learning_curve.py

Backgrounds are simulated once, and the plan adds other signals to them in each epoch, so that no cadence is seen twice.
Each point is a training of its own, from random weights to the end of its schedule. All points, the untrained network
and the classical search are scored on the test split of the needle benchmark. The picture goes to
benchmarks/results/learning_curve.png, the table to the history.
"""

import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import tyro

from benchmarks.history import RESULTS, record
from benchmarks.needles.charts import write_learning_curve
from benchmarks.needles.config import NeedleBenchConfig, simulated_splits
from benchmarks.needles.data import NeedleSet, pack_real, simulate_backgrounds, simulate_set
from benchmarks.needles.recipes import CLASSICAL, UNTRAINED
from benchmarks.needles.rows import classical_scores, predicted, run_program
from benchmarks.needles.scores import Runs, ahead_figure, real_figure, simulated_figure
from shard_tools.atomic_files import write_whole
from shard_tools.errors import InputError
from shard_tools.system.command import run_command
from shard_tools.system.cores import bound_cores, usable_cores

_NOTHING = "--learning-rate 1e-12 --min-learning-rate 0"
Figure = dict[str, Any]
Rows = dict[str, tuple[Figure, dict[str, Runs]]]
"""For each row's name: its figures, and the scores of each of its trainings by the names of `Curve.sets`."""


@dataclass(frozen=True)
class CurveConfig:
    """Train on ever more cadences with fresh signals, and score each training."""

    cadences: tuple[int, ...] = (1_000, 3_000, 10_000, 30_000, 100_000, 200_000)
    """Cadences that each training sees."""
    backgrounds: int = 10_000
    """Most backgrounds; a training on more cadences uses them again, with other signals."""
    runs: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    """Trainings of each point, from seeds of their own; the mean is shown."""
    at_once: int = usable_cores()
    """Trainings at the same time, each bound to cores of its own."""
    recipe: str = "--preset demo"
    """Words for train.py."""
    test: int = 2_000
    """Cadences of the test split, half of them with a needle."""
    seed: int = 0
    """Seed of the data and of the first training."""
    real: Path | None = None
    """Folder in the Kaggle layout: its positives, and the same with ON and OFF panels exchanged, are scored too."""
    labelled: int = 2_000
    """Cadences of the train split: the best epoch is chosen by a tenth of them; the others are not used."""
    out: Path | None = None
    """Folder for the picture; unset: benchmarks/results, or no picture if other options change what is measured."""
    keep: Path | None = None
    """File for the weights of the last point."""
    work_dir: Path = Path(tempfile.gettempdir())
    """Folder for data and runs: 0.84 MB for each background, 2.1 MB for each test cadence, removed at the end."""

    def __post_init__(self) -> None:
        if not self.cadences or list(self.cadences) != sorted(set(self.cadences)) or self.cadences[0] < 1:
            raise InputError(f"--cadences {self.cadences}: expected rising numbers from 1 on")
        if len(self.runs) != len(self.cadences) or min(self.runs) < 1:
            raise InputError(f"--runs {self.runs}: expected a number of at least 1 for each of --cadences")
        if not 1 <= self.at_once <= bound_cores():
            raise InputError(f"--at-once {self.at_once}: expected 1 to {bound_cores()}, the cores of this process")
        if self.backgrounds < 1:
            raise InputError(f"--backgrounds {self.backgrounds}: expected at least 1")


@dataclass(frozen=True)
class Curve:
    """The data that all points share."""

    config: CurveConfig
    folder: Path
    needles: NeedleSet
    real: NeedleSet | None
    backgrounds: list[tuple[int, Path]]
    """Data sets of backgrounds, with their numbers of cadences."""

    @property
    def sets(self) -> dict[str, NeedleSet]:
        """The sets of needles that are scored, by name."""
        return {"simulated": self.needles} | ({"real": self.real} if self.real else {})


def build_curve(config: CurveConfig, folder: Path) -> Curve:
    """Simulate and pack everything."""
    base = simulated_splits(NeedleBenchConfig(train=config.labelled, test=config.test, seed=config.seed), folder)
    needles = simulate_set(folder / "simulated", base)
    sizes = background_sizes(config)
    sets = []
    for number, size in enumerate(sizes):
        another = dataclasses.replace(base, seed=config.seed + 1000 + number)
        sets.append((size, simulate_backgrounds(folder / f"backgrounds-{number}", another, size)))
    real = pack_real(folder / "real", config.real) if config.real else None
    return Curve(config, folder, needles, real, sets)


def background_sizes(config: CurveConfig) -> list[int]:
    """Sizes of the data sets of backgrounds: the first n together are what the n-th training needs."""
    wanted = [min(count, config.backgrounds) for count in config.cadences]
    return [size for size in np.diff([0, *wanted]).tolist() if size]


@dataclass(frozen=True)
class Trained:
    """One training and its scores."""

    figure: Figure
    scores: dict[str, pd.Series]
    """By the names of `Curve.sets`."""
    weights: Path


@dataclass(frozen=True)
class Point:
    """A row: several trainings, each from its own seed."""

    name: str
    cadences: int
    runs: int
    more: str = ""
    """Words for train.py after those of the recipe."""


def train_point(curve: Curve, point: Point, seed: int) -> Trained:
    """Train once and score."""
    sizes = np.cumsum([size for size, _ in curve.backgrounds])
    used = int(np.searchsorted(sizes, min(point.cadences, curve.config.backgrounds))) + 1
    in_epoch, epochs = int(sizes[used - 1]), max(1, round(point.cadences / sizes[used - 1]))
    run_dir = curve.folder / "runs" / point.name / str(seed)
    words = [*curve.config.recipe.split(), "--backgrounds", *(shards for _, shards in curve.backgrounds[:used])]
    words += ["--shards", curve.needles.shards, "--run-dir", run_dir, "--epochs", epochs, "--seed", seed]
    print(f"{point.name}: training on {epochs} x {in_epoch:,} cadences, seed {seed}", flush=True)
    began = time.perf_counter()
    run_program("train.py", *words, "--tracker", "none", "--checkpoint-minutes", 0, *point.more.split())
    figure = {"cadences": epochs * in_epoch, "train_s": time.perf_counter() - began}
    weights = run_dir / "best.safetensors"
    scores = {name: predicted(needles, weights, run_dir / f"{name}.csv") for name, needles in curve.sets.items()}
    return Trained(figure, scores, weights)


@contextmanager
def cores_shared(at_once: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads, each bound to cores of its own, as are the programs that it starts."""
    if not hasattr(os, "sched_setaffinity"):
        with ThreadPoolExecutor(at_once) as pool:
            yield pool
        return
    cores, shares = sorted(os.sched_getaffinity(0)), SimpleQueue[list[int]]()
    for number in range(at_once):
        shares.put(cores[number::at_once])
    with ThreadPoolExecutor(at_once, initializer=lambda: os.sched_setaffinity(0, shares.get())) as pool:
        yield pool


def measure(curve: Curve) -> list[Figure]:
    """A figure for each point, for the untrained network and for the classical search."""
    config = curve.config
    classical: dict[str, Runs] = {name: (classical_scores(needles)[0],) for name, needles in curve.sets.items()}
    rows: Rows = {CLASSICAL: ({"row": CLASSICAL}, classical)}
    points = [untrained_point(config)]
    points += [Point(f"{count:,}", count, runs) for count, runs in zip(config.cadences, config.runs, strict=True)]
    trainings: list[Trained] = []
    for point, trainings in train_points(curve, points):
        rows[point.name] = to_row(point, trainings)
        _print(curve, point.name, rows)
    rows[UNTRAINED][0]["cadences"] = 0
    if config.keep:
        write_whole(config.keep, trainings[-1].weights.read_bytes())
    return [figure_of(curve, name, rows, UNTRAINED) for name in rows]


def untrained_point(config: CurveConfig) -> Point:
    """The network before training: trained for an epoch at a rate of almost zero."""
    return Point(UNTRAINED, min(config.cadences[0], config.backgrounds), config.runs[0], _NOTHING)


def train_points(curve: Curve, points: Sequence[Point]) -> Iterator[tuple[Point, list[Trained]]]:
    """The trainings of each point, in order, though several run at once."""
    with cores_shared(curve.config.at_once) as pool:
        started: dict[str, list[Future[Trained]]] = {}
        for point in sorted(points, key=lambda each: -each.cadences):  # longest first, so that the cores end together
            seeds = range(curve.config.seed, curve.config.seed + point.runs)
            started[point.name] = [pool.submit(train_point, curve, point, seed) for seed in seeds]
        for point in points:
            yield point, [each.result() for each in started[point.name]]


def to_row(point: Point, trainings: Sequence[Trained]) -> tuple[Figure, dict[str, Runs]]:
    """A row's mean seconds, and the scores of all its trainings by the names of `Curve.sets`."""
    seconds = float(np.mean([each.figure["train_s"] for each in trainings]))
    scores: dict[str, Runs] = {name: [one.scores[name] for one in trainings] for name in trainings[0].scores}
    return {"row": point.name, **trainings[0].figure, "train_s": seconds}, scores


def figure_of(curve: Curve, name: str, rows: Rows, base: str) -> Figure:
    """All figures of one row, and how far it is ahead of the row `base` on the same cadences."""
    seed, (figure, scores) = curve.config.seed, rows[name]
    figure = figure | simulated_figure(curve.needles, scores["simulated"], seed) | {"workload": "curve"}
    if curve.real:
        figure |= real_figure(curve.real, scores["real"], seed)
    if name != base and base in rows:
        figure |= ahead_figure(curve.needles, curve.real, scores, rows[base][1], seed)
    return figure


def _print(curve: Curve, name: str, rows: Rows) -> None:
    figure = figure_of(curve, name, rows, UNTRAINED)
    shown = ("auc", "recall_1e2", "recall_1e3", "real_auc")
    print(name, {each: figure[each] for each in shown if each in figure}, flush=True)


def print_table(figures: Sequence[Figure], base: str) -> None:
    """The rows, in 80 columns; `base` is the row with which the others are compared."""
    print(f"\n{'':<16}{'AUC':>7}{f'ahead of {base}':>26}{'1e-2':>7}{'1e-3':>7}{'real':>7}{'s':>7}")
    for figure in figures:
        ahead = ""
        if "ahead_auc" in figure:
            ahead = f"{figure['ahead_auc']:+.4f} ({figure['ahead_auc_low']:+.4f}, {figure['ahead_auc_high']:+.4f})"
        cells = [("auc", ".4f"), ("recall_1e2", ".3f"), ("recall_1e3", ".3f"), ("real_auc", ".3f"), ("train_s", ".0f")]
        auc, *rest = (_cell(figure.get(name), form) for name, form in cells)
        name = figure["row"] if len(figure["row"]) < 16 else f"{figure['row']}\n"  # figures go below a long name
        indent = "" if len(figure["row"]) < 16 else " " * 16
        print(f"{name:<16}{indent}{auc:>7}{ahead:>26}" + "".join(f"{each:>7}" for each in rest))
    print("1e-2, 1e-3: recall at these false positive rates. real: AUC of real needles")
    print("against their twins. s: seconds of training. Intervals: 95 %, same cadences.")


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main(config: CurveConfig) -> int:
    """Measure, print, draw, record; return the exit code."""
    with tempfile.TemporaryDirectory(dir=config.work_dir) as folder:
        figures = measure(build_curve(config, Path(folder)))
    print_table(figures, "untrained")
    kept = {name: getattr(config, name) for name in ("real", "out", "keep", "work_dir", "at_once")}
    is_part = config != CurveConfig(**kept)
    out = config.out or (None if is_part else RESULTS)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_learning_curve(out / "learning_curve.png", figures)
    about = {
        name: value for name, value in dataclasses.asdict(config).items() if name not in ("work_dir", "keep", "out")
    }
    about |= {"is_part": is_part, "real": config.real.name if config.real else None}
    record("curve", about, figures)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(tyro.cli(CurveConfig))))
