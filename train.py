"""Train: shards to weights, on any number of devices. python train.py --help"""

import contextlib
import csv
import io
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from checkpoint import load_last_checkpoint, save_checkpoint
from config import TrainConfig, check_same_run, parse_train_config, to_dict
from infer import build_accelerator, predict
from metrics import average_precision, roc_auc, sigmoid
from model import build_model, save_weights
from pipeline.loader import Batch, Loader
from pipeline.plan import Order, Share
from report import write_curves, write_roc
from shard_tools.errors import InputError, run_command
from shard_tools.files import folder_lock, write_whole
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.progress import progress
from shard_tools.trivial import read_trivial_auc
from tracker import start_tracker

_TRIVIAL_SAMPLES = 2000
_log = logging.getLogger("train")


@dataclass
class Progress:
    """How far a run is; part of every checkpoint."""

    step: int = 0
    best_auc: float = -math.inf
    history: list[dict[str, float]] = field(default_factory=list)
    """One line per finished epoch."""
    loss_sum: float = 0.0
    """Of this epoch so far, over the cadences of this rank."""

    def state_dict(self) -> dict[str, Any]:
        """For Accelerate's checkpoints."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From Accelerate's checkpoints."""
        vars(self).update(state)


@dataclass
class Run:
    """The parts of one training run."""

    config: TrainConfig
    accelerator: Accelerator
    manifest: Manifest
    train_loader: Loader
    valid_loader: Loader
    bare_model: nn.Module
    """The network itself."""
    model: nn.Module
    """The network as it is trained: compiled, distributed."""
    ema: ModelEmaV3 | None
    optimiser: Any
    schedule: CosineLRScheduler
    progress: Progress = field(default_factory=Progress)

    @property
    def judged_model(self) -> nn.Module:
        """What is validated and saved."""
        return self.bare_model if self.ema is None else self.ema.module


def build_run(config: TrainConfig, accelerator: Accelerator, manifest: Manifest) -> Run:
    """Put the parts of a run together, on this rank."""
    folds = manifest.made["folds"]
    if config.fold >= folds:
        raise InputError(f"--fold {config.fold}: {config.shards} has folds 0 to {folds - 1}")
    set_seed(config.seed)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    rows, held_out = (manifest.rows("train", config.fold, held_out=out) for out in (False, True))
    order = Order(rows, manifest.target[rows], config.sampling, config.seed, config.class_weights)
    share = Share(len(order), config.batch_size, config.accumulate, rank, world_size)
    train_loader = Loader(
        manifest, order, share, config.canvas, config.draws, device=accelerator.device, config=config.loader
    )
    valid_order = Order(held_out, manifest.target[held_out], "sequential")
    valid_share = Share(len(valid_order), config.eval_batch_size, 1, rank, world_size)
    valid_loader = Loader(
        manifest, valid_order, valid_share, config.canvas, device=accelerator.device, config=config.loader
    )
    canvas = config.canvas
    bare_model = build_model(config.model, canvas.channels, canvas.height, canvas.width).to(accelerator.device)
    ema = ModelEmaV3(bare_model, decay=config.ema, use_warmup=True) if config.ema else None
    bare_optimiser = build_optimiser(config, bare_model)
    schedule = build_schedule(config, bare_optimiser, share.steps)
    model = torch.compile(bare_model) if config.compile else bare_model
    model, optimiser = accelerator.prepare(model, bare_optimiser)
    run = Run(config, accelerator, manifest, train_loader, valid_loader, bare_model, model, ema, optimiser, schedule)
    accelerator.register_for_checkpointing(run.progress, train_loader, *([ema] if ema else []))
    return run


def build_optimiser(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW without decay on biases and norms, or plain Adam."""
    if config.optimiser == "adam":
        return torch.optim.Adam(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    groups = param_groups_weight_decay(model, config.weight_decay)
    return torch.optim.AdamW(groups, config.learning_rate)


def build_schedule(config: TrainConfig, optimiser: torch.optim.Optimizer, steps_per_epoch: int) -> CosineLRScheduler:
    """Linear warm-up, then half a cosine; a pure function of the step."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    total = round((config.cosine_epochs or config.epochs) * steps_per_epoch)
    return CosineLRScheduler(
        optimiser,
        t_initial=max(total - warmup, 1),
        lr_min=config.min_learning_rate,
        warmup_t=warmup,
        warmup_lr_init=config.min_learning_rate,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def soft_target_loss(logit: Tensor, batch: Batch, share: Share) -> Tensor:
    """This rank's part of the mean binary cross-entropy of a step, against targets in 0 to 1; logit (B,).

    Over the whole global batch, in its last short step too, so that each cadence weighs the same in an epoch; times
    the world size, because ranks average their gradients.
    """
    losses = binary_cross_entropy_with_logits(logit.float(), batch.target, reduction="none")
    return (losses * batch.counts).sum() * (share.world_size / share.global_batch)


class Timed:
    """Iterate, and count the seconds spent waiting."""

    def __init__(self, batches: Loader) -> None:
        self._batches = batches
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        iterator = iter(self._batches)
        while True:
            began = time.perf_counter()
            batch = next(iterator, None)
            self.seconds += time.perf_counter() - began
            if batch is None:
                return
            yield batch


def train_epoch(run: Run) -> dict[str, float]:
    """Train to the end of the epoch that the loader is in; return its loss, rate and stall."""
    config, share, state = run.config, run.train_loader.share, run.progress
    first = state.step
    run.model.train()
    losses = torch.zeros((), device=run.accelerator.device)  # read once an epoch: a look each step would stop the GPU
    batches = Timed(run.train_loader)
    began = time.perf_counter()
    left = (share.steps - first % share.steps) * share.accumulate
    for micro, batch in enumerate(progress(batches, left, f"epoch {len(state.history) + 1}", "batches"), start=1):
        last_of_step = micro % share.accumulate == 0
        with contextlib.nullcontext() if last_of_step else run.accelerator.no_sync(run.model):
            with run.accelerator.autocast():
                logit = run.model(batch.image).squeeze(1)
            loss = soft_target_loss(logit, batch, share)
            run.accelerator.backward(loss)
        losses += loss.detach()
        if not last_of_step:
            continue
        run.schedule.step_update(state.step)
        if config.clip:
            run.accelerator.clip_grad_norm_(run.model.parameters(), config.clip)
        run.optimiser.step()
        run.optimiser.zero_grad(set_to_none=True)
        state.step += 1
        if run.ema is not None:
            run.ema.update(run.bare_model, step=state.step)
        if config.checkpoint_every and state.step % config.checkpoint_every == 0 and state.step % share.steps:
            state.loss_sum, losses = state.loss_sum + float(losses), torch.zeros_like(losses)
            save_checkpoint(run.accelerator, config.run_dir, state.step, best=False)
    state.loss_sum += float(losses)
    seconds = time.perf_counter() - began
    trained = min((state.step - first) * share.global_batch, share.length)
    mean_loss = run.accelerator.reduce(torch.tensor(state.loss_sum, device=losses.device), "mean").item()
    state.loss_sum = 0.0
    return {
        "loss": mean_loss * share.global_batch / share.length,
        "cadences_per_s": trained / seconds,
        "stall": batches.seconds / seconds,
    }


def validate(run: Run) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Rows and scores of the whole held-out fold."""
    rows, logit = predict(run.accelerator, run.judged_model, run.valid_loader, "validation")
    return rows, sigmoid(logit)


def train(config: TrainConfig) -> None:
    """Train a run to its end, or on from its last checkpoint."""
    manifest = read_manifest(config.shards)
    accelerator = build_accelerator(config.precision, **start_tracker(config))
    with _own_run_dir(config, accelerator, manifest):
        run = build_run(config, accelerator, manifest)
        accelerator.init_trackers("needlestream", to_dict(config), {"wandb": {"dir": str(config.run_dir)}})
        if config.resume and load_last_checkpoint(accelerator, config.run_dir):
            _log.info("going on after step %d", run.progress.step)
        while len(run.progress.history) < config.epochs:
            line = {"epoch": float(len(run.progress.history) + 1), **train_epoch(run)}
            _finish_epoch(run, line)
        _finish_run(run)
        run.train_loader.close()
        run.valid_loader.close()
    accelerator.end_training()


def _finish_epoch(run: Run, line: dict[str, float]) -> None:
    """Validate, keep the best weights and their scores, write the epoch down and make a checkpoint."""
    began = time.perf_counter()
    rows, score = validate(run)
    target = run.manifest.target[rows]
    line["auc"], line["average_precision"] = roc_auc(target, score), average_precision(target, score)
    line["validation_s"] = time.perf_counter() - began
    line["learning_rate"] = run.optimiser.param_groups[0]["lr"]
    is_best = line["auc"] > run.progress.best_auc or not run.progress.history
    run.progress.best_auc = max(run.progress.best_auc, line["auc"])
    run.progress.history.append(line)
    run_dir = run.config.run_dir
    if run.accelerator.is_main_process:
        if is_best:
            save_weights(run_dir / "best.safetensors", run.judged_model.state_dict(), _about(run, line["auc"]))
            _write_scores(run_dir / "oof.csv", run.manifest.keys_of(rows), target, score)
        lines = "".join(json.dumps(entry) + "\n" for entry in run.progress.history)
        write_whole(run_dir / "metrics.jsonl", lines)
        write_curves(run_dir / "curves.png", run.progress.history)
    run.accelerator.log(line, step=run.progress.step)
    _log.info(
        "epoch %d of %d: loss %.4f, validation ROC AUC %.4f%s, %.0f cadences/s, stall %.1f %%",
        line["epoch"], run.config.epochs, line["loss"], line["auc"], " (best)" if is_best else "",
        line["cadences_per_s"], 100 * line["stall"],
    )  # fmt: skip
    save_checkpoint(run.accelerator, run_dir, run.progress.step, best=is_best)


def _finish_run(run: Run) -> None:
    """Draw the ROC of the best weights and say how far above trivial statistics they are."""
    if not run.accelerator.is_main_process:
        return
    run_dir, manifest = run.config.run_dir, run.manifest
    with (run_dir / "oof.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    target = np.array([int(line["target"]) for line in lines])
    score = np.array([float(line["score"]) for line in lines])
    write_roc(run_dir / "roc.png", target, score, run.progress.best_auc)
    rows = manifest.rows("train", run.config.fold, held_out=True)
    rows = rows[np.linspace(0, len(rows) - 1, min(_TRIVIAL_SAMPLES, len(rows)), dtype=np.int64)]
    trivial = read_trivial_auc(manifest, rows)
    summary = {"auc": run.progress.best_auc, "trivial_auc": trivial, "epochs": run.config.epochs}
    write_whole(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(f"validation ROC AUC {run.progress.best_auc:.4f} on fold {run.config.fold}, {len(lines):,} cadences")
    print("trivial statistics: " + ", ".join(f"{name} {auc:.4f}" for name, auc in trivial.items()))
    print(f"run folder: {run_dir}  (best.safetensors, oof.csv, metrics.jsonl, curves.png, roc.png)")


@contextlib.contextmanager
def _own_run_dir(config: TrainConfig, accelerator: Accelerator, manifest: Manifest) -> Iterator[None]:
    """Take the run folder for this run: no other may write there, and what it holds must be this run's."""
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(folder_lock(config.run_dir, ".lock"))
            path, mine = config.run_dir / "config.json", {**to_dict(config), "shards_identity": manifest.identity}
            others = sorted(entry.name for entry in config.run_dir.iterdir() if entry.name != ".lock")
            if path.is_file():
                check_same_run(json.loads(path.read_text()), mine, config.run_dir)
            if others and (not path.is_file() or not config.resume):
                raise InputError(
                    f"{config.run_dir}: not empty ({others[0]}); give --resume to go on, or another folder"
                )
            write_whole(path, json.dumps(mine, indent=1) + "\n")
        accelerator.wait_for_everyone()
        yield


def _about(run: Run, auc: float) -> dict[str, Any]:
    """What someone needs to use the weights."""
    plain = to_dict(run.config)
    return {
        "model": plain["model"]["model"],
        "canvas": plain["canvas"],
        "shape": list(run.manifest.shape),
        "fold": run.config.fold,
        "auc": auc,
        "shards_identity": run.manifest.identity,
    }


def _write_scores(path: Path, keys: list[str], target: npt.NDArray[np.int8], score: npt.NDArray[np.float64]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "target", "score"])
    writer.writerows(zip(keys, target.tolist(), score.tolist(), strict=True))
    write_whole(path, text.getvalue())


def main() -> None:
    """Parse the command line and train."""
    train(parse_train_config())


if __name__ == "__main__":
    sys.exit(run_command(main))
