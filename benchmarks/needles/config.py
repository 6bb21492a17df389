"""The options of the needle benchmark, and what follows from them: form, sizes and recipes."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.needles.data import FOLDS
from benchmarks.needles.recipes import RECIPES, Form, Recipe, quick
from shard_tools.errors import InputError
from shard_tools.simulate import KINDS, Needle, SimulateConfig
from shard_tools.sky import Broad
from training.environment import cpu_is_asked_for

# Cadences to train on, to test on and to calibrate with, and minutes of training for each row.
_SIZES: dict[Form, tuple[int, int, int, float]] = {"cpu": (2000, 2000, 480, 3.0), "gpu": (20_000, 8000, 3840, 10.0)}
QUICK = 64  # cadences of each split
_HELD_OUT_KINDS: tuple[Needle, ...] = ("s_curve",)
# Not comb or bursts, the most frequent kinds in real skies (shard_tools/sky.py).
_HELD_OUT_INTERFERENCE: tuple[Broad, ...] = ("stripes", "dashes")


@dataclass(frozen=True)
class NeedleBenchConfig:
    """Train recipes on the same simulated data for the same time, and measure how well each finds needles."""

    real: Path | None = None
    """Folder in the Kaggle layout: its positives, and the same with ON and OFF panels exchanged, are scored too."""
    quick: bool = False
    """Seconds instead of half an hour: one epoch over 64 cadences. The figures mean nothing and are not recorded."""
    train: int = 0
    """Cadences to train on; 0: 2,000 without a GPU, 20,000 with one."""
    test: int = 0
    """Cadences to test on; 0: 2,000 without a GPU, 8,000 with one."""
    backgrounds: int = 5_000
    """Cadences without needles, for the recipes that are trained on these."""
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
    """Trainings of each recipe, each from another seed; the mean is shown."""
    more: str = ""
    """Options for train.py after those of every recipe, such as "--pretrained none"."""
    seed: int = 0
    """Seed of the data, of the first training and of the intervals."""
    work_dir: Path = Path(tempfile.gettempdir())
    """Folder for data and runs: 2.1 MB for each cadence, removed at the end."""
    out: Path | None = None
    """Folder for the pictures; unset: benchmarks/results, or no pictures if other options change what is measured."""
    check: bool = False
    """Exit with 1 unless ours is ahead of every row beyond chance, and recall reaches one half at an SNR 1.5 times
    lower than that of the de-Doppler search."""

    def __post_init__(self) -> None:
        if self.backgrounds < 1:
            raise InputError(f"--backgrounds {self.backgrounds}: expected at least 1")
        if min(self.train, self.test) < 0 or not 0 <= self.minutes < float("inf"):
            raise InputError("--train, --test, --minutes: expected at least 0")
        if self.runs < 1:
            raise InputError(f"--runs {self.runs}: expected at least 1")
        if not 0 < self.positive_share < 1:
            raise InputError(f"--positive-share {self.positive_share}: expected more than 0 and less than 1")
        self._check_classes()
        if self.quick and self.check:
            raise InputError("--quick --check: the quick form's figures mean nothing; leave one of the two out")
        if self.rows and self.check:
            raise InputError("--rows --check: the goals are about all rows; leave one of the two out")
        known = [recipe.name for recipe in RECIPES[self.form]]
        if set(self.rows) - set(known):
            raise InputError(f"--rows {' '.join(self.rows)}: expected some of {known}")

    def _check_classes(self) -> None:
        """Both classes have to occur in every split, and in every fold of the train splits."""
        train, test, calibration, _ = self.sizes
        for name, count, least in (("--train", train, FOLDS), ("--test", test, 1), ("calibration", calibration, FOLDS)):
            positive = round(self.positive_share * count)
            if min(positive, count - positive) < least:
                raise InputError(
                    f"--positive-share {self.positive_share}: of {count} cadences ({name}) {positive} have a needle; "
                    f"expected at least {least} with and {least} without"
                )

    @property
    def form(self) -> Form:
        """The form for the device that train.py will use."""
        return "gpu" if torch.cuda.is_available() and not cpu_is_asked_for() else "cpu"

    @property
    def sizes(self) -> tuple[int, int, int, float]:
        """As _SIZES, with the options that were given."""
        train, test, calibration, minutes = _SIZES[self.form]
        if self.quick:
            train, test, calibration = QUICK, QUICK, self.train or QUICK
        return self.train or train, self.test or test, calibration, self.minutes or minutes

    @property
    def is_part(self) -> bool:
        """Whether rows, data or time differ from a whole benchmark, which a part never replaces (history_tables.py)."""
        kept = {name: getattr(self, name) for name in ("real", "quick", "work_dir", "out", "check")}
        return self != NeedleBenchConfig(**kept)

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The recipes to train."""
        known = RECIPES[self.form]
        chosen = tuple(r for r in known if (r.name in self.rows if self.rows else r.is_default))
        return quick(chosen) if self.quick else chosen


def simulated_splits(config: NeedleBenchConfig, out: Path) -> SimulateConfig:
    """What is simulated: a train split that lacks kinds of needles and of interference that the test split has."""
    train, test, _, _ = config.sizes
    return SimulateConfig(
        out=out,
        train=train,
        test=test,
        seed=config.seed,
        positive_share=config.positive_share,
        snr_min=config.snr_min,
        snr_max=config.snr_max,
        train_kinds=tuple(kind for kind in KINDS if kind not in _HELD_OUT_KINDS),
        train_without=_HELD_OUT_INTERFERENCE,
        workers=1 if config.quick else SimulateConfig.workers,  # each worker takes seconds to import setigen
    )
