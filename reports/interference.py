"""What interference an observation holds, by frequency."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reports.page import Picture, to_picture
from reports.plots import OFF_COLOUR, ON_COLOUR, to_png
from shard_tools.cadence import OFF_POSITIONS, ON_POSITIONS
from shard_tools.csv_table import read_table
from shard_tools.manifest import Manifest
from shard_tools.observation.candidate_table import CandidateRow, to_number
from shard_tools.observation.tables import Observations

Floats = npt.NDArray[np.floating]
_FREQUENCY = "frequency_mhz"


def read_interference(path: Path) -> Floats:
    """The frequencies (MHz) of a table of interference; empty where there is none."""
    if not path.is_file():
        return np.empty(0)
    with path.open("rb") as file:
        rows = read_table(file, str(path), [_FREQUENCY])
        return np.array([to_number(where, _FREQUENCY, cells[_FREQUENCY]) for where, cells in rows])


def draw_interference(
    observed: Sequence[Observations], manifest: Manifest, candidates: Sequence[CandidateRow], interference: Floats
) -> list[Picture]:
    """A chart of each data set: the strongest panel of each snippet, ON and OFF, with candidates and interference."""
    pictures = []
    for observations in observed:
        widths = np.array([cadence.channel_width_hz for cadence in observations.cadences])[observations.cadence]
        middle = observations.first_mhz + (manifest.shape[2] - 1) / 2 * widths / 1e6
        found = np.array([candidate.frequency_mhz for candidate in candidates])
        figure = _draw(middle, observations.scale, found, interference)
        pictures.append(to_picture(to_png(figure), "strength of ON and OFF panels by frequency"))
    return pictures


def _draw(mhz: Floats, scale: Floats, candidates: Floats, interference: Floats) -> Figure:
    """`scale` (snippets, P) at the middles `mhz` of the snippets, in those of the receiver's noise."""
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    order = np.argsort(mhz)
    for name, panels, colour in (("OFF", OFF_POSITIONS, OFF_COLOUR), ("ON", ON_POSITIONS, ON_COLOUR)):
        strongest = scale[order][:, list(panels)].max(axis=1)
        axes.plot(mhz[order], strongest, ".", markersize=4, color=colour, alpha=0.7, label=f"strongest {name} panel")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    top = axes.get_xaxis_transform()
    for name, places, marker, height in (
        ("interference", interference, "x", 1.03),
        ("candidates", candidates, 7, 1.08),
    ):
        if len(places):
            colour = OFF_COLOUR if marker == "x" else ON_COLOUR
            axes.plot(
                places, np.full(len(places), height), marker=marker, linestyle="", markersize=5, color=colour,
                transform=top, clip_on=False, label=name,
            )  # fmt: skip
    axes.set_xlabel("frequency (MHz)")
    axes.set_ylabel("times the receiver's noise")
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return figure
