"""Buffers that are used again: fresh memory costs more than the work done in it (page faults, pinning)."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

Allocate = Callable[[], npt.NDArray[Any]]


class BufferPool:
    """Tensors of one shape. Each has its memory for itself until it, and every view of it, is let go of."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool = False) -> None:
        """`pinned` memory can be copied to a GPU without a detour, while the CPU goes on."""
        self._shape, self._dtype, self._pinned = shape, dtype, pinned
        self._free: list[npt.NDArray[Any]] = []

    def take(self) -> Tensor:
        """A tensor with anything in it. May be called from any thread."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = torch.zeros(self._shape, dtype=self._dtype, pin_memory=self._pinned).numpy()
        # The tensor, and each view of it, holds this array; when the last is gone, so is the array.
        held = memory[...]
        weakref.finalize(held, self._free.append, memory).atexit = False
        return torch.from_numpy(held)
