"""Train: shards to weights, on any number of devices. python train.py --help"""

import shard_tools.openmp  # noqa: F401  before torch is loaded

# isort: split
import contextlib
import json
import logging
import os
import sys
import time

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pipeline.loader import Batch
from pipeline.plan import Share
from pipeline.stall import StallTimer
from reports.plots import write_curves, write_roc
from reports.sections import write_training_report
from shard_tools.atomic_files import write_whole
from shard_tools.baselines import read_trivial_auc
from shard_tools.errors import InputError, run_command
from shard_tools.joined_manifest import read_manifests
from shard_tools.progress import progress
from training.accelerator import build_accelerator
from training.checkpoint import point_best_to_last, save_checkpoint
from training.config import TrainConfig, run_identity, to_dict
from training.cross_validation import train_folds
from training.drivers import check_gpu
from training.environment import cpu_is_asked_for
from training.finite import clip_gradients
from training.interruption import exit_when_asked, launcher_of
from training.metrics import average_precision, roc_auc
from training.out_of_fold import read_scores, write_scores
from training.prediction import predict_rows
from training.presets import parse_train_config
from training.resume import resume
from training.run import CONFIG, Run, about_weights, build_network, build_run, own_run_dir
from training.tracker import start_tracker
from training.weights import save_weights

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
_TRIVIAL_SAMPLES = 2000
_log = logging.getLogger("train")


def soft_target_loss(logit: Tensor, batch: Batch, share: Share) -> Tensor:
    """This rank's part of the mean binary cross-entropy of a step, against targets in 0 to 1; logit (B,).

    Over the whole global batch, in its last short step too, so that each cadence weighs the same in an epoch; times
    the world size, because ranks average their gradients.
    """
    losses = binary_cross_entropy_with_logits(logit.float(), batch.target, reduction="none")
    return (losses * batch.counts).sum() * (share.world_size / share.global_batch)


class RunInterruptedError(Exception):
    """The run was asked to stop, and its last checkpoint holds all that was trained."""


def train_step(run: Run, batch: Batch, is_last: bool = True) -> Tensor:
    """Learn from one micro-batch, and after the last of a step take the step; return its part of the step's loss."""
    share, state = run.train_loader.share, run.progress
    with contextlib.nullcontext() if is_last else run.accelerator.no_sync(run.model):
        with run.accelerator.autocast():
            logit = run.model(batch.image).squeeze(1)
        loss = soft_target_loss(logit, batch, share)
        run.accelerator.backward(loss)
    run.watch.add_loss(loss)
    if is_last:
        run.schedule.step_update(state.step)
        norm = clip_gradients(run.accelerator, run.model, run.config.clip)
        run.watch.before_update(state.step + 1, norm)
        run.optimiser.step()
        run.optimiser.zero_grad(set_to_none=True)
        state.step += 1
        if run.ema is not None:
            run.ema.update(run.bare_model, step=state.step)
    return loss.detach()


def train_epoch(run: Run) -> dict[str, float]:
    """Train to the end of the epoch that the loader is in; return its loss, rate and stall."""
    config, share, state = run.config, run.train_loader.share, run.progress
    first = state.step
    run.model.train()
    # Read once an epoch: a look each step would stop the GPU. In float64, so that it does not matter where it is cut.
    losses = torch.zeros((), device=run.accelerator.device, dtype=torch.float64)
    batches = StallTimer(run.train_loader, run.accelerator.device)
    began = time.perf_counter()
    left = (share.steps - first % share.steps) * share.accumulate
    for micro, batch in enumerate(progress(batches, left, f"epoch {len(state.history) + 1}", "batches"), start=1):
        is_last = micro % share.accumulate == 0
        losses += train_step(run, batch, is_last)
        if not is_last:
            continue
        stop, due = run.interruption.agree()
        due |= bool(config.checkpoint_every) and state.step % config.checkpoint_every == 0
        if state.step % share.steps and (stop or due):  # the end of an epoch has its own
            _check_weights(run, batch)
            state.loss_sum, losses = state.loss_sum + _over_ranks(run, losses), torch.zeros_like(losses)
            _save(run)
            if stop:
                raise RunInterruptedError
    loss_sum = state.loss_sum + _over_ranks(run, losses)
    seconds = time.perf_counter() - began
    _check_weights(run, batch)
    trained = share.length - first % share.steps * share.global_batch
    state.loss_sum = 0.0
    return {
        "loss": loss_sum * share.global_batch / share.length,
        "cadences_per_s": trained / seconds,
        "stall": batches.seconds / seconds,
    }


def _check_weights(run: Run, batch: Batch) -> None:
    """Before a checkpoint: raise InputError where a step since the last one was not sound, by its own batch."""
    run.bare_model.eval()
    with torch.inference_mode(), run.accelerator.autocast():
        logit = run.bare_model(batch.image)
    run.watch.check(run.progress.step, logit)
    run.bare_model.train()


def _over_ranks(run: Run, losses: Tensor) -> float:
    """The mean over ranks, of which each counted its own cadences times the world size."""
    return float(run.accelerator.reduce(losses, "mean"))


def validate(run: Run) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Rows and logits of the whole held-out fold. Raises RunInterruptedError between two batches."""

    def stop_if_asked() -> None:
        if run.interruption.agree()[0]:
            raise RunInterruptedError

    rows, logit = predict_rows(run.accelerator, run.judged_model, run.valid_loader, "validation", stop_if_asked)
    if not np.isfinite(logit).all():
        raise InputError(
            f"epoch {len(run.progress.history) + 1}: the model's output is not finite any more; start again with a "
            f"lower --learning-rate than {run.config.learning_rate}, or with --precision float32"
        )
    return rows, logit


def train(config: TrainConfig) -> None:
    """Train a run to its end, or on from its last checkpoint."""
    accelerator = build_accelerator(config.precision, **start_tracker(config))
    network = build_network(config, accelerator)
    manifest = read_manifests(config.shards, config.store)
    with own_run_dir(config, accelerator, manifest):
        run = build_run(config, accelerator, manifest, network)
        if accelerator.is_main_process:
            identity = run_identity(config, manifest.identity, accelerator.num_processes)
            write_whole(config.run_dir / CONFIG, json.dumps(identity, indent=1) + "\n")
        accelerator.init_trackers("needlestream", to_dict(config))
        if config.resume:
            resume(run)
        _log.info(
            "training on %s (%s, %s): %s cadences, validation on %s of fold %d",
            "1 rank" if accelerator.num_processes == 1 else f"{accelerator.num_processes} ranks",
            accelerator.device.type, accelerator.mixed_precision,
            f"{run.train_loader.share.length:,}", f"{run.valid_loader.share.length:,}", config.held_out,
        )  # fmt: skip
        with run.interruption:
            while len(run.progress.history) < config.epochs:
                if run.progress.trained is None:
                    run.progress.trained = train_epoch(run)
                    # Before the validation: a run that ends in it, or while it is written down, repeats that alone.
                    _save(run)
                _finish_epoch(run, run.progress.trained)
        _finish_run(run)
        run.train_loader.close()
        run.valid_loader.close()
    # Not end_training: it would take the ranks apart, and the next fold needs them.
    for tracker in accelerator.trackers:
        tracker.finish()


def _finish_epoch(run: Run, trained: dict[str, float]) -> None:
    """Validate what was trained, keep the best weights and their scores, and write the epoch down."""
    began = time.perf_counter()
    rows, logit = validate(run)
    target = run.manifest.target[rows]
    line = {"epoch": float(len(run.progress.history) + 1), **trained}
    line["auc"], line["average_precision"] = roc_auc(target, logit), average_precision(target, logit)
    line["validation_s"] = time.perf_counter() - began
    line["learning_rate"] = run.optimiser.param_groups[0]["lr"]
    is_best = line["auc"] > run.progress.best_auc or not run.progress.history
    run.progress.best_auc = max(run.progress.best_auc, line["auc"])
    run.progress.history.append(line)
    run.progress.trained = None
    run_dir = run.config.run_dir
    if run.accelerator.is_main_process:
        if is_best:
            save_weights(run_dir / "best.safetensors", run.judged_model.state_dict(), about_weights(run, line["auc"]))
            write_scores(run_dir / "oof.csv", run.manifest.keys_of(rows), target, logit)
            point_best_to_last(run_dir)
        lines = "".join(json.dumps(entry) + "\n" for entry in run.progress.history)
        write_whole(run_dir / "metrics.jsonl", lines)
        write_curves(run_dir / "curves.png", run.progress.history)
    run.accelerator.log(line, step=run.progress.step)
    _log.info(
        "epoch %d of %d: loss %.4f, validation ROC AUC %.4f%s, %.0f cadences/s, stall %.1f %%",
        line["epoch"], run.config.epochs, line["loss"], line["auc"], " (best)" if is_best else "",
        line["cadences_per_s"], 100 * line["stall"],
    )  # fmt: skip
    if len(run.progress.history) == run.config.epochs:
        _save(run, best=is_best)  # or a finished run that is started again would validate again


def _save(run: Run, best: bool = False) -> None:
    run.progress.skipped |= dict(gather_object(list(run.train_loader.skipped.items())))
    save_checkpoint(run.accelerator, run.config.run_dir, run.progress.step, best)
    run.interruption.checkpoint_was_made()


def _finish_run(run: Run) -> None:
    """Draw the ROC of the best weights, and say how far above trivial statistics they are and what was skipped."""
    skipped = run.progress.skipped
    if not run.accelerator.is_main_process:
        return
    run_dir, manifest = run.config.run_dir, run.manifest
    judged = read_scores(run_dir / "oof.csv")
    write_roc(run_dir / "roc.png", judged.target, judged.logit, run.progress.best_auc)
    rows = manifest.rows("train", run.config.held_out, held_out=True)
    rows = rows[np.linspace(0, len(rows) - 1, min(_TRIVIAL_SAMPLES, len(rows)), dtype=np.int64)]
    trivial = read_trivial_auc(manifest, rows)
    summary = {"auc": run.progress.best_auc, "trivial_auc": trivial, "epochs": run.config.epochs}
    summary["skipped"] = skipped
    write_whole(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(f"validation ROC AUC {run.progress.best_auc:.4f} on fold {run.config.fold}, {len(judged.keys):,} cadences")
    print("trivial statistics: " + ", ".join(f"{name} {auc:.4f}" for name, auc in trivial.items()))
    if skipped:
        print(f"skipped {len(skipped)} bad samples (see summary.json): {', '.join(sorted(skipped)[:10])}")
    print(f"run folder: {run_dir}  (best.safetensors, oof.csv, metrics.jsonl, curves.png, roc.png)")
    # Last: whatever keeps the page from being made, the run is whole without it.
    if run.config.report:
        print(f"report:     {write_training_report(run_dir, manifest, run.accelerator)}")


def main() -> int:
    """Parse the command line and train; return the exit code."""
    config = parse_train_config()
    check_gpu(cpu_is_asked_for())
    # Outside of a run's loop, which finishes its step: before, after and between folds there is nothing to lose.
    exit_when_asked(EXIT_PREEMPTED)
    try:
        if config.fold == "all":
            train_folds(config, train, write_roc)
        else:
            train(config)
    except RunInterruptedError:
        if PartialState().is_main_process:
            said = f"stopped after a checkpoint; the same command with --resume goes on ({config.run_dir})"
            launched = launcher_of(os.getppid()) is not None
            print(said + ("; the launcher will report this as a failure" if launched else ""), file=sys.stderr)
        return EXIT_PREEMPTED
    PartialState().destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, again="run the same command with --resume"))
