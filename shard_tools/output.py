"""Where a data set is written: to a folder, or through a staging folder on this machine to a store."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from shard_tools.errors import InputError
from shard_tools.manifest import MANIFEST
from shard_tools.storage.address import check_url, is_remote, local_folder
from shard_tools.system.locks import folder_lock
from shard_tools.tasks.base import TaskConfig
from shard_tools.unfinished import BESIDE, WORK, ShardDestination, check_out_folder, clear_leftovers

if TYPE_CHECKING:
    from shard_tools.storage.upload import Upload


class Output:
    """The place that a data set is written to, from the first shard to the manifest."""

    def __init__(self, out: str | Path, staging: Path | None, tasks: TaskConfig) -> None:
        """`staging` is the folder for what is not uploaded yet; None: a folder among each machine's temporary files.

        Raises InputError where nothing can be written there.
        """
        self.out = str(out)
        self._upload: Upload | None = None
        if not is_remote(self.out):
            self.folder = local_folder(self.out)
            self.destination = ShardDestination(self.folder)
        else:
            digest = hashlib.sha256(check_url(self.out).encode()).hexdigest()[:16]
            # Relative to the folder for temporary files, which differs between the nodes of some clusters.
            own = staging or Path(f"needlestream-pack-{os.getuid()}-{digest}")
            self.folder = Path(tempfile.gettempdir(), own)
            is_shared = tasks.on == "local"
            self.destination = ShardDestination(self.folder if is_shared else own, self._open_upload(), is_shared)
            self._upload = self.destination.upload
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"--out {out}: is a file, expected a folder for the shards; choose another --out")

    def prepare(self) -> None:
        """Make the folder. Raises InputError where it holds something else."""
        self.folder.mkdir(parents=True, exist_ok=True)
        check_out_folder(self.folder)

    @property
    def is_remote(self) -> bool:
        """Whether shards are uploaded."""
        return self._upload is not None

    def is_finished(self) -> bool:
        """Whether a whole data set is there."""
        return self._upload.is_finished() if self._upload else (self.folder / MANIFEST).is_file()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out. Raises InputError where another process is writing."""
        (self.folder / WORK).mkdir(exist_ok=True)
        with (
            folder_lock(self.folder / WORK, "lock"),
            self._upload.locked() if self._upload else contextlib.nullcontext(),
        ):
            yield

    def clear(self, planned: Collection[str]) -> None:
        """Remove what a run with other options, or a killed one, left behind. Raises InputError for anything else."""
        clear_leftovers(self.folder, planned)
        if self._upload:
            self._upload.clear(planned, BESIDE)

    def check_held(self) -> None:
        """Raise InputError where another process has taken over the place in a store."""
        if self._upload:
            self._upload.check_locked()

    def remove_shard(self, name: str) -> None:
        """Remove a finished shard and its index, if they are there."""
        if self._upload:
            self._upload.remove_shard(name)
        else:
            (self.folder / name).unlink(missing_ok=True)
            (self.folder / name).with_suffix(".idx").unlink(missing_ok=True)

    def publish(self) -> None:
        """Upload the tables in the folder, the manifest last, and remove the notes of unfinished work."""
        if self._upload:
            self._upload.finish(self.folder, BESIDE)
        shutil.rmtree(self.folder / WORK)

    def tidy(self) -> None:
        """Once the data set is whole, remove what is not part of it: notes, and the staging folder."""
        shutil.rmtree(self.folder / WORK, ignore_errors=True)  # of a run that was killed at the very end
        if self._upload:
            self._upload.remove_notes()
            self._upload.remove_staging(self.folder, WORK)

    def _open_upload(self) -> "Upload":
        from shard_tools.storage.upload import Upload  # its libraries are slow to import

        return Upload(self.out, MANIFEST, WORK)
