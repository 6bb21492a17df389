"""The promises of the kernels' cache: shared by all clones, never stale, private, and no run fails because of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cpu_kernels, kernel_cache

ROOT = Path(__file__).parents[1]
_KERNEL = """
from numba import njit
from constants import SCALE
from pipeline.kernel_cache import share_cache

@share_cache
@njit
def scaled(value):
    return SCALE * value
"""
_REPORT = """
from kernels import scaled
value = scaled(1.0)
print(value, sum(scaled.stats.cache_hits.values()), scaled.stats.cache_path)
"""


class Clones:
    """Folders of code, each with a kernel, and one user's home."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.caches = folder, folder / "caches"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
        self.environment["XDG_CACHE_HOME"] = str(self.caches)

    def add(self, name: str, kernel: str = _KERNEL, scale: float = 2.0) -> str:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "kernels.py").write_text(kernel)
        (folder / "constants.py").write_text(f"SCALE = {scale}\n")
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)  # Python tells sources apart by second and size
        return name

    def start(self, name: str, before: str = "", **environment: str) -> subprocess.Popen[str]:
        """Start to run a clone's kernel, after the code `before`."""
        path = f"{self.folder / name}{os.pathsep}{ROOT}"
        return subprocess.Popen(
            [sys.executable, "-c", before + _REPORT],
            env={**self.environment, "PYTHONPATH": path, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, name: str, before: str = "", **environment: str) -> tuple[float, int, Path]:
        """What the kernel makes of 1, whether it was found in the cache, and the cache's folder."""
        return result_of(self.start(name, before, **environment))

    def files(self) -> list[Path]:
        return sorted(path for path in self.caches.rglob("*") if path.suffix in (".nbi", ".nbc"))


def result_of(process: subprocess.Popen[str]) -> tuple[float, int, Path]:
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    value, hits, path = out.split()
    return float(value), int(hits), Path(path)


@pytest.fixture
def clones(tmp_path: Path) -> Clones:
    return Clones(tmp_path)


def test_a_clone_finds_the_kernels_that_another_one_compiled(clones: Clones) -> None:
    value, hits, folder = clones.run(clones.add("first"))
    assert (value, hits) == (2, 0)
    assert folder.is_relative_to(clones.caches / "needlestream")
    assert clones.run(clones.add("second")) == (2, 1, folder)
    assert clones.run("first") == (2, 1, folder)


def test_a_kernel_is_compiled_anew_when_its_file_changes_or_a_number_that_it_imports(clones: Clones) -> None:
    clones.run(clones.add("clone"))
    assert clones.run(clones.add("clone", scale=3.0))[:2] == (3, 0)
    assert clones.run(clones.add("clone", _KERNEL.replace("SCALE *", "1 + SCALE *")))[:2] == (3, 0)
    assert clones.run(clones.add("clone"))[:2] == (2, 1)  # each content has its own place in the cache


def test_the_kernels_of_images_depend_on_every_number_that_they_import(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = cpu_kernels.write_train_images.py_func
    before = kernel_cache.kernel_digest(kernel)
    for name in ("LORENTZIAN_END", "LORENTZIAN_REACH", "NEIGHBOUR_ROOT"):
        with monkeypatch.context() as patch:
            patch.setattr(cpu_kernels, name, 0.123)
            assert kernel_cache.kernel_digest(kernel) != before
    assert kernel_cache.kernel_digest(kernel) == before


def test_kernels_depend_on_how_their_steps_are_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel = cpu_kernels.write_train_images.py_func
    before = kernel_cache.kernel_digest(kernel)
    changed = tmp_path / "inlining.py"
    changed.write_bytes(kernel_cache._INLINING.read_bytes() + b"#")
    monkeypatch.setattr(kernel_cache, "_INLINING", changed)
    assert kernel_cache.kernel_digest(kernel) != before


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_a_damaged_cache_costs_a_compilation_and_not_the_run(clones: Clones, suffix: str) -> None:
    clones.run(clones.add("clone"))
    (damaged,) = [path for path in clones.files() if path.suffix == suffix]
    for content in (b"", damaged.read_bytes()[:-40], b"\0" * 100):
        damaged.write_bytes(content)
        assert clones.run("clone")[:2] == (2, 0)
        assert clones.run("clone")[:2] == (2, 1)


def test_processes_that_begin_together_all_get_their_kernels(clones: Clones) -> None:
    clones.add("clone")
    assert {result_of(process)[0] for process in [clones.start("clone") for _ in range(3)]} == {2}
    assert clones.run("clone")[:2] == (2, 1)


@pytest.mark.parametrize("open_to_others", ["needlestream", "needlestream/kernels"])
def test_kernels_are_not_taken_from_a_folder_that_others_can_write_to(clones: Clones, open_to_others: str) -> None:
    folder = clones.caches / open_to_others
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    value, _, used = clones.run(clones.add("clone"))
    assert value == 2 and used == clones.folder / "clone" / "__pycache__"
    assert not clones.files()


def test_the_folder_for_kernels_is_made_for_its_user_alone(clones: Clones) -> None:
    clones.run(clones.add("clone"))
    made = [clones.caches / "needlestream", clones.caches / "needlestream" / "kernels"]
    assert [folder.stat().st_mode & 0o777 for folder in made] == [0o700, 0o700]


def test_a_place_for_numbas_cache_that_the_user_set_comes_first(clones: Clones) -> None:
    mine = clones.folder / "mine"
    assert clones.run(clones.add("clone"), NUMBA_CACHE_DIR=str(mine))[2].is_relative_to(mine)
    locator = "InTreeCacheLocator"
    used = clones.run("clone", NUMBA_CACHE_LOCATOR_CLASSES=locator)[2]
    assert used == clones.folder / "clone" / "__pycache__"


def test_kernels_run_where_nothing_can_be_cached_beside_them_or_at_home(clones: Clones) -> None:
    clones.add("clone")
    (clones.folder / "clone" / "__pycache__").write_bytes(b"")  # a file in place of the folder that would be made
    nowhere = {"XDG_CACHE_HOME": os.devnull, "TMPDIR": str(clones.folder)}
    before = "import shard_tools.system.library_caches as caches\ncaches._ROOT = caches.Path(caches.os.devnull)\n"
    value, _, folder = clones.run("clone", f"{before}caches.place_library_caches()", **nowhere)
    assert value == 2 and folder.is_relative_to(clones.folder / f"needlestream-caches-{os.getuid()}")


@pytest.mark.parametrize("missing", ["_CacheLocator", "CompileResultCacheImpl"])
def test_numbas_own_cache_is_used_where_its_classes_have_changed(clones: Clones, missing: str) -> None:
    value, _, folder = clones.run(clones.add("clone"), f"import numba.core.caching as caching\ndel caching.{missing}")
    assert value == 2 and folder == clones.folder / "clone" / "__pycache__"


def test_a_function_that_is_not_compiled_stays_as_it_is() -> None:
    assert kernel_cache.share_cache(result_of) is result_of
    assert kernel_cache.cached_signatures(result_of) is None
