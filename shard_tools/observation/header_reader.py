"""Read headers in a child process: HDF5, a C library, crashes or hangs on some damaged files.

A crash ends only the child, and the error names the file that it was reading.
"""

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

from shard_tools.atomic_files import naming
from shard_tools.errors import InputError
from shard_tools.observation.header import Header
from shard_tools.observation.opening import is_hdf5, read_header

SECONDS = 120.0
"""Longest that one header may take; disks that sleep and network drives need seconds."""


class HeaderReader:
    """Reads the headers of files, one after the other."""

    def __init__(self, nfpc: int | None = None, seconds: float | None = None) -> None:
        """`nfpc` overrides the fine channels per coarse channel that files state; `seconds` limits one header."""
        self._nfpc, self._seconds = nfpc, SECONDS if seconds is None else seconds
        self._child: tuple[multiprocessing.context.SpawnProcess, Connection] | None = None

    def read(self, path: Path) -> Header:
        """The checked header of one file. Raises as `opening.open_filterbank` does, and where HDF5 crashes or hangs."""
        if not is_hdf5(path):
            return read_header(path, self._nfpc)
        _, connection = self._child or self._start()
        connection.send((path, self._nfpc))
        try:
            if not connection.poll(self._seconds):
                raise InputError(f"{path}: HDF5 hangs while it reads the header; the file is damaged: fetch it again")
            found: Header | Exception = connection.recv()
        except (EOFError, ConnectionError):
            self.close()
            raise InputError(f"{path}: HDF5 crashes on its header; the file is damaged: fetch it again") from None
        except InputError:
            self.close()
            raise
        if isinstance(found, Exception):
            with naming(path):
                raise found
        return found

    def close(self) -> None:
        """End the child."""
        if self._child:
            process, connection = self._child
            process.kill()
            process.join()
            connection.close()
            self._child = None

    def _start(self) -> tuple[multiprocessing.context.SpawnProcess, Connection]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that the child's end closes with the child
        self._child = process, ours
        try:
            ours.recv()
        except (EOFError, ConnectionError):
            self.close()
            raise InputError(
                "the process that reads headers ended at its start; where a script calls ingest(), the call must be "
                'under `if __name__ == "__main__":`, since each new process runs the script up to there'
            ) from None
        return self._child

    def __enter__(self) -> "HeaderReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _serve(connection: Connection) -> None:
    """Answer each path with its header, or with the error, until the other end is closed."""
    connection.send("ready")
    while True:
        try:
            path, nfpc = connection.recv()
        except EOFError:
            return
        try:
            answer: Header | Exception = read_header(path, nfpc)
        except (InputError, OSError) as error:
            answer = error
        connection.send(answer)
