"""Rooms of the program: what import-linter cannot see, because the scripts are single files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEAVES = (
    "candidates",
    "model",
    "pretrained",
    "weights",
    "metrics",
    "report",
    "checkpoint",
    "page",
    "machine",
    "environment",
)
LOOP = (
    "config",
    "drivers",
    "finite",
    "interruption",
    "folds",
    "infer",
    "optimiser",
    "resume",
    "run",
    "scores",
    "submission",
    "sections",
    "tracker",
    "train",
)
OURS = {*LEAVES, *LOOP, "pipeline", "shard_tools"}


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports, with their packages' names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_only_the_pipeline_imports_dali() -> None:
    files = [*ROOT.glob("*.py"), *ROOT.glob("shard_tools/*.py")]
    assert len(files) > 10
    assert not [path.name for path in files if any(name.startswith("nvidia") for name in imports_of(path))]
    assert any(name.startswith("nvidia") for name in imports_of(ROOT / "pipeline" / "graph.py"))


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_no_more_than_the_lowest_of_ours(leaf: str) -> None:
    ours = {name for name in imports_of(ROOT / f"{leaf}.py") if name.split(".")[0] in OURS}
    lowest = {"shard_tools.cores", "shard_tools.errors", "shard_tools.files"}
    above = {"model": {"candidates", "pretrained", "weights"}, "pretrained": {"weights"}}
    assert ours <= lowest | above.get(leaf, set())


def test_shard_tools_load_neither_torch_nor_dali_nor_setigen() -> None:
    """Packing and verifying start quickly, and work where none of these is installed."""
    script = (
        "import sys, shard_tools.__main__; print(*{'torch', 'nvidia.dali', 'timm', 'setigen'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_configuration_composes_and_the_loop_is_on_top() -> None:
    assert not {"train", "infer"} & imports_of(ROOT / "training/config.py")
    for package in ("pipeline", "shard_tools"):
        for path in (ROOT / package).glob("*.py"):
            names = {name.split(".")[0] for name in imports_of(path)}
            assert not names & (OURS - {"pipeline", "shard_tools", "metrics"}), path
            assert package == "pipeline" or "pipeline" not in names, path
