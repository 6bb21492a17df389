"""Predict: weights and shards to a Kaggle submission, on any number of devices; or an observation to candidates.

python infer.py --help
"""

import shard_tools.system.allocator
import shard_tools.system.openmp  # noqa: F401  before torch is loaded
from pipeline import compile_ahead

if __name__ == "__main__":
    compile_ahead.start(("eval",))

# isort: split
import contextlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tyro
from accelerate import Accelerator

from pipeline.canvas import CanvasConfig
from pipeline.loader import LoaderConfig
from reports.candidates import Scored, write_best
from reports.observation import write_observation_report
from reports.sections import Prediction, write_prediction_report
from shard_tools.atomic_files import is_stream
from shard_tools.errors import InputError
from shard_tools.joined_manifest import read_manifests
from shard_tools.manifest import Int64s, Manifest
from shard_tools.storage.base import StoreConfig
from shard_tools.system.command import run_command
from shard_tools.tasks.base import TaskConfig
from training.accelerator import build_accelerator
from training.config import listed
from training.drivers import check_gpu
from training.environment import cpu_is_asked_for
from training.metrics import Average, mean_logit, mean_score, roc_auc
from training.observation.write_findings import (
    NO_WEIGHTS,
    CandidatesConfig,
    ObservationSearch,
    Written,
    find_candidates,
)
from training.prediction import (
    BATCH_SIZE,
    OtherModel,
    PredictConfig,
    Trained,
    load_trained,
    predict_all,
    warn_of_known,
)
from training.run import trained_on
from training.scoring import Scoring, score_in_parts
from training.submission import check_ids, check_out, check_split, hold_pipe, submission_keys, write_submission
from training.weights import find_weights

_LISTED = 10  # candidates of an observation that are printed
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InferConfig:
    """Score a split with one or several trained models and write a submission."""

    shards: tuple[str, ...]
    """Folder or URL (s3://, gs://, https://, file://) with manifest.json, as `python -m shard_tools pack` writes it.
    Several are read as one data set: their shapes and numbers of folds must be equal, and every key unique."""
    weights: tuple[Path, ...]
    """Files of weights; their predictions are averaged. Files of train.py (best.safetensors) state their model and
    canvas; files of another program (.pth, .safetensors) need --model and the canvas options. needlestream: the weights
    that come with the program, for snippets of the competition's shape. none: with --candidates, the search alone."""
    out: Path = Path("submission.csv")
    """The submission. Unless it is a device or a pipe, a picture of its best candidates and a page are written beside
    it."""
    split: Literal["test", "train"] = "test"
    """The split to score."""
    average: Average = "logits"
    """How to average several models. logits: the mean of their logits. ranks: the mean of their ranks within the split,
    0 to 1, for models whose scores are on different scales."""
    tta: bool = False
    """Average over the flips that the canvas allows (test time augmentation)."""
    batch_size: int = BATCH_SIZE
    """Cadences of one rank in one forward pass; --tta passes each of them in every view."""
    fill_missing: float | None = None
    """Score for ids of the submission that the shards lack, 0 to 1; unset: such ids are an error."""
    precision: Literal["auto", "bf16", "fp16", "float32"] = "auto"
    """Precision of the forward pass. auto: bf16 if the hardware has it, else fp16 on a GPU, else float32."""
    scores: str | None = None
    """Folder or URL (s3://, gs://) for the logits, in several parquet files with one row per cadence; an interrupted
    prediction continues from them. --on ray needs it, in a place that all nodes see."""
    model: str | None = None
    """For weights of another program: the timm model that they belong to. Describe the images that they were trained on
    with --canvas, --height, --width and the options after them."""
    canvas: tyro.conf.OmitArgPrefixes[CanvasConfig] = field(default_factory=CanvasConfig)
    observation: tyro.conf.OmitArgPrefixes[CandidatesConfig] = field(default_factory=CandidatesConfig)
    loader: tyro.conf.OmitArgPrefixes[LoaderConfig] = field(default_factory=LoaderConfig)
    store: tyro.conf.OmitArgPrefixes[StoreConfig] = field(default_factory=StoreConfig)
    tasks: tyro.conf.OmitArgPrefixes[TaskConfig] = field(default_factory=TaskConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", tuple(map(self.tasks.absolute, listed(self.shards))))
        if self.scores is not None:
            object.__setattr__(self, "scores", self.tasks.absolute(self.scores))
        object.__setattr__(self, "weights", tuple(map(find_weights, self.weights)))
        if not self.weights:
            raise InputError("--weights: expected at least one file")
        if self.model is None and self.canvas != CanvasConfig():
            raise InputError(
                "--canvas and its options are for weights of another program, which need --model too; weights of "
                "train.py state their canvas"
            )
        if self.observation.candidates is not None:
            self._check_observation()
        if self.tasks.on == "ray" and self.scores is None:
            raise InputError("--on ray: needs --scores too, a folder or URL for what each node scored")
        if self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: expected at least 1")
        if self.fill_missing is not None and not 0 <= self.fill_missing <= 1:
            raise InputError(f"--fill-missing {self.fill_missing}: expected 0 to 1")
        if self.observation.candidates is None and NO_WEIGHTS in self.weights:
            raise InputError("--weights none: works with --candidates only; a submission needs a file of weights")

    def _check_observation(self) -> None:
        """Raise InputError for an option that cannot be used with --candidates."""
        if self.model or self.tta:
            raise InputError("--candidates: takes weights of train.py, without --model and --tta")
        if self.scores is not None or self.tasks.on == "ray":
            raise InputError("--candidates: searches on one machine; leave out --scores and --on ray")
        if self.out != Path("submission.csv") or self.fill_missing is not None:
            raise InputError("--candidates: writes no submission; leave out --out and --fill-missing")


def load_all(config: InferConfig, manifest: Manifest) -> list[Trained]:
    """Load the models of all files. Raises InputError if one cannot be used, or --model is given but not needed."""
    other = None if config.model is None else OtherModel(config.model, config.canvas)
    trained = [load_trained(path, manifest, config.tta, other) for path in config.weights]
    if other is not None and all(each.about for each in trained):
        raise InputError(
            f"--model {other.name}: train.py wrote all of these weights, and they state their model; omit --model"
        )
    return trained


def infer(config: InferConfig) -> None:
    """Score the split, average over weights, write the submission, the picture of its candidates and the page.

    Everything that can be checked without a prediction is checked first.
    """
    accelerator = build_accelerator(config.precision)
    manifest = read_manifests(config.shards, config.store)
    check_split(config.split, manifest)
    if config.observation.candidates is not None:
        _search_observation(config, manifest, accelerator)
        return
    keys = submission_keys(config.split, manifest)
    check_ids(keys, config.split, manifest, config.fill_missing)
    with contextlib.ExitStack() as until_written:
        if accelerator.is_main_process:
            check_out(config.out, keys)
            until_written.enter_context(hold_pipe(config.out))
        trained = load_all(config, manifest)
        rows, logits = predict(config, accelerator, manifest, trained)
        if accelerator.is_main_process:
            warn_of_known(manifest, trained, rows)
            score = mean_score(logits, config.average)
            logit = mean_logit(logits) if config.average == "logits" else None
            scored = Scored(rows, manifest.target[rows], score, logit)
            _write_results(_Results(config, manifest, keys, scored, [each.about for each in trained]))
    accelerator.end_training()


def predict(
    config: InferConfig, accelerator: Accelerator, manifest: Manifest, trained: Sequence[Trained]
) -> tuple[Int64s, list[npt.NDArray[np.float64]]]:
    """The split's rows and each model's logits: computed on this rank's device, or by tasks if --scores is given."""
    how = PredictConfig(config.split, config.batch_size, config.loader)
    if config.scores is None:
        return predict_all(accelerator, manifest, trained, how)
    if accelerator.num_processes > 1:
        raise InputError(
            "--scores: start infer.py without a launcher; --on ray spreads the work over GPUs and machines"
        )
    scoring = Scoring(manifest, trained, config.weights, config.model, config.precision, how, config.scores)
    return score_in_parts(config.tasks, scoring)


def _search_observation(config: InferConfig, manifest: Manifest, accelerator: Accelerator) -> None:
    """Write the candidates of an observation, their pictures and a page, and print their paths."""
    if accelerator.num_processes > 1:
        raise InputError("--candidates: works in one process; start infer.py without accelerate launch or torchrun")
    search = ObservationSearch(manifest, config.split, config.weights, config.loader, accelerator.device)
    written = find_candidates(config.observation, search)
    _print_found(written)
    page = write_observation_report(written.paths[0], manifest, list(map(str, config.weights)))
    print(f"report:      {page}")


def _print_found(written: Written) -> None:
    candidates, findings = written.candidates, written.findings
    print(f"candidates:  {written.paths[0]}  ({len(candidates):,} lines in the ON panels alone)")
    print(f"interference: {written.paths[1]}  ({len(findings.interference):,} lines in ON and OFF panels)")
    print(f"controls:    {len(findings.controls):,} lines in the OFF panels alone; they give the false alarm rates")
    for candidate in candidates[:_LISTED]:
        print(
            f"{candidate.rank:5d}  {candidate.frequency_mhz:.6f} MHz {candidate.drift_rate_hz_s:+.4f} Hz/s  SNR "
            f"{candidate.snr:.1f}  score {candidate.score:.4g}  {candidate.flags}"
        )


@dataclass(frozen=True)
class _Results:
    """What a prediction found, and where to write it."""

    config: InferConfig
    manifest: Manifest
    keys: Sequence[str]
    """The ids of the submission, in its order."""
    scored: Scored
    abouts: Sequence[dict[str, Any]]
    """The metadata of each file of weights; empty for files of another program."""


def _write_results(results: _Results) -> None:
    """Write the submission and, if it is a regular file, a picture and a page beside it."""
    config, manifest, scored = results.config, results.manifest, results.scored
    score_of = dict(zip(manifest.keys_of(scored.rows), scored.score.tolist(), strict=True))
    write_submission(config.out, results.keys, score_of, config.fill_missing)
    if is_stream(config.out):
        _log.info("%s is not a regular file: only the submission is written, no picture and no report", config.out)
        with contextlib.redirect_stdout(sys.stderr):  # the submission may go to standard output, which gets only that
            _print_summary(results, [])
        return
    picture = config.out.with_name("candidates.png")
    write_best(picture, manifest, scored)
    _print_summary(results, [picture])
    prediction = Prediction(config.out, len(results.keys), config.split, config.weights)
    page = write_prediction_report(prediction, manifest, scored)
    print(f"report:      {page}")


def _print_summary(results: _Results, pictures: list[Path]) -> None:
    config, scored, abouts = results.config, results.scored, results.abouts
    print(f"submission:  {config.out}  ({len(results.keys):,} ids)")
    beside = {path.parent for path in config.weights}
    pictures = [*pictures, *(folder / name for folder in sorted(beside) for name in ("curves.png", "roc.png"))]
    if shown := [str(path) for path in pictures if path.is_file()]:
        print("pictures:    " + "\n             ".join(shown))
    for path, about in zip(config.weights, abouts, strict=True):
        told = f"validation ROC AUC {about['auc']:.4f} on fold {about['fold']}" if about else "of another program"
        print(f"weights:     {path}  ({told})")
    if (scored.target >= 0).all():
        print(f"ROC AUC of this prediction on the {config.split} split: {roc_auc(scored.target, scored.order):.4f}")
    if config.split == "train" and trained_on(abouts) & {each.identity for each in results.manifest.data_sets}:
        _log.warning(
            "warning: these weights were trained on this split, except for the fold that each file held out: the "
            "scores and the ROC AUC are too high, and averaging does not correct that; train.py --fold all writes "
            "unbiased scores to oof.csv"
        )


def main() -> None:
    """Parse the command line and predict."""
    config = tyro.cli(InferConfig, prog="infer.py")
    check_gpu(cpu_is_asked_for())
    infer(config)


if __name__ == "__main__":
    sys.exit(run_command(main))
