"""A run's checkpoints, saved through Accelerate: each whole or absent, and the last one never lost.

RUN/checkpoints/step-00000123/ holds one; `last` and `best` are links to two of them, or small files with their names
where the file system has no links.
"""

import contextlib
import itertools
import json
import logging
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils.other import load as load_plain
from safetensors import SafetensorError

from shard_tools.atomic_files import NOT_SUPPORTED, file_sha256, naming, put_in_place, say_once, sync, write_whole
from shard_tools.errors import InputError

_FOLDER = "checkpoints"
_HASHES = "sha256.json"  # neither safetensors nor torch.load notices a flipped bit
_NAME = re.compile(r"step-([0-9]{8,})(?:-([0-9]+))?\Z")
LAST, BEST = "last", "best"
_log = logging.getLogger(__name__)


def save_checkpoint(accelerator: Accelerator, run_dir: Path, step: int, best: bool = False) -> None:
    """Write a checkpoint, point `last` (and `best`, if it is the best so far) to it; delete those nothing points to.

    Every rank calls it. It holds all that is registered with `accelerator.register_for_checkpointing`.
    """
    folder = run_dir / _FOLDER
    name = next(_names(step))
    temporary = folder / f".{name}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
    except (RuntimeError, SafetensorError) as error:  # what they raise on a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        reason = str(error).splitlines()[0][:200]
        raise InputError(
            f"{folder / name}: could not be written ({reason}); earlier checkpoints are intact: free some space and "
            "run the same command with --resume"
        ) from None
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with naming(folder / name):
            _keep(folder, temporary, step, best)
    accelerator.wait_for_everyone()


def _keep(folder: Path, temporary: Path, step: int, best: bool) -> None:
    """Rename a finished checkpoint, point to it, and delete those no longer needed."""
    (temporary / _HASHES).write_text(json.dumps(_read_hashes(temporary), indent=1) + "\n")
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)  # else a power cut could leave it empty, with the previous one already deleted
    name = next(name for name in _names(step) if name not in _pointed_to(folder))
    shutil.rmtree(folder / name, ignore_errors=True)
    temporary.rename(folder / name)
    for pointer in (LAST, BEST) if best else (LAST,):
        _point(folder / pointer, name)
    kept = _pointed_to(folder)
    for path in [*folder.glob("step-*"), *folder.glob(".*.tmp")]:
        if path.name not in kept:
            _remove(path)


def point_best_to_last(run_dir: Path) -> None:
    """Keep the last checkpoint as the best so far."""
    folder = run_dir / _FOLDER
    last = _named(folder / LAST)
    if last is not None:
        _point(folder / BEST, last)


def names_a_checkpoint(run_dir: Path) -> bool:
    """Whether `last` names a checkpoint that exists, intact or not."""
    name = _named(run_dir / _FOLDER / LAST)
    return name is not None and (run_dir / _FOLDER / name).is_dir()


def has_checkpoint(run_dir: Path) -> bool:
    """Whether there is any checkpoint here, intact or not, with or without pointers."""
    return any((run_dir / _FOLDER).glob("step-*")) or (run_dir / _FOLDER / LAST).exists()


def load_last_checkpoint(accelerator: Accelerator, run_dir: Path) -> bool:
    """Restore the last checkpoint; False if there is none. Raises InputError if it cannot be read.

    Every rank calls it. Where `last` is missing, the newest intact checkpoint is used.
    """
    folder = run_dir / _FOLDER
    if accelerator.is_main_process:
        _mend_pointers(folder)
    accelerator.wait_for_everyone()
    last = folder / LAST
    name = _named(last)
    if name is None or not (folder / name).is_dir():
        return False
    try:
        damage = _damage(folder / name)
        if damage:
            raise ValueError(damage)
        for path in (folder / name).glob("custom_checkpoint_*.pkl"):
            # Accelerate would run any code pickled in these; this raises on all but plain data.
            load_plain(path, map_location="cpu")
        with _mappable(folder / name) as source:
            accelerator.load_state(str(source))
    except Exception as error:  # damaged pickles raise almost any error
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{last}: could not be read as a checkpoint of this run ({reason}); delete {last} and {name} to go on from "
            f"the newest whole one that is left, or delete {run_dir} to start over"
        ) from None
    return True


def rehearse_checkpoint(run_dir: Path) -> None:
    """Try the file operations of a checkpoint now, so that a run does not fail at its first checkpoint.

    Raises OSError if the file system lacks an operation that checkpoints need.
    """
    folder = run_dir / ".rehearsal"
    _remove(folder)
    try:
        for name in ("step-00000001", "step-00000002"):
            (folder / f".{name}.tmp").mkdir(parents=True)
            write_whole(folder / f".{name}.tmp" / _HASHES, name)
            sync(folder / f".{name}.tmp")
            (folder / f".{name}.tmp").rename(folder / name)
            write_whole(folder / "weights", name)
            _point(folder / LAST, name)
    except OSError as error:
        error.filename = str(run_dir)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _names(step: int) -> Iterator[str]:
    """Names for checkpoints after a step: more than one, since one that is pointed to is never overwritten."""
    return (f"step-{step:08d}{suffix}" for suffix in itertools.chain([""], map("-{}".format, itertools.count(2))))


def _pointed_to(folder: Path) -> set[str]:
    return {name for name in (_named(folder / pointer) for pointer in (LAST, BEST)) if name is not None}


def _named(pointer: Path) -> str | None:
    """The checkpoint that a pointer (a link or a small file) names; None if it names none."""
    if pointer.is_symlink():
        return pointer.readlink().name
    try:
        name = pointer.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if _NAME.match(name) else None


def _point(pointer: Path, target: str) -> None:
    """Make `pointer` a symbolic link to `target`, or a file with its name, replacing it in one step."""
    temporary = pointer.with_name(f".{pointer.name}.link.tmp")
    _remove(temporary)
    try:
        temporary.symlink_to(target)
    except OSError as error:
        say_once(
            "symlink",
            f"{pointer.parent.parent}: no symbolic links here ({error.strerror}); {LAST} and {BEST} of its checkpoints "
            "are files that name them instead",
        )
        temporary.write_text(target + "\n")
        sync(temporary)
    if pointer.is_dir() and not pointer.is_symlink():
        shutil.rmtree(pointer)
    put_in_place(temporary, pointer)


def _mend_pointers(folder: Path) -> None:
    """Repair `last` and `best` in a run that was copied by a tool that followed or dropped links.

    Raises InputError if there are checkpoints but none is intact.
    """
    if not folder.is_dir():
        return
    for pointer in (folder / LAST, folder / BEST):
        if pointer.is_dir() and not pointer.is_symlink() and not _damage(pointer):
            _adopt(pointer)
    if names_a_checkpoint(folder.parent):
        return
    found = sorted((path for path in folder.glob("step-*") if _NAME.match(path.name)), key=_age, reverse=True)
    damages = {path: _damage(path) for path in found}
    whole = next((path for path in found if not damages[path]), None)
    if whole is not None:
        _log.warning("%s: names no checkpoint; going on from the newest whole one, %s", folder / LAST, whole.name)
        _point(folder / LAST, whole.name)
    elif found:
        reason = f"{found[0].name}: {damages[found[0]]}"
        raise InputError(
            f"{folder}: holds no whole checkpoint ({reason}); copy one from where the run was made, or delete "
            f"{folder.parent} to start over"
        )


def _adopt(copy: Path) -> None:
    """Turn a pointer that became a copy of its checkpoint back into a pointer; keep the copy if it is the only one."""
    hashes = (copy / _HASHES).read_bytes()
    twins = [path for path in copy.parent.glob("step-*") if _NAME.match(path.name) and not _damage(path)]
    twin = next((path for path in twins if (path / _HASHES).read_bytes() == hashes), None)
    if twin is None:
        step = int(load_plain(copy / "custom_checkpoint_0.pkl", map_location="cpu")["step"])
        twin = next(copy.with_name(name) for name in _names(step) if not copy.with_name(name).exists())
        copy.rename(twin)
    _point(copy, twin.name)


def _age(path: Path) -> tuple[int, int]:
    found = _NAME.match(path.name)
    return (int(found[1]), int(found[2] or 1)) if found else (0, 0)


def _damage(step: Path) -> str:
    """What is wrong with a checkpoint's files; empty if they are as they were written."""
    try:
        stated, found = json.loads((step / _HASHES).read_bytes()), _read_hashes(step)
        changed = sorted(name for name in {**stated, **found} if stated.get(name) != found.get(name))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0][:200]
    return f"{changed[0]} is missing or was changed after it was written" if changed else ""


def _read_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint, by name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _HASHES)
    return {str(path.relative_to(folder)): file_sha256(path) for path in paths}


@contextlib.contextmanager
def _mappable(step: Path) -> Iterator[Path]:
    """The checkpoint or a temporary copy of it, whichever can be memory-mapped, as safetensors does."""
    try:
        with (step / _HASHES).open("rb") as file:
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ).close()
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        with tempfile.TemporaryDirectory() as copies:
            yield Path(shutil.copytree(step, Path(copies, step.name), copy_function=shutil.copyfile))
        return
    yield step


def _remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
