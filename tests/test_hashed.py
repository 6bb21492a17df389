"""The promises about large tables: what was hashed is what is read, and what is kept compactly is what was given."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shard_tools import hashed, places
from shard_tools.errors import InputError
from shard_tools.hashed import HashedFile, HashedReader
from shard_tools.places import Places, find_places, numbers_where
from shard_tools.store import open_store

PIECE = 100
SEVERAL = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=[0, 10**6], ids=["read again", "kept"])
def small_pieces(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> bool:
    """Pieces so small that a file has many; returns whether they are kept."""
    monkeypatch.setattr(hashed, "_PIECE_BYTES", PIECE)
    monkeypatch.setattr(hashed, "_KEPT_BYTES", request.param)
    return request.param > 0


def write(folder: Path, size: int) -> bytes:
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    (folder / "table").write_bytes(data)
    return data


@SEVERAL
@given(size=st.integers(0, 12 * PIECE), reads=st.lists(st.tuples(st.integers(0, 1300), st.integers(-1, 500))))
def test_a_file_is_hashed_as_hashlib_does_and_read_as_it_is(
    tmp_path: Path, small_pieces: bool, size: int, reads: list[tuple[int, int]]
) -> None:
    data = write(tmp_path, size)
    file = HashedFile(open_store(tmp_path), "table")
    assert (file.size, file.sha256) == (size, hashlib.sha256(data).hexdigest())
    reader = HashedReader(file)
    for start, count in reads:
        assert reader.seek(start) == start
        expected = data[start:] if count < 0 else data[start : start + count]
        assert reader.read(count) == expected
        assert reader.tell() == start + len(expected)
    assert reader.seek(0, 2) == size


@SEVERAL
@given(size=st.integers(1, 12 * PIECE), data=st.data())
def test_a_bit_that_flips_after_the_file_was_hashed_is_found_when_it_is_read(
    tmp_path: Path, small_pieces: bool, size: int, data: st.DataObject
) -> None:
    good = write(tmp_path, size)
    file = HashedFile(open_store(tmp_path), "table")
    place = data.draw(st.integers(0, size - 1))
    bad = bytearray(good)
    bad[place] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "table").write_bytes(bad)
    reader = HashedReader(file)
    reader.seek(place)
    if small_pieces:
        assert reader.read(1) == good[place : place + 1]
    else:
        with pytest.raises(InputError, match="table: changed while it was read"):
            reader.read(1)
        with pytest.raises(InputError, match="table: changed while it was read"):
            reader.read(1)  # what was refused is not held


def test_bytes_before_a_damaged_piece_are_still_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused piece was read into the memory of the one before."""
    monkeypatch.setattr(hashed, "_PIECE_BYTES", PIECE)
    monkeypatch.setattr(hashed, "_KEPT_BYTES", 0)
    good = write(tmp_path, 3 * PIECE)
    reader = HashedReader(HashedFile(open_store(tmp_path), "table"))
    assert reader.read(10) == good[:10]
    (tmp_path / "table").write_bytes(good[:PIECE] + bytes(2 * PIECE))
    reader.seek(PIECE)
    with pytest.raises(InputError, match="table: changed while it was read"):
        reader.read(10)
    reader.seek(20)
    assert reader.read(10) == good[20:30]


def test_a_file_cut_short_after_it_was_hashed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashed, "_KEPT_BYTES", 0)
    good = write(tmp_path, 1000)
    file = HashedFile(open_store(tmp_path), "table")
    (tmp_path / "table").write_bytes(good[:-1])
    with pytest.raises(InputError, match="table: 999 bytes, expected 1000"):
        HashedReader(file).read()


@settings(max_examples=200)
@given(
    # Few shards, steps and parts, so that runs begin and end everywhere.
    shard=st.lists(st.integers(0, 2), min_size=1, max_size=30),
    offsets=st.lists(st.sampled_from([512, 1024, 1536, 2048, 2**63 - 1]), min_size=30, max_size=30),
    regular=st.booleans(),
    cuts=st.lists(st.integers(1, 29), max_size=3),
)
def test_places_kept_as_runs_are_those_that_were_given(
    shard: list[int], offsets: list[int], regular: bool, cuts: list[int]
) -> None:
    shards = np.array(sorted(shard) if regular else shard, np.int32)
    offset = np.arange(len(shards)) * 1024 + 512 if regular else np.array(offsets[: len(shards)], np.int64)
    edges = sorted({0, len(shards), *(cut for cut in cuts if cut < len(shards))})
    parts = [find_places(start, shards[start:stop], offset[start:stop]) for start, stop in itertools.pairwise(edges)]
    found = Places.join(parts)
    if regular:
        assert len(found.starts) <= len(set(shard)) + len(edges) - 2
    for column, expected in zip(found.spread(len(shards)), (shards, offset), strict=True):
        assert column.tolist() == expected.tolist()
    assert [found.at(row) for row in range(len(shards))] == list(zip(shards.tolist(), offset.tolist(), strict=True))


@SEVERAL
@given(mask=st.lists(st.booleans(), max_size=50))
def test_numbers_found_in_slices_are_those_found_at_once(monkeypatch: pytest.MonkeyPatch, mask: list[bool]) -> None:
    monkeypatch.setattr(places, "_SLICE", 7)
    whole = np.array(mask, np.bool_)
    found = numbers_where(lambda part: whole[part], len(whole))
    assert found.tolist() == np.flatnonzero(whole).tolist()
