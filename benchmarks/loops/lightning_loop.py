"""Lightning: a LightningModule, and its Trainer's `fit` and `predict`."""

from typing import Any

import lightning
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.loops.feed import Job, mean_logits
from benchmarks.loops.spec import MOST_EPOCHS, Predictor, Turns

_PRECISIONS = {"no": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class Classifier(lightning.LightningModule):  # type: ignore[misc]
    """The model with our loss and optimiser."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model, self.plan = job.build_model(), job.plan
        # A function: the callback that averages weights copies this module, and would copy the job with it.
        self.mixed: Any = lambda batch: job.mixed(*batch)

    def training_step(self, batch: Any, _: int) -> dict[str, Tensor]:
        """The loss of a batch, and its images."""
        images, targets = self.mixed(batch)
        loss = binary_cross_entropy_with_logits(self.model(images).squeeze(1), targets)
        self.log("loss", loss)
        return {"loss": loss, "images": images}

    def predict_step(self, batch: Any, _: int) -> Tensor:
        """The logits of a batch."""
        return mean_logits(self.model, batch[0])

    def configure_optimizers(self) -> Any:
        """Adam or AdamW, with a schedule that is stepped after each batch."""
        plan = self.plan
        kind = torch.optim.Adam if plan.optimiser == "adam" else torch.optim.AdamW
        adam = kind(self.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay)
        schedule = OneCycleLR(adam, plan.learning_rate, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class EpochForEachTurn(Callback):  # type: ignore[misc]
    """Waits for the benchmark between the epochs of one `fit`, since each further `fit` would start new workers."""

    def __init__(self, turns: Turns) -> None:
        self._turns, self._seen, self._losses = turns, 0, torch.zeros(())

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Wait for the first turn."""
        self._turn = next(self._turns, None)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
        """Count a batch."""
        self._seen += len(outputs["images"])
        self._losses = self._losses + outputs["loss"].detach()
        self._images = outputs["images"]

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """End a turn, and wait for the next one."""
        if self._turn is not None:
            self._turn.record(self._seen, float(self._losses) / trainer.num_training_batches, self._images)
        self._seen, self._losses = 0, torch.zeros(())
        self._turn = next(self._turns, None)
        trainer.should_stop = self._turn is None


def train(job: Job, turns: Turns) -> None:
    """One `fit`, with an epoch for each turn."""
    plan = job.plan
    averages = [EMAWeightAveraging(decay=plan.ema)] if plan.ema else []
    trainer = build_trainer(job, callbacks=[*averages, EpochForEachTurn(turns)], gradient_clip_val=plan.clip or None)
    trainer.fit(Classifier(job), job.build_loader())


def predictor(job: Job) -> Predictor:
    """Each prediction is a `predict` of the same Trainer."""
    trainer, classifier = build_trainer(job), Classifier(job)

    def predict() -> npt.NDArray[np.float64]:
        return np.asarray(torch.cat(trainer.predict(classifier, job.build_loader())).double().cpu())

    return predict


def build_trainer(job: Job, **options: Any) -> Any:
    """A Trainer that does nothing besides training and prediction."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    accelerator = "gpu" if job.device.type == "cuda" else "cpu"
    return lightning.Trainer(
        accelerator=accelerator, devices=1, precision=_PRECISIONS[job.precision], max_epochs=MOST_EPOCHS,
        **quiet, **options,
    )  # fmt: skip
