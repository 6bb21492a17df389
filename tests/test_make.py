"""`make` and its targets, as a user types them."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import write_tiny_data

ROOT = Path(__file__).resolve().parents[1]
# The demonstration's model on snippets of (6, 14, 56).
TINY = (
    "--epochs 1 --batch-size 8 --sum-time-bins 2 --height 28 --width 56 --compress none --subtract none "
    "--tracker none --precision float32"
)


def make(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", f"PYTHON={sys.executable}", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "COLUMNS": "80"},
    )


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("make")
    write_tiny_data(folder / "data", 50, 11)
    return [f"DATA={folder / 'data'}", f"SHARDS={folder / 'shards'}", f"RUN={folder / 'run'}", "PRESET=demo"]


def test_each_step_does_only_what_is_not_done_yet(places: list[str]) -> None:
    run = Path(places[2].removeprefix("RUN="))
    packed = make("shards", *places)
    assert packed.returncode == 0, packed.stderr
    assert "shard_tools pack" in packed.stdout and "ROC AUC of trivial statistics" in packed.stdout
    trained = make("train", *places, f"ARGS={TINY}")
    assert trained.returncode == 0, trained.stderr
    assert "shard_tools pack" not in trained.stdout and "train.py" in trained.stdout
    assert "validation ROC AUC" in trained.stdout and "trivial statistics" in trained.stdout
    predicted = make("infer", *places)
    assert predicted.returncode == 0, predicted.stderr
    assert "train.py" not in predicted.stdout and "infer.py" in predicted.stdout
    for word in ("submission.csv", "candidates.png", "best.safetensors", "ROC AUC", "report.html"):
        assert word in predicted.stdout
    with (run / "submission.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 11
    before = (run / "submission.csv").stat().st_mtime_ns
    again = make("infer", *places)
    assert again.returncode == 0 and ".py" not in again.stdout
    assert (run / "submission.csv").stat().st_mtime_ns == before


def test_a_failed_step_stops_the_rest_with_its_own_words(tmp_path: Path) -> None:
    done = make("infer", f"DATA={tmp_path / 'nothing'}", f"SHARDS={tmp_path / 's'}", f"RUN={tmp_path / 'r'}")
    assert done.returncode != 0
    assert "no such folder" in done.stderr and "Traceback" not in done.stderr
    assert "train.py" not in done.stdout


def test_observe_goes_from_six_files_to_a_page_and_says_which_needles_it_found(tmp_path: Path) -> None:
    simulate = "OBSERVE_SIMULATE=--coarse-channels 2 --nfpc 32768 --needles 2 --interference 1 --snr-min 200 --seed 3"
    words = ("observe", f"OBSERVED={tmp_path / 'observed'}", simulate + " --snr-max 300")
    done = make(*words)
    assert done.returncode == 0, done.stderr
    for word in ("simulate-observation", "shard_tools ingest", "infer.py", "carrier", "rank", "needles found: 5 of 5"):
        assert word in done.stdout, word
    for name in ("candidates.csv", "candidates.report.html", "interference.csv", "candidates/1.png"):
        assert (tmp_path / "observed" / name).is_file()
    again = make(*words)
    assert again.returncode == 0 and "infer.py" not in again.stdout and "needles found: 5 of 5" in again.stdout


def test_observe_deletes_no_files_of_the_user(tmp_path: Path) -> None:
    for name in ("A1.h5", "notes.txt"):
        path = tmp_path / "files" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    done = make("observe", f"OBSERVED={tmp_path}")
    assert done.returncode != 0 and "holds files; choose another --out" in done.stderr
    assert {path.name: path.read_text() for path in (tmp_path / "files").iterdir()} == {
        "A1.h5": "mine",
        "notes.txt": "mine",
    }


@pytest.mark.parametrize("name", ["DATA", "SHARDS", "RUN", "OBSERVED"])
def test_paths_with_spaces_are_refused_before_anything_is_done(tmp_path: Path, name: str) -> None:
    done = make("observe" if name == "OBSERVED" else "shards", f"{name}={tmp_path}/with spaces")
    assert done.returncode != 0 and "make cannot take paths with spaces" in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_names_every_target_and_fits_a_terminal() -> None:
    done = make("help")
    for word in (
        "make shards",
        "make train",
        "make infer",
        "make observe",
        "make test",
        "DATA=",
        "SHARDS=",
        "RUN=",
        "ARGS=",
        "PYTHON=",
    ):
        assert word in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    "script",
    [
        "train.py",
        "infer.py",
        *(f"shard_tools {name}" for name in ("simulate", "simulate-observation", "pack", "ingest", "inject")),
    ],
)
def test_every_option_is_explained_with_its_default(script: str) -> None:
    words = ["-m", *script.split()] if script.startswith("shard_tools") else [script]
    done = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    options: list[str] = []
    for line in done.stdout.splitlines():
        if line.startswith("│ --"):
            options.append(line)
        elif options and line.startswith("│"):
            options[-1] += line
    assert len(options) > 5
    for option in options:
        text = " ".join(option.replace("│", " ").split())
        assert ("(default: " in text or "(required)" in text) and len(text.split()) > 6, text
