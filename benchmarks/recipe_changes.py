"""What does each choice of the recipe buy? Trains `demo` with one choice changed at a time, from three seeds.

    python benchmarks/recipe_changes.py

Data, training and scoring are those of the learning curve (learning_curve.py). All rows are judged on the same
cadences, and compared with the recipe as it is by paired intervals. The table goes to the history.
"""

import dataclasses
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from benchmarks.history import record
from benchmarks.learning_curve import (
    CurveConfig,
    Figure,
    Point,
    Rows,
    build_curve,
    figure_of,
    print_table,
    to_row,
    train_points,
)
from shard_tools.errors import InputError
from shard_tools.system.command import run_command
from shard_tools.system.cores import usable_cores

RECIPE = "demo"
CHANGES = {
    "learning rate 1e-3, not 2e-3": "--learning-rate 1e-3",
    "learning rate 4e-3": "--learning-rate 4e-3",
    "no warm-up": "--warmup-epochs 0",
    "no moving average of the weights": "--ema 0",
    "1 line, not 2": "--candidates 1",
    "4 lines": "--candidates 4",
    "panels stay in their order": "--permute-panels 0",
    "added signals have an SNR of at least 300": "--signal-snr-min 300",
}
"""Each change, and the options of train.py that make it."""


@dataclass(frozen=True)
class ChangesConfig:
    """Train the recipe with one choice changed at a time, and compare."""

    cadences: int = 10_000
    """Cadences that each training sees, each of them once."""
    runs: int = 3
    """Trainings of each row, each from its own seed."""
    rows: tuple[str, ...] = tuple(CHANGES)
    """The changes to train, by their names in `CHANGES`."""
    test: int = 2_000
    """Cadences of the test split, half of them with a needle."""
    seed: int = 0
    """Seed of the data and of the first training."""
    at_once: int = usable_cores()
    """Trainings at the same time, each bound to cores of its own."""
    real: Path | None = None
    """Folder in the Kaggle layout: its positives, and the same with ON and OFF panels exchanged, are scored too."""
    labelled: int = CurveConfig.labelled
    """Cadences of the simulated train split, as in learning_curve.py."""
    work_dir: Path = Path(tempfile.gettempdir())
    """Folder for data and runs: 0.84 MB for each cadence, 2.1 MB for each test cadence, removed at the end."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.rows if name not in CHANGES]:
            raise InputError(f"--rows {unknown}: expected some of {list(CHANGES)}")

    @property
    def curve(self) -> CurveConfig:
        """These options as those of a learning curve whose only point is the recipe."""
        return CurveConfig(
            (self.cadences,), self.cadences, (self.runs,), self.at_once, f"--preset {RECIPE}", self.test, self.seed,
            self.real, self.labelled, work_dir=self.work_dir,
        )  # fmt: skip


def measure(config: ChangesConfig, folder: Path) -> list[Figure]:
    """A figure for the recipe and for each change."""
    curve = build_curve(config.curve, folder)
    points = [Point(RECIPE, config.cadences, config.runs)]
    points += [Point(name, config.cadences, config.runs, CHANGES[name]) for name in config.rows]
    rows: Rows = {point.name: to_row(point, trainings) for point, trainings in train_points(curve, points)}
    return [figure_of(curve, name, rows, RECIPE) | {"workload": "changes"} for name in rows]


def main(config: ChangesConfig) -> int:
    """Measure, print, record; return the exit code."""
    with tempfile.TemporaryDirectory(dir=config.work_dir) as folder:
        figures = measure(config, Path(folder))
    print_table(figures, RECIPE)
    about = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("work_dir", "real")}
    record("changes", about | {"real": config.real.name if config.real else None}, figures)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(tyro.cli(ChangesConfig))))
