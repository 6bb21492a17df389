"""Work on the nodes of a Ray cluster: the bytes of one machine, whatever dies."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed (pip install -r requirements-ray.txt)")

from shard_tools.manifest import Manifest
from tests.conftest import Command, Layout, data_set_bytes
from tests.ray_nodes import Nodes, cluster

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def two() -> Iterator[Nodes]:
    """A cluster of two nodes of one core each."""
    with cluster() as nodes:
        nodes.add()
        yield nodes


@pytest.fixture(autouse=True)
def nearby(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_pack_on_two_nodes_has_the_bytes_of_one_machine(
    two: Nodes, packed: Manifest, sharded: Layout, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "on-ray"
    words = ["--folds", 3, "--shard-mb", 1, "--on", "ray", "--ray-address", two.address]
    answer = command("pack", "--input", sharded.root, "--out", out, *words)
    assert answer.code == 0, answer.err
    assert data_set_bytes(out) == data_set_bytes(packed.root)
