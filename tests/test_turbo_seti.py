"""The real turboSETI reads what is written for it, and its hits are read here.

It is installed once into its own environment (requirements-turboseti.txt), in the folder for temporary files.
"""

import csv
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from shard_tools.errors import InputError
from shard_tools.manifest import read_manifest
from shard_tools.observation.candidates_table import read_candidates
from shard_tools.observation.ingest import ingest
from shard_tools.observation.ingest_config import IngestConfig
from tests.conftest import ROOT
from tests.observation_files import NAMES
from tests.test_observation_candidates import INTERFERENCE, VOYAGER, candidates_of, nearest, write_files

REQUIREMENTS = ROOT / "requirements-turboseti.txt"
EVENTS = """
import sys
import matplotlib
matplotlib.use("Agg")
from turbo_seti.find_event.find_event_pipeline import find_event_pipeline
from turbo_seti.find_event.plot_event_pipeline import plot_event_pipeline

folder = sys.argv[1]
for kind in ("dat", "h5"):
    with open(f"{folder}/{kind}.lst", "w") as file:
        file.writelines(f"{folder}/{name}.{kind}\\n" for name in sys.argv[2:])
find_event_pipeline(f"{folder}/dat.lst", filter_threshold=3, number_in_cadence=6, csv_name=f"{folder}/found.csv")
plot_event_pipeline(f"{folder}/events.csv", f"{folder}/h5.lst", filter_spec="f3", plot_dir=f"{folder}/")
"""
SEARCH = """
import sys
from turbo_seti.find_doppler.find_doppler import FindDoppler

FindDoppler(sys.argv[1], max_drift=4, snr=10, out_dir=sys.argv[2], n_coarse_chan=4).search()
"""


@pytest.fixture(scope="module")
def python() -> Path:
    """An interpreter that has turboSETI; the tests are skipped if it cannot be installed."""
    made_for = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir(), f"needlestream-turboseti-{made_for}")
    found, complete = folder / "bin" / "python", folder / "installed"
    if not complete.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [found, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", REQUIREMENTS]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"turboSETI could not be installed: {done.stderr.strip().splitlines()[-1]}")
        complete.touch()
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with candidates.csv, the telescope files, and turbo_seti/ with what is written for turboSETI."""
    folder = tmp_path_factory.mktemp("turbo_seti")
    files = write_files(folder / "files", [*VOYAGER, *INTERFERENCE])
    manifest = ingest(IngestConfig(folder / "shards", tuple(files), workers=1))
    candidates_of(manifest, folder / "candidates.csv", turbo_seti=folder / "turbo_seti")
    for path in files:
        (folder / "turbo_seti" / path.name).symlink_to(path)
    return folder


def run(python: Path, script: str, *arguments: object) -> None:
    # turboSETI must not see our packages, which are built for another NumPy.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", script, *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_find_event_and_plot_event_take_the_files_and_find_the_candidates(python: Path, written: Path) -> None:
    folder = written / "turbo_seti"
    run(python, EVENTS, folder, *NAMES)
    found, ours = rows_of(folder / "found.csv"), rows_of(folder / "events.csv")
    expected = sorted(round(each.frequency_mhz, 6) for each in read_candidates(written / "candidates.csv"))
    assert len(expected) == 3
    assert sorted(float(row["Freq"]) for row in found if row["status"] == "on_table_1") == expected
    # turboSETI lists a row for each ON file, unless hits of an event have the same number in two files.
    assert len(ours) == 9 and {row["status"] for row in ours} == {"on_table_1", "on_table_2", "on_table_3"}
    assert list(found[0]) == list(ours[0])[: len(found[0])]
    mine = {(row["status"], row["TopHitNum"]): row for row in ours}
    for row in found:
        same = mine[row["status"], row["TopHitNum"]]
        for name in ("DriftRate", "SNR", "Freq", "ChanIndx", "CoarseChanNum", "DELTAT", "DELTAF", "delta_t", "MJD"):
            assert float(row[name]) == pytest.approx(float(same[name]), abs=1e-5), name
        assert (row["FileID"], row["Source"], row["RA"]) == (same["FileID"], same["Source"], same["RA"])
    assert len(list(folder.glob("*.png"))) == 9


@pytest.fixture(scope="module")
def theirs(python: Path, written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the A1.dat that turboSETI itself writes."""
    folder = tmp_path_factory.mktemp("theirs")
    run(python, SEARCH, written / "files" / "A1.h5", folder)
    return folder


def test_its_own_hits_are_where_ours_are_and_get_our_scores(written: Path, theirs: Path, tmp_path: Path) -> None:
    found = read_candidates(written / "candidates.csv")
    manifest = read_manifest(str(written / "shards"))
    candidates_of(manifest, tmp_path / "candidates.csv", hits=theirs / "A1.dat")
    carrier = nearest(found, VOYAGER[0])
    (hit,) = (row for row in rows_of(tmp_path / "hits.csv") if row["rank"] == str(carrier.rank))
    assert hit["found"] == "candidate" and float(hit["score"]) == carrier.score
    assert abs(float(hit["Freq"]) - carrier.frequency_mhz) < 2e-5
    assert abs(float(hit["DriftRate"]) - carrier.drift_rate_hz_s) < 0.02
    assert {row["found"] for row in rows_of(tmp_path / "hits.csv")} <= {"candidate", "interference"}


def test_its_own_hits_are_never_replaced(written: Path, theirs: Path, tmp_path: Path) -> None:
    before = (theirs / "A1.dat").read_bytes()
    with pytest.raises(InputError, match=r"A1\.dat would be replaced"):
        candidates_of(read_manifest(str(written / "shards")), tmp_path / "candidates.csv", turbo_seti=theirs)
    assert (theirs / "A1.dat").read_bytes() == before and not (tmp_path / "candidates.csv").exists()
