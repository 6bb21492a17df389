"""Progress of long work: a bar with rate and time left on a terminal, plain lines in a log file."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from shard_tools.system.streams import is_terminal

_SECONDS_BETWEEN_LINES = 10.0
_log = logging.getLogger(__name__)
T = TypeVar("T")


def progress(
    items: Iterable[T],
    total: int,
    label: str,
    unit: str = "cadences",
    note: Callable[[], str] = lambda: "",
) -> Iterator[T]:
    """Yield `items` while showing how many of `total` are done, the rate, the time left, and what `note` returns."""
    if is_terminal(sys.stderr):
        with tqdm(items, total=total, desc=label, unit=f" {unit}", dynamic_ncols=True, leave=False) as bar:
            for item in bar:
                yield item
                bar.set_postfix_str(note(), refresh=False)
        return
    # tqdm's carriage returns make one endless line of a log file.
    began = shown = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - shown >= _SECONDS_BETWEEN_LINES and done < total:
            rate = done / (now - began)
            more = f"; {said}" if (said := note()) else ""
            left = (total - done) / rate
            _log.info("%s: %d of %d, %.3g %s/s, %.0f s left%s", label, done, total, rate, unit, left, more)
            shown = now
