"""What the loader benchmark measured, in panels of rates that can be compared: one machine, workload and source."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from benchmarks.peers.spec import Kind

KINDS = get_args(Kind)
# Beginnings of names in older histories, whose figures do not state their kind.
_OURS = ("ours", "needlestream")
_CEILINGS = ("memcpy", "memory copy", "resident")


@dataclass(frozen=True)
class ChartPanel:
    """What one run measured of one workload from one source."""

    machine_name: str
    workload: str
    source: str
    entry: dict[str, Any]
    figures: list[dict[str, Any]]
    """Fastest first, with two more keys: `kind`, and `name`, to which the number of workers is added if a loader ran
    with different numbers of them."""
    failed: list[dict[str, Any]]
    """Those without a rate; `failed` says why."""

    @property
    def title(self) -> str:
        """Workload and source."""
        return f"{self.workload}, {self.source}" if self.source else self.workload

    @property
    def best(self) -> dict[str, float]:
        """The highest rate of each kind: ours, peer, kernels, ceiling."""
        return {figure["kind"]: figure["cadences_per_s"] for figure in reversed(self.figures)}


def machine_name(entry: dict[str, Any]) -> str:
    """GPU, cores and CPU of the machine that an entry was measured on."""
    machine = entry["machine"]
    gpu = f"{machine['gpu']}, " if machine.get("gpu") else ""
    return f"{gpu}{machine.get('cores', '?')} cores of {machine.get('cpu', '?')}"


def machine_size(entry: dict[str, Any]) -> str:
    """GPU and cores of the machine that an entry was measured on: a newer machine of the same size takes its place."""
    machine = entry["machine"]
    return f"{machine.get('gpu') or 'no GPU'}, {machine.get('cores', '?')} cores"


def panels_of(entry: dict[str, Any]) -> list[ChartPanel]:
    """The panels of one run of the loader benchmark."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for figure in entry["figures"]:
        place = (str(figure.get("workload") or ""), str(figure.get("source") or ""))
        groups.setdefault(place, []).append(figure)
    panels = []
    for (workload, source), figures in groups.items():
        names = [str(figure["loader"]) for figure in figures]
        named = [
            {**figure, "name": _name(figure, names.count(str(figure["loader"])) > 1), "kind": _kind(figure)}
            for figure in figures
        ]
        timed = [figure for figure in named if figure.get("cadences_per_s") is not None]
        timed.sort(key=lambda figure: -figure["cadences_per_s"])
        failed = [figure for figure in named if figure.get("cadences_per_s") is None]
        panels.append(ChartPanel(machine_name(entry), workload, source, entry, timed, failed))
    return panels


def latest_panels(entries: Sequence[dict[str, Any]]) -> list[ChartPanel]:
    """The last run's panel of each size of machine, workload and source."""
    found: dict[tuple[str, str, str], ChartPanel] = {}
    for entry in entries:
        if entry["benchmark"] == "loader":
            size = machine_size(entry)
            found |= {(size, panel.workload, panel.source): panel for panel in panels_of(entry)}
    return list(found.values())


def _name(figure: dict[str, Any], several: bool) -> str:
    return f"{figure['loader']}, {figure.get('workers')} workers" if several else str(figure["loader"])


def _kind(figure: dict[str, Any]) -> str:
    """The kind that the figure states, or else the one that its name shows."""
    if figure.get("kind") in KINDS:
        return str(figure["kind"])
    if str(figure["loader"]).startswith(_OURS):
        return "ours"
    return "ceiling" if str(figure["loader"]).startswith(_CEILINGS) else "peer"
