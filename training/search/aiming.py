"""Aim a model's search at the cadences of an observation: in training at their median, in scoring at each by itself.

A search (lines.py) has to know when the panels began and how steep a line may be. Both are the same for all of the
competition's snippets, but differ between observations.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.canvas import CanvasConfig
from shard_tools.axes import Axes
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from shard_tools.observation.observed_axes import axes_of, cadence_of, is_observed
from training.search.lines import Search


def aim(model: nn.Module, axes: Axes) -> None:
    """Make a model's search look at cadences with these axes; a model without a search stays as it is."""
    for search in _searches(model):
        search.observe(axes)


def aim_at(model: nn.Module, manifest: Manifest, canvas: CanvasConfig) -> None:
    """Aim a model at the median of a data set's observed cadences; do nothing if `ingest` did not cut the data set.

    Raises InputError if the canvas resizes the panels: lines would be looked for in the wrong places.
    """
    if not is_observed(manifest) or not _searches(model):
        return
    axes = median_axes(axes_of(manifest)).summed(canvas.sum_time_bins)
    if (axes.time_bins, axes.channels) != (canvas.height, canvas.width):
        raise InputError(
            f"--height {canvas.height} --width {canvas.width}: expected {axes.time_bins} and {axes.channels} for "
            f"{manifest.root}, as the search of --stem needs panels that are not resized"
        )
    aim(model, axes)


def aimed_axes(model: nn.Module) -> dict[str, Any] | None:
    """The axes that a model's search looks at, as JSON values; None for a model without a search."""
    return next((asdict(search.axes) for search in _searches(model)), None)


def parse_axes(plain: dict[str, Any]) -> Axes:
    """The axes of `aimed_axes`, read from JSON. Raises KeyError or TypeError if it is no such description."""
    return Axes(**{**plain, "panel_starts_s": tuple(plain["panel_starts_s"])})


def median_axes(each: Sequence[Axes]) -> Axes:
    """The median of each quantity over several cadences, in time bins and channels; the steepest drift of any."""
    bin_length = float(np.median([axes.bin_length_s for axes in each]))
    width = float(np.median([axes.channel_width_hz for axes in each]))
    starts = np.median([np.array(axes.panel_starts_s) / axes.bin_length_s for axes in each], axis=0) * bin_length
    steepest = max(axes.steepest for axes in each)
    max_drift = steepest * width / (each[0].time_bins * bin_length)
    return Axes(each[0].time_bins, each[0].channels, bin_length, width, tuple(starts.tolist()), max_drift)


class CadenceScorer:
    """Scores snippets with a model's search aimed at the cadence of each; on leaving the context it is aimed as before.

    The drift rates that are searched stay those of the training, in channels a time bin: the network was trained on
    windows of sums at these rates.
    """

    def __init__(self, models: Iterable[nn.Module], manifest: Manifest | None) -> None:
        """`manifest` holds the rows that are scored."""
        self._searches = [search for model in models for search in _searches(model)]
        self._before = [search.axes for search in self._searches]
        is_needed = manifest is not None and bool(self._searches) and is_observed(manifest)
        self._axes = axes_of(manifest) if manifest is not None and is_needed else []
        self._cadence = cadence_of(manifest) if manifest is not None and is_needed else np.zeros(0, np.int64)

    def __enter__(self) -> "CadenceScorer":
        return self

    def __exit__(self, *_: object) -> None:
        for search, axes in zip(self._searches, self._before, strict=True):
            search.observe(axes)

    def score(self, rows: Tensor, image: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """What `forward` makes of images (B, ...), cadence by cadence; `rows` (B,) are their rows in the manifest."""
        if not self._axes:
            return forward(image)
        cadence = self._cadence[rows.cpu().numpy()]
        found: list[tuple[npt.NDArray[np.int64], Tensor]] = []
        for number in np.unique(cadence).tolist():
            for search, before in zip(self._searches, self._before, strict=True):
                search.observe(started_as(before, self._axes[number]))
            places = np.flatnonzero(cadence == number)
            found.append((places, forward(image[torch.from_numpy(places).to(image.device)])))
        order = np.argsort(np.concatenate([places for places, _ in found]))
        return torch.cat([logits for _, logits in found])[torch.from_numpy(order).to(image.device)]


def started_as(axes: Axes, cadence: Axes) -> Axes:
    """`axes` with the panels' starts of `cadence`, in time bins."""
    length = axes.bin_length_s * axes.time_bins / (cadence.bin_length_s * cadence.time_bins)
    return replace(axes, panel_starts_s=tuple(start * length for start in cadence.panel_starts_s))


def _searches(model: nn.Module) -> list[Search]:
    return [module for module in model.modules() if isinstance(module, Search)]
