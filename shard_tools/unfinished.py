"""A folder of shards while they are written: what an interrupted run finished is kept, the rest is cleared away."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
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
_TASK = ".task-"  # hidden: not part of a data set


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


@dataclass(frozen=True)
class ShardDestination:
    """Where shards and their notes are kept once they are finished. It is pickled with the tasks that write them."""

    folder: Path
    """Holds the shards; with an upload, each one until it is uploaded."""
    upload: "Upload | None" = None
    is_shared: bool = True
    """Whether all tasks see the same folder. If not, each task makes its own folder inside it, on its own machine; a
    relative `folder` is then among that machine's temporary files."""

    def finish_shard(self, name: str, inputs: str, write: Callable[[Path], PackedShard]) -> PackedShard:
        """Write a shard, unless an earlier run finished it from the same `inputs` (a digest) and it is still there."""
        note = self._read_note(f"{name}.json")
        kept = _parse_note(note, inputs)
        if kept and self._holds(kept.shard):
            return kept
        if note and self.upload:
            # In a store only sizes are checked: after a kill, the old note would seem to describe the new shard.
            self.upload.remove_note(f"{name}.json")
        with self._opened() as folder:
            packed = write(folder / name)
            if self.upload:
                self.upload.send_shard(folder / name)
        self._write_note(f"{name}.json", _to_note(inputs, packed))
        return packed

    def _read_note(self, name: str) -> bytes:
        if self.upload:
            return self.upload.read_note(name)
        path = self.folder / WORK / name
        return path.read_bytes() if path.is_file() else b""

    def _write_note(self, name: str, text: str) -> None:
        if self.upload:
            self.upload.send_note(name, text)
        else:
            write_whole(self.folder / WORK / name, text)

    def _holds(self, shard: Shard) -> bool:
        """Whether a shard and its index are there as its note says; a store is asked for sizes only."""
        if self.upload:
            return self.upload.holds(shard.name, shard.bytes)
        path = self.folder / shard.name
        index = path.with_suffix(".idx")
        if not (path.is_file() and index.is_file()):
            return False
        return (file_sha256(path), file_sha256(index)) == (shard.sha256, shard.index_sha256)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Path]:
        """The folder to write to."""
        if self.is_shared:
            yield self.folder
            return
        here = Path(tempfile.gettempdir(), self.folder)
        here.mkdir(parents=True, exist_ok=True)
        for left in here.glob(f"{_TASK}*"):
            if not Path("/proc", left.name.split("-")[1]).exists():  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f"{_TASK}{os.getpid()}-", dir=here) as own:
            yield Path(own)


def _to_note(inputs: str, packed: PackedShard) -> str:
    """The note of a finished shard. Its field "places" holds the members, as in the notes of earlier versions."""
    content = asdict(packed)
    content["places"] = content.pop("members")
    return json.dumps({"inputs": inputs, **content})


def _parse_note(text: bytes, inputs: str) -> PackedShard | None:
    """The note of a shard that an earlier run finished from the same inputs; None if it is anything else."""
    try:
        content = json.loads(text)
        if content["inputs"] == inputs:
            shard, conversions = Shard(**content["shard"]), Conversions(**content["conversions"])
            about = content.get("about", {})  # earlier versions had none
            return PackedShard(shard, content["places"], content["quarantined"], conversions, about)
    except (ValueError, KeyError, TypeError):
        pass  # A note damaged by a power cut is ignored: the shard is written again.
    return None
