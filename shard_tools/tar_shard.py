"""One shard: a USTAR tar of snippets and labels, and its index in DALI's format."""

import hashlib
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from shard_tools.atomic_files import whole_file, write_whole
from shard_tools.cadence import check_finite, npy_header, read_snippet, time_binned
from shard_tools.conversions import Conversions
from shard_tools.errors import InputError
from shard_tools.kaggle_layout import UNKNOWN_TARGET, Record
from shard_tools.manifest import TAR_BLOCK, Shard


@dataclass(frozen=True)
class ShardPlan:
    """Which records one shard holds."""

    name: str
    records: Sequence[Record]


@dataclass(frozen=True)
class Making:
    """How source files are converted to tar members."""

    shape: tuple[int, ...]
    """(P, T, F), after summing time bins."""
    time_bin: int
    """Number of neighbouring time bins to sum."""
    cast: bool
    """Whether other types are rounded to float16."""
    quarantine: bool
    """Whether an invalid snippet is left out; otherwise it is an error."""


@dataclass(frozen=True)
class PackedShard:
    """What a finished shard holds; kept as a note until the whole pack is done."""

    shard: Shard
    members: list[list[Any]]
    """[key, offset, size] of every sample."""
    quarantined: list[list[str]]
    """[key, split, reason] of every snippet left out."""
    conversions: Conversions = field(default_factory=Conversions)
    about: dict[str, Any] = field(default_factory=dict)
    """Anything else known about its samples, in types that JSON preserves."""


class SnippetTar:
    """A shard's tar while it is written, with where its samples lie and the lines of its index."""

    def __init__(self, file: BinaryIO) -> None:
        self._writer = TarWriter(file)
        self.members: list[list[Any]] = []
        """[key, offset, size] of every sample."""
        self._index_lines: list[str] = []

    def add(self, key: str, data: bytes, target: int = UNKNOWN_TARGET) -> None:
        """Append a sample: its npy file, and its label where it is known."""
        offset = self._writer.add(f"{key}.npy", data)
        self.members.append([key, offset, len(data)])
        line = f"npy {offset} {len(data)} {key}.npy"
        if target != UNKNOWN_TARGET:
            label = str(target).encode()
            line += f" cls {self._writer.add(f'{key}.cls', label)} {len(label)} {key}.cls"
        self._index_lines.append(line)

    def close(self, name: str) -> tuple[Shard, str]:
        """End the tar; return the shard `name`, and the text of its index."""
        size = self._writer.close()
        # DALI's own index format, so that its readers.webdataset takes the shards too.
        index = "\n".join([f"v1.2 {len(self._index_lines)}", *self._index_lines]) + "\n"
        index_sha256 = hashlib.sha256(index.encode()).hexdigest()
        return Shard(name, size, self._writer.sha256, index_sha256, len(self.members)), index


def write_members(
    members: Iterable[tuple[str, bytes] | tuple[str, bytes, int]], path: Path, about: dict[str, Any]
) -> PackedShard:
    """Write `path` and its index, each whole or not at all, from keys, npy files and any known targets.

    `about` becomes part of the result; the iterable of members may fill it until its end.
    """
    with whole_file(path) as temporary, temporary.open("wb") as file:
        tar = SnippetTar(file)
        for member in members:
            tar.add(*member)
        shard, index = tar.close(path.name)
    write_whole(path.with_suffix(".idx"), index)
    return PackedShard(shard, tar.members, [], about=about)


def write_shard(records: Sequence[Record], path: Path, making: Making) -> PackedShard:
    """Write `path` and its index, each whole or not at all.

    An invalid snippet is left out if `making.quarantine` is set; otherwise its InputError is raised.
    """
    with whole_file(path) as temporary, temporary.open("wb") as file:
        packed, index = _fill(records, file, path.name, making)
    write_whole(path.with_suffix(".idx"), index)
    return packed


def hash_shard(records: Sequence[Record], name: str, making: Making) -> PackedShard:
    """What `write_shard` would return, without writing anything."""
    with Path(os.devnull).open("wb") as nowhere:
        return _fill(records, nowhere, name, making)[0]


def _fill(records: Sequence[Record], file: BinaryIO, name: str, making: Making) -> tuple[PackedShard, str]:
    """Write a tar of the records; return what it holds, and the text of its index."""
    quarantined: list[list[str]] = []
    conversions = Conversions()
    tar = SnippetTar(file)
    for record in records:
        try:
            data = member_bytes(record, making, conversions)
        except InputError as error:
            if not making.quarantine:
                raise
            # Without the path, so that the same input packs to the same bytes wherever it lies.
            quarantined.append([record.key, record.split, str(error).removeprefix(f"{record.path}: ")])
            continue
        tar.add(record.key, data, record.target)
    shard, index = tar.close(name)
    return PackedShard(shard, tar.members, quarantined, conversions), index


class TarWriter:
    """A USTAR archive whose members' offsets and SHA-256 are known while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._position = file, hashlib.sha256(), 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member, with time 0 and no owner: equal inputs give equal bytes. Return its data's offset."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self._position
        self._write(data)
        self._write(bytes(padded(len(data)) - len(data)))
        return offset

    def close(self) -> int:
        """End the archive with its two empty blocks; return its size in bytes."""
        self._write(bytes(2 * TAR_BLOCK))
        return self._position

    @property
    def sha256(self) -> str:
        """SHA-256 of everything written so far, in hex."""
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._position += len(data)


def member_bytes(record: Record, making: Making, conversions: Conversions) -> bytes:
    """The checked bytes of one npy member; conversions are counted in `conversions`."""
    snippet = read_snippet(record.path, making.cast)
    panels, time_bins, channels = making.shape
    expected = (panels, time_bins * making.time_bin, channels)
    if snippet.values.shape != expected:
        raise InputError(f"{record.path}: shape {snippet.values.shape}, expected {expected} like the others")
    if making.time_bin == 1:
        data = snippet.data
    else:
        binned = time_binned(snippet.values, making.time_bin)
        check_finite(binned, f"{record.path}: the sum of {making.time_bin} time bins goes beyond float16")
        data = npy_header(making.shape) + binned.tobytes()
    conversions.add(snippet)
    return data


def padded(size: int) -> int:
    """`size` bytes rounded up to whole tar blocks."""
    return -(-size // TAR_BLOCK) * TAR_BLOCK
