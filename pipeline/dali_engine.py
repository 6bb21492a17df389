"""The GPU's engine: snippets are read ahead on threads and fed into a DALI graph, which makes the images.

Worker threads of this project only read. Everything from the float16 bytes to the image happens in the graph
(dali_graph.py), on the GPU, or for tests on the CPU.
"""

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipeline.bad_samples import BadSamples
from pipeline.dali_graph import PREFETCH_DEPTH, Feed, GraphPlace, build_eval_graph, build_train_graph, train_inputs
from pipeline.devices import record_event
from pipeline.images import ImageConfig
from pipeline.planner import Planned
from pipeline.reader import Block, ReadAhead, Reader


class DaliImages:
    """Makes the images of planned batches in a DALI graph."""

    def __init__(self, reader: Reader, images: ImageConfig, bad: BadSamples, place: GraphPlace) -> None:
        self._blocks, self._place = ReadAhead(reader, bad), place
        self._in_graph: deque[Block] = deque()
        self._copying: deque[tuple[Any, Block, torch.cuda.Event]] = deque()
        self._inputs = train_inputs(images.draws) if images.draws else ()
        self._graph = _build_graph(_weak(self._feed), images, place)
        self._graph.build()

    def start(self, planned: Planned, epoch: int) -> None:
        """Begin to read a batch and return at once."""
        self._blocks.start(planned, epoch)

    def next(self) -> tuple[Planned, Tensor]:
        """Wait for the oldest batch that was begun. Raises InputError if a sample is bad and is not replaced."""
        if not self._in_graph:
            self._graph.reset()  # it ended with the epoch before, or with a failed batch
        (output,) = self._graph.run()
        # Its batch has left the graph: the block's memory may be reused.
        block = self._in_graph.popleft()
        return block.planned, self._image(output, block)[: len(block.planned.counts)]

    def reset(self) -> None:
        """Drop all batches that were begun."""
        self._blocks.reset()
        while self._in_graph:
            self._graph.run()
            self._in_graph.popleft()

    def close(self) -> None:
        """Stop the reader's threads and free the graph and all memory at once, the device's too."""
        self._blocks.close()
        while self._copying:
            self._copying.popleft()[2].synchronize()
        del self._graph
        self._in_graph.clear()

    def _feed(self) -> tuple[Any, ...]:
        """The graph's next inputs."""
        if not self._blocks:
            raise StopIteration
        block = self._blocks.next()
        self._in_graph.append(block)
        planned, snippets = block.planned, block.snippets.numpy()
        if planned.draws is None:
            return (snippets,)
        return (snippets, *(getattr(planned.draws, name) for name in self._inputs))

    def _image(self, output: Any, block: Block) -> Tensor:
        """The images of a batch, in memory that DALI does not reuse."""
        image = from_dlpack(output.as_tensor())
        if self._place.device_id is None:
            return image
        # torch may read now: run() without a stream returns when its output is done (DALI's documentation), and
        # from_dlpack tells DALI which of torch's streams reads it: the current one of the output's device, on which
        # clone() runs. DALI does not wait for that stream before it reuses its memory, so the output is kept until
        # torch has copied it. Two batches later the copy is long done, and nothing waits.
        copy = image.clone()
        copied = record_event(torch.device("cuda", self._place.device_id))
        self._copying.append((output, block, copied))
        while len(self._copying) > PREFETCH_DEPTH:
            self._copying.popleft()[2].synchronize()
        return copy


def _build_graph(feed: Feed, images: ImageConfig, place: GraphPlace) -> Any:
    if images.draws:
        return build_train_graph(feed, images.canvas, images.draws, images.shape, place)
    return build_eval_graph(feed, images.canvas, images.shape, images.views, place)


def _weak(feed: Callable[[], tuple[Any, ...]]) -> Callable[[], tuple[Any, ...]]:
    """A graph's callback that does not keep its object alive, as DALI's reference cycles otherwise would."""
    reference = weakref.WeakMethod(feed)

    def call() -> tuple[Any, ...]:
        method = reference()
        if method is None:
            raise StopIteration
        return method()

    return call
