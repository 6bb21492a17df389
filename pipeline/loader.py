"""The iterable that ties plan, draws, reader and graph together: batches on the device, in a planned order.

Axes: B batch, V views, C channels, H height, W width.
"""

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipeline.canvas import CanvasConfig
from pipeline.draws import DrawConfig, Draws, Int32s, draw, mixed_targets, partner_positions
from pipeline.graph import DRAW_INPUTS, PREFETCH_DEPTH, GraphPlace, build_eval_graph, build_train_graph
from pipeline.plan import Order, Share
from pipeline.randomness import Int64s
from pipeline.reader import Block, Reader
from shard_tools.errors import InputError, StoreError
from shard_tools.manifest import Manifest
from shard_tools.store import Bytes

_log = logging.getLogger(__name__)
REMOTE_READS = 32  # 300 cadences/s of 838 kB at 20 ms of latency and 1 Gbit/s need some 10
_EXTRA = 2  # a contiguous batch of odd size has at most a partner before its start and one after its end


@dataclass(frozen=True)
class LoaderConfig:
    """How far and how wide the loader works ahead."""

    loader_threads: int = os.cpu_count() or 1
    """Threads that decode and augment on the CPU."""
    read_threads: int = 0
    """Threads that read. 0: as many as loader-threads from a local folder, 32 from a remote store."""
    read_ahead: int = 4
    """Batches that are read ahead of the one that is being decoded."""
    on_bad_sample: Literal["fail", "skip"] = "fail"
    """In training, what to do with a sample whose bytes are not those that were packed: stop, or read the next of
    the epoch in its place and name it at the end. Validation and prediction always stop."""
    max_bad: int = 10
    """With skip, the largest number of samples that one rank may replace before it stops."""

    def __post_init__(self) -> None:
        if min(self.loader_threads, self.read_ahead) < 1:
            raise InputError("--loader-threads, --read-ahead: expected at least 1")
        if self.read_threads < 0:
            raise InputError(f"--read-threads {self.read_threads}: expected 0 or more")
        if self.max_bad < 0:
            raise InputError(f"--max-bad {self.max_bad}: expected at least 0")


@dataclass(frozen=True)
class Batch:
    """What the model is fed."""

    image: Tensor
    """(B, C, H, W) float32 in training, (B, V, C, H, W) in evaluation, on the device."""
    target: Tensor
    """(B,) float32 on the device, in 0 to 1; -1 where unknown."""
    counts: Tensor
    """(B,) bool on the device; False for the repeats that fill up the last batch."""
    row: Tensor
    """(B,) int64 on the device, rows of the manifest."""
    position: Int64s
    """(B,) positions in the epoch."""


@dataclass(frozen=True)
class _Planned:
    """One batch on its way: planned, its bytes being read, or inside the graph."""

    positions: Int64s
    """Of the batch, then of partners outside it."""
    counts: npt.NDArray[np.bool_]
    """Of the batch alone."""
    draws: Draws | None
    block: Block


class Loader:
    """Iterate over one epoch after another of an order; resumable through `state_dict`.

    Each iteration continues where the last batch was handed out and ends at the end of its epoch. A rank's loader
    reads its own share, so Accelerate need not (and does not) prepare it.
    """

    def __init__(
        self,
        manifest: Manifest,
        order: Order,
        share: Share,
        canvas: CanvasConfig,
        draws: DrawConfig | None = None,
        views: Sequence[str] = ("identity",),
        device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
        config: LoaderConfig = LoaderConfig(),
    ) -> None:
        """`draws` makes training batches; None makes evaluation batches of `views`."""
        if share.length != len(order):
            raise ValueError(f"a share of {share.length} positions, for an order of {len(order)}")
        self.share = share
        self._manifest, self._order, self._canvas, self._draws = manifest, order, canvas, draws
        self._device, self._config = device, config
        self.skipped: dict[str, str] = {}
        """Key and reason of every sample that was replaced."""
        self._planes = canvas.plane_shape(manifest.shape)
        self._epoch = self._micro = 0  # of the next batch to hand out
        self._to_plan: Iterator[int] = iter(())
        self._reading: deque[_Planned] = deque()
        self._in_graph: deque[_Planned] = deque()
        self._copying: deque[tuple[Any, torch.cuda.Event]] = deque()
        max_batch = share.batch_size + (_EXTRA if draws else 0)
        # A buffer is free again when its batch has left the graph, which holds at most depth + 1 batches.
        blocks = config.read_ahead + PREFETCH_DEPTH + 2
        # A request is mostly waiting: many are under way at once, so that their latencies overlap.
        read_threads = config.read_threads or (REMOTE_READS if manifest.store.is_remote else config.loader_threads)
        self._reader = Reader(manifest, max_batch, blocks, read_threads, self._allocate)
        device_id = (device.index or 0) if device.type == "cuda" else None
        place = GraphPlace(max_batch, config.loader_threads, device_id)
        if draws:
            self._graph = build_train_graph(self._feed, canvas, manifest.shape, place)
        else:
            self._graph = build_eval_graph(self._feed, canvas, manifest.shape, views, place)
        self._graph.build()

    def __len__(self) -> int:
        """Batches of one rank in one epoch."""
        return self.share.steps * self.share.accumulate

    def __iter__(self) -> Iterator[Batch]:
        self._restart()
        while self._micro < len(self):
            (output,) = self._graph.run()
            planned = self._in_graph.popleft()
            # Counted before it is handed out: a state taken while the batch is at work continues after it.
            self._micro += 1
            yield self._to_batch(output, planned)
        self._epoch, self._micro = self._epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Where the next batch lies, as (epoch, position in epoch): for any number of ranks."""
        step, within = divmod(self._micro, self.share.accumulate)
        if within:
            raise RuntimeError("a loader's state is taken between steps, not between the micro-batches of a step")
        if step == self.share.steps:
            return {"epoch": self._epoch + 1, "position": 0}
        return {"epoch": self._epoch, "position": step * self.share.global_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where a state was taken. Raises InputError where no step of this global batch begins there."""
        step, rest = divmod(state["position"], self.share.global_batch)
        if rest:
            raise InputError(
                f"the run stopped at position {state['position']} of its epoch, where no step of a global batch of "
                f"{self.share.global_batch} begins; keep batch size x ranks x accumulation as it was"
            )
        self._epoch, self._micro = state["epoch"], step * self.share.accumulate

    def close(self) -> None:
        """Stop the reader's threads."""
        self._to_plan = iter(())
        self._reader.close()

    def _allocate(self, shape: tuple[int, int]) -> Bytes:
        # Pinned: the GPU copies from it without a detour, while the CPU goes on.
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda").numpy()

    def _restart(self) -> None:
        """Begin at the next batch; first empty what an iteration that was left early has under way."""
        self._to_plan = iter(())
        for planned in self._reading:
            wait(planned.block.pending)  # its buffer is about to be used again
        self._reading.clear()
        while self._in_graph:
            self._graph.run()
            self._in_graph.popleft()
        self._graph.reset()
        self._to_plan = iter(range(self._micro, len(self)))

    def _feed(self) -> tuple[Any, ...]:
        """The graph's next inputs; the reads of the batches after it are under way when it returns."""
        while len(self._reading) <= self._config.read_ahead and (micro := next(self._to_plan, None)) is not None:
            self._reading.append(self._plan(micro))
        if not self._reading:
            raise StopIteration
        planned = self._reading.popleft()
        self._reader.finish(planned.block)
        if planned.draws is not None and self._config.on_bad_sample == "skip":
            self._replace_failed(planned)
        data = self._reader.data(planned.block)
        self._in_graph.append(planned)
        if planned.draws is None:
            return (data,)
        return (data, *(getattr(planned.draws, name) for name in DRAW_INPUTS))

    def _plan(self, micro: int) -> _Planned:
        """Decide on a batch of this epoch and begin to read it."""
        positions, counts = self.share.positions(*divmod(micro, self.share.accumulate))
        if self._draws is None:
            rows = self._order.rows_at(self._epoch, positions)
            return _Planned(positions, counts, None, self._reader.start(rows))
        slots, partner = batch_slots(positions, counts, len(self._order))
        rows = self._order.rows_at(self._epoch, slots)
        draws = draw(
            self._draws,
            self._canvas,
            self._planes,
            seed=self._order.seed,
            epoch=self._epoch,
            positions=slots,
            length=len(self._order),
        )
        return _Planned(slots, counts, replace(draws, partner=partner), self._reader.start(rows))

    def _replace_failed(self, planned: _Planned) -> None:
        """Read the next sample of the epoch that can be read in the place of each that cannot."""
        for slot in sorted(planned.block.failed):
            reason = planned.block.failed[slot]
            key = self._manifest.key(int(planned.block.rows[slot]))
            if key not in self.skipped:
                self.skipped[key] = str(reason)
                _log.warning("skipped %s: %s", key, reason)
            if len(self.skipped) > self._config.max_bad:
                raise InputError(
                    f"more than --max-bad {self._config.max_bad} samples could not be read; last: {reason}"
                )
            position = int(planned.positions[slot])
            # Of the plan alone, like the sample itself: on any number of ranks the same one takes its place.
            for after in range(1, len(self._order)):
                (row,) = self._order.rows_at(self._epoch, np.array([(position + after) % len(self._order)]))
                if self._manifest.key(int(row)) in self.skipped:
                    continue
                try:
                    self._reader.retry(planned.block, slot, int(row))
                    break
                except StoreError:
                    raise
                except InputError:
                    continue  # it is counted where the plan has it

    def _targets(self, planned: _Planned) -> npt.NDArray[np.float32]:
        """Of the batch and partners outside it, as mixed."""
        own = self._manifest.target[planned.block.rows]
        if self._draws is None or planned.draws is None:
            return own.astype(np.float32)
        return mixed_targets(self._draws, planned.draws, own, own[planned.draws.partner])

    def _image(self, output: Any, size: int) -> Tensor:
        """The canvases of a batch, as a tensor that stays what it is."""
        image = from_dlpack(output.as_tensor())[:size]
        if self._device.type != "cuda":
            return image
        # DALI knows nothing of torch's stream: it gets its memory back when torch has copied from it, not when Python
        # has let go of it. Two batches later the copy is long done, so that nothing waits.
        copy = image.clone()
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        self._copying.append((output, copied))
        while len(self._copying) > PREFETCH_DEPTH:
            self._copying.popleft()[1].synchronize()
        return copy

    def _to_batch(self, output: Any, planned: _Planned) -> Batch:
        size = len(planned.counts)

        def to_device(values: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(values).to(self._device, non_blocking=True)

        return Batch(
            image=self._image(output, size),
            target=to_device(self._targets(planned)[:size]),
            counts=to_device(planned.counts),
            row=to_device(planned.block.rows[:size]),
            position=planned.positions[:size],
        )


def batch_slots(positions: Int64s, counts: npt.NDArray[np.bool_], length: int) -> tuple[Int64s, Int32s]:
    """The positions that a training batch has to hold, and where in it each one's CutMix partner lies.

    The batch's own positions come first. Those that count are contiguous, so at most two partners lie outside and are
    added; a batch of even size has none. What does not count, and what was added, is its own partner.
    """
    own = positions[counts]
    partners = partner_positions(own, length)
    slots = np.concatenate([positions, np.setdiff1d(partners, own)])
    places = np.arange(len(slots), dtype=np.int32)
    place_of = {int(position): place for place, position in reversed(list(enumerate(slots)))}
    places[: len(own)] = [place_of[int(position)] for position in partners]
    return slots, places
