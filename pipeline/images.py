"""What an engine is asked for, and what each engine can do: raw_batches.py, cpu_engine.py, dali_engine.py."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pipeline.augment import DrawConfig
from pipeline.canvas import CanvasConfig
from pipeline.planner import Planned


@dataclass(frozen=True)
class ImageConfig:
    """Which images are made of the snippets."""

    canvas: CanvasConfig
    shape: tuple[int, int, int]
    """A snippet's (P, t, F)."""
    draws: DrawConfig | None = None
    """How training images are augmented; images are then (B, C, H, W) float32. None: evaluation images of `views`,
    (B, V, C, H, W) float32."""
    views: tuple[str, ...] = ("identity",)


class Images(Protocol):
    """Turns planned batches into images, several of them at once."""

    def start(self, planned: Planned, epoch: int) -> None:
        """Begin a batch and return at once."""

    def next(self) -> tuple[Planned, Tensor]:
        """Wait for the oldest batch that was begun. Raises InputError if a sample is bad and is not replaced."""

    def reset(self) -> None:
        """Drop all batches that were begun."""

    def close(self) -> None:
        """Stop the threads and free all memory. Nothing may be called afterwards."""
