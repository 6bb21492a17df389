"""Going on with a run: from its last checkpoint, or not at all where that would train over what it made."""

import json
import logging
from pathlib import Path
from typing import Any

from shard_tools.errors import InputError
from training.checkpoint import load_last_checkpoint, names_a_checkpoint
from training.run import Run

_RESULTS = ("best.safetensors", "oof.csv", "metrics.jsonl", "summary.json")
_log = logging.getLogger(__name__)


def resume(run: Run) -> None:
    """Put a run where it stopped; leave it as it is where nothing of it was trained yet.

    Raises InputError where results lie in its folder, and no checkpoint to go on from.
    """
    run_dir = run.config.run_dir
    finished = {} if names_a_checkpoint(run_dir) else _read_finished(run_dir, run.config.epochs)
    if finished:
        # A copy without links, or without checkpoints: what an older one goes on to would replace finished weights.
        run.progress.load_state_dict(finished)
        _log.info("%s: this run is finished; its checkpoints are missing but no longer needed", run_dir)
    elif load_last_checkpoint(run.accelerator, run_dir):
        _log.info("going on after step %d", run.progress.step)
    else:
        _check_nothing_is_lost(run_dir)


def _check_nothing_is_lost(run_dir: Path) -> None:
    left = [name for name in _RESULTS if (run_dir / name).exists()]
    if left:
        raise InputError(
            f"{run_dir}: holds results ({', '.join(left)}) and no checkpoint to go on from; choose another --run-dir "
            "to keep them, or delete this one to train anew"
        )


def _read_finished(run_dir: Path, epochs: int) -> dict[str, Any]:
    """How far a finished run is, from its results; empty where they are not those of all epochs."""
    if not all((run_dir / name).is_file() for name in _RESULTS):
        return {}
    try:
        summary = json.loads((run_dir / "summary.json").read_bytes())
        history = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        progress = {"best_auc": summary["auc"], "skipped": summary["skipped"], "history": history}
        return progress if min(summary["epochs"], len(history)) >= epochs else {}
    except (ValueError, KeyError, TypeError):
        return {}
