"""`make` installs the torch and DALI that the driver can run, and says which and why."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT

PLAIN, CUDA12, CPU = "requirements.txt", "requirements-cuda12.txt", "requirements-cpu.txt"
OPEN_MODULE = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.129.03  Release Build  (dvs-builder)\n"
CLOSED_MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:17:40 UTC 2025\n"


@dataclass
class Checkout:
    """The Makefile and requirements, with an interpreter in .venv that only notes what pip is asked for."""

    root: Path

    def script(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)

    def make(self, *words: str, **variables: str) -> tuple[list[str], str]:
        """What pip was asked for, and all that make printed; `variables` are set in the environment."""
        calls = self.root / "calls.txt"
        calls.unlink(missing_ok=True)
        done = subprocess.run(
            ["make", f"DRIVER_FILE={self.root / 'driver'}", *words], cwd=self.root, capture_output=True, text=True,
            env={"PATH": f"{self.root / 'bin'}:{os.environ['PATH']}", "HOME": str(self.root), **variables},
            timeout=60,
        )  # fmt: skip
        asked = calls.read_text().splitlines() if calls.is_file() else []
        return asked, f"{done.stdout}{done.stderr}"


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    for path in [ROOT / "Makefile", *ROOT.glob("requirements*.txt")]:
        shutil.copy(path, tmp_path)
    made = Checkout(tmp_path)
    made.script(".venv/bin/python", f'echo "$@" >> {tmp_path}/calls.txt')
    made.script("bin/nvidia-smi", "exit 9")
    return made


def installed_from(call: str) -> list[str]:
    return re.findall(r"-r (\S+)", call)


@pytest.mark.parametrize(
    ("answer", "chosen", "why"),
    [
        ("echo 580.65.06", PLAIN, "driver 580 is 580 or newer"),
        ("echo 610.11; echo 610.11", PLAIN, "driver 610"),
        ("echo 535.129.03", CUDA12, "driver 535 is older than 580"),
        ("echo 525.60.13", CUDA12, "driver 525"),
        ("echo 470.256.02", PLAIN, "older than 525, too old for any"),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the driver'; exit 9", PLAIN, "no NVIDIA"),
    ],
)
def test_what_the_driver_runs_is_installed_and_the_reason_said(
    checkout: Checkout, answer: str, chosen: str, why: str
) -> None:
    checkout.script("bin/nvidia-smi", answer)
    (call,), said = checkout.make("install")
    assert installed_from(call)[0] == chosen
    assert f"of {chosen} (" in said and why in said


@pytest.mark.parametrize(("text", "chosen"), [(OPEN_MODULE, CUDA12), (CLOSED_MODULE, PLAIN)])
def test_the_driver_is_found_where_nvidia_smi_is_of_no_use(checkout: Checkout, text: str, chosen: str) -> None:
    checkout.script("bin/nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    (checkout.root / "driver").write_text(text)
    (call,), _ = checkout.make("install")
    assert installed_from(call)[0] == chosen


def test_a_choice_is_kept_until_another_is_asked_for(checkout: Checkout) -> None:
    (call,), said = checkout.make("install", "CUDA=12")
    assert installed_from(call)[0] == CUDA12 and "as asked for" in said
    for words in ((), ("CUDA=12",)):
        assert checkout.make("install", *words)[0] == []
    (call,), _ = checkout.make(".venv/installed-dev")
    assert installed_from(call)[0] == CUDA12
    for _ in range(2):
        calls, _ = checkout.make("install", "CUDA=13")
    assert calls == []
    assert (checkout.root / ".venv" / "installed").read_text().strip() == PLAIN


def test_an_environment_of_before_stays_as_it_was(checkout: Checkout) -> None:
    checkout.script("bin/nvidia-smi", "echo 535.129.03")
    (checkout.root / ".venv" / "installed").touch()
    (call,), said = checkout.make("install")
    assert installed_from(call)[0] == PLAIN and "as .venv has them" in said


@pytest.mark.parametrize("target", [".venv/installed-dev", ".venv/installed-bench"])
def test_what_tests_and_benchmarks_need_is_installed_beside_the_same_torch(checkout: Checkout, target: str) -> None:
    calls, _ = checkout.make(target, "CUDA=12")
    assert installed_from(calls[0]) == [CUDA12, ".venv/further.txt"]
    further = (checkout.root / ".venv" / "further.txt").read_text()
    assert "pytest==" in further and ("litdata==" in further) == target.endswith("bench") and "\n-r " not in further


def test_where_pip_offers_no_cpu_builds_the_way_out_is_said_and_nothing_is_chosen(checkout: Checkout) -> None:
    checkout.make("install", "CUDA=12")
    checkout.script(".venv/bin/python", "exit 1")
    _, said = checkout.make("install", "CUDA=cpu")
    assert "error: pip offers no torch without CUDA here" in said and "PIP_EXTRA_INDEX_URL" in said
    checkout.script(".venv/bin/python", f'echo "$@" >> {checkout.root}/calls.txt')
    (call,), _ = checkout.make("install")
    assert installed_from(call)[0] == CUDA12


def test_another_failure_of_pip_is_not_laid_on_cpu_builds(checkout: Checkout) -> None:
    checkout.script(".venv/bin/python", "exit 1")
    _, said = checkout.make("install", "CUDA=12")
    assert "Error 1" in said
    assert "PIP_EXTRA_INDEX_URL" not in said and not (checkout.root / ".venv" / "installed").exists()


def test_a_cuda_that_there_is_no_file_for_is_refused(checkout: Checkout) -> None:
    calls, said = checkout.make("install", "CUDA=11")
    assert calls == [] and "CUDA=11: expected 13, 12 or cpu" in said


def test_variables_of_the_environment_choose_nothing(checkout: Checkout) -> None:
    (call,), said = checkout.make("install", CUDA="/usr/local/cuda", file=CPU, driver="535")
    assert installed_from(call)[0] == PLAIN and "no NVIDIA driver found" in said


def pins(name: str) -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


@pytest.mark.parametrize("name", [CUDA12, CPU])
def test_the_other_requirements_differ_in_torch_torchvision_and_dali_alone(name: str) -> None:
    def others(found: dict[str, str]) -> dict[str, str]:
        return {key: value for key, value in found.items() if key not in ("torch", "torchvision") and "dali" not in key}

    assert others(pins(name)) == others(pins(PLAIN)) and len(others(pins(name))) > 15
    assert pins(name)["torch"] != pins(PLAIN)["torch"]
    dali = [key for key in pins(name) if "dali" in key]
    assert dali == (["nvidia-dali-cuda120"] if name == CUDA12 else [])
