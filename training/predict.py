"""Prediction: models and a loader to the logits of everything that the loader's order holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import nn

from pipeline.canvas import CanvasConfig
from pipeline.loader import Loader, LoaderConfig
from pipeline.plan import Order, Share
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from shard_tools.progress import progress
from training.metrics import unique_rows
from training.model import ModelConfig, build_model
from training.weights import fill_model, load_weights

BATCH_SIZE = 64
"""Cadences of one rank in one forward pass, unless infer.py is told otherwise."""


def predict(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Loader,
    label: str,
    after_batch: Callable[[], None] = lambda: None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Rows and logits of everything the loader's order holds, over all ranks, each row once, sorted.

    Logits are averaged over the views of a batch (B, V, C, H, W). `after_batch` may end it by raising.
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
    """As `predict`, of several models that see the same batches: rows, and the logits of each model."""
    for model in models:
        model.eval()
    rows, counts, logits = [], [], []
    with torch.inference_mode():
        for batch in progress(loader, len(loader), label, "batches"):
            image = batch.image.flatten(0, 1)
            found = []
            for model in models:
                with accelerator.autocast():
                    views = model(image).float().view(batch.image.shape[:2])
                found.append(views.double().mean(dim=1))
            rows.append(batch.row)
            counts.append(batch.counts)
            logits.append(torch.stack(found, dim=1))
            after_batch()
    row, count, logit = (accelerator.gather(torch.cat(parts)).cpu().numpy() for parts in (rows, counts, logits))
    unique, values = unique_rows(row[count], logit[count])
    return unique.astype(np.int64), [column.astype(np.float64) for column in values.T]


@dataclass(frozen=True)
class Trained:
    """A model as a file of weights has it, and what it looks at."""

    model: nn.Module
    canvas: CanvasConfig
    views: tuple[str, ...]
    about: dict[str, Any]


def load_trained(path: Path, manifest: Manifest, tta: bool) -> Trained:
    """A model with the weights of a file, on the CPU. Raises InputError where it could not score this data set."""
    state, about = load_weights(path)
    try:
        canvas, shape = CanvasConfig(**about["canvas"]), tuple(about["shape"])
        stem, candidates = about.get("stem", "none"), about.get("candidates", 1)  # older weights have neither
        architecture = ModelConfig(about["model"], stem=stem, candidates=candidates)
        _ = f"{about['auc']:.4f} {about['fold']}"  # what is said of them at the end
    except (KeyError, TypeError, ValueError, InputError) as error:
        raise InputError(f"{path}: of another version of the program ({error}); train again") from None
    if shape != manifest.shape:
        raise InputError(f"{path}: trained on snippets of shape {shape}; {manifest.root} holds {manifest.shape}")
    model = build_model(architecture, canvas.channels, canvas.height, canvas.width)
    fill_model(model, state, str(path))
    possible = architecture.views(canvas.views)
    return Trained(model, canvas, possible if tta else possible[:1], about)


def predict_all(
    accelerator: Accelerator,
    manifest: Manifest,
    split: str,
    trained: Sequence[Trained],
    batch_size: int,
    config: LoaderConfig,
) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.float64]]]:
    """Rows and each model's logits of a split, with one pass over the shards for all that look at the same images.

    All models of one pass are on the device together.
    """
    rows = manifest.rows(split)
    order = Order(rows, manifest.target[rows], "sequential")
    share = Share(len(order), batch_size, 1, accelerator.process_index, accelerator.num_processes)
    logits: dict[int, npt.NDArray[np.float64]] = {}
    for canvas, views in dict.fromkeys((each.canvas, each.views) for each in trained):
        group = [number for number, each in enumerate(trained) if (each.canvas, each.views) == (canvas, views)]
        models = [trained[number].model.to(accelerator.device) for number in group]
        loader = Loader(manifest, order, share, canvas, None, views, accelerator.device, config)
        try:
            rows, found = predict_each(accelerator, models, loader, "prediction")
        finally:
            loader.close()
        for number, model, values in zip(group, models, found, strict=True):
            logits[number] = values
            model.to("cpu")  # the next pass needs the device's memory
    return rows, [logits[number] for number in range(len(trained))]
