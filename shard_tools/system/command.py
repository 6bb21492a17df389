"""How a command runs: its streams, its log, and how it exits on an error that a user can fix."""

import contextlib
import errno
import logging
import sys
from collections.abc import Callable

from shard_tools.errors import InputError
from shard_tools.system.streams import mute, prepare_streams

EXIT_INPUT_ERROR = 1  # 2 is what argument parsers exit with
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_OUTPUT = "standard output"


def run_command(command: Callable[[], int | None], again: str = "run the same command again") -> int:
    """Run a command's body and return its exit code; errors that a user can fix print a line or two, not a traceback.

    `again` says how to go on after an interruption or a full disk.
    """
    prepare_streams()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("accelerate", "timm", "httpx", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        code = command() or 0
        _flush()
        return code
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"interrupted; {again} to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        # A full disk, no permission, a broken device: the system's message and the file name are enough.
        if error.errno is None:
            raise
        if error.filename is None:
            with contextlib.suppress(OSError):
                _flush()
        if isinstance(error, BrokenPipeError) and error.filename in (None, _OUTPUT):
            return EXIT_INPUT_ERROR  # the reader closed our output (`| head`)
        advice = f"; free some space and {again}" if error.errno == errno.ENOSPC else ""
        print(f"error: {error.filename or f'an unnamed file, or {_OUTPUT}'}: {error.strerror}{advice}", file=sys.stderr)
    return EXIT_INPUT_ERROR


def _flush() -> None:
    """Flush standard output now, while a failure can still be reported."""
    try:
        sys.stdout.flush()
    except OSError as error:
        mute(sys.stdout)
        error.filename = error.filename or _OUTPUT
        raise
