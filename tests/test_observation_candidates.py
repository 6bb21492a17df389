"""The promises of `infer.py --candidates`: from the shards of an observation to ranked candidates.

Axes: P panel, T time bin, F frequency channel; B snippet, K line.
"""

import csv
import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infer import InferConfig, infer
from pipeline.canvas import CanvasConfig
from pipeline.loader import LoaderConfig
from shard_tools.axes import kaggle_axes
from shard_tools.cadence import OFF_POSITIONS, ON_POSITIONS
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from shard_tools.observation.candidates_table import Candidate, read_candidates
from shard_tools.observation.header import SECONDS_A_DAY
from shard_tools.observation.ingest import ingest
from shard_tools.observation.ingest_config import IngestConfig
from shard_tools.observation.lines import Grid
from shard_tools.observation.lines import add_line as add_observed_line
from shard_tools.observation.simulate import (
    CARRIER_DRIFT_HZ_S,
    CARRIER_MHZ,
    CHANNEL_MHZ,
    SIDE_BAND_MHZ,
    Line,
    SimulateObservationConfig,
    draw_panel,
    header_fields,
    write_fbh5,
)
from shard_tools.sample import read_snippets
from shard_tools.tasks.base import TaskConfig
from tests.observation_files import NAMES, write_cadence, write_h5
from tests.observation_files import fields as header_fields_of
from tests.test_line_fit import FINE, add_line, noise
from tests.tiny import pack_tiny
from training.model import ModelConfig, build_model
from training.observation.hits import Hits, place_hits, read_hits
from training.observation.line_scores import LineScorer
from training.observation.observed import read_observed
from training.observation.ranking import rank_events
from training.observation.search_observation import How, search_observation
from training.observation.snippet_lines import find_lines
from training.observation.write_findings import NO_WEIGHTS, CandidatesConfig, load_judges
from training.search.candidates import WindowModel
from training.weights import find_weights, save_weights

BAND = SimulateObservationConfig(Path(), coarse_channels=4, nfpc=32768, seed=3)
CPU = torch.device("cpu")


def write_files(
    folder: Path,
    lines: Sequence[Line],
    config: SimulateObservationConfig = BAND,
    later_days: float = 0.0,
    longer_s: float = 0.0,
    source_prefix: str = "",
) -> list[Path]:
    """Six files of noise with these lines."""
    folder.mkdir(parents=True)
    paths = [folder / f"{name}.h5" for name in NAMES]
    for panel, path in enumerate(paths):
        header = header_fields(config, panel)
        header["source_name"] = source_prefix + header["source_name"]
        header["tstart"] += later_days + panel * longer_s / SECONDS_A_DAY
        write_fbh5(path, draw_panel(config, panel, list(lines)), header, config.nfpc)
    return paths


def ingested(folder: Path, lines: Sequence[Line], config: SimulateObservationConfig = BAND) -> Manifest:
    files = write_files(folder / "files", lines, config)
    return ingest(IngestConfig(folder / "shards", tuple(files), workers=1))


def candidates_of(manifest: Manifest, out: Path, weights: Path | str = "none", **options: Any) -> list[Candidate]:
    config = CandidatesConfig(candidates=out, **options)
    infer(InferConfig((str(manifest.root),), (Path(weights),), observation=config, precision="float32"))
    return read_candidates(out)


def interference_of(out: Path) -> list[dict[str, str]]:
    with out.with_name("interference.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def nearest(found: Sequence[Candidate], line: Line) -> Candidate:
    return min(found, key=lambda each: abs(each.frequency_mhz - line.frequency_mhz))


def assert_at(found: Candidate, line: Line) -> None:
    """Check that a candidate lies within 2 channels of 22 Hz and 0.05 Hz/s of a line."""
    assert abs(found.frequency_mhz - line.frequency_mhz) < 2 * 8 * CHANNEL_MHZ, (found, line)
    assert abs(found.drift_rate_hz_s - line.drift_rate_hz_s) < 0.05, (found, line)


VOYAGER = [
    Line("carrier", CARRIER_MHZ, CARRIER_DRIFT_HZ_S, 300.0, ON_POSITIONS),
    *(
        Line("side_band", CARRIER_MHZ + side * SIDE_BAND_MHZ, CARRIER_DRIFT_HZ_S, 40.0, ON_POSITIONS)
        for side in (-1, 1)
    ),
]
HIGHEST_MHZ = BAND.first_mhz
INTERFERENCE = [
    Line("interference", HIGHEST_MHZ - 0.06, 0.3, 60.0, tuple(range(6))),
    Line("interference", HIGHEST_MHZ - 0.12, -1.1, 60.0, (0, 1, 2, 4)),
    Line("interference", HIGHEST_MHZ - 0.25, 0.8, 120.0, OFF_POSITIONS),
]


@pytest.fixture(scope="module")
def voyager(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return ingested(tmp_path_factory.mktemp("voyager"), [*VOYAGER, *INTERFERENCE])


@pytest.fixture(scope="module")
def table(voyager: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The candidates.csv of `voyager`, in a folder with all other outputs."""
    out = tmp_path_factory.mktemp("candidates") / "new" / "candidates.csv"
    candidates_of(voyager, out, pictures=2, turbo_seti=out.parent / "turbo_seti")
    return out


def test_batches_that_are_searched_at_the_same_time_change_nothing(
    voyager: Manifest, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.observation.search_observation._AT_ONCE", 1)
    monkeypatch.setattr("training.observation.search_observation._SUMS_BYTES", 1)  # one snippet per batch
    found = candidates_of(voyager, tmp_path / "candidates.csv", pictures=2)
    expected = read_candidates(table)
    assert [each.snippet for each in found] == [each.snippet for each in expected]
    assert [each.score for each in found] == pytest.approx([each.score for each in expected], rel=1e-4)


def test_voyagers_carrier_and_side_bands_are_the_candidates_and_interference_is_none(
    voyager: Manifest, table: Path
) -> None:
    found = read_candidates(table)
    assert len(found) == 3 and [each.rank for each in found] == [1, 2, 3]
    for line in VOYAGER:
        assert_at(nearest(found, line), line)
    carrier = nearest(found, VOYAGER[0])
    assert (round(carrier.frequency_mhz, 4), round(carrier.drift_rate_hz_s, 3)) == (8419.2970, -0.378)
    assert carrier.snr == pytest.approx((carrier.snr_a1 + carrier.snr_a2 + carrier.snr_a3) / np.sqrt(3), abs=0.02)
    # 300 in one channel of 2.8 Hz. As 8 are summed, and the line leaves its channel, about 100 in each ON panel.
    assert min(carrier.snr_a1, carrier.snr_a2, carrier.snr_a3) > 80
    assert max(map(abs, (carrier.snr_b, carrier.snr_c, carrier.snr_d))) < 4
    assert (carrier.source, carrier.tstart_mjd) == ("VOYAGER-1", pytest.approx(57650.7820949074))
    assert carrier.ra == pytest.approx(17.1677733) and carrier.dec == pytest.approx(12.183)
    assert [each.picture for each in found] == ["candidates/1.png", "candidates/2.png", ""]
    assert {each.snippet for each in found} <= set(voyager.keys_of(np.arange(len(voyager))))
    both = interference_of(table)
    assert len(both) == 2
    for line in INTERFERENCE[:2]:
        assert min(abs(float(row["frequency_mhz"]) - line.frequency_mhz) for row in both) < 3e-5
    assert not table.with_name("submission.csv").exists()


def test_channels_are_counted_from_the_lowest_of_the_file(table: Path) -> None:
    carrier = nearest(read_candidates(table), VOYAGER[0])
    lowest = HIGHEST_MHZ - (BAND.channels - 1) * CHANNEL_MHZ
    assert abs(carrier.channel - (CARRIER_MHZ - lowest) / CHANNEL_MHZ) < 16
    assert carrier.coarse_channel == carrier.channel // BAND.nfpc == 1


def test_a_line_in_the_off_panels_alone_is_a_false_alarm_of_candidates_that_score_less(table: Path) -> None:
    """The OFF line of INTERFERENCE is the only control."""
    found = read_candidates(table)
    rates = [each.false_alarm_rate for each in found]
    assert rates == sorted(rates) and min(rates) >= 0.3333 and rates[-1] == pytest.approx(2 / 3, abs=1e-3)


def test_the_best_score_is_first_however_faint_and_of_equal_scores_the_brightest(voyager: Manifest) -> None:
    observed = read_observed(voyager)
    how = How(load_judges([NO_WEIGHTS], voyager, "test", CPU), 6.0, CPU, LoaderConfig())
    findings = search_observation(voyager, observed, "test", how)
    for sign in (-1, 1, 0):
        events = [replace(each, line=replace(each.line, score=sign * each.line.snr)) for each in findings.events]
        scored = replace(findings, events=events)
        found, _ = rank_events(scored, observed, voyager, trained=False, pictures=())
        assert [each.snr for each in found] == sorted((each.snr for each in found), reverse=sign >= 0)
        assert [each.rank for each in found] == [1, 2, 3]


def test_the_same_shards_give_the_same_tables(voyager: Manifest, table: Path, tmp_path: Path) -> None:
    candidates_of(voyager, tmp_path / "candidates.csv", pictures=2, turbo_seti=tmp_path / "turbo_seti")
    written = [path for path in sorted(tmp_path.rglob("*")) if path.is_file() and path.suffix != ".html"]
    assert len(written) == 2 + 2 + 7  # not the page, which says when it was made
    for path in written:
        assert path.read_bytes() == (table.parent / path.relative_to(tmp_path)).read_bytes()


def test_pictures_of_an_earlier_run_are_removed_and_other_files_stay(voyager: Manifest, tmp_path: Path) -> None:
    out, pictures = tmp_path / "candidates.csv", tmp_path / "candidates"
    candidates_of(voyager, out)
    assert sorted(path.name for path in pictures.iterdir()) == ["1.png", "2.png", "3.png"]
    for kept in ("4.png", "notes.txt"):
        (pictures / kept).write_text("mine")
    text = out.read_text()
    (tmp_path / "3.png").write_text("mine")
    out.write_text(text.replace("candidates/3.png", "3.png"))
    candidates_of(voyager, out, pictures=1)
    assert sorted(path.name for path in pictures.iterdir()) == ["1.png", "3.png", "4.png", "notes.txt"]
    assert (tmp_path / "3.png").read_text() == "mine"
    out.write_text(text)
    candidates_of(voyager, out, min_snr=1e6, pictures=3)
    assert sorted(path.name for path in pictures.iterdir()) == ["4.png", "notes.txt"]


def test_a_picture_that_no_earlier_run_wrote_is_not_replaced(
    voyager: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(*_: Any) -> None:
        raise AssertionError("the search began")

    mine = tmp_path / "candidates" / "2.png"
    mine.parent.mkdir()
    mine.write_text("mine")
    candidates_of(voyager, tmp_path / "candidates.csv", pictures=1)
    with monkeypatch.context() as patch:
        patch.setattr("training.observation.write_findings.search_observation", search)
        with pytest.raises(InputError, match=f"could replace {mine}, .* move or remove that file, or choose another"):
            candidates_of(voyager, tmp_path / "candidates.csv", pictures=2)
    assert mine.read_text() == "mine"
    mine.unlink()
    # Each run replaces the pictures of the one before, even if its table is damaged: a number that is none, and an open
    # quote before more text than a cell may hold.
    for damage, end in (("", ""), ("about ", ""), ("", '"' + 150_000 * "x")):
        candidates_of(voyager, tmp_path / "candidates.csv", pictures=2)
        assert mine.read_bytes().startswith(b"\x89PNG")
        table = (tmp_path / "candidates.csv").read_text()
        (tmp_path / "candidates.csv").write_text(table.replace("\n1,", f"\n{damage}1,") + end)
    candidates_of(voyager, tmp_path / "candidates.csv", pictures=2)


def test_needles_are_found_wherever_they_lie_once_each_and_where_they_are(tmp_path: Path) -> None:
    """They lie at any place in a snippet and in a coarse channel, cross the borders of both, and drift up and down."""
    # Their distance of 6.13 kHz divides neither the snippets' step of 15.3 kHz nor the coarse channels' 91.6 kHz.
    offsets = np.arange(0.006, BAND.channels * CHANNEL_MHZ - 0.006, 0.00613)
    drifts = np.resize([0.41, -0.27, 0.13, -0.52, 0.0, 0.33], len(offsets))
    needles = [
        Line("needle", HIGHEST_MHZ - offset, drift, 55.0, ON_POSITIONS)
        for offset, drift in zip(offsets.tolist(), drifts.tolist(), strict=True)
    ]
    borders = HIGHEST_MHZ - np.arange(1, 4) * BAND.nfpc * CHANNEL_MHZ
    needles += [
        Line("border", mhz - 0.0003 * sign, 0.6 * sign, 55.0, ON_POSITIONS)
        for mhz, sign in zip(borders, (1, -1, 1), strict=True)
    ]
    found = candidates_of(ingested(tmp_path, needles), tmp_path / "candidates.csv", min_snr=8.0)
    for line in needles:
        assert_at(nearest(found, line), line)
    assert len(found) == len(needles) == 61
    assert not [each for each in found if each.snr < 20]


@pytest.mark.parametrize("weights", ["none", "needlestream"])
def test_needles_of_a_mid_resolution_product_are_found_within_a_channel_and_1_hz_s(
    tmp_path: Path, weights: str
) -> None:
    """A channel is 2.9 kHz wide and the cadence takes half an hour, so 1.5 Hz/s crosses one channel in all."""
    width_mhz = 187.5 / 64 / 1024
    spectra, spectrum_s = 279, 3072e-6 / width_mhz
    needles = [Line("needle", 8416.0, 3.0, 60.0, ON_POSITIONS), Line("needle", 8417.0, 0.0, 60.0, ON_POSITIONS)]
    interference = [
        Line("interference", mhz, rate, 60.0, tuple(range(6))) for mhz, rate in ((8418.5, -2.0), (8415.5, 0.0))
    ]
    files = []
    for panel, name in enumerate(NAMES):
        power = 1 + np.random.default_rng(panel).standard_normal((spectra, 2048)) / np.sqrt(3072)
        for line in (each for each in (*needles, *interference) if panel in each.panels):
            grid = Grid(8420.0, -width_mhz, panel * 320.0, spectrum_s)
            add_observed_line(power, grid, line, line.snr / np.sqrt(3072 * spectra))
        header = header_fields_of(panel, foff=-width_mhz, nchans=2048, nfpc=1024, tsamp=spectrum_s)
        files.append(write_h5(tmp_path / f"{name}.h5", (1e9 * power).astype(np.float32), header, 1024))
    manifest = ingest(IngestConfig(tmp_path / "shards", tuple(files), workers=1))
    assert manifest.shape == (6, 273, 256)
    found = candidates_of(manifest, tmp_path / "candidates.csv", find_weights(Path(weights)))
    for line in needles:
        nearby = nearest(found, line)
        assert abs(nearby.frequency_mhz - line.frequency_mhz) < width_mhz, (nearby, line)
        assert abs(nearby.drift_rate_hz_s - line.drift_rate_hz_s) < 1, (nearby, line)
    assert len(found) == 2


@pytest.mark.parametrize("options", [{}, {"channel_bin": 1, "max_drift": 0.4}])
def test_a_second_pass_without_summing_channels_finds_the_slow_line_brighter(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    config = replace(BAND, coarse_channels=2, nfpc=16384)  # narrower channels are steep, so not flat across a wide line
    line = Line("needle", config.first_mhz - 0.02, 0.01, 25.0, ON_POSITIONS)
    files = write_files(tmp_path / "files", [line], config)
    manifest = ingest(IngestConfig(tmp_path / "shards", tuple(files), workers=1, **options))
    (found,) = candidates_of(manifest, tmp_path / "candidates.csv", min_snr=8.0)
    assert_at(found, line)
    assert (found.snr > 30) == bool(options)


@pytest.mark.parametrize("other", ["", "OTHER-"])
def test_cadences_of_one_data_set_keep_their_own_times_and_sources(tmp_path: Path, other: str) -> None:
    """Both have a line at the same place: two candidates, each with the start of its own cadence; repeated if the
    targets differ.
    """
    config = replace(BAND, coarse_channels=2, nfpc=8192)
    line = Line("needle", config.first_mhz - 0.02, 0.4, 80.0, ON_POSITIONS)
    # The second cadence's panels begin 400 s apart, not 320 s.
    pieces = [
        line._replace(frequency_mhz=line.frequency_mhz + 0.4 * 80 * panel / 1e6, panels=(panel,)) for panel in (0, 2, 4)
    ]
    lists = [
        write_files(tmp_path / "0", [line], config),
        write_files(tmp_path / "1", pieces, config, later_days=1.0, longer_s=80.0, source_prefix=other),
    ]
    (tmp_path / "two.lst").write_text("".join(f"{path}\n" for files in lists for path in files))
    manifest = ingest(IngestConfig(tmp_path / "shards", cadences=tmp_path / "two.lst", workers=1))
    found = candidates_of(manifest, tmp_path / "candidates.csv", min_snr=12.0)
    assert len({each.tstart_mjd for each in found}) == len(found) == 2
    for each in found:
        assert_at(each, line)
        assert min(each.snr_a1, each.snr_a2, each.snr_a3) > 15
        assert ("repeated" in each.flags.split()) == bool(other)
    assert {each.source for each in found} == {"VOYAGER-1", f"{other}VOYAGER-1"}


def untrained(path: Path, shape: tuple[int, int, int] = (6, 16, 1024), stem: str = "sums", **canvas: Any) -> Path:
    """Write weights of a new model, which scores as the search does, except for noise."""
    torch.manual_seed(0)
    plain = {"canvas": "panels", "height": shape[1], "width": shape[2], "normalise": False}
    size = CanvasConfig(**(plain | canvas))
    model = "convnext_window" if stem == "sums" else "swin_nano"
    state = build_model(ModelConfig(model, stem=stem), size.channels, size.height, size.width).state_dict()  # type: ignore[arg-type]
    about = {"model": model, "stem": stem, "candidates": 2, "canvas": dataclasses.asdict(size), "shape": list(shape)}
    save_weights(path, state, about | {"fold": 0, "auc": 0.5, "shards_identity": ""})
    return path


def test_a_model_searches_the_rates_of_its_training_at_the_times_of_the_cadence() -> None:
    size = CanvasConfig("panels", 16, 1024, normalise=False)
    model = build_model(ModelConfig("convnext_window", stem="sums"), size.channels, size.height, size.width)
    assert isinstance(model, WindowModel)
    trained = replace(FINE, bin_length_s=10.0, panel_starts_s=tuple(160.0 * n for n in range(6)), max_drift_hz_s=2.0)
    model.candidates.observe(trained)
    scorer = LineScorer(FINE, model, 0, CPU)
    expected = 2.0 * 10.0 / FINE.channel_width_hz  # channels a time bin
    assert float(scorer._search.rates.max()) == pytest.approx(expected)
    assert scorer.axes.max_drift_hz_s == pytest.approx(FINE.hertz_per_second(expected))
    np.testing.assert_allclose(scorer._search.rows.numpy(), FINE.rows[[0, 2, 4, 1, 3, 5]], rtol=1e-5)


def test_by_weights_candidates_are_the_same_and_scores_are_probabilities(voyager: Manifest, tmp_path: Path) -> None:
    found = candidates_of(voyager, tmp_path / "candidates.csv", untrained(tmp_path / "w.safetensors"))
    for line in VOYAGER:
        assert_at(nearest(found, line), line)
    assert len(found) == 3 and all(0 <= each.score <= 1 for each in found)
    assert found == sorted(found, key=lambda each: -each.score)


def test_the_logits_of_a_snippets_lines_add_up_to_the_models_own(voyager: Manifest, tmp_path: Path) -> None:
    """The lines of the control add up to another logit."""
    (judge,) = load_judges([untrained(tmp_path / "w.safetensors")], voyager, "test", CPU)
    model = judge.model
    assert model is not None
    axes = read_observed(voyager).cadences[0].axes
    scorer = LineScorer(axes, model.eval(), 0, CPU)
    order = [*ON_POSITIONS, *OFF_POSITIONS]
    images = read_snippets(voyager, np.arange(5, 13))[:, order].astype(np.float32)
    found = scorer.score(images)
    model.candidates = scorer._search
    with torch.no_grad():
        own = model(torch.from_numpy(images)).numpy()[:, 0]
    np.testing.assert_allclose(np.logaddexp.reduce(found.needles.score, axis=1), own, atol=1e-4)
    assert not np.allclose(np.logaddexp.reduce(found.controls.score, axis=1), own, atol=0.1)


def test_time_bins_are_summed_as_the_weights_need_it_and_rates_stay_those_of_the_snippet() -> None:
    """Shapes of the competition and of mid-resolution products, with weights that sum 7 time bins."""
    axes = kaggle_axes()
    values = noise(axes, 1)
    add_line(values, axes, 130, 0.06, level=1.0)
    image = values[[*ON_POSITIONS, *OFF_POSITIONS]][None]
    whole, summed = (LineScorer(axes, None, 2, CPU, time_bins).score(image).needles for time_bins in (1, 7))
    for found in (whole, summed):
        assert abs(found.channel[0, 0] - 130) < 3 and abs(found.rate[0, 0] - 0.06) < 0.01
    lines = list(
        find_lines(LineScorer(axes, None, 2, CPU, 7), np.array([4]), values[None].astype(np.float16), np.array([8.0]))
    )
    assert [(line.row, line.on) for line in lines] == [(4, True)] and abs(lines[0].fit.rate - 0.06) < 0.002


def test_more_lines_than_one_search_proposes_are_found_in_one_snippet() -> None:
    values = noise(FINE)
    places = [(120, 0.3), (260, -0.4), (400, 0.1), (520, 0.6), (640, -0.2), (760, 0.5), (900, -0.6)]
    for middle, rate in places:
        add_line(values, FINE, middle, rate, level=4.0)
    scorer = LineScorer(FINE, None, 2, CPU)
    lines = list(find_lines(scorer, np.array([0]), values[None].astype(np.float16), np.array([8.0])))
    assert sorted(round(line.fit.middle) for line in lines) == pytest.approx([middle for middle, _ in places], abs=1)


def test_a_faint_needle_beside_bright_interference_is_found_once_this_is_blanked() -> None:
    values = noise(FINE)
    add_line(values, FINE, 500, 0.5, level=60.0, panels=tuple(range(6)))
    add_line(values, FINE, 512, 0.5, level=3.0)
    scorer = LineScorer(FINE, None, 4, CPU)
    lines = list(find_lines(scorer, np.array([0]), values[None].astype(np.float16), np.array([8.0])))
    needles = [line for line in lines if not line.is_interference]
    assert len(needles) == 1 and abs(needles[0].fit.middle - 512) < 1.5 and np.isfinite(needles[0].score)


# ---- turboSETI's formats


def test_each_telescope_file_has_a_dat_file_with_its_header_and_the_lines_that_it_shows(table: Path) -> None:
    folder, wanted = table.parent / "turbo_seti", [*VOYAGER, *INTERFERENCE]
    for panel, name in enumerate(NAMES):
        text = (folder / f"{name}.dat").read_text().splitlines()
        fields = header_fields(BAND, panel)
        assert text[1] == f"# File ID: {name}.h5 " and text[3] == f"# Source:{fields['source_name']}"
        assert float(text[4].split()[2]) == pytest.approx(fields["tstart"], abs=1e-9)
        hits = read_hits(folder / f"{name}.dat")
        expected = sorted(
            line.frequency_mhz + line.drift_rate_hz_s * 320 * panel / 1e6 for line in wanted if panel in line.panels
        )
        assert sorted(hits.mhz) == pytest.approx(expected, abs=4e-5)
        assert set(hits.mjd) == {float(text[4].split()[2])}
        for row, mhz in zip(hits.rows, hits.mhz, strict=True):
            coarse, index = divmod(round((mhz - fields["fch1"]) / fields["foff"]), BAND.nfpc)
            assert abs(int(row[5]) - index) <= 1 and 0 <= coarse < 4  # the written frequency is rounded to 1 Hz


def test_files_of_one_name_in_several_folders_have_a_dat_file_each(tmp_path: Path) -> None:
    config = replace(BAND, coarse_channels=2, nfpc=8192)
    files = write_files(tmp_path / "files", [], config)
    for path in files[1:]:
        (tmp_path / path.stem).mkdir()
        path.rename(tmp_path / path.stem / "x.h5")
    paths = [files[0], *(tmp_path / path.stem / "x.h5" for path in files[1:])]
    manifest = ingest(IngestConfig(tmp_path / "shards", tuple(paths), workers=1))
    candidates_of(manifest, tmp_path / "candidates.csv", turbo_seti=tmp_path / "dat")
    found = {path.name for path in (tmp_path / "dat").glob("*.dat")}
    assert found == {"A1.dat", *(f"{name}_x.dat" for name in NAMES[1:])}
    for panel, name in enumerate(NAMES[1:], start=1):
        start = float((tmp_path / "dat" / f"{name}_x.dat").read_text().splitlines()[4].split()[2])
        assert start == pytest.approx(header_fields(config, panel)["tstart"], abs=1e-9)


@pytest.mark.parametrize("name", ["A2.dat", "events.csv"])
def test_files_of_turbo_seti_are_not_replaced_and_those_of_an_earlier_run_are(
    voyager: Manifest, table: Path, tmp_path: Path, name: str
) -> None:
    ours = table.parent / "turbo_seti" / name
    folder = tmp_path / "dat"
    folder.mkdir()
    # The beginning of turboSETI's own files, without our name and our columns.
    theirs = ours.read_text().replace(" Needlestream", "", 1).replace(",rank,score,false_alarm_rate", "", 1)
    (folder / name).write_text(theirs)
    with pytest.raises(InputError, match=rf"--turbo-seti {folder}: .*{name} would be replaced, .* choose another"):
        candidates_of(voyager, tmp_path / "candidates.csv", turbo_seti=folder)
    assert (folder / name).read_text() == theirs and not (tmp_path / "candidates.csv").exists()
    (folder / name).write_text(ours.read_text().replace("8419", "1"))
    candidates_of(voyager, tmp_path / "candidates.csv", turbo_seti=folder)
    assert (folder / name).read_bytes() == ours.read_bytes()


def test_hits_of_turbo_seti_get_the_score_of_the_line_near_them(voyager: Manifest, table: Path, tmp_path: Path) -> None:
    found = read_candidates(table)
    second = header_fields(BAND, 2)["tstart"]
    faint = HIGHEST_MHZ - 0.3
    rows = [
        (CARRIER_MHZ + CARRIER_DRIFT_HZ_S * 640 / 1e6 + 2e-5, second),  # in the third file, a few channels off
        (INTERFERENCE[0].frequency_mhz, header_fields(BAND, 0)["tstart"]),
        (8000.0, second),
        (CARRIER_MHZ, second + 1),
        (faint, second),
    ]
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("", "SNR", "Freq", "MJD"), *((n, 30, *row) for n, row in enumerate(rows))])
    candidates_of(voyager, tmp_path / "candidates.csv", hits=tmp_path / "mine.csv")
    with (tmp_path / "hits.csv").open(newline="") as file:
        scored = list(csv.DictReader(file))
    carrier = nearest(found, VOYAGER[0])
    assert [row["SNR"] for row in scored] == ["30"] * 5
    assert [row["found"] for row in scored[:4]] == ["candidate", "interference", "outside", "outside"]
    assert scored[4]["found"] in ("faint", "nothing")
    assert (int(scored[0]["rank"]), float(scored[0]["score"])) == (carrier.rank, carrier.score)
    assert float(scored[0]["line_mhz"]) == carrier.frequency_mhz and scored[0]["snippet"]
    assert scored[1]["score"] == scored[2]["score"] == scored[2]["snippet"] == "" and scored[1]["snippet"]
    # The table of candidates is the same with hits and without.
    assert (tmp_path / "candidates.csv").read_text().count("\n") == len(found) + 1


def test_a_faint_line_that_is_no_candidate_gives_a_hit_its_score(tmp_path: Path) -> None:
    config = replace(BAND, coarse_channels=1)
    line = Line("needle", config.first_mhz - 0.03, 0.3, 16.0, ON_POSITIONS)
    files = write_files(tmp_path / "files", [line], config)
    manifest = ingest(IngestConfig(tmp_path / "shards", tuple(files), workers=1))
    (tmp_path / "mine.csv").write_text(f"Freq,MJD\n{line.frequency_mhz},{header_fields(config, 0)['tstart']}\n")
    assert candidates_of(manifest, tmp_path / "candidates.csv", hits=tmp_path / "mine.csv", min_snr=30) == []
    with (tmp_path / "hits.csv").open(newline="") as file:
        (scored,) = csv.DictReader(file)
    assert scored["found"] == "faint" and 3 < float(scored["score"]) < 12 and 5 < float(scored["line_snr"]) < 16
    assert abs(float(scored["line_mhz"]) - line.frequency_mhz) < 5e-5


def test_a_hit_is_in_the_band_whose_snippets_hold_it_where_several_began_at_its_time(tmp_path: Path) -> None:
    bands = {8420.0: write_cadence(tmp_path / "0"), 8421.0: write_cadence(tmp_path / "1", fch1=8421.0)}
    (tmp_path / "two.lst").write_text("".join(f"{path}\n" for files in bands.values() for path in files))
    observed = read_observed(ingest(IngestConfig(tmp_path / "shards", cadences=tmp_path / "two.lst", workers=1)))
    mjd = header_fields_of(2)["tstart"]
    hits = Hits(["Freq", "MJD"], [], [8419.99, 8420.99, 8420.5], [mjd] * 3)
    placed = place_hits(hits, observed)
    cadence_of = {round(files.fch1_mhz, 3): number for number, files in enumerate(observed.cadences)}
    assert placed.panels == [(cadence_of[8420.0], 2), (cadence_of[8421.0], 2), None]
    for mhz, rows in zip(hits.mhz[:2], placed.rows, strict=False):
        places = [observed.origins[row] for row in rows.tolist()]
        assert places and all(place.first_mhz <= mhz <= place.first_mhz + 0.023 for place in places)
    assert not len(placed.rows[2])


def test_two_passes_over_the_same_files_are_not_searched_together(tmp_path: Path) -> None:
    files = tuple(write_cadence(tmp_path / "files"))
    passes = [
        str(ingest(IngestConfig(tmp_path / f"bin{width}", files, workers=1, channel_bin=width, max_drift=0.4)).root)
        for width in (8, 1)
    ]
    out = CandidatesConfig(tmp_path / "found" / "candidates.csv")
    with pytest.raises(InputError, match=r"A1\.h5 is in the data twice, in channels of 22.35 and 2.794 Hz.*by itself"):
        infer(InferConfig(tuple(passes), (NO_WEIGHTS,), observation=out))
    assert not out.candidates.exists()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Freq,Source\n1,2\n", "lacks the columns .'MJD'.; expected turboSETI's table"),
        ("Freq,MJD\n8419.1,57650\nsoon,57650\n", "line 3: 'soon', expected a number"),
        ("# File ID\n000001 1 2 8419.1\n", "lacks a line '# MJD:'"),
        ("# MJD: 57650.0\tRA\n000001\t0.1\n", "line 2: 2 cells, expected 8"),
        ("# MJD: soon\tRA\n", "line 1: 'soon', expected a number"),
        ("Freq,MJD,SNR\n8419.1,57650,9\n\n8419.1,57650\n", "line 4: 2 cells, expected 3"),
        ("Freq,MJD,SNR\n8419.1,57650,9,9\n", "line 2: 4 cells, expected 3"),
        ("Freq,MJD\n" + "9" * 200_000, "not a CSV table"),
        ("", "lacks the columns"),
        (None, "cannot be read"),
    ],
)
def test_a_table_that_is_none_of_turbo_setis_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "mine").write_text(text)
    with pytest.raises(InputError, match=f"--hits {tmp_path / 'mine'}.*{words}"):
        read_hits(tmp_path / "mine")


def test_a_table_of_hits_may_have_empty_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    """Spreadsheets write such files."""
    (tmp_path / "mine.csv").write_text("\ufeffFreq,MJD\n8419.1,57650\n\n8419.2,57651\n\n")
    found = read_hits(tmp_path / "mine.csv")
    assert (found.columns, found.mhz, found.mjd) == (["Freq", "MJD"], [8419.1, 8419.2], [57650.0, 57651.0])


def test_two_tables_in_one_folder_keep_what_is_written_beside_each(voyager: Manifest, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text(f"Freq,MJD\n{CARRIER_MHZ},{header_fields(BAND, 0)['tstart']}\n")
    candidates_of(voyager, tmp_path / "candidates.csv", hits=tmp_path / "mine.csv", pictures=1)
    names = ("candidates.csv", "interference.csv", "hits.csv", "candidates/1.png")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    (found,) = candidates_of(voyager, tmp_path / "bright.csv", hits=tmp_path / "mine.csv", pictures=1, min_snr=150)
    assert found.picture == "bright.candidates/1.png"
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    for name in ("bright.interference.csv", "bright.hits.csv", "bright.candidates/1.png", "bright.report.html"):
        assert (tmp_path / name).is_file(), name


@pytest.mark.parametrize("name", ["candidates.csv", "interference.csv", "hits.csv"])
@pytest.mark.parametrize("text", ["rank,score,mine\n1,2,3\n", "frequency_mhz,drift_rate_hz_s\n"])
def test_tables_that_this_program_did_not_write_are_not_replaced(
    voyager: Manifest, tmp_path: Path, name: str, text: str
) -> None:
    out = tmp_path / "found" / "candidates.csv"
    out.parent.mkdir()
    out.with_name(name).write_text(text)
    (tmp_path / "mine.csv").write_text("Freq,MJD\n")
    with pytest.raises(InputError, match=rf"--candidates {out}: .*{name} would be replaced, .* choose another"):
        candidates_of(voyager, out, hits=tmp_path / "mine.csv")
    assert [path.name for path in out.parent.iterdir()] == [name] and out.with_name(name).read_text() == text


# ---- What is refused


def test_a_data_set_without_frequencies_is_refused_with_the_remedy(tmp_path: Path) -> None:
    manifest = pack_tiny(tmp_path, train=20, test=3)
    with pytest.raises(InputError, match=r"--candidates: .*has no frequencies; .*ingest.*Leave --candidates out"):
        candidates_of(manifest, tmp_path / "candidates.csv")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shape": (6, 32, 512)}, r"trained on snippets of shape \(6, 32, 512\); .* holds \(6, 16, 1024\)"),
        ({"stem": "none", "canvas": "on_off", "height": 224, "width": 224}, "expected weights that score lines"),
        ({"normalise": True}, "expected weights that score lines"),
        ({"height": 8}, "expected weights that score lines"),
    ],
)
def test_weights_that_do_not_score_lines_of_this_shape_are_refused(
    voyager: Manifest, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    weights = untrained(tmp_path / "w.safetensors", **options)
    with pytest.raises(InputError, match=words):
        candidates_of(voyager, tmp_path / "candidates.csv", weights)


@pytest.mark.parametrize(
    ("weights", "options", "words"),
    [
        (("none",), {}, "--weights none: works with --candidates"),
        (("a",), {"observation": CandidatesConfig(Path("c.csv")), "model": "swin_nano"}, "--candidates: takes weights"),
        (("a",), {"observation": CandidatesConfig(Path("c.csv")), "tta": True}, "--candidates: takes weights"),
        (("none",), {"observation": CandidatesConfig(Path("c.csv")), "tasks": TaskConfig("ray")}, "on one machine"),
        (("none",), {"observation": CandidatesConfig(Path("c.csv")), "scores": "s3://b"}, "leave out --scores"),
        (("none",), {"observation": CandidatesConfig(Path("c.csv")), "out": Path("s.csv")}, "writes no submission"),
        (("none",), {"observation": CandidatesConfig(Path("c.csv")), "fill_missing": 0.5}, "writes no submission"),
    ],
)
def test_options_that_contradict_candidates_are_refused(
    weights: tuple[str, ...], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        InferConfig(("shards",), tuple(map(Path, weights)), **options)


@pytest.mark.parametrize(
    ("options", "words"), [({"min_snr": 3.0}, "--min-snr 3.0"), ({"pictures": -1}, "--pictures -1")]
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        CandidatesConfig(Path("c.csv"), **options)


@pytest.mark.parametrize("option", ["hits", "turbo_seti"])
def test_what_is_written_of_an_observation_needs_candidates(option: str) -> None:
    with pytest.raises(InputError, match=r"--turbo-seti, --hits: .* give --candidates too"):
        CandidatesConfig(**{option: Path("x")})


def test_a_place_that_cannot_be_written_is_refused_before_the_search(voyager: Manifest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "c.interference.csv").mkdir(parents=True)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "c.candidates").write_text("")
    names = ("folder/c.csv", "pictures/c.csv", "file/c.csv", "interference.csv", "hits.csv", "candidates", "A1.h5")
    for out in (tmp_path, Path("/dev/null"), *(tmp_path / name for name in names)):
        with pytest.raises(InputError, match=f"--candidates {out}: "):
            candidates_of(voyager, out)
    with pytest.raises(InputError, match=f"--turbo-seti {tmp_path / 'file'}: cannot be written"):
        candidates_of(voyager, tmp_path / "c.csv", turbo_seti=tmp_path / "file")


def test_the_hits_that_are_read_are_not_written_over(voyager: Manifest, tmp_path: Path) -> None:
    for name, options in (("c.hits.csv", {}), ("c.csv", {}), ("dat/events.csv", {"turbo_seti": tmp_path / "dat"})):
        hits = tmp_path / name
        hits.parent.mkdir(exist_ok=True)
        hits.write_text("Freq,MJD\n")
        with pytest.raises(InputError, match=f"--hits {hits}: would be overwritten"):
            candidates_of(voyager, tmp_path / "c.csv", hits=hits, **options)
        assert hits.read_text() == "Freq,MJD\n"
        hits.unlink()


def test_an_observation_without_noise_in_some_panel_is_refused(tmp_path: Path) -> None:
    config = replace(BAND, coarse_channels=2, nfpc=8192)
    files = write_files(tmp_path / "files", [], config)
    write_fbh5(files[3], np.ones((16, config.channels), np.float32), header_fields(config, 3), config.nfpc)
    manifest = ingest(IngestConfig(tmp_path / "shards", tuple(files), workers=1))
    with pytest.raises(InputError, match=r"each of the \d+ snippets .* has a panel without noise"):
        candidates_of(manifest, tmp_path / "candidates.csv")


def test_noise_alone_gives_a_table_without_rows(tmp_path: Path) -> None:
    manifest = ingested(tmp_path, [], replace(BAND, coarse_channels=1))
    assert candidates_of(manifest, tmp_path / "candidates.csv", turbo_seti=tmp_path / "dat") == []
    assert interference_of(tmp_path / "candidates.csv") == []


def test_weights_of_different_trainings_are_not_mixed(voyager: Manifest, tmp_path: Path) -> None:
    weights = [untrained(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    with pytest.raises(InputError, match=r"a.safetensors .*b.safetensors: trained on different data"):
        load_judges(weights, voyager, "test", CPU)
