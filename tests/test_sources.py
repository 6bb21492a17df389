"""The promises about sources: what was packed is compared with what is there now, by content and never by clocks."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from shard_tools.pack import pack
from shard_tools.sources import SOURCES
from tests.conftest import (
    INFINITY,
    SHARDED_SHAPE,
    Layout,
    data_set_bytes,
    folder_bytes,
    late_key,
    small_config,
    snippet,
)


def relabel(data: Layout) -> None:
    data.write_labels({key: str(1 - data.target(key)) for key in data.train})


def add_a_test_key_without_file(data: Layout) -> None:
    with (data.root / "sample_submission.csv").open("a") as file:
        file.write("zzz,0.5\n")


def reorder_the_submission(data: Layout) -> None:
    path = data.root / "sample_submission.csv"
    header, *rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join([header, *reversed(rows)]))


def replace_a_snippet(data: Layout) -> None:
    """Replace a snippet by another of the same size and time, as unpacking an archive may do."""
    path = data.path(data.train[0])
    before = path.stat()
    np.save(path, snippet(99, SHARDED_SHAPE))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def replace_a_snippet_by_an_old_one(data: Layout) -> None:
    path = data.path(data.test[1])
    np.save(path, snippet(99, SHARDED_SHAPE))
    os.utime(path, (1, 1))


def spoil_a_late_snippet(data: Layout) -> None:
    path = data.path(late_key(data))
    path.write_bytes(path.read_bytes()[:-2] + INFINITY)


CHANGES = [
    relabel,
    add_a_test_key_without_file,
    reorder_the_submission,
    replace_a_snippet,
    replace_a_snippet_by_an_old_one,
    spoil_a_late_snippet,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_finished_pack_of_another_input_is_refused_and_stays(sharded: Layout, packed: Manifest, change: Any) -> None:
    before = folder_bytes(packed.root)
    change(sharded)
    with pytest.raises(InputError, match="holds finished shards"):
        pack(small_config(sharded, packed.root, allow_missing=True))
    assert folder_bytes(packed.root) == before


@pytest.mark.parametrize("time_bin", [1, 2])
@pytest.mark.parametrize("change", [replace_a_snippet, replace_a_snippet_by_an_old_one])
def test_a_source_that_was_replaced_is_named_whatever_its_time(
    sharded: Layout, tmp_path: Path, change: Any, time_bin: int
) -> None:
    config = small_config(sharded, tmp_path / "out", time_bin=time_bin)
    pack(config)
    change(sharded)
    replaced = sharded.path(sharded.train[0] if change is replace_a_snippet else sharded.test[1])
    with pytest.raises(InputError, match=rf"shards \(changed since packing: {re.escape(str(replaced))}\)"):
        pack(config)


def test_a_source_that_was_left_out_and_is_whole_now_is_named(sharded: Layout, tmp_path: Path) -> None:
    path = sharded.path(late_key(sharded))
    good = path.read_bytes()
    path.write_bytes(good[:-2] + INFINITY)
    config = small_config(sharded, tmp_path / "out", on_bad="quarantine")
    pack(config)
    assert pack(replace(config, on_bad="fail")).splits["train"]["quarantined"] == 1
    path.write_bytes(good)
    with pytest.raises(InputError, match=path.name):
        pack(config)


@pytest.mark.parametrize("seconds", [1, 4102444800])  # in 1970, and in 2100
def test_times_alone_never_make_a_finished_pack_another(sharded: Layout, packed: Manifest, seconds: int) -> None:
    before = data_set_bytes(packed.root)
    for key in [*sharded.train, *sharded.test]:
        os.utime(sharded.path(key), (seconds, seconds))
    assert pack(small_config(sharded, packed.root)).identity == packed.identity
    assert data_set_bytes(packed.root) == before


def test_a_copy_of_the_data_set_elsewhere_is_known_as_the_one_that_was_packed(
    sharded: Layout, packed: Manifest, tmp_path: Path
) -> None:
    copy = Layout(shutil.copytree(sharded.root, tmp_path / "copy"), sharded.train, sharded.test)
    assert pack(small_config(copy, packed.root)).identity == packed.identity
    replace_a_snippet(copy)
    with pytest.raises(InputError, match=re.escape(str(copy.path(copy.train[0])))):
        pack(small_config(copy, packed.root))


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"manifest": "another", "sources": {}}'])
def test_a_finished_pack_without_a_note_of_its_sources_is_compared_with_them(
    sharded: Layout, packed: Manifest, content: bytes | None
) -> None:
    """Earlier versions wrote no note."""
    before, note = folder_bytes(packed.root), packed.root / SOURCES
    if content is None:
        note.unlink()
    else:
        note.write_bytes(content)
    assert pack(small_config(sharded, packed.root)).identity == packed.identity
    assert folder_bytes(packed.root) == before
    note.unlink()
    replace_a_snippet(sharded)
    with pytest.raises(InputError, match="changed since packing: "):
        pack(small_config(sharded, packed.root))


def test_sources_of_the_same_size_and_times_are_not_read_again(
    sharded: Layout, packed: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shard_tools.tar_shard.read_snippet", lambda *_: pytest.fail("a snippet was read"))
    assert pack(small_config(sharded, packed.root)).identity == packed.identity
