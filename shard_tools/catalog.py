"""Labels and files to records, and records to folds."""

import csv
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from shard_tools.cadence import check_key, read_shape
from shard_tools.errors import InputError
from shard_tools.groups import assign_group_folds, check_groups, read_groups

LABELS = "train_labels.csv"
SUBMISSION = "sample_submission.csv"
SPLITS = ("train", "test")
UNKNOWN_TARGET = -1  # of a test snippet
NO_FOLD = -1
_SHAPE_VOTES = 100


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
    """Per split, the keys that a table names and no file backs."""


def read_catalog(root: Path, folds: int | None, seed: int, allow_missing: bool, groups: Path | None = None) -> Catalog:
    """Read a folder in the Kaggle layout into a catalogue.

    A train part (train_labels.csv, train/<c>/<key>.npy) or a test part (sample_submission.csv, test/<c>/<key>.npy)
    may be absent as a whole. Folds are assigned over all labels, with or without a file, so a partial download has
    the folds of the full one; `folds` None assigns none. `groups` is a table of keys that belong into one fold, in
    which every training snippet must stand. Raises InputError on duplicate or unsafe keys, labels other than 0 and 1,
    files without a label, and, unless `allow_missing`, labels without a file.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; expected {LABELS} and train/, or {SUBMISSION} and test/")
    missing: dict[str, list[str]] = {}
    records: list[Record] = []
    for split in SPLITS:
        files = _find_snippets(root / split)
        targets = _read_targets(root, split, files)
        fold_of: dict[str, int] = {}
        if split == "train" and folds is not None:
            group_of = read_groups(groups) if groups else None
            if groups and group_of is not None:
                check_groups(group_of, files.keys() & targets.keys(), groups)
            fold_of = assign_folds(list(targets), list(targets.values()), folds, seed, group_of)
        stray = sorted(files.keys() - targets.keys())
        if stray:
            table = LABELS if split == "train" else SUBMISSION
            raise InputError(
                f"{files[stray[0]]}: not in {table}, the first of {len(stray)} such files; add or move them"
            )
        missing[split] = sorted(targets.keys() - files.keys())
        if missing[split] and not allow_missing:
            raise InputError(
                f"{root / split}: no file for {len(missing[split])} of {len(targets)} keys, the first is "
                f"{missing[split][0]}.npy; complete the download, or pack what is there with --allow-missing"
            )
        records += [
            Record(key, split, targets[key], fold_of.get(key, NO_FOLD), files[key]) for key in sorted(files.keys())
        ]
    if not records:
        raise InputError(f"{root}: no snippets; expected train/<c>/<key>.npy with {LABELS}, or test/<c>/<key>.npy")
    in_both = {r.key for r in records if r.split == "train"} & {r.key for r in records if r.split == "test"}
    if in_both:
        raise InputError(f"{root}: key {min(in_both)} is in train and in test; a key names one snippet")
    return Catalog(records, missing)


def assign_folds(
    keys: Sequence[str], targets: Sequence[int], folds: int, seed: int, groups: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Stratified folds: a pure function of the set of (key, target), the groups and the seed, whatever their order."""
    from sklearn.model_selection import StratifiedKFold  # slow to import, and only packing needs it

    if not keys:
        return {}
    order = np.argsort(np.asarray(keys))
    labels = np.asarray(targets)[order]
    rarest = int(np.bincount(labels, minlength=2)[np.unique(labels)].min())
    if not 2 <= folds <= rarest:
        raise InputError(f"--folds {folds}: the rarer class has {rarest} snippets; expected 2 to {rarest} folds")
    if groups is not None:
        return assign_group_folds(keys, targets, folds, seed, groups)
    fold_of: npt.NDArray[np.int64] = np.empty(len(keys), np.int64)
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for fold, (_, held_out) in enumerate(splitter.split(labels, labels)):
        fold_of[order[held_out]] = fold
    return {key: int(fold) for key, fold in zip(keys, fold_of, strict=True)}


def common_shape(root: Path, records: Sequence[Record], skip_bad: bool) -> tuple[int, int, int]:
    """The shape (P, T, F) of most of the first snippets: all others must have it too. Raises as `read_snippet`."""
    shapes: Counter[tuple[int, int, int]] = Counter()
    for record in records:
        try:
            shapes[read_shape(record.path)] += 1
        except InputError:
            if not skip_bad:
                raise
        # Enough for one odd snippet not to put all others in the wrong, and quick on any disk.
        if shapes.total() == _SHAPE_VOTES:
            break
    if not shapes:
        raise InputError(f"{root}: not one readable snippet among {len(records)}")
    return shapes.most_common(1)[0][0]


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
    # Cadences of one's own to score need no table: each file is one.
    return dict.fromkeys(sorted(files), UNKNOWN_TARGET)


def _to_targets(table: BinaryIO, path: str, labelled: bool) -> dict[str, int]:
    """Key to target of a CSV table with the columns id and target."""
    targets: dict[str, int] = {}
    try:
        with io.TextIOWrapper(table, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            expected = {"id", "target"} if labelled else {"id"}
            if not expected <= set(rows.fieldnames or ()):
                raise InputError(f"{path}: columns {str(rows.fieldnames)[:120]}, expected {sorted(expected)}")
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                key = row["id"] or ""
                check_key(key, where)
                if key in targets:
                    raise InputError(f"{where}: id {key} stands twice; expected each id once")
                if labelled and row["target"] not in ("0", "1"):
                    raise InputError(f"{where}: target {str(row['target'])[:40]!r} of id {key}; expected 0 or 1")
                targets[key] = int(row["target"]) if labelled else UNKNOWN_TARGET
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV table ({error})") from None
    return targets


def _find_snippets(folder: Path) -> dict[str, Path]:
    """Key to path of <folder>/<c>/<key>.npy and <folder>/<key>.npy."""
    found: dict[str, Path] = {}
    if not folder.exists():
        return found
    if not folder.is_dir():
        raise InputError(f"{folder}: a file, expected a folder of snippets")

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}; expected a readable folder")

    seen: set[Path] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = Path(parent).resolve()
        if real in seen:  # through a link that leads back up, where a walk would not end
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            if not name.endswith(".npy"):
                continue
            key, path = name.removesuffix(".npy"), Path(parent, name)
            check_key(key, str(path))
            if key in found:
                raise InputError(f"{path}: key {key} is {found[key]} too; a key names one snippet")
            if not path.is_file():  # opening a pipe waits for its writer, for ever
                raise InputError(f"{path}: not a regular file, expected a snippet")
            found[key] = path
    return found
