"""Several stores read as one: a file of store number n is named `n/name`, so that names may repeat between stores."""

from collections.abc import Iterator, Sequence

from shard_tools.storage.base import Bytes, Check, Store


def joined_name(number: int, name: str) -> str:
    """The name, in a JoinedStore, of a file of one of its stores."""
    return f"{number}/{name}"


class JoinedStore:
    """Stores side by side. Each keeps its own cache and its own path or URL in error messages."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self._stores = tuple(stores)

    @property
    def root(self) -> str:
        """All folders and URLs, in order."""
        return ", ".join(str(store.root) for store in self._stores)

    @property
    def is_remote(self) -> bool:
        """Whether reads from any of the stores are requests."""
        return any(store.is_remote for store in self._stores)

    def where(self, name: str) -> str:
        """The file's path or URL in its own store."""
        store, own_name = self._find(name)
        return store.where(own_name)

    def identify(self, identity: str) -> None:
        """Nothing to do: each store was told the identity of its own data set when it was opened."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is no such file."""
        store, own_name = self._find(name)
        return store.size(own_name)

    def read_record(self, name: str, offset: int, parts: Sequence[Bytes], check: Check) -> None:
        """See Store."""
        store, own_name = self._find(name)
        store.read_record(own_name, offset, parts, check)

    def chunks(self, name: str) -> Iterator[bytes]:
        """A whole file, piece by piece."""
        store, own_name = self._find(name)
        return store.chunks(own_name)

    def _find(self, name: str) -> tuple[Store, str]:
        number, _, own_name = name.partition("/")
        return self._stores[int(number)], own_name
