"""The promises of fingerprints and of the groups made from them.

Axes: N snippet, P panel, T time bin, F frequency channel. Overlaps are simulated, so the truth is known: each
observation is wider than a snippet, and snippets are cut from it, each panel normalised by itself.
"""

import csv
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_tools.cadence import PANELS
from shard_tools.fingerprint import LEAST_CORRELATION, FingerprintConfig, fingerprint
from shard_tools.overlaps import (
    PROOF_POSITIONS,
    Candidates,
    code_rows,
    correlation,
    find_candidates,
    proof_rows,
    to_codes,
)
from shard_tools.sky import TIME_BINS, draw_sky
from tests.conftest import Command, Layout, MakeData, snippet, write_table

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
WIDTH = 64  # channels of a small snippet


def observe(seed: int, channels: int, sky_seed: int = 0, panel_bins: int = 40) -> Floats:
    """(P, T, F) radiometer noise and a sky that depends on `sky_seed` alone: gain, bandpass, lines, a blinking band."""
    sky = np.random.default_rng(sky_seed)
    time_bins = PANELS * panel_bins
    brightness = np.outer(sky.lognormal(0, 0.3, time_bins), 1 + sky.random(channels))
    brightness[:, sky.integers(channels, size=channels // 8)] *= sky.uniform(2, 30)
    low = sky.integers(channels - 10)
    brightness[np.arange(time_bins) % 7 < 3, low : low + 10] += 5
    noise = np.random.default_rng((seed, 1)).chisquare(12, brightness.shape) / 12
    return (brightness * noise).astype(np.float32).reshape(PANELS, panel_bins, channels)


def cut(observation: Floats, start: int, channels: int = WIDTH, needle: float = 0.0) -> Halves:
    """A snippet of the observation, with a drifting needle of brightness `needle` in its ON panels."""
    panels = observation[:, :, start : start + channels].copy()
    steps = np.arange(panels.shape[1])
    for panel in (0, 2, 4):
        path = (channels // 3 + 0.1 * (steps + panel * len(steps))).astype(int) % channels
        panels[panel, steps, path] += needle
    panels -= panels.mean(axis=(1, 2), keepdims=True)
    panels /= panels.std(axis=(1, 2), keepdims=True)
    return panels.astype(np.float16)


def compare(snippets: list[Halves], min_overlap: int = 16) -> set[tuple[int, int, int]]:
    """(first, second, shift) of the pairs that are found and confirmed."""
    time_bins = snippets[0].shape[1]
    codes = np.stack([to_codes(values[:, code_rows(time_bins)]) for values in snippets])
    proofs = [values[list(PROOF_POSITIONS), proof_rows(time_bins)] for values in snippets]
    return {
        (first, second, shift)
        for first, second, shift in to_rows(find_candidates(codes, min_overlap))
        if correlation(proofs[first], proofs[second], shift) >= LEAST_CORRELATION
    }


def to_rows(pairs: Candidates) -> list[tuple[int, int, int]]:
    return list(zip(*(column.tolist() for column in pairs), strict=True))


def write_snippets(root: Path, snippets: dict[str, Halves]) -> Path:
    (root / "train").mkdir(parents=True)
    for key, values in snippets.items():
        np.save(root / "train" / f"{key}.npy", values)
    write_table(root / "train_labels.csv", [(key, number % 2) for number, key in enumerate(snippets)])
    return root


def read_table(path: Path) -> dict[str, str]:
    with path.open(newline="") as file:
        return {row["id"]: row["group"] for row in csv.DictReader(file)}


# ---- Pairs


@given(
    seed=st.integers(0, 2**16),
    shift=st.integers(-WIDTH + 1, WIDTH - 1),
    min_overlap=st.integers(12, WIDTH),
    needles=st.tuples(st.sampled_from((0, 2, 50)), st.sampled_from((0, 2, 50))),
)
@settings(max_examples=60, deadline=None)
def test_two_cuts_are_joined_exactly_where_they_share_enough_channels(
    seed: int, shift: int, min_overlap: int, needles: tuple[float, float]
) -> None:
    observation = observe(seed, 2 * WIDTH, sky_seed=seed)
    first = max(0, -shift)
    found = compare(
        [cut(observation, start, needle=n) for start, n in zip((first, first + shift), needles, strict=True)],
        min_overlap,
    )
    assert found == ({(0, 1, shift)} if WIDTH - abs(shift) >= min_overlap else set())


@given(seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_the_same_lines_and_gain_over_other_noise_join_nothing(seed: int) -> None:
    skies = [cut(observe(noise, WIDTH, sky_seed=seed), 0) for noise in range(4)]
    assert compare(skies, min_overlap=1) == set()


@given(seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_the_same_minutes_at_other_channels_join_nothing(seed: int) -> None:
    observation = observe(seed, 2 * WIDTH, sky_seed=seed)
    assert compare([cut(observation, 0), cut(observation, WIDTH)], min_overlap=1) == set()


def test_proofs_of_overlaps_and_of_other_pairs_lie_far_on_either_side_of_the_threshold() -> None:
    observations = [observe(seed, 2 * WIDTH) for seed in range(12)]
    rows = proof_rows(40)
    cuts = [[cut(wide, start, needle=start)[:, rows] for start in (0, 40)] for wide in observations]
    same = [correlation(first, second, 40) for first, second in cuts]
    other = [correlation(cuts[k][0], cuts[k - 1][1], shift) for k in range(12) for shift in range(-48, 49, 8)]
    assert min(same) > 0.99
    assert max(other) < 0.2


@pytest.mark.parametrize("blank", [slice(0, 40), slice(20, 44)])
def test_constant_channels_join_nothing_and_part_nothing(blank: slice) -> None:
    observations = [observe(seed, 2 * WIDTH) for seed in range(3)]
    for observation in observations:
        observation[:, :, blank] = 1
    assert compare([cut(observations[k], start) for k, start in ((0, 0), (0, 30), (1, 0), (2, 0))]) == {(0, 1, 30)}


def test_constant_snippets_join_nothing() -> None:
    assert compare([np.zeros((PANELS, 40, WIDTH), np.float16)] * 3) == set()


def test_values_that_are_not_finite_join_nothing_and_raise_nothing() -> None:
    broken = cut(observe(0, WIDTH), 0)
    broken[:, :, ::2] = np.nan
    broken[:, :, 1::2] = np.inf
    assert compare([broken, broken]) == set()
    assert correlation(broken, broken, 0) == 0


def test_what_repeats_within_a_snippet_is_no_code() -> None:
    one, other = (cut(observe(seed, 2 * WIDTH), 0, 8)[:, code_rows(40)] for seed in (0, 1))
    codes = to_codes(np.concatenate([one, one, other, one], axis=2))
    assert np.flatnonzero(codes).tolist() == [7, *range(15, 24)]  # the places of `other`, and of each seam


def test_of_many_copies_a_few_pairs_each_are_found_and_they_join_all() -> None:
    observation, count = observe(0, WIDTH), 100
    one = to_codes(cut(observation, 0)[:, code_rows(40)])
    pairs = to_rows(find_candidates(np.tile(one, (count, 1)), 16))
    assert {(first, first + 1, 0) for first in range(count - 1)} <= set(pairs)
    assert len(pairs) < 10 * count


def test_candidates_take_little_more_memory_than_the_codes() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(1, 2**64, (6000, 255), np.uint64)
    codes[3000:, :127] = codes[:3000, 128:]  # half of each snippet overlaps with another
    tracemalloc.start()
    pairs = find_candidates(codes, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert to_rows(pairs) == [(k, k + 3000, 128) for k in range(3000)]
    assert peak < codes.nbytes


# ---- Whole folders


def test_the_groups_of_a_folder_are_the_true_ones(tmp_path: Path, command: Command) -> None:
    """Skies of the demonstration, at full size: a chain, two copies, a pair that is too far apart, and single ones."""
    snippets, truth = {}, {}
    for number, starts in enumerate([(0, 150, 250), (40, 40), (0, 230), (100,), (100,)]):
        rng = np.random.default_rng(number)
        sky = np.concatenate([draw_sky(rng)[0], draw_sky(rng)[0]], axis=1)
        noise = rng.chisquare(12, (TIME_BINS, 512)) / 12
        observation = (sky * noise).astype(np.float32).reshape(PANELS, -1, 512)
        for place, start in enumerate(starts):
            key = f"{'fbdac'[place]}{number}"
            snippets[key] = cut(observation, start, channels=256, needle=20.0 * place)
            truth[key] = f"{number}" if number != 2 else key
    data = write_snippets(tmp_path / "data", snippets)
    answer = command("fingerprint", "--input", data, "--out", tmp_path / "groups.csv", "--workers", 2)
    assert answer.code == 0
    assert "9 snippets, 3 overlapping pairs (0 candidates refuted), 6 groups, the largest of 3" in answer.out
    found = read_table(tmp_path / "groups.csv")
    assert {key: min(k for k in truth if truth[k] == truth[key]) for key in truth} == found
    assert list(found) == sorted(found)


def test_threads_do_not_change_the_table(tmp_path: Path) -> None:
    wide = [observe(seed, 2 * WIDTH) for seed in range(40)]
    data = write_snippets(
        tmp_path / "data", {f"k{3 * k % 97:02d}{s}": cut(w, s) for k, w in enumerate(wide) for s in (0, 32)}
    )
    tables = []
    for workers in (1, 4):
        found = fingerprint(FingerprintConfig(data, tmp_path / f"{workers}.csv", workers=workers))
        assert found.sizes().tolist() == [2] * 40
        tables.append((tmp_path / f"{workers}.csv").read_bytes())
    assert tables[0] == tables[1]


def test_of_a_partial_download_the_files_are_grouped_and_test_ones_on_demand(
    make_data: MakeData, tmp_path: Path, command: Command
) -> None:
    data = make_data()
    data.path(data.train[0]).unlink()
    data.path(data.test[0]).write_bytes(data.path(data.train[1]).read_bytes())
    out = tmp_path / "groups.csv"
    assert command("fingerprint", "--input", data.root, "--out", out).code == 0
    assert read_table(out) == {key: key for key in sorted(data.train[1:])}
    answer = command("fingerprint", "--input", data.root, "--out", out, "--test")
    assert "1 of 4 snippets of test/ share a group with one of train/" in answer.out
    assert read_table(out)[data.test[0]] == read_table(out)[data.train[1]] == data.train[1]


def spoil(data: Layout, how: str) -> str:
    key = data.train[5]
    if how == "cut short":
        data.path(key).write_bytes(data.path(key).read_bytes()[:-2])
    else:
        np.save(data.path(key), snippet(0, (6, 14, 17)))
    return key


@pytest.mark.parametrize("how", ["cut short", "another shape"])
def test_a_bad_file_stops_it_by_name_or_stands_alone(
    make_data: MakeData, tmp_path: Path, command: Command, how: str
) -> None:
    data, out = make_data(), tmp_path / "groups.csv"
    key = spoil(data, how)
    answer = command("fingerprint", "--input", data.root, "--out", out)
    assert (answer.code, str(data.path(key)) in answer.err, out.exists()) == (1, True, False)
    answer = command("fingerprint", "--input", data.root, "--out", out, "--on-bad", "quarantine")
    assert (answer.code, "could not be read, so in groups of their own: 1" in answer.out) == (0, True)
    assert read_table(out) == {key: key for key in sorted(data.train)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--min-overlap", 0), "--min-overlap 0.0: expected a share"),
        (("--min-overlap", "nan"), "--min-overlap nan: expected a share"),
        (("--workers", 0), "--workers 0"),
        (("--out", "/nowhere/groups.csv"), "--out /nowhere/groups.csv: expected the path of a table"),
    ],
)
def test_options_that_cannot_work_are_refused(
    make_data: MakeData, tmp_path: Path, command: Command, arguments: tuple[object, ...], message: str
) -> None:
    answer = command("fingerprint", "--input", make_data().root, "--out", tmp_path / "groups.csv", *arguments)
    assert (answer.code, message in answer.err) == (1, True)


def test_snippets_with_too_few_time_bins_are_refused(make_data: MakeData, tmp_path: Path, command: Command) -> None:
    answer = command("fingerprint", "--input", make_data(shape=(6, 11, 16)).root, "--out", tmp_path / "groups.csv")
    assert (answer.code, "fingerprints need at least 12 time bins" in answer.err) == (1, True)


# ---- Real backgrounds


@pytest.mark.kaggle
def test_cuts_of_real_snippets_are_joined_where_they_overlap_and_only_there(kaggle_seti: Path) -> None:
    whole = [np.load(path) for path in sorted(kaggle_seti.glob("train/*/*.npy"))]
    count = len(whole)
    assert compare(whole) == set()
    overlapping = [
        cut(values.astype(np.float32), start, 160, n) for start, n in ((0, 0.0), (96, 9.0)) for values in whole
    ]
    assert compare(overlapping, min_overlap=40) == {(k, k + count, 96) for k in range(count)}
    apart = [cut(values.astype(np.float32), start, 128) for start in (0, 128) for values in whole]
    assert compare(apart, min_overlap=8) == set()
