"""Small observations for tests, in both formats."""

import functools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shard_tools.observation.header import GREEN_BANK, SECONDS_A_DAY
from shard_tools.observation.simulate import BIN_LENGTH_S, CHANNEL_MHZ, write_fbh5
from tests.conftest import ROOT

REAL = ROOT / "tests" / "data" / "observations"
NAMES = ("A1", "B", "A2", "C", "A3", "D")
SOURCES = ("A", "B", "A", "C", "A", "D")
START_MJD, SECONDS_APART = 57650.75, 320.0
CHANNELS, NFPC, SPECTRA = 32768, 8192, 16


def fields(position: int = 0, **changed: Any) -> dict[str, Any]:
    """The header of a file of a cadence at Green Bank, frequencies falling."""
    found = {
        "fch1": 8420.0,
        "foff": -CHANNEL_MHZ,
        "nchans": CHANNELS,
        "nifs": 1,
        "nbits": 32,
        "nfpc": NFPC,
        "tsamp": BIN_LENGTH_S,
        "tstart": START_MJD + position * SECONDS_APART / SECONDS_A_DAY,
        "source_name": SOURCES[position],
        "src_raj": 17.25,
        "src_dej": -12.5,
        "telescope_id": GREEN_BANK,
        "data_type": 1,
    } | changed
    return {name: value for name, value in found.items() if value is not None}


@functools.cache
def power(position: int = 0, spectra: int = SPECTRA, channels: int = CHANNELS) -> npt.NDArray[np.float32]:
    """(T, F) of noise, in the order of the file; it is shared, so do not change it."""
    rng = np.random.default_rng(position)
    return (1e9 * rng.standard_gamma(51, (spectra, channels)) / 51).astype(np.float32)


def fil_header(values: dict[str, Any]) -> bytes:
    """A SIGPROC header: text as it is, whole numbers in 4 bytes, others in 8."""

    def text(word: str) -> bytes:
        return struct.pack("<I", len(word)) + word.encode()

    data = text("HEADER_START")
    for name, value in values.items():
        data += text(name)
        data += text(value) if isinstance(value, str) else struct.pack("<i" if isinstance(value, int) else "<d", value)
    return data + text("HEADER_END")


def write_fil(path: Path, values: npt.NDArray[Any], header: dict[str, Any]) -> Path:
    path.write_bytes(fil_header(header) + values.tobytes())
    return path


def write_h5(path: Path, values: npt.NDArray[Any], header: dict[str, Any], chunk_channels: int = NFPC) -> Path:
    write_fbh5(path, values, header, chunk_channels)
    return path


def write_cadence(folder: Path, extension: str = "h5", **changed: Any) -> list[Path]:
    """Six files of noise; `changed` changes the header of all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    write = write_h5 if extension == "h5" else write_fil
    return [
        write(folder / f"{name}.{extension}", power(position), fields(position, **changed))
        for position, name in enumerate(NAMES)
    ]
