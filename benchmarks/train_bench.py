"""Is the loader faster than the model? Loader alone, model alone and both together, for the same model and data.

    python benchmarks/train_bench.py [--what infer] [--preset demo] [--check]
    python benchmarks/train_bench.py --peers all                  also timm, Lightning and accelerate, in place of ours
    python benchmarks/train_bench.py --peers all --preset seed --model swin_nano

benchmarks/rates.py says how the three are measured. With --peers the loops of other projects train the same model, or
predict with it, each in a process of its own, taking turns (benchmarks/loops). A GPU gives more figures: timm's own
benchmark of the same model, batch and precision, and the share of the device's peak; with --variants a table of
precisions, layouts and compiler, each in a fresh process; with --five-epochs the time of 5 epochs of 48,000 cadences.

Training has run on an NVIDIA H200 and an H100, prediction on the H100. --variants, --five-epochs and --peers have not
run on a GPU: the five epochs in docs/performance.md were begun with train.py itself, and stopped in the third.
The data is noise that is made and packed here: the rates do not depend on what is in a cadence.
"""

import dataclasses
import json
import math
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shard_tools.system.allocator
import shard_tools.system.openmp  # noqa: F401  before torch is loaded

# isort: split
import tyro

from benchmarks.history import record
from benchmarks.loops.contest import measure
from benchmarks.loops.rows import loop_figures, table
from benchmarks.loops.spec import LoopSpec
from benchmarks.model_figures import timm_rate, utilisation
from benchmarks.rates import below_goal, infer_rates, to_figures, train_rates, verdict
from benchmarks.train_bench_config import (
    TrainBenchConfig,
    close,
    infer_batch_size,
    make_shards,
    name_of,
    train_config,
    uses_gpu,
)
from benchmarks.train_variants import five_epochs, measure_variant, variant_figures
from pipeline.loader import Loader
from pipeline.plan import Order, Share
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.system.command import run_command
from shard_tools.system.cores import usable_cores
from training.accelerator import build_accelerator
from training.config import Preset, TrainConfig
from training.drivers import check_gpu
from training.environment import cpu_is_asked_for
from training.model import build_model
from training.run import build_run

GOALS = {("train", "cuda"): 0.99, ("train", "cpu"): 0.95, ("infer", "cuda"): 0.98, ("infer", "cpu"): 0.98}


def measure_training(config: TrainBenchConfig, plan: TrainConfig, manifest: Manifest) -> list[dict[str, Any]]:
    """The three rates of training; on a GPU also timm's rate and the share of its peak."""
    accelerator = build_accelerator(plan.precision)
    run = build_run(plan, accelerator, manifest)
    figures = to_figures("train", train_rates(run, config.rounds), views=1)
    close(run)
    return _with_limits(figures, plan, accelerator, plan.batch_size, training=True)


def measure_prediction(config: TrainBenchConfig, plan: TrainConfig, manifest: Manifest) -> list[dict[str, Any]]:
    """The three rates of prediction over all TTA views; on a GPU also timm's rate and the share of its peak."""
    accelerator, canvas = build_accelerator(plan.precision), plan.canvas
    model = build_model(
        dataclasses.replace(plan.model, pretrained="none"), canvas.channels, canvas.height, canvas.width
    )
    rows = manifest.rows("train", 0)
    order = Order(rows, manifest.target[rows], "sequential")
    batch_size = infer_batch_size(config)
    share = Share(len(order), batch_size)
    views = plan.model.views(canvas.views)
    loader = Loader(manifest, order, share, canvas, None, views, accelerator.device, plan.loader)
    rates = infer_rates(accelerator, model.to(accelerator.device), loader, config.rounds)
    loader.close()
    figures = to_figures("infer", rates, len(views))
    return _with_limits(figures, plan, accelerator, batch_size * len(views), training=False)


def _with_limits(
    figures: list[dict[str, Any]], plan: TrainConfig, accelerator: Any, images: int, training: bool
) -> list[dict[str, Any]]:
    """Add to the verdict the model's arithmetic per second, and on a GPU timm's rate for batches of `images`."""
    found, precision = verdict(figures), accelerator.mixed_precision
    found |= {"preset": name_of(plan), "precision": precision, "device": accelerator.device.type}
    found |= {"batch_size": images, "compiled": plan.compile and training}
    found |= utilisation(plan, found["model_images_per_s"], precision, training)
    if accelerator.device.type == "cuda":
        found["timm_images_per_s"] = timm_rate(plan, precision, images, training)
    return figures


def peer_figures(config: TrainBenchConfig, preset: Preset, manifest: Manifest, files: Path) -> list[dict[str, Any]]:
    """A figure for each loop; `files` holds the manifest's cadences as .npy files."""
    on_gpu = uses_gpu()
    # What every loop can do: shuffle instead of drawing by class weights, and on a CPU float32, not bf16.
    changes: dict[str, Any] = {"sampling": "uniform", "precision": "auto" if on_gpu else "float32"}
    if config.what == "infer":
        changes["batch_size"] = infer_batch_size(config)
    plan = train_config(config, preset, Path(manifest.root), **changes)
    spec = LoopSpec(config.what, plan, files, config.workers, "cuda" if on_gpu else "cpu")
    rows = measure(spec, config.loops, len(manifest.rows("train", plan.held_out)), config.rounds)
    common = {"workload": f"{config.what} peers", "preset": name_of(plan), "device": spec.device}
    return loop_figures(rows, config.workers, **common)


def print_rates(figures: list[dict[str, Any]]) -> None:
    """Print the three rates and what follows from them."""
    found, names = verdict(figures), {"loader": "loader alone", "model": "model alone", "both": "both together"}
    print(f"{'':<15}{'cadences/s':>11}  range")
    for figure in figures[:3]:
        limits = f"{figure['lowest']:,.1f} to {figure['highest']:,.1f}"
        print(f"{names[figure['rate']]:<15}{figure['cadences_per_s']:>11,.1f}  {limits}")
    limits = f"{found['lowest_ratio']:.3f} to {found['highest_ratio']:.3f}"
    print(f"both / model   {found['ratio']:>11.3f}  {limits}")
    print(
        f"bound by the {found['bound_by']}, stall {found['stall']:.1%}; {found['images_per_s']:,.0f} images/s in "
        f"{found['precision']} on the {found['device']}"
    )
    if found["device"] == "cuda":
        print(
            f"model FLOP utilisation {found['mfu'] or math.nan:.1%}; images/s: timm's own loop "
            f"{found['timm_images_per_s'] or math.nan:,.0f}, the model alone {found['model_images_per_s']:,.0f}"
        )


def print_and_record(config: TrainBenchConfig, figures: list[dict[str, Any]]) -> None:
    """Record the figures at once, as a later part may fail, and print a line for each."""
    record(config.what, dataclasses.asdict(config), figures)
    for figure in figures:
        words = {name: f"{value:,.4g}" if isinstance(value, float) else value for name, value in figure.items()}
        print("  ".join(f"{name} {word}" for name, word in words.items()), flush=True)


def main(config: TrainBenchConfig) -> int:
    """Measure, print, record; return the exit code."""
    check_gpu(cpu_is_asked_for())
    on_gpu = uses_gpu()
    preset: Preset = config.preset or ("full" if on_gpu else "demo")
    if config.variant:
        assert config.shards
        print(json.dumps(measure_variant(config, preset, read_manifest(config.shards))))
        return 0
    print(f"preset {preset}, {usable_cores()} cores, load {os.getloadavg()[0]:.1f} before the start, page cache warm")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=config.work_dir)))
        cadences = config.cadences or (12_800 if on_gpu else 192)
        manifest = read_manifest(config.shards) if config.shards else make_shards(folder, cadences)
        measure_rates = measure_training if config.what == "train" else measure_prediction
        plan = train_config(config, preset, Path(manifest.root), compile=config.compile)
        figures = measure_rates(config, plan, manifest)
        below = below_goal(figures, goal := GOALS[config.what, verdict(figures)["device"]], config.check_margin)
        print_rates(figures)
        record(config.what, dataclasses.asdict(config), figures)
        if config.loops:
            figures = peer_figures(config, preset, manifest, folder / "data")
            print(f"\n{table(figures)}")
            record(config.what, dataclasses.asdict(config), figures)
        if config.variants:
            print_and_record(config, variant_figures(config, preset, Path(manifest.root)))
        if config.five_epochs:
            print_and_record(config, five_epochs(config, folder / "five-epochs"))
    if config.check and below:
        print(f"error: both / model is below {goal:g} x {config.check_margin:g}", file=sys.stderr)
    return int(config.check and below)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(tyro.cli(TrainBenchConfig))))
