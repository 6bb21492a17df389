"""Build the Accelerator of a training or a prediction, and choose its precision; checks of what it needs come first."""

import logging
import os
import shlex
import shutil
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from shard_tools.errors import InputError
from training.environment import check_environment, cpu_is_asked_for


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


def pick_precision(device: torch.device) -> str:
    """bf16 if the hardware has it, else fp16 on a GPU, else float32; in Accelerate's words."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    # Emulated bf16 is slower than float32.
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "no"


def check_compiler(device: torch.device) -> None:
    """Raise InputError if --compile would fail in the first step: torch needs a compiler for it."""
    variable, usual = ("CXX", ("g++",)) if device.type == "cpu" else ("CC", ("gcc", "clang"))
    named = shlex.split(os.environ.get(variable, ""))[:1]
    if not any(shutil.which(program) for program in named or usual):
        raise InputError(
            f"--compile: needs a compiler ({variable} or {' or '.join(usual)}), and there is none; install one "
            "(Debian: apt-get install g++), or leave --compile out"
        )
