"""A few rows of a manifest, small enough to be sent to the process that handles them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from shard_tools.manifest import COLUMNS, Int64s, Manifest


def only_rows(manifest: Manifest, rows: Int64s) -> Manifest:
    """A manifest of `rows` alone, in that order, and of their shards; its counts remain those of the whole data set."""
    numbers, shard = np.unique(manifest.shard[rows], return_inverse=True)
    columns: dict[str, Any] = {name: getattr(manifest, name)[rows] for name in COLUMNS}
    columns["shard"] = shard.astype(manifest.shard.dtype)
    return replace(
        manifest,
        shards=tuple(manifest.shards[number] for number in numbers),
        files={},
        keys=pa.chunked_array(manifest.keys.take(pa.array(rows))),
        parts=(),
        **columns,
    )
