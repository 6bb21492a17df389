"""The promises of events: one row for each line, false alarm rates, and interference by frequency."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_tools.axes import Axes
from shard_tools.cadence import OFF_POSITIONS, ON_POSITIONS
from shard_tools.errors import InputError
from shard_tools.observation.candidates_table import COLUMNS, Candidate, read_candidates, write_candidates
from tests.test_line_fit import FINE
from training.observation.events import PARTIAL, Event, SnippetOrigin, merge_lines
from training.observation.false_alarms import false_alarm_rates
from training.observation.interference import in_comb, is_crossed, is_crowded, is_repeated, write_interference
from training.observation.line_fit import Fit
from training.observation.observed import Observed
from training.observation.search_observation import _to_findings
from training.observation.snippet_lines import SnippetLine

WIDTH_MHZ = FINE.channel_width_hz / 1e6
STEP = 685  # channels from one snippet to the next


def origins(count: int = 4, axes: Axes = FINE, cadence: int = 0) -> list[SnippetOrigin]:
    return [SnippetOrigin(cadence, axes, 8419.0 + number * STEP * WIDTH_MHZ, "") for number in range(count)]


def line_in(
    row: int,
    channel: float,
    rate: float,
    *,
    score: float = 5.0,
    level: float = 12.0,
    panels: Sequence[int] = ON_POSITIONS,
    on: bool = True,
    width: int = 1,
) -> SnippetLine:
    """A line at `channel` of the band in the middle of the cadence, as seen in the snippet `row`."""
    middle = channel - row * STEP
    within = middle + rate * FINE.rows
    inside = (within >= 0) & (within < FINE.channels)
    snr = np.where(np.isin(np.arange(6), panels), level, 0.0)
    snr[inside.mean(axis=1) < 0.5] = np.nan
    return SnippetLine(row, on, score, Fit(middle, rate, width, snr, float(inside.mean())))


def event_at(mhz: float, rate: float = 0.0, level: float = 12.0, cadence: int = 0, width: int = 1) -> Event:
    line = line_in(0, (mhz - 8419.0) / WIDTH_MHZ, rate, level=level, width=width)
    fit = dataclasses.replace(line.fit, panel_snr=np.full(6, level))
    return Event(dataclasses.replace(line, fit=fit), origins(cadence=cadence)[0], 1)


def test_a_line_that_overlapping_snippets_show_is_one_event_of_the_snippet_that_shows_it_best() -> None:
    lines = [line_in(0, 900, 0.9, score=9.0), line_in(1, 900.7, 0.902, score=3.0)]
    for order in (lines, lines[::-1]):
        (event,) = merge_lines(order, origins())
        assert event.line.row == 1 and event.line.score == 3.0 and event.snippets == 2


def test_a_part_of_a_line_does_not_become_an_event_of_its_own() -> None:
    """The first snippet holds only the line's first panels, so its drift is known less well there."""
    whole = line_in(1, 1010, 2.0)
    part = line_in(0, 1010 + 6.0, 2.0 + 6.0 / 35)
    assert np.isfinite(part.fit.panel_snr).sum() == 3
    (event,) = merge_lines([part, whole], origins())
    assert event.line is whole and PARTIAL not in event.flags
    (alone,) = merge_lines([part], origins())
    assert alone.flags == (PARTIAL,)


def test_a_part_of_interference_that_lacks_the_panels_to_show_it_is_no_candidate() -> None:
    whole = line_in(1, 1010, 2.0, panels=range(6))
    part = line_in(0, 1010 + 6.0, 2.0 + 6.0 / 35)
    assert part.can_be_judged and not part.is_interference and whole.is_interference
    findings = _to_findings([part, whole], Observed([], origins()), 6.0)
    assert not findings.events and not findings.controls and len(findings.interference) == 1


def test_lines_that_cross_and_lines_of_other_cadences_stay_apart() -> None:
    crossing = merge_lines([line_in(0, 500, 1.0), line_in(0, 500, -1.0)], origins())
    assert len(crossing) == 2
    two = [*origins(1), *origins(1, cadence=1)]
    again = dataclasses.replace(line_in(0, 500, 1.0), row=1)
    assert [event.origin.cadence for event in merge_lines([line_in(0, 500, 1.0), again], two)] == [0, 1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(200, 2400), st.floats(-2, 2)), max_size=12), st.integers(0, 2**31))
def test_merging_is_the_same_in_any_order_and_keeps_every_line_of_the_sky(
    lines: list[tuple[float, float]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shown = [
        line_in(row, channel + rng.uniform(-0.5, 0.5), rate)
        for channel, rate in lines
        for row in range(4)
        if channel - row * STEP - abs(rate) * 55 >= 0 and channel - row * STEP + abs(rate) * 55 < FINE.channels
    ]
    first = merge_lines(shown, origins())
    second = merge_lines([shown[n] for n in rng.permutation(len(shown))], origins())
    assert {id(event.line) for event in first} == {id(event.line) for event in second}
    for each in shown:
        start = 8419.0 + (each.row * STEP + each.fit.channels(FINE.rows[0, :1] - 0.5)[0]) * WIDTH_MHZ
        assert min(abs(event.start_mhz - start) for event in first) < 8 * WIDTH_MHZ


def test_frequency_is_that_at_the_start_of_the_panel_and_drift_in_hz_per_second() -> None:
    (event,) = merge_lines([line_in(0, 500, -0.5)], origins())
    drift = -0.5 * FINE.channel_width_hz / FINE.bin_length_s
    assert event.drift_rate_hz_s == pytest.approx(drift)
    for panel, start_s in enumerate(FINE.panel_starts_s):
        assert event.panel_mhz(panel) == pytest.approx(event.start_mhz + drift * start_s / 1e6, abs=1e-9)
    middle_s = (FINE.panel_starts_s[5] + 16 * FINE.bin_length_s) / 2
    assert event.start_mhz + drift * middle_s / 1e6 == pytest.approx(8419.0 + 500 * WIDTH_MHZ, abs=1e-9)


def test_the_bandwidth_leaves_out_the_drift_within_a_time_bin_and_is_a_channel_at_least() -> None:
    assert merge_lines([line_in(0, 500, 2.0, width=6)], origins())[0].bandwidth_hz == pytest.approx(4 * 22.3517)
    assert merge_lines([line_in(0, 500, 3.0, width=2)], origins())[0].bandwidth_hz == pytest.approx(22.3517)


@pytest.mark.parametrize(
    ("panels", "level", "expected"),
    [
        (ON_POSITIONS, 12.0, False),
        ((0, 1, 2, 3, 4, 5), 12.0, True),
        ((0, 1, 2, 4), 12.0, True),  # one OFF panel is as bright as the ON panels
        ((0, 1, 2, 3, 4, 5), 3.0, True),  # 3 in each panel is 5.2 in three together
        ((0, 1, 2, 4), 3.9, False),  # noise reaches 3.9 once in thousands
    ],
)
def test_a_line_that_is_in_off_panels_too_is_interference(panels: Sequence[int], level: float, expected: bool) -> None:
    assert line_in(0, 500, 0.3, panels=panels, level=level).is_interference == expected
    others = tuple({0: 1, 1: 0, 2: 3, 3: 2, 4: 5, 5: 4}[panel] for panel in panels)
    assert line_in(0, 500, 0.3, panels=others, level=level, on=False).is_interference == expected


def test_a_needle_a_hundred_times_brighter_than_what_leaks_into_an_off_panel_is_none() -> None:
    line = line_in(0, 500, 0.3, level=600.0)
    line.fit.panel_snr[1] = 6.0
    assert not line.is_interference


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-5, 5), max_size=20).map(np.array), st.lists(st.integers(-5, 5), max_size=20).map(np.array))
def test_false_alarm_rates_are_the_controls_and_1_per_event_with_as_high_a_score(
    scores: np.ndarray, controls: np.ndarray
) -> None:
    scores, controls = scores.astype(float), controls.astype(float)
    found = false_alarm_rates(scores, controls)
    plain = [min(1.0, ((controls >= s).sum() + 1) / (scores >= s).sum()) for s in scores]
    expected = [min(p for p, other in zip(plain, scores, strict=True) if other <= s) for s in scores]
    np.testing.assert_allclose(found, expected)
    order = np.argsort(-scores)
    assert (np.diff(found[order]) >= 0).all() and ((found > 0) & (found <= 1)).all()


def test_a_comb_is_five_lines_at_equal_distances_and_three_are_none() -> None:
    teeth = [event_at(8419.001 + 0.002 * number, rate=0.1) for number in range(6)]
    others = [event_at(8419.0152), event_at(8419.0195), event_at(8419.0201)]
    assert in_comb([*others, *teeth]).tolist() == [False] * 3 + [True] * 6
    assert not in_comb(teeth[:3]).any() and not in_comb([]).any()
    rates = [0.3 * (number % 2) for number in range(6)]
    # Lines at equal distances at the start, but not in the middle, of the cadence.
    start = FINE.rows[0, 0] - 0.5
    tilted = [event_at(8419.003 + 0.002 * n - rate * start * WIDTH_MHZ, rate) for n, rate in enumerate(rates)]
    assert np.ptp(np.diff([event.start_mhz for event in tilted])) < 1e-7
    assert not in_comb(tilted).any()


def test_an_event_among_many_lines_of_interference_is_crowded() -> None:
    crowd = [event_at(8419.002 + 0.0003 * number) for number in range(9)]
    events = [event_at(8419.004), event_at(8419.018), event_at(8419.004, cadence=1)]
    assert is_crowded(events, crowd).tolist() == [True, False, False]
    assert is_crowded([], crowd).tolist() == []


def test_an_event_at_whose_frequency_another_target_has_a_line_is_repeated() -> None:
    """Lines of its own target, in any cadence, and lines more than four channels away do not count."""
    events = [event_at(8419.004, cadence=cadence) for cadence in range(3)]
    sources = ["A", "B", "A"]
    assert is_repeated(events, events, sources).tolist() == [True] * 3
    assert is_repeated(events, [events[0], events[2]], sources).tolist() == [False, True, False]
    for channels, expected in ((3.9, True), (-3.9, True), (4.1, False), (-4.1, False)):
        other = event_at(8419.004 + channels * WIDTH_MHZ, cadence=1)
        assert is_repeated(events[:1], [*events[:1], other], sources).tolist() == [expected]
    assert is_repeated([], events, sources).tolist() == [] and not is_repeated(events, [], sources).any()


def test_an_event_that_a_brighter_line_crosses_in_an_on_panel_is_marked() -> None:
    event, brighter = event_at(8419.01, rate=0.5), event_at(8419.01, rate=-0.5, level=50.0)
    in_off = event_at(8419.01 + 0.7 * FINE.rows[3].mean() * WIDTH_MHZ, rate=-0.2, level=50.0)
    at_the_start = FINE.rows[0].mean()
    meets = event_at(8419.01 + 0.7 * at_the_start * WIDTH_MHZ, rate=-0.2, level=50.0)
    assert is_crossed([event], [meets, event]).tolist() == [True]
    assert is_crossed([event], [event_at(8419.02, rate=-0.5, level=50.0), event]).tolist() == [False]
    assert is_crossed([brighter], [event]).tolist() == [False]
    assert is_crossed([event], [in_off, event]).tolist() == [False]


def test_interference_is_written_by_frequency(tmp_path: Path) -> None:
    write_interference(tmp_path / "i.csv", [event_at(8419.02), event_at(8419.01)], [("A", 57650.0)])
    with (tmp_path / "i.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["frequency_mhz"]) for row in rows] == pytest.approx([8419.01, 8419.02], abs=1e-6)
    assert {row["source"] for row in rows} == {"A"} and float(rows[0]["snr_off"]) == 12


def candidate(**changed: object) -> Candidate:
    values = dict.fromkeys(COLUMNS, 1.5) | {
        "rank": 1,
        "coarse_channel": 3,
        "channel": 70,
        "source": "A, B",
        "flags": "border crossed",
        "snippet": "key",
        "picture": "candidates/1.png",
    }
    return Candidate(**(values | changed))  # type: ignore[arg-type]


def test_the_table_is_read_as_it_was_written_with_empty_cells_for_what_is_not_known(tmp_path: Path) -> None:
    rows = [candidate(), candidate(rank=2, score=1 - 2.0**-53, coarse_channel=None, picture="", snr_d=float("nan"))]
    write_candidates(tmp_path / "c.csv", rows)
    text = (tmp_path / "c.csv").read_text().splitlines()
    assert tuple(text[0].split(",")) == COLUMNS and "nan" not in text[2].lower() and "None" not in text[2]
    found = read_candidates(tmp_path / "c.csv")
    assert found[0] == rows[0]
    assert found[1].score == rows[1].score and found[1].coarse_channel is None and np.isnan(found[1].snr_d)
    (tmp_path / "c.csv").write_text("\n".join([text[0], text[1].replace("1,1.5", "one,1.5", 1)]))
    with pytest.raises(InputError, match=r"c\.csv, line 2: .*one"):
        read_candidates(tmp_path / "c.csv")


def test_the_columns_are_those_that_the_page_and_other_programs_know() -> None:
    assert " ".join(COLUMNS) == (
        "rank score false_alarm_rate frequency_mhz drift_rate_hz_s snr snr_a1 snr_b snr_a2 snr_c snr_a3 snr_d "
        "bandwidth_hz coarse_channel channel source ra dec tstart_mjd flags snippet picture"
    )
    assert OFF_POSITIONS == (1, 3, 5)
