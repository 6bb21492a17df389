"""A stand-in for Ray: processes on nodes that a test lets die, one event at a time, without a cluster."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError


@dataclass(eq=False)
class Reference:
    """The answer to a call of a process; `number` is None for the question whether the process has started."""

    process: "Process"
    number: int | None = None


@dataclass(eq=False)
class Process:
    """A process; it gets a node as soon as one has room."""

    options: dict[str, Any]
    node: str | None = None
    is_dead: bool = False

    @property
    def started(self) -> "Method":
        return Method(self)

    @property
    def call(self) -> "Method":
        return Method(self)


@dataclass
class Method:
    """A method of a process, to be called."""

    process: Process

    def remote(self, *arguments: Any) -> Reference:
        return Reference(self.process, arguments[0] if arguments else None)


@dataclass
class FakeRay:
    """Nodes by their names, each with so many cores and bytes."""

    cores: dict[str, int]
    answer: Callable[[Reference], Any]
    """Returns or raises the result of a call."""
    first: str = ""
    """The node whose calls end before those of the others."""
    memory: float = 1e12
    gone: set[str] = field(default_factory=set)
    """Nodes that Ray knows to be dead."""
    processes: list[Process] = field(default_factory=list)

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "NodeID": node,
                "NodeManagerHostname": node,
                "Alive": node not in self.gone,
                "Resources": {"CPU": cores, "memory": self.memory},
            }
            for node, cores in self.cores.items()
        ]

    @staticmethod
    def put(value: Any) -> Any:
        return value

    def remote(self, _: Any) -> "_Starting":
        return _Starting(self)

    @staticmethod
    def kill(process: Process) -> None:
        process.is_dead = True

    def wait(self, references: Sequence[Reference], **_: Any) -> tuple[list[Reference], list[Reference]]:
        """The next answer: first from processes that have started, then from calls."""
        self._place()
        there = [each for each in references if each.process.node]
        assert there, "all wait for ever"
        ready = min(there, key=lambda each: (each.number is not None, each.process.node != self.first))
        return [ready], []

    def get(self, reference: Reference) -> Any:
        try:
            return self.answer(reference)
        except RayError:
            reference.process.is_dead = True
            raise

    def _place(self) -> None:
        for process in self.processes:
            if process.node is None and not process.is_dead:
                process.node = next(self._with_room(process.options), None)

    def _with_room(self, options: dict[str, Any]) -> Iterator[str]:
        """The nodes that a process fits on."""
        avoid = options.get("label_selector", {}).get("ray.io/node-id", "!in()")[4:-1].split(",")
        for node, cores in self.cores.items():
            there = [each for each in self.processes if each.node == node and not each.is_dead]
            memory = options["memory"] + sum(each.options["memory"] for each in there)
            if node not in self.gone and node not in avoid and len(there) < cores and memory <= self.memory:
                yield node


@dataclass
class _Starting:
    ray: FakeRay
    chosen: dict[str, Any] = field(default_factory=dict)

    def options(self, **options: Any) -> "_Starting":
        return _Starting(self.ray, options)

    def remote(self, _: Any) -> Process:
        self.ray.processes.append(process := Process(self.chosen))
        return process
