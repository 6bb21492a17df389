"""The tests marked gpu: ask pytest which there are, and judge by its report how they ended."""

import importlib.util
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree  # of a file that pytest wrote
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.history import ROOT
from shard_tools.system.cores import usable_cores

COLLECTING_SECONDS = 40
_PYTEST = ("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider")
_PROCESSES = 5  # of pytest-xdist: as many as there are files with such tests
# Packages of requirements-dev.txt, stores and trackers that no test marked gpu needs (tests/test_bench_tools.py).
NOT_NEEDED = (
    "setigen", "webdataset", "wandb", "tensorboard", "onnx", "onnxruntime", "nbclient", "nbformat", "moto", "boto3",
    "flask", "psutil", "aiohttp", "s3fs",
)  # fmt: skip
_EXCUSES = ("'setigen'", "KAGGLE_SETI", "second NVIDIA GPU")  # in the reason of a skipped test
_NODE = re.compile(r"^(\S+\.py)::")
_BROKEN = re.compile(r"^_+ ERROR collecting (\S+) _+$")
_REASON = re.compile(r"^E\s+(\w.*)$")
_ABSENT = re.compile(r"'([\w.]+)'|import of ([\w.]+) halted")


@dataclass(frozen=True)
class GpuTests:
    """What pytest collected."""

    counts: dict[str, int] = field(default_factory=dict)
    """Tests marked gpu, by file."""
    broken: dict[str, str] = field(default_factory=dict)
    """Why a file could not be imported, by file: whether it has such tests is not known."""

    @property
    def unexpected(self) -> dict[str, str]:
        """`broken`, except files that only lack a package that no test marked gpu needs."""
        return {path: reason for path, reason in self.broken.items() if _absent(reason) not in NOT_NEEDED}

    def words(self, junit: Path) -> tuple[str, ...]:
        """The command that runs them and writes `junit`: a file's tests in one process, files side by side."""
        processes = min(_PROCESSES, usable_cores())
        side_by_side = processes > 1 and importlib.util.find_spec("xdist") is not None
        spread = ("-n", str(processes), "--dist", "loadfile") if side_by_side else ()
        # If no file was found, run all of them, so that pytest shows what is wrong.
        return (*_PYTEST, "-q", *spread, f"--junitxml={junit}", *(sorted(self.counts) or ["tests"]))


def collect_gpu_tests() -> GpuTests:
    """Ask pytest, in a process of its own; it imports every test file, and goes on if one cannot be imported."""
    words = [sys.executable, *_PYTEST, "-o", "addopts=-q", "--collect-only", "--continue-on-collection-errors", "tests"]
    # Wide enough for the whole of a file's name in a heading.
    environment = {**os.environ, "COLUMNS": "400"}
    try:
        done = subprocess.run(
            words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=COLLECTING_SECONDS
        )
    except subprocess.TimeoutExpired:
        return GpuTests(broken={"tests": f"not collected within {COLLECTING_SECONDS} s"})
    return read_collection(done.stdout)


def read_collection(printed: str) -> GpuTests:
    """From what `pytest --collect-only -q` printed: a line for each test, heading and traceback for each bad file."""
    counts: dict[str, int] = {}
    broken: dict[str, str] = {}
    heading = ""
    for line in printed.splitlines():
        if node := _NODE.match(line):
            counts[node[1]] = counts.get(node[1], 0) + 1
        elif found := _BROKEN.match(line):
            heading = found[1]
            broken[heading] = "cannot be imported"
        elif heading and (reason := _REASON.match(line)):
            broken[heading] = reason[1]
    return GpuTests(counts, broken)


def _absent(reason: str) -> str:
    """The package that a ModuleNotFoundError names, or nothing."""
    found = _ABSENT.search(reason) if reason.startswith("ModuleNotFoundError") else None
    return (found[1] or found[2]).partition(".")[0] if found else ""


def count_outcomes(junit: Path) -> dict[str, int]:
    """Counts of passed, failed and skipped tests in pytest's JUnit file, and of skips for what a machine may lack."""
    if not junit.is_file():
        return {"passed": 0}
    cases = list(ElementTree.parse(junit).iter("testcase"))  # noqa: S314 (pytest wrote it)
    bad = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    reasons = [skip.get("message", "") for case in cases if (skip := case.find("skipped")) is not None]
    excused = sum(any(word in reason for word in _EXCUSES) for reason in reasons)
    counted = {"passed": len(cases) - bad - len(reasons), "failed": bad, "skipped": len(reasons) - excused}
    return counted | ({"without setigen, real snippets or a second GPU": excused} if excused else {})


def judge(tests: GpuTests, junit: Path) -> tuple[bool, str]:
    """Whether every collected test ran and passed, and a summary in words."""
    counted = count_outcomes(junit)
    summary = ", ".join(f"{count} {name}" for name, count in counted.items())
    collected = sum(tests.counts.values())
    if sum(counted.values()) != collected:
        summary += f"; {collected} were collected"
    for path, reason in tests.unexpected.items():
        summary += f"; {path}: {reason}"
    excused = sorted({_absent(reason) for path, reason in tests.broken.items() if path not in tests.unexpected})
    if excused:
        summary += f" (files that need {', '.join(excused)} were left out; none has a test marked gpu)"
    # If every test was skipped, pytest reports success, but nothing was tested.
    passed = counted["passed"] > 0 and not counted.get("skipped") and not counted.get("failed")
    return passed and sum(counted.values()) == collected and not tests.unexpected, summary
