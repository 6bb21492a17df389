"""The promises of tables and folds."""

import csv
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_tools.errors import InputError
from shard_tools.fold_split import assign_folds, read_groups
from shard_tools.kaggle_layout import NO_FOLD, UNKNOWN_TARGET, digest_catalog, read_catalog, to_submission_keys
from shard_tools.manifest import read_manifest
from tests.conftest import Command, Layout, MakeData, logged, snippet
from training.submission import submission_keys, write_submission

KEYS = st.lists(st.text("0123456789abcdef", min_size=1, max_size=15), min_size=12, max_size=60, unique=True)


@st.composite
def labels(draw: st.DrawFn) -> dict[str, int]:
    """Keys and targets, with at least five of each class."""
    keys = draw(KEYS)
    positive = draw(st.integers(5, len(keys) - 5))
    return dict(zip(keys, draw(st.permutations([1] * positive + [0] * (len(keys) - positive))), strict=True))


@given(targets=labels(), folds=st.integers(2, 5), seed=st.integers(0, 2**32 - 1), shuffle=st.randoms())
@settings(max_examples=60, deadline=None)
def test_folds_depend_on_keys_targets_and_seed_but_not_on_their_order(
    targets: dict[str, int], folds: int, seed: int, shuffle: random.Random
) -> None:
    other = list(targets)
    shuffle.shuffle(other)
    expected = assign_folds(list(targets), list(targets.values()), folds, seed)
    assert assign_folds(other, [targets[key] for key in other], folds, seed) == expected


@given(targets=labels(), folds=st.integers(2, 5), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_each_fold_has_its_share_of_positives_and_of_cadences(targets: dict[str, int], folds: int, seed: int) -> None:
    fold_of = assign_folds(list(targets), list(targets.values()), folds, seed)
    assert set(fold_of) == set(targets)
    for target in (0, 1):
        counts = [sum(fold_of[key] == fold and targets[key] == target for key in targets) for fold in range(folds)]
        assert max(counts) - min(counts) <= 1
        assert min(counts) > 0


def test_another_seed_gives_other_folds() -> None:
    keys, targets = [f"k{number}" for number in range(60)], [number % 3 == 0 for number in range(60)]
    assert assign_folds(keys, targets, 5, seed=0) != assign_folds(keys, targets, 5, seed=1)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([1, 1, 1, 0, 0, 0, 0, 0], "--folds 5: class 1 has only 3 snippets; choose --folds 3, or add snippets"),
        ([1, 1, 0, 0, 0, 0, 0, 0], "--folds 5: class 1 has only 2 snippets; choose --folds 2, or add snippets"),
        (
            [1, 0, 1, 1, 1, 1, 1, 1],
            "--folds 5: class 0 has only 1 snippet, .* add snippets of class 0, 2",
        ),
        ([1, 1, 1, 1], "--folds 5: class 1 has only 4 snippets; choose --folds 4, or add snippets"),
    ],
)
def test_more_folds_than_a_class_has_snippets_are_refused_and_the_message_says_what_to_do(
    targets: list[int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        assign_folds(list("abcdefgh")[: len(targets)], targets, 5, seed=0)


def test_a_partial_download_has_the_folds_of_the_full_one(make_data: MakeData) -> None:
    data = make_data(train=30, test=2)
    full = {r.key: r.fold for r in read_catalog(data.root, 5, 0, allow_missing=False).records}
    for key in data.train[::2]:
        data.path(key).unlink()
    partial = read_catalog(data.root, 5, 0, allow_missing=True)
    assert partial.missing == {"train": sorted(data.train[::2]), "test": []}
    assert {r.key: r.fold for r in partial.records} == {
        key: fold for key, fold in full.items() if key not in data.train[::2]
    }


def test_records_are_train_then_test_each_sorted_with_their_labels(make_data: MakeData) -> None:
    data = make_data()
    records = read_catalog(data.root, 4, 0, allow_missing=False).records
    assert [r.key for r in records] == sorted(data.train) + sorted(data.test)
    for record in records:
        assert record.path == data.path(record.key)
        if record.split == "train":
            assert (record.target, record.fold in range(4)) == (data.target(record.key), True)
        else:
            assert (record.target, record.fold) == (UNKNOWN_TARGET, NO_FOLD)


def test_submission_keys_keep_the_order_of_the_table(make_data: MakeData) -> None:
    data = make_data()
    assert to_submission_keys((data.root / "sample_submission.csv").read_bytes(), "table") == data.test[::-1]


def test_a_table_saved_by_a_spreadsheet_is_read_like_any_other(make_data: MakeData) -> None:
    data = make_data()
    expected = read_catalog(data.root, 4, 0, allow_missing=False)
    table = data.root / "train_labels.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert read_catalog(data.root, 4, 0, allow_missing=False) == expected


def test_cadences_of_ones_own_need_no_table_and_no_subfolders(make_data: MakeData) -> None:
    data = make_data(train=0, test=3)
    (data.root / "sample_submission.csv").unlink()
    np.save(data.root / "test" / "flat.npy", snippet(0))
    records = read_catalog(data.root, 5, 0, allow_missing=False).records
    assert [r.key for r in records] == sorted([*data.test, "flat"])


def test_folders_behind_links_are_read_and_a_link_back_up_ends(make_data: MakeData, tmp_path: Path) -> None:
    data = make_data()
    expected = [r.key for r in read_catalog(data.root, 4, 0, allow_missing=False).records]
    moved = data.root / "train" / data.train[0][0]
    moved.rename(tmp_path / "elsewhere")
    moved.symlink_to(tmp_path / "elsewhere")
    (data.root / "train" / "loop").symlink_to(data.root / "train")
    assert [r.key for r in read_catalog(data.root, 4, 0, allow_missing=False).records] == expected


def test_a_key_in_train_and_in_test_is_refused(make_data: MakeData) -> None:
    data = make_data()
    key = data.train[0]
    np.save(data.root / "test" / f"{key}.npy", snippet(0))
    with (data.root / "sample_submission.csv").open("a", newline="") as file:
        csv.writer(file).writerow((key, 0.5))
    with pytest.raises(InputError, match=f"key {key} is in train and in test"):
        read_catalog(data.root, 4, 0, allow_missing=False)


def test_two_files_of_one_key_are_refused_and_both_are_named(make_data: MakeData) -> None:
    data = make_data()
    key = data.train[0]
    np.save(data.root / "train" / f"{key}.npy", snippet(0))
    with pytest.raises(InputError) as caught:
        read_catalog(data.root, 4, 0, allow_missing=False)
    assert str(data.path(key)) in str(caught.value)
    assert str(data.root / "train" / f"{key}.npy") in str(caught.value)


# ---- What other programs leave and write


CLUTTER = {
    "Mac metadata": ["train/a/._{key}.npy", "test/.DS_Store", "train/__MACOSX/a/._{key}.npy"],
    "hidden": [
        "test/.ipynb_checkpoints/{key}-checkpoint.npy",
        "train/.Trash-0/files/{key}.npy",
        "test/.{key}.npy.7.tmp",
    ],
    "trash or system": [
        "train/Thumbs.db",
        "test/desktop.ini",
        "test/$RECYCLE.BIN/deleted.npy",
        "train/@eaDir/{key}.npy",
    ],
    "partial downloads": ["test/{key}.npy.crdownload", "train/b/{key}.npy.part", "test/{key}.npy.download/{key}.npy"],
    "others, not .npy": ["train/notes.txt"],
}


def leave_clutter(data: Layout, kind: str) -> None:
    """Write clutter of one kind under each of its names, both for a key in no table and for a key in a table."""
    for pattern in CLUTTER[kind]:
        for key in ("stray", data.train[0]):
            path = data.root / pattern.format(key=key)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path.open("wb"), snippet(0))


@pytest.mark.parametrize("kind", CLUTTER)
def test_what_other_programs_leave_is_left_alone_and_counted(
    make_data: MakeData, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_data()
    expected = read_catalog(data.root, 4, 0, allow_missing=False)
    assert not logged(caplog)
    leave_clutter(data, kind)
    with caplog.at_level("INFO"):
        assert read_catalog(data.root, 4, 0, allow_missing=False) == expected
    (said,) = caplog.messages
    assert re.match(rf"{data.root}: left alone \d files and folders that are not snippets: \d {kind} \(.*\)$", said)


def test_clutter_among_cadences_of_ones_own_gets_no_scores_and_no_groups(
    make_data: MakeData, command: Command, tmp_path: Path
) -> None:
    data = make_data(train=0, test=4, shape=(6, 24, 16))
    (data.root / "sample_submission.csv").unlink()
    for kind in CLUTTER:
        data.train[:] = data.test[:1]  # a key that exists already
        leave_clutter(data, kind)
    for folder in ("train", "test"):
        (data.root / folder).mkdir(exist_ok=True)
    answer = command("pack", "--input", data.root, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    manifest = read_manifest(tmp_path / "out")
    assert manifest.keys_of(np.arange(len(manifest))) == sorted(data.test)
    answer = command("fingerprint", "--input", data.root, "--out", tmp_path / "groups.csv", "--test")
    assert answer.code == 0, answer.err
    assert sorted(read_groups(tmp_path / "groups.csv")) == sorted(data.test)


def test_a_file_that_looks_like_data_and_stands_in_no_table_is_refused_among_clutter_too(make_data: MakeData) -> None:
    data = make_data()
    for kind in CLUTTER:
        leave_clutter(data, kind)
    np.save(data.root / "train" / "stray.npy", snippet(0))
    with pytest.raises(InputError, match=r"train/stray\.npy: not in train_labels\.csv, the first of 1 such files"):
        read_catalog(data.root, 4, 0, allow_missing=False)


LABELS_OF_TOOLS = [
    ("{}", "0", "1"),
    ("{}.0", "0", "1"),
    ("{}.000", "0", "1"),
    ("{}", "False", "True"),
    ("{}", "FALSE", "TRUE"),
    ("{}", "false", "true"),
    ("  {}\t", "0", "1"),
    ('"{}"', "0", "1.0"),
]


@pytest.mark.parametrize(("form", "negative", "positive"), LABELS_OF_TOOLS)
def test_labels_as_other_tools_write_them_are_the_same_labels(
    make_data: MakeData, form: str, negative: str, positive: str
) -> None:
    data = make_data()
    expected = read_catalog(data.root, 4, 0, allow_missing=False)
    digest = digest_catalog(expected, data.root)
    lines = [f" {key} , {form.format(positive if data.target(key) else negative)}" for key in data.train]
    (data.root / "train_labels.csv").write_text("\n".join([" id, target ", *lines, "", ""]))
    found = read_catalog(data.root, 4, 0, allow_missing=False)
    assert found == expected
    assert digest_catalog(found, data.root) == digest  # so that earlier shards are recognised


@pytest.mark.parametrize("value", ["0.5", "", " ", "2", "-0", "+1", "1e0", "01", "10", "yes", "t", "nan", "0,0"])
def test_labels_that_could_mean_something_else_are_refused(make_data: MakeData, value: str) -> None:
    data = make_data()
    data.write_labels({data.train[5]: value})
    with pytest.raises(InputError, match=rf"line 7: target '.*' of id {data.train[5]}; expected 0 or 1"):
        read_catalog(data.root, 4, 0, allow_missing=False)


@pytest.mark.parametrize(
    ("table", "header", "column"),
    [
        ("train_labels.csv", "id,target,target", "target"),
        ("train_labels.csv", "id,target, target ", "target"),
        ("train_labels.csv", "id,target,id", "id"),
        ("sample_submission.csv", "id,target,id", "id"),
    ],
)
def test_a_column_that_stands_twice_is_refused(make_data: MakeData, table: str, header: str, column: str) -> None:
    data = make_data()
    _, *rows = (data.root / table).read_text().splitlines()
    (data.root / table).write_text("\n".join([header, *(f"{row},1" for row in rows)]))
    with pytest.raises(InputError, match=rf"{table}: column {column} appears 2 times"):
        read_catalog(data.root, 4, 0, allow_missing=False)
    groups = data.root / "groups.csv"
    groups.write_text("id,group,group\na,b,c\n")
    with pytest.raises(InputError, match=r"groups\.csv: column group appears 2 times"):
        read_groups(groups)


# A program that guesses types takes each of these for a number, a date or a missing value.
ODD_KEYS = ["0012e9", "1e5", "007", "1_000", "0x1F", "inf", "nan", "NA", "null", "True", "2021-08-18", "-1", "9" * 30]


def test_ids_that_look_like_numbers_stay_text_in_every_table(
    make_data: MakeData, command: Command, tmp_path: Path
) -> None:
    data = make_data(train=13, test=13, shape=(6, 24, 16))
    for old, new in zip(data.train + data.test, [*ODD_KEYS, *(f"0{key}" for key in ODD_KEYS)], strict=True):
        data.path(old).rename(data.path(old).with_name(f"{new}.npy"))
    tables = {"train_labels.csv": data.train, "sample_submission.csv": data.test}
    for name, keys in tables.items():
        text = (data.root / name).read_text()
        prefix = "0" if keys is data.test else ""
        for old, new in zip(keys, ODD_KEYS, strict=True):
            text = text.replace(old, prefix + new)
        (data.root / name).write_text(text)
    next(data.root.rglob("007.npy")).write_bytes(b"")
    groups, out = tmp_path / "groups.csv", tmp_path / "out"
    bad = ("--input", data.root, "--on-bad", "quarantine")
    assert command("fingerprint", *bad, "--out", groups).code == 0
    assert command("pack", *bad, "--out", out, "--folds", 2, "--groups", groups).code == 0
    assert read_groups(groups) == {key: key for key in ODD_KEYS}
    manifest = read_manifest(out)
    assert manifest.keys_of(manifest.rows("train")) == sorted(set(ODD_KEYS) - {"007"})
    assert (out / "skipped.csv").read_text().splitlines()[1].startswith("007,train,")
    keys = submission_keys("test", manifest)
    assert keys == [f"0{key}" for key in reversed(ODD_KEYS)]
    write_submission(tmp_path / "submission.csv", keys, dict.fromkeys(keys, 0.5), None)
    assert (tmp_path / "submission.csv").read_text() == "id,target\n" + "".join(f"{key},0.5\n" for key in keys)
