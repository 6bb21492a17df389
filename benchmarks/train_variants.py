"""Training on a GPU under several settings, and for five epochs of the competition's size."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.model_figures import VARIANTS, set_layout, utilisation
from benchmarks.rates import Held, trained_per_second
from benchmarks.train_bench_config import TrainBenchConfig, close, make_shards, train_config
from pipeline.plan import Share
from shard_tools.manifest import Manifest
from training.accelerator import build_accelerator
from training.config import Preset
from training.run import build_run

KAGGLE_TRAINING_FOLD = 48_000
_BENCH = Path(__file__).with_name("train_bench.py")
_VARIANT_STEPS = 40


def measure_variant(config: TrainBenchConfig, preset: Preset, manifest: Manifest) -> dict[str, Any]:
    """Images/s of the model alone in training with one row of the table's settings."""
    assert config.shards
    variant = VARIANTS[config.variant]
    plan = train_config(config, preset, config.shards, precision=variant.precision, compile=variant.compile)
    run = build_run(plan, build_accelerator(plan.precision), manifest)
    set_layout(run.bare_model, variant)
    held = Held(run.train_loader, Share(_VARIANT_STEPS * plan.batch_size, plan.batch_size))
    if variant.channels_last:
        image = held.batch.image.contiguous(memory_format=torch.channels_last)
        held.batch = dataclasses.replace(held.batch, image=image)
    began = time.perf_counter()
    trained_per_second(run, held)  # warms up, and compiles
    warm_up_s = time.perf_counter() - began
    rate = trained_per_second(run, held)
    close(run)
    figure = {"workload": "variants", "variant": config.variant, "preset": preset, "images_per_s": rate}
    figure |= {"warm_up_s": warm_up_s, "memory_gb": torch.cuda.max_memory_allocated() / 1e9}
    return figure | utilisation(plan, rate, variant.precision, training=True)


def variant_figures(config: TrainBenchConfig, preset: Preset, shards: Path) -> list[dict[str, Any]]:
    """The table's rows, each measured in a process of its own; one that fails says why in its place."""
    figures = []
    for name in VARIANTS:
        words = [sys.executable, str(_BENCH), "--variant", name, "--preset", preset, "--shards", str(shards)]
        words += ["--batch-size", str(config.batch_size), *(["--model", config.model] if config.model else [])]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            figures.append({"workload": "variants", "variant": name, "preset": preset, "failed": reason[:400]})
        else:
            figures.append(json.loads(done.stdout.splitlines()[-1]))
    return figures


def five_epochs(config: TrainBenchConfig, folder: Path) -> list[dict[str, Any]]:
    """Seconds of 5 epochs of a training fold of the competition's size, as train.py trains them, with full and seed."""
    manifest = make_shards(folder, KAGGLE_TRAINING_FOLD, folds=25)  # one of 25 is held out: little to write in vain
    figures = []
    for preset in ("full", "seed"):
        plan = train_config(config, preset, folder / "shards", epochs=5)
        began = time.perf_counter()
        run = build_run(plan, build_accelerator(plan.precision), manifest)
        built = time.perf_counter()
        rates = [trained_per_second(run, run.train_loader) for _ in range(plan.epochs)]
        seconds = time.perf_counter() - built
        close(run)
        figure: dict[str, Any] = {"workload": "five epochs", "preset": preset, "seconds": seconds}
        figure |= {"build_s": built - began, "cadences": run.train_loader.share.length * plan.epochs}
        figures.append({**figure, "lowest": min(rates), "highest": max(rates)})
    return figures
