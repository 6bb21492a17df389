"""Which recipe finds needles best? Trains recipes on the same simulated data for the same time, and scores them.

    make needles ARGS="--real DIR"
    python benchmarks/needle_bench.py [--real DIR] [--check]
    python benchmarks/needle_bench.py --quick

benchmarks/needle_rows.py lists the recipes, each a command line of train.py that anyone can repeat; beside them stand a
classical de-Doppler search and trivial statistics, which learn nothing. Each recipe first runs for seconds on a few
cadences, which says how many epochs fit into --minutes, and is then trained from several seeds. Ours is compared with
every other row on the same cadences. The test split has kinds of needles and of interference that the train split has
not. There is a form for two CPU cores (half an hour) and one for a GPU, which has not run yet. Pictures, of the first
run of each row, go to benchmarks/results/needle_*.png.
"""

import dataclasses
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
import tyro

from benchmarks.history import RESULTS, record
from benchmarks.needle_charts import write_histograms, write_recall, write_rocs
from benchmarks.needle_data import FOLDS, NeedleSet, pack_real, simulate_set
from benchmarks.needle_rows import (
    CLASSICAL,
    OURS,
    RECIPES,
    TRIVIAL,
    Form,
    Recipe,
    RowFailedError,
    classical_scores,
    epochs_in,
    predicted,
    quick,
    split_sizes,
    train,
    trivial_table,
)
from benchmarks.needle_scores import (
    Figure,
    Runs,
    ahead_figure,
    missed_goals,
    print_tables,
    real_figure,
    simulated_figure,
)
from shard_tools.cores import usable_cores
from shard_tools.errors import InputError, run_command
from shard_tools.simulate import KINDS, Needle, SimulateConfig
from shard_tools.sky import Broad
from training.environment import cpu_is_asked_for
from training.metrics import roc_auc

# Cadences to train on, to test on and to calibrate with, and minutes of training a row.
_SIZES: dict[Form, tuple[int, int, int, float]] = {"cpu": (2000, 2000, 480, 3.0), "gpu": (20_000, 8000, 3840, 10.0)}
_QUICK = 64  # cadences of either split
_HELD_OUT_KINDS: tuple[Needle, ...] = ("s_curve",)
_HELD_OUT_INTERFERENCE: tuple[Broad, ...] = ("comb", "bursts")


@dataclass(frozen=True)
class NeedleBenchConfig:
    """Train recipes on simulated data for equal times, and tell how well each finds needles."""

    real: Path | None = None
    """Folder in the Kaggle layout: its positives, and the same with ON and OFF panels swapped, are scored too."""
    quick: bool = False
    """Seconds instead of half an hour: one epoch over 64 cadences. Nothing is recorded; the figures mean nothing."""
    train: int = 0
    """Cadences to train on; 0: 2,000 without a GPU, 20,000 with one."""
    test: int = 0
    """Cadences to test on; 0: 2,000 without a GPU, 8,000 with one."""
    minutes: float = 0.0
    """Training time of each recipe; 0: 3 without a GPU, 10 with one."""
    positive_share: float = 0.5
    """Share of cadences with a needle."""
    snr_min: float = 100.0
    """SNR of the faintest needle; see python -m shard_tools simulate --help."""
    snr_max: float = 3000.0
    """SNR of the brightest needle."""
    rows: tuple[str, ...] = ()
    """Names of the recipes to train; unset: those that learn something in the time. Searches that need no
    training are always included."""
    runs: int = 3
    """Trainings of each recipe, from seeds of their own; what is shown is their mean."""
    more: str = ""
    """Words that go to train.py behind those of every recipe, such as "--pretrained none"."""
    seed: int = 0
    """Of the data, the training and the intervals."""
    work_dir: Path = Path(tempfile.gettempdir())
    """Folder for data and runs: 2.1 MB a cadence, removed at the end."""
    out: Path | None = None
    """Folder for the pictures; unset: benchmarks/results, and no pictures of a part of the benchmark."""
    check: bool = False
    """Exit with 1 unless ours is ahead of every row beyond chance, and recall reaches one half at an SNR 1.5 times
    lower than that of the de-Doppler search."""

    def __post_init__(self) -> None:
        if min(self.train, self.test) < 0 or not 0 <= self.minutes < float("inf"):
            raise InputError("--train, --test, --minutes: expected at least 0")
        if self.runs < 1:
            raise InputError(f"--runs {self.runs}: expected at least 1")
        if not 0 < self.positive_share < 1:
            raise InputError(f"--positive-share {self.positive_share}: expected more than 0 and less than 1")
        train, test, calibration, _ = self.sizes
        # The train splits go into folds, each of which has both kinds.
        for name, count, least in (("--train", train, FOLDS), ("--test", test, 1), ("calibration", calibration, FOLDS)):
            positive = round(self.positive_share * count)
            if min(positive, count - positive) < least:
                raise InputError(
                    f"--positive-share {self.positive_share}: of {count} cadences ({name}) {positive} have a needle; "
                    f"expected at least {least} with and {least} without"
                )
        if self.quick and self.check:
            raise InputError("--quick --check: the quick form's figures mean nothing; leave one of the two out")
        if self.rows and self.check:
            raise InputError("--rows --check: the goals are about all rows; leave one of the two out")
        known = [recipe.name for recipe in RECIPES[self.form]]
        if set(self.rows) - set(known):
            raise InputError(f"--rows {' '.join(self.rows)}: expected some of {known}")

    @property
    def form(self) -> Form:
        """By the device that train.py will take."""
        return "gpu" if torch.cuda.is_available() and not cpu_is_asked_for() else "cpu"

    @property
    def sizes(self) -> tuple[int, int, int, float]:
        """As _SIZES, with what was asked for."""
        train, test, calibration, minutes = _SIZES[self.form]
        if self.quick:
            train, test, calibration = _QUICK, _QUICK, self.train or _QUICK
        return self.train or train, self.test or test, calibration, self.minutes or minutes

    @property
    def is_part(self) -> bool:
        """Whether rows, data or time are others than the benchmark's; pages prefer its own (benchmarks/report.py)."""
        kept = {name: getattr(self, name) for name in ("real", "quick", "work_dir", "out", "check")}
        return self != NeedleBenchConfig(**kept)

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """Those to train."""
        known = RECIPES[self.form]
        chosen = tuple(r for r in known if (r.name in self.rows if self.rows else r.is_default))
        return quick(chosen) if self.quick else chosen


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    config: NeedleBenchConfig
    folder: Path
    needles: NeedleSet
    real: NeedleSet | None
    calibration: NeedleSet | None
    """Few cadences, to measure how fast a recipe is; None in the quick form."""
    seconds: float
    """Training time of a row."""


def build_bench(config: NeedleBenchConfig, folder: Path) -> Bench:
    """Simulate and pack everything."""
    train_count, test_count, calibration_count, minutes = config.sizes
    base = SimulateConfig(
        out=folder,
        train=train_count,
        test=test_count,
        seed=config.seed,
        positive_share=config.positive_share,
        snr_min=config.snr_min,
        snr_max=config.snr_max,
        train_kinds=tuple(kind for kind in KINDS if kind not in _HELD_OUT_KINDS),
        train_without=_HELD_OUT_INTERFERENCE,
        workers=1 if config.quick else SimulateConfig.workers,  # each takes seconds to import setigen
    )
    few = dataclasses.replace(base, train=calibration_count, test=2)
    return Bench(
        config,
        folder,
        simulate_set(folder / "simulated", base),
        pack_real(folder / "real", config.real) if config.real else None,
        None if config.quick else simulate_set(folder / "calibration", few),
        60 * minutes,
    )


def train_row(bench: Bench, recipe: Recipe) -> tuple[Figure, dict[str, Runs]]:
    """Train a recipe several times and score the simulated test split ("simulated") and the real cadences ("real").

    Raises RowFailedError.
    """
    config, run_dir = bench.config, bench.folder / "runs" / recipe.name.replace(", ", "-")
    epochs = recipe.epochs or _epochs_in_time(bench, recipe, Path(f"{run_dir}-calibration"))
    words = f"--epochs {epochs} {recipe.command(epochs)} {config.more}".rstrip()
    in_epoch = split_sizes(bench.needles.shards)[0]
    sets = {"simulated": bench.needles} | ({"real": bench.real} if bench.real else {})
    figures: list[Figure] = []
    scores: dict[str, list[pd.Series]] = {name: [] for name in sets}
    for seed in range(config.seed, config.seed + config.runs):
        print(f"training {recipe.name}: train.py {words} --seed {seed}", flush=True)
        folder = Path(f"{run_dir}-{seed}")
        history = train(recipe, bench.needles.shards, folder, epochs, seed, config.more)
        seconds = (in_epoch / history["cadences_per_s"] + history["validation_s"]).sum()
        figures.append({"cadences_per_s": history["cadences_per_s"].median(), "train_s": seconds})
        figures[-1] |= {str(name): value for name, value in history.attrs.items()}
        for name, needles in sets.items():
            scores[name].append(predicted(needles, folder / "best.safetensors", folder / f"{name}.csv"))
    means = {name: float(np.mean([figure[name] for figure in figures])) for name in ("cadences_per_s", "train_s")}
    return {"epochs": epochs, **figures[0], **means}, dict(scores)


def _epochs_in_time(bench: Bench, recipe: Recipe, run_dir: Path) -> int:
    if bench.calibration is None:
        return 1
    tried = train(recipe, bench.calibration.shards, run_dir, 2, bench.config.seed, bench.config.more)
    return epochs_in(bench.seconds, tried, bench.calibration.shards, bench.needles.shards)


def searches(bench: Bench) -> list[tuple[Figure, dict[str, Runs]]]:
    """The de-Doppler search, and the trivial statistic that tells the test split's needles best."""
    sets = {"simulated": bench.needles} | ({"real": bench.real} if bench.real else {})
    classical = {name: classical_scores(needles) for name, needles in sets.items()}
    tables = {name: trivial_table(needles) for name, needles in sets.items()}
    truth, table = bench.needles.truth["target"], tables["simulated"][0]
    # In the direction that flatters it.
    auc = {name: roc_auc(truth.to_numpy(), table.loc[truth.index][name].to_numpy()) for name in map(str, table)}
    best = max(auc, key=lambda name: abs(auc[name] - 0.5))
    sign = np.sign(auc[best] - 0.5) or 1.0
    rows: list[tuple[Figure, dict[str, Runs]]] = []
    for name, found in (
        (CLASSICAL, classical),
        (f"{TRIVIAL}: {best}", {name: (sign * scores[best], rate) for name, (scores, rate) in tables.items()}),
    ):
        figure: Figure = {"row": name, "cadences_per_s": found["simulated"][1]}
        rows.append((figure, {name: (scores,) for name, (scores, _) in found.items()}))
    return rows


def measure(bench: Bench) -> tuple[list[Figure], dict[str, pd.Series]]:
    """A figure for each row, and the simulated test split's scores of the first run of those that did not fail."""
    rows = dict[str, tuple[Figure, dict[str, Runs]]]((str(figure["row"]), (figure, s)) for figure, s in searches(bench))
    failed: list[Figure] = []
    for recipe in bench.config.recipes:
        try:
            figure, scores = train_row(bench, recipe)
        except RowFailedError as error:
            failed.append({"workload": "needles", "row": recipe.name, "failed": str(error)})
            continue
        rows[recipe.name] = {"row": recipe.name, **figure}, scores
    figures = [_figure(bench, row, rows) for row in rows]
    figures.sort(key=lambda figure: -figure["auc"])
    return [*figures, *failed], {row: scores["simulated"][0] for row, (_, scores) in rows.items()}


def _figure(bench: Bench, row: str, rows: dict[str, tuple[Figure, dict[str, Runs]]]) -> Figure:
    """All about one row, and by how much ours is ahead of it."""
    seed, (figure, scores) = bench.config.seed, rows[row]
    figure = figure | simulated_figure(bench.needles, scores["simulated"], seed)
    if bench.real:
        figure |= real_figure(bench.real, scores["real"], seed)
    if OURS in rows and row != OURS:
        figure |= ahead_figure(bench.needles, bench.real, rows[OURS][1], scores, seed)
    return figure


def write_pictures(out: Path, form: Form, needles: NeedleSet, scores: dict[str, pd.Series]) -> None:
    """Draw ROC curves, recall against SNR and histograms of the scores; those of a GPU have names of their own."""
    out.mkdir(parents=True, exist_ok=True)
    ending = "_gpu" if form == "gpu" else ""
    for name, write in (("roc", write_rocs), ("recall", write_recall), ("scores", write_histograms)):
        write(out / f"needle_{name}{ending}.png", needles, scores)


def main(config: NeedleBenchConfig) -> int:
    """Measure, print, draw, record; return the exit code."""
    print(f"form {config.form}, {usable_cores()} cores, load {os.getloadavg()[0]:.1f} before the start")
    with tempfile.TemporaryDirectory(dir=config.work_dir) as folder:
        bench = build_bench(config, Path(folder))
        figures, scores = measure(bench)
        print_tables(figures)
        if not config.real:
            print("\nno real needles: give --real DIR, a folder in the layout of the Kaggle competition")
        out = config.out or (None if config.quick or config.is_part else RESULTS)
        if out:
            # Ours first, so that it has its colour; the rest as in the table.
            order = sorted((row["row"] for row in figures if row["row"] in scores), key=lambda name: name != OURS)
            write_pictures(out, config.form, bench.needles, {row: scores[row] for row in order})
    if config.quick:
        return 0
    # Without where this machine keeps its folders.
    about = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("work_dir", "out")}
    about |= {"form": config.form, "is_part": config.is_part, "real": config.real.name if config.real else None}
    record("needle", about, figures)
    missed = missed_goals(figures)
    for reason in missed if config.check else ():
        print(f"error: {reason}", file=sys.stderr)
    return int(config.check and bool(missed))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(tyro.cli(NeedleBenchConfig))))
