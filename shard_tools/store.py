"""Where shards lie: a local folder or a remote store, read by ranges, written whole."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shard_tools.errors import InputError
from shard_tools.files import NOT_SUPPORTED, say_once

Bytes = npt.NDArray[np.uint8]
Check = Callable[[int], None]
"""Given how many bytes were found; raises InputError where they are not those that were asked for."""

REMOTE_SCHEMES = ("s3", "gs", "https", "http")
GIVE_UP_SECONDS = 60.0
"""How long a store may stay away before reading from it is an error; the default of --store-timeout."""
_CHUNK_BYTES = 8 << 20  # large enough that 20 ms of latency do not count, small enough for a time-out of seconds


@dataclass(frozen=True)
class StoreConfig:
    """How shards in a remote store are read; nothing of it concerns a local folder."""

    cache_dir: Path | None = None
    """Folder that keeps what was read from a remote store, so that later epochs are local; ranks of one machine share
    it. Unset: nothing is kept."""
    cache_size: float = 100.0
    """Most that cache-dir may hold, in GB (10^9 bytes); what was not used for longest goes first."""
    store_timeout: float = GIVE_UP_SECONDS
    """Seconds for which failed reads from a remote store are tried again; then it is an error."""

    def __post_init__(self) -> None:
        if not self.cache_size > 0:
            raise InputError(f"--cache-size {self.cache_size}: expected more than 0 GB")
        if not self.store_timeout > 0:
            raise InputError(f"--store-timeout {self.store_timeout}: expected more than 0 seconds")


class Store(Protocol):
    """A place with files by name. Names come from checked manifests: they hold no path characters."""

    @property
    def root(self) -> Any:
        """The folder (a Path), or the URL (a str)."""

    @property
    def is_remote(self) -> bool:
        """Whether each read is a request, so that many have to be under way at once."""

    def where(self, name: str) -> str:
        """The file as messages name it."""

    def identify(self, identity: str) -> None:
        """Say which data set lies here, as soon as its manifest is read."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is no such file."""

    def read_record(self, name: str, offset: int, parts: Sequence[Bytes], check: Check) -> None:
        """Fill `parts`, one after the other, from a shard's `offset` on; `check` how many bytes there were, and what.

        Raises InputError where the shard is missing, cannot be reached, or does not pass the check.
        """

    def chunks(self, name: str) -> Iterator[bytes]:
        """A whole file, piece by piece."""


def read_file(store: Store, name: str) -> bytes | None:
    """A whole file; None where there is no such file."""
    return None if store.size(name) is None else b"".join(store.chunks(name))


class LocalStore:
    """A folder."""

    is_remote = False

    def __init__(self, root: Path) -> None:
        self.root = root
        self._base = f"{root}{os.sep}"  # joined as text: a Path for every sample took as long as its checks

    def where(self, name: str) -> str:
        """The file's path."""
        return self._base + name

    def identify(self, identity: str) -> None:
        """As Store says; a folder keeps no copies that could be of another."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is no such file."""
        path = self.root / name
        return path.stat().st_size if path.is_file() else None

    def read_record(self, name: str, offset: int, parts: Sequence[Bytes], check: Check) -> None:
        """As Store says."""
        check(read_into(self._base + name, offset, parts))

    def chunks(self, name: str) -> Iterator[bytes]:
        """A whole file, piece by piece."""
        with (self.root / name).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk


def read_into(path: str, offset: int, parts: Sequence[Bytes]) -> int:
    """Fill `parts`, one after the other, from a file's `offset` on; return how many bytes there were."""
    try:
        # Opened for every sample: a few microseconds against the hundred of the copy, and no limit on open files.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InputError(f"{path}: no such shard; it was there when the data set was packed: pack again") from None
    try:
        left, done = [part.data for part in parts], 0
        while left:
            count = _read_some(descriptor, left, offset + done)
            if count == 0:
                break
            done += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if left:
                left[0] = left[0][count:]
        return done
    except OSError as error:
        error.filename = error.filename or path
        raise
    finally:
        os.close(descriptor)


def _read_some(descriptor: int, parts: Sequence[memoryview], offset: int) -> int:
    """Fill `parts` from an offset on, as far as one call goes; return how many bytes there were."""
    try:
        return os.preadv(descriptor, parts, offset)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        say_once("preadv", f"no reads into several parts (preadv: {error.strerror}); samples are read more slowly")
        found = os.pread(descriptor, len(parts[0]), offset)
        parts[0][: len(found)] = found
        return len(found)


def is_remote(place: str | Path) -> bool:
    """Whether shards lie behind a URL of a store, not in a folder."""
    return isinstance(place, str) and "://" in place and not place.startswith("file://")


def local_folder(place: str | Path) -> Path:
    """The folder of a place that is none of `is_remote`."""
    if isinstance(place, str) and place.startswith("file://"):
        folder = place.removeprefix("file://")
        if not folder.startswith("/"):
            raise InputError(f"{place}: expected file:///absolute/path")
        return Path(folder)
    return Path(place)


def open_store(place: str | Path, config: StoreConfig = StoreConfig()) -> Store:
    """The store behind a path or a URL. Raises InputError where the URL is of no kind that we read."""
    if not is_remote(place):
        return LocalStore(local_folder(place))
    try:
        from shard_tools.remote import RemoteStore  # its libraries are slow to import, and only remote shards need them
    except ImportError as error:
        raise InputError(f"{place}: remote stores need more packages ({error}); pip install fsspec aiohttp") from None
    return RemoteStore(check_url(str(place)), config)


def check_url(url: str) -> str:
    """A store's URL without its last slash. Raises InputError on what is none."""
    scheme, _, rest = url.partition("://")
    if scheme not in REMOTE_SCHEMES:  # fsspec knows others, which run commands, unpack archives or chain stores
        expected = ", ".join(f"{name}://" for name in REMOTE_SCHEMES)
        raise InputError(f"{url}: unknown kind of store; expected {expected}, file:// or a path")
    if "@" in rest.partition("/")[0]:
        raise InputError(
            f"{scheme}://...: credentials in a URL end up in logs; put them into the environment (AWS_...)"
        )
    if not re.fullmatch(r"[^/?#\s:]+(:[0-9]+)?(/[^?#\s]*)?", rest):
        raise InputError(f"{url}: expected {scheme}://{'host' if 'http' in scheme else 'bucket'}/path")
    return url.rstrip("/")
