"""The checked header of one file of an observation; the same for FBH5 and SIGPROC files.

Keywords: Lorimer's SIGPROC manual, and Lebofsky et al. 2019 (arXiv:1906.07391) for Breakthrough Listen's products.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shard_tools.errors import InputError

GREEN_BANK = 6  # telescope_id
COARSE_CHANNEL_MHZ = 187.5 / 64  # of Breakthrough Listen's recorders at Green Bank and Parkes
FINE_CHANNELS = 1 << 20  # of one coarse channel in a fine product
FEWEST_SPECTRA = 4
# Limits between the products: fine 2.79 Hz x 18.3 s, mid-resolution 2.86 kHz x 1.07 s, time 366 kHz x 0.35 ms.
WIDEST_FINE_HZ, WIDEST_MID_HZ, SHORTEST_MID_S = 500.0, 50e3, 0.02
SECONDS_A_DAY = 86400.0
MAX_MJD, MAX_MHZ = 1e6, 1e6
MOST_TELESCOPE_ID = 2**31 - 1  # 4 bytes in SIGPROC's files


@dataclass(frozen=True)
class Layout:
    """Shape and type of the data themselves, whatever the header says about them."""

    spectra: int
    feeds: int
    channels: int
    dtype: str
    """float32, uint16 or uint8."""


@dataclass(frozen=True)
class Header:
    """One file's header. Channels are counted in the order of rising frequency, from 0."""

    path: Path
    layout: Layout
    fch1_mhz: float
    """Centre of the file's first channel."""
    foff_mhz: float
    """From one channel of the file to the next; negative where frequencies fall."""
    bin_length_s: float
    start_mjd: float
    """Start of the first spectrum."""
    nfpc: int
    """Fine channels per coarse channel; 0 where it is not known."""
    source: str
    ra_hours: float | None
    dec_degrees: float | None
    telescope: int | None
    """telescope_id of SIGPROC."""

    @property
    def channel_width_hz(self) -> float:
        """Width of one channel."""
        return abs(self.foff_mhz) * 1e6

    @property
    def lowest_mhz(self) -> float:
        """Centre of channel 0, the lowest."""
        return self.fch1_mhz + min(0.0, self.foff_mhz * (self.layout.channels - 1))

    @property
    def is_fine(self) -> bool:
        """Whether it is a fine product (a few Hz), not a mid-resolution one (a few kHz)."""
        return self.channel_width_hz <= WIDEST_FINE_HZ

    @property
    def has_dc_spikes(self) -> bool:
        """Whether each coarse channel has a spike in its middle: Green Bank's recorders leave it in."""
        return self.telescope == GREEN_BANK and self.nfpc > 0 and self.nfpc % 2 == 0

    @property
    def length_s(self) -> float:
        """From the start of the first spectrum to the end of the last."""
        return self.layout.spectra * self.bin_length_s


def build_header(path: Path, fields: Mapping[str, Any], layout: Layout, nfpc: int | None) -> Header:
    """Check what a file's header says; `nfpc` overrides it. Raises InputError naming the file and the keyword."""
    fch1, foff = (_to_number(path, fields, name) for name in ("fch1", "foff"))
    ra, dec = to_position(fields.get("src_raj"), fields.get("src_dej"))
    header = Header(
        path=path,
        layout=layout,
        fch1_mhz=fch1,
        foff_mhz=foff,
        bin_length_s=_to_number(path, fields, "tsamp"),
        start_mjd=_to_number(path, fields, "tstart"),
        nfpc=_find_nfpc(path, foff, layout.channels, fields.get("nfpc"), nfpc),
        source=str(fields.get("source_name", "")).strip(),
        ra_hours=ra,
        dec_degrees=dec,
        telescope=_to_count(fields.get("telescope_id")),
    )
    _check_header(header)
    return header


def _to_number(path: Path, fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        found = "missing" if value is None else f"{str(value)[:40]!r}"
        raise InputError(f"{path}: {name} is {found}, expected a number; its header is damaged: fetch the file again")
    return float(value)


def _to_count(value: object) -> int | None:
    """A whole number of the header; None where it is absent or something else."""
    is_whole = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return int(value) if is_whole and int(value) == value else None  # type: ignore[call-overload]


def _find_nfpc(path: Path, foff_mhz: float, channels: int, stated: object, asked: int | None) -> int:
    """Fine channels per coarse channel: as asked, as stated, or as in the known products; 0 where none fits."""
    if asked is not None:
        if channels % asked:
            raise InputError(
                f"{path}: {channels} channels, which --nfpc {asked} does not divide; expected whole coarse channels: "
                "give another --nfpc, or leave it out"
            )
        return asked
    ratio = COARSE_CHANNEL_MHZ / abs(foff_mhz) if foff_mhz else 0.0
    known = round(ratio) if 2 <= ratio < 2**31 and abs(ratio - round(ratio)) < 1e-4 * ratio else 0
    for nfpc in (_to_count(stated) or 0, known, FINE_CHANNELS):
        if nfpc > 1 and channels % nfpc == 0:
            return nfpc
    return 0


def _check_header(header: Header) -> None:
    """Raise InputError where the numbers describe no fine or mid-resolution product."""
    path, layout = header.path, header.layout
    if not header.foff_mhz or not header.bin_length_s > 0 or not 0 < header.start_mjd < MAX_MJD:
        raise InputError(
            f"{path}: foff {header.foff_mhz:g} MHz, tsamp {header.bin_length_s:g} s, tstart {header.start_mjd:g}; "
            "expected a channel width, a time above 0 and an MJD: its header is damaged"
        )
    if not abs(header.fch1_mhz) < MAX_MHZ:
        raise InputError(f"{path}: fch1 {header.fch1_mhz:g} MHz, expected below {MAX_MHZ:g}; its header is damaged")
    if header.telescope is not None and abs(header.telescope) > MOST_TELESCOPE_ID:
        raise InputError(
            f"{path}: telescope_id {header.telescope}, expected at most {MOST_TELESCOPE_ID}; its header is damaged"
        )
    if not header.lowest_mhz > 0 or not math.isfinite(header.foff_mhz * layout.channels):
        raise InputError(
            f"{path}: {layout.channels} channels of {header.foff_mhz:g} MHz from {header.fch1_mhz:g} MHz; expected "
            "frequencies above 0: its header is damaged"
        )
    if header.channel_width_hz > WIDEST_MID_HZ or header.bin_length_s < SHORTEST_MID_S:
        raise InputError(
            f"{path}: channels of {header.channel_width_hz:.6g} Hz and spectra of {header.bin_length_s:.6g} s, a time "
            "product; expected the fine (2.8 Hz x 18 s) or the mid-resolution one (2.9 kHz x 1 s), often the file "
            "that ends with 0000.h5 or 0002.h5"
        )
    if layout.spectra < FEWEST_SPECTRA:
        raise InputError(
            f"{path}: {layout.spectra} spectra, expected at least {FEWEST_SPECTRA} to see a line drift; leave this "
            "cadence out"
        )


def to_position(ra: object, dec: object) -> tuple[float | None, float | None]:
    """Right ascension in hours and declination in degrees, None where unknown.

    Files hold them as decimal hours and degrees (FBH5), or packed as hhmmss.s and ddmmss.s (SIGPROC). Packed positions
    that could also be decimal lie within 24 s of 0 h and 90'' of 0 degrees; they are taken as decimal. A position is
    unknown if its right ascension may be in degrees and its declination is decimal.
    """
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (ra, dec)):
        return None, None
    hours, degrees = float(ra), float(dec)  # type: ignore[arg-type]
    if abs(hours) > 24 or abs(degrees) > 90:
        if abs(hours) <= 360 and abs(degrees) <= 90:
            return None, None
        hours, degrees = _unpack(hours), _unpack(degrees)
    return (hours, degrees) if 0 <= hours <= 24 and abs(degrees) <= 90 else (None, None)


def _unpack(packed: float) -> float:
    """Hours or degrees from hhmmss.s or ddmmss.s; NaN where minutes or seconds are 60 or more."""
    whole, seconds = divmod(abs(packed), 100)
    units, minutes = divmod(whole, 100)
    if minutes >= 60 or seconds >= 60:
        return math.nan
    return math.copysign(units + minutes / 60 + seconds / 3600, packed)
