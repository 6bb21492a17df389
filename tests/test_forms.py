"""The promises of snippet files in another form than a shard's: read right if nothing is lost, else refused.

Axes: P panel, T time bin, F frequency channel.
"""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_tools.cadence import read_rows, read_shape, read_snippet
from shard_tools.errors import InputError
from shard_tools.float16 import MOST_OF_NOISE
from shard_tools.manifest import read_manifest
from shard_tools.sample import read_snippet_of
from tests.conftest import SMALL_SHAPE, Command, Layout, MakeData, data_set_bytes, snippet

Write = Callable[[Path, Any], None]


Log = Callable[[], str]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    """What was logged since the last call."""
    caplog.set_level("INFO")

    def said() -> str:
        text = "\n".join(caplog.messages)
        caplog.clear()
        return text

    return said


def in_format(major: int) -> Write:
    def write(path: Path, values: Any) -> None:
        with path.open("wb") as file:
            np.lib.format.write_array(file, values, (major, 0))

    return write


def two_at_once(path: Path, values: Any) -> None:
    in_format(3)(path, np.asfortranarray(values.astype(">f2")))


FORMS: dict[str, Write] = {
    "npy format 2.0": in_format(2),
    "npy format 3.0": in_format(3),
    "big-endian": lambda path, values: np.save(path, values.astype(">f2")),
    "Fortran order": lambda path, values: np.save(path, np.asfortranarray(values)),
    "big-endian, Fortran order, npy format 3.0": two_at_once,
}


def rewrite(data: Layout, keys: list[str], write: Write) -> None:
    for key in keys:
        write(data.path(key), np.load(data.path(key)))


@pytest.mark.parametrize("time_bin", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_a_file_in_another_form_packs_to_the_bytes_of_an_ordinary_one(
    make_data: MakeData, command: Command, tmp_path: Path, log: Log, form: str, time_bin: int
) -> None:
    data = make_data()
    options = ("--input", data.root, "--folds", 3, "--time-bin", time_bin)
    assert command("pack", *options, "--out", tmp_path / "ordinary").code == 0
    assert log() == ""
    rewrite(data, data.train[:3], FORMS[form])
    assert command("pack", *options, "--out", tmp_path / "other").code == 0
    said = log()
    assert len(said.splitlines()) == 1
    for name in form.split(", "):
        assert f"3 of {name}" in said
    assert data_set_bytes(tmp_path / "other") == data_set_bytes(tmp_path / "ordinary")
    assert command("verify", tmp_path / "other").code == 0


@pytest.mark.parametrize("form", FORMS)
def test_groups_and_shapes_do_not_depend_on_the_form(
    make_data: MakeData, command: Command, tmp_path: Path, form: str
) -> None:
    data = make_data(shape=(6, 24, 32))
    np.save(data.path(data.train[4]), np.roll(np.load(data.path(data.train[1])), 3, axis=2))  # it shares a background
    tables = [tmp_path / "ordinary.csv", tmp_path / "other.csv"]
    for table in tables:
        answer = command("fingerprint", "--input", data.root, "--out", table)
        assert "1 overlapping pairs" in answer.out
        rewrite(data, data.train[3:8], FORMS[form])
    assert tables[0].read_text() == tables[1].read_text()
    assert read_shape(data.path(data.train[4])) == (6, 24, 32)


@given(where=st.integers(0, 139), byte=st.integers(0, 255), form=st.sampled_from(sorted(FORMS)))
@settings(max_examples=300, deadline=None)
def test_any_damage_to_a_header_in_another_form_is_refused_or_read_as_numpy_reads_it(
    tmp_path_factory: pytest.TempPathFactory, where: int, byte: int, form: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.npy"
    FORMS[form](path, snippet(3))
    data = path.read_bytes()
    path.write_bytes(data[:where] + bytes([byte]) + data[where + 1 :])
    try:
        found = read_snippet(path)
    except InputError as error:
        assert str(error).startswith(f"{path}: ")
        return
    expected = np.load(path)
    assert np.array_equal(found.values, expected)
    assert np.array_equal(np.load(io.BytesIO(found.data)), expected)
    assert np.array_equal(read_rows(path, found.values.shape, (1, 5), slice(2, 9)), expected[[1, 5], 2:9])


def test_an_ordinary_file_is_packed_byte_for_byte_and_seen_as_one(make_data: MakeData) -> None:
    data = make_data()
    found = read_snippet(data.path(data.train[0]))
    assert (found.data, found.differences, found.rounding) == (data.path(data.train[0]).read_bytes(), (), None)


def test_a_form_is_said_also_of_shards_that_an_earlier_try_finished(
    make_data: MakeData, command: Command, tmp_path: Path, log: Log
) -> None:
    data = make_data(shape=(6, 64, 256))  # five per shard
    rewrite(data, sorted(data.train)[:2], FORMS["Fortran order"])
    last = data.path(max(data.train))
    good = last.read_bytes()
    last.write_bytes(good[:-2] + b"\x00\x7e")  # a NaN
    arguments = ("pack", "--input", data.root, "--out", tmp_path / "out", "--folds", 3, "--shard-mb", 1, "--workers", 1)
    assert command(*arguments).code == 1
    last.write_bytes(good)
    assert command(*arguments).code == 0
    assert "2 of Fortran order" in log()


# ---- Other types of numbers


def cast(data: Layout, out: Path, *more: object) -> tuple[object, ...]:
    return ("pack", "--input", data.root, "--out", out, "--folds", 3, "--cast", "float16", *more)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8"])
def test_a_cast_is_the_nearest_float16_and_says_by_how_much_it_rounds(
    make_data: MakeData, command: Command, tmp_path: Path, log: Log, dtype: str
) -> None:
    data = make_data(train=6, test=2)
    rng = np.random.default_rng(5)
    largest = 0.0
    for key in [*data.train, *data.test]:
        exact = (300 * rng.standard_normal(SMALL_SHAPE)).astype(dtype)
        np.save(data.path(key), exact)
        largest = max(largest, float(np.abs(exact.astype("f8") - exact.astype("f2").astype("f8")).max()))
    assert command("pack", "--input", data.root, "--out", tmp_path / "out", "--folds", 2).code == 1
    answer = command(*cast(data, tmp_path / "out", "--folds", 2))
    assert answer.code == 0, answer.err
    said = log()
    assert f"8 of {np.dtype(dtype).newbyteorder('=')}" in said
    assert f"rounding to float16 changed a value by {largest:.2g} at most" in said
    assert float(re.search(r"at most (\S+) % of a panel's noise", said)[1]) < 0.1  # type: ignore[index]
    manifest = read_manifest(tmp_path / "out")
    assert manifest.made["cast"] == "float16"
    for row in range(len(manifest)):
        exact = np.load(data.path(manifest.key(row)))
        assert np.array_equal(read_snippet_of(manifest, row), exact.astype("f2"))
    assert command(*cast(data, tmp_path / "out", "--folds", 2)).code == 0  # a second time: it is packed already


def test_a_cast_of_float16_changes_no_byte_of_a_shard_and_its_absence_none_of_the_manifest(
    make_data: MakeData, command: Command, tmp_path: Path
) -> None:
    data = make_data()
    assert command("pack", "--input", data.root, "--out", tmp_path / "a", "--folds", 3).code == 0
    assert command(*cast(data, tmp_path / "b")).code == 0
    plain, casted = read_manifest(tmp_path / "a"), read_manifest(tmp_path / "b")
    assert plain.shards == casted.shards
    assert plain.made.keys() == {"folds", "seed", "time_bin", "shard_mb", "catalog_sha256"}
    assert casted.made == {**plain.made, "cast": "float16"}


def tiny_power(values: Any) -> Any:
    return 1e-9 * (1 + values**2)


def power_of_a_large_level(values: Any) -> Any:
    return 30_000 + values


LOSSES = {
    "beyond": (lambda values: 1e6 + values, "float16 ends at 65504: divide"),
    "vanishing": (tiny_power, "float16 would lose panel .* become 0; subtract the mean and divide"),
    "constant and tiny": (lambda values: np.full_like(values, 1e-9), "8,?[0-9]* values become 0|would lose panel 0"),
    "far from 0": (power_of_a_large_level, "float16 would lose panel"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_cast_that_would_lose_the_values_is_refused_by_name_and_says_how_to_scale(
    make_data: MakeData, command: Command, tmp_path: Path, loss: str
) -> None:
    data = make_data()
    change, expected = LOSSES[loss]
    path = data.path(data.train[5])
    np.save(path, change(np.load(path).astype("f4")))
    answer = command(*cast(data, tmp_path / "out"))
    assert answer.code == 1
    assert re.match(f"error: {path}: .*({expected})", answer.err), answer.err
    answer = command(*cast(data, tmp_path / "out", "--on-bad", "quarantine"))
    assert (answer.code, "1 snippets quarantined" in answer.out) == (0, True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_cast_of_what_is_not_finite_is_refused(
    make_data: MakeData, command: Command, tmp_path: Path, value: float
) -> None:
    data = make_data()
    path = data.path(data.train[5])
    values = np.load(path).astype("f4")
    values[2, 3, 4] = value
    np.save(path, values)
    answer = command(*cast(data, tmp_path / "out"))
    assert f"{value} at panel 2, time bin 3, channel 4; expected finite values" in answer.err


@given(seed=st.integers(0, 2**32 - 1), level=st.floats(-2000, 2000), scale=st.floats(-6, 3).map(lambda x: 10.0**x))
@settings(max_examples=60, deadline=None)
def test_a_cast_that_passes_keeps_the_noise(
    tmp_path_factory: pytest.TempPathFactory, seed: int, level: float, scale: float
) -> None:
    """For any level and scale of the values the rounding is reported truly and is small, or the file is refused."""
    path = tmp_path_factory.getbasetemp() / "float32.npy"
    exact = (level + scale * np.random.default_rng(seed).standard_normal((6, 40, 32))).astype("f4")
    np.save(path, exact)
    lost = (exact.astype("f8") - exact.astype("f2")).std(axis=(1, 2)).max() / scale
    try:
        found = read_snippet(path, cast=True)
    except InputError:
        assert lost > 0.5 * MOST_OF_NOISE
        return
    assert found.rounding
    assert found.rounding.of_noise <= MOST_OF_NOISE
    assert lost < 1.5 * MOST_OF_NOISE


def test_snippets_of_nothing_but_zeros_are_warned_of(
    make_data: MakeData, command: Command, tmp_path: Path, log: Log
) -> None:
    """A conversion of tiny values may leave such snippets."""
    data = make_data()
    for key in data.test[:2]:
        np.save(data.path(key), np.full(SMALL_SHAPE, 1e-9, "f4").astype("f2"))
    assert command("pack", "--input", data.root, "--out", tmp_path / "out", "--folds", 3).code == 0
    assert "snippets of nothing but zeros: 2" in log()


def test_fingerprints_can_be_taken_of_what_is_cast(make_data: MakeData, command: Command, tmp_path: Path) -> None:
    data = make_data(train=6, test=0, shape=(6, 24, 32))
    arguments = ("fingerprint", "--input", data.root, "--out", tmp_path / "groups.csv")
    assert command(*arguments).code == 0
    expected = (tmp_path / "groups.csv").read_text()
    for key in data.train:
        np.save(data.path(key), np.load(data.path(key)).astype("f4"))
    assert "--cast float16" in command(*arguments).err
    assert command(*arguments, "--cast", "float16").code == 0
    assert (tmp_path / "groups.csv").read_text() == expected
