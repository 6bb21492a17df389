"""Resume a run from its last checkpoint; refuse if that would overwrite results."""

import json
import logging
from pathlib import Path
from typing import Any

from shard_tools.errors import InputError
from training.checkpoint import load_last_checkpoint, names_a_checkpoint
from training.results import FILES, HISTORY, SUMMARY
from training.run import Run

_log = logging.getLogger(__name__)


def resume(run: Run) -> None:
    """Restore a run from its last checkpoint; leave it as it is if it has none yet.

    Raises InputError if its folder holds results but no checkpoint to go on from.
    """
    run_dir = run.config.run_dir
    finished = {} if names_a_checkpoint(run_dir) else _read_finished(run_dir, run.config.epochs)
    if finished:
        # The run was copied without checkpoints, or without the links to them. Going on from an older checkpoint would
        # replace the finished weights.
        run.progress.load_state_dict(finished)
        _log.info("%s: this run is finished; its checkpoints are missing but no longer needed", run_dir)
    elif load_last_checkpoint(run.accelerator, run_dir):
        _log.info("going on after step %d", run.progress.step)
    else:
        _check_nothing_is_lost(run_dir)


def _check_nothing_is_lost(run_dir: Path) -> None:
    """Raise InputError if a new training would overwrite results."""
    left = [name for name in FILES if (run_dir / name).exists()]
    if left:
        raise InputError(
            f"{run_dir}: holds results ({', '.join(left)}) and no checkpoint to go on from; choose another --run-dir "
            "to keep them, or delete this one to train anew"
        )


def _read_finished(run_dir: Path, epochs: int) -> dict[str, Any]:
    """The progress of a finished run, read from its results; empty unless they cover all epochs."""
    if not all((run_dir / name).is_file() for name in FILES):
        return {}
    try:
        summary = json.loads((run_dir / SUMMARY).read_bytes())
        history = [json.loads(line) for line in (run_dir / HISTORY).read_text().splitlines()]
        progress = {"best_auc": summary["auc"], "skipped": summary["skipped"], "history": history}
        return progress if min(summary["epochs"], len(history)) >= epochs else {}
    except (ValueError, KeyError, TypeError):
        return {}
