"""Storage of shards in a local folder or a remote store: ranged reads, writes of whole files."""

from pathlib import Path
from typing import TYPE_CHECKING

from shard_tools.errors import InputError
from shard_tools.storage.address import check_url, is_remote, local_folder
from shard_tools.storage.base import Store, StoreConfig
from shard_tools.storage.local import LocalStore

if TYPE_CHECKING:
    from shard_tools.storage.remote import RemoteStore


def open_store(place: str | Path, config: StoreConfig = StoreConfig()) -> Store:  # noqa: B008 (immutable)
    """The store behind a path or a URL. Raises InputError where the URL is of an unsupported kind."""
    return open_remote(str(place), config) if is_remote(place) else LocalStore(local_folder(place))


def open_remote(url: str, config: StoreConfig) -> "RemoteStore":
    """The remote store behind a URL. Raises InputError where the URL is of an unsupported kind."""
    try:
        from shard_tools.storage.remote import RemoteStore  # its libraries are slow to import, and folders need none
    except ImportError as error:
        raise InputError(f"{url}: remote stores need more packages ({error}); pip install fsspec aiohttp") from None
    return RemoteStore(check_url(url), config)
