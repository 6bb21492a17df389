"""What a loop has to do, and the list of loops."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.peers.spec import Kind, first_missing
from benchmarks.rates import What
from pipeline.augment import DrawConfig
from pipeline.canvas import CanvasConfig
from pipeline.loader import LoaderConfig
from training.config import TrainConfig
from training.model import ModelConfig

Feed = Literal["shards", "torch", "kernels", "held"]
"""shards: our loader. torch: .npy files, and canvases by torch's own routines. kernels: .npy files, and canvases by our
kernels. held: one batch of our loader again and again, the upper limit."""
MOST_EPOCHS = 1000  # length of a schedule: no loop is asked for more epochs
_PARTS: dict[str, Callable[..., Any]] = {
    "model": ModelConfig, "canvas": CanvasConfig, "draws": DrawConfig, "loader": LoaderConfig
}  # fmt: skip


@dataclass(frozen=True)
class LoopSpec:
    """What to train or predict, and with how much of the machine."""

    what: What
    plan: TrainConfig
    """Model, canvas, draws, optimiser and batch size; its shards hold the cadences."""
    files: Path
    """Folder with train/<c>/<key>.npy for the same cadences."""
    workers: int
    """Worker processes of loops that have any."""
    device: str

    def to_json(self) -> str:
        """The specification as text, for the process of a loop."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "LoopSpec":
        """What `to_json` wrote, with the default store: the benchmark reads a local folder."""
        plain = json.loads(text)
        plan: dict[str, Any] = plain.pop("plan")
        del plan["store"]
        plan |= {name: tuple(value) for name, value in plan.items() if isinstance(value, list)}
        plan |= {name: build(**plan[name]) for name, build in _PARTS.items()}
        plan |= {"run_dir": Path(plan["run_dir"])}
        return cls(**{**plain, "plan": TrainConfig(**plan), "files": Path(plain["files"])})


@dataclass
class Turn:
    """What a loop did in one turn: an epoch of training, or one prediction of all cadences."""

    cadences: int = 0
    loss: float = 0.0
    """Mean of the epoch's batches; 0 in prediction."""
    shape: tuple[int, ...] = ()
    """Shape of the images of the last batch that was trained on."""
    logits: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """(cadences,) in prediction."""

    def record(self, cadences: int, loss: float, image: torch.Tensor) -> None:
        """Note an epoch: cadences that were trained on, their mean loss, and a batch of images."""
        self.cadences, self.loss, self.shape = cadences, loss, tuple(image.shape)


Turns = Iterator[Turn]
"""Each `next` stops the clock of the turn before, waits for the benchmark, and starts the clock again."""
Predictor = Callable[[], npt.NDArray[np.float64]]
"""Each call predicts all cadences, with workers or threads of its own, and returns their logits in order."""


@dataclass(frozen=True)
class Loop:
    """One loop with one feed."""

    name: str
    module: str
    """A module of benchmarks.loops with `train(job, turns)` and `predictor(job)`."""
    feed: Feed
    kind: Kind = "peer"
    packages: tuple[str, ...] = ()
    """What it needs beyond the project's own packages, by the names that pip knows."""
    has_workers: bool = True
    differs: str = ""
    """How it differs from our loop, besides `OF_ALL`."""

    def workers(self, workers: int) -> int:
        """The number of its worker processes."""
        return workers if self.has_workers and self.kind in ("peer", "kernels") else 0

    def missing(self) -> str | None:
        """The first of its packages that is not installed; None if all are."""
        return first_missing(self.packages)


OF_ALL = (
    "torch's optimiser as it is by default, not fused; no search for losses that are not finite; where torch makes the "
    "canvases, one CutMix box for a whole batch, across panels; in prediction demo's model searches each TTA view; "
    "ours searches once for both views"
)
"""How every peer differs from our loop."""
_TIMM = (
    "the steps of its train.py, which its wheel lacks, through its own parts; without its prefetcher, which takes "
    "images as bytes; a last, incomplete batch is dropped"
)
_LIGHTNING = "no progress bar, logger or checkpoints"
_ACCELERATE = "its example's loop with our loss and clipping; no moving average of the weights, which it does not offer"
LOOPS = (
    Loop("ours", "our_loop", "shards", "ours"),
    Loop("timm", "timm_loop", "torch", differs=_TIMM),
    Loop("lightning", "lightning_loop", "torch", packages=("lightning",), differs=_LIGHTNING),
    Loop("accelerate", "accelerate_loop", "torch", differs=_ACCELERATE),
    Loop("accelerate-main", "accelerate_loop", "torch", has_workers=False, differs=_ACCELERATE),
    Loop("timm-kernels", "timm_loop", "kernels", "kernels", differs=_TIMM),
    Loop("lightning-kernels", "lightning_loop", "kernels", "kernels", ("lightning",), differs=_LIGHTNING),
    Loop("accelerate-kernels", "accelerate_loop", "kernels", "kernels", differs=_ACCELERATE),
    Loop("accelerate-kernels-main", "accelerate_loop", "kernels", "kernels", has_workers=False, differs=_ACCELERATE),
    Loop("held", "our_loop", "held", "ceiling"),
)
BY_NAME = {loop.name: loop for loop in LOOPS}
