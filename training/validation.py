"""Validation: the held-out fold's logits and metrics after an epoch, and the check before each checkpoint."""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.loader import Batch
from shard_tools.errors import InputError
from training.interruption import RunInterruptedError
from training.metrics import average_precision, roc_auc
from training.prediction import predict_rows
from training.run import Run


@dataclass(frozen=True)
class Validation:
    """One validation of the whole held-out fold; the arrays are (n,), one entry for each cadence."""

    rows: npt.NDArray[np.int64]
    """Rows of the manifest, ascending."""
    target: npt.NDArray[np.int8]
    logit: npt.NDArray[np.float64]
    auc: float
    average_precision: float
    seconds: float


def validate(run: Run) -> Validation:
    """Score the held-out fold with the weights that would be saved. Every rank calls it and gets the same.

    Raises RunInterruptedError between two batches if the run is asked to stop, and InputError if a logit is not finite.
    """

    def stop_if_asked() -> None:
        if run.interruption.agree()[0]:
            raise RunInterruptedError

    began = time.perf_counter()
    rows, logit = predict_rows(run.accelerator, run.judged_model, run.valid_loader, "validation", stop_if_asked)
    if not np.isfinite(logit).all():
        raise InputError(
            f"epoch {len(run.progress.history) + 1}: the model's output is not finite any more; start again with a "
            f"lower --learning-rate than {run.config.learning_rate}, or with --precision float32"
        )
    target = run.manifest.target[rows]
    auc, precision = roc_auc(target, logit), average_precision(target, logit)
    return Validation(rows, target, logit, auc, precision, time.perf_counter() - began)


def check_weights(run: Run, batch: Batch) -> None:
    """Check the weights before they are saved, by the model's output on the last batch that it learnt from.

    Raises InputError if this output is not finite, or if a loss or gradient since the last check was not.
    """
    run.bare_model.eval()
    with torch.inference_mode(), run.accelerator.autocast():
        logit = run.bare_model(batch.image)
    run.watch.check(run.progress.step, logit)
    run.bare_model.train()
