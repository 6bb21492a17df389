"""The loop of accelerate's examples/cv_example.py: Accelerator, a prepared DataLoader, OneCycleLR.

Our loss, optimiser, clipping and precision are added. https://github.com/huggingface/accelerate, examples
"""

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.loops.feed import Job, mean_logits
from benchmarks.loops.spec import MOST_EPOCHS, Predictor, Turns


def train(job: Job, turns: Turns) -> None:
    """An epoch for each turn."""
    plan, accelerator = job.plan, build_accelerator(job)
    network = job.build_model()
    kind = torch.optim.Adam if plan.optimiser == "adam" else torch.optim.AdamW
    adam = kind(network.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay)
    batches = job.build_loader()
    one_cycle = OneCycleLR(adam, plan.learning_rate, epochs=MOST_EPOCHS, steps_per_epoch=len(batches))
    model, optimiser, loader, schedule = accelerator.prepare(network, adam, batches, one_cycle)
    for turn in turns:
        model.train()
        losses, seen = torch.zeros((), device=accelerator.device), 0
        for batch in loader:
            images, targets = job.mixed(*batch)
            loss = binary_cross_entropy_with_logits(model(images).squeeze(1), targets)
            accelerator.backward(loss)
            if plan.clip:
                accelerator.clip_grad_norm_(model.parameters(), plan.clip)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            losses += loss.detach()
            seen += len(images)
        turn.record(seen, float(losses) / len(loader), images)


def predictor(job: Job) -> Predictor:
    """Gathers logits as the example does for its metrics."""
    accelerator = build_accelerator(job)
    model = accelerator.prepare(job.build_model())
    model.eval()

    def predict() -> npt.NDArray[np.float64]:
        found = []
        for images, _ in accelerator.prepare(job.build_loader()):
            with torch.no_grad():
                logits = mean_logits(model, images)
            found.append(accelerator.gather_for_metrics(logits))
        return np.asarray(torch.cat(found).double().cpu())

    return predict


def build_accelerator(job: Job) -> Accelerator:
    """An Accelerator on the job's device, in its precision."""
    return Accelerator(cpu=job.device.type == "cpu", mixed_precision=job.precision)
