"""The promises of folds by group: no group is split, and bad tables of groups are refused."""

import logging
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shard_tools.atomic_files import file_sha256
from shard_tools.errors import InputError
from shard_tools.fold_split import assign_folds, read_groups, write_groups
from shard_tools.kaggle_layout import read_catalog
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.pack import PackConfig, pack
from tests.conftest import Command, Layout, MakeData, folder_bytes, logged


@st.composite
def grouped(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, str]]:
    """Targets and groups of keys: at least twenty groups of one to six keys, some named like a key of another group."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=20, max_size=40))
    keys = [f"{place * 7919 % 10007:05d}" for place in range(sum(sizes))]
    numbers = [number for number, size in enumerate(sizes) for _ in range(size)]
    names = draw(st.permutations(keys))
    targets = {key: int((number + draw(st.integers(0, 3))) % 3 == 0) for key, number in zip(keys, numbers, strict=True)}
    groups = {key: names[number] for key, number in zip(keys, numbers, strict=True)}
    # Groups of one key need no row in the table, nor do keys without a file.
    alone = {key for key, number in zip(keys, numbers, strict=True) if sizes[number] == 1}
    left_out = draw(st.sets(st.sampled_from(sorted(alone)))) if alone else set()
    return targets, {key: group for key, group in groups.items() if key not in left_out}


def try_folds(targets: dict[str, int], folds: int, groups: dict[str, str]) -> dict[str, int] | None:
    try:
        return assign_folds(list(targets), list(targets.values()), folds, 0, groups)
    except InputError:
        return None


@given(data=grouped(), folds=st.integers(2, 4))
@settings(max_examples=60, deadline=None)
def test_a_group_is_in_one_fold_and_every_key_is_in_one(
    data: tuple[dict[str, int], dict[str, str]], folds: int
) -> None:
    targets, groups = data
    fold_of = try_folds(targets, folds, groups)
    assume(fold_of is not None)  # otherwise a fold would lack a class
    assert fold_of.keys() == targets.keys()
    for target in (0, 1):
        assert {fold_of[key] for key in targets if targets[key] == target} == set(range(folds))
    folds_of_group: dict[str, set[int]] = {}
    for key, group in groups.items():
        folds_of_group.setdefault(group, set()).add(fold_of[key])
    assert all(len(found) == 1 for found in folds_of_group.values())


@given(data=grouped(), shuffle=st.randoms())
@settings(max_examples=40, deadline=None)
def test_folds_depend_on_who_shares_a_group_but_not_on_order_or_names(
    data: tuple[dict[str, int], dict[str, str]], shuffle: random.Random
) -> None:
    targets, groups = data
    names = sorted(set(groups.values()))
    renamed = dict(zip(names, shuffle.sample(range(1000), len(names)), strict=True))
    other = list(targets)
    shuffle.shuffle(other)
    assert try_folds(
        {key: targets[key] for key in other}, 3, {k: str(renamed[groups[k]]) for k in groups}
    ) == try_folds(targets, 3, groups)


def test_a_key_without_a_group_does_not_join_one_that_has_its_name() -> None:
    keys = [f"{number:03d}" for number in range(90)]
    targets = [number % 3 % 2 for number in range(90)]
    groups = {key: str(number // 4) for number, key in enumerate(keys[:60])}
    named = {key: keys[60 + int(group)] for key, group in groups.items()}  # named like keys that have no group
    assert assign_folds(keys, targets, 3, 0, named) == assign_folds(keys, targets, 3, 0, groups)


def test_folds_of_groups_are_even_in_size_and_in_needles(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    keys = [f"{number:04d}" for number in range(1500)]
    targets = (rng.random(1500) < 0.1).astype(int).tolist()
    groups = {key: str(group) for key, group in zip(keys, rng.integers(0, 600, 1500), strict=True)}
    fold_of = assign_folds(keys, targets, 5, 0, groups)
    assert all(abs(count - 300) <= 15 for count in Counter(fold_of.values()).values())
    needles = Counter(fold_of[key] for key, target in zip(keys, targets, strict=True) if target)
    assert max(needles.values()) - min(needles.values()) <= 3
    assert not logged(caplog)


def test_a_group_too_large_for_even_folds_is_warned_of_with_sizes(caplog: pytest.LogCaptureFixture) -> None:
    keys = [f"{number:03d}" for number in range(100)]
    targets = [number % 2 for number in range(100)]
    with caplog.at_level(logging.WARNING):
        assign_folds(keys, targets, 5, 0, dict.fromkeys(keys[:60], "sky"))
    assert "uneven folds" in caplog.text
    sizes = [int(size) for size in re.findall(r"(\d+) \(\d+\)", caplog.text)]
    assert (len(sizes), sum(sizes), max(sizes) >= 60) == (5, 100, True)
    assert "the largest group has 60 of 100" in caplog.text


def test_groups_that_leave_a_fold_without_a_target_are_refused() -> None:
    keys, targets = list("abcdefgh"), [1, 1, 1, 0, 0, 0, 0, 0]
    with pytest.raises(InputError, match=r"--folds 3 with --groups: a fold would lack .* the largest group has 3 of 8"):
        assign_folds(keys, targets, 3, 0, dict.fromkeys("abc", "sky"))
    with pytest.raises(InputError, match=r"--folds 3: only 2 groups, each in one fold; choose --folds 2, or add"):
        assign_folds(keys, targets, 3, 0, {key: str(key > "d") for key in keys})
    with pytest.raises(InputError, match=r"--folds 2: only 1 groups, .* add snippets of other groups"):
        assign_folds(keys, targets, 2, 0, dict.fromkeys(keys, "sky"))


# ---- The table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("key,group\na,b\n", r"columns \['key', 'group'\], expected \['id', 'group'\]"),
        ("", r"columns None, expected"),
        ("id,group\na,b\na,b\n", r"line 3: id a appears twice"),
        ("id,group\na,\n", r"line 2: id a has no group"),
        ("id,group\na\n", r"line 2: id a has no group"),
        ("id,group\n../a,b\n", r"line 2: bad key '../a'"),
        (b"id,group\n\xff,b\n", r"not a CSV table"),
    ],
)
def test_a_table_of_another_form_is_refused_by_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "groups.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        read_groups(path)


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--groups .*nothing.csv: no such file; .*fingerprint"):
        read_groups(tmp_path / "nothing.csv")


# ---- Packing


def table_of(data: Layout, path: Path, groups: Sequence[Sequence[int]] = ((0, 1), (2, 5, 7))) -> Path:
    """Write a row for each training snippet; those at the given places share groups."""
    name = {data.train[place]: f"g{number}" for number, places in enumerate(groups) for place in places}
    write_groups(path, [(key, name.get(key, key)) for key in data.train])
    return path


def folds(manifest: Manifest) -> dict[str, int]:
    rows = manifest.rows("train")
    return dict(zip(manifest.keys_of(rows), manifest.fold[rows].tolist(), strict=True))


def test_packed_folds_keep_groups_whole_and_the_manifest_says_by_which_table(
    make_data: MakeData, tmp_path: Path, command: Command
) -> None:
    data = make_data()
    table = table_of(data, tmp_path / "groups.csv")
    out = tmp_path / "out"
    answer = command("pack", "--input", data.root, "--out", out, "--folds", 3, "--groups", table)
    assert answer.code == 0, answer.err
    manifest = read_manifest(out)
    found = folds(manifest)
    assert len({found[data.train[place]] for place in (0, 1)}) == 1
    assert len({found[data.train[place]] for place in (2, 5, 7)}) == 1
    assert manifest.made["groups_sha256"] == file_sha256(table)
    assert "groups_sha256" not in pack(PackConfig(data.root, tmp_path / "without", folds=3)).made


def test_a_table_may_hold_more_ids_but_not_fewer(make_data: MakeData, tmp_path: Path) -> None:
    data = make_data()
    table = table_of(data, tmp_path / "groups.csv")
    expected = read_catalog(data.root, 3, 0, False, table)
    whole = table.read_text()
    table.write_text(whole + "elsewhere,g0\n" + "".join(f"{key},g1\n" for key in data.test))
    assert read_catalog(data.root, 3, 0, False, table) == expected
    table.write_text("".join(line for line in whole.splitlines(True) if line[:5] not in data.train[3:5]))
    first = min(data.train[3:5])
    with pytest.raises(
        InputError, match=rf"--groups .*: no group for 2 of the snippets in train/, the first is {first}"
    ):
        read_catalog(data.root, 3, 0, False, table)


def test_labels_without_a_file_need_no_group(make_data: MakeData, tmp_path: Path) -> None:
    data = make_data()
    table = table_of(data, tmp_path / "groups.csv")
    expected = {record.key: record.fold for record in read_catalog(data.root, 3, 0, False, table).records}
    gone = data.train[3]
    data.path(gone).unlink()
    table.write_text("".join(line for line in table.read_text().splitlines(True) if not line.startswith(gone)))
    found = {record.key: record.fold for record in read_catalog(data.root, 3, 0, True, table).records}
    assert found == {key: fold for key, fold in expected.items() if key != gone}


def test_a_finished_pack_with_other_groups_is_refused_and_stays(make_data: MakeData, tmp_path: Path) -> None:
    data = make_data()
    config = PackConfig(data.root, tmp_path / "out", folds=3, groups=table_of(data, tmp_path / "groups.csv"))
    packed = pack(config)
    before = folder_bytes(packed.root)
    assert pack(config).identity == packed.identity
    table_of(data, tmp_path / "groups.csv", groups=((3, 4), (6, 8)))
    with pytest.raises(InputError, match="holds finished shards"):
        pack(config)
    with pytest.raises(InputError, match="holds finished shards"):
        pack(PackConfig(data.root, tmp_path / "out", folds=3))
    assert folder_bytes(packed.root) == before


def test_an_interrupted_pack_goes_on_with_the_groups_of_the_last_try(make_data: MakeData, tmp_path: Path) -> None:
    data = make_data(shape=(6, 64, 256))  # five per shard
    table = table_of(data, tmp_path / "groups.csv")
    last = data.path(max(data.train))
    good = last.read_bytes()
    last.write_bytes(good[:-2] + b"\x00\x7e")  # a NaN, in the last shard of the training part
    config = PackConfig(data.root, tmp_path / "out", folds=3, groups=table, workers=1, shard_mb=1)
    with pytest.raises(InputError, match="nan"):
        pack(config)
    assert list((tmp_path / "out").glob("*.tar"))
    last.write_bytes(good)
    table_of(data, table, groups=((3, 4), (6, 8)))
    pack(config)
    fresh = pack(PackConfig(data.root, tmp_path / "fresh", folds=3, groups=table, workers=1, shard_mb=1))
    assert folder_bytes(tmp_path / "out") == folder_bytes(fresh.root)
