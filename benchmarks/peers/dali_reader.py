"""DALI's own readers.webdataset, over the same tars and indexes."""

from collections.abc import Iterator

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from benchmarks.bench_data import BUCKET, SHARDS
from benchmarks.peers.spec import BATCHES_AHEAD, HEIGHT, WIDTH, Loading, Spec
from benchmarks.peers.transforms import cut_mixed
from pipeline.devices import with_index
from shard_tools.manifest import Manifest, read_manifest

_SHUFFLE_BUFFER = 256  # samples, among which it shuffles
_OUTPUTS_AHEAD = 2  # batches that are finished before they are asked for


def build(spec: Spec, workers: int) -> Loading:
    """DALI's threads decode, cast, flip and resize; CutMix is torch's, on the finished batch."""
    torch.set_num_threads(spec.threads)
    manifest = read_manifest(spec.data / BUCKET / SHARDS)
    epochs = _Epochs(_build_pipeline(spec, workers, manifest), len(manifest), spec)
    # The reader does not return names. Without shuffling, samples come in the order of the shards.
    return Loading(epochs, to_keys=lambda places: manifest.keys_of(np.asarray(places)), settle=epochs.settle)


def _build_pipeline(spec: Spec, workers: int, manifest: Manifest) -> Pipeline:
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
        halves = halves if spec.device == "cpu" else halves.gpu()
        return halves if spec.workload == "raw" else _image(halves, spec)

    pipeline = pipeline_def(
        graph,
        batch_size=spec.batch_size,
        num_threads=workers,
        device_id=with_index(torch.device(spec.device)).index,
        prefetch_queue_depth=_OUTPUTS_AHEAD,
    )()
    pipeline.build()
    return pipeline


class _Epochs:
    """Epochs of a reader that never stops: pairs of places in the order of the shards, and a batch."""

    def __init__(self, pipeline: Pipeline, length: int, spec: Spec) -> None:
        self._pipeline, self._length, self._spec = pipeline, length, spec
        self._start = 0  # of the next batch

    def __iter__(self) -> Iterator[tuple[range, Tensor]]:
        for _ in range(0, self._length, self._spec.batch_size):
            yield self._next()

    def settle(self) -> None:
        """Use up the batches that it prepared after its last epoch, since their making was not timed."""
        for _ in range(BATCHES_AHEAD + _OUTPUTS_AHEAD):
            self._next()

    def _next(self) -> tuple[range, Tensor]:
        (output,) = self._pipeline.run()
        size = self._spec.batch_size
        start, self._start = self._start, (self._start + size) % self._length
        batch = from_dlpack(output.as_tensor())
        return range(start, start + size), cut_mixed(batch) if self._spec.workload == "train" else batch


def _image(halves: DataNode, spec: Spec) -> DataNode:
    """(P, T, F) float16 to (1, H, W), or to both views of it."""
    panels, time_bins, channels = spec.shape
    stacked = fn.reshape(fn.cast(halves, dtype=types.FLOAT), shape=[1, panels * time_bins, channels], layout="CHW")
    image = fn.resize(stacked, size=[HEIGHT, WIDTH], interp_type=types.INTERP_LINEAR, antialias=True)
    if spec.workload == "tta":
        return fn.stack(image, fn.flip(image, horizontal=1))
    return fn.flip(image, horizontal=fn.random.coin_flip()) if spec.workload == "train" else image
