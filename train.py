"""Train: shards to weights, on any number of devices. python train.py --help"""

import sys

import shard_tools.system.allocator
import shard_tools.system.openmp  # noqa: F401  before torch is loaded
from pipeline import compile_ahead

if __name__ == "__main__":
    compile_ahead.start(compile_ahead.training_kernels(sys.argv))

# isort: split
import contextlib
import logging
import os
import time

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
from reports.tracked_results import track_results
from shard_tools.joined_manifest import read_manifests
from shard_tools.system.command import run_command
from shard_tools.system.progress import progress
from training.accelerator import build_accelerator
from training.checkpoint import save_checkpoint
from training.config import TrainConfig
from training.cross_validation import train_folds
from training.drivers import check_gpu
from training.environment import cpu_is_asked_for
from training.finite import clip_gradients
from training.interruption import RunInterruptedError, exit_when_asked, launcher_of
from training.presets import parse_train_config
from training.results import (
    add_norms,
    add_to_history,
    read_best_scores,
    write_best,
    write_history,
    write_norms,
    write_summary,
)
from training.resume import resume
from training.run import Run, build_network, build_run, log_start, own_run_dir, read_backgrounds, write_config
from training.tracker import build_trackers, start_trackers
from training.validation import check_weights, validate
from training.validation_set import with_validation_set

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
_log = logging.getLogger("train")


def soft_target_loss(logit: Tensor, batch: Batch, share: Share) -> Tensor:
    """This rank's part of a step's mean binary cross-entropy, with targets from 0 to 1; logit (B,).

    Divides by the full global batch even in a short last step, so that every cadence has the same weight. Multiplies by
    the world size because ranks average their gradients.
    """
    losses = binary_cross_entropy_with_logits(logit.float(), batch.target, reduction="none")
    return (losses * batch.counts).sum() * (share.world_size / share.global_batch)


def train_step(run: Run, batch: Batch, ends_step: bool = True) -> Tensor:
    """Add a micro-batch's gradients; after the step's last one, update the weights. Return its part of the loss."""
    share, state = run.train_loader.share, run.progress
    with contextlib.nullcontext() if ends_step else run.accelerator.no_sync(run.model):
        with run.accelerator.autocast():
            logit = run.model(batch.image).squeeze(1)
        loss = soft_target_loss(logit, batch, share)
        run.accelerator.backward(loss)
    run.watch.add_loss(loss)
    if ends_step:
        run.schedule.step_update(state.step)
        with run.norms.around_update(state.step + 1):
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
    share, state = run.train_loader.share, run.progress
    first = state.step
    run.model.train()
    # Read once an epoch: reading it each step would stall the GPU. In float64, so that checkpoints, at which the sum
    # starts again, do not change the total.
    losses = torch.zeros((), device=run.accelerator.device, dtype=torch.float64)
    batches = StallTimer(run.train_loader, run.accelerator.device)
    began = time.perf_counter()
    left = (share.steps - first % share.steps) * share.accumulate
    for micro, batch in enumerate(progress(batches, left, f"epoch {len(state.history) + 1}", "batches"), start=1):
        ends_step = micro % share.accumulate == 0
        if micro == left:
            run.valid_loader.begin()  # it makes the first batches of validation during the last step
        losses += train_step(run, batch, ends_step)
        if ends_step and state.step % share.steps:  # `train` always saves a checkpoint after an epoch's last step
            _checkpoint_if_due(run, batch, losses)
    loss_sum = state.loss_sum + _sum_over_ranks(run, losses)
    seconds = time.perf_counter() - began
    check_weights(run, batch)
    trained = share.length - first % share.steps * share.global_batch
    state.loss_sum = 0.0
    return {
        "loss": loss_sum * share.global_batch / share.length,
        "cadences_per_s": trained / seconds,
        "stall": batches.seconds / seconds,
    }


def _checkpoint_if_due(run: Run, batch: Batch, losses: Tensor) -> None:
    """Save a checkpoint if one is due or the run was asked to stop, after moving `losses` into the run's total.

    Raises RunInterruptedError after saving if the run was asked to stop.
    """
    state, every = run.progress, run.config.checkpoint_every
    stop, due = run.interruption.agree()
    if not (stop or due or (every and state.step % every == 0)):
        return
    check_weights(run, batch)
    state.loss_sum += _sum_over_ranks(run, losses)
    losses.zero_()
    _save(run)
    if stop:
        raise RunInterruptedError


def _sum_over_ranks(run: Run, losses: Tensor) -> float:
    """The sum of all ranks' losses: their mean, since soft_target_loss multiplied each by the world size."""
    return float(run.accelerator.reduce(losses, "mean"))


def _save(run: Run, best: bool = False) -> None:
    run.progress.skipped |= dict(gather_object(list(run.train_loader.skipped.items())))
    add_norms(run)
    save_checkpoint(run.accelerator, run.config.run_dir, run.progress.step, best)
    run.interruption.checkpoint_was_made()


def train(config: TrainConfig) -> None:
    """Train a run to its end, from the start or from its last checkpoint."""
    accelerator = build_accelerator(config.precision, **build_trackers(config))
    network = build_network(config, accelerator)
    manifest = read_manifests(config.shards, config.store)
    backgrounds = read_backgrounds(config, manifest)
    with contextlib.ExitStack() as until_ended:
        until_ended.enter_context(own_run_dir(config, accelerator, manifest, backgrounds))
        run = build_run(config, accelerator, manifest, network, backgrounds)
        # Also when the run is stopped: otherwise it would first finish the batches that the loaders have begun.
        until_ended.callback(run.train_loader.close)
        until_ended.callback(run.valid_loader.close)
        write_config(run)
        if config.resume:
            resume(run)
        _begin_epoch(run)
        start_trackers(accelerator, config, run.progress.step)
        log_start(run)
        with run.interruption:
            while len(run.progress.history) < config.epochs:
                if run.progress.trained is None:
                    run.progress.trained = train_epoch(run)
                    _begin_epoch(run)
                    # Before the validation: a run stopped after this point repeats only the validation.
                    _save(run)
                _finish_epoch(run, run.progress.trained)
        _finish_run(run)
    # Not end_training: it would destroy the process group, which the next fold needs.
    for tracker in accelerator.trackers:
        tracker.finish()


def _begin_epoch(run: Run) -> None:
    """Start making the next epoch's first batches, while this epoch is validated or the run starts."""
    finished = len(run.progress.history) + (run.progress.trained is not None)
    if finished < run.config.epochs:
        run.train_loader.begin()


def _finish_epoch(run: Run, trained: dict[str, float]) -> None:
    """Validate the epoch that was trained, keep the weights if they are the best, and write its results."""
    validation = validate(run)
    is_best = add_to_history(run, trained, validation)
    line = run.progress.history[-1]
    if run.accelerator.is_main_process:
        if is_best:
            write_best(run, validation)
        write_history(run)
        write_norms(run)
        write_curves(run.config.run_dir / "curves.png", run.progress.history)
    run.accelerator.log(line, step=run.progress.step)
    _log.info(
        "epoch %d of %d: loss %.4f, validation ROC AUC %.4f%s, %.0f cadences/s, stall %.1f %%",
        line["epoch"], run.config.epochs, line["loss"], line["auc"], " (best)" if is_best else "",
        line["cadences_per_s"], 100 * line["stall"],
    )  # fmt: skip
    if len(run.progress.history) == run.config.epochs:
        _save(run, best=is_best)  # else a finished run that is started again would repeat this validation


def _finish_run(run: Run) -> None:
    """Draw the ROC curve of the best weights, write and print the summary, and write the page."""
    if not run.accelerator.is_main_process:
        return
    run_dir, best = run.config.run_dir, read_best_scores(run)
    write_roc(run_dir / "roc.png", best.target, best.logit, run.progress.best_auc)
    write_summary(run)
    if step := run.progress.step:  # 0 if only the results of a finished run were left: its trackers have them already
        track_results(run.accelerator.trackers, run_dir, run.manifest, run.config.held_out, step)
    # Last: the run is complete even if the page cannot be made.
    if run.config.report:
        print(f"report:     {write_training_report(run_dir, run.manifest, run.accelerator)}")


def main() -> int:
    """Parse the command line and train; return the exit code."""
    config = parse_train_config()
    check_gpu(cpu_is_asked_for())
    # Before, after and between runs a signal exits at once: nothing is lost. During a run it waits for the step's end.
    exit_when_asked(EXIT_PREEMPTED)
    config = with_validation_set(config)
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
