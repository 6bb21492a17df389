"""The snippet contract: what one cadence is, and how its bytes are read and checked.

Axes: P position in the cadence, T time bin, F frequency channel. A snippet is a finite float16 array (P, T, F) in C
order, stored as npy format 1.0. Files in another form are read if that loses nothing.
"""

import io
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from shard_tools.atomic_files import naming
from shard_tools.errors import InputError
from shard_tools.float16 import Rounding, to_halves

PANELS = 6
ON_POSITIONS = (0, 2, 4)
OFF_POSITIONS = (1, 3, 5)
PANEL_NAMES = ("A1", "B", "A2", "C", "A3", "D")
KAGGLE_SHAPE = (PANELS, 273, 256)

# The competition does not publish its resolution. These values are those of Breakthrough Listen's mid-resolution
# product at Green Bank (Lebofsky et al. 2019, arXiv:1906.07391): coarse channels of 187.5 MHz / 64, each divided into
# 1,024 channels, and time bins of 3,072 spectra, of which 273 make the five minutes of one pointing (293 s). The noise
# of the real snippets shows that each value sums thousands of samples, not six as in a product of 2.79 Hz
# (docs/data.md). Only the units of drift rates and widths depend on these two constants.
CHANNEL_WIDTH_HZ = 187.5e6 / 64 / 1024
TIME_BIN_SECONDS = 3072 / CHANNEL_WIDTH_HZ

# A key becomes a file name, a tar member and a WebDataset __key__, which ends at the first dot; a USTAR name holds
# 100 bytes, of which ".npy" takes four.
MAX_KEY_LENGTH = 96
_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY_LENGTH}}}\Z")
_MAX_HEADER_BYTES = 4096
_FLOAT16_INFINITY = 0x7C00
_CHECKED_AT_ONCE = 1 << 15  # values
MAX_SNIPPET_BYTES = 2**31 - 1  # the largest size that the manifest's int32 holds


def check_key(key: str, where: str) -> None:
    """Raise InputError unless `key` is safe as a file name and as a tar member."""
    if not _KEY.match(key):
        raise InputError(f"{where}: bad key {key[:120]!r}; expected 1 to 96 letters, digits, '_' or '-'")


def npy_header(shape: Sequence[int]) -> bytes:
    """The npy 1.0 header that NumPy writes for a float16 C-order array of `shape`."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f2", "fortran_order": False, "shape": tuple(shape)})
    return buffer.getvalue()


class NpyHeader(NamedTuple):
    """The header of an npy file, whichever program wrote it."""

    size: int
    """Bytes of the header itself."""
    shape: tuple[int, int, int]
    """(P, T, F)"""
    dtype: np.dtype[Any]
    fortran_order: bool
    version: tuple[int, int]

    @property
    def file_bytes(self) -> int:
        """Bytes that the whole file has to have."""
        return self.size + self.dtype.itemsize * math.prod(self.shape)

    @property
    def differences(self) -> tuple[str, ...]:
        """How the file differs from a shard's members; empty if its bytes can be packed unchanged."""
        found = {
            str(self.dtype.newbyteorder("=")): self.dtype.newbyteorder("=") != np.float16,
            "big-endian": self.dtype.byteorder == ">",
            "Fortran order": self.fortran_order,
            f"npy format {self.version[0]}.{self.version[1]}": self.version != (1, 0),
        }
        return tuple(name for name, differs in found.items() if differs)


class Snippet(NamedTuple):
    """A snippet file that was read and checked."""

    data: bytes
    """The npy member of a shard: the file's own bytes, unless it had to be converted."""
    values: npt.NDArray[np.float16]
    """(P, T, F)"""
    differences: tuple[str, ...] = ()
    """`NpyHeader.differences` of the file."""
    rounding: Rounding | None = None
    """What rounding another type to float16 lost."""


def read_npy_header(data: bytes | memoryview, where: str) -> NpyHeader:
    """Parse the npy header at the start of `data`, whatever its version, type and order are.

    Reads no array data, so a header that claims an enormous shape costs nothing. Raises InputError where the header is
    not valid, or its type or shape cannot be a snippet's.
    """
    start = bytes(data[:_MAX_HEADER_BYTES])
    try:
        try:
            size, version, shape, fortran_order, dtype = _parse_npy(start)
        except SystemError:  # in threads, Python 3.11.0 to .7 may fail on good text (CPython issue 106905)
            size, version, shape, fortran_order, dtype = _parse_npy(start)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{where}: not a readable npy file ({reason}); expected what np.save writes") from None
    if dtype.kind not in "fiu":  # pickled, complex, records: no spectra
        raise InputError(f"{where}: dtype {dtype}, expected float16")
    if len(shape) != 3 or shape[0] != PANELS or min(shape) < 1:
        raise InputError(f"{where}: shape {shape}, expected ({PANELS}, time bins, frequency channels)")
    return NpyHeader(size, shape, dtype, fortran_order, version)


def _parse_npy(start: bytes) -> tuple[int, tuple[int, int], tuple[int, ...], bool, np.dtype[Any]]:
    """Size, version, shape, order and type. NumPy parses headers as Python text: a bad one may raise any error."""
    stream = io.BytesIO(start)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"npy format {version[0]}.{version[1]}, expected 1.0 to 3.0")
    # Format 3.0 differs from 2.0 only in UTF-8 field names, and float16 has no fields.
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(stream, max_header_size=_MAX_HEADER_BYTES)
    return stream.tell(), version, shape, fortran_order, dtype


def check_npy_header(data: bytes | memoryview, where: str) -> tuple[int, tuple[int, int, int]]:
    """Header size and shape (P, T, F) of a shard's npy member. Raises InputError where it is not in our form."""
    header = read_npy_header(data, where)
    if header.differences:
        found = ", ".join(header.differences)
        raise InputError(f"{where}: {found}; expected float16 in C order, npy format 1.0: pack again")
    return header.size, header.shape


def read_snippet(path: Path, cast: bool = False) -> Snippet:
    """Read and check one snippet file; another byte order, array order or npy format is converted.

    Raises InputError naming the file where it is cut short, too long, pickled, not float16, not of six panels, or
    holds a NaN or an infinity; OSError where it cannot be read. With `cast`, real numbers of any type are rounded to
    float16, and InputError is raised where float16 cannot hold them.
    """
    with naming(path), path.open("rb") as file:
        header = _check_file(file, path, cast)
        data = _read_whole(file, header, path)
    values = _to_array(data, header)
    if not header.differences:
        check_finite(values, str(path))
        return Snippet(data, values)
    halves, rounding = to_halves(values, str(path))
    check_finite(halves, str(path))
    return Snippet(npy_header(halves.shape) + halves.tobytes(), halves, header.differences, rounding)


def _read_whole(file: BinaryIO, header: NpyHeader, path: Path) -> bytes:
    file.seek(0)
    data = file.read(header.file_bytes)
    if len(data) != header.file_bytes:
        raise InputError(f"{path}: {len(data)} bytes, expected {header.file_bytes}; it changed while it was read")
    return data


def _to_array(data: bytes, header: NpyHeader) -> npt.NDArray[Any]:
    """(P, T, F) of the file's own type."""
    values = np.frombuffer(data, header.dtype, offset=header.size)
    return values.reshape(header.shape, order="F" if header.fortran_order else "C")


def read_shape(path: Path, cast: bool = False) -> tuple[int, int, int]:
    """The shape (P, T, F) of one snippet file, from its header and size alone. Raises as `read_snippet` does."""
    with naming(path), path.open("rb") as file:
        return _check_file(file, path, cast).shape


def read_rows(
    path: Path, shape: tuple[int, int, int], positions: Iterable[int], rows: slice, cast: bool = False
) -> npt.NDArray[np.float16]:
    """The time bins `rows` of the panels `positions` of one snippet file of `shape`: (panels, time bins, F).

    Reads only these bytes, unless the file is in another form. Does not check the values, which may include NaN.
    Raises InputError where the file is not a snippet of `shape`; OSError where it cannot be read.
    """
    panel_bytes, row_bytes = 2 * shape[1] * shape[2], 2 * shape[2]
    start, count = rows.start * row_bytes, (rows.stop - rows.start) * row_bytes
    with naming(path), path.open("rb", buffering=0) as file:
        header = _check_file(file, path, cast)
        if header.shape != shape:
            raise InputError(f"{path}: shape {header.shape}, expected {shape} like the others")
        if header.differences:
            values = _to_array(_read_whole(file, header, path), header)[list(positions), rows]
            with np.errstate(over="ignore"):
                return values.astype(np.float16, order="C")
        pieces = [os.pread(file.fileno(), count, header.size + panel_bytes * p + start) for p in positions]
    return np.frombuffer(b"".join(pieces), "<f2").reshape(len(pieces), -1, shape[2])


def _check_file(file: BinaryIO, path: Path, cast: bool) -> NpyHeader:
    """The header of an open snippet file, after checking its type and that the file has the size it states."""
    head = file.read(_MAX_HEADER_BYTES)
    if not head:
        raise InputError(f"{path}: empty file, expected a snippet")
    header = read_npy_header(head, str(path))
    _check_type(header.dtype, path, cast)
    # The actual size is checked before the data are read: a header may claim terabytes.
    found = file.seek(0, io.SEEK_END)
    if found != header.file_bytes:
        shape = header.shape
        raise InputError(f"{path}: {found} bytes, expected {header.file_bytes} for shape {shape}; fetch the file again")
    if found > MAX_SNIPPET_BYTES:
        raise InputError(f"{path}: {found} bytes, expected at most {MAX_SNIPPET_BYTES}; cut smaller snippets")
    return header


def _check_type(dtype: np.dtype[Any], path: Path, cast: bool) -> None:
    """Raise InputError on any type but float16, unless `cast` allows all real types."""
    if not cast and dtype.newbyteorder("=") != np.float16:
        raise InputError(
            f"{path}: dtype {dtype}, expected float16; --cast float16 rounds the values, says by how much, and refuses "
            "what float16 cannot hold. Raw power may exceed 65504 or vanish below 6e-8: divide it by its noise's "
            "standard deviation first"
        )


def check_finite(snippet: npt.NDArray[np.float16], where: str) -> None:
    """Raise InputError if any value is NaN or infinite."""
    # Compare bit patterns: that runs at memory speed, whereas np.isfinite converts each half to a float.
    bits = snippet.view(np.uint16).reshape(-1)
    # In pieces that fit the CPU cache: the page faults of a full copy make reading a snippet three times as slow.
    for start in range(0, bits.size, _CHECKED_AT_ONCE):
        magnitude = bits[start : start + _CHECKED_AT_ONCE] & np.uint16(0x7FFF)
        if magnitude.max() >= _FLOAT16_INFINITY:
            place = start + int(np.argmax(magnitude >= _FLOAT16_INFINITY))
            position, time_bin, channel = np.unravel_index(place, snippet.shape)
            raise InputError(
                f"{where}: {snippet[position, time_bin, channel]} at panel {position}, time bin {time_bin}, "
                f"channel {channel}; expected finite values"
            )


def time_binned(snippet: npt.NDArray[np.float16], time_bins: int) -> npt.NDArray[np.float16]:
    """Sum `time_bins` neighbouring time bins, divided by sqrt(time_bins): white noise keeps its standard deviation.

    (P, T, F) float16 to (P, T / time_bins, F) float16, summed in float32. Raises InputError unless `time_bins` divides
    T. A sum beyond the range of float16 becomes infinite.
    """
    panels, total, channels = snippet.shape
    check_time_bins(total, time_bins)
    summed = snippet.reshape(panels, total // time_bins, time_bins, channels).sum(axis=2, dtype=np.float32)
    with np.errstate(over="ignore"):
        binned: npt.NDArray[np.float16] = (summed / np.float32(np.sqrt(time_bins))).astype(np.float16)
    return binned


def check_time_bins(total: int, time_bins: int, flag: str = "--time-bin") -> None:
    """Raise InputError unless `total` time bins divide into groups of `time_bins`."""
    if time_bins < 1 or total % time_bins:
        divisors = [k for k in range(1, total + 1) if total % k == 0]
        raise InputError(f"{flag} {time_bins}: does not divide the {total} time bins; choose one of {divisors}")
