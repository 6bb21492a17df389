"""What does training on more cadences buy? Trains one recipe on ever more cadences, and scores each.

    python benchmarks/learning_curve.py

Backgrounds are simulated once, and the plan adds other signals to them in each epoch, so that no cadence is seen twice.
Each point is a training of its own, from random weights to the end of its schedule. All points, the untrained network
and the classical search are scored on the test split of the needle benchmark. The picture goes to
benchmarks/results/learning_curve.png, the table to the history.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import tyro

from benchmarks.history import RESULTS, record
from benchmarks.needle_charts import write_learning_curve
from benchmarks.needle_config import NeedleBenchConfig, simulated_splits
from benchmarks.needle_data import NeedleSet, pack_real, simulate_backgrounds, simulate_set
from benchmarks.needle_recipes import CLASSICAL, UNTRAINED
from benchmarks.needle_rows import classical_scores, predicted, run_program
from benchmarks.needle_scores import Runs, ahead_figure, real_figure, simulated_figure
from shard_tools.atomic_files import write_whole
from shard_tools.errors import InputError, run_command

_NOTHING = "--learning-rate 1e-12 --min-learning-rate 0"
Figure = dict[str, Any]


@dataclass(frozen=True)
class CurveConfig:
    """Train on ever more cadences with fresh signals, and score each training."""

    cadences: tuple[int, ...] = (1_000, 3_000, 10_000, 30_000, 100_000, 200_000)
    """Cadences that each training sees."""
    backgrounds: int = 10_000
    """Backgrounds at most; a training that sees more takes them again, with other signals."""
    runs: tuple[int, ...] = (3, 3, 3, 1, 1, 1)
    """Trainings of each point, from seeds of their own; the mean is shown."""
    recipe: str = "--preset demo"
    """Words for train.py."""
    test: int = 2_000
    """Cadences of the test split, half of them with a needle."""
    seed: int = 0
    """Seed of the data and of the first training."""
    real: Path | None = None
    """Folder in the Kaggle layout: its positives, and the same with ON and OFF panels exchanged, are scored too."""
    out: Path | None = None
    """Folder for the picture; unset: benchmarks/results, or no picture where other options make the run a part."""
    keep: Path | None = None
    """File for the weights of the last point."""
    work_dir: Path = Path(tempfile.gettempdir())
    """Folder for data and runs: 0.84 MB for each background, 2.1 MB for each test cadence, removed at the end."""

    def __post_init__(self) -> None:
        if not self.cadences or list(self.cadences) != sorted(set(self.cadences)) or self.cadences[0] < 1:
            raise InputError(f"--cadences {self.cadences}: expected rising numbers from 1 on")
        if len(self.runs) != len(self.cadences) or min(self.runs) < 1:
            raise InputError(f"--runs {self.runs}: expected a number of at least 1 for each of --cadences")
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
        """What is scored, by name."""
        return {"simulated": self.needles} | ({"real": self.real} if self.real else {})


def build_curve(config: CurveConfig, folder: Path) -> Curve:
    """Simulate and pack everything."""
    base = simulated_splits(dataclasses.replace(NeedleBenchConfig(), test=config.test, seed=config.seed), folder)
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


def train_point(curve: Curve, count: int, seed: int, more: str = "") -> tuple[Path, Figure]:
    """Train on `count` cadences; the run's folder and its figures."""
    sizes = np.cumsum([size for size, _ in curve.backgrounds])
    used = int(np.searchsorted(sizes, min(count, curve.config.backgrounds))) + 1
    in_epoch, epochs = int(sizes[used - 1]), max(1, round(count / sizes[used - 1]))
    run_dir = curve.folder / "runs" / f"{count}-{seed}{'-untrained' if more else ''}"
    words = [*curve.config.recipe.split(), "--backgrounds", *(shards for _, shards in curve.backgrounds[:used])]
    words += ["--shards", curve.needles.shards, "--run-dir", run_dir, "--epochs", epochs, "--seed", seed]
    print(f"training on {epochs} x {in_epoch:,} cadences, seed {seed}", flush=True)
    began = time.perf_counter()
    run_program("train.py", *words, "--tracker", "none", "--checkpoint-minutes", 0, *more.split())
    return run_dir, {"cadences": epochs * in_epoch, "train_s": time.perf_counter() - began}


def measure(curve: Curve) -> list[Figure]:
    """A figure for each point, for the untrained network and for the classical search."""
    config = curve.config
    rows: dict[str, tuple[Figure, dict[str, Runs]]] = {}
    classical: dict[str, Runs] = {name: (classical_scores(needles)[0],) for name, needles in curve.sets.items()}
    rows[CLASSICAL] = {"row": CLASSICAL}, classical
    points = [(UNTRAINED, config.cadences[0], config.runs[0], _NOTHING)]
    points += [(f"{count:,}", count, runs, "") for count, runs in zip(config.cadences, config.runs, strict=True)]
    for name, count, runs, more in points:
        figures: list[Figure] = []
        scores: dict[str, list[pd.Series]] = {each: [] for each in curve.sets}
        for seed in range(config.seed, config.seed + runs):
            run_dir, figure = train_point(curve, count, seed, more)
            figures.append(figure)
            for each, needles in curve.sets.items():
                scores[each].append(predicted(needles, run_dir / "best.safetensors", run_dir / f"{each}.csv"))
        figure = {"row": name, **figures[0], "train_s": float(np.mean([each["train_s"] for each in figures]))}
        rows[name] = figure | ({"cadences": 0} if more else {}), dict(scores)
        _print(curve, name, rows)
    if config.keep:
        write_whole(config.keep, (run_dir / "best.safetensors").read_bytes())
    return [_figure(curve, name, rows) for name in rows]


def _figure(curve: Curve, name: str, rows: Mapping[str, tuple[Figure, dict[str, Runs]]]) -> Figure:
    """All about one row, and by how much it is ahead of the untrained network on the same cadences."""
    seed, (figure, scores) = curve.config.seed, rows[name]
    figure = figure | simulated_figure(curve.needles, scores["simulated"], seed) | {"workload": "curve"}
    if curve.real:
        figure |= real_figure(curve.real, scores["real"], seed)
    if name != UNTRAINED and UNTRAINED in rows:
        figure |= ahead_figure(curve.needles, curve.real, scores, rows[UNTRAINED][1], seed)
    return figure


def _print(curve: Curve, name: str, rows: Mapping[str, tuple[Figure, dict[str, Runs]]]) -> None:
    figure = _figure(curve, name, rows)
    print(
        name,
        {each: figure[each] for each in ("auc", "recall_1e2", "recall_1e3", "real_auc") if each in figure},
        flush=True,
    )


def print_table(figures: Sequence[Figure]) -> None:
    """The rows, in 80 columns."""
    print(f"\n{'trained on':<16}{'AUC':>7}{'ahead of untrained':>26}{'1e-2':>7}{'1e-3':>7}{'real':>7}{'s':>7}")
    for figure in figures:
        ahead = ""
        if "ahead_auc" in figure:
            ahead = f"{figure['ahead_auc']:+.4f} ({figure['ahead_auc_low']:+.4f}, {figure['ahead_auc_high']:+.4f})"
        cells = [("auc", ".4f"), ("recall_1e2", ".3f"), ("recall_1e3", ".3f"), ("real_auc", ".3f"), ("train_s", ".0f")]
        auc, *rest = (_cell(figure.get(name), form) for name, form in cells)
        print(f"{figure['row']:<16}{auc:>7}{ahead:>26}" + "".join(f"{each:>7}" for each in rest))
    print("1e-2, 1e-3: recall at these false positive rates. real: AUC of real needles against")
    print("their twins. s: seconds of training. Intervals: 95 %, on the same cadences.")


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main(config: CurveConfig) -> int:
    """Measure, print, draw, record; return the exit code."""
    with tempfile.TemporaryDirectory(dir=config.work_dir) as folder:
        figures = measure(build_curve(config, Path(folder)))
    print_table(figures)
    kept = {name: getattr(config, name) for name in ("real", "out", "keep", "work_dir")}
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
