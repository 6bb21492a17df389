"""A GPU that torch cannot use stops the start, with advice what to do, unless the CPU was asked for."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import infer
import train
from shard_tools.errors import InputError
from training.drivers import Gpu, TorchBuild, check_architecture, check_gpu, explain, find_gpu, read_torch_build

CUDA_13 = TorchBuild("2.15.0", "13.2", ("sm_75", "sm_80", "sm_90"), "The driver is too old")
VERSION = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n"


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment does not mention GPUs, and there is no nvidia-smi but a test's own."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()


def install_nvidia_smi(tmp_path: Path, script: str) -> None:
    path = tmp_path / "bin" / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def check(tmp_path: Path, build: TorchBuild = CUDA_13, cpu: bool = False) -> None:
    check_gpu(cpu, build, tmp_path / "driver", tmp_path / "dev")


def test_an_old_driver_is_named_with_what_is_needed_and_the_ways_out(tmp_path: Path) -> None:
    install_nvidia_smi(tmp_path, "echo 'NVIDIA A100-SXM4-40GB, 535.129.03'")
    with pytest.raises(InputError) as error:
        check(tmp_path)
    said = str(error.value)
    for part in (
        "A100",
        "driver 535.129.03",
        "CUDA 13.2",
        "driver 580",
        "CUDA 12",
        "driver 525",
        "make install CUDA=12",
        "ACCELERATE_USE_CPU",
    ):
        assert part in said


@pytest.mark.parametrize("shown_by", ["the driver's folder", "a device file", "a driver that answers no more"])
def test_a_gpu_is_found_without_nvidia_smi(tmp_path: Path, shown_by: str) -> None:
    if shown_by == "a device file":
        (tmp_path / "dev").mkdir()
        (tmp_path / "dev" / "nvidia0").touch()
    else:
        (tmp_path / "driver" / "gpus" / "0000:00:04.0").mkdir(parents=True)
        (tmp_path / "driver" / "version").write_text(VERSION)
    if shown_by == "a driver that answers no more":
        install_nvidia_smi(tmp_path, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    gpu = find_gpu(tmp_path / "driver", tmp_path / "dev")
    assert gpu == Gpu("an NVIDIA GPU", None if shown_by == "a device file" else "535.129.03")
    with pytest.raises(InputError, match="ACCELERATE_USE_CPU=true"):
        check(tmp_path)


@pytest.mark.parametrize("asked_by", ["ACCELERATE_USE_CPU", "no device visible", "device -1", "no GPU at all"])
def test_who_asks_for_the_cpu_or_has_no_gpu_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_by: str
) -> None:
    if asked_by != "no GPU at all":
        install_nvidia_smi(tmp_path, "echo 'NVIDIA A100-SXM4-40GB, 535.129.03'")
    if asked_by in ("no device visible", "device -1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "" if asked_by == "no device visible" else "-1")
    there = find_gpu(tmp_path / "driver", tmp_path / "dev")
    assert (there is None) == (asked_by == "no GPU at all")  # a GPU is there but is not asked for, and stops nothing
    check(tmp_path, cpu=asked_by == "ACCELERATE_USE_CPU")


@pytest.mark.parametrize(
    ("cuda", "driver", "parts", "not_said"),
    [
        ("13.2", "470.1", ["driver 580", "update the driver"], "CUDA 12"),
        ("12.6", "470.1", ["driver 525", "update the driver"], "CUDA 12,"),
        ("13.2", "580.65.06", ["no device", "nvidia-smi", "--gpus all"], "update the driver"),
        ("13.2", None, ["no device", "nvidia-smi"], "update the driver"),
        ("14.0", "535.1", ["no device", "nvidia-smi"], "update the driver"),
        (None, "580.65.06", ["without CUDA"], "nvidia-smi"),
    ],
)
def test_the_reason_fits_what_is_installed(
    cuda: str | None, driver: str | None, parts: list[str], not_said: str
) -> None:
    said = explain(TorchBuild("2.15.0", cuda, (), "no device"), Gpu("a GPU", driver))
    assert all(part in said for part in parts) and not_said not in said


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (("sm_75", "sm_80"), (7, 5), True),
        (("sm_75", "sm_80"), (8, 9), True),
        (("sm_75", "sm_80"), (7, 0), False),
        (("sm_75", "sm_80"), (9, 0), False),
        (("sm_80", "compute_80"), (9, 0), True),
        (("sm_86",), (8, 0), False),
        (("sm_90a", "sm_120"), (12, 1), True),
        ((), (7, 0), True),  # a build that does not state its architectures
    ],
)
def test_a_gpu_that_torch_has_no_code_for_is_refused(
    architectures: tuple[str, ...], capability: tuple[int, int], runs: bool
) -> None:
    build = TorchBuild("2.15.0", "13.2", architectures, None, capability)
    if runs:
        check_architecture(build)
    else:
        with pytest.raises(InputError, match=f"this GPU is sm_{capability[0]}{capability[1]}"):
            check_gpu(False, build)


def test_what_torch_says_of_itself_is_read_on_any_machine() -> None:
    build = read_torch_build()
    assert build.version == torch.__version__ and build.cuda == torch.version.cuda
    assert (build.error is None) == torch.cuda.is_available()
    assert bool(build.architectures) == (torch.version.cuda is not None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU of this machine")
@pytest.mark.parametrize("script", [train, infer], ids=lambda script: script.__name__)
def test_a_start_stops_before_it_reads_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: ModuleType
) -> None:
    install_nvidia_smi(tmp_path, "echo 'NVIDIA A100-SXM4-40GB, 450.1'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    out = ["--run-dir", "run"] if script is train else ["--weights", "none.safetensors"]
    monkeypatch.setattr(sys, "argv", ["script", "--shards", "nowhere", *out])
    with pytest.raises(InputError, match=r"A100.*ACCELERATE_USE_CPU=true"):
        script.main()
    assert {path.name for path in tmp_path.iterdir()} == {"bin"}
