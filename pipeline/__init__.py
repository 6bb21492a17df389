"""From shards to batches on the device. `open_loader` is what other programs call.

Which sample comes next is decided in plan.py, what happens to it in augment.py (with the weights of mixed targets), and
planner.py puts both together for one batch. All of this is pure: it depends on the table of samples, the settings, the
seed and the place in the epoch, never on threads or timing. The rest does what was planned: reader.py reads on threads,
and an engine makes the images:

- dali_engine.py with dali_graph.py: DALI on a GPU; threads only read
- cpu_engine.py with cpu_canvas.py and cpu_kernels.py: on a CPU, on threads, from reading to the image
- raw_batches.py: makes no images; hands out snippets as they are

Both engines do the same steps under the same names, each configured by CanvasConfig (canvas.py) or drawn (augment.py):
sum_time_bins (float16 to float32, and the choice of panels), add_signal, subtract_means, normalise, compress, augment
(flip, roll, shift, gain and offset, erase), mix (CutMix, mixup), resize (stack and resize), make_views. loader.py
iterates, computes the targets and keeps the state.
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
