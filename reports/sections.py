"""What train.py and infer.py have to say on the page of a run, as sections for reports/page.py."""

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator

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
    draw_calibration,
    draw_curve,
    draw_precision_recall,
    draw_roc,
    draw_score_histogram,
    draw_waterfall,
    to_png,
)  # fmt: skip
from shard_tools.baselines import read_snippets
from shard_tools.cadence import CHANNEL_WIDTH_HZ, TIME_BIN_SECONDS
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from training.dedoppler import find_drift
from training.metrics import average_precision, calibration, recall_at_fpr, roc_auc
from training.out_of_fold import read_scores
from training.system_info import machine, versions

_SHOWN = 6  # of each kind of validation cadence
_CANDIDATES = 12  # of a prediction
_RATES = (0.1, 0.01, 0.001)
_EXPECTED_FALSE = 10  # false positives at such a rate: with fewer, a recall is a matter of luck
_PACKAGES = (
    "torch", "torchvision", "timm", "accelerate", "nvidia-dali", "numba", "numpy", "scipy", "scikit-learn",
    "safetensors",
)  # fmt: skip
_FILES = {
    "best.safetensors": "weights of the best epoch",
    "oof.csv": "their score and logit of each cadence of validation",
    "metrics.jsonl": "a line of figures for each epoch",
    "config.json": "the configuration",
    "summary.json": "ROC AUC, trivial statistics, skipped samples",
    "curves.png": "curves over the epochs",
    "roc.png": "the ROC curve of the best epoch",
    "checkpoints": "what --resume goes on from",
}
_DRIFT = (
    "Red arrowheads show where the line that a de-Doppler search finds in the ON panels, and not in the OFF panels, "
    "enters and leaves each panel: an estimate, to be checked by eye, that knows nothing of the network's score. "
    "Channels count from 0; Hz/s are those of channels of {hertz:.2f} Hz and time bins of {seconds:.2f} s."
)


@dataclass(frozen=True)
class Scored:
    """Rows of a data set with their scores, in the order of the rows; the target is -1 where it is not known."""

    rows: npt.NDArray[np.int64]
    target: npt.NDArray[np.int8]
    score: npt.NDArray[np.float64]
    logit: npt.NDArray[np.float64] | None = None
    """None where several models' ranks were averaged, and there is none."""

    @property
    def order(self) -> npt.NDArray[np.float64]:
        """What cadences are ranked by; scores may be 1 for all of the best."""
        return self.score if self.logit is None else self.logit

    @property
    def falling(self) -> npt.NDArray[np.int64]:
        """Places in the order of the rows, the best first."""
        return np.argsort(-self.order, kind="stable")

    def say(self, place: int) -> list[str]:
        """What tells a cadence from its neighbours, a line each: its rank, its logit, and its score."""
        rank = 1 + int((self.order > self.order[place]).sum())
        score = f"score {self.score[place]:.4f}"
        return [
            f"rank {rank:,} of {len(self.rows):,}",
            score if self.logit is None else f"logit {self.logit[place]:.2f}, {score}",
        ]

    @property
    def is_judged(self) -> bool:
        """Whether both classes are known, so that scores can be told right or wrong."""
        return bool((self.target >= 0).all()) and len(np.unique(self.target)) == 2


def write_training_report(run_dir: Path, manifest: Manifest, accelerator: Accelerator) -> Path:
    """Write the training's section from the files of a finished run, and the page; return where the page is.

    Raises InputError where a snippet cannot be read, and OSError where the page cannot be written.
    """
    config, summary = (json.loads((run_dir / name).read_bytes()) for name in ("config.json", "summary.json"))
    history = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    judged = read_scores(run_dir / "oof.csv")
    rows = manifest.rows("train", config["fold"], held_out=True).astype(np.int64)  # oof.csv has them in this order
    scored = Scored(rows, manifest.target[rows], judged.score, judged.logit)
    infer = ["infer.py", "--shards", *_shards_of(config), "--weights", str(run_dir / "best.safetensors")]
    command = ["python", *infer, "--tta", "--out", str(run_dir / "submission.csv")]
    blocks = [
        Block("", numbers=_headline(scored)),
        Block("The run", rows=_run_rows(config, summary, history, manifest, accelerator)),
        Block("Over the epochs", pictures=_curves(history)),
        Block("What the scores of validation are worth", pictures=_judgements(scored)),
        *_galleries(manifest, scored),
        Block("Configuration", rows=to_rows(config), is_folded=True),
        Block("Machine and versions", rows=to_rows({**machine(), **versions(_PACKAGES)}), is_folded=True),
        Block("Files of the run", rows=[(n, a) for n, a in _FILES.items() if (run_dir / n).exists()], is_folded=True),
        Block("To go on", text="Scores the test split with these weights.", command=shlex.join(command)),
    ]
    if summary["skipped"]:
        skipped = Block("Bad samples that training skipped", rows=to_rows(summary["skipped"]), is_folded=True)
        blocks.insert(-1, skipped)
    _drop_predictions_of_older_weights(run_dir)
    write_section(run_dir, "1-training", Section("Training", f"Finished {_now()}.", blocks))
    return write_run_page(run_dir)


def _shards_of(config: dict[str, Any]) -> list[str]:
    """The folders and URLs of a run, of which config.json holds one as text and several as a list."""
    shards = config["shards"]
    return [shards] if isinstance(shards, str) else list(shards)


def write_prediction_report(
    weights: Sequence[Path], out: Path, split: str, manifest: Manifest, scored: Scored, ids: int
) -> Path:
    """Write what was predicted to a page and return where it is.

    Where all weights lie in one run's folder that is ours to write in, that run's page gets the section; else the
    prediction has a page of its own beside the submission. Predictions of other submissions stay on the page. Raises
    as `write_training_report`.
    """
    facts = {
        "submission": str(out.resolve()),
        "ids in it": f"{ids:,}",
        "split": split,
        "cadences scored": f"{len(scored.rows):,}",
        "shards": str(manifest.root),
        "weights": ", ".join(map(str, weights)),
    }
    if scored.is_judged:
        facts["ROC AUC on this split"] = f"{roc_auc(scored.target, scored.order):.4f}"
    target = scored.target if scored.is_judged else None
    histogram = to_picture(to_png(draw_score_histogram(scored.score, target)), "histogram of the scores")
    best = scored.falling[:_CANDIDATES]
    blocks = [
        Block("", rows=list(facts.items())),
        Block("Scores", pictures=[histogram]),
        Block("Best candidates", _about_drift(manifest), pictures=_waterfalls(manifest, scored, best),
              is_gallery=True),
    ]  # fmt: skip
    section = Section(f"Prediction: {split}", f"{out.name}, made {_now()}.", blocks)
    folder = weights[0].parent
    is_of_the_run = {path.parent for path in weights} == {folder} and (folder / "config.json").is_file()
    if is_of_the_run and os.access(folder, os.W_OK):
        write_section(folder, _section_of(folder, split, out), section)
        return write_run_page(folder)
    page = out.with_name(f"{out.stem}.report.html")
    write_page(page, out.stem, [section])
    return page


def _section_of(folder: Path, split: str, out: Path) -> str:
    """The name of a submission's section: its own of before, else one that is free, in the order they were made."""
    for name in (f"2-prediction-{split}{suffix}" for suffix in ("", *(f"_{number:02d}" for number in range(2, 100)))):
        path = folder / SECTIONS / f"{name}.json"
        if not path.is_file():
            return name
        said = dict(row for block in read_section(path).blocks for row in block.rows)
        if Path(said.get("submission", "")).resolve() == out.resolve():
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
            numbers.append(("-", name, f"takes {needed:,} cadences without a needle; here are {negatives:,}"))
    return numbers


def _run_rows(
    config: dict[str, Any], summary: dict[str, Any], history: Sequence[dict[str, float]], manifest: Manifest,
    accelerator: Accelerator,
) -> list[tuple[str, str]]:  # fmt: skip
    trained = len(manifest.rows("train", config["fold"]))
    held_out = manifest.rows("train", config["fold"], held_out=True)
    best = max(history, key=lambda line: line["auc"])
    world_size = accelerator.num_processes
    return [
        ("preset", config["preset"]),
        ("model", config["model"]["model"]),
        ("shards", f"{', '.join(_shards_of(config))} ({len(manifest.shards)} shards)"),
        ("cadences", f"{trained:,} to train on; {len(held_out):,} of fold {config['fold']} to validate on"),
        ("needles in validation", f"{int((manifest.target[held_out] == 1).sum()):,}"),
        ("epochs", f"{len(history)}, the best was {best['epoch']:.0f}"),
        ("devices", f"{world_size} x {accelerator.device.type}, in {_precision(accelerator)}"),
        ("global batch", f"{config['global_batch']} cadences"),
        (
            "trivial statistics",
            ", ".join(f"{name} {auc:.3f}" for name, auc in summary["trivial_auc"].items())
            + ": their ROC AUC, ON minus OFF panels, for comparison",
        ),
    ]


def _precision(accelerator: Accelerator) -> str:
    return "float32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision


def _curves(history: Sequence[dict[str, float]]) -> list[Picture]:
    epochs = [line["epoch"] for line in history]
    figures = {
        "training loss": draw_curve("training loss", epochs, [line["loss"] for line in history]),
        "validation ROC AUC": draw_curve("validation ROC AUC", epochs, [line["auc"] for line in history]),
        "throughput": draw_curve(
            "throughput of training", epochs, [line["cadences_per_s"] for line in history], "cadences/s", True
        ),
        "stall": draw_curve(
            "stall: waiting for the loader", epochs, [100 * line["stall"] for line in history], "% of the time", True
        ),
    }
    return [to_picture(to_png(figure), f"{name} over the epochs") for name, figure in figures.items()]


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


def _galleries(manifest: Manifest, scored: Scored) -> list[Block]:
    """The highest scores, the negatives that score highest and the positives that score lowest."""
    falling = scored.falling
    kinds = {
        "Best candidates of validation": falling,
        "Worst errors: no needle, and a high score": falling[scored.target[falling] == 0],
        "Worst errors: a needle, and a low score": falling[::-1][scored.target[falling[::-1]] == 1],
    }
    texts = [_about_drift(manifest), "", ""]
    return [
        Block(heading, text, pictures=_waterfalls(manifest, scored, chosen[:_SHOWN]), is_gallery=True)
        for text, (heading, chosen) in zip(texts, kinds.items(), strict=True)
    ]


def _waterfalls(manifest: Manifest, scored: Scored, chosen: npt.NDArray[np.int64]) -> list[Picture]:
    """Pictures of some of the rows: key, score, truth where it is known, and the estimated drift."""
    rows = scored.rows[chosen]
    summed = manifest.made.get("time_bin", 1)  # while packing: find_drift takes the bins for unsummed ones
    pictures = []
    for place, row, key in zip(chosen, rows, manifest.keys_of(rows), strict=True):
        snippet = read_snippets(manifest, np.array([row]))[0]
        track = find_drift(snippet)
        lines = scored.say(int(place))
        if scored.target[place] >= 0:
            lines.append("truth: needle" if scored.target[place] else "truth: no needle")
        lines.append(f"drift {track.drift_rate / summed:+.3f} Hz/s")
        is_inside = 0 <= track.start_channel < manifest.shape[2]
        lines.append(f"from channel {track.start_channel:.0f}{'' if is_inside else ', outside of the snippet'}")
        figure = draw_waterfall(snippet, (track.start_channel, track.end_channel))
        pictures.append(to_picture(to_png(figure), f"waterfall of {key}, six panels", key, lines))
    return pictures


def _about_drift(manifest: Manifest) -> str:
    seconds = TIME_BIN_SECONDS * manifest.made.get("time_bin", 1)
    return _DRIFT.format(hertz=CHANNEL_WIDTH_HZ, seconds=seconds)


def _drop_predictions_of_older_weights(run_dir: Path) -> None:
    trained = (run_dir / "best.safetensors").stat().st_mtime_ns
    for path in (run_dir / SECTIONS).glob("2-prediction-*.json"):
        if path.stat().st_mtime_ns < trained:
            path.unlink()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
