"""Requests to stop: by signals that come in any way, by a terminal that closes, by the end of a launcher."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from accelerate import Accelerator

from shard_tools.manifest import Manifest
from tests.launch import command_line, flags
from tests.tiny import pack_tiny, tiny_config
from train import EXIT_PREEMPTED
from training import interruption
from training.config import TrainConfig
from training.interruption import Interruption, launcher_of

ROOT = Path(__file__).resolve().parents[1]
STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("interruption"))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Kill trainings that a failed test left behind."""
    yield
    while STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(STARTED.pop().pid, signal.SIGKILL)


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """Set signals as in programs that a shell starts, even if nohup started these tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def test_the_same_request_on_two_ways_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler signals the ranks and the launcher, which passes it on: the second must not cost the checkpoint."""
    with Interruption(Accelerator(), 0) as asked:
        assert not asked.agree()[0]
        send(signal.SIGINT, signal.SIGINT)
        monkeypatch.setattr(interruption, "_SECONDS_TO_A_SECOND_CTRL_C", 0.0)
        send(signal.SIGTERM, signal.SIGTERM, signal.SIGHUP)
        assert asked.agree()[0]


def test_a_request_that_comes_again_does_not_cut_off_a_run_that_stops() -> None:
    before = [signal.signal(number, lambda *_: sys.exit("cut off")) for number in (signal.SIGTERM, signal.SIGHUP)]
    try:
        with pytest.raises(StopIteration), Interruption(Accelerator(), 0) as asked:
            send(signal.SIGTERM)
            assert asked.agree()[0]
            raise StopIteration
        send(signal.SIGTERM, signal.SIGHUP)
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGHUP), before, strict=True):
            signal.signal(number, handler)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_second_ctrl_c_a_while_later_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "_SECONDS_TO_A_SECOND_CTRL_C", 0.0)
    with Interruption(Accelerator(), 0):
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interruption(Accelerator(), 0) as asked:
        send(signal.SIGHUP)
        assert not asked.agree()[0]
        send(signal.SIGTERM)
        assert asked.agree()[0]


@pytest.mark.parametrize(
    ("words", "is_launcher"),
    [
        (["python", "-m", "accelerate.commands.launch", "train.py"], True),
        (["/usr/bin/python3", "/opt/bin/accelerate", "launch", "train.py"], True),
        (["python", "-u", "-m", "torch.distributed.run", "train.py"], True),
        (["bash", "-c", "accelerate launch train.py"], False),
        (["python", "start.py"], False),
        (["bash"], False),
    ],
)
def test_a_launcher_is_told_from_other_parents(tmp_path: Path, words: list[str], is_launcher: bool) -> None:
    """A shell that ends must not stop a training that it started in the background."""
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))
    assert launcher_of(7, tmp_path) == (7 if is_launcher else None)
    assert launcher_of(8, tmp_path) is None


def start(words: Sequence[str], **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True, **options}
    STARTED.append(subprocess.Popen(words, cwd=ROOT, env=environment, **pipes))  # type: ignore[call-overload]
    return STARTED[-1]


def long_run(manifest: Manifest, tmp_path: Path, processes: int = 1) -> tuple[TrainConfig, list[str]]:
    config = tiny_config(manifest.root, tmp_path / "run", epochs=200, batch_size=8 // processes)
    return config, list(command_line("train.py", *flags(config), "--checkpoint-every", 1, processes=processes))


def wait_for_checkpoint(config: TrainConfig, process: subprocess.Popen[str], do: Callable[[], object]) -> None:
    while not os.path.lexists(config.run_dir / "checkpoints" / "last"):
        assert process.poll() is None, process.communicate()[0]
        do()
        time.sleep(0.02)  # there is no event for a new file to wait for


ON_A_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_terminal_that_closes_ends_a_run_with_a_checkpoint(manifest: Manifest, tmp_path: Path) -> None:
    config, words = long_run(manifest, tmp_path)
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)

    def read_terminal() -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 1 << 16)

    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    process = start([sys.executable, "-c", ON_A_TERMINAL, *words], start_new_session=False, **streams)
    os.close(theirs)
    wait_for_checkpoint(config, process, read_terminal)
    os.close(ours)
    assert process.wait(timeout=120) == EXIT_PREEMPTED


def test_a_signal_to_the_launcher_and_to_its_ranks_ends_a_run_with_a_checkpoint_and_one_message(
    manifest: Manifest, tmp_path: Path
) -> None:
    config, words = long_run(manifest, tmp_path, processes=2)
    process = start(words)
    wait_for_checkpoint(config, process, lambda: None)
    ranks = [child for child in psutil.Process(process.pid).children() if "train.py" in child.cmdline()]
    for one in (*ranks, psutil.Process(process.pid)):
        one.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert len(ranks) == 2 and said.count("the same command with --resume goes on") == 1, said
    assert process.returncode == 1, "the launcher's own, whatever its ranks end with"


def test_the_end_of_a_launcher_of_one_process_ends_its_run_with_a_checkpoint(
    manifest: Manifest, tmp_path: Path
) -> None:
    config, words = long_run(manifest, tmp_path)
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    process = start([words[0], *launcher, *words[1:]])
    wait_for_checkpoint(config, process, lambda: None)
    process.terminate()
    said, _ = process.communicate(timeout=120)  # ends with the training, which holds the other end of the pipe
    assert process.returncode == -signal.SIGTERM
    assert "the same command with --resume goes on" in said
