"""Atomic file writes: a file appears only when it is complete, even where the file system lacks some calls."""

import contextlib
import errno
import hashlib
import logging
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_CHUNK_BYTES = 1 << 20
NOT_SUPPORTED = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.ENOTTY, errno.ENODEV}
)
"""Error numbers of calls that a file system does not support."""
_CANNOT_REPLACE = NOT_SUPPORTED | {errno.EEXIST, errno.EPERM, errno.EACCES, errno.EBUSY}
_log = logging.getLogger(__name__)
_said: set[str] = set()


@contextlib.contextmanager
def whole_file(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` at the end, or remove it if the body raises.

    A symbolic link is kept, and the file it points to is replaced. A device or a pipe receives the bytes at the end.
    Without `durable`, the file survives a killed process but not a power cut, and small files are written much faster.
    """
    if is_stream(path):
        with tempfile.TemporaryDirectory() as folder, naming(path):
            temporary = Path(folder, "whole")
            yield temporary
            _pour(temporary, path)
        return
    place = Path(os.path.realpath(path)) if path.is_symlink() else path
    # Not the process id alone: in a folder that machines share, two processes may have the same.
    temporary = place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with naming(path):
            yield temporary
            if durable:
                sync(temporary)
            put_in_place(temporary, place)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)  # the user does not know the temporary name
        raise
    finally:
        with contextlib.suppress(OSError):  # usually renamed already; a read-only file system refuses even this
            temporary.unlink()


def is_stream(path: Path) -> bool:
    """Whether to write into a path instead of replacing it: a device, a pipe, or our own standard output."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or _open_already(path) is not None


def _open_already(path: Path) -> int | None:
    """The descriptor of our standard output or error if `path` is one, such as /dev/stdout redirected to a file."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
    return None


def _pour(source: Path, stream: Path) -> None:
    """Copy a file's bytes into a device or a pipe, which is neither created nor truncated."""
    known = _open_already(stream)
    # A duplicate descriptor keeps the write position; flush Python's own buffer first.
    if known is not None and sys.stdout is not None:
        sys.stdout.flush()
    descriptor = os.open(stream, os.O_WRONLY | os.O_APPEND) if known is None else os.dup(known)
    # Buffered: an unbuffered write may be short without an error.
    with source.open("rb") as whole, os.fdopen(descriptor, "wb") as into:
        shutil.copyfileobj(whole, into)


def put_in_place(new: Path, place: Path) -> None:
    """Rename `new` to `place`, replacing any file there: in one step, where the file system can.

    Otherwise the old file is moved aside first, and moved back if the second step fails.
    """
    try:
        new.replace(place)
    except OSError as error:
        if error.errno not in _CANNOT_REPLACE or not os.path.lexists(place) or place.is_dir() > place.is_symlink():
            raise
        aside = place.with_name(f".{place.name}.{os.getpid()}.old.tmp")
        place.rename(aside)
        say_once(
            "rename",
            f"{place.parent}: files cannot be replaced in one step here ({error.strerror}). Going on in two steps; a "
            "kill between them leaves the old file under a hidden name that ends in .old.tmp",
        )
        try:
            new.rename(place)
        except OSError:
            aside.rename(place)
            raise
        aside.unlink()


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk (fsync), where the file system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        say_once(
            "fsync",
            f"{path.parent}: this file system does not say when data are on the disk (fsync: {error.strerror}). Going "
            "on without; a power cut may damage what was written last",
        )


def say_once(lack: str, message: str) -> None:
    """Warn, once for each `lack`, of a feature that the file system lacks."""
    if lack not in _said:
        _said.add(lack)
        _log.warning("%s", message)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Set `path` as the file name of an OSError without one: failed opens name their file, failed writes do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_whole(path: Path, data: bytes | str, durable: bool = True) -> None:
    """Write `data` to `path`, whole or not at all; see `whole_file`."""
    with whole_file(path, durable) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with naming(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
