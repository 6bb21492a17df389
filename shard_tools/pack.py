"""Pack records into shards: tars, indexes and the manifest; in parallel, resumable, each file whole or absent."""

import functools
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from shard_tools.atomic_files import file_sha256
from shard_tools.cadence import check_time_bins, npy_header
from shard_tools.conversions import report_conversions
from shard_tools.errors import InputError
from shard_tools.kaggle_layout import SPLITS, Catalog, Record, common_shape, digest_catalog, read_catalog
from shard_tools.manifest import MANIFEST, TAR_BLOCK, Manifest, read_manifest
from shard_tools.manifest_writer import NO_FILE, PackedDataSet, write_tables
from shard_tools.output import Output
from shard_tools.sources import digest_sources, find_changed, find_unsure, renew_sources, write_sources
from shard_tools.system.cores import usable_cores
from shard_tools.tar_shard import Making, PackedShard, ShardPlan, padded, write_shard
from shard_tools.tasks.base import Need, TaskConfig, Work
from shard_tools.tasks.local import Threads
from shard_tools.tasks.opening import open_tasks, run_shown
from shard_tools.unfinished import ShardDestination

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackConfig:
    """Pack a folder of snippets in the Kaggle layout into shards."""

    input: Path
    """Folder with train_labels.csv and train/, or sample_submission.csv and test/, or both."""
    out: str
    """Folder for the shards, made if it is absent, or URL (s3://, gs://, file://). An interrupted pack goes on where
    it stopped."""
    staging: Path | None = None
    """With a URL, the local folder that holds shards until they are uploaded, one per worker at a time. Unset: a folder
    among the system's temporary files, the same for the same URL."""
    folds: int = 5
    """Number of stratified folds of the train split."""
    groups: Path | None = None
    """Table with the columns id and group, as `fingerprint` writes it: snippets of one group stay in one fold. It may
    list other ids too. It need not list an id without a file, which is then its own group."""
    seed: int = 0
    """Seed of the folds."""
    workers: int = usable_cores()
    """Threads, each of which writes its own shard."""
    allow_missing: bool = False
    """Go on where the tables name keys without a file; skipped.csv lists these keys."""
    on_bad: Literal["fail", "quarantine"] = "fail"
    """What to do with an invalid snippet (damaged, not finite, of another shape or type): stop, or leave it out and
    list it in skipped.csv."""
    cast: Literal["none", "float16"] = "none"
    """What to do with numbers of other types, such as float32. none: refuse them; float16: round them, say by how much,
    and refuse what float16 cannot hold."""
    time_bin: int = 1
    """Number of neighbouring time bins to sum into one, for smaller shards; 1 keeps the source files' bytes."""
    shard_mb: int = 256
    """Size of a shard, in MB (10^6 bytes)."""
    tasks: tyro.conf.OmitArgPrefixes[TaskConfig] = field(default_factory=TaskConfig)

    def __post_init__(self) -> None:
        for flag, value in (("--workers", self.workers), ("--shard-mb", self.shard_mb), ("--time-bin", self.time_bin)):
            if value < 1:
                raise InputError(f"{flag} {value}: expected at least 1")
        if not 2 <= self.folds <= 100:
            raise InputError(f"--folds {self.folds}: expected 2 to 100")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed {self.seed}: expected 0 to {2**32 - 1}")
        object.__setattr__(self, "input", self.tasks.absolute(self.input))
        object.__setattr__(self, "out", self.tasks.absolute(self.out))


def pack(config: PackConfig) -> Manifest:
    """Write `config.input` as shards to `config.out` and return their manifest.

    Packing the same input twice gives the same bytes, wherever the tasks run. Raises InputError naming the file or key
    that is invalid, or where the output folder holds something else; finished shards are kept for the next try.
    """
    catalog = read_catalog(config.input, config.folds, config.seed, config.allow_missing, config.groups)
    making = _plan_making(config, catalog.records)
    plans = plan_shards(catalog.records, making.shape, config.shard_mb * 10**6)
    made = _describe(config, catalog)
    output = Output(config.out, config.staging, config.tasks)
    output.prepare()
    if output.is_finished():
        return _already_packed(config, made, plans, making, output)
    with output.held():
        if output.is_finished():  # another process finished it since the check above
            return _already_packed(config, made, plans, making, output)
        output.clear({plan.name for plan in plans})
        done = _pack_shards(config, plans, making, output)
        packed = [shard for shard, _ in done]
        data = PackedDataSet(catalog.records, packed, _say_what_was_left_out(catalog, packed), making.shape, made)
        write_tables(config.input, output.folder, data)
        sources = {plan.name: digest for plan, (_, digest) in zip(plans, done, strict=True)}
        write_sources(output.folder, file_sha256(output.folder / MANIFEST), sources)
        output.publish()
    output.tidy()
    return read_manifest(config.out)


def _say_what_was_left_out(catalog: Catalog, packed: Sequence[PackedShard]) -> list[list[str]]:
    """[key, split, reason] of each missing or quarantined sample; logs the quarantined ones and what was rounded."""
    report_conversions(shard.conversions for shard in packed)
    quarantined = [line for shard in packed for line in shard.quarantined]
    for line in quarantined[:20]:
        _log.warning("left out %s (%s): %s", *line)
    missing = [[key, split, NO_FILE] for split in SPLITS for key in catalog.missing.get(split, [])]
    return [*missing, *quarantined]


def _describe(config: PackConfig, catalog: Catalog) -> dict[str, Any]:
    """How the data set was made, for the manifest; equal for equal inputs and options."""
    made = {
        "folds": config.folds,
        "seed": config.seed,
        "time_bin": config.time_bin,
        "shard_mb": config.shard_mb,
        "catalog_sha256": digest_catalog(catalog, config.input),
    }
    # Left out if not used, so that shards packed by earlier versions still match.
    if config.groups:
        made["groups_sha256"] = file_sha256(config.groups)
    if config.cast != "none":
        made["cast"] = config.cast
    return made


def plan_shards(records: Sequence[Record], shape: tuple[int, ...], shard_bytes: int) -> list[ShardPlan]:
    """Cut records, in order, into shards of about `shard_bytes`; no shard mixes splits."""
    count = 1
    for length in shape:
        count *= length
    member = TAR_BLOCK + padded(len(npy_header(shape)) + 2 * count) + 2 * TAR_BLOCK
    per_shard = max(1, shard_bytes // member)
    plans = []
    for split in SPLITS:
        members = [record for record in records if record.split == split]
        for number, start in enumerate(range(0, len(members), per_shard)):
            plans.append(ShardPlan(f"{split}-{number:06d}.tar", members[start : start + per_shard]))
    return plans


def _plan_making(config: PackConfig, records: Sequence[Record]) -> Making:
    """How files become members, all of the most common shape."""
    cast, quarantine = config.cast == "float16", config.on_bad == "quarantine"
    panels, time_bins, channels = common_shape(config.input, records, quarantine, cast)
    check_time_bins(time_bins, config.time_bin)
    return Making((panels, time_bins // config.time_bin, channels), config.time_bin, cast, quarantine)


def _already_packed(
    config: PackConfig, made: dict[str, Any], plans: Sequence[ShardPlan], making: Making, output: Output
) -> Manifest:
    """Return a finished pack of the same input; raise InputError if it is of anything else."""
    manifest = read_manifest(config.out)
    unsure = find_unsure(manifest, plans)
    if manifest.made != made or manifest.shape != making.shape:
        reason: str | None = "made with other keys, labels, options or shapes"
    else:
        changed = find_changed(manifest, unsure, making, config.workers)
        reason = changed and f"changed since packing: {changed}"
    if reason:
        raise InputError(f"{config.out}: holds finished shards ({reason}); delete it or choose another --out")
    if unsure:
        renew_sources(manifest, plans)
    output.tidy()
    _log.info("%s is already packed; `python -m shard_tools verify %s` checks its bytes", config.out, config.out)
    return manifest


def _pack_shards(
    config: PackConfig, plans: Sequence[ShardPlan], making: Making, output: Output
) -> list[tuple[PackedShard, str]]:
    """Write missing shards; return all, each with the digest of its sources."""
    calls = [(output.destination, plan, making) for plan in plans]
    names = [f"{config.out}/{plan.name}" for plan in plans]
    need = Need().uploading(config.shard_mb * 10**6) if output.is_remote else Need()
    work = Work(pack_shard, calls, "packing", "shards", names, need)
    done: dict[int, tuple[PackedShard, str]] = {}
    # Threads, not processes: reading, hashing and writing all release the GIL.
    with open_tasks(config.tasks, Threads(config.workers)) as tasks:
        for each in run_shown(tasks, work):
            done[each.number] = each.result()
            output.check_held()
    return [done[number] for number in range(len(plans))]


def pack_shard(destination: ShardDestination, plan: ShardPlan, making: Making) -> tuple[PackedShard, str]:
    """Write a shard, unless an earlier run finished it and its bytes still match; also return its sources' digest."""
    sources = digest_sources(plan.records)  # before reading: the next run then notices a change made meanwhile
    write = functools.partial(write_shard, plan.records, making=making)
    return destination.finish_shard(plan.name, _inputs_digest(plan, making, sources), write), sources


def _inputs_digest(plan: ShardPlan, making: Making, sources: str) -> str:
    """A digest of what a shard is made from; it changes with the size or the times of a source file."""
    parts = [astuple(making), sources, *((r.key, r.target, r.fold) for r in plan.records)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
