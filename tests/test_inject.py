"""The promises of added needles and of recall: needles are as strong and lie where truth.csv says; all else stays.

Axes: P panel, T time bin, F frequency channel.
"""

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from shard_tools.cadence import OFF_POSITIONS, ON_POSITIONS
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.observation.cadence_tables import Observations, read_observations
from shard_tools.observation.candidates_table import read_candidates
from shard_tools.observation.ingest import ingest, plan_ingest
from shard_tools.observation.ingest_config import IngestConfig
from shard_tools.observation.inject import InjectConfig, draw_needles, inject
from shard_tools.observation.lines import Line, TrueLine, read_truth, write_truth
from shard_tools.observation.recall import RecallConfig, find_needles, group_needles, recall_lines
from shard_tools.sample import read_snippets
from tests.conftest import Command, data_set_bytes
from tests.observation_files import CHANNELS, NFPC, SPECTRA, START_MJD, write_cadence
from tests.test_ingest import damage_data
from tests.test_observation_page import write_candidates

FIRST = {"score": 0.9, "false_alarm_rate": 0.1, "coarse_channel": 1, "tstart_mjd": START_MJD}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six files of noise, 4 coarse channels of 8192."""
    return write_cadence(tmp_path_factory.mktemp("noise") / "cadence")


@pytest.fixture(scope="module")
def plain(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return ingest(IngestConfig(str(tmp_path_factory.mktemp("plain") / "out"), tuple(files), workers=1))


def config(out: Path, files: list[Path], **options: Any) -> InjectConfig:
    return InjectConfig(str(out), tuple(files), **{"workers": 1, "snr_min": 300.0, "snr_max": 300.0, **options})


def observed_of(manifest: Manifest) -> Observations:
    observed = read_observations(manifest.data_sets[0])
    assert observed is not None
    return observed


def noise(manifest: Manifest) -> npt.NDArray[np.float64]:
    """(N, P, T, F) in standard deviations of the radiometer noise."""
    observed = observed_of(manifest)
    values = read_snippets(manifest, np.arange(len(manifest))).astype(np.float64)
    return observed.level[:, :, None, None] + observed.scale[:, :, None, None] * values


def needles_in_snippets(out: Path, manifest: Manifest) -> Iterator[tuple[Line, int, npt.NDArray[np.float64]]]:
    """Every pair of a needle in `out`/truth.csv and a row, with its channel in that row (P, T), mid-time-bin."""
    observed = observed_of(manifest)
    (cadence,) = observed.cadences
    middle_s = cadence.row_starts_s(SPECTRA) + cadence.bin_length_s / 2
    for each in read_truth(out / "truth.csv"):
        for row, first_mhz in enumerate(observed.first_mhz):
            yield each.signal, row, (each.signal.mhz_at(middle_s) - first_mhz) * 1e6 / cadence.channel_width_hz


def test_needles_are_as_strong_as_truth_says_and_where_it_says_and_nothing_else_changes(
    files: list[Path], plain: Manifest, tmp_path: Path
) -> None:
    manifest = inject(config(tmp_path / "out", files, needles=5, max_drift=0.5))
    plain_too = ingest(IngestConfig(str(tmp_path / "plain"), tuple(files), workers=1, max_drift=0.5))
    difference = noise(manifest) - noise(plain_too)
    assert np.abs(difference[:, list(OFF_POSITIONS)]).max() == 0
    whole = 0
    for line, row, channel in needles_in_snippets(tmp_path / "out", manifest):
        if channel.min() < 8 or channel.max() > 1015:
            continue
        whole += 1
        for panel in ON_POSITIONS:
            own = np.array([
                difference[row, panel, t, int(c) - 4 : int(c) + 6].sum() for t, c in enumerate(channel[panel])
            ])  # fmt: skip
            # Summing 8 channels of the file raises the noise by sqrt(8).
            assert own.sum() / np.sqrt(SPECTRA) == pytest.approx(line.snr / np.sqrt(8), rel=0.08)
            assert own.min() > 0.5 * own.mean()
    assert whole >= 4
    assert (np.abs(difference) > 1).mean() < 0.01  # the rest is rounding, as each panel has a new mean and deviation


def test_needles_lie_evenly_in_the_band_for_the_whole_cadence(files: list[Path], tmp_path: Path) -> None:
    asked = config(tmp_path / "out", files, needles=5, snr_min=10.0, snr_max=90.0)
    (plan,) = plan_ingest(asked)[0]
    band = plan.column_mhz(0), plan.column_mhz(int(plan.borders[-1]) - 1)
    for number in range(20):
        needles = draw_needles(plan, asked, number)
        starts = np.array([line.frequency_mhz for line in needles])
        ends = np.array([line.mhz_at(plan.cadence.length_s) for line in needles])
        half = plan.column_width_hz / 2e6
        assert min(starts.min(), ends.min()) >= band[0] - half and max(starts.max(), ends.max()) <= band[1] + half
        shares = (starts - band[0]) / (band[1] - band[0])
        assert np.abs(shares - (np.arange(5) + 0.5) / 5).max() < 0.2
        assert all(abs(line.drift_rate_hz_s) <= 4 and 10 <= line.snr <= 90 for line in needles)
    drifts = [line.drift_rate_hz_s for number in range(40) for line in draw_needles(plan, asked, number)]
    assert min(drifts) < -3 and max(drifts) > 3


def test_a_steep_needle_is_where_it_was_in_every_time_bin_borders_and_pauses_included(
    files: list[Path], plain: Manifest, tmp_path: Path
) -> None:
    inject(config(tmp_path / "out", files, needles=5))
    difference = noise(read_manifest(tmp_path / "out")) - noise(plain)
    found = 0
    for line, row, expected in needles_in_snippets(tmp_path / "out", plain):
        for panel in ON_POSITIONS:
            for channel, values in zip(expected[panel], difference[row, panel], strict=True):
                if 8 <= channel <= 1015:
                    # 4 Hz/s crosses three channels in a time bin.
                    assert values[int(channel) - 3 : int(channel) + 5].sum() > 0.6 * line.snr / np.sqrt(8 * SPECTRA)
                    found += 1
    assert found >= 5 * 3 * SPECTRA * 0.9


def test_the_place_in_the_coarse_channel_counts_from_its_lowest_frequency(files: list[Path], tmp_path: Path) -> None:
    inject(config(tmp_path / "out", files))
    for each in read_truth(tmp_path / "out" / "truth.csv"):
        channel = CHANNELS - 1 - (8420.0 - each.signal.frequency_mhz) / (187.5 / 64 / (1 << 20))
        assert each.place == pytest.approx((channel + 0.5) / NFPC % 1, abs=1e-6)
        assert each.start_mjd == START_MJD and each.is_needle


def test_the_same_seed_gives_the_same_bytes_and_another_seed_is_refused(files: list[Path], tmp_path: Path) -> None:
    inject(config(tmp_path / "a", files))
    inject(config(tmp_path / "b", files))
    assert data_set_bytes(tmp_path / "a") == data_set_bytes(tmp_path / "b")
    before = data_set_bytes(tmp_path / "a")
    (tmp_path / "a" / "truth.csv").unlink()  # as after a kill at the very end
    inject(config(tmp_path / "a", files))
    assert data_set_bytes(tmp_path / "a") == before
    with pytest.raises(InputError, match="made from other files or with other options"):
        inject(config(tmp_path / "a", files, seed=1))
    with pytest.raises(InputError, match="made from other files or with other options"):
        ingest(IngestConfig(str(tmp_path / "a"), tuple(files), workers=1))


def test_needles_of_a_cadence_that_is_left_out_are_neither_listed_nor_counted(
    files: list[Path], tmp_path: Path
) -> None:
    bad = write_cadence(tmp_path / "bad", fch1=8500.0)
    damage_data(bad[3])
    listed = tmp_path / "two.lst"
    listed.write_text("\n".join(map(str, [*files, *bad])))
    options = {"cadences": listed, "on_bad": "skip", "needles": 3}
    manifest = inject(config(tmp_path / "out", [], **options))
    lines = [each.signal for each in read_truth(tmp_path / "out" / "truth.csv")]
    assert len(lines) == 3 and all(line.frequency_mhz < 8421 for line in lines)
    assert manifest.made["observation"]["needles"] == 3
    before = data_set_bytes(tmp_path / "out")
    assert inject(config(tmp_path / "out", [], **options)).identity == manifest.identity
    assert data_set_bytes(tmp_path / "out") == before


def test_excluded_ranges_get_no_needle_and_the_number_stays(files: list[Path], tmp_path: Path) -> None:
    (plan,) = plan_ingest(config(tmp_path / "out", files))[0]
    low, high = plan.column_mhz(800), plan.column_mhz(2400)
    inject(config(tmp_path / "out", files, exclude_mhz=(f"{low}-{high}",), needles=4))
    lines = [each.signal for each in read_truth(tmp_path / "out" / "truth.csv")]
    assert len(lines) == 4
    assert not any(low < mhz < high for line in lines for mhz in (line.frequency_mhz, line.mhz_at(1900)))


def test_needles_lie_evenly_in_what_the_excluded_ranges_leave(files: list[Path], tmp_path: Path) -> None:
    (plan,) = plan_ingest(config(tmp_path / "out", files))[0]
    band = [plan.column_mhz(column) for column in (0, int(plan.borders[-1]) - 1)]
    ranges = [(8000.0, plan.column_mhz(200)), (plan.column_mhz(1900), plan.column_mhz(2900)), (8440.0, 9000.0)]
    ranges.append((plan.column_mhz(1000), plan.column_mhz(2100)))  # neither sorted nor apart
    asked = config(tmp_path / "out", files, needles=4, exclude_mhz=[f"{low}-{high}" for low, high in ranges])
    (plan,) = plan_ingest(asked)[0]
    free = (ranges[0][1], ranges[3][0]), (ranges[1][1], band[1])
    half = plan.column_width_hz / 2e6
    for number in range(50):
        needles = draw_needles(plan, asked, number)
        assert len(needles) == 4
        for n, line in enumerate(needles):
            ends = sorted([line.frequency_mhz, line.mhz_at(plan.cadence.length_s)])
            part = next(place for place, (low, high) in enumerate(free) if low <= ends[0] and ends[1] <= high + half)
            before = sum(high - low for low, high in free[:part])
            share = (line.frequency_mhz - free[part][0] + before) / sum(high - low for low, high in free)
            assert abs(share - (n + 0.5) / 4) < 0.3


def test_ranges_outside_the_band_change_no_needle(files: list[Path], tmp_path: Path) -> None:
    options = {"needles": 5, "seed": 3}
    (plan,) = plan_ingest(config(tmp_path / "out", files))[0]
    asked = config(tmp_path / "out", files, **options, exclude_mhz=("1200-1340", "8500-8600"))
    (excluding,) = plan_ingest(asked)[0]
    assert excluding.exclude_mhz and draw_needles(excluding, asked, 0) == draw_needles(plan, asked, 0)


def test_ranges_that_leave_no_place_for_a_needle_are_refused(files: list[Path], tmp_path: Path) -> None:
    (plan,) = plan_ingest(config(tmp_path / "out", files))[0]
    ranges = (f"8000-{plan.column_mhz(1500)}", f"{plan.column_mhz(1510)}-9000")  # 200 Hz are left
    with pytest.raises(InputError, match=r"--exclude-mhz: .* has no place .* or a smaller --max-drift"):
        inject(config(tmp_path / "out", files, needles=1, exclude_mhz=ranges))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"needles": 0}, "--needles 0"),
        ({"needles": 1000}, "--needles 1000: expected at most"),
        ({"snr_min": 0.0}, "--snr-min 0"),
        ({"snr_max": 3.0}, "--snr-max 3"),
        ({"seed": -1}, "--seed -1"),
        ({"max_drift": -1}, "--max-drift -1"),
        ({"out": "s3://bucket/shards"}, "--out s3://bucket/shards: expected a local folder"),
    ],
)
def test_options_of_inject_out_of_range_are_refused(
    files: list[Path], tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        inject(config(options.pop("out", tmp_path / "out"), files, **options))


def test_info_says_that_needles_were_added(
    files: list[Path], plain: Manifest, tmp_path: Path, command: Command
) -> None:
    assert command("inject", *files, "--out", tmp_path / "out", "--needles", 3, "--workers", 1).code == 0
    assert "added: 3 simulated needles" in command("info", tmp_path / "out").out
    assert "added" not in command("info", plain.root).out
    assert "every byte" in command("verify", tmp_path / "out").out
    assert read_manifest(tmp_path / "out").made["observation"]["needles"] == 3


# ---- Recall


def needle(mhz: float, drift: float = 1.0, snr: float = 50.0, **changed: Any) -> TrueLine:
    return replace(TrueLine(Line("needle", mhz, drift, snr, ON_POSITIONS), START_MJD, 0.3), **changed)


def options(tmp_path: Path, **changed: Any) -> RecallConfig:
    return RecallConfig(tmp_path / "candidates.csv", tmp_path / "truth.csv", **changed)


def write_found(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_candidates(
        tmp_path / "candidates.csv", [FIRST | {"rank": n, "picture": ""} | row for n, row in enumerate(rows, start=1)]
    )


def test_a_needle_is_the_best_ranked_candidate_of_its_frequency_drift_and_cadence(tmp_path: Path) -> None:
    rows = [
        {"frequency_mhz": 8420.00010, "drift_rate_hz_s": 1.5},  # too steep
        {"frequency_mhz": 8420.00030, "drift_rate_hz_s": 1.0},  # too far
        {"frequency_mhz": 8420.00010, "drift_rate_hz_s": 1.0, "tstart_mjd": START_MJD + 1},  # on another day
        {"frequency_mhz": 8420.00010, "drift_rate_hz_s": 1.1},
        {"frequency_mhz": 8420.00000, "drift_rate_hz_s": 1.0},
    ]
    candidates = read_candidates(write_found(tmp_path, rows))
    truth = [needle(8420.0), needle(8421.0)]
    interference = TrueLine(Line("interference", 8420.0, 1.0, 50.0, (0, 1, 2, 3, 4, 5)), START_MJD, 0.3)
    found, missed = find_needles(candidates[::-1], [*truth, interference], options(tmp_path))
    assert found.candidate is not None and found.candidate.rank == 4 and missed.candidate is None
    assert found.error_hz == pytest.approx(100, abs=1e-3) and found.error_hz_s == pytest.approx(0.1)
    assert np.isnan(missed.error_hz) and np.isnan(missed.error_hz_s)
    exact = options(tmp_path, within_hz=50, within_hz_s=0.05)
    (again,) = find_needles(candidates, truth[:1], exact)
    assert again.candidate is not None and again.candidate.rank == 5
    (any_day,) = find_needles(candidates[:3], [needle(8420.0, start_mjd=np.nan)], options(tmp_path))
    assert any_day.candidate is not None and any_day.candidate.rank == 3


def test_candidates_of_too_high_a_false_alarm_rate_do_not_count_if_asked(tmp_path: Path) -> None:
    rows = [{"frequency_mhz": 8420.0, "drift_rate_hz_s": 1.0, "false_alarm_rate": rate} for rate in (0.5, 0.2, "")]
    candidates = read_candidates(write_found(tmp_path, rows))
    for most, expected in ((1.0, 1), (0.3, 2), (0.1, 3)):  # an unknown false alarm rate counts as found
        (found,) = find_needles(candidates, [needle(8420.0)], options(tmp_path, most_false_alarms=most))
        assert found.candidate is not None and found.candidate.rank == expected


def test_every_needle_is_in_one_group_of_each_kind(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth = [
        needle(8420 + n / 100, float(rng.uniform(-4, 4)), float(rng.uniform(5, 99)), place=float(rng.uniform(0, 1)))
        for n in range(50)
    ]
    rows = [{"frequency_mhz": each.signal.frequency_mhz, "drift_rate_hz_s": each.signal.drift_rate_hz_s}
            for each in truth if each.signal.snr > np.median([each.signal.snr for each in truth])]  # fmt: skip
    found = find_needles(read_candidates(write_found(tmp_path, rows)), truth, options(tmp_path))
    groups = group_needles(found)
    assert len(groups) == 3
    for each in groups.values():
        assert sum(group.needles for group in each) == 50
        assert sum(group.found for group in each) == len(rows)
    by_snr = groups["SNR in a panel"]
    assert by_snr[0].found == 0 and by_snr[-1].found == by_snr[-1].needles
    alike = find_needles([], [needle(8420.0, place=np.nan), needle(8421.0, place=np.nan)], options(tmp_path))
    assert [len(each) for each in group_needles(alike).values()] == [1, 1]


def test_recall_prints_what_was_found_and_how_exactly(tmp_path: Path, command: Command) -> None:
    write_found(tmp_path, [{"frequency_mhz": 8420.00002, "drift_rate_hz_s": 1.01}])
    write_truth(tmp_path / "truth.csv", [needle(8420.0), needle(8425.0, -2.0)])
    answer = command("recall", tmp_path / "candidates.csv", tmp_path / "truth.csv", "--each")
    assert answer.code == 0, answer.err
    for words in ("needles found: 1 of 2", "20.0 and 20.0 Hz", "0.0100 and 0.0100 Hz/s", "50%", "not found"):
        assert words in answer.out, words
    assert command("recall", tmp_path / "candidates.csv", tmp_path / "truth.csv", "--within-hz", 0).code == 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"panels": "0 2 6"}, "line 2: panels '0 2 6'"),
        ({"snr": "high"}, "line 2: snr 'high'"),
        ({"panels": "0 1"}, "holds no needle"),
    ],
)
def test_a_table_of_truth_that_is_none_is_refused_by_name(tmp_path: Path, changed: dict[str, str], words: str) -> None:
    write_found(tmp_path, [])
    write_truth(tmp_path / "truth.csv", [needle(8420.0)])
    with (tmp_path / "truth.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    with (tmp_path / "truth.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row | changed)
    with pytest.raises(InputError, match=rf"truth\.csv.*{words}"):
        list(recall_lines(options(tmp_path)))
    (tmp_path / "truth.csv").unlink()
    with pytest.raises(InputError, match=r"truth\.csv: no such file"):
        list(recall_lines(options(tmp_path)))
