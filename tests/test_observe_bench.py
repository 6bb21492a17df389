"""The benchmark of an observation, in a small form, measures what it says, and its check can fail."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import observe_bench
from benchmarks.commands import run
from benchmarks.observe_bench import ObserveBenchConfig
from benchmarks.observe_goals import missed_goals
from shard_tools.errors import InputError

GOOD: list[dict[str, Any]] = [
    {"what": "ingest", "seconds": 4.0, "seconds_per_coarse_channel": 0.9, "peak_mb": 900.0},
    {"what": "infer.py --candidates", "seconds": 5.0, "peak_mb": 2000.0},
    {"what": "ours / turboSETI", "share": 0.45},
    {"what": "added needles", "needles": 300, "found": 150, "hz": 3.0, "hz_95": 20.0, "hz_s": 0.002, "hz_s_95": 0.02},
    {"what": "recall by place in the coarse channel", "group": "0 to 0.05", "needles": 20, "found": 9},
    {"what": "recall by place in the coarse channel", "group": "0.4 to 0.6", "needles": 60, "found": 31},
    {"what": "carrier", "found": 1, "hz": 2.0, "hz_95": 2.0, "hz_s": 0.001, "hz_s_95": 0.001},
]


def test_a_small_form_measures_ingest_search_memory_recall_and_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[Any] = []
    monkeypatch.setattr(observe_bench, "record", lambda *entry: recorded.append(entry))
    config = ObserveBenchConfig(
        1, 16384, rounds=1, workers=1, recall_channels=2, needles=4, work_dir=tmp_path, check=True, check_margin=1e-4
    )
    observe_bench.main(config)
    ((name, _, figures),) = recorded
    assert name == "observe" and json.dumps(figures, allow_nan=False)
    of = {figure["what"]: figure for figure in figures}
    assert of["ingest"]["seconds"] > 0 and 20 < of["ingest"]["peak_mb"] < 4000
    assert of["infer.py --candidates"]["peak_mb"] > 100
    assert of["carrier"]["found"] == 1 and of["carrier"]["hz"] < 45 and of["carrier"]["hz_s"] < 0.05
    assert of["added needles"]["needles"] == 4
    places = [figure for figure in figures if figure["what"] == "recall by place in the coarse channel"]
    assert sum(figure["needles"] for figure in places) == 4
    assert "turboSETI FindDoppler" not in of
    assert list(tmp_path.iterdir()) == []


def test_goals_that_are_kept_are_not_missed() -> None:
    assert missed_goals(GOOD, 1.0) == []
    assert len(missed_goals(GOOD, 0.95)) == 0 and len(missed_goals(GOOD, 2.0)) == 2


@pytest.mark.parametrize(
    ("number", "changed", "words"),
    [
        (0, {"seconds_per_coarse_channel": 1.1}, "1.1 s for a coarse channel, expected at most 1"),
        (0, {"peak_mb": 1600.0}, "MB of memory"),
        (2, {"share": 0.6}, "0.6 of turboSETI's time"),
        (3, {"hz_95": 60.0}, "60 Hz off"),
        (3, {"hz_s_95": 0.06}, "0.06 Hz/s off"),
        (6, {"hz": 60.0}, "carrier: 60 Hz off"),
        (6, {"hz_s": 0.06}, "carrier: 0.06 Hz/s off"),
        (4, {"found": 1}, "recall at 0 to 0.05 of a coarse channel: 1 of 20"),
    ],
)
def test_a_goal_that_is_missed_is_named(number: int, changed: dict[str, Any], words: str) -> None:
    figures = [figure | changed if n == number else figure for n, figure in enumerate(GOOD)]
    (missed,) = missed_goals(figures, 1.0)
    assert words in missed


def test_a_search_that_finds_nothing_misses_its_goals() -> None:
    """It has no errors that could be too large, and the same recall everywhere."""
    nothing = [
        {"what": "added needles", "needles": 300, "found": 0},
        {"what": "recall by place in the coarse channel", "group": "0 to 0.05", "needles": 20, "found": 0},
        {"what": "carrier", "found": 0},
    ]
    assert missed_goals(nothing, 1.0) == ["added needles: not found", "carrier: not found"]


def test_a_command_that_fails_is_refused_with_its_words() -> None:
    with pytest.raises(InputError, match=r"exit codes \[3\]: oh no"):
        run([sys.executable, "-c", "import sys; print('oh no'); sys.exit(3)"])


@pytest.mark.parametrize("options", [{"rounds": 0}, {"workers": 0}, {"needles": 0}, {"check_margin": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        ObserveBenchConfig(**options)
