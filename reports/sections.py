"""The sections of a run's page: one about the training, and one about each prediction."""

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from reports.candidates import Scored, build_galleries, describe_tracks, draw_candidates, read_validation
from reports.page import (
    SECTIONS,
    Block,
    Picture,
    Section,
    read_section,
    to_picture,
    to_rows,
    write_page,
    write_run_page,
    write_section,
)
from reports.plots import (
    MEASURES,
    draw_calibration,
    draw_gradients,
    draw_measure,
    draw_precision_recall,
    draw_roc,
    draw_score_histogram,
    draw_updates,
    to_png,
)
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from training.config import listed
from training.metrics import average_precision, calibration, recall_at_fpr, roc_auc
from training.results import NORMS
from training.system_info import describe_machine, versions

_CANDIDATES = 12  # pictures of a prediction's best cadences
_SUBMISSION = "submission"  # the row that identifies a prediction's section
_RATES = (0.1, 0.01, 0.001)
_EXPECTED_FALSE = 10  # least number of false positives at a rate; with fewer, recall is a matter of luck
_PACKAGES = (
    "torch", "torchvision", "timm", "accelerate", "nvidia-dali", "numba", "numpy", "scipy", "scikit-learn",
    "safetensors",
)  # fmt: skip
_FILES = {
    "best.safetensors": "weights of the best epoch",
    "oof.csv": "the score and logit that they give each validation cadence",
    "metrics.jsonl": "a line of figures for each epoch",
    NORMS: "norms of gradient, weights and update, by part of the network and step",
    "config.json": "the configuration",
    "summary.json": "ROC AUC, trivial statistics, skipped samples",
    "curves.png": "curves over the epochs",
    "roc.png": "the ROC curve of the best epoch",
    "checkpoints": "what --resume goes on from",
}


def write_training_report(run_dir: Path, manifest: Manifest, accelerator: Accelerator) -> Path:
    """Write the training section from the files of a finished run, render the page and return its path.

    Raises InputError if a snippet cannot be read, and OSError if the page cannot be written.
    """
    config, summary = (json.loads((run_dir / name).read_bytes()) for name in ("config.json", "summary.json"))
    history = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    scored = read_validation(run_dir, manifest, config["fold"])
    infer = ["infer.py", "--shards", *listed(config["shards"]), "--weights", str(run_dir / "best.safetensors")]
    command = ["python", *infer, "--tta", "--out", str(run_dir / "submission.csv")]
    blocks = [
        Block("", numbers=_headline(scored)),
        Block("The run", rows=_run_rows(config, summary, history, manifest, accelerator)),
        Block("Over the epochs", pictures=_curves(history)),
        *_learning(run_dir),
        Block("How good the validation scores are", pictures=_judgements(scored)),
        *build_galleries(manifest, scored),
        Block("Configuration", rows=to_rows(config), is_folded=True),
        Block("Machine and versions", rows=to_rows({**describe_machine(), **versions(_PACKAGES)}), is_folded=True),
        Block("Files of the run", rows=[(n, a) for n, a in _FILES.items() if (run_dir / n).exists()], is_folded=True),
        Block("To go on", text="This scores the test split with these weights.", command=shlex.join(command)),
    ]
    if summary["skipped"]:
        skipped = Block("Bad samples that training skipped", rows=to_rows(summary["skipped"]), is_folded=True)
        blocks.insert(-1, skipped)
    _drop_predictions_of_older_weights(run_dir)
    write_section(run_dir, "1-training", Section("Training", f"Finished {_now()}.", blocks))
    return write_run_page(run_dir)


@dataclass(frozen=True)
class Prediction:
    """What was predicted, and with which weights."""

    out: Path
    """The submission."""
    ids: int
    """How many ids it holds."""
    split: str
    weights: Sequence[Path]

    @property
    def run_dir(self) -> Path | None:
        """Folder of the run that all weights belong to; None if there is none, or if it cannot be written to."""
        folder = self.weights[0].parent
        is_run = {path.parent for path in self.weights} == {folder} and (folder / "config.json").is_file()
        return folder if is_run and os.access(folder, os.W_OK) else None


def write_prediction_report(prediction: Prediction, manifest: Manifest, scored: Scored) -> Path:
    """Write a section about a prediction, render the page and return its path.

    It is the page of the run that the weights belong to, which keeps the sections of other submissions. If there is no
    such run, it is a separate page beside the submission. Raises as `write_training_report`.
    """
    target = scored.target if scored.is_judged else None
    histogram = to_picture(to_png(draw_score_histogram(scored.score, target)), "histogram of the scores")
    best = draw_candidates(manifest, scored, scored.falling[:_CANDIDATES])
    blocks = [
        Block("", rows=_prediction_rows(prediction, manifest, scored)),
        Block("Scores", pictures=[histogram]),
        Block("Best candidates", describe_tracks(manifest), pictures=best, is_gallery=True),
    ]
    out, run_dir = prediction.out, prediction.run_dir
    section = Section(f"Prediction: {prediction.split}", f"{out.name}, made {_now()}.", blocks)
    if run_dir:
        write_section(run_dir, _section_of(run_dir, prediction.split, out), section)
        return write_run_page(run_dir)
    page = out.with_name(f"{out.stem}.report.html")
    write_page(page, out.stem, [section])
    return page


def _prediction_rows(prediction: Prediction, manifest: Manifest, scored: Scored) -> list[tuple[str, str]]:
    rows = [
        (_SUBMISSION, str(prediction.out.resolve())),
        ("ids in it", f"{prediction.ids:,}"),
        ("split", prediction.split),
        ("cadences scored", f"{len(scored.rows):,}"),
        ("shards", str(manifest.root)),
        ("weights", ", ".join(map(str, prediction.weights))),
    ]
    if scored.is_judged:
        rows.append(("ROC AUC on this split", f"{roc_auc(scored.target, scored.order):.4f}"))
    return rows


def _section_of(folder: Path, split: str, out: Path) -> str:
    """The name of a submission's section: that of its earlier section, or else the next free one."""
    for name in (f"2-prediction-{split}{suffix}" for suffix in ("", *(f"_{number:02d}" for number in range(2, 100)))):
        path = folder / SECTIONS / f"{name}.json"
        if not path.is_file():
            return name
        said = dict(row for block in read_section(path).blocks for row in block.rows)
        if Path(said.get(_SUBMISSION, "")).resolve() == out.resolve():
            return name
    raise InputError(f"{folder / SECTIONS}: holds 99 predictions of {split}; delete those no longer needed")


def _headline(scored: Scored) -> list[tuple[str, str, str]]:
    target, score = scored.target, scored.order
    negatives = int((target == 0).sum())
    numbers = [
        (f"{roc_auc(target, score):.4f}", "validation ROC AUC", ""),
        (f"{average_precision(target, score):.4f}", "average precision", f"chance: {np.mean(target == 1):.4f}"),
    ]
    for rate in _RATES:
        name, needed = f"recall at a false positive rate of {rate:g}", round(_EXPECTED_FALSE / rate)
        if negatives >= needed:
            numbers.append((f"{recall_at_fpr(target, score, rate):.3f}", name, ""))
        else:
            numbers.append(("-", name, f"needs {needed:,} cadences without a needle, but there are {negatives:,}"))
    return numbers


def _run_rows(
    config: dict[str, Any], summary: dict[str, Any], history: Sequence[dict[str, float]], manifest: Manifest,
    accelerator: Accelerator,
) -> list[tuple[str, str]]:  # fmt: skip
    trained = f"{len(manifest.rows('train', config['fold'])):,} to train on"
    if "backgrounds" in config:
        trained = f"backgrounds of {', '.join(config['backgrounds'])} to train on"
    held_out = manifest.rows("train", config["fold"], held_out=True)
    best = max(history, key=lambda line: line["auc"])
    world_size = accelerator.num_processes
    return [
        ("preset", config["preset"]),
        ("model", config["model"]["model"]),
        ("shards", f"{', '.join(listed(config['shards']))} ({len(manifest.shards)} shards)"),
        ("cadences", f"{trained}; {len(held_out):,} of fold {config['fold']} to validate on"),
        ("needles in validation", f"{int((manifest.target[held_out] == 1).sum()):,}"),
        ("epochs", f"{len(history)}, the best was {best['epoch']:.0f}"),
        ("devices", f"{world_size} x {accelerator.device.type}, in {_precision(accelerator)}"),
        ("global batch", f"{config['global_batch']} cadences"),
        (
            "trivial statistics",
            ", ".join(f"{name} {auc:.3f}" for name, auc in summary["trivial_auc"].items())
            + ": the ROC AUC of ON minus OFF panels, for comparison",
        ),
    ]


def _precision(accelerator: Accelerator) -> str:
    return "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision


def _curves(history: Sequence[dict[str, float]]) -> list[Picture]:
    figures = {measure.title: draw_measure(history, measure) for measure in MEASURES}
    return [to_picture(to_png(figure), f"{title} over the epochs") for title, figure in figures.items()]


def _learning(run_dir: Path) -> list[Block]:
    """How strongly each part of the network learns; nothing for a run of an earlier version, which has no norms."""
    path = run_dir / NORMS
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    if not rows:
        return []
    figures = {"gradients": draw_gradients(rows), "updates": draw_updates(rows)}
    pictures = [to_picture(to_png(figure), f"{name} by part of the network") for name, figure in figures.items()]
    return [Block("What each part of the network learns", "At steps 1, 10, 100, ...", pictures=pictures)]


def _judgements(scored: Scored) -> list[Picture]:
    target, score = scored.target, scored.score
    means, shares, counts = calibration(target, score)
    error = float(np.average(np.abs(means - shares), weights=counts))
    figures = {
        "ROC curve": draw_roc(target, scored.order, f"ROC AUC {roc_auc(target, scored.order):.4f}"),
        "precision-recall curve": draw_precision_recall(
            target, scored.order, f"average precision {average_precision(target, scored.order):.4f}"
        ),
        "histogram of the scores by class": draw_score_histogram(score, target),
        "calibration, with the number of cadences at each point": draw_calibration(means, shares, counts),
    }
    said = {3: [f"Expected calibration error {error:.3f}; the numbers are cadences."]}
    return [
        to_picture(to_png(figure), name, lines=said.get(number, ()))
        for number, (name, figure) in enumerate(figures.items())
    ]


def _drop_predictions_of_older_weights(run_dir: Path) -> None:
    trained = (run_dir / "best.safetensors").stat().st_mtime_ns
    for path in (run_dir / SECTIONS).glob("2-prediction-*.json"):
        if path.stat().st_mtime_ns < trained:
            path.unlink()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
