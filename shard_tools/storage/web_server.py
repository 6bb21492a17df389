"""Ranged reads from web servers, with strict checks: many servers answer with a web page instead of the file."""

import contextlib
import functools
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
import yarl

from shard_tools.errors import InputError, StoreError
from shard_tools.storage.request_errors import StatusError

CONNECT_SECONDS = 5.0
_ENCODINGS = ("gzip", "x-gzip", "deflate", "br", "zstd", "compress")
_MISSING = (404, 410)
_PAST_END = 416
_PAGE_ADVICE = (
    "the server may require a sign-in, or lack the file: open the address in a browser, and give one that serves the "
    "files without a sign-in"
)
_RANGES_ADVICE = "choose a server that serves ranges (nginx, Apache and object stores do)"


class WebFiles:
    """Files by URL. Its coroutines run in `loop`, which fsspec runs on a thread of its own."""

    def __init__(self, encoded: bool = False, certificates: str | None = None) -> None:
        """`encoded`: URLs are percent-encoded. `certificates`: file of trusted authorities; None: the system's."""
        self._encoded = encoded
        # Fsspec's own methods don't tell 200 from 206, a page from a file, or a refusal from a missing file.
        # `get_client` is not a method: a reference cycle would keep the session open until garbage collection.
        client = functools.partial(_open_session, certificates)
        self._http = fsspec.filesystem("http", skip_instance_cache=True, get_client=client)
        self.loop = self._http.loop

    async def size(self, url: str) -> int:
        """Bytes of a file, found by reading its first byte, since some servers do not answer HEAD."""
        async with self._get(url, 0, 1) as answer:
            if answer.status == _PAST_END:
                return 0
            size = _total(answer)
            if size is None:
                raise StoreError(
                    f"{_plain(url)}: the server does not say its size (status {answer.status}); {_RANGES_ADVICE}"
                )
            if answer.status == 206:
                _check_no_page(url, await answer.read(), answer)
            return size

    async def read(self, url: str, start: int, end: int) -> bytes:
        """The bytes from `start` to `end` (excluded); fewer, or none, where the file is shorter."""
        async with self._get(url, start, end) as answer:
            if answer.status == _PAST_END:
                return b""
            if answer.status == 200 and (start or (answer.content_length or 0) > end):
                raise _ignores_ranges(url)
            data = await (_read_at_most(answer, end) if answer.content_length is None else answer.read())
            if len(data) > end - start:
                raise _ignores_ranges(url)
            if start == 0:
                _check_no_page(url, data, answer)
            return data

    @contextlib.asynccontextmanager
    async def _get(self, url: str, start: int, end: int) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to a ranged request: 200, 206 or 416."""
        session = await self._http.set_session()
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        async with session.get(yarl.URL(url, encoded=self._encoded), headers=headers) as answer:
            if answer.status in _MISSING:
                raise FileNotFoundError(2, "no such file in the store", _plain(url))
            if answer.status not in (200, 206, _PAST_END):
                raise StatusError(answer.status, answer.reason or "", answer.headers)
            if answer.status == 200 and answer.content_type == "text/html":
                raise _is_page(url, answer)
            if answer.headers.get("Content-Encoding", "").lower() in _ENCODINGS:
                raise StoreError(
                    f"{_plain(url)}: the server compresses its answers (Content-Encoding "
                    f"{answer.headers['Content-Encoding']}, status {answer.status}), so its byte ranges are not those "
                    "of the file; switch compression off for this folder"
                )
            yield answer


async def _open_session(certificates: str | None, **_: Any) -> aiohttp.ClientSession:
    context = ssl.create_default_context(cafile=certificates) if certificates else True
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=context),
        timeout=aiohttp.ClientTimeout(None, sock_connect=CONNECT_SECONDS),
        read_bufsize=1 << 21,  # holds a whole sample, so that reading does not pause midway
        trust_env=True,
    )


def certificate_file(*variables: str) -> str | None:
    """The file of trusted certificates that the first of some environment variables names; None where none is set."""
    for variable in variables:
        if path := os.environ.get(variable):
            if not Path(path).is_file():
                raise InputError(f"{variable}={path}: no such file; expected the certificates of trusted authorities")
            return path
    return None


def _total(answer: aiohttp.ClientResponse) -> int | None:
    """The length of the whole file, of which an answer may hold only a part."""
    if answer.status == 200:
        return answer.content_length
    said = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return int(said) if said.isdigit() else None


async def _read_at_most(answer: aiohttp.ClientResponse, most: int) -> bytes:
    """The body of an answer that does not state its length, up to one byte more than `most`."""
    data = bytearray()
    while len(data) <= most and (piece := await answer.content.read(most + 1 - len(data))):
        data += piece
    return bytes(data)


def _check_no_page(url: str, data: bytes, answer: aiohttp.ClientResponse) -> None:
    """Refuse data that begins like HTML or XML, which no file of a data set does."""
    if data.startswith(b"<"):
        raise _is_page(url, answer)


def _is_page(url: str, answer: aiohttp.ClientResponse) -> StoreError:
    return StoreError(
        f"{_plain(url)}: got a web page, not the file (status {answer.status}, {answer.content_type} from "
        f"{_plain(str(answer.url))}); {_PAGE_ADVICE}"
    )


def _ignores_ranges(url: str) -> StoreError:
    return StoreError(f"{_plain(url)}: the server ignores ranges (status 200 to a ranged request); {_RANGES_ADVICE}")


def _plain(url: str) -> str:
    """A URL without its query, which may hold a signature."""
    return url.partition("?")[0]
