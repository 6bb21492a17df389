"""Two machines under `accelerate launch`, with shards in S3; here both launchers run on this machine."""

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from shard_tools.manifest import Manifest
from tests.launch import machine_command
from tests.s3_server import environment, serving_s3
from tests.test_resume import ROOT, read_history, same_weights, wait_for_step
from tests.tiny import pack_tiny, tiny_config
from training.config import TrainConfig

# The address of rank 0's machine; all addresses in 127.0.0.0/8 are this machine.
MAIN_IP = "127.0.0.2"
LONGEST = 400.0  # seconds; it usually takes twenty


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("machines"), train=50)


@pytest.fixture(scope="module")
def store(manifest: Manifest) -> Iterator[dict[str, str]]:
    """The environment that leads to an S3 server with the shards."""
    with serving_s3(manifest, "s3://bucket/data") as port:
        yield environment(f"http://127.0.0.1:{port}")


@contextlib.contextmanager
def both_machines(config: TrainConfig, store: dict[str, str]) -> Iterator[list[subprocess.Popen[str]]]:
    """The launchers of both machines, each in its own session; processes that are left are killed at the end."""
    with socket.socket() as probe:
        probe.bind((MAIN_IP, 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, **store, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    machines = [
        subprocess.Popen(
            machine_command(rank, f"{MAIN_IP}:{port}", config, "--checkpoint-every", 1, "--resume"),
            cwd=ROOT, env=environment, text=True, start_new_session=True,
            stdout=(config.run_dir.parent / f"machine-{rank}.log").open("w"), stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        yield machines
    finally:
        for machine in machines:
            switch_off(machine)


def switch_off(machine: subprocess.Popen[str]) -> None:
    """Kill all processes of a machine at once, as a power cut does. Ranks have sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(machine.pid)
        for process in (launcher, *launcher.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    machine.wait()


def test_a_training_on_two_machines_goes_on_bit_for_bit_after_one_is_killed(
    store: dict[str, str], tmp_path: Path
) -> None:
    whole, killed = (
        tiny_config("s3://bucket/data", tmp_path / name, epochs=2, batch_size=4) for name in ("whole", "killed")
    )
    with both_machines(whole, store) as machines:
        assert [machine.wait(LONGEST) for machine in machines] == [0, 0], log_of(tmp_path)
    with both_machines(killed, store) as machines:
        wait_for_step(killed, 3, machines[0])
        switch_off(machines[1])
        assert machines[0].wait(LONGEST) != 0, "rank 0 did not notice"
    with both_machines(killed, store) as machines:
        assert [machine.wait(LONGEST) for machine in machines] == [0, 0], log_of(tmp_path)
    assert "going on after step" in log_of(tmp_path)
    assert read_history(killed.run_dir) == read_history(whole.run_dir)
    assert same_weights(killed, whole)


def log_of(folder: Path) -> str:
    return (folder / "machine-0.log").read_text()
