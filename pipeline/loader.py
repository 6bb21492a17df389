"""The loader: plans each batch, has an engine make its images, and hands both out on the device.

Which sample comes next is decided in plan.py, what happens to it in augment.py. A batch is planned in the thread that
iterates, before any of its work goes to a worker thread. Worker threads only read and compute what was planned
(reader.py, cpu_engine.py, and DALI's own), so that their timing changes nothing. Only a replacement for a bad sample is
chosen later (bad_samples.py), in the iterating thread too. augment.py computes the weights of mixed targets; here they
are applied to the batch's labels.

Axes: B batch, V views, C channels, H height, W width.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.augment import DrawConfig, mixed_targets
from pipeline.backgrounds import check_no_needles
from pipeline.bad_samples import BadSamples, Policy
from pipeline.canvas import CanvasConfig
from pipeline.devices import with_index
from pipeline.images import ImageConfig, Images
from pipeline.observed_times import observed_cadences
from pipeline.plan import Order, Share
from pipeline.planner import EXTRA, Planned, Planner, UpcomingBatches
from pipeline.randomness import Int64s
from pipeline.raw_batches import RawSnippets
from pipeline.reader import Reader
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from shard_tools.system.cores import rank_cores

Engine = Literal["auto", "dali", "cpu"]
_ASKED_FOR = (-1, -1)  # stands for the batch that is waited for: if it fails, all are begun again
REMOTE_READS = 32  # 300 cadences/s of 838 kB need some 10, at 20 ms of latency and 1 Gbit/s for each read


@dataclass(frozen=True)
class LoaderConfig:
    """How far and how wide the loader works ahead."""

    engine: Engine = "auto"
    """What makes the images: DALI, or compiled kernels on threads of the CPU. auto: DALI on a GPU, the kernels on a
    CPU, where they are several times as fast."""
    loader_threads: int = rank_cores()
    """Threads that decode and augment on the CPU. Default: the usable cores, divided by this machine's ranks."""
    read_threads: int = 0
    """Samples that are read at once. 0: as many as loader-threads from a local folder, 32 from a remote store. With
    the CPU engine the same threads make the images, so a number below loader-threads changes nothing."""
    read_ahead: int = 4
    """Batches that are made in advance."""
    on_bad_sample: Policy = "fail"
    """In training, what to do with a sample that is missing, cut short or swapped (only `shard_tools verify` finds
    flipped bits): fail stops; skip reads the epoch's next sample in its place and names the bad one at the end.
    Validation, prediction and `open_loader` without `augment` always stop."""
    max_bad: int = 10
    """With skip, the number of bad samples that one rank tolerates before it stops."""

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
    """(B, C, H, W) float32 with draws, (B, V, C, H, W) float32 without, (B, P, T, F) float16 without a canvas; on the
    device."""
    target: Tensor
    """(B,) float32 on the device, in 0 to 1; -1 where unknown."""
    counts: Tensor
    """(B,) bool on the device; False for the repeats that fill up the last batch."""
    row: Tensor
    """(B,) int64 on the device, rows of the manifest."""
    position: Int64s
    """(B,) positions in the epoch, on the CPU."""


class Loader:
    """Iterate over an order, one epoch after another; resumable through `state_dict`.

    Each iteration goes on after the last batch that was handed out, to the end of its epoch. `begin` starts its first
    batches before they are asked for. Each rank's loader reads its own share, so that Accelerate need not (and does
    not) prepare it.
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
        """Make training batches if given `draws`, else evaluation batches of `views`; without `canvas`, raw snippets.

        Raises ValueError where `order` and `share` differ in length, InputError where the canvas does not fit.
        """
        if share.length != len(order):
            raise ValueError(f"a share of {share.length} positions, for an order of {len(order)}")
        adds_needles = draws is not None and draws.needles is not None
        if adds_needles:
            check_no_needles(manifest)
        self.share = share
        self.manifest = manifest
        self._draws, self._config = draws, config
        # Numbered now, so that DALI and torch use the same GPU whichever is current later.
        self.device = with_index(device)
        planes = canvas.plane_shape(manifest.shape) if canvas else (0, 0, 0)
        observed = observed_cadences(manifest) if adds_needles else None
        self._planner = Planner(order, share, draws if canvas else None, canvas, planes, observed)
        self._upcoming = UpcomingBatches(self._planner)
        self._bad = BadSamples(manifest, order, config.on_bad_sample if draws else "fail", config.max_bad)
        self._ahead = config.read_ahead + 1
        self._images: Images | None = self._build_images(canvas, tuple(views))
        self._epoch = self._micro = 0  # of the next batch to hand out
        self._begun: deque[tuple[int, int]] = deque()
        """Epoch and number of every batch that was begun and not yet handed out."""

    @property
    def skipped(self) -> dict[str, str]:
        """Key and reason of every sample that was replaced."""
        return self._bad.skipped

    def __len__(self) -> int:
        """Batches of one rank in one epoch."""
        return self.share.steps * self.share.accumulate

    def __iter__(self) -> Iterator[Batch]:
        while self._micro < len(self):
            self.begin()
            self._begun[0] = _ASKED_FOR
            planned, image = self._open_images().next()
            self._begun.popleft()
            # Counted before it is handed out, so that a state taken while it is used continues after it.
            self._micro += 1
            yield self._to_batch(planned, image)
        self._epoch, self._micro = self._epoch + 1, 0

    def begin(self) -> None:
        """Begin the next batches and return at once, so that the next iteration need not wait for its first ones.

        Call it before a pause between two iterations, such as validation. It begins as many batches as an iteration has
        in advance (`read_ahead` + 1, and with DALI those in its graph), and none of the epoch after. `state_dict` does
        not count them. Errors are raised when the batch is asked for.
        """
        images = self._open_images()
        if self._begun and self._begun[0] != (self._epoch, self._micro):
            images.reset()  # another state was loaded, or a batch that was asked for has failed
            self._begun.clear()
        for micro in range(self._micro + len(self._begun), min(len(self), self._micro + self._ahead)):
            images.start(self._upcoming.take(self._epoch, micro), self._epoch)
            self._begun.append((self._epoch, micro))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, int]:
        """The epoch and the position at which the next batch begins.

        Another number of ranks can load it if its global batch divides the position. Raises RuntimeError between the
        micro-batches of a step.
        """
        step, within = divmod(self._micro, self.share.accumulate)
        if within:
            raise RuntimeError("a loader's state is taken between steps, not between the micro-batches of a step")
        if step == self.share.steps:
            return {"epoch": self._epoch + 1, "position": 0}
        return {"epoch": self._epoch, "position": step * self.share.global_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where a state was taken. Raises InputError if no step of this global batch begins there."""
        step, rest = divmod(state["position"], self.share.global_batch)
        if rest:
            raise InputError(
                f"the run stopped at position {state['position']} of its epoch, where no step of a global batch of "
                f"{self.share.global_batch} begins; keep batch size x ranks x accumulation as it was"
            )
        self._epoch, self._micro = state["epoch"], step * self.share.accumulate

    def close(self) -> None:
        """Stop the threads and free the memory, the device's too. Batches that were handed out stay valid."""
        if self._images is not None:
            self._images.close()
            self._images = None
            self._begun.clear()

    def _open_images(self) -> Images:
        if self._images is None:
            raise RuntimeError("this loader is closed; build another")
        return self._images

    def _build_images(self, canvas: CanvasConfig | None, views: tuple[str, ...]) -> Images:
        if canvas is None:
            return RawSnippets(self._build_reader(), self._bad)
        images = ImageConfig(canvas, self.manifest.shape, self._draws, views)
        engine = self._config.engine
        if engine == "cpu" or (engine == "auto" and self.device.type != "cuda"):
            return self._build_cpu_images(images)
        return self._build_dali_images(images)

    def _build_cpu_images(self, images: ImageConfig) -> Images:
        from pipeline.cpu_engine import CpuImages, Threads  # needs Numba, which a machine with a GPU may lack

        threads = Threads(self._config.loader_threads, self._read_threads)
        return CpuImages(self.manifest, images, self.share.batch_size, self._bad, threads)

    def _build_dali_images(self, images: ImageConfig) -> Images:
        from pipeline.dali_engine import DaliImages  # slow to import, and not needed on a CPU
        from pipeline.dali_graph import PREFETCH_DEPTH, GraphPlace

        self._ahead += PREFETCH_DEPTH  # inside the graph
        device_id = self.device.index if self.device.type == "cuda" else None
        place = GraphPlace(self._slots, self._config.loader_threads, device_id)
        return DaliImages(self._build_reader(), images, self._bad, place)

    def _build_reader(self) -> Reader:
        return Reader(self.manifest, self._slots, self._read_threads, pinned=self.device.type == "cuda")

    @property
    def _slots(self) -> int:
        """Most samples that a batch needs: its own, and partners from outside it."""
        return self.share.batch_size + (EXTRA if self._draws else 0)

    @property
    def _read_threads(self) -> int:
        # A remote request is mostly waiting: many are under way at once, so that their latencies overlap.
        default = REMOTE_READS if self.manifest.store.is_remote else self._config.loader_threads
        return self._config.read_threads or default

    def _targets(self, planned: Planned) -> npt.NDArray[np.float32]:
        """Targets of all slots, mixed as the images are."""
        own = self.manifest.target[planned.rows]
        if self._draws is None or planned.draws is None:
            return own.astype(np.float32)
        if self._draws.needles is not None:
            own = np.zeros_like(own)  # backgrounds, labelled or not
        own = np.where(planned.draws.has_needle, np.int8(1), own)
        return mixed_targets(self._draws, planned.draws, own, own[planned.draws.partner])

    def _to_batch(self, planned: Planned, image: Tensor) -> Batch:
        if planned.failed:  # an engine forgot to settle these: what was not read is never handed out
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
