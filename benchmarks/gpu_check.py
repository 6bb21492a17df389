"""Everything that needs an NVIDIA GPU, in one command of at most 8 minutes: the tests marked gpu and both benchmarks.

    python benchmarks/gpu_check.py [--out DIR] [--parts tests loader train infer]

Needs torch, DALI, timm, accelerate, tyro, pytest and hypothesis, and no network; with pytest-xdist the tests run in
several processes. Each part's outcome is printed when it ends, and gpu-check.json and gpu-check.txt in --out hold them
all. If a part fails, the last lines that it printed are shown, the others still run, and the exit code is 1.

The tests and the training of train_bench have run to their end on an NVIDIA H200, the prediction of train_bench on an
H100. loader_bench has run to its end on neither, so its time limit is an estimate.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_tests import GpuTests, collect_gpu_tests, judge
from benchmarks.history import PACKAGES, RESULTS, ROOT, commit, read
from shard_tools.atomic_files import write_whole
from shard_tools.errors import InputError
from shard_tools.system.command import run_command
from training.system_info import describe_machine, versions

_LAST_LINES = 15
_REQUIREMENTS = ROOT / "requirements.txt"
PARTS = ("tests", "loader", "train", "infer")
_JUNIT, _HISTORY = "gpu-tests.xml", "gpu-history.jsonl"


@dataclass(frozen=True)
class Part:
    """One command and the seconds that it may take."""

    name: str
    words: tuple[str, ...]
    seconds: int
    tests: GpuTests | None = None
    """The tests to run, if this part runs pytest."""


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    name: str
    passed: bool
    seconds: float
    summary: str
    figures: list[dict[str, Any]] = field(default_factory=list)
    last_lines: list[str] = field(default_factory=list)
    """The last lines that it printed, if it failed."""


def parts(out: Path, wanted: Sequence[str] = PARTS) -> list[Part]:
    """The parts, the most useful first, in case the machine is taken away early."""
    train = ("benchmarks/train_bench.py", "--preset", "full", "--rounds", "3", "--check", "--check-margin", "0.98")
    # Not --check: the loader's goals are for two CPU cores.
    loader = ("benchmarks/loader_bench.py", "--quick", "--peers", "torch-workers", "dali")
    found = {
        "loader": Part("loader_bench", loader, 115),
        "train": Part("train_bench", (*train, "--cadences", "3200"), 90),
        "infer": Part("train_bench, infer", (*train, "--what", "infer", "--cadences", "1600"), 115),
    }
    if "tests" in wanted:
        tests = collect_gpu_tests()
        found = {"tests": Part("tests marked gpu", tests.words(out / _JUNIT), 100, tests)} | found
    return [part for name, part in found.items() if name in wanted]


def pinned_versions() -> dict[str, str]:
    """The versions in requirements.txt; DALI's package is named without the CUDA version at its end."""
    pinned = re.findall(r"^([\w-]+?)(?:-cuda\d+)?==([\w.]+)", _REQUIREMENTS.read_text(), re.MULTILINE)
    return dict(pinned)


def not_as_pinned(found: Mapping[str, str]) -> list[str]:
    """What differs from requirements.txt: "timm 1.0.29 (pinned: 1.0.31)", "no wandb (pinned: 0.31.0)"."""
    differing = []
    for name, pinned in pinned_versions().items():
        version = found.get(name)
        # torch's version ends in the CUDA that it was built for.
        if version is None or version.partition("+")[0] != pinned:
            differing.append(f"{f'{name} {version}' if version else f'no {name}'} (pinned: {pinned})")
    return differing


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
    passed, summary = code == 0, "passed" if code == 0 else f"exit code {code}"
    if code is None:
        summary = f"not done within {part.seconds} s"
    elif part.tests:
        all_passed, summary = judge(part.tests, out / _JUNIT)
        passed = passed and all_passed
    figures = [figure for entry in read(history) for figure in entry["figures"]] if history.is_file() else []
    history.unlink(missing_ok=True)
    return Outcome(part.name, passed, round(seconds, 1), summary, figures, [] if passed else lines[-_LAST_LINES:])


def header(about: Mapping[str, Any]) -> str:
    """Machine, time, commit, versions, and which versions are not the pinned ones."""
    machine = about["machine"]
    lines = [f"{machine['gpu']}, driver {machine['driver']}, {about['time']}, commit {about['commit']}"]
    lines.append(", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    if about["not_as_pinned"]:
        lines.append(f"not as requirements.txt pins them: {', '.join(about['not_as_pinned'])}")
    return "\n".join(lines) + "\n"


def to_text(outcome: Outcome) -> str:
    """A line for a part, then its figures, then why it failed."""
    verdict = "ok" if outcome.passed else "FAILED"
    lines = ["", f"{verdict:<8}{outcome.name:<22}{outcome.seconds:>7.1f} s  {outcome.summary}"]
    for figure in outcome.figures:
        words = {name: f"{value:,.4g}" if isinstance(value, float) else value for name, value in figure.items()}
        lines.append("        " + "  ".join(f"{name} {word}" for name, word in words.items() if word is not None))
    lines += [f"      | {line}" for line in outcome.last_lines]
    return "\n".join(lines) + "\n"


def check_gpu() -> None:
    """Raise InputError on a machine without an NVIDIA GPU that torch can use."""
    import torch  # slow to import, and --help does not need it

    if not torch.cuda.is_available():
        raise InputError(
            f"gpu_check: torch {torch.__version__} sees no NVIDIA GPU here; run it on a machine with one, or "
            "`make test` and `make bench` on this one"
        )


def describe_check() -> dict[str, Any]:
    """The machine, commit and versions that the outcomes depend on."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "commit": commit(),
        "machine": describe_machine(),
        "versions": versions(PACKAGES),
        "not_as_pinned": not_as_pinned(versions(list(pinned_versions()))),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every part; print and write each outcome as soon as it is known; return the exit code."""
    parser = argparse.ArgumentParser(description="Run all that needs an NVIDIA GPU, within 8 minutes.")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="folder for gpu-check.json and gpu-check.txt")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which to run; all unless given")
    given = parser.parse_args(arguments)
    out: Path = given.out.resolve()
    check_gpu()
    out.mkdir(parents=True, exist_ok=True)
    about = describe_check()
    outcomes: list[Outcome] = []
    text = header(about)
    print(text, end="", flush=True)
    for part in parts(out, given.parts):
        outcomes.append(check(part, out))
        found = to_text(outcomes[-1])
        print(found, end="", flush=True)
        text += found
        passed = all(outcome.passed for outcome in outcomes)
        content = {**about, "passed": passed, "parts": [asdict(outcome) for outcome in outcomes]}
        # Written after each part, so that its outcome is kept if a later part is cut off.
        write_whole(out / "gpu-check.json", json.dumps(content, indent=1) + "\n")
        write_whole(out / "gpu-check.txt", text)
    (out / _JUNIT).unlink(missing_ok=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
