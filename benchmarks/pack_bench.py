"""How fast packing is beside `tar cf` of the same files: seconds, and pack's multiple of tar's.

    python benchmarks/pack_bench.py [--check]

`pack` reads, checks, hashes and writes every snippet, and syncs every shard to the disk; `tar cf` only copies, and
leaves its output to the page cache. So it is compared with two commands, `tar cf` alone, and `tar cf` and `sync`. All
take turns over the same files, which lie in the page cache; in between their output is removed and the disk synced.
The start of `pack` (Python and imports, a few seconds whatever the size) is timed too, by packing ten cadences: it is
negligible for the competition's 84 GB, but half of a short benchmark. The goal is for pack's multiple without it.
"""

import dataclasses
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tyro

from benchmarks.history import ROOT, record
from shard_tools.cadence import KAGGLE_SHAPE, npy_header
from shard_tools.errors import InputError
from shard_tools.kaggle_layout import LABELS
from shard_tools.system.command import run_command
from shard_tools.system.cores import usable_cores

GOAL = 2.0  # times the seconds of `tar cf` and `sync`
PACK, START, TAR, SYNCED = "shard_tools pack", "its start", "tar cf", "tar cf, sync"
_FEW = 10
_NOISE_VALUES = 1 << 23


@dataclass(frozen=True)
class PackBenchConfig:
    """Time `shard_tools pack` against `tar cf` of the same files."""

    cadences: int = 2000
    """Cadences to pack; each takes 0.84 MB as a snippet and again in each archive."""
    rounds: int = 5
    """Times that each command is run."""
    workers: int = usable_cores()
    """Threads of pack."""
    work_dir: Path = Path(tempfile.gettempdir())
    """A folder on the disk to be measured."""
    check: bool = False
    """Exit with 1 if pack takes more than twice as long as `tar cf` and `sync`."""
    check_margin: float = 1.0
    """Divides that limit; below 1 for machines that are busy with other work: 0.8 allows 2.5 times as long."""

    def __post_init__(self) -> None:
        if self.cadences < 10 * _FEW or self.rounds < 1 or self.check_margin <= 0:
            raise InputError(f"--cadences: expected at least {10 * _FEW}; --rounds, --check-margin: more than 0")


def write_cadences(
    root: Path, count: int, positive: int, shape: tuple[int, int, int] = KAGGLE_SHAPE, distinct: int | None = None
) -> None:
    """White noise in the Kaggle layout: `count` labelled snippets, the first `positive` of them with target 1.

    Only `distinct` of them (None: all) take space, the others are links to these; for packing it makes no difference.
    """
    noise = np.random.default_rng(0).standard_normal(_NOISE_VALUES, np.float32).astype(np.float16)
    header, values = npy_header(shape), int(np.prod(shape))
    places = np.random.default_rng(1).integers(0, len(noise) - values, count).tolist()
    paths: list[Path] = []
    for number, place in enumerate(places):
        path = root / "train" / f"{number % 16:x}" / f"{number % 16:x}{number:07d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        if distinct is not None and number >= distinct:
            os.link(paths[number % distinct], path)
        else:
            path.write_bytes(header + noise[place : place + values].tobytes())
        paths.append(path)
    rows = "".join(f"{path.stem},{int(number < positive)}\n" for number, path in enumerate(paths))
    (root / LABELS).write_text("id,target\n" + rows)


def pack_seconds(config: PackBenchConfig, data: Path, out: Path) -> float:
    """Seconds of the whole command; every shard is on the disk when it ends."""
    words = [sys.executable, "-m", "shard_tools", "pack", "--input", str(data), "--out", str(out)]
    return _seconds([*words, "--workers", str(config.workers)])


def tar_seconds(data: Path, out: Path, sync: bool) -> float:
    """Seconds of `tar cf`, with `sync` of its archive if asked for."""
    out.mkdir()
    archive = str(out / "all.tar")
    seconds = _seconds(["tar", "cf", archive, "-C", str(data), "."])
    return seconds + (_seconds(["sync", archive]) if sync else 0.0)


def _seconds(words: list[str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise InputError(f"{' '.join(words[:4])}: exit code {done.returncode}: {done.stderr.strip()[-400:]}")
    return seconds


def measure(config: PackBenchConfig, folder: Path) -> dict[str, list[float]]:
    """Seconds of each command in each round."""
    data, few, out = folder / "data", folder / "few", folder / "out"
    # Of both classes at least one for each of the five folds.
    write_cadences(data, config.cadences, config.cadences // 4)
    write_cadences(few, _FEW, _FEW // 2)
    os.sync()
    ways: dict[str, Callable[[], float]] = {
        PACK: lambda: pack_seconds(config, data, out),
        START: lambda: pack_seconds(config, few, out),
        TAR: lambda: tar_seconds(data, out, sync=False),
        SYNCED: lambda: tar_seconds(data, out, sync=True),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, config.rounds):  # the first warms up
        names = list(ways)
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            seconds = ways[name]()
            shutil.rmtree(out)
            os.sync()  # so that unwritten data of one run do not slow the next
            if turn >= 0:
                found[name].append(seconds)
    return found


def to_figures(config: PackBenchConfig, found: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A figure for each way; pack is compared with tar in the same round."""
    figures = []
    for name, seconds in found.items():
        figure: dict[str, Any] = {"workload": "pack", "way": name, "seconds": statistics.median(seconds)}
        figure |= {"lowest": min(seconds), "highest": max(seconds)}
        if name != START:
            figure["cadences_per_s"] = config.cadences / figure["seconds"]
        if name in (TAR, SYNCED):
            whole = [pack / tar for pack, tar in zip(found[PACK], seconds, strict=True)]
            rounds = zip(found[PACK], found[START], seconds, strict=True)
            bare = [(pack - start) / tar for pack, start, tar in rounds]
            figure |= {"multiple_with_start": statistics.median(whole), "multiple": statistics.median(bare)}
            figure |= {"lowest_multiple": min(bare), "highest_multiple": max(bare)}
        figures.append(figure)
    return figures


def above_goal(figures: list[dict[str, Any]], margin: float) -> bool:
    """Whether pack takes longer than its goal allows, compared with `tar cf` and `sync`."""
    (synced,) = (figure for figure in figures if figure["way"] == SYNCED)
    return bool(synced["multiple"] > GOAL / margin)


def print_table(figures: list[dict[str, Any]]) -> None:
    """One line for each way."""
    print(
        f"{'':<18}{'seconds: median (range)':<26}{'cadences/s':>11}  pack's multiple, start left out (range); with it"
    )
    for figure in figures:
        seconds = f"{figure['seconds']:.2f} ({figure['lowest']:.2f} to {figure['highest']:.2f})"
        rate = f"{figure['cadences_per_s']:,.0f}" if "cadences_per_s" in figure else ""
        multiple = (
            f"{figure['multiple']:.2f} ({figure['lowest_multiple']:.2f} to {figure['highest_multiple']:.2f}); "
            f"{figure['multiple_with_start']:.2f}"
            if "multiple" in figure
            else ""
        )
        print(f"{figure['way']:<18}{seconds:<26}{rate:>11}  {multiple}".rstrip())


def main(config: PackBenchConfig) -> int:
    """Measure, print a table, record it; return the exit code."""
    print(
        f"{config.cadences:,} cadences of 0.84 MB, {config.workers} threads, {usable_cores()} cores, load "
        f"{os.getloadavg()[0]:.1f} before the start, page cache warm; median of {config.rounds} rounds (range)"
    )
    with tempfile.TemporaryDirectory(dir=config.work_dir) as name:
        figures = to_figures(config, measure(config, Path(name)))
    print_table(figures)
    record("pack", dataclasses.asdict(config), figures)
    if config.check and above_goal(figures, config.check_margin):
        print(f"error: pack took more than {GOAL:g} times as long as tar cf and sync", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(tyro.cli(PackBenchConfig))))
