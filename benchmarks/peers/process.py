"""A contestant's process, seen from the benchmark that starts it."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TextIO

ROOT = Path(__file__).resolve().parents[2]
_SECONDS_TO_ANSWER = 300.0
_SECONDS_TO_QUIT = 10.0


class Failed(Exception):  # noqa: N818 (it is what the table says)
    """A contestant cannot go on; the message is the reason, in one line."""


class ContestantProcess:
    """A contestant in a process of its own, which answers each line on its standard input with a line of JSON."""

    def __init__(self, module: str, words: Sequence[str]) -> None:
        """Start `python -m module words`; it has to know the command `quit`, and take its output from `own_stdout`."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        # Some contestants leave temporary files behind: each gets a folder that is removed when it ends.
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            bufsize=0,  # what a dead process did not read must not be written again when its pipe is closed
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": self._folder.name},
            start_new_session=True,  # so that it can be ended with all its workers
        )

    @property
    def pid(self) -> int:
        """The id of the process, and of the process group of its workers."""
        return self._process.pid

    def ask(self, command: str, seconds: float = _SECONDS_TO_ANSWER) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises Failed."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # a process that failed by itself may have said why before it ended
            self._process.stdin.write(f"{command}\n".encode())
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            raise Failed(f"no answer to {command.split()[0]!r} in {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise Failed(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def close(self) -> None:
        """Ask it to quit; end it and its workers if it does not."""
        try:
            if self._process.poll() is None:
                self.ask("quit", _SECONDS_TO_QUIT)
                self._process.wait(_SECONDS_TO_QUIT)
        except (Failed, subprocess.TimeoutExpired):
            pass  # it is ended below
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # its group outlives it if workers do
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._errors):
                if stream:
                    stream.close()
            self._folder.cleanup()

    def _last_words(self) -> str:
        """Why it died, as far as it said."""
        code = self._process.wait(_SECONDS_TO_QUIT)
        if code == -signal.SIGKILL:
            return "SIGKILL, most often for lack of memory"  # what it printed last has nothing to do with it
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{how}: {lines[-1].strip()}" if lines else how


class ResultRow(Protocol):
    """The results of a contestant, as far as its process needs them."""

    failed: str
    """Why there are no figures; empty if there are any."""

    @property
    def name(self) -> str:
        """The contestant's name."""

    def fail(self, reason: str) -> None:
        """Note why it failed, and drop what was measured."""


class ProcessContest:
    """Contestants in processes of their own, each of which takes part until it fails."""

    def __init__(self, step: Callable[[str], None]) -> None:
        """`step` is called at every turn with the name of the contestant whose turn it is."""
        self.processes: dict[str, ContestantProcess] = {}
        """The processes of the contestants that take part and have not failed, by name."""
        self._step = step

    def close(self) -> None:
        """End all processes."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(ContestantProcess.close, self.processes.values()))

    def ask(self, row: ResultRow, command: str, seconds: float = _SECONDS_TO_ANSWER) -> dict[str, Any]:
        """A contestant's answer; {} if it has failed, and then its row says why."""
        self._step(row.name)
        if row.failed:
            return {}
        try:
            return self.processes[row.name].ask(command, seconds)
        except Failed as reason:
            self.fail(row, str(reason))
            return {}

    def fail(self, row: ResultRow, reason: str) -> None:
        """Note why a contestant cannot go on, and end its process."""
        row.fail(reason)
        self.processes.pop(row.name).close()


def own_stdout() -> TextIO:
    """Return the standard output of a contestant's process, for its answers alone.

    What libraries print goes to standard error from now on, so that it cannot mix with the answers.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def reason_of(error: Exception) -> str:
    """An error as one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
