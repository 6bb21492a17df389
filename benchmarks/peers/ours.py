"""This project's loader."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_data import shards_of
from benchmarks.peers.spec import BATCHES_AHEAD, HEIGHT, WIDTH, Loading, Spec
from pipeline.augment import DrawConfig
from pipeline.canvas import CanvasConfig
from pipeline.loader import Loader, LoaderConfig
from pipeline.plan import Order, Share
from shard_tools.manifest import read_manifest

CANVAS = CanvasConfig("stack6", HEIGHT, WIDTH, normalise=False)
DRAWS = DrawConfig(cutmix=1.0)


def build(spec: Spec, workers: int) -> Loading:
    """Training has every augmentation, and CutMix for every pair."""
    # The loader's own threads use the cores; torch's would compete with them.
    torch.set_num_threads(1)
    manifest = read_manifest(shards_of(spec))
    rows = manifest.rows("train")
    order = Order(rows, manifest.target[rows], "uniform" if spec.shuffles else "sequential")
    loader = Loader(
        manifest,
        order,
        Share(len(order), spec.batch_size),
        None if spec.workload == "raw" else CANVAS,
        DRAWS if spec.workload == "train" else None,
        views=CANVAS.views if spec.workload == "tta" else ("identity",),
        device=torch.device(spec.device),
        config=LoaderConfig(loader_threads=workers, read_ahead=BATCHES_AHEAD),
    )

    class Epochs:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for batch in loader:
                yield batch.row, batch.image

    def to_keys(row: Tensor) -> list[str]:
        return manifest.keys_of(np.asarray(row.cpu()))

    return Loading(Epochs(), to_keys=to_keys, close=loader.close)
