"""Several data sets read as one: the rows of the first, then those of the second, and so on."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from shard_tools.errors import InputError
from shard_tools.key_digests import (
    UInt64s,
    ascending_runs,
    find_repeated,
    indices_of,
    leading_words,
    rows_with,
    sorted_digests,
    take,
    tell_apart,
)
from shard_tools.manifest import (
    Contents,
    DataSet,
    Manifest,
    Shard,
    allocate_columns,
    read_contents,
    read_manifest,
    read_samples,
)
from shard_tools.sample_table import Columns
from shard_tools.storage.base import StoreConfig
from shard_tools.storage.joined import JoinedStore, joined_name
from shard_tools.system.cores import rank_cores

# Each table's file is in memory while it is decoded: 200 MB for 10 million samples.
_TABLES_AT_ONCE = 2


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
        data_sets = list(pool.map(lambda root: read_contents(root, config), roots))
        columns = allocate_columns(data_sets)
        ends = list(itertools.accumulate(each.samples for each in data_sets))
        # Each data set decodes its rows into their final place, so that no column is held or copied twice.
        rows = [slice(end - each.samples, end) for each, end in zip(data_sets, ends, strict=True)]
        parts = [{name: column[each] for name, column in columns.items()} for each in rows]
        opened = list(pool.map(_open_part, range(len(roots)), data_sets, parts))
    return _join(opened, columns)


@dataclass(frozen=True)
class _Part:
    """One of the data sets, with what joining needs from it."""

    manifest: Manifest
    shards: list[Shard]
    """Its shards as the joined store names them."""


def _open_part(number: int, contents: Contents, columns: Columns) -> _Part:
    manifest = read_samples(contents, columns)
    shards = [replace(shard, name=joined_name(number, shard.name)) for shard in manifest.shards]
    return _Part(manifest, shards)


def _join(opened: Sequence[_Part], columns: Columns) -> Manifest:
    """One manifest of all rows, which lie in `columns`; renumbers their shards in place."""
    manifests = [part.manifest for part in opened]
    _check_alike(manifests)
    data_sets = tuple(_to_data_sets(manifests))
    _check_keys_differ(manifests)
    identities = "\n".join(each.identity for each in manifests)
    first_shard = [0, *itertools.accumulate(len(each.shards) for each in manifests)]
    for first, each in zip(first_shard, manifests, strict=False):
        each.shard[:] += first
    return Manifest(
        store=JoinedStore([each.store for each in manifests]),
        shape=manifests[0].shape,
        shards=tuple(shard for part in opened for shard in part.shards),
        splits=_add_up([each.splits for each in manifests]),
        made={name: value for name, value in manifests[0].made.items() if _all_have(manifests, name, value)},
        files={
            joined_name(number, name): digest
            for number, each in enumerate(manifests)
            for name, digest in each.files.items()
        },
        # It tells a joined run from a run on one data set, and from one on the same data sets in another order.
        identity=hashlib.sha256(f"joined\n{identities}".encode()).hexdigest(),
        keys=pa.chunked_array([chunk for each in manifests for chunk in each.keys.chunks]),
        parts=data_sets,
        **columns,
    )


def _check_alike(manifests: Sequence[Manifest]) -> None:
    """Raise InputError where two data sets cannot feed one model, or cannot be split in the same folds."""
    first = manifests[0]
    for other in manifests[1:]:
        for what, remedy, here, there in (
            ("snippets of shape", "pack them to one shape", first.shape, other.shape),
            ("time bins summed by", "pack both with the same --time-bin", first.time_bin, other.time_bin),
            ("folds:", "pack both with the same --folds", first.made["folds"], other.made["folds"]),
        ):
            if here != there:
                raise InputError(
                    f"{first.root} and {other.root}: {what} {here} and {there}, expected the same in all data sets; "
                    f"{remedy}, or use one of the two alone"
                )


def _to_data_sets(manifests: Iterable[Manifest]) -> Iterator[DataSet]:
    start = 0
    for each in manifests:
        yield DataSet(each.store, each.files, each.identity, range(start, start + len(each)), each.made)
        start += len(each)


def _check_keys_differ(manifests: Sequence[Manifest]) -> None:
    """Raise InputError naming a key that two data sets hold, in any split."""
    holder: dict[str, Manifest] = {}
    with ThreadPoolExecutor(rank_cores(), thread_name_prefix="keys") as pool:
        suspects = _keys_to_compare(manifests, pool)
        repeated = find_repeated(list(pool.map(sorted_digests, suspects)), pool)
    for each, keys in zip(manifests, suspects, strict=True):
        # Two keys with equal digests are nearly always the same key.
        for key in take(keys, rows_with(keys, repeated)).to_pylist():
            other = holder.setdefault(key, each)
            if other is not each:  # a key in both splits of one data set is left to `verify`
                raise InputError(
                    f"{key}: is in {other.root} and in {each.root}, expected in one data set only; leave one of the "
                    "two out, or pack one again without it"
                )


def _keys_to_compare(manifests: Sequence[Manifest], pool: Executor) -> list[pa.ChunkedArray]:
    """For each data set, the keys that have the same eight bytes as another key, after what all keys begin with.

    All keys, where these bytes tell few keys apart or a table is not sorted.
    """
    ends = [each.key(row).encode() for each in manifests for row in (0, len(each) - 1)]
    skip = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*ends, strict=False)))
    words = list(pool.map(lambda each: leading_words(each.keys, skip), manifests))
    if not all(pool.map(tell_apart, words)):
        return [each.keys for each in manifests]
    repeated = find_repeated(list(itertools.chain.from_iterable(map(ascending_runs, words))), pool)

    def suspects(manifest: Manifest, own: UInt64s) -> pa.ChunkedArray:
        rows = indices_of(own, repeated)
        return take(manifest.keys, rows) if 2 * len(rows) < len(own) else manifest.keys

    return list(pool.map(suspects, manifests, words))


def _add_up(splits: Sequence[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    return {
        split: {count: sum(each[split][count] for each in splits) for count in counts}
        for split, counts in splits[0].items()
    }


def _all_have(manifests: Iterable[Manifest], name: str, value: object) -> bool:
    return all(each.made.get(name) == value for each in manifests)
