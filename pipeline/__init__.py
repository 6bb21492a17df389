"""From shards to batches on the device. `open_loader` is what other programs call.

Before any work on a batch starts, the iterating thread decides which sample comes next (plan.py) and what happens to it
(augment.py, which also computes the weights of CutMix and mixup targets); planner.py puts both together for a batch.
These decisions are pure: they depend on the table of samples, the settings, the seed and the place in the epoch, never
on threads or timing.

The loader's worker threads read the samples (reader.py), or with the CPU engine read them and make their images
(cpu_engine.py). They decide nothing. The iterating thread replaces a sample that cannot be read (bad_samples.py).
CONTRIBUTING.md names the threads of other parts of the program.

Two engines make images, with the same steps:

- dali_engine.py with dali_graph.py: on a GPU, DALI makes all images of a batch at once
- cpu_engine.py with cpu_canvas.py and cpu_kernels.py: on a CPU, each worker thread takes one sample at a time from the
  shard to the image, through compiled kernels

A third engine, raw_batches.py, makes no images: it hands out snippets as they are.

The steps, and the functions that do them:

    step                dali_graph.py                         cpu_kernels.py
    choice of panels    _select_panels                        in write_eval_image and _sum_and_add_signals
    float16 to float32  _select_panels                        _to_float32, in _sum_time_bins
    sum_time_bins       _sum_time_bins                        _sum_time_bins; _sum_rows if signals were added before
    add_signal          _add_signals, _normalise_where_added  _add_signals, _normalise, in _sum_and_add_signals
    subtract_means      _subtract_means                       _subtract_means
    normalise           _normalise                            _normalise, in _normalise_and_compress
    compress            _compress                             _compress, in _normalise_and_compress
    augment             _augment                              _augment
    mix                 _mix                                  _mix
    resize              _resize, which also stacks planes     _resize_rows, which also stacks planes; _resize_columns
    make_views          _make_views                           make_views of cpu_canvas.py

augment flips, rolls, shifts, scales and erases; mix is CutMix or mixup. With DrawConfig.needles, signals are added
before time bins are summed, and their panels normalised again; with DrawConfig.inject, signals are added after that.
CanvasConfig (canvas.py) and DrawConfig (augment.py) configure the steps. loader.py iterates, computes the targets and
keeps the state.
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
