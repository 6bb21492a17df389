"""Open an observation's file, whose first bytes show its format."""

from pathlib import Path

from shard_tools.atomic_files import naming
from shard_tools.errors import AbsentError, InputError
from shard_tools.observation.filterbank import FilterbankFile
from shard_tools.observation.header import Header
from shard_tools.observation.sigproc import MAGIC, SigprocFile

_HDF5 = b"\x89HDF\r\n\x1a\n"


def _read_head(path: Path) -> bytes:
    """The first bytes of a file. Raises AbsentError where there is no such file."""
    if not path.is_file():
        raise AbsentError(f"{path}: no such file; expected a file of an observation (.h5 or .fil)")
    with naming(path), path.open("rb") as file:
        return file.read(len(MAGIC))


def is_hdf5(path: Path) -> bool:
    """Whether a file is HDF5, by its first bytes. Raises InputError where there is no such file."""
    return _read_head(path).startswith(_HDF5)


def open_filterbank(path: Path, nfpc: int | None = None) -> FilterbankFile:
    """Open an FBH5 or SIGPROC file and check its header; `nfpc` overrides the fine channels per coarse channel.

    Raises InputError naming the file, OSError where it cannot be opened.
    """
    head = _read_head(path)
    if head.startswith(_HDF5):
        from shard_tools.observation.fbh5 import Fbh5File  # HDF5 is slow to load

        return Fbh5File(path, nfpc)
    if head == MAGIC:
        return SigprocFile(path, nfpc)
    raise InputError(f"{path}: begins with {head[:8]!r}, expected an FBH5 (.h5) or a SIGPROC file (.fil)")


def read_header(path: Path, nfpc: int | None = None) -> Header:
    """The checked header of one file."""
    with open_filterbank(path, nfpc) as file:
        return file.header
