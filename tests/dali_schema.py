"""Check DALI's graphs for a GPU without having one: where operators run, what they take, how many bytes they move.

DALI places operators and converts operands in Python, before it asks for a driver; its schemas say what each takes.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, backend, types

KERNELS = {
    "cpu": set(backend.RegisteredCPUOps()),
    "gpu": set(backend.RegisteredGPUOps()),
    "mixed": set(backend.RegisteredMixedOps()),
}
# A GPU waits for operators on the CPU, so only inputs may be there, and numbers that say where to cut.
ON_THE_CPU = {"ExternalSource", "Reshape"}
MOVES_NOTHING = {"ExternalSource", "Reshape", "Constant"}


@dataclass(frozen=True)
class Operator:
    """An operator of a graph, with the device that DALI placed it on."""

    spec: Any

    @property
    def name(self) -> str:
        return re.findall(r"OpSpec for (\S+):", str(self.spec))[0]

    @property
    def backend(self) -> str:
        return (re.findall(r"^ +device: (\w+)$", str(self.spec), re.MULTILINE) or ["cpu"])[0]

    @property
    def inputs(self) -> list[str]:
        """The device of each input."""
        return [self.spec.InputDevice(number) for number in range(self.spec.NumRegularInput())]

    @property
    def arguments(self) -> list[str]:
        """The device of each named argument that is a tensor."""
        return [self.spec.InputDevice(number) for number in range(self.spec.NumRegularInput(), self.spec.NumInput())]

    def read_and_written(self, nbytes: dict[str, float]) -> float:
        """Bytes that it reads and writes; `nbytes` has the size of each output in the graph."""
        if self.name in MOVES_NOTHING:
            return 0
        written = sum(nbytes[self.spec.OutputName(number)] for number in range(self.spec.NumOutput()))
        read = sum(nbytes[self.spec.InputName(number)] for number in range(self.spec.NumRegularInput()))
        if self.name == "Normalize":
            read *= 3  # once for the mean, once for the variance, once to apply both
        return written + (min(read, written) if self.name == "_TensorSubscript" else read)


def operators(pipeline: Pipeline) -> list[Operator]:
    """The operators of a pipeline, which need not have been built."""
    if not pipeline._ops:
        pipeline._build_graph()
    return [Operator(each._spec) for each in pipeline._ops]


def faults(pipeline: Pipeline) -> list[str]:
    """What a GPU would refuse or be slow at; [] if there is nothing."""
    found: set[str] = set()
    for each in operators(pipeline):
        found |= {f"{each.name}: {fault}" for fault in _faults(each)}
    outputs = {node.device for node in pipeline._graph_outputs}
    return sorted(found | {f"an output on the {device}" for device in outputs - {"gpu"}})


def _faults(each: Operator) -> list[str]:
    schema = backend.GetSchema(each.name)
    found = []
    if each.name not in KERNELS[each.backend]:
        found.append(f"has no {each.backend} kernel")
    if each.backend != "gpu" and each.name not in ON_THE_CPU:
        found.append(f"runs on the {each.backend}")
    if not schema.MinNumInput() <= len(each.inputs) <= schema.MaxNumInput():
        found.append(f"{len(each.inputs)} inputs")
    for number, device in enumerate(each.inputs):
        wanted = schema.GetInputDevice(number, device, each.backend)
        if wanted != device:
            found.append(f"input {number} on the {device}, expected on the {wanted}")
    if "gpu" in each.arguments:
        found.append("an argument on the gpu")  # arguments are read by the CPU, whatever the operator's backend
    return found


@dataclass(frozen=True)
class Moved:
    """What a graph's operators read and write for one sample."""

    nbytes: float
    widest: int
    """Bytes of one value of the widest type that fills planes."""


def moved(build: Callable[[Callable[[], Sequence[Any]]], Pipeline], inputs: Sequence[Any]) -> Moved:
    """Run a graph on the CPU with every intermediate result as an output, and add up the bytes."""
    count = len(inputs[0])
    graph = build(lambda: inputs)
    placed = operators(graph)
    nodes = {node.name: node for each in graph._ops for node in each.outputs}
    every = Pipeline(batch_size=count, num_threads=1, device_id=None, prefetch_queue_depth=1)
    every.set_outputs(*nodes.values())
    every.build()
    made = dict(zip(nodes, every.run(), strict=True))
    nbytes = {name: sum(np.asarray(values[k]).nbytes for k in range(count)) / count for name, values in made.items()}
    wide = [types.to_numpy_type(values.dtype)().itemsize for name, values in made.items() if nbytes[name] > 1e5]
    return Moved(sum(each.read_and_written(nbytes) for each in placed), max(wide))
