"""Tell folders from the URLs of stores, and check the URLs."""

import re
from pathlib import Path

from shard_tools.errors import InputError

REMOTE_SCHEMES = ("s3", "gs", "https", "http")


def is_remote(place: str | Path) -> bool:
    """Whether a place is the URL of a remote store, not a folder."""
    return isinstance(place, str) and "://" in place and not place.startswith("file://")


def local_folder(place: str | Path) -> Path:
    """The folder of a place that is not remote."""
    if isinstance(place, str) and place.startswith("file://"):
        folder = place.removeprefix("file://")
        if not folder.startswith("/"):
            raise InputError(f"{place}: expected file:///absolute/path")
        return Path(folder)
    return Path(place)


def check_url(url: str) -> str:
    """A store's URL without its last slash. Raises InputError if it is not one."""
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
