"""One call from a data set to batches, for programs that bring their own training loop."""

from collections.abc import Sequence

import torch

from pipeline.augment import DrawConfig
from pipeline.canvas import CanvasConfig
from pipeline.loader import Loader, LoaderConfig
from pipeline.plan import Order, Sampling, Share
from shard_tools.errors import InputError
from shard_tools.joined import Roots, read_manifests
from shard_tools.kaggle_layout import SPLITS
from shard_tools.manifest import Manifest


def open_loader(
    shards: Roots | Manifest,
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

    A `for` over the loader is one epoch, the next `for` the next epoch. Each sample comes once an epoch over all ranks,
    in an order that depends on `seed` and the epoch alone. `state_dict()` and `load_state_dict()` continue in the
    middle of an epoch, bit for bit. Close the loader, or use it in a `with` statement.

    A batch has `image`, `target` (B,) float32 in 0 to 1 (-1 where unknown), `counts` (B,) bool, False for the
    repeats that fill up the last batch, and `row` (B,) int64, the row of each sample in the manifest. `image` is

    - without `canvas`: (B, 6, T, F) float16, the snippets as they are;
    - with `canvas` and `augment`: (B, C, H, W) float32, augmented, with mixed targets where CutMix or mixup are drawn;
    - with `canvas` alone: (B, V, C, H, W) float32, one image for each of the V `views`.

    Args:
        shards: A folder or URL (s3://, https://) that `python -m shard_tools pack` wrote, several of them, or a
            manifest.
        split: "train" or "test".
        fold: Of the train split: leave this fold out. None: leave none out.
        held_out: Read the samples of `fold` alone, to validate on them.
        batch_size: Cadences in a batch of one rank.
        canvas: How a snippet becomes an image, for example `CanvasConfig("on_off", 224, 224)`.
        augment: What is drawn for training images, for example `DrawConfig(cutmix=0.5)`. Needs `canvas`.
        views: The images of each cadence for test-time augmentation, some of `canvas.views`. Not with `augment`.
        sampling: "uniform" (each sample once, shuffled), "weighted" (both classes equally often, with replacement) or
            "sequential". None: uniform for training, sequential for the held-out fold and the test split.
        seed: Of the order and of all that is drawn.
        device: Where batches arrive. None: the current GPU if torch can use one, or else the CPU.
        config: Threads, engine, how far to read ahead, and what to do with a bad sample.

    The rank and the number of ranks are those of `torch.distributed` where it is initialised.

    Raises InputError where the data set, split or fold is absent or empty, or the options contradict each other.

    Example:
        with open_loader("shards", fold=0, batch_size=64, canvas=CanvasConfig("on_off", 224, 224)) as loader:
            for batch in loader:
                logits = model(batch.image[:, 0])
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    if held_out and fold is None:
        raise InputError("held_out=True: needs a fold, such as fold=0")
    if augment is not None and (canvas is None or tuple(views) != ("identity",)):
        raise InputError("augment: needs a canvas, and no views; views are for evaluation")
    manifest = shards if isinstance(shards, Manifest) else read_manifests(shards)
    rows = manifest.rows(split, fold, held_out)
    if not len(rows):
        of_fold = "" if fold is None else f", {'fold' if held_out else 'without fold'} {fold}"
        raise InputError(f"{manifest.root}: no samples of the {split} split{of_fold}; it holds {manifest.splits}")
    is_training = split == "train" and not held_out
    order = Order(rows, manifest.targets(rows), sampling or ("uniform" if is_training else "sequential"), seed)
    share = Share(len(rows), batch_size, 1, *_rank_and_world_size())
    return Loader(manifest, order, share, canvas, augment, views, _device(device), config)


def _rank_and_world_size() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
