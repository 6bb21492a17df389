"""The data set's table of contents: what the shards hold and where each sample lies."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shard_tools.cadence import PANELS
from shard_tools.errors import InputError
from shard_tools.kaggle_layout import SPLITS
from shard_tools.sample_table import SAMPLES, SAMPLES_SCHEMA, Columns, empty_columns, has_repeats, read_columns
from shard_tools.storage import open_store
from shard_tools.storage.base import Store, StoreConfig, read_array, read_file

MANIFEST = "manifest.json"
FORMAT = "needlestream-shards"
FORMAT_VERSION = 1
TAR_BLOCK = 512
COLUMNS = tuple(SAMPLES_SCHEMA.names[1:])
"""The columns that are NumPy arrays: all but the keys."""
Int64s = npt.NDArray[np.int64]

# Rows that are checked at a time: few enough to stay in the processor's cache.
_ROWS = 1 << 15

_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]+\.tar\Z")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-]+\.[a-z]+\Z")
_COUNTS = ("samples", "positive", "missing", "quarantined")


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    bytes: int
    sha256: str
    index_sha256: str
    samples: int


@dataclass(frozen=True)
class DataSet:
    """One of the data sets whose rows a manifest holds."""

    store: Store
    files: dict[str, str]
    """SHA-256 of its files other than the shards, by name."""
    identity: str
    """SHA-256 of its manifest.json."""
    rows: range
    """Its rows of the manifest."""
    made: dict[str, Any]
    """How it was made."""


@dataclass(frozen=True)
class Manifest:
    """A data set of shards, or several joined. The columns have one value per sample, in the order of the shards.

    Where several were joined (`joined_manifest.read_manifests`), the names of shards and files begin with the number of
    their data set, because names may repeat.
    """

    store: Store
    shape: tuple[int, int, int]
    shards: tuple[Shard, ...]
    splits: dict[str, dict[str, int]]
    """Per split the numbers of samples, positive, missing and quarantined."""
    made: dict[str, Any]
    files: dict[str, str]
    """SHA-256 of the other files of the data set, by name."""
    identity: str
    """SHA-256 of the whole table of contents: equal only for equal data sets."""
    keys: pa.ChunkedArray
    split: npt.NDArray[np.int8]
    target: npt.NDArray[np.int8]
    fold: npt.NDArray[np.int8]
    shard: npt.NDArray[np.int32]
    """The number of each sample's shard."""
    offset: Int64s
    """Bytes from the start of the shard to the npy header of each sample."""
    size: npt.NDArray[np.int32]
    """Bytes of each sample's npy file."""
    parts: tuple[DataSet, ...] = ()
    """Where several data sets were joined, each of them."""

    @property
    def data_sets(self) -> tuple[DataSet, ...]:
        """The data sets whose rows these are, in order; one, unless several were joined."""
        return self.parts or (DataSet(self.store, self.files, self.identity, range(len(self)), self.made),)

    @property
    def root(self) -> Any:
        """The folder (a Path), or the URL (a str); of several data sets all of them, as text."""
        return self.store.root

    def __len__(self) -> int:
        return len(self.target)

    @property
    def time_bin(self) -> int:
        """How many time bins were summed into one while packing."""
        return int(self.made.get("time_bin", 1))

    def rows(self, split: str, fold: int | None = None, held_out: bool = False) -> Int64s:
        """Row numbers of a split: all; all but those of `fold`; or with `held_out` only those of `fold`."""
        chosen = self.split == SPLITS.index(split)
        return np.flatnonzero(chosen if fold is None else chosen & ((self.fold == fold) == held_out))

    def targets(self, rows: Int64s) -> npt.NDArray[np.int8]:
        """The targets of many rows; -1 where unknown."""
        return self.target[rows]

    def key(self, row: int) -> str:
        """The key of one row."""
        return str(self.keys[int(row)].as_py())

    def keys_of(self, rows: Int64s) -> list[str]:
        """The keys of many rows."""
        return [str(key) for key in self.keys.take(pa.array(rows)).to_pylist()]


def canonical_json(content: dict[str, Any]) -> str:
    """The canonical text of a manifest, ending with its own SHA-256: any other text was changed after packing."""
    body = json.dumps(content, indent=1, sort_keys=True)
    return body.removesuffix("\n}") + f',\n "~sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def manifest_content(
    shape: tuple[int, ...],
    shards: list[Shard],
    splits: dict[str, dict[str, int]],
    made: dict[str, Any],
    files: dict[str, str],
) -> dict[str, Any]:
    """What manifest.json holds."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "shape": list(shape),
        "dtype": "float16",
        "shards": [asdict(shard) for shard in shards],
        "splits": splits,
        "made": made,
        "files": files,
    }


@dataclass(frozen=True)
class Contents:
    """What manifest.json of one data set says, checked; its samples are not read yet."""

    store: Store
    fields: dict[str, Any]
    """`manifest_content`, with the shards as Shard."""
    identity: str

    @property
    def samples(self) -> int:
        """How many samples the shards hold."""
        return sum(shard.samples for shard in self.fields["shards"])


def read_manifest(root: Path | str, config: StoreConfig = StoreConfig()) -> Manifest:  # noqa: B008 (immutable)
    """Read a data set's table of contents and check that it agrees with itself (not with the shards).

    `root` is a folder or a URL. Raises InputError naming the file where it is absent, was changed after packing, or
    contradicts itself.
    """
    contents = read_contents(root, config)
    return read_samples(contents, allocate_columns([contents]))


def read_contents(root: Path | str, config: StoreConfig) -> Contents:
    """Read and check manifest.json, the first step of `read_manifest`."""
    store = open_store(root, config)
    path = store.where(MANIFEST)
    text = read_file(store, MANIFEST)
    if text is None:
        raise InputError(f"{path}: no such file; expected a folder that `python -m shard_tools pack` wrote")
    return Contents(store, _check_content(path, text), hashlib.sha256(text).hexdigest())


def allocate_columns(data_sets: Sequence[Contents]) -> Columns:
    """Arrays for the samples of all of them; raises InputError where they cannot be held."""
    samples = sum(each.samples for each in data_sets)
    try:
        return empty_columns(samples)
    except (MemoryError, ValueError):
        where = " and ".join(each.store.where(MANIFEST) for each in data_sets)
        raise InputError(f"{where}: {samples} samples, more than fit into memory; pack again") from None


def read_samples(contents: Contents, columns: Columns) -> Manifest:
    """Read and check samples.parquet into `columns`, as `read_manifest` does after manifest.json."""
    store, fields = contents.store, contents.fields
    where = store.where(SAMPLES)
    keys = read_columns(read_array(store, SAMPLES), where, fields, columns)
    of_all: dict[str, Any] = {name: fields[name] for name in ("shards", "splits", "made", "files")}
    of_rows: dict[str, Any] = {"keys": keys, **columns}
    manifest = Manifest(store, tuple(fields["shape"]), identity=contents.identity, **of_all, **of_rows)
    _check_samples(manifest, where)
    _check_extents(manifest, where)
    store.identify(manifest.identity)
    return manifest


def _check_content(path: str, text: bytes) -> dict[str, Any]:
    """Parse manifest.json, its shards as Shard, and check its form."""
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"no field format={FORMAT!r}")
        stated = content.pop("~sha256")
    except (ValueError, KeyError, RecursionError) as error:
        raise InputError(f"{path}: not a manifest ({error}); pack again") from None
    if content.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {content.get('format_version')}, expected {FORMAT_VERSION}; pack again"
        )
    # The digest is cut off as text: serialising a large manifest again takes longer than everything else.
    body = text.removesuffix(f',\n "~sha256": "{stated}"\n}}\n'.encode()) + b"\n}"
    if len(body) >= len(text) or hashlib.sha256(body).hexdigest() != stated:
        raise InputError(f"{path}: changed after packing (its SHA-256 does not match); pack again")
    if not _has_form(content):
        raise InputError(f"{path}: a field is missing, of another type, or names another folder; pack again")
    return content


def _has_form(content: dict[str, Any]) -> bool:
    """Whether a manifest's fields are there, and of the types and names that `pack` writes."""
    try:
        content["shards"] = shards = tuple(Shard(**shard) for shard in content["shards"])
        names = [shard.name for shard in shards]
        numbers = [n for shard in shards for n in (shard.bytes, shard.samples)]
        numbers += [content["splits"][split][count] for split in SPLITS for count in _COUNTS]
        hashes = [digest for shard in shards for digest in (shard.sha256, shard.index_sha256)]
        return (
            all(type(length) is int and length > 0 for length in content["shape"])
            and len(content["shape"]) == 3
            and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
            and all(isinstance(digest, str) for digest in [*hashes, *content["files"].values()])
            # Names are joined to the folder's path: they must not lead out of it.
            and all(_SHARD_NAME.match(name) for name in names)
            and all(_FILE_NAME.match(name) for name in content["files"])
            and len(set(names)) == len(names)
            and type(content["made"]["folds"]) is int
        )
    except (KeyError, TypeError, AttributeError):
        return False


def has_repeated_keys(manifest: Manifest) -> bool:
    """Whether any key appears twice in the table, in one split or in both."""
    return has_repeats(manifest.keys)


def _check_samples(manifest: Manifest, where: str) -> None:
    """Refuse columns that contradict each other or the manifest's counts."""
    target = manifest.target
    if target.min() < -1 or target.max() > 1 or manifest.fold.min() < -1:
        raise InputError(f"{where}: targets or folds out of range (targets -1 to 1, folds from -1); pack again")
    for number, name in enumerate(SPLITS):
        in_split = manifest.split == number
        found = int(in_split.sum()), int((in_split & (target == 1)).sum())
        expected = manifest.splits[name]
        if found != (expected["samples"], expected["positive"]):
            raise InputError(
                f"{where}: {name} has {found} samples and positives, {MANIFEST} says {expected}; pack again"
            )


def _check_extents(manifest: Manifest, where: str) -> None:
    """Refuse samples that lie outside the shards: readers trust them."""
    if manifest.shape[0] != PANELS:
        raise InputError(f"{where}: snippets of {manifest.shape[0]} panels, expected {PANELS}; pack again")
    sizes = np.array([shard.bytes for shard in manifest.shards], np.int64)
    if manifest.shard.min() < 0 or manifest.shard.max() >= len(sizes):
        raise InputError(f"{where}: samples of unknown shards; pack again")
    array_bytes = 2 * math.prod(manifest.shape)
    for start in range(0, len(manifest), _ROWS):
        rows = slice(start, start + _ROWS)
        offset, size = manifest.offset[rows], manifest.size[rows]
        # By subtraction: adding the size to an enormous offset would overflow.
        left = sizes[manifest.shard[rows]] - offset
        inside = (offset >= TAR_BLOCK) & (size <= left) & (size > array_bytes)
        if not inside.all():
            raise InputError(f"{where}: sample {start + int(np.argmin(inside))} lies outside its shard; pack again")
