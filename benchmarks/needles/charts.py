"""The pictures of the needle benchmark: ROC, recall against SNR by kind, and histograms of scores."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.intervals import share_interval
from benchmarks.needles.data import TWIN, NeedleSet
from benchmarks.needles.scores import RATE, found_needles
from reports.plots import Curve, label_axes, plot_curve, roc, write_figure
from shard_tools.simulate import KINDS

# Colours that stay apart for colour-blind eyes (Okabe and Ito), ours first.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_SNR_BINS = 6
_BARS = 40


def write_rocs(path: Path, needles: NeedleSet, scores: Mapping[str, pd.Series]) -> None:
    """Draw the ROC curve of every row, false positives on a logarithmic axis: a search can follow up only a few."""
    target = needles.truth["target"].to_numpy()
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.add_subplot()
    for (name, score), colour in zip(scores.items(), _COLOURS, strict=False):
        values = score[needles.truth.index].to_numpy()
        plot_curve(axes, roc(target, values, name, color=colour, drawstyle="steps-post"))
    title = f"{(target == 1).sum():,} needles among {len(target):,} simulated cadences"
    label_axes(axes, title, "false positive rate", "recall")
    axes.set_xscale("log")
    axes.set_xlim(1 / max(2, (target == 0).sum()), 1)
    figure.legend(fontsize=9, loc="outside right upper")
    write_figure(path, figure)


def write_recall(path: Path, needles: NeedleSet, scores: Mapping[str, pd.Series]) -> None:
    """Draw recall at the false positive rate 1e-2 against SNR, a panel for all and for each kind of needle."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True, sharey=True).flat
    for axes, kind in zip(grid, ("all", *KINDS), strict=False):
        for (name, score), colour in zip(scores.items(), _COLOURS, strict=False):
            found = found_needles(needles, score)
            found = found if kind == "all" else found[found["kind"] == kind]
            if len(found):
                plot_curve(axes, _recall_against_snr(found, name, colour))
        label_axes(axes, kind, "", "")
        axes.axhline(0.5, color="grey", linestyle=":", linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    grid[2].tick_params(labelbottom=True)  # nothing is drawn below it
    last = grid[5]
    last.set_axis_off()
    last.legend(*grid[0].get_legend_handles_labels(), loc="center", fontsize=9)
    figure.supxlabel("SNR", fontsize=10)
    figure.supylabel(f"recall at a false positive rate of {RATE:g}", fontsize=10)
    write_figure(path, figure)


def _recall_against_snr(found: pd.DataFrame, name: str, colour: str) -> Curve:
    """Needles in bins of SNR of equal widths on a logarithmic axis: the recall of each bin with its interval."""
    edges = np.geomspace(found["snr"].min(), found["snr"].max() * 1.001, _SNR_BINS + 1)
    groups = [found[found["snr"].between(*ends, inclusive="left")] for ends in itertools.pairwise(edges)]
    snr, recall, low, high = np.array([_point(group) for group in groups if len(group)]).T
    return Curve(snr, recall, name, {"color": colour, "marker": "o", "markersize": 3}, (low, high))


def _point(group: pd.DataFrame) -> tuple[float, float, float, float]:
    """SNR and recall of some needles, and the recall's interval."""
    found = int(group["found"].sum())
    return float(np.exp(np.log(group["snr"]).mean())), found / len(group), *share_interval(found, len(group))


def write_histograms(path: Path, needles: NeedleSet, scores: Mapping[str, pd.Series]) -> None:
    """Draw each row's scores of negatives, of positives and of the positives' twins."""
    truth = needles.truth["target"]
    groups = {
        "without a needle": list(truth.index[truth == 0]),
        "with a needle": needles.twins,
        "the same, its needle in OFF panels": [f"{key}{TWIN}" for key in needles.twins],
    }
    figure = Figure(figsize=(7, 1.8 * len(scores) + 0.6), layout="constrained")
    for number, (name, score) in enumerate(scores.items(), start=1):
        axes = figure.add_subplot(len(scores), 1, number)
        # Ranks, since the scores of one row crowd at 0 and 1 and those of another run from 3 to 300.
        rank = score.rank(pct=True)
        for (label, keys), colour in zip(groups.items(), _COLOURS, strict=False):
            axes.hist(rank[keys], bins=_BARS, range=(0, 1), histtype="step", color=colour, label=label)
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_yticks([])
        if number == 1:
            figure.legend(*axes.get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside upper center")
    figure.supxlabel("rank of the score among all", fontsize=10)
    write_figure(path, figure)


def write_learning_curve(path: Path, figures: Sequence[Mapping[str, Any]]) -> None:
    """Draw AUC and recall against the cadences seen; the untrained network at the left end, the search as a line."""
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.add_subplot()
    points = sorted((row for row in figures if "cadences" in row), key=lambda row: row["cadences"])
    searched = next(row for row in figures if "cadences" not in row)
    seen = np.array([row["cadences"] for row in points], float)
    left = seen[seen > 0].min() / 3
    seen[seen == 0] = left
    names = (("auc", "ROC AUC"), ("recall_1e2", "recall at FPR 0.01"), ("recall_1e3", "recall at FPR 0.001"))
    for (name, label), colour in zip(names, _COLOURS, strict=False):
        values, low, high = (np.array([row[f"{name}{end}"] for row in points], float) for end in ("", "_low", "_high"))
        axes.plot(seen, values, "o-", color=colour, label=label)
        axes.fill_between(seen, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.axhline(searched[name], color=colour, linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(seen, ["none", *(f"{int(count):,}" for count in seen[1:])])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(top=1)
    label_axes(axes, "dotted: the classical search; bands: 95 %", "cadences trained on", "")
    figure.legend(fontsize=9, loc="outside right upper")
    write_figure(path, figure)
