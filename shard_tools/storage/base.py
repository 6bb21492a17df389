"""The interface of a place that holds shards: files by name, read by ranges."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shard_tools.errors import InputError

Bytes = npt.NDArray[np.uint8]
Check = Callable[[int], None]
"""Called with the number of bytes found; raises InputError where they are not the requested ones."""

GIVE_UP_SECONDS = 60.0
"""How long a store may be unreachable before reading from it is an error; the default of --store-timeout."""
CHUNK_BYTES = 8 << 20  # large enough that 20 ms of latency do not matter, small enough for a time-out of seconds


@dataclass(frozen=True)
class StoreConfig:
    """How shards in a remote store are read; local folders ignore it."""

    cache_dir: Path | None = None
    """Folder that keeps what was read from a remote store, so that later epochs are local; ranks of one machine share
    it. Unset: nothing is kept."""
    cache_size: float = 100.0
    """Most that cache-dir may hold, in GB (10^9 bytes); the least recently used samples are removed first."""
    store_timeout: float = GIVE_UP_SECONDS
    """Seconds for which failed reads from a remote store are retried before they are an error."""

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
        """Whether each read is a network request, so that many should run at once."""

    def where(self, name: str) -> str:
        """The file's path or URL, for messages."""

    def identify(self, identity: str) -> None:
        """Tell the store which data set it holds, as soon as its manifest is read."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is no such file."""

    def read_record(self, name: str, offset: int, parts: Sequence[Bytes], check: Check) -> None:
        """Fill `parts`, one after the other, from a shard's `offset` on; `check` gets the number of bytes found.

        Raises InputError where the shard is missing, cannot be reached, or does not pass the check.
        """

    def chunks(self, name: str) -> Iterator[bytes]:
        """A whole file, piece by piece."""


def read_file(store: Store, name: str) -> bytes | None:
    """A whole file; None where there is no such file."""
    return None if store.size(name) is None else b"".join(store.chunks(name))


def read_array(store: Store, name: str) -> Bytes:
    """A whole large file, held in memory only once; empty where there is no such file."""
    content: Bytes = np.empty(store.size(name) or 0, np.uint8)
    done = 0
    for chunk in store.chunks(name) if len(content) else ():
        # The file may have grown or shrunk since: the caller checks its SHA-256.
        part = content[done : done + len(chunk)]
        part[:] = np.frombuffer(chunk, np.uint8)[: len(part)]
        done += len(part)
    return content[:done]
