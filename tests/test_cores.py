"""The program uses as many cores as its process may have, not as many as the machine shows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shard_tools.system.cores import usable_cores
from tests.conftest import ROOT, source_files

NO_LIMIT = Path("/nonexistent")
DEFAULTS = """
from pipeline.loader import LoaderConfig
from shard_tools.fingerprint import FingerprintConfig
from shard_tools.pack import PackConfig
from shard_tools.simulate import SimulateConfig
print(*(config.workers for config in (FingerprintConfig, PackConfig, SimulateConfig)), LoaderConfig().loader_threads)
"""
one_core = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a system that can bind processes")


def run(script: str, **environment: str) -> list[str]:
    """What a new Python process prints that may use only one core."""
    bound = f"import os; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", bound], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert not done.returncode, done.stderr
    return done.stdout.split()


@one_core
def test_every_default_of_workers_and_threads_is_what_the_process_may_use() -> None:
    assert run(DEFAULTS) == ["1", "1", "1", "1"]


@one_core
def test_nothing_else_counts_the_cores_of_the_machine() -> None:
    files = source_files()
    counting = [path.name for path in files if "cpu_count" in path.read_text() and path.name != "cores.py"]
    assert not counting


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/job", {"job/cpu.max": "150000 100000\n"}, 2),
        ("0::/job/step", {"job/cpu.max": "100000 100000\n", "job/step/cpu.max": "max 100000\n"}, 1),
        ("0::/as/the/host/names/it", {"cpu.max": "100000 100000\n"}, 1),
        ("4:cpu,cpuacct:/job", {"cpu/job/cpu.cfs_quota_us": "50000\n", "cpu/job/cpu.cfs_period_us": "100000\n"}, 1),
        ("4:cpu:/job", {"cpu/job/cpu.cfs_quota_us": "-1\n", "cpu/job/cpu.cfs_period_us": "100000\n"}, None),
        ("7:memory:/job", {"job/cpu.max": "100000 100000\n"}, None),
        ("0::/", {"cpu.max": "max 100000\n"}, None),
        ("0::/", {"cpu.max": ""}, None),
    ],
)
def test_a_container_is_believed(tmp_path: Path, group: str, files: dict[str, str], expected: int | None) -> None:
    (tmp_path / "cgroup").write_text(f"{group}\n")
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    everything = usable_cores(NO_LIMIT, NO_LIMIT)
    assert usable_cores(tmp_path / "cgroup", tmp_path / "mount") == min(everything, expected or everything)


@pytest.mark.parametrize(("ranks", "expected"), [("1", 8), ("2", 4), ("3", 2), ("16", 1), ("", 8), ("many", 8)])
def test_the_ranks_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch, ranks: str, expected: int) -> None:
    from shard_tools.system import cores

    monkeypatch.setattr(cores, "usable_cores", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert cores.rank_cores() == expected


@pytest.mark.parametrize(("script", "asked", "spins"), [("train", "", 0), ("infer", "", 0), ("train", "ACTIVE", 1)])
def test_threads_sleep_while_they_wait_unless_the_user_said_otherwise(script: str, asked: str, spins: int) -> None:
    """Checked by OpenMP's own report of how often its threads spin."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | ({"OMP_WAIT_POLICY": asked} if asked else {})
    done = subprocess.run(
        [sys.executable, "-c", f"import {script}"], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    told = {line.strip() for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line}
    assert not done.returncode and told, done.stderr[-2000:]
    assert (told == {"GOMP_SPINCOUNT = '0'"}) == (spins == 0)
