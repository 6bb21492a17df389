"""Fsspec's filesystems for the URLs of stores: how long they wait, how they read ranges; retries are not theirs."""

import importlib
from collections.abc import Awaitable, Callable
from typing import Any

from shard_tools.errors import InputError

ATTEMPT_SECONDS = 15.0  # for one request; a chunk takes less at 5 Mbit/s
_CONNECT_SECONDS = 5.0
_CONNECTIONS = 64
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp", "http": "aiohttp"}


def open_filesystem(url: str) -> Any:
    """Fsspec's filesystem for a URL, with credentials and address from the environment."""
    import fsspec

    scheme = url.partition("://")[0]
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "s3":
        options["config_kwargs"] = {
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": ATTEMPT_SECONDS,
            "max_pool_connections": _CONNECTIONS,
            "signature_version": "s3v4",
            "retries": {"total_max_attempts": 1, "mode": "standard"},  # ours are bounded in time
        }
    try:
        importlib.import_module(_PACKAGES[scheme])
        if scheme.startswith("http"):
            options["client_kwargs"] = _client_options()
        files = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        package = _PACKAGES[scheme]
        raise InputError(f"{url}: {scheme}:// needs the package {package} ({error}); pip install {package}") from None
    files.retries = 1
    return files


def _client_options() -> dict[str, Any]:
    """Of aiohttp's session: a buffer for a whole sample, so that a read is not stopped and started on its way."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(None, sock_connect=_CONNECT_SECONDS)
    return {"timeout": timeout, "read_bufsize": 1 << 21, "trust_env": True}


def reads_of(files: Any, scheme: str) -> Callable[[str, int, int], Awaitable[bytes]]:
    """How ranges of a filesystem's files are read."""

    async def read(path: str, start: int, end: int) -> bytes:
        data: bytes = await files._cat_file(path, start=start, end=end)
        return data

    if scheme != "s3" or files.anon:
        return read
    from shard_tools.signed import SignedReads

    return SignedReads(files, _client_options()).read
