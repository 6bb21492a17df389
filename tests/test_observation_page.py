"""The promises of an observation's page: pictures with true frequencies and times; bad tables are refused by name.

Axes: P panel, T time bin, F frequency channel.
"""

import csv
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from reports.event_waterfalls import EventLine, Panels, draw_event, shown_starts
from reports.observation import ObservedSnippets, write_observation_report
from shard_tools.errors import InputError
from shard_tools.joined_manifest import read_manifests
from shard_tools.manifest import Manifest
from shard_tools.observation.candidates_table import COLUMNS, read_candidates
from shard_tools.observation.ingest import ingest
from shard_tools.observation.ingest_config import IngestConfig
from shard_tools.observation.simulate import SimulateObservationConfig, simulate_observation
from tests.browser import find_chromium, look
from tests.test_page import EVIL, pictures_of
from tests.tiny import pack_tiny

CARRIER = {"frequency_mhz": 8419.297028, "drift_rate_hz_s": -0.3776}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two coarse channels with Voyager's carrier."""
    folder = tmp_path_factory.mktemp("observation")
    files = simulate_observation(SimulateObservationConfig(folder / "files", coarse_channels=2, nfpc=32768))
    ingest(IngestConfig(str(folder / "shards"), tuple(files), workers=1))
    return read_manifests(str(folder / "shards"))


def snippet_of(manifest: Manifest, mhz: float) -> str:
    """The key of the snippet whose middle is nearest to a frequency."""
    ((_, observed),) = ObservedSnippets(manifest).observed
    middle = observed.first_mhz + 512 * observed.cadences[0].channel_width_hz / 1e6
    return manifest.key(int(np.abs(middle - mhz).argmin()))


def candidate(manifest: Manifest, rank: int = 1, **changed: Any) -> dict[str, Any]:
    snrs = {name: 12.5 for name in COLUMNS if name.startswith("snr")}
    found = {"rank": rank, "score": 0.97, "false_alarm_rate": 0.05, **CARRIER, **snrs, "bandwidth_hz": 22.3,
             "coarse_channel": 1, "channel": 20000, "source": "VOYAGER-1", "ra": 17.1, "dec": 12.2,
             "tstart_mjd": 57650.782, "flags": "border roll_off", "picture": f"candidates/{rank}.png"}  # fmt: skip
    found |= changed
    return {"snippet": snippet_of(manifest, found["frequency_mhz"]), **found}


def write_candidates(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a table; cells that a row leaves out are empty, or 0 if a number is needed."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({"channel": 0} | row for row in rows)
    return path


def panels_of(manifest: Manifest, mhz: float) -> Panels:
    snippets = ObservedSnippets(manifest)
    place = snippets.find(snippet_of(manifest, mhz))
    assert place is not None
    return snippets.panels(place)


def arrowheads(figure: Figure) -> list[tuple[float, float]]:
    """MHz and s of each arrowhead."""
    return [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in figure.axes[0].lines
        if line.get_marker() in (6, 7)
    ]


def test_panels_are_drawn_where_they_were_with_the_line_between_its_arrowheads(manifest: Manifest) -> None:
    line = EventLine(*CARRIER.values())
    panels = panels_of(manifest, line.frequency_mhz)
    figure = draw_event(panels, line, [1.0] * 6)
    axes = figure.axes[0]
    bottoms, tops = zip(*(image.get_extent()[2:] for image in axes.images), strict=True)
    assert tops == pytest.approx([320.0 * n for n in range(6)], abs=0.01)
    assert np.subtract(bottoms, tops) == pytest.approx(16 * panels.bin_length_s)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "320", "640", "960", "1280", "1600"]
    marks = arrowheads(figure)
    assert len(marks) == 12
    for mhz, seconds in marks:
        assert mhz == pytest.approx(line.mhz_at(seconds), abs=1e-9)
    width_mhz = panels.channel_width_hz / 1e6
    for image in axes.images[::2]:  # the carrier is the brightest channel in the first and the last time bin
        low, high, bottom, top = image.get_extent()
        values = image.get_array()
        for row, seconds in (
            (values[0], top + panels.bin_length_s / 2),
            (values[-1], bottom - panels.bin_length_s / 2),
        ):
            found_mhz = low + (row.argmax() + 0.5) * (high - low) / len(row)
            assert found_mhz == pytest.approx(line.mhz_at(seconds), abs=width_mhz)


def test_a_long_pause_is_shortened_and_it_is_said(manifest: Manifest) -> None:
    panels = replace(panels_of(manifest, 8419.297), starts_s=[0.0, 320.0, 7840.0, 8160.0, 8480.0, 8800.0])
    tops, is_true = shown_starts(panels.starts_s, panels.length_s)
    assert not is_true and tops[2] == pytest.approx(320 + 2 * panels.length_s)
    assert np.diff(tops)[[0, 2, 3, 4]] == pytest.approx(320)
    axes = draw_event(panels, EventLine(*CARRIER.values()), [1.0] * 6).axes[0]
    assert "shortened" in axes.get_ylabel()
    assert axes.get_yticklabels()[2].get_text() == "7840"


@pytest.mark.parametrize("drift", [-4.0, 0.0, 4.0])
@pytest.mark.parametrize("place", [-0.2, 0.0, 0.5, 1.0])
def test_the_picture_stays_within_the_snippet_wherever_the_line_is(place: float, drift: float) -> None:
    values = np.random.default_rng(0).standard_normal((6, 16, 1024)).astype(np.float32)
    panels = Panels(values, [320.0 * n for n in range(6)], 18.25, 8419.0, 22.35)
    low, high = panels.edges_mhz
    figure = draw_event(panels, EventLine(low + place * (high - low), drift), [np.nan] * 6)
    left, right = figure.axes[0].get_xlim()
    assert low - 1e-9 <= left < right <= high + 1e-9
    assert all(left <= mhz <= right for mhz, _ in arrowheads(figure))


@pytest.mark.parametrize("shape", [(6, 16, 1024), (6, 273, 256), (6, 5, 40)])
def test_noise_is_drawn_as_high_as_it_is_however_many_values_a_pixel_sums(shape: tuple[int, int, int]) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    panels = Panels(values, [400.0 * n for n in range(6)], 300 / shape[1], 8419.0, 22.35)
    for drift in (0.0, 3.5):
        figure = draw_event(panels, EventLine(8419.0004, drift), [1.0] * 6)
        drawn = np.concatenate([image.get_array().ravel() for image in figure.axes[0].images])
        assert drawn.std() == pytest.approx(1, abs=0.05)


def test_the_page_holds_the_table_the_pictures_and_the_interference(manifest: Manifest, tmp_path: Path) -> None:
    rows = [candidate(manifest, rank, score=1 - rank / 100) for rank in range(1, 6)]
    rows[4] |= {"picture": "", "false_alarm_rate": "", "coarse_channel": ""}
    table = write_candidates(tmp_path / "found.csv", rows)
    (tmp_path / "found.interference.csv").write_text("frequency_mhz,snr_off\n8419.25,31.5\n")
    page = write_observation_report(table, manifest, ["needlestream"])
    assert page == tmp_path / "found.report.html"
    html = page.read_text()
    assert len(pictures_of(html)) == 6  # four candidates and two charts of interference
    for word in ("8419.297028", "-0.378", "0.970", "false alarm rate 0.05", "not known", "border roll_off",
                 "VOYAGER-1", "lines of interference", "needlestream", "panels begin at"):  # fmt: skip
        assert word in html, word
    drawn = sorted(path.name for path in (tmp_path / "candidates").iterdir())
    assert drawn == ["1.png", "2.png", "3.png", "4.png"]
    assert all(matplotlib.image.imread(tmp_path / "candidates" / name).shape[0] > 400 for name in drawn)


def test_an_empty_table_has_a_page_that_says_so(manifest: Manifest, tmp_path: Path) -> None:
    page = write_observation_report(write_candidates(tmp_path / "candidates.csv", []), manifest)
    assert "It is empty" in page.read_text() and not (tmp_path / "candidates").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"snippet": "elsewhere"}, "rank 1 has snippet 'elsewhere', which .* does not hold"),
        ({"score": "high"}, "line 2: .*'high', expected a row of infer.py --candidates"),
        ({"rank": 1.5}, "line 2: .*'1.5', expected a row of infer.py --candidates"),
        ({"picture": "../../1.png"}, "leads out of its folder"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_by_name(
    manifest: Manifest, tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    (tmp_path / "in").mkdir()
    table = write_candidates(tmp_path / "in" / "candidates.csv", [candidate(manifest) | changed])
    with pytest.raises(InputError, match=f"{re.escape(str(table))}.*{words}"):
        write_observation_report(table, manifest)
    assert not (tmp_path / "1.png").exists()


def test_a_missing_table_and_a_missing_column_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"candidates\.csv: no such file; `infer\.py --candidates"):
        read_candidates(tmp_path / "candidates.csv")
    (tmp_path / "candidates.csv").write_text("rank,score\n1,0.5\n")
    with pytest.raises(InputError, match=r"candidates\.csv: columns .*, expected"):
        read_candidates(tmp_path / "candidates.csv")


def test_what_pack_made_has_no_frequencies_and_is_refused(tmp_path: Path) -> None:
    packed = pack_tiny(tmp_path / "packed")
    with pytest.raises(InputError, match="has no frequencies, as `pack` made it"):
        write_observation_report(write_candidates(tmp_path / "candidates.csv", []), packed)


@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_the_page_without_complaint(manifest: Manifest, tmp_path: Path, width: int) -> None:
    browser = find_chromium()
    if browser is None:
        pytest.skip("no chromium on the path (Debian: apt-get install chromium); CHROMIUM names another")
    rows = [candidate(manifest, 1, source=EVIL, flags=EVIL), candidate(manifest, 2)]
    page = write_observation_report(write_candidates(tmp_path / "candidates.csv", rows), manifest)
    seen = look(browser, page, width)
    assert seen.complaints == [] and seen.requests == [] and seen.broken == []
    assert seen.pictures == 4 and seen.wide <= 0 and seen.scripts == 0 and not seen.ran
    assert EVIL in seen.text
