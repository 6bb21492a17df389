"""What do real skies among the backgrounds buy? Trains `demo` on simulated skies, and on real ones beside them.

    python benchmarks/real_skies.py --real DIR

DIR is in the Kaggle layout. Its needles are divided into parts. For each part a training of its own takes the twins of
all other parts (ON and OFF panels exchanged) as further backgrounds, to which the plan adds signals, and the part is
judged by that training. So no needle is judged by a network that has seen its sky. Recipe, simulated data and scoring
are those of the learning curve (learning_curve.py). The table goes to the history.
"""

import dataclasses
import sys
import tempfile
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import tyro

from benchmarks.history import record
from benchmarks.history_tables import SKIES
from benchmarks.learning_curve import (
    Curve,
    CurveConfig,
    Figure,
    Point,
    Rows,
    Trained,
    build_curve,
    cores_shared,
    figure_of,
    print_table,
    to_row,
    train_point,
    train_points,
    untrained_point,
)
from benchmarks.needles.data import TWIN, NeedleSet, snippet_path, write_snippet, write_submission_table
from benchmarks.needles.recipes import UNTRAINED
from shard_tools.cadence import read_snippet
from shard_tools.errors import InputError
from shard_tools.pack import PackConfig, pack
from shard_tools.system.command import run_command
from shard_tools.system.cores import usable_cores

SIMULATED, REAL = "simulated skies", "real skies too"


@dataclass(frozen=True)
class RealSkiesConfig:
    """Train on simulated skies, and on these and real ones, of which each part is left out in turn."""

    real: Path
    """Folder in the Kaggle layout; its positives are used, as far as their files are there."""
    parts: int = 5
    """Parts that the needles are divided into."""
    copies: int = 12
    """Times that each real background is used in an epoch, with other signals each time."""
    cadences: int = 20_000
    """Cadences that each training sees."""
    backgrounds: int = 3_000
    """Simulated backgrounds."""
    runs: int = 2
    """Trainings on simulated skies, and for each part; each from its own seed."""
    recipe: str = CurveConfig.recipe
    """Words for train.py."""
    test: int = 2_000
    """Cadences of the simulated test split."""
    labelled: int = CurveConfig.labelled
    """Cadences of the simulated train split, as in learning_curve.py."""
    seed: int = 0
    """Seed of the data, of the parts and of the first training."""
    at_once: int = usable_cores()
    """Trainings at the same time, each bound to cores of its own."""
    work_dir: Path = Path(tempfile.gettempdir())
    """Folder for data and runs, removed at the end."""

    def __post_init__(self) -> None:
        if self.parts < 2 or min(self.copies, self.runs) < 1:
            raise InputError("--parts: expected at least 2; --copies, --runs: at least 1")

    @property
    def curve(self) -> CurveConfig:
        """These options as those of a learning curve whose only point is the training on simulated skies."""
        return CurveConfig(
            (self.cadences,), self.backgrounds, (self.runs,), self.at_once, self.recipe, self.test, self.seed,
            self.real, self.labelled, work_dir=self.work_dir,
        )  # fmt: skip


def divide(needles: NeedleSet, parts: int, seed: int) -> list[list[str]]:
    """The keys of the needles in parts of nearly equal size. Raises InputError if there are fewer keys than parts."""
    if len(needles.twins) < parts:
        raise InputError(f"--real: {len(needles.twins)} needles, expected at least {parts}, the number of --parts")
    shuffled = np.random.default_rng(seed).permutation(sorted(needles.twins))
    return [list(map(str, part)) for part in np.array_split(shuffled, parts)]


def pack_skies(folder: Path, real: NeedleSet, keys: list[str], copies: int) -> Path:
    """Pack the twins of these needles, each `copies` times, as backgrounds."""
    data, names = folder / "data", []
    for key in keys:
        snippet = read_snippet(snippet_path(real.shards.parent / "data", f"{key}{TWIN}"))[1]
        for copy in range(copies):
            names.append(f"{key}{TWIN}-{copy}")
            write_snippet(snippet_path(data, names[-1]), snippet)
    write_submission_table(data, names)
    pack(PackConfig(data, str(folder / "shards")))
    return folder / "shards"


def without_part(curve: Curve, config: RealSkiesConfig, parts: list[list[str]], number: int) -> Curve:
    """The curve's data, and the skies of all parts but one."""
    assert curve.real
    others = [key for place, part in enumerate(parts) if place != number for key in part]
    shards = pack_skies(curve.folder / f"skies-{number}", curve.real, others, config.copies)
    backgrounds = [*curve.backgrounds, (len(others) * config.copies, shards)]
    total = sum(size for size, _ in backgrounds)
    return dataclasses.replace(
        curve, backgrounds=backgrounds, config=dataclasses.replace(curve.config, backgrounds=total)
    )


def train_parts(curve: Curve, config: RealSkiesConfig, parts: list[list[str]]) -> list[list[Trained]]:
    """For each seed, a training without each part."""
    curves = [without_part(curve, config, parts, number) for number in range(len(parts))]
    seeds = range(config.seed, config.seed + config.runs)
    with cores_shared(config.at_once) as pool:
        started: list[list[Future[Trained]]] = [
            [
                pool.submit(train_point, each, Point(f"without part {number + 1}", config.cadences, 1), seed)
                for number, each in enumerate(curves)
            ]
            for seed in seeds
        ]
    return [[each.result() for each in of_seed] for of_seed in started]


def joined_scores(trainings: list[Trained], parts: list[list[str]]) -> pd.Series:
    """The score of each real needle and of its twin, by the training that has seen neither."""
    judged = zip(trainings, parts, strict=True)
    found: pd.Series = pd.concat(
        [training.scores["real"][[*part, *(f"{key}{TWIN}" for key in part)]] for training, part in judged]
    )
    return found


def measure(curve: Curve, config: RealSkiesConfig) -> list[Figure]:
    """A figure for the untrained network, one for simulated skies, and one for real ones too."""
    assert curve.real
    parts = divide(curve.real, config.parts, config.seed)
    rows: Rows = {}
    points = [untrained_point(curve.config), Point(SIMULATED, config.cadences, config.runs)]
    for point, trainings in train_points(curve, points):
        rows[point.name] = to_row(point, trainings)
    rows[UNTRAINED][0]["cadences"] = 0
    by_seed = train_parts(curve, config, parts)
    figure, scores = to_row(Point(REAL, config.cadences, config.runs), [each for runs in by_seed for each in runs])
    rows[REAL] = figure, scores | {"real": [joined_scores(runs, parts) for runs in by_seed]}
    return [figure_of(curve, name, rows, SIMULATED) | {"workload": SKIES} for name in rows]


def main(config: RealSkiesConfig) -> int:
    """Measure, print, record; return the exit code."""
    with tempfile.TemporaryDirectory(dir=config.work_dir) as folder:
        figures = measure(build_curve(config.curve, Path(folder)), config)
    print_table(figures, SIMULATED)
    about = {name: value for name, value in dataclasses.asdict(config).items() if name != "work_dir"}
    record(SKIES, about | {"real": config.real.name}, figures)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(tyro.cli(RealSkiesConfig))))
