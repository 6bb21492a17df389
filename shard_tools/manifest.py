"""The data set's table of contents: what the shards hold, where each sample lies, and whether it is all still there."""

import functools
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shard_tools.cadence import PANELS, check_finite, check_npy_header, npy_header
from shard_tools.catalog import SPLITS
from shard_tools.errors import InputError
from shard_tools.files import file_sha256

MANIFEST = "manifest.json"
SAMPLES = "samples.parquet"
FORMAT = "needlestream-shards"
FORMAT_VERSION = 1
TAR_BLOCK = 512

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
    table = pq.read_table(io.BytesIO(table_bytes), schema=SAMPLES_SCHEMA)
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
    return content


def _check_places(manifest: Manifest, where: Path) -> None:
    """Refuse places that point outside the shards: a reader trusts them."""
    sizes = np.array([shard.bytes for shard in manifest.shards], np.int64)
    shard_ok = (manifest.shard >= 0) & (manifest.shard < len(sizes))
    if len(manifest) == 0 or not shard_ok.all() or manifest.shape[0] != PANELS:
        raise InputError(f"{where}: no samples, or samples of unknown shards; pack again")
    array_bytes = 2 * int(np.prod(manifest.shape, dtype=object))
    ends = manifest.offset + manifest.size
    inside = (manifest.offset >= TAR_BLOCK) & (ends <= sizes[manifest.shard]) & (manifest.size > array_bytes)
    if not inside.all():
        row = int(np.argmin(inside))
        raise InputError(f"{where}: sample {manifest.key(row)} lies outside its shard; pack again")


def verify(root: Path) -> Iterator[str]:
    """Yield one line for every fault: of the manifest, of a shard's size or bytes, of an index, of a snippet."""
    try:
        manifest = read_manifest(root)
    except InputError as error:
        yield str(error)
        return
    for name, expected in manifest.files.items():
        yield from _verify_file(root / name, expected)
    for number, shard in enumerate(manifest.shards):
        faults = list(_verify_file(root / shard.name, shard.sha256, shard.bytes))
        yield from faults
        yield from _verify_file((root / shard.name).with_suffix(".idx"), shard.index_sha256)
        if not faults:
            yield from _verify_samples(manifest, number)


def _verify_file(path: Path, sha256: str, size: int | None = None) -> Iterator[str]:
    """At most one fault of one file."""
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            yield f"{path}: {found} bytes, expected {size}"
        elif file_sha256(path) != sha256:
            yield f"{path}: its bytes changed after packing (SHA-256 differs)"
    except OSError as error:
        yield f"{path}: {error.strerror}"


def _verify_samples(manifest: Manifest, number: int) -> Iterator[str]:
    """The faults of the samples of one shard whose bytes are as packed: the manifest may still point wrongly."""
    path = manifest.root / manifest.shards[number].name
    with path.open("rb") as file:
        for row in np.flatnonzero(manifest.shard == number).tolist():
            key, size = manifest.key(row), int(manifest.size[row])
            file.seek(int(manifest.offset[row]) - TAR_BLOCK)
            record = file.read(TAR_BLOCK + size)
            try:
                check_record(record, key, size, manifest.shape, f"{path}, {key}")
                array = np.frombuffer(record, "<f2")[-int(np.prod(manifest.shape)) :].reshape(manifest.shape)
                check_finite(array, f"{path}, {key}")
            except InputError as error:
                yield str(error)


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
