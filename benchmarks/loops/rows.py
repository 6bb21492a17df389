"""The results of the loops: figures for the history, and the table that is printed."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import fill
from typing import Any

from benchmarks.loops.spec import OF_ALL, Loop

_FEEDS = {"shards": "our loader", "torch": "torch", "kernels": "our kernels", "held": "one batch"}


@dataclass
class Row:
    """The results of one loop."""

    loop: Loop
    failed: str = ""
    """Why there are no figures; empty if there are any."""
    rates: list[float] = field(default_factory=list)
    """Cadences/s of each round."""
    cpu_ms: list[float] = field(default_factory=list)
    """CPU milliseconds per cadence in each round, workers included."""

    @property
    def name(self) -> str:
        """The loop's name."""
        return self.loop.name

    @property
    def rate(self) -> float:
        """Median of cadences/s; 0 if it failed."""
        return statistics.median(self.rates) if self.rates else 0.0

    def fail(self, reason: str) -> None:
        """Note why it failed, and drop what was measured."""
        self.failed = f"failed: {reason}"
        self.rates.clear()

    def figure(self, workers: int) -> dict[str, Any]:
        """The figure that the history keeps."""
        loop = self.loop
        found: dict[str, Any] = {"loop": loop.name, "kind": loop.kind, "feed": loop.feed, "differs": loop.differs}
        found |= {"workers": loop.workers(workers)}
        if not self.rates:
            return {**found, "failed": self.failed}
        rates = {"cadences_per_s": self.rate, "lowest": min(self.rates), "highest": max(self.rates)}
        return {**found, **rates, "cpu_ms": statistics.median(self.cpu_ms)}


def loop_figures(rows: Sequence[Row], workers: int, **common: str) -> list[dict[str, Any]]:
    """A figure for each row, with our rate as a multiple of its rate, if both were measured."""
    ours = next((row.rate for row in rows if row.loop.kind == "ours"), 0.0)
    found = [{**common, **row.figure(workers)} for row in rows]
    for figure, row in zip(found, rows, strict=True):
        if ours and row.rate:
            figure["ours_times"] = ours / row.rate
    return found


def table(figures: Sequence[dict[str, Any]]) -> str:
    """A line for each loop, in 80 columns, and below them how each differs from ours."""
    lines = [f"{'loop':<24}{'canvases':<12}{'':>3}{'cadences/s':>11}{'range':>14}{'CPU ms':>8}{'ours/it':>8}"]
    for figure in figures:
        workers = f"{figure['workers']}w" if figure["workers"] else "-"
        start = f"{figure['loop']:<24}{_FEEDS[figure['feed']]:<12}{workers:>3}"
        if "failed" in figure:
            lines.append(f"{start} {figure['failed']}"[:80])
            continue
        limits = f"{_short(figure['lowest'])}-{_short(figure['highest'])}"
        times = f"{figure['ours_times']:.2f}" if "ours_times" in figure else ""
        rate = _short(figure["cadences_per_s"])
        lines.append(f"{start}{rate:>11}{limits:>14}{figure['cpu_ms']:>8.1f}{times:>8}")
    notes = {"all others": OF_ALL, **{figure["loop"].split("-")[0]: figure["differs"] for figure in figures}}
    return "\n".join(lines + [fill(f"{name}: {words}", 80) for name, words in notes.items() if words])


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.1f}"
