"""Shards in a remote store: ranged reads through fsspec, with time-outs and retries."""

import asyncio
import itertools
import math
import random
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from shard_tools.cache import SampleCache
from shard_tools.errors import InputError, StoreError
from shard_tools.filesystem import ATTEMPT_SECONDS, open_filesystem, reads_of
from shard_tools.store import Bytes, Check, StoreConfig

_CHUNK_BYTES = 8 << 20
_CHUNKS_AHEAD = 4
_SLOWEST_UPLOAD = 1e6  # bytes/s
_PAUSE_SECONDS, _LONGEST_PAUSE = 0.1, 5.0  # before the second attempt; doubled up to the second
_WRONG_TRIES = 4  # of a store that answers in time, but not with the sample that lies there
T = TypeVar("T")


class RemoteStore:
    """A folder of an object store or a web server. Its methods may be called from many threads at once."""

    is_remote = True

    def __init__(self, url: str, config: StoreConfig) -> None:
        """`url` is one that `check_url` let through."""
        self.root = url
        self._config, self._patience = config, config.store_timeout
        self._files, self._is_web = open_filesystem(url), url.startswith("http")
        self._read = reads_of(self._files, url.partition("://")[0])
        self._base = url if self._is_web else url.partition("://")[2]
        self._cache: SampleCache | None = None
        # Of the whole store: no request has succeeded since the first, and the last one failed at the second.
        self._away_since, self._last_failed = math.inf, -math.inf

    def where(self, name: str) -> str:
        """The file's URL."""
        return f"{self.root}/{name}"

    def identify(self, identity: str) -> None:
        """As Store says; begins to keep samples where `--cache-dir` says so."""
        if self._config.cache_dir:
            self._cache = SampleCache(self._config.cache_dir, self._config.cache_size * 1e9, identity)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is no such file."""
        try:
            about = self._insist(name, lambda: self._files._info(self._path(name)))
        except FileNotFoundError:
            return None
        if about.get("size") is None:
            raise InputError(f"{self.where(name)}: the server does not say its size; choose one that serves ranges")
        return int(about["size"])

    def read_record(self, name: str, offset: int, parts: Sequence[Bytes], check: Check) -> None:
        """As Store says; from the cache where it is there and whole."""
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
        """A whole file, piece by piece, some pieces ahead."""
        total = self.size(name)
        if total is None:
            raise FileNotFoundError(2, "no such file in the store", self.where(name))

        def read(start: int) -> bytes:
            length = min(_CHUNK_BYTES, total - start)

            def take(data: bytes) -> None:
                if len(data) != length:
                    raise InputError(f"{self.where(name)}: {len(data)} bytes from {start} on, expected {length}")

            return self._read_range(name, start, length, take)

        with ThreadPoolExecutor(_CHUNKS_AHEAD, thread_name_prefix="chunks") as pool:
            ahead: deque[Future[bytes]] = deque()
            try:
                for start in range(0, total, _CHUNK_BYTES):
                    ahead.append(pool.submit(read, start))
                    if len(ahead) > _CHUNKS_AHEAD:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def names(self) -> list[str]:
        """What lies there, without what lies deeper."""
        try:
            found = self._insist("", lambda: self._files._ls(self._base, detail=False, refresh=True))
        except FileNotFoundError:
            return []
        return sorted(path.rpartition("/")[2] for path in found if path.rstrip("/") != self._base)

    def put(self, name: str, source: Path) -> None:
        """Upload a file; it appears whole, in place of what had its name."""
        seconds = source.stat().st_size / _SLOWEST_UPLOAD
        self._writable()
        self._insist(name, lambda: self._files._put_file(str(source), self._path(name)), extra_seconds=seconds)

    def remove(self, name: str) -> None:
        """Delete a file."""
        self._writable()
        self._insist(name, lambda: self._files._rm_file(self._path(name)))

    def _writable(self) -> None:
        if self._is_web:
            raise InputError(f"{self.root}: a web server is read, not written; pack to s3://, gs:// or a folder")

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}" if name else self._base

    def _read_range(self, name: str, offset: int, length: int, take: Callable[[bytes], None]) -> bytes:
        """`length` bytes from `offset` on, once `take` has accepted them."""

        async def request() -> bytes:
            try:
                return await self._read(self._path(name), offset, offset + length)
            except Exception as error:
                if _is_past_end(error):
                    return b""
                raise

        def accept(data: bytes) -> None:
            if len(data) > length:
                raise InputError(
                    f"{self.where(name)}: {len(data)} bytes, asked for {length}; the server ignores ranges, choose "
                    "one that serves them"
                )
            take(data)

        return self._insist(name, request, accept)

    def _insist(
        self,
        name: str,
        request: Callable[[], Awaitable[T]],
        accept: Callable[[T], None] | None = None,
        extra_seconds: float = 0.0,
    ) -> T:
        """The answer to a request, tried again after failures of the store or the way to it.

        Raises FileNotFoundError at once where the store says so. Raises InputError where it refuses us, or where for
        `--store-timeout` seconds (and `extra_seconds`) this request failed, or every request of all threads did.
        """
        began, wrong = time.monotonic(), 0
        for attempt in itertools.count(1):
            tried = time.monotonic()
            deadline = min(began, self._away_since) + self._patience
            # Where others have waited long enough already, one short try: the threads' queues empty soon.
            seconds = min(ATTEMPT_SECONDS, max(deadline - tried, 1.0)) + extra_seconds
            try:
                answer = self._once(request, seconds)
                self._away_since = math.inf
                if accept:
                    accept(answer)
                return answer
            except FileNotFoundError as error:
                if self._is_web and not _is_not_found(error):
                    deadline = min(began, self._failed(tried)) + self._patience
                    self._refuse(name, error.__cause__ or error, attempt, deadline)
                else:
                    self._away_since = math.inf
                    raise
            except InputError:
                wrong += 1  # bytes that arrived, but are not those of the sample
                if wrong == _WRONG_TRIES:
                    raise
            except Exception as error:
                self._refuse(name, error, attempt, min(began, self._failed(tried)) + self._patience + extra_seconds)
            pause = min(_PAUSE_SECONDS * 2.0 ** min(attempt - 1, 10), _LONGEST_PAUSE)
            # By chance, so that all threads of all ranks do not come back at the same moment.
            time.sleep(min(pause, self._patience / 10) * random.uniform(0.5, 1.0))
        raise AssertionError

    def _once(self, request: Callable[[], Awaitable[T]], seconds: float) -> T:
        async def bounded() -> T:
            return await asyncio.wait_for(request(), seconds)

        # A second more, should a library swallow the cancellation.
        return asyncio.run_coroutine_threadsafe(bounded(), self._files.loop).result(seconds + 1)

    def _failed(self, tried: float) -> float:
        """Note that a request failed that began at `tried`; return since when all have."""
        # A failure of long ago, with no request after it, says nothing of today.
        recent = tried - self._last_failed < ATTEMPT_SECONDS + _LONGEST_PAUSE
        self._away_since = since = min(self._away_since, tried) if recent else tried
        self._last_failed = time.monotonic()
        return since

    def _refuse(self, name: str, error: BaseException, attempts: int, deadline: float) -> None:
        """Raise InputError for an error that no retry mends, or that comes after the deadline."""
        where, kind = self.where(name), type(error).__name__
        text = re.sub(r"\?[^\s'\"]*", "", str(error))[:200]  # without the signature of a signed URL
        said = f"{kind}: {text}" if text else kind
        if isinstance(error, PermissionError) or "Credentials" in kind or getattr(error, "status", 0) in (401, 403):
            raise StoreError(
                f"{where}: the store refuses access ({said}); check the credentials in the environment (AWS_...) and "
                "the rights of the bucket"
            ) from None
        if kind in ("ParamValidationError", "InvalidURL"):
            raise StoreError(f"{where}: not an address that the store takes ({said}); check the URL") from None
        if time.monotonic() >= deadline:
            raise StoreError(
                f"{where}: no answer for {self._patience:.0f} s ({attempts} tries here, the last: {said}); check the "
                "address and the network, then run the same command again (train.py with --resume)"
            ) from None


def _is_not_found(error: FileNotFoundError) -> bool:
    """Whether a web server said 404: fsspec calls each failure to ask for a file's size by the same name."""
    cause = error.__cause__
    return cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) == 404


def _is_past_end(error: Exception) -> bool:
    """Whether a store says that a file has no bytes where some were asked for (HTTP 416): it is too short."""
    return getattr(error, "status", 0) == 416 or (isinstance(error, OSError) and "range" in str(error).lower())
