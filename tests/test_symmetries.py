"""A draw or a view does to the image what it would do to the cadence: checks that need no second implementation.

The twin, with which the other tests compare, is checked too.

Axes: n samples, P positions, t time bins, F frequency channels; N planes; V views; C, H, W canvas.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.augment import DrawConfig, Draws
from pipeline.canvas import CanvasConfig, Layout
from tests import twin
from tests.test_dali_graph import MAKERS, SAMPLES, WILD, Snippets, draws_for, eval_images, short_name, train_images

Array = npt.NDArray[np.float64]
Change = Callable[[Array, Draws, int, CanvasConfig], Array]
"""A function of snippets (n, P, t, F), draws and a sample's number that returns the sample changed, (P, t, F)."""

SHAPE = (6, 28, 40)
BINS = 2
TOLERANCE = 2e-3
HALF_PRECISION = 2e-2  # tolerance for changed brightnesses up to 20 in float16
# For each layout two heights, both with whole panels: one to which a resize shrinks, and one to which it enlarges.
HEIGHTS: dict[Layout, tuple[int, int]] = {"stack6": (54, 96), "on": (27, 48), "on_off": (27, 48), "panels": (9, 16)}
PLAIN = [
    CanvasConfig(layout, height, 33, sum_time_bins=BINS, normalise=False)
    for layout, heights in HEIGHTS.items()
    for height in heights
]
WHOLE = [
    CanvasConfig(
        layout,
        heights[0],
        47,
        sum_time_bins=BINS,
        subtract="none" if layout == "on" else "lines_bursts",
        compress="asinh",
    )
    for layout, heights in HEIGHTS.items()
]
QUIET = DrawConfig(flip_frequency=0, flip_time=0, roll_frequency=0, shift_time=0, erase=0, gain=0, offset=0, cutmix=0)

on_each_maker = pytest.mark.parametrize("maker", ["twin", *MAKERS])
on_plain_canvases = pytest.mark.parametrize("canvas", PLAIN, ids=short_name)
on_all_canvases = pytest.mark.parametrize("canvas", [*PLAIN, *WHOLE], ids=short_name)


def reversed_in_time(cadence: Array) -> Array:
    """(P, t, F) with time reversed; ON panels stay in ON positions, OFF panels in OFF positions."""
    return cadence[[4, 5, 2, 3, 0, 1]][:, ::-1]


def reversed_in_frequency(cadence: Array) -> Array:
    return cadence[:, :, ::-1]


VIEWS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda cadence: cadence,
    "flip_frequency": reversed_in_frequency,
    "flip_time": reversed_in_time,
    "flip_both": lambda cadence: reversed_in_time(reversed_in_frequency(cadence)),
}


def flipped_in_frequency(cadences: Array, draws: Draws, k: int, canvas: CanvasConfig) -> Array:
    return reversed_in_frequency(cadences[k]) if draws.flip_frequency[k] else cadences[k]


def flipped_in_time(cadences: Array, draws: Draws, k: int, canvas: CanvasConfig) -> Array:
    return reversed_in_time(cadences[k]) if draws.flip_time[k] else cadences[k]


def rolled(cadences: Array, draws: Draws, k: int, canvas: CanvasConfig) -> Array:
    return np.roll(cadences[k], -int(draws.roll[k]), axis=2)


def shifted(cadences: Array, draws: Draws, k: int, canvas: CanvasConfig) -> Array:
    """A cadence shifted in time within each panel; zeros replace what would come from another panel."""
    bins = int(draws.shift[k]) * canvas.sum_time_bins
    padded = np.pad(cadences[k], ((0, 0), (max(-bins, 0), max(bins, 0)), (0, 0)))
    return padded[:, -SHAPE[1] :] if bins > 0 else padded[:, : SHAPE[1]]


def brightened(cadences: Array, draws: Draws, k: int, canvas: CanvasConfig) -> Array:
    # A sum of time bins is divided by the square root of their number.
    return cadences[k] * float(draws.gain[k]) + float(draws.offset[k]) / np.sqrt(canvas.sum_time_bins)


def erased(cadences: Array, draws: Draws, k: int, canvas: CanvasConfig) -> Array:
    plane, time, channel = draws.erase_start[k].astype(int).tolist()
    count, height, width = draws.erase_shape[k].astype(int).tolist()
    bins, changed = canvas.sum_time_bins, cadences[k].copy()
    if count:
        changed[canvas.positions[plane], time * bins : (time + height) * bins, channel : channel + width] = 0
    return changed


def pasted(cadences: Array, draws: Draws, k: int, canvas: CanvasConfig) -> Array:
    time_start, time_end, channel_start, channel_end = draws.cutmix_box[k].tolist()
    bins, changed = canvas.sum_time_bins, cadences[k].copy()
    box = np.s_[:, time_start * bins : time_end * bins, channel_start:channel_end]
    changed[box] = cadences[draws.partner[k]][box]
    return changed


def blended(cadences: Array, draws: Draws, k: int, canvas: CanvasConfig) -> Array:
    weight = float(draws.mixed[k])
    return np.asarray((1 - weight) * cadences[k] + weight * cadences[draws.partner[k]])


ALWAYS: dict[str, tuple[DrawConfig, Change]] = {
    "flip_frequency": (replace(QUIET, flip_frequency=0.6), flipped_in_frequency),
    "flip_time": (replace(QUIET, flip_time=0.6), flipped_in_time),
    "roll": (replace(QUIET, roll_frequency=0.5), rolled),
}
# Removing the background after these changes gives another plane, so they are tested without it.
WITHOUT_BACKGROUND: dict[str, tuple[DrawConfig, Change]] = {
    "shift": (replace(QUIET, shift_time=0.4), shifted),
    "gain and offset": (replace(QUIET, gain=0.5, offset=1.0), brightened),
    "erase": (replace(QUIET, erase=1.0, erase_size=0.7), erased),
    "cutmix box": (replace(QUIET, cutmix=1.0), pasted),
    "cutmix band": (replace(QUIET, cutmix=1.0, cutmix_box="band"), pasted),
    "mixup": (replace(QUIET, mixup=1.0), blended),
}


@pytest.fixture(scope="module")
def snippets() -> Snippets:
    """Cadences in which each sample, panel, time and channel differs from every other."""
    sample, panel, time, channel = np.indices((SAMPLES, *SHAPE))
    ramp = sample + 2 * panel + np.sin(time / 5) + channel / 16
    return (ramp + np.random.default_rng(0).normal(size=ramp.shape)).astype(np.float16)


def evaluated(snippets: npt.NDArray[np.floating], canvas: CanvasConfig, maker: str) -> npt.NDArray[np.floating]:
    """Evaluation images (n, V, C, H, W) of snippets (n, P, t, F)."""
    halves = snippets.astype(np.float16)
    if maker != "twin":
        return eval_images(halves, canvas, maker)
    images = [twin.resize(twin.to_planes(snippet, canvas), canvas) for snippet in halves]
    return np.stack([twin.make_views(image, canvas, canvas.views) for image in images])


def trained(snippets: Snippets, canvas: CanvasConfig, draws: Draws, maker: str) -> npt.NDArray[np.floating]:
    """Training images (n, C, H, W) of snippets (n, P, t, F), augmented and mixed."""
    if maker != "twin":
        return train_images(snippets, canvas, draws, maker)
    planes = [
        twin.augment(twin.to_planes(snippet, canvas, draws, k), canvas, draws, k) for k, snippet in enumerate(snippets)
    ]
    return np.stack([twin.resize(each, canvas) for each in twin.mix(np.stack(planes), draws)])


def by_plane(images: npt.NDArray[np.floating], canvas: CanvasConfig) -> npt.NDArray[np.floating]:
    """(..., C, H, W) to (..., N, h, W), without the rows in which a resize mixes neighbouring panels."""
    rows = canvas.channels * canvas.height // canvas.planes
    return images.reshape(*images.shape[:-3], canvas.planes, rows, canvas.width)[..., 1:-1, :]


@on_each_maker
@on_all_canvases
def test_a_view_is_the_image_of_the_reversed_cadence(snippets: Snippets, canvas: CanvasConfig, maker: str) -> None:
    views = evaluated(snippets, canvas, maker)
    for place, view in enumerate(canvas.views):
        changed = np.stack([VIEWS[view](snippet) for snippet in snippets.astype(np.float64)])
        expected = evaluated(changed, canvas, maker)[:, 0]
        np.testing.assert_allclose(views[:, place], expected, atol=TOLERANCE, rtol=TOLERANCE, err_msg=view)


@on_each_maker
@on_all_canvases
@pytest.mark.parametrize("name", ALWAYS)
def test_a_flip_or_a_roll_alone_makes_the_image_of_the_changed_cadence(
    snippets: Snippets, canvas: CanvasConfig, name: str, maker: str
) -> None:
    config, change = ALWAYS[name]
    check_draw(snippets, canvas, config, change, maker, TOLERANCE)


@on_each_maker
@on_plain_canvases
@pytest.mark.parametrize("name", WITHOUT_BACKGROUND)
def test_any_other_draw_alone_makes_the_image_of_the_changed_cadence(
    snippets: Snippets, canvas: CanvasConfig, name: str, maker: str
) -> None:
    config, change = WITHOUT_BACKGROUND[name]
    check_draw(snippets, canvas, config, change, maker, HALF_PRECISION)


def check_draw(
    snippets: Snippets, canvas: CanvasConfig, config: DrawConfig, change: Change, maker: str, tolerance: float
) -> None:
    draws = draws_for(canvas, SHAPE, config, seed=11)
    cadences = snippets.astype(np.float64)
    changed = np.stack([change(cadences, draws, k, canvas) for k in range(SAMPLES)])
    assert (changed != cadences).any() or (config.flip_time and not canvas.flips_time)
    expected = evaluated(changed, canvas, maker)[:, 0]
    found = trained(snippets, canvas, draws, maker)
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance)


@on_each_maker
@pytest.mark.parametrize("canvas", WHOLE, ids=short_name)
def test_gain_and_offset_are_those_of_the_normalised_image(
    snippets: Snippets, canvas: CanvasConfig, maker: str
) -> None:
    draws = draws_for(canvas, SHAPE, replace(QUIET, gain=0.5, offset=1.0), seed=11)
    gain, offset = (values.reshape(-1, 1, 1, 1) for values in (draws.gain, draws.offset))
    expected = evaluated(snippets, canvas, maker)[:, 0] * gain + offset
    found = trained(snippets, canvas, draws, maker)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@on_each_maker
@on_plain_canvases
def test_on_stays_on_in_every_view_and_under_every_draw(canvas: CanvasConfig, maker: str) -> None:
    """ON panels are bright and OFF panels dark, and the same must hold for the planes of every image."""
    cadences = np.random.default_rng(1).normal(scale=0.1, size=(SAMPLES, *SHAPE))
    cadences += np.where(np.arange(6) % 2 == 0, 8, -8)[:, None, None]
    sign = np.where(np.isin(canvas.positions, (0, 2, 4)), 1, -1)[:, None, None]
    views = by_plane(evaluated(cadences, canvas, maker), canvas) * sign
    assert views.min() > 7
    for seed in range(4):
        draws = draws_for(canvas, SHAPE, WILD, seed)
        planes = by_plane(trained(cadences.astype(np.float16), canvas, draws, maker), canvas) * sign
        # Shifted-in and erased pixels are 0, and offsets go up to 1.
        assert planes.min() > -1.1 and planes.mean(axis=(-1, -2)).min() > 1


@on_each_maker
@on_plain_canvases
@pytest.mark.parametrize("interference", [0.0, 1.0])
def test_an_added_signal_shows_in_the_slots_of_the_panels_it_was_added_to(
    canvas: CanvasConfig, maker: str, interference: float
) -> None:
    noise = np.random.default_rng(2).normal(size=(SAMPLES, *SHAPE)).astype(np.float16)
    config = replace(WILD, inject=1.0, inject_interference=interference, inject_snr_min=5, inject_snr_max=9)
    draws = replace(draws_for(canvas, SHAPE, config), **nothing_else(canvas))
    found = trained(noise, canvas, draws, maker) - evaluated(noise, canvas, maker)[:, 0]
    is_changed = np.abs(by_plane(found, canvas)).max(axis=(-1, -2)) > 0.5
    is_on = np.isin(canvas.positions, (0, 2, 4))
    assert np.array_equal(is_changed, draws.signal_level[:, 0].max(axis=2) > 0)
    assert draws.has_needle.all() == (not interference)
    if not interference:
        assert is_changed[:, is_on].any(axis=1).all() and not is_changed[:, ~is_on].any()


def nothing_else(canvas: CanvasConfig) -> dict[str, npt.NDArray[np.generic]]:
    """Values for the fields of draws, except those of signals, that change nothing."""
    quiet = vars(draws_for(canvas, SHAPE, QUIET))
    return {name: quiet[name] for name in quiet if not name.startswith("signal_") and name != "has_needle"}
