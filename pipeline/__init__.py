"""From shards to batches on the device: plan, draws, reader, graph, loader.

`open_loader` is the way in for other programs.
"""

from typing import TYPE_CHECKING, Any

import shard_tools  # noqa: F401 (it finds a place for Numba's cache)

if TYPE_CHECKING:
    from pipeline.opening import open_loader

__all__ = ["open_loader"]


def __getattr__(name: str) -> Any:
    """`open_loader` when it is first asked for: it loads torch, which planning does not need."""
    if name == "open_loader":
        from pipeline.opening import open_loader

        return open_loader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
