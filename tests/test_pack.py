"""The promises of packing: the bytes of the shards, and what an interrupted pack leaves behind.

Axes: P panel, T time bin, F frequency channel.
"""

import csv
import io
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_tools.cadence import check_finite, npy_header, time_binned
from shard_tools.errors import InputError
from shard_tools.kaggle_layout import UNKNOWN_TARGET
from shard_tools.manifest import Manifest
from shard_tools.pack import pack
from shard_tools.sources import SOURCES
from shard_tools.verify import verify
from tests.conftest import (
    INFINITY,
    ROOT,
    SHARDED_SHAPE,
    SMALL_SHAPE,
    Layout,
    MakeData,
    data_set_bytes,
    folder_bytes,
    late_key,
    small_config,
    snippet,
)


def tars(manifest: Manifest, split: str) -> list[Path]:
    return [manifest.root / shard.name for shard in manifest.shards if shard.name.startswith(split)]


def file_states(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every file: writing a file again changes one of them."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}


# ---- The bytes


@pytest.mark.parametrize("workers", [1, 3])
def test_packing_twice_gives_the_same_bytes(sharded: Layout, packed: Manifest, tmp_path: Path, workers: int) -> None:
    again = pack(small_config(sharded, tmp_path / "again", workers=workers))
    assert folder_bytes(again.root) == folder_bytes(packed.root)
    assert again.identity == packed.identity
    assert len(packed.shards) == 4


def test_the_same_input_elsewhere_packs_to_the_same_bytes_quarantine_included(
    make_data: MakeData, tmp_path: Path
) -> None:
    data = make_data()
    data.path(data.train[1]).write_bytes(b"")
    here = pack(small_config(data, tmp_path / "here", on_bad="quarantine"))
    expected = folder_bytes(here.root)
    data.root.rename(tmp_path / "moved")
    there = pack(small_config(Layout(tmp_path / "moved"), tmp_path / "there", on_bad="quarantine"))
    assert folder_bytes(there.root) == expected


def test_members_are_source_bytes_then_label_without_time_or_owner(sharded: Layout, packed: Manifest) -> None:
    seen = []
    for path in tars(packed, "train"):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            for npy, cls in zip(members[::2], members[1::2], strict=True):
                key = npy.name.removesuffix(".npy")
                assert cls.name == f"{key}.cls"
                for member in (npy, cls):
                    assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                    block = path.read_bytes()[member.offset : member.offset + 512]
                    assert block[257:265] == b"ustar\x0000"  # POSIX USTAR; GNU's would be "ustar  "
                assert tar.extractfile(npy).read() == sharded.path(key).read_bytes()  # type: ignore[union-attr]
                assert tar.extractfile(cls).read() == str(sharded.target(key)).encode()  # type: ignore[union-attr]
                seen.append(key)
    assert seen == sorted(sharded.train)
    for path in tars(packed, "test"):
        with tarfile.open(path) as tar:
            assert [member.name for member in tar.getmembers()] == [f"{key}.npy" for key in sorted(sharded.test)]


def test_the_manifest_leads_to_every_sample_and_tells_its_label(sharded: Layout, packed: Manifest) -> None:
    assert packed.keys_of(np.arange(len(packed))) == sorted(sharded.train) + sorted(sharded.test)
    for row in range(len(packed)):
        key, size = packed.key(row), int(packed.size[row])
        with (packed.root / packed.shards[packed.shard[row]].name).open("rb") as file:
            file.seek(int(packed.offset[row]))
            assert file.read(size) == sharded.path(key).read_bytes()
        in_train = key in sharded.train
        assert packed.target[row] == (sharded.target(key) if in_train else UNKNOWN_TARGET)
        assert (packed.fold[row] >= 0) == in_train
    assert packed.splits["train"] == {"samples": 12, "positive": 4, "missing": 0, "quarantined": 0}
    assert packed.splits["test"] == {"samples": 4, "positive": 0, "missing": 0, "quarantined": 0}


def test_webdataset_reads_every_sample(sharded: Layout, packed: Manifest) -> None:
    for split, keys in (("train", sharded.train), ("test", sharded.test)):
        samples = list(wds.WebDataset([str(path) for path in tars(packed, split)], shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == sorted(keys)
        for sample in samples:
            assert sample["npy"] == sharded.path(sample["__key__"]).read_bytes()
            if split == "train":
                assert int(sample["cls"]) == sharded.target(sample["__key__"])


def test_tar_lists_every_member_and_extracts_the_source_files(
    sharded: Layout, packed: Manifest, tmp_path: Path
) -> None:
    for path in tars(packed, "train"):
        listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
        subprocess.run(["tar", "xf", path, "-C", tmp_path], check=True)
        names = listed.stdout.split()
        assert names and not listed.stderr
        assert [name.rpartition(".")[2] for name in names] == ["npy", "cls"] * (len(names) // 2)
        for name in names[::2]:
            assert (tmp_path / name).read_bytes() == sharded.path(name.removesuffix(".npy")).read_bytes()


@pytest.mark.parametrize(("split", "extensions"), [("train", ["npy", "cls"]), ("test", ["npy"])])
def test_dali_reads_every_sample_through_our_index(
    sharded: Layout, packed: Manifest, split: str, extensions: list[str]
) -> None:
    dali = pytest.importorskip("nvidia.dali")
    paths = tars(packed, split)
    keys = sorted(sharded.train if split == "train" else sharded.test)

    @dali.pipeline_def(batch_size=len(keys), num_threads=1, device_id=None)
    def pipeline() -> Any:
        columns = dali.fn.readers.webdataset(
            paths=[str(path) for path in paths],
            index_paths=[str(path.with_suffix(".idx")) for path in paths],
            ext=extensions,
            missing_component_behavior="error",
        )
        return tuple(columns) if len(extensions) > 1 else columns

    outputs = pipeline().run()
    for number, key in enumerate(keys):
        assert np.asarray(outputs[0].at(number)).tobytes() == sharded.path(key).read_bytes()
        if split == "train":
            assert np.asarray(outputs[1].at(number)).tobytes() == str(sharded.target(key)).encode()


@pytest.mark.parametrize(("train", "test"), [(12, 0), (0, 4)])
def test_one_split_alone_packs(make_data: MakeData, tmp_path: Path, train: int, test: int) -> None:
    data = make_data(train=train, test=test)
    manifest = pack(small_config(data, tmp_path / "out"))
    assert (len(manifest.rows("train")), len(manifest.rows("test"))) == (train, test)
    assert not list(verify(manifest.root))


# ---- Summing time bins


@given(
    values=st.integers(0, 2**32 - 1).map(lambda seed: 8 * snippet(seed, (6, 12, 4))),
    time_bins=st.sampled_from([1, 2, 3, 4, 6, 12]),
)
@settings(max_examples=40, deadline=None)
def test_time_binning_is_the_sum_of_neighbours_over_the_root_of_their_number(
    values: np.ndarray, time_bins: int
) -> None:
    expected = np.stack([values[:, k::time_bins].astype(np.float64) for k in range(time_bins)]).sum(0)
    expected /= np.sqrt(time_bins)
    binned = time_binned(values, time_bins)
    assert binned.dtype == np.float16
    assert np.allclose(binned, expected, rtol=2**-10, atol=2**-10)  # twice half a unit in the last place of float16


def test_time_bins_packed_are_those_summed_and_noise_keeps_its_deviation(make_data: MakeData, tmp_path: Path) -> None:
    data = make_data(shape=(6, 28, 64))
    manifest = pack(small_config(data, tmp_path / "out", time_bin=7))
    assert manifest.shape == (6, 4, 64)
    deviations = []
    for path in tars(manifest, "train"):
        with tarfile.open(path) as tar:
            for member in tar.getmembers()[::2]:
                found = np.load(io.BytesIO(tar.extractfile(member).read()))  # type: ignore[union-attr]
                source = np.load(data.path(member.name.removesuffix(".npy"))).astype(np.float64)
                assert found.dtype == np.float16
                assert np.allclose(found, source.reshape(6, 4, 7, 64).sum(2) / np.sqrt(7), rtol=2**-10, atol=2**-10)
                deviations.append(found.astype(np.float64).std())
    assert np.mean(deviations) == pytest.approx(1, rel=0.03)
    assert not list(verify(manifest.root))


def test_time_bins_that_do_not_divide_are_refused_with_those_that_do(make_data: MakeData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"4: does not divide the 14 time bins; choose one of \[1, 2, 7, 14\]"):
        pack(small_config(make_data(), tmp_path / "out", time_bin=4))
    assert not (tmp_path / "out").exists()


def test_a_sum_beyond_float16_is_refused_not_packed_as_infinity(make_data: MakeData, tmp_path: Path) -> None:
    data = make_data()
    bright = np.full(SMALL_SHAPE, 60000, np.float16)
    check_finite(bright, "bright")
    np.save(data.path(data.train[3]), bright)
    with pytest.raises(InputError, match=rf"{data.train[3]}\.npy: the sum of 7 time bins goes beyond float16"):
        pack(small_config(data, tmp_path / "out", time_bin=7))


# ---- Missing and bad snippets


def skipped_rows(manifest: Manifest) -> list[list[str]]:
    with (manifest.root / "skipped.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_missing_files_are_refused_with_their_number_and_the_first_key(make_data: MakeData, tmp_path: Path) -> None:
    data = make_data()
    gone = sorted(data.train)[4:7]
    for key in gone:
        data.path(key).unlink()
    with pytest.raises(InputError, match=rf"no file for 3 of 12 keys, the first is {gone[0]}\.npy"):
        pack(small_config(data, tmp_path / "out"))
    manifest = pack(small_config(data, tmp_path / "out", allow_missing=True))
    assert skipped_rows(manifest) == [["id", "split", "reason"], *([key, "train", "no file"] for key in gone)]
    assert manifest.splits["train"] == {
        "samples": 9,
        "positive": sum(data.target(key) for key in data.train if key not in gone),
        "missing": 3,
        "quarantined": 0,
    }


def test_quarantine_leaves_out_exactly_the_bad_and_says_why(make_data: MakeData, tmp_path: Path) -> None:
    data = make_data()
    first, nan, short = sorted(data.train)[0], sorted(data.train)[5], data.test[1]
    np.save(data.path(first), snippet(0, (6, 15, 16)))  # the odd one out, though it is the first
    values = snippet(1)
    values[1, 2, 3] = np.nan
    np.save(data.path(nan), values)
    data.path(short).write_bytes(data.path(short).read_bytes()[:-2])
    manifest = pack(small_config(data, tmp_path / "out", on_bad="quarantine"))
    left = set(manifest.keys_of(np.arange(len(manifest))))
    assert left == {*data.train, *data.test} - {first, nan, short}
    rows = {key: (split, reason) for key, split, reason in skipped_rows(manifest)[1:]}
    assert rows.keys() == {first, nan, short}
    assert rows[first] == ("train", "shape (6, 15, 16), expected (6, 14, 16) like the others")
    assert rows[nan] == ("train", "nan at panel 1, time bin 2, channel 3; expected finite values")
    assert rows[short][0] == "test"
    assert "bytes, expected" in rows[short][1]
    assert [manifest.splits[split]["quarantined"] for split in ("train", "test")] == [2, 1]
    assert not list(verify(manifest.root))


# ---- Interrupted, and again


def fail_in_the_third_shard(data: Layout, out: Path) -> bytes:
    """Pack until a bad snippet stops it, then mend that snippet; return its good bytes."""
    path = data.path(late_key(data))
    good = path.read_bytes()
    path.write_bytes(good[:-2] + INFINITY)
    with pytest.raises(InputError, match=path.name):
        pack(small_config(data, out))
    path.write_bytes(good)
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob(".*.tmp"))
    return good


def test_a_try_after_a_failed_one_keeps_finished_shards(sharded: Layout, packed: Manifest, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fail_in_the_third_shard(sharded, out)
    before = file_states(out)
    assert {"train-000000.tar", "train-000000.idx", "train-000001.tar", "train-000001.idx"} <= before.keys()
    pack(small_config(sharded, out))
    after = file_states(out)
    assert {name: after[name] for name in before} == before
    assert data_set_bytes(out) == data_set_bytes(packed.root)


def flip_a_tar_bit(data: Layout, out: Path) -> None:
    path = out / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)


def cut_an_index(data: Layout, out: Path) -> None:
    os.truncate(out / "train-000000.idx", 10)


def remove_a_tar(data: Layout, out: Path) -> None:
    (out / "train-000000.tar").unlink()


def empty_a_note(data: Layout, out: Path) -> None:
    (out / ".pack" / "train-000000.tar.json").write_bytes(b"")


def leave_rubbish(data: Layout, out: Path) -> None:
    (out / "train-000099.tar").write_bytes(b"of other options")
    (out / ".train-000001.tar.7.tmp").write_bytes(b"of a killed process")
    (out / "sample_submission.csv").write_text("of another input")


@pytest.mark.parametrize("damage", [flip_a_tar_bit, cut_an_index, remove_a_tar, empty_a_note, leave_rubbish])
def test_what_is_damaged_between_the_tries_is_written_anew(
    sharded: Layout, packed: Manifest, tmp_path: Path, damage: Any
) -> None:
    out = tmp_path / "out"
    fail_in_the_third_shard(sharded, out)
    damage(sharded, out)
    pack(small_config(sharded, out))
    assert data_set_bytes(out) == data_set_bytes(packed.root)


def test_a_source_file_changed_between_the_tries_is_packed_as_it_is_now(sharded: Layout, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fail_in_the_third_shard(sharded, out)
    path = sharded.path(sorted(sharded.train)[0])
    np.save(path, snippet(99, SHARDED_SHAPE))
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))  # file systems have coarse clocks
    pack(small_config(sharded, out))
    assert folder_bytes(out) == folder_bytes(pack(small_config(sharded, tmp_path / "fresh")).root)


def test_a_try_with_other_options_keeps_nothing_of_the_first(sharded: Layout, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fail_in_the_third_shard(sharded, out)
    pack(small_config(sharded, out, time_bin=2, seed=1))
    fresh = pack(small_config(sharded, tmp_path / "fresh", time_bin=2, seed=1))
    assert folder_bytes(out) == folder_bytes(fresh.root)


def test_finished_shards_of_another_shape_are_not_kept(sharded: Layout, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fail_in_the_third_shard(sharded, out)
    # The first shard's files stay as they were, but most cadences now have another shape of the same size.
    for key in [*sorted(sharded.train)[5:], *sharded.test]:
        np.save(sharded.path(key), snippet(5, (6, 32, 512)))
    with pytest.raises(InputError, match="like the others"):
        pack(small_config(sharded, out))


# Packs as `python -m shard_tools pack` does, but stops and waits in the middle of the third shard.
STANDING_STILL = """
import os, time
from shard_tools import tar_shard as shard
from shard_tools.__main__ import main
read_snippet = shard.read_snippet
def stand_still(path, cast):
    if path.stem == os.environ["STAND_STILL_AT"]:
        print("standing still", flush=True)
        time.sleep(600)
    return read_snippet(path, cast)
shard.read_snippet = stand_still
main()
"""


@pytest.fixture
def standing_still(sharded: Layout, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that waits in the middle of packing `sharded` into tmp_path / "out"."""
    arguments = ["pack", "--input", sharded.root, "--out", tmp_path / "out", "--folds", "3", "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", STANDING_STILL, *map(str, arguments), "--shard-mb", "1"],
        cwd=ROOT,
        env={**os.environ, "STAND_STILL_AT": late_key(sharded)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "standing still\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_after_kill_9_the_next_try_ends_as_if_nothing_had_been(
    sharded: Layout, packed: Manifest, tmp_path: Path, standing_still: subprocess.Popen[str]
) -> None:
    out = tmp_path / "out"
    standing_still.send_signal(signal.SIGKILL)
    standing_still.wait()
    assert list(out.glob(".train-000002.tar.*.tmp"))
    assert not (out / "manifest.json").exists()
    before = file_states(out)
    pack(small_config(sharded, out))
    assert folder_bytes(out) == folder_bytes(packed.root)  # hidden files too: nothing temporary is left
    assert file_states(out)["train-000000.tar"] == before["train-000000.tar"]


def test_a_folder_that_another_process_packs_into_is_refused(
    sharded: Layout, tmp_path: Path, standing_still: subprocess.Popen[str]
) -> None:
    before = folder_bytes(tmp_path / "out")
    with pytest.raises(InputError, match="another process is writing here"):
        pack(small_config(sharded, tmp_path / "out"))
    assert folder_bytes(tmp_path / "out") == before
    assert standing_still.poll() is None


# ---- A folder that holds something


def test_a_finished_pack_of_the_same_input_stays_as_it_is(
    sharded: Layout, packed: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    before = file_states(packed.root)
    with caplog.at_level("INFO"):
        again = pack(small_config(sharded, packed.root))
    assert "is already packed" in caplog.text
    assert file_states(packed.root) == before
    assert again.identity == packed.identity


@pytest.mark.parametrize("option", [{"time_bin": 2}, {"seed": 1}, {"folds": 2}, {"shard_mb": 2}])
def test_a_finished_pack_with_other_options_is_refused(
    sharded: Layout, packed: Manifest, option: dict[str, int]
) -> None:
    with pytest.raises(InputError, match="made with other keys, labels, options or shapes"):
        pack(small_config(sharded, packed.root, **option))


def test_a_folder_with_something_else_is_refused_and_untouched(make_data: MakeData, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tar").write_bytes(b"years of work")
    with pytest.raises(InputError, match=r"holds something else \(thesis\.tar\)"):
        pack(small_config(make_data(), out))
    assert folder_bytes(out) == {"thesis.tar": b"years of work"}


def test_what_a_file_manager_left_in_the_output_folder_is_not_in_the_way(make_data: MakeData, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in (".DS_Store", "Thumbs.db", "._shards"):
        (out / name).write_bytes(b"of a file manager")
    assert not list(verify(pack(small_config(make_data(), out)).root))
    assert (out / ".DS_Store").read_bytes() == b"of a file manager"


def test_the_input_folder_is_no_output_folder(make_data: MakeData) -> None:
    data = make_data()
    before = folder_bytes(data.root)
    with pytest.raises(InputError, match="holds something else"):
        pack(small_config(data, data.root))
    assert folder_bytes(data.root) == before


def test_a_try_killed_between_the_manifest_and_the_end_is_a_finished_one(sharded: Layout, packed: Manifest) -> None:
    before = folder_bytes(packed.root)
    (packed.root / ".pack").mkdir()
    (packed.root / ".pack" / "lock").touch()
    (packed.root / SOURCES).rename(packed.root / f".{SOURCES}.7.tmp")
    pack(small_config(sharded, packed.root))
    assert folder_bytes(packed.root) == before


def test_a_header_of_odd_length_packs_verifies_and_keeps_its_bytes(make_data: MakeData, tmp_path: Path) -> None:
    data = make_data()
    path = data.path(data.train[0])
    header = npy_header(SMALL_SHAPE)
    odd = header[:8] + (len(header) - 10 + 3).to_bytes(2, "little") + header[10:-1] + b"   \n"
    path.write_bytes(odd + snippet(0).tobytes())
    assert np.array_equal(np.load(path), snippet(0))
    manifest = pack(small_config(data, tmp_path / "out"))
    assert not list(verify(manifest.root))
