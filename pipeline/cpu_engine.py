"""Images made on the CPU: each thread takes samples all the way from the shard to the canvas, one pair at a time."""

import contextlib
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pipeline.augment import Draws, Float32s
from pipeline.bad_samples import BadSamples
from pipeline.buffers import BufferPool
from pipeline.cpu_canvas import CpuCanvas, Float16s, make_views
from pipeline.planner import Planned
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
        shape = (batch_size, *(() if views is None else (len(views),)), *canvas.image_shape)
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
        self._bad.settle(work.planned, work.epoch, lambda slots: self._make(work, _groups_of(work.planned, slots)))
        return work.planned, work.image

    def reset(self) -> None:
        """Let go of all that was begun."""
        while self._started:
            wait(self._started.popleft().pending)

    def close(self) -> None:
        """Stop the threads, and let go of what was begun."""
        self._executor.shutdown(cancel_futures=True)
        self._started.clear()

    def _make(self, work: _Work, groups: list[Group]) -> None:
        images = work.image.numpy()
        for group in groups:
            snippets = self._snippets()[: len(group)]
            if self._read_group(work.planned, group, snippets):
                with self._cores:
                    self._write(work.planned.draws, group, snippets, images)

    def _read_group(self, planned: Planned, group: Group, snippets: Float16s) -> bool:
        """Read the snippets of a group; whether all of them could be."""
        for slot, snippet in zip(group, snippets, strict=True):
            try:
                read_values(self._manifest, int(planned.rows[slot]), snippet.reshape(-1).view(np.uint8))
            except StoreError:
                raise  # of no sample's own: none could be read in its place
            except InputError as error:
                planned.failed[slot] = error
        return not any(slot in planned.failed for slot in group)

    def _snippets(self) -> Float16s:
        """A thread's memory for two snippets (2, P, t, F)."""
        if not hasattr(self._scratch, "snippets"):
            self._scratch.snippets = np.zeros((2, *self._manifest.shape), np.float16)
        snippets: Float16s = self._scratch.snippets
        return snippets

    def _write(self, draws: Draws | None, group: Group, snippets: Float16s, images: Float32s) -> None:
        """The canvases of a group into the batch."""
        if draws is not None:
            # A partner from outside the batch has no place in it.
            places = [images[slot] if slot < len(images) else np.empty_like(images[0]) for slot in group]
            self._canvas.write_train_images(snippets, draws, group, places)
        elif self._views == ("identity",):
            self._canvas.write_eval_image(snippets[0], images[group[0], 0])
        else:
            image = np.empty(self._canvas.image_shape, np.float32)
            self._canvas.write_eval_image(snippets[0], image)
            make_views(image, self._views or (), images[group[0]])


def _groups(planned: Planned) -> list[Group]:
    """Every slot once, with its partner where that is another."""
    partners = range(len(planned.rows)) if planned.draws is None else planned.draws.partner.tolist()
    groups, taken = [], set()
    for slot, partner in enumerate(partners):
        if slot not in taken:
            groups.append([slot] if partner == slot else [slot, partner])
            taken.update(groups[-1])
    return groups


def _groups_of(planned: Planned, slots: list[int]) -> list[Group]:
    """Those that hold any of these slots."""
    return [group for group in _groups(planned) if not set(slots).isdisjoint(group)]
