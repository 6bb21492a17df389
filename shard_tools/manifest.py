"""The data set's table of contents: what the shards hold and where each sample lies."""

import functools
import hashlib
import io
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shard_tools.cadence import PANELS, check_npy_header, npy_header
from shard_tools.catalog import SPLITS
from shard_tools.errors import InputError

MANIFEST = "manifest.json"
SAMPLES = "samples.parquet"
FORMAT = "needlestream-shards"
FORMAT_VERSION = 1
TAR_BLOCK = 512

_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]+\.tar\Z")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-]+\.[a-z]+\Z")
_COUNTS = ("samples", "positive", "missing", "quarantined")

SAMPLES_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "split": pa.int8(),  # an index into SPLITS
        "target": pa.int8(),  # 0, 1, or -1 where unknown
        "fold": pa.int8(),  # or -1 for test
        "shard": pa.int32(),  # an index into the manifest's shards
        "offset": pa.int64(),  # bytes from the start of the shard to the npy header
        "size": pa.int32(),  # bytes of the npy file
    }
)


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    bytes: int
    sha256: str
    index_sha256: str
    samples: int


@dataclass(frozen=True)
class Manifest:
    """A data set of shards. The columns of its samples are arrays of one length, in the order of the shards."""

    root: Path
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
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.target)

    def rows(self, split: str, fold: int | None = None, held_out: bool = False) -> npt.NDArray[np.int64]:
        """Row numbers of a split: all of it, or without `fold`, or (`held_out`) of `fold` alone."""
        mask = self.split == SPLITS.index(split)
        if fold is not None:
            mask &= (self.fold == fold) == held_out
        return np.flatnonzero(mask)

    def key(self, row: int) -> str:
        """The key of one row."""
        return str(self.keys[int(row)].as_py())

    def keys_of(self, rows: npt.NDArray[np.int64]) -> list[str]:
        """The keys of many rows."""
        return [str(key) for key in self.keys.take(pa.array(rows)).to_pylist()]


def canonical_json(content: dict[str, Any]) -> str:
    """The one text of a manifest's content, its own SHA-256 last: any other text was changed after packing."""
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


def read_manifest(root: Path) -> Manifest:
    """Read a folder of shards' table of contents and check that it agrees with itself (not with the shards).

    Raises InputError naming the file where it is absent, was changed after packing, or contradicts itself.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a folder that `python -m shard_tools pack` wrote")
    text = path.read_bytes()
    content = _check_content(path, text)
    table_bytes = (root / SAMPLES).read_bytes() if (root / SAMPLES).is_file() else b""
    if hashlib.sha256(table_bytes).hexdigest() != content["files"].get(SAMPLES):
        raise InputError(f"{root / SAMPLES}: missing or not the one that was packed with {path.name}; pack again")
    try:
        table = pq.read_table(io.BytesIO(table_bytes)).cast(SAMPLES_SCHEMA)
    except pa.ArrowException as error:
        raise InputError(f"{root / SAMPLES}: not a table of samples ({str(error)[:200]}); pack again") from None
    columns = {name: table[name].to_numpy() for name in SAMPLES_SCHEMA.names if name != "key"}
    manifest = Manifest(
        root=root,
        shape=tuple(content["shape"]),
        shards=tuple(Shard(**shard) for shard in content["shards"]),
        splits=content["splits"],
        made=content["made"],
        files=content["files"],
        identity=hashlib.sha256(text).hexdigest(),
        keys=table["key"],
        **columns,
    )
    _check_samples(manifest, root / SAMPLES)
    _check_places(manifest, root / SAMPLES)
    return manifest


def _check_content(path: Path, text: bytes) -> dict[str, Any]:
    """Parse manifest.json and check its form."""
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"no field format={FORMAT!r}")
        content.pop("~sha256")
        canonical = canonical_json(content).encode()
    except (ValueError, KeyError, RecursionError) as error:
        raise InputError(f"{path}: not a manifest ({error}); pack again") from None
    if content.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {content.get('format_version')}, expected {FORMAT_VERSION}; pack again"
        )
    if text != canonical:
        raise InputError(f"{path}: changed after packing (its SHA-256 does not match); pack again")
    if not _has_form(content):
        raise InputError(f"{path}: a field is missing, of another type, or names another folder; pack again")
    return content


def _has_form(content: dict[str, Any]) -> bool:
    """Whether a manifest's fields are there, and of the types and names that `pack` writes."""
    try:
        shards = [Shard(**shard) for shard in content["shards"]]
        names = [shard.name for shard in shards]
        numbers = [n for shard in shards for n in (shard.bytes, shard.samples)]
        numbers += [content["splits"][split][count] for split in SPLITS for count in _COUNTS]
        hashes = [digest for shard in shards for digest in (shard.sha256, shard.index_sha256)]
        return (
            all(type(length) is int and length > 0 for length in content["shape"])
            and len(content["shape"]) == 3
            and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
            and all(isinstance(digest, str) for digest in [*hashes, *content["files"].values()])
            # Joined to the folder's path when they are opened: they must not lead out of it.
            and all(_SHARD_NAME.match(name) for name in names)
            and all(_FILE_NAME.match(name) for name in content["files"])
            and len(set(names)) == len(names)
            and isinstance(content["made"], dict)
        )
    except (KeyError, TypeError, AttributeError):
        return False


def _check_samples(manifest: Manifest, where: Path) -> None:
    """Refuse columns that contradict each other or the manifest's counts."""
    nulls = any(getattr(manifest, name).dtype.kind != "i" for name in SAMPLES_SCHEMA.names if name != "key")
    if nulls or manifest.keys.null_count:
        raise InputError(f"{where}: empty cells; pack again")
    keys = pc.match_substring_regex(manifest.keys, r"\A[A-Za-z0-9_-]{1,96}\z")
    if not pc.all(keys).as_py() or pc.count_distinct(manifest.keys).as_py() != len(manifest):
        raise InputError(f"{where}: unsafe or repeated keys; pack again")
    for number, split in enumerate(SPLITS):
        target = manifest.target[manifest.split == number]
        expected = manifest.splits[split]
        found = (len(target), int((target == 1).sum()))
        if found != (expected["samples"], expected["positive"]):
            raise InputError(
                f"{where}: {split} has {found} samples and positives, {MANIFEST} says {expected}; pack again"
            )


def _check_places(manifest: Manifest, where: Path) -> None:
    """Refuse places that point outside the shards: a reader trusts them."""
    sizes = np.array([shard.bytes for shard in manifest.shards], np.int64)
    shard_ok = (manifest.shard >= 0) & (manifest.shard < len(sizes))
    if len(manifest) == 0 or not shard_ok.all() or manifest.shape[0] != PANELS:
        raise InputError(f"{where}: no samples, or samples of unknown shards; pack again")
    array_bytes = 2 * int(np.prod(manifest.shape, dtype=object))
    # By subtraction: a sum of an enormous offset and a size wraps round.
    room = sizes[manifest.shard] - manifest.offset
    inside = (manifest.offset >= TAR_BLOCK) & (manifest.size <= room) & (manifest.size > array_bytes)
    if not inside.all():
        row = int(np.argmin(inside))
        raise InputError(f"{where}: sample {manifest.key(row)} lies outside its shard; pack again")


def check_record(record: bytes | memoryview, key: str, size: int, shape: tuple[int, int, int], where: str) -> None:
    """Check one sample as it lies in a shard: a tar header block of `key`.npy, then `size` bytes of npy.

    Raises InputError where the member's name, its size, the npy header or the shape is another.
    """
    name = f"{key}.npy".encode().ljust(100, b"\0")  # the name field of a USTAR header
    if len(record) != TAR_BLOCK + size:
        raise InputError(f"{where}: {max(len(record) - TAR_BLOCK, 0)} bytes, expected {size}; pack again")
    if bytes(record[: len(name)]) != name:
        raise InputError(f"{where}: another sample lies there; the shard changed after packing: pack again")
    expected = _header_of(shape)
    head = record[TAR_BLOCK : TAR_BLOCK + len(expected)]
    if bytes(head) == expected and size == len(expected) + 2 * int(np.prod(shape)):
        return  # the header NumPy writes, as nearly every file has it
    header_bytes, found = check_npy_header(record[TAR_BLOCK:], where)
    if found != shape or size != header_bytes + 2 * int(np.prod(shape)):
        raise InputError(f"{where}: shape {found} in {size} bytes, expected {shape}; pack again")


@functools.lru_cache(maxsize=8)
def _header_of(shape: tuple[int, int, int]) -> bytes:
    return npy_header(shape)
