"""Open the place where the command line has tasks run, and show their progress."""

import contextlib
from collections.abc import Iterator

from shard_tools.errors import InputError
from shard_tools.system.progress import progress
from shard_tools.tasks.base import Done, T, TaskConfig, Tasks, Work


@contextlib.contextmanager
def open_tasks(config: TaskConfig, local: Tasks) -> Iterator[Tasks]:
    """The place that the command line chose; `local` is the one to use on this machine.

    Raises InputError where Ray is not installed, or no cluster answers.
    """
    if config.on == "local":
        yield local
        return
    try:
        from shard_tools.tasks.ray_cluster import connected  # optional, and slow to import
    except ImportError as error:
        raise InputError(f"--on ray: needs Ray ({error}); pip install -r requirements-ray.txt") from None
    with connected(config) as tasks:
        yield tasks


def run_shown(tasks: Tasks, work: Work[T]) -> Iterator[Done[T]]:
    """Run all calls, and show how many of their units are done."""
    counts = work.counts or [1] * len(work.calls)
    with contextlib.closing(tasks.run(work)) as ended:  # type: ignore[type-var]
        units = (done if last else None for done in ended for last in _marking_the_last(counts[done.number]))
        for done in progress(units, sum(counts), work.label, work.unit, tasks.describe):
            if done is not None:
                yield done


def _marking_the_last(count: int) -> Iterator[bool]:
    yield from (number == count for number in range(1, count + 1))
