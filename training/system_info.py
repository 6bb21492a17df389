"""The machine that a command runs on, and the versions of its packages."""

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from shard_tools.system.cores import usable_cores

_SECONDS = 20  # for a command to answer


def describe_machine() -> dict[str, Any]:
    """CPU, cores, memory, GPU (None if there is none) and system."""
    gpus = (output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or "").splitlines()
    gpu, _, driver = gpus[0].rpartition(", ") if gpus else ("", "", "")
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": gpu or None,
        "gpus": len(gpus),
        "driver": driver or None,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of `packages`, as pip names them; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for distribution in distributions():
        name = distribution.name.lower()
        # DALI's name ends in the CUDA that it was built for.
        known = next((package for package in packages if name in (package, f"{package}-cuda{name[-3:]}")), None)
        if known:
            found.setdefault(known, distribution.version)  # the first on the path is the one that is imported
    return found


def output_of(*words: str) -> str | None:
    """What a command printed; None if it is not installed or does not succeed."""
    if shutil.which(words[0]) is None:
        return None
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS)  # noqa: S603 (our own commands)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.is_file() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
