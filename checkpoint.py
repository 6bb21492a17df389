"""All that a run needs to go on, through Accelerate's own checkpointing; whole or absent, the last one never lost.

RUN/checkpoints/step-00000123/ holds one; `last` and `best` are links to two of them.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils.other import load as load_plain
from safetensors import SafetensorError

from shard_tools.errors import InputError
from shard_tools.files import file_sha256

_FOLDER = "checkpoints"
_HASHES = "sha256.json"  # neither safetensors nor torch.load notices a flipped bit
LAST, BEST = "last", "best"


def save_checkpoint(accelerator: Accelerator, run_dir: Path, step: int, best: bool = False) -> None:
    """Write a checkpoint and point `last`, and if it is the best so far `best`, to it; drop those nothing points to.

    Every rank calls it. What `accelerator.register_for_checkpointing` was told of is in it.
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
    except (RuntimeError, SafetensorError) as error:  # what they make of a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"{folder / name}: could not be written ({reason}); the last checkpoint is whole") from None
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (temporary / _HASHES).write_text(json.dumps(_read_hashes(temporary), indent=1) + "\n")
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)  # or a power cut could leave nothing but the name, after the one before is gone
        name = next(name for name in _names(step) if name not in _pointed_to(folder))
        shutil.rmtree(folder / name, ignore_errors=True)
        temporary.rename(folder / name)
        for link in (LAST, BEST) if best else (LAST,):
            _point(folder / link, name)
        kept = _pointed_to(folder)
        for path in [*folder.glob("step-*"), *folder.glob(".*.tmp")]:
            if path.name not in kept:
                shutil.rmtree(path)
    accelerator.wait_for_everyone()


def point_best_to_last(run_dir: Path) -> None:
    """Keep the last checkpoint as the best so far."""
    folder = run_dir / _FOLDER
    _point(folder / BEST, (folder / LAST).readlink().name)


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run was saved here, whole or not."""
    return any((run_dir / _FOLDER).glob("step-*"))


def load_last_checkpoint(accelerator: Accelerator, run_dir: Path) -> bool:
    """Restore the last checkpoint; False where there is none. Raises InputError where it cannot be read."""
    last = run_dir / _FOLDER / LAST
    if not last.is_symlink():
        return False
    try:
        step = last.resolve(strict=True)
        stated = json.loads((step / _HASHES).read_bytes())
        found = _read_hashes(step)
        changed = sorted(name for name in {**stated, **found} if stated.get(name) != found.get(name))
        if changed:
            raise ValueError(f"{changed[0]} is missing or changed after it was written")
        for path in step.glob("custom_checkpoint_*.pkl"):
            # Accelerate would run whatever code a pickle in these holds; this raises on all but plain data.
            load_plain(path, map_location="cpu")
        accelerator.load_state(str(step))
    except Exception as error:  # damaged pickles raise about every error that there is
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{last}: could not be read as a checkpoint of this run ({reason}); point it to another one of its "
            f"folder, or delete {run_dir} to start over"
        ) from None
    return True


def _names(step: int) -> Iterator[str]:
    """Names for checkpoints after a step: more than one, since what a link points to is never replaced in place."""
    return (f"step-{step:08d}{suffix}" for suffix in itertools.chain([""], map("-{}".format, itertools.count(2))))


def _pointed_to(folder: Path) -> set[str]:
    return {(folder / link).readlink().name for link in (LAST, BEST) if (folder / link).is_symlink()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint, by name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _HASHES)
    return {str(path.relative_to(folder)): file_sha256(path) for path in paths}


def _point(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`, replacing it in one step."""
    temporary = link.with_name(f".{link.name}.link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
