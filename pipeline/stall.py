"""How long the device waits for its batches."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from pipeline.devices import record_event, with_index
from pipeline.loader import Batch

_PENDING = 64  # waits whose length is not yet known; more than the steps that a GPU queues


class StallTimer:
    """Iterate over batches, and measure for how many seconds the device was idle because the next was not there.

    On a CPU that is the time spent waiting for the next batch. With a GPU, Python's wait for a batch also includes
    waiting for the GPU's work, so it cannot be used. There the stall is the time between the end of the work on one
    batch and the arrival of the next, measured by the GPU's own clock.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device) -> None:
        self._batches = batches
        self._device = with_index(device)
        self._seconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def seconds(self) -> float:
        """Seconds so far. On a GPU this waits until the last batch has arrived."""
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
            began = record_event(self._device, timing=True)
            yield
            self._pending.append((began, record_event(self._device, timing=True)))
            self._settle(_PENDING)
        else:
            now = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - now

    def _settle(self, left: int) -> None:
        """Add up all waits but the last `left`."""
        while len(self._pending) > left:
            began, ended = self._pending.popleft()
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1e3  # of milliseconds
