"""Cross-validation: a run for each fold under one folder, and their out-of-fold scores joined.

RUN/fold0/, RUN/fold1/, ... are ordinary runs; RUN/oof.csv, RUN/cv.json and RUN/roc.png are made of them.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator
from accelerate.utils import release_memory

from shard_tools.atomic_files import write_whole
from shard_tools.errors import InputError
from shard_tools.joined_manifest import read_manifests
from shard_tools.manifest import Manifest
from training.accelerator import build_accelerator
from training.config import TrainConfig
from training.metrics import average_precision, roc_auc
from training.out_of_fold import read_scores, write_scores
from training.run import CONFIG, build_network, check_fold, check_run_dir, is_trained, read_backgrounds

Draw = Callable[[Path, npt.NDArray[np.int8], npt.NDArray[np.float64], float], None]
"""Draws the ROC curve of targets and logits to a file, labelled with their ROC AUC."""


def train_folds(config: TrainConfig, train: Callable[[TrainConfig], None], draw_roc: Draw) -> None:
    """Call `train` for each fold, to start or resume its run, and join their scores.

    They run one after another in this process, so that all ranks stay in step; an exception from `train` ends them all.
    """
    accelerator = build_accelerator(config.precision)
    if not any(is_trained(path) for path in config.run_dir.glob("fold*")):
        build_network(config, accelerator)  # for its checks, before any data is read
    manifest = read_manifests(config.shards, config.store)
    runs = plan_folds(config, manifest)
    backgrounds = read_backgrounds(config, manifest)
    if accelerator.is_main_process:
        check_folds(config, runs, accelerator, manifest, backgrounds)
    for one in runs:
        train(one)
        release_memory()  # reference cycles and CUDA's cached memory, before the next model needs it
    if accelerator.is_main_process:
        write_cross_validation(config.run_dir, runs, manifest, draw_roc)


def plan_folds(config: TrainConfig, manifest: Manifest) -> list[TrainConfig]:
    """One configuration for each fold of the shards, with a run folder of its own."""
    return [
        dataclasses.replace(config, fold=fold, run_dir=config.run_dir / f"fold{fold}")
        for fold in range(manifest.made["folds"])
    ]


def check_folds(
    config: TrainConfig,
    runs: Sequence[TrainConfig],
    accelerator: Accelerator,
    manifest: Manifest,
    backgrounds: Manifest | None = None,
) -> None:
    """Check all folds and their folders before the first is trained, so that the last is not refused hours later."""
    if (config.run_dir / CONFIG).exists():
        raise InputError(f"{config.run_dir}: holds the run of one fold; choose another --run-dir for --fold all")
    fold = manifest.fold[manifest.rows("train")]
    if not np.isin(fold, [one.held_out for one in runs]).all():
        raise InputError(f"{manifest.root}: has training samples outside its {len(runs)} folds; pack again")
    for one in runs:
        check_fold(one, manifest)
        if one.run_dir.is_dir():
            check_run_dir(one, accelerator, manifest, backgrounds)


def write_cross_validation(run_dir: Path, runs: Sequence[TrainConfig], manifest: Manifest, draw_roc: Draw) -> None:
    """Join the out-of-fold scores of each fold's best weights; write and print their metrics, joint and per fold."""
    logit = np.full(len(manifest), np.nan)
    aucs = []
    for one in runs:
        rows = manifest.rows("train", one.held_out, held_out=True)
        logit[rows] = _read_logits(one.run_dir / "oof.csv", manifest.keys_of(rows))
        aucs.append(roc_auc(manifest.target[rows], logit[rows]))
    rows = manifest.rows("train")
    target, logit = manifest.target[rows], logit[rows]
    auc, precision = roc_auc(target, logit), average_precision(target, logit)
    mean, deviation = statistics.fmean(aucs), statistics.stdev(aucs)
    write_scores(run_dir / "oof.csv", manifest.keys_of(rows), target, logit, manifest.fold[rows])
    draw_roc(run_dir / "roc.png", target, logit, auc)
    summary = {"auc": auc, "average_precision": precision, "cadences": len(rows), "fold_auc": aucs}
    summary |= {"fold_auc_mean": mean, "fold_auc_std": deviation}
    write_whole(run_dir / "cv.json", json.dumps(summary, indent=1) + "\n")
    for one, fold_auc in zip(runs, aucs, strict=True):
        print(f"fold {one.held_out}: validation ROC AUC {fold_auc:.4f}")
    print(f"mean of the folds: ROC AUC {mean:.4f}, standard deviation {deviation:.4f}")
    print(f"out of fold, all {len(rows):,} cadences: ROC AUC {auc:.4f}, average precision {precision:.4f}")
    print(f"run folder: {run_dir}  (oof.csv, cv.json, roc.png; weights: fold*/best.safetensors)")


def _read_logits(path: Path, keys: list[str]) -> npt.NDArray[np.float64]:
    """The logits of exactly `keys`, in their order, that a run wrote."""
    try:
        scores = read_scores(path)
    except (InputError, OSError):
        scores = None
    found = dict(zip(scores.keys, scores.logit.tolist(), strict=True)) if scores else {}
    if scores is None or len(scores.keys) != len(keys) or found.keys() != set(keys):
        raise InputError(
            f"{path}: expected a score for each of the {len(keys):,} ids of its fold; delete {path.parent}, and the "
            "same command with --resume trains that fold again"
        )
    return np.array([found[key] for key in keys])
