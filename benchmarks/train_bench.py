"""Is the loader faster than the model? Loader alone, model alone and both together, for the same model and data.

    python benchmarks/train_bench.py [--what infer] [--preset demo] [--check]

benchmarks/rates.py says how the three are measured. On a GPU there is more: timm's own benchmark of the same model,
batch and precision, and the share of the device's peak; with --variants a table of precisions, layouts and compiler,
each in a fresh process; with --five-epochs the time of 5 epochs of 48,000 cadences. Training has run on an NVIDIA H200;
--what infer has not run to its end on a GPU yet, --variants and --five-epochs not at all. The data is noise that is
made and packed here: the rates do not depend on what is in a cadence.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shard_tools.allocator
import shard_tools.openmp  # noqa: F401  before torch is loaded

# isort: split
import torch
import tyro

from benchmarks.history import record
from benchmarks.model_figures import VARIANTS, set_layout, timm_rate, utilisation
from benchmarks.pack_bench import write_cadences
from benchmarks.rates import Held, What, below_goal, infer_rates, to_figures, train_rates, trained_per_second, verdict
from pipeline.loader import Loader
from pipeline.plan import Order, Share
from shard_tools.cadence import KAGGLE_SHAPE
from shard_tools.cores import usable_cores
from shard_tools.errors import InputError, run_command
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.pack import PackConfig, pack
from training.accelerator import build_accelerator
from training.config import Preset, TrainConfig
from training.drivers import check_gpu
from training.environment import cpu_is_asked_for
from training.model import build_model
from training.prediction import BATCH_SIZE
from training.presets import PRESETS
from training.run import Run, build_run

GOALS = {("train", "cuda"): 0.99, ("train", "cpu"): 0.95, ("infer", "cuda"): 0.98, ("infer", "cpu"): 0.98}
KAGGLE_TRAINING_FOLD = 48_000
FIVE_EPOCHS_GOAL_S = 180  # Swin-Small at 224 on one H100
_DISTINCT = 1000  # snippets that are made; more cadences repeat their bytes, in other places of the shards
_VARIANT_STEPS = 40


@dataclass(frozen=True)
class TrainBenchConfig:
    """Measure loader alone, model alone and both together."""

    what: What = "train"
    """train: train.py's loop. infer: infer.py's, over all TTA views."""
    preset: Preset | None = None
    """Model, canvas and batch of a preset of train.py; unset: full on a GPU, demo without one."""
    cadences: int = 0
    """Training cadences in a round; 0: 12,800 on a GPU, 192 without one."""
    batch_size: int = 0
    """Cadences of one forward pass; 0: the preset's, with infer that of infer.py on a GPU and 16 without one."""
    rounds: int = 5
    """Times that each of the three is measured."""
    shards: Path | None = None
    """Folder of shards; unset: made, of noise, in work-dir."""
    work_dir: Path = Path(tempfile.gettempdir())
    """Folder for the data that is made: 0.84 MB for each cadence, and up to 1,000 times that for snippets."""
    variants: bool = False
    """On a GPU: also the table of precision, channels_last and torch.compile."""
    five_epochs: bool = False
    """On a GPU: also the time of 5 epochs of 48,000 cadences with the presets full and seed; 57 GB of work-dir."""
    check: bool = False
    """Exit with 1 where both together are below their goal: training 0.99 of model alone on a GPU, 0.95 without one;
    prediction 0.98."""
    check_margin: float = 1.0
    """Multiplies what the goal requires; below 1 on machines that are busy with other work."""
    variant: str = ""
    """Measure this row of the table once and print JSON; what --variants starts its processes with."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or min(self.cadences, self.batch_size) < 0 or self.check_margin <= 0:
            raise InputError("--rounds, --check-margin: expected more than 0; --cadences, --batch-size: at least 0")
        if (self.variants or self.five_epochs or self.variant) and not torch.cuda.is_available():
            raise InputError("--variants, --five-epochs: need an NVIDIA GPU, and torch sees none")
        if self.variant and (self.variant not in VARIANTS or self.shards is None):
            raise InputError(f"--variant {self.variant!r}: needs --shards, and to be one of {sorted(VARIANTS)}")


def make_shards(folder: Path, training: int, folds: int = 5, shape: tuple[int, int, int] = KAGGLE_SHAPE) -> Manifest:
    """Shards of noise whose folds other than fold 0 hold `training` cadences, or a few more, of both classes."""
    per_fold = max(2, -(-training // (folds - 1)))
    write_cadences(folder / "data", per_fold * folds, per_fold // 4 * folds or folds, shape, _DISTINCT)
    return pack(PackConfig(folder / "data", str(folder / "shards"), folds=folds))


def train_config(config: TrainBenchConfig, preset: Preset, shards: Path, **changes: Any) -> TrainConfig:
    """The preset as it trains, with weights drawn here and no checkpoints within an epoch."""
    base = PRESETS[preset]
    given: dict[str, Any] = {
        "shards": str(shards),
        "run_dir": config.work_dir / "unused",
        "batch_size": config.batch_size or base.batch_size,
        "model": dataclasses.replace(base.model, pretrained="none"),
        "tracker": "none",
        "checkpoint_minutes": 0.0,
    }
    return dataclasses.replace(base, **given, **changes)


def close(run: Run) -> None:
    """Stop a run's threads."""
    run.train_loader.close()
    run.valid_loader.close()


def measure_training(config: TrainBenchConfig, plan: TrainConfig, manifest: Manifest) -> list[dict[str, Any]]:
    """The three rates of training, and on a GPU what they could be."""
    accelerator = build_accelerator(plan.precision)
    run = build_run(plan, accelerator, manifest)
    figures = to_figures("train", train_rates(run, config.rounds), views=1)
    close(run)
    return _with_limits(figures, plan, accelerator, plan.batch_size, training=True)


def measure_prediction(config: TrainBenchConfig, plan: TrainConfig, manifest: Manifest) -> list[dict[str, Any]]:
    """The three rates of prediction over all TTA views, and on a GPU what they could be."""
    accelerator, canvas = build_accelerator(plan.precision), plan.canvas
    model = build_model(
        dataclasses.replace(plan.model, pretrained="none"), canvas.channels, canvas.height, canvas.width
    )
    rows = manifest.rows("train", 0)
    order = Order(rows, manifest.target[rows], "sequential")
    on_gpu = accelerator.device.type == "cuda"
    batch_size = config.batch_size or (BATCH_SIZE if on_gpu else 16)
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
    """Add to the verdict what the model's arithmetic says, and on a GPU timm's rate for `images` at once."""
    found, precision = verdict(figures), accelerator.mixed_precision
    found |= {"preset": plan.preset, "precision": precision, "device": accelerator.device.type}
    found |= utilisation(plan, found["model_images_per_s"], precision, training)
    if accelerator.device.type == "cuda":
        found["timm_images_per_s"] = timm_rate(plan, precision, images, training)
    return figures


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
        words = [sys.executable, __file__, "--variant", name, "--preset", preset, "--shards", str(shards)]
        words += ["--batch-size", str(config.batch_size)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            figures.append({"workload": "variants", "variant": name, "preset": preset, "failed": reason[:400]})
        else:
            figures.append(json.loads(done.stdout.splitlines()[-1]))
    return figures


def five_epochs(config: TrainBenchConfig, folder: Path) -> list[dict[str, Any]]:
    """Seconds of 5 epochs of a training fold of the competition's size, as train.py trains them, with full and seed."""
    manifest = make_shards(folder, KAGGLE_TRAINING_FOLD, folds=25)  # one of 25: little to hold out, and to write
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


def print_rates(figures: list[dict[str, Any]]) -> None:
    """The three rates, and what follows from them."""
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
    """Print a line a figure, its values as they are named in the history; record them, whatever else may yet fail."""
    record(config.what, dataclasses.asdict(config), figures)
    for figure in figures:
        words = {name: f"{value:,.4g}" if isinstance(value, float) else value for name, value in figure.items()}
        print("  ".join(f"{name} {word}" for name, word in words.items()), flush=True)


def main(config: TrainBenchConfig) -> int:
    """Measure, print, record; return the exit code."""
    check_gpu(cpu_is_asked_for())
    on_gpu = torch.cuda.is_available() and not cpu_is_asked_for()
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
        measure = measure_training if config.what == "train" else measure_prediction
        figures = measure(config, train_config(config, preset, Path(manifest.root)), manifest)
        below = below_goal(figures, goal := GOALS[config.what, verdict(figures)["device"]], config.check_margin)
        print_rates(figures)
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
