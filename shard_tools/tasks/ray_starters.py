"""Start calls on a Ray cluster: each as a task of its own, or in processes that hold what was prepared."""

import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from shard_tools.errors import InputError
from shard_tools.tasks.base import Done, Need, T, Work, attempt
from shard_tools.tasks.ray_nodes import DISK, Nodes

MOST_TRIES = 4
"""Tries of one call: the first, and those after a failure of a node, a process or a disk."""
# Calls handed to Ray: for each core one that runs and one that waits, and at least so many that a cluster can grow.
_QUEUED, _LEAST_QUEUED = 2, 64


@dataclass(frozen=True)
class Try:
    """One try at a call."""

    number: int
    """Number of the call."""
    need: Need
    tries: int = 1
    avoid: frozenset[str] = frozenset()
    """Ids of the nodes on which it failed."""


@dataclass(frozen=True)
class Fault:
    """How a call ended whose error is not about the input: a fault of the program or of a node."""

    what: str
    """The kind and the text of the error, on one line."""
    traceback: str


class Starter(Protocol):
    """Starts calls on the cluster."""

    starting: dict[Any, Any]
    """Processes that are starting, by the reference that becomes ready when they have started."""

    def start(self, waiting: deque[Try], running: int) -> tuple[Any, Try] | None:
        """Start one of the `waiting` calls and remove it from them; `running` is the number of calls that run.

        Returns Ray's reference to its answer and the try; None where there is no room now.
        """

    def started(self, reference: Any) -> None:
        """Note that a process has started, or died as it started. Raises InputError where processes do not start."""

    def ended(self, reference: Any, is_dead: bool) -> str | None:
        """Note that a call has ended, or its process died; return its node where that is known."""

    def stop(self, references: Iterable[Any]) -> None:
        """End the calls that still run or wait."""


class TaskStarter(Starter):
    """Starts each call as a task, in whichever process Ray chooses."""

    def __init__(self, work: Work[Any], nodes: Nodes) -> None:
        self._work, self._nodes = work, nodes
        self._call: Any = ray.remote(call)  # once for all calls: Ray sends each remote function to the cluster
        self.starting: dict[Any, Any] = {}

    def start(self, waiting: deque[Try], running: int) -> tuple[Any, Try] | None:
        """See Starter."""
        if not waiting or running >= max(_LEAST_QUEUED, _QUEUED * self._nodes.cores):
            return None
        one = waiting.popleft()
        options: dict[str, Any] = {"num_cpus": 1, "max_retries": 0, **_placing(one.need, one.avoid, self._nodes)}
        if one.need.disk and self._nodes.declare_disk:
            options["resources"] = {DISK: one.need.disk}
        started = self._call.options(name=self._work.label, **options)
        return started.remote(one.number, self._work.function, self._work.calls[one.number]), one

    def started(self, reference: Any) -> None:
        """Nothing to do: Ray starts processes by itself."""

    def ended(self, reference: Any, is_dead: bool) -> str | None:
        """Nothing to do: Ray keeps or ends the process."""
        return None

    def stop(self, references: Iterable[Any]) -> None:
        """See Starter."""
        for reference in references:
            ray.cancel(reference, force=True)


@dataclass(eq=False)
class _Process:
    """A process on a node that holds what was prepared."""

    actor: Any
    need: Need
    avoid: frozenset[str]
    """Nodes on which it must not start."""
    failures: int
    """How many starts had failed when this one was asked for."""
    node: str | None = field(default=None)
    """Where it is, once it has started."""


class ProcessStarter(Starter):
    """Starts each call in a process that holds what was prepared. There is one process for each GPU, or for each core.

    A process gets its first call once it has started: one that no node has room for would keep a call for ever.
    """

    def __init__(self, work: Work[Any], nodes: Nodes) -> None:
        self._work, self._nodes = work, nodes
        self._prepare = ray.put(work.prepare)  # once for all processes: it may hold models
        self.starting: dict[Any, Any] = {}
        self._idle: list[_Process] = []
        self._busy: dict[Any, _Process] = {}  # by the reference to the answer
        self._failures = 0  # in a row

    def start(self, waiting: deque[Try], running: int) -> tuple[Any, Try] | None:
        """See Starter; asks for more processes where nodes have room, and for calls that no process suits."""
        self._drop_useless()
        for place, one in enumerate(waiting):
            if not self._idle:
                break
            process = next((each for each in self._idle if self._suits(each, one)), None)
            if process:
                self._idle.remove(process)
                del waiting[place]
                reference = process.actor.call.remote(one.number, self._work.function, self._work.calls[one.number])
                self._busy[reference] = process
                return reference, one
        if waiting:
            self._add_processes(waiting)
        return None

    def started(self, reference: Any) -> None:
        """See Starter.

        A failed start does not count if it was asked for before the last counted failure: one node may end them all.
        """
        process: _Process = self.starting.pop(reference)
        try:
            process.node = ray.get(reference)
        except RayError as error:
            ray.kill(process.actor)
            self._nodes.look(now=True)
            if process.failures == self._failures:
                self._failures += 1
            if self._failures == MOST_TRIES:
                reason = str(error).strip().splitlines()[-1]
                raise InputError(f"--on ray: processes for {self._work.label} do not start: {reason}") from None
            return
        self._failures = 0
        if process.node not in self._nodes.alive:  # it joined since the last look
            self._nodes.look(now=True)
        self._idle.append(process)

    def ended(self, reference: Any, is_dead: bool) -> str | None:
        """See Starter; the process is then idle or dead."""
        process = self._busy.pop(reference)
        if is_dead:
            ray.kill(process.actor)  # it may only be out of reach, and still hold its core
            self._nodes.look(now=True)
        else:
            self._idle.append(process)
        return process.node

    def stop(self, references: Iterable[Any]) -> None:
        """End all processes."""
        for process in (*self.starting.values(), *self._idle, *self._busy.values()):
            ray.kill(process.actor)

    def _suits(self, process: _Process, one: Try) -> bool:
        """Whether a process can take a call: it has the memory, and its node, once known, is not one to avoid."""
        avoid = one.avoid if set(self._nodes.fit(one.need)) - one.avoid else frozenset()
        is_elsewhere = process.node not in avoid if process.node else process.avoid >= avoid
        return process.need.memory >= one.need.memory and is_elsewhere

    def _drop_useless(self) -> None:
        """End idle processes of nodes that are gone, and starting ones that no living node may start."""
        for process in [each for each in self._idle if each.node not in self._nodes.alive]:
            self._idle.remove(process)
            ray.kill(process.actor)
        for reference, process in list(self.starting.items()):
            if process.avoid and not set(self._nodes.fit(process.need)) - process.avoid:
                ray.kill(self.starting.pop(reference).actor)

    def _add_processes(self, waiting: deque[Try]) -> None:
        """Ask for processes for the waiting calls that no idle process suits."""
        # Processes that are idle here suit no waiting call, and may take the room of new ones.
        while self._idle:
            ray.kill(self._idle.pop().actor)
        failed = list(takewhile(lambda each: each.tries > 1, waiting))  # calls to try again are put first
        for one in failed:
            if not any(self._suits(process, one) for process in self.starting.values()):
                self._add(one.need, one.avoid)
        # A process that must avoid nodes may wait for long; it does not count against the room of the others.
        asked = sum(not process.avoid for process in self.starting.values())
        room = self._nodes.actors - len(self._busy)
        for _ in range(min(room, len(waiting) - len(failed)) - asked):
            self._add(self._work.need, frozenset())

    def _add(self, need: Need, avoid: frozenset[str]) -> None:
        options = {"num_cpus": self._nodes.cores_of_actor, "num_gpus": int(self._nodes.gpus > 0)}
        options |= _placing(need, avoid, self._nodes)
        actor = ray.remote(_Holder).options(max_restarts=0, **options).remote(self._prepare)
        self.starting[actor.started.remote()] = _Process(actor, need, avoid, self._failures)


def _placing(need: Need, avoid: frozenset[str], nodes: Nodes) -> dict[str, Any]:
    """Ray's options for memory, and for nodes to avoid where there are others that are large enough."""
    options: dict[str, Any] = {"memory": need.memory}
    if avoid and set(nodes.fit(need)) - avoid:
        options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"}
    return options


class _Holder:
    """On a node: a process that holds what was prepared."""

    def __init__(self, prepare: Callable[[int | None], Any]) -> None:
        # Not prepared here: an error would end the process without naming what it was to work on.
        self._prepare, self._held = prepare, None

    def started(self) -> str:
        """The id of the node, once the process has started."""
        return _node()

    def call(self, number: int, function: Callable[..., T], arguments: Sequence[Any]) -> tuple[str, Done[T] | Fault]:
        """Like the function `call`, but prepare first, if need be."""
        try:
            if self._held is None:
                self._held = self._prepare(int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
        except Exception as error:
            return _node(), _fault(error)
        return call(number, function, (self._held, *arguments))


def call(number: int, function: Callable[..., T], arguments: Sequence[Any]) -> tuple[str, Done[T] | Fault]:
    """Run a call on a node; return the node's id, and how the call ended."""
    try:
        return _node(), attempt(number, function, arguments)
    except Exception as error:
        return _node(), _fault(error)


def _node() -> str:
    """The id of the node that this process runs on."""
    return str(ray.get_runtime_context().get_node_id())


def _fault(error: Exception) -> Fault:
    what = " ".join(str(error).split())
    what = what if isinstance(error, InputError) else f"{type(error).__name__}: {what}"
    return Fault(what, "".join(traceback.format_exception(error)))
