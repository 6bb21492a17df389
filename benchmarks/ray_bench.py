"""How much Ray clusters of one and of two nodes do per second, what a task costs, and an estimate for 100 nodes.

    python benchmarks/ray_bench.py

Nodes have one core each, all on this machine and on loopback: it needs two idle cores. One node and two nodes are two
clusters, one started after the other. Prints the tables of docs/scaling.md in Markdown.
"""

import dataclasses
import importlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from benchmarks.history import record
from benchmarks.pack_bench import write_cadences
from shard_tools.errors import InputError
from shard_tools.observation.ingest import ingest
from shard_tools.observation.ingest_config import IngestConfig
from shard_tools.observation.opening import read_header
from shard_tools.observation.simulate import SimulateObservationConfig, simulate_observation
from shard_tools.pack import PackConfig, pack
from shard_tools.system.command import run_command
from shard_tools.tasks.base import Need, TaskConfig, Work
from shard_tools.tasks.local import InTurn
from shard_tools.tasks.opening import open_tasks
from shard_tools.verify import verify

CADENCE_BYTES = 838_656  # one snippet of the competition
_NODES, _CORES, _NETWORK = 100, 16, 1.25e9  # of the estimate: nodes; cores and bytes/s of each node (10 Gbit/s)
_PETABYTE = 1e15
# Of a fine product: coarse channels of 2.93 MHz with 2^20 channels each, 16 spectra of 18.25 s, float32; a scan takes
# 5 minutes and 30 s to the next (docs/observations.md).
_COARSE_MHZ, _COARSE_BYTES, _SCAN_S = 2.9297, 16 * 4 * 2**20, 330.0
_BANDS_MHZ = {"L (1.1 to 1.9 GHz)": 800.0, "C (4 to 8 GHz)": 4000.0}
_DAY_S = 86400.0


@dataclass(frozen=True)
class RayBenchConfig:
    """Time pack, verify and ingest here, and on Ray with one node and with two."""

    cadences: int = 8000
    """Cadences to pack and verify."""
    coarse_channels: int = 64
    """Coarse channels, of 131,072 channels each, of the cadence to ingest."""
    tasks: int = 5000
    """Empty tasks, by which the cost of one is measured; it includes a share of the seconds that connecting takes."""
    rounds: int = 3
    """Times that each kind of work is run."""
    work_dir: Path = Path(tempfile.gettempdir())
    """A folder on the disk to be measured."""

    def __post_init__(self) -> None:
        if min(self.cadences, self.coarse_channels, self.tasks, self.rounds) < 1:
            raise InputError("--cadences, --coarse-channels, --tasks, --rounds: expected at least 1")


@dataclass(frozen=True)
class Figure:
    """Seconds of one kind of work in one place, one number per round."""

    work: str
    place: str
    seconds: list[float]
    count: int
    unit: str

    @property
    def rate(self) -> float:
        """Units per second, by the median of the rounds."""
        return self.count / statistics.median(self.seconds)

    def flat(self) -> dict[str, Any]:
        """The figure that the history keeps."""
        about = {"workload": "ray", "work": self.work, "place": self.place, "unit": self.unit, "rate": self.rate}
        seconds = {
            "seconds": statistics.median(self.seconds),
            "lowest": min(self.seconds),
            "highest": max(self.seconds),
        }
        return about | seconds


def nothing() -> None:
    """A task that does nothing, so that only the cost of starting it is left."""


def time_works(
    config: RayBenchConfig, folder: Path, observation: Sequence[Path], place: str, where: TaskConfig
) -> list[Figure]:
    """Every kind of work in one place; `observation` has the six files to ingest, in their order."""
    out = folder / "out"
    packing = PackConfig(folder / "data", str(out), workers=1, shard_mb=32, tasks=where)
    ingesting = IngestConfig(str(out), tuple(observation), workers=1, shard_mb=8, tasks=where)
    works: dict[str, tuple[Callable[[], object], int, str]] = {
        "pack": (lambda: pack(packing), config.cadences, "cadences"),
        "verify": (lambda: list(verify(folder / "packed", where=where)), config.cadences, "cadences"),
        "ingest": (lambda: ingest(ingesting), raw_bytes(observation), "bytes"),
        "empty tasks": (lambda: run_empty(config, where), config.tasks, "tasks"),
    }
    figures = []
    for name, (run, count, unit) in works.items():
        seconds = []
        for turn in range(-1, config.rounds):  # the first warms up
            began = time.perf_counter()
            run()
            seconds += [time.perf_counter() - began] * (turn >= 0)
            shutil.rmtree(out, ignore_errors=True)
            os.sync()  # so that unwritten data of one run do not slow the next
        figures.append(Figure(name, place, seconds, count, unit))
    return figures


def raw_bytes(files: Sequence[Path]) -> int:
    """Bytes of the files' values as float32, however they are compressed; a telescope's day is stated in these too."""
    layouts = [read_header(path).layout for path in files]
    return sum(4 * layout.spectra * layout.channels for layout in layouts)


def run_empty(config: RayBenchConfig, where: TaskConfig) -> None:
    """Connect, and run tasks that do nothing."""
    work = Work(nothing, [()] * config.tasks, "", "tasks", [""] * config.tasks, Need(1))
    with open_tasks(where, InTurn()) as tasks:
        for done in tasks.run(work):
            done.result()


def measure(config: RayBenchConfig, folder: Path) -> list[Figure]:
    """All figures: in this process, on one node, on two."""
    cluster = importlib.import_module("tests.ray_nodes").cluster  # needs Ray
    write_cadences(folder / "data", config.cadences, config.cadences // 4)
    observation = simulate_observation(
        SimulateObservationConfig(folder / "observation", coarse_channels=config.coarse_channels, nfpc=1 << 17)
    )
    pack(PackConfig(folder / "data", str(folder / "packed"), workers=1, shard_mb=32))
    figures = time_works(config, folder, observation, "one process, no Ray", TaskConfig())
    for number in (1, 2):
        with cluster() as nodes:
            nodes.start_head()
            for _ in range(1, number):
                nodes.add()
            place = f"Ray, {number} node" + "s" * (number > 1)
            figures += time_works(config, folder, observation, place, TaskConfig("ray", nodes.address))
    return figures


def print_measured(figures: Sequence[Figure]) -> None:
    """One line for each kind of work and place."""
    print("| work | where | seconds: median (range) | rate |\n|---|---|---|---|")
    for figure in figures:
        low, high = min(figure.seconds), max(figure.seconds)
        rate = (
            f"{figure.rate / 1e6:,.0f} MB/s of float32"
            if figure.unit == "bytes"
            else f"{figure.rate:,.0f} {figure.unit}/s"
        )
        seconds = f"{statistics.median(figure.seconds):.2f} ({low:.2f} to {high:.2f})"
        print(f"| {figure.work} | {figure.place} | {seconds} | {rate} |")


def print_on_paper(figures: Sequence[Figure]) -> None:
    """Print an estimate for 100 nodes of 16 cores, if only the limits named in it apply."""
    two = {figure.work: figure for figure in figures if figure.place == "Ray, 2 nodes"}
    one = {figure.work: figure for figure in figures if figure.place == "Ray, 1 node"}
    core = {name: figure.rate / 2 for name, figure in two.items()}
    cores, network = _NODES * _CORES, _NODES * _NETWORK
    packing = min(cores * core["pack"] * CADENCE_BYTES, network / 2)  # in and out
    print(f"\nEstimated, not measured: {_NODES} nodes of {_CORES} cores, {_NETWORK * 8 / 1e9:g} Gbit/s each:\n")
    print("| what | value |\n|---|---|")
    print(f"| cost of an empty task, through the whole cluster | {1e3 / two['empty tasks'].rate:.1f} ms |")
    print(f"| empty tasks that one driver starts a second | {two['empty tasks'].rate:,.0f} |")
    gain = two["pack"].rate / one["pack"].rate
    print(
        f"| pack: cores alone, each as fast as one of two (two nodes gave {gain:.2f} times one) "
        f"| {cores * core['pack'] * CADENCE_BYTES / 1e9:,.0f} GB/s |"
    )
    print(f"| pack: network alone, in and out | {network / 2 / 1e9:,.0f} GB/s |")
    print(f"| a petabyte packed | {_PETABYTE / packing / 3600:,.1f} h |")
    for megabytes in (256, 2000):
        shards = _PETABYTE / (megabytes * 1e6)
        needed = packing / (megabytes * 1e6)
        print(f"| its shards of {megabytes} MB; tasks and uploads a second | {shards:,.0f}; {needed:,.0f} |")
    for band, width in _BANDS_MHZ.items():
        day = width / _COARSE_MHZ * _COARSE_BYTES * _DAY_S / _SCAN_S
        hours = day / core["ingest"] / 3600
        print(
            f"| a day of Green Bank, {band}, fine product | {day / 1e12:,.1f} TB, {hours:,.1f} core hours to ingest |"
        )


def main(config: RayBenchConfig) -> int:
    """Measure, print the tables, record the figures; return the exit code."""
    print(
        f"load {os.getloadavg()[0]:.1f} before the start, page cache warm; median of {config.rounds} rounds (range)\n"
    )
    with tempfile.TemporaryDirectory(dir=config.work_dir) as name:
        figures = measure(config, Path(name))
    print_measured(figures)
    print_on_paper(figures)
    record("ray", dataclasses.asdict(config), [figure.flat() for figure in figures])
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(tyro.cli(RayBenchConfig))))
