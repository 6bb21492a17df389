"""The errors that a user can mend, and how a command ends on one."""

import contextlib
import errno
import logging
import sys
from collections.abc import Callable

from shard_tools.streams import mute, prepare_streams

EXIT_INPUT_ERROR = 1  # 2 stays what argument parsers exit with
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_OUTPUT = "standard output"


class InputError(Exception):
    """Something that was given cannot work: the message names it, says what was expected and found, and what to do."""


class StoreError(InputError):
    """A remote store cannot be reached, or refuses us: the fault of no file in it."""


def run_command(command: Callable[[], int | None], again: str = "run the same command again") -> int:
    """Run a command's body and return its exit code; what a user can mend becomes a line or two, not a traceback.

    `again` is the advice how to go on after an end that is not the command's fault.
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
        # A full disk, a missing right, a broken device: the system's word and the file name say it all.
        if error.errno is None:
            raise
        if error.filename is None:
            with contextlib.suppress(OSError):
                _flush()
        if isinstance(error, BrokenPipeError) and error.filename in (None, _OUTPUT):
            return EXIT_INPUT_ERROR  # whoever read our output has had enough (`| head`)
        advice = f"; free some space and {again}" if error.errno == errno.ENOSPC else ""
        print(f"error: {error.filename or f'an unnamed file, or {_OUTPUT}'}: {error.strerror}{advice}", file=sys.stderr)
    return EXIT_INPUT_ERROR


def _flush() -> None:
    """Find out while it can still be said that what was printed could not be written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        mute(sys.stdout)
        error.filename = error.filename or _OUTPUT
        raise
