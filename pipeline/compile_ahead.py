"""Compiles the CPU engine's kernels while torch is loaded and the shards are opened, if no cache has them yet.

A separate process compiles them into the cache (kernel_cache.py): Numba holds the GIL while it compiles, so a thread
would slow down what it should run beside.
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

from pipeline.kernel_cache import cached_signatures
from shard_tools.system.cores import usable_cores

Kernel = Literal["train", "train_with_signals", "eval"]
_GPU = Path("/dev/nvidiactl")  # where it exists DALI makes the images, unless asked otherwise
_ROOT = Path(__file__).parents[1]
_PR_SET_PDEATHSIG = 1  # of prctl.h
_LONGEST = 120.0  # `wait` gives up so many seconds after the process started
_process: subprocess.Popen[bytes] | None = None
_began = 0.0


def start(kernels: Sequence[Kernel]) -> None:
    """Begin to compile the kernels, in this order.

    Does nothing where a GPU makes the images, where all kernels are cached, or where it would save no time.
    """
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
    if all(_is_cached(cpu_kernels, name) for name in kernels):
        return
    command = [sys.executable, "-m", "pipeline.compile_ahead", str(os.getpid()), *kernels]
    nothing = subprocess.DEVNULL
    _began = time.monotonic()
    with contextlib.suppress(OSError):  # then they are compiled when they are needed
        _process = subprocess.Popen(command, cwd=_ROOT, stdin=nothing, stdout=nothing, stderr=nothing)  # noqa: S603


def training_kernels(words: Sequence[str]) -> tuple[Kernel, ...]:
    """The kernels that a training with this command line needs."""
    options = {word.partition("=")[0] for word in words}
    return ("train_with_signals" if options & {"--backgrounds", "--needles", "--inject"} else "train"), "eval"


def wait() -> None:
    """Wait until the kernels are in the cache, but not for too long. May be called from any thread."""
    if _process is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            _process.wait(max(0.0, _began + _LONGEST - time.monotonic()))


def compile_kernels(kernels: Sequence[str]) -> None:
    """Call kernels once, with the types of arguments that they are always called with."""
    from pipeline.augment import DrawConfig, draw
    from pipeline.canvas import CanvasConfig
    from pipeline.cpu_canvas import CpuCanvas, to_kernel_types
    from pipeline.randomness import EpochPart

    canvas, shape = CanvasConfig("on_off", 28, 56, sum_time_bins=2), (6, 14, 56)
    images = CpuCanvas(canvas, shape)
    snippets, image = np.zeros((1, *shape), np.float16), np.zeros(images.image_shape, np.float32)
    for name in kernels:
        if name == "eval":
            images.write_eval_image(snippets[0], image)
        else:
            config = DrawConfig(inject=float(name == "train_with_signals"))
            draws = draw(config, canvas, images.planes, EpochPart(0, 0, np.arange(1), 1))
            images.write_train_images(snippets, to_kernel_types(draws), [0], [image])


def _is_cached(module: Any, name: Kernel) -> bool:
    """Whether a kernel of `cpu_kernels` is in the cache; True too where that cannot be told."""
    signatures = cached_signatures(module.write_eval_image if name == "eval" else module.write_train_images)
    if signatures is None:
        return True
    with_signals = [module.SampleSignals.__name__ in signature for signature in signatures]
    return (name == "train_with_signals") in with_signals


def _end_with(parent: int) -> None:
    """Have the system end this process when its parent ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()


if __name__ == "__main__":
    _end_with(int(sys.argv[1]))
    compile_kernels(sys.argv[2:])
