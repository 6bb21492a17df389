"""Work on the nodes of a Ray cluster gives the bytes of one machine, whatever dies."""

import contextlib
import errno
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed (pip install -r requirements-ray.txt)")

import shard_tools.fingerprint as fingerprint_module
from infer import InferConfig, infer
from shard_tools.errors import InputError
from shard_tools.fingerprint import FingerprintConfig, fingerprint
from shard_tools.manifest import Manifest
from shard_tools.observation.ingest import ingest
from shard_tools.observation.ingest_config import IngestConfig
from shard_tools.pack import PackConfig, pack
from shard_tools.tasks.base import Need, TaskConfig, Work
from shard_tools.tasks.local import InTurn
from shard_tools.tasks.opening import open_tasks
from shard_tools.verify import verify
from tests.conftest import ROOT, Command, data_set_bytes, folder_bytes
from tests.faulty_proxy import FaultyProxy, Request
from tests.observation_files import write_cadence
from tests.range_server import serving
from tests.ray_nodes import Nodes, NotInstalledThere, cluster, die, node_of_call, nodes_with
from tests.s3_server import read_s3, serving_s3, through_proxy
from tests.test_file_systems import build_lacking
from tests.test_infer import write_weights
from tests.tiny import pack_tiny, write_tiny_data

pytestmark = pytest.mark.ray
LONGEST = 120.0  # seconds; it usually takes two


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Shards packed on this machine: five of train, two of test."""
    folder = tmp_path_factory.mktemp("packed")
    data = write_tiny_data(folder / "data", 24, 6, (6, 64, 256))
    return pack(PackConfig(data, str(folder / "shards"), workers=1, shard_mb=1))


@pytest.fixture(scope="module")
def s3(packed: Manifest) -> Iterator[int]:
    """The port of an S3 server."""
    with serving_s3(packed, "s3://bucket/packed") as port:
        yield port


class Two:
    """Two nodes of one core each, with a proxy for each to the store; a driver uses the first node's."""

    def __init__(self, nodes: Nodes, ways: tuple[FaultyProxy, FaultyProxy]) -> None:
        self.nodes, self.ways = nodes, ways
        self.second: subprocess.Popen[bytes] | None = None

    @property
    def tasks(self) -> TaskConfig:
        return TaskConfig("ray", self.nodes.address)

    def complete(self) -> None:
        """Start the second node again if a test has killed it, and clear the proxies' faults."""
        for way in self.ways:
            way.fault = lambda request: None
        if self.second is None or self.second.poll() is not None:
            self.second = self.nodes.add(AWS_ENDPOINT_URL=self.ways[1].url)
        self.nodes.wait()


@pytest.fixture(scope="module")
def started(s3: int) -> Iterator[Two]:
    with pytest.MonkeyPatch.context() as patch, through_proxy(s3) as first, FaultyProxy(s3) as other, serving(other):
        patch.delenv("RAY_ADDRESS", raising=False)
        with cluster() as nodes:
            nodes.start_head()
            yield Two(nodes, (first, other))


@pytest.fixture
def two(started: Two) -> Two:
    started.complete()
    return started


def to_store(packed: Manifest, two: Two, name: str, **changes: object) -> PackConfig:
    """The configuration that packs the same data to a place in the store."""
    config = PackConfig(packed.root.parent / "data", f"s3://bucket/{name}", shard_mb=1, tasks=two.tasks)
    return replace(config, **changes)  # type: ignore[arg-type]


def is_shard(request: Request) -> bool:
    """Whether a request uploads a shard or a part of a prediction."""
    return request.method == "PUT" and request.path.endswith((".tar", ".parquet")) and "samples" not in request.path


def slowly(seconds: float) -> Callable[[Request], None]:
    """A fault for a proxy: each shard takes `seconds` longer to upload."""

    def wait(request: Request) -> None:
        time.sleep(seconds * is_shard(request))

    return wait


def test_a_pack_on_two_nodes_has_the_bytes_of_one_machine(
    two: Two, packed: Manifest, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "on-ray"
    words = ["--shard-mb", 1, "--on", "ray", "--ray-address", two.nodes.address]
    answer = command("pack", "--input", packed.root.parent / "data", "--out", out, *words)
    assert answer.code == 0, answer.err
    assert data_set_bytes(out) == data_set_bytes(packed.root)


def test_a_slow_node_gets_fewer_shards_of_a_pack_into_s3_and_the_bytes_stay(
    two: Two, packed: Manifest, s3: int
) -> None:
    two.ways[1].fault = slowly(4)
    before = [len(way.requests) for way in two.ways]
    pack(to_store(packed, two, "slow"))
    fast, slow = (sum(map(is_shard, way.requests[n:])) for way, n in zip(two.ways, before, strict=True))
    assert fast + slow == 7 and 1 <= slow <= 2
    assert read_s3(s3, "slow") == data_set_bytes(packed.root) | sources_of(s3, "slow")


def sources_of(port: int, name: str) -> dict[str, bytes]:
    """The note of the sources' times in the store."""
    return {file: data for file, data in read_s3(port, name).items() if file == ".sources.json"}


@contextlib.contextmanager
def killing_the_second(two: Two) -> Iterator[None]:
    """Kill the second node while it uploads its first shard."""
    reached = threading.Event()

    def hold(request: Request) -> None:
        if is_shard(request):
            reached.set()
            time.sleep(10)

    def wait_for_the_other(request: Request) -> None:
        reached.wait(10 * is_shard(request))  # else the first node might do all the work

    def kill() -> None:
        reached.wait(LONGEST)
        assert two.second
        two.nodes.kill(two.second)

    two.ways[0].fault, two.ways[1].fault = wait_for_the_other, hold
    killer = threading.Thread(target=kill)
    killer.start()
    yield
    killer.join()
    assert reached.is_set()


def test_a_node_that_is_killed_in_the_middle_changes_nothing(
    two: Two, packed: Manifest, s3: int, caplog: pytest.LogCaptureFixture
) -> None:
    with killing_the_second(two):
        pack(to_store(packed, two, "node"))
    assert "trying again (2 of 4)" in caplog.text
    assert read_s3(s3, "node") == data_set_bytes(packed.root) | sources_of(s3, "node")


def test_a_driver_that_is_killed_and_started_again_packs_only_what_was_not_finished(
    two: Two, packed: Manifest, s3: int
) -> None:
    for way in two.ways:
        way.fault = slowly(1)
    words = ["pack", "--input", packed.root.parent / "data", "--out", "s3://bucket/driver", "--shard-mb", 1]
    words += ["--on", "ray", "--ray-address", two.nodes.address]
    process = subprocess.Popen([sys.executable, "-m", "shard_tools", *map(str, words)], cwd=ROOT)
    wait_until(lambda: len(notes_of(s3, "driver")) >= 2)
    process.kill()
    process.wait()
    time.sleep(2)  # its tasks end too
    finished = {note.removeprefix(".pack/").removesuffix(".json") for note in notes_of(s3, "driver")}
    assert 2 <= len(finished) < 7 and "manifest.json" not in read_s3(s3, "driver")
    before = [len(way.requests) for way in two.ways]
    pack(to_store(packed, two, "driver"))
    sent = [each.path for way, n in zip(two.ways, before, strict=True) for each in way.requests[n:] if is_shard(each)]
    assert {Path(path).name for path in sent} == {shard.name for shard in packed.shards} - finished
    assert read_s3(s3, "driver") == data_set_bytes(packed.root) | sources_of(s3, "driver")


def notes_of(port: int, name: str) -> list[str]:
    return [file for file in read_s3(port, name) if file.startswith(".pack/") and file.endswith(".tar.json")]


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_worker_out_of_memory_is_tried_again_with_twice_the_memory(
    two: Two, packed: Manifest, s3: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The node is too small for twice the memory, and Ray's memory monitor ends every task there."""
    two.ways[0].fault = slowly(1)
    two.ways[1].fault = slowly(1)
    small = two.nodes.add(400_000_000, RAY_memory_usage_threshold="0.001", RAY_memory_monitor_refresh_ms="50")
    try:
        pack(to_store(packed, two, "memory"))
    finally:
        two.nodes.kill(small)
    assert "trying again (2 of 4)" in caplog.text and "memory" in caplog.text
    assert read_s3(s3, "memory") == data_set_bytes(packed.root) | sources_of(s3, "memory")


def test_a_node_whose_disk_is_full_hands_its_shards_to_another(
    two: Two, packed: Manifest, s3: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = build_lacking(tmp_path)
    two.ways[0].fault = slowly(1)
    two.ways[1].fault = slowly(1)
    staging = tmp_path / "staging"
    node = two.nodes.add(
        LD_PRELOAD=str(library), LACKS=", room, ", LACKS_ERRNO=str(errno.ENOSPC), LACKS_UNDER=str(staging)
    )
    try:
        pack(to_store(packed, two, "full", staging=staging))
    finally:
        two.nodes.kill(node)
    assert "No space left on device" in caplog.text and "trying another node" in caplog.text
    assert read_s3(s3, "full") == data_set_bytes(packed.root) | sources_of(s3, "full")


def test_a_file_on_which_every_process_dies_is_named_after_four_tries(two: Two, tmp_path: Path) -> None:
    work = Work(die, [(tmp_path,)], "dying", "files", [str(tmp_path / "bad.h5")])
    with open_tasks(two.tasks, InTurn()) as tasks, pytest.raises(InputError, match=r"bad.h5: a process died .*4 tries"):
        list(tasks.run(work))


def test_a_fault_of_the_program_on_a_node_is_one_line_before_and_in_the_call(two: Two) -> None:
    before = Work(node_of_call, [(NotInstalledThere(),)], "", "", ["a.h5"])
    within = Work(divmod, [(1, 0)], "", "", ["b.h5"])
    with open_tasks(two.tasks, InTurn()) as tasks:
        with pytest.raises(InputError, match=r"^a.h5: node [\d.]+: .*not_installed_there'$"):
            list(tasks.run(before))
        with pytest.raises(InputError, match=r"^b.h5: node [^ ]+/\w{6}: ZeroDivisionError: [^\n]+$"):
            list(tasks.run(within))


def test_a_task_that_no_node_can_hold_is_refused_with_its_size(
    two: Two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shard_tools.tasks.ray_cluster._WAIT_FOR_NODE_SECONDS", 1.0)
    work = Work(die, [(tmp_path,)], "dying", "files", [str(tmp_path / "big.h5")], Need(memory=10**13))
    with open_tasks(two.tasks, InTurn()) as tasks, pytest.raises(InputError, match=r"big.h5: no node .* 1e\+04 GB"):
        list(tasks.run(work))


def test_tasks_that_need_disk_run_where_it_is_declared_and_the_nodes_rates_are_told(two: Two) -> None:
    declaring = two.nodes.add(disk=1000)
    work = Work(node_of_call, [(number,) for number in range(6)], "", "", [""] * 6, Need(1, disk=600))
    try:
        with open_tasks(two.tasks, InTurn()) as tasks:
            found = {done.result() for done in tasks.run(work)}
            expected = nodes_with("disk")
            said = tasks.describe()
    finally:
        two.nodes.kill(declaring)
    assert len(expected) == 1 and found == expected
    (node,) = found
    assert re.fullmatch(rf"3 nodes: [^ ]+/{node[:6]} [0-9.e+]+/s", said)


def test_where_no_cluster_answers_it_is_said_at_once_how_to_start_one(tmp_path: Path) -> None:
    began = time.monotonic()
    with (
        pytest.raises(InputError, match=r"no cluster at 127.0.0.1:1 .*ray start --head"),
        open_tasks(TaskConfig("ray", "127.0.0.1:1"), InTurn()),
    ):
        pass
    assert time.monotonic() - began < LONGEST


def test_ray_is_pinned_alike_for_users_and_for_the_tests() -> None:
    (pin,) = (line for line in (ROOT / "requirements-ray.txt").read_text().splitlines() if not line.startswith("#"))
    assert pin in [line.partition("  #")[0] for line in (ROOT / "requirements-dev.txt").read_text().splitlines()]


def test_an_ingest_on_two_nodes_has_the_bytes_of_one_machine_in_a_folder_and_in_s3(
    two: Two, s3: int, tmp_path: Path
) -> None:
    files = write_cadence(tmp_path / "cadence")
    config = IngestConfig(str(tmp_path / "here"), tuple(files), shard_mb=1, workers=1)
    here = ingest(config)
    there = ingest(replace(config, out=str(tmp_path / "there"), tasks=two.tasks))
    assert len(here.shards) == 2 and data_set_bytes(there.root) == data_set_bytes(here.root)
    stored = ingest(replace(config, out="s3://bucket/ingested", tasks=two.tasks))
    assert stored.identity == here.identity
    assert read_s3(s3, "ingested") == folder_bytes(here.root)


def test_verify_on_two_nodes_finds_the_faults_of_one_machine_in_their_order(
    two: Two, packed: Manifest, tmp_path: Path, command: Command
) -> None:
    shutil.copytree(packed.root, damaged := tmp_path / "damaged")
    for name in ("train-000001.tar", "test-000000.idx"):
        path = damaged / name
        path.write_bytes(b"x" + path.read_bytes()[1:])
    expected = list(verify(damaged))
    answer = command("verify", damaged, "--on", "ray", "--ray-address", two.nodes.address)
    assert len(expected) == 2 and answer.code == 1
    assert answer.out.splitlines()[:2] == [f"fault: {fault}" for fault in expected]


def test_verify_on_two_nodes_reads_a_store(two: Two) -> None:
    assert list(verify("s3://bucket/packed", where=two.tasks)) == []


def test_fingerprint_on_two_nodes_writes_the_table_of_one_machine(
    two: Two, packed: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fingerprint_module._AT_ONCE, "ray", 5)
    data = shutil.copytree(packed.root.parent / "data", tmp_path / "data")
    first, second = sorted((data / "train").rglob("*.npy"))[:2]
    np.save(second, np.roll(np.load(first), 40, axis=2))  # most of its channels are the first snippet's
    config = FingerprintConfig(data, tmp_path / "here.csv")
    here = fingerprint(config)
    fingerprint(replace(config, out=tmp_path / "there.csv", tasks=two.tasks))
    assert len(here.pairs.first) == 1
    assert (tmp_path / "there.csv").read_bytes() == (tmp_path / "here.csv").read_bytes()


def test_a_prediction_on_two_nodes_has_one_row_a_snippet_though_a_node_is_killed(
    two: Two, s3: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its parts have the bytes that one machine writes."""
    monkeypatch.setattr("training.scoring.ROWS", 8)
    first = pack_tiny(tmp_path / "first", 20, 4)
    weights = [write_weights(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    config = InferConfig((str(first.root),), tuple(weights), tmp_path / "here.csv", "train", batch_size=4)
    here = replace(config, precision="float32", scores=str(tmp_path / "parts"))
    infer(here)
    with killing_the_second(two):
        infer(replace(here, out=tmp_path / "there.csv", scores="s3://bucket/scores", tasks=two.tasks))
    assert "trying again (2 of 4)" in caplog.text
    assert read_s3(s3, "scores") == folder_bytes(tmp_path / "parts")
    assert (tmp_path / "there.csv").read_bytes() == (tmp_path / "here.csv").read_bytes()
