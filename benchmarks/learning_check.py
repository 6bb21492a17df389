"""Can the presets learn at all? Takes minutes on two cores.

    make learning-check
    python benchmarks/learning_check.py [--presets demo] [--out DIR]

Four checks of each preset, with train.py's own step:
- It memorises 128 simulated cadences without augmentation, in float32 and under bf16. Their needles are too faint to
  be seen, so that nothing but memory helps.
- Before the first step its loss is at most that of a guess by the classes' shares.
- Every part of its network has a gradient that is finite and not 0, and updates that are neither tiny nor huge.
- Twice the cadences, trained on for the same number of steps, do not give a lower ROC AUC (demo alone: networks that
  see the whole canvas learn nothing from so few).
It prints a table, draws a picture, and exits with 1 if a check fails. Networks that are too large for two cores are
replaced by a small one (benchmarks/learning/runs.py).
"""

import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shard_tools.system.allocator
import shard_tools.system.openmp  # noqa: F401  before torch is loaded

# isort: split
import tyro

from benchmarks.learning.charts import write_learning
from benchmarks.learning.runs import (
    Learning,
    Precision,
    learn,
    memorising,
    opened,
    scores,
    simulate_shards,
    small_preset,
    steps_of_a_pass,
    untrained,
    use_one_thread,
    whole_recipe,
)
from benchmarks.learning.verdicts import (
    MEMORISED,
    Verdict,
    judge_doubling,
    judge_memory,
    judge_norms,
    judge_start,
    table,
)
from shard_tools.errors import InputError
from shard_tools.joined_manifest import read_manifests
from shard_tools.simulate import SimulateConfig
from shard_tools.system.command import run_command
from shard_tools.system.cores import usable_cores
from training.config import Preset
from training.metrics import Floats, Ints

_PRECISIONS: tuple[Precision, ...] = ("float32", "bf16")
_AT_START = 32  # cadences for the loss before the first step: a large network takes half a second for each
_DOUBLED: tuple[Preset, ...] = ("demo",)
_HELD_OUT = 1.25  # cadences to simulate for each one that is trained on: a fifth is held out
# SNRs of needles as in the demonstration (Makefile), and of needles too faint for any search.
_BRIGHT, _FAINT = (300.0, 3000.0), (1.0, 3.0)


@dataclass(frozen=True)
class LearningCheckConfig:
    """Check that the presets can learn: memorise, start well, move every part, and gain from data."""

    presets: tuple[Preset, ...] = ("demo", "seed", "full")
    """Which presets to check."""
    cadences: int = 128
    """Cadences to memorise."""
    within: int = 320
    """Steps in which they have to be memorised."""
    steps: int = 1000
    """Steps under bf16; a power of ten, so that the gradients and updates of the last one are recorded."""
    few: int = 200
    """Cadences of the smaller training set; the larger has twice as many."""
    test: int = 300
    """Cadences to test the two on."""
    doubling_steps: int = 300
    """Steps of a training on either."""
    seeds: int = 2
    """Trainings on each of the two."""
    work_dir: Path = Path(tempfile.gettempdir())
    """Folder for the data: 2 MB for each cadence, removed at the end."""
    out: Path = Path("learning-check.png")
    """The picture."""

    def __post_init__(self) -> None:
        for name in ("cadences", "within", "steps", "few", "test", "doubling_steps", "seeds"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")


Submit = Callable[..., Future[Any]]
"""Starts a function of this module in another process."""
Scores = tuple[Ints, Floats]
"""Targets and logits of some cadences."""


@dataclass(frozen=True)
class Findings:
    """What was measured."""

    memories: dict[tuple[Preset, Precision], Learning]
    starts: dict[Preset, Scores]
    doublings: dict[tuple[Preset, str], list[Scores]]
    """The scores of each training on "few" cadences, and of each on "twice" as many."""

    def verdicts(self, config: LearningCheckConfig) -> list[Verdict]:
        """A verdict for each check of each preset."""
        found = [judge_memory(*names, learning, config.within) for names, learning in self.memories.items()]
        found += [judge_start(preset, "float32", *start) for preset, start in self.starts.items()]
        for (preset, precision), learning in self.memories.items():
            found += judge_norms(preset, precision, learning)
        for preset in dict.fromkeys(preset for preset, _ in self.doublings):
            few, twice = ([logit for _, logit in self.doublings[preset, size]] for size in ("few", "twice"))
            found.append(judge_doubling(preset, "auto", self.doublings[preset, "few"][0][0], few, twice))
        return found


def memorise(preset: Preset, precision: Precision, shards: str, config: LearningCheckConfig) -> Learning:
    """Train a preset on `shards` without augmentation until it has memorised them; under bf16 for all `steps`."""
    pass_steps = steps_of_a_pass(config.cadences)
    trained = memorising(small_preset(preset), config.within, pass_steps)
    with opened(trained, (shards,), precision) as run:
        if precision == "bf16":
            return learn(run, max(config.within, config.steps))
        return learn(run, config.within, enough=MEMORISED)


def score_untrained(preset: Preset, shards: str) -> Scores:
    """Targets and logits of a few cadences by a new network, in the preset's own size."""
    with opened(untrained(preset), (shards,), "float32") as run:
        return scores(run, run.manifest, _AT_START)


def score_trained(preset: Preset, shards: tuple[str, ...], test: str, seed: int, config: LearningCheckConfig) -> Scores:
    """Targets and logits of the cadences of `test` by a preset that was trained on `shards`."""
    steps = config.doubling_steps
    recipe = whole_recipe(small_preset(preset), steps, steps_of_a_pass(len(shards) * config.few))
    with opened(replace(recipe, seed=seed), shards, "auto") as run:
        learn(run, steps)
        return scores(run, read_manifests((test,)), config.test)


def simulate_all(folder: Path, config: LearningCheckConfig, submit: Submit) -> tuple[str, str, str, str]:
    """Shards of faint needles to memorise, and of bright ones: two to train on and one to test on."""
    wanted = ((config.cadences, _FAINT), (config.few, _BRIGHT), (config.few, _BRIGHT), (config.test, _BRIGHT))
    made = [
        submit(simulate_shards, folder / str(seed), SimulateConfig(
            folder, train=math.ceil(_HELD_OUT * cadences), seed=seed, positive_share=0.5, snr_min=snr[0],
            snr_max=snr[1],
        ))
        for seed, (cadences, snr) in enumerate(wanted)
    ]  # fmt: skip
    faint, first, second, test = (each.result() for each in made)
    return faint, first, second, test


def measure(config: LearningCheckConfig, folder: Path, submit: Submit) -> Findings:
    """Train and score everything; `submit` starts a function in another process."""
    faint, first, second, test = simulate_all(folder, config, submit)
    memories = {
        (preset, precision): submit(memorise, preset, precision, faint, config)
        for preset in config.presets
        for precision in _PRECISIONS
    }
    starts = {preset: submit(score_untrained, preset, test) for preset in config.presets}
    sizes = {"few": (first,), "twice": (first, second)}
    doublings = {
        (preset, size): [submit(score_trained, preset, sizes[size], test, seed, config) for seed in range(config.seeds)]
        for preset in config.presets
        for size in sizes
        if preset in _DOUBLED
    }
    return Findings(
        {names: each.result() for names, each in memories.items()},
        {preset: each.result() for preset, each in starts.items()},
        {names: [each.result() for each in runs] for names, runs in doublings.items()},
    )


def conclude(findings: Findings, config: LearningCheckConfig) -> int:
    """Print the table and draw the picture; return 1 if a check failed, else 0."""
    verdicts = findings.verdicts(config)
    print(table(verdicts))
    write_learning(config.out, [(*names, learning) for names, learning in findings.memories.items()])
    print(f"\npicture: {config.out}")
    return int(not all(verdict.passed for verdict in verdicts))


def main(config: LearningCheckConfig) -> int:
    """Measure and conclude; return the exit code."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes below, each of which has a core
    spawn = multiprocessing.get_context("spawn")
    # A process for each training: Accelerate's precision is fixed for the life of a process.
    with (
        tempfile.TemporaryDirectory(dir=config.work_dir) as folder,
        ProcessPoolExecutor(usable_cores(), spawn, use_one_thread, max_tasks_per_child=1) as pool,
    ):
        findings = measure(config, Path(folder), pool.submit)
    return conclude(findings, config)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(tyro.cli(LearningCheckConfig))))
