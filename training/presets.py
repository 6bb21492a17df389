"""Presets, and the command line of train.py made from them."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from pipeline.augment import DrawConfig
from pipeline.canvas import CanvasConfig
from training.config import Preset, TrainConfig
from training.model import ModelConfig

# Placeholders for the fields that a user must give.
_NOWHERE: dict[str, Any] = {"shards": ("shards",), "run_dir": Path("run")}
# Shared by demo and fine, which may start from the weights of demo.
_SEARCH_RECIPE: dict[str, Any] = {
    "epochs": 8,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "warmup_epochs": 0.5,
    "ema": 0.995,
    "model": ModelConfig("convnext_window", stem="sums"),
}
# What each preset sets; every other field has its own default.
PRESETS: dict[Preset, TrainConfig] = {
    "demo": TrainConfig(
        **_NOWHERE,
        **_SEARCH_RECIPE,
        preset="demo",
        # The search for candidates removes the background itself.
        canvas=CanvasConfig("panels", 39, 256, sum_time_bins=7, normalise=False),
        draws=DrawConfig(flip_time=0.0, erase=0.0, gain=0.0, offset=0.0, cutmix=0.0),
    ),
    "fine": TrainConfig(
        **_NOWHERE,
        **_SEARCH_RECIPE,
        preset="fine",
        eval_batch_size=32,
        canvas=CanvasConfig("panels", 16, 1024, normalise=False),
        # No roll: a line may drift over a third of the channels, and would wrap around.
        draws=DrawConfig(
            flip_time=0.0,
            roll_frequency=0.0,
            shift_time=0.0,
            erase=0.0,
            gain=0.0,
            offset=0.0,
            cutmix=0.0,
            signal_snr_min=10.0,
            signal_snr_max=400.0,
        ),
    ),
    # The recipe of the project that Needlestream is based on, without its bugs: here CutMix mixes pixels, sampling
    # weights are those of the classes, and flips keep ON panels in ON positions.
    "seed": TrainConfig(
        **_NOWHERE,
        preset="seed",
        epochs=5,
        batch_size=32,
        sampling="weighted",
        optimiser="adam",
        learning_rate=1e-4,
        min_learning_rate=1e-6,
        cosine_epochs=10.0,
        weight_decay=1e-6,
        clip=0.0,
        model=ModelConfig("swin_small_patch4_window7_224", pretrained="hub"),
        canvas=CanvasConfig("stack6", 224, 224, normalise=False),
        draws=DrawConfig(
            flip_time=0.0, roll_frequency=0.0, shift_time=0.0, erase=0.0, gain=0.0, offset=0.0, cutmix=1.0
        ),
    ),
    "full": TrainConfig(
        **_NOWHERE,
        preset="full",
        epochs=10,
        batch_size=64,
        learning_rate=3e-4,
        warmup_epochs=0.5,
        ema=0.999,
        model=ModelConfig("swin_small_patch4_window7_224", pretrained="hub", drop_path=0.1),
        canvas=CanvasConfig("on_off", 224, 224, sum_time_bins=3, subtract="lines_bursts", compress="asinh"),
    ),
}


@dataclass(frozen=True)
class _PresetOnly:
    preset: Preset = "full"


def parse_train_config(arguments: list[str] | None = None) -> TrainConfig:
    """Read a TrainConfig from the command line: the preset, changed by the other options."""
    arguments = sys.argv[1:] if arguments is None else arguments
    wanted = [word for word in arguments if word not in ("-h", "--help")]
    chosen, _ = tyro.cli(_PresetOnly, args=wanted, return_unknown_args=True, add_help=False)
    preset = PRESETS[chosen.preset]
    required = dataclasses.replace(preset, shards=tyro.MISSING, run_dir=tyro.MISSING)
    return tyro.cli(TrainConfig, args=arguments, default=required, prog="train.py")
