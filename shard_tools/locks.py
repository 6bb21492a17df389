"""Folders that one process at a time may fill, on file systems without locks too.

Where the kernel cannot lock a file, a file that names its owner stands for the lock. The owner rewrites it all the
time, so that others can tell a living owner from a dead one, without a look at any clock but their own. A machine that
can lock the folder's files and one that cannot keep each other out in one direction alone: the first sees the second.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from shard_tools.atomic_files import NOT_SUPPORTED, naming, say_once
from shard_tools.errors import InputError

BEAT_SECONDS = 10.0
"""Between two signs of life."""
SILENT_SECONDS = 60.0
"""Without a sign of life, after which an owner on another machine is taken for dead."""
_LOOKS = 60  # in that time
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def folder_lock(folder: Path, name: str) -> Iterator[None]:
    """Hold the folder's lock file `name`; raise InputError if another process holds it."""
    owner = folder / f"{name}.owner"
    with (folder / name).open("w") as file, contextlib.ExitStack() as held:
        try:
            # The kernel lets go of it when the process dies, however it dies.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(folder) from None
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                error.filename = str(folder / name)
                raise
            say_once("flock", f"{folder}: no file locks here ({error.strerror}); {owner.name} keeps others out instead")
            held.enter_context(_own(owner))
        else:
            # Of a process on a machine that cannot lock files of this folder, as this one can.
            _clear_abandoned(owner)
        yield


def _in_use(folder: Path) -> InputError:
    return InputError(f"{folder}: another process is writing here; wait for it, or choose another folder")


@contextlib.contextmanager
def _own(path: Path) -> Iterator[None]:
    """Hold an owner's file, rewritten until the end. Raises InputError where a living process holds it."""
    while not _create(path):
        _clear_abandoned(path)
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, ended), name="lock", daemon=True)
    beats.start()
    try:
        yield
    finally:
        ended.set()
        beats.join()
        with contextlib.suppress(OSError):
            if _is_ours(path.read_bytes()):
                path.unlink()


def _create(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return False
    with naming(path), os.fdopen(descriptor, "wb") as file:
        file.write(_sign_of_life(0))
    return True


def _beat(path: Path, ended: threading.Event) -> None:
    """Rewrite our file until the end; stop where it is not ours any more."""
    number = 0
    while not ended.wait(BEAT_SECONDS):
        number += 1
        try:
            with path.open("r+b") as file:
                if not _is_ours(file.read()):
                    _log.warning(
                        "%s: another process took this folder over as abandoned; stop one of the two", path.parent
                    )
                    return
                file.seek(0)
                file.write(_sign_of_life(number))
        except OSError:
            pass  # a full disk, or another process that looks who we are: the next beat may do better


def _sign_of_life(number: int) -> bytes:
    about = {"machine": _machine(), "process": os.getpid(), "started": _started(os.getpid()), "beat": f"{number:012d}"}
    return json.dumps(about).encode()


def _is_ours(content: bytes) -> bool:
    about = _parsed(content)
    return (about.get("machine"), about.get("process")) == (_machine(), os.getpid())


def _parsed(content: bytes) -> dict[str, object]:
    try:
        about = json.loads(content)
    except ValueError:
        return {}  # caught while it was written, or left so
    return about if isinstance(about, dict) else {}


def _clear_abandoned(path: Path) -> None:
    """Remove the file of an owner that is dead. Raises InputError where it is alive."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    if not _is_abandoned(path, content):
        raise _in_use(path.parent)
    # Renamed, which only one of several can do, and looked at again: another may have taken it over just now.
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if aside.read_bytes() != content:
            aside.rename(path)
            raise _in_use(path.parent)
        aside.unlink()


def _is_abandoned(path: Path, content: bytes) -> bool:
    """Whether an owner is dead: of this machine, its process is gone; of another, it shows no sign of life."""
    about = _parsed(content)
    process = about.get("process")
    if about.get("machine") == _machine() and isinstance(process, int):
        return _started(process) != about.get("started")
    _log.info(
        "%s: held by process %s of another machine; waiting %.0f s for a sign of life", path, process, SILENT_SECONDS
    )
    for _ in range(_LOOKS):
        time.sleep(SILENT_SECONDS / _LOOKS)
        with contextlib.suppress(FileNotFoundError):
            if path.read_bytes() != content:
                return False
    return True


def _machine() -> str:
    """The machine, since it was started, and the container: where a process's number means something."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
        return " ".join(parts)
    return f"{parts[0]} (no way to tell its processes apart) {os.getpid()}"


def _started(process: int) -> str:
    """When a process of this machine was started; empty where it is dead. Numbers of processes are used again."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]
