"""train.py's `train_epoch` and infer.py's `predict_rows`, over our loader or over one batch of it."""

import dataclasses
from typing import cast

import numpy as np
import numpy.typing as npt

from benchmarks.loops.feed import Job
from benchmarks.loops.spec import Predictor, Turns
from benchmarks.rates import Held
from pipeline.loader import Loader
from pipeline.plan import Order, Share
from train import train_epoch
from training.accelerator import build_accelerator
from training.prediction import predict_rows
from training.run import Progress, build_run


def train(job: Job, turns: Turns) -> None:
    """Train an epoch for each turn, with new Progress, so that each turn begins at the first step of an epoch."""
    run = build_run(job.plan, build_accelerator(job.plan.precision), job.manifest)
    held = Held(run.train_loader)
    batches = held if job.feed == "held" else run.train_loader
    for turn in turns:
        epoch = dataclasses.replace(run, train_loader=cast(Loader, batches), progress=Progress())
        turn.record(held.share.length, train_epoch(epoch)["loss"], held.batch.image)
    run.train_loader.close()
    run.valid_loader.close()


def predictor(job: Job) -> Predictor:
    """As in infer.py, each prediction has a loader of its own. One held batch gives only its own logits."""
    accelerator, model = build_accelerator(job.plan.precision), job.build_model()
    with open_loader(job) as loader:
        held = cast(Loader, Held(loader))

    def predict() -> npt.NDArray[np.float64]:
        if job.feed == "held":
            return predict_rows(accelerator, model, held, "prediction")[1]
        with open_loader(job) as loader:
            return predict_rows(accelerator, model, loader, "prediction")[1]

    return predict


def open_loader(job: Job) -> Loader:
    """A loader of all cadences, in order."""
    order = Order(job.rows, job.manifest.target[job.rows], "sequential")
    share = Share(len(order), job.plan.batch_size)
    return Loader(job.manifest, order, share, job.plan.canvas, None, job.views or (), job.device, job.plan.loader)
