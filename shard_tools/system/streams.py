"""Handle standard streams that are absent, closed, or in an encoding that lacks what we print."""

import contextlib
import os
import sys
from typing import IO


def prepare_streams() -> None:
    """Prepare standard output and error so that a print or a log line cannot end a command.

    Services, schedulers and `2>&-` start a program without them; its output is then discarded.
    """
    _fill_descriptors()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123 (for as long as the process lives)
        elif getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _fill_descriptors() -> None:
    """Open 0, 1 and 2 if closed: otherwise the next opened file would become one of them, and get library output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def mute(stream: IO[str] | None) -> None:
    """Discard what a stream still buffers, so that Python does not meet the broken pipe again at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())  # type: ignore[union-attr]
        os.close(descriptor)


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether a stream is a terminal; False where there is none."""
    return stream is not None and not stream.closed and stream.isatty()
