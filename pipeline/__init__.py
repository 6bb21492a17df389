"""From shards to batches on the device: plan, draws, reader, graph, loader."""

import shard_tools  # noqa: F401 (it finds a place for Numba's cache)
