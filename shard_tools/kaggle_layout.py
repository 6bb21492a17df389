"""The Kaggle layout: read labels and files as records."""

import hashlib
import io
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from shard_tools.cadence import check_key, read_shape
from shard_tools.csv_table import read_table
from shard_tools.errors import InputError
from shard_tools.fold_split import assign_folds, check_groups, read_groups
from shard_tools.snippet_files import LeftAlone, find_snippets

LABELS = "train_labels.csv"
SUBMISSION = "sample_submission.csv"
SPLITS = ("train", "test")
UNKNOWN_TARGET = -1  # of a test snippet
NO_FOLD = -1
_SHAPE_VOTES = 100
_TARGET_0, _TARGET_1 = re.compile(r"0(\.0*)?|false"), re.compile(r"1(\.0*)?|true")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One snippet of the catalogue."""

    key: str
    split: str
    target: int
    """0, 1, or UNKNOWN_TARGET."""
    fold: int
    """0 to folds - 1, or NO_FOLD for test snippets."""
    path: Path


@dataclass(frozen=True)
class Catalog:
    """What a data folder holds, in the order (train, test), each sorted by key."""

    records: list[Record]
    missing: dict[str, list[str]] = field(default_factory=dict)
    """Per split, the keys in its table that have no file."""


def read_catalog(root: Path, folds: int | None, seed: int, allow_missing: bool, groups: Path | None = None) -> Catalog:
    """Read a folder in the Kaggle layout into a catalogue.

    A train part (train_labels.csv, train/<c>/<key>.npy) or a test part (sample_submission.csv, test/<c>/<key>.npy)
    may be absent as a whole. Files that other programs left there are skipped, and counted in a line of the log.
    Folds are assigned over all labels, with or without a file, so a partial download has the folds of the full one;
    `folds` None assigns none. `groups` is a table of the group of each training snippet; a group stays in one fold.
    Raises InputError on duplicate or unsafe keys, labels other than 0 and 1, files without a label, and,
    unless `allow_missing`, labels without a file.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; expected {LABELS} and train/, or {SUBMISSION} and test/")
    missing: dict[str, list[str]] = {}
    records: list[Record] = []
    left = LeftAlone()
    for split in SPLITS:
        files = find_snippets(root / split, left)
        targets = _read_targets(root, split, files)
        fold_of: dict[str, int] = {}
        if split == "train" and folds is not None:
            group_of = _read_groups(groups, files.keys() & targets.keys()) if groups else None
            fold_of = assign_folds(list(targets), list(targets.values()), folds, seed, group_of)
        missing[split] = _check_files(root, split, files, targets, allow_missing)
        records += [
            Record(key, split, targets[key], fold_of.get(key, NO_FOLD), files[key]) for key in sorted(files.keys())
        ]
    if left:
        _log.info("%s: %s", root, left)
    if not records:
        raise InputError(f"{root}: no snippets; expected train/<c>/<key>.npy with {LABELS}, or test/<c>/<key>.npy")
    in_both = {r.key for r in records if r.split == "train"} & {r.key for r in records if r.split == "test"}
    if in_both:
        raise InputError(f"{root}: key {min(in_both)} is in train and in test; a key names one snippet")
    return Catalog(records, missing)


def _read_groups(path: Path, keys: Iterable[str]) -> dict[str, str]:
    group_of = read_groups(path)
    check_groups(group_of, keys, path)
    return group_of


def _check_files(
    root: Path, split: str, files: Mapping[str, Path], targets: Mapping[str, int], allow_missing: bool
) -> list[str]:
    """The keys of a split that have no file, if that is allowed. Raises InputError on files that no table names."""
    stray = sorted(files.keys() - targets.keys())
    if stray:
        table = LABELS if split == "train" else SUBMISSION
        raise InputError(f"{files[stray[0]]}: not in {table}, the first of {len(stray)} such files; add or move them")
    missing = sorted(targets.keys() - files.keys())
    if missing and not allow_missing:
        raise InputError(
            f"{root / split}: no file for {len(missing)} of {len(targets)} keys, the first is {missing[0]}.npy; "
            f"complete the download, or pack what is there with --allow-missing"
        )
    return missing


def common_shape(root: Path, records: Sequence[Record], skip_bad: bool, cast: bool = False) -> tuple[int, int, int]:
    """The most common shape (P, T, F) of the first snippets; all others must have it. Raises as `read_snippet` does."""
    shapes: Counter[tuple[int, int, int]] = Counter()
    for record in records:
        try:
            shapes[read_shape(record.path, cast)] += 1
        except InputError:
            if not skip_bad:
                raise
        # Enough to outvote one odd snippet, and quick on any disk.
        if shapes.total() == _SHAPE_VOTES:
            break
    if not shapes:
        raise InputError(f"{root}: not one readable snippet among {len(records)}")
    return shapes.most_common(1)[0][0]


def digest_catalog(catalog: Catalog, root: Path) -> str:
    """SHA-256 of a data set's records, missing keys and sample submission."""
    digest = hashlib.sha256()
    for r in catalog.records:
        digest.update(f"{r.key} {r.split} {r.target} {r.fold}\n".encode())
    for split in SPLITS:
        for key in catalog.missing.get(split, []):
            digest.update(f"{key} {split} missing\n".encode())
    if (root / SUBMISSION).is_file():
        digest.update((root / SUBMISSION).read_bytes())
    return digest.hexdigest()


def to_submission_keys(table: bytes, where: str) -> list[str]:
    """The keys of a sample_submission.csv, in its order. Raises InputError on duplicate or unsafe keys."""
    return list(_to_targets(io.BytesIO(table), where, labelled=False))


def _read_targets(root: Path, split: str, files: dict[str, Path]) -> dict[str, int]:
    """Key to target, from the split's table."""
    table = root / (LABELS if split == "train" else SUBMISSION)
    if table.is_file():
        with table.open("rb") as file:
            return _to_targets(file, str(table), labelled=split == "train")
    if split == "train" and files:
        raise InputError(f"{table}: missing, but {root / split} has {len(files)} snippets; add the table (id,target)")
    # A user's own cadences need no table: every file is scored.
    return dict.fromkeys(sorted(files), UNKNOWN_TARGET)


def _to_targets(table: BinaryIO, path: str, labelled: bool) -> dict[str, int]:
    """Key to target of a CSV table with the columns id and target."""
    targets: dict[str, int] = {}
    for where, row in read_table(table, path, ("id", "target") if labelled else ("id",)):
        key = row["id"]
        check_key(key, where)
        if key in targets:
            raise InputError(f"{where}: id {key} appears twice; expected each id once")
        targets[key] = to_target(row["target"], key, where) if labelled else UNKNOWN_TARGET
    return targets


def to_target(text: str, key: str, where: str) -> int:
    """0 or 1, also as 0.0 or 1.0 (pandas after a merge) and as False or True."""
    word = text.lower()
    if _TARGET_0.fullmatch(word):
        return 0
    if _TARGET_1.fullmatch(word):
        return 1
    raise InputError(f"{where}: target {text[:40]!r} of id {key}; expected 0 or 1 (or 0.0, 1.0, False, True)")
