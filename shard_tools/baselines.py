"""Trivial statistics of a cadence, which ignore the shape of signals: a detector has to beat these."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from shard_tools.cadence import OFF_POSITIONS, ON_POSITIONS
from shard_tools.manifest import Int64s, Manifest
from shard_tools.sample import read_snippet_of

STATISTICS: dict[str, Callable[[npt.NDArray[np.float32]], float]] = {
    "mean": lambda panels: float(panels.mean()),
    "maximum": lambda panels: float(panels.max()),
    "variance": lambda panels: float(panels.var()),
}


def trivial_scores(snippet: npt.NDArray[np.float16]) -> dict[str, float]:
    """Each statistic of the ON panels minus that of the OFF panels, for a snippet (P, T, F)."""
    values = snippet.astype(np.float32)
    on, off = values[list(ON_POSITIONS)], values[list(OFF_POSITIONS)]
    return {name: statistic(on) - statistic(off) for name, statistic in STATISTICS.items()}


def read_trivial_auc(manifest: Manifest, rows: Int64s) -> dict[str, float]:
    """ROC AUC of every trivial statistic over `rows`, with the sign that makes it larger (0.5 to 1)."""
    from sklearn.metrics import roc_auc_score  # slow to import

    scores = [trivial_scores(read_snippet_of(manifest, row)) for row in rows.tolist()]
    target = manifest.target[rows]
    found = {name: float(roc_auc_score(target, [score[name] for score in scores])) for name in STATISTICS}
    return {name: max(auc, 1 - auc) for name, auc in found.items()}
