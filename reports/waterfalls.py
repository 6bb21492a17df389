"""Snippets as waterfalls: six panels from top to bottom, ON and OFF marked.

Axes of a snippet: P position, T time bin, F frequency channel.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.plots import OFF_COLOUR, ON_COLOUR, write_figure

Halves = npt.NDArray[np.float16]
Floats = npt.NDArray[np.floating]
Track = tuple[float, float]
"""The channels where an estimated needle starts and ends."""

# Rows of a panel: a picture has no pixels for more, and averaging time bins lifts needles out of the noise.
_ROWS = 40
_PAGE_ROWS = 24  # fewer on a page of many pictures, where each pixel of noise costs a byte
_GAP = 2  # rows between panels, where the track's arrowheads lie
_SHADES = 24  # the rest of a page's palette is for marks and labels
_DARKEST, _BRIGHTEST = 0.02, 0.99  # quantiles; lines of interference, 0.4 % of the pixels each, must not darken needles
_TRACK_COLOUR = "#e03131"


def draw_waterfall(snippet: Halves, track: Track | None) -> Figure:
    """One snippet (P, T, F) for a page.

    Arrowheads at the edges of each panel show the track without covering what lies along it, so that it can be judged.
    """
    figure = Figure(figsize=(2.9, 4.4), layout="constrained")
    axes = figure.add_subplot()
    edges = _draw_panels(axes, snippet, _PAGE_ROWS)
    if track is not None:
        _draw_track(axes, track, edges, snippet.shape[2])
    return figure


def write_waterfalls(path: Path, snippets: Halves, titles: Sequence[str]) -> None:
    """Draw snippets (n, P, T, F) side by side into one PNG."""
    figure = Figure(figsize=(2.1 * len(snippets) + 0.6, 9), layout="constrained")
    for number, (snippet, title) in enumerate(zip(snippets, titles, strict=True), start=1):
        axes = figure.add_subplot(1, len(snippets), number)
        _draw_panels(axes, snippet, _ROWS)
        axes.set_title(title, fontsize=8)
        if number > 1:
            axes.tick_params(labelleft=False)
    write_figure(path, figure)


def _draw_panels(axes: Axes, snippet: Halves, rows: int) -> Floats:
    """Draw a snippet with about `rows` rows a panel; return each panel's upper and lower edge (P, 2)."""
    positions, time_bins, channels = snippet.shape
    averaged = max(1, time_bins // rows)
    rows = time_bins // averaged
    panels = snippet[:, : rows * averaged].astype(np.float32).reshape(positions, rows, averaged, channels).mean(axis=2)
    low, high = np.quantile(panels, (_DARKEST, _BRIGHTEST))
    spaced = np.full((positions, rows + _GAP, channels), np.nan, np.float32)
    spaced[:, :rows] = panels
    # Leave out the last gap, below which there is no panel.
    axes.imshow(
        spaced.reshape(-1, channels)[:-_GAP], aspect="auto", interpolation="nearest", vmin=float(low), vmax=float(high),
        cmap=matplotlib.colormaps["viridis"].resampled(_SHADES),
    )  # fmt: skip
    top = np.arange(positions) * (rows + _GAP) - 0.5
    edges = np.stack((top, top + rows), axis=1)
    _mark_positions(axes, edges)
    axes.set_xlim(-0.5, channels - 0.5)
    axes.set_xlabel("frequency channel", fontsize=8)
    axes.tick_params(labelsize=8, length=0)
    axes.spines[:].set_visible(False)
    return edges


def _mark_positions(axes: Axes, edges: Floats) -> None:
    """Write ON and OFF in colour beside the panels."""
    is_on = np.arange(len(edges)) % 2 == 0
    axes.set_yticks(edges.mean(axis=1), ["ON" if on else "OFF" for on in is_on])
    for on, edge, label in zip(is_on, edges, axes.get_yticklabels(), strict=True):
        colour = ON_COLOUR if on else OFF_COLOUR
        label.set(color=colour, fontweight="bold" if on else "normal")
        axes.plot([0, 0], edge, color=colour, linewidth=5, solid_capstyle="butt")


def _draw_track(axes: Axes, track: Track, edges: Floats, channels: int) -> None:
    """Two arrowheads for each panel, where the track enters it and where it leaves it."""
    start, end = track
    for position, panel in enumerate(edges):
        for moment, edge, marker in zip((position, position + 1), panel, ("v", "^"), strict=True):
            channel = start + (end - start) * moment / len(edges)
            if 0 <= channel < channels:
                axes.plot(channel, edge, marker=marker, markersize=4, color=_TRACK_COLOUR, clip_on=False, zorder=3)
