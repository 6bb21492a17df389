"""Shards in a store: an S3 server and a web server on loopback, behind a proxy that breaks what passes."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infer import InferConfig, infer
from pipeline.augment import DrawConfig
from pipeline.loader import Loader, LoaderConfig
from pipeline.plan import Order, Share
from shard_tools.errors import InputError, StoreError
from shard_tools.manifest import MANIFEST, Manifest, Shard, read_manifest
from shard_tools.observation.ingest import ingest
from shard_tools.observation.ingest_config import IngestConfig
from shard_tools.pack import PackConfig, pack
from shard_tools.sample import read_record
from shard_tools.storage.base import GIVE_UP_SECONDS, StoreConfig
from shard_tools.storage.upload import Upload
from shard_tools.tar_shard import PackedShard
from shard_tools.unfinished import WORK, ShardDestination
from shard_tools.verify import verify
from tests.conftest import ROOT, Command, folder_bytes
from tests.faulty_proxy import FaultyProxy, Request
from tests.observation_files import write_cadence
from tests.range_server import RangeServer, serving
from tests.s3_server import serving_s3, through_proxy
from tests.tiny import CANVAS, pack_tiny, tiny_config
from train import train

SLACK = 25.0  # seconds beyond a documented time: a request may take 15 to end, and the machine may be busy
PATIENCE = 1.5  # seconds, in place of the documented ones
URL = "s3://bucket/data"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def moto(manifest: Manifest) -> Iterator[int]:
    """The port of an S3 server that holds the data set."""
    with serving_s3(manifest, "s3://bucket/data") as port:
        yield port


@pytest.fixture
def proxy(moto: int) -> Iterator[FaultyProxy]:
    """A proxy to the S3 server, to which the environment leads."""
    with through_proxy(moto) as proxy:
        yield proxy


def batches(manifest: Manifest, epochs: int = 1, config: LoaderConfig = LoaderConfig(2)) -> Iterator[dict[str, Any]]:  # noqa: B008
    """Yield every batch of training epochs, with augmentation and CutMix."""
    rows = manifest.rows("train")
    order = Order(rows, manifest.target[rows], "uniform", 3)
    loader = Loader(manifest, order, Share(len(order), 7, 1, 0, 1), CANVAS, DrawConfig(cutmix=0.5), config=config)
    try:
        for _ in range(epochs):
            for batch in loader:
                yield {name: np.array(value) for name, value in vars(batch).items()}
    finally:
        loader.close()


@pytest.fixture(scope="module")
def expected(manifest: Manifest) -> list[dict[str, Any]]:
    return list(batches(manifest, 2))


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        for name in theirs:
            assert np.array_equal(mine[name], theirs[name]), name


def of_shards(proxy: FaultyProxy) -> list[Request]:
    return [request for request in proxy.requests if request.of_shard]


def test_batches_from_s3_are_those_of_the_folder(proxy: FaultyProxy, expected: list[dict[str, Any]]) -> None:
    assert_same(list(batches(read_manifest(URL), 2)), expected)
    assert len(of_shards(proxy)) >= 2 * 50


def test_batches_from_a_web_server_are_those_of_the_folder(manifest: Manifest, expected: list[dict[str, Any]]) -> None:
    with RangeServer(manifest.root.parent) as server, serving(server):
        assert_same(list(batches(read_manifest(f"{server.url}/shards/"), 2)), expected)


def test_batches_from_a_file_url_are_those_of_the_folder(manifest: Manifest, expected: list[dict[str, Any]]) -> None:
    assert_same(list(batches(read_manifest(f"file://{manifest.root}"), 2)), expected)


@pytest.mark.parametrize("fault", ["reset", "500", "503", "short", "cut", "wrong"])
def test_a_fault_of_each_first_read_changes_no_batch(
    proxy: FaultyProxy, expected: list[dict[str, Any]], fault: str
) -> None:
    remote = read_manifest(URL)
    seen: dict[tuple[str, str], int] = {}

    def first(request: Request) -> str | None:
        place = request.path, request.range
        seen[place] = seen.get(place, 0) + 1
        return fault if seen[place] == 1 else None

    proxy.fault = first
    assert_same(list(batches(remote)), expected[: len(expected) // 2])
    assert len(seen) == 50 and min(seen.values()) == 2


def test_every_fault_while_the_table_of_contents_is_read_is_mended(proxy: FaultyProxy, manifest: Manifest) -> None:
    faults = ["reset", "500", "short", "cut", None]
    for turn in range(5):  # so that each of the few requests meets each fault
        proxy.fault = lambda request, turn=turn: faults[(request.number + turn) % 5]  # type: ignore[misc]
        assert read_manifest(URL).identity == manifest.identity


def test_latency_changes_no_batch(proxy: FaultyProxy, expected: list[dict[str, Any]]) -> None:
    remote = read_manifest(URL)
    proxy.latency = 0.02
    assert_same(list(batches(remote)), expected[: len(expected) // 2])


@pytest.mark.parametrize("fault", ["reset", "503", "hang"])
def test_a_store_that_vanishes_in_mid_epoch_and_returns_changes_no_batch(
    proxy: FaultyProxy, expected: list[dict[str, Any]], fault: str
) -> None:
    remote = read_manifest(URL)
    began: list[float] = []

    def away(request: Request) -> str | None:
        if len(of_shards(proxy)) < 20:
            return None
        began.append(time.monotonic())
        gone = began[-1] - began[0] < 1
        if not gone:
            proxy.released.set()
        return fault if gone else None

    proxy.fault = away
    if fault == "hang":  # a timer ends the fault, as no further request would come to end it
        import threading

        threading.Timer(2, proxy.released.set).start()
    assert_same(list(batches(remote)), expected[: len(expected) // 2])
    assert len(began) > 5


@pytest.mark.parametrize("fault", ["reset", "500", "hang"])
def test_a_store_that_stays_away_is_an_error_within_the_documented_time(
    proxy: FaultyProxy, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = read_manifest(URL)
    found = batches(remote, config=LoaderConfig(2, on_bad_sample="skip"))  # skipping samples does not apply to a store
    next(found)
    monkeypatch.setattr(remote.store, "_patience", PATIENCE)  # only now, as a busy machine may need longer before
    proxy.fault = lambda request: fault
    began = time.monotonic()
    with pytest.raises(StoreError) as caught:
        list(found)
    assert time.monotonic() - began < PATIENCE + SLACK
    message = str(caught.value)
    assert URL in message and ".tar: no answer for 2 s" in message and "--resume" in message
    assert "Signature" not in message


def test_a_store_that_is_not_there_is_an_error_within_the_documented_time(command: Command) -> None:
    began = time.monotonic()
    answer = command("info", "http://127.0.0.1:1/data", "--store-timeout", 1)
    assert answer.code == 1 and "http://127.0.0.1:1/data/manifest.json: no answer for 1 s" in answer.err
    assert time.monotonic() - began < 1 + SLACK


def test_the_documented_time_is_the_default_and_in_the_help(command: Command, capsys: Any) -> None:
    assert StoreConfig().store_timeout == GIVE_UP_SECONDS == 60
    with pytest.raises(SystemExit):
        command("info", "--help")
    assert "60" in capsys.readouterr().out.split("--store-timeout")[1][:300]


def test_a_missing_shard_is_an_error_at_once(proxy: FaultyProxy) -> None:
    remote = read_manifest(URL)
    proxy.fault = lambda request: "404" if request.of_shard else None
    with pytest.raises(InputError, match=r"s3://bucket/data/train-000000.tar: no such shard in the store \(404\)"):
        read_record(remote, 0)
    assert len(of_shards(proxy)) == 1


def test_refused_access_is_an_error_at_once(proxy: FaultyProxy) -> None:
    remote = read_manifest(URL)
    proxy.fault = lambda request: "403"
    with pytest.raises(StoreError, match=r"refuses access.*credentials") as caught:
        read_record(remote, 0)
    assert len(of_shards(proxy)) == 2  # one with the signed URL, and one more with new credentials
    assert "Signature" not in str(caught.value)


@pytest.mark.parametrize(("fault", "said"), [("cut", "bytes, expected"), ("wrong", "another sample lies there")])
def test_a_sample_that_stays_wrong_is_named(proxy: FaultyProxy, manifest: Manifest, fault: str, said: str) -> None:
    remote = read_manifest(URL)
    proxy.fault = lambda request: fault if request.of_shard else None
    with pytest.raises(InputError, match=f"s3://bucket/data/train-000000.tar, {manifest.key(3)}: .*{said}"):
        read_record(remote, 3)


def test_a_server_without_ranges_is_refused(manifest: Manifest, proxy: FaultyProxy) -> None:
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Plain(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(manifest.root))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Plain) as server, serving(server):
        remote = read_manifest(f"http://127.0.0.1:{server.server_port}/.")
        with pytest.raises(InputError, match="the server ignores ranges"):
            read_record(remote, 0)


def test_the_second_epoch_from_the_cache_makes_no_request(
    proxy: FaultyProxy, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = StoreConfig(cache_dir=tmp_path / "cache", cache_size=1.0)
    half = len(expected) // 2
    assert_same(list(batches(read_manifest(URL, config))), expected[:half])
    remote = read_manifest(URL, config)  # as in a later run
    before = len(proxy.requests)
    assert_same(list(batches(remote, 2)), expected)
    assert len(proxy.requests) == before


@pytest.mark.parametrize("damage", ["cut", "flip", "zeros", "longer"])
def test_a_damaged_file_of_the_cache_is_read_from_the_store_again(
    proxy: FaultyProxy, manifest: Manifest, tmp_path: Path, damage: str
) -> None:
    remote = read_manifest(URL, StoreConfig(cache_dir=tmp_path))
    whole = read_record(remote, 0).copy()
    (path,) = tmp_path.rglob("*.sample")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-100] ^= 1
    middle = len(data) // 2
    changed = {"cut": data[:middle], "flip": data, "zeros": data[:middle] + bytes(len(data) - middle)}
    path.write_bytes(changed.get(damage, data + b"x"))
    assert np.array_equal(read_record(remote, 0), whole)
    assert len(of_shards(proxy)) == 2
    assert np.array_equal(read_record(remote, 0), whole)
    assert len(of_shards(proxy)) == 2  # the cache was mended


def test_another_data_set_at_the_same_url_is_not_served_from_the_cache(tmp_path: Path) -> None:
    first, second = pack_tiny(tmp_path / "a", 30, 3), pack_tiny(tmp_path / "b", 40, 3)
    config = StoreConfig(cache_dir=tmp_path / "cache")
    with RangeServer(tmp_path / "served") as server, serving(server):
        for local in (first, second):
            shutil.rmtree(tmp_path / "served", ignore_errors=True)
            shutil.copytree(local.root, tmp_path / "served")
            remote = read_manifest(server.url, config)
            for row in range(len(local)):
                assert np.array_equal(read_record(remote, row), read_record(local, row))


_RANK = """
import sys
from pathlib import Path
import numpy as np
from shard_tools.manifest import read_manifest
from shard_tools.sample import read_record
from shard_tools.storage.base import StoreConfig
from tests.cache_size import held
url, local, cache, size, seed = sys.argv[1:]
remote, local = read_manifest(url, StoreConfig(cache_dir=Path(cache), cache_size=float(size))), read_manifest(local)
for _ in range(2):
    for row in np.random.default_rng(int(seed)).permutation(len(local)).tolist():
        assert np.array_equal(read_record(remote, row), read_record(local, row)), row
        assert held(Path(cache)) <= 1e9 * float(size)
"""


def test_ranks_share_a_cache_that_stays_within_its_bound(manifest: Manifest, tmp_path: Path) -> None:
    record = 512 + int(manifest.size.max())
    bound = f"{20.5 * record / 1e9:.9f}"
    (tmp_path / "mine.txt").write_text("not of the cache")
    with RangeServer(manifest.root) as server, serving(server):
        words = [sys.executable, "-c", _RANK, server.url, str(manifest.root), str(tmp_path / "cache"), bound]
        ranks = [subprocess.Popen([*words, str(seed)], cwd=ROOT) for seed in range(2)]
        assert [rank.wait(120) for rank in ranks] == [0, 0]
    files = list((tmp_path / "cache").rglob("*.sample"))
    assert 10 < len(files) <= 20
    assert not list(tmp_path.rglob("*.tmp"))
    assert (tmp_path / "mine.txt").exists()


def test_a_full_disk_under_the_cache_costs_time_and_nothing_else(
    proxy: FaultyProxy, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    remote = read_manifest(URL, StoreConfig(cache_dir=tmp_path))
    monkeypatch.setattr("shard_tools.storage.cache.os.writev", lambda descriptor, parts: 10)
    for row in range(3):
        assert np.array_equal(read_record(remote, row), read_record(manifest, row))
    assert caplog.text.count("No space left on device; keeping no further samples there") == 1
    assert not list(tmp_path.rglob("*.sample"))


def test_verify_and_info_take_a_url(proxy: FaultyProxy, manifest: Manifest, command: Command) -> None:
    assert command("verify", URL).out == f"{URL}: every byte is as it was packed\n"
    there, here = command("info", URL), command("info", manifest.root)
    assert (there.code, there.out) == (0, here.out.replace(str(manifest.root), URL))


def test_verify_finds_what_changed_in_a_store(proxy: FaultyProxy) -> None:
    proxy.fault = lambda request: "404" if request.path.endswith("train-000000.idx") else None
    assert list(verify(URL)) == [f"{URL}/train-000000.idx: no such file in the store"]
    proxy.fault = lambda request: "wrong" if request.of_shard and "test" in request.path else None
    assert list(verify(URL)) == [f"{URL}/test-000000.tar: its bytes changed after packing (SHA-256 differs)"]


def test_the_note_of_a_shard_in_a_store_never_describes_other_bytes(proxy: FaultyProxy, tmp_path: Path) -> None:
    """A pack of changed sources is killed after writing a shard, of the old one's size, and before writing its note."""
    place = ShardDestination(tmp_path, Upload("s3://bucket/notes", MANIFEST, WORK))
    written: list[bytes] = []

    def finish(inputs: str, data: bytes) -> None:
        def write(path: Path) -> PackedShard:
            path.write_bytes(data)
            path.with_suffix(".idx").write_bytes(b"v1.2 0\n")
            written.append(data)
            return PackedShard(Shard(path.name, len(data), "0" * 64, "0" * 64, 0), [], [])

        place.finish_shard("train-000000.tar", inputs, write)

    finish("first", b"old")
    proxy.fault = lambda request: "403" if request.method == "PUT" and request.path.endswith(".json") else None
    with pytest.raises(StoreError):
        finish("second", b"new")
    proxy.fault = lambda request: None
    finish("first", b"old")
    finish("first", b"old")
    assert written == [b"old", b"new", b"old"]


def test_training_and_prediction_from_s3_give_what_the_folder_gives(
    proxy: FaultyProxy, manifest: Manifest, tmp_path: Path
) -> None:
    here = tiny_config(manifest.root, tmp_path / "here", epochs=1)
    there = replace(here, shards=URL, run_dir=tmp_path / "there", store=StoreConfig(cache_dir=tmp_path / "cache"))
    for config in (here, there):
        train(config)
        weights = (config.run_dir / "best.safetensors",)
        infer(InferConfig(config.shards, weights, config.run_dir / "submission.csv", precision="float32", tta=True))
    for name in ("submission.csv", "oof.csv"):
        assert (there.run_dir / name).read_bytes() == (here.run_dir / name).read_bytes()


@pytest.fixture
def bucket(moto: int) -> Callable[[str], dict[str, bytes]]:
    """A function that returns the files under a prefix of the store."""
    import boto3

    client = boto3.client(
        "s3", "us-east-1", endpoint_url=f"http://127.0.0.1:{moto}", aws_access_key_id="x", aws_secret_access_key="y"
    )

    def read(prefix: str) -> dict[str, bytes]:
        found = client.list_objects_v2(Bucket="bucket", Prefix=f"{prefix}/").get("Contents", [])
        keys = [str(entry["Key"]) for entry in found]
        return {
            key.removeprefix(f"{prefix}/"): client.get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys
        }

    return read


def packing(manifest: Manifest, out: str, staging: Path) -> PackConfig:
    return PackConfig(manifest.root.parent / "data", out, staging, folds=5, workers=2, shard_mb=1)


def test_a_pack_into_s3_has_the_bytes_of_one_into_a_folder(
    proxy: FaultyProxy, manifest: Manifest, tmp_path: Path, bucket: Callable[[str], dict[str, bytes]]
) -> None:
    config = packing(manifest, "s3://bucket/packed-once", tmp_path / "staging")
    assert pack(config).identity == manifest.identity
    assert bucket("packed-once") == folder_bytes(manifest.root)
    assert not (tmp_path / "staging").exists()
    puts = [request.path for request in proxy.requests if request.method == "PUT"]
    assert puts[-1] == "/bucket/packed-once/manifest.json"
    before = len(proxy.requests)
    pack(config)  # again, with nothing to do
    assert not [request for request in proxy.requests[before:] if request.method != "GET" and request.method != "HEAD"]
    with pytest.raises(InputError, match="s3://bucket/packed-once: holds finished shards"):
        pack(replace(config, folds=3))


def test_a_source_that_is_replaced_after_a_pack_into_s3_is_named_whatever_its_time(
    proxy: FaultyProxy, manifest: Manifest, tmp_path: Path
) -> None:
    data = shutil.copytree(manifest.root.parent / "data", tmp_path / "data")
    config = replace(packing(manifest, "s3://bucket/replaced", tmp_path / "staging"), input=data)
    assert pack(config).identity == manifest.identity
    path = next((data / "test").rglob("*.npy"))
    os.utime(path, (4102444800, 4102444800))  # in 2100
    assert pack(config).identity == manifest.identity
    np.save(path, np.load(path) + np.float16(1))
    os.utime(path, (1, 1))
    with pytest.raises(InputError, match=f"s3://bucket/replaced: holds finished shards .changed since packing: {path}"):
        pack(config)


def test_an_interrupted_pack_into_s3_goes_on_and_makes_nothing_exist_before_its_end(
    proxy: FaultyProxy, manifest: Manifest, tmp_path: Path, bucket: Callable[[str], dict[str, bytes]]
) -> None:
    config = replace(packing(manifest, "s3://bucket/resumed", tmp_path / "staging"), workers=1)
    proxy.fault = lambda request: "403" if request.method == "PUT" and "test-000000" in request.path else None
    with pytest.raises(InputError, match=r"s3://bucket/resumed/test-000000.tar: the store refuses access"):
        pack(config)
    assert "train-000000.tar" in bucket("resumed") and "manifest.json" not in bucket("resumed")
    proxy.fault, before = lambda request: None, len(proxy.requests)
    pack(config)
    assert bucket("resumed") == folder_bytes(manifest.root)
    sent = [request.path for request in proxy.requests[before:] if request.method == "PUT"]
    assert "/bucket/resumed/train-000000.tar" not in sent and "/bucket/resumed/test-000000.tar" in sent


def test_a_store_that_fails_during_an_ingest_stops_it_and_no_cadence_is_left_out(
    proxy: FaultyProxy, tmp_path: Path, bucket: Callable[[str], dict[str, bytes]]
) -> None:
    files = [*write_cadence(tmp_path / "low"), *write_cadence(tmp_path / "high", fch1=8500.0)]
    (tmp_path / "two.lst").write_text("".join(f"{path}\n" for path in files))
    config = IngestConfig(
        "s3://bucket/cut", cadences=tmp_path / "two.lst", workers=1, staging=tmp_path / "s", on_bad="skip"
    )
    proxy.fault = lambda request: "403" if request.method == "PUT" and request.path.endswith("1.tar") else None
    with pytest.raises(StoreError, match="the store refuses access"):
        ingest(config)
    proxy.fault = lambda request: None
    ingest(config)
    assert {"test-000000.tar", "test-000001.tar"} <= set(bucket("cut")) and b"A1.h5" not in bucket("cut")["skipped.csv"]


def test_a_pack_leaves_alone_what_is_not_its_own(proxy: FaultyProxy, manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"s3://bucket/data/\.\.|s3://bucket: |s3://bucket/\w+: not part of a pack"):
        pack(packing(manifest, "s3://bucket", tmp_path / "staging"))
    with pytest.raises(InputError, match="a web server is read, not written"):
        pack(packing(manifest, proxy.url + "/bucket/elsewhere", tmp_path / "other"))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host/data", "unknown kind of store; expected s3://"),
        ("simplecache::s3://bucket/data", "unknown kind of store"),
        ("file://data", "expected file:///absolute/path"),
        ("https://name:secret@host/data", "credentials in a URL"),
        ("s3://", "expected s3://bucket/path"),
        ("https://host/data?list", "expected https://host/path"),
    ],
)
def test_an_odd_url_is_refused_with_what_was_expected(url: str, said: str, command: Command) -> None:
    answer = command("info", url)
    assert (answer.code, answer.err.count("\n")) == (1, 1)
    assert said in answer.err and "secret" not in answer.err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert "pip install gcsfs" in command("info", "gs://bucket/data").err


def test_a_folder_needs_no_fsspec(manifest: Manifest) -> None:
    script = (
        "import sys\nfrom shard_tools.verify import verify\n"
        "assert not list(verify(sys.argv[1]))\n"
        "print(*{'fsspec', 's3fs', 'aiohttp', 'shard_tools.storage.remote'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(manifest.root)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_the_tests_compare_something(expected: list[dict[str, Any]]) -> None:
    rows = np.concatenate([batch["row"][batch["counts"]] for batch in expected])
    assert len(rows) == 100 and set(np.bincount(rows)[:50]) == {2}
    assert torch.tensor(expected[0]["image"]).std() > 0
