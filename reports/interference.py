"""Charts of the interference in an observation, by frequency."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from reports.page import Picture, to_picture
from reports.plots import OFF_COLOUR, ON_COLOUR, to_png
from shard_tools.cadence import OFF_POSITIONS, ON_POSITIONS
from shard_tools.csv_table import read_table
from shard_tools.manifest import Manifest
from shard_tools.observation.cadence_tables import Observations
from shard_tools.observation.candidates_table import Candidate
from shard_tools.observation.lines import to_number

Floats = npt.NDArray[np.floating]
_COLUMNS = ("frequency_mhz", "snr_off")
_WIDE_SPAN = 5.0
_POINTS: Mapping[str, Any] = {"marker": "o", "markersize": 3, "linestyle": "", "alpha": 0.8}


def read_interference(path: Path) -> Floats:
    """Frequency (MHz) and SNR in the OFF panels of each line in interference.csv (n, 2); no lines if it is absent."""
    if not path.is_file():
        return np.empty((0, 2))
    with path.open("rb") as file:
        rows = [[to_number(where, name, cells[name]) for name in _COLUMNS]
                for where, cells in read_table(file, str(path), _COLUMNS)]  # fmt: skip
    return np.array(rows, np.float64).reshape(-1, 2)


def draw_lines(candidates: Sequence[Candidate], interference: Floats) -> Picture:
    """Candidates and lines of interference by frequency and SNR."""
    figure, axes = _chart()
    found = np.array([(each.frequency_mhz, each.snr) for each in candidates]).reshape(-1, 2)
    axes.plot(*interference.T, color=OFF_COLOUR, label="interference, in its best OFF panel", **_POINTS)
    axes.plot(*found.T, color=ON_COLOUR, label="candidates, in the ON panels", **_POINTS)
    axes.set_ylabel("SNR")
    _finish(axes, np.concatenate([found, interference])[:, 1])
    return to_picture(to_png(figure), "SNR of candidates and of interference by frequency", "Lines that were found")


def draw_strengths(observed: Sequence[Observations], manifest: Manifest) -> list[Picture]:
    """A chart for each data set: how much the strongest ON and the strongest OFF panel of each snippet vary."""
    pictures = []
    for observations in observed:
        widths = np.array([cadence.channel_width_hz for cadence in observations.cadences])[observations.cadence]
        mhz = observations.first_mhz + (manifest.shape[2] - 1) / 2 * widths / 1e6
        figure, axes = _chart()
        for name, panels, colour in (("OFF", OFF_POSITIONS, OFF_COLOUR), ("ON", ON_POSITIONS, ON_COLOUR)):
            strongest = observations.scale[:, list(panels)].max(axis=1)
            axes.plot(mhz, strongest, color=colour, label=f"strongest {name} panel of a snippet", **_POINTS)
        axes.set_ylabel("times the receiver's noise")
        _finish(axes, observations.scale)
        title = "How much snippets vary"
        pictures.append(to_picture(to_png(figure), "standard deviation of each snippet by frequency", title))
    return pictures


def _chart() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.6, 2.9), layout="constrained")
    return figure, figure.add_subplot()


def _finish(axes: Axes, heights: Floats) -> None:
    """Add names and ticks; the axis of the `heights` is logarithmic if they span more than a factor of five."""
    heights = heights[np.isfinite(heights) & (heights > 0)]
    if len(heights) and heights.max() > _WIDE_SPAN * heights.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # 20, not 2 x 10^1
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("frequency (MHz)")
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, frameon=False)
