"""Writable cache folders for Numba and matplotlib, set before they are imported."""

import contextlib
import os
import stat
import tempfile
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_WITH_KERNELS = ("pipeline", "training/search", "training/observation")  # packages that Numba compiles from


def place_library_caches() -> None:
    """Give Numba and matplotlib a temporary cache folder where they would find no writable one.

    Without one, Numba refuses to compile and matplotlib cannot be imported. This happens in a container whose user has
    no home and may not write to the code. Variables that the user has set are kept.
    """
    with contextlib.suppress(OSError):  # nothing is writable: the library that needs a cache will say so
        if "NUMBA_CACHE_DIR" not in os.environ and not _numba_finds_a_place():
            os.environ["NUMBA_CACHE_DIR"] = str(_own_folder() / "numba")
        settings = user_folder("XDG_CONFIG_HOME", ".config") / "matplotlib"
        if "MPLCONFIGDIR" not in os.environ and not _can_write(settings):
            os.environ["MPLCONFIGDIR"] = str(_own_folder() / "matplotlib")


def _numba_finds_a_place() -> bool:
    """Whether Numba finds a folder, in its own order: beside the code, else in the user's cache folder."""
    beside = [_ROOT / package / "__pycache__" for package in _WITH_KERNELS]
    return all(map(_can_write, beside)) or _can_write(user_folder("XDG_CACHE_HOME", ".cache") / "numba")


def user_folder(variable: str, default: str) -> Path:
    """A user's cache or configuration folder; an unwritable path for a user without a home."""
    given = os.environ.get(variable)
    # Without HOME or a user name, "~" is not expanded: it would name a folder in the current one.
    home = given or str(Path(os.path.expanduser("~"), default))  # noqa: PTH111 (Path.expanduser raises)
    return Path(home) if os.path.isabs(home) else Path(os.devnull, "home")  # noqa: PTH117


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _own_folder() -> Path:
    """A folder that only this user can access: Numba runs the code in its cache."""
    folder = Path(tempfile.gettempdir(), f"needlestream-caches-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    about = folder.lstat()
    is_ours = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o077
    return folder if is_ours else Path(tempfile.mkdtemp(prefix="needlestream-caches-"))
