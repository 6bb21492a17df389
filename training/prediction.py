"""Prediction: from models and a loader to one logit for each sample."""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.canvas import CanvasConfig
from pipeline.loader import Loader, LoaderConfig
from pipeline.plan import Order, Share
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from shard_tools.observation.band_folds import band_folds
from shard_tools.system.progress import progress
from training.accelerator import pick_precision
from training.metrics import sigmoid, unique_rows
from training.model import ModelConfig, build_model
from training.other_weights import load_other_weights
from training.search.aiming import CadenceScorer, aim, parse_axes
from training.search.candidates import WindowModel
from training.weights import fill_model, find_weights, is_ours, load_weights

_log = logging.getLogger(__name__)
BATCH_SIZE = 64
"""Cadences of one rank in one forward pass, unless infer.py is told otherwise."""


def predict_rows(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Loader,
    label: str,
    after_batch: Callable[[], None] = lambda: None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Rows and logits of everything the loader's order holds, over all ranks, each row once, sorted.

    Logits are averaged over the views of a batch (B, V, C, H, W). `after_batch` may raise to stop it.
    """
    rows, (logits,) = predict_each(accelerator, [model], loader, label, after_batch)
    return rows, logits


def predict_each(
    accelerator: Accelerator,
    models: Sequence[nn.Module],
    loader: Loader,
    label: str,
    after_batch: Callable[[], None] = lambda: None,
) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.float64]]]:
    """As `predict_rows`, of several models that see the same batches: rows, and the logits of each model."""
    for model in models:
        model.eval()
    rows, counts, logits = [], [], []
    # Benchmarks pass batches without a manifest.
    with torch.inference_mode(), CadenceScorer(models, getattr(loader, "manifest", None)) as cadences:
        for batch in progress(loader, len(loader), label, "batches"):
            rows.append(batch.row)
            counts.append(batch.counts)
            logits.append(cadences.score(batch.row, batch.image, partial(_all_logits, models, accelerator.autocast)))
            after_batch()
    row, count, logit = (accelerator.gather(torch.cat(parts)).cpu().numpy() for parts in (rows, counts, logits))
    unique, values = unique_rows(row[count], logit[count])
    return unique.astype(np.int64), [column.astype(np.float64) for column in values.T]


def _all_logits(
    models: Sequence[nn.Module], autocast: Callable[[], AbstractContextManager[Any]], image: Tensor
) -> Tensor:
    """(B, models) logits of images (B, V, C, H, W)."""
    return torch.stack([_mean_logits(model, image, autocast) for model in models], 1)


def _mean_logits(model: nn.Module, image: Tensor, autocast: Callable[[], AbstractContextManager[Any]]) -> Tensor:
    """Logits (B,) in float64 of images (B, V, C, H, W), averaged over the views."""
    with autocast():
        views: Tensor
        if isinstance(model, WindowModel) and image.shape[1] == 2:
            views = model.both_views(image[:, 0]).float()
        else:
            views = model(image.flatten(0, 1)).float().view(image.shape[:2])
    return views.double().mean(dim=1)


def load_model(weights: str | Path, device: torch.device | str | None = None) -> tuple[nn.Module, CanvasConfig]:
    """A trained model in evaluation mode, and the canvas that it takes.

    Args:
        weights: A file that train.py wrote, such as best.safetensors; or "needlestream", the weights that come with the
            program.
        device: Where the model goes. None: the current GPU if torch can use one, or else the CPU.

    The model takes canvases (B, C, H, W) float32 to logits (B, 1) float32. Raises InputError naming the file if it is
    absent, damaged, or not written by train.py.

    Example:
        model, canvas = load_model("runs/full/best.safetensors")
        with open_loader("shards", split="test", canvas=canvas, batch_size=64) as loader:
            table = predict(model, loader)
    """
    trained, _ = read_trained(find_weights(weights))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return trained.model.to(device).eval(), trained.canvas


def predict(
    model: nn.Module, loader: Loader, precision: Literal["auto", "bf16", "fp16", "float32"] = "auto"
) -> pd.DataFrame:
    """Score one epoch of an evaluation loader, on this rank.

    Args:
        model: Takes canvases (B, C, H, W) to logits (B, 1), on the loader's device.
        loader: From `pipeline.open_loader` with a canvas and without `augment`. Logits are averaged over its views.
        precision: Precision of the forward pass. auto: bf16 if the hardware has it, else fp16 on a GPU, else float32.

    Returns a row for each sample in the loader's order: `key`, `logit` and `score`, the logit's sigmoid. Logits are
    those of infer.py with the same views and precision; infer.py changes the last digits of scores, to keep those of
    different logits apart. Raises InputError if a sample is bad.
    """
    device = loader.device
    chosen = pick_precision(device) if precision == "auto" else precision
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(chosen)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype, enabled=dtype is not None)

    model.eval()
    rows, logits = [], []
    with torch.inference_mode(), CadenceScorer([model], loader.manifest) as cadences:
        for batch in loader:
            if batch.image.ndim != 5:
                raise InputError(
                    f"predict: images of shape {tuple(batch.image.shape)}, expected (batch, views, channels, height, "
                    "width); open the loader with a canvas and without augment"
                )
            rows.append(batch.row[batch.counts])
            found = cadences.score(batch.row, batch.image, partial(_all_logits, [model], autocast))
            logits.append(found[batch.counts, 0])
    row, logit = (torch.cat(parts).cpu().numpy() for parts in (rows, logits))
    return pd.DataFrame({"key": loader.manifest.keys_of(row), "logit": logit, "score": sigmoid(logit)})


@dataclass(frozen=True)
class Trained:
    """A model from a file of weights, and the views that it takes."""

    model: nn.Module
    canvas: CanvasConfig
    views: tuple[str, ...]
    about: dict[str, Any]
    """The file's metadata about its training; empty if another program wrote it."""


@dataclass(frozen=True)
class OtherModel:
    """What files of weights from another program do not state."""

    name: str
    """A timm model."""
    canvas: CanvasConfig


def load_trained(path: Path, manifest: Manifest, tta: bool, other: OtherModel | None = None) -> Trained:
    """A model with the weights of a file, on the CPU; `other` describes the model if another program wrote the file.

    Raises InputError if it cannot score this data set.
    """
    if other is not None and not is_ours(path):
        other.canvas.plane_shape(manifest.shape)
        trained = Trained(load_other_weights(path, other.name, other.canvas), other.canvas, other.canvas.views, {})
    else:
        trained, shape = read_trained(path)
        if shape != manifest.shape:
            raise InputError(f"{path}: trained on snippets of shape {shape}; {manifest.root} holds {manifest.shape}")
    return trained if tta else replace(trained, views=trained.views[:1])


def read_trained(path: Path) -> tuple[Trained, tuple[int, ...]]:
    """A model with the weights of a file, on the CPU, with all its views; and the shape of its training snippets."""
    state, about = load_weights(path)
    try:
        canvas, shape = CanvasConfig(**about["canvas"]), tuple(about["shape"])
        stem, candidates = about.get("stem", "none"), about.get("candidates", 1)  # older weights have neither
        architecture = ModelConfig(about["model"], stem=stem, candidates=candidates)
        axes = parse_axes(about["axes"]) if about.get("axes") else None  # only a search in observations has them
        _ = f"{about['auc']:.4f} {about['fold']}"  # printed at the end
    except (KeyError, TypeError, ValueError, InputError) as error:
        raise InputError(f"{path}: of another version of the program ({error}); train again") from None
    model = build_model(architecture, canvas.channels, canvas.height, canvas.width)
    fill_model(model, state, str(path))
    if axes is not None:
        aim(model, axes)
    return Trained(model, canvas, architecture.views(canvas.views), about), shape


@dataclass(frozen=True)
class PredictConfig:
    """What is scored, and how it is read."""

    split: str
    batch_size: int
    """Cadences of one rank in one forward pass."""
    loader: LoaderConfig


def predict_all(
    accelerator: Accelerator, manifest: Manifest, trained: Sequence[Trained], config: PredictConfig
) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.float64]]]:
    """Rows of a split, and their logits by each judge (`plan_judges`).

    There is one pass over the shards for all models that take the same images of the same rows. All models of one pass
    are on the device together.
    """
    rows = manifest.rows(config.split)
    judges = plan_judges(manifest, trained, rows)
    logits = [np.empty(len(rows)) for _ in judges]
    parts = [(judge, part) for judge, judge_parts in enumerate(judges) for part in judge_parts]
    passes: dict[tuple[Any, ...], list[tuple[int, JudgePart]]] = {}
    for judge, part in parts:
        each = trained[part.model]
        passes.setdefault((each.canvas, each.views, part.rows.tobytes()), []).append((judge, part))
    for group in passes.values():
        models = [trained[part.model] for _, part in group]
        found = _predict_part(accelerator, manifest, models, group[0][1].rows, config)
        for (judge, part), values in zip(group, found, strict=True):
            logits[judge][np.searchsorted(rows, part.rows)] = values
    return rows, logits


def _predict_part(
    accelerator: Accelerator,
    manifest: Manifest,
    trained: Sequence[Trained],
    rows: npt.NDArray[np.int64],
    config: PredictConfig,
) -> list[npt.NDArray[np.float64]]:
    """Logits of some rows by models that take the same images."""
    order = Order(rows, manifest.target, "sequential")
    share = Share(len(order), config.batch_size, 1, accelerator.process_index, accelerator.num_processes)
    models = [each.model.to(accelerator.device) for each in trained]
    canvas, views = trained[0].canvas, trained[0].views
    loader = Loader(manifest, order, share, canvas, None, views, accelerator.device, config.loader)
    try:
        _, found = predict_each(accelerator, models, loader, "prediction")
    finally:
        loader.close()
    for model in models:
        model.to("cpu")  # the next pass needs the device's memory
    return found


class JudgePart(NamedTuple):
    """The rows that one of several models scores."""

    model: int
    """Its place among the models."""
    rows: npt.NDArray[np.int64]


def plan_judges(manifest: Manifest, trained: Sequence[Trained], rows: npt.NDArray[np.int64]) -> list[list[JudgePart]]:
    """Which model scores which rows.

    A judge is one model, or the models of several folds of an observation, each of which scores the fold that it was
    not trained on. Rows of folds without a model go to the first.
    """
    judges: dict[str, list[int]] = {}
    for number, each in enumerate(trained):
        kept_back = each.about.get("kept_back_of")
        judges.setdefault(json.dumps(kept_back) if kept_back else str(number), []).append(number)
    return [_share_rows(manifest, trained, numbers, rows) for numbers in judges.values()]


def _share_rows(
    manifest: Manifest, trained: Sequence[Trained], numbers: Sequence[int], rows: npt.NDArray[np.int64]
) -> list[JudgePart]:
    """The rows that each of a judge's models scores; some models may get none."""
    if len(numbers) == 1:
        return [JudgePart(numbers[0], rows)]
    judge = np.full(len(manifest), numbers[0])
    fold = _kept_back_fold(manifest, trained[numbers[0]].about)
    for number in reversed(numbers):  # so that the first of several models of one fold scores it
        judge[fold == trained[number].about["fold"]] = number
    shares = [JudgePart(number, rows[judge[rows] == number]) for number in numbers]
    return [share for share in shares if len(share.rows)]


def _kept_back_fold(manifest: Manifest, about: dict[str, Any]) -> npt.NDArray[np.int8]:
    """(rows,) the fold of each row, if the weights were trained on other folds of its observation; else -1."""
    observations = about.get("kept_back_of", [])
    known = np.zeros(len(manifest), bool)
    for data_set in manifest.data_sets:
        known[data_set.rows.start : data_set.rows.stop] = data_set.identity in observations
    return np.where(known, band_folds(manifest), np.int8(-1)) if known.any() else np.full(len(manifest), -1, np.int8)


def count_trained_on(manifest: Manifest, trained: Sequence[Trained], rows: npt.NDArray[np.int64]) -> int:
    """How many of these rows of observations are scored by weights that were trained on them."""
    seen = np.zeros(len(manifest), bool)
    for part in (part for judge in plan_judges(manifest, trained, rows) for part in judge):
        about = trained[part.model].about
        fold = _kept_back_fold(manifest, about)
        own = part.rows
        seen[own] |= (fold[own] >= 0) & (fold[own] != about.get("fold"))
    return int(seen.sum())


def warn_of_known(manifest: Manifest, trained: Sequence[Trained], rows: npt.NDArray[np.int64]) -> None:
    """Warn if snippets of an observation are scored by weights that were trained on them."""
    if known := count_trained_on(manifest, trained, rows):
        _log.warning(
            "warning: %s of %s snippets are scored by weights that were trained on them as holding no needle, which "
            "may hide one; with the weights of train.py --fold all, none scores a snippet that it was trained on",
            f"{known:,}", f"{len(rows):,}",
        )  # fmt: skip
