"""Reader of SIGPROC filterbank files (.fil): a header of keywords, then spectra (T, feed, channel), little-endian."""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shard_tools.atomic_files import naming
from shard_tools.errors import InputError
from shard_tools.observation.filterbank import FilterbankFile
from shard_tools.observation.header import Layout, build_header

MAGIC = struct.pack("<I", 12) + b"HEADER_START"
_END = "HEADER_END"
_MAX_HEADER_BYTES = 1 << 16
_MAX_TEXT = 1024
_TYPE_OF_BITS = {32: "<f4", 16: "<u2", 8: "u1"}
# The keywords of SIGPROC, and `nfpc`, which FBH5 added. A keyword's type is not in the file.
_INTEGERS = (
    *("telescope_id", "machine_id", "data_type", "barycentric", "pulsarcentric", "nbits", "nsamples", "nchans", "nifs"),
    *("nbeams", "ibeam", "nfpc", "npuls", "nbins"),
)
_REALS = ("az_start", "za_start", "tstart", "tsamp", "fch1", "foff", "refdm", "period", "src_raj", "src_dej")
_FORMATS = {**dict.fromkeys(_INTEGERS, "<i"), **dict.fromkeys(_REALS, "<d"), "signed": "<b"}
_TEXTS = ("rawdatafile", "source_name")
_TIME_SERIES = 2  # data_type


class SigprocFile(FilterbankFile):
    """An open .fil file."""

    def __init__(self, path: Path, nfpc: int | None) -> None:
        """Read and check the header. Raises InputError where it is damaged, or does not fit the file's size."""
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with naming(path):
                head = os.pread(self._descriptor, _MAX_HEADER_BYTES, 0)
                size = os.fstat(self._descriptor).st_size
            fields, self._start = parse_header(head, path)
            self._dtype = np.dtype(_type_of(fields, path))
            layout = _find_layout(path, fields, self._dtype, size - self._start)
            self.header = build_header(path, fields, layout, nfpc)
            self.chunk_channels = 1
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _read(self, first: int, last: int, spectra: int, feed: int) -> npt.NDArray[Any]:
        layout, item = self.header.layout, self._dtype.itemsize
        values = np.empty((spectra, last - first), self._dtype)
        for spectrum in range(spectra):
            place = (spectrum * layout.feeds + feed) * layout.channels + first
            self._read_into(memoryview(values[spectrum]).cast("B"), self._start + place * item)
        return values

    def _read_into(self, into: memoryview, offset: int) -> None:
        """Fill `into` from `offset` on; the system may return less than asked."""
        done = 0
        while done < len(into):
            with naming(self.header.path):
                piece = os.pread(self._descriptor, len(into) - done, offset + done)
            if not piece:
                raise InputError(
                    f"{self.header.path}: ends at byte {offset + done}; it became shorter while it was read"
                )
            into[done : done + len(piece)] = piece
            done += len(piece)


def parse_header(head: bytes, path: Path) -> tuple[dict[str, Any], int]:
    """The keywords of a SIGPROC header and its length in bytes. Raises InputError where it is damaged."""
    if not head.startswith(MAGIC):
        raise InputError(f"{path}: does not begin with HEADER_START; expected a SIGPROC filterbank file")
    fields: dict[str, Any] = {}
    place = len(MAGIC)
    try:
        while True:
            keyword, place = _text_at(head, place)
            if keyword == _END:
                return fields, place
            if keyword not in _TEXTS and keyword not in _FORMATS:
                raise InputError(
                    f"{path}: unknown keyword {keyword[:40]!r} in the header, before byte {place}, expected those of "
                    "SIGPROC, since the length of any other's value is unknown; write the header again without it, or "
                    "fetch the file again if the word is damaged"
                )
            fields[keyword], place = _value_at(head, place, keyword)
    except (struct.error, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: not a SIGPROC header at byte {place} ({error}); expected keywords up to {_END}: fetch the file "
            "again"
        ) from None


def _text_at(head: bytes, place: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<I", head, place)
    text = head[place + 4 : place + 4 + length]
    if not 0 < length <= _MAX_TEXT or len(text) != length:
        raise struct.error(f"a text of {length} bytes")
    return text.decode("ascii"), place + 4 + length


def _value_at(head: bytes, place: int, keyword: str) -> tuple[Any, int]:
    if keyword in _TEXTS:
        return _text_at(head, place)
    layout = _FORMATS[keyword]
    return struct.unpack_from(layout, head, place)[0], place + struct.calcsize(layout)


def _type_of(fields: dict[str, Any], path: Path) -> str:
    bits = fields.get("nbits")
    if bits not in _TYPE_OF_BITS:
        raise InputError(f"{path}: nbits {bits}, expected 32 (float), 16 or 8; convert the file to 8 bits or more")
    if fields.get("signed") and bits != 32:
        raise InputError(f"{path}: signed integers, expected unsigned ones or 32 bits (float)")
    if fields.get("data_type") == _TIME_SERIES:
        raise InputError(f"{path}: data_type 2, a time series; expected spectra (data_type 1)")
    return _TYPE_OF_BITS[bits]


def _find_layout(path: Path, fields: dict[str, Any], dtype: np.dtype[Any], data_bytes: int) -> Layout:
    """The shape of the data, from their size. Raises InputError where the file is cut short."""
    channels, feeds = fields.get("nchans", 0), fields.get("nifs", 1)
    if channels < 1 or feeds < 1:
        raise InputError(f"{path}: nchans {channels} and nifs {feeds}, expected 1 or more; its header is damaged")
    spectrum_bytes = channels * feeds * dtype.itemsize
    spectra, rest = divmod(data_bytes, spectrum_bytes)
    stated = fields.get("nsamples", 0)
    if rest or stated > spectra or not spectra:
        raise InputError(
            f"{path}: {data_bytes} bytes of data are {data_bytes / spectrum_bytes:.3f} spectra, expected "
            f"{stated if stated > 0 else 'a whole number of them'}; the file is cut short: fetch it again"
        )
    return Layout(spectra, feeds, channels, dtype.name)
