"""Which recipe finds needles best? Trains recipes on the same simulated data for the same time, and scores them.

    make needles ARGS="--real DIR"
    python benchmarks/needle_bench.py [--real DIR] [--check]
    python benchmarks/needle_bench.py --quick

The recipes (benchmarks/needles/recipes.py) are command lines of train.py that anyone can repeat. Beside them stand a
classical de-Doppler search and trivial statistics, which learn nothing. Each recipe first runs for seconds on a few
cadences, which says how many epochs fit into --minutes, and is then trained from several seeds. Ours is compared with
every other row on the same cadences. The test split has kinds of needles and of interference that the train split does
not have. There is a form for two CPU cores (half an hour) and one for a GPU, which has not been run yet. Pictures of
the first run of each row go to benchmarks/results/needle_*.png.
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
import tyro

from benchmarks.history import RESULTS, record
from benchmarks.needles.charts import write_histograms, write_recall, write_rocs
from benchmarks.needles.config import QUICK, NeedleBenchConfig, simulated_splits
from benchmarks.needles.data import NeedleSet, pack_real, simulate_backgrounds, simulate_set
from benchmarks.needles.recipes import CLASSICAL, OURS, TRIVIAL, Form, Recipe
from benchmarks.needles.rows import (
    RowFailedError,
    Training,
    classical_scores,
    epochs_in,
    predicted,
    split_sizes,
    train,
    trivial_table,
)
from benchmarks.needles.scores import (
    Figure,
    Runs,
    ahead_figure,
    missed_goals,
    print_tables,
    real_figure,
    simulated_figure,
)
from shard_tools.manifest import read_manifest
from shard_tools.system.command import run_command
from shard_tools.system.cores import usable_cores
from training.metrics import roc_auc

Row = tuple[Figure, dict[str, Runs]]
"""A row's figures besides its scores, and its scores of the sets "simulated" and, if given, "real"."""


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    config: NeedleBenchConfig
    folder: Path
    needles: NeedleSet
    real: NeedleSet | None
    backgrounds: Path
    """Shards of cadences without needles."""
    calibration: NeedleSet | None
    """A few cadences, to measure how fast a recipe is; None with --quick."""
    seconds: float
    """Training time of a row."""

    @property
    def sets(self) -> dict[str, NeedleSet]:
        """The sets that are scored, by name."""
        return {"simulated": self.needles} | ({"real": self.real} if self.real else {})


def build_bench(config: NeedleBenchConfig, folder: Path) -> Bench:
    """Simulate and pack everything."""
    base = simulated_splits(config, folder)
    _, _, calibration_count, minutes = config.sizes
    few = dataclasses.replace(base, train=calibration_count, test=2)
    return Bench(
        config,
        folder,
        simulate_set(folder / "simulated", base),
        pack_real(folder / "real", config.real) if config.real else None,
        simulate_backgrounds(folder / "backgrounds", base, QUICK if config.quick else config.backgrounds),
        None if config.quick else simulate_set(folder / "calibration", few),
        60 * minutes,
    )


def train_row(bench: Bench, recipe: Recipe) -> Row:
    """Train a recipe from several seeds and score every set with each. Raises RowFailedError."""
    config, folder = bench.config, bench.folder / "runs"
    name = recipe.name.replace(", ", "-")
    epochs = recipe.epochs or _epochs_in_time(bench, recipe, folder / f"{name}-calibration")
    figures: list[Figure] = []
    scores: dict[str, list[pd.Series]] = {name: [] for name in bench.sets}
    for seed in range(config.seed, config.seed + config.runs):
        training, run_dir = Training(recipe, epochs, seed, config.more), folder / f"{name}-{seed}"
        figures.append(_train_once(bench, training, run_dir))
        for name_of_set, needles in bench.sets.items():
            weights, out = run_dir / "best.safetensors", run_dir / f"{name_of_set}.csv"
            scores[name_of_set].append(predicted(needles, weights, out))
    means = {each: float(np.mean([figure[each] for figure in figures])) for each in ("cadences_per_s", "train_s")}
    return {"epochs": epochs, **figures[0], **means}, dict(scores)


def _train_once(bench: Bench, training: Training, run_dir: Path) -> Figure:
    words = f"train.py --epochs {training.epochs} {' '.join(training.words)} --seed {training.seed}"
    print(f"training {training.recipe.name}: {words}", flush=True)
    history = train(training, bench.needles.shards, run_dir, bench.backgrounds)
    in_epoch = split_sizes(bench.needles.shards)[0]
    if training.recipe.uses_backgrounds:
        in_epoch = len(read_manifest(bench.backgrounds))
    seconds = (in_epoch / history["cadences_per_s"] + history["validation_s"]).sum()
    attributes = {str(name): value for name, value in history.attrs.items()}
    return {"cadences_per_s": history["cadences_per_s"].median(), "train_s": seconds, **attributes}


def _epochs_in_time(bench: Bench, recipe: Recipe, run_dir: Path) -> int:
    if bench.calibration is None:
        return 1
    training = Training(recipe, 2, bench.config.seed, bench.config.more)
    tried = train(training, bench.calibration.shards, run_dir)
    return epochs_in(bench.seconds, tried, bench.calibration.shards, bench.needles.shards)


def searches(bench: Bench) -> list[Row]:
    """The de-Doppler search, and the trivial statistic that separates the test split best, in either direction."""
    classical = {name: classical_scores(needles) for name, needles in bench.sets.items()}
    tables = {name: trivial_table(needles) for name, needles in bench.sets.items()}
    truth, table = bench.needles.truth["target"], tables["simulated"][0]
    auc = {name: roc_auc(truth.to_numpy(), table.loc[truth.index][name].to_numpy()) for name in map(str, table)}
    best = max(auc, key=lambda name: abs(auc[name] - 0.5))
    sign = np.sign(auc[best] - 0.5) or 1.0
    trivial = {name: (sign * scores[best], rate) for name, (scores, rate) in tables.items()}
    rows: list[Row] = []
    for name, found in ((CLASSICAL, classical), (f"{TRIVIAL}: {best}", trivial)):
        figure: Figure = {"row": name, "cadences_per_s": found["simulated"][1]}
        rows.append((figure, {name: (scores,) for name, (scores, _) in found.items()}))
    return rows


def measure(bench: Bench) -> tuple[list[Figure], dict[str, pd.Series]]:
    """A figure for each row, and the scores of the simulated test split by the first run of each row.

    A row that fails has a figure that says why, and no scores.
    """
    rows: dict[str, Row] = {str(figure["row"]): (figure, scores) for figure, scores in searches(bench)}
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


def _figure(bench: Bench, row: str, rows: dict[str, Row]) -> Figure:
    """All figures of one row, and how far ours is ahead of it."""
    seed, (figure, scores) = bench.config.seed, rows[row]
    figure = figure | simulated_figure(bench.needles, scores["simulated"], seed)
    if bench.real:
        figure |= real_figure(bench.real, scores["real"], seed)
    if OURS in rows and row != OURS:
        figure |= ahead_figure(bench.needles, bench.real, rows[OURS][1], scores, seed)
    return figure


def write_pictures(out: Path, form: Form, needles: NeedleSet, scores: dict[str, pd.Series]) -> None:
    """Draw ROC curves, recall against SNR and histograms of the scores; file names tell the two forms apart."""
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
        # Ours first, so that it always has the same colour; the rest as in the table.
        order = sorted((row["row"] for row in figures if row["row"] in scores), key=lambda name: name != OURS)
        write_pictures(out, config.form, bench.needles, {row: scores[row] for row in order})
    if config.quick:
        return 0
    # Leave out the folders of this machine.
    about = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("work_dir", "out")}
    about |= {"form": config.form, "is_part": config.is_part, "real": config.real.name if config.real else None}
    record("needle", about, figures)
    missed = missed_goals(figures)
    for reason in missed if config.check else ():
        print(f"error: {reason}", file=sys.stderr)
    return int(config.check and bool(missed))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(tyro.cli(NeedleBenchConfig))))
