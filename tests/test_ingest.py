"""The promises of ingesting observations: which six files are a cadence, what is cut from them, and its frequencies.

Axes: P panel, T time bin, F frequency channel.
"""

import csv
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import psutil
import pytest

from shard_tools.cadence import check_key
from shard_tools.errors import InputError
from shard_tools.joined_manifest import read_manifests
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.observation import cutting
from shard_tools.observation.agreement import Cadence, check_cadence
from shard_tools.observation.cadence_tables import Observations, read_observations
from shard_tools.observation.cut_plan import PIECE_COLUMNS, CutOptions, CutPlan, CutShard, plan_cuts
from shard_tools.observation.cutting import to_power
from shard_tools.observation.flatten import block_count, block_medians, remove_dc_spikes, sum_channels, to_bandpass
from shard_tools.observation.header import Header
from shard_tools.observation.ingest import ingest, plan_ingest
from shard_tools.observation.ingest_config import IngestConfig
from shard_tools.observation.lists import read_cadence_list
from shard_tools.observation.opening import read_header
from shard_tools.observation.simulate import (
    BIN_LENGTH_S,
    CHANNEL_MHZ,
    Line,
    SimulateObservationConfig,
    bandpass_shape,
    draw_lines,
    draw_panel,
    header_fields,
    simulate_observation,
    write_fbh5,
)
from shard_tools.sample import read_snippets
from shard_tools.verify import verify
from tests.conftest import ROOT, Command, data_set_bytes
from tests.observation_files import CHANNELS, NAMES, NFPC, SPECTRA, fields, power, write_cadence, write_fil, write_h5
from tests.tiny import pack_tiny

SMALL = SimulateObservationConfig(Path(), coarse_channels=3, nfpc=16384)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six files of noise, 2 coarse channels of 8192."""
    return write_cadence(tmp_path_factory.mktemp("noise") / "cadence")


@pytest.fixture(scope="module")
def headers(files: list[Path]) -> list[Header]:
    return [read_header(path) for path in files]


def config(out: Path, files: list[Path] | tuple[Path, ...] = (), **options: Any) -> IngestConfig:
    return IngestConfig(str(out), tuple(files), **{"workers": 1, "shard_mb": 1, **options})


def observed(manifest: Manifest) -> Observations:
    found = read_observations(manifest.data_sets[0])
    assert found is not None
    return found


def all_snippets(manifest: Manifest) -> npt.NDArray[np.float16]:
    return read_snippets(manifest, np.arange(len(manifest)))


# ---- Six files that are one cadence


def test_six_files_in_order_are_a_cadence_whose_panels_start_when_they_did(headers: list[Header]) -> None:
    cadence = check_cadence(headers)
    assert cadence.panel_starts_s == pytest.approx([320.0 * n for n in range(6)], abs=1e-5)
    assert cadence.length_s == pytest.approx(1600 + 16 * BIN_LENGTH_S, abs=1e-5)
    assert cadence.spectra == SPECTRA


def changed(position: int, **values: Any) -> Callable[[list[Header]], list[Header]]:
    layout = {name: values.pop(name) for name in ("spectra", "feeds", "channels", "dtype") if name in values}

    def change(headers: list[Header]) -> list[Header]:
        header = headers[position]
        values["layout"] = replace(header.layout, **layout)
        return [*headers[:position], replace(header, **values), *headers[position + 1 :]]

    return change


def reordered(*order: int) -> Callable[[list[Header]], list[Header]]:
    return lambda headers: [headers[place] for place in order]


@pytest.mark.parametrize(
    ("change", "culprit", "words"),
    [
        (reordered(0, 1, 2, 3, 4), 0, "5 files, expected the six of one cadence"),
        (reordered(0, 2, 4, 1, 3, 5), 1, "By tstart they are: A1.h5, B.h5, A2.h5, C.h5, A3.h5, D.h5"),
        (reordered(0, 1, 0, 3, 4, 5), 0, "is the same file as"),
        (reordered(1, 2, 3, 4, 5, 5), 5, "is the same file as"),
        (reordered(0, 0, 0, 0, 0, 0), 0, "A1.h5: the 2nd file is the same file as the 1st"),
        (changed(5, start_mjd=57652.8), 5, "days after"),
        (changed(0, source=""), 0, "source_name is missing, expected the name of the target"),
        (changed(3, source=""), 3, "source_name is missing, expected the name of the target"),
        (changed(3, channels=CHANNELS * 2), 3, "channels 65536, expected 32768"),
        (changed(2, foff_mhz=-1.0001 * CHANNEL_MHZ), 2, "foff (MHz)"),
        (changed(2, foff_mhz=CHANNEL_MHZ), 2, "foff (MHz)"),
        (changed(4, fch1_mhz=8420.0 + 0.51 * CHANNEL_MHZ), 4, "fch1 (MHz)"),
        (changed(1, bin_length_s=1.00001 * BIN_LENGTH_S), 1, "tsamp (s)"),
        (changed(5, feeds=2), 5, "nifs 2, expected 1"),
        (changed(5, dtype="uint8"), 5, "type uint8, expected float32"),
        (changed(5, nfpc=4096), 5, "nfpc 4096, expected 8192"),
        (changed(5, telescope=4), 5, "telescope_id 4, expected 6"),
        (changed(2, source="B"), 2, "source 'B', expected 'A' as in"),
        (changed(3, source="A"), 3, "source 'A', as in the ON files, expected another one"),
    ],
)
def test_six_files_that_are_no_cadence_are_refused_with_file_found_expected_and_remedy(
    headers: list[Header], change: Callable[[list[Header]], list[Header]], culprit: int, words: str
) -> None:
    with pytest.raises(InputError) as refused:
        check_cadence(change(headers))
    assert words in str(refused.value) and str(headers[culprit].path) in str(refused.value)


def test_what_one_file_does_not_say_is_taken_from_the_others(headers: list[Header]) -> None:
    for position in (0, 3):
        cadence = check_cadence(changed(position, telescope=None, nfpc=0)(headers))
        assert {(header.telescope, header.nfpc) for header in cadence.headers} == {(6, NFPC)}
    with pytest.raises(InputError, match="telescope_id 4, expected 6"):
        check_cadence(changed(0, telescope=None)(changed(5, telescope=4)(headers)))


def test_a_file_that_does_not_say_its_coarse_channels_is_cut_as_the_others(tmp_path: Path, files: list[Path]) -> None:
    whole = ingest(config(tmp_path / "whole", files))
    other = write_cadence(tmp_path / "files")
    for position in (0, 3):
        write_h5(other[position], power(position), fields(position, nfpc=None, telescope_id=None))
    manifest = ingest(config(tmp_path / "out", other))
    assert np.array_equal(all_snippets(manifest), all_snippets(whole))
    assert observed(manifest).flags == observed(whole).flags


def test_what_a_telescope_rounds_is_no_fault(headers: list[Header]) -> None:
    late = replace(headers[3], fch1_mhz=8420.0 + 0.49 * CHANNEL_MHZ, start_mjd=headers[3].start_mjd + 0.4 / 86400)
    assert check_cadence([*headers[:3], late, *headers[4:]])
    end_to_end = [headers[0].start_mjd + (n * headers[0].length_s - 0.9 * (n == 3)) / 86400 for n in range(6)]
    assert check_cadence([replace(h, start_mjd=mjd) for h, mjd in zip(headers, end_to_end, strict=True)])
    with pytest.raises(InputError, match=r"begins 10\.0 s before"):
        early = replace(headers[3], start_mjd=end_to_end[3] - 9.1 / 86400)
        check_cadence(
            [*(replace(h, start_mjd=mjd) for h, mjd in zip(headers[:3], end_to_end, strict=False)), early, *headers[4:]]
        )


def test_a_schedule_that_names_all_sources_alike_needs_the_option(headers: list[Header]) -> None:
    alike = [replace(header, source="A") for header in headers]
    with pytest.raises(InputError, match="--any-sources"):
        check_cadence(alike)
    assert check_cadence(alike, any_sources=True)


def test_longer_files_are_cropped_to_the_shortest_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_cadence(tmp_path / "files")
    write_h5(files[3], power(3, spectra=15), fields(3))
    manifest = ingest(config(tmp_path / "out", files))
    assert f"cropped to the 15 spectra of {files[3]}: A1.h5 (16), B.h5 (16)" in caplog.text
    assert manifest.shape == (6, 15, 1024)


# ---- Lists


def test_turboseti_lists_and_aetherscan_catalogues_name_the_same_cadences(tmp_path: Path) -> None:
    names = [[f"{band}/{name}.h5" for name in NAMES] for band in ("low", "high")]
    lines = tmp_path / "cadences.lst"
    lines.write_text("# two\n\n" + "\n".join(name for cadence in names for name in cadence) + "\n")
    catalogue = tmp_path / "cadences.csv"
    rows = [("x", "A", "s", band[0].split("/")[0], "1", "8420", name) for band in names for name in band]
    with catalogue.open("w", newline="") as file:
        header = ("note", "Target", "Session", "Band", "Cadence ID", "Frequency", ".h5 path")
        csv.writer(file).writerows([header, *(row for pair in zip(rows[:6], rows[6:], strict=True) for row in pair)])
    expected = [tuple(tmp_path / name for name in cadence) for cadence in names]
    assert read_cadence_list(lines) == read_cadence_list(catalogue) == expected


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.lst", "a\nb\nc\nd\ne\n", "5 paths, expected six for each cadence"),
        ("a.lst", "\n", "empty, expected six paths"),
        ("a.csv", "Target,Session\n", "expected ['Target', 'Session'"),
        (
            "a.csv",
            "Target,Session,Band,Cadence ID,Frequency,.h5 path\nA,s,b,1,f,x.h5\n",
            "cadence A, s, b, 1, f has 1 files, expected six",
        ),
        ("a.csv", "Target,Session,Band,Cadence ID,Frequency,.h5 path\nA,s,b,1,f,\n", "line 2: no '.h5 path'"),
    ],
)
def test_a_list_that_names_no_whole_cadences_is_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        read_cadence_list(path)
    assert str(path) in str(refused.value) and words in str(refused.value)


# ---- The plan


def cadence_of(headers: list[Header], channels: int, nfpc: int, **values: Any) -> Cadence:
    return check_cadence(
        [replace(h, layout=replace(h.layout, channels=channels), nfpc=nfpc, **values) for h in headers]
    )


def check_cover(plan: CutPlan) -> None:
    """Every line that drifts no more than allowed is whole in one snippet; no channel of the band is left out."""
    starts, band = plan.starts, int(plan.borders[-1])
    assert starts[0] == 0 and starts[-1] + plan.columns == band
    assert (np.diff(starts) > 0).all() and (np.diff(starts) <= plan.columns - plan.overlap).all()


def test_fine_products_are_cut_to_1024_channels_of_22_hz_that_overlap_by_the_steepest_drift(
    headers: list[Header],
) -> None:
    plan = plan_cuts(cadence_of(headers, 4 << 20, 1 << 20), CutOptions(None, 4.0))
    assert plan.shape == (6, 16, 1024) and plan.column_width_hz == pytest.approx(22.35, abs=0.01)
    assert plan.overlap == 339  # 4 Hz/s in 1892 s, gaps included
    check_cover(plan)
    border = (1 << 20) // 8
    assert ((plan.starts < border) & (plan.starts + 1024 > border)).any()  # snippets cross borders of coarse channels


def test_mid_resolution_products_are_cut_as_the_competitions_are(headers: list[Header]) -> None:
    values = {"foff_mhz": -187.5 / 64 / 1024, "bin_length_s": 1.0737}
    long = [replace(header, layout=replace(header.layout, spectra=279)) for header in headers]
    plan = plan_cuts(cadence_of(long, 8192, 1024, **values), CutOptions(None, 4.0))
    assert plan.shape == (6, 273, 256) and (plan.channel_bin, plan.overlap) == (1, 3)
    check_cover(plan)


@pytest.mark.parametrize("channels", [8192, 8200, 16384, 100_000])
@pytest.mark.parametrize("max_drift", [0.0, 1.0, 4.0])
def test_every_channel_is_in_a_snippet_whatever_the_band(
    headers: list[Header], channels: int, max_drift: float
) -> None:
    check_cover(plan_cuts(cadence_of(headers, channels, 0), CutOptions(8, max_drift)))


def test_a_band_too_narrow_for_a_snippet_of_unsummed_channels_has_no_smaller_bin_as_remedy(
    headers: list[Header],
) -> None:
    with pytest.raises(InputError, match=r"with --channel-bin 1, .*; give a file with more channels$"):
        plan_cuts(cadence_of(headers, 116, 0), CutOptions(1, 0.1))


@pytest.mark.parametrize("rest", [1, PIECE_COLUMNS // 2 - 1, PIECE_COLUMNS - 1])
def test_the_end_of_a_band_of_unknown_coarse_channels_is_never_a_short_piece(headers: list[Header], rest: int) -> None:
    plan = plan_cuts(cadence_of(headers, 2 * PIECE_COLUMNS + rest, 0), CutOptions(1, 1.0))
    widths = np.diff(plan.borders)
    assert plan.borders[-1] == 2 * PIECE_COLUMNS + rest and widths.min() >= PIECE_COLUMNS // 2
    assert widths.max() < 1.6 * PIECE_COLUMNS


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (CutOptions(8, 10.0), "--max-drift 10: crosses 846 channels of 22.35 Hz .* expected at most 768"),
        (CutOptions(1, 4.0), "--max-drift 4: crosses 2709 channels of 2.794 Hz"),
        (CutOptions(3, 4.0), "--channel-bin 3: does not divide the 8192 channels of a coarse channel"),
        (
            CutOptions(64, 4.0),
            "32768 channels are 512 columns with --channel-bin 64, expected at least a snippet's 1024; give a smaller",
        ),
        (CutOptions(8, 4.0, ((8000.0, 9000.0),)), "--exclude-mhz leaves nothing"),
    ],
)
def test_options_that_leave_nothing_to_cut_are_refused_with_a_remedy(
    headers: list[Header], options: CutOptions, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        plan_cuts(check_cadence(headers), options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exclude_mhz": ("1200",)}, "--exclude-mhz 1200: expected LOW-HIGH"),
        ({"exclude_mhz": ("1300-1200",)}, "expected LOW-HIGH"),
        ({"max_drift": -1.0}, "--max-drift -1"),
        ({"channel_bin": 0}, "--channel-bin 0: expected at least 1"),
        ({"cadences": Path("a.lst")}, "expected six files, or --cadences LIST, and not both"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(config(Path("out"), [Path("A1.h5")]), **options)


@pytest.mark.parametrize(
    ("nfpc", "channel_bin", "words"),
    [
        (8, 8, "a coarse channel of 8 channels is 1 columns with --channel-bin 8, expected at least 64; .*--nfpc 512"),
        (64, 1, None),
        (256, 8, "is 32 columns .*--nfpc 512 to take several coarse channels as one, or a --channel-bin of at most 4"),
        (512, 8, None),
    ],
)
def test_coarse_channels_too_narrow_for_a_bandpass_are_refused_with_a_remedy_that_helps(
    headers: list[Header], nfpc: int, channel_bin: int, words: str | None
) -> None:
    if words is None:
        assert plan_cuts(cadence_of(headers, CHANNELS, nfpc), CutOptions(channel_bin, 1.0))
        return
    with pytest.raises(InputError, match=words):
        plan_cuts(cadence_of(headers, CHANNELS, nfpc), CutOptions(channel_bin, 1.0))


def test_keys_say_source_time_and_channel_and_differ_between_bands_and_bins(headers: list[Header]) -> None:
    odd = [replace(header, source="β Pic b / 2" if header.source == "A" else "B") for header in headers]
    plans = [
        plan_cuts(check_cadence([replace(h, fch1_mhz=h.fch1_mhz + shift) for h in odd]), CutOptions(channel_bin, 1.0))
        for shift, channel_bin in ((0.0, 8), (0.0, 4), (100.0, 8))
    ]
    keys = [plan.key(cut) for plan in plans for cut in range(len(plan.starts))]
    for key in keys:
        check_key(key, "here")
    assert len(set(keys)) == len(keys)
    assert keys[0] == "Pic_b_2-057650_750000-008419_908460-000000000x8"
    of_one = [plans[0].key(cut) for cut in range(len(plans[0].starts))]
    assert of_one == sorted(of_one)


# ---- The steps


def test_summing_channels_is_exact_and_blanks_what_is_not_finite() -> None:
    values = np.random.default_rng(0).integers(0, 1000, (3, 48)).astype(np.float32)
    for channel_bin in (1, 2, 3, 4, 6, 8):
        assert np.array_equal(sum_channels(values, channel_bin), values.reshape(3, -1, channel_bin).sum(2))
    values[1, 5], values[2, 6] = np.inf, np.nan
    found = sum_channels(values, 8)
    assert np.isnan(found[1:, 0]).all() and np.isfinite(found).sum() == 16


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_dc_spike_is_interpolated_in_the_files_of_either_sign(sign: int) -> None:
    values = np.ones((4, 3 * 64), np.float32)
    values[:, 32::64] = 1000  # in the order of the file
    values = values[:, ::sign]
    remove_dc_spikes(values, 64)
    assert (values == 1).all()


def test_the_bandpass_follows_straight_lines_to_the_borders() -> None:
    assert block_count(16, (1 << 20) // 8) == 512 and block_count(273, 1024) == 128 and block_count(16, 5) == 1
    assert block_count(16, 8191) == 255  # not a divisor of 8191
    medians = np.array([1, 2, 3, 5], np.float32)
    found = to_bandpass(medians, 16)
    assert found == pytest.approx(
        [0.625, 0.875, 1.125, 1.375, 1.625, 1.875, 2.125, 2.375, 2.625, 2.875, 3.25, 3.75, 4.25, 4.75, 5.25, 5.75]
    )
    assert to_bandpass(np.array([1, 9], np.float32), 8).min() == 0.5  # not below half of the neighbouring median


@pytest.mark.parametrize("columns", [8191, 8192, 1000])
def test_a_sloping_band_is_flattened_whatever_its_number_of_columns(columns: int) -> None:
    slope = np.linspace(0.2, 1.8, columns).astype(np.float32)
    medians = block_medians(np.tile(slope, (16, 1)), block_count(16, columns))
    assert to_bandpass(medians, columns) == pytest.approx(slope, rel=0.02)


def test_panels_are_normalised_as_the_competitions_and_noise_is_white(files: list[Path], tmp_path: Path) -> None:
    manifest = ingest(config(tmp_path / "out", files))
    values = all_snippets(manifest).astype(np.float64)
    assert values.mean(axis=(2, 3)) == pytest.approx(0, abs=1e-3)
    assert values.std(axis=(2, 3)) == pytest.approx(1, abs=1e-3)
    found = observed(manifest)
    assert found.scale == pytest.approx(1, abs=0.03) and found.level == pytest.approx(0, abs=0.1)
    # Sums over time have the spread of white noise, so neither bandpass nor borders are left.
    assert np.sqrt(16) * values.mean(axis=2).std(axis=2) == pytest.approx(1, abs=0.12)


def test_normalisation_can_be_undone_to_the_files_own_power(files: list[Path], tmp_path: Path) -> None:
    manifest = ingest(config(tmp_path / "out", files))
    found, snippets = observed(manifest), all_snippets(manifest)
    bandpass = {
        (row["coarse_channel"], row["panel"]): to_bandpass(np.array(row["medians"], np.float32), NFPC // 8)
        for row in found.tables["bandpass.parquet"].to_pylist()
    }
    expected = np.stack([sum_channels(power(panel)[:, ::-1], 8) for panel in range(6)])
    of_panel = np.stack(
        [np.concatenate([bandpass[coarse, panel] for coarse in range(CHANNELS // NFPC)]) for panel in range(6)]
    )
    for row, cut in enumerate(found.tables["cuts.parquet"].to_pylist()):
        columns = slice(cut["first_channel"] // 8, cut["first_channel"] // 8 + 1024)
        samples = found.cadences[0].channel_width_hz * found.cadences[0].bin_length_s
        back = to_power(snippets[row], found.level[row], found.scale[row], of_panel[:, columns], samples)
        clean = ~np.isin(np.arange(columns.start, columns.stop) % (NFPC // 8), (511, 512))  # except DC spikes
        assert np.allclose(back[..., clean], expected[:, :, columns][..., clean], rtol=2e-3)


# ---- What is cut


def write_lines(folder: Path, lines: list[Line]) -> list[Path]:
    """A cadence without noise that holds `lines`."""
    folder.mkdir()
    paths = [folder / f"{name}.h5" for name in NAMES]
    for panel, path in enumerate(paths):
        values = draw_panel(SMALL, panel, lines, noise=False)
        write_fbh5(path, values, header_fields(SMALL, panel), SMALL.nfpc)
    return paths


BORDER_MHZ = SMALL.first_mhz - SMALL.nfpc * CHANNEL_MHZ
"""The border of the first two coarse channels, to half a channel."""
DC_MHZ = [SMALL.first_mhz - (n + 0.5) * SMALL.nfpc * CHANNEL_MHZ for n in range(3)]


@pytest.mark.parametrize("channel_bin", [8, 16])
@pytest.mark.parametrize("place", [0.012, 0.2, 0.33, 1 / 3, 0.334, 0.5, 0.62, 2 / 3, 0.97])
@pytest.mark.parametrize("drift_rate", [-3.0, 0.0, 1.3, 3.9])
def test_a_line_is_whole_in_the_snippet_where_it_belongs_borders_included(
    tmp_path: Path, place: float, drift_rate: float, channel_bin: int
) -> None:
    """In every row of every panel its channel is the true one."""
    start_mhz = SMALL.first_mhz - place * SMALL.channels * CHANNEL_MHZ
    paths = write_lines(tmp_path / "files", [Line("needle", start_mhz, drift_rate, 2000.0, (0, 2, 4))])
    plan = plan_cuts(check_cadence([read_header(path) for path in paths]), CutOptions(channel_bin, 4.0))
    cuts = list(cutting.read_cuts(CutShard("a.tar", 0, plan, 0, len(plan.starts)), {}))
    snippets = np.stack([cut.values for cut in cuts]).astype(np.float64)
    first_mhz = np.array([plan.column_mhz(start) for start in plan.starts.tolist()])
    width = plan.column_width_hz
    starts = np.array(plan.cadence.panel_starts_s)[[0, 2, 4]]
    seconds = starts[:, None] + BIN_LENGTH_S * (np.arange(SPECTRA) + 0.5)  # (3, T)
    channel = (start_mhz * 1e6 + drift_rate * seconds - 1e6 * first_mhz[:, None, None]) / width
    inside = ((channel > 1) & (channel < 1022)).all(axis=(1, 2))
    in_band = abs(place - 0.5) < 0.45
    assert inside.any() or not in_band
    for row in np.flatnonzero(inside):
        brightest = snippets[row, [0, 2, 4]].argmax(axis=2)
        to_spike = abs(first_mhz[row] + channel[row] * width / 1e6 - np.array(DC_MHZ)[:, None, None]).min(axis=0)
        clean = to_spike > 4e-6 * width  # channels of a DC spike are interpolated, a line in them too
        # A line spreads over the channels that it crosses within a row.
        reach = 1 + abs(drift_rate) * BIN_LENGTH_S / 2 / width
        assert abs(brightest - channel[row])[clean].max(initial=0) <= reach


def test_dc_spikes_borders_roll_off_and_excluded_ranges_are_flagged(tmp_path: Path) -> None:
    excluded = BORDER_MHZ - 0.040, BORDER_MHZ - 0.039
    files = write_lines(tmp_path / "files", [])
    found = observed(ingest(config(tmp_path / "out", files, exclude_mhz=(f"{excluded[0]}-{excluded[1]}",))))
    borders = [SMALL.first_mhz - n * SMALL.nfpc * CHANNEL_MHZ for n in range(4)]
    for first, flags in zip(found.first_mhz, found.flags, strict=True):
        low, high = first, first + 1024 * 8 * CHANNEL_MHZ
        words = set(flags.split())
        assert ("dc_spike" in words) == any(low - 2e-5 < each < high + 2e-5 for each in DC_MHZ)
        assert ("border" in words) == any(low + 1e-5 < each < high - 3e-5 for each in borders[1:3])
        assert ("excluded" in words) == (low < excluded[1] and high > excluded[0])
        near = min(abs(each - edge) for each in borders for edge in (low, high))
        assert ("roll_off" in words) or ("border" not in words and near > 1e-4)
    words = set(" ".join(found.flags).split())
    assert words >= {"dc_spike", "border", "roll_off", "excluded"}


def test_without_green_bank_no_spike_is_removed(tmp_path: Path) -> None:
    files = write_cadence(tmp_path / "files", telescope_id=4)
    found = observed(ingest(config(tmp_path / "out", files)))
    assert "dc_spike" not in " ".join(found.flags)


def test_excluded_snippets_are_left_out_and_excluded_channels_are_blank(files: list[Path], tmp_path: Path) -> None:
    whole = ingest(config(tmp_path / "whole", files))
    second = observed(whole).first_mhz[1]
    limit = second + 400 * 8 * CHANNEL_MHZ
    part = ingest(config(tmp_path / "part", files, exclude_mhz=(f"8000-{limit:.7f}",)))
    assert len(part) == len(whole) - 1 and observed(part).first_mhz[0] == second
    blank = (all_snippets(part)[0] == 0).all(axis=(0, 1))
    assert blank.sum() in (400, 401) and blank[:400].all()
    rest = all_snippets(part)[0][..., ~blank].astype(np.float64)
    assert rest.std(axis=(1, 2)) == pytest.approx(1, abs=1e-3)


def test_coarse_channels_that_are_excluded_are_not_read(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.fil" for name in NAMES]
    for position, path in enumerate(paths):
        write_fil(path, power(position, channels=8 * NFPC), fields(position, nchans=8 * NFPC))
    low = read_header(paths[0]).lowest_mhz
    limits = [low + coarse * NFPC * CHANNEL_MHZ for coarse in (2, 6)]
    whole, part = (
        ingest(config(tmp_path / name, paths, exclude_mhz=ranges))
        for name, ranges in (("whole", ()), ("part", (f"{limits[0]:.7f}-{limits[1]:.7f}",)))
    )
    read = set(observed(part).tables["bandpass.parquet"]["coarse_channel"].to_pylist())
    assert read == {0, 1, 2, 5, 6, 7}
    keys = [each.keys_of(np.arange(len(each))) for each in (whole, part)]
    assert set(keys[1]) < set(keys[0])
    for row, key in enumerate(keys[1]):
        if "excluded" not in observed(part).flags[row]:
            assert np.array_equal(all_snippets(part)[row], all_snippets(whole)[keys[0].index(key)])


def test_values_that_are_not_finite_and_dead_channels_are_blank_and_flagged(tmp_path: Path) -> None:
    files = write_cadence(tmp_path / "files", "fil", foff=CHANNEL_MHZ)
    values = power(2).copy()
    values[3, 100], values[4, 108], values[:, 8000:] = np.nan, np.inf, 0
    write_fil(files[2], values, fields(2, foff=CHANNEL_MHZ))
    manifest = ingest(config(tmp_path / "out", files))
    found, snippets = observed(manifest), all_snippets(manifest)
    assert np.isfinite(snippets).all()
    assert snippets[0, 2, 3, 12] == snippets[0, 2, 4, 13] == 0 and (snippets[-1, 2] == 0).all()
    assert "blanked" in found.flags[0] and "blanked" in found.flags[-1]
    assert "empty" in found.flags[-1] and not found.scale[-1, 2]


def with_changed_panel(folder: Path, change: Callable[[npt.NDArray[np.float32]], None]) -> list[Path]:
    """Six files of noise with ascending frequencies, of which the third is changed."""
    files = write_cadence(folder, "fil", foff=CHANNEL_MHZ)
    values = power(2).copy()
    change(values)
    write_fil(files[2], values, fields(2, foff=CHANNEL_MHZ))
    return files


def a_spectrum_of_zeros(values: npt.NDArray[np.float32]) -> None:
    values[5] = 0


def some_channels_of_zeros(values: npt.NDArray[np.float32]) -> None:
    values[:, 1003:1080] = 0


def most_channels_of_a_block_of_zeros(values: npt.NDArray[np.float32]) -> None:
    values[:, 1024:1224] = 0


@pytest.mark.parametrize("change", [a_spectrum_of_zeros, some_channels_of_zeros, most_channels_of_a_block_of_zeros])
def test_zeros_are_blanked_and_flagged_and_leave_the_rest_as_it_was(
    tmp_path: Path, change: Callable[[npt.NDArray[np.float32]], None]
) -> None:
    manifest = ingest(config(tmp_path / "out", with_changed_panel(tmp_path / "files", change)))
    found, panel = observed(manifest), all_snippets(manifest)[0, 2].astype(np.float64)
    changed = power(2).copy()
    change(changed)
    zeros = (changed.reshape(SPECTRA, -1, 8) == 0).any(axis=2)[:, :1024]
    assert "blanked" in found.flags[0].split() and (panel[zeros] == 0).all()
    assert found.scale == pytest.approx(1, abs=0.03) and found.level == pytest.approx(0, abs=0.1)
    assert (panel[~zeros] == 0).mean() < 0.001


def test_a_lone_zero_of_whole_numbers_is_a_value(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.fil" for name in NAMES]
    for position, path in enumerate(files):
        values = (power(position) / 1e7).astype(np.uint8)
        values[3, 700], values[:, 1000:1080] = 0, 0
        write_fil(path, values, fields(position, nbits=8, foff=CHANNEL_MHZ))
    blank = all_snippets(ingest(config(tmp_path / "out", files)))[0] == 0
    assert not blank[:, 3, 87].any() and blank[:, :, 125:135].all()


def test_live_columns_beside_a_dead_block_are_divided_by_the_nearest_live_median() -> None:
    found = to_bandpass(np.array([1, 1, np.nan, np.nan, 3], np.float32), 20)
    assert np.array_equal(found, [1] * 8 + [np.nan] * 8 + [3] * 4, equal_nan=True)
    assert np.isnan(to_bandpass(np.full(3, np.nan, np.float32), 12)).all()


@pytest.mark.parametrize("height", [1e15, 1e30, 3e38])
def test_an_absurd_value_is_blanked_and_flagged_and_a_strong_carrier_is_kept(tmp_path: Path, height: float) -> None:
    def change(values: npt.NDArray[np.float32]) -> None:
        values[3, 700] = height
        values[:, 804:812] *= 1000  # two columns with a carrier of 1000 times the noise power

    manifest = ingest(config(tmp_path / "out", with_changed_panel(tmp_path / "files", change)))
    found, panel = observed(manifest), all_snippets(manifest)[0, 2]
    assert "blanked" in found.flags[0].split() and panel[3, 700 // 8] == 0 and found.scale.max() < 1000
    assert (panel[:, 100:102] > 10).all() and np.isfinite(panel).all()
    assert ((panel == 0).sum(axis=0) > 1).sum() == 0


@pytest.mark.parametrize("extension", ["h5", "fil"])
def test_memory_does_not_grow_with_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str) -> None:
    monkeypatch.setattr(cutting, "_READ_BYTES", 1 << 20)
    peaks = []
    for channels in (2 * NFPC, 16 * NFPC):
        files = [tmp_path / f"{name}.{extension}" for name in NAMES]
        for position, path in enumerate(files):
            write = write_h5 if extension == "h5" else write_fil
            write(path, power(position, channels=channels), fields(position, nchans=channels))
        plan = plan_cuts(check_cadence([read_header(path) for path in files]), CutOptions(None, 4.0))
        tracemalloc.start()
        snippets = sum(1 for _ in cutting.read_cuts(CutShard("a.tar", 0, plan, 0, len(plan.starts)), {}))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert snippets == len(plan.starts)
    assert peaks[1] < 1.2 * peaks[0]


# ---- The data set


def test_the_table_says_where_and_when_each_snippet_was(files: list[Path], tmp_path: Path) -> None:
    manifest = ingest(config(tmp_path / "out", files))
    found = observed(manifest)
    header = read_header(files[0])
    assert manifest.made["observation"]["channel_width_hz"] == 8 * header.channel_width_hz
    assert manifest.made["observation"]["bin_length_s"] == header.bin_length_s
    (cadence,) = found.cadences
    assert (cadence.source, cadence.start_mjd) == ("A", header.start_mjd)
    assert cadence.row_starts_s(16)[5, 3] == pytest.approx(1600 + 3 * BIN_LENGTH_S, abs=1e-4)
    assert found.first_mhz[0] == pytest.approx(header.lowest_mhz + 3.5 * CHANNEL_MHZ, abs=1e-9)
    keys = manifest.keys_of(np.arange(len(manifest)))
    assert found.tables["cuts.parquet"]["key"].to_pylist() == keys
    assert set(manifest.splits["test"].values()) == {0, len(manifest)}


def test_a_table_that_changed_is_found(files: list[Path], tmp_path: Path) -> None:
    manifest = ingest(config(tmp_path / "out", files))
    path = manifest.root / "cuts.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=rf"{path}: missing or not the one"):
        observed(manifest)
    assert [fault for fault in verify(manifest.root) if str(path) in fault]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("shard_mb", [1, 2])
def test_both_formats_any_workers_and_any_shards_give_the_same_snippets(
    files: list[Path], tmp_path: Path, workers: int, shard_mb: int
) -> None:
    expected = ingest(config(tmp_path / "expected", files))
    other = write_cadence(tmp_path / "files", "fil")
    manifest = ingest(config(tmp_path / "out", other, workers=workers, shard_mb=shard_mb))
    assert np.array_equal(all_snippets(manifest), all_snippets(expected))
    assert (len(expected.shards), len(manifest.shards)) == (2, 3 - shard_mb)
    assert not list(verify(manifest.root))
    tables = [observed(each).tables for each in (manifest, expected)]
    assert tables[0]["bandpass.parquet"] == tables[1]["bandpass.parquet"]
    assert tables[0]["cuts.parquet"] == tables[1]["cuts.parquet"]


def test_ingesting_twice_gives_the_same_bytes_from_another_folder_too(files: list[Path], tmp_path: Path) -> None:
    first = ingest(config(tmp_path / "first", files))
    moved = write_cadence(tmp_path / "elsewhere")
    second = ingest(config(tmp_path / "second", moved))
    assert data_set_bytes(first.root) == data_set_bytes(second.root)


def test_several_cadences_of_a_list_are_one_data_set_and_bad_ones_are_left_out_if_asked(
    tmp_path: Path, command: Command
) -> None:
    low = write_cadence(tmp_path / "low", "fil")
    high = write_cadence(tmp_path / "high", "fil", fch1=8500.0)
    bad = write_cadence(tmp_path / "bad", "fil", fch1=8600.0)
    write_fil(bad[1], power(1), fields(1, fch1=8600.0, source_name="A"))
    listed = tmp_path / "all.lst"
    listed.write_text("\n".join(map(str, [*high, *bad, *low])))
    answer = command("ingest", "--cadences", listed, "--out", tmp_path / "out", "--workers", 1)
    assert answer.code == 1 and f"{bad[1]}: source 'A', as in the ON files" in answer.err
    options = ("--workers", 1, "--on-bad", "skip")
    answer = command("ingest", "--cadences", listed, "--out", tmp_path / "out", *options)
    assert answer.code == 0, answer.err
    manifest = read_manifest(tmp_path / "out")
    found = observed(manifest)
    assert len(found.cadences) == 2 and found.cadence.tolist() == sorted(found.cadence.tolist())
    assert (np.diff(found.first_mhz) > 0).all() and manifest.splits["test"]["quarantined"] == 1
    assert bad[0].name in (manifest.root / "skipped.csv").read_text()
    assert "quarantined" in answer.out and "already" not in answer.err


def damage_data(path: Path) -> None:
    """Overwrite the middle of the file's last block of data."""
    with h5py.File(path) as file:
        data = file["data"].id
        block = data.get_chunk_info(data.get_num_chunks() - 1)
    with path.open("r+b") as raw:
        raw.seek(block.byte_offset + block.size // 2)
        raw.write(b"\xff" * (block.size // 4))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cadence_whose_data_are_damaged_is_left_out_whole_if_asked(tmp_path: Path, workers: int) -> None:
    low, bad, high = (
        write_cadence(tmp_path / name, fch1=mhz) for name, mhz in (("low", 8400.0), ("bad", 8500.0), ("high", 8600.0))
    )
    damage_data(bad[3])
    unreadable = [tmp_path / ("x" * 300 + ".h5"), *low[1:]]  # a name that is too long for the system
    listed = tmp_path / "all.lst"
    listed.write_text("\n".join(map(str, [*low, *bad, *high, *unreadable])))
    options = {"cadences": listed, "workers": workers, "on_bad": "skip"}
    manifest = ingest(config(tmp_path / "out", **options))
    found = observed(manifest)
    assert found.tables["cadences.parquet"]["fch1_mhz"].to_pylist() == [8400.0, 8600.0]
    assert set(found.cadence.tolist()) == {0, 1} and not list(verify(manifest.root))
    assert len(list(manifest.root.glob("*.tar"))) == len(manifest.shards)
    expected = [all_snippets(ingest(config(tmp_path / name, files))) for name, files in (("a", low), ("b", high))]
    assert np.array_equal(all_snippets(manifest), np.concatenate(expected))
    with (manifest.root / "skipped.csv").open(newline="") as file:
        reasons = [row["reason"] for row in csv.DictReader(file)]
    assert len(reasons) == 2 and "name too long" in reasons[0] and reasons[1].startswith("C.h5: not a readable HDF5")
    before = data_set_bytes(manifest.root)
    assert ingest(config(tmp_path / "out", **options)).identity == manifest.identity
    (manifest.root / ".sources.json").unlink()
    assert ingest(config(tmp_path / "out", **options)).identity == manifest.identity
    assert data_set_bytes(manifest.root) == before
    listed.write_text("\n".join(map(str, [*low, *bad, *high])))
    with pytest.raises(InputError, match=r"C\.h5: not a readable HDF5"):
        ingest(config(tmp_path / "strict", cadences=listed, workers=workers))
    with pytest.raises(InputError, match="some of its cadences were left out"):
        ingest(config(tmp_path / "out", cadences=listed, workers=workers))


def test_a_list_of_which_every_cadence_is_damaged_is_refused(tmp_path: Path) -> None:
    files = write_cadence(tmp_path / "files")
    damage_data(files[0])
    with pytest.raises(InputError, match=r"every cadence was left out; A1\.h5: not a readable"):
        ingest(config(tmp_path / "out", files, on_bad="skip"))


def test_cadences_of_other_shapes_and_repeated_ones_are_refused_or_left_out(tmp_path: Path, files: list[Path]) -> None:
    folder = tmp_path / "short"
    folder.mkdir()
    short = [write_h5(folder / p.name, power(n, spectra=12), fields(n)) for n, p in enumerate(files)]
    high = write_cadence(tmp_path / "high", "fil", fch1=8500.0)
    listed = tmp_path / "all.lst"
    for second, words in (
        (short, "snippets of shape (6, 12, 1024), expected (6, 16, 1024)"),
        (files, "the same source"),
    ):
        listed.write_text("\n".join(map(str, [*files, *second, *high])))
        with pytest.raises(InputError, match=re.escape(words)):
            ingest(config(tmp_path / "out", cadences=listed))
        assert not (tmp_path / "out").exists()
        plans, skipped = plan_ingest(config(tmp_path / "out", cadences=listed, on_bad="skip"))
        assert [plan.cadence.paths for plan in plans] == [tuple(files), tuple(high)]
        ((name, split, reason),) = skipped
        assert (name, split) == ("A1.h5", "test") and words in reason and reason.startswith("A1.h5: ")


def test_mid_resolution_files_become_snippets_of_the_competitions_shape(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    rng = np.random.default_rng(5)
    product = {"foff": -187.5 / 64 / 1024, "tsamp": 1.0737418, "nfpc": None, "nchans": 2048}
    shape = np.tile(bandpass_shape(1024), 2)
    files = []
    for position, name in enumerate(NAMES):
        values = (1e9 * shape * rng.standard_gamma(3072, (279, 2048)) / 3072).astype(np.float32)
        values[:, 512::1024] *= 50
        files.append(write_h5(folder / f"{name}.h5", values, fields(position, **product), 512))
    manifest = ingest(config(tmp_path / "out", files))
    assert f"{files[0]}: the last 6 of 279 spectra are left out" in caplog.text
    found, snippets = observed(manifest), all_snippets(manifest).astype(np.float64)
    assert manifest.shape == (6, 273, 256) and found.cadences[0].channel_width_hz == pytest.approx(2861, abs=1)
    assert found.scale == pytest.approx(1, abs=0.1) and "dc_spike" in " ".join(found.flags)
    assert abs(snippets).max() < 12


def test_joined_data_sets_keep_the_places_of_each(files: list[Path], tmp_path: Path) -> None:
    other = write_cadence(tmp_path / "files", "fil", fch1=8500.0)
    roots = [ingest(config(tmp_path / name, paths)).root for name, paths in (("a", files), ("b", other))]
    joined = read_manifests(roots)
    for data_set, mhz in zip(joined.data_sets, (8420, 8500), strict=True):
        found = read_observations(data_set)
        assert found is not None and abs(found.first_mhz - mhz).max() < 0.1
        assert found.tables["cuts.parquet"]["key"].to_pylist() == joined.keys_of(np.array(data_set.rows))


def test_what_pack_made_has_no_observations(tmp_path: Path, command: Command) -> None:
    manifest = pack_tiny(tmp_path, 20, 2)
    assert read_observations(manifest.data_sets[0]) is None
    assert "observed" not in command("info", manifest.root).out


def test_info_says_what_was_observed(files: list[Path], tmp_path: Path, command: Command) -> None:
    assert "packed 6 snippets into 1 shard," in command("ingest", *files, "--out", tmp_path / "out", "--workers", 1).out
    answer = command("info", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert "6 snippets in 1 shard," in answer.out
    assert (
        "observed: 1 cadence of A, channels of 22.35 Hz, time bins of 18.25 s, 8419.9085 to 8420.0000 MHz" in answer.out
    )


# ---- Interrupted, and again

# Ingests as `python -m shard_tools ingest` does, but stops and waits in the middle of the second shard.
STANDING_STILL = """
import time
from pathlib import Path
import shard_tools.observation.cut_jobs as jobs_module
import shard_tools.observation.ingest as ingest_module
from shard_tools.tasks.local import InTurn

write = jobs_module.write_shard

def stand_still(shard, path):
    if shard.name == "test-000001.tar":
        path.with_name(f".{path.name}.7.tmp").write_bytes(b"half")
        print("standing still", flush=True)
        time.sleep(600)
    return write(shard, path)

jobs_module.write_shard, ingest_module.Processes = stand_still, lambda workers: InTurn()
from shard_tools.__main__ import main
main()
"""


@pytest.fixture
def killed(files: list[Path], tmp_path: Path) -> Iterator[Path]:
    """The folder of an ingest that was killed in the middle of its second shard."""
    out = tmp_path / "killed"
    arguments = ["ingest", *map(str, files), "--out", str(out), "--workers", "1", "--shard-mb", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", STANDING_STILL, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "standing still\n"
    with pytest.raises(InputError, match="another process is writing here"):
        ingest(config(out, files))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    yield out


def test_after_a_kill_the_next_try_keeps_what_was_finished_and_ends_alike(
    files: list[Path], tmp_path: Path, killed: Path
) -> None:
    whole = ingest(config(tmp_path / "whole", files))
    assert len(whole.shards) == 2 and not (killed / "manifest.json").exists()
    before = (killed / "test-000000.tar").stat()
    manifest = ingest(config(killed, files))
    assert data_set_bytes(manifest.root) == data_set_bytes(whole.root)
    after = (killed / "test-000000.tar").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not list(killed.rglob(".*.tmp")) and not (killed / ".pack").exists()


def test_a_killed_ingest_leaves_no_process_behind(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text("import time\ndef sleep(*job): time.sleep(600)\n")
    script = tmp_path / "ingest_for_ever.py"
    script.write_text(
        "import sys, sleeper; from shard_tools.observation import cut_jobs; from shard_tools.__main__ import main\n"
        "if __name__ == '__main__':\n    cut_jobs.cut_shard = sleeper.sleep\n    main()\n"
    )
    command = [sys.executable, str(script), "ingest", *map(str, files), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    process = psutil.Popen([*command, "--workers", "2", "--shard-mb", "1"], env=environment, cwd=ROOT)
    until = time.monotonic() + 60
    while len(children := process.children()) < 3 and time.monotonic() < until:  # two workers and Python's tracker
        time.sleep(0.1)
    time.sleep(2)  # so that both workers are busy
    process.kill()
    process.wait()
    assert len(children) == 3 and not psutil.wait_procs(children, timeout=20)[1]


def test_after_a_kill_other_options_keep_nothing(files: list[Path], tmp_path: Path, killed: Path) -> None:
    options = {"channel_bin": 4, "max_drift": 1.0}
    manifest = ingest(config(killed, files, **options))
    assert data_set_bytes(manifest.root) == data_set_bytes(ingest(config(tmp_path / "other", files, **options)).root)


def test_a_finished_ingest_stays_and_other_options_or_files_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    files = write_cadence(tmp_path / "files", "fil")
    out = tmp_path / "out"
    first = ingest(config(out, files))
    before = data_set_bytes(out)
    assert ingest(config(out, files)).identity == first.identity and "is already ingested" in caplog.text
    with pytest.raises(InputError, match=r"made from other files or with other options\); delete it"):
        ingest(config(out, files, max_drift=1.0))
    os.utime(files[2])  # a new time, but the same content
    assert ingest(config(out, files)).identity == first.identity
    write_fil(files[2], power(9), fields(2))
    with pytest.raises(InputError, match=r"A1.fil or a file after it has changed"):
        ingest(config(out, files))
    assert data_set_bytes(out) == before


def test_a_file_in_place_of_the_folder_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(InputError, match=r"--out .*out: is a file, expected a folder"):
        ingest(config(tmp_path / "out", [tmp_path / "absent.h5"]))


def test_a_folder_that_holds_something_else_is_refused(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="holds something else"):
        ingest(config(tmp_path, files))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_process_that_dies_on_a_file_names_it(files: list[Path], tmp_path: Path) -> None:
    script = (
        "import functools, os, sys; from pathlib import Path\n"
        "import shard_tools.tasks.local as local; from shard_tools.errors import InputError\n"
        "from shard_tools.observation.ingest import IngestConfig, ingest\n"
        "if __name__ == '__main__':\n"
        "    local.end_with_parent = functools.partial(os._exit, 9)  # as HDF5 does on some damaged files\n"
        "    try: ingest(IngestConfig(Path(sys.argv[1]), tuple(map(Path, sys.argv[2:])), workers=1))\n"
        "    except InputError as error: print(error)\n"
    )
    arguments = [str(tmp_path / "out"), *map(str, files)]
    path = tmp_path / "dies.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert f"{files[0]}: a process died while it read this file" in done.stdout, done.stderr


def test_a_process_that_hangs_on_a_file_is_ended_and_names_it(tmp_path: Path) -> None:
    files = write_cadence(tmp_path / "files", "fil")
    script = (
        "import functools, sys; from pathlib import Path\n"
        "import shard_tools.tasks.local as local; from shard_tools.errors import InputError\n"
        "from shard_tools.observation import read_watch; from tests.hanging_reads import hang_on\n"
        "from shard_tools.observation.ingest import IngestConfig, ingest\n"
        "if __name__ == '__main__':\n"
        "    local.end_with_parent, read_watch.SECONDS = functools.partial(hang_on, 'A2.fil'), 3.0\n"
        "    try: ingest(IngestConfig(Path(sys.argv[1]), tuple(map(Path, sys.argv[2:])), workers=1))\n"
        "    except InputError as error: print(error)\n"
    )
    path = tmp_path / "hangs.py"
    path.write_text(script)
    words = [sys.executable, str(path), str(tmp_path / "out"), *map(str, files)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.startswith(f"{files[2]}: one read took more than 3 s"), done.stdout + done.stderr
    again = ingest(config(tmp_path / "out", files))  # the remains are no obstacle
    assert sorted(data_set_bytes(again.root)) == sorted(data_set_bytes(ingest(config(tmp_path / "b", files)).root))


# ---- The simulated observation


def test_a_simulated_observation_is_seeded_and_ingests_with_its_lines(tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "files"
    options = ("--coarse-channels", 2, "--nfpc", 16384, "--seed", 3)
    assert command("simulate-observation", "--out", folder, *options).code == 0
    again = replace(SMALL, out=tmp_path / "again", coarse_channels=2, seed=3)
    assert [path.read_bytes() for path in simulate_observation(again)] == [
        (folder / f"{name}.h5").read_bytes() for name in NAMES
    ]
    with (folder / "truth.csv").open(newline="") as file:
        truth = list(csv.DictReader(file))
    assert [row["kind"] for row in truth][:3] == ["carrier", "side_band", "side_band"]
    answer = command("ingest", *(folder / f"{name}.h5" for name in NAMES), "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    found = observed(read_manifest(tmp_path / "out"))
    assert found.scale == pytest.approx(1, abs=0.2)
    assert command("simulate-observation", "--out", folder).code == 1  # the folder is not empty


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from shard_tools.observation.simulate import SimulateObservationConfig, simulate_observation
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try: simulate_observation(SimulateObservationConfig(Path(sys.argv[1]), coarse_channels=1, nfpc=16384))
except OSError as error: print("refused:", error)
"""


def test_a_simulation_that_finds_no_space_says_so_and_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"File too large: '{out / 'A1.h5'}'" in done.stdout, done.stderr
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nfpc": 100}, "--nfpc 100: expected a multiple of 64"),
        ({"coarse_channels": 0}, "--coarse-channels 0: expected 1 or more"),
        ({"snr_min": 50.0, "snr_max": 20.0}, "--snr-min 50.0 --snr-max 20.0: expected 0 < min <= max <= 1e6"),
        ({"max_drift": -1.0}, "--max-drift -1.0: expected 0 to 100 Hz/s"),
    ],
)
def test_options_of_the_simulation_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(SMALL, **options)


def test_voyagers_carrier_stands_where_it_was_observed(tmp_path: Path) -> None:
    settings = replace(SMALL, out=tmp_path / "files", needles=0, interference=0)
    manifest = ingest(config(tmp_path / "out", simulate_observation(settings)))
    found, snippets = observed(manifest), all_snippets(manifest).astype(np.float64)
    carrier = draw_lines(settings)[0]
    width = found.cadences[0].channel_width_hz
    seconds = found.cadences[0].row_starts_s(SPECTRA) + BIN_LENGTH_S / 2
    channel = (
        carrier.frequency_mhz * 1e6 + carrier.drift_rate_hz_s * seconds - 1e6 * found.first_mhz[:, None, None]
    ) / width
    holds = ((channel > 0) & (channel < 1023)).all(axis=(1, 2))
    assert holds.any()
    for row in np.flatnonzero(holds):
        along = np.take_along_axis(snippets[row], np.rint(channel[row]).astype(np.int64)[..., None], axis=2)[..., 0]
        snr = along.sum(axis=1) / np.sqrt(SPECTRA)
        assert snr[[0, 2, 4]].min() > 15 and abs(snr[[1, 3, 5]]).max() < 5


def test_the_simulated_bandpass_falls_to_the_edges() -> None:
    shape = bandpass_shape(4096)
    assert shape[0] < 0.4 < 0.85 < shape[300:-300].min() and shape.dtype == np.float32
