"""The parts of one training run, and how they are put together.

Everything that a rank needs is built here; train.py is the loop over it.
"""

import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from checkpoint import rehearse_checkpoint
from config import TrainConfig, check_same_run, run_identity, to_dict
from model import build_model
from pipeline.loader import Loader
from pipeline.plan import Order, Share
from shard_tools.errors import InputError
from shard_tools.locks import folder_lock
from shard_tools.manifest import Manifest

CONFIG = "config.json"


@dataclass
class Progress:
    """How far a run is; part of every checkpoint."""

    step: int = 0
    best_auc: float = -math.inf
    history: list[dict[str, float]] = field(default_factory=list)
    """One line per finished epoch."""
    loss_sum: float = 0.0
    """Of the steps of this epoch that were done before the last checkpoint in it, over all ranks."""
    trained: dict[str, float] | None = None
    """Loss, rate and stall of an epoch that is trained and not yet validated."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Key and reason of every bad sample that was replaced, over all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """For Accelerate's checkpoints."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From Accelerate's checkpoints."""
        vars(self).update(state)


class Interruption:
    """SIGTERM (preemption), Ctrl-C and the clock, as all ranks agree on them between two steps."""

    def __init__(self, accelerator: Accelerator, checkpoint_minutes: float) -> None:
        self._asked = False
        self._seconds = checkpoint_minutes * 60
        self._last = time.monotonic()
        # Over gloo, whatever the gradients travel by: the CPUs agree without waiting for the GPUs.
        self._group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def __enter__(self) -> Self:
        self._before = {name: signal.signal(name, self._ask) for name in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _ask(self, number: int, _: object) -> None:
        self._asked = True
        signal.signal(number, self._before[signal.Signals(number)])  # asked again, it stops at once

    def agree(self) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether the time for a checkpoint has come."""
        due = bool(self._seconds) and time.monotonic() - self._last > self._seconds
        if self._group is None:
            return self._asked, due
        flags = torch.tensor([self._asked, due], dtype=torch.int32)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, cast(Any, self._group))
        return bool(flags[0]), bool(flags[1])

    def checkpoint_was_made(self) -> None:
        """Start the clock anew."""
        self._last = time.monotonic()


@dataclass
class Run:
    """The parts of one training run."""

    config: TrainConfig
    accelerator: Accelerator
    manifest: Manifest
    train_loader: Loader
    valid_loader: Loader
    bare_model: nn.Module
    """The network itself."""
    model: nn.Module
    """The network as it is trained: distributed over ranks."""
    ema: ModelEmaV3 | None
    optimiser: Any
    schedule: CosineLRScheduler
    interruption: Interruption
    progress: Progress = field(default_factory=Progress)

    @property
    def judged_model(self) -> nn.Module:
        """What is validated and saved."""
        return self.bare_model if self.ema is None else self.ema.module


def build_run(config: TrainConfig, accelerator: Accelerator, manifest: Manifest) -> Run:
    """Put the parts of a run together, on this rank."""
    check_fold(config, manifest)
    set_seed(config.seed)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    rows, held_out = (manifest.rows("train", config.held_out, held_out=out) for out in (False, True))
    order = Order(rows, manifest.targets(rows), config.sampling, config.seed, config.class_weights)
    share = Share(len(order), config.batch_size, config.accumulate, rank, world_size)
    train_loader = Loader(
        manifest, order, share, config.canvas, config.draws, device=accelerator.device, config=config.loader
    )
    valid_order = Order(held_out, manifest.target[held_out], "sequential")
    valid_share = Share(len(valid_order), config.eval_batch_size, 1, rank, world_size)
    valid_loader = Loader(
        manifest, valid_order, valid_share, config.canvas, device=accelerator.device, config=config.loader
    )
    canvas = config.canvas
    bare_model = build_model(config.model, canvas.channels, canvas.height, canvas.width).to(accelerator.device)
    ema = ModelEmaV3(bare_model, decay=config.ema, use_warmup=True) if config.ema else None
    bare_optimiser = build_optimiser(config, bare_model)
    schedule = build_schedule(config, bare_optimiser, share.steps)
    if config.compile:
        bare_model.compile()  # in place: checkpoints are the same with and without
    # Each rank draws its own stochastic depth, over weights that are alike.
    set_seed(config.seed, device_specific=True)
    model, optimiser = accelerator.prepare(bare_model, bare_optimiser)
    interruption = Interruption(accelerator, config.checkpoint_minutes)
    run = Run(
        config, accelerator, manifest, train_loader, valid_loader, bare_model, model, ema, optimiser, schedule,
        interruption,
    )  # fmt: skip
    accelerator.register_for_checkpointing(run.progress, train_loader, *([ema] if ema else []))
    return run


def check_fold(config: TrainConfig, manifest: Manifest) -> None:
    """Refuse a fold that the shards lack, or that cannot be validated on."""
    folds = manifest.made["folds"]
    if config.held_out >= folds:
        raise InputError(f"--fold {config.fold}: {config.shards} has folds 0 to {folds - 1}")
    if len(np.unique(manifest.target[manifest.rows("train", config.held_out, held_out=True)])) < 2:
        raise InputError(f"--fold {config.fold}: holds one class only; the ROC AUC of validation needs both")


def build_optimiser(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW without decay on biases and norms, or plain Adam."""
    if config.optimiser == "adam":
        return torch.optim.Adam(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    groups = param_groups_weight_decay(model, config.weight_decay)
    return torch.optim.AdamW(groups, config.learning_rate)


def build_schedule(config: TrainConfig, optimiser: torch.optim.Optimizer, steps_per_epoch: int) -> CosineLRScheduler:
    """Linear warm-up, then half a cosine; a pure function of the step."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    total = round((config.cosine_epochs or config.epochs) * steps_per_epoch)
    return CosineLRScheduler(
        optimiser,
        t_initial=max(total - warmup, 1),
        lr_min=config.min_learning_rate,
        warmup_t=warmup,
        warmup_lr_init=config.min_learning_rate,
        warmup_prefix=True,
        t_in_epochs=False,
    )


@contextlib.contextmanager
def own_run_dir(config: TrainConfig, accelerator: Accelerator, manifest: Manifest) -> Iterator[None]:
    """Take the run folder for this run: no other may write there, and what it holds must be this run's."""
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(folder_lock(config.run_dir, ".lock"))
            check_run_dir(config, accelerator, manifest)
            rehearse_checkpoint(config.run_dir)
        accelerator.wait_for_everyone()
        yield


def check_run_dir(config: TrainConfig, accelerator: Accelerator, manifest: Manifest) -> None:
    """Refuse a run folder that holds anything but this run, or that without --resume."""
    path = config.run_dir / CONFIG
    others = sorted(entry.name for entry in config.run_dir.iterdir() if not entry.name.startswith("."))
    if path.is_file() and config.resume:
        mine = run_identity(config, manifest.identity, accelerator.num_processes)
        check_same_run(_read_config(path), mine, config.run_dir, config.override)
    elif others:
        raise InputError(f"{config.run_dir}: not empty ({others[0]}); give --resume to go on, or another folder")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
    except ValueError:
        pass
    raise InputError(f"{path}: not a run's configuration; delete {path.parent} to start over")


def about_weights(run: Run, auc: float) -> dict[str, Any]:
    """What someone needs to use the weights."""
    plain = to_dict(run.config)
    return {
        **{name: plain["model"][name] for name in ("model", "stem", "candidates")},
        "canvas": plain["canvas"],
        "shape": list(run.manifest.shape),
        "fold": run.config.fold,
        "auc": auc,
        "shards_identity": run.manifest.identity,
    }
