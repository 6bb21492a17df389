"""The rows of the needle benchmark: recipes, each a command line of train.py, and detectors that learn nothing."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from benchmarks.history import ROOT
from benchmarks.needle_data import NeedleSet, test_snippets
from shard_tools.baselines import trivial_scores
from shard_tools.cadence import read_snippet
from shard_tools.cores import usable_cores
from shard_tools.errors import InputError
from shard_tools.manifest import read_manifest
from training.dedoppler import find_drift
from training.model import build_model
from training.presets import parse_train_config
from training.pretrained import NoPretrainedError

Form = Literal["cpu", "gpu"]
Scores = pd.DataFrame
"""A row a cadence, by its key; a column a detector."""

OURS, UNTRAINED, CLASSICAL, TRIVIAL = "ours", "ours, untrained", "de-Doppler", "trivial"


@dataclass(frozen=True)
class Recipe:
    """A row that is trained: what comes behind `python train.py --shards ... --run-dir ... --epochs ...`."""

    name: str
    words: str
    epochs: int = 0
    """So many, whatever the time; 0: as many as fit into it."""
    is_default: bool = True
    """Whether it is trained where no rows are named."""

    def command(self, epochs: int) -> str:
        """Its words for so many epochs, of which some recipe does a thing in most."""
        return self.words.format(most_epochs=max(1, round(0.8 * epochs)))


# What the best public solutions of the competition have in common, as they describe it: the ON panels under each
# other, mixup whose target is the larger of both until 80 % of the epochs, flips, every cadence once an epoch. So
# neither the OFF panels nor what else ours draws.
_COMPETITION = (
    "--stem none --canvas on --subtract none --normalise --compress none --mixup 1.0 --mixup-epochs {most_epochs} "
    "--mix-target or --cutmix 0 --erase 0 --roll-frequency 0 --shift-time 0 --gain 0 --offset 0 --flip-time 0.5"
)
_ADDED = "--inject 0.5 --inject-interference 0.5 --inject-snr-min 0.4 --inject-snr-max 10"
_NANO = "--model swin_nano --pretrained none"
# The seed's cosine ends where the training does, however many epochs that are.
_SEED = "--preset seed --cosine-epochs 0"
# Two cores have no time for Swin-Small at 224 x 224 pixels: the same recipes with a small network, without pretraining
# and so with that network's learning rate.
RECIPES: dict[Form, tuple[Recipe, ...]] = {
    "cpu": (
        # In minutes on two cores these two learn nothing, which says nothing of what they are worth: only when named.
        Recipe("seed, nano", f"{_SEED} {_NANO} --height 112 --learning-rate 5e-4", is_default=False),
        Recipe(
            "competition, nano",
            f"--preset demo {_NANO} --learning-rate 5e-4 --height 56 --width 224 --sum-time-bins 13 {_COMPETITION}",
            is_default=False,
        ),
        Recipe(OURS, "--preset demo"),
        # Signals are added while it trains; some bend, as the test split's s_curve needles do.
        Recipe("ours, with added", f"--preset demo {_ADDED}", is_default=False),
        # What training gives: nothing is learnt at such a rate.
        Recipe(UNTRAINED, "--preset demo --learning-rate 1e-12 --min-learning-rate 0", epochs=1),
    ),
    "gpu": (
        Recipe("seed", _SEED),
        Recipe("competition", f"--preset full {_COMPETITION}"),
        Recipe(OURS, "--preset full"),
        # What wins on two cores, in batches that a GPU is for.
        Recipe("ours, candidates", "--preset demo --batch-size 64"),
    ),
}


class RowFailedError(Exception):
    """A row's program ended with an error; the message is its last line."""


def run_program(*words: object) -> None:
    """Run a program of the project. Raises RowFailedError with the last line of what it said."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        # Errors of the command line come in a frame, and before a hint.
        lines = [line.strip("│╭╰─╮╯ ") for line in done.stderr.splitlines()]
        said = [line for line in lines if line and not line.startswith("For full helptext")]
        reason = said[-1] if said else f"exit code {done.returncode}"
        raise RowFailedError(reason[:300])


def train(recipe: Recipe, shards: Path, run_dir: Path, epochs: int, seed: int, more: str = "") -> pd.DataFrame:
    """Train with train.py in a process of its own; return its metrics.jsonl, a row an epoch.

    Where pretrained weights are asked for and none are at hand, it starts from scratch, and `attrs` says so.
    """
    words = [*recipe.command(epochs).split(), *more.split()]
    without = not _has_pretrained(words)
    words += ["--pretrained", "none"] if without else []
    given = ["--shards", shards, "--run-dir", run_dir, "--epochs", epochs, "--seed", seed]
    given += ["--tracker", "none", "--checkpoint-minutes", 0]
    run_program("train.py", *words, *given)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    history = pd.DataFrame([json.loads(line) for line in lines])
    if without:
        history.attrs["pretrained"] = "none at hand"
    return history


def _has_pretrained(words: Sequence[str]) -> bool:
    """Whether what a recipe starts from is at hand."""
    try:
        config = parse_train_config(["--shards", ".", "--run-dir", ".", *words])
        if config.model.pretrained == "hub":
            build_model(config.model, config.canvas.channels, config.canvas.height, config.canvas.width)
    except NoPretrainedError:
        return False
    except (InputError, SystemExit):
        pass  # train.py will say what is wrong
    return True


def split_sizes(shards: Path) -> tuple[int, int]:
    """How many cadences of the train split are trained on, and how many validate."""
    manifest = read_manifest(shards)
    fold = manifest.fold[manifest.rows("train")]
    return int((fold != 0).sum()), int((fold == 0).sum())


def epochs_in(seconds: float, calibration: pd.DataFrame, calibrated: Path, shards: Path) -> int:
    """How many whole epochs over `shards` fit into so many seconds, by a short run over the shards `calibrated`.

    Its last epoch counts: the first one compiles and warms up. One epoch may take up to twice the time; raises
    RowFailedError where it would take more.
    """
    (trained, held_out), (_, small_held_out) = split_sizes(shards), split_sizes(calibrated)
    last = calibration.iloc[-1]
    epoch_s = float(trained / last["cadences_per_s"] + held_out * last["validation_s"] / small_held_out)
    if epoch_s > 2 * seconds:
        raise RowFailedError(f"an epoch would take {epoch_s:,.0f} s; give it more --minutes or fewer --train")
    return max(1, int(seconds / epoch_s))


def predicted(needles: NeedleSet, weights: Path, out: Path) -> pd.Series:
    """Scores of the test split by infer.py, over all views that the canvas allows."""
    run_program("infer.py", "--shards", needles.shards, "--weights", weights, "--out", out, "--tta")
    return pd.read_csv(out, dtype={"id": str}).set_index("id")["target"].rename("score")


def classical_scores(needles: NeedleSet) -> tuple[pd.Series, float]:
    """The de-Doppler search's scores of the test split, and cadences/s."""
    return _scored(needles, lambda snippet: find_drift(snippet).score)


def trivial_table(needles: NeedleSet) -> tuple[Scores, float]:
    """A column for each trivial statistic, and cadences/s of all together."""
    scores, rate = _scored(needles, trivial_scores)
    return pd.DataFrame(scores.tolist(), index=scores.index), rate


def _scored(needles: NeedleSet, score: Callable[[npt.NDArray[np.float16]], object]) -> tuple[pd.Series, float]:
    files = list(test_snippets(needles))
    score(read_snippet(files[0][1])[1])  # compiles
    began = time.perf_counter()
    # Threads: the search's loops let go of Python's lock.
    with ThreadPoolExecutor(usable_cores()) as pool:
        found = list(pool.map(lambda file: score(read_snippet(file[1])[1]), files))
    rate = len(files) / (time.perf_counter() - began)
    return pd.Series(found, index=pd.Index([key for key, _ in files], name="id"), name="score"), rate


def quick(recipes: tuple[Recipe, ...]) -> tuple[Recipe, ...]:
    """The recipes with canvases and batches that seconds are enough for."""
    small = "--sum-time-bins 13 --height 28 --width 56 --batch-size 8"
    return tuple(dataclasses.replace(recipe, words=f"{recipe.words} {small}") for recipe in recipes)
