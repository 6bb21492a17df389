"""What the model itself can do: its arithmetic, the device's peak, timm's own loop, and the settings to choose from.

The arithmetic, the peak and timm's loop were tried on an NVIDIA H200, for training; the settings (`VARIANTS`) only on a
CPU.
"""

import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import timm
import torch
from timm.layers import set_fused_attn
from timm.optim import create_optimizer_v2
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from pipeline.canvas import CanvasConfig
from training.config import TrainConfig
from training.model import ModelConfig, build_model

# Dense bf16 and fp16 on the tensor cores, FLOP/s, by torch's name of the device, the longest match first. From NVIDIA's
# data sheets, which state twice as much for sparse matrices: H100 (SXM, PCIe, NVL), H200, A100 Tensor Core GPU.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
}
# The defaults of timm's benchmark.py.
_TIMM_WARM_UP, _TIMM_STEPS = 10, 40


@dataclass(frozen=True)
class Variant:
    """One setting of precision, memory layout and compiler."""

    precision: Literal["bf16", "fp16"] = "bf16"
    channels_last: bool = False
    compile: bool = False


VARIANTS = {
    "bf16": Variant(),
    "fp16": Variant("fp16"),
    "bf16, channels_last": Variant(channels_last=True),
    "bf16, compile": Variant(compile=True),
    "bf16, compile, channels_last": Variant("bf16", True, True),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """The device's dense peak in FLOP/s; None if the table lacks the device or the precision."""
    if precision not in ("bf16", "fp16"):
        return None
    return next((peak for name, peak in PEAKS.items() if all(word in device_name for word in name.split())), None)


def count_flops(model: ModelConfig, canvas: CanvasConfig, training: bool) -> float:
    """Floating-point operations for one image, two for a multiply-add; with the backward pass if `training`.

    Counted from shapes, without computing anything: the same number whatever the device, precision or compiler.
    """
    set_fused_attn(False)  # its fused kernels are counted on some devices only
    try:
        with torch.device("meta"):
            network = build_model(replace(model, pretrained="none"), canvas.channels, canvas.height, canvas.width)
            images = torch.zeros(1, canvas.channels, canvas.height, canvas.width)
    finally:
        set_fused_attn(True)
    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(training):
        logit = network(images)
        if training:
            torch.autograd.backward(binary_cross_entropy_with_logits(logit, torch.zeros_like(logit)))
    return float(counter.get_total_flops())


def utilisation(config: TrainConfig, images_per_s: float, precision: str, training: bool) -> dict[str, Any]:
    """Figures of the arithmetic done, and its share of the device's peak (None if the peak is not known)."""
    flops = count_flops(config.model, config.canvas, training)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = peak_flops(name, precision)
    rate = images_per_s * flops
    return {"gflop_per_image": flops / 1e9, "tflop_per_s": rate / 1e12, "mfu": rate / peak if peak else None}


def timm_rate(config: TrainConfig, precision: str, batch_size: int, training: bool) -> float | None:
    """Images/s of timm's own benchmark for the same model, batch and precision; None for a model that is not timm's.

    timm installs without its benchmark.py, so this is its TrainBenchmarkRunner (and InferenceBenchmarkRunner) step for
    step with its defaults: random images of three channels, 1000 classes, SGD, 10 steps to warm up and 40 to time, a
    wait for the device after each.
    """
    if not timm.is_model(config.model.name):
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = (config.canvas.height, config.canvas.width)
    model = timm.create_model(config.model.name, img_size=size, drop_path_rate=config.model.drop_path).to(device)
    model.train(training)
    optimiser = create_optimizer_v2(model, opt="sgd", lr=1e-4)
    images = torch.randn(batch_size, 3, *size, device=device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            output = model(images)
            if training:
                target = torch.empty(batch_size, device=device, dtype=torch.long).random_(output.shape[1])
                loss = cross_entropy(output, target)
        if training:
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
        wait_for(device)

    with torch.set_grad_enabled(training):
        for _ in range(_TIMM_WARM_UP):
            step()
        began = time.perf_counter()
        for _ in range(_TIMM_STEPS):
            step()
    return _TIMM_STEPS * batch_size / (time.perf_counter() - began)


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def set_layout(model: torch.nn.Module, variant: Variant) -> None:
    """Give the model a variant's memory layout; call it before the first step."""
    if variant.channels_last:
        model.to(memory_format=torch.channels_last)
