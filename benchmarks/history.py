"""The log of benchmarks: one JSON line a run in benchmarks/results/history.jsonl, which benchmarks/report.py draws.

A line holds benchmark, time (UTC), commit, machine, versions, config and figures. The environment variable
NEEDLESTREAM_HISTORY names another file, NEEDLESTREAM_COMMIT the commit of a working tree without git.
"""

import fcntl
import json
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shard_tools.atomic_files import naming
from shard_tools.errors import InputError
from training.system_info import describe_machine, output_of, versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HISTORY = Path(os.environ.get("NEEDLESTREAM_HISTORY", RESULTS / "history.jsonl"))
# Packages that a rate may depend on.
PACKAGES = (
    "torch", "torchvision", "nvidia-dali", "timm", "accelerate", "numpy", "webdataset", "mosaicml-streaming",
    "litdata", "spdl", "spdl-core", "spdl-io", "ffcv", "torchdata", "grain", "lightning",
)  # fmt: skip
_FIELDS = {
    "benchmark": str, "time": str, "commit": str, "machine": dict, "versions": dict, "config": dict, "figures": list,
}  # fmt: skip
# The folders of an absolute path; not of a URL, a unit such as cadences/s, or a ratio such as both / model.
_FOLDERS = re.compile(r"(?<![\w/.)<~])(?:file://)?/(?:[^\s/'\",;<>]+/)+(?=[^\s/'\",;<>])")
_GIT = ("git", "--no-optional-locks", "-C", str(ROOT))


def record(
    benchmark: str, config: Mapping[str, Any], figures: Sequence[Mapping[str, Any]], path: Path = HISTORY
) -> dict[str, Any]:
    """Append one line to the history and return what it holds.

    Figures are flat: names to numbers, words or None. Raises ValueError if one is not finite, and InputError if the
    history's last line is cut short, as nothing can be added after it.
    """
    entry = {
        "benchmark": benchmark,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": describe_machine(),
        "versions": versions(PACKAGES),
        "config": {name: _published(value) for name, value in config.items()},
        "figures": [{name: _without_folders(value) for name, value in figure.items()} for figure in figures],
    }
    line = json.dumps(entry, allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # released when it is closed
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                raise InputError(f"{path}: its last line is cut short; remove that line, then run again")
            # One write, so that readers see the whole line or nothing of it.
            if os.write(descriptor, line) != len(line):
                os.ftruncate(descriptor, size)
                raise InputError(f"{path}: the disk is full; free some space and run again")
        finally:
            os.close(descriptor)
    written: dict[str, Any] = json.loads(line)
    return written


def read(path: Path = HISTORY) -> list[dict[str, Any]]:
    """Every entry of a history, oldest first. Raises InputError naming the file and the line that is damaged."""
    if not path.is_file():
        raise InputError(f"{path}: no history yet; run a benchmark first, such as benchmarks/loader_bench.py")
    lines = path.read_bytes().split(b"\n")
    if lines.pop():
        raise InputError(f"{path}, line {len(lines) + 1}: cut short; remove it")
    return [_entry(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _entry(line: bytes, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); remove or mend it") from None
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected an object, found {type(entry).__name__}")
    for name, kind in _FIELDS.items():
        if not isinstance(entry.get(name), kind):
            raise InputError(f"{where}: {name}: expected {kind.__name__}, found {str(entry.get(name))[:60]!r}")
    flat = all(
        isinstance(figure, dict) and not any(isinstance(value, dict | list) for value in figure.values())
        for figure in entry["figures"]
    )
    if not flat:
        raise InputError(f"{where}: figures: expected flat objects")
    return entry


def commit() -> str:
    """The commit of the working tree, with + if tracked files differ from it; "unknown" without git."""
    head = output_of(*_GIT, "rev-parse", "HEAD")
    if not head:
        return os.environ.get("NEEDLESTREAM_COMMIT", "unknown")
    # Results are stored with the code, but are not part of what was measured.
    changes = output_of(*_GIT, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return head + ("+" if changes else "")


def _published(value: Any) -> Any:
    """A value of a configuration as JSON; of a path only its last part, since histories are published."""
    if isinstance(value, Mapping):
        return {str(name): _published(part) for name, part in value.items()}
    if isinstance(value, list | tuple | set):
        return [_published(part) for part in value]
    if isinstance(value, Path):
        return value.name
    return _without_folders(value) if isinstance(value, str | int | float | bool | None) else str(value)


def _without_folders(value: Any) -> Any:
    """A text with only the last part of each absolute path in it; any other value as it is."""
    return _FOLDERS.sub("", value) if isinstance(value, str) else value
