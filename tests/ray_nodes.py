"""A Ray cluster on loopback: nodes that tests start and kill, each a `ray start` of its own."""

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ray
from ray._raylet import GcsClient

from tests.conftest import ROOT

START_SECONDS = 120.0
MEMORY = 4_000_000_000  # bytes that a node declares
_ALIVE = 0
_RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--block"]
_SMALL = ["--num-cpus", "1", "--object-store-memory", "80000000", "--disable-usage-stats"]


class Nodes:
    """A head node, and those that were added."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.address = folder, ""
        self._processes: list[subprocess.Popen[bytes]] = []

    def start_head(self, **environment: str) -> None:
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        client = ["--ray-client-server-port", str(port + 1), "--include-dashboard", "false"]
        self._start(["--head", "--port", str(port), *client, "--temp-dir", str(self._folder)], MEMORY, environment)
        self.wait()

    def add(self, memory: int = MEMORY, disk: int = 0, **environment: str) -> subprocess.Popen[bytes]:
        """Start a node; return as soon as the cluster knows it."""
        resources = ["--resources", json.dumps({"disk": disk})] if disk else []
        process = self._start(["--address", self.address, *resources], memory, environment)
        self.wait()
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill all processes of a node at once, as a power cut does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def count(self) -> int:
        """The number of living nodes that the head knows; 0 if it does not answer yet."""
        host, _, port = self.address.rpartition(":")
        with contextlib.suppress(OSError, ray.exceptions.RpcError):
            socket.create_connection((host, int(port)), 1).close()
            infos = GcsClient(address=self.address).get_all_node_info(timeout=5)
            return sum(info.state == _ALIVE for info in infos.values())
        return 0

    def wait(self) -> None:
        """Wait until the head knows which nodes are alive."""
        deadline = time.monotonic() + START_SECONDS
        expected = sum(process.poll() is None for process in self._processes)
        while (found := self.count()) != expected:
            assert time.monotonic() < deadline, f"{found} nodes, expected {expected}"
            time.sleep(0.2)

    def stop(self) -> None:
        for process in reversed(self._processes):
            self.kill(process)

    def _start(self, words: list[str], memory: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with (self._folder / f"node-{len(self._processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [*_RAY, *words, *_SMALL, "--memory", str(memory), "--node-ip-address", "127.0.0.1"],
                cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "RAY_enable_metrics_collection": "0", **environment},
            )  # fmt: skip
        self._processes.append(process)
        return process


@contextlib.contextmanager
def cluster() -> Iterator[Nodes]:
    """A cluster without nodes; those that are started are killed at the end."""
    # A short path, as paths of sockets are limited to 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        nodes = Nodes(Path(folder))
        try:
            yield nodes
        finally:
            nodes.stop()


def free_port() -> int:
    """A port that is free, and below those that Ray gives its workers (10002 to 19999)."""
    for port in range(6400 + os.getpid() % 1000, 9900):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("no free port")


def node_of_call(_: int) -> str:
    """The id of the node that a call runs on."""
    return str(ray.get_runtime_context().get_node_id())


def nodes_with(resource: str) -> set[str]:
    """The ids of the living nodes that declare a resource."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"] and resource in node["Resources"]}


class NotInstalledThere:
    """An object that needs a package that a node lacks."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return importlib.import_module, ("not_installed_there",)


def die(_: Path) -> None:
    """End as a process that the system kills because memory ran out."""
    os.kill(os.getpid(), signal.SIGKILL)
