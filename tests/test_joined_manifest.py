"""Several data sets read as one."""

import csv
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer import InferConfig, infer
from pipeline.augment import DrawConfig
from pipeline.loader import Batch, Loader, LoaderConfig
from pipeline.plan import Order, Share
from shard_tools import joined_manifest
from shard_tools.errors import InputError
from shard_tools.joined_manifest import read_manifests
from shard_tools.key_digests import (
    ascending_runs,
    find_repeated,
    indices_of,
    leading_words,
    rows_with,
    sorted_digests,
    take,
    tell_apart,
)
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.pack import PackConfig, pack
from shard_tools.sample import read_snippet_of
from shard_tools.storage.base import StoreConfig
from shard_tools.storage.local import LocalStore
from tests.conftest import snippet, write_table
from tests.s3_server import environment, serving_s3
from tests.tiny import CANVAS, SHAPE, tiny_config
from train import train
from training.config import TrainConfig
from training.presets import parse_train_config
from training.weights import load_weights

FOLDS, TRAIN, TEST = 2, 16, 5
NAMES = ("a", "b", "c")
URL = "s3://bucket/set"


def write_set(folder: Path, name: str, shape: tuple[int, ...] = SHAPE, key: str = "") -> Path:
    """A data folder whose keys begin with its name, except a test id that may be given. Targets depend on the name."""
    first = 1000 * (1 + NAMES.index(name[-1]))
    keys = [f"{name}{number:04d}" for number in range(TRAIN + TEST)]
    keys[-1] = key or keys[-1]
    for number, each in enumerate(keys):
        path = folder / ("train" if number < TRAIN else "test") / each[0] / f"{each}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, snippet(first + number, shape))
    write_table(
        folder / "train_labels.csv",
        [(each, int(number % (1 + first // 1000) == 0)) for number, each in enumerate(keys[:TRAIN])],
    )
    write_table(folder / "sample_submission.csv", [(each, 0.5) for each in reversed(keys[TRAIN:])])
    return folder


def pack_set(folder: Path, name: str, folds: int = FOLDS, shape: tuple[int, ...] = SHAPE, key: str = "") -> Path:
    data = write_set(folder / f"{name}-data", name, shape, key)
    return Path(pack(PackConfig(data, str(folder / name), folds=folds, workers=1, shard_mb=1)).root)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sets")
    return [pack_set(folder, name) for name in NAMES]


def make_loader(manifest: Manifest, share: Share) -> Loader:
    rows = manifest.rows("train")
    return Loader(manifest, Order(rows, manifest.targets(rows), seed=3), share, None, config=LoaderConfig("cpu", 1))


def expected_snippet(key: str) -> np.ndarray:
    return snippet(1000 * (1 + NAMES.index(key[0])) + int(key[1:]), SHAPE)


def test_the_rows_of_several_data_sets_follow_each_other_and_keep_their_folds(roots: list[Path]) -> None:
    joined, alone = read_manifests(roots), [read_manifest(root) for root in roots]
    assert joined.keys.to_pylist() == [key for each in alone for key in each.keys.to_pylist()]
    for name in ("split", "target", "fold", "offset", "size"):
        assert getattr(joined, name).tolist() == [value for each in alone for value in getattr(each, name).tolist()]
    assert joined.splits["train"]["samples"] == len(roots) * TRAIN
    assert [each.rows for each in joined.data_sets] == [range(21), range(21, 42), range(42, 63)]


def test_shards_of_one_name_are_kept_apart(roots: list[Path]) -> None:
    joined = read_manifests(roots)
    assert len({shard.name for shard in joined.shards}) == len(joined.shards) == 2 * len(roots)
    for row in range(len(joined)):
        np.testing.assert_array_equal(read_snippet_of(joined, row), expected_snippet(joined.key(row)))


def test_one_data_set_is_read_as_ever(roots: list[Path]) -> None:
    alone = read_manifest(roots[0])
    for shards in (roots[0], str(roots[0]), [roots[0]], (str(roots[0]),)):
        found = read_manifests(shards)
        assert (found.identity, found.shards, found.files, found.root, found.parts) == (
            alone.identity, alone.shards, alone.files, roots[0], (),
        )  # fmt: skip


def test_a_damaged_sample_is_named_in_its_own_folder(roots: list[Path], tmp_path: Path) -> None:
    copies = [Path(shutil.copytree(root, tmp_path / root.name)) for root in roots]
    joined = read_manifests(copies)
    row = int(joined.rows("train")[TRAIN])  # the first of the second data set
    with (copies[1] / "train-000000.tar").open("r+b") as file:
        file.truncate(int(joined.offset[row]))
    with pytest.raises(InputError, match=f"{copies[1]}/train-000000.tar, {joined.key(row)}: "):
        read_snippet_of(joined, row)
    read_snippet_of(joined, 0)
    rows = joined.rows("train")
    share = Share(len(rows), 4)
    config = LoaderConfig("cpu", 1, on_bad_sample="skip", max_bad=TRAIN)
    loader = Loader(joined, Order(rows, joined.targets(rows)), share, CANVAS, DrawConfig(), config=config)
    list(loader)
    loader.close()
    assert joined.key(row) in loader.skipped
    assert all(key.startswith("b") and str(copies[1]) in reason for key, reason in loader.skipped.items())


@pytest.mark.parametrize("options, said", [
    ({"shape": (6, 7, 56)}, r"snippets of shape \(6, 14, 56\) and \(6, 7, 56\).*pack them to one shape"),
    ({"folds": 3}, "folds: 2 and 3.*--folds"),
    ({"key": "a0020"}, "a0020: is in .*a and in .*b, expected in one data set only"),  # in the test parts of both
    ({"key": "a0001"}, "a0001: is in .*a and in .*b, expected in one data set only"),  # in train and in test
])  # fmt: skip
def test_data_sets_that_do_not_fit_are_refused(
    roots: list[Path], tmp_path: Path, options: dict[str, object], said: str
) -> None:
    other = pack_set(tmp_path, "b", **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=said) as caught:
        read_manifests([roots[0], other])
    assert str(roots[0]) in str(caught.value) and str(other) in str(caught.value)


def test_no_data_set_is_refused() -> None:
    with pytest.raises(InputError, match="--shards: expected at least one"):
        read_manifests([])


def test_the_identity_covers_all_data_sets_in_order(roots: list[Path]) -> None:
    a, b, c = roots
    choices: list[list[Path]] = [[a], [b], [a, b], [b, a], [a, b, c], [a, c]]
    assert len({read_manifests(choice).identity for choice in choices}) == len(choices)
    assert read_manifests([a, b]).identity == read_manifests([str(a), str(b)]).identity


@settings(max_examples=15, deadline=None)
@given(world_size=st.integers(1, 5), batch_size=st.integers(1, 9), count=st.integers(2, 3), epoch=st.integers(0, 3))
def test_each_row_is_planned_once_an_epoch_over_all_ranks(
    roots: list[Path], world_size: int, batch_size: int, count: int, epoch: int
) -> None:
    joined = read_manifests(roots[:count])
    rows = joined.rows("train", 0)
    order = Order(rows, joined.targets(rows), seed=5)
    seen: list[int] = []
    for rank in range(world_size):
        share = Share(len(order), batch_size, 1, rank, world_size)
        for step in range(share.steps):
            positions, counts = share.positions(step)
            seen += order.rows_at(epoch, positions)[counts].tolist()
    assert sorted(seen) == rows.tolist()
    assert {joined.key(row)[0] for row in seen} == set(NAMES[:count])


def contents(batches: Iterator[Batch]) -> list[tuple[list[int], bytes]]:
    return [(batch.row.tolist(), batch.image.numpy().tobytes()) for batch in batches]


@pytest.mark.parametrize("cut", [0, 1, 5, 11])
def test_a_loader_goes_on_in_the_middle_of_an_epoch_bit_for_bit(roots: list[Path], cut: int) -> None:
    share = Share(3 * TRAIN, 4)
    whole, stopped, resumed = (make_loader(read_manifests(roots), share) for _ in range(3))
    expected = contents(iter(whole))
    batches = iter(stopped)
    found = contents(next(batches) for _ in range(cut))
    resumed.load_state_dict(stopped.state_dict())
    assert found + contents(iter(resumed)) == expected
    for loader in (whole, stopped, resumed):
        loader.close()


@pytest.fixture
def on_s3(roots: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of the second data set in a store."""
    with serving_s3(read_manifest(roots[1]), URL) as port:
        for name, value in environment(f"http://127.0.0.1:{port}").items():
            monkeypatch.setenv(name, value)
        yield URL


def test_a_folder_and_a_store_are_read_as_one_and_the_cache_keeps_the_store_alone(
    roots: list[Path], on_s3: str, tmp_path: Path
) -> None:
    mixed = read_manifests([roots[0], on_s3, roots[2]], StoreConfig(cache_dir=tmp_path / "cache"))
    assert mixed.store.is_remote and mixed.root == f"{roots[0]}, {on_s3}, {roots[2]}"
    assert mixed.identity == read_manifests(roots).identity
    for _ in range(2):
        for row in range(len(mixed)):
            np.testing.assert_array_equal(read_snippet_of(mixed, row), expected_snippet(mixed.key(row)))
    assert len(list((tmp_path / "cache").rglob("*.sample"))) == TRAIN + TEST


def train_on(roots: list[Path], run_dir: Path, **changes: object) -> TrainConfig:
    shards = tuple(map(str, roots))
    config = tiny_config(shards[0], run_dir, epochs=1, **changes)  # type: ignore[arg-type]
    return replace(config, shards=shards if len(shards) > 1 else shards[0])


def test_a_run_over_two_data_sets_trains_goes_on_and_predicts_both(
    roots: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair = roots[:2]
    config = train_on(pair, tmp_path / "run")
    train(config)
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    assert content["shards"] == [str(root) for root in pair]
    with (tmp_path / "run" / "oof.csv").open() as file:
        assert {row["id"][0] for row in csv.DictReader(file)} == {"a", "b"}
    train(replace(config, resume=True))  # the same run, finished
    for other in (pair[::-1], roots, roots[:1]):
        with pytest.raises(InputError, match="shards_identity"):
            train(replace(train_on(other, tmp_path / "run"), resume=True))
    weights = (tmp_path / "run" / "best.safetensors",)
    out = tmp_path / "submission.csv"
    infer(InferConfig(tuple(map(str, pair)), weights, out, precision="float32"))
    with out.open() as file:
        ids = [row["id"] for row in csv.DictReader(file)]
    assert ids == [f"{name}{number:04d}" for name in "ab" for number in reversed(range(TRAIN, TRAIN + TEST))]
    single = tmp_path / "one.csv"
    infer(InferConfig(str(roots[1]), weights, single, precision="float32"))
    assert set(single.read_text().split()) < set(out.read_text().split())
    caplog.clear()
    infer(InferConfig(str(roots[1]), weights, tmp_path / "train.csv", "train", precision="float32"))
    assert "trained on this split" in caplog.text
    caplog.clear()
    infer(InferConfig(str(roots[2]), weights, tmp_path / "train.csv", "train", precision="float32"))
    assert "trained on this split" not in caplog.text


def test_a_run_over_one_data_set_is_recorded_as_ever(roots: list[Path], tmp_path: Path) -> None:
    train(train_on(roots[:1], tmp_path / "run"))
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    assert content["shards"] == str(roots[0])
    assert content["shards_identity"] == read_manifest(roots[0]).identity
    _, about = load_weights(tmp_path / "run" / "best.safetensors")
    assert about["shards_identity"] == content["shards_identity"] and "data_sets" not in about


def test_an_id_in_two_sample_submissions_is_refused(roots: list[Path], tmp_path: Path) -> None:
    """An id of which neither data set has a snippet is refused too."""
    packed = []
    for name in "ab":
        data = write_set(tmp_path / f"{name}-data", name)
        with (data / "sample_submission.csv").open("a") as file:
            file.write("both,0.5\n")
        packed.append(pack(PackConfig(data, str(tmp_path / name), folds=2, workers=1, allow_missing=True)).root)
    train(train_on(packed[:1], tmp_path / "run"))
    weights = (tmp_path / "run" / "best.safetensors",)
    with pytest.raises(InputError, match=r"both: is an id of the submission of .*a and of .*b"):
        infer(InferConfig(tuple(map(str, packed)), weights, tmp_path / "s.csv", fill_missing=0.5, precision="float32"))


def test_the_command_line_takes_one_folder_or_several() -> None:
    one = parse_train_config(["--shards", "a", "--run-dir", "r"])
    several = parse_train_config(["--shards", "a", "s3://b/c", "--run-dir", "r"])
    assert one.shards == ("a",) and several.shards == ("a", "s3://b/c")


keys = st.text("abc_-0", min_size=1, max_size=20)


def to_keys(found: list[str], cut: int) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(found[:cut], pa.string()), pa.array(found[cut:], pa.string())])


@given(st.lists(keys, min_size=2, max_size=40), st.integers(1, 39))
def test_digests_find_exactly_the_keys_that_repeat(found: list[str], cut: int) -> None:
    array = to_keys(found, cut)
    digests = [sorted_digests(pa.chunked_array([chunk])) for chunk in array.chunks]
    with ThreadPoolExecutor(2) as pool:
        rows = rows_with(array, find_repeated(digests, pool))
    assert rows.tolist() == [row for row, key in enumerate(found) if found.count(key) > 1]


@given(st.lists(keys, min_size=2, max_size=60), st.integers(1, 39), st.integers(0, 9), st.booleans())
def test_leading_words_find_exactly_the_keys_that_share_eight_letters(
    found: list[str], cut: int, skip: int, is_sorted: bool
) -> None:
    found = sorted(found[:cut]) + sorted(found[cut:]) if is_sorted else found
    words = leading_words(to_keys(found, cut), skip)
    letters = [key[skip : skip + 8] for key in found]
    assert np.array_equal(np.argsort(words, kind="stable"), np.argsort(np.array(letters), kind="stable"))
    with ThreadPoolExecutor(2) as pool:
        rows = indices_of(words, find_repeated(ascending_runs(words), pool))
    assert rows.tolist() == [row for row, each in enumerate(letters) if letters.count(each) > 1]


def test_numbers_become_ascending_runs_without_a_copy() -> None:
    for numbers in (np.arange(9), np.r_[5:9, 0:7, 3:3], np.random.default_rng(0).permutation(50), np.zeros(0)):
        numbers = numbers.astype(np.uint64)
        runs = ascending_runs(numbers)
        assert all((run[1:] >= run[:-1]).all() for run in runs)
        assert np.array_equal(np.concatenate(runs), numbers)
        assert not len(numbers) or all(np.shares_memory(run, numbers) for run in runs)


def test_words_that_tell_no_keys_apart_or_are_not_sorted_are_not_compared() -> None:
    words = np.arange(5000, dtype=np.uint64)
    assert tell_apart(words) and tell_apart(np.roll(words, 1000))
    assert not tell_apart(words // np.uint64(3000)) and not tell_apart(np.random.default_rng(0).permutation(words))


@given(st.lists(keys, min_size=1, max_size=40), st.integers(0, 40), st.data())
def test_rows_are_taken_from_every_chunk(found: list[str], cut: int, data: st.DataObject) -> None:
    rows = sorted(data.draw(st.sets(st.integers(0, len(found) - 1))))
    assert take(to_keys(found, cut), np.array(rows, np.int64)).to_pylist() == [found[row] for row in rows]


def test_rows_are_taken_from_chunks_that_do_not_fit_into_one() -> None:
    chunk = pa.array(["k" * 1000] * 100_000)
    array = pa.chunked_array([chunk] * 25)  # 2.5 GB of text, of which 100 MB are in memory
    assert take(array, np.array([0, 1_250_000, 2_499_999])).to_pylist() == ["k" * 1000] * 3


@pytest.mark.parametrize(
    ("digits", "is_sorted", "are_told_apart"),
    [
        ("{:012x}", True, True),
        ("one-long-name-for-all-{:03d}", True, True),
        ("{:02d}-set", True, True),
        ("{:012x}", False, False),
    ],
)
def test_a_key_in_the_first_and_third_of_three_data_sets_is_named(
    monkeypatch: pytest.MonkeyPatch, digits: str, is_sorted: bool, are_told_apart: bool
) -> None:
    answers: list[bool] = []
    tell_apart = joined_manifest.tell_apart
    monkeypatch.setattr(joined_manifest, "tell_apart", lambda words: answers.append(tell_apart(words)) or answers[-1])
    numbers = np.random.default_rng(0).permutation(180)
    texts = [[digits.format(number) for number in part] for part in np.split(numbers, 3)]
    texts = [sorted(text) for text in texts] if is_sorted else texts
    texts[2][7] = texts[0][11]
    with pytest.raises(InputError, match=f"^{texts[0][11]}: is in first and in third"):
        check_keys_differ(texts)
    assert all(answers) == are_told_apart
    check_keys_differ(texts[:2])


def check_keys_differ(texts: list[list[str]]) -> None:
    """Join keys alone."""
    manifests = [
        Manifest(LocalStore(Path(name)), (6, 1, 1), (), {}, {}, {}, "", to_keys(text, 5), *[np.zeros(len(text))] * 6)  # type: ignore[arg-type]
        for name, text in zip(("first", "second", "third"), texts, strict=False)
    ]
    joined_manifest._check_keys_differ(manifests)


def test_digests_that_are_equal_by_chance_refuse_nothing(roots: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shard_tools.key_digests._mix", lambda values: values & np.uint64(1))
    # So that all keys are compared by their digests.
    monkeypatch.setattr("shard_tools.joined_manifest.tell_apart", lambda _: False)
    joined = read_manifests(roots)
    assert len(joined) == 3 * (TRAIN + TEST)
