"""DALI's own readers.webdataset, over the same tars and indexes."""

from collections.abc import Iterator

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from benchmarks.bench_data import BUCKET, SHARDS
from benchmarks.peers.spec import BATCHES_AHEAD, HEIGHT, WIDTH, Loading, Spec
from benchmarks.peers.transforms import cut_mixed
from pipeline.devices import with_index
from shard_tools.manifest import read_manifest

_SHUFFLE_BUFFER = 256  # samples; its shuffle is within it
_OUTPUTS_AHEAD = 2  # batches that are done before they are asked for


def build(spec: Spec, workers: int) -> Loading:
    """Its threads do all: decode, cast, flip, resize; CutMix is torch's, on the batch that it made."""
    on_gpu = spec.device != "cpu"
    torch.set_num_threads(spec.threads)
    manifest = read_manifest(spec.data / BUCKET / SHARDS)
    tars = [str(spec.data / BUCKET / SHARDS / shard.name) for shard in manifest.shards]

    def graph() -> DataNode:
        data = fn.readers.webdataset(
            paths=tars,
            index_paths=[tar.replace(".tar", ".idx") for tar in tars],
            ext=["npy"],
            missing_component_behavior="error",
            random_shuffle=spec.shuffles,
            initial_fill=_SHUFFLE_BUFFER,
            read_ahead=False,
            # Mapped pages stay in the cache however often they are dropped.
            dont_use_mmap=spec.source == "cold",
            prefetch_queue_depth=BATCHES_AHEAD,
            name="reader",
        )
        halves = fn.decoders.numpy(data)
        halves = halves.gpu() if on_gpu else halves
        return halves if spec.workload == "raw" else _image(halves, spec)

    pipeline = pipeline_def(
        graph,
        batch_size=spec.batch_size,
        num_threads=workers,
        device_id=with_index(torch.device(spec.device)).index,
        prefetch_queue_depth=_OUTPUTS_AHEAD,
    )()
    pipeline.build()

    class Epochs:
        def __init__(self) -> None:
            self.start = 0  # of the next batch; it reads round and round

        def __iter__(self) -> Iterator[tuple[range, Tensor]]:
            for _ in range(0, len(manifest), spec.batch_size):
                yield self.next()

        def next(self) -> tuple[range, Tensor]:
            (output,) = pipeline.run()
            start, self.start = self.start, (self.start + spec.batch_size) % len(manifest)
            batch = from_dlpack(output.as_tensor())
            return range(start, start + spec.batch_size), cut_mixed(batch) if spec.workload == "train" else batch

    epochs = Epochs()

    def settle() -> None:
        # It alone reads on when its epoch is over, and would begin its turn with work that nobody timed.
        for _ in range(BATCHES_AHEAD + _OUTPUTS_AHEAD):
            epochs.next()

    # It hands out no names: where it does not shuffle, samples come as the shards hold them.
    return Loading(epochs, to_keys=lambda places: manifest.keys_of(np.asarray(places)), settle=settle)


def _image(halves: DataNode, spec: Spec) -> DataNode:
    """(P, T, F) float16 to (1, H, W), or to both views of it."""
    panels, time_bins, channels = spec.shape
    stacked = fn.reshape(fn.cast(halves, dtype=types.FLOAT), shape=[1, panels * time_bins, channels], layout="CHW")
    image = fn.resize(stacked, size=[HEIGHT, WIDTH], interp_type=types.INTERP_LINEAR, antialias=True)
    if spec.workload == "tta":
        return fn.stack(image, fn.flip(image, horizontal=1))
    return fn.flip(image, horizontal=fn.random.coin_flip()) if spec.workload == "train" else image
