"""From batches to weights and scores: configuration, model, run, checkpoints, cross-validation, prediction, metrics.

`load_model` and `predict` are the API for other programs.
"""

from typing import TYPE_CHECKING, Any

import shard_tools  # noqa: F401 (it finds a place for Numba's cache)

if TYPE_CHECKING:
    from training.prediction import load_model, predict

__all__ = ["load_model", "predict"]


def __getattr__(name: str) -> Any:
    """Import the functions of `__all__` on first use, since they load torch."""
    if name in __all__:
        from training import prediction

        return getattr(prediction, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
