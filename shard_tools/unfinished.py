"""A folder of shards while they are written: what an interrupted run finished is kept, the rest is cleared away."""

import json
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from shard_tools.atomic_files import file_sha256, write_whole
from shard_tools.conversions import Conversions
from shard_tools.errors import InputError
from shard_tools.manifest import MANIFEST, Shard
from shard_tools.manifest_writer import TABLES
from shard_tools.snippet_files import clutter_kind
from shard_tools.sources import SOURCES
from shard_tools.tar_shard import PackedShard

if TYPE_CHECKING:
    from shard_tools.storage.upload import Upload

BESIDE = (*TABLES, SOURCES)
"""Files beside the manifest and the shards."""
WORK = ".pack"
"""Inside the output folder: the lock, and a note for every finished shard."""


def check_out_folder(out: Path) -> None:
    """Refuse a folder that holds something other than a pack."""
    paths = list(out.iterdir())
    names = sorted(path.name for path in paths if clutter_kind(path.name, path.is_dir()) is None)
    if names and not {out / MANIFEST, out / WORK} & set(paths):
        raise InputError(f"{out}: holds something else ({names[0]}); expected an empty folder or an unfinished pack")


def clear_leftovers(out: Path, planned: Collection[str]) -> None:
    """Remove what an interrupted run with other options, or a killed one, left behind."""
    for path in [*out.glob("*.tar"), *out.glob("*.idx"), *out.rglob(".*.tmp")]:
        if path.with_suffix(".tar").name not in planned:
            path.unlink()
    for name in BESIDE:
        (out / name).unlink(missing_ok=True)


def finish_shard(
    folder: Path, name: str, inputs: str, write: Callable[[Path], PackedShard], upload: "Upload | None" = None
) -> PackedShard:
    """Write a shard, unless an earlier run finished it from the same `inputs` (a digest) and its bytes still match."""
    path, note = folder / name, folder / WORK / f"{name}.json"
    kept, index = _read_note(note, inputs), path.with_suffix(".idx")
    if kept and upload and upload.holds(kept.shard.name, kept.shard.bytes):
        return kept
    if kept and not upload and path.is_file() and index.is_file():
        found = file_sha256(path), file_sha256(index)
        if found == (kept.shard.sha256, kept.shard.index_sha256):
            return kept
    packed = write(path)
    if upload:
        upload.send_shard(path)
    write_whole(note, json.dumps({"inputs": inputs, **asdict(packed)}))
    return packed


def _read_note(note: Path, inputs: str) -> PackedShard | None:
    """The note of a shard that an earlier run finished from the same inputs; None where there is none."""
    try:
        content = json.loads(note.read_bytes())
        if content["inputs"] == inputs:
            shard, conversions = Shard(**content["shard"]), Conversions(**content["conversions"])
            about = content.get("about", {})  # earlier versions had none
            return PackedShard(shard, content["places"], content["quarantined"], conversions, about)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # A note damaged by a power cut is ignored: the shard is written again.
    return None
