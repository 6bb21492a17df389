"""Compiles the CPU engine's kernels while torch is loaded and the shards are opened, where no cache has them yet.

In a process of its own, which fills the cache (kernel_cache.py): Numba compiles under Python's lock, so that a thread
would take its time from what it should run beside.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.kernel_cache import is_cached
from shard_tools.cores import usable_cores

Kernel = Literal["train", "eval"]
_GPU = Path("/dev/nvidiactl")  # where it exists DALI makes the images, unless asked otherwise
_ROOT = Path(__file__).parents[1]
_PR_SET_PDEATHSIG = 1  # of prctl.h
_LONGEST = 120.0  # seconds to wait, from its start on
_process: subprocess.Popen[bytes] | None = None
_began = 0.0


def start(kernels: Sequence[Kernel]) -> None:
    """Begin to compile, in this order, unless a GPU makes the images, or all are in the cache, or it saves no time."""
    global _process, _began
    words = {word.rpartition("=")[2] for word in sys.argv}
    if words & {"dali", "-h", "--help"} or _GPU.exists():
        return
    if usable_cores() < 2 or os.environ.get("LOCAL_RANK", "0") != "0":  # the first rank compiles for its machine
        return
    try:
        from pipeline import cpu_kernels
    except ImportError:  # a machine with a GPU may lack Numba
        return
    compiled: dict[Kernel, Any] = {"train": cpu_kernels.write_train_images, "eval": cpu_kernels.write_eval_image}
    if all(is_cached(compiled[name]) for name in kernels):
        return
    command = [sys.executable, "-m", "pipeline.compile_ahead", str(os.getpid()), *kernels]
    nothing = subprocess.DEVNULL
    _began = time.monotonic()
    with contextlib.suppress(OSError):  # then they are compiled when they are needed
        _process = subprocess.Popen(command, cwd=_ROOT, stdin=nothing, stdout=nothing, stderr=nothing)  # noqa: S603


def wait() -> None:
    """Wait until what was begun is in the cache, or takes too long. May be called from any thread."""
    if _process is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            _process.wait(max(0.0, _began + _LONGEST - time.monotonic()))


def compile_kernels(kernels: Sequence[str]) -> None:
    """Call kernels once, with the types of arguments that they are always called with."""
    from pipeline.augment import DrawConfig, draw
    from pipeline.canvas import CanvasConfig
    from pipeline.cpu_canvas import CpuCanvas
    from pipeline.randomness import EpochPart

    canvas, shape = CanvasConfig("on_off", 28, 56, sum_time_bins=2), (6, 14, 56)
    images = CpuCanvas(canvas, shape)
    snippets, image = np.zeros((1, *shape), np.float16), np.zeros(images.image_shape, np.float32)
    for name in kernels:
        if name == "eval":
            images.write_eval_image(snippets[0], image)
        else:
            draws = draw(DrawConfig(), canvas, images.planes, EpochPart(0, 0, np.arange(1), 1))
            images.write_train_images(snippets, draws, [0], [image])


def _end_with(parent: int) -> None:
    """Have the system end this process when its parent ends, however that does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()


if __name__ == "__main__":
    _end_with(int(sys.argv[1]))
    compile_kernels(sys.argv[2:])
