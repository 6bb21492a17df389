"""Simulate the six files of a small cadence: noise, bandpass, DC spikes, Voyager's carrier, needles, interference.

Axes: P panel, T spectrum, F channel; here in the order of the files, frequencies falling as at Green Bank.
"""

import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shard_tools.atomic_files import write_whole
from shard_tools.cadence import ON_POSITIONS, PANEL_NAMES, PANELS
from shard_tools.errors import InputError
from shard_tools.observation.header import COARSE_CHANNEL_MHZ, FINE_CHANNELS, GREEN_BANK, SECONDS_A_DAY
from shard_tools.observation.lines import TRUTH_TABLE, Grid, Line, TrueLine, add_line, check_snr_range, write_truth

CHANNEL_MHZ = COARSE_CHANNEL_MHZ / FINE_CHANNELS
BIN_LENGTH_S = 51 / (CHANNEL_MHZ * 1e6)
SPECTRA = 16
SOURCES = ("VOYAGER-1", "HIP83043", "VOYAGER-1", "HIP82860", "VOYAGER-1", "HIP83501")
# Voyager 1 at Green Bank on 16 July 2016, as measured in Breakthrough Listen's public file.
CARRIER_MHZ, CARRIER_DRIFT_HZ_S, SIDE_BAND_MHZ = 8419.297028, -0.3776, 0.0224
_START_MJD = 57650.7820949074
_SECONDS_APART = 320.0  # from the start of one panel to the next: 292 s of data, then the telescope turns
_POWER = 1e9  # as in Green Bank's files
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SimulateObservationConfig:
    """Simulate six small files of one cadence (.h5), like Green Bank's, on which to try `ingest` and the search."""

    out: Path
    """Folder for A1.h5, B.h5, A2.h5, C.h5, A3.h5, D.h5 and truth.csv; new or empty."""
    coarse_channels: int = 4
    """Coarse channels in the band, whose middle is near Voyager's carrier."""
    nfpc: int = 32768
    """Fine channels of 2.79 Hz in each coarse channel; real ones have 1,048,576."""
    needles: int = 4
    """Lines in the ON panels alone, at random places in the band."""
    interference: int = 2
    """Lines in all six panels."""
    snr_min: float = 20.0
    """SNR of the faintest line, in one panel, if it does not drift."""
    snr_max: float = 100.0
    """SNR of the brightest line."""
    max_drift: float = 2.0
    """Steepest drift rate, in Hz/s."""
    seed: int = 0
    """Same seed, same bytes; 0 or more."""

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("coarse-channels", self.coarse_channels, 1),
            ("nfpc", self.nfpc, 64),
            ("needles", self.needles, 0),
            ("interference", self.interference, 0),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise InputError(f"--{flag} {value}: expected {least} or more")
        if self.nfpc % 64:
            raise InputError(f"--nfpc {self.nfpc}: expected a multiple of 64")
        check_snr_range(self.snr_min, self.snr_max)
        if not 0 <= self.max_drift <= 100:
            raise InputError(f"--max-drift {self.max_drift}: expected 0 to 100 Hz/s")

    @property
    def channels(self) -> int:
        """Channels in the whole band."""
        return self.coarse_channels * self.nfpc

    @property
    def first_mhz(self) -> float:
        """Centre of the file's first channel, the highest. The carrier is off the middle, where a DC spike may be."""
        return CARRIER_MHZ + (self.channels // 2 + self.nfpc // 8) * CHANNEL_MHZ

    def place_of(self, line: Line) -> float:
        """Where a line begins in its coarse channel, from 0 at the lowest frequency to 1."""
        return 1 - ((self.first_mhz - line.frequency_mhz) / CHANNEL_MHZ + 0.5) / self.nfpc % 1


def draw_lines(config: SimulateObservationConfig) -> list[Line]:
    """Voyager's carrier and side bands, needles and interference."""
    rng = np.random.default_rng([config.seed, 0])
    lines = [Line("carrier", CARRIER_MHZ, CARRIER_DRIFT_HZ_S, config.snr_max, ON_POSITIONS)]
    for side in (-1, 1):
        mhz = CARRIER_MHZ + side * SIDE_BAND_MHZ
        lines.append(Line("side_band", mhz, CARRIER_DRIFT_HZ_S, config.snr_max / 8, ON_POSITIONS))
    kinds = [("needle", ON_POSITIONS)] * config.needles + [("interference", tuple(range(PANELS)))] * config.interference
    for kind, panels in kinds:
        mhz = config.first_mhz - rng.uniform(0.02, 0.98) * config.channels * CHANNEL_MHZ
        snr = float(np.exp(rng.uniform(np.log(config.snr_min), np.log(config.snr_max))))
        lines.append(Line(kind, mhz, rng.uniform(-config.max_drift, config.max_drift), snr, panels))
    band = config.first_mhz - config.channels * CHANNEL_MHZ, config.first_mhz
    return [line for line in lines if band[0] < line.frequency_mhz < band[1]]


def draw_panel(
    config: SimulateObservationConfig, panel: int, lines: list[Line], *, noise: bool = True
) -> npt.NDArray[np.float32]:
    """(T, F) power of one panel; without `noise`, every value is the mean of its distribution."""
    rng = np.random.default_rng([config.seed, 1, panel])
    shape = SPECTRA, config.channels
    # A power averaged over 51 samples is gamma distributed.
    values = rng.standard_gamma(51, shape).astype(np.float32) / np.float32(51) if noise else np.ones(shape, np.float32)
    for line in lines:
        if panel in line.panels:
            grid = Grid(config.first_mhz, -CHANNEL_MHZ, panel * _SECONDS_APART, BIN_LENGTH_S)
            add_line(values, grid, line, line.snr / np.sqrt(51 * SPECTRA))
    values *= np.tile(bandpass_shape(config.nfpc), config.coarse_channels) * np.float32(_POWER)
    values[:, config.nfpc // 2 :: config.nfpc] *= 20  # DC spikes
    return values


def bandpass_shape(nfpc: int) -> npt.NDArray[np.float32]:
    """(F,) of one coarse channel: flat, with a slow ripple, down to a third at its edges."""
    place = (np.arange(nfpc) + 0.5) / nfpc
    edge = np.clip(np.minimum(place, 1 - place) / 0.08, 0, 1)
    return ((1 / 3 + 2 / 3 * np.sin(np.pi / 2 * edge)) * (1 + 0.1 * np.sin(2 * np.pi * place))).astype(np.float32)


def header_fields(config: SimulateObservationConfig, panel: int) -> dict[str, Any]:
    """The header of one file, as FBH5 files of Green Bank have it."""
    return {
        "fch1": config.first_mhz,
        "foff": -CHANNEL_MHZ,
        "nchans": config.channels,
        "nifs": 1,
        "nbits": 32,
        "nfpc": config.nfpc,
        "tsamp": BIN_LENGTH_S,
        "tstart": _START_MJD + panel * _SECONDS_APART / SECONDS_A_DAY,
        "source_name": SOURCES[panel],
        "src_raj": 17.1677733,
        "src_dej": 12.183,
        "telescope_id": GREEN_BANK,
        "machine_id": 20,
        "data_type": 1,
    }


def write_fbh5(path: Path, values: npt.NDArray[Any], fields: dict[str, Any], chunk_channels: int) -> None:
    """Write spectra (T, F), or (T, feed, F), as FBH5: bitshuffle and LZ4, one block of channels a chunk."""
    import h5py  # slow to load
    import hdf5plugin

    if values.ndim == 2:
        values = values[:, None]
    content = io.BytesIO()  # in memory first: HDF5 crashes on a full disk
    with h5py.File(content, "w") as file:
        file.attrs.update({"CLASS": "FILTERBANK", "VERSION": "1.0"})
        chunks = (1, 1, min(chunk_channels, values.shape[2]))
        data = file.create_dataset("data", data=values, chunks=chunks, **hdf5plugin.Bitshuffle(cname="lz4"))
        data.attrs.update(fields)
    write_whole(path, content.getvalue(), durable=False)


def simulate_observation(config: SimulateObservationConfig) -> list[Path]:
    """Write the six files and truth.csv, and return their paths in the order of the observation."""
    config.out.mkdir(parents=True, exist_ok=True)
    if any(config.out.iterdir()):
        raise InputError(f"--out {config.out}: holds files; choose another --out, or empty this one")
    lines = draw_lines(config)
    paths = [config.out / f"{name}.h5" for name in PANEL_NAMES]
    for panel, path in enumerate(paths):
        write_fbh5(path, draw_panel(config, panel, lines), header_fields(config, panel), config.nfpc)
    write_truth(config.out / TRUTH_TABLE, [TrueLine(line, _START_MJD, config.place_of(line)) for line in lines])
    _log.info("simulated %d lines in six files of %d channels in %s", len(lines), config.channels, config.out)
    return paths
