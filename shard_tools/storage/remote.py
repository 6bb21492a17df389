"""Shards in a remote store: ranged reads, with time-outs and retries."""

import asyncio
import contextlib
import errno
import itertools
import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from shard_tools.errors import InputError, StoreError
from shard_tools.storage.base import CHUNK_BYTES, Bytes, Check, StoreConfig
from shard_tools.storage.cache import SampleCache
from shard_tools.storage.filesystem import ATTEMPT_SECONDS, BucketFiles, open_files
from shard_tools.storage.request_errors import describe, find_remedy, seconds_to_wait

_CHUNKS_AHEAD = 4
_SLOWEST_UPLOAD = 1e6  # bytes/s
_PAUSE_SECONDS, _LONGEST_PAUSE = 0.1, 5.0  # before the second attempt; doubled up to the longest
_WRONG_TRIES = 4  # tries at a store that answers in time, but with wrong bytes
_SILENT_SECONDS = 4.0  # failures that take less are not logged
_log = logging.getLogger(__name__)
T = TypeVar("T")


class RemoteStore:
    """A folder of an object store or a web server. Its methods may be called from many threads at once."""

    is_remote = True

    def __init__(self, url: str, config: StoreConfig) -> None:
        """`url` has passed `check_url`."""
        self.root = url
        self._config, self._patience = config, config.store_timeout
        self._files = open_files(url)
        self._base = url.partition("://")[2] if isinstance(self._files, BucketFiles) else url
        self._cache: SampleCache | None = None
        # For the whole store: since when no request has succeeded, and when the last one failed.
        self._away_since, self._last_failed = math.inf, -math.inf
        self._host_is_known = False
        self._not_before = -math.inf  # the store asked for no requests until then
        self._told_at, self._telling = -math.inf, threading.Lock()

    def __reduce__(self) -> tuple[type["RemoteStore"], tuple[str, StoreConfig]]:
        """Connections are not pickled: each process opens its own."""
        return RemoteStore, (self.root, self._config)

    def where(self, name: str) -> str:
        """The file's URL."""
        return f"{self.root}/{name}"

    def identify(self, identity: str) -> None:
        """See Store; starts the cache if there is a `--cache-dir`."""
        if self._config.cache_dir:
            self._cache = SampleCache(self._config.cache_dir, self._config.cache_size * 1e9, identity)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is no such file."""
        try:
            return self._insist(name, lambda: self._files.size(self._path(name)))
        except FileNotFoundError:
            return None

    def read_record(self, name: str, offset: int, parts: Sequence[Bytes], check: Check) -> None:
        """See Store; reads from the cache if it has an intact copy."""
        if self._cache and self._cache.read_record(name, offset, parts, check):
            return

        def take(data: bytes) -> None:
            rest = memoryview(data)
            for part in parts:
                found = rest[: len(part)]
                part[: len(found)] = found
                rest = rest[len(found) :]
            check(len(data))

        try:
            self._read_range(name, offset, sum(len(part) for part in parts), take)
        except FileNotFoundError:
            raise InputError(
                f"{self.where(name)}: no such shard in the store (404); it was there when the data set was packed: "
                "upload it or pack again"
            ) from None
        if self._cache:
            self._cache.write_record(name, offset, parts)

    def chunks(self, name: str) -> Iterator[bytes]:
        """A whole file, piece by piece, reading some pieces ahead."""
        total = self.size(name)
        if total is None:
            raise FileNotFoundError(2, "no such file in the store", self.where(name))

        def read(start: int) -> bytes:
            length = min(CHUNK_BYTES, total - start)

            def take(data: bytes) -> None:
                if len(data) != length:
                    raise InputError(f"{self.where(name)}: {len(data)} bytes from {start} on, expected {length}")

            return self._read_range(name, start, length, take)

        with ThreadPoolExecutor(_CHUNKS_AHEAD, thread_name_prefix="chunks") as pool:
            ahead: deque[Future[bytes]] = deque()
            try:
                for start in range(0, total, CHUNK_BYTES):
                    ahead.append(pool.submit(read, start))
                    if len(ahead) > _CHUNKS_AHEAD:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def names(self) -> list[str]:
        """Names of the direct entries of the store's folder."""
        files = self.check_writable()
        try:
            found = self._insist("", lambda: files.names(self._base))
        except FileNotFoundError:
            return []
        return sorted(path.rpartition("/")[2] for path in found if path.rstrip("/") != self._base)

    def put(self, name: str, source: Path) -> None:
        """Upload a file; it appears whole, replacing any file of that name."""
        files, seconds = self.check_writable(), source.stat().st_size / _SLOWEST_UPLOAD
        self._insist(name, lambda: files.put(source, self._path(name)), extra_seconds=seconds)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file at once, replacing any file of that name."""
        files = self.check_writable()
        self._insist(name, lambda: files.write(self._path(name), data))

    def write_if(self, name: str, data: bytes, version: str | None) -> str | None:
        """Write a small file if its version is still `version` (None: absent); return the new version, None if refused.

        A write whose answer was lost is tried again, and then refused although it succeeded: read the file to see who
        wrote it. Raises NotImplementedError where the store has no conditional writes.
        """
        files = self.check_writable()

        async def write() -> str | NotImplementedError | None:
            try:
                return await files.write_if(self._path(name), data, version)
            except NotImplementedError as error:
                return error  # not a failure: it must not be tried again

        answer = self._insist(name, write)
        if isinstance(answer, NotImplementedError):
            raise answer
        return answer

    def read_version(self, name: str) -> tuple[bytes, str] | None:
        """A small file and its version; None where there is no such file."""
        files = self.check_writable()
        try:
            return self._insist(name, lambda: files.read_version(self._path(name)))
        except FileNotFoundError:
            return None

    def remove_folder(self, name: str) -> None:
        """Delete a folder with all its files, if it is there."""
        files = self.check_writable()
        with contextlib.suppress(FileNotFoundError):
            self._insist(name, lambda: files.remove_folder(self._path(name)))

    def remove(self, name: str) -> None:
        """Delete a file."""
        files = self.check_writable()
        self._insist(name, lambda: files.remove(self._path(name)))

    def check_writable(self) -> BucketFiles:
        """The files of the store. Raises InputError for a web server, which cannot be written to."""
        if not isinstance(self._files, BucketFiles):
            raise InputError(f"{self.root}: a web server is read, not written; pack to s3://, gs:// or a folder")
        return self._files

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}" if name else self._base

    def _read_range(self, name: str, offset: int, length: int, take: Callable[[bytes], None]) -> bytes:
        """`length` bytes from `offset` on, once `take` has accepted them."""
        return self._insist(name, lambda: self._files.read(self._path(name), offset, offset + length), take)

    def _insist(
        self,
        name: str,
        request: Callable[[], Awaitable[T]],
        accept: Callable[[T], None] | None = None,
        extra_seconds: float = 0.0,
    ) -> T:
        """The answer to a request, retried after failures of the store or the network.

        Raises FileNotFoundError at once where there is no such file. Raises InputError where no retry would help, or
        where this request, or all requests of all threads, failed for `--store-timeout` plus `extra_seconds`.
        """
        began, wrong = time.monotonic(), 0
        for attempt in itertools.count(1):
            self._pause(attempt)
            tried = time.monotonic()
            try:
                answer = self._once(request, self._seconds_for_a_try(began) + extra_seconds)
                if accept:
                    accept(answer)
                return answer
            except FileNotFoundError as error:
                self._refuse(name, error)  # a missing bucket is not a missing file
                self._away_since = math.inf
                raise FileNotFoundError(errno.ENOENT, "no such file in the store", self.where(name)) from None
            except StoreError:
                raise
            except InputError:
                wrong += 1  # bytes that arrived, but are not those of the sample
                if wrong == _WRONG_TRIES:
                    raise
            except Exception as error:
                since = min(began, self._failed(tried))
                self._refuse(name, error)
                self._wait(name, error, attempt, since, since + self._patience + extra_seconds)
        raise AssertionError

    def _seconds_for_a_try(self, began: float) -> float:
        """The time for one try: short once the store has been away too long, so that queued requests fail soon."""
        deadline = min(began, self._away_since) + self._patience
        return min(ATTEMPT_SECONDS, max(deadline - time.monotonic(), 1.0))

    def _pause(self, attempt: int) -> None:
        """Wait before a request, with random jitter: all threads of all ranks must not retry at the same moment."""
        pause = min(_PAUSE_SECONDS * 2.0 ** min(attempt - 2, 10), _LONGEST_PAUSE, self._patience / 10)
        chance = random.uniform(0.5, 1.0)
        asked = self._not_before - time.monotonic()
        time.sleep(asked + chance * _PAUSE_SECONDS if asked > 0 else chance * pause if attempt > 1 else 0.0)

    def _once(self, request: Callable[[], Awaitable[T]], seconds: float) -> T:
        async def bounded() -> T:
            return await asyncio.wait_for(request(), seconds)

        # One second more, in case a library swallows the cancellation.
        answer = asyncio.run_coroutine_threadsafe(bounded(), self._files.loop).result(seconds + 1)
        self._away_since, self._host_is_known = math.inf, True
        return answer

    def _failed(self, tried: float) -> float:
        """Record the failure of a request that began at `tried`; return since when all requests have failed."""
        # An old failure with no request after it says nothing about now.
        recent = tried - max(self._last_failed, self._not_before) < ATTEMPT_SECONDS + _LONGEST_PAUSE
        self._away_since = since = min(self._away_since, tried) if recent else tried
        self._last_failed = time.monotonic()
        return since

    def _refuse(self, name: str, error: Exception) -> None:
        """Raise StoreError for an error that no retry fixes."""
        if remedy := find_remedy(error, self._host_is_known):
            raise StoreError(f"{self.where(name)}: {remedy.problem} ({describe(error)}); {remedy.advice}") from None

    def _wait(self, name: str, error: Exception, attempts: int, since: float, deadline: float) -> None:
        """Record how long the next attempt has to wait. Raises StoreError where that is too long."""
        now, asked = time.monotonic(), seconds_to_wait(error)
        if asked and now + asked >= deadline:
            raise StoreError(
                f"{self.where(name)}: the server asks for a pause of {asked:.0f} s ({describe(error)}), longer than "
                f"--store-timeout {self._patience:g} allows; wait, or give a larger --store-timeout"
            ) from None
        if now >= deadline:
            raise StoreError(
                f"{self.where(name)}: no answer for {self._patience:.0f} s ({attempts} tries, the last: "
                f"{describe(error)}); check the address and the network, then run the same command again (train.py "
                "with --resume)"
            ) from None
        self._not_before = max(self._not_before, now + asked) if asked else self._not_before
        if now - since + asked > _SILENT_SECONDS:
            self._tell(name, error, now - since, deadline - now)

    def _tell(self, name: str, error: Exception, failed: float, left: float) -> None:
        """Log what is being waited for, once for all threads."""
        with self._telling:
            now = time.monotonic()
            if now - self._told_at < self._patience:
                return
            self._told_at = now
        _log.warning(
            "%s: no answer for %.0f s (%s); trying again for up to %.0f s more (--store-timeout)",
            *(self.where(name), failed, describe(error), left),
        )
