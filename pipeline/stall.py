"""How long the device waits for its batches."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from pipeline.devices import numbered, recorded
from pipeline.loader import Batch

_PENDING = 64  # waits whose length is not known yet: more of them than a GPU's queue holds steps


class Timed:
    """Iterate over batches, and tell for how many seconds the device had nothing to do for want of one.

    On a CPU that is the time in which the next batch is waited for. With a GPU Python is ahead, and waits in the same
    place for the GPU to get on: there it is the time between the end of the work on one batch and the arrival of the
    next, by the GPU's own clock.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device) -> None:
        self._batches = batches
        self._device = numbered(device)
        self._seconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def seconds(self) -> float:
        """So far; on a GPU, waits until the last batch has arrived there."""
        self._settle(0)
        return self._seconds

    def __iter__(self) -> Iterator[Batch]:
        iterator = iter(self._batches)
        while True:
            with self._timing():
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    @contextmanager
    def _timing(self) -> Iterator[None]:
        if self._device.type == "cuda":
            began = recorded(self._device, timing=True)
            yield
            self._pending.append((began, recorded(self._device, timing=True)))
            self._settle(_PENDING)
        else:
            now = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - now

    def _settle(self, left: int) -> None:
        """Add up all but the last waits."""
        while len(self._pending) > left:
            began, ended = self._pending.popleft()
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1e3  # of milliseconds
