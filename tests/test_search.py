"""The candidates' promises: right sums along lines, lines found in place and turned upright, networks that learn."""

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infer import InferConfig, infer
from pipeline.augment import DrawConfig
from pipeline.canvas import CanvasConfig
from shard_tools.axes import Axes, kaggle_axes
from shard_tools.errors import InputError
from shard_tools.sample import read_snippets
from tests import twin
from tests.tiny import pack_tiny, tiny_config
from train import train
from training.model import ModelConfig, build_model
from training.search.candidates import (
    CUTOUT_CHANNELS,
    CUTOUT_PLANES,
    WINDOW_CHANNELS,
    WINDOW_PLANES,
    WINDOW_RATES,
    Candidates,
    SumWindows,
    upright_shape,
)
from training.search.lines import EVIDENCE, Search, asinh, flatten, near, whiten
from training.weights import fill_model, load_weights, save_weights

BINS, CHANNELS = 39, 256
POSITIONS = (0, 2, 4, 1, 3, 5)  # positions of an image's panels in the cadence
Array = npt.NDArray[np.float64]


def with_line(
    values: Array, rate: float, middle: float, level: float, panels: tuple[int, ...] = (0, 1, 2)
) -> torch.Tensor:
    """Add a line of `rate` channels per time bin, at channel `middle` in the cadence's middle; return (1, P, T, F)."""
    out, channel = values.copy(), np.arange(values.shape[2])
    for panel in panels:
        for row in range(values.shape[1]):
            time = POSITIONS[panel] * values.shape[1] + row - (6 * values.shape[1] - 1) / 2
            out[panel, row] += level * np.exp(-0.5 * (channel - middle - rate * time) ** 2)
    return torch.from_numpy(out.astype(np.float32))[None]


def noise(seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(6, BINS, CHANNELS))


def found_at(candidates: Candidates | SumWindows, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        seen, evidence, *_ = candidates(image)
    return seen[0], evidence[0].sinh()


def test_sums_are_those_of_rows_shifted_one_by_one() -> None:
    values, candidates = noise(), Candidates(kaggle_axes(BINS, CHANNELS), 4)
    found = candidates.sums(torch.from_numpy(values).float()[None])[0].numpy()
    waves = np.fft.rfft(values, n=2 * CHANNELS, axis=2)
    waves[..., int(0.75 * (CHANNELS + 1)) :] = 0
    k = np.arange(CHANNELS + 1)
    for number in (0, 20, 28, 56):
        rate = float(candidates.rates[number])
        for panel, position in enumerate(POSITIONS):
            time = position * BINS + np.arange(BINS) - (6 * BINS - 1) / 2
            turned = waves[panel] * np.exp(2j * np.pi * np.outer(time * rate, k) / (2 * CHANNELS))
            expected = np.roll(np.fft.irfft(turned, n=2 * CHANNELS, axis=1), CHANNELS // 2, axis=1).sum(axis=0)
            expected /= np.sqrt(BINS)
            np.testing.assert_allclose(found[panel, number], expected, atol=2e-3)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.floats(-0.25, 0.25), st.floats(90, 166))
def test_a_line_in_the_on_panels_is_the_first_candidate_and_stands_upright(
    seed: int, rate: float, middle: float
) -> None:
    candidates = Candidates(kaggle_axes(BINS, CHANNELS), 4)
    cutouts, evidence = found_at(candidates, with_line(noise(seed), rate, middle, level=4.0))
    assert cutouts.shape == (4, CUTOUT_PLANES, *upright_shape(BINS)) and evidence.shape == (4, EVIDENCE)
    assert evidence[0, 0] > 2 * evidence[1:, 0].max()
    columns = cutouts[0, :3, :BINS].mean(dim=(0, 1))
    assert abs(int(columns.argmax()) - (CUTOUT_CHANNELS - 1) / 2) <= 1.5
    others = cutouts[0, 3:6, :BINS].mean(dim=(0, 1))
    assert columns.max() > 4 * others.abs().max()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.floats(-0.15, 0.15), st.floats(100, 156))
def test_a_window_shows_the_sums_around_its_line(seed: int, rate: float, middle: float) -> None:
    search = SumWindows(kaggle_axes(BINS, CHANNELS), 4)
    windows, evidence = found_at(search, with_line(noise(seed), rate, middle, level=4.0))
    assert windows.shape == (4, WINDOW_PLANES, WINDOW_RATES, WINDOW_CHANNELS) and evidence.shape == (4, EVIDENCE)
    row, column = WINDOW_RATES // 2, WINDOW_CHANNELS // 2
    on, off = windows[:, :3, row, column].sinh(), windows[:, 3:6, row, column].sinh()
    torch.testing.assert_close(on.sort(1, descending=True).values, evidence[:, 1:4], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(off.sort(1, descending=True).values, evidence[:, 5:8], rtol=1e-3, atol=1e-3)
    assert on[0].mean() > 4 * off[0].abs().mean()
    # The search has chosen well: no neighbour is much brighter in the two best ON panels together.
    assert windows[0, :3].sinh().topk(2, 0).values.sum(0).max() < 1.3 * on[0].topk(2).values.sum()
    assert windows[0, 9].argmax() == row * WINDOW_CHANNELS + column
    assert windows[:, 8].unique().numel() <= 4


def test_the_control_sees_the_windows_of_the_exchanged_cadence() -> None:
    search, image = SumWindows(kaggle_axes(BINS, CHANNELS), 4), with_line(noise(), 0.0, 128, level=3.0)
    exchanged = SumWindows(kaggle_axes(BINS, CHANNELS), 4)
    exchanged.panel_turn = search.panel_turn.roll(3, 0)
    with torch.no_grad():
        windows, evidence, *paths, channel, rate = search(image)
        again, same, *exchanged_paths, same_channel, same_rate = exchanged(image.roll(3, 1))
    for here, there in zip(paths, exchanged_paths, strict=True):
        torch.testing.assert_close(there.roll(3, 1), here, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again.roll(1, 0), windows, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(same.roll(1, 0), evidence, rtol=1e-3, atol=1e-3)
    assert torch.equal(same_channel.roll(1, 0), channel) and torch.equal(same_rate.roll(1, 0), rate)


def test_what_lies_outside_of_the_sums_is_0_in_a_window() -> None:
    search = SumWindows(kaggle_axes(BINS, CHANNELS), 4)
    rate = float(search.rates[118])  # two rates below the steepest: five rows of the window are outside
    middle = 128 - rate * (-(6 * BINS - 1) / 2 + (BINS - 1) / 2)
    windows, _ = found_at(search, with_line(noise(), rate, middle, level=6.0, panels=(0,)))
    rows = windows[0, :8].abs().amax((0, 2)) > 0
    assert 9 <= int(rows.sum()) <= 13 and not rows[-1] and rows[0]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.001, 1000))
def test_noise_is_white_after_bursts_bands_and_lines_whatever_the_units(seed: int, unit: float) -> None:
    rng = np.random.default_rng(seed)
    channel = np.arange(CHANNELS)
    sky = noise(seed) * rng.uniform(0.2, 5, (6, BINS, 1))  # each time bin has its own noise,
    sky += 50 * rng.random((6, BINS, 1)) + 20 * np.sin(channel / 60) * rng.random((6, BINS, 1))  # level and slope
    sky[:, :, 100] += 8  # a persistent line
    values = whiten(torch.from_numpy((unit * sky).astype(np.float32))[None])[0]
    away = np.abs(channel - 100) > 21
    assert values[..., away].std() == pytest.approx(1, abs=0.1)
    assert values[..., away].std((1, 2)).sub(1).abs().max() < 0.15
    assert values[..., 100].mean(1).abs().max() < 2
    with_needle = whiten(with_line(noise(seed), 0.05, 128, level=4.0))
    exchanged = whiten(with_line(noise(seed), 0.05, 128, level=4.0).roll(3, 1))
    torch.testing.assert_close(exchanged.roll(3, 1), with_needle, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("panels", [(3, 4, 5), (0, 1, 2, 3, 4, 5)])
def test_what_is_in_off_panels_too_counts_against_a_line(panels: tuple[int, ...]) -> None:
    candidates = Candidates(kaggle_axes(BINS, CHANNELS), 4)
    _, needle = found_at(candidates, with_line(noise(), 0.1, 128, level=4.0))
    _, evidence = found_at(candidates, with_line(noise(), 0.1, 128, level=4.0, panels=panels))
    assert evidence[0, 0] < 0.5 * needle[0, 0]


def test_neither_scale_nor_zero_point_nor_persistent_lines_matter() -> None:
    image = with_line(noise(), 0.1, 128, level=3.0)
    torch.testing.assert_close(flatten(image * 7 + 100), flatten(image), atol=0.01, rtol=0.01)
    steady, zeros = 30.0 * (torch.arange(CHANNELS) % 50 == 7), torch.linspace(-2, 5, 6).reshape(6, 1, 1)
    torch.testing.assert_close(flatten(image + steady + zeros), flatten(image), atol=1e-4, rtol=0)
    constant = flatten(torch.full((1, 6, BINS, CHANNELS), 3.0))
    assert torch.isfinite(constant).all()
    assert 0.9 < float(flatten(torch.from_numpy(noise()).float()[None]).std()) < 1.1


def test_bands_and_steps_of_one_panel_go_and_lines_stay() -> None:
    hump = 2 * np.exp(-0.5 * ((np.arange(CHANNELS) - 128) / 30) ** 2)
    wide = noise()
    wide[1] += hump
    flat, plain = (flatten(torch.from_numpy(values).float()[None]) for values in (wide, noise()))
    assert (flat - plain)[0, 1].mean(0).abs().max() < 0.5
    # A steady line in the ON panels is in half of the values that give its channel's level, and still stays whole.
    still = flatten(with_line(noise(), 0.0, 128, level=3.0))[0]
    assert still[:3, :, 128].mean() > 2.2 and still[3:, :, 128].mean().abs() < 0.3


def test_an_unsteady_line_is_told_by_the_panels_in_which_it_is_fainter() -> None:
    candidates = Candidates(kaggle_axes(BINS, CHANNELS), 4)
    bright = with_line(noise(), 0.0, 128, level=3.0, panels=(0,))[0].double().numpy()
    _, needle = found_at(candidates, with_line(bright, 0.0, 128, level=0.0))
    _, unsteady = found_at(candidates, with_line(bright, 0.0, 128, level=-3.0, panels=(4,)))
    assert unsteady[0, 0] < 0.5 * needle[0, 0]


def test_on_and_off_panels_are_treated_alike() -> None:
    image = with_line(noise(), 0.1, 128, level=3.0)
    torch.testing.assert_close(flatten(image.roll(3, 1)), flatten(image).roll(3, 1))
    # The control finds in the OFF panels what the search finds in the ON panels.
    candidates = Candidates(kaggle_axes(BINS, CHANNELS), 4)
    found = []
    for panels in ((0, 1, 2), (3, 4, 5)):
        with torch.no_grad():
            cutouts, evidence = candidates(with_line(noise(), 0.1, 128, level=3.0, panels=panels))
        search, control = evidence[:, 0, 0].sinh() if panels[0] == 0 else evidence[:, 0, 0].sinh().flip(0)
        assert search > 5 * control
        found.append((search, (cutouts if panels[0] == 0 else cutouts.flip(0))[0, 0, :3, :BINS].mean((0, 1))))
    (needle, line), (twin, same) = found
    assert abs(needle - twin) < 0.2 * needle and line.argmax() == same.argmax()


@pytest.mark.parametrize("panel", [0, 2])
def test_a_steep_line_in_one_panel_is_cut_out_upright(panel: int) -> None:
    candidates = Candidates(kaggle_axes(BINS, CHANNELS), 4)
    rate = float(candidates.rates[118])  # 131 channels per panel: far outside the panels in mid-cadence
    middle = 128 - rate * (POSITIONS[panel] * BINS + (BINS - 1) / 2 - (6 * BINS - 1) / 2)
    cutouts, evidence = found_at(candidates, with_line(noise(), rate, middle, level=6.0, panels=(panel,)))
    assert evidence[0, 0] > 2 * evidence[1:, 0].max()
    assert abs(int(cutouts[0, panel, :BINS].mean(0).argmax()) - (CUTOUT_CHANNELS - 1) / 2) <= 1.5


def test_a_mirrored_cadence_has_mirrored_candidates() -> None:
    candidates, image = Candidates(kaggle_axes(BINS, CHANNELS), 4), with_line(noise(), 0.1, 140, level=3.0)
    cutouts, evidence = found_at(candidates, image)
    mirrored, again = found_at(candidates, image.flip(3))
    torch.testing.assert_close(again[0], evidence[0], atol=0.05, rtol=0.02)
    torch.testing.assert_close(mirrored[0].flip(2), cutouts[0], atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("name", "stem"), [("swin_pico", "candidates"), ("convnext_window", "sums")])
def test_an_untrained_model_believes_brighter_needles_more_and_each_weight_is_in_its_gradient(
    name: str, stem: Literal["candidates", "sums"]
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(name, stem=stem)
    model = build_model(config, 6, BINS, CHANNELS)
    images = torch.cat([with_line(noise(seed), 0.05, 128, level) for seed, level in enumerate((0, 0.5, 1, 2, 4))])
    logit = model(images)
    assert logit.shape == (5, 1) and (logit.diff(dim=0) > 0).all()
    logit.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # DDP needs a gradient for each
    first = model.backbone.patch_embed.proj.weight if stem == "candidates" else model.backbone.stem[0].weight
    last = model.weigh[2].weight if stem == "candidates" else model.compare[2].weight
    for parameter in (first, model.backbone.get_classifier().weight, last, model.slope):
        assert parameter.grad.abs().max() > 0
    with torch.no_grad():
        model.eval()
        torch.testing.assert_close(model(images), torch.cat([model(image[None]) for image in images]))
    with pytest.raises(InputError, match="--canvas panels"):
        build_model(config, 2, 112, 224)
    with pytest.raises(InputError, match="needs 28 channels or more, and the canvas has 27"):
        build_model(config, 6, BINS, 27)
    with pytest.raises(InputError, match="--candidates 64: a canvas of 30 channels has 60 at most"):
        build_model(dataclasses.replace(config, candidates=64), 6, BINS, 30)


def test_a_sky_with_lines_in_its_off_panels_is_believed_less_but_not_without_bound() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig("swin_pico", stem="candidates"), 6, BINS, CHANNELS)
    sky = with_line(noise(), 0.1, 60, level=2.0)[0].double().numpy()
    levels = (0, 2, 6, 12)
    with torch.no_grad():
        logit = model(torch.cat([with_line(sky, -0.1, 200, level, panels=(3, 4, 5)) for level in levels]))[:, 0]
    assert logit[0] - logit[1] > 0.5 and abs(logit[3] - logit[1]) < 0.5


@pytest.mark.parametrize(("name", "stem"), [("swin_pico", "candidates"), ("convnext_window", "sums")])
def test_weights_of_a_run_with_candidates_can_be_started_from(
    tmp_path: Path, name: str, stem: Literal["candidates", "sums"]
) -> None:
    torch.manual_seed(0)
    source = build_model(ModelConfig(name, stem=stem), 6, BINS, CHANNELS)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    save_weights(tmp_path / "ours.safetensors", source.state_dict(), {})
    path = str(tmp_path / "ours.safetensors")
    model = build_model(ModelConfig(name, path, stem=stem), 6, BINS, CHANNELS)
    for weight, value in load_weights(tmp_path / "ours.safetensors")[0].items():
        assert torch.equal(model.state_dict()[weight], value), weight


def test_a_run_with_candidates_and_added_signals_trains_saves_and_predicts(tmp_path: Path) -> None:
    manifest = pack_tiny(tmp_path, train=60, test=11)
    config = tiny_config(
        manifest.root,
        tmp_path / "run",
        model=ModelConfig("swin_pico", stem="candidates", candidates=2),
        canvas=CanvasConfig("panels", 7, 56, sum_time_bins=2, normalise=False),
        draws=DrawConfig(flip_time=0, cutmix=0, erase=0, inject=0.3, inject_snr_min=4, inject_snr_max=9),
    )
    train(config)
    history = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert max(line["auc"] for line in history) > 0.9
    infer(
        InferConfig(
            str(manifest.root),
            (config.run_dir / "best.safetensors",),
            tmp_path / "out.csv",
            tta=True,
            precision="float32",
        )
    )
    with (tmp_path / "out.csv").open() as file:
        found = {row["id"]: float(row["target"]) for row in csv.DictReader(file)}
    # The mean over the two views that leave time as it is, computed by hand.
    model = build_model(config.model, 6, 7, 56).eval()
    path = config.run_dir / "best.safetensors"
    fill_model(model, load_weights(path)[0], str(path))
    rows, expected, spread = manifest.rows("test"), {}, {}
    for key, snippet in zip(manifest.keys_of(rows), read_snippets(manifest, rows), strict=True):
        image = twin.resize(twin.to_planes(snippet, config.canvas), config.canvas)
        views = torch.from_numpy(twin.make_views(image, config.canvas, ("identity", "flip_frequency"))).float()
        with torch.inference_mode():
            each = model(views).double()[:, 0]
        expected[key], spread[key] = float(each.mean()), float(each.std())
    assert max(spread.values()) > 0.05  # else one view would be enough
    logits = {key: math.log(score / (1 - score)) for key, score in found.items()}
    assert len(found) == 11 and logits == pytest.approx(expected, abs=0.01)
    with pytest.raises(InputError, match="--flip-time"):
        dataclasses.replace(config, draws=DrawConfig(flip_time=0.5))


# Panels of 16 time bins that begin every 17.5 time bins.
PAUSING = Axes(16, 1024, 18.25, 22.35, tuple(17.5 * 18.25 * panel for panel in range(6)), 4.0)


@pytest.mark.parametrize("outside", [None, 0])
@pytest.mark.parametrize(("rate", "channel"), [(0.0, 300), (1.7, 500), (-2.9, 700)])
def test_lines_are_followed_through_the_pauses_between_panels(rate: float, channel: int, outside: int | None) -> None:
    """After a pause a line is where its drift has carried it by then."""
    axes = PAUSING
    values = np.random.default_rng(0).normal(size=(6, 16, 1024)).astype(np.float32)
    for position in (0, 2, 4):
        place = np.rint(channel + rate * axes.rows[position]).astype(int)
        values[position, np.arange(16), place] += 6
    search = SumWindows(axes, 2, outside)
    lines = search.find(*_halves(search, torch.from_numpy(values)[None, [0, 2, 4, 1, 3, 5]]))
    assert abs(lines.channel[0, 0].item() - search.outside - channel) <= 2
    assert abs(search.rates[lines.rate[0, 0]].item() - rate) < 0.05


def _halves(search: SumWindows, panels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sums = search.sums(panels)
    return sums[:, :3], sums[:, 3:], near(sums[:, 3:])


@pytest.mark.parametrize("outside", [0, 40])
def test_fewer_places_outside_of_the_panels_leave_the_sums_inside_as_they_are(outside: int) -> None:
    values = torch.randn(1, 6, 16, 1024, generator=torch.Generator().manual_seed(0))
    values[..., [0, -1]] += 10  # if rows wrapped around, these would show in far places
    wide, narrow = (Search(PAUSING, 1, each).sums(values) for each in (None, outside))
    assert narrow.shape == (1, 6, 121, 1024 + 2 * outside)
    off = narrow - wide[..., 512 - outside : 512 + 1024 + outside]
    # They are equal except for ringing at the ends of the padded rows.
    assert off.abs().max() < 0.5 and off.std() < 0.05


@pytest.mark.parametrize("time_bins", [1, 6, 13])
def test_sums_follow_the_times_of_the_rows_whatever_their_number(time_bins: int) -> None:
    axes = Axes(time_bins, 32, 2.0, 3.0, (0.0, 31.0, 60.0, 93.0, 120.0, 155.0), 4.0)
    values = torch.randn(2, 6, time_bins, 32, generator=torch.Generator().manual_seed(0))
    search = SumWindows(axes, 1)
    waves = torch.fft.rfft(values.double(), n=64, dim=3)[..., None, :]  # (B, P, T, 1, k)
    waves[..., len(search.turn) :] = 0  # frequencies that are left out
    shift = search.rates[:, None] * search.rows.double()[:, :, None, None] - 16  # channels: (P, T, R, 1)
    turned = waves * torch.exp(2j * torch.pi * torch.arange(33) / 64 * shift)
    expected = torch.fft.irfft(turned, n=64, dim=4).sum(2) / time_bins**0.5
    torch.testing.assert_close(search.sums(values).double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("channels", [256, 56])
def test_one_search_serves_both_views(channels: int) -> None:
    model = build_model(ModelConfig("convnext_window", stem="sums"), 6, BINS, channels).eval()
    image = torch.randn(4, 6, BINS, channels, generator=torch.Generator().manual_seed(0))
    image[:2, :3, :, 31] += 2.0
    with torch.no_grad():
        expected = torch.cat([model(image), model(image.flip(3))], 1)
        both = model.both_views(image)
    torch.testing.assert_close(both, expected, atol=1e-4, rtol=0)
    assert (both[:, 0] - both[:, 1]).abs().max() > 1e-3  # the two differ, so the second is not a copy of the first


@settings(deadline=None)
@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1))
def test_the_fast_asinh_is_torchs(values: list[float]) -> None:
    of = torch.tensor(values)
    torch.testing.assert_close(asinh(of), torch.asinh(of.double()).float(), atol=1e-9, rtol=1e-6)
