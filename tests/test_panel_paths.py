"""The best path through a panel: it is where the signal is, no path is better, and it is cut out upright."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.search.panel_paths import (
    PATH_CHANNELS,
    PATH_EVIDENCE,
    PATH_PLANES,
    cut_out_paths,
    find_paths,
    path_evidence,
)

BINS, CHANNELS = 39, 256


def panels_with(path: npt.NDArray[np.float64], rows: slice, level: float, seed: int) -> torch.Tensor:
    """White noise (1, 6, T, F), with a signal in panel 2 along `path` (T,) during `rows`."""
    panels = np.random.default_rng(seed).normal(size=(6, BINS, CHANNELS))
    channel = np.arange(CHANNELS)
    panels[2, rows] += level * np.exp(-0.5 * (channel - path[rows, None]) ** 2)
    return torch.from_numpy(panels.astype(np.float32))[None]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 10), st.integers(26, 39), st.floats(-0.5, 0.5), st.floats(0, 4))
def test_a_bent_path_that_begins_and_ends_within_a_panel_is_followed(
    seed: int, begin: int, end: int, drift: float, bend: float
) -> None:
    time = np.arange(BINS)
    path = 128 + drift * (time - BINS / 2) + bend * np.sin(2 * np.pi * time / BINS)
    found = find_paths(panels_with(path, slice(begin, end), 4.0, seed))
    on = found.inside[0, 2].numpy()
    # Noise may lengthen the path a little at both ends.
    assert abs(int(np.flatnonzero(on)[0]) - begin) <= 8 and abs(int(np.flatnonzero(on)[-1]) + 1 - end) <= 8
    both = on & (time >= begin) & (time < end)
    assert (np.abs(found.channel[0, 2].numpy() - path)[both] <= 2).mean() > 0.9
    assert found.score[0, 2] > 1.5 * found.score[0, [0, 1, 3, 4, 5]].max()


def best_by_trying(panel: npt.NDArray[np.float32]) -> float:
    """The largest sum along any chain of neighbouring pixels of a small panel (T, F)."""
    wide = np.pad(panel, ((0, 0), (1, 1)))
    gain = np.clip((wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]) / 6**0.5, -4, 4) - 1.5
    bins, channels = panel.shape
    sums = []
    for first, last in itertools.combinations_with_replacement(range(bins), 2):
        for start, *steps in itertools.product(range(channels), *[(-1, 0, 1)] * (last - first)):
            places = np.cumsum([start, *steps])
            if places.min() >= 0 and places.max() < channels:
                sums.append(gain[np.arange(first, last + 1), places].sum() - 0.2 * np.count_nonzero(steps))
    return float(max(sums))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5), st.floats(0.1, 4))
def test_no_other_path_has_a_larger_sum(seed: int, bins: int, channels: int, scale: float) -> None:
    values = np.random.default_rng(seed).normal(scale=scale, size=(2, 3, bins, channels)).astype(np.float32)
    found = find_paths(torch.from_numpy(values))
    expected = [[best_by_trying(panel) for panel in cadence] for cadence in values]
    np.testing.assert_allclose(found.score.numpy(), expected, rtol=1e-4, atol=1e-4)
    assert found.inside.any(2).all() and path_evidence(found).shape == (2, 3, PATH_EVIDENCE)
    assert (found.channel.diff(dim=2).abs() <= 1).all()


def test_a_cut_out_has_the_path_in_its_middle_column() -> None:
    path = 30 + 3 * np.sin(np.arange(BINS) / 6)
    values = panels_with(path, slice(5, 35), 6.0, 0)
    paths = find_paths(values)
    cut = cut_out_paths(values, paths)
    assert cut.shape == (1, 6, PATH_PLANES, 40, PATH_CHANNELS)
    assert cut[0, 2, 0, 8:32].mean(0).argmax() == PATH_CHANNELS // 2
    assert torch.equal(cut[0, :, 1, :BINS, 0].bool(), paths.inside[0]) and not cut[0, :, :, BINS:].any()


@pytest.mark.parametrize("channel", [0, CHANNELS - 1])
def test_a_path_at_the_edge_is_cut_out_with_zeros_beyond_it(channel: int) -> None:
    values = panels_with(np.full(BINS, float(channel)), slice(0, BINS), 6.0, 1)
    paths = find_paths(values)
    beyond = cut_out_paths(values, paths)[0, 2, 0, :BINS, : PATH_CHANNELS // 2 - 1]
    if channel:
        beyond = cut_out_paths(values, paths)[0, 2, 0, :BINS, PATH_CHANNELS // 2 + 2 :]
    assert (paths.channel[0, 2] - channel).abs().max() <= 1 and not beyond.any()


@pytest.mark.parametrize("batch", [1, 20, 45])
def test_paths_of_a_large_batch_are_those_of_each_cadence(batch: int) -> None:
    """They are found a few cadences at a time."""
    values = torch.randn(batch, 6, BINS, CHANNELS, generator=torch.Generator().manual_seed(0))
    for whole, *each in zip(find_paths(values), *map(find_paths, values.split(1)), strict=True):
        assert torch.equal(whole, torch.cat(each))
