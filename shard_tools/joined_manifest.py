"""Several data sets read as one: the rows of the first, then those of the second, and so on."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shard_tools.cores import rank_cores
from shard_tools.errors import InputError
from shard_tools.key_digests import UInt64s, fill_digests, find_repeated, rows_with
from shard_tools.manifest import COLUMNS, DataSet, Manifest, read_manifest
from shard_tools.storage.base import StoreConfig
from shard_tools.storage.joined import JoinedStore, joined_name

# Each table's file is in memory while it is decoded: 200 MB for 10 million samples.
_TABLES_AT_ONCE = 4


def read_manifests(
    shards: str | Path | Sequence[str | Path],
    config: StoreConfig = StoreConfig(),  # noqa: B008 (immutable)
) -> Manifest:
    """Read one data set, or several as one, each from a folder or a URL.

    One data set gives what `read_manifest` gives. The rows of several follow each other in the order of `shards`, and
    each row keeps its fold. Raises InputError as `read_manifest` does, and where data sets differ in shape, number of
    folds or summed time bins, or share a key.
    """
    roots = [shards] if isinstance(shards, str | Path) else list(shards)
    if not roots:
        raise InputError("--shards: expected at least one folder or URL")
    if len(roots) == 1:
        return read_manifest(roots[0], config)
    with ThreadPoolExecutor(_TABLES_AT_ONCE, thread_name_prefix="manifest") as pool:
        manifests = list(pool.map(lambda root: read_manifest(root, config), roots))
    return join_manifests(manifests)


def join_manifests(manifests: list[Manifest]) -> Manifest:
    """One manifest over the rows of several, in their order. Empties `manifests`, so that no column is held twice.

    Raises InputError where they differ in shape, number of folds or summed time bins, or share a key.
    """
    _check_alike(manifests)
    data_sets = tuple(_to_data_sets(manifests))
    _check_keys_differ(manifests)
    first_shard = [0, *itertools.accumulate(len(each.shards) for each in manifests)]
    shards = tuple(
        replace(shard, name=joined_name(number, shard.name))
        for number, each in enumerate(manifests)
        for shard in each.shards
    )
    identities = "\n".join(each.identity for each in manifests)
    about: dict[str, Any] = {
        "store": JoinedStore([each.store for each in manifests]),
        "shape": manifests[0].shape,
        "shards": shards,
        "splits": _add_up([each.splits for each in manifests]),
        "made": {name: value for name, value in manifests[0].made.items() if _all_have(manifests, name, value)},
        "files": {
            joined_name(number, name): digest
            for number, each in enumerate(manifests)
            for name, digest in each.files.items()
        },
        # A joined run differs from a run on one data set, and from one on the same data sets in another order.
        "identity": hashlib.sha256(f"joined\n{identities}".encode()).hexdigest(),
        "keys": pa.chunked_array([chunk for each in manifests for chunk in each.keys.chunks]),
        "parts": data_sets,
    }
    columns = [{name: getattr(each, name) for name in COLUMNS} for each in manifests]
    manifests.clear()
    return Manifest(**about, **_join_columns(columns, first_shard))


def _join_columns(columns: Sequence[dict[str, Any]], first_shard: Sequence[int]) -> dict[str, Any]:
    """Concatenate each column; the pieces are freed column by column."""
    joined: dict[str, Any] = {}
    for name in COLUMNS:
        pieces = [each.pop(name) for each in columns]
        joined[name] = np.concatenate(pieces)
        if name == "shard":
            start = 0
            for first, piece in zip(first_shard, pieces, strict=False):
                joined[name][start : start + len(piece)] += first
                start += len(piece)
    return joined


def _check_alike(manifests: Sequence[Manifest]) -> None:
    """Raise InputError where two data sets cannot feed one model, or cannot be split in the same folds."""
    first = manifests[0]
    for other in manifests[1:]:
        for what, remedy, here, there in (
            ("snippets of shape", "pack them to one shape", first.shape, other.shape),
            ("time bins summed by", "pack both with the same --time-bin", *map(_time_bin, (first, other))),
            ("folds:", "pack both with the same --folds", first.made["folds"], other.made["folds"]),
        ):
            if here != there:
                raise InputError(
                    f"{first.root} and {other.root}: {what} {here} and {there}, expected the same in all data sets; "
                    f"{remedy}, or use one of the two alone"
                )


def _time_bin(manifest: Manifest) -> int:
    return int(manifest.made.get("time_bin", 1))


def _to_data_sets(manifests: Iterable[Manifest]) -> Iterator[DataSet]:
    start = 0
    for each in manifests:
        yield DataSet(each.store, each.files, each.identity, range(start, start + len(each)))
        start += len(each)


def _check_keys_differ(manifests: Sequence[Manifest]) -> None:
    """Raise InputError naming a key that two data sets hold, in whichever split."""
    repeated = _find_repeated(manifests)
    if not len(repeated):
        return
    holder: dict[str, Manifest] = {}
    for each in manifests:
        for key in each.keys_of(rows_with(each.keys, repeated)):
            other = holder.setdefault(key, each)
            if other is not each:  # a key in both splits of one data set is left to `verify`
                raise InputError(
                    f"{key}: is in {other.root} and in {each.root}, expected in one data set only; leave one of the "
                    "two out, or pack one again without it"
                )


def _find_repeated(manifests: Sequence[Manifest]) -> UInt64s:
    """Digests of keys that occur more than once in all data sets; rarely also of others, by collision."""
    ends = list(itertools.accumulate(len(each) for each in manifests))
    digests = np.empty(ends[-1], np.uint64)

    def fill(place: tuple[Manifest, int]) -> None:
        manifest, end = place
        part = digests[end - len(manifest) : end]
        fill_digests(manifest.keys, part)
        part.sort()

    with ThreadPoolExecutor(rank_cores(), thread_name_prefix="digests") as pool:
        list(pool.map(fill, zip(manifests, ends, strict=True)))
    return find_repeated(digests)


def _add_up(splits: Sequence[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    return {
        split: {count: sum(each[split][count] for each in splits) for count in counts}
        for split, counts in splits[0].items()
    }


def _all_have(manifests: Iterable[Manifest], name: str, value: object) -> bool:
    return all(each.made.get(name) == value for each in manifests)
