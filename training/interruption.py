"""Requests to stop a run or to write a checkpoint: from signals, the end of its launcher, and the clock."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path, PurePath
from types import FrameType
from typing import Any, Self, cast

import torch
import torch.distributed
from accelerate import Accelerator

_LAUNCHERS = {
    "accelerate", "accelerate-launch", "accelerate.commands.launch",
    "torchrun", "torch.distributed.run", "torch.distributed.launch",
}  # fmt: skip
_SECONDS_TO_A_SECOND_CTRL_C = 1.0


class RunInterruptedError(Exception):
    """The run was asked to stop, and its last checkpoint holds all that was trained."""


class Interruption:
    """Requests to stop, and the time for a checkpoint, as all ranks agree on them between two steps.

    SIGTERM is preemption, SIGINT is Ctrl-C, SIGHUP a terminal that closes. A launcher of one process does not pass
    signals on, so its end counts as a request to stop.
    """

    def __init__(self, accelerator: Accelerator, checkpoint_minutes: float) -> None:
        self._asked_at: float | None = None
        self._launcher = launcher_of(os.getppid())
        self._seconds = checkpoint_minutes * 60
        self._last = time.monotonic()
        # Always over gloo, whatever the gradients use: the CPUs agree without waiting for the GPUs.
        self._group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def __enter__(self) -> Self:
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        self._before = {number: signal.signal(number, self._ask) for number in stop_signals()}
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None and self._asked_at is not None:
            return  # the run is stopping: a repeated signal must not cut off its final messages
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGHUP:
            self._mute_lost_terminals()
        if self._asked_at is None:
            self._asked_at = now
        # Any other second signal repeats the first: schedulers signal the ranks and the launcher, which passes it on.
        elif number == signal.SIGINT and now - self._asked_at > _SECONDS_TO_A_SECOND_CTRL_C:
            raise KeyboardInterrupt

    def _mute_lost_terminals(self) -> None:
        """Redirect closed terminals to /dev/null: a write to one would raise."""
        for number in self._terminals:
            if not os.isatty(number):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)

    def agree(self) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether the time for a checkpoint has come."""
        asked = self._asked_at is not None or (self._launcher is not None and os.getppid() != self._launcher)
        due = bool(self._seconds) and time.monotonic() - self._last > self._seconds
        if self._group is None:
            return asked, due
        flags = torch.tensor([asked, due], dtype=torch.int32)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, cast(Any, self._group))
        return bool(flags[0]), bool(flags[1])

    def checkpoint_was_made(self) -> None:
        """Restart the clock."""
        self._last = time.monotonic()


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a run to stop; not SIGHUP if it is ignored, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignored else [signal.SIGHUP])]


def exit_when_asked(code: int) -> None:
    """Have a signal exit with `code` at once, while nothing can be lost; Ctrl-C keeps Python's own handling."""
    for number in stop_signals():
        if number != signal.SIGINT:
            signal.signal(number, lambda *_: sys.exit(code))


def launcher_of(process: int, proc: Path = Path("/proc")) -> int | None:
    """`process` if it is one of the launchers of Accelerate and torch; None if it is not, or if that is unknown."""
    with contextlib.suppress(OSError):
        words = (proc / str(process) / "cmdline").read_bytes().decode(errors="replace").split("\0")
        # Interpreter, its flags, the launcher; the launched program comes later.
        if _LAUNCHERS & {PurePath(word).name for word in words[:5]}:
            return process
    return None
