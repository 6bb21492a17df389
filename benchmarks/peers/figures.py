"""Pure functions from rounds to figures: medians, ratios, goals and the verdict."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.peers.spec import Contestant, Kind, Source, Workload

_BUSY = 0.85  # share of the cores' time from which on the CPU is the bottleneck
_NEAR_COPY = 0.5  # share of the memory copy's rate from which on memory is the bottleneck


@dataclass(frozen=True)
class Round:
    """One contestant's turn."""

    cadences: int
    seconds: float
    cpu_s: float
    first_batch_s: float

    @property
    def rate(self) -> float:
        """Cadences/s."""
        return self.cadences / self.seconds


@dataclass
class Row:
    """The results of one contestant in one workload."""

    contestant: Contestant
    workload: Workload
    source: Source
    failed: str = ""
    """Why there are no figures; empty if there are any."""
    peak_mb: float = 0.0
    rounds: list[Round] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The contestant's name."""
        return self.contestant.name

    @property
    def rate(self) -> float:
        """Median of cadences/s."""
        return statistics.median(turn.rate for turn in self.rounds)

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds a cadence, over all rounds."""
        return 1000 * sum(turn.cpu_s for turn in self.rounds) / sum(turn.cadences for turn in self.rounds)

    @property
    def cores_busy(self) -> float:
        """Number of busy cores, on average."""
        return sum(turn.cpu_s for turn in self.rounds) / sum(turn.seconds for turn in self.rounds)

    @property
    def first_batch_s(self) -> float:
        """Median time to an epoch's first batch."""
        return statistics.median(turn.first_batch_s for turn in self.rounds)

    def fail(self, reason: str) -> None:
        """Note why it failed, and drop what was measured."""
        self.failed = f"failed: {reason}"
        self.rounds.clear()

    def figures(self, threads: int, cadence_bytes: int) -> dict[str, str | int | float | None]:
        """The figures that the history keeps."""
        found: dict[str, str | int | float | None] = {
            "workload": self.workload,
            "source": self.source,
            "loader": self.contestant.name,
            "kind": self.contestant.kind,
            "workers": self.contestant.workers(threads),
        }
        if self.failed:
            return {**found, "failed": self.failed}
        rates = [turn.rate for turn in self.rounds]
        return {
            **found,
            "cadences_per_s": self.rate,
            "lowest": min(rates),
            "highest": max(rates),
            "gb_per_s": self.rate * cadence_bytes / 1e9,
            "cpu_ms": self.cpu_ms,
            "peak_mb": self.peak_mb,
            "first_batch_s": self.first_batch_s,
        }


@dataclass(frozen=True)
class Goal:
    """A ratio that our loader has to reach on two cores."""

    workload: Workload
    against: str
    """The name of one of the workload's ratios."""
    required: float
    reached: float = math.inf
    """What was measured (docs/performance.md), if the goal is out of reach; margins below 1 multiply it instead."""


GOALS = (
    Goal("raw", "best peer with workers", 10.0, reached=3.3),
    Goal("raw", "memory copy", 0.5),
    Goal("canvas", "best peer", 4.0),
    Goal("train", "our canvas", 0.6),
)


def best(rows: Sequence[Row], with_workers: bool = False, kind: Kind = "peer") -> Row | None:
    """The fastest of a kind, or the fastest of those that use worker processes."""
    peers = [row for row in rows if row.contestant.kind == kind and not row.failed]
    if with_workers:
        peers = [row for row in peers if row.contestant.parallel == "workers"]
    return max(peers, key=lambda row: row.rate, default=None)


def ratios(rows: Sequence[Row], our_canvas: Row | None) -> dict[str, tuple[float, str]]:
    """Our rate over that of others in one workload, and their names; ratios that could not be measured are left out."""
    ours = _named(rows, "ours")
    if ours is None:
        return {}
    others = {
        "best peer": best(rows),
        "best peer with workers": best(rows, with_workers=True),
        "best peer with our kernels": best(rows, kind="kernels"),
        "memory copy": _named(rows, "memory-copy"),
    }
    if ours.workload == "train":
        others["our canvas"] = our_canvas
    return {name: (ours.rate / row.rate, row.contestant.name) for name, row in others.items() if row}


def _named(rows: Sequence[Row], name: str) -> Row | None:
    return next((row for row in rows if row.contestant.name == name and not row.failed), None)


def missed_goals(found: Mapping[Workload, Mapping[str, tuple[float, str]]], margin: float) -> tuple[list[str], bool]:
    """A line for each goal, and whether one is missed; `found` has the ratios of each workload that was asked for.

    A `margin` below 1 is for machines that are busy with other work: then only a broken loader misses a goal.
    """
    lines, missed = [], False
    for goal in GOALS:
        name = f"{goal.workload}: ours / {goal.against}"
        required = margin * (goal.required if margin >= 1 else min(goal.required, goal.reached))
        if goal.workload not in found:
            lines.append(f"skipped {name}: workload not asked for")
            continue
        ratio, _ = found[goal.workload].get(goal.against, (None, ""))
        reached = ratio is not None and ratio >= required
        missed |= not reached
        measured = "not measured" if ratio is None else f"{ratio:.2f}"
        lines.append(f"{'reached' if reached else 'MISSED '} {name}: {measured}, required {required:.2f}")
    return lines, missed


def verdict(rows: Sequence[Row], cores: int) -> str:
    """What bounds our loader in one workload, judged from the measurements."""
    ours, copy = _named(rows, "ours"), _named(rows, "memory-copy")
    if ours is None:
        return "none: our loader was not measured"
    share = min(1.0, ours.cores_busy / cores)
    copied = f", {ours.rate / copy.rate:.0%} of a copy of the same bytes" if copy else ""
    if copy and ours.source == "page-cache" and ours.rate >= _NEAR_COPY * copy.rate:
        return f"memory: {ours.rate / copy.rate:.0%} of a copy of the same bytes, {share:.0%} of the cores"
    if share >= _BUSY:
        return f"the CPU: {share:.0%} of {cores} cores at work{copied}"
    waits_for = {"page-cache": "its own threads, or for other programs", "cold": "the disk", "s3": "the store"}[
        ours.source
    ]
    return f"waiting for {waits_for}: {share:.0%} of {cores} cores at work{copied}"
