"""The NumPy twin of both engines: every step under the same name, in float64 and as plain as it can be.

Axes as in pipeline/dali_graph.py: P positions, t time bins before summing, N planes, T time bins, F frequency channels;
C, H, W canvas; n samples; V views.
"""

import numpy as np
import numpy.typing as npt

from pipeline.augment import Draws
from pipeline.canvas import NORMALISE_EPSILON, CanvasConfig

Array = npt.NDArray[np.float64]


def to_planes(snippet: npt.NDArray[np.float16], canvas: CanvasConfig, draws: Draws | None = None, k: int = 0) -> Array:
    """(P, t, F) to (N, T, F), with sample k's signals."""
    order = {"stack6": [0, 1, 2, 3, 4, 5], "on": [0, 2, 4]}.get(canvas.layout, [0, 2, 4, 1, 3, 5])
    panels = snippet.astype(np.float64)[order]
    is_normalised = draws is not None and bool(draws.signal_normalised[k])
    if draws is not None and is_normalised:
        panels = normalise_where_added(add_signals(panels, 1, draws, k), draws, k)
    values = sum_time_bins(panels, canvas.sum_time_bins)
    if draws is not None and not is_normalised:
        values = add_signals(values, canvas.sum_time_bins, draws, k)
    return compress(normalise(subtract_means(values, canvas), canvas), canvas)


def sum_time_bins(values: Array, bins: int) -> Array:
    """(N, t, F) to (N, T, F)."""
    count, raw_bins, channels = values.shape
    return np.asarray(values.reshape(count, raw_bins // bins, bins, channels).sum(axis=2) / np.sqrt(bins))


def add_signals(planes: Array, bins: int, draws: Draws, k: int) -> Array:
    """Add sample k's signals to (N, T, F), each row of which is the sum of `bins` time bins."""
    values = planes
    for signal in range(draws.signal_level.shape[1]):
        values = values + sum_time_bins(signal_of(draws, k, signal, planes.shape[2]), bins) * noise_of(planes)
    return values


def normalise_where_added(panels: Array, draws: Draws, k: int) -> Array:
    """(N, t, F) in which each panel with a signal has mean 0 and standard deviation 1."""
    values = panels.copy()
    for plane in range(len(panels)):
        if (draws.signal_level[k][:, plane] > 0).any():
            variance = panels[plane].var() + NORMALISE_EPSILON
            values[plane] = (panels[plane] - panels[plane].mean()) / np.sqrt(variance)
    return values


def subtract_means(planes: Array, canvas: CanvasConfig) -> Array:
    """(N, T, F) without its background."""
    values = planes
    if canvas.subtract != "none":
        values = values - values.mean(axis=(0, 1))
    if canvas.subtract == "lines_bursts":
        values = values - values.mean(axis=2, keepdims=True)
    return values


def normalise(planes: Array, canvas: CanvasConfig) -> Array:
    """(N, T, F) with mean 0 and standard deviation 1 in each plane."""
    if not canvas.normalise:
        return planes
    mean = planes.mean(axis=(1, 2), keepdims=True)
    variance = planes.var(axis=(1, 2), keepdims=True)
    return np.asarray((planes - mean) / np.sqrt(variance + NORMALISE_EPSILON))


def compress(planes: Array, canvas: CanvasConfig) -> Array:
    """The asinh of planes."""
    return np.arcsinh(planes) if canvas.compress == "asinh" else planes


def signal_of(draws: Draws, k: int, signal: int, channels: int) -> Array:
    """(N, t, F) brightness of one of sample k's signals, in standard deviations of a plane's noise."""
    path, level = (values[k, signal].astype(np.float64) for values in (draws.signal_path, draws.signal_level))
    offset = (np.arange(channels) - path[:, :, None]) / float(draws.signal_width[k, signal])
    profile = np.exp(-0.5 * offset**2)
    if draws.signal_lorentzian[k, signal]:
        end = 1 / (1 + 15**2)  # the profile ends 15 half widths from its centre
        profile = np.maximum(1 / (1 + offset**2) - end, 0) / (1 - end)
    return np.asarray(level[:, :, None] * profile)


def noise_of(values: Array) -> Array:
    """(N, 1, 1) standard deviation of white noise whose steps between channels are as large."""
    steps = np.abs(np.diff(values, axis=2))
    # The mean square root of the distance between two normal numbers, by definition.
    x = np.linspace(0, 20, 200_001)
    root = np.trapezoid(np.sqrt(x) * np.exp(-(x**2) / 4) / np.sqrt(np.pi), x)
    return np.asarray((np.sqrt(steps).mean(axis=(1, 2), keepdims=True) / root) ** 2)


def augment(planes: Array, canvas: CanvasConfig, draws: Draws, k: int) -> Array:
    """Sample k's flips, roll, shift, gain, offset and erased box on (N, T, F)."""
    values = planes.copy()
    count, time_bins, _ = values.shape
    if draws.flip_frequency[k]:
        values = values[:, :, ::-1]
    if draws.flip_time[k]:
        slots = range(count) if canvas.layout == "on" else None
        # Reverse time inside each panel, and the order of the ON panels and of the OFF panels among themselves.
        order = list(slots)[::-1] if slots else [2, 1, 0, 5, 4, 3]
        values = values[order][:, ::-1]
    values = np.roll(values, -int(draws.roll[k]), axis=2)
    shift = int(draws.shift[k])
    shifted = np.zeros_like(values)
    for bin_ in range(time_bins):
        if 0 <= bin_ + shift < time_bins:
            shifted[:, bin_] = values[:, bin_ + shift]
    values = shifted * float(draws.gain[k]) + float(draws.offset[k])
    start, shape = draws.erase_start[k].astype(int), draws.erase_shape[k].astype(int)
    if shape.all():
        values[tuple(slice(a, a + b) for a, b in zip(start, shape, strict=True))] = 0
    return values


def mix(planes: Array, draws: Draws) -> Array:
    """CutMix and mixup on (n, N, T, F); partners are places in the batch."""
    values = planes.copy()
    for k, (time_start, time_end, channel_start, channel_end) in enumerate(draws.cutmix_box):
        box = np.s_[:, time_start:time_end, channel_start:channel_end]
        values[k][box] = planes[draws.partner[k]][box]
        weight = float(draws.mixed[k])
        values[k] = (1 - weight) * values[k] + weight * planes[draws.partner[k]]
    return values


def resize(planes: Array, canvas: CanvasConfig) -> Array:
    """(N, T, F) to (C, H, W)."""
    count, time_bins, channels = planes.shape
    image = planes.reshape(canvas.channels, count // canvas.channels * time_bins, channels)
    return resize_axis(resize_axis(image, canvas.height, axis=1), canvas.width, axis=2)


def resize_axis(image: Array, size: int, axis: int) -> Array:
    """Bilinear resize with antialiasing: a triangle as wide as an output pixel, edge pixels repeated outwards."""
    old = image.shape[axis]
    if old == size:
        return image
    scale = old / size
    reach = max(scale, 1.0)
    weights = np.zeros((size, old))
    for new in range(size):
        centre = (new + 0.5) * scale - 0.5
        for source in range(int(np.floor(centre - reach)), int(np.ceil(centre + reach)) + 1):
            weight = max(0.0, 1 - abs(source - centre) / reach)
            weights[new, min(max(source, 0), old - 1)] += weight
    weights /= weights.sum(axis=1, keepdims=True)
    return np.moveaxis(np.tensordot(weights, image, axes=(1, axis)), 0, axis)


def make_views(image: Array, canvas: CanvasConfig, views: tuple[str, ...]) -> Array:
    """(C, H, W) to (V, C, H, W)."""
    # If panels are channels, the order of the ON panels among themselves, and of the OFF panels, is time too.
    backwards = image[[2, 1, 0, 5, 4, 3]] if canvas.layout == "panels" else image
    flips = {
        "identity": image,
        "flip_frequency": image[:, :, ::-1],
        "flip_time": backwards[:, ::-1],
        "flip_both": backwards[:, ::-1, ::-1],
    }
    return np.stack([flips[view] for view in views])
