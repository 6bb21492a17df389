"""From shards to batches on the device. `open_loader` is what other programs call.

Before any work on a batch starts, the iterating thread decides which sample comes next (plan.py) and what happens to it
(augment.py, which also computes the weights of CutMix and mixup targets); planner.py puts both together for a batch.
These decisions are pure: they depend on the table of samples, the settings, the seed and the place in the epoch, never
on threads or timing.

Worker threads read the samples (reader.py), or with the CPU engine read them and make their images (cpu_engine.py).
They decide nothing. The iterating thread replaces a sample that cannot be read (bad_samples.py).

Two engines make images, with the same steps under the same names:

- dali_engine.py with dali_graph.py: on a GPU, DALI makes all images of a batch at once
- cpu_engine.py with cpu_canvas.py and cpu_kernels.py: on a CPU, each worker thread takes one sample at a time from the
  shard to the image, through compiled kernels

A third engine, raw_batches.py, makes no images: it hands out snippets as they are.

The steps are sum_time_bins (float16 to float32, and the choice of panels), add_signal, subtract_means, normalise,
compress, augment (flip, roll, shift, gain and offset, erase), mix (CutMix, mixup), resize (stack and resize) and
make_views; CanvasConfig (canvas.py) and DrawConfig (augment.py) configure them. loader.py iterates, computes the
targets and keeps the state.
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
