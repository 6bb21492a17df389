"""Pictures of a run: curves, ROC, and candidates as waterfalls.

Axes of a snippet: P position, T time bin, F frequency channel.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_curve

from shard_tools.files import whole_file

_SHOWN_TIME_BINS = 40  # of a panel: more than a picture has pixels for, and summing lifts needles out of the noise


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


def write_roc(path: Path, target: npt.NDArray[np.integer], score: npt.NDArray[np.floating], auc: float) -> None:
    """Draw the ROC curve of validation scores."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    if len(np.unique(target)) == 2:
        false_positive_rate, recall, _ = roc_curve(target, score)
        axes.plot(false_positive_rate, recall, label=f"ROC AUC {auc:.4f}")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="chance")
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("recall")
    axes.set_title(f"validation, {len(target):,} cadences")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    _write(path, figure)


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


def _write(path: Path, figure: Figure) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
