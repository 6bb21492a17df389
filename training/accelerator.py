"""Build the Accelerator of a training or a prediction: its device and precision, after checks of the environment."""

import logging
from typing import Any

from accelerate import Accelerator, PartialState

from shard_tools.errors import InputError
from training.environment import check_environment, cpu_is_asked_for
from training.model import pick_precision


def build_accelerator(precision: str, **options: Any) -> Accelerator:
    """An Accelerator of `precision` (auto, bf16, fp16 or float32); ranks other than the first log only warnings."""
    check_environment()
    device = PartialState(cpu=cpu_is_asked_for()).device
    chosen = {"auto": pick_precision(device), "float32": "no"}.get(precision, precision)
    if chosen == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16: needs a GPU; on a CPU choose bf16 or float32")
    accelerator = Accelerator(mixed_precision=chosen, **options)
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.WARNING)
    return accelerator
