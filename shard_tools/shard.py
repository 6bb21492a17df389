"""One shard: a USTAR tar of snippets and labels, and its index in DALI's format."""

import hashlib
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shard_tools.cadence import check_finite, npy_header, read_snippet, time_binned
from shard_tools.catalog import UNKNOWN_TARGET, Record
from shard_tools.errors import InputError
from shard_tools.files import whole_file, write_whole
from shard_tools.manifest import TAR_BLOCK, Shard


@dataclass(frozen=True)
class PackedShard:
    """What a finished shard holds; kept as a note until the whole pack is done."""

    shard: Shard
    places: list[list[Any]]
    """[key, offset, size] of every sample."""
    quarantined: list[list[str]]
    """[key, split, reason] of every snippet left out."""


def write_shard(
    records: Sequence[Record], path: Path, shape: tuple[int, ...], time_bin: int, quarantine: bool
) -> PackedShard:
    """Write `path` and its index, each whole or not at all.

    `shape` is (P, T, F) after summing `time_bin` time bins. A snippet that breaks the contract is left out where
    `quarantine` is set, else its InputError is raised.
    """
    places: list[list[Any]] = []
    quarantined: list[list[str]] = []
    index_lines: list[str] = []
    with whole_file(path) as temporary, temporary.open("wb") as file:
        writer = TarWriter(file)
        for record in records:
            try:
                data = _snippet_bytes(record, time_bin, shape)
            except InputError as error:
                if not quarantine:
                    raise
                # Without the path, so that the same input packs to the same bytes from another place.
                quarantined.append([record.key, record.split, str(error).removeprefix(f"{record.path}: ")])
                continue
            offset = writer.add(f"{record.key}.npy", data)
            places.append([record.key, offset, len(data)])
            line = f"npy {offset} {len(data)} {record.key}.npy"
            if record.target != UNKNOWN_TARGET:
                label = str(record.target).encode()
                line += f" cls {writer.add(f'{record.key}.cls', label)} {len(label)} {record.key}.cls"
            index_lines.append(line)
        size = writer.close()
    # DALI's own index format, so that its readers.webdataset takes the shards too.
    index = "\n".join([f"v1.2 {len(index_lines)}", *index_lines]) + "\n"
    write_whole(path.with_suffix(".idx"), index)
    index_sha256 = hashlib.sha256(index.encode()).hexdigest()
    return PackedShard(Shard(path.name, size, writer.sha256, index_sha256, len(places)), places, quarantined)


class TarWriter:
    """A USTAR archive whose members' offsets and SHA-256 are known while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self._position = file, hashlib.sha256(), 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member, time 0 and no owner so that equal inputs give equal bytes; return its data's offset."""
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
        """Of everything written so far, in hex."""
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._position += len(data)


def _snippet_bytes(record: Record, time_bin: int, shape: tuple[int, ...]) -> bytes:
    """The checked bytes of one npy member."""
    data, snippet = read_snippet(record.path)
    panels, time_bins, channels = shape
    if snippet.shape != (panels, time_bins * time_bin, channels):
        expected = (panels, time_bins * time_bin, channels)
        raise InputError(f"{record.path}: shape {snippet.shape}, expected {expected} like the others")
    if time_bin == 1:
        return data
    binned = time_binned(snippet, time_bin)
    check_finite(binned, f"{record.path}: the sum of {time_bin} time bins goes beyond float16")
    return npy_header(shape) + binned.tobytes()


def padded(size: int) -> int:
    """`size` bytes rounded up to whole tar blocks."""
    return -(-size // TAR_BLOCK) * TAR_BLOCK
