"""Bad input gives a message that can be acted on, exit code 1, and nothing half done."""

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_tools.cadence import check_npy_header, npy_header
from shard_tools.errors import InputError
from tests.conftest import ROOT, SMALL_SHAPE, Answer, Command, Layout, MakeData, folder_bytes, snippet

KEY = "f0005"  # a training key in the middle of the others


def refused(answer: Answer, *fragments: str) -> None:
    """Exit code 1, and one short message with every fragment in it."""
    assert answer.code == 1
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    assert len(answer.err.splitlines()) <= 3
    assert "Traceback" not in answer.err
    assert len(answer.err) < 1000
    for fragment in fragments:
        assert fragment in answer.err


# ---- Snippets


def with_value(value: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        values = snippet(1)
        values[2, 3, 4] = value
        np.save(path, values)

    return write


def with_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def replaced(by: Callable[[Path], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.unlink()
        by(path)

    return write


SNIPPETS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "five panels": (lambda p: np.save(p, snippet(1, (5, 14, 16))), ("shape (5, 14, 16), expected (6, ",)),
    "two axes": (lambda p: np.save(p, snippet(1, (6, 14))), ("shape (6, 14), expected (6, ",)),
    "no time bins": (lambda p: np.save(p, snippet(1, (6, 0, 16))), ("shape (6, 0, 16), expected (6, ",)),
    "another shape": (lambda p: np.save(p, snippet(1, (6, 21, 16))), ("shape (6, 21, 16), expected (6, 14, 16)",)),
    "float32": (
        lambda p: np.save(p, snippet(1).astype("f4")),
        ("dtype float32, expected float16", "--cast float16", "65504", "vanish", "standard deviation"),
    ),
    "float32, cut": (
        lambda p: p.write_bytes((np.save(p, snippet(1).astype("f4")), p.read_bytes())[1][:-1]) and None,
        ("dtype float32, expected float16",),
    ),
    "complex": (lambda p: np.save(p, snippet(1).astype("c8")), ("dtype complex64, expected float16\n",)),
    "NaN": (with_value(np.nan), ("nan at panel 2, time bin 3, channel 4; expected finite",)),
    "infinity": (with_value(np.inf), ("inf at panel 2, time bin 3, channel 4; expected finite",)),
    "minus infinity": (with_value(-np.inf), ("-inf at panel 2, time bin 3, channel 4; expected finite",)),
    "truncated": (with_bytes(lambda data: data[:-10]), ("2806 bytes, expected 2816 for shape (6, 14, 16)",)),
    "too long": (with_bytes(lambda data: data + b"x"), ("2817 bytes, expected 2816 for shape (6, 14, 16)",)),
    "cut in its header": (with_bytes(lambda data: data[:50]), ("not a readable npy file", "expected what np.save")),
    "pickled": (lambda p: np.save(p, np.array([{}], object), allow_pickle=True), ("dtype object, expected float16",)),
    "enormous claim": (
        lambda p: p.write_bytes(npy_header((6, 10**12, 10**12)) + b"1234") and None,
        ("132 bytes, expected 12000000000000000000000128",),
    ),
    "npy 2.0 in name": (with_bytes(lambda data: data[:6] + b"\2\0" + data[8:]), ("not a readable npy file",)),
    "npy 4.0": (with_bytes(lambda data: data[:6] + b"\4\0" + data[8:]), ("npy format 4.0, expected 1.0 to 3.0",)),
    "empty": (lambda p: p.write_bytes(b"") and None, ("empty file, expected a snippet",)),
    "a text": (lambda p: p.write_text("<html>Not found</html>") and None, ("not a readable npy file",)),
    "missing": (Path.unlink, ("no file for 1 of 12 keys", "--allow-missing")),
    "a folder": (replaced(Path.mkdir), ("no file for 1 of 12 keys",)),
    "a pipe": (replaced(os.mkfifo), ("not a regular file, expected a snippet",)),
    "a link to nowhere": (replaced(lambda p: p.symlink_to("nowhere")), ("not a regular file",)),
}


@pytest.mark.parametrize("time_bin", [1, 7])
@pytest.mark.parametrize("fault", SNIPPETS)
def test_a_bad_snippet_is_refused_by_name(
    make_data: MakeData, command: Command, tmp_path: Path, fault: str, time_bin: int
) -> None:
    data = make_data()
    spoil, expected = SNIPPETS[fault]
    spoil(data.path(KEY))
    answer = command(
        "pack", "--input", data.root, "--out", tmp_path / "out", "--folds", 3, "--time-bin", time_bin, "--workers", 1
    )
    refused(answer, f"{KEY}.npy", *expected)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not list(tmp_path.rglob(".*.tmp"))


@pytest.mark.parametrize("place", ["first", "only"])
def test_a_first_snippet_that_claims_a_gigantic_shape_costs_no_time(
    make_data: MakeData, command: Command, tmp_path: Path, place: str
) -> None:
    data = make_data(train=0, test=1 if place == "only" else 3)
    data.path(min(data.test)).write_bytes(npy_header((6, 10**15, 3)) + b"1")
    answer = command("pack", "--input", data.root, "--out", tmp_path / "out", "--time-bin", 7)
    refused(answer, min(data.test), "bytes, expected")


def test_an_error_of_the_interpreter_is_not_taken_for_one_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11.7 raises this one in threads that parse at the same time."""
    errors, parse = [SystemError("AST constructor recursion depth mismatch")], np.lib.format.read_array_header_1_0

    def parse_with_luck(*arguments: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop()
        return parse(*arguments, **options)

    monkeypatch.setattr("numpy.lib.format.read_array_header_1_0", parse_with_luck)
    assert check_npy_header(npy_header(SMALL_SHAPE), "a file")[1] == SMALL_SHAPE
    assert not errors


@given(where=st.integers(0, 127), byte=st.integers(0, 255), length=st.integers(0, 127))
@settings(max_examples=400, deadline=None)
def test_any_damage_to_a_header_is_refused_or_harmless(where: int, byte: int, length: int) -> None:
    good = npy_header(SMALL_SHAPE)
    flipped = good[:where] + bytes([byte]) + good[where + 1 :]
    for damaged in (flipped, good[:length], good[:10] + flipped[:length].ljust(len(good) - 10)):
        try:
            _, shape = check_npy_header(damaged, "here")
            assert len(shape) == 3
        except InputError as error:
            assert str(error).startswith("here: ")
            assert len(str(error)) < 500


@pytest.mark.parametrize(
    "text",
    ["(" * 1000, "{'descr': [('a',)], 'fortran_order': False, 'shape': (6, 1, 1)}", "{" * 3000, "'''", "\0"],
)
def test_a_header_that_is_no_header_is_refused(text: str) -> None:
    header = text.encode().ljust(1014) + b"\n"
    with pytest.raises(InputError, match="here: not a readable npy file"):
        check_npy_header(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header, "here")


# ---- Tables and folders


def add_row(name: str, row: str) -> Callable[[Layout], None]:
    def add(data: Layout) -> None:
        with (data.root / name).open("a") as file:
            file.write(row + "\n")

    return add


def label(value: str) -> Callable[[Layout], None]:
    return lambda data: data.write_labels({KEY: value})


def rewrite(name: str, content: bytes) -> Callable[[Layout], None]:
    return lambda data: (data.root / name).write_bytes(content) and None


def train_is_a_file(data: Layout) -> None:
    (data.root / "train").rename(data.root / "old")
    (data.root / "train").write_text("")


TABLES: dict[str, tuple[Callable[[Layout], object], tuple[str, ...]]] = {
    "duplicate id": (
        add_row("train_labels.csv", f"{KEY},0"),
        (
            "line 14",
            f"id {KEY} appears twice",
        ),
    ),
    "duplicate test id": (
        add_row("sample_submission.csv", "a0012,0.5"),
        ("sample_submission.csv", "a0012 appears twice"),
    ),
    "label 2": (label("2"), ("train_labels.csv, line 7", "'2'", KEY, "expected 0 or 1")),
    "empty label": (label(""), ("train_labels.csv, line 7", "''", KEY, "expected 0 or 1")),
    "label yes": (label("yes"), ("train_labels.csv, line 7", "'yes'", KEY, "expected 0 or 1")),
    "label half": (label("0.5"), ("train_labels.csv, line 7", "'0.5'", KEY, "expected 0 or 1")),
    "enormous label": (label("9" * 100_000), ("train_labels.csv, line 7", KEY, "expected 0 or 1")),
    "no label": (add_row("train_labels.csv", "lonely"), ("line 14", "lonely", "expected 0 or 1")),
    "key up": (add_row("train_labels.csv", "../x,0"), ("line 14", "bad key '../x'", "expected 1 to 96 letters")),
    "key below": (add_row("train_labels.csv", "a/b,0"), ("line 14", "bad key 'a/b'")),
    "key with dot": (add_row("train_labels.csv", "a.b,0"), ("line 14", "bad key 'a.b'")),
    "empty key": (add_row("train_labels.csv", ",0"), ("line 14", "bad key ''")),
    "key with newline": (add_row("train_labels.csv", '"a\nb",0'), ("line 15", "bad key 'a\\nb'")),
    "long key": (add_row("sample_submission.csv", "k" * 97 + ",0"), ("sample_submission.csv, line 6", "1 to 96")),
    "file with a dot": (lambda data: np.save(data.root / "test" / "a.b.npy", snippet(0)), ("a.b.npy", "bad key 'a.b'")),
    "train file without label": (
        lambda data: np.save(data.root / "train" / "stray.npy", snippet(0)),
        ("stray.npy", "not in train_labels.csv", "first of 1 "),
    ),
    "no table": (lambda data: (data.root / "train_labels.csv").unlink(), ("train_labels.csv", "12 snippets", "add")),
    "other columns": (rewrite("train_labels.csv", b"key,label\na,1\n"), ("['key', 'label']", "['id', 'target']")),
    "empty table": (rewrite("train_labels.csv", b""), ("columns None, expected ['id', 'target']",)),
    "binary table": (rewrite("train_labels.csv", bytes(range(256)) * 40), ("train_labels.csv", "not a CSV table")),
    "one endless line": (rewrite("train_labels.csv", b"x" * 10**6), ("train_labels.csv", "not a CSV table")),
    "train is a file": (train_is_a_file, ("train: a file, expected a folder",)),
    "no input": (lambda data: data.root.rename(data.root.parent / "moved"), ("data: no such folder; expected",)),
}


@pytest.mark.parametrize("fault", TABLES)
def test_a_bad_table_or_folder_is_refused_by_name(
    make_data: MakeData, command: Command, tmp_path: Path, fault: str
) -> None:
    data = make_data()
    spoil, expected = TABLES[fault]
    spoil(data)
    refused(command("pack", "--input", data.root, "--out", tmp_path / "out", "--folds", 3), *expected)
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_refused_with_what_it_should_hold(command: Command, tmp_path: Path) -> None:
    refused(command("pack", "--input", tmp_path, "--out", tmp_path / "out"), "no snippets", "train/<c>/<key>.npy")


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Become the user nobody for a while, since root may read everything."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_folder_that_may_not_be_read_is_refused(make_data: MakeData, command: Command) -> None:
    with tempfile.TemporaryDirectory() as name:  # other users cannot enter pytest's own folders
        Path(name).chmod(0o755)
        root = Path(shutil.copytree(make_data().root, Path(name, "data")))
        closed = root / "train" / KEY[0]
        closed.chmod(0)
        with unprivileged():
            answer = command("pack", "--input", root, "--out", Path(name, "out"), "--folds", 3)
    refused(answer, str(closed), "expected a readable folder")


OPTIONS = [
    ("--workers", 0, "expected at least 1"),
    ("--shard-mb", 0, "expected at least 1"),
    ("--time-bin", 0, "expected at least 1"),
    ("--time-bin", 3, "choose one of [1, 2, 7, 14]"),
    ("--folds", 1, "expected 2 to 100"),
    ("--folds", 6, "class 1 has only 5 snippets; choose --folds 5"),
    ("--seed", -1, "expected 0 to 4294967295"),
]


@pytest.mark.parametrize(("flag", "value", "expected"), OPTIONS)
def test_an_option_that_cannot_work_is_refused_by_its_flag(
    make_data: MakeData, command: Command, tmp_path: Path, flag: str, value: int, expected: str
) -> None:
    answer = command("pack", "--input", make_data(train=15).root, "--out", tmp_path / "out", flag, value)
    refused(answer, f"{flag} {value}", expected)


@pytest.mark.parametrize("below", ["", "shards"])
def test_an_output_folder_that_is_a_file_is_refused(
    make_data: MakeData, command: Command, tmp_path: Path, below: str
) -> None:
    (tmp_path / "out").write_text("mine")
    answer = command("pack", "--input", make_data().root, "--out", tmp_path / "out" / below, "--folds", 3)
    refused(answer, str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


# ---- Earlier results, the disk, the real command line


def test_a_bad_input_leaves_an_earlier_pack_whole(make_data: MakeData, command: Command, tmp_path: Path) -> None:
    data, out = make_data(), tmp_path / "out"
    arguments = ("pack", "--input", data.root, "--out", out, "--folds", 3)
    assert command(*arguments).code == 0
    before = folder_bytes(out)
    data.path(KEY).write_bytes(b"")
    os.utime(data.path(KEY), ns=(1, (out / "manifest.json").stat().st_mtime_ns + 10**9))
    refused(command(*arguments), "empty file")
    assert folder_bytes(out) == before
    data.write_labels({KEY: "maybe"})
    refused(command(*arguments), "'maybe'")
    assert folder_bytes(out) == before


def python(*arguments: object, file_limit: int | None = None) -> Answer:
    """Run the real command; `file_limit` limits the size of the files that it writes."""

    def limit() -> None:
        if file_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    done = subprocess.run(
        [sys.executable, "-m", "shard_tools", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def test_the_real_command_refuses_a_bad_snippet_and_packs_it_once_mended(make_data: MakeData, tmp_path: Path) -> None:
    data, out = make_data(), tmp_path / "out"
    good = data.path(KEY).read_bytes()
    data.path(KEY).write_bytes(good[:-10])
    arguments = ("pack", "--input", data.root, "--out", out, "--folds", 3)
    refused(python(*arguments), f"{KEY}.npy", "2806 bytes, expected 2816")
    data.path(KEY).write_bytes(good)
    answer = python(*arguments)
    assert (answer.code, answer.err) == (0, "")
    assert "packed 16 cadences into 2 shards" in answer.out


SHARDS_OF_FIVE = ("train-000000", "train-000001", "train-000002", "test-000000")


def test_a_shard_that_the_disk_does_not_take_is_named_and_the_next_try_goes_on(
    make_data: MakeData, command: Command, tmp_path: Path
) -> None:
    data = make_data(shape=(6, 64, 256))
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    options = ("--input", data.root, "--folds", 3, "--shard-mb", 1, "--workers", 1)
    # Less than the smallest shard. Which shard fails first is chance: the thread may have begun the next one.
    answer = python("pack", *options, "--out", out, file_limit=300_000)
    refused(answer, "File too large")
    assert any(f"{name}.tar" in answer.err for name in SHARDS_OF_FIVE)
    assert not list(out.glob("*.tar"))
    assert not list(out.rglob(".*.tmp"))
    assert command("pack", *options, "--out", out).code == 0
    assert command("pack", *options, "--out", fresh).code == 0
    assert folder_bytes(out) == folder_bytes(fresh)


SYNCS_PER_SHARD = 3  # the tar, its index, and the note that it is done


# The syncs of two shards, three tables and the manifest.
@pytest.mark.parametrize("after", range(2 * SYNCS_PER_SHARD + 4))
def test_a_disk_that_fills_up_is_named_and_finished_shards_stay(
    make_data: MakeData, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    data, out = make_data(), tmp_path / "out"
    fsync, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    arguments = ("pack", "--input", data.root, "--out", out, "--folds", 3, "--workers", 1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        refused(
            command(*arguments), str(out), "No space left on device; free some space and run the same command again"
        )
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob(".*.tmp"))
    finished = {path: path.stat().st_ino for path in out.glob("*.tar") if after >= 3}
    assert command(*arguments).code == 0
    assert {
        path: path.stat().st_ino for path in finished if path.name == "train-000000.tar"
    }.items() <= finished.items()
    assert command("verify", out).code == 0
