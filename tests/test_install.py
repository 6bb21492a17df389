"""What `pip install .` installs."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.conftest import ROOMS, ROOT, source_files

FILES = ("pyproject.toml", "README.md", "LICENSE")
INSTALLED = tuple(room for room in ROOMS if room != "benchmarks")


def test_pip_makes_a_wheel_of_the_packages_that_works_anywhere(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for folder in (*ROOMS, "docs"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt"), *(ROOT / name for name in FILES)]:
        shutil.copy(path, checkout)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(tmp_path), str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("needlestream-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    installed = {path.relative_to(tmp_path / "installed") for path in (tmp_path / "installed").rglob("*.*")}
    ours = {path.relative_to(ROOT) for path in source_files(*INSTALLED)}
    assert {path for path in installed if path.suffix == ".py"} == ours
    assert Path("reports", "templates", "report.html") in installed
    script = "import pipeline.plan, reports.page; from shard_tools.__main__ import main; main()"
    command = [sys.executable, "-c", script, "pack", "--help"]
    environment = {"PYTHONPATH": str(tmp_path / "installed"), "HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, "--input" in done.stdout) == (0, True), done.stderr
    script = "import pathlib; from reports.page import write_page; write_page(pathlib.Path('a.html'), 'a', [])"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    assert "<html" in (tmp_path / "a.html").read_text()
