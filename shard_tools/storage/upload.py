"""Upload of a pack to a remote store: each shard and its note when it is finished, the manifest last."""

import contextlib
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from shard_tools.errors import InputError
from shard_tools.snippet_files import clutter_kind
from shard_tools.storage import open_remote
from shard_tools.storage.base import StoreConfig, read_file
from shard_tools.storage.lock import StoreLock, store_lock

_OURS = re.compile(r"(train|test)-[0-9]{6}\.(tar|idx)\Z")


class Upload:
    """Uploads a staging folder's files to a store as `pack` writes them, and checks what the store holds already."""

    def __init__(self, url: str, last: str, work: str) -> None:
        """`last` is the file that makes the data set valid: its manifest. `work` is the folder for notes."""
        self._store, self._last, self._work = open_remote(url, StoreConfig()), last, work
        self._store.check_writable()
        self._lock: StoreLock | None = None

    def __reduce__(self) -> tuple[type["Upload"], tuple[str, str, str]]:
        """Pickle all but the lock, which stays with the process that holds it."""
        return Upload, (self._store.root, self._last, self._work)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the place in the store. Raises InputError where another process writes there."""
        with store_lock(self._store, f"{self._work}/lock") as self._lock:
            yield

    def check_locked(self) -> None:
        """Raise InputError where another process has taken the place over."""
        if self._lock:
            self._lock.check()

    def is_finished(self) -> bool:
        """Whether the store holds a complete data set."""
        return self._store.size(self._last) is not None

    def clear(self, planned: Collection[str], tables: Collection[str]) -> None:
        """Remove what a run with other options left in the store.

        Raises InputError where something else lies there.
        """
        names = [name for name in self._store.names() if name in tables or clutter_kind(name, is_folder=False) is None]
        for name in names:
            if not _OURS.match(name) and name not in tables:
                raise InputError(
                    f"{self._store.where(name)}: not part of a pack; expected an empty place or an unfinished pack"
                )
        for name in names:
            if name in tables or name.rpartition(".")[0] + ".tar" not in planned:
                self._store.remove(name)

    def holds(self, shard: str, size: int) -> bool:
        """Whether a shard that an earlier run finished is there with this size; stores check what they receive."""
        index = self._store.size(_index_of(shard))
        return self._store.size(shard) == size and index is not None

    def send_shard(self, path: Path) -> None:
        """Upload a shard and its index, and delete them here: a staging folder need not hold the whole data set."""
        index = path.with_name(_index_of(path.name))
        for file in (path, index):
            self._store.put(file.name, file)
        for file in (path, index):
            file.unlink()

    def remove_shard(self, shard: str) -> None:
        """Delete a shard and its index, if they are there."""
        for name in {shard, _index_of(shard)} & set(self._store.names()):
            self._store.remove(name)

    def read_note(self, name: str) -> bytes:
        """The note of an unfinished pack; empty where there is none."""
        return read_file(self._store, f"{self._work}/{name}") or b""

    def send_note(self, name: str, text: str) -> None:
        """Write a note beside the shards, where the next run finds it on any machine."""
        self._store.write(f"{self._work}/{name}", text.encode())

    def remove_note(self, name: str) -> None:
        """Delete the note of one shard, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._store.remove(f"{self._work}/{name}")

    def remove_notes(self) -> None:
        """Delete all notes, and the lock, once the data set is complete."""
        self._store.remove_folder(self._work)

    def finish(self, folder: Path, tables: Collection[str]) -> None:
        """Upload the tables, and last the manifest, which makes the data set valid; then delete them here."""
        self.check_locked()
        for name in (*(table for table in tables if (folder / table).is_file()), self._last):
            self._store.put(name, folder / name)
        for name in (*tables, self._last):
            (folder / name).unlink(missing_ok=True)

    @staticmethod
    def remove_staging(folder: Path, work: str) -> None:
        """Delete our files from a staging folder, and the folder if it is then empty."""
        shutil.rmtree(folder / work, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def _index_of(name: str) -> str:
    return name.removesuffix(".tar") + ".idx"
