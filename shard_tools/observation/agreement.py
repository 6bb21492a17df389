"""Check that six files are one cadence, A-B-A-C-A-D: same channels, rising times, and each source in its place."""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shard_tools.cadence import OFF_POSITIONS, ON_POSITIONS, PANELS
from shard_tools.errors import InputError
from shard_tools.observation.header import SECONDS_A_DAY, Header

_LONGEST_GAP_S = 12 * 3600.0  # between files; turning a telescope takes seconds to minutes
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cadence:
    """Six files that belong together."""

    headers: tuple[Header, ...]
    """Of A, B, A, C, A, D."""
    spectra: int
    """Number of spectra in the shortest file; the others are cropped to it."""

    @property
    def first(self) -> Header:
        """The header of the first file, which the others agree with."""
        return self.headers[0]

    @property
    def panel_starts_s(self) -> tuple[float, ...]:
        """Start of each panel, in seconds since the start of the first."""
        return tuple((header.start_mjd - self.first.start_mjd) * SECONDS_A_DAY for header in self.headers)

    @property
    def length_s(self) -> float:
        """From the start of the first panel to the end of the last, gaps included."""
        return self.panel_starts_s[-1] + self.spectra * self.first.bin_length_s

    @property
    def paths(self) -> tuple[Path, ...]:
        """The six files."""
        return tuple(header.path for header in self.headers)


def check_cadence(headers: Sequence[Header], any_sources: bool = False) -> Cadence:
    """Check that six headers, in the order of the observation, are one cadence; longer files are cropped, and named.

    `any_sources` skips the check of the sources' names. Raises InputError naming the file that does not fit.
    """
    if len(headers) != PANELS:
        files = f"{headers[0].path} and {len(headers) - 1} more" if headers else "no file"
        raise InputError(f"{files}: {len(headers)} files, expected the six of one cadence, A B A C A D")
    _check_once(headers)
    headers = _fill_unknown(headers)
    for other in headers[1:]:
        _check_alike(headers[0], other)
    _check_order(headers)
    if not any_sources:
        _check_sources(headers)
    cadence = Cadence(tuple(headers), min(header.layout.spectra for header in headers))
    longer = [header for header in headers if header.layout.spectra > cadence.spectra]
    if longer:
        names = ", ".join(f"{header.path.name} ({header.layout.spectra})" for header in longer)
        shortest = min(headers, key=lambda header: header.layout.spectra)
        _log.warning("cropped to the %d spectra of %s: %s", cadence.spectra, shortest.path, names)
    return cadence


def _check_once(headers: Sequence[Header]) -> None:
    """Raise InputError where a file is given twice."""
    ordinals = ("1st", "2nd", "3rd", "4th", "5th", "6th")
    places: dict[Path, int] = {}
    for position, header in enumerate(headers):
        before = places.setdefault(header.path.resolve(), position)
        if before != position:
            raise InputError(
                f"{header.path}: the {ordinals[position]} file is the same file as the {ordinals[before]}; give the "
                "six files of one cadence, A B A C A D, each once"
            )


def _fill_unknown(headers: Sequence[Header]) -> list[Header]:
    """Headers in which a missing telescope or nfpc is filled in from the first file that states it."""
    telescope = next((header.telescope for header in headers if header.telescope is not None), None)
    nfpc = next((header.nfpc for header in headers if header.nfpc), 0)
    return [
        replace(
            header,
            telescope=telescope if header.telescope is None else header.telescope,
            nfpc=header.nfpc or nfpc,
        )
        for header in headers
    ]


def _check_alike(first: Header, other: Header) -> None:
    """Raise InputError unless two files have the same channels, to half a channel, and spectra of the same kind."""
    here, there = first.layout, other.layout
    half = abs(first.foff_mhz) / 2
    for what, is_same, expected, found in (
        ("channels", here.channels == there.channels, here.channels, there.channels),
        # Times the number of channels: the last channel may be off by no more than the first.
        (
            "foff (MHz)",
            abs(first.foff_mhz - other.foff_mhz) * here.channels < half,
            first.foff_mhz,
            other.foff_mhz,
        ),
        ("fch1 (MHz)", abs(first.fch1_mhz - other.fch1_mhz) < half, first.fch1_mhz, other.fch1_mhz),
        (
            "tsamp (s)",
            abs(first.bin_length_s - other.bin_length_s) < 1e-6 * first.bin_length_s,
            first.bin_length_s,
            other.bin_length_s,
        ),
        ("nifs", here.feeds == there.feeds, here.feeds, there.feeds),
        ("type", here.dtype == there.dtype, here.dtype, there.dtype),
        ("nfpc", first.nfpc == other.nfpc, first.nfpc, other.nfpc),
        ("telescope_id", first.telescope == other.telescope, first.telescope, other.telescope),
    ):
        if not is_same:
            raise InputError(
                f"{other.path}: {what} {found}, expected {expected} as in {first.path}; give the six files of one "
                "cadence, of the same product and band"
            )


def _check_order(headers: Sequence[Header]) -> None:
    """Raise InputError unless each file begins after the one before it has ended, and within half a day."""
    for before, after in itertools.pairwise(headers):
        gap = (after.start_mjd - before.start_mjd) * SECONDS_A_DAY - before.length_s
        # Start times are often rounded to whole seconds.
        if gap < -max(1.0, 0.5 * before.bin_length_s):
            by_time = ", ".join(header.path.name for header in sorted(headers, key=lambda header: header.start_mjd))
            raise InputError(
                f"{after.path}: begins {-gap:.1f} s before {before.path} ends; expected the files in the order of the "
                f"observation, each once. By tstart they are: {by_time}"
            )
        if gap > _LONGEST_GAP_S:
            raise InputError(
                f"{after.path}: begins {gap / SECONDS_A_DAY:.1f} days after {before.path} ends; expected the six files "
                "of one cadence, minutes apart"
            )


def _check_sources(headers: Sequence[Header]) -> None:
    """Raise InputError unless the ON files have one source, and no OFF file has it."""
    for header in headers:
        if not header.source:
            raise InputError(
                f"{header.path}: source_name is missing, expected the name of the target; give --any-sources if the "
                "files are in the order A B A C A D"
            )
    source = headers[0].source
    for position in ON_POSITIONS:
        if headers[position].source != source:
            raise InputError(
                f"{headers[position].path}: source {headers[position].source!r}, expected {source!r} as in "
                f"{headers[0].path}; give A B A C A D, or --any-sources if the schedule names sources differently"
            )
    for position in OFF_POSITIONS:
        if headers[position].source == source:
            raise InputError(
                f"{headers[position].path}: source {source!r}, as in the ON files, expected another one; give "
                "A B A C A D, or --any-sources if the schedule gives all files one name"
            )
