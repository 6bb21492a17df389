"""Several data sets as one: every sample once, from its own store, and nothing that two of them contradict."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infer import InferConfig, infer
from pipeline import open_loader
from pipeline.augment import DrawConfig
from pipeline.plan import Order, Share
from shard_tools.errors import InputError
from shard_tools.joined import hash_keys, read_manifests
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.pack import PackConfig, pack
from shard_tools.sample import read_snippet_of
from tests.conftest import Layout, MakeData, small_config
from tests.s3_server import serving_s3
from tests.tiny import CANVAS, tiny_config, write_tiny_data
from train import train
from training.config import to_dict


def renamed(data: Path, prefix: str) -> Path:
    """The same data set under other keys."""
    for path in [*data.rglob("*.npy")]:
        path.rename(path.with_name(f"{path.stem[0]}{prefix}{path.stem[1:]}.npy"))
    for name in ("train_labels.csv", "sample_submission.csv"):
        rows = [line.split(",") for line in (data / name).read_text().split()]
        changed = [rows[0], *([f"{key[0]}{prefix}{key[1:]}", target] for key, target in rows[1:])]
        (data / name).write_text("".join(f"{','.join(row)}\n" for row in changed))
    return data


def pack_some(folder: Path, prefix: str, train: int, test: int = 5, **options: object) -> Manifest:
    data = renamed(write_tiny_data(folder / prefix / "data", train, test), prefix)
    values = {"folds": 5, "shard_mb": 1, **options}
    return pack(PackConfig(data, str(folder / prefix / "shards"), **values))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """Three data sets whose shards have the same names."""
    folder = tmp_path_factory.mktemp("joined")
    return [pack_some(folder, prefix, train) for prefix, train in (("p", 40), ("q", 21), ("r", 32))]


@pytest.fixture(scope="module")
def whole(sets: list[Manifest]) -> Manifest:
    return read_manifests([manifest.root for manifest in sets])


def test_the_whole_holds_each_data_sets_samples_in_its_order(sets: list[Manifest], whole: Manifest) -> None:
    assert len({shard.name for manifest in sets for shard in manifest.shards}) < len(whole.shards)
    assert len(whole) == sum(map(len, sets)) and len(whole.keys) == len(whole)
    assert whole.splits["train"]["samples"] == 93 and whole.splits["test"]["samples"] == 15
    start = 0
    for manifest in sets:
        for row in range(len(manifest)):
            assert whole.key(start + row) == manifest.key(row)
            assert np.array_equal(read_snippet_of(whole, start + row), read_snippet_of(manifest, row))
        assert np.array_equal(whole.fold[start : start + len(manifest)], manifest.fold)
        assert np.array_equal(whole.target[start : start + len(manifest)], manifest.target)
        start += len(manifest)


def test_one_data_set_is_what_it_was(sets: list[Manifest]) -> None:
    alone, as_ever = read_manifests([sets[0].root]), read_manifest(sets[0].root)
    assert alone.identity == as_ever.identity and alone.root == as_ever.root and alone.shards == as_ever.shards


def test_the_whole_is_another_data_set_in_another_order(sets: list[Manifest], whole: Manifest) -> None:
    roots = [manifest.root for manifest in sets]
    identities = {read_manifests(chosen).identity for chosen in (roots, roots[::-1], roots[:2], roots[1:], roots[:1])}
    assert len(identities) == 5 and whole.identity in identities


@given(world_size=st.integers(1, 4), batch_size=st.integers(1, 9), epoch=st.integers(0, 3), fold=st.integers(0, 4))
def test_every_sample_is_read_once_an_epoch_over_all_ranks(
    whole: Manifest, world_size: int, batch_size: int, epoch: int, fold: int
) -> None:
    rows = whole.rows("train", fold)
    order = Order(rows, whole.target[rows], seed=1)
    shares = [Share(len(order), batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    read = []
    for share in shares:
        for step in range(share.steps):
            positions, counts = share.positions(step)
            read += order.rows_at(epoch, positions)[counts].tolist()
    assert sorted(read) == rows.tolist()


def test_a_loader_goes_on_in_the_middle_of_an_epoch_bit_for_bit(sets: list[Manifest]) -> None:
    roots = [str(manifest.root) for manifest in sets]
    with (
        open_loader(roots, batch_size=8, canvas=CANVAS, augment=DrawConfig()) as first,
        open_loader(roots, batch_size=8, canvas=CANVAS, augment=DrawConfig()) as second,
    ):
        batches = iter(first)
        for _ in range(5):
            next(batches)
        second.load_state_dict(first.state_dict())
        for one, other in zip(batches, second, strict=True):
            assert torch.equal(one.image, other.image) and torch.equal(one.row, other.row)


def test_a_damaged_shard_is_named_with_its_own_folder(sets: list[Manifest], tmp_path: Path) -> None:
    copies = [Path(shutil.copytree(manifest.root, tmp_path / f"set{n}")) for n, manifest in enumerate(sets)]
    whole = read_manifests(copies)
    name = sets[1].shards[0].name
    (copies[1] / name).write_bytes(b"")
    rows = [row for row in range(len(whole)) if whole.shards[whole.shard[row]].name == f"1/{name}"]
    with pytest.raises(InputError, match=f"{copies[1] / name}.*{whole.key(rows[0])}"):
        read_snippet_of(whole, rows[0])
    others = [row for row in range(len(whole)) if whole.shards[whole.shard[row]].name == f"0/{name}"]
    read_snippet_of(whole, others[0])


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_key_that_two_data_sets_hold_is_named_with_both(sets: list[Manifest], tmp_path: Path, split: str) -> None:
    data = renamed(write_tiny_data(tmp_path / "data", 12, 4), "z")
    taken = sets[1].keys_of(sets[1].rows(split))[1]
    path = next((data / split).rglob("*.npy"))
    old = path.stem
    path.rename(path.with_name(f"{taken}.npy"))
    table = data / {"train": "train_labels.csv", "test": "sample_submission.csv"}[split]
    table.write_text(table.read_text().replace(old, taken))
    (data / split / taken[0]).mkdir(exist_ok=True)
    (path.with_name(f"{taken}.npy")).rename(data / split / taken[0] / f"{taken}.npy")
    other = pack(PackConfig(data, str(tmp_path / "shards"), folds=5))
    with pytest.raises(InputError, match=f"{sets[1].root} and {other.root} both hold {taken};"):
        read_manifests([sets[0].root, sets[1].root, other.root])


def test_the_same_data_set_twice_is_refused(sets: list[Manifest]) -> None:
    with pytest.raises(InputError, match=r"both hold \w+ and 44 more"):
        read_manifests([sets[0].root, sets[0].root])


def test_data_sets_of_other_shapes_or_folds_are_refused(
    sets: list[Manifest], make_data: MakeData, tmp_path: Path
) -> None:
    odd: Layout = make_data("odd", train=12, test=0)
    shapes = pack(small_config(odd, tmp_path / "packed"))
    with pytest.raises(InputError, match="snippets of shape"):
        read_manifests([sets[0].root, shapes.root])
    folds = pack_some(tmp_path, "f", 20, folds=4)
    with pytest.raises(InputError, match=r"a number of folds of 5, .* 4; pack one of them again with --folds"):
        read_manifests([sets[0].root, folds.root])


@given(st.lists(st.text("abcXYZ019_-", min_size=1, max_size=40), min_size=1, max_size=60), st.data())
def test_hashes_of_keys_depend_on_the_key_alone(keys: list[str], data: st.DataObject) -> None:
    together = dict(zip(keys, hash_keys(pa.chunked_array([pa.array(keys)])).tolist(), strict=True))
    cut = data.draw(st.integers(0, len(keys)))
    apart = pa.chunked_array([pa.array(keys[:cut], pa.string()), pa.array(["x" * 70, *keys[cut:]]).slice(1)])
    assert hash_keys(apart).tolist() == [together[key] for key in keys]
    assert len(set(together.values())) == len(set(keys))


def test_training_and_prediction_take_several_data_sets(sets: list[Manifest], tmp_path: Path) -> None:
    roots = tuple(str(manifest.root) for manifest in sets)
    config = tiny_config(Path("x"), tmp_path / "run", epochs=1)
    train(dataclasses.replace(config, shards=roots))
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["shards"] == list(roots)
    out = tmp_path / "submission.csv"
    infer(InferConfig(roots, (tmp_path / "run" / "best.safetensors",), out, precision="float32"))
    with out.open(newline="") as file:
        found = [row["id"] for row in csv.DictReader(file)]
    expected = []
    for manifest in sets:
        with (Path(str(manifest.root)).parent / "data" / "sample_submission.csv").open(newline="") as file:
            expected += [row["id"] for row in csv.DictReader(file)]
    assert found == expected
    with pytest.raises(InputError, match="shards_identity"):
        train(dataclasses.replace(config, shards=roots[::-1], resume=True))


def test_one_data_set_is_recorded_as_a_string(tmp_path: Path) -> None:
    assert to_dict(tiny_config(tmp_path / "shards", tmp_path))["shards"] == str(tmp_path / "shards")


def test_a_folder_and_a_store_are_one(sets: list[Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "y"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    with serving_s3(sets[1], "s3://bucket/data") as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        whole = read_manifests([sets[0].root, "s3://bucket/data"])
        assert whole.store.is_remote
        with open_loader(whole, batch_size=4) as loader:
            found = {int(row): image for batch in loader for row, image in zip(batch.row, batch.image, strict=True)}
    start = len(sets[0])
    for row, image in found.items():
        manifest, own_row = (sets[0], row) if row < start else (sets[1], row - start)
        assert np.array_equal(image.numpy(), read_snippet_of(manifest, own_row))
    assert sorted(found) == whole.rows("train").tolist()
