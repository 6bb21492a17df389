"""One call from a data set to batches, for programs that bring their own training loop."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.augment import DrawConfig
from pipeline.backgrounds import backgrounds_order
from pipeline.canvas import CanvasConfig
from pipeline.loader import Loader, LoaderConfig
from pipeline.plan import Order, Sampling, Share
from pipeline.randomness import Int64s
from shard_tools.errors import InputError
from shard_tools.joined_manifest import read_manifests
from shard_tools.kaggle_layout import SPLITS
from shard_tools.manifest import Manifest


def open_loader(
    shards: str | Path | Sequence[str | Path] | Manifest,
    split: str = "train",
    fold: int | None = None,
    *,
    held_out: bool = False,
    batch_size: int = 32,
    canvas: CanvasConfig | None = None,
    augment: DrawConfig | None = None,
    views: Sequence[str] = ("identity",),
    sampling: Sampling | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    config: LoaderConfig = LoaderConfig(),  # noqa: B008 (immutable)
) -> Loader:
    """Open a data set of shards as an iterable of batches on the device.

    Each `for` over the loader is one epoch, or the rest of one that was left early. Over all ranks an epoch holds each
    sample once (with "weighted", as many draws as there are samples), in an order fixed by `sampling`, `seed` and the
    epoch. `state_dict()` and `load_state_dict()` continue in the middle of an epoch, on a CPU bit for bit. Close the
    loader when done, or use it in a `with` statement.

    A batch has these fields, all but the last on the device:

    - `image`: without `canvas` (B, 6, T, F) float16, the snippets as they are; with `canvas` and `augment`
      (B, C, H, W) float32; with `canvas` alone (B, V, C, H, W) float32, one image for each of the V `views`
    - `target`: (B,) float32 in 0 to 1, mixed where images were; -1 where unknown
    - `counts`: (B,) bool, False for the repeats that fill up the last batch
    - `row`: (B,) int64, rows of `loader.manifest`; `loader.manifest.keys_of(rows)` gives their keys
    - `position`: (B,) int64, a NumPy array of positions in the epoch

    Args:
        shards: A folder or URL (s3://, https://) that `python -m shard_tools pack` wrote, several of them, or a
            manifest.
        split: "train" or "test".
        fold: Of the train split: leave this fold out. None: leave none out.
        held_out: Read the samples of `fold` alone, to validate on them.
        batch_size: Samples in a batch of one rank.
        canvas: How a snippet becomes an image, for example `CanvasConfig("on_off", 224, 224)`.
        augment: How strongly training images are augmented; `DrawConfig()` has the defaults of train.py. Needs
            `canvas`. None: nothing is augmented, whatever the split. With `DrawConfig(needles=0.5)` the data set must
            hold only cadences without needles: all of both splits are read, signals are added to them, and a target is
            1 where a needle was added.
        views: The images of each sample for test-time augmentation, some of `canvas.views`. Not with `augment`.
        sampling: "uniform" (each sample once, shuffled), "weighted" (both classes equally often, with replacement) or
            "sequential". None: uniform for training, sequential for the held-out fold and the test split.
        seed: Seed of the order and of the augmentation.
        device: Where batches arrive. None: the current GPU if torch can use one, else the CPU.
        config: Threads, engine, batches read ahead, and what to do with a bad sample.

    Rank and world size are those of `torch.distributed` if it is initialised, else 0 and 1.

    Raises: InputError: The data set cannot be read, the split or fold is empty, or options contradict each other;
    later, while iterating, a sample is missing, cut short or swapped. The message says what to do.

    Example:
        with open_loader("shards", fold=0, canvas=CanvasConfig("on_off", 224, 224), augment=DrawConfig()) as loader:
            for batch in loader:
                logits = model(batch.image)
    """
    manifest = shards if isinstance(shards, Manifest) else read_manifests(shards)
    _check_images(canvas, augment, views)
    if batch_size < 1:
        raise InputError(f"batch_size {batch_size}: expected at least 1")
    if augment is not None and augment.needles is not None:
        if fold is not None or held_out or sampling not in (None, "uniform"):
            raise InputError("fold, held_out, sampling: leave them out with needles; every background is read once")
        order = backgrounds_order(manifest, seed)
    else:
        rows = _chosen_rows(manifest, split, fold, held_out)
        is_training = split == "train" and not held_out
        order = Order(rows, manifest.targets(rows), sampling or ("uniform" if is_training else "sequential"), seed)
    share = Share(len(order), batch_size, 1, *_rank_and_world_size())
    return Loader(manifest, order, share, canvas, augment, views, _device(device), config)


def _chosen_rows(manifest: Manifest, split: str, fold: int | None, held_out: bool) -> Int64s:
    _check_split(manifest, split, fold, held_out)
    rows = manifest.rows(split, fold, held_out)
    if not len(rows):
        raise InputError(f"{manifest.root}: no samples of the {split} split are left; it holds {manifest.splits}")
    return rows


def _check_split(manifest: Manifest, split: str, fold: int | None, held_out: bool) -> None:
    if split not in SPLITS:
        raise InputError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    if held_out and fold is None:
        raise InputError("held_out=True: needs a fold, such as fold=0")
    if fold is None:
        return
    if split != "train":
        raise InputError(f"fold {fold}: only the train split has folds; leave fold out")
    folds = np.unique(manifest.fold[manifest.rows(split)]).tolist()
    if fold not in folds:
        raise InputError(f"{manifest.root}: fold {fold}: no sample of the train split is in it; its folds are {folds}")


def _check_images(canvas: CanvasConfig | None, augment: DrawConfig | None, views: Sequence[str]) -> None:
    asks_for_views = tuple(views) != ("identity",)
    if canvas is None and (augment is not None or asks_for_views):
        raise InputError("augment, views: need a canvas")
    if augment is not None and asks_for_views:
        raise InputError("augment and views: choose one; augment is for training, views are for evaluation")
    if canvas is not None and (not views or set(views) - set(canvas.views)):
        raise InputError(f"views {tuple(views)} of canvas {canvas.layout!r}: expected some of {canvas.views}")


def _rank_and_world_size() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
