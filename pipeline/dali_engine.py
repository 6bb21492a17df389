"""Images made by DALI: blocks of snippets are read ahead and fed into a graph on the device."""

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipeline.augment import DrawConfig
from pipeline.bad_samples import BadSamples
from pipeline.canvas import CanvasConfig
from pipeline.dali_graph import PREFETCH_DEPTH, GraphPlace, build_eval_graph, build_train_graph, train_inputs
from pipeline.devices import recorded
from pipeline.planner import Planned
from pipeline.reader import Block, ReadAhead, Reader


class DaliImages:
    """Makes the images of planned batches, float32 (B, C, H, W), or (B, V, C, H, W) of the views."""

    def __init__(
        self,
        reader: Reader,
        canvas: CanvasConfig,
        draws: DrawConfig | None,
        shape: tuple[int, int, int],
        views: tuple[str, ...],
        bad: BadSamples,
        place: GraphPlace,
    ) -> None:
        """`draws` make training images, None evaluation images of `views`. `shape` is a snippet's (P, t, F)."""
        self._blocks, self._place = ReadAhead(reader, bad), place
        self._in_graph: deque[Block] = deque()
        self._copying: deque[tuple[Any, Block, torch.cuda.Event]] = deque()
        self._inputs = train_inputs(draws) if draws else ()
        feed = _weak(self._feed)
        if draws:
            self._graph = build_train_graph(feed, canvas, draws, shape, place)
        else:
            self._graph = build_eval_graph(feed, canvas, shape, views, place)
        self._graph.build()

    def start(self, planned: Planned, epoch: int) -> None:
        """Begin to read a batch, and return at once."""
        self._blocks.start(planned, epoch)

    def next(self) -> tuple[Planned, Tensor]:
        """The oldest batch that was begun and not yet handed out; raises InputError for a sample that is bad."""
        (output,) = self._graph.run()
        # A block is let go of, and its memory used again, when its batch has left the graph.
        block = self._in_graph.popleft()
        return block.planned, self._image(output, block)[: len(block.planned.counts)]

    def reset(self) -> None:
        """Let go of all that was begun."""
        self._blocks.reset()
        while self._in_graph:
            self._graph.run()
            self._in_graph.popleft()
        self._graph.reset()

    def close(self) -> None:
        """Stop the reader's threads, and let go of the graph and of all memory, the device's too, at once."""
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
        """The canvases of a batch, as a tensor that stays what it is."""
        image = from_dlpack(output.as_tensor())
        if self._place.device_id is None:
            return image
        # torch reads what DALI has written: run() without a stream returns when its output is done (its documentation
        # says so), and from_dlpack names to DALI torch's current stream of the output's own device, clone()'s.
        # DALI knows nothing of that stream: it gets its memory back when torch has copied from it, not when Python has
        # let go of it. Two batches later the copy is long done, so that nothing waits.
        copy = image.clone()
        copied = recorded(torch.device("cuda", self._place.device_id))
        self._copying.append((output, block, copied))
        while len(self._copying) > PREFETCH_DEPTH:
            self._copying.popleft()[2].synchronize()
        return copy


def _weak(feed: Callable[[], tuple[Any, ...]]) -> Callable[[], tuple[Any, ...]]:
    """A graph's callback that does not keep its object: DALI's own cycles hold it until a garbage collection."""
    reference = weakref.WeakMethod(feed)

    def call() -> tuple[Any, ...]:
        method = reference()
        if method is None:
            raise StopIteration
        return method()

    return call
