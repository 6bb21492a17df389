"""Pictures and pages of runs and predictions."""

import shard_tools  # noqa: F401 (it finds a place for matplotlib's cache)
