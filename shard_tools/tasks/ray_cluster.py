"""Tasks on the nodes of a Ray cluster: tried again, a few times, elsewhere, where a node or a process dies.

Ray's own retries are off: after an out-of-memory kill it would try for ever, and always on the node that it likes best.
"""

import contextlib
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
        waiting = deque(_Try(number, work.need) for number in range(len(work.calls)))
        running: dict[ray.ObjectRef[Any], _Try] = {}
        try:
            while waiting or running:
                self._nodes.look()
                while waiting and len(running) < max(1, _QUEUED * self._nodes.cores):
                    one = waiting.popleft()
                    running[self._submit(work, one)] = one
                ready, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK_SECONDS)
                for reference in ready:
                    ended = self._settle(work, running.pop(reference), reference)
                    if isinstance(ended, Done):
                        yield ended
                    else:
                        waiting.appendleft(ended)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    def _submit(self, work: Work[T], one: _Try) -> "ray.ObjectRef[Any]":
        self._wait_for_room(work, one)
        options: dict[str, Any] = {"num_cpus": 1, "memory": one.need.memory, "max_retries": 0}
        if one.need.disk and self._nodes.declare_disk:
            options["resources"] = {DISK: one.need.disk}
        if one.avoid and set(self._nodes.fit(one.need)) - one.avoid:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(one.avoid))})"}
        call: Callable[..., Any] = ray.remote(_call).options(name=work.label, **options).remote
        return call(one.number, work.function, work.calls[one.number])

    def _wait_for_room(self, work: Work[Any], one: _Try) -> None:
        """Wait until some node is large enough: Ray would wait for ever, without a word."""
        if self._nodes.fit(one.need):
            return
        name, need = work.names[one.number], one.need
        size = f"{need.memory / 1e9:.2g} GB of memory and {need.disk / 1e9:.2g} GB of disk"
        _log.warning("%s: waiting for a node with %s", name, size)
        began = time.monotonic()
        while not self._nodes.fit(need):
            if time.monotonic() - began > _WAIT_FOR_NODE_SECONDS:
                raise InputError(f"{name}: no node of the cluster has {size}; add a larger one, or make smaller shards")
            time.sleep(_LOOK_SECONDS)
            self._nodes.look()

    def _settle(self, work: Work[T], one: _Try, reference: "ray.ObjectRef[Any]") -> Done[T] | _Try:
        """How a call ended, or the next try at it. Raises InputError where a process died on it too often."""
        try:
            answer: tuple[str, Done[T]] = ray.get(reference)
        except RayTaskError:
            raise  # a fault of the program
        except RayError as error:
            return self._after_death(work, one, error)
        node, done = answer
        if done.error is None or not self._may_be_the_nodes(done.error):
            self._counts.add(self._nodes.name(node))
            return done
        others = set(self._nodes.fit(one.need)) - one.avoid - {node}
        if not others or one.tries == MOST_TRIES:
            return done
        _log.warning(
            "%s: %s on node %s; trying another node", work.names[one.number], done.error, self._nodes.name(node)
        )
        return replace(one, tries=one.tries + 1, avoid=one.avoid | {node})

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
