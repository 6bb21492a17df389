"""The picture of the learning check: training loss, gradients and updates of each preset."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.learning.runs import Learning
from benchmarks.learning.verdicts import MEMORISED, UPDATE_SHARES
from reports.plots import Curve, label_axes, plot_curve, write_figure
from training.part_norms import gradient_norm, update_share

_POINTS = {"marker": "o", "markersize": 3}


def write_learning(path: Path, learnings: Sequence[tuple[str, str, Learning]]) -> None:
    """Draw a row for each preset: the losses in each of its precisions, and the norms in the last of them."""
    presets = list(dict.fromkeys(preset for preset, _, _ in learnings))
    figure = Figure(figsize=(13, 3.4 * len(presets)), layout="constrained")
    grid = figure.subplots(len(presets), 3, squeeze=False)
    for (losses, gradients, updates), preset in zip(grid, presets, strict=True):
        own = {precision: learning for name, precision, learning in learnings if name == preset}
        _draw_losses(losses, preset, own)
        precision, learning = list(own.items())[-1]
        _draw_norms(gradients, updates, f"{preset}, {precision}", learning)
    write_figure(path, figure)


def _draw_losses(axes: Axes, preset: str, learnings: Mapping[str, Learning]) -> None:
    for precision, learning in learnings.items():
        losses = np.maximum(learning.pass_losses, 1e-4)
        plot_curve(axes, Curve(learning.pass_steps * np.arange(1.0, len(losses) + 1), losses, precision))
    axes.axhline(MEMORISED, color="grey", linestyle=":")
    axes.set_yscale("log")
    label_axes(axes, f"{preset}: loss of each pass over the cadences", "step", "")
    axes.legend()


def _draw_norms(gradients: Axes, updates: Axes, name: str, learning: Learning) -> None:
    for part in dict.fromkeys(norms["part"] for norms in learning.norms):
        own = [norms for norms in learning.norms if norms["part"] == part]
        steps = [norms["step"] for norms in own]
        plot_curve(gradients, Curve(steps, [gradient_norm(norms) for norms in own], part, _POINTS))
        plot_curve(updates, Curve(steps, [update_share(norms) for norms in own], part, _POINTS))
    for bound in UPDATE_SHARES:
        updates.axhline(bound, color="grey", linestyle=":")
    for axes, what in ((gradients, "gradient before clipping"), (updates, "update / weights")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        label_axes(axes, f"{name}: {what}", "step", "")
    updates.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
