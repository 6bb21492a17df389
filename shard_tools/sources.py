"""Check whether the files that a finished data set was packed from are still the same.

A note in its folder holds a digest of the size and the times of each shard's sources. If these match, the files count
as unchanged. If they differ, or there is no note (as after a copy), the shard is built again without writing it, to
compare its SHA-256. Times are compared for equality only: clocks may be wrong, and archives restore old times.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shard_tools.atomic_files import write_whole
from shard_tools.conversions import Conversions
from shard_tools.errors import InputError
from shard_tools.kaggle_layout import Record
from shard_tools.manifest import TAR_BLOCK, Manifest
from shard_tools.sample import read_record
from shard_tools.storage.base import read_file
from shard_tools.system.progress import progress
from shard_tools.tar_shard import Making, ShardPlan, hash_shard, member_bytes

SOURCES = ".sources.json"  # not part of the data set: times differ between two copies of the same files


def digest_sources(records: Sequence[Record]) -> str:
    """A hash of the size and the times of some snippet files."""
    return hashlib.sha256(repr([_state(record) for record in records]).encode()).hexdigest()


def write_sources(folder: Path, identity: str, digests: dict[str, str]) -> None:
    """Write the digest of each shard's sources, with the identity of their manifest."""
    text = json.dumps({"manifest": identity, "sources": digests}, indent=1) + "\n"
    with contextlib.suppress(OSError):  # it only saves time: the data set is whole without it
        for left in folder.glob(f".{SOURCES}.*.tmp"):  # of an earlier run that was killed at the very end
            left.unlink(missing_ok=True)
        write_whole(folder / SOURCES, text, durable=False)


def renew_sources(manifest: Manifest, plans: Sequence[ShardPlan]) -> None:
    """Write the note for the sources as they are now, so that the next run need not read them; local folders only."""
    if not manifest.store.is_remote:
        write_sources(manifest.root, manifest.identity, {plan.name: digest_sources(plan.records) for plan in plans})


def find_unsure(manifest: Manifest, plans: Sequence[ShardPlan]) -> list[ShardPlan]:
    """The shards whose sources have changed in size or time, or that have no note."""
    noted = _read_sources(manifest)
    return [plan for plan in plans if noted.get(plan.name) != digest_sources(plan.records)]


def find_changed(manifest: Manifest, plans: Sequence[ShardPlan], making: Making, workers: int) -> str | None:
    """The first source file of these shards that changed after packing, or None. Reads all their sources."""
    making = replace(making, quarantine=True)  # snippets left out then must not raise now
    expected = {shard.name: shard.sha256 for shard in manifest.shards}
    pool = ThreadPoolExecutor(workers)
    try:
        made = pool.map(lambda plan: hash_shard(plan.records, plan.name, making).shard.sha256, plans)
        checked = progress(zip(plans, made, strict=True), len(plans), "comparing the sources", "shards")
        for plan, sha256 in checked:
            if sha256 != expected.get(plan.name):
                return _name_changed(manifest, plan, making)
    finally:
        pool.shutdown(cancel_futures=True)
    return None


def _state(record: Record) -> tuple[str, int, int, int]:
    about = record.path.stat()
    # Archives and copies can set st_mtime_ns; st_ctime_ns is set by the system alone.
    return record.key, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def _read_sources(manifest: Manifest) -> dict[str, Any]:
    """The digests that were noted with this manifest."""
    try:
        content = json.loads(read_file(manifest.store, SOURCES) or b"{}")
        if content["manifest"] == manifest.identity:
            return dict(content["sources"])
    except (ValueError, KeyError, TypeError):
        pass  # a damaged note is ignored: the sources are read
    return {}


def _name_changed(manifest: Manifest, plan: ShardPlan, making: Making) -> str:
    """The first record of a shard whose member would now differ; the shard itself where there is none."""
    packed = dict(_members(manifest, plan.name))
    for record in plan.records:
        try:
            now = member_bytes(record, making, Conversions())
        except InputError:
            now = None
        if now != packed.get(record.key):
            return str(record.path)
    return f"the sources of {plan.name}"


def _members(manifest: Manifest, name: str) -> Iterator[tuple[str, bytes]]:
    """Key and npy bytes of all samples of a shard."""
    for number, shard in enumerate(manifest.shards):
        if shard.name == name:
            for row in np.flatnonzero(manifest.shard == number).tolist():
                yield manifest.key(row), read_record(manifest, row)[TAR_BLOCK:].tobytes()
