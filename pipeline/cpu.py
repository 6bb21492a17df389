"""Images made on the CPU: each thread takes samples all the way from the shard to the canvas, one pair at a time."""

import contextlib
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pipeline.batches import Planned
from pipeline.buffers import BufferPool
from pipeline.cpu_canvas import CpuCanvas, Float16s, mix_pair, write_views
from pipeline.draws import Float32s
from pipeline.skipping import BadSamples
from shard_tools.errors import InputError, StoreError
from shard_tools.manifest import Manifest
from shard_tools.sample import read_values

Group = list[int]
"""Slots that need each other: a sample, or a pair that CutMix mixes."""


@dataclass
class _Work:
    """One batch while it is made."""

    planned: Planned
    epoch: int
    image: Tensor
    pending: list[Future[None]] = field(default_factory=list)


class CpuImages:
    """Makes the images of planned batches, float32 (B, C, H, W), or (B, V, C, H, W) of the views."""

    def __init__(
        self,
        manifest: Manifest,
        canvas: CpuCanvas,
        views: tuple[str, ...] | None,
        batch_size: int,
        bad: BadSamples,
        threads: int,
        read_threads: int,
    ) -> None:
        """`views` None: training images. `threads` compute at once, of `read_threads` (no fewer) that mostly wait."""
        self._manifest, self._canvas, self._views, self._bad = manifest, canvas, views, bad
        config = canvas.canvas
        image = (config.channels, config.height, config.width)
        shape = (batch_size, *image) if views is None else (batch_size, len(views), *image)
        self._pool = BufferPool(shape, np.float32)
        self._started: deque[_Work] = deque()
        self._threads = max(threads, read_threads)
        # Where threads mostly wait for a store there are more of them than cores.
        self._cores = threading.Semaphore(threads) if self._threads > threads else contextlib.nullcontext()
        self._scratch = threading.local()
        self._executor = ThreadPoolExecutor(self._threads, "canvas")

    def start(self, planned: Planned, epoch: int) -> None:
        """Begin to make the images of a batch, and return at once."""
        work = _Work(planned, epoch, self._pool.take())
        groups = _groups(planned)
        for part in np.array_split(np.arange(len(groups)), min(self._threads, len(groups))):
            work.pending.append(self._executor.submit(self._make, work, [groups[place] for place in part]))
        self._started.append(work)

    def next(self) -> tuple[Planned, Tensor]:
        """The oldest batch that was begun and not yet handed out; raises InputError for a sample that is bad."""
        work = self._started.popleft()
        wait(work.pending)
        for future in work.pending:
            future.result()
        if work.planned.failed:
            replaced = set(self._bad.settle(work.planned, work.epoch, lambda _, row: self._read(row)))
            self._make(work, [group for group in _groups(work.planned) if replaced.intersection(group)])
        return work.planned, work.image

    def reset(self) -> None:
        """Let go of all that was begun."""
        while self._started:
            wait(self._started.popleft().pending)

    def close(self) -> None:
        """Stop the threads."""
        self._executor.shutdown(cancel_futures=True)

    def _make(self, work: _Work, groups: list[Group]) -> None:
        images = work.image.numpy()
        for group in groups:
            planes: dict[int, Float32s] = {}
            for slot in group:
                try:
                    snippet = self._read(int(work.planned.rows[slot]))
                except StoreError:
                    raise  # of no sample's own: none could be read in its place
                except InputError as error:
                    work.planned.failed[slot] = error
                    continue
                with self._cores:
                    planes[slot] = self._planes(snippet, work.planned, slot, len(planes))
            if len(planes) == len(group):
                with self._cores:
                    self._write(work.planned, group, planes, images)

    def _read(self, row: int) -> Float16s:
        """A row's snippet (P, t, F), in memory that the thread's next read uses again."""
        if not hasattr(self._scratch, "snippet"):
            self._scratch.snippet = np.zeros(self._manifest.shape, np.float16)
        snippet: Float16s = self._scratch.snippet
        read_values(self._manifest, row, snippet.reshape(-1).view(np.uint8))
        return snippet

    def _planes(self, snippet: Float16s, planned: Planned, slot: int, place: int) -> Float32s:
        if planned.draws is None:
            return self._canvas.to_planes(snippet)
        return self._canvas.to_augmented_planes(snippet, planned.draws, slot, place)

    def _write(self, planned: Planned, group: Group, planes: dict[int, Float32s], images: Float32s) -> None:
        """Mix a group and write its canvases into the batch."""
        if planned.draws is not None and len(group) == 2:
            mix_pair(planes, planned.draws, group)
        for slot in group:
            if slot >= len(images):
                continue  # a partner from outside the batch
            if self._views is None or self._views == ("identity",):
                self._canvas.write_canvas(planes[slot], images[slot].reshape(images.shape[-3:]))
            else:
                image = np.empty(images.shape[2:], np.float32)
                self._canvas.write_canvas(planes[slot], image)
                write_views(image, self._views, images[slot])


def _groups(planned: Planned) -> list[Group]:
    """Every slot once, with its partner where that is another."""
    partners = range(len(planned.rows)) if planned.draws is None else planned.draws.partner.tolist()
    groups, taken = [], set()
    for slot, partner in enumerate(partners):
        if slot not in taken:
            groups.append([slot] if partner == slot else [slot, partner])
            taken.update(groups[-1])
    return groups
