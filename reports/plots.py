"""Pictures of a run: curves, what validation scores are worth, and candidates as waterfalls.

Axes of a snippet: P position, T time bin, F frequency channel.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from PIL import Image
from sklearn.metrics import precision_recall_curve, roc_curve

from shard_tools.atomic_files import whole_file

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.integer]

_SHOWN_TIME_BINS = 40  # of a panel: more than a picture has pixels for, and summing lifts needles out of the noise
_PAGE_TIME_BINS = 24  # the same for a page of many pictures, of which each pixel of noise is a byte
_SHADES = 24  # of a waterfall: what is left of the palette is for the marks and the words
_GAP = 2  # rows between panels, where the track's ticks lie
_DPI = 110
_ON, _OFF, _TRACK = "#d9480f", "#5c636a", "#e03131"
_LONG_TAIL = 100  # cadences in a bin of a histogram, above which its axis is logarithmic


def write_curves(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Draw loss, validation AUC, throughput and stall over the epochs."""
    epochs = [line["epoch"] for line in history]
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    panels = [
        ("training loss", "loss", 1.0),
        ("validation ROC AUC", "auc", 1.0),
        ("training, cadences/s", "cadences_per_s", 1.0),
        ("stall, % of the time", "stall", 100.0),
    ]
    for number, (title, name, factor) in enumerate(panels, start=1):
        axes = figure.add_subplot(2, 2, number)
        axes.plot(epochs, [line[name] * factor for line in history], marker="o", markersize=4)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _write(path, figure)


def write_roc(path: Path, target: Ints, score: Floats, auc: float) -> None:
    """Draw the ROC curve of validation scores."""
    _write(path, draw_roc(target, score, f"ROC AUC {auc:.4f}", f"validation, {len(target):,} cadences", (5, 5)))


def draw_curve(
    title: str, epochs: Sequence[float], values: Sequence[float], unit: str = "", is_from_zero: bool = False
) -> Figure:
    """One number over the epochs."""
    figure, axes = _chart(title, "epoch", unit)
    axes.plot(epochs, values, marker="o", markersize=4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if is_from_zero:
        axes.set_ylim(0, 1.1 * max(values) if max(values) > 0 else 1)
    return figure


def draw_roc(
    target: Ints,
    score: Floats,
    label: str,
    title: str = "ROC",
    size: tuple[float, float] = (4.2, 3.4),
) -> Figure:
    """The ROC curve, where there are two classes to tell apart."""
    figure, axes = _chart(title, "false positive rate", "recall", size)
    if len(np.unique(target)) == 2:
        false_positive_rate, recall, _ = roc_curve(target, score)
        axes.plot(false_positive_rate, recall, label=label)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="chance")
    axes.legend(loc="lower right")
    return figure


def draw_precision_recall(target: Ints, score: Floats, label: str) -> Figure:
    """The precision-recall curve, where there is a positive."""
    figure, axes = _chart("precision and recall", "recall", "precision")
    if (target == 1).any():
        precision, recall, _ = precision_recall_curve(target, score)
        axes.plot(recall, precision, label=label, drawstyle="steps-pre")
    share = float(np.mean(target == 1))
    axes.axhline(share, color="grey", linestyle=":", label="chance")
    axes.set_ylim(0, 1.03)
    axes.legend(loc="lower left")
    return figure


def draw_score_histogram(score: Floats, target: Ints | None) -> Figure:
    """How many cadences have which score, by class where `target` is known."""
    figure, axes = _chart("scores", "score", "cadences")
    edges = np.linspace(0, 1, 41).tolist()
    if target is None:
        axes.hist(score, edges, color="#1971c2")
    else:
        for value, name, colour in ((0, "no needle", _OFF), (1, "needle", _ON)):
            axes.hist(score[target == value], edges, color=colour, alpha=0.65, label=name)
        axes.legend()
    if axes.get_ylim()[1] > _LONG_TAIL:
        axes.set_yscale("symlog", linthresh=10)  # a few needles among thousands without one stay visible
        axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylim(bottom=0)
    return figure


def draw_calibration(mean_score: Floats, share: Floats, count: Ints) -> Figure:
    """How often a score of so much is a needle (reliability diagram); the counts stand at the points."""
    figure, axes = _chart("calibration", "mean score of the bin", "share of needles")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="calibrated")
    axes.plot(mean_score, share, marker="o", markersize=4, color="#1971c2")
    for x, y, number in zip(mean_score, share, count, strict=True):
        below = y > 0.9
        axes.annotate(
            f"{number:,}", (x, y), (0, -6 if below else 6), textcoords="offset points", fontsize=7, ha="center",
            va="top" if below else "bottom",
        )  # fmt: skip
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
    axes.legend(loc="upper left")
    return figure


def draw_waterfall(snippet: npt.NDArray[np.float16], track: tuple[float, float] | None) -> Figure:
    """One snippet (P, T, F), panels from top to bottom, ON and OFF marked.

    `track` holds the channels where an estimated needle starts and ends; ticks at the edges of each panel show it, and
    leave what it runs over free to be judged.
    """
    positions, time_bins, channels = snippet.shape
    step = max(1, time_bins // _PAGE_TIME_BINS)
    shown = time_bins // step
    panels = snippet[:, : shown * step].astype(np.float32).reshape(positions, shown, step, channels).mean(axis=2)
    low, high = np.quantile(panels, (0.02, 0.997))
    spaced = np.full((positions, shown + _GAP, channels), np.nan, np.float32)
    spaced[:, :shown] = panels
    figure = Figure(figsize=(2.9, 4.4), layout="constrained")
    axes = figure.add_subplot()
    # No space for the last gap: there is no panel after it.
    axes.imshow(
        spaced.reshape(-1, channels)[:-_GAP], aspect="auto", interpolation="nearest", vmin=float(low), vmax=float(high),
        cmap=matplotlib.colormaps["viridis"].resampled(_SHADES),
    )  # fmt: skip
    middles = np.arange(positions) * (shown + _GAP) + (shown - 1) / 2
    axes.set_yticks(middles, ["ON" if position % 2 == 0 else "OFF" for position in range(positions)])
    for position, label in enumerate(axes.get_yticklabels()):
        label.set(color=_ON if position % 2 == 0 else _OFF, fontweight="bold" if position % 2 == 0 else "normal")
        edges = np.array([middles[position] - shown / 2, middles[position] + shown / 2])
        axes.plot([0, 0], edges, color=_ON if position % 2 == 0 else _OFF, linewidth=5, solid_capstyle="butt")
        if track is not None:
            _draw_track(axes, track, np.array([position, position + 1]) / positions, edges, channels)
    axes.set_xlim(-0.5, channels - 0.5)
    axes.set_xlabel("frequency channel", fontsize=8)
    axes.tick_params(labelsize=8, length=0)
    axes.spines[:].set_visible(False)
    return figure


def _draw_track(axes: Axes, track: tuple[float, float], when: Floats, edges: Floats, channels: int) -> None:
    """Two arrowheads that point at where the track enters a panel and where it leaves it."""
    start, end = track
    for moment, edge, marker in zip(when, edges, ("v", "^"), strict=True):
        channel = start + (end - start) * moment
        if 0 <= channel < channels:
            axes.plot(channel, edge, marker=marker, markersize=4, color=_TRACK, clip_on=False, zorder=3)


def write_waterfalls(path: Path, snippets: npt.NDArray[np.float16], titles: Sequence[str]) -> None:
    """Draw snippets (n, P, T, F) side by side, panels from top to bottom, ON panels marked."""
    count, positions, time_bins, _ = snippets.shape
    step = max(1, time_bins // _SHOWN_TIME_BINS)
    shown = time_bins // step
    figure = Figure(figsize=(2.1 * count + 0.6, 9), layout="constrained")
    for number, (snippet, title) in enumerate(zip(snippets, titles, strict=True), start=1):
        axes = figure.add_subplot(1, count, number)
        rows = snippet[:, : shown * step].astype(np.float32).reshape(positions * shown, step, -1).mean(axis=1)
        axes.imshow(rows, aspect="auto", interpolation="nearest", vmin=-1.0, vmax=float(np.quantile(rows, 0.995)))
        for border in range(1, positions):
            axes.axhline(border * shown - 0.5, color="white", linewidth=1)
        names = ["ON" if position % 2 == 0 else "off" for position in range(positions)]
        axes.set_yticks([(position + 0.5) * shown - 0.5 for position in range(positions)])
        axes.set_yticklabels(names if number == 1 else [""] * positions)
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("channel", fontsize=8)
        axes.tick_params(labelsize=8)
    _write(path, figure)


def to_png(figure: Figure, colours: int = 128) -> bytes:
    """A figure as a PNG of few colours: a page of many pictures has to stay light."""
    figure.set_dpi(_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    small = io.BytesIO()
    image.quantize(colours, dither=Image.Dither.NONE).save(small, format="PNG", optimize=True)
    return small.getvalue()


def _chart(title: str, x: str, y: str, size: tuple[float, float] = (4.2, 3.4)) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _write(path: Path, figure: Figure) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)
