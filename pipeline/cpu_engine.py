"""The CPU's engine: each thread takes samples all the way from the shard to the image, one pair at a time.

The threads decide nothing: they read and compute what was planned, each into its own slots of the batch. A bad sample
is replaced on the thread that asks for the batch, which also reads the replacement and makes its image.
"""

import contextlib
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pipeline import compile_ahead
from pipeline.augment import Float32s
from pipeline.bad_samples import BadSamples
from pipeline.buffers import BufferPool
from pipeline.cpu_canvas import CpuCanvas, DrawnBatch, Float16s, make_views, to_kernel_types
from pipeline.images import ImageConfig
from pipeline.planner import Planned
from shard_tools.errors import InputError, StoreError
from shard_tools.manifest import Manifest
from shard_tools.sample import read_values

Group = list[int]
"""The slot of one sample, or those of two partners, which are read and made together."""


@dataclass(frozen=True)
class Threads:
    """How many samples are worked on at once."""

    compute: int
    """Largest number that are computed at once: one for each core."""
    read: int
    """Largest number that are read at once: more than cores where reading is mostly waiting."""


@dataclass
class _Work:
    """One batch while it is made."""

    planned: Planned
    epoch: int
    image: Tensor
    drawn: DrawnBatch | None
    """None in evaluation."""
    pending: list[Future[None]] = field(default_factory=list)


class CpuImages:
    """Makes the images of planned batches on threads of the CPU."""

    def __init__(
        self,
        manifest: Manifest,
        images: ImageConfig,
        batch_size: int,
        bad: BadSamples,
        threads: Threads,
    ) -> None:
        self._manifest, self._bad = manifest, bad
        self._canvas = CpuCanvas(images.canvas, images.shape)
        self._views = None if images.draws else images.views
        views = () if self._views is None else (len(self._views),)
        self._pool = BufferPool((batch_size, *views, *self._canvas.image_shape), np.float32)
        self._started: deque[_Work] = deque()
        self._threads = max(threads.compute, threads.read)
        # With a remote store most threads wait, so there are more than cores; only one for each core may compute.
        is_limited = self._threads > threads.compute
        self._cores = threading.Semaphore(threads.compute) if is_limited else contextlib.nullcontext()
        self._scratch = threading.local()
        self._executor = ThreadPoolExecutor(self._threads, "canvas")

    def start(self, planned: Planned, epoch: int) -> None:
        """Begin a batch and return at once."""
        drawn = None if planned.draws is None else to_kernel_types(planned.draws)
        work = _Work(planned, epoch, self._pool.take(), drawn)
        groups = _groups(planned)
        for part in np.array_split(np.arange(len(groups)), min(self._threads, len(groups))):
            work.pending.append(self._executor.submit(self._make, work, [groups[place] for place in part]))
        self._started.append(work)

    def next(self) -> tuple[Planned, Tensor]:
        """Wait for the oldest batch that was begun. Raises InputError if a sample is bad and is not replaced."""
        work = self._started.popleft()
        wait(work.pending)
        for future in work.pending:
            future.result()
        self._bad.settle(work.planned, work.epoch, lambda slots: self._make(work, _groups_of(work.planned, slots)))
        return work.planned, work.image

    def reset(self) -> None:
        """Drop all batches that were begun."""
        while self._started:
            wait(self._started.popleft().pending)

    def close(self) -> None:
        """Stop the threads and drop what was begun."""
        self._executor.shutdown(cancel_futures=True)
        self._started.clear()

    def _make(self, work: _Work, groups: list[Group]) -> None:
        compile_ahead.wait()
        images = work.image.numpy()
        for group in groups:
            snippets = self._snippets()[: len(group)]
            if self._read_group(work.planned, group, snippets):
                with self._cores:
                    self._write(work.drawn, group, snippets, images)

    def _read_group(self, planned: Planned, group: Group, snippets: Float16s) -> bool:
        """Read the snippets of a group; return whether all could be read, and note in the plan which could not."""
        for slot, snippet in zip(group, snippets, strict=True):
            values = snippet.reshape(-1).view(np.uint8)
            try:
                read_values(self._manifest, int(planned.rows[slot]), values, planned.panels(slot))
            except StoreError:
                raise  # the store failed, not the sample: no other could be read either
            except InputError as error:
                planned.failed[slot] = error
        return not any(slot in planned.failed for slot in group)

    def _snippets(self) -> Float16s:
        """A thread's memory for two snippets (2, P, t, F)."""
        if not hasattr(self._scratch, "snippets"):
            self._scratch.snippets = np.zeros((2, *self._manifest.shape), np.float16)
        snippets: Float16s = self._scratch.snippets
        return snippets

    def _write(self, drawn: DrawnBatch | None, group: Group, snippets: Float16s, images: Float32s) -> None:
        """Write the images of a group into the batch."""
        if drawn is not None:
            # The image of a partner from outside the batch is not needed.
            places = [images[slot] if slot < len(images) else np.empty_like(images[0]) for slot in group]
            self._canvas.write_train_images(snippets, drawn, group, places)
        elif self._views == ("identity",):
            self._canvas.write_eval_image(snippets[0], images[group[0], 0])
        else:
            image = np.empty(self._canvas.image_shape, np.float32)
            self._canvas.write_eval_image(snippets[0], image)
            make_views(image, self._views or (), images[group[0]])


def _groups(planned: Planned) -> list[Group]:
    """Every slot once, together with its partner if it has another one."""
    partners = range(len(planned.rows)) if planned.draws is None else planned.draws.partner.tolist()
    groups, taken = [], set()
    for slot, partner in enumerate(partners):
        if slot not in taken:
            groups.append([slot] if partner == slot else [slot, partner])
            taken.update(groups[-1])
    return groups


def _groups_of(planned: Planned, slots: list[int]) -> list[Group]:
    """The groups that hold any of these slots."""
    return [group for group in _groups(planned) if not set(slots).isdisjoint(group)]
