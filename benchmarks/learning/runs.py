"""What the learning check trains: each preset on a few simulated cadences, with train.py's own step.

A preset whose network is too large for two cores gets swin_nano on canvases of 56 x 56, from random weights. Its
optimiser, learning rate, clipping, weight decay and the steps that make the canvas stay.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from pipeline.augment import DrawConfig
from pipeline.loader import Batch, Loader, LoaderConfig
from pipeline.plan import Order, Share
from shard_tools.errors import InputError
from shard_tools.joined_manifest import read_manifests
from shard_tools.manifest import Manifest
from shard_tools.pack import PackConfig, pack
from shard_tools.simulate import SimulateConfig, simulate
from train import train_step
from training.accelerator import build_accelerator
from training.config import Preset, TrainConfig
from training.metrics import Floats, Ints
from training.model import ModelConfig
from training.prediction import predict_rows
from training.presets import PRESETS
from training.run import Run, build_run

Precision = Literal["float32", "bf16"]
BATCH = 16
_FOLDS = 5
_SMALL_SIDE = 56  # pixels: a fourth of the side of the large presets' canvases
_CONSTANT = 1e9  # epochs of the cosine: the learning rate stays at its highest after the warm-up
_PLAIN = DrawConfig(
    flip_frequency=0.0, roll_frequency=0.0, flip_time=0.0, shift_time=0.0, erase=0.0, gain=0.0, offset=0.0, cutmix=0.0
)


@dataclass(frozen=True)
class Learning:
    """The record of a training."""

    losses: list[float]
    """Training loss of each step."""
    norms: list[dict[str, Any]]
    """As in norms.jsonl (training/part_norms.py)."""
    pass_steps: int
    """Steps in which every cadence is seen once."""
    cadences: int
    failed: str = ""
    """Why it ended early, if it did."""

    @property
    def pass_losses(self) -> Floats:
        """The mean loss of each whole pass over the cadences."""
        whole = len(self.losses) // self.pass_steps * self.pass_steps
        return np.asarray(np.reshape(self.losses[:whole], (-1, self.pass_steps)).mean(axis=1))


def simulate_shards(folder: Path, config: SimulateConfig) -> str:
    """Simulate the train split of `config` into `folder` and pack it; return the folder of the shards.

    A fifth is held out as fold 0: a run needs a fold to validate on.
    """
    simulate(replace(config, out=folder / "data", test=1, workers=1))
    pack(PackConfig(folder / "data", str(folder / "shards"), folds=_FOLDS, workers=1))
    return str(folder / "shards")


def small_preset(preset: Preset) -> TrainConfig:
    """A preset that two cores train in minutes, without its moving average of weights, which changes no step."""
    base = PRESETS[preset]
    model = replace(base.model, pretrained="none")
    canvas = base.canvas
    if model.stem == "none":  # networks behind a search are small as they are
        model = replace(model, model="swin_nano")
        canvas = replace(canvas, height=_SMALL_SIDE, width=_SMALL_SIDE)
    return replace(
        base, model=model, canvas=canvas, batch_size=BATCH, eval_batch_size=BATCH, accumulate=1, ema=0.0,
        tracker=("none",), report=False, loader=LoaderConfig(loader_threads=1),
    )  # fmt: skip


def steps_of_a_pass(cadences: int) -> int:
    """Steps in which each of so many cadences is seen once."""
    return -(-cadences // BATCH)


def memorising(config: TrainConfig, steps: int, pass_steps: int) -> TrainConfig:
    """A configuration without augmentation, whose learning rate stays at its highest for `steps` steps.

    The warm-up is the same share of the steps as it is of the preset's epochs.
    """
    warmup = config.warmup_epochs / config.epochs * steps / pass_steps
    return replace(
        config, epochs=-(-steps // pass_steps), warmup_epochs=warmup, cosine_epochs=_CONSTANT, draws=_PLAIN,
        sampling="uniform", class_weights=None,
    )  # fmt: skip


def whole_recipe(config: TrainConfig, steps: int, pass_steps: int) -> TrainConfig:
    """A configuration as its preset has it, with warm-up and cosine shortened to `steps` steps."""
    epochs = steps / pass_steps
    return replace(
        config,
        epochs=-(-steps // pass_steps),
        warmup_epochs=config.warmup_epochs / config.epochs * epochs,
        cosine_epochs=(config.cosine_epochs or config.epochs) / config.epochs * epochs,
    )


@contextmanager
def opened(config: TrainConfig, shards: tuple[str, ...], precision: str) -> Iterator[Run]:
    """A run of a configuration on `shards`; it writes nothing."""
    config = replace(config, shards=shards, run_dir=Path(os.devnull), precision=precision)  # type: ignore[arg-type]
    run = build_run(config, build_accelerator(precision), read_manifests(config.shards))
    try:
        yield run
    finally:
        run.train_loader.close()
        run.valid_loader.close()


def learn(run: Run, steps: int, enough: float = 0.0) -> Learning:
    """Train `steps` steps, or up to the first pass whose mean loss is below `enough`.

    Ends early if a loss or gradient is not finite, with the reason in `failed`.
    """
    share, failed = run.train_loader.share, ""
    losses: list[float] = []
    found = Learning(losses, run.progress.norms, share.steps, share.length)
    run.model.train()
    try:
        for batch in _training_batches(run, steps):
            losses.append(float(train_step(run, batch)) * share.global_batch / int(batch.counts.sum()))
            run.progress.norms += run.norms.read()
            if len(losses) % share.steps == 0 and found.pass_losses[-1] < enough:
                break
    except InputError as error:  # a loss or gradient that is not finite
        failed = str(error)
    return replace(found, failed=failed)


def _training_batches(run: Run, count: int) -> Iterator[Batch]:
    """The first batches of a run, over as many epochs as it takes."""
    left = count
    while left:
        for batch in run.train_loader:
            yield batch
            left -= 1
            if not left:
                return


def scores(run: Run, manifest: Manifest, most: int) -> tuple[Ints, Floats]:
    """Targets and logits of up to `most` cadences of the train split of another data set, by a run's network."""
    rows = manifest.rows("train")[:most]
    order = Order(rows, manifest.target[rows], "sequential")
    share = Share(len(rows), run.config.eval_batch_size)
    device, config = run.accelerator.device, run.config
    with Loader(manifest, order, share, config.canvas, device=device, config=config.loader) as loader:
        found, logit = predict_rows(run.accelerator, run.judged_model, loader, "scores")
    return manifest.target[found], logit


def mean_losses(target: Ints, logit: Floats) -> tuple[float, float]:
    """The mean binary cross-entropy of cadences without and with a needle."""
    losses: npt.NDArray[np.float64] = np.logaddexp(0, np.where(target == 1, -logit, logit))
    return float(losses[target == 0].mean()), float(losses[target == 1].mean())


def untrained(preset: Preset) -> TrainConfig:
    """A preset with its own network and canvas and random weights: nothing is trained, so size matters less."""
    base = PRESETS[preset]
    model: ModelConfig = replace(base.model, pretrained="none")
    return replace(
        base, model=model, batch_size=BATCH, eval_batch_size=BATCH, ema=0.0, loader=LoaderConfig(loader_threads=1)
    )


def use_one_thread() -> None:
    """Keep a process to one core: several trainings run beside each other."""
    torch.set_num_threads(1)
