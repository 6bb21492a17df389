"""Locks that let one process at a time write to a folder, even on file systems without file locks.

Where the kernel cannot lock a file, a file that names its owner is the lock. The owner rewrites it regularly, so that
others can detect a dead owner without comparing clocks. Between a machine that can lock the folder's files and one that
cannot, exclusion works in one direction only: the first notices the second.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from shard_tools.atomic_files import NOT_SUPPORTED, naming, say_once
from shard_tools.errors import InputError

BEAT_SECONDS = 10.0
"""Interval between two heartbeats."""
SILENT_SECONDS = 60.0
"""Time without a heartbeat after which an owner on another machine counts as dead."""
_LOOKS = 60  # checks in that time
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def folder_lock(folder: Path, name: str) -> Iterator[None]:
    """Hold the folder's lock file `name`; raise InputError if another process holds it."""
    owner = folder / f"{name}.owner"
    with (folder / name).open("w") as file, contextlib.ExitStack() as held:
        try:
            # The kernel releases it however the process dies.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise in_use(folder) from None
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                error.filename = str(folder / name)
                raise
            say_once("flock", f"{folder}: no file locks here ({error.strerror}); {owner.name} keeps others out instead")
            held.enter_context(_own(owner))
        else:
            # An owner file is from a machine that, unlike this one, cannot lock the folder's files.
            _clear_abandoned(owner)
        yield


def in_use(place: Path | str) -> InputError:
    """The error for a folder or a URL that another process writes to."""
    return InputError(f"{place}: another process is writing here; wait for it, or choose another folder")


@contextlib.contextmanager
def _own(path: Path) -> Iterator[None]:
    """Hold the owner file, rewriting it until the end. Raises InputError where a living process holds it."""
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
            if is_ours(path.read_bytes()):
                path.unlink()


def _create(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return False
    with naming(path), os.fdopen(descriptor, "wb") as file:
        file.write(sign_of_life(0))
    return True


def _beat(path: Path, ended: threading.Event) -> None:
    """Rewrite our owner file until `ended` is set, or it is no longer ours."""
    number = 0
    while not ended.wait(BEAT_SECONDS):
        number += 1
        try:
            with path.open("r+b") as file:
                if not is_ours(file.read()):
                    _log.warning(
                        "%s: another process took this folder over as abandoned; stop one of the two", path.parent
                    )
                    return
                file.seek(0)
                file.write(sign_of_life(number))
        except OSError:
            pass  # a full disk, or another process is checking the file: the next beat may succeed


def sign_of_life(number: int) -> bytes:
    """What an owner writes into its file at heartbeat `number`."""
    about = {
        "machine": _machine_id(),
        "process": os.getpid(),
        "started": _started(os.getpid()),
        "beat": f"{number:012d}",
    }
    return json.dumps(about).encode()


def is_ours(content: bytes) -> bool:
    """Whether this process wrote an owner's file."""
    about = _parse_sign(content)
    return (about.get("machine"), about.get("process")) == (_machine_id(), os.getpid())


def _parse_sign(content: bytes) -> dict[str, object]:
    """What an owner wrote; empty where that cannot be read."""
    try:
        about = json.loads(content)
    except ValueError:
        return {}  # read during a write, or left incomplete
    return about if isinstance(about, dict) else {}


def _clear_abandoned(path: Path) -> None:
    """Remove the file of a dead owner. Raises InputError where the owner is alive."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    if not is_abandoned(path, content, lambda: _has_changed(path, content)):
        raise in_use(path.parent)
    # Rename it, which only one process can do, and check it again: another may just have taken it over.
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if aside.read_bytes() != content:
            aside.rename(path)
            raise in_use(path.parent)
        aside.unlink()


def _has_changed(path: Path, content: bytes) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes() != content
    return False


def is_abandoned(file: Path | str, content: bytes, has_changed: Callable[[], bool]) -> bool:
    """Whether the owner that wrote `content` is dead: on this machine, its process is gone; on another, it is silent.

    `has_changed` checks whether the owner's file, a path or a URL, has been rewritten since.
    """
    about = _parse_sign(content)
    process = about.get("process")
    if about.get("machine") == _machine_id() and isinstance(process, int):
        return _started(process) != about.get("started")
    _log.info(
        "%s: held by process %s of another machine; waiting %.0f s for a heartbeat", file, process, SILENT_SECONDS
    )
    for _ in range(_LOOKS):
        time.sleep(SILENT_SECONDS / _LOOKS)
        if has_changed():
            return False
    return True


def _machine_id() -> str:
    """The machine, its boot and its container: the scope in which a process id is unique."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
        return " ".join(parts)
    return f"{parts[0]} (no way to tell its processes apart) {os.getpid()}"


def _started(process: int) -> str:
    """When a process of this machine was started; empty where it is dead. Process ids are reused."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]
