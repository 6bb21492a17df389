"""Predict: weights and shards to a Kaggle submission, on any number of devices. python infer.py --help"""

import shard_tools.openmp  # noqa: F401  before torch is loaded

# isort: split
import contextlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import tyro
from accelerate import Accelerator, PartialState
from torch import nn

from drivers import check_gpu
from environment import check_environment, cpu_is_asked_for
from metrics import Average, mean_logit, mean_score, roc_auc, unique_rows
from model import ModelConfig, build_model, pick_precision
from pipeline.canvas import CanvasConfig
from pipeline.loader import Loader, LoaderConfig
from pipeline.plan import Order, Share
from report import write_waterfalls
from sections import Scored, write_prediction_report
from shard_tools.errors import InputError, run_command
from shard_tools.files import is_stream
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.progress import progress
from shard_tools.store import StoreConfig
from shard_tools.trivial import read_snippets
from submission import check_ids, check_out, hold_pipe, submission_keys, write_submission
from weights import fill_model, load_weights

_CANDIDATES = 6  # in the picture
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InferConfig:
    """Score a split with one or several trained models and write a submission."""

    shards: str
    """Folder or URL (s3://, gs://, https://, file://) with manifest.json, as `python -m shard_tools pack` writes it."""
    weights: tuple[Path, ...]
    """Files of weights (train.py's best.safetensors); their predictions are averaged."""
    out: Path = Path("submission.csv")
    """The submission; a picture of its best candidates is written beside it, but not beside a device or a pipe."""
    split: Literal["test", "train"] = "test"
    """The split to score."""
    average: Average = "logits"
    """Of several weights. logits: the mean of their logits. ranks: the mean of their ranks within the split, 0 to 1,
    for models whose scores are on different scales."""
    tta: bool = False
    """Average over the flips that the canvas allows (test time augmentation)."""
    batch_size: int = 64
    """Cadences of one rank in one forward pass; with --tta each is seen in every view."""
    fill_missing: float | None = None
    """Score for ids of the submission that the shards lack, 0 to 1; unset: such ids are an error."""
    precision: Literal["auto", "bf16", "fp16", "float32"] = "auto"
    """Of the forward pass. auto: bf16 where the hardware has it, else fp16 on a GPU, else float32."""
    loader: tyro.conf.OmitArgPrefixes[LoaderConfig] = field(default_factory=LoaderConfig)
    store: tyro.conf.OmitArgPrefixes[StoreConfig] = field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        if not self.weights:
            raise InputError("--weights: expected at least one file")
        if self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: expected at least 1")
        if self.fill_missing is not None and not 0 <= self.fill_missing <= 1:
            raise InputError(f"--fill-missing {self.fill_missing}: expected 0 to 1")


def build_accelerator(precision: str, **options: Any) -> Accelerator:
    """An Accelerator of `precision` (auto, bf16, fp16 or float32); ranks other than the first keep quiet."""
    check_environment()
    device = PartialState(cpu=cpu_is_asked_for()).device
    chosen = {"auto": pick_precision(device), "float32": "no"}.get(precision, precision)
    if chosen == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16: needs a GPU; on a CPU choose bf16 or float32")
    accelerator = Accelerator(mixed_precision=chosen, **options)
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.WARNING)
    return accelerator


def predict(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Loader,
    label: str,
    after_batch: Callable[[], None] = lambda: None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Rows and logits of everything the loader's order holds, over all ranks, each row once, sorted.

    Logits are averaged over the views of a batch (B, V, C, H, W). `after_batch` may end it by raising.
    """
    rows, (logits,) = predict_each(accelerator, [model], loader, label, after_batch)
    return rows, logits


def predict_each(
    accelerator: Accelerator,
    models: Sequence[nn.Module],
    loader: Loader,
    label: str,
    after_batch: Callable[[], None] = lambda: None,
) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.float64]]]:
    """As `predict`, of several models that see the same batches: rows, and the logits of each model."""
    for model in models:
        model.eval()
    rows, counts, logits = [], [], []
    with torch.inference_mode():
        for batch in progress(loader, len(loader), label, "batches"):
            image = batch.image.flatten(0, 1)
            found = []
            for model in models:
                with accelerator.autocast():
                    views = model(image).float().view(batch.image.shape[:2])
                found.append(views.double().mean(dim=1))
            rows.append(batch.row)
            counts.append(batch.counts)
            logits.append(torch.stack(found, dim=1))
            after_batch()
    row, count, logit = (accelerator.gather(torch.cat(parts)).cpu().numpy() for parts in (rows, counts, logits))
    unique, values = unique_rows(row[count], logit[count])
    return unique.astype(np.int64), [column.astype(np.float64) for column in values.T]


@dataclass(frozen=True)
class Trained:
    """A model as a file of weights has it, and what it looks at."""

    model: nn.Module
    canvas: CanvasConfig
    views: tuple[str, ...]
    about: dict[str, Any]


def load_trained(path: Path, manifest: Manifest, tta: bool) -> Trained:
    """A model with the weights of a file, on the CPU. Raises InputError where it could not score this data set."""
    state, about = load_weights(path)
    try:
        canvas, shape = CanvasConfig(**about["canvas"]), tuple(about["shape"])
        stem, candidates = about.get("stem", "none"), about.get("candidates", 1)  # older weights have neither
        architecture = ModelConfig(about["model"], stem=stem, candidates=candidates)
        _ = f"{about['auc']:.4f} {about['fold']}"  # what is said of them at the end
    except (KeyError, TypeError, ValueError, InputError) as error:
        raise InputError(f"{path}: of another version of the program ({error}); train again") from None
    if shape != manifest.shape:
        raise InputError(f"{path}: trained on snippets of shape {shape}; {manifest.root} holds {manifest.shape}")
    model = build_model(architecture, canvas.channels, canvas.height, canvas.width)
    fill_model(model, state, str(path))
    possible = architecture.views(canvas.views)
    return Trained(model, canvas, possible if tta else possible[:1], about)


def predict_all(
    config: InferConfig, accelerator: Accelerator, manifest: Manifest, trained: Sequence[Trained]
) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.float64]]]:
    """Rows and each model's logits of the split, with one pass over the shards for all that look at the same images.

    All models of one pass are on the device together.
    """
    rows = manifest.rows(config.split)
    order = Order(rows, manifest.target[rows], "sequential")
    share = Share(len(order), config.batch_size, 1, accelerator.process_index, accelerator.num_processes)
    logits: dict[int, npt.NDArray[np.float64]] = {}
    for canvas, views in dict.fromkeys((each.canvas, each.views) for each in trained):
        group = [number for number, each in enumerate(trained) if (each.canvas, each.views) == (canvas, views)]
        models = [trained[number].model.to(accelerator.device) for number in group]
        loader = Loader(manifest, order, share, canvas, None, views, accelerator.device, config.loader)
        try:
            rows, found = predict_each(accelerator, models, loader, "prediction")
        finally:
            loader.close()
        for number, model, values in zip(group, models, found, strict=True):
            logits[number] = values
            model.to("cpu")  # the next pass needs the device's memory
    return rows, [logits[number] for number in range(len(trained))]


def check_split(config: InferConfig, manifest: Manifest) -> None:
    """Raise InputError where the shards have no cadences of the split."""
    if manifest.splits[config.split]["samples"]:
        return
    other = "train" if config.split == "test" else "test"
    raise InputError(
        f"--split {config.split}: {config.shards} has no cadences of {config.split}/; pack a folder that has some, or "
        f"score the {manifest.splits[other]['samples']:,} of {other}/ with --split {other}"
    )


def infer(config: InferConfig) -> None:
    """Score the split, average over weights, write the submission and the picture of its candidates.

    Whatever can be refused without a prediction is refused before it.
    """
    accelerator = build_accelerator(config.precision)
    manifest = read_manifest(config.shards, config.store)
    check_split(config, manifest)
    keys = submission_keys(config.split, manifest)
    check_ids(keys, config.split, manifest, config.fill_missing)
    with contextlib.ExitStack() as until_written:
        if accelerator.is_main_process:
            check_out(config.out, keys)
            until_written.enter_context(hold_pipe(config.out))
        trained = [load_trained(path, manifest, config.tta) for path in config.weights]
        rows, logits = predict_all(config, accelerator, manifest, trained)
        if accelerator.is_main_process:
            score = mean_score(logits, config.average)
            logit = mean_logit(logits) if config.average == "logits" else None
            scored = Scored(rows, manifest.target[rows], score, logit)
            _write_results(config, manifest, keys, scored, [each.about for each in trained])
    accelerator.end_training()


def _write_results(
    config: InferConfig, manifest: Manifest, keys: Sequence[str], scored: Scored, abouts: Sequence[dict[str, Any]]
) -> None:
    """The submission, and where it is a file, a picture and a page beside it."""
    score_of = dict(zip(manifest.keys_of(scored.rows), scored.score.tolist(), strict=True))
    write_submission(config.out, keys, score_of, config.fill_missing)
    if is_stream(config.out):
        _log.info("%s is not a regular file: only the submission is written, no picture and no report", config.out)
        with contextlib.redirect_stdout(sys.stderr):  # it may be standard output, which has the submission alone
            _print_summary(config, manifest, keys, scored, abouts, [])
        return
    _print_summary(config, manifest, keys, scored, abouts, [_write_picture(config, manifest, scored)])
    page = write_prediction_report(config.weights, config.out, config.split, manifest, scored, len(keys))
    print(f"report:      {page}")


def _write_picture(config: InferConfig, manifest: Manifest, scored: Scored) -> Path:
    """Draw the best candidates beside the submission; return where."""
    picture, best = config.out.with_name("candidates.png"), scored.falling[:_CANDIDATES]
    chosen = scored.rows[best]
    titles = [
        "\n".join([key, *scored.say(int(place))]) for key, place in zip(manifest.keys_of(chosen), best, strict=True)
    ]
    write_waterfalls(picture, read_snippets(manifest, chosen), titles)
    return picture


def _print_summary(
    config: InferConfig,
    manifest: Manifest,
    keys: Sequence[str],
    scored: Scored,
    abouts: Sequence[dict[str, Any]],
    pictures: list[Path],
) -> None:
    print(f"submission:  {config.out}  ({len(keys):,} ids)")
    beside = {path.parent for path in config.weights}
    pictures = [*pictures, *(folder / name for folder in sorted(beside) for name in ("curves.png", "roc.png"))]
    if shown := [str(path) for path in pictures if path.is_file()]:
        print("pictures:    " + "\n             ".join(shown))
    for path, about in zip(config.weights, abouts, strict=True):
        print(f"weights:     {path}  (validation ROC AUC {about['auc']:.4f} on fold {about['fold']})")
    if (scored.target >= 0).all():
        print(f"ROC AUC of this prediction on the {config.split} split: {roc_auc(scored.target, scored.order):.4f}")
    if config.split == "train" and any(about.get("shards_identity") == manifest.identity for about in abouts):
        _log.warning(
            "warning: these weights were trained on this split, all but their own folds: its scores and ROC AUC are "
            "too good, and averaging does not mend it; for honest ones see the oof.csv of train.py --fold all"
        )


def main() -> None:
    """Parse the command line and predict."""
    config = tyro.cli(InferConfig, prog="infer.py")
    check_gpu(cpu_is_asked_for())
    infer(config)


if __name__ == "__main__":
    sys.exit(run_command(main))
