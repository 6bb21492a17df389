"""Stratified folds that do not split groups of snippets with a shared background, and the table of groups."""

import csv
import io
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shard_tools.atomic_files import write_whole
from shard_tools.cadence import check_key
from shard_tools.csv_table import read_table
from shard_tools.errors import InputError

COLUMNS = ("id", "group")
_MOST_UNEVEN = 0.1  # folds whose sizes differ by more than this share plus one snippet cause a warning
_log = logging.getLogger(__name__)


def assign_folds(
    keys: Sequence[str], targets: Sequence[int], folds: int, seed: int, groups: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Stratified folds: a pure function of the set of (key, target), the groups and the seed, whatever the order."""
    from sklearn.model_selection import StratifiedKFold  # slow to import, and only packing needs it

    if not keys:
        return {}
    order = np.argsort(np.asarray(keys))
    labels = np.asarray(targets)[order]
    _check_fold_count(labels, folds)
    if groups is not None:
        return assign_group_folds(keys, targets, folds, seed, groups)
    fold_of: npt.NDArray[np.int64] = np.empty(len(keys), np.int64)
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for fold, (_, held_out) in enumerate(splitter.split(labels, labels)):
        fold_of[order[held_out]] = fold
    return {key: int(fold) for key, fold in zip(keys, fold_of, strict=True)}


def _check_fold_count(labels: npt.NDArray[np.int64], folds: int) -> None:
    """Raise InputError unless every fold can hold out a snippet of each class."""
    counts = {target: int(np.count_nonzero(labels == target)) for target in np.unique(labels).tolist()}
    rarer, count = min(counts.items(), key=lambda pair: pair[1])
    if count == 1:
        raise InputError(
            f"--folds {folds}: class {rarer} has only 1 snippet, and one fold needs it for training while another "
            f"holds it out; add snippets of class {rarer}, 2 or more in all"
        )
    if folds > count:
        raise InputError(
            f"--folds {folds}: class {rarer} has only {count} snippets; choose --folds {count}, or add snippets"
        )


def write_groups(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write the table of groups, one (id, group) per row, whole or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    write_whole(path, text.getvalue())


def read_groups(path: Path) -> dict[str, str]:
    """Read a table with the columns id and group. Raises InputError on other columns and on repeated ids."""
    if not path.is_file():
        raise InputError(f"--groups {path}: no such file; `python -m shard_tools fingerprint` writes it")
    groups: dict[str, str] = {}
    with path.open("rb") as file:
        for where, row in read_table(file, str(path), COLUMNS):
            key, group = row["id"], row["group"]
            check_key(key, where)
            if key in groups:
                raise InputError(f"{where}: id {key} appears twice; expected each id once")
            if not group:
                raise InputError(f"{where}: id {key} has no group; expected a name (a unique one if it is alone)")
            groups[key] = group
    return groups


def check_groups(groups: Mapping[str, str], keys: Iterable[str], path: Path) -> None:
    """Raise InputError unless each of `keys` has a group. `groups` may hold others, such as test ids."""
    without = sorted(set(keys) - groups.keys())
    if without:
        raise InputError(
            f"--groups {path}: no group for {len(without)} of the snippets in train/, the first is {without[0]}; "
            f"run `python -m shard_tools fingerprint` on this folder again"
        )


def assign_group_folds(
    keys: Sequence[str], targets: Sequence[int], folds: int, seed: int, groups: Mapping[str, str]
) -> dict[str, int]:
    """Stratified folds, each group in one of them; a key without a group is its own group.

    A pure function of the set of (key, target), the grouping and the seed: neither order nor the groups' names matter.
    Raises InputError where a fold would lack one of the targets.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # slow to import, and only packing needs it

    order = np.argsort(np.asarray(keys))
    labels = np.asarray(targets)[order]
    number_of: dict[tuple[bool, str], int] = {}  # groups, numbered by their first key
    for place in order.tolist():
        number_of.setdefault(_name(keys[place], groups), len(number_of))
    group = np.array([number_of[_name(keys[place], groups)] for place in order.tolist()])
    if folds > len(number_of):
        raise InputError(f"--folds {folds}: only {len(number_of)} groups, each in one fold; {_advice(len(number_of))}")
    fold_of: npt.NDArray[np.int64] = np.empty(len(keys), np.int64)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for fold, (_, held_out) in enumerate(splitter.split(labels, labels, group)):
        fold_of[order[held_out]] = fold
    _check_balance(fold_of[order], labels, folds, group)
    return {key: int(fold) for key, fold in zip(keys, fold_of, strict=True)}


def _advice(groups: int) -> str:
    return f"choose --folds {groups}, or add snippets" if groups > 1 else "add snippets of other groups"


def _name(key: str, groups: Mapping[str, str]) -> tuple[bool, str]:
    """A key's group; the flag keeps a key without one apart from a group of the same name."""
    return (True, groups[key]) if key in groups else (False, key)


def _check_balance(
    fold_of: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], folds: int, group: npt.NDArray[np.int64]
) -> None:
    """Refuse folds without one of the targets, and warn of uneven ones."""
    sizes = {target: np.bincount(fold_of[labels == target], minlength=folds) for target in np.unique(labels).tolist()}
    largest = Counter(group.tolist()).most_common(1)[0][1]
    held = ", ".join(
        f"{sum(int(counts[fold]) for counts in sizes.values()):,} ({int(sizes[1][fold]) if 1 in sizes else 0:,})"
        for fold in range(folds)
    )
    found = (
        f"the folds would hold {held} snippets (with a needle); the largest group has {largest:,} of {len(labels):,}"
    )
    if any(counts.min() == 0 for counts in sizes.values()):
        raise InputError(f"--folds {folds} with --groups: a fold would lack a target: {found}; choose fewer folds")
    if any(np.ptp(counts) > 1 + _MOST_UNEVEN * counts.mean() for counts in sizes.values()):
        _log.warning("--groups: uneven folds, since each group stays in one fold: %s", found)
