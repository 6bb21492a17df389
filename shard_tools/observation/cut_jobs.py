"""Cut shards in processes of their own: each is finished or absent, and one that died names the files it read."""

import hashlib
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from shard_tools.errors import InputError
from shard_tools.observation import read_watch
from shard_tools.observation.cut_plan import CutPlan, CutShard
from shard_tools.observation.cutting import to_members
from shard_tools.observation.read_watch import read_notes, watch_reads
from shard_tools.tar_shard import PackedShard, write_members
from shard_tools.unfinished import WORK, finish_shard

METHOD = 2
"""What is cut depends on it: raise it with every change of the values."""
Job = tuple[CutShard, Path, str]
"""A shard to cut, the folder for it, and the digest of its sources' sizes and times."""


def cut_jobs(workers: int, jobs: Sequence[Job]) -> Iterator[tuple[int, PackedShard | InputError | OSError]]:
    """Each job's number and shard, or why it could not be cut, as they are finished.

    Raises InputError naming the file where a process dies or hangs: HDF5 does so on some damaged files.
    """
    # Processes, not threads: HDF5 lets one thread of a process read at a time. Spawned, as the caller may have threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=end_with_parent) as pool:
        futures: dict[Future[PackedShard], int] = {
            pool.submit(cut_shard, *job, read_watch.SECONDS): n for n, job in enumerate(jobs)
        }
        try:
            for future in as_completed(futures):
                error = future.exception()
                yield futures[future], error if isinstance(error, InputError | OSError) else future.result()
        except BrokenProcessPool:
            left = [jobs[n] for future, n in futures.items() if not future.done() or future.exception()]
            raise _died(left, workers) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _died(left: Sequence[Job], workers: int) -> InputError:
    """The error of a process that ended while it cut one of the jobs `left`."""
    slow, files = read_notes([_note(shard, folder) for shard, folder, _ in left])
    if slow:
        return InputError(
            f"{', '.join(slow)}: one read took more than {read_watch.SECONDS:.0f} s; HDF5 hangs, as the file is "
            "damaged, or its disk does not answer: fetch the file again, or leave its cadence out"
        )
    first = files or sorted({str(shard.plan.cadence.first.path) for shard, _, _ in left[:workers]})
    return InputError(
        f"{', '.join(first)}: a process died that read this file or one after it in its cadence; "
        "either HDF5 crashed, as the file is damaged, or memory ran out (give a smaller --workers)"
    )


def _note(shard: CutShard, folder: Path) -> Path:
    """Where the file is named that is being read for a shard."""
    return folder / WORK / f"{shard.name}.reading"


def end_with_parent() -> None:
    """End this worker when its parent was killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def cut_shard(shard: CutShard, folder: Path, sources: str, seconds: float) -> PackedShard:
    """Cut a shard into `folder`, unless an earlier run finished it from the same sources.

    Ends this process where one read takes more than `seconds`.
    """
    watch_reads(_note(shard, folder), seconds)
    inputs = hashlib.sha256(repr([identity(shard.plan), shard.first, shard.last, sources]).encode()).hexdigest()
    return finish_shard(folder, shard.name, inputs, lambda path: write_shard(shard, path))


def write_shard(shard: CutShard, path: Path) -> PackedShard:
    """Cut a shard and write it to `path`."""
    about: dict[str, Any] = {}
    return write_members(to_members(shard, about), path, about)


def identity(plan: CutPlan) -> list[Any]:
    """All that a plan's snippets depend on but the data; without folders, so that files may be moved."""
    headers = [{**vars(header), "path": header.path.name} for header in plan.cadence.headers]
    rest = plan.channel_bin, plan.shape, plan.overlap, plan.starts.tolist(), plan.exclude_mhz, plan.feed, METHOD
    return [headers, *rest, *plan.needles]
