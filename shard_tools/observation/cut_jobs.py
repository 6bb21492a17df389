"""Cut shards, each in a task of its own; each shard is whole or absent."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shard_tools.errors import InputError
from shard_tools.observation import read_watch
from shard_tools.observation.cut_plan import CutPlan, CutShard
from shard_tools.observation.cutting import to_members
from shard_tools.tar_shard import PackedShard, write_members
from shard_tools.tasks.base import Need, Work
from shard_tools.unfinished import ShardDestination

METHOD = 2
"""Version of the way in which values are computed: raise it with every change of the values."""
_MEMORY = 600_000_000  # of a process that cuts (measured: 0.4 GB, with 16 spectra and 8 channels summed), and some room
Job = tuple[ShardDestination, CutShard, str]
"""Where to write a shard, the shard, and the digest of its sources' sizes and times."""


def cut_work(jobs: Sequence[Job], uploaded: int = 0) -> Work[PackedShard]:
    """The tasks that cut shards; each uploads `uploaded` bytes.

    They need processes: HDF5 lets one thread at a time read, and may crash.
    """
    death = (
        "while it read this file or one after it in its cadence; either HDF5 crashed because the file is damaged, or "
        "memory ran out"
    )
    names = [str(shard.plan.cadence.first.path) for _, shard, _ in jobs]
    calls = [(*job, read_watch.SECONDS) for job in jobs]
    need = Need(_MEMORY).uploading(uploaded) if uploaded else Need(_MEMORY)
    return Work(cut_shard, calls, "ingesting", "shards", names, need, death=death, culprit=_culprit)


def _culprit() -> InputError | None:
    """The error of a process that died while it read a file; None where none was being read."""
    slow, files = read_watch.collect_notes()
    if slow:
        return InputError(
            f"{', '.join(slow)}: one read took more than {read_watch.SECONDS:.0f} s; either HDF5 hangs because the "
            "file is damaged, or its disk does not answer: fetch the file again, or leave its cadence out"
        )
    if not files:
        return None
    return InputError(
        f"{', '.join(files)}: a process died while it read this file; either HDF5 crashed because the file is damaged, "
        "or memory ran out (give a smaller --workers)"
    )


def cut_shard(destination: ShardDestination, shard: CutShard, sources: str, seconds: float) -> PackedShard:
    """Cut a shard, unless an earlier run finished it from the same sources.

    In a child process, a read that takes more than `seconds` ends the process.
    """
    read_watch.watch_reads(seconds)
    inputs = hashlib.sha256(repr([identity(shard.plan), shard.first, shard.last, sources]).encode()).hexdigest()
    return destination.finish_shard(shard.name, inputs, lambda path: write_shard(shard, path))


def write_shard(shard: CutShard, path: Path) -> PackedShard:
    """Cut a shard and write it to `path`."""
    about: dict[str, Any] = {}
    return write_members(to_members(shard, about), path, about)


def identity(plan: CutPlan) -> list[Any]:
    """All that a plan's snippets depend on, except the data; without folders, so that files may be moved."""
    headers = [{**vars(header), "path": header.path.name} for header in plan.cadence.headers]
    rest = plan.channel_bin, plan.shape, plan.overlap, plan.starts.tolist(), plan.exclude_mhz, plan.feed, METHOD
    return [headers, *rest, *plan.needles]
