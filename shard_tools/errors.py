"""The errors that a user can mend, and how a command ends on one."""

import errno
import logging
import os
import sys
from collections.abc import Callable

EXIT_INPUT_ERROR = 1  # 2 stays what argument parsers exit with
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class InputError(Exception):
    """Something that was given cannot work: the message names it, says what was expected and found, and what to do."""


class StoreError(InputError):
    """A remote store cannot be reached, or refuses us: the fault of no file in it."""


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command's body and return its exit code; what a user can mend becomes a line or two, not a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("accelerate", "timm", "httpx", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        return command() or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
    except BrokenPipeError:
        # Whoever read our output has had enough (`| head`). Python must not find the pipe broken again at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        # A full disk, a missing right, a broken device: the system's word and the file name say it all.
        if error.errno is None:
            raise
        advice = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        print(f"error: {error.filename or 'a file'}: {error.strerror}{advice}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_INPUT_ERROR
