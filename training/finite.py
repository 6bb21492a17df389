"""Detect a loss or gradient that is not finite before an update uses it, without waiting for the GPU each step.

The first bad step sets a flag on the device, which stays set. While it is set a fused optimiser does not change the
weights. The host reads copies of the flag up to two steps late, and all of them before anything is saved.
"""

from collections import deque
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from shard_tools.errors import InputError
from training.checkpoint import has_checkpoint
from training.config import TrainConfig


def clip_gradients(accelerator: Accelerator, model: nn.Module, largest: float) -> Tensor:
    """Clip a step's gradients to the norm `largest` (0: no clipping); return their norm before that, a scalar."""
    if largest:
        norm: Tensor = accelerator.clip_grad_norm_(model.parameters(), largest)
        return norm
    return get_total_norm([weight.grad for weight in model.parameters() if weight.grad is not None])


class FiniteWatch:
    """Ends a run at a loss or gradient that is not finite, and names the first such step.

    On a CPU the run ends at that step, on a GPU up to two steps later.
    """

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, optimiser: torch.optim.Optimizer, steps_per_epoch: int
    ) -> None:
        """`optimiser` is torch's own, and fused."""
        self._config, self._accelerator, self._steps_per_epoch = config, accelerator, steps_per_epoch
        self.steps_late = 2 if accelerator.device.type == "cuda" else 0
        """How many steps' flags stay unread, so that a GPU has work while the host waits for an older flag."""
        self._loss = torch.zeros((), device=accelerator.device)
        self._is_bad = torch.zeros((), device=accelerator.device)
        self._unread: deque[tuple[int, Tensor, Any]] = deque()
        if accelerator.scaler is None:  # else GradScaler sets it
            optimiser.found_inf = self._is_bad  # type: ignore[attr-defined]

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of one micro-batch, a scalar."""
        self._loss += loss.detach()

    def before_update(self, step: int, norm: Tensor) -> None:
        """Flag `step`, which is about to update the weights, if its loss or its gradient's norm is not finite.

        Raises InputError if a step was flagged: on a CPU before its update, on a GPU up to two steps later.
        """
        torch.maximum(self._is_bad, self._is_bad_now(norm).float(), out=self._is_bad)
        self._loss.zero_()
        self._unread.append((step, *self._copy_flag()))
        self._read_flags(left=self.steps_late)

    def check(self, step: int, logit: Tensor) -> None:
        """Wait for the device before the weights after `step` are saved; `logit` is the model's output with them.

        Raises InputError if a step was flagged or any rank's output is not finite: the last update may have left finite
        but useless weights, which only the next step would show.
        """
        self._read_flags(left=0)
        if self._accelerator.reduce((~logit.isfinite()).sum(), "sum"):
            raise InputError(self._explain(step, "it left weights whose output is not finite; they were not saved"))

    def _is_bad_now(self, norm: Tensor) -> Tensor:
        # Gradients are averages over the ranks, so all ranks have the same norm. The loss is this rank's own.
        loss: Tensor = self._accelerator.reduce(self._loss, "sum")
        scaler = self._accelerator.scaler
        if scaler is None:
            return ~(loss.isfinite() & norm.isfinite())
        # Under fp16 gradients may overflow: GradScaler skips the step and halves the scale. Below 1 that does not help.
        scale: Tensor = scaler.scale(torch.ones_like(loss))
        return ~loss.isfinite() | (scale < 1)

    def _copy_flag(self) -> tuple[Tensor, Any]:
        """A copy of the flag on its way to the host, and the event that marks its arrival (None on a CPU)."""
        on_gpu = self._is_bad.is_cuda
        copy = torch.empty((), pin_memory=on_gpu).copy_(self._is_bad, non_blocking=True)
        if not on_gpu:
            return copy, None
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._is_bad.device))
        return copy, event

    def _read_flags(self, left: int) -> None:
        """Read the oldest flags, all but `left` of them."""
        while len(self._unread) > left:
            step, is_bad, event = self._unread.popleft()
            if event is not None:
                event.synchronize()
            if is_bad:
                fp16 = "the loss is not finite, or fp16 overflows at every scale; the step was not applied"
                plain = "the loss or its gradient is not finite; the step was not applied"
                raise InputError(self._explain(step, plain if self._accelerator.scaler is None else fp16))

    def _explain(self, step: int, what: str) -> str:
        config = self._config
        is_saved = has_checkpoint(config.run_dir)
        kept = f"the checkpoints in {config.run_dir} are from before it" if is_saved else "nothing was saved yet"
        return (
            f"step {step}, in epoch {(step - 1) // self._steps_per_epoch + 1}: {what}; {kept}. Go on with --resume and "
            f"a lower --learning-rate than {config.learning_rate:g} (--override learning_rate), or with --precision "
            "float32 (--override precision)"
        )
