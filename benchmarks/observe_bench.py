"""How fast and how well an observation is searched: seconds, memory, recall by place, and turboSETI's time beside ours.

    python benchmarks/observe_bench.py [--turbo-seti PYTHON] [--check]

Everything is measured on simulated files. Speed: one cadence of a few coarse channels of 2^20, by the commands that a
user types, in turns; files lie in the page cache. The start of `ingest` (Python and imports) is measured on a tiny
cadence and subtracted. turboSETI (FindDoppler) searches the same six files for the same drift rates, as many files at a
time as there are workers; PYTHON is an interpreter of an environment with requirements-turboseti.txt. Recall: a cadence
of many narrow coarse channels, so that many added needles lie at their borders and in the middle.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tyro

from benchmarks.commands import Spent, run, run_together
from benchmarks.history import record
from benchmarks.observe_goals import INGEST, SEARCH, START, TURBO_SETI, missed_goals
from shard_tools.errors import InputError
from shard_tools.observation.candidates_table import read_candidates
from shard_tools.observation.lines import TRUTH_TABLE, read_truth
from shard_tools.observation.recall import Found, RecallConfig, find_needles, group_needles
from shard_tools.observation.simulate import SimulateObservationConfig, simulate_observation
from shard_tools.system.command import run_command
from shard_tools.system.cores import usable_cores

_NARROW = 16384  # channels of a coarse channel where recall is measured
_TURBO_SETI = """
import sys
from turbo_seti.find_doppler.find_doppler import FindDoppler
for path in sys.argv[3:]:
    FindDoppler(path, max_drift=4, snr=10, out_dir=sys.argv[1], n_coarse_chan=int(sys.argv[2])).search()
"""


@dataclass(frozen=True)
class ObserveBenchConfig:
    """Time ingest and search of a simulated observation, beside turboSETI, and count which added needles are found."""

    coarse_channels: int = 3
    """Coarse channels of the cadence whose search is timed."""
    nfpc: int = 1 << 20
    """Fine channels in each of them."""
    rounds: int = 3
    """Times that each command is run."""
    workers: int = usable_cores()
    """Processes of ingest, and files that turboSETI searches at a time."""
    recall_channels: int = 64
    """Narrow coarse channels of the cadence to which needles are added."""
    needles: int = 190
    """Number of needles that are added."""
    weights: str = "none"
    """Weights of the search; none: the search alone."""
    turbo_seti: Path | None = None
    """Interpreter of an environment with turboSETI; unset: it is left out."""
    work_dir: Path = Path(tempfile.gettempdir())
    """A folder on the disk to be measured, with 1 GB for each coarse channel."""
    check: bool = False
    """Exit with 1 if a goal is missed."""
    check_margin: float = 1.0
    """Divides the limits of time; below 1 on machines that are busy with other work."""

    def __post_init__(self) -> None:
        for flag, value in (("--rounds", self.rounds), ("--workers", self.workers), ("--needles", self.needles)):
            if value < 1:
                raise InputError(f"{flag} {value}: expected at least 1")
        if self.check_margin <= 0:
            raise InputError(f"--check-margin {self.check_margin}: expected more than 0")


class _Observation:
    """A simulated cadence, and the commands that a user types for it."""

    def __init__(self, config: ObserveBenchConfig, folder: Path, coarse_channels: int, nfpc: int) -> None:
        self.config, self.folder = config, folder
        files = SimulateObservationConfig(folder / "files", coarse_channels, nfpc, max_drift=4.0, snr_min=60.0)
        self.files = simulate_observation(files)
        self.made = 0

    def ingest(self, command: str = "ingest", *options: str) -> Spent:
        """Ingest the files, into a new folder each time."""
        self.made += 1
        words: list[str | Path] = [sys.executable, "-m", "shard_tools", command, *self.files, "--out", self.shards]
        return run([*words, "--workers", str(self.config.workers), *options])

    @property
    def shards(self) -> Path:
        """The folder that was ingested last."""
        return self.folder / f"shards{self.made}"

    @property
    def candidates(self) -> Path:
        """The table of what was found."""
        return self.folder / "candidates.csv"

    def search(self) -> Spent:
        """Search the folder that was ingested last."""
        options = "--shards", self.shards, "--weights", self.config.weights, "--candidates", self.candidates
        return run([sys.executable, "infer.py", *options])

    def turbo_seti(self, python: Path) -> Spent:
        """Search the six files with turboSETI, in as many processes as there are workers."""
        workers = min(self.config.workers, len(self.files))
        out = Path(tempfile.mkdtemp(dir=self.folder))  # it refuses to write over its files
        words: list[str | Path] = [python, "-c", _TURBO_SETI, out, str(self.config.coarse_channels)]
        return run_together([[*words, *self.files[number::workers]] for number in range(workers)])


def measure_speed(config: ObserveBenchConfig, folder: Path) -> list[dict[str, Any]]:
    """Figures of each command, and of the errors of Voyager's carrier."""
    observation = _Observation(config, folder / "wide", config.coarse_channels, config.nfpc)
    tiny = _Observation(config, folder / "tiny", 1, _NARROW)
    found: dict[str, list[Spent]] = {INGEST: [], START: [], SEARCH: [], TURBO_SETI: []}
    for _ in range(config.rounds):
        found[START].append(tiny.ingest())
        found[INGEST].append(observation.ingest())
        found[SEARCH].append(observation.search())
        if config.turbo_seti is not None:
            found[TURBO_SETI].append(observation.turbo_seti(config.turbo_seti))
    truth = read_truth(observation.folder / "files" / TRUTH_TABLE)
    hits = _found(observation, observation.folder / "files")
    carrier = hits[[each.signal.kind for each in truth if each.is_needle].index("carrier")]
    figures = [_figure(name, spent) for name, spent in found.items() if spent]
    bare = statistics.median(a.seconds - b.seconds for a, b in zip(found[INGEST], found[START], strict=True))
    figures[0]["seconds_per_coarse_channel"] = bare / config.coarse_channels
    if found[TURBO_SETI]:
        rounds = zip(found[INGEST], found[SEARCH], found[TURBO_SETI], strict=True)
        shares = [(ours.seconds + search.seconds) / other.seconds for ours, search, other in rounds]
        figures.append({"what": "ours / turboSETI", "share": statistics.median(shares)})
    figures.append({"what": "carrier", **_errors([carrier])})
    return figures


def _figure(name: str, spent: Sequence[Spent]) -> dict[str, Any]:
    seconds = [each.seconds for each in spent]
    return {
        "what": name,
        "seconds": statistics.median(seconds),
        "lowest": min(seconds),
        "highest": max(seconds),
        "peak_mb": max(each.mb for each in spent),
    }


def _found(observation: _Observation, truth: Path) -> list[Found]:
    config = RecallConfig(observation.candidates, truth / TRUTH_TABLE)
    return find_needles(read_candidates(config.candidates), read_truth(config.truth), config)


def _errors(found: Sequence[Found]) -> dict[str, Any]:
    """Median and 95th percentile of the errors in frequency (Hz) and drift rate (Hz/s) of what was found."""
    hits = [each for each in found if each.candidate is not None]
    if not hits:
        return {"found": 0}
    hz, hz_s = (np.abs([getattr(each, name) for each in hits]) for name in ("error_hz", "error_hz_s"))
    values = {"hz": np.median(hz), "hz_95": np.quantile(hz, 0.95)}
    values |= {"hz_s": np.median(hz_s), "hz_s_95": np.quantile(hz_s, 0.95)}
    return {"found": len(hits), **{name: float(value) for name, value in values.items()}}


def measure_recall(config: ObserveBenchConfig, folder: Path) -> list[dict[str, Any]]:
    """Figures of recall by drift rate, SNR and place in the coarse channel, and of the errors."""
    observation = _Observation(config, folder / "narrow", config.recall_channels, _NARROW)
    observation.ingest("inject", "--needles", str(config.needles), "--snr-min", "15", "--snr-max", "80")
    observation.search()
    found = _found(observation, observation.shards)
    figures: list[dict[str, Any]] = [{"what": "added needles", "needles": len(found), **_errors(found)}]
    for name, groups in group_needles(found).items():
        figures += [
            {"what": f"recall by {name}", "group": each.name, "needles": each.needles, "found": each.found}
            for each in groups
        ]
    return figures


def print_table(figures: Sequence[dict[str, Any]]) -> None:
    """One line for each figure."""
    for figure in figures:
        values = {name: value for name, value in figure.items() if name not in ("what", "group")}
        shown = ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
        )
        print(f"{figure['what']:<42}{figure.get('group', ''):<16}{shown}")


def main(config: ObserveBenchConfig) -> int:
    """Measure, print a table, record it; return the exit code."""
    print(
        f"{config.coarse_channels} coarse channels of {config.nfpc:,}, {config.workers} workers, {usable_cores()} "
        f"cores, load {os.getloadavg()[0]:.1f} before the start, page cache warm; median of {config.rounds} rounds"
    )
    with tempfile.TemporaryDirectory(dir=config.work_dir) as name:
        figures = [*measure_speed(config, Path(name)), *measure_recall(config, Path(name))]
    print_table(figures)
    record("observe", dataclasses.asdict(config), [{"workload": "observe", **figure} for figure in figures])
    missed = missed_goals(figures, config.check_margin) if config.check else []
    for line in missed:
        print(f"error: {line}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(tyro.cli(ObserveBenchConfig))))
