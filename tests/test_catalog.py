"""The promises of tables and folds."""

import csv
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_tools.catalog import NO_FOLD, UNKNOWN_TARGET, assign_folds, read_catalog, to_submission_keys
from shard_tools.errors import InputError
from tests.conftest import MakeData, snippet

KEYS = st.lists(st.text("0123456789abcdef", min_size=1, max_size=15), min_size=12, max_size=60, unique=True)


@st.composite
def labels(draw: st.DrawFn) -> dict[str, int]:
    """Keys and targets with at least five of each class."""
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
