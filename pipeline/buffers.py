"""Memory that is reused: fresh memory costs more than the work done in it (page faults, pinning)."""

import math
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class BufferPool:
    """Tensors of one shape. The memory of each is reused when it and all views of it are deleted."""

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike, pinned: bool = False) -> None:
        """`pinned` memory is copied to a GPU directly, while the CPU goes on."""
        self._shape, self._dtype, self._pinned = shape, np.dtype(dtype), pinned
        self._free: list[npt.NDArray[Any]] = []

    def take(self) -> Tensor:
        """A tensor with undefined values. May be called from any thread."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = self._allocate()
        # The tensor and all views of it hold this array: it is deleted with the last of them.
        held = memory[...]
        weakref.finalize(held, self._free.append, memory).atexit = False
        return torch.from_numpy(held)

    def _allocate(self) -> npt.NDArray[Any]:
        if self._pinned:
            size = math.prod(self._shape) * self._dtype.itemsize
            return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().view(self._dtype).reshape(self._shape)
        # NumPy asks for huge pages. They are written to now, so that no later batch pays for the page faults.
        memory = np.empty(self._shape, self._dtype)
        memory.fill(0)
        return memory
