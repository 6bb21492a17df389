"""The files that start a Ray cluster under Slurm or with Ray's launcher."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("ray", reason="Ray is not installed (pip install -r requirements-ray.txt)")

from ray.autoscaler._private.util import prepare_config, validate_config

from shard_tools.manifest import Manifest
from tests.conftest import ROOT, data_set_bytes
from tests.ray_nodes import free_port
from tests.tiny import pack_tiny

pytestmark = pytest.mark.ray
FOLDER = ROOT / "docs" / "cluster"
# Replaces Slurm's command: both "nodes" are this machine.
SCONTROL = "#!/bin/sh\nprintf 'first\\nsecond\\n'\n"
SRUN = '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\n[ "$1" = hostname ] && exec echo 127.0.0.1\nexec "$@"\n'


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("cluster"), 20, 4)


def test_the_slurm_script_packs_on_a_cluster_of_its_nodes_and_ends_it(manifest: Manifest, tmp_path: Path) -> None:
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
    ray = tmp_path / "ray"
    ray.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from ray.scripts.scripts import main; main()" "$@"\n')
    ray.chmod(0o755)
    out = tmp_path / "out"
    words = [sys.executable, "-m", "shard_tools", "pack", "--input", manifest.root.parent / "data", "--out", out]
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "first,second",
        "SLURM_CPUS_ON_NODE": "1",
        "RAY": str(ray),
        "RAY_PORT": str(free_port()),
        "RAY_START_OPTIONS": "--object-store-memory 80000000",
    }
    process = subprocess.Popen(
        ["bash", FOLDER / "ray.sbatch", *map(str, words), "--shard-mb", "1", "--on", "ray"],
        cwd=ROOT, env=environment, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=150)
    finally:
        subprocess.run(["kill", "-9", "--", f"-{process.pid}"], capture_output=True)
    assert process.returncode == 0, said
    assert data_set_bytes(out) == data_set_bytes(manifest.root)


def test_the_launchers_file_has_the_form_that_ray_takes_and_names_files_that_exist() -> None:
    text = (FOLDER / "cluster.yaml").read_text()
    config = yaml.safe_load(text)
    validate_config(prepare_config(config))
    assert config["file_mounts"] == {"/home/ubuntu/needlestream": "."}
    for name in re.findall(r"needlestream/([\w.-]+\.txt)", text):
        assert (ROOT / name).is_file()


@pytest.mark.parametrize("name", ["ray.sbatch", "cluster.yaml"])
def test_the_commands_that_the_files_name_are_those_of_the_program(name: str) -> None:
    text = (FOLDER / name).read_text()
    for command in re.findall(r"-m shard_tools (\w+)", text):
        done = subprocess.run(
            [sys.executable, "-m", "shard_tools", command, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0 and "--on" in done.stdout
