"""Find the snippet files of a data folder, and skip the clutter among them.

Macs, Windows, notebooks, network drives, browsers and archives leave files and folders of their own beside the
snippets, some of them named like snippets. They are recognised by name, skipped and counted.
"""

import os
from collections import Counter
from pathlib import Path

from shard_tools.cadence import check_key
from shard_tools.errors import InputError

_MAC = "Mac metadata"
_HIDDEN = "hidden"
_TRASH = "trash or system"
_PARTIAL = "partial downloads"
_OTHER = "others, not .npy"
_KIND_OF_FOLDER = {
    "__macosx": _MAC,
    "$recycle.bin": _TRASH,
    "#recycle": _TRASH,
    "system volume information": _TRASH,
    "lost+found": _TRASH,
    "@eadir": _TRASH,
}
_KIND_OF_FILE = {"thumbs.db": _TRASH, "ehthumbs.db": _TRASH, "desktop.ini": _TRASH}
_PARTIAL_ENDINGS = (".crdownload", ".part", ".partial", ".download", ".aria2", ".tmp")


class LeftAlone:
    """How many files and folders of each kind were skipped, and the first of each."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, kind: str, name: str) -> None:
        """Count one."""
        self._counts[kind] += 1
        self._first.setdefault(kind, name)

    def __bool__(self) -> bool:
        return bool(self._counts)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} {kind} ({self._first[kind]})" for kind, count in sorted(self._counts.items()))
        return f"left alone {self._counts.total():,} files and folders that are not snippets: {kinds}"


def clutter_kind(name: str, is_folder: bool) -> str | None:
    """The kind of a file or folder that other programs leave behind, by its name; None for one that may be data."""
    if name.startswith("._") or name == ".DS_Store":
        return _MAC
    if name.startswith("."):
        return _HIDDEN
    if is_folder:
        # A browser on a Mac keeps a partial download in a folder that is named after it.
        return _PARTIAL if name.lower().endswith(".download") else _KIND_OF_FOLDER.get(name.lower())
    return _PARTIAL if name.lower().endswith(_PARTIAL_ENDINGS) else _KIND_OF_FILE.get(name.lower())


def find_snippets(folder: Path, left: LeftAlone) -> dict[str, Path]:
    """Key to path of <folder>/<c>/<key>.npy and <folder>/<key>.npy; clutter is counted in `left`.

    Raises InputError where a folder cannot be read, or a file that looks like a snippet has an unsafe or repeated key
    or is not a regular file.
    """
    found: dict[str, Path] = {}
    if not folder.exists():
        return found
    if not folder.is_dir():
        raise InputError(f"{folder}: a file, expected a folder of snippets")
    seen: set[Path] = set()
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        real = Path(parent).resolve()
        if real in seen:  # a link that leads back up would make the walk endless
            folders.clear()
            continue
        seen.add(real)
        folders[:] = _data_of(folders, left, is_folder=True)
        for name in _data_of(names, left, is_folder=False):
            _add_snippet(found, Path(parent, name))
    return found


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename}: {error.strerror}; expected a readable folder")


def _data_of(names: list[str], left: LeftAlone, is_folder: bool) -> list[str]:
    """The names that may be data; the others are counted in `left`."""
    chosen = []
    for name in names:
        kind = clutter_kind(name, is_folder)
        if kind is None and not is_folder and not name.endswith(".npy"):
            kind = _OTHER
        if kind is None:
            chosen.append(name)
        else:
            left.add(kind, name)
    return chosen


def _add_snippet(found: dict[str, Path], path: Path) -> None:
    key = path.name.removesuffix(".npy")
    check_key(key, str(path))
    if key in found:
        raise InputError(f"{path}: key {key} is also used by {found[key]}; rename or remove one")
    if not path.is_file():  # opening a pipe would wait for a writer for ever
        raise InputError(f"{path}: not a regular file, expected a snippet")
    found[key] = path
