"""Check that torch can use this machine's GPU; otherwise it would silently train on the CPU, for weeks."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from shard_tools.errors import InputError
from training.system_info import output_of

# The oldest driver that runs programs of a CUDA major version.
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
_ON_THE_CPU = "set ACCELERATE_USE_CPU=true to run on the CPU"
_INSTALL = "https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class TorchBuild:
    """How the installed torch was built, and what it found."""

    version: str
    cuda: str | None
    """The CUDA that it was built with; None for a build without."""
    architectures: tuple[str, ...]
    """GPU architectures that it has code for, like sm_90."""
    error: str | None
    """Why it cannot use a GPU; None if it can."""
    capability: tuple[int, int] = (0, 0)
    """Compute capability of the GPU that this process would use."""

    @property
    def cuda_major(self) -> int:
        """13 for CUDA 13.2."""
        return int((self.cuda or "0").split(".")[0])


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU that the system shows, whether or not CUDA works."""

    name: str
    driver: str | None

    def __str__(self) -> str:
        return f"{self.name}, driver {self.driver or 'unknown'}"

    @property
    def driver_major(self) -> int | None:
        """580 for driver 580.65.06."""
        return int(self.driver.split(".")[0]) if self.driver else None


def check_gpu(
    cpu_is_asked: bool,
    build: TorchBuild | None = None,
    driver_folder: Path = Path("/proc/driver/nvidia"),
    device_folder: Path = Path("/dev"),
) -> None:
    """Raise InputError if an NVIDIA GPU is here, torch cannot use it, and nobody asked for the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip()
    if cpu_is_asked or visible in ("", "-1") or torch.version.hip:
        return
    build = build or read_torch_build()
    if build.error is None:
        check_architecture(build)
        return
    gpu = find_gpu(driver_folder, device_folder)
    if gpu is not None:
        raise InputError(f"torch {build.version} cannot use the GPU ({gpu}): {explain(build, gpu)}; or {_ON_THE_CPU}")


def check_architecture(build: TorchBuild) -> None:
    """Raise InputError if torch has no code that the GPU runs."""
    device = 10 * build.capability[0] + build.capability[1]
    kinds = [re.fullmatch(r"(sm|compute)_(\d+)[af]?", name) for name in build.architectures]
    numbers = [(kind[1], int(kind[2])) for kind in kinds if kind]
    # Machine code runs on later GPUs of its generation; PTX, compute_, is compiled for any later one.
    runs = any(number <= device and (kind == "compute" or number // 10 == device // 10) for kind, number in numbers)
    if numbers and not runs:
        raise InputError(
            f"torch {build.version} is built for {', '.join(build.architectures)}, but this GPU is sm_{device}; "
            f"install a torch built for it ({_INSTALL}; older GPUs need one for an older CUDA), or {_ON_THE_CPU}"
        )


def explain(build: TorchBuild, gpu: Gpu) -> str:
    """Why torch can use no GPU, and what to do about it."""
    if build.cuda is None:
        return f"it was built without CUDA; install a torch with CUDA (make install CUDA=13 or CUDA=12; {_INSTALL})"
    needed, driver = _OLDEST_DRIVER.get(build.cuda_major), gpu.driver_major
    if needed is None or driver is None or driver >= needed:
        return (
            f"{build.error}; check `nvidia-smi`, restart the machine if its driver was just updated, or give the "
            "container the GPU (docker run --gpus all)"
        )
    return f"its CUDA {build.cuda} needs driver {needed} or newer; update the driver{_older_cuda(build, driver)}"


def _older_cuda(build: TorchBuild, driver: int) -> str:
    """A second remedy, if the driver is new enough for it."""
    if build.cuda_major <= 12 or driver < _OLDEST_DRIVER[12]:
        return ""
    return (
        f", or install torch and DALI for CUDA 12, which needs driver {_OLDEST_DRIVER[12]} or newer: make install "
        "CUDA=12, or pip install -r requirements-cuda12.txt"
    )


def read_torch_build() -> TorchBuild:
    """What torch says of itself and of the GPU of this rank."""
    flags = getattr(torch._C, "_cuda_getArchFlags", lambda: "")()  # as torch.cuda.get_arch_list, without a GPU too
    build = TorchBuild(torch.__version__, torch.version.cuda, tuple((flags or "").split()), None)
    try:
        torch.cuda.current_device()  # initialises CUDA, or raises why it cannot
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        capability = torch.cuda.get_device_capability(index)
    except (RuntimeError, AssertionError, ZeroDivisionError) as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0] or "no CUDA device"
        return TorchBuild(build.version, build.cuda, build.architectures, reason)
    return TorchBuild(build.version, build.cuda, build.architectures, None, capability)


def find_gpu(driver_folder: Path, device_folder: Path) -> Gpu | None:
    """The first NVIDIA GPU that nvidia-smi, the driver's folder in /proc or a device file shows."""
    lines = (output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or "").splitlines()
    name, comma, driver = lines[0].rpartition(", ") if lines else ("", "", "")
    if comma and re.match(r"\d", driver):
        return Gpu(name, driver)
    if not any(driver_folder.glob("gpus/*")) and not (device_folder / "nvidia0").exists():
        return None
    version = driver_folder / "version"
    found = re.search(r"\b(\d{3}\.[\d.]+)", version.read_text()) if version.is_file() else None
    return Gpu("an NVIDIA GPU", found[1] if found else None)
