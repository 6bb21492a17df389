"""Tasks on this machine: in turn, on threads, or in processes."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from shard_tools.tasks.base import Done, T, Tasks, Work, attempt, died


@dataclass(frozen=True)
class InTurn(Tasks):
    """One task after the other, each when its result is asked for."""

    def run(self, work: Work[T]) -> Iterator[Done[T]]:
        """See Tasks; in the order of the calls."""
        held = (work.prepare(None),) if work.prepare else ()
        for number, arguments in enumerate(work.calls):
            yield attempt(number, work.function, (*held, *arguments))


@dataclass(frozen=True)
class Threads(Tasks):
    """For tasks that release the GIL, as reading, hashing and writing do."""

    workers: int

    def run(self, work: Work[T]) -> Iterator[Done[T]]:
        """See Tasks."""
        with ThreadPoolExecutor(self.workers) as pool:
            yield from _run_in(pool, work)


@dataclass(frozen=True)
class Processes(Tasks):
    """For tasks that two threads of one process cannot do at once, or that may crash their process."""

    workers: int

    def run(self, work: Work[T]) -> Iterator[Done[T]]:
        """See Tasks."""
        # Spawned, since the caller may have threads.
        context = multiprocessing.get_context("spawn")
        ended: set[int] = set()
        with ProcessPoolExecutor(min(self.workers, len(work.calls)), context, initializer=end_with_parent) as pool:
            try:
                for done in _run_in(pool, work):
                    ended.add(done.number)
                    yield done
            except BrokenProcessPool:
                if error := work.culprit and work.culprit():
                    raise error from None
                left = [name for number, name in enumerate(work.names) if number not in ended]
                raise died(sorted(set(left[: self.workers])), work, "give a smaller --workers") from None


def _run_in(pool: Executor, work: Work[T]) -> Iterator[Done[T]]:
    futures: list[Future[Done[T]]] = [
        pool.submit(attempt, number, work.function, arguments) for number, arguments in enumerate(work.calls)
    ]
    try:
        for future in as_completed(futures):
            yield future.result()
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def end_with_parent() -> None:
    """End this worker when its parent is killed: otherwise it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
