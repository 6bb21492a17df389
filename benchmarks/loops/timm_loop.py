"""The loop of timm's train.py and the one of its inference.py, step by step, through timm's own parts.

timm's wheel holds neither script. timm's prefetcher is left out (--no-prefetcher), as it takes images as bytes, and so
are its transforms, which are for photographs. https://github.com/huggingface/pytorch-image-models, train.py
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.data import create_loader
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, dispatch_clip_grad
from torch import nn

from benchmarks.loops.feed import Job, mean_logits
from benchmarks.loops.spec import MOST_EPOCHS, Predictor, Turns

_LOG_INTERVAL = 50  # batches, as in timm's train.py


@dataclass
class _Training:
    """What timm's train.py gives to its `train_one_epoch`."""

    job: Job
    model: nn.Module
    loader: Any
    optimiser: torch.optim.Optimizer
    schedule: Any
    ema: ModelEmaV3 | None
    updates: int = 0


def train(job: Job, turns: Turns) -> None:
    """An epoch for each turn. Raises ValueError with fp16, whose losses would have to be scaled."""
    if job.precision == "fp16":
        raise ValueError("fp16: this loop does not scale losses; expected bf16 or float32")
    plan, model, loader = job.plan, job.build_model(), build_loader(job)
    optimiser = create_optimizer_v2(model, plan.optimiser, plan.learning_rate, plan.weight_decay)
    schedule, _ = create_scheduler_v2(
        optimiser, "cosine", MOST_EPOCHS, min_lr=plan.min_learning_rate, warmup_lr=plan.min_learning_rate,
        step_on_epochs=False, updates_per_epoch=len(loader),
    )  # fmt: skip
    ema = ModelEmaV3(model, decay=plan.ema) if plan.ema else None
    training = _Training(job, model, loader, optimiser, schedule, ema)
    for turn in turns:
        turn.record(*train_one_epoch(training))


def train_one_epoch(training: _Training) -> tuple[int, float, torch.Tensor]:
    """Train an epoch; return the number of cadences, the mean of the logged losses, and the last batch of images."""
    job, model = training.job, training.model
    loss_fn, meter = BinaryCrossEntropy(smoothing=0.0), AverageMeter()
    clip = job.plan.clip
    model.train()
    seen = 0
    for number, batch in enumerate(training.loader):
        images, targets = job.mixed(*(part.to(job.device, non_blocking=True) for part in batch))
        with job.autocast():
            loss = loss_fn(model(images), targets[:, None])
        training.optimiser.zero_grad()
        torch.autograd.backward(loss)
        if clip:
            dispatch_clip_grad(model.parameters(), clip)
        training.optimiser.step()
        training.updates += 1
        if training.ema is not None:
            training.ema.update(model, step=training.updates)
        if number % _LOG_INTERVAL == 0 or number == len(training.loader) - 1:
            meter.update(loss.item(), len(images))  # waits for the device
        training.schedule.step_update(training.updates)
        seen += len(images)
    return seen, meter.avg, images


def predictor(job: Job) -> Predictor:
    """As timm's inference.py, which copies each batch's outputs to the CPU."""
    model = job.build_model().eval()

    def predict() -> npt.NDArray[np.float64]:
        found = []
        with torch.inference_mode():
            for images, _ in build_loader(job):
                with job.autocast():
                    logits = mean_logits(model, images.to(job.device, non_blocking=True))
                found.append(logits.cpu())
        return np.asarray(torch.cat(found).double())

    return predict


def build_loader(job: Job) -> Any:
    """A loader by timm: it shuffles and drops a last, incomplete batch in training."""
    canvas, training = job.plan.canvas, job.spec.what == "train"
    return create_loader(
        job.dataset, (canvas.channels, canvas.height, canvas.width), job.plan.batch_size, is_training=training,
        no_aug=True, num_workers=job.workers, collate_fn=job.collate, use_prefetcher=False,
        pin_memory=job.device.type == "cuda", device=job.device, persistent_workers=training,
    )  # fmt: skip
