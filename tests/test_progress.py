"""Progress of long work: a bar on a terminal, plain lines in a log file."""

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A clock that jumps five seconds per item, so that the test need not wait.
SCRIPT = """
import itertools, logging, sys
import shard_tools.system.progress as p
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
if sys.argv[1] == "log":
    clock = itertools.count(0, 5)
    p.time.monotonic = lambda: next(clock)
assert list(p.progress(iter(range(9)), 9, "packing", "shards")) == list(range(9))
"""


def test_a_log_file_gets_plain_lines_with_rate_and_time_left() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, "log"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert lines[0] == "packing: 2 of 9, 0.2 shards/s, 35 s left"
    assert 3 <= len(lines) <= 5 and "\r" not in done.stderr


def test_a_terminal_gets_a_bar_with_rate_and_time_left() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with subprocess.Popen([sys.executable, "-c", SCRIPT, "bar"], cwd=ROOT, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:
            pass  # reading a terminal whose other end is closed raises
        assert process.wait() == 0
    assert b"packing" in shown and b"\r" in shown and b"shards/s" in shown and b"0/9" in shown


def test_a_line_ends_with_what_the_place_of_the_work_says() -> None:
    script = SCRIPT.replace('"packing", "shards")', '"packing", "shards", lambda: "2 nodes: a 3/s")')
    done = subprocess.run([sys.executable, "-c", script, "log"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[0] == "packing: 2 of 9, 0.2 shards/s, 35 s left; 2 nodes: a 3/s"
