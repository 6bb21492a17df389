"""The promises of the manifest: damage is found, and entries that point elsewhere are refused."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shard_tools.errors import InputError
from shard_tools.manifest import Manifest, canonical_json, read_manifest
from shard_tools.pack import PackConfig, pack
from shard_tools.sample import read_snippets
from shard_tools.verify import verify
from tests.conftest import Command, MakeData, data_set_bytes

FILES = [
    "manifest.json",
    "samples.parquet",
    "skipped.csv",
    "sample_submission.csv",
    "train-000000.tar",
    "train-000000.idx",
    "test-000000.tar",
    "test-000000.idx",
]


@pytest.fixture
def packed(make_data: MakeData, tmp_path: Path) -> Manifest:
    return pack(PackConfig(make_data().root, tmp_path / "out", folds=3, workers=1))


def test_a_good_data_set_has_no_fault(packed: Manifest, command: Command) -> None:
    assert sorted(data_set_bytes(packed.root)) == sorted(FILES)
    answer = command("verify", packed.root)
    assert (answer.code, answer.err) == (0, "")
    assert "every byte is as it was packed" in answer.out


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_file_is_found(packed: Manifest, command: Command, name: str) -> None:
    path = packed.root / name
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    places = {0, 1, len(good) - 1, len(good) // 2, *rng.integers(0, len(good), 30).tolist()}
    for place in sorted(places):
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        faults = list(verify(packed.root))
        assert len(faults) == 1, f"byte {place} of {name}"
        assert str(path) in faults[0]
    answer = command("verify", packed.root)
    assert answer.code == 1
    assert f"fault: {path}" in answer.out
    path.write_bytes(good)
    assert not list(verify(packed.root))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(packed: Manifest, command: Command, name: str) -> None:
    (packed.root / name).unlink()
    answer = command("verify", packed.root)
    assert answer.code == 1
    assert str(packed.root / name) in answer.out
    assert "Traceback" not in answer.out + answer.err


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data[:512], lambda data: b"", lambda d: d + b"x"]
)
def test_a_truncated_or_longer_shard_is_found_with_both_sizes(
    packed: Manifest, command: Command, change: Callable[[bytes], bytes]
) -> None:
    path = packed.root / "train-000000.tar"
    good = path.read_bytes()
    path.write_bytes(change(good))
    answer = command("verify", packed.root)
    assert answer.code == 1
    assert f"fault: {path}: {len(change(good))} bytes, expected {len(good)}" in answer.out


def test_every_fault_is_named_not_the_first_alone(packed: Manifest, command: Command) -> None:
    for name in ("skipped.csv", "train-000000.idx", "test-000000.tar"):
        (packed.root / name).unlink()
    answer = command("verify", packed.root)
    assert answer.code == 1
    assert "3 faults" in answer.out


def test_a_folder_without_shards_is_no_data_set(command: Command, tmp_path: Path) -> None:
    for action in ("verify", "info"):
        answer = command(action, tmp_path)
        assert answer.code == 1
        assert "manifest.json: no such file; expected a folder that" in answer.out + answer.err


# ---- Manifests with right hashes and wrong content, which `pack` did not write


def forge(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((root / "manifest.json").read_text())
    content.pop("~sha256")
    change(content)
    (root / "manifest.json").write_text(canonical_json(content))


def forge_samples(root: Path, column: str, row: int, value: object) -> None:
    table = pq.read_table(root / "samples.parquet")
    values = table[column].to_pylist()
    values[row] = value
    position = table.schema.get_field_index(column)
    table = table.set_column(position, table.schema.field(column), pa.array(values, table.schema.field(column).type))
    pq.write_table(table, root / "samples.parquet")
    digest = hashlib.sha256((root / "samples.parquet").read_bytes()).hexdigest()
    forge(root, lambda content: content["files"].update({"samples.parquet": digest}))


@pytest.mark.parametrize("samples", [2**47, 2**62])
def test_more_samples_than_fit_into_memory_are_refused(packed: Manifest, samples: int) -> None:
    """Memory for them is requested before the table is opened."""
    forge(packed.root, lambda content: content["shards"][0].update(samples=samples))
    with pytest.raises(InputError, match=r"manifest\.json: \d+ samples, more than fit into memory; pack again"):
        read_manifest(packed.root)


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("shard", 2, "unknown shards"),
        ("shard", -1, "unknown shards"),
        ("offset", -512, "outside its shard"),
        ("offset", 0, "outside its shard"),
        ("offset", 10**9, "outside its shard"),
        ("offset", 2**63 - 1, "outside its shard"),  # offset plus size wraps around to before the start
        ("size", 0, "outside its shard"),
        ("size", -1, "outside its shard"),
        ("size", 2**31 - 1, "outside its shard"),
        ("key", "../../etc/passwd", "unsafe or repeated keys"),
        ("key", "a0000", "unsafe or repeated keys"),
        ("key", None, "empty cells"),
        ("offset", None, "empty cells"),
        ("target", 1, "samples and positives"),
        ("split", 1, "samples and positives"),
    ],
)
def test_a_place_outside_the_shards_is_refused(packed: Manifest, column: str, value: object, expected: str) -> None:
    row = int(np.flatnonzero(packed.target == 0)[0])
    assert packed.key(row) != "a0000"
    forge_samples(packed.root, column, row, value)
    with pytest.raises(InputError, match=rf"samples\.parquet: .*{expected}"):
        read_manifest(packed.root)


def test_rows_are_those_of_the_split_and_the_fold(packed: Manifest) -> None:
    for split, number in (("train", 0), ("test", 1)):
        assert packed.rows(split).tolist() == np.flatnonzero(packed.split == number).tolist()
    held_out, rest = (set(packed.rows("train", 1, held_out=held_out).tolist()) for held_out in (True, False))
    assert held_out == set(np.flatnonzero((packed.split == 0) & (packed.fold == 1)).tolist())
    assert held_out | rest == set(packed.rows("train").tolist()) and not held_out & rest


def test_a_table_that_lies_about_its_length_is_refused(packed: Manifest) -> None:
    table = pq.read_table(packed.root / "samples.parquet")
    pq.write_table(table.slice(1), packed.root / "samples.parquet")
    digest = hashlib.sha256((packed.root / "samples.parquet").read_bytes()).hexdigest()
    forge(packed.root, lambda content: content["files"].update({"samples.parquet": digest}))
    with pytest.raises(InputError, match=rf"samples\.parquet: {len(table) - 1} samples .* expected {len(table)}"):
        read_manifest(packed.root)


def first_shard(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["shards"][0].update(changes)


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "shard above the folder": first_shard(name="../train-000000.tar"),
    "shard at the root": first_shard(name="/etc/passwd"),
    "shard by a pipe": first_shard(name="pipe:cat.tar"),
    "shard twice": first_shard(name="test-000000.tar"),
    "size as text": first_shard(bytes="many"),
    "negative size": first_shard(bytes=-1),
    "endless size": first_shard(bytes=10**30),
    "hash as number": first_shard(sha256=1),
    "another field": first_shard(colour="red"),
    "file above the folder": lambda content: content["files"].update({"../x.csv": ""}),
    "no shards": lambda content: content.pop("shards"),
    "no splits": lambda content: content.pop("splits"),
    "no counts": lambda content: content["splits"]["train"].clear(),
    "no files": lambda content: content.pop("files"),
    "shape as text": lambda content: content.update(shape="big"),
    "two axes": lambda content: content.update(shape=[6, 14]),
    "no channels": lambda content: content.update(shape=[6, 14, 0]),
    "five panels": lambda content: content.update(shape=[5, 14, 16]),
    "greater shape": lambda content: content.update(shape=[6, 10**12, 10**12]),
    "no samples table": lambda content: content["files"].pop("samples.parquet"),
    "shards as number": lambda content: content.update(shards=7),
    "another version": lambda content: content.update(format_version=2),
    "another format": lambda content: content.update(format="tarballs"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_manifest_of_another_form_is_refused(packed: Manifest, command: Command, forgery: str) -> None:
    forge(packed.root, FORGERIES[forgery])
    with pytest.raises(InputError, match="pack again"):
        read_manifest(packed.root)
    answer = command("verify", packed.root)
    assert answer.code == 1
    assert "Traceback" not in answer.out + answer.err


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"7", b'{"format": 1}'])
def test_what_is_no_manifest_is_refused(packed: Manifest, text: bytes) -> None:
    (packed.root / "manifest.json").write_bytes(text)
    with pytest.raises(InputError, match=r"manifest\.json: not a manifest"):
        read_manifest(packed.root)


def test_a_samples_table_that_is_none_is_refused(packed: Manifest) -> None:
    (packed.root / "samples.parquet").write_bytes(b"no table")
    digest = hashlib.sha256(b"no table").hexdigest()
    forge(packed.root, lambda content: content["files"].update({"samples.parquet": digest}))
    with pytest.raises(InputError, match=r"samples\.parquet: not a table of samples"):
        read_manifest(packed.root)


def test_verify_finds_places_that_lead_to_another_sample(packed: Manifest) -> None:
    forge_samples(packed.root, "offset", 1, int(packed.offset[2]))
    faults = list(verify(packed.root))
    assert len(faults) == 1
    assert packed.key(1) in faults[0]
    assert "another sample lies there" in faults[0]


# ---- Looking inside


def test_info_says_counts_folds_and_trivial_scores(packed: Manifest, command: Command) -> None:
    answer = command("info", packed.root)
    assert (answer.code, answer.err) == (0, "")
    assert "16 cadences in 2 shards" in answer.out
    assert "6 panels x 14 time bins x 16 frequency channels" in answer.out
    assert "train: 0 missing, 4 positive, 0 quarantined, 12 samples" in answer.out
    assert answer.out.count("  fold ") == 3
    assert "over 12 training cadences" in answer.out


@pytest.mark.parametrize("count", [0, 1])
def test_info_over_too_few_cadences_leaves_the_scores_out(packed: Manifest, command: Command, count: int) -> None:
    answer = command("info", packed.root, "--trivial", count)
    assert (answer.code, answer.err) == (0, "")
    assert "ROC AUC" not in answer.out


def test_info_refuses_a_negative_number(packed: Manifest, command: Command) -> None:
    answer = command("info", packed.root, "--trivial", -1)
    assert (answer.code, answer.err) == (1, "error: --trivial -1: expected 0 or more\n")


@pytest.mark.parametrize("left", [0, 1000])
def test_info_on_a_truncated_shard_names_it(packed: Manifest, command: Command, left: int) -> None:
    path = packed.root / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:left])
    answer = command("info", packed.root)
    assert answer.code == 1
    assert f"error: {path}, a" in answer.err
    assert "bytes, expected 2816" in answer.err or "another sample lies there" in answer.err
    assert "Traceback" not in answer.err


def test_snippets_read_for_a_look_are_those_of_the_source(make_data: MakeData, tmp_path: Path) -> None:
    data = make_data()
    manifest = pack(PackConfig(data.root, tmp_path / "out", folds=3))
    rows = np.array([7, 0, 13])
    expected = np.stack([np.load(data.path(manifest.key(row))) for row in rows])
    assert np.array_equal(read_snippets(manifest, rows), expected)
