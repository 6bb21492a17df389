"""The result files that a run writes into its folder: after each epoch, and at its end.

metrics.jsonl has a line for each epoch, norms.jsonl a line for each part of the network at steps 1, 10, 100, ...;
best.safetensors and oof.csv come from the epoch with the highest validation ROC AUC; summary.json is written when all
epochs are done. reports/ draws the pictures and the page from these.
"""

import json

import numpy as np

from shard_tools.atomic_files import write_whole
from shard_tools.baselines import read_trivial_auc
from training.checkpoint import point_best_to_last
from training.out_of_fold import Scores, read_scores, write_scores
from training.run import Run, about_weights
from training.validation import Validation
from training.weights import save_weights

WEIGHTS, SCORES, HISTORY, SUMMARY = "best.safetensors", "oof.csv", "metrics.jsonl", "summary.json"
NORMS = "norms.jsonl"  # not among FILES: finished older runs lack it
FILES = (WEIGHTS, SCORES, HISTORY, SUMMARY)
_TRIVIAL_SAMPLES = 2000  # cadences of the held-out fold, evenly spaced: the trivial statistics need no more
_NAMED = 10  # bad samples that the final output names


def add_to_history(run: Run, trained: dict[str, float], validation: Validation) -> bool:
    """Add a line for the epoch to `run.progress.history`; return whether its ROC AUC is the best so far."""
    progress = run.progress
    is_best = validation.auc > progress.best_auc or not progress.history
    progress.best_auc = max(progress.best_auc, validation.auc)
    progress.history.append(
        {
            "epoch": float(len(progress.history) + 1),
            **trained,
            "auc": validation.auc,
            "average_precision": validation.average_precision,
            "validation_s": validation.seconds,
            "learning_rate": run.optimiser.param_groups[0]["lr"],
        }
    )
    progress.trained = None
    return is_best


def write_best(run: Run, validation: Validation) -> None:
    """Write the weights and their scores of the held-out fold, and keep the last checkpoint as the best."""
    run_dir = run.config.run_dir
    save_weights(run_dir / WEIGHTS, run.judged_model.state_dict(), about_weights(run, validation.auc))
    write_scores(run_dir / SCORES, run.manifest.keys_of(validation.rows), validation.target, validation.logit)
    point_best_to_last(run_dir)


def write_history(run: Run) -> None:
    """Write a line of JSON for each finished epoch."""
    lines = "".join(json.dumps(entry) + "\n" for entry in run.progress.history)
    write_whole(run.config.run_dir / HISTORY, lines)


def add_norms(run: Run) -> None:
    """Add the norms of the steps since the last checkpoint to the run's progress, and hand them to its tracker."""
    rows = run.norms.read()
    run.progress.norms += rows
    for step in dict.fromkeys(row["step"] for row in rows):
        found = {
            f"{name}_norm/{row['part']}": row[name]
            for row in rows
            for name in ("gradient", "weight", "update")
            if row["step"] == step and row[name] is not None
        }
        run.accelerator.log(found, step=step)


def write_norms(run: Run) -> None:
    """Write a line of JSON for each part of the network at each recorded step."""
    write_whole(run.config.run_dir / NORMS, "".join(json.dumps(row) + "\n" for row in run.progress.norms))


def write_summary(run: Run) -> None:
    """Write and print the best ROC AUC, the ROC AUCs of trivial statistics, and which samples were skipped."""
    run_dir, skipped, auc = run.config.run_dir, run.progress.skipped, run.progress.best_auc
    trivial = _trivial_auc(run)
    summary = {"auc": auc, "trivial_auc": trivial, "epochs": run.config.epochs, "skipped": skipped}
    write_whole(run_dir / SUMMARY, json.dumps(summary, indent=1) + "\n")
    cadences = len(run.manifest.rows("train", run.config.held_out, held_out=True))
    print(f"validation ROC AUC {auc:.4f} on fold {run.config.fold}, {cadences:,} cadences")
    print("trivial statistics: " + ", ".join(f"{name} {value:.4f}" for name, value in trivial.items()))
    if skipped:
        print(f"skipped {len(skipped)} bad samples (see {SUMMARY}): {', '.join(sorted(skipped)[:_NAMED])}")
    print(f"run folder: {run_dir}  (best.safetensors, oof.csv, metrics.jsonl, curves.png, roc.png)")


def _trivial_auc(run: Run) -> dict[str, float]:
    """ROC AUC of statistics that need no training, on the held-out fold: what a network has to beat."""
    rows = run.manifest.rows("train", run.config.held_out, held_out=True)
    chosen = np.linspace(0, len(rows) - 1, min(_TRIVIAL_SAMPLES, len(rows)), dtype=np.int64)
    return read_trivial_auc(run.manifest, rows[chosen])


def read_best_scores(run: Run) -> Scores:
    """The scores of the held-out fold by the best weights, as `write_best` wrote them."""
    return read_scores(run.config.run_dir / SCORES)
