"""A task for tests, in a module that a new process imports quickly."""

import time
from pathlib import Path

from shard_tools.errors import InputError


def take(number: int, folder: Path) -> int:
    """Note that a call has begun, and return the square of its number; odd numbers fail."""
    (folder / str(number)).touch()
    if number % 2:
        raise InputError(f"{number}: odd")
    time.sleep(0.01)
    return number**2
