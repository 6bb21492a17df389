"""A few rows of a table of contents, small enough to be sent to the process that handles them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from shard_tools.manifest import COLUMNS, Int64s, Manifest


def only_rows(manifest: Manifest, rows: Int64s) -> Manifest:
    """A manifest of some rows, in their order, and of the shards in which they lie; its counts stay those of all."""
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
