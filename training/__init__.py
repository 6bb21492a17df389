"""From batches to weights and scores: configuration, model, run, checkpoints, cross-validation, prediction, metrics."""

import shard_tools  # noqa: F401 (it finds a place for Numba's cache)
