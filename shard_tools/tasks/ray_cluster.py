"""Tasks on the nodes of a Ray cluster: tried again, a few times, elsewhere, where a node or a process dies.

Ray's own retries are off: after an out-of-memory kill it would try for ever, and always on the node that it likes best.
"""

import contextlib
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from shard_tools.errors import InputError, StoreError
from shard_tools.tasks.base import Done, Need, NodeCounts, T, TaskConfig, Work, attempt, died

MOST_TRIES = 4
"""Of one call: the first, and those after a failure of a node, a process or a disk."""
DISK = "disk"
"""Name of the custom resource with which a node says how many bytes of temporary files it can hold."""
_QUEUED = 2  # calls for each core of the cluster: one that runs and one that waits
_LOOK_SECONDS = 2.0  # between two looks at the nodes
_WAIT_FOR_NODE_SECONDS = 600.0  # for one that is large enough: a cluster that grows by itself needs minutes
_CONNECT_SECONDS = 10.0
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def connected(config: TaskConfig) -> Iterator["RayTasks"]:
    """Connect to a cluster for as long as tasks are to be run. Raises InputError where there is none."""
    address = config.ray_address or os.environ.get("RAY_ADDRESS") or "auto"
    _check_answers(address)
    try:
        ray.init(address, logging_level=logging.ERROR, ignore_reinit_error=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--on ray: no cluster at {address} ({reason}); {_HOW_TO_START}") from None
    try:
        yield RayTasks()
    finally:
        ray.shutdown()


_HOW_TO_START = "start one (`ray start --head`), or give its address (--ray-address HOST:PORT)"


def _check_answers(address: str) -> None:
    """Raise InputError where nothing listens at HOST:PORT: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "/" in host:
        return  # "auto", or an address of Ray's own kinds
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(f"--on ray: no cluster at {address} ({error.strerror or error}); {_HOW_TO_START}") from None


@dataclass(frozen=True)
class _Try:
    """One try at a call."""

    number: int
    """Of the call."""
    need: Need
    tries: int = 1
    avoid: frozenset[str] = frozenset()
    """Ids of the nodes on which it failed."""


@dataclass
class _Nodes:
    """The nodes of the cluster, looked at now and then."""

    alive: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What Ray says of each living node, by its id."""
    looked: float = float("-inf")

    def look(self) -> None:
        """Ask Ray for the nodes, unless it was asked just now; log those that came or went."""
        if time.monotonic() - self.looked < _LOOK_SECONDS:
            return
        found = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        for gone in self.alive.keys() - found.keys():
            _log.warning("node %s is gone; what it worked on is done again elsewhere", self.name(gone))
        self.alive, self.looked = found, time.monotonic()

    @property
    def cores(self) -> int:
        """Cores of all living nodes."""
        return int(sum(self._has(node, "CPU") for node in self.alive))

    @property
    def gpus(self) -> int:
        """GPUs of all living nodes."""
        return int(sum(self._has(node, "GPU") for node in self.alive))

    @property
    def cores_of_actor(self) -> int:
        """Cores for a process that holds a GPU: its share of those of its node. Without GPUs one."""
        shares = [self._has(node, "CPU") / gpus for node in self.alive if (gpus := self._has(node, "GPU"))]
        return max(1, int(min(shares, default=1)))

    @property
    def actors(self) -> int:
        """How many processes that hold something the cluster has room for; at least one."""
        return max(1, self.gpus or self.cores)

    @property
    def declare_disk(self) -> bool:
        """Whether any node says how much disk it has: only those that do can then be asked for some."""
        return any(self._has(node, DISK) for node in self.alive)

    def fit(self, need: Need) -> list[str]:
        """The nodes that are large enough for a task when nothing else runs on them."""
        disk = need.disk if self.declare_disk else 0
        return [
            node
            for node in self.alive
            if self._has(node, "CPU") >= 1
            and self._has(node, "memory") >= need.memory
            and self._has(node, DISK) >= disk
        ]

    def name(self, node: str) -> str:
        """A node as messages name it: its host and the start of its id."""
        about = self.alive.get(node, {})
        return f"{about.get('NodeManagerHostname', 'unknown')}/{node[:6]}"

    def _has(self, node: str, resource: str) -> float:
        return float(self.alive[node]["Resources"].get(resource, 0))


class _Tasks:
    """Starts each call as a task, in whichever process Ray chooses."""

    def __init__(self, work: Work[Any], nodes: _Nodes) -> None:
        self._work, self._nodes = work, nodes

    def has_room(self, running: int) -> bool:
        """Whether to start one more call beside those that run or wait for a core."""
        return running < max(1, _QUEUED * self._nodes.cores)

    def start(self, one: _Try) -> Any:
        """Start a call; return Ray's reference to its answer."""
        self._wait_for_a_node(one)
        options: dict[str, Any] = {"num_cpus": 1, "memory": one.need.memory, "max_retries": 0}
        if one.need.disk and self._nodes.declare_disk:
            options["resources"] = {DISK: one.need.disk}
        if one.avoid and set(self._nodes.fit(one.need)) - one.avoid:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(one.avoid))})"}
        call: Callable[..., Any] = ray.remote(_call).options(name=self._work.label, **options).remote
        return call(one.number, self._work.function, self._work.calls[one.number])

    def ended(self, reference: Any, is_dead: bool) -> None:
        """Nothing to do: Ray keeps or ends the process."""

    def stop(self, references: Iterable[Any]) -> None:
        """End the calls that still run or wait."""
        for reference in references:
            ray.cancel(reference, force=True)

    def _wait_for_a_node(self, one: _Try) -> None:
        """Wait until some node is large enough: Ray would wait for ever, without a word."""
        if self._nodes.fit(one.need):
            return
        name, need = self._work.names[one.number], one.need
        size = f"{need.memory / 1e9:.2g} GB of memory and {need.disk / 1e9:.2g} GB of disk"
        _log.warning("%s: waiting for a node with %s", name, size)
        began = time.monotonic()
        while not self._nodes.fit(need):
            if time.monotonic() - began > _WAIT_FOR_NODE_SECONDS:
                raise InputError(f"{name}: no node of the cluster has {size}; add a larger one, or make smaller shards")
            time.sleep(_LOOK_SECONDS)
            self._nodes.look()


class _Actors:
    """Starts each call in one of some processes that hold what was prepared: one for each GPU, or for each core."""

    def __init__(self, work: Work[Any], nodes: _Nodes) -> None:
        self._work, self._nodes = work, nodes
        self._idle: deque[Any] = deque()
        self._busy: dict[Any, Any] = {}  # by the reference to the answer

    def has_room(self, running: int) -> bool:
        """Whether a process is idle, or could be started."""
        return bool(self._idle) or len(self._busy) < self._nodes.actors

    def start(self, one: _Try) -> Any:
        """Start a call; return Ray's reference to its answer."""
        actor = self._idle.popleft() if self._idle else self._add(one.need)
        reference = actor.call.remote(one.number, self._work.function, self._work.calls[one.number])
        self._busy[reference] = actor
        return reference

    def ended(self, reference: Any, is_dead: bool) -> None:
        """A call ended; its process is idle or dead."""
        actor = self._busy.pop(reference)
        if not is_dead:
            self._idle.append(actor)

    def stop(self, references: Iterable[Any]) -> None:
        """End all processes."""
        for actor in (*self._idle, *self._busy.values()):
            ray.kill(actor)

    def _add(self, need: Need) -> Any:
        options = {"num_cpus": self._nodes.cores_of_actor, "num_gpus": int(self._nodes.gpus > 0), "memory": need.memory}
        return ray.remote(_Holder).options(max_restarts=0, **options).remote(self._work.prepare)


class _Holder:
    """On a node: a process that holds what was prepared."""

    def __init__(self, prepare: Callable[[], Any]) -> None:
        # Not here: an error would end the actor without a name.
        self._prepare, self._held = prepare, None

    def call(self, number: int, function: Callable[..., T], arguments: Sequence[Any]) -> tuple[str, Done[T]]:
        """As `_call`."""
        if self._held is None:
            self._held = self._prepare()
        return _call(number, function, (self._held, *arguments))


class RayTasks:
    """Runs tasks on the cluster that this process is connected to."""

    def __init__(self) -> None:
        self._nodes = _Nodes()
        self._counts = NodeCounts()

    def describe(self) -> str:
        """How many nodes there are, and how fast each has been."""
        return self._counts.describe(len(self._nodes.alive))

    def run(self, work: Work[T]) -> Iterator[Done[T]]:
        """As Tasks says; a call whose node, process or disk failed is tried again, up to MOST_TRIES times in all."""
        starter = (_Actors if work.prepare else _Tasks)(work, self._nodes)
        waiting = deque(_Try(number, work.need) for number in range(len(work.calls)))
        running: dict[Any, _Try] = {}
        try:
            while waiting or running:
                self._nodes.look()
                while waiting and starter.has_room(len(running)):
                    one = waiting.popleft()
                    running[starter.start(one)] = one
                ready, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK_SECONDS)
                for reference in ready:
                    ended, is_dead = self._settle(work, running.pop(reference), reference)
                    starter.ended(reference, is_dead)
                    if isinstance(ended, Done):
                        yield ended
                    else:
                        waiting.appendleft(ended)
        finally:
            starter.stop(running)

    def _settle(self, work: Work[T], one: _Try, reference: Any) -> tuple[Done[T] | _Try, bool]:
        """How a call ended, or the next try at it; and whether its process died.

        Raises InputError where a process died on it too often.
        """
        try:
            answer: tuple[str, Done[T]] = ray.get(reference)
        except RayTaskError:
            raise  # a fault of the program
        except RayError as error:
            return self._after_death(work, one, error), True
        node, done = answer
        if done.error is None or not self._may_be_the_nodes(done.error):
            self._counts.add(self._nodes.name(node))
            return done, False
        others = set(self._nodes.fit(one.need)) - one.avoid - {node}
        if not others or one.tries == MOST_TRIES:
            return done, False
        where = work.names[one.number], self._nodes.name(node)
        _log.warning("%s: node %s: %s; trying another node", *where, done.error)
        return replace(one, tries=one.tries + 1, avoid=one.avoid | {node}), False

    @staticmethod
    def _may_be_the_nodes(error: InputError | OSError) -> bool:
        """Whether another node may do better: its disk is full, or it does not see the files or the store."""
        return isinstance(error, OSError | StoreError)

    def _after_death(self, work: Work[Any], one: _Try, error: RayError) -> _Try:
        """The next try after a process or a node died: with twice the memory where that ran out."""
        name, what = work.names[one.number], str(error).strip().splitlines()[0]
        if one.tries == MOST_TRIES:
            raise died([name], work, f"{MOST_TRIES} tries, the last: {what}")
        need = one.need
        if isinstance(error, OutOfMemoryError):
            more = replace(need, memory=2 * need.memory)
            need = more if self._nodes.fit(more) else need
        _log.warning("%s: %s; trying again (%d of %d)", name, what, one.tries + 1, MOST_TRIES)
        return replace(one, need=need, tries=one.tries + 1)


def _call(number: int, function: Callable[..., T], arguments: Sequence[Any]) -> tuple[str, Done[T]]:
    """On a node: its id, and how the call ended."""
    return ray.get_runtime_context().get_node_id(), attempt(number, function, arguments)
