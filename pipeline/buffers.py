"""Buffers that are used again: fresh memory costs more than the work done in it (page faults, pinning)."""

import math
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class BufferPool:
    """Tensors of one shape. Each has its memory for itself until it, and every view of it, is let go of."""

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike, pinned: bool = False) -> None:
        """`pinned` memory can be copied to a GPU without a detour, while the CPU goes on."""
        self._shape, self._dtype, self._pinned = shape, np.dtype(dtype), pinned
        self._free: list[npt.NDArray[Any]] = []

    def take(self) -> Tensor:
        """A tensor with anything in it. May be called from any thread."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = self._allocate()
        # The tensor, and each view of it, holds this array; when the last is gone, so is the array.
        held = memory[...]
        weakref.finalize(held, self._free.append, memory).atexit = False
        return torch.from_numpy(held)

    def _allocate(self) -> npt.NDArray[Any]:
        if self._pinned:
            size = math.prod(self._shape) * self._dtype.itemsize
            return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().view(self._dtype).reshape(self._shape)
        # NumPy's, which asks for huge pages; written to now, so that later batches do not pay for it piece by piece.
        memory = np.empty(self._shape, self._dtype)
        memory.fill(0)
        return memory
