"""How fast our loader and others are on this machine, on data that the benchmark makes.

    python benchmarks/loader_bench.py                    a minute or two
    python benchmarks/loader_bench.py --peers all        every peer that is installed (requirements-bench.txt)

Every contestant runs in a process of its own, with `--threads` threads or workers if it has any; its batches are
compared with a reference before it is timed. Then all take turns, round by round, in an order that is reversed each
time, so that other work on the machine affects all alike. Memory is the PSS of a process and its workers (shared pages
are divided among them) without mapped files, in an epoch before the timed ones. How to add a loader:
benchmarks/peers/__init__.py.
"""

import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro
from tqdm import tqdm

from benchmarks.bench_data import DataConfig, cached_bytes, drop_from_cache, make_data
from benchmarks.peers.contest import Contest
from benchmarks.peers.figures import Row, missed_goals, ratios, verdict
from benchmarks.peers.process import Failed
from benchmarks.peers.spec import BY_NAME, CONTESTANTS, Contestant, Source, Spec, Workload
from benchmarks.peers.table import ratio_lines, table
from shard_tools.errors import InputError
from shard_tools.system.command import run_command

CORES = len(os.sched_getaffinity(0))
_STAYED = 0.05  # share of a contestant's files that may be in the page cache when its turn on a cold disk begins
SOURCES = {
    "page-cache": "files in the page cache",
    "cold": "files dropped from the page cache before each turn (fsync, POSIX_FADV_DONTNEED)",
    "s3": "a server on the same cores that waits {latency:g} ms before each answer",
}


def _peers_help() -> str:
    """The help of --peers, from the list of contestants."""
    peers = [contestant for contestant in CONTESTANTS if contestant.kind in ("peer", "kernels")]
    in_default = [peer.name for peer in peers if peer.by_default]
    in_all = [peer.name for peer in peers if peer.in_all and not peer.by_default]
    named = [peer.name for peer in peers if not peer.in_all and not peer.by_default]
    kernels = [peer.name for peer in peers if peer.kind == "kernels"]
    return (
        f"none, default ({', '.join(in_default)}), all (also {', '.join(in_all)}), or names; only by name: "
        f"{', '.join(named)}. With canvases made by our kernels: {', '.join(kernels)}."
    )


@dataclass(frozen=True)
class LoaderBenchConfig:
    """What to measure."""

    workloads: tuple[Workload, ...] = ("raw", "canvas", "train")
    """raw: float16 batches as they are. canvas: the six panels stacked, resized to 224x224. train: the canvas with
    every draw and CutMix. tta: the canvas and its reverse along frequency."""
    peers: Annotated[tuple[str, ...], tyro.conf.arg(help=_peers_help())] = ("default",)
    source: Source = "page-cache"
    """page-cache: files that were just read. cold: dropped from the page cache before every round, which is one
    epoch. s3: a server on this machine that waits before each answer."""
    latency_ms: float = 20.0
    """With s3, the wait before each answer."""
    batch_size: int = 32
    """Cadences in a batch."""
    threads: int = CORES
    """Threads or worker processes of each loader."""
    rounds: int = 5
    """Timed rounds, after one epoch to warm up."""
    seconds: float = 0.3
    """Least duration of a round, which ends with a whole epoch."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device on which batches have to arrive."""
    data: DataConfig = field(default_factory=DataConfig)
    data_dir: Path | None = None
    """Folder for the data, kept and used again. Unset: a temporary one."""
    quick: bool = False
    """128 cadences and two short rounds, for a look and for CI."""
    check: bool = False
    """Exit with code 1 if a goal is missed."""
    check_margin: float = 1.0
    """Multiplies the ratios that the goals require. Below 1, for machines that are busy with other work, it multiplies
    the ratio that docs/performance.md reports, where that is less than the goal."""
    history: bool = True
    """Append the figures to the history (benchmarks/history.py)."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.peers if name not in (*BY_NAME, "default", "all", "none")]
        if unknown:
            raise InputError(f"--peers {unknown[0]}: expected default, all, none, or some of {', '.join(BY_NAME)}")
        if min(self.batch_size, self.threads, self.rounds) < 1 or self.seconds <= 0 or self.check_margin <= 0:
            raise InputError("--batch-size, --threads, --rounds, --seconds, --check-margin: expected more than 0")
        if self.data.cadences % self.batch_size:
            raise InputError(f"--data.cadences {self.data.cadences}: expected a multiple of {self.batch_size}")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise InputError(f"--device {self.device}: no GPU that torch can use")

    @property
    def asked_for(self) -> "LoaderBenchConfig":
        """The configuration, shortened if --quick is given."""
        if not self.quick:
            return self
        return replace(self, quick=False, rounds=2, seconds=0.2, data=replace(self.data, cadences=128))

    def contestants(self) -> list[Contestant]:
        """Ours, the peers that were asked for, and the ceilings."""

        def takes_part(contestant: Contestant) -> bool:
            asked_for = {contestant.name}
            asked_for |= {"all"} if contestant.in_all else set()
            asked_for |= {"default"} if contestant.by_default else set()
            return contestant.kind in ("ours", "ceiling") or bool(asked_for & set(self.peers))

        return [contestant for contestant in CONTESTANTS if takes_part(contestant)]


def measure(config: LoaderBenchConfig, folder: Path) -> list[Row]:
    """Every contestant in every workload, on the data of `folder`."""
    contestants = config.contestants()
    rows: list[Row] = []
    is_cold = config.source == "cold"
    before = partial(make_cold, folder) if is_cold else lambda _: None
    # One epoch from a cold disk: for a second one the files would be cached.
    seconds = 0.0 if is_cold else config.seconds
    # Contestants that fail early count too: the bar only shows that work continues.
    steps = len(config.workloads) * len(contestants) * (config.rounds + 2)
    with tqdm(total=steps, unit="turn", disable=None, leave=False, dynamic_ncols=True) as bar:

        def step(what: str) -> None:
            bar.set_description(f"{what:<24}", refresh=False)
            bar.update()

        for workload in config.workloads:
            spec = Spec(
                workload, folder, config.data.shape, config.batch_size, config.threads, config.source, config.device
            )
            with Contest(contestants, spec, step) as contest:
                contest.compare(at_once=CORES)
                contest.warm_up()
                for number in range(config.rounds):
                    contest.play(number, seconds, before)
            rows += contest.rows
    return rows


def make_cold(folder: Path, contestant: Contestant) -> None:
    """Empty the page cache of the data. Raises Failed if the contestant's own files stay in it."""
    drop_from_cache(folder)
    files = [path for path in (folder / contestant.reads).rglob("*") if path.is_file()]
    stayed, size = sum(map(cached_bytes, files)), sum(path.stat().st_size for path in files)
    if stayed > _STAYED * size:
        # Mapped pages cannot be dropped, so its rate would be that of the page cache.
        raise Failed(f"{stayed / size:.0%} of its files stay cached, as it maps them")


@contextmanager
def data_source(config: LoaderBenchConfig) -> Iterator[Path]:
    """The folder of the data; with --source s3 a server on this machine serves it."""
    with ExitStack() as stack:
        folder = config.data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loader-bench-")))
        make_data(folder, config.data)
        if config.source == "s3":
            from benchmarks.remote_bench import server  # slow to import

            for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "y"), ("DEFAULT_REGION", "us-east-1")):
                os.environ[f"AWS_{name}"] = value
            port = stack.enter_context(server("-m", "tests.range_server", str(folder), str(config.latency_ms / 1e3)))
            os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        yield folder


def report(config: LoaderBenchConfig, rows: Sequence[Row]) -> dict[Workload, dict[str, tuple[float, str]]]:
    """Print a table for each workload, with ratios and a verdict below it; return the ratios by workload."""
    our_canvas = next((row for row in rows if (row.contestant.name, row.workload) == ("ours", "canvas")), None)
    found: dict[Workload, dict[str, tuple[float, str]]] = {}
    for workload in config.workloads:
        here = [row for row in rows if row.workload == workload]
        found[workload] = ratios(here, our_canvas)
        print(f"\n{workload}, {config.source}")
        print(table(here, config.threads, config.data.cadence_bytes))
        print("\n".join(ratio_lines(found[workload])))
        print(fill(f"bound by {verdict(here, CORES)}", 80))
    return found


def print_conditions(config: LoaderBenchConfig) -> None:
    """Print what the figures depend on."""
    size = config.data.cadence_bytes
    print(
        f"{config.data.cadences} cadences of {size / 1e3:.0f} kB, batches of {config.batch_size} to {config.device}, "
        f"{config.rounds} rounds\n{CORES} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f} before, "
        f"torch {torch.__version__}; 2t: threads, 2w: workers"
    )
    print(fill(f"source: {SOURCES[config.source].format(latency=config.latency_ms)}", 80))


def main(config: LoaderBenchConfig) -> int:
    """Measure, print, and with --check judge."""
    config = config.asked_for
    with data_source(config) as folder:
        print_conditions(config)
        rows = measure(config, folder)
    found = report(config, rows)
    if config.history:
        from benchmarks.history import record

        record("loader", asdict(config), [row.figures(config.threads, config.data.cadence_bytes) for row in rows])
    if not config.check:
        return 0
    lines, missed = missed_goals(found, config.check_margin)
    print("\ngoals" if config.check_margin == 1 else f"\ngoals, times {config.check_margin:g}")
    print("\n".join(lines))
    return int(missed)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(tyro.cli(LoaderBenchConfig))))
