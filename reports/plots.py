"""Charts: curves of a run over its epochs, and how well its scores tell needles from the rest."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from PIL import Image

from shard_tools.atomic_files import whole_file
from training.part_norms import Norms, gradient_norm, update_share

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]
History = Sequence[Mapping[str, float]]
"""A mapping for each epoch, as in metrics.jsonl."""

ON_COLOUR, OFF_COLOUR = "#d9480f", "#5c636a"
_BLUE = "#1971c2"
_CHART_INCHES = (4.2, 3.4)
_DPI = 110
_POINTS: Mapping[str, Any] = {"marker": "o", "markersize": 4}
_LONG_TAIL = 100  # cadences in a bin of a histogram, above which its axis is logarithmic


@dataclass(frozen=True)
class Curve:
    """Points joined by a line."""

    x: Floats | Sequence[float]
    y: Floats | Sequence[float]
    label: str | None = None
    style: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of matplotlib's `plot`."""
    interval: tuple[Floats, Floats] | None = None
    """Lower and upper bound of each y, drawn as a band in the curve's colour."""


def plot_curve(axes: Axes, curve: Curve) -> None:
    """Draw a curve and its band."""
    (line,) = axes.plot(curve.x, curve.y, label=curve.label, **curve.style)
    if curve.interval is not None:
        axes.fill_between(curve.x, *curve.interval, color=line.get_color(), alpha=0.12, linewidth=0)


def label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, names of the axes, and a grid."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def roc(target: Ints, score: Floats, label: str | None = None, **style: Any) -> Curve:
    """The ROC curve; empty unless there are two classes."""
    if len(np.unique(target)) < 2:
        return Curve([], [], label, style)
    from sklearn.metrics import roc_curve  # slow to import

    false_positive_rate, recall, _ = roc_curve(target, score)
    return Curve(false_positive_rate, recall, label, style)


@dataclass(frozen=True)
class Measure:
    """A quantity that is drawn over the epochs."""

    title: str
    name: str
    """Its key in the history."""
    unit: str = ""
    factor: float = 1.0
    is_from_zero: bool = False


MEASURES = (
    Measure("training loss", "loss"),
    Measure("validation ROC AUC", "auc"),
    Measure("throughput of training", "cadences_per_s", "cadences/s", is_from_zero=True),
    Measure("stall: waiting for the loader", "stall", "% of the time", 100.0, is_from_zero=True),
)


def write_curves(path: Path, history: History) -> None:
    """Draw every measure over the epochs into one PNG."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axes, measure in zip(figure.subplots(2, 2).flat, MEASURES, strict=True):
        _draw_measure(axes, history, measure)
    write_figure(path, figure)


def draw_measure(history: History, measure: Measure) -> Figure:
    """One measure over the epochs."""
    figure, axes = _chart()
    _draw_measure(axes, history, measure)
    return figure


def _draw_measure(axes: Axes, history: History, measure: Measure) -> None:
    values = [measure.factor * line[measure.name] for line in history]
    plot_curve(axes, Curve([line["epoch"] for line in history], values, style=_POINTS))
    label_axes(axes, measure.title, "epoch", measure.unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if measure.is_from_zero:
        axes.set_ylim(0, 1.1 * max(values) if max(values) > 0 else 1)


def draw_gradients(rows: Sequence[Norms]) -> Figure:
    """Each part's gradient before clipping, over the steps."""
    return _draw_parts(rows, gradient_norm, "gradients before clipping", "L2 norm")


def draw_updates(rows: Sequence[Norms]) -> Figure:
    """How much each step changed each part, as a share of its weights, over the steps."""
    return _draw_parts(rows, update_share, "updates", "norm of update / of weights")


def _draw_parts(rows: Sequence[Norms], value: Callable[[Norms], float], title: str, unit: str) -> Figure:
    figure, axes = _chart()
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        plot_curve(axes, Curve([row["step"] for row in own], [value(row) for row in own], part, _POINTS))
    label_axes(axes, title, "step", unit)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
    return figure


def write_roc(path: Path, target: Ints, score: Floats, auc: float) -> None:
    """Draw the ROC curve of validation scores into a PNG."""
    figure, axes = _chart((5, 5))
    _draw_roc(axes, roc(target, score, f"ROC AUC {auc:.4f}"), f"validation, {len(target):,} cadences")
    write_figure(path, figure)


def draw_roc(target: Ints, score: Floats, label: str) -> Figure:
    """The ROC curve beside that of chance."""
    figure, axes = _chart()
    _draw_roc(axes, roc(target, score, label), "ROC")
    return figure


def _draw_roc(axes: Axes, curve: Curve, title: str) -> None:
    plot_curve(axes, curve)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="chance")
    label_axes(axes, title, "false positive rate", "recall")
    axes.legend(loc="lower right")


def draw_precision_recall(target: Ints, score: Floats, label: str) -> Figure:
    """The precision-recall curve; only that of chance if there is no positive."""
    figure, axes = _chart()
    if (target == 1).any():
        from sklearn.metrics import precision_recall_curve  # slow to import

        precision, recall, _ = precision_recall_curve(target, score)
        plot_curve(axes, Curve(recall, precision, label, {"drawstyle": "steps-pre"}))
    share = float(np.mean(target == 1))
    axes.axhline(share, color="grey", linestyle=":", label="chance")
    label_axes(axes, "precision and recall", "recall", "precision")
    axes.set_ylim(0, 1.03)
    axes.legend(loc="lower left")
    return figure


def draw_score_histogram(score: Floats, target: Ints | None) -> Figure:
    """How many cadences have which score, by class if `target` is known."""
    figure, axes = _chart()
    label_axes(axes, "scores", "score", "cadences")
    edges = np.linspace(0, 1, 41).tolist()
    if target is None:
        axes.hist(score, edges, color=_BLUE)
    else:
        for value, name, colour in ((0, "no needle", OFF_COLOUR), (1, "needle", ON_COLOUR)):
            axes.hist(score[target == value], edges, color=colour, alpha=0.65, label=name)
        axes.legend()
    if axes.get_ylim()[1] > _LONG_TAIL:
        axes.set_yscale("symlog", linthresh=10)  # so that a few needles among thousands of others can be seen
        axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylim(bottom=0)
    return figure


def draw_calibration(mean_score: Floats, share: Floats, count: Ints) -> Figure:
    """Share of needles against score (reliability diagram), with the number of cadences at each point."""
    figure, axes = _chart()
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="calibrated")
    plot_curve(axes, Curve(mean_score, share, style={**_POINTS, "color": _BLUE}))
    for x, y, number in zip(mean_score, share, count, strict=True):
        below = y > 0.9
        axes.annotate(
            f"{number:,}", (x, y), (0, -6 if below else 6), textcoords="offset points", fontsize=7, ha="center",
            va="top" if below else "bottom",
        )  # fmt: skip
    label_axes(axes, "calibration", "mean score of the bin", "share of needles")
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
    axes.legend(loc="upper left")
    return figure


def to_png(figure: Figure, colours: int = 128) -> bytes:
    """A figure as a PNG of few colours: a page of many pictures has to stay light."""
    figure.set_dpi(_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    small = io.BytesIO()
    image.quantize(colours, dither=Image.Dither.NONE).save(small, format="PNG", optimize=True)
    return small.getvalue()


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as a PNG, at once or not at all."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)


def _chart(size: tuple[float, float] = _CHART_INCHES) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()
