"""Let one process at a time write to a place in a store, by conditional writes of a file that names its owner.

The owner rewrites it regularly, so that another process can recognise a dead owner without comparing clocks, and take
over. If several try, the store lets only one succeed (If-Match).
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from functools import partial

from shard_tools.errors import InputError, StoreError
from shard_tools.storage.base import StoreConfig
from shard_tools.storage.remote import RemoteStore
from shard_tools.system import locks
from shard_tools.system.locks import in_use, is_abandoned, is_ours, sign_of_life

_BEAT_TIMEOUT = 20.0  # seconds: a beat that fails must leave time for another one before SILENT_SECONDS have passed
_log = logging.getLogger(__name__)


class StoreLock:
    """A lock that this process holds, for as long as its heartbeat is seen."""

    def __init__(self, store: RemoteStore, name: str, version: str) -> None:
        """`version` is that of the owner's file as this process wrote it."""
        self._name, self._version = name, version
        self._store = RemoteStore(store.root, StoreConfig(store_timeout=_BEAT_TIMEOUT))
        self._ended, self._is_lost = threading.Event(), False
        self._broken = ""  # the error that ended the heartbeat
        self._beats = threading.Thread(target=self._beat, name="store-lock", daemon=True)
        self._beats.start()

    def check(self) -> None:
        """Raise InputError if another process took over, having seen no heartbeat for too long, or may take over."""
        if self._broken:
            raise InputError(
                f"{self._store.root}: this process can send no more heartbeats ({self._broken}), so another one may "
                "take this place over; run the same command again"
            )
        if self._is_lost:
            raise InputError(
                f"{self._store.root}: another process took this place over, since it saw no heartbeat of this one for "
                f"{locks.SILENT_SECONDS:.0f} s; let it finish, then run the same command again"
            )

    def release(self) -> None:
        """Stop the heartbeat and remove the file, if it is still ours."""
        self._ended.set()
        self._beats.join()
        with contextlib.suppress(StoreError):
            found = self._store.read_version(self._name)
            if found and is_ours(found[0]):
                self._store.remove(self._name)

    def _beat(self) -> None:
        number = 0
        while not self._ended.wait(locks.BEAT_SECONDS):
            number += 1
            try:
                self._is_lost = not self._write_sign(number)
            except StoreError:
                pass  # the next beat may get through
            except Exception as error:
                self._broken = f"{type(error).__name__}: {error}"
                _log.exception("%s: no more heartbeats", self._store.root)
            if self._is_lost or self._broken:
                return

    def _write_sign(self, number: int) -> bool:
        """Write one beat; False where the file is another process's."""
        written = self._store.write_if(self._name, sign_of_life(number), self._version)
        if written is None:
            # Still ours, if the answer to an earlier beat was lost.
            found = self._store.read_version(self._name)
            if not found or not is_ours(found[0]):
                return False
            written = found[1]
        self._version = written
        return True


@contextlib.contextmanager
def store_lock(store: RemoteStore, name: str) -> Iterator[StoreLock | None]:
    """Hold the file `name` of a store; None where the store cannot write conditionally, which is logged.

    Raises InputError where a living process holds it. It takes a minute to find out if one on another machine lives.
    """
    version = _acquire(store, name)
    if version is None:
        _log.warning(
            "%s: this store cannot refuse a second writer (no conditional writes); start one pack to it at a time",
            store.root,
        )
        yield None
        return
    lock = StoreLock(store, name, version)
    try:
        yield lock
    finally:
        lock.release()


def _acquire(store: RemoteStore, name: str) -> str | None:
    """Create the owner's file or take it over; return its version, or None where the store has no conditions."""
    try:
        return _create_or_take(store, name)
    except NotImplementedError:
        found = store.read_version(name)
        if found and is_ours(found[0]):  # the store knows one condition but not the other
            store.remove(name)
        return None


def _create_or_take(store: RemoteStore, name: str) -> str | None:
    """Like `_acquire`, but raises NotImplementedError where the store rejects a condition as unknown."""
    while True:
        version = store.write_if(name, sign_of_life(0), None)
        if version:
            # A store that ignores the condition lets the same write through again.
            if store.write_if(name, sign_of_life(0), None):
                return None
            # Try the other condition, which beats need. None if an answer was lost: the file is then read below.
            version = store.write_if(name, sign_of_life(0), version)
        if version:
            return version
        found = store.read_version(name)
        if not found:
            continue  # just released
        content, version = found
        # Ours, if the answer to the first write was lost and it was tried again.
        if is_ours(content):
            return version
        if not is_abandoned(store.where(name), content, partial(_has_changed, store, name, version)):
            raise in_use(store.root)
        if taken := store.write_if(name, sign_of_life(0), version):
            return taken


def _has_changed(store: RemoteStore, name: str, version: str) -> bool:
    found = store.read_version(name)
    return found is not None and found[1] != version
