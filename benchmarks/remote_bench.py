"""How fast the loader reads from a store: cadences/s of the demo canvas from S3, from a cache, and from a folder.

python benchmarks/remote_bench.py --shards DIR [--latency-ms 20]   (DIR as `python -m shard_tools pack` wrote it)

The stores: `range`: a small server of files, which waits, then lets the kernel copy; it understands the part of S3 that
reading needs. `moto`: moto's S3 server behind a proxy that waits; both are Python and on the same cores as the loader.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tyro

from pipeline.loader import Loader, LoaderConfig
from pipeline.plan import Order, Share
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.storage.base import StoreConfig
from shard_tools.system.cores import usable_cores
from training.presets import PRESETS

_PREFIX = "bucket/data"


@dataclass(frozen=True)
class RemoteBenchConfig:
    """What to measure."""

    shards: Path
    """Folder of shards, with snippets of full size."""
    latency_ms: float = 20.0
    """Wait before each answer."""
    batch_size: int = 32
    """Cadences in a batch."""
    epochs: int = 5
    """Epochs to time, after one to warm up."""
    read_threads: int = 0
    """The loader's option of this name; 0: its default."""
    store: Literal["range", "moto", "both"] = "both"
    """Which stores to measure."""


@contextmanager
def server(*words: str) -> Iterator[int]:
    """A server in a process of its own, which prints its port."""
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def measure(manifest: Manifest, config: RemoteBenchConfig, what: str) -> tuple[list[float], float]:
    """Cadences/s of each epoch, and this process's CPU milliseconds for a cadence.

    `what`: "read" only reads and checks bytes; "eval" is the loader of prediction, "train" that of training.
    """
    rows = manifest.rows("train")
    order = Order(rows, manifest.target[rows], "uniform", 0)
    share = Share(len(order), config.batch_size, 1, 0, 1)
    preset, loader_config = PRESETS["demo"], LoaderConfig(read_threads=config.read_threads)
    canvas, draws = None if what == "read" else preset.canvas, preset.draws if what == "train" else None
    source = Loader(manifest, order, share, canvas, draws, config=loader_config)
    rates, cpu = [], 0.0
    for epoch in range(config.epochs + 1):
        began, cpu_began = time.perf_counter(), time.process_time()
        for _ in source:
            pass
        if epoch:
            rates.append(len(rows) / (time.perf_counter() - began))
            cpu += time.process_time() - cpu_began
    source.close()
    return rates, 1000 * cpu / (config.epochs * len(rows))


def main(config: RemoteBenchConfig) -> None:
    """Measure and print a table."""
    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "y"), ("DEFAULT_REGION", "us-east-1")):
        os.environ[f"AWS_{name}"] = value
    local = read_manifest(config.shards)
    mean_size = int(np.mean(local.size))
    print(
        f"{len(local.rows('train'))} train cadences of {mean_size / 1e3:.0f} kB, batches of {config.batch_size}, demo "
        f"canvas, {config.latency_ms:g} ms a request, {usable_cores()} cores ({platform.processor() or 'CPU'}), load "
        f"{os.getloadavg()[0]:.1f} before the start, page cache warm; store and loader share the cores"
    )
    print(f"{'from':<20}{'to':<8}{'cadences/s: median':>20}{'lowest':>8}{'highest':>9}{'CPU ms a cadence':>18}")
    report("folder", local, config)
    for name in ("range", "moto") if config.store == "both" else (config.store,):
        with ExitStack() as stack:
            port = stack.enter_context(SERVERS[name](config))
            os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
            url = f"s3://{_PREFIX}"
            report(f"s3, {name} server", read_manifest(url), config)
            if name == "range":
                report("http, range server", read_manifest(f"http://127.0.0.1:{port}/{_PREFIX}"), config)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            report(f"its cache, {name}", read_manifest(url, StoreConfig(cache_dir=folder)), config)


def report(name: str, manifest: Manifest, config: RemoteBenchConfig) -> None:
    """Measure and print the lines of one source."""
    for what in ("read", "eval", "train"):
        rates, cpu_ms = measure(manifest, config, what)
        middle = statistics.median(rates)
        print(f"{name:<20}{what:<8}{middle:>20,.0f}{min(rates):>8,.0f}{max(rates):>9,.0f}{cpu_ms:>18.2f}", flush=True)


@contextmanager
def range_server(config: RemoteBenchConfig) -> Iterator[int]:
    """The small server, of a folder that looks like the bucket."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, _PREFIX)
        place.mkdir(parents=True)
        for file in config.shards.iterdir():
            if file.is_file():
                (place / file.name).write_bytes(file.read_bytes())
        with server("-m", "tests.range_server", folder, str(config.latency_ms / 1e3)) as port:
            yield port


@contextmanager
def moto_server(config: RemoteBenchConfig) -> Iterator[int]:
    """Moto's S3, filled, behind the proxy."""
    import boto3

    script = (
        "import time; from moto.server import ThreadedMotoServer; s = ThreadedMotoServer('127.0.0.1', 0, False);"
        "s.start(); print(s.get_host_and_port()[1], flush=True); time.sleep(1e6)"
    )
    with server("-c", script) as behind:
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{behind}")
        client.create_bucket(Bucket=_PREFIX.split("/")[0])
        for file in config.shards.iterdir():
            if file.is_file():
                client.upload_file(str(file), *_PREFIX.split("/")[:1], f"{_PREFIX.split('/')[1]}/{file.name}")
        with server("-m", "tests.faulty_proxy", str(behind), str(config.latency_ms / 1e3)) as port:
            yield port


SERVERS = {"range": range_server, "moto": moto_server}

if __name__ == "__main__":
    main(tyro.cli(RemoteBenchConfig))
