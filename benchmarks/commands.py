"""Seconds and memory of commands, each a process of its own with its children."""

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.history import ROOT
from shard_tools.errors import InputError


@dataclass(frozen=True)
class Spent:
    """What one command took."""

    seconds: float
    mb: float
    """Peak memory of all its processes together (10^6 bytes); pages that they share count once."""


def run(words: Sequence[str | Path]) -> Spent:
    """Run one command. Raises InputError with the end of its output if it fails."""
    return run_together([words])


def run_together(commands: Sequence[Sequence[str | Path]]) -> Spent:
    """Run commands at the same time."""
    # turboSETI must not see our packages, which are built for another NumPy.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        processes = [
            subprocess.Popen(list(map(str, words)), cwd=ROOT, stdout=said, stderr=said, env=environment)
            for words in commands
        ]
        watch = _MemoryWatch([process.pid for process in processes])
        codes = [process.wait() for process in processes]
        seconds = time.perf_counter() - began
        peak = watch.stop()
        if any(codes):
            said.seek(0)
            words = " ".join(map(str, commands[0][:4]))
            raise InputError(f"{words}: exit codes {codes}: {said.read().decode(errors='replace').strip()[-400:]}")
    return Spent(seconds, peak / 1e6)


class _MemoryWatch:
    """Looks at the memory of processes and their children, only twice a second, as looking takes time itself."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids, self._peak, self._done = pids, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The peak in bytes."""
        self._done.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            self._peak = max(self._peak, sum(map(_memory_of, self._pids)))


def _memory_of(pid: int) -> int:
    """Bytes of a process and its children: pages that several of them share count once."""
    total = 0
    try:
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            total += each.memory_full_info().pss
    except psutil.Error:
        pass  # it ended in the meantime
    return total
