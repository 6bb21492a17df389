"""Reader of FBH5 files: HDF5 with one data set `data` of spectra (T, feed, channel), and the header as its attributes.

Importing this module loads HDF5, which takes a while; `opening.open_filterbank` does so only for such a file.
"""

import math
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  (registers bitshuffle and the other filters)
import numpy as np
import numpy.typing as npt

from shard_tools.errors import InputError
from shard_tools.observation.filterbank import DTYPES, FilterbankFile
from shard_tools.observation.header import Layout, build_header

# What HDF5 raises on damaged files.
_DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, UnicodeError, OverflowError)


class Fbh5File(FilterbankFile):
    """An open FBH5 file."""

    def __init__(self, path: Path, nfpc: int | None) -> None:
        """Read and check the header. Raises InputError where the file is not a filterbank, damaged or cut short."""
        try:
            self._file = h5py.File(path, "r", locking="best-effort")
        except _DAMAGE as error:
            raise _damaged(path, error) from None
        try:
            self._data = self._open_data(path)
            fields = {name: _plain(value) for name, value in self._data.attrs.items()}
            spectra, feeds, channels = map(int, self._data.shape)
            layout = Layout(spectra, feeds, channels, self._data.dtype.name)
            _check_stored(path, self._data)
            self.header = build_header(path, fields, layout, nfpc)
            self.chunk_channels = self._data.chunks[2] if self._data.chunks else 1
        except _DAMAGE as error:
            self.close()
            raise _damaged(path, error) from None
        except BaseException:
            self.close()
            raise

    def _open_data(self, path: Path) -> h5py.Dataset:
        """The spectra. Raises InputError unless the file is a filterbank."""
        kind = _plain(self._file.attrs.get("CLASS"))
        data = self._file.get("data")
        if kind != "FILTERBANK" or not isinstance(data, h5py.Dataset):
            names = ", ".join(map(str, self._file))[:80]
            raise InputError(
                f"{path}: HDF5 of CLASS {str(kind)[:40]!r} with {names or 'nothing'}, expected CLASS FILTERBANK with "
                "spectra in data; it is not a filterbank file"
            )
        if data.ndim != 3 or data.dtype.name not in DTYPES or not data.size:
            raise InputError(
                f"{path}: data of shape {data.shape} and type {data.dtype}, expected (spectra, feeds, channels) of "
                f"{', '.join(DTYPES)}"
            )
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, first: int, last: int, spectra: int, feed: int) -> npt.NDArray[Any]:
        try:
            values: npt.NDArray[Any] = self._data[:spectra, feed, first:last]
        except _DAMAGE as error:
            raise _damaged(self.header.path, error, f" in channels {first} to {last} of the file") from None
        return values


def _plain(value: Any) -> Any:
    """An attribute as a Python number or text: writers store scalars, arrays of one, bytes and text."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    if isinstance(value, np.generic):
        value = value.item()
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _check_stored(path: Path, data: h5py.Dataset) -> None:
    """Raise InputError where part of the data is missing: HDF5 would read zeros there."""
    if data.is_virtual or data.external:
        raise InputError(f"{path}: its data lie in other files, expected them inside; copy them with h5repack")
    if data.chunks is None:
        if data.id.get_offset() is None:
            raise InputError(f"{path}: holds no data; the file was cut short while it was written: fetch it again")
        return
    expected = math.prod(-(-length // size) for length, size in zip(data.shape, data.chunks, strict=True))
    found = data.id.get_num_chunks()
    if found != expected:
        raise InputError(
            f"{path}: {found} of {expected} blocks of data are there; the file was cut short while it was written: "
            "fetch it again"
        )


def _damaged(path: Path, error: BaseException, where: str = "") -> BaseException:
    """An InputError for a damaged file; the system's own error (no such file, no permission) is returned unchanged."""
    if isinstance(error, OSError) and error.errno is not None:
        error.filename = error.filename or str(path)
        return error
    reason = " ".join(str(error).split())[:160]
    return InputError(f"{path}: not a readable HDF5 file{where} ({reason}); damaged or cut short: fetch it again")
