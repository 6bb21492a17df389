"""Tasks on the nodes of a Ray cluster, tried again elsewhere, a few times, when a node or a process dies.

Ray's own retries are off: after an out-of-memory kill Ray would try for ever, and always on the node that it prefers.
"""

import contextlib
import logging
import os
import re
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from shard_tools.errors import AbsentError, InputError, StoreError
from shard_tools.tasks.base import Done, T, TaskConfig, Work, died
from shard_tools.tasks.ray_nodes import LOOK_SECONDS, NodeCounts, Nodes
from shard_tools.tasks.ray_starters import MOST_TRIES, Fault, ProcessStarter, Starter, TaskStarter, Try

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
        """See Tasks; a call whose node, process or disk failed is tried again, up to MOST_TRIES times in all."""
        starter: Starter = (ProcessStarter if work.prepare else TaskStarter)(work, self._nodes)
        waiting = deque(Try(number, work.need) for number in range(len(work.calls)))
        running: dict[Any, Try] = {}
        try:
            while waiting or running:
                if self._nodes.look():  # not for each result: the check goes over every try and every node
                    self._check_fit(work, [*running.values(), *islice(waiting, 1)])
                while started := starter.start(waiting, len(running)):
                    running[started[0]] = started[1]
                ready, _ = ray.wait([*running, *starter.starting], num_returns=1, timeout=LOOK_SECONDS)
                for reference in ready:
                    if reference in starter.starting:
                        starter.started(reference)
                        continue
                    ended = self._settle(work, running.pop(reference), reference, starter)
                    if isinstance(ended, Done):
                        yield ended
                    else:
                        waiting.appendleft(ended)
        finally:
            starter.stop(running)

    def _check_fit(self, work: Work[Any], tries: Iterable[Try]) -> None:
        """Raise InputError where a call waited too long for a node that is large enough: Ray would wait for ever."""
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

    def _settle(self, work: Work[T], one: Try, reference: Any, starter: Starter) -> Done[T] | Try:
        """How a call ended, or the next try at it.

        Raises InputError where a process died on it too often, or it met a fault of the program.
        """
        name = work.names[one.number]
        try:
            answer: tuple[str, Done[T] | Fault] = ray.get(reference)
        except RayTaskError as error:  # before the call began: its arguments cannot be unpickled there
            text = str(error).strip()
            found = re.search(r"\bip=([^,)\s]+)", text)  # the error has it only in its text
            where = found.group(1) if found else "unknown"
            raise InputError(f"{name}: node {where}: {text.splitlines()[-1]}") from error
        except RayError as error:
            return self._after_death(work, one, error, starter.ended(reference, is_dead=True))
        node, done = answer
        starter.ended(reference, is_dead=False)
        where = self._nodes.name(node)
        if isinstance(done, Fault):
            raise InputError(f"{name}: node {where}: {done.what}") from RuntimeError(done.traceback)
        if done.error is None or not self._may_be_the_nodes(done.error):
            self._counts.add(where)
            return done
        others = set(self._nodes.fit(one.need)) - one.avoid - {node}
        if not others or one.tries == MOST_TRIES:
            return done
        _log.warning("%s: node %s: %s; trying another node", name, where, done.error)
        return replace(one, tries=one.tries + 1, avoid=one.avoid | {node})

    @staticmethod
    def _may_be_the_nodes(error: InputError | OSError) -> bool:
        """Whether another node may do better: its disk is full, or it does not see the files or the store."""
        return isinstance(error, OSError | AbsentError | StoreError)

    def _after_death(self, work: Work[Any], one: Try, error: RayError, node: str | None) -> Try:
        """The next try after a process or a node died: with twice the memory if it ran out, else on another node."""
        name, what = work.names[one.number], str(error).strip().splitlines()[0]
        if one.tries == MOST_TRIES:
            raise died([name], work, f"{MOST_TRIES} tries, the last: {what}")
        need = one.need
        if isinstance(error, OutOfMemoryError):
            more = replace(need, memory=2 * need.memory)
            need, node = more if self._nodes.fit(more) else need, None
        _log.warning("%s: %s; trying again (%d of %d)", name, what, one.tries + 1, MOST_TRIES)
        return replace(one, need=need, tries=one.tries + 1, avoid=one.avoid | ({node} if node else set()))
