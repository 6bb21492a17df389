"""The rows of the needle benchmark: training a recipe, predicting with it, and detectors that learn nothing."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from benchmarks.history import ROOT
from benchmarks.needles.data import NeedleSet, test_snippets
from benchmarks.needles.recipes import Recipe
from shard_tools.baselines import trivial_scores
from shard_tools.cadence import read_snippet
from shard_tools.errors import InputError
from shard_tools.manifest import read_manifest
from shard_tools.system.cores import usable_cores
from training.model import build_model
from training.presets import parse_train_config
from training.pretrained import NoPretrainedError
from training.search.dedoppler import find_drift

Scores = pd.DataFrame
"""A row for each cadence, by its key; a column for each detector."""


class RowFailedError(Exception):
    """A row's program ended with an error; the message is the last line that it printed."""


def run_program(*words: object) -> None:
    """Run a program of the project. Raises RowFailedError with the last line of its errors."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        # tyro prints errors of the command line in a frame, followed by a hint.
        lines = [line.strip("│╭╰─╮╯ ") for line in done.stderr.splitlines()]
        said = [line for line in lines if line and not line.startswith("For full helptext")]
        reason = said[-1] if said else f"exit code {done.returncode}"
        raise RowFailedError(reason[:300])


@dataclass(frozen=True)
class Training:
    """One training of a recipe."""

    recipe: Recipe
    epochs: int
    seed: int
    more: str = ""
    """Words for train.py after those of the recipe."""

    @property
    def words(self) -> list[str]:
        """The command line, except for folders, epochs and seed."""
        return [*self.recipe.command(self.epochs).split(), *self.more.split()]


def train(training: Training, shards: Path, run_dir: Path, backgrounds: Path | None = None) -> pd.DataFrame:
    """Train with train.py in a process of its own; return its metrics.jsonl, a row for each epoch.

    A recipe that uses backgrounds is trained on those, and validated on `shards`.

    If the recipe asks for pretrained weights that are not on this machine, it starts from scratch, and
    `attrs["pretrained"]` says so. Raises RowFailedError.
    """
    words = training.words
    from_scratch = not _has_pretrained(words)
    words += ["--pretrained", "none"] if from_scratch else []
    given = ["--shards", shards, "--run-dir", run_dir, "--epochs", training.epochs, "--seed", training.seed]
    given += ["--tracker", "none", "--checkpoint-minutes", 0]
    if training.recipe.uses_backgrounds:
        assert backgrounds is not None, f"{training.recipe.name}: needs backgrounds"
        given += ["--backgrounds", backgrounds]
    run_program("train.py", *words, *given)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    history = pd.DataFrame([json.loads(line) for line in lines])
    if from_scratch:
        history.attrs["pretrained"] = "none at hand"
    return history


def _has_pretrained(words: Sequence[str]) -> bool:
    """Whether the pretrained weights that a recipe starts from, if any, are on this machine."""
    try:
        config = parse_train_config(["--shards", ".", "--run-dir", ".", *words])
        if config.model.pretrained == "hub":
            build_model(config.model, config.canvas.channels, config.canvas.height, config.canvas.width)
    except NoPretrainedError:
        return False
    except (InputError, SystemExit):
        pass  # train.py will report what is wrong
    return True


def split_sizes(shards: Path) -> tuple[int, int]:
    """How many cadences of the train split are trained on, and how many validate."""
    manifest = read_manifest(shards)
    fold = manifest.fold[manifest.rows("train")]
    return int((fold != 0).sum()), int((fold == 0).sum())


def epochs_in(seconds: float, calibration: pd.DataFrame, calibrated: Path, shards: Path) -> int:
    """How many whole epochs over `shards` fit into `seconds`, from a short run over the shards `calibrated`.

    Only the last epoch of that run counts, as the first one compiles and warms up. If the time is too short for one
    epoch, but long enough for half of one, the answer is 1; below that it raises RowFailedError.
    """
    (trained, held_out), (_, small_held_out) = split_sizes(shards), split_sizes(calibrated)
    last = calibration.iloc[-1]
    epoch_s = float(trained / last["cadences_per_s"] + held_out * last["validation_s"] / small_held_out)
    if epoch_s > 2 * seconds:
        raise RowFailedError(f"an epoch would take {epoch_s:,.0f} s; give more --minutes or fewer --train")
    return max(1, int(seconds / epoch_s))


def predicted(needles: NeedleSet, weights: Path, out: Path) -> pd.Series:
    """Scores of the test split by infer.py, averaged over all views of the canvas."""
    run_program("infer.py", "--shards", needles.shards, "--weights", weights, "--out", out, "--tta")
    return pd.read_csv(out, dtype={"id": str}).set_index("id")["target"].rename("score")


def classical_scores(needles: NeedleSet) -> tuple[pd.Series, float]:
    """The scores of the de-Doppler search on the test split, and its cadences/s."""
    return _scored(needles, lambda snippet: find_drift(snippet).score)


def trivial_table(needles: NeedleSet) -> tuple[Scores, float]:
    """A column for each trivial statistic, and the cadences/s of all of them together."""
    scores, rate = _scored(needles, trivial_scores)
    return pd.DataFrame(scores.tolist(), index=scores.index), rate


def _scored(needles: NeedleSet, score: Callable[[npt.NDArray[np.float16]], object]) -> tuple[pd.Series, float]:
    files = list(test_snippets(needles))
    score(read_snippet(files[0][1])[1])  # compiles
    began = time.perf_counter()
    # Threads suffice: the search's loops release Python's lock.
    with ThreadPoolExecutor(usable_cores()) as pool:
        found = list(pool.map(lambda file: score(read_snippet(file[1])[1]), files))
    rate = len(files) / (time.perf_counter() - began)
    return pd.Series(found, index=pd.Index([key for key, _ in files], name="id"), name="score"), rate
