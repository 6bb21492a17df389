"""Everything that needs an NVIDIA GPU, in one command of at most 8 minutes: the tests marked gpu and both benchmarks.

    python benchmarks/gpu_check.py [--out DIR]

Needs torch, DALI, timm, accelerate and tyro, and no network; wandb, setigen and webdataset may be absent. Leaves
gpu-check.json and gpu-check.txt in --out. A part that fails is shown with its last lines and the others still run; the
exit code is 1 then. This file itself has not run on a GPU yet.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree  # of a file that pytest wrote here
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.history import PACKAGES, RESULTS, ROOT, commit, read
from shard_tools.atomic_files import write_whole
from shard_tools.errors import InputError, run_command
from training.system_info import machine, versions

_LAST_LINES = 15
_GPU_MARK = "mark.gpu"
_MAY_BE_ABSENT = ("'setigen'", "KAGGLE_SETI", "second NVIDIA GPU")  # in the reason of a skipped test
_JUNIT, _HISTORY = "gpu-tests.xml", "gpu-history.jsonl"


@dataclass(frozen=True)
class Part:
    """One command, which gets `seconds`: all of them together fit 8 minutes."""

    name: str
    words: tuple[str, ...]
    seconds: int


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    name: str
    passed: bool
    seconds: float
    summary: str
    figures: list[dict[str, Any]] = field(default_factory=list)
    last_lines: list[str] = field(default_factory=list)
    """Of what it printed, where it failed."""


def parts(out: Path) -> list[Part]:
    """The parts, in order of worth: what ends early leaves its time to nobody, what is last may be cut."""
    # Only these files: the others import what a GPU machine may not have.
    tests = sorted(str(path) for path in (ROOT / "tests").glob("test_*.py") if _has_gpu_tests(path))
    words = ("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={out / _JUNIT}", *tests)
    train = ("benchmarks/train_bench.py", "--preset", "full", "--rounds", "3", "--check", "--check-margin", "0.98")
    return [
        Part("tests marked gpu", words, 120),
        # Not --check: the loader's goals are for two CPU cores.
        Part("loader_bench", ("benchmarks/loader_bench.py", "--quick"), 140),
        Part("train_bench", (*train, "--cadences", "3200"), 110),
        Part("train_bench, infer", (*train, "--what", "infer", "--cadences", "3200"), 90),
    ]


def _has_gpu_tests(path: Path) -> bool:
    return _GPU_MARK in path.read_text() and path.name != "test_bench_tools.py"


def run_part(part: Part, history: Path) -> tuple[int | None, list[str], float]:
    """Exit code (None: out of time), lines that it printed, seconds."""
    environment = {**os.environ, "NEEDLESTREAM_HISTORY": str(history), "PYTHONUNBUFFERED": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *part.words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its own processes end with it
    )
    try:
        printed, _ = process.communicate(timeout=part.seconds)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        code = None
    return code, printed.splitlines(), time.perf_counter() - began


def check(part: Part, out: Path) -> Outcome:
    """Run a part and judge it."""
    history = out / _HISTORY
    history.unlink(missing_ok=True)
    code, lines, seconds = run_part(part, history)
    passed, summary = code == 0, "passed"
    if code is None:
        summary = f"not done within {part.seconds} s"
    elif code:
        summary = f"exit code {code}"
    if part.name == "tests marked gpu" and code is not None:
        counted = count_tests(out / _JUNIT)
        summary = ", ".join(f"{count} {name}" for name, count in counted.items())
        # Where every test was skipped, pytest is content, and nothing was shown.
        passed = passed and counted.get("passed", 0) > 0 and not counted.get("skipped")
    figures = [figure for entry in read(history) for figure in entry["figures"]] if history.is_file() else []
    history.unlink(missing_ok=True)
    return Outcome(part.name, passed, round(seconds, 1), summary, figures, [] if passed else lines[-_LAST_LINES:])


def count_tests(path: Path) -> dict[str, int]:
    """Passed, failed and skipped, from pytest's JUnit file; apart, those skipped for what may be absent."""
    if not path.is_file():
        return {"passed": 0}
    cases = list(ElementTree.parse(path).iter("testcase"))  # noqa: S314 (pytest wrote it)
    bad = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    reasons = [skip.get("message", "") for case in cases if (skip := case.find("skipped")) is not None]
    excused = sum(any(word in reason for word in _MAY_BE_ABSENT) for reason in reasons)
    counted = {"passed": len(cases) - bad - len(reasons), "failed": bad, "skipped": len(reasons) - excused}
    return counted | ({"without setigen, real snippets or a second GPU": excused} if excused else {})


def to_text(outcomes: Sequence[Outcome], about: dict[str, Any]) -> str:
    """The table: a line for each part, then its figures, then why it failed."""
    lines = [
        f"{about['machine']['gpu']}, driver {about['machine']['driver']}, {about['time']}, commit {about['commit']}"
    ]
    lines.append(", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    for outcome in outcomes:
        lines += [
            "",
            f"{'ok' if outcome.passed else 'FAILED':<8}{outcome.name:<22}{outcome.seconds:>7.1f} s  {outcome.summary}",
        ]
        for figure in outcome.figures:
            words = {name: f"{value:,.4g}" if isinstance(value, float) else value for name, value in figure.items()}
            lines.append("        " + "  ".join(f"{name} {word}" for name, word in words.items() if word is not None))
        lines += [f"      | {line}" for line in outcome.last_lines]
    return "\n".join(lines) + "\n"


def check_gpu() -> None:
    """Raise InputError on a machine without an NVIDIA GPU that torch can use."""
    import torch  # slow; --help needs none

    if not torch.cuda.is_available():
        raise InputError(
            f"gpu_check: torch {torch.__version__} sees no NVIDIA GPU here; run it on a machine with one, or "
            "`make test` and `make bench` on this one"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every part, write both files, print the table; return the exit code."""
    parser = argparse.ArgumentParser(description="Run all that needs an NVIDIA GPU, within 8 minutes.")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="folder for gpu-check.json and gpu-check.txt")
    out: Path = parser.parse_args(arguments).out.resolve()
    check_gpu()
    out.mkdir(parents=True, exist_ok=True)
    began = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    about: dict[str, Any] = {"time": began, "commit": commit(), "machine": machine(), "versions": versions(PACKAGES)}
    outcomes: list[Outcome] = []
    for part in parts(out):
        outcomes.append(check(part, out))
        # After each part: what is cut off later keeps what there is.
        passed = all(outcome.passed for outcome in outcomes)
        content = {**about, "passed": passed, "parts": [asdict(outcome) for outcome in outcomes]}
        write_whole(out / "gpu-check.json", json.dumps(content, indent=1) + "\n")
        write_whole(out / "gpu-check.txt", to_text(outcomes, about))
    (out / _JUNIT).unlink(missing_ok=True)
    print((out / "gpu-check.txt").read_text(), end="")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
