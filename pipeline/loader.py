"""The iterable that ties plan, reader and images together: batches on the device, in a planned order.

Axes: B batch, V views, C channels, H height, W width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.augment import DrawConfig, mixed_targets
from pipeline.bad_samples import BadSamples, Policy
from pipeline.canvas import CanvasConfig
from pipeline.devices import numbered
from pipeline.plan import Order, Share
from pipeline.planner import EXTRA, Planned, Planner
from pipeline.randomness import Int64s
from pipeline.raw_batches import RawSnippets
from pipeline.reader import Reader
from shard_tools.cores import rank_cores
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest

Engine = Literal["auto", "dali", "cpu"]
REMOTE_READS = 32  # 300 cadences/s of 838 kB at 20 ms of latency and 1 Gbit/s need some 10


@dataclass(frozen=True)
class LoaderConfig:
    """How far and how wide the loader works ahead."""

    engine: Engine = "auto"
    """What makes the images: DALI's graph, or compiled kernels on threads of the CPU. auto: DALI on a GPU, the kernels
    on a CPU, where they are several times as fast."""
    loader_threads: int = rank_cores()
    """Threads that decode and augment on the CPU; by default the usable cores, shared among this machine's ranks."""
    read_threads: int = 0
    """Threads that read. 0: as many as loader-threads from a local folder, 32 from a remote store."""
    read_ahead: int = 4
    """Batches that are begun before the one that is handed out is needed."""
    on_bad_sample: Policy = "fail"
    """In training, what to do with a sample whose bytes are not those that were packed: stop, or read the next of
    the epoch in its place and name it at the end. Validation and prediction always stop."""
    max_bad: int = 10
    """With skip, the largest number of bad samples that one rank may meet before it stops."""

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
    """(B, C, H, W) float32 in training, (B, V, C, H, W) in evaluation, (B, P, T, F) float16 without a canvas; on the
    device."""
    target: Tensor
    """(B,) float32 on the device, in 0 to 1; -1 where unknown."""
    counts: Tensor
    """(B,) bool on the device; False for the repeats that fill up the last batch."""
    row: Tensor
    """(B,) int64 on the device, rows of the manifest."""
    position: Int64s
    """(B,) positions in the epoch."""


class Images(Protocol):
    """What turns planned batches into images, some of them at once."""

    def start(self, planned: Planned, epoch: int) -> None:
        """Begin on a batch, and return at once."""

    def next(self) -> tuple[Planned, Tensor]:
        """The oldest batch that was begun and not yet handed out; raises InputError for a sample that is bad."""

    def reset(self) -> None:
        """Let go of all that was begun."""

    def close(self) -> None:
        """Stop the threads and let go of all memory; nothing may be asked for after it."""


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
        canvas: CanvasConfig | None,
        draws: DrawConfig | None = None,
        views: Sequence[str] = ("identity",),
        device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
        config: LoaderConfig = LoaderConfig(),
    ) -> None:
        """`draws` makes training batches, None evaluation batches of `views`; no `canvas`, snippets as they are."""
        if share.length != len(order):
            raise ValueError(f"a share of {share.length} positions, for an order of {len(order)}")
        self.share = share
        self.manifest = manifest
        self._draws, self._config = draws, config
        # Once: DALI and torch have to mean the same GPU, whatever is current when a batch is made.
        self.device = numbered(device)
        planes = canvas.plane_shape(manifest.shape) if canvas else (0, 0, 0)
        self._planner = Planner(order, share, draws if canvas else None, canvas, planes)
        self._bad = BadSamples(manifest, order, config.on_bad_sample if draws else "fail", config.max_bad)
        self._images: Images | None = self._build_images(canvas, tuple(views))
        self._epoch = self._micro = self._begun = 0  # of the next batch to hand out, and to begin

    @property
    def skipped(self) -> dict[str, str]:
        """Key and reason of every sample that was replaced."""
        return self._bad.skipped

    def __len__(self) -> int:
        """Batches of one rank in one epoch."""
        return self.share.steps * self.share.accumulate

    def __iter__(self) -> Iterator[Batch]:
        self._open_images().reset()  # of what an iteration that was left early had under way
        self._begun = self._micro
        while self._micro < len(self):
            while self._begun < min(len(self), self._micro + self._ahead):
                self._open_images().start(self._planner.plan(self._epoch, self._begun), self._epoch)
                self._begun += 1
            planned, image = self._open_images().next()
            # Counted before it is handed out: a state taken while the batch is at work continues after it.
            self._micro += 1
            yield self._to_batch(planned, image)
        self._epoch, self._micro = self._epoch + 1, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        """Stop the threads, and let go of graph and memory, the device's too; batches handed out stay what they are."""
        if self._images is not None:
            self._images.close()
            self._images = None

    def _open_images(self) -> Images:
        if self._images is None:
            raise RuntimeError("this loader was closed; build another")
        return self._images

    def _build_images(self, canvas: CanvasConfig | None, views: tuple[str, ...]) -> Images:
        config, manifest, on_gpu = self._config, self.manifest, self.device.type == "cuda"
        slots = self.share.batch_size + (EXTRA if self._draws else 0)
        # A request is mostly waiting: many are under way at once, so that their latencies overlap.
        read_threads = config.read_threads or (REMOTE_READS if manifest.store.is_remote else config.loader_threads)
        self._ahead = config.read_ahead + 1
        shown = None if self._draws else views
        if canvas is None:
            return RawSnippets(Reader(manifest, slots, read_threads, pinned=on_gpu), self._bad)
        if config.engine == "cpu" or (config.engine == "auto" and not on_gpu):
            from pipeline.cpu_canvas import CpuCanvas
            from pipeline.cpu_engine import CpuImages  # with Numba, which a machine with a GPU may lack

            arithmetic = CpuCanvas(canvas, manifest.shape)
            batch_size, threads = self.share.batch_size, config.loader_threads
            return CpuImages(manifest, arithmetic, shown, batch_size, self._bad, threads, read_threads)
        from pipeline.dali_engine import DaliImages  # slow to import, and not needed on a CPU
        from pipeline.dali_graph import PREFETCH_DEPTH, GraphPlace

        self._ahead += PREFETCH_DEPTH  # inside the graph
        place = GraphPlace(slots, config.loader_threads, self.device.index if on_gpu else None)
        reader = Reader(manifest, slots, read_threads, pinned=on_gpu)
        return DaliImages(reader, canvas, self._draws, manifest.shape, views, self._bad, place)

    def _targets(self, planned: Planned) -> npt.NDArray[np.float32]:
        """Of the batch and partners outside it, as mixed."""
        own = self.manifest.target[planned.rows]
        if self._draws is None or planned.draws is None:
            return own.astype(np.float32)
        own = np.where(planned.draws.has_needle, np.int8(1), own)
        return mixed_targets(self._draws, planned.draws, own, own[planned.draws.partner])

    def _to_batch(self, planned: Planned, image: Tensor) -> Batch:
        if planned.failed:  # that an engine forgot to settle: what was not read is not handed out
            raise planned.failed[min(planned.failed)]
        size = len(planned.counts)

        def to_device(values: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(values).to(self.device, non_blocking=True)

        return Batch(
            image=image.to(self.device),
            target=to_device(self._targets(planned)[:size]),
            counts=to_device(planned.counts),
            row=to_device(planned.rows[:size]),
            position=planned.positions[:size],
        )
