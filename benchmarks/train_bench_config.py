"""What train_bench measures, and the data and the runs that it measures on."""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.loops.spec import BY_NAME, LOOPS, Loop
from benchmarks.model_figures import VARIANTS
from benchmarks.pack_bench import write_cadences
from benchmarks.rates import What
from shard_tools.cadence import KAGGLE_SHAPE
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from shard_tools.pack import PackConfig, pack
from shard_tools.system.cores import usable_cores
from training.config import Preset, TrainConfig
from training.environment import cpu_is_asked_for
from training.model import ModelConfig
from training.prediction import BATCH_SIZE
from training.presets import PRESETS
from training.run import Run

_DISTINCT = 1000  # snippets that are made; more cadences repeat their bytes, in other places of the shards


@dataclass(frozen=True)
class TrainBenchConfig:
    """Measure loader alone, model alone and both together."""

    what: What = "train"
    """train: train.py's loop. infer: infer.py's, over all TTA views."""
    preset: Preset | None = None
    """Model, canvas and batch of a preset of train.py; unset: full on a GPU, demo without one."""
    model: str | None = None
    """Another model for the preset's canvas: swin_nano, or a timm model."""
    cadences: int = 0
    """Training cadences in a round; 0: 12,800 on a GPU, 192 without one."""
    batch_size: int = 0
    """Cadences of one forward pass; 0: the preset's, or with --what infer: infer.py's on a GPU, 16 without one."""
    compile: bool = False
    """Compile the model with torch.compile before it is trained, as train.py --compile does."""
    rounds: int = 5
    """Times that each rate is measured."""
    shards: Path | None = None
    """Folder of shards; unset: made, of noise, in work-dir."""
    peers: tuple[str, ...] = ("none",)
    """Other loops to train or predict by, on the same cadences as .npy files: all, none, or some of timm, lightning and
    accelerate. NAME-kernels: with canvases made by our kernels. accelerate-main, accelerate-kernels-main: with canvases
    made in the main process."""
    workers: int = usable_cores()
    """Worker processes of each of these loops."""
    work_dir: Path = Path(tempfile.gettempdir())
    """Folder for the data that is made: 0.84 MB for each cadence, and up to 1,000 times that for snippets."""
    variants: bool = False
    """On a GPU: also the table of precision, channels_last and torch.compile."""
    five_epochs: bool = False
    """On a GPU: also the time of 5 epochs of 48,000 cadences with the presets full and seed; 57 GB of work-dir."""
    check: bool = False
    """Exit with 1 if both together miss their goal: in training 0.99 of the model alone on a GPU, 0.95 without one; in
    prediction 0.98."""
    check_margin: float = 1.0
    """Multiplies what the goal requires; below 1 on machines that are busy with other work."""
    variant: str = ""
    """Measure this row of the table once and print JSON; --variants starts its processes with this option."""

    def __post_init__(self) -> None:
        if min(self.rounds, self.workers) < 1 or min(self.cadences, self.batch_size) < 0 or self.check_margin <= 0:
            raise InputError(
                "--rounds, --workers, --check-margin: expected more than 0; --cadences, --batch-size: at least 0"
            )
        if unknown := [name for name in self.peers if name not in (*BY_NAME, "all", "none")]:
            raise InputError(f"--peers {unknown[0]}: expected all, none, or some of {', '.join(BY_NAME)}")
        if self.loops and self.shards is not None:
            raise InputError("--peers: other loops read .npy files that are made here; leave --shards out")
        if (self.variants or self.five_epochs or self.variant) and not torch.cuda.is_available():
            raise InputError("--variants, --five-epochs: need an NVIDIA GPU, and torch sees none")
        if self.variant and (self.variant not in VARIANTS or self.shards is None):
            raise InputError(f"--variant {self.variant!r}: needs --shards, and to be one of {sorted(VARIANTS)}")

    @property
    def loops(self) -> list[Loop]:
        """Our loop, the peers' that were asked for, and the upper limit; none if no peer was asked for."""
        peers = [loop for loop in LOOPS if loop.name in self.peers or "all" in self.peers]
        return [loop for loop in LOOPS if loop in peers or loop.kind in ("ours", "ceiling")] if peers else []


def make_shards(folder: Path, training: int, folds: int = 5, shape: tuple[int, int, int] = KAGGLE_SHAPE) -> Manifest:
    """Shards of noise whose folds other than fold 0 hold `training` cadences, or a few more, of both classes."""
    per_fold = max(2, -(-training // (folds - 1)))
    write_cadences(folder / "data", per_fold * folds, per_fold // 4 * folds or folds, shape, _DISTINCT)
    return pack(PackConfig(folder / "data", str(folder / "shards"), folds=folds))


def train_config(config: TrainBenchConfig, preset: Preset, shards: Path, **changes: Any) -> TrainConfig:
    """The preset's configuration, with random weights and no checkpoints within an epoch; `changes` come last."""
    base = PRESETS[preset]
    given: dict[str, Any] = {
        "shards": str(shards),
        "run_dir": config.work_dir / "unused",
        "batch_size": config.batch_size or base.batch_size,
        "model": ModelConfig(config.model) if config.model else dataclasses.replace(base.model, pretrained="none"),
        "tracker": "none",
        "checkpoint_minutes": 0.0,
    }
    return dataclasses.replace(base, **{**given, **changes})


def name_of(plan: TrainConfig) -> str:
    """The preset's name, and the model's if it is not the preset's own."""
    own = PRESETS[plan.preset].model.name
    return plan.preset if plan.model.name == own else f"{plan.preset}, {plan.model.name}"


def uses_gpu() -> bool:
    """Whether the benchmark runs on a GPU."""
    return torch.cuda.is_available() and not cpu_is_asked_for()


def infer_batch_size(config: TrainBenchConfig) -> int:
    """Cadences of one forward pass of prediction."""
    return config.batch_size or (BATCH_SIZE if uses_gpu() else 16)


def close(run: Run) -> None:
    """Stop a run's threads."""
    run.train_loader.close()
    run.valid_loader.close()
