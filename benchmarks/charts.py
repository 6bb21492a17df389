"""The pictures of the loader benchmark: bars of the last runs, and the trend over commits."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.chart_panels import ChartPanel
from reports.plots import Curve, label_axes, plot_curve, write_figure

# Colours that stay apart for colour-blind eyes and in grey (Okabe and Ito).
_COLOURS = {"ours": "#0072b2", "peer": "#a6adb4", "kernels": "#56b4e9", "ceiling": "#f3e3b3"}
_CUT = 1.6  # times the fastest loader: longer bars are cut there, so that they do not squash the others
_BAR_INCHES, _PANEL_INCHES, _WIDTH_INCHES = 0.3, 1.0, 8.0
_LINES = ("-", "--", ":", "-.")  # by source
_IN_ONE_COLUMN = 4  # panels
_SHOWN_COMMITS = 30


def write_bars(path: Path, panels: Sequence[ChartPanel]) -> None:
    """Draw each panel's horizontal bars, coloured by kind, with the range of the rounds."""
    columns = 1 if len(panels) <= _IN_ONE_COLUMN else 2
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [_PANEL_INCHES + _BAR_INCHES * max(len(panel.figures) for panel in row) for row in rows]
    figure = Figure(figsize=(_WIDTH_INCHES * columns, sum(heights) + 0.4), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_bars(axes, panel)
    figure.supxlabel("cadences/s (bar: median, line: range of the rounds)", fontsize=10)
    write_figure(path, figure)


def _draw_bars(axes: Axes, panel: ChartPanel) -> None:
    loaders = [figure["cadences_per_s"] for figure in panel.figures if figure["kind"] != "ceiling"]
    longest = max((figure["cadences_per_s"] for figure in panel.figures), default=0.0)
    limit = min(_CUT * max(loaders, default=longest), 1.25 * longest) or 1.0
    for place, figure in enumerate(panel.figures):
        rate = figure["cadences_per_s"]
        axes.barh(place, min(rate, limit), color=_COLOURS[figure["kind"]], height=0.75)
        label = f"{rate:,.0f}"
        if rate > limit:
            axes.text(limit * 0.99, place, f"{label} \N{RIGHTWARDS ARROW}", va="center", ha="right", fontsize=9)
            continue
        low, high = (figure[name] if figure.get(name) is not None else rate for name in ("lowest", "highest"))
        axes.plot([low, high], [place, place], color="black", linewidth=1)
        axes.text(max(high, rate) + 0.01 * limit, place, label, va="center", fontsize=9, clip_on=False)
    axes.set_xlim(0, limit)
    axes.set_yticks(range(len(panel.figures)), [_wrapped(figure["name"]) for figure in panel.figures], fontsize=9)
    for name, figure in zip(axes.get_yticklabels(), panel.figures, strict=True):
        name.set_fontweight("bold" if figure["kind"] == "ours" else "normal")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.invert_yaxis()
    title = "\n".join([panel.title, *textwrap.wrap(f"{panel.machine_name}, {panel.entry['time'][:10]}", 60)])
    axes.set_title(title, fontsize=10, loc="left", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)


def write_trend(path: Path, panels: Sequence[ChartPanel]) -> None:
    """Draw, for each machine, our rate and its multiple of the best peer's over the commits; panels oldest first."""
    machines = list(dict.fromkeys(panel.machine_name for panel in panels))
    figure = Figure(figsize=(_WIDTH_INCHES, 5.2 * len(machines)), layout="constrained")
    grid = figure.subplots(2 * len(machines), 1, squeeze=False)[:, 0]
    for number, machine in enumerate(machines):
        rate_axes, ratio_axes = grid[2 * number], grid[2 * number + 1]
        _draw_trend(rate_axes, ratio_axes, [panel for panel in panels if panel.machine_name == machine])
        rate_axes.set_title("\n".join(textwrap.wrap(machine, 90)), fontsize=10, loc="left", parse_math=False)
    write_figure(path, figure)


def _draw_trend(rate_axes: Axes, ratio_axes: Axes, panels: Sequence[ChartPanel]) -> None:
    commits = list(dict.fromkeys(panel.entry["commit"] for panel in panels))[-_SHOWN_COMMITS:]
    workloads, sources = (
        list(dict.fromkeys(words)) for words in zip(*((p.workload, p.source) for p in panels), strict=True)
    )
    for title, workload, source in dict.fromkeys((panel.title, panel.workload, panel.source) for panel in panels):
        style: dict[str, Any] = {"color": f"C{workloads.index(workload) % 10}", "marker": "o", "markersize": 4}
        style["linestyle"] = _LINES[sources.index(source) % len(_LINES)]
        points = [
            (commits.index(panel.entry["commit"]), panel.best)
            for panel in panels
            if panel.title == title and panel.entry["commit"] in commits and panel.best.get("ours")
        ]
        ours = [best["ours"] for _, best in points]
        plot_curve(rate_axes, Curve([x for x, _ in points], ours, _wrapped(title), style))
        beside = [(x, best["ours"] / best["peer"]) for x, best in points if best.get("peer")]
        plot_curve(ratio_axes, Curve([x for x, _ in beside], [ratio for _, ratio in beside], style=style))
    ratio_axes.axhline(1.0, color="grey", linestyle=":", linewidth=1)
    labels = [commit[:7] + ("+" if commit.endswith("+") else "") for commit in commits]
    for axes, name in ((rate_axes, "ours, cadences/s"), (ratio_axes, "ours / best peer")):
        axes.set_xticks(range(len(commits)), labels, rotation=45, ha="right", fontsize=8)
        axes.set_xlim(-0.5, len(commits) - 0.5)
        axes.set_ylim(bottom=0)
        label_axes(axes, "", "", name)
    rate_axes.yaxis.set_major_formatter("{x:,.0f}")
    if rate_axes.lines:
        rate_axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def _wrapped(name: str) -> str:
    # matplotlib would take a dollar sign for the start of mathematics.
    return "\n".join(textwrap.wrap(name, 28)).replace("$", r"\$")
