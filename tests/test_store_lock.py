"""A store has one writer at a time: a second one is refused, and a dead one is replaced."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from shard_tools.pack import PackConfig, pack
from shard_tools.storage import open_remote
from shard_tools.storage.base import StoreConfig
from shard_tools.storage.lock import store_lock
from shard_tools.storage.remote import RemoteStore
from shard_tools.system import locks
from tests.conftest import ROOT
from tests.faulty_proxy import FaultyProxy, Request
from tests.s3_server import read_s3, s3_client, serving_s3, through_proxy
from tests.tiny import pack_tiny

NAME = ".pack/lock"
# Takes the lock, reports it, and holds it until its input ends.
HOLDER = """
import sys
from shard_tools.storage import open_remote
from shard_tools.storage.base import StoreConfig
from shard_tools.storage.lock import store_lock
with store_lock(open_remote(sys.argv[1], StoreConfig()), ".pack/lock"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("tiny"), 12, 3)


@pytest.fixture(scope="module")
def moto(manifest: Manifest) -> Iterator[int]:
    with serving_s3(manifest, "s3://bucket/data") as port:
        yield port


@pytest.fixture
def proxy(moto: int) -> Iterator[FaultyProxy]:
    with through_proxy(moto) as proxy:
        yield proxy


@pytest.fixture
def store(proxy: FaultyProxy, request: pytest.FixtureRequest) -> RemoteStore:
    return open_remote(f"s3://bucket/{request.node.name}", StoreConfig())


def hold(store: RemoteStore) -> subprocess.Popen[str]:
    """Start another process that holds the lock of a place."""
    words = [sys.executable, "-c", HOLDER, store.root]
    process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def elsewhere(sign: bytes) -> bytes:
    """The file of an owner on another machine, with a sign of life."""
    return json.dumps({**json.loads(sign), "machine": "another"}).encode()


def test_a_second_pack_to_the_same_url_is_refused_while_the_first_lives(
    proxy: FaultyProxy, manifest: Manifest, tmp_path: Path
) -> None:
    config = PackConfig(manifest.root.parent / "data", "s3://bucket/twice", tmp_path / "staging", shard_mb=1)
    process = hold(open_remote(config.out, StoreConfig()))
    with process, pytest.raises(InputError, match="s3://bucket/twice: another process is writing here"):
        pack(config)
    assert pack(config).identity == manifest.identity
    assert not [name for name in read_s3(proxy.port, "twice") if name.startswith(".pack")]


def test_the_place_of_a_process_that_was_killed_here_is_taken_at_once(
    store: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = hold(store)
    process.kill()
    process.communicate()
    monkeypatch.setattr("shard_tools.storage.lock._has_changed", lambda *_: pytest.fail("it was waited for"))
    with store_lock(store, NAME) as lock:
        assert lock


def test_of_two_that_find_an_owner_dead_one_takes_its_place(
    store: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "SILENT_SECONDS", 1.0)
    store.write(NAME, elsewhere(locks.sign_of_life(0)))
    monkeypatch.setattr("shard_tools.storage.lock.is_ours", lambda content: False)  # as if in another process
    results: list[str] = []
    one_is_refused = threading.Event()

    def take() -> None:
        try:
            with store_lock(store, NAME):
                results.append("taken")
                one_is_refused.wait(60)
        except InputError as error:
            results.append(str(error))
            one_is_refused.set()

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results)[1] == "taken" and "another process is writing here" in sorted(results)[0]


def test_an_owner_on_another_machine_that_gives_signs_of_life_is_alive(
    store: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "SILENT_SECONDS", 3.0)
    store.write(NAME, elsewhere(locks.sign_of_life(0)))
    beat = threading.Timer(1.0, lambda: store.write(NAME, elsewhere(locks.sign_of_life(1))))
    beat.start()
    with pytest.raises(InputError, match="another process is writing here"), store_lock(store, NAME):
        pass
    beat.join()


def test_the_owner_gives_signs_of_life_and_removes_its_file(
    store: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    with store_lock(store, NAME) as lock:
        first = store.read_version(NAME)
        for _ in range(100):
            if store.read_version(NAME) != first:
                break
        assert lock and store.read_version(NAME) != first
        lock.check()
    assert store.read_version(NAME) is None


def test_an_owner_whose_place_was_taken_stops_and_leaves_the_others_file(
    store: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.2)
    with store_lock(store, NAME) as lock:
        assert lock
        taken = elsewhere(locks.sign_of_life(0))
        store.write(NAME, taken)
        lock._beats.join(30)
        with pytest.raises(InputError, match="another process took this place over"):
            lock.check()
    found = store.read_version(NAME)
    assert found and found[0] == taken


def test_an_owner_that_can_give_no_more_signs_of_life_stops(
    store: RemoteStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.2)

    def fail(*_: object) -> str:
        raise OSError("cannot start a thread")

    with store_lock(store, NAME) as lock:
        assert lock
        monkeypatch.setattr(lock._store, "write_if", fail)
        lock._beats.join(30)
        with pytest.raises(InputError, match=r"no more heartbeats \(OSError: cannot start a thread\)"):
            lock.check()
    assert "cannot start a thread" in caplog.text


def test_a_beat_that_fails_leaves_time_for_another(store: RemoteStore) -> None:
    with store_lock(store, NAME) as lock:
        assert lock and 2 * (lock._store._patience + locks.BEAT_SECONDS) <= locks.SILENT_SECONDS


@pytest.mark.parametrize("is_taken", [False, True], ids=["new", "abandoned"])
def test_a_store_that_can_create_but_not_replace_conditionally_is_used_and_it_is_said(
    store: RemoteStore, is_taken: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "SILENT_SECONDS", 1.0)
    if is_taken:
        store.write(NAME, elsewhere(locks.sign_of_life(0)))
    write_if = store.write_if

    def without_if_match(name: str, data: bytes, version: str | None) -> str | None:
        if version:
            raise NotImplementedError
        return write_if(name, data, version)

    monkeypatch.setattr(store, "write_if", without_if_match)
    with store_lock(store, NAME) as lock:
        assert lock is None
    assert "this store cannot refuse a second writer" in caplog.text
    assert is_taken == (store.read_version(NAME) is not None)


def test_an_answer_that_is_lost_after_the_write_is_no_other_owner(store: RemoteStore, proxy: FaultyProxy) -> None:
    """The write is tried again, and the store refuses it, as our own file is there already."""
    lost = []

    def lose_the_first(request: Request) -> str | None:
        if request.method != "PUT" or lost:
            return None
        lost.append(request)
        s3_client(proxy.port).put_object(Bucket="bucket", Key=request.path.removeprefix("/bucket/"), Body=sign)
        return "reset"

    sign = locks.sign_of_life(0)
    proxy.fault = lose_the_first
    with store_lock(store, NAME) as lock:
        assert lock and lost


@pytest.mark.parametrize("answer", ["501", "ignores"])
def test_a_store_without_conditional_writes_is_used_and_it_is_said(
    proxy: FaultyProxy, answer: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_remote(f"s3://bucket/without-{answer}", StoreConfig())
    if answer == "501":
        proxy.fault = lambda request: "501" if request.method == "PUT" else None
    else:
        proxy.ignored = ("if-none-match",)
    with store_lock(store, NAME) as lock:
        assert lock is None
    assert "this store cannot refuse a second writer" in caplog.text
