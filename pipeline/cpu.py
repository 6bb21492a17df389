"""Images made on the CPU: each thread takes samples all the way from the shard to the canvas, one pair at a time."""

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pipeline.batches import Planned
from pipeline.buffers import BufferPool
from pipeline.cpu_canvas import CpuCanvas, mix_pair, write_views
from pipeline.draws import Float32s
from pipeline.reader import record_failures
from pipeline.skipping import BadSamples
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
        self._images, self._snippets = BufferPool(shape, np.float32), BufferPool(manifest.shape, np.float16)
        self._started: deque[_Work] = deque()
        self._cores = threading.Semaphore(threads)
        self._threads = max(threads, read_threads)
        self._executor = ThreadPoolExecutor(self._threads, "canvas")

    def start(self, planned: Planned, epoch: int) -> None:
        """Begin to make the images of a batch, and return at once."""
        work = _Work(planned, epoch, self._images.take())
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
            replaced = set(self._bad.settle(work.planned, work.epoch, self._try))
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
        for group in groups:
            planes: dict[int, Float32s] = {}

            def make(slot: int, planes: dict[int, Float32s] = planes) -> None:
                planes[slot] = self._planes(work.planned, slot)

            record_failures(work.planned, group, make)
            if len(planes) == len(group):
                with self._cores:
                    self._write(work, group, planes)

    def _planes(self, planned: Planned, slot: int) -> Float32s:
        """Read a slot's sample, and make its planes, augmented."""
        snippet = self._snippets.take()
        read_values(self._manifest, int(planned.rows[slot]), snippet.numpy().reshape(-1).view(np.uint8))
        with self._cores:
            planes = self._canvas.to_planes(snippet.numpy())
            return planes if planned.draws is None else self._canvas.augment(planes, planned.draws, slot)

    def _write(self, work: _Work, group: Group, planes: dict[int, Float32s]) -> None:
        """Mix a group and write its canvases into the batch."""
        if work.planned.draws is not None and len(group) == 2:
            mix_pair(planes, work.planned.draws, group)
        images = work.image.numpy()
        for slot in group:
            if slot >= len(images):
                continue  # a partner from outside the batch
            if self._views is None or self._views == ("identity",):
                self._canvas.write_canvas(planes[slot], images[slot].reshape(images.shape[-3:]))
            else:
                image = np.empty(images.shape[2:], np.float32)
                self._canvas.write_canvas(planes[slot], image)
                write_views(image, self._views, images[slot])

    def _try(self, slot: int, row: int) -> None:
        read_values(self._manifest, row, self._snippets.take().numpy().reshape(-1).view(np.uint8))


def _groups(planned: Planned) -> list[Group]:
    """Every slot once, with its partner where that is another."""
    partners = range(len(planned.rows)) if planned.draws is None else planned.draws.partner.tolist()
    groups, taken = [], set()
    for slot, partner in enumerate(partners):
        if slot not in taken:
            groups.append([slot] if partner == slot else [slot, partner])
            taken.update(groups[-1])
    return groups
