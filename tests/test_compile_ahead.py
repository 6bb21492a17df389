"""The promises of compiling kernels ahead: it compiles what is needed, only where that helps, and leaves no process."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import compile_ahead
from tests.tiny import pack_tiny

ROOT = Path(__file__).parents[1]
_START = """
from pipeline import compile_ahead
compile_ahead.usable_cores = lambda: 2
compile_ahead.start(("train", "eval"))
"""
_LOAD = """
import sys
from pipeline import compile_ahead, cpu_kernels, open_loader
from pipeline.augment import DrawConfig
from pipeline.canvas import CanvasConfig
from pipeline.loader import LoaderConfig

compile_ahead._LONGEST = 3600.0
compile_ahead.wait()
for draws in (DrawConfig(cutmix=0.6, mixup=0.3, inject=float(sys.argv[2]), erase=0.5), None):
    for layout in ("on_off", "stack6"):
        canvas = CanvasConfig(layout, 28, 56, subtract="lines")
        with open_loader(sys.argv[1], canvas=canvas, augment=draws, device="cpu", config=LoaderConfig("cpu")) as loader:
            list(loader)
for kernel in (cpu_kernels.write_train_images, cpu_kernels.write_eval_image):
    print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
"""


def environment(caches: Path) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    return {**ours, "XDG_CACHE_HOME": str(caches)}


@pytest.mark.parametrize(("kernel", "inject"), [("train", "0.0"), ("train_with_signals", "0.6")])
def test_a_loader_compiles_nothing_more_when_its_kernels_were_compiled_ahead(
    tmp_path: Path, kernel: str, inject: str
) -> None:
    manifest = pack_tiny(tmp_path, train=10, test=2)
    program = _START.replace('"train"', f'"{kernel}"') + _LOAD
    words = [sys.executable, "-c", program, str(manifest.root), inject]
    done = subprocess.run(words, env=environment(tmp_path / "caches"), cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "0", "1", "0"], done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends when all is compiled")
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(1)", "raise KeyboardInterrupt"])
def test_the_compiling_process_ends_with_the_one_that_started_it(tmp_path: Path, end: str) -> None:
    script = f"import os, time\n{_START}\nprint(compile_ahead._process.pid, flush=True)\ntime.sleep(1)\n{end}\n"
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, env=environment(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    started = Path("/proc") / done.stdout.decode().strip()
    for _ in range(100):
        if not started.exists():
            break
        time.sleep(0.1)
    assert done.stdout and not started.exists()
    assert not [path for path in tmp_path.rglob("*") if ".tmp." in path.name]


def test_a_process_that_takes_too_long_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_ahead, "_LONGEST", 0.5)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        began = time.monotonic()
        monkeypatch.setattr(compile_ahead, "_process", process)
        monkeypatch.setattr(compile_ahead, "_began", began)
        for _ in range(20):
            compile_ahead.wait()
        waited, still_runs = time.monotonic() - began, process.poll() is None
    assert still_runs and 0.5 <= waited < 5


CASES = ["in the cache", "DALI", "DALI, written with =", "a GPU", "help", "one core", "another rank"]


@pytest.mark.parametrize("case", [None, *CASES])
def test_a_process_is_started_only_where_it_saves_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str | None
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(compile_ahead.subprocess, "Popen", lambda words, **_: started.append(words))
    monkeypatch.setattr(compile_ahead, "_process", None)
    monkeypatch.setattr(compile_ahead, "_began", 0.0)
    monkeypatch.setattr(compile_ahead, "_is_cached", lambda *_: case == "in the cache")
    monkeypatch.setattr(compile_ahead, "_GPU", Path("/" if case == "a GPU" else "/dev/no such device"))
    monkeypatch.setattr(compile_ahead, "usable_cores", lambda: 1 if case == "one core" else 2)
    monkeypatch.setenv("LOCAL_RANK", "1" if case == "another rank" else "0")
    words = {"DALI": ["--engine", "dali"], "DALI, written with =": ["--engine=dali"], "help": ["--help"]}
    monkeypatch.setattr(sys, "argv", ["train.py", *words.get(case or "", [])])
    compile_ahead.start(("train", "eval"))
    assert bool(started) == (case is None)


@pytest.mark.parametrize(
    ("words", "kernel"),
    [
        (["--shards", "shards"], "train"),
        (["--inject-snr-max", "6", "--backgrounds-folder=more"], "train"),
        (["--backgrounds", "more"], "train_with_signals"),
        (["--backgrounds=more"], "train_with_signals"),
        (["--inject", "0.3"], "train_with_signals"),
    ],
)
def test_the_kernel_with_signals_is_compiled_where_the_command_line_asks_for_signals(
    words: list[str], kernel: str
) -> None:
    assert compile_ahead.training_kernels(["train.py", *words]) == (kernel, "eval")


def test_a_kernel_counts_as_cached_once_it_was_compiled_with_signals_or_without(tmp_path: Path) -> None:
    script = """
from pipeline import compile_ahead, cpu_kernels
kinds = "train", "train_with_signals", "eval"
print(*(compile_ahead._is_cached(cpu_kernels, kind) for kind in kinds))
for kind in ("eval", "train_with_signals", "train"):
    compile_ahead.compile_kernels([kind])
    print(*(compile_ahead._is_cached(cpu_kernels, kind) for kind in kinds))
cpu_kernels.write_eval_image._cache._cache_file._save_index({})
with open(cpu_kernels.write_train_images._cache._cache_file._index_path, "r+b") as file:
    file.truncate(30)
print(*(compile_ahead._is_cached(cpu_kernels, kind) for kind in kinds))
"""
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, env=environment(tmp_path), cwd=ROOT, capture_output=True, text=True)
    found = [line.split() for line in done.stdout.splitlines()]
    expected = [(False, False, False), (False, False, True), (False, True, True), (True, True, True), (False,) * 3]
    assert found == [[str(each) for each in row] for row in expected], done.stderr
