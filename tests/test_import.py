"""Shards of other WebDataset tools: what is clear is imported as it was meant, and the rest is refused by name."""

import gzip
import io
import json
import pickle
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_tools.errors import InputError
from shard_tools.import_webdataset import ImportConfig, expand_sources, import_webdataset
from shard_tools.manifest import Manifest
from shard_tools.sample import read_snippet_of
from shard_tools.verify import verify
from tests.conftest import Command, data_set_bytes

SHAPE = (6, 8, 16)
Members = dict[str, bytes]


def array(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(SHAPE).astype(np.float16)


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def samples(count: int = 6) -> Members:
    members = {}
    for number in range(count):
        members |= {f"k{number:03d}.npy": npy(array(number)), f"k{number:03d}.cls": str(number % 2).encode()}
    return members


def write_tar(path: Path, members: Members, format: int = tarfile.PAX_FORMAT, mode: str = "w", prefix: str = "") -> str:
    with tarfile.open(path, mode, format=format) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(prefix + name)
            info.size, info.mtime = len(data), 1.5
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def take(tmp_path: Path, *sources: str, **options: Any) -> Manifest:
    values = {"folds": 2, "workers": 1, **options}
    return import_webdataset(ImportConfig(sources, str(tmp_path / "shards"), **values))


def check_values(manifest: Manifest, count: int = 6) -> None:
    assert len(manifest) == count and list(verify(manifest.root)) == []
    for row in range(count):
        assert np.array_equal(read_snippet_of(manifest, row), array(int(manifest.key(row)[-3:])))


def check_samples(manifest: Manifest, count: int = 6) -> None:
    check_values(manifest, count)
    assert manifest.target.tolist() == [int(key[-3:]) % 2 for key in manifest.keys.to_pylist()]


WRITERS: dict[str, Callable[[Path], str]] = {
    "PAX headers": lambda path: write_tar(path, samples()),
    "GNU headers": lambda path: write_tar(path, samples(), tarfile.GNU_FORMAT),
    "USTAR headers": lambda path: write_tar(path, samples(), tarfile.USTAR_FORMAT),
    "a ./ prefix": lambda path: write_tar(path, samples(), prefix="./"),
    "gzip": lambda path: write_tar(path, samples(), mode="w:gz"),
    "labels first": lambda path: write_tar(path, dict(sorted(samples().items()))),
    "all labels last": lambda path: write_tar(
        path, dict(sorted(samples().items(), key=lambda kv: kv[0][-3:] == "cls"))
    ),
}


@pytest.mark.parametrize("written", WRITERS)
def test_tars_in_every_form_are_imported(tmp_path: Path, written: str) -> None:
    manifest = take(tmp_path, WRITERS[written](tmp_path / "x.tar"))
    check_samples(manifest)
    assert sorted(manifest.keys.to_pylist()) == [f"k{number:03d}" for number in range(6)]


def test_shards_of_pack_are_imported_to_the_same_bytes(tmp_path: Path) -> None:
    first = take(tmp_path / "one", write_tar(tmp_path / "x.tar", samples()))
    again = take(tmp_path / "two", str(Path(str(first.root)) / "train-*.tar"))
    assert data_set_bytes(Path(str(again.root))) == data_set_bytes(Path(str(first.root)))


def test_importing_again_to_the_same_folder_leaves_it_as_it_is(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", samples())
    first = data_set_bytes(Path(str(take(tmp_path, path).root)))
    assert data_set_bytes(Path(str(take(tmp_path, path).root))) == first
    write_tar(tmp_path / "x.tar", samples() | {"k001.npy": npy(array(9))})
    with pytest.raises(InputError, match=r"changed since packing: .*x\.tar, k001\.npy"):
        take(tmp_path, path)


@settings(deadline=None, max_examples=40)
@given(
    dtype=st.sampled_from(["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"]),
    fortran=st.booleans(),
    zipped=st.booleans(),
    label=st.sampled_from(["cls", "txt", "json"]),
    prefix=st.sampled_from(["", "./", "a/b/", "./a.b/", "long/" * 30]),
    form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    mode=st.sampled_from(["w", "w:gz"]),
)
def test_any_mixture_of_forms_gives_the_same_values(
    dtype: str, fortran: bool, zipped: bool, label: str, prefix: str, form: int, mode: str
) -> None:
    members: Members = {}
    for number in range(6):
        values = np.asarray(array(number), dtype, order="F" if fortran else "C")
        members[f"k{number:03d}.npz" if zipped else f"k{number:03d}.npy"] = npz(x=values) if zipped else npy(values)
        members[f"k{number:03d}.{label}"] = str(number % 2).encode()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_tar(folder / "x.tar", members, form, mode, prefix)
        if len(prefix) > 96:
            with pytest.raises(InputError, match=r"x\.tar, long/.*bad key"):
                take(folder, path, cast="float16")
        else:
            check_samples(take(folder, path, cast="float16"))


def test_what_a_mac_adds_to_a_tar_is_left_out(tmp_path: Path) -> None:
    members = {}
    for name, data in samples().items():
        members |= {f"._{name}": b"\0\5\x16\7", name: data}
    check_samples(take(tmp_path, write_tar(tmp_path / "x.tar", members)))


def test_time_bins_are_summed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", samples())
    manifest = take(tmp_path, path, time_bin=2)
    assert manifest.shape == (6, 4, 16)
    for row in range(len(manifest)):
        whole = array(int(manifest.key(row)[-3:])).astype(np.float32)
        expected = (whole[:, 0::2] + whole[:, 1::2]) / np.sqrt(2)  # the noise keeps its level
        np.testing.assert_allclose(read_snippet_of(manifest, row), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("split", ["train", "test"])
def test_of_two_arrays_of_a_sample_one_is_named(tmp_path: Path, split: str) -> None:
    masks = {f"k{number:03d}.mask.npy": npy(np.zeros(SHAPE, np.float16)) for number in range(6)}
    path = write_tar(tmp_path / "x.tar", samples() | masks)
    with pytest.raises(InputError, match=r"k00\d\.mask\.npy: a second array of k00\d; choose one with --array-ext npy"):
        take(tmp_path, path, split=split)
    check_values(take(tmp_path / "npy", path, split=split, array_ext="npy"))
    masked = take(tmp_path / "mask", path, split=split, array_ext="mask.npy")
    assert len(masked) == 6 and not read_snippet_of(masked, 0).any()


def test_what_shard_writer_wrote_is_imported(tmp_path: Path) -> None:
    with wds.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(6):
            writer.write({"__key__": f"k{number:03d}", "npy": array(number), "cls": number % 2})
    check_samples(take(tmp_path, str(tmp_path / "train-{000000..000001}.tar")))


def test_a_pattern_takes_all_its_tars(tmp_path: Path) -> None:
    both = samples()
    for number, names in enumerate((list(both)[:6], list(both)[6:])):
        write_tar(tmp_path / f"part {number}.tar", {name: both[name] for name in names})
    check_samples(take(tmp_path, str(tmp_path / "part *.tar")))


def test_labels_under_other_names_and_arrays_in_npz(tmp_path: Path) -> None:
    members: Members = {}
    for number in range(6):
        members[f"k{number:03d}.image.npz"] = npz(on=array(number), mask=np.zeros(3))
        members[f"k{number:03d}.meta.json"] = json.dumps({"target": bool(number % 2), "snr": 3.5}).encode()
    path = write_tar(tmp_path / "x.tar", members)
    named = {"array_ext": "image.npz", "array_name": "on", "label_ext": "meta.json", "label_field": "target"}
    check_samples(take(tmp_path, path, **named))


def test_keys_with_dots_and_folders_stay_apart(tmp_path: Path) -> None:
    members: Members = {}
    for number in range(6):
        name = f"obs/2021.05/s.{number:03d}"
        members |= {f"{name}.npy": npy(array(number)), f"{name}.txt": f"{number % 2}.0\n".encode()}
    manifest = take(tmp_path, write_tar(tmp_path / "x.tar", members))
    check_samples(manifest)
    assert manifest.key(0) == "obs_2021_05_s_000"


def test_other_types_are_cast_where_that_is_asked_for(tmp_path: Path) -> None:
    exact = [np.asfortranarray(array(n).astype(">f4" if n % 2 else "f8")) for n in range(6)]
    members = samples() | {f"k{n:03d}.npy": npy(values) for n, values in enumerate(exact)}
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(InputError, match="--cast float16"):
        take(tmp_path, path)
    check_samples(take(tmp_path, path, cast="float16"))


def test_the_test_split_needs_no_labels(tmp_path: Path) -> None:
    members = {name: data for name, data in samples().items() if name.endswith("npy")} | {"readme.md": b"hello"}
    manifest = take(tmp_path, write_tar(tmp_path / "x.tar", members), split="test")
    assert manifest.splits["test"]["samples"] == 6 and manifest.target.tolist() == [-1] * 6


def test_importing_again_gives_the_same_bytes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", samples())
    staging = tmp_path / "staging"
    first = data_set_bytes(Path(str(take(tmp_path / "one", path, staging=staging).root)))
    assert first == data_set_bytes(Path(str(take(tmp_path / "two", path, staging=staging).root)))
    assert list(staging.iterdir()) == []


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    trap = tmp_path / "unpickled"
    held = np.empty(1, object)
    held[0] = Evil(trap)
    for members in (
        samples() | {"k000.npy": npy(held)},
        samples() | {"k000.npz": npz(x=held), "k000.npy": b""},
        samples() | {"k000.pyd": pickle.dumps(Evil(trap)), "k000.npy": npy(held)},
    ):
        with pytest.raises(InputError):
            take(tmp_path, write_tar(tmp_path / "x.tar", members), on_bad="fail")
    with pytest.raises(InputError, match="expected a name that ends with npy or npz"):
        take(tmp_path, str(tmp_path / "x.tar"), array_ext="pyd")
    assert not trap.exists()


@pytest.mark.parametrize("source", ["pipe:touch {trap}", "http://127.0.0.1:9/x.tar", "s3://bucket/x.tar", "-"])
def test_commands_and_urls_are_refused(tmp_path: Path, source: str) -> None:
    trap = tmp_path / "ran"
    with pytest.raises(InputError, match="expected a local tar file"):
        expand_sources((source.format(trap=trap),))
    assert not trap.exists()


FAULTS: dict[str, tuple[Members, str]] = {
    "no array": ({"a.cls": b"1"}, r"x\.tar: no array in 1 tars"),
    "no label": ({"a.npy": npy(array(0))}, r"x\.tar, a\.npy: no label"),
    "a label alone": (samples() | {"b.cls": b"1"}, "a label of b but no array"),
    "a label that is none": (samples() | {"k001.cls": b"seven"}, r"x\.tar, k001\.cls: target 'seven'"),
    "two arrays": (samples() | {"k001.npz": npz(x=array(1))}, r"k001\.npz: a second array of k001"),
    "two labels": (samples() | {"k001.txt": b"1"}, r"k001\.txt: a second label of k001"),
    "keys that become one": (samples() | {"k.001.npy": npy(array(1)), "k_001.npy": npy(array(2))}, "a second array of"),
    "no npz": (samples() | {"k009.npz": b"PK no", "k009.cls": b"1"}, r"k009\.npz: not an \.npz file"),
    "several in an npz": (samples() | {"k009.npz": npz(a=array(1), b=array(2))}, r"\['a', 'b'\], expected one array"),
    "no JSON": (samples() | {"k009.npy": npy(array(1)), "k009.json": b"{"}, r"k009\.json: not JSON"),
    "many fields": (samples() | {"k009.npy": npy(array(1)), "k009.json": b'{"a":1,"b":0}'}, "--label-field"),
    "not a number": (samples() | {"k001.npy": npy(array(1) * np.inf)}, r"^[^ ]*/x\.tar, k001\.npy: .*finite"),
    "another shape": (samples() | {"k001.npy": npy(array(1)[:, :4])}, r"^[^ ]*/x\.tar, k001\.npy: shape"),
    "no npy": (samples() | {"k001.npy": b"no"}, r"^[^ ]*/x\.tar, k001\.npy: not a readable npy"),
    "an empty key": ({".npy": npy(array(0))}, "bad key ''"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_tar_and_member(tmp_path: Path, fault: str) -> None:
    members, message = FAULTS[fault]
    with pytest.raises(InputError, match=message):
        take(tmp_path, write_tar(tmp_path / "x.tar", members))
    assert not (tmp_path / "shards" / "manifest.json").exists()


def test_a_tar_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    whole = Path(write_tar(tmp_path / "x.tar", samples())).read_bytes()
    packed = gzip.compress(whole)
    for name, data in (("cut.tar", whole[:5000]), ("cut.tar.gz", packed[: len(packed) // 2]), ("no.tar", b"x" * 2000)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=f"{name}: not a whole tar file"):
            take(tmp_path, str(tmp_path / name))


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    bomb = npz(x=np.zeros((1 << 30) // 8 + 100))
    assert len(bomb) < 2_000_000
    path = write_tar(tmp_path / "x.tar", samples() | {"k009.npz": bomb, "k009.cls": b"1"})
    with pytest.raises(InputError, match=r"k009\.npz: unpacks to 1,"):
        take(tmp_path, path)


def test_the_command_says_what_it_packed(tmp_path: Path, command: Command) -> None:
    path = write_tar(tmp_path / "x.tar", samples())
    answer = command("import", path, "--out", tmp_path / "shards", "--folds", 2)
    assert answer.code == 0 and "packed 6 cadences into 1 shard," in answer.out
    answer = command("import", tmp_path / "none.tar", "--out", tmp_path / "more")
    assert answer.code == 1 and "none.tar: no such file" in answer.err
