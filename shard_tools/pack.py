"""Records to shards: tars, indexes and the manifest; in parallel, each file whole or absent, and resumable."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shard_tools.cadence import check_time_bins, npy_header
from shard_tools.catalog import SPLITS, SUBMISSION, Catalog, Record, common_shape, read_catalog
from shard_tools.errors import InputError
from shard_tools.files import file_sha256, write_whole
from shard_tools.locks import folder_lock
from shard_tools.manifest import (
    MANIFEST,
    TAR_BLOCK,
    Manifest,
    Shard,
    read_manifest,
)
from shard_tools.progress import progress
from shard_tools.shard import PackedShard, padded, write_shard
from shard_tools.store import StoreConfig, check_url, is_remote, local_folder
from shard_tools.tables import NO_FILE, TABLES, write_tables

if TYPE_CHECKING:
    from shard_tools.upload import Upload

_WORK = ".pack"  # inside the output folder: the lock, and a note for every shard that is done
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
    """With a URL, the local folder where shards lie until they are uploaded: for each worker one. Unset: a folder of
    the system's for temporary files, the same for the same URL."""
    folds: int = 5
    """Number of stratified folds of the train split."""
    groups: Path | None = None
    """Table with the columns id and group, as `fingerprint` writes it: snippets of one group stay in one fold. It may
    hold more ids; one without a file and a group counts as a group of its own."""
    seed: int = 0
    """Seed of the folds."""
    workers: int = os.cpu_count() or 1
    """Threads, each of which writes a shard of its own."""
    allow_missing: bool = False
    """Pack what is there where the tables name keys without a file; skipped.csv lists them."""
    on_bad: Literal["fail", "quarantine"] = "fail"
    """What to do with a snippet that breaks the contract: stop, or leave it out and list it in skipped.csv."""
    time_bin: int = 1
    """Number of neighbouring time bins to sum into one, for smaller shards; 1 keeps the source files' bytes."""
    shard_mb: int = 256
    """Size of a shard, in MB (10^6 bytes)."""

    def __post_init__(self) -> None:
        for flag, value in (("--workers", self.workers), ("--shard-mb", self.shard_mb), ("--time-bin", self.time_bin)):
            if value < 1:
                raise InputError(f"{flag} {value}: expected at least 1")
        if not 2 <= self.folds <= 100:
            raise InputError(f"--folds {self.folds}: expected 2 to 100")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed {self.seed}: expected 0 to {2**32 - 1}")

    @property
    def folder(self) -> Path:
        """Where files are written: `out` itself, or the staging folder before a store."""
        if not is_remote(self.out):
            return local_folder(self.out)
        name = f"needlestream-pack-{os.getuid()}-{hashlib.sha256(check_url(self.out).encode()).hexdigest()[:16]}"
        return self.staging or Path(tempfile.gettempdir(), name)


@dataclass(frozen=True)
class ShardPlan:
    """Which records one shard holds."""

    name: str
    records: Sequence[Record]


def pack(config: PackConfig) -> Manifest:
    """Write `config.input` as shards to `config.out` and return their manifest.

    Packing the same input twice gives the same bytes. Raises InputError naming the file or key that breaks a
    contract, or where the output folder holds something else; finished shards stay for the next try.
    """
    catalog = read_catalog(config.input, config.folds, config.seed, config.allow_missing, config.groups)
    shape = _common_shape(config, catalog.records)
    plans = plan_shards(catalog.records, shape, config.shard_mb * 10**6)
    made = {
        "folds": config.folds,
        "seed": config.seed,
        "time_bin": config.time_bin,
        "shard_mb": config.shard_mb,
        "catalog_sha256": _catalog_digest(catalog, config.input),
    }
    if config.groups:  # absent where there are none, so that shards of before are still known as the same
        made["groups_sha256"] = file_sha256(config.groups)
    config.folder.mkdir(parents=True, exist_ok=True)
    _check_out_folder(config.folder)
    upload = _open_upload(config)
    if _is_packed(config, upload):
        return _already_packed(config, made, catalog.records, upload)
    (config.folder / _WORK).mkdir(exist_ok=True)
    with folder_lock(config.folder / _WORK, "lock"):
        if _is_packed(config, upload):  # another process finished it since the look above
            return _already_packed(config, made, catalog.records, upload)
        _clear_leftovers(config.folder, plans)
        if upload:
            upload.clear({plan.name for plan in plans}, TABLES)
        packed = _pack_shards(config, plans, shape, upload)
        quarantined = [line for shard in packed for line in shard.quarantined]
        for line in quarantined[:20]:
            _log.warning("left out %s (%s): %s", *line)
        missing = [[key, split, NO_FILE] for split in SPLITS for key in catalog.missing.get(split, [])]
        write_tables(config.input, config.folder, catalog.records, packed, [*missing, *quarantined], shape, made)
        if upload:
            upload.finish(config.folder, TABLES)
        shutil.rmtree(config.folder / _WORK)
    if upload:
        upload.remove_staging(config.folder, _WORK)
    return read_manifest(config.out)


def _open_upload(config: PackConfig) -> "Upload | None":
    """The way to a remote store; None where the shards stay in a folder."""
    if not is_remote(config.out):
        return None
    from shard_tools.upload import Upload  # its libraries are slow to import

    return Upload(config.out, StoreConfig())


def _is_packed(config: PackConfig, upload: "Upload | None") -> bool:
    return upload.is_finished() if upload else (config.folder / MANIFEST).is_file()


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


def _common_shape(config: PackConfig, records: Sequence[Record]) -> tuple[int, int, int]:
    """The shape (P, T, F) that all snippets must have, after summing time bins."""
    panels, time_bins, channels = common_shape(config.input, records, skip_bad=config.on_bad == "quarantine")
    check_time_bins(time_bins, config.time_bin)
    return panels, time_bins // config.time_bin, channels


def _check_out_folder(out: Path) -> None:
    """Refuse a folder that holds something other than a pack."""
    names = sorted(path.name for path in out.iterdir())
    if names and MANIFEST not in names and _WORK not in names:
        raise InputError(f"{out}: holds something else ({names[0]}); expected an empty folder or an unfinished pack")


def _clear_leftovers(out: Path, plans: Sequence[ShardPlan]) -> None:
    """Remove what an interrupted try with other options, or a killed one, left behind."""
    planned = {plan.name for plan in plans}
    for path in [*out.glob("*.tar"), *out.glob("*.idx"), *out.rglob(".*.tmp")]:
        if path.with_suffix(".tar").name not in planned:
            path.unlink()
    for name in TABLES:
        (out / name).unlink(missing_ok=True)


def _already_packed(
    config: PackConfig, made: dict[str, Any], records: Sequence[Record], upload: "Upload | None"
) -> Manifest:
    """A finished pack of the same input stays; of anything else it is in the way."""
    manifest = read_manifest(config.out)
    packed_at = upload.finished_at() if upload else (config.folder / MANIFEST).stat().st_mtime
    newer = [record.path for record in records if record.path.stat().st_mtime > packed_at]
    if manifest.made != made or newer:
        reason = f"{newer[0]} is newer" if newer else "of other keys, labels or options"
        raise InputError(f"{config.out}: holds finished shards ({reason}); delete it or choose another --out")
    shutil.rmtree(config.folder / _WORK, ignore_errors=True)  # of a try that was killed at its very end
    if upload:
        upload.remove_staging(config.folder, _WORK)
    _log.info("%s is already packed; `python -m shard_tools verify %s` checks its bytes", config.out, config.out)
    return manifest


def _pack_shards(
    config: PackConfig, plans: Sequence[ShardPlan], shape: tuple[int, ...], upload: "Upload | None"
) -> list[PackedShard]:
    """Write the shards that are not there yet, on `config.workers` threads."""
    # Threads, not processes: reading, hashing and writing all let go of the interpreter lock.
    with ThreadPoolExecutor(config.workers) as pool:
        futures: dict[Future[PackedShard], int] = {
            pool.submit(_pack_shard, config, plan, shape, upload): number for number, plan in enumerate(plans)
        }
        packed: dict[int, PackedShard] = {}
        try:
            for future in progress(as_completed(futures), len(plans), "packing", "shards"):
                packed[futures[future]] = future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [packed[number] for number in range(len(plans))]


def _pack_shard(config: PackConfig, plan: ShardPlan, shape: tuple[int, ...], upload: "Upload | None") -> PackedShard:
    """One shard: kept where an earlier try finished it and its bytes still match, else written."""
    path = config.folder / plan.name
    note = config.folder / _WORK / f"{plan.name}.json"
    inputs = _inputs_digest(config, plan, shape)
    kept = _read_note(note, inputs)
    index = path.with_suffix(".idx")
    if kept and upload and upload.holds(kept.shard):
        return kept
    if kept and not upload and path.is_file() and index.is_file():
        found = file_sha256(path), file_sha256(index)
        if found == (kept.shard.sha256, kept.shard.index_sha256):
            return kept
    packed = write_shard(plan.records, path, shape, config.time_bin, config.on_bad == "quarantine")
    if upload:
        upload.send_shard(path)
    write_whole(note, json.dumps({"inputs": inputs, **asdict(packed)}))
    return packed


def _read_note(note: Path, inputs: str) -> PackedShard | None:
    """What an earlier try noted of a shard that it finished from the same inputs; None where it left no such note."""
    try:
        content = json.loads(note.read_bytes())
        if content["inputs"] == inputs:
            return PackedShard(Shard(**content["shard"]), content["places"], content["quarantined"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # A note damaged by a power cut is none: the shard is written anew.
    return None


def _catalog_digest(catalog: Catalog, root: Path) -> str:
    """What a data set is of: its records, the keys it lacks, and the table it will be submitted in."""
    digest = hashlib.sha256()
    for r in catalog.records:
        digest.update(f"{r.key} {r.split} {r.target} {r.fold}\n".encode())
    for split in SPLITS:
        for key in catalog.missing.get(split, []):
            digest.update(f"{key} {split} missing\n".encode())
    if (root / SUBMISSION).is_file():
        digest.update((root / SUBMISSION).read_bytes())
    return digest.hexdigest()


def _inputs_digest(config: PackConfig, plan: ShardPlan, shape: tuple[int, ...]) -> str:
    """What a finished shard was made from: another size or time of a source file makes it stale."""
    stats = [(record.path.stat().st_size, record.path.stat().st_mtime_ns) for record in plan.records]
    parts = [
        config.time_bin,
        config.on_bad,
        shape,
        *((r.key, r.target, r.fold, s) for r, s in zip(plan.records, stats, strict=True)),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
