"""The promises of reading observations: FBH5 and SIGPROC files are read right, or refused with a remedy."""

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shard_tools.errors import InputError
from shard_tools.observation.agreement import check_cadence
from shard_tools.observation.filterbank import check_feed
from shard_tools.observation.header import Header, to_position
from shard_tools.observation.header_reader import HeaderReader
from shard_tools.observation.ingest import plan_ingest
from shard_tools.observation.ingest_config import IngestConfig
from shard_tools.observation.opening import open_filterbank, read_header
from tests.conftest import ROOT
from tests.observation_files import (
    BIN_LENGTH_S,
    CHANNEL_MHZ,
    CHANNELS,
    NFPC,
    REAL,
    fields,
    fil_header,
    power,
    write_cadence,
    write_fil,
    write_h5,
)

CARRIER = REAL / "seticore" / "voyager1_carrier.h5"
each_format = pytest.mark.parametrize("extension", ["h5", "fil"])
any_path = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder: Path, extension: str, values: npt.NDArray[Any] | None = None, **changed: Any) -> Path:
    values = power() if values is None else values
    own = {"nchans": values.shape[-1], "nbits": 8 * values.itemsize}
    path = folder / f"one.{extension}"
    return (write_h5 if extension == "h5" else write_fil)(path, values, fields(**(own | changed)))


def read_all(path: Path, feed: int = 0) -> npt.NDArray[np.float32]:
    with open_filterbank(path) as file:
        return file.read(0, file.header.layout.channels, file.header.layout.spectra, feed)


def refusal(path: Path, nfpc: int | None = None) -> str:
    with pytest.raises(InputError) as refused:
        read_header(path, nfpc)
    assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)
    return str(refused.value)


# ---- Right


def test_voyagers_carrier_is_the_same_in_both_formats_and_where_it_was() -> None:
    paths = [CARRIER, CARRIER.with_suffix(".fil")]
    first, second = (read_header(path) for path in paths)
    assert replace(first, path=second.path, ra_hours=None, dec_degrees=None) == replace(
        second, ra_hours=None, dec_degrees=None
    )
    assert (first.source, first.telescope, first.layout.spectra, first.layout.channels) == ("Voyager1", 6, 16, 116)
    # RA 17h10m04s and Dec 12d10m59s: decimal in one file, packed digits in the other.
    for header in (first, second):
        assert (header.ra_hours, header.dec_degrees) == (
            pytest.approx(17.16777, abs=1e-4),
            pytest.approx(12.183, abs=1e-3),
        )
    values = [read_all(path) for path in paths]
    assert np.array_equal(*values)
    mhz = first.lowest_mhz + values[0].argmax(axis=1) * CHANNEL_MHZ
    assert mhz[0] == pytest.approx(8419.297028, abs=3e-6)
    drift = np.polyfit(np.arange(16) * first.bin_length_s, mhz * 1e6, 1)[0]
    assert drift == pytest.approx(-0.3776, abs=0.02)


def test_a_file_of_another_program_is_read_as_it_is() -> None:
    path = REAL / "setigen" / "sample.fil"
    header = read_header(path)
    assert (header.layout.spectra, header.layout.channels, header.source) == (32, 1024, "DIAG_SGR_B2")
    data = path.read_bytes()
    expected = np.frombuffer(data[data.index(b"HEADER_END") + 10 :], "<f4").reshape(32, 1024)
    assert np.array_equal(read_all(path), expected[:, ::-1])


@each_format
@pytest.mark.parametrize("sign", [-1, 1])
def test_frequencies_ascend_whatever_the_sign_of_foff(tmp_path: Path, extension: str, sign: int) -> None:
    values = power()
    path = write(tmp_path, extension, values, foff=sign * CHANNEL_MHZ)
    header = read_header(path)
    assert np.array_equal(read_all(path), values[:, ::sign])
    assert header.lowest_mhz == pytest.approx(8420.0 if sign > 0 else 8420.0 - (CHANNELS - 1) * CHANNEL_MHZ, abs=1e-9)


@each_format
@pytest.mark.parametrize("kind", ["<f4", "<u2", "u1"])
def test_8_16_and_32_bits_are_read_by_ranges_as_the_whole(tmp_path: Path, extension: str, kind: str) -> None:
    values = (np.arange(5 * 2048).reshape(5, 2048) % 251).astype(kind)
    path = write(tmp_path, extension, values, nfpc=None)
    whole = values[:, ::-1].astype(np.float32)
    with open_filterbank(path) as file:
        for start, stop, spectra in [(0, 2048, 5), (0, 1, 5), (1000, 1001, 1), (17, 1500, 4), (2047, 2048, 5)]:
            found = file.read(start, stop, spectra)
            assert found.dtype == np.float32 and np.array_equal(found, whole[:spectra, start:stop])


@each_format
def test_the_chosen_polarisation_is_read_and_none_in_silence(tmp_path: Path, extension: str) -> None:
    values = np.arange(4 * 3 * 1024, dtype=np.float32).reshape(4, 3, 1024)
    path = write(tmp_path, extension, values, nifs=3, nfpc=None)
    header = read_header(path)
    assert header.layout.feeds == 3
    assert np.array_equal(read_all(path, 2), values[:, 2, ::-1])
    with pytest.raises(InputError, match=rf"{path}: nifs 3, expected 1; choose .* 0 to 2 with --feed"):
        check_feed(header, None)
    with pytest.raises(InputError, match=r"--feed 3, but the file has nifs 3; choose 0 to 2"):
        check_feed(header, 3)
    assert check_feed(header, 2) == 2


def test_the_shape_of_the_data_counts_not_what_the_header_says(tmp_path: Path) -> None:
    assert read_header(write(tmp_path, "h5", nchans=7, nifs=5, nbits=8)).layout.channels == CHANNELS


@pytest.mark.parametrize(
    ("changed", "nfpc", "expected"),
    [
        ({}, None, NFPC),
        ({}, 4096, 4096),
        ({"nfpc": None}, None, 0),  # 2.8 Hz, but fewer channels than a coarse channel
        ({"nfpc": 0}, None, 0),
        ({"nfpc": 999}, None, 0),  # does not divide the channels
        ({"nfpc": None, "foff": -187.5 / 64 / 1024, "tsamp": 1.07}, None, 1024),  # as in mid-resolution products
    ],
)
def test_nfpc_is_as_asked_as_stated_or_as_the_products_have_it(
    tmp_path: Path, changed: dict[str, Any], nfpc: int | None, expected: int
) -> None:
    assert read_header(write(tmp_path, "fil", **changed), nfpc).nfpc == expected


@pytest.mark.parametrize(
    ("ra", "dec", "expected"),
    [
        (17.5, -12.25, (17.5, -12.25)),
        (173000.0, -121500.0, (17.5, -12.25)),
        (3000.0, 900.0, (0.5, 0.15)),
        (3000.0, 45.0, (0.5, 0.0125)),
        (1.5, -200.0, (1.5 / 3600, -2 / 60)),
        (0.0, 89.5, (0.0, 89.5)),
        (1e9, 0.0, (None, None)),
        (257.5, 12.25, (None, None)),  # degrees, or 97.5 s
        (176000.0, -121500.0, (None, None)),
        (173000.0, -126100.0, (None, None)),
        (173000.0, -121561.0, (None, None)),
        (None, 3.0, (None, None)),
        ("17:30:00", 3.0, (None, None)),
        (float("nan"), 3.0, (None, None)),
    ],
)
def test_positions_are_read_in_both_conventions(ra: object, dec: object, expected: tuple[float, float]) -> None:
    assert to_position(ra, dec) == tuple(None if each is None else pytest.approx(each) for each in expected)


def test_a_position_that_is_in_no_convention_is_null_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_cadence(tmp_path / "degrees", src_raj=257.5, src_dej=12.25)
    ((plan,), _) = plan_ingest(IngestConfig(tmp_path / "out", tuple(files)))
    assert (plan.cadence.first.ra_hours, plan.cadence.first.dec_degrees) == (None, None)
    assert f"{files[0]}: src_raj and src_dej are missing, or neither decimal" in caplog.text
    caplog.clear()
    plan_ingest(IngestConfig(tmp_path / "out", tuple(write_cadence(tmp_path / "hours"))))
    assert "src_raj" not in caplog.text


def test_text_and_numbers_of_attributes_are_read_however_they_were_written(tmp_path: Path) -> None:
    path = write(tmp_path, "h5")
    plain = read_header(path)
    with h5py.File(path, "r+") as file:
        file.attrs["CLASS"] = np.bytes_("FILTERBANK")
        attributes = file["data"].attrs
        attributes["source_name"] = np.array([b"A"])
        attributes["tsamp"] = np.array([BIN_LENGTH_S])
        attributes["telescope_id"] = np.float64(6)
    assert read_header(path) == plain


# ---- Refused


@pytest.mark.parametrize("extension", ["h5", "fil"])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"fch1": None}, "fch1 is missing, expected a number"),
        ({"tsamp": float("nan")}, "tsamp is 'nan', expected a number"),
        ({"foff": 0.0}, "foff 0 MHz"),
        ({"tsamp": -1.0}, "tsamp -1 s"),
        ({"tstart": 0.0}, "tstart 0"),
        ({"fch1": 0.001}, "frequencies above 0"),
        ({"fch1": 1e90}, "fch1 1e+90 MHz, expected below 1e+06"),
        ({"fch1": 1e6}, "fch1 1e+06 MHz, expected below 1e+06"),
        ({"foff": -0.1, "tsamp": 3e-4}, "a time product; expected the fine"),
        ({"tsamp": 3.5e-4}, "a time product; expected the fine"),
    ],
)
def test_headers_that_describe_no_product_are_refused_with_the_keyword(
    tmp_path: Path, extension: str, changed: dict[str, Any], words: str
) -> None:
    assert words in refusal(write(tmp_path, extension, **changed))


@pytest.mark.parametrize("telescope", [2**40, 2**31, -(2**40)])
def test_a_telescope_id_that_sigproc_cannot_hold_is_refused(tmp_path: Path, telescope: int) -> None:
    assert f"telescope_id {telescope}, expected" in refusal(write(tmp_path, "h5", telescope_id=telescope))


@each_format
def test_fewer_than_four_spectra_are_refused(tmp_path: Path, extension: str) -> None:
    assert "3 spectra, expected at least 4" in refusal(write(tmp_path, extension, power(spectra=3)))


@each_format
def test_an_nfpc_that_does_not_divide_the_channels_is_refused(tmp_path: Path, extension: str) -> None:
    assert "which --nfpc 1000 does not divide" in refusal(write(tmp_path, extension), 1000)


def test_pulsar_data_of_2_bits_are_refused() -> None:
    path = REAL / "sigpyproc3" / "parkes_2bit_head.fil"
    assert "nbits 2, expected 32 (float), 16 or 8; convert" in refusal(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "begins with b''"),
        (b"id,target\n", "expected an FBH5 (.h5) or a SIGPROC file (.fil)"),
        (fil_header({}), "nbits None"),
        (fil_header({"nbits": 32, "nchans": 33_554_432, "nifs": 1}), "0.000 spectra"),  # a header without data
        (fil_header(fields(nsamples=17)) + power().tobytes(), "16.000 spectra, expected 17; the file is cut short"),
        (fil_header({"nbits": 32, "nchans": -5}), "nchans -5 and nifs 1, expected 1 or more"),
        (fil_header({"nbits": 8, "signed": 1}).replace(struct.pack("<i", 1), b"\1"), "signed integers"),
        (fil_header({"nbits": 32, "data_type": 2}), "a time series; expected spectra"),
        (fil_header({"nbits": 32, "colour": 1}), "unknown keyword 'colour' in the header"),
        (fil_header({"nbits": 32, "colour": 1}), "write the header again without it"),
        (fil_header({"nbits": 32, "rawdatafile": "x" * 2000}), "a text of 2000 bytes"),
        (fil_header({"nbits": 32})[:-10], "not a SIGPROC header at byte"),
        (b"\x89HDF\r\n\x1a\n" + bytes(3000), "not a readable HDF5 file"),
    ],
)
def test_what_is_no_filterbank_is_refused_with_what_was_found(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "odd.fil"
    path.write_bytes(content)
    assert words in refusal(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.h5") and "no such file" in refusal(tmp_path)


def without_class(file: h5py.File) -> None:
    del file.attrs["CLASS"]


def a_group(file: h5py.File) -> None:
    del file["data"]
    file.create_group("data")


def of_two_axes(file: h5py.File) -> None:
    del file["data"]
    file["data"] = np.zeros((4, 16), np.float32)


def of_text(file: h5py.File) -> None:
    del file["data"]
    file["data"] = np.zeros((4, 1, 16), "S4")


def never_filled(file: h5py.File) -> None:
    attributes = dict(file["data"].attrs)
    del file["data"]
    data = file.create_dataset("data", (16, 1, CHANNELS), np.float32, chunks=(1, 1, NFPC))
    data[:7] = 1
    data.attrs.update(attributes)


def elsewhere(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4, 1, 16), np.float32)
    layout[:] = h5py.VirtualSource("other.h5", "data", (4, 1, 16))
    del file["data"]
    file.create_virtual_dataset("data", layout)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_class, "HDF5 of CLASS 'None' with data, expected CLASS FILTERBANK"),
        (a_group, "it is not a filterbank file"),
        (of_two_axes, "data of shape (4, 16)"),
        (of_text, "expected (spectra, feeds, channels) of float32"),
        (never_filled, "28 of 64 blocks of data are there; the file was cut short while it was written"),
        (elsewhere, "its data lie in other files"),
    ],
)
def test_hdf5_that_is_no_whole_filterbank_is_refused(
    tmp_path: Path, change: Callable[[h5py.File], None], words: str
) -> None:
    path = write(tmp_path, "h5")
    with h5py.File(path, "r+") as file:
        change(file)
    assert words in refusal(path)


@each_format
def test_a_file_that_is_cut_short_anywhere_is_refused(tmp_path: Path, extension: str) -> None:
    path = write(tmp_path, extension, power(spectra=9, channels=256), nfpc=None)  # enough even if one is missing
    whole = path.read_bytes()
    for length in {*range(0, 700, 7), *range(700, len(whole), 501), len(whole) - 1, len(whole) - 2}:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=str(path)):
            read_all(path)


def test_a_damaged_block_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "h5")
    with h5py.File(path) as file:
        start, size = (getattr(file["data"].id.get_chunk_info(9), name) for name in ("byte_offset", "size"))
    data = bytearray(path.read_bytes())
    data[start : start + size] = bytes(size)
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"{path}: not a readable HDF5 file in channels 0 to {CHANNELS} of the file"):
        read_all(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "fil")
    with open_filterbank(path) as file:
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(InputError, match="became shorter while it was read"):
            file.read(0, CHANNELS, 16)


# ---- Mutants


@pytest.fixture(scope="module")
def cadence(tmp_path_factory: pytest.TempPathFactory) -> list[Header]:
    return [read_header(path) for path in write_cadence(tmp_path_factory.mktemp("cadence"), "fil")]


def check_mutant(path: Path, cadence: list[Header], read: Callable[[Path], Header] = read_header) -> str:
    """Check that a file is refused by name, or reads like a file of the cadence, or does not fit into the cadence."""
    try:
        header = read(path)
        found = check_cadence([*cadence[:5], header])
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return "refused"
    assert abs(header.lowest_mhz - cadence[0].lowest_mhz) <= CHANNEL_MHZ
    assert header.layout == cadence[0].layout and found.spectra == header.layout.spectra
    assert 1600 - 2 < found.panel_starts_s[5] < 1e12  # a later start is possible
    assert header.bin_length_s == pytest.approx(BIN_LENGTH_S, rel=1e-5)
    last = found.headers[5]  # values that it lacks are taken from the others
    assert last.nfpc == NFPC and last.telescope == 6
    return "right"


@any_path
@given(data=st.data())
def test_a_mutant_of_a_sigproc_header_is_refused_or_read_right(
    tmp_path: Path, cadence: list[Header], data: st.DataObject
) -> None:
    head = bytearray(fil_header(fields(5)))
    for _ in range(data.draw(st.integers(1, 3))):
        place, length = data.draw(st.integers(0, len(head) - 1)), data.draw(st.integers(0, 8))
        head[place : place + length] = data.draw(st.binary(min_size=0, max_size=8))
    path = tmp_path / "mutant.fil"
    path.write_bytes(head + power(5).tobytes())
    check_mutant(path, cadence)


odd_values = st.one_of(
    st.floats(),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from(["", "x", "FILTERBANK", b"\xff\xfe", np.zeros(3), np.array([8420.0]), np.bool_(True), None]),
)


@any_path
@given(name=st.sampled_from(sorted(fields())), value=odd_values)
def test_a_mutant_of_an_fbh5_header_is_refused_or_read_right(
    tmp_path: Path, cadence: list[Header], name: str, value: Any
) -> None:
    path = tmp_path / "mutant.h5"
    if not path.exists():
        write_h5(path, power(5), fields(5))
    with h5py.File(path, "r+") as file:
        file["data"].attrs.update(fields(5))
        if value is None:
            del file["data"].attrs[name]
        else:
            file["data"].attrs[name] = value
    check_mutant(path, cadence)


def test_mutants_of_the_bytes_of_an_fbh5_file_are_refused_or_read_right(tmp_path: Path, cadence: list[Header]) -> None:
    """Read in a child process, as `ingest` reads headers, since HDF5 crashes on some mutants."""
    path = write_h5(tmp_path / "mutant.h5", power(5), fields(5))
    good, rng = path.read_bytes(), np.random.default_rng(1)
    outcomes = []
    with HeaderReader(seconds=20) as reader:
        for _ in range(150):
            data = bytearray(good)
            for place in rng.integers(0, 6000, rng.integers(1, 4)):
                data[place] ^= 1 << rng.integers(8)
            path.write_bytes(data)
            outcomes.append(check_mutant(path, cadence, reader.read))
    assert {"right", "refused"} <= set(outcomes)


def test_a_file_on_which_hdf5_crashes_or_hangs_is_refused_by_name(tmp_path: Path) -> None:
    """These flipped bits crash and hang the HDF5 of h5py 3.16."""
    good = CARRIER.read_bytes()
    paths = [tmp_path / f"{seed}.h5" for seed in (237, 966)]
    for seed, path in zip((237, 966), paths, strict=True):
        path.write_bytes(bits_flipped(good, seed))
    with HeaderReader(seconds=10) as reader:
        for path in paths:
            with pytest.raises(InputError, match=str(path)):
                reader.read(path)
            assert reader.read(CARRIER).source == "Voyager1"  # another child reads the next file


def test_a_script_that_starts_itself_anew_is_told_so_and_no_file_is_blamed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom shard_tools.observation.header_reader import HeaderReader\n"
        f"HeaderReader().read(Path({str(CARRIER)!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert "InputError: the process that reads headers ended at its start; where a script calls ingest()" in done.stderr


def bits_flipped(good: bytes, seed: int) -> bytes:
    rng, data = np.random.default_rng(seed), bytearray(good)
    for _ in range(rng.integers(4)):
        place = rng.integers(len(data)) if rng.random() < 0.5 else rng.integers(4096)
        data[place] ^= 1 << rng.integers(8)
    return bytes(data)
