"""The cache folder of a store's samples stays within its bound, whatever happens to it or to processes that fill it."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shard_tools.storage.cache import SampleCache
from tests.cache_size import held
from tests.conftest import ROOT

BOUND = 10_000
RECORD = 1_500


def cache(folder: Path) -> SampleCache:
    return SampleCache(folder, BOUND, "0" * 64)


def record(number: int, size: int = RECORD) -> list[np.ndarray[Any, Any]]:
    return [np.full(512, number % 251, np.uint8), np.full(size - 512, number % 241, np.uint8)]


def is_kept(kept: SampleCache, number: int) -> bool:
    """Whether a record is there as it was written."""
    found = [np.zeros_like(part) for part in record(number)]
    there = kept.read_record("train-000000.tar", number, found, lambda count: None)
    if there:
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(found, record(number), strict=True))
    return there


@pytest.mark.parametrize(
    "damage", [b"", bytes(20), bytes(29), b"\xff\xfe nonsense", b"-0000000000000000001", b"0" * 20, b"9" * 5000, b"12 "]
)
def test_a_damaged_ledger_is_made_anew_and_the_bound_holds(tmp_path: Path, damage: bytes) -> None:
    kept = cache(tmp_path)
    for number in range(6):
        kept.write_record("train-000000.tar", number, record(number))
    (tmp_path / "needlestream-samples" / "held").write_bytes(damage)
    for number in range(6, 20):
        kept.write_record("train-000000.tar", number, record(number))
        assert is_kept(kept, number)
        assert held(tmp_path) <= BOUND
    assert held(tmp_path) > BOUND / 2


def test_the_ledger_of_an_older_version_is_read_as_one_to_make_anew(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    for number in range(6):
        kept.write_record("train-000000.tar", number, record(number))
    (tmp_path / "needlestream-samples" / "held").write_text(f"{0:020d}")
    kept.write_record("train-000000.tar", 6, record(6))
    assert held(tmp_path) <= BOUND


def test_a_write_that_takes_long_holds_no_other_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, other = cache(tmp_path), cache(tmp_path)
    begun, released, write = threading.Event(), threading.Event(), os.writev

    def slow(descriptor: int, parts: Any) -> int:
        if threading.current_thread() is writer:
            begun.set()
            released.wait(60)
        return write(descriptor, parts)

    monkeypatch.setattr("shard_tools.storage.cache.os.writev", slow)
    writer = threading.Thread(target=kept.write_record, args=("train-000000.tar", 0, record(0)))
    writer.start()
    try:
        assert begun.wait(60)
        quick = threading.Thread(target=other.write_record, args=("train-000000.tar", 1, record(1)), daemon=True)
        quick.start()
        quick.join(20)
        assert not quick.is_alive() and is_kept(other, 1)
        # Room is reserved for a record that is still being written.
        for number in range(2, 12):
            other.write_record("train-000000.tar", number, record(number))
            assert held(tmp_path) <= BOUND
    finally:
        released.set()
        writer.join()
    assert is_kept(kept, 0) and held(tmp_path) <= BOUND


_WRITER = """
import sys, random, time
from pathlib import Path
import numpy as np
from shard_tools.storage.cache import SampleCache
kept, chance = SampleCache(Path(sys.argv[1]), int(sys.argv[3]), "0" * 64), random.Random(int(sys.argv[2]))
parts = [np.zeros(512, np.uint8), np.zeros(988, np.uint8)]
print("ready", flush=True)
while True:
    kept.write_record("train-000000.tar", chance.randrange(1000), parts)
    time.sleep(0.001)  # or no one else would get the lock
"""


def test_ranks_that_are_killed_while_they_write_leave_a_cache_within_its_bound(tmp_path: Path) -> None:
    def start(seed: int) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", _WRITER, str(tmp_path), str(seed), str(BOUND)]
        return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE)

    chance = random.Random(0)
    ranks = [start(seed) for seed in range(3)]
    try:
        for rank in ranks:
            assert rank.stdout and rank.stdout.readline() == b"ready\n"
        for victim in ranks:
            for _ in range(20):
                assert held(tmp_path) <= BOUND
            time.sleep(chance.uniform(0, 0.05))  # so that the kill may fall anywhere in a write
            victim.send_signal(signal.SIGKILL)
            victim.wait()
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            assert rank.stdout
            rank.stdout.close()
    kept = cache(tmp_path)
    for number in range(2000, 2020):
        kept.write_record("train-000000.tar", number, record(number))
        assert is_kept(kept, number) and held(tmp_path) <= BOUND
    assert not list(tmp_path.rglob("*.tmp"))  # the next search for room removes what was left


def test_a_cache_that_cannot_be_read_or_touched_costs_time_and_nothing_else(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    kept.write_record("train-000000.tar", 0, record(0))
    (path,) = tmp_path.rglob("*.sample")
    path.unlink()
    path.mkdir()  # a folder cannot be read, nor removed like a file
    assert not is_kept(kept, 0)
