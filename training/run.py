"""The parts of one training run, and how they are put together.

Everything that a rank needs is built here; train.py is the loop over it.
"""

import contextlib
import json
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast, set_seed
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from pipeline.backgrounds import VALIDATION, backgrounds_order, check_backgrounds, kept_back_rows
from pipeline.loader import Loader
from pipeline.plan import Order, Share
from shard_tools.atomic_files import write_whole
from shard_tools.errors import InputError
from shard_tools.joined_manifest import read_manifests
from shard_tools.manifest import Manifest
from shard_tools.observation.observed_axes import is_observed
from shard_tools.system.locks import folder_lock
from training.accelerator import check_compiler
from training.checkpoint import has_checkpoint, rehearse_checkpoint
from training.config import TrainConfig, check_same_run, run_identity, to_dict
from training.finite import FiniteWatch
from training.interruption import Interruption
from training.model import build_model
from training.optimiser import build_optimiser
from training.part_norms import PartNorms
from training.search.aiming import aim_at, aimed_axes

CONFIG = "config.json"
_log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is; part of every checkpoint."""

    step: int = 0
    best_auc: float = -math.inf
    history: list[dict[str, float]] = field(default_factory=list)
    """One line per finished epoch."""
    loss_sum: float = 0.0
    """Sum of the losses of this epoch's steps before its last checkpoint, over all ranks."""
    trained: dict[str, float] | None = None
    """Loss, rate and stall of an epoch that is trained but not yet validated."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Key and reason of every bad sample that was replaced, over all ranks."""
    norms: list[dict[str, Any]] = field(default_factory=list)
    """Rows of part_norms.py: one for each part of the network at each recorded step."""

    def state_dict(self) -> dict[str, Any]:
        """For Accelerate's checkpoints."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From Accelerate's checkpoints."""
        vars(self).update(state)


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
    watch: FiniteWatch
    norms: PartNorms
    progress: Progress = field(default_factory=Progress)
    backgrounds: Manifest | None = None
    """What is trained on in place of the other folds, with --backgrounds."""

    @property
    def trained_on(self) -> Manifest:
        """The data that are trained on."""
        return self.manifest if self.backgrounds is None else self.backgrounds

    @property
    def judged_model(self) -> nn.Module:
        """The model that is validated and saved: the moving average, if there is one."""
        return self.bare_model if self.ema is None else self.ema.module


def is_trained(run_dir: Path) -> bool:
    """Whether a run left weights here: a checkpoint, or its best weights, if it lost its checkpoints."""
    return has_checkpoint(run_dir) or (run_dir / "best.safetensors").exists()


def build_network(config: TrainConfig, accelerator: Accelerator) -> nn.Module:
    """The network that a run starts from. Its options are checked here, before any data is read."""
    if config.compile:
        check_compiler(accelerator.device)
    # A run with weights of its own needs no hub, whether it is resumed or finished.
    model = replace(config.model, pretrained="none") if config.resume and is_trained(config.run_dir) else config.model
    set_seed(config.seed)
    with accelerator.local_main_process_first():  # it downloads weights; the others find them in the cache
        return build_model(model, config.canvas.channels, config.canvas.height, config.canvas.width)


def build_run(
    config: TrainConfig,
    accelerator: Accelerator,
    manifest: Manifest,
    network: nn.Module | None = None,
    backgrounds: Manifest | None = None,
) -> Run:
    """Put the parts of a run together on this rank; build its network unless it is given."""
    check_fold(config, manifest)
    set_seed(config.seed)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    train_loader = build_train_loader(config, accelerator, manifest, backgrounds)
    share = train_loader.share
    held_out = manifest.rows("train", config.held_out, held_out=True)
    valid_order = Order(held_out, manifest.target[held_out], "sequential")
    valid_share = Share(len(valid_order), config.eval_batch_size, 1, rank, world_size)
    valid_loader = Loader(
        manifest, valid_order, valid_share, config.canvas, device=accelerator.device, config=config.loader
    )
    bare_model = build_network(config, accelerator) if network is None else network
    aim_at(bare_model, manifest if backgrounds is None else backgrounds, config.canvas)
    bare_model.to(accelerator.device)
    make_ranks_alike(accelerator, bare_model)  # before the moving average starts from these weights
    ema = ModelEmaV3(bare_model, decay=config.ema, use_warmup=True) if config.ema else None
    bare_optimiser = build_optimiser(config, bare_model)
    schedule = build_schedule(config, bare_optimiser, share.steps)
    if config.compile:
        bare_model.compile()  # in place: checkpoints are the same with and without
    # Ranks have equal weights, but each draws its own stochastic depth.
    set_seed(config.seed, device_specific=True)
    accelerator.ddp_handler = ddp_options(bare_model)
    model, optimiser = accelerator.prepare(bare_model, bare_optimiser)
    interruption = Interruption(accelerator, config.checkpoint_minutes)
    watch = FiniteWatch(config, accelerator, bare_optimiser, share.steps)
    run = Run(
        config, accelerator, manifest, train_loader, valid_loader, bare_model, model, ema, optimiser, schedule,
        interruption, watch, PartNorms(accelerator, bare_model), backgrounds=backgrounds,
    )  # fmt: skip
    accelerator.register_for_checkpointing(run.progress, train_loader, *([ema] if ema else []))
    return run


def read_backgrounds(config: TrainConfig, manifest: Manifest) -> Manifest | None:
    """The data sets of --backgrounds, joined; None without any. Raises InputError if they do not fit `manifest`."""
    if not config.backgrounds:
        return None
    backgrounds = read_manifests(config.backgrounds, config.store)
    all_folds = config.fold == "all"
    held_out = manifest.rows("train") if all_folds else manifest.rows("train", config.held_out, held_out=True)
    check_backgrounds(backgrounds, manifest, held_out)
    return backgrounds


def build_train_loader(
    config: TrainConfig, accelerator: Accelerator, manifest: Manifest, backgrounds: Manifest | None
) -> Loader:
    """The loader of this rank's training batches: of the backgrounds, or else of all folds but the held-out one."""
    if backgrounds is None:
        data, rows = manifest, manifest.rows("train", config.held_out)
        order = Order(rows, manifest.targets(rows), config.sampling, config.seed, config.class_weights)
    else:
        kept_back = kept_back_rows(backgrounds, manifest, config.held_out)
        data, order = backgrounds, backgrounds_order(backgrounds, config.seed, kept_back)
    share = Share(
        len(order), config.batch_size, config.accumulate, accelerator.process_index, accelerator.num_processes
    )
    return Loader(data, order, share, config.canvas, config.draws, device=accelerator.device, config=config.loader)


def make_ranks_alike(accelerator: Accelerator, model: nn.Module) -> None:
    """Give every rank the weights of the first, and warn if a rank had loaded other pretrained weights."""
    if accelerator.num_processes == 1:
        return
    changed = torch.zeros(1, dtype=torch.int64, device=accelerator.device)
    for value in model.state_dict().values():
        first = broadcast(value.clone())
        changed += (first != value).any()
        value.copy_(first)
    ranks = accelerator.gather(changed).nonzero().flatten().tolist()
    if ranks:
        _log.warning(
            "warning: rank %s began with other weights than rank 0, and now uses those of rank 0; check that the "
            "--pretrained file, or the hub's cache, is the same on every machine", ", ".join(map(str, ranks))
        )  # fmt: skip


def ddp_options(model: nn.Module) -> DistributedDataParallelKwargs:
    """How ranks exchange a model's gradients."""
    names = {name for name, _ in model.named_parameters()}
    # Only running statistics differ between ranks. Other buffers are constants and need not be sent before each step.
    has_statistics = bool(model.state_dict().keys() - names)
    # Without gradient_as_bucket_view each gradient would be in memory twice.
    return DistributedDataParallelKwargs(broadcast_buffers=has_statistics, gradient_as_bucket_view=True)


def check_fold(config: TrainConfig, manifest: Manifest) -> None:
    """Refuse a fold that the shards lack, or that cannot be validated on."""
    folds = manifest.made["folds"]
    if config.held_out >= folds:
        raise InputError(f"--fold {config.fold}: {manifest.root} has folds 0 to {folds - 1}")
    samples = manifest.splits["train"]["samples"]
    if not samples and is_observed(manifest):
        raise InputError(
            f"{manifest.root}: snippets of an observation, without labels; give it as --backgrounds too, to train on "
            "it with needles that are added, and to validate on snippets that are kept back"
        )
    if not samples:
        raise InputError(
            f"{manifest.root}: no training cadences, only {manifest.splits['test']['samples']:,} of test/; pack a "
            "folder with train_labels.csv and train/"
        )
    held_out = manifest.rows("train", config.held_out, held_out=True)
    if len(held_out) == samples and not config.backgrounds:
        raise InputError(
            f"--fold {config.held_out}: all {samples:,} training cadences of {manifest.root} are in this fold, so that "
            "none is left to train on; hold out another fold, or pack more cadences"
        )
    if len(np.unique(manifest.target[held_out])) < 2:
        found = "one class only" if len(held_out) else f"none of the {samples:,} training cadences"
        raise InputError(f"--fold {config.fold}: holds {found}; validation needs both classes: choose another fold")


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


def log_start(run: Run) -> None:
    """Log the ranks, the device and the number of cadences that a run trains on."""
    accelerator = run.accelerator
    ranks = "1 rank" if accelerator.num_processes == 1 else f"{accelerator.num_processes} ranks"
    _log.info(
        "training on %s (%s, %s): %s cadences, validation on %s of fold %d",
        ranks, accelerator.device.type, accelerator.mixed_precision, f"{run.train_loader.share.length:,}",
        f"{run.valid_loader.share.length:,}", run.config.held_out,
    )  # fmt: skip


@contextlib.contextmanager
def own_run_dir(
    config: TrainConfig, accelerator: Accelerator, manifest: Manifest, backgrounds: Manifest | None = None
) -> Iterator[None]:
    """Lock the run folder, and check that it holds nothing but this run."""
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(folder_lock(config.run_dir, ".lock"))
            check_run_dir(config, accelerator, manifest, backgrounds)
            rehearse_checkpoint(config.run_dir)
        accelerator.wait_for_everyone()
        yield


def check_run_dir(
    config: TrainConfig, accelerator: Accelerator, manifest: Manifest, backgrounds: Manifest | None = None
) -> None:
    """Refuse a run folder that holds anything but this run, or this run without --resume."""
    path = config.run_dir / CONFIG
    names = sorted(entry.name for entry in config.run_dir.iterdir() if not entry.name.startswith("."))
    others = [name for name in names if name != VALIDATION]  # made before the run, and checked where it is made
    if path.is_file() and config.resume:
        identity = None if backgrounds is None else backgrounds.identity
        mine = run_identity(config, manifest.identity, accelerator.num_processes, identity)
        check_same_run(_read_config(path), mine, config.run_dir, config.override)
    elif others and config.resume:
        raise InputError(
            f"{config.run_dir}: holds {others[0]} but no {CONFIG}; copy that too from where the run was made, or "
            "choose another --run-dir"
        )
    elif others:
        raise InputError(f"{config.run_dir}: not empty ({others[0]}); give --resume to go on, or another folder")


def write_config(run: Run) -> None:
    """Write config.json, by which --resume recognises this run; on the first rank."""
    if run.accelerator.is_main_process:
        backgrounds = None if run.backgrounds is None else run.backgrounds.identity
        identity = run_identity(run.config, run.manifest.identity, run.accelerator.num_processes, backgrounds)
        write_whole(run.config.run_dir / CONFIG, json.dumps(identity, indent=1) + "\n")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
    except ValueError:
        pass
    raise InputError(f"{path}: not a run's configuration; delete {path.parent} to start over")


def about_weights(run: Run, auc: float) -> dict[str, Any]:
    """What is needed to use the weights."""
    plain = to_dict(run.config)
    return {
        **{name: plain["model"][name] for name in ("model", "stem", "candidates")},
        "canvas": plain["canvas"],
        "shape": list(run.manifest.shape),
        # The axes of the competition's snippets follow from the shape; older weights lack them too.
        **({"axes": aimed_axes(run.bare_model)} if is_observed(run.trained_on) else {}),
        "fold": run.config.fold,
        "auc": auc,
        "shards_identity": run.manifest.identity,
        # Only if several were joined: weights of one data set keep the older form.
        **({"data_sets": [each.identity for each in run.manifest.parts]} if run.manifest.parts else {}),
        **(
            {"backgrounds": [each.identity for each in run.backgrounds.data_sets]}
            if run.backgrounds is not None
            else {}
        ),
        # Observations that the weights were trained on, except for the fold that they kept back.
        **({"kept_back_of": run.manifest.made[VALIDATION]["of"]} if VALIDATION in run.manifest.made else {}),
    }


def trained_on(abouts: Iterable[dict[str, Any]]) -> set[str]:
    """The identities of all data sets that some weights were trained on, from their metadata."""
    return {name for about in abouts for name in _trained_on(about)}


def _trained_on(about: dict[str, Any]) -> list[str]:
    shards: list[str] = about.get("data_sets", [about.get("shards_identity", "")])
    backgrounds: list[str] = about.get("backgrounds", shards)
    return backgrounds
