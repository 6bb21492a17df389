"""Fsspec's filesystems for the URLs of stores: their time-outs and ranged reads; retries are in remote.py."""

import errno
import importlib
import logging
from pathlib import Path
from typing import Any

from shard_tools.errors import InputError
from shard_tools.storage.presigned import SignedReads
from shard_tools.storage.request_errors import code_of, status_of
from shard_tools.storage.web_server import CONNECT_SECONDS, WebFiles, certificate_file

ATTEMPT_SECONDS = 15.0  # for one request; a chunk takes less at 5 Mbit/s
_CONNECTIONS = 64
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_ABSENT, _CHANGED, _PAST_END, _NOT_IMPLEMENTED = 404, 412, 416, 501


class BucketFiles:
    """Files by bucket/key. Its coroutines run in `loop`."""

    def __init__(self, files: Any, scheme: str) -> None:
        """`files` is fsspec's filesystem."""
        self._files, self.loop, self._scheme = files, files.loop, scheme
        self._signed_reads = SignedReads(files) if scheme == "s3" and not files.anon else None

    async def about(self, path: str) -> dict[str, Any]:
        """The store's metadata of a file: its `size`, and when it was written."""
        try:
            found: dict[str, Any] = await self._files._info(path)
            return found
        except Exception as error:
            if not code_of(error).isdigit() or status_of(error) not in (301, 400, 403):
                raise
            refusal = error
        # An answer to HEAD has no body that says why; an answer to GET has. (Outside the handler, so that an error of
        # the GET is not chained to the refusal.)
        await self._files._cat_file(path, start=0, end=1)
        raise refusal

    async def size(self, path: str) -> int:
        """Bytes of a file."""
        return int((await self.about(path))["size"])

    async def read(self, path: str, start: int, end: int) -> bytes:
        """The bytes from `start` to `end` (excluded); fewer, or none, where the file is shorter."""
        try:
            read = self._signed_reads.read if self._signed_reads else self._files._cat_file
            data: bytes = await read(path, start=start, end=end)
            return data
        except Exception as error:
            if status_of(error) == _PAST_END:
                return b""
            raise

    async def names(self, path: str) -> list[str]:
        """Paths of the direct entries of a folder."""
        found: list[str] = await self._files._ls(path, detail=False, refresh=True)
        return found

    async def put(self, source: Path, path: str) -> None:
        """Upload a file."""
        await self._files._put_file(str(source), path)

    async def write(self, path: str, data: bytes) -> None:
        """Write a small file in one request."""
        await self._files._pipe_file(path, data)

    async def write_if(self, path: str, data: bytes, version: str | None) -> str | None:
        """Write a small file if its version is still `version` (None: absent); return the new version, None if refused.

        Raises NotImplementedError where the store has no conditional writes.
        """
        if self._scheme != "s3":
            raise NotImplementedError
        bucket, key, _ = self._files.split_path(path)
        condition = {"IfMatch": version} if version else {"IfNoneMatch": "*"}
        try:
            answer = await self._files._call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except Exception as error:
            if status_of(error) == _NOT_IMPLEMENTED:
                raise NotImplementedError from error
            if status_of(error) in (_CHANGED, _ABSENT) and code_of(error) != "NoSuchBucket":
                return None
            raise
        return str(answer["ETag"])

    async def read_version(self, path: str) -> tuple[bytes, str]:
        """A small file from S3 and its version. Raises FileNotFoundError."""
        bucket, key, _ = self._files.split_path(path)
        try:
            answer = await self._files._call_s3("get_object", Bucket=bucket, Key=key)
        except FileNotFoundError as error:
            if code_of(error) == "NoSuchKey":
                raise FileNotFoundError(errno.ENOENT, "no such file in the store", path) from None
            raise
        async with answer["Body"] as body:
            return await body.read(), str(answer["ETag"])

    async def remove(self, path: str) -> None:
        """Delete a file."""
        await self._files._rm_file(path)

    async def remove_folder(self, path: str) -> None:
        """Delete a folder with all its files. Raises FileNotFoundError where there is none."""
        await self._files._rm(path, recursive=True)


def open_files(url: str) -> BucketFiles | WebFiles:
    """The files behind a URL, with credentials and address from the environment."""
    scheme = url.partition("://")[0]
    if scheme in ("http", "https"):
        return WebFiles(certificates=certificate_file("SSL_CERT_FILE") if scheme == "https" else None)
    import fsspec

    options = _s3_options() if scheme == "s3" else {}
    try:
        importlib.import_module(_PACKAGES[scheme])
        files = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError as error:
        package = _PACKAGES[scheme]
        raise InputError(f"{url}: {scheme}:// needs the package {package} ({error}); pip install {package}") from None
    files.retries = 1
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs each failure with its traceback
    return BucketFiles(files, scheme)


def _s3_options() -> dict[str, Any]:
    config = {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": ATTEMPT_SECONDS,
        "max_pool_connections": _CONNECTIONS,
        "signature_version": "s3v4",
        "retries": {"total_max_attempts": 1, "mode": "standard"},  # our own retries are bounded in time
    }
    # Botocore reads only AWS_CA_BUNDLE; one variable should serve both its requests and those to signed URLs.
    certificates = certificate_file("AWS_CA_BUNDLE", "SSL_CERT_FILE")
    return {"config_kwargs": config, "client_kwargs": {"verify": certificates} if certificates else {}}
