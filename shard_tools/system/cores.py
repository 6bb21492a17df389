"""How many cores this process may use by its affinity and container quotas, not how many the machine has."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUP, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def bound_cores() -> int:
    """Cores that the system may run this process on: its affinity (`taskset`, cpusets, Slurm)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores(cgroup: Path = _CGROUP, mount: Path = _MOUNT) -> int:
    """The cores from `bound_cores`, or fewer if the container's CPU quota (control group) allows fewer; at least 1.

    `cgroup` and `mount` are where Linux describes control groups (man 7 cgroups); both versions are read. A quota of
    one and a half cores counts as two. joblib's count is not used: it is slower to import than this whole package, and
    ignores nested groups.
    """
    return max(1, min([bound_cores(), *map(math.ceil, _quotas(cgroup, mount))]))


def rank_cores() -> int:
    """This rank's share of the usable cores, where a launcher started several ranks on this machine; at least 1."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, usable_cores() // max(1, int(ranks) if ranks.isdecimal() else 1))


def _quotas(cgroup: Path, mount: Path) -> Iterator[float]:
    """The quotas, in cores, of this process's control groups, from its own up to the root."""
    for line in _read(cgroup).splitlines():
        _, controllers, path = line.split(":", 2)
        is_first_version = "cpu" in controllers.split(",")
        if controllers and not is_first_version:
            continue
        root = mount / "cpu" if is_first_version else mount
        group = root / path.lstrip("/")
        # A container may not see its group under the host's path, but always as the root.
        for folder in dict.fromkeys([group, *group.parents, root]):
            if folder.is_relative_to(root):
                yield from _quota(folder, is_first_version)


def _quota(folder: Path, is_first_version: bool) -> list[float]:
    if is_first_version:
        words = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    else:
        words = _read(folder / "cpu.max").split()
    quota, period = (int(word) if word.isdecimal() else 0 for word in (*words, "", "")[:2])  # "max" and -1: no limit
    return [quota / period] if quota and period else []


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
