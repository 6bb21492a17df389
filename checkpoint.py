"""All that a run needs to go on, through Accelerate's own checkpointing; whole or absent, the last one never lost.

RUN/checkpoints/step-00000123/ holds one; `last` and `best` are links to two of them.
"""

import shutil
from pathlib import Path
from pickle import UnpicklingError

from accelerate import Accelerator
from safetensors import SafetensorError

from shard_tools.errors import InputError

_FOLDER = "checkpoints"
LAST, BEST = "last", "best"


def save_checkpoint(accelerator: Accelerator, run_dir: Path, step: int, best: bool) -> None:
    """Write a checkpoint and point `last`, and if it is the best so far `best`, to it; drop those nothing points to.

    Every rank calls it. What `accelerator.register_for_checkpointing` was told of is in it.
    """
    folder = run_dir / _FOLDER
    name = f"step-{step:08d}"
    temporary = folder / f".{name}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder / name, ignore_errors=True)
        temporary.rename(folder / name)
        for link in (LAST, BEST) if best else (LAST,):
            _point(folder / link, name)
        kept = {(folder / link).readlink().name for link in (LAST, BEST) if (folder / link).is_symlink()}
        for path in [*folder.glob("step-*"), *folder.glob(".*.tmp")]:
            if path.name not in kept:
                shutil.rmtree(path)
    accelerator.wait_for_everyone()


def load_last_checkpoint(accelerator: Accelerator, run_dir: Path) -> bool:
    """Restore the last checkpoint; False where there is none. Raises InputError where it cannot be read."""
    last = run_dir / _FOLDER / LAST
    if not last.is_symlink():
        return False
    try:
        accelerator.load_state(str(last.resolve(strict=True)))
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, UnpicklingError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{last}: not a whole checkpoint of this run ({reason}); delete {run_dir} to start over"
        ) from None
    return True


def _point(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`, replacing it in one step."""
    temporary = link.with_name(f".{link.name}.link")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
