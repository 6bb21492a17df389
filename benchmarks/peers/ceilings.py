"""Upper limits for any loader: copying the same bytes, and returning one batch that is already on the device."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.bench_data import snippet_paths
from benchmarks.peers.spec import BATCHES_AHEAD, HEIGHT, WIDTH, Loading, Spec
from benchmarks.peers.transforms import load_npy

Halves = npt.NDArray[np.float16]


def build(spec: Spec, workers: int) -> Loading:
    """With threads, copy the snippets; without, return the same batch again and again."""
    return _copies(spec, workers) if workers else _resident(spec)


def _copies(spec: Spec, workers: int) -> Loading:
    """Copy every snippet from memory into batch buffers, which are reused."""
    values = np.stack([load_npy(path) for path in snippet_paths(spec.data)])
    pool = ThreadPoolExecutor(workers)
    buffers = cycle([np.zeros((spec.batch_size, *spec.shape), np.float16) for _ in range(BATCHES_AHEAD + 1)])
    parts = np.array_split(np.arange(spec.batch_size), workers)

    def start(first: int) -> tuple[int, Halves, list[Future[None]]]:
        buffer, source = next(buffers), values[first : first + spec.batch_size]
        pieces = [slice(part[0], part[-1] + 1) for part in parts if len(part)]
        return first, buffer, [pool.submit(np.copyto, buffer[piece], source[piece]) for piece in pieces]

    class Epochs:
        def __iter__(self) -> Iterator[tuple[range, Tensor]]:
            under_way: deque[tuple[int, Halves, list[Future[None]]]] = deque()
            for first in range(0, len(values), spec.batch_size):
                under_way.append(start(first))
                if len(under_way) == BATCHES_AHEAD:
                    yield self._finished(*under_way.popleft())
            while under_way:
                yield self._finished(*under_way.popleft())

        def _finished(self, first: int, buffer: Halves, copies: list[Future[None]]) -> tuple[range, Tensor]:
            for copy in copies:
                copy.result()
            return range(first, first + spec.batch_size), torch.from_numpy(buffer)

    return Loading(Epochs(), close=pool.shutdown)


def _resident(spec: Spec) -> Loading:
    """Return one batch again and again: the cost of the loop itself."""
    shape, dtype = ((1, HEIGHT, WIDTH), torch.float32) if spec.workload != "raw" else (spec.shape, torch.float16)
    views = (2,) if spec.workload == "tta" else ()
    batch = torch.zeros((spec.batch_size, *views, *shape), dtype=dtype, device=spec.device)
    count = len(snippet_paths(spec.data)) // spec.batch_size

    class Epochs:
        def __iter__(self) -> Iterator[tuple[range, Tensor]]:
            for number in range(count):
                yield range(number * spec.batch_size, (number + 1) * spec.batch_size), batch

    return Loading(Epochs())
