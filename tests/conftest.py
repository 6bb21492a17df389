"""Shared fixtures: small data folders in the Kaggle layout, and the real one."""

import csv
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from shard_tools.__main__ import main
from shard_tools.manifest import Manifest
from shard_tools.pack import PackConfig, pack
from shard_tools.sources import SOURCES
from shard_tools.system.command import run_command

ROOT = Path(__file__).resolve().parents[1]
# The packages of the program: every folder of the checkout that is a package, except tests.
ROOMS = tuple(sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"))
SMALL_SHAPE = (6, 14, 16)
# The smallest shards are 1 MB: five cadences of this shape fit into one.
SHARDED_SHAPE = (6, 64, 256)
INFINITY = b"\x00\x7c"  # in float16
NO_SNIPPETS = "no real snippets here; set KAGGLE_SETI to their folder"


def snippet(number: int, shape: tuple[int, ...] = SMALL_SHAPE) -> npt.NDArray[np.float16]:
    """White noise; each number gives another snippet."""
    return np.random.default_rng(number).standard_normal(shape).astype(np.float16)


def write_table(path: Path, rows: Iterable[tuple[object, ...]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "target"), *rows])


@dataclass
class Layout:
    """A data folder in the Kaggle layout; every third train snippet has a needle."""

    root: Path
    train: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)

    def path(self, key: str) -> Path:
        return self.root / ("train" if key in self.train else "test") / key[0] / f"{key}.npy"

    def target(self, key: str) -> int:
        return int(self.train.index(key) % 3 == 0)

    def write_labels(self, changed: dict[str, str] | None = None, extra: Iterable[tuple[str, str]] = ()) -> None:
        rows = [(key, (changed or {}).get(key, str(self.target(key)))) for key in self.train]
        write_table(self.root / "train_labels.csv", [*rows, *extra])


MakeData = Callable[..., Layout]


@pytest.fixture
def make_data(tmp_path: Path) -> MakeData:
    """Build a data folder with `train` and `test` snippets of a shape."""

    def build(name: str = "data", train: int = 12, test: int = 4, shape: tuple[int, ...] = SMALL_SHAPE) -> Layout:
        keys = [f"{'abcdef'[number % 6]}{number:04d}" for number in range(train + test)]
        data = Layout(tmp_path / name, keys[:train], keys[train:])
        data.root.mkdir()
        for number, key in enumerate(keys):
            data.path(key).parent.mkdir(parents=True, exist_ok=True)
            np.save(data.path(key), snippet(number, shape))
        if train:
            data.write_labels()
        if test:
            # Not in the order of the keys, since a submission has to keep the table's order.
            write_table(data.root / "sample_submission.csv", [(key, 0.5) for key in reversed(data.test)])
        return data

    return build


def small_config(data: Layout, out: Path, **options: Any) -> PackConfig:
    return replace(PackConfig(data.root, out, folds=3, workers=1, shard_mb=1), **options)


@pytest.fixture
def sharded(make_data: MakeData) -> Layout:
    """12 train and 4 test cadences: three and one shards."""
    return make_data(shape=SHARDED_SHAPE)


@pytest.fixture
def packed(sharded: Layout, tmp_path: Path) -> Manifest:
    return pack(small_config(sharded, tmp_path / "packed"))


def late_key(data: Layout) -> str:
    """A key of the third shard."""
    return sorted(data.train)[11]


@dataclass(frozen=True)
class Answer:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Answer]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `python -m shard_tools ...` in this process, as its __main__ does."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["shard_tools", *map(str, arguments)])
        capsys.readouterr()
        code = run_command(main)
        return Answer(code, *capsys.readouterr())

    return run


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def data_set_bytes(folder: Path) -> dict[str, bytes]:
    """As `folder_bytes` without the note of the sources' times, which differ if files were written anew in between."""
    return {name: data for name, data in folder_bytes(folder).items() if name != SOURCES}


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged, except by wandb, whose thread may log the end of a service that another test killed."""
    return [record.getMessage() for record in caplog.records if record.name.partition(".")[0] != "wandb"]


@pytest.fixture(scope="session")
def kaggle_seti() -> Path:
    """The folder of the real snippets, if this machine has them."""
    folder = Path(os.environ.get("KAGGLE_SETI", ROOT.parent / "shared" / "data" / "kaggle_seti"))
    if not (folder / "train_labels.csv").is_file():
        pytest.skip(f"{folder}: {NO_SNIPPETS}")
    return folder


@pytest.fixture(autouse=True)
def on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run on the CPU, where results are equal bit for bit; only tests marked gpu use a GPU."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(autouse=True)
def own_accelerate_state() -> Iterator[None]:
    """Reset Accelerate's device and precision, which it keeps for the whole process, before each test."""
    forget_accelerate()
    yield
    forget_accelerate()


def forget_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU if there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def source_files(*rooms: str) -> list[Path]:
    """The Python files of some packages, or of the whole program, its scripts too."""
    scripts = [] if rooms else sorted(ROOT.glob("*.py"))
    return [*scripts, *(path for room in rooms or ROOMS for path in sorted((ROOT / room).rglob("*.py")))]
