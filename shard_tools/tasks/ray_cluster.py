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
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from shard_tools.errors import InputError, StoreError
from shard_tools.tasks.base import Done, Need, T, TaskConfig, Work, attempt, died
from shard_tools.tasks.ray_nodes import DISK, LOOK_SECONDS, NodeCounts, Nodes

MOST_TRIES = 4
"""Of one call: the first, and those after a failure of a node, a process or a disk."""
# Calls that Ray knows of: for each core one that runs and one that waits; and enough for a cluster to grow by.
_QUEUED, _LEAST_QUEUED = 2, 64
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


class _Tasks:
    """Starts each call as a task, in whichever process Ray chooses."""

    def __init__(self, work: Work[Any], nodes: Nodes) -> None:
        self._work, self._nodes = work, nodes
        self._call: Any = ray.remote(_call)  # once for all calls: Ray sends each one that is made to the cluster
        self.starting: dict[Any, Any] = {}

    def has_room(self, running: int) -> bool:
        """Whether to start one more call beside those that run or wait for a core."""
        return running < max(_LEAST_QUEUED, _QUEUED * self._nodes.cores)

    def start(self, one: _Try) -> Any:
        """Start a call; return Ray's reference to its answer."""
        options: dict[str, Any] = {"num_cpus": 1, "memory": one.need.memory, "max_retries": 0}
        if one.need.disk and self._nodes.declare_disk:
            options["resources"] = {DISK: one.need.disk}
        if one.avoid and set(self._nodes.fit(one.need)) - one.avoid:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(one.avoid))})"}
        call = self._call.options(name=self._work.label, **options)
        return call.remote(one.number, self._work.function, self._work.calls[one.number])

    def started(self, reference: Any) -> None:
        """Nothing to do: Ray starts processes by itself."""

    def ended(self, reference: Any, is_dead: bool) -> None:
        """Nothing to do: Ray keeps or ends the process."""

    def stop(self, references: Iterable[Any]) -> None:
        """End the calls that still run or wait."""
        for reference in references:
            ray.cancel(reference, force=True)


class _Actors:
    """Starts each call in one of some processes that hold what was prepared: one for each GPU, or for each core.

    A process gets its first call once it has started: one for which no node has room would keep a call for ever.
    """

    def __init__(self, work: Work[Any], nodes: Nodes) -> None:
        self._work, self._nodes = work, nodes
        self._prepare = ray.put(work.prepare)  # once for all processes: it may hold models
        self.starting: dict[Any, Any] = {}
        self._idle: deque[Any] = deque()
        self._busy: dict[Any, Any] = {}  # by the reference to the answer
        self._failed_starts = 0  # one after the other

    def has_room(self, running: int) -> bool:
        """Whether a process is idle; starts processes where nodes have room."""
        while len(self.starting) + len(self._idle) + len(self._busy) < self._nodes.actors:
            actor = self._add()
            self.starting[actor.started.remote()] = actor
        return bool(self._idle)

    def started(self, reference: Any) -> None:
        """A process has started, or died over it. Raises InputError where several did one after the other."""
        actor = self.starting.pop(reference)
        try:
            ray.get(reference)
        except RayError as error:
            self._failed_starts += 1
            if self._failed_starts == MOST_TRIES:
                reason = str(error).strip().splitlines()[-1]
                raise InputError(f"--on ray: processes for {self._work.label} do not start: {reason}") from None
            return
        self._failed_starts = 0
        self._idle.append(actor)

    def start(self, one: _Try) -> Any:
        """Start a call; return Ray's reference to its answer."""
        actor = self._idle.popleft()
        reference = actor.call.remote(one.number, self._work.function, self._work.calls[one.number])
        self._busy[reference] = actor
        return reference

    def ended(self, reference: Any, is_dead: bool) -> None:
        """A call ended; its process is idle or dead."""
        actor = self._busy.pop(reference)
        if is_dead:
            ray.kill(actor)  # perhaps it is only out of reach, and holds its core
        else:
            self._idle.append(actor)

    def stop(self, references: Iterable[Any]) -> None:
        """End all processes."""
        for actor in (*self.starting.values(), *self._idle, *self._busy.values()):
            ray.kill(actor)

    def _add(self) -> Any:
        memory = self._work.need.memory
        options = {"num_cpus": self._nodes.cores_of_actor, "num_gpus": int(self._nodes.gpus > 0), "memory": memory}
        return ray.remote(_Holder).options(max_restarts=0, **options).remote(self._prepare)


class _Holder:
    """On a node: a process that holds what was prepared."""

    def __init__(self, prepare: Callable[[], Any]) -> None:
        # Not here: an error would end the process without the name of what it was to work on.
        self._prepare, self._held = prepare, None

    def started(self) -> None:
        """Answers once the process has started."""

    def call(self, number: int, function: Callable[..., T], arguments: Sequence[Any]) -> tuple[str, Done[T]]:
        """As `_call`."""
        if self._held is None:
            self._held = self._prepare()
        return _call(number, function, (self._held, *arguments))


class RayTasks:
    """Runs tasks on the cluster that this process is connected to."""

    def __init__(self) -> None:
        self._nodes = Nodes()
        self._counts = NodeCounts()
        self._unfit_since: float | None = None

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
                if self._nodes.look():  # not for each result: it asks of every try on every node
                    self._check_fit(work, [*running.values(), *islice(waiting, 1)])
                while waiting and starter.has_room(len(running)):
                    one = waiting.popleft()
                    running[starter.start(one)] = one
                ready, _ = ray.wait([*running, *starter.starting], num_returns=1, timeout=LOOK_SECONDS)
                for reference in ready:
                    if reference in starter.starting:
                        starter.started(reference)
                        continue
                    ended, is_dead = self._settle(work, running.pop(reference), reference)
                    starter.ended(reference, is_dead)
                    if isinstance(ended, Done):
                        yield ended
                    else:
                        waiting.appendleft(ended)
        finally:
            starter.stop(running)

    def _check_fit(self, work: Work[Any], tries: Iterable[_Try]) -> None:
        """Raise InputError where a call has waited too long for a node that is large enough: Ray waits for ever."""
        unfit = next((one for one in tries if not self._nodes.fit(one.need)), None)
        if unfit is None:
            self._unfit_since = None
            return
        name, need = work.names[unfit.number], unfit.need
        size = f"{need.memory / 1e9:.2g} GB of memory and {need.disk / 1e9:.2g} GB of disk"
        if self._unfit_since is None:
            self._unfit_since = time.monotonic()
            _log.warning("%s: waiting for a node with %s", name, size)
        elif time.monotonic() - self._unfit_since > _WAIT_FOR_NODE_SECONDS:
            raise InputError(f"{name}: no node of the cluster has {size}; add a larger one, or make smaller shards")

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
