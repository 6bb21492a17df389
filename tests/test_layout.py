"""Layers of the program: checks that import-linter (pyproject.toml) cannot make, as the scripts are no packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOMS, ROOT, source_files

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))


def imports_of(path: Path) -> set[str]:
    """The top-level names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name.split(".")[0] for name in found}


def test_at_the_top_level_are_the_two_scripts_and_nothing_else() -> None:
    assert SCRIPTS == ["infer", "train"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_a_script_nor_dali(script: str) -> None:
    assert not imports_of(ROOT / f"{script}.py") & {*SCRIPTS, "benchmarks", "tests", "nvidia"}


def test_no_package_but_the_benchmarks_imports_a_script() -> None:
    rooms = [room for room in ROOMS if room != "benchmarks"]
    assert len(rooms) == 4
    assert not [path for path in source_files(*rooms) if imports_of(path) & {*SCRIPTS, "tests"}]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_start_without_what_only_some_of_their_figures_need(script: str) -> None:
    """scikit-learn alone takes a fifth of the start."""
    slow = {"sklearn", "scipy.stats"}
    program = f"import sys, {script}; print(*{slow} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stdout.strip()


def test_shard_tools_load_neither_torch_nor_dali_nor_setigen() -> None:
    """So packing and verifying start quickly, and work if none of these is installed."""
    slow = {"torch", "nvidia.dali", "timm", "setigen", "h5py"}
    script = f"import sys, shard_tools.__main__; print(*{slow} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
