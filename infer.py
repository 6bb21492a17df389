"""Predict: weights and shards to a Kaggle submission, on any number of devices. python infer.py --help"""

import csv
import hashlib
import io
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
from accelerate.utils import parse_flag_from_env
from torch import nn

from metrics import Average, mean_score, roc_auc, unique_rows
from model import ModelConfig, build_model, fill_model, load_weights, pick_precision
from pipeline.canvas import CanvasConfig
from pipeline.loader import Loader, LoaderConfig
from pipeline.plan import Order, Share
from report import write_waterfalls
from sections import write_prediction_report
from shard_tools.catalog import SUBMISSION, to_submission_keys
from shard_tools.errors import InputError, run_command
from shard_tools.files import is_stream, write_whole
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.progress import progress
from shard_tools.store import StoreConfig, read_file
from shard_tools.trivial import read_snippets

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
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
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
    model.eval()
    rows, counts, logits = [], [], []
    with torch.inference_mode():
        for batch in progress(loader, len(loader), label, "batches"):
            with accelerator.autocast():
                views = model(batch.image.flatten(0, 1)).float().view(batch.image.shape[:2])
            rows.append(batch.row)
            counts.append(batch.counts)
            logits.append(views.double().mean(dim=1))
            after_batch()
    row, count, logit = (accelerator.gather(torch.cat(parts)).cpu().numpy() for parts in (rows, counts, logits))
    unique, values = unique_rows(row[count], logit[count])
    return unique.astype(np.int64), values.astype(np.float64)


def predict_with(
    config: InferConfig, accelerator: Accelerator, manifest: Manifest, path: Path
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Rows and logits of the split by one file of weights."""
    state, about = load_weights(path)
    try:
        canvas, shape = CanvasConfig(**about["canvas"]), tuple(about["shape"])
        stem, candidates = about.get("stem", "none"), about.get("candidates", 1)  # older weights have neither
        architecture = ModelConfig(about["model"], stem=stem, candidates=candidates)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: of another version of the program ({error}); train again") from None
    if shape != manifest.shape:
        raise InputError(f"{path}: trained on snippets of shape {shape}; {manifest.root} holds {manifest.shape}")
    model = build_model(architecture, canvas.channels, canvas.height, canvas.width)
    fill_model(model, state, str(path))
    model.to(accelerator.device)
    rows = manifest.rows(config.split)
    order = Order(rows, manifest.target[rows], "sequential")
    share = Share(len(order), config.batch_size, 1, accelerator.process_index, accelerator.num_processes)
    possible = architecture.views(canvas.views)
    views = possible if config.tta else possible[:1]
    loader = Loader(manifest, order, share, canvas, None, views, accelerator.device, config.loader)
    found = predict(accelerator, model, loader, "prediction")
    loader.close()
    return found


def submission_keys(config: InferConfig, manifest: Manifest) -> list[str]:
    """The ids that the submission has to hold, in order: the sample submission's where the shards came with one."""
    if config.split == "test" and SUBMISSION in manifest.files:
        table, where = read_file(manifest.store, SUBMISSION) or b"", manifest.store.where(SUBMISSION)
        if hashlib.sha256(table).hexdigest() != manifest.files[SUBMISSION]:
            raise InputError(f"{where}: missing, or changed after packing; pack again")
        return to_submission_keys(table, where)
    return manifest.keys_of(manifest.rows(config.split))


def write_submission(path: Path, keys: Sequence[str], score_of: dict[str, float], fill: float | None) -> None:
    """Write id,target for exactly `keys`, in their order, at once or not at all.

    Raises InputError where a key has no score and `fill` is None, or a score is not a number in 0 to 1.
    """
    missing = [key for key in keys if key not in score_of]
    if missing and fill is None:
        raise InputError(
            f"{len(missing):,} of the {len(keys):,} ids of the submission are not in the shards, the first is "
            f"{missing[0]}; pack the whole test part, or give them a score with --fill-missing 0.5"
        )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "target"])
    for key in keys:
        score = score_of[key] if fill is None else score_of.get(key, fill)
        if not 0 <= score <= 1:  # also refuses NaN
            raise InputError(f"{path}: score {score} of {key}, expected 0 to 1; are the weights sound?")
        writer.writerow([key, repr(float(score))])
    write_whole(path, text.getvalue())


def infer(config: InferConfig) -> None:
    """Score the split, average over weights, write the submission and the picture of its candidates."""
    if config.out.is_dir():
        raise InputError(f"--out {config.out}: a folder, expected the name of the submission")
    config.out.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    accelerator = build_accelerator(config.precision)
    manifest = read_manifest(config.shards, config.store)
    keys = submission_keys(config, manifest)
    each = []
    for path in config.weights:
        rows, logits = predict_with(config, accelerator, manifest, path)
        each.append(logits)
    score = mean_score(each, config.average)
    if accelerator.is_main_process:
        score_of = dict(zip(manifest.keys_of(rows), score.tolist(), strict=True))
        write_submission(config.out, keys, score_of, config.fill_missing)
        picture = config.out.with_name("candidates.png")
        if is_stream(config.out):
            _log.info("%s is no file: the submission alone is written, no picture and no report", config.out)
        else:
            best = np.argsort(-score, kind="stable")[:_CANDIDATES]
            titles = [f"{key}\nscore {score_of[key]:.3f}" for key in manifest.keys_of(rows[best])]
            write_waterfalls(picture, read_snippets(manifest, rows[best]), titles)
        _print_summary(config, manifest, keys, rows, score, picture)
        if not is_stream(config.out):
            page = write_prediction_report(config.weights, config.out, config.split, manifest, rows, score, len(keys))
            print(f"report:      {page}")
    accelerator.end_training()


def _print_summary(
    config: InferConfig,
    manifest: Manifest,
    keys: Sequence[str],
    rows: npt.NDArray[np.int64],
    score: npt.NDArray[np.float64],
    picture: Path,
) -> None:
    print(f"submission:  {config.out}  ({len(keys):,} ids)")
    beside = {path.parent for path in config.weights}
    pictures = [folder / name for folder in sorted(beside) for name in ("curves.png", "roc.png")]
    print("pictures:    " + "\n             ".join(str(path) for path in [picture, *pictures] if path.is_file()))
    abouts = [load_weights(path)[1] for path in config.weights]
    for path, about in zip(config.weights, abouts, strict=True):
        print(f"weights:     {path}  (validation ROC AUC {about['auc']:.4f} on fold {about['fold']})")
    target = manifest.target[rows]
    if (target >= 0).all():
        print(f"ROC AUC of this prediction on the {config.split} split: {roc_auc(target, score):.4f}")
    if config.split == "train" and any(about.get("shards_identity") == manifest.identity for about in abouts):
        _log.warning(
            "warning: these weights were trained on this split, all but their own folds: its scores and ROC AUC are "
            "too good, and averaging does not mend it; for honest ones see the oof.csv of train.py --fold all"
        )


def main() -> None:
    """Parse the command line and predict."""
    infer(tyro.cli(InferConfig, prog="infer.py"))


if __name__ == "__main__":
    sys.exit(run_command(main))
