"""The card of a trained model for the model hub: what it takes, how to use it, and the figures of its own run."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData

from shard_tools.errors import InputError
from training.metrics import average_precision, recall_at_fpr, roc_auc
from training.out_of_fold import Scores, read_scores
from training.prediction import Trained

_RATES = (0.1, 0.01, 0.001)
_EXPECTED_FALSE = 10  # least number of false positives at a rate; with fewer, recall is a matter of luck
_TAGS = ("technosignatures", "seti", "radio-astronomy", "image-classification", "needlestream")

_TEXT = """\
---
{metadata}
---

# {name}

Scores radio-telescope cadences for technosignatures: the logit is high where a signal shows in the ON panels and not in
the OFF panels. The model is a `{model}`, trained with Needlestream.

## Input

Canvases ({channels}, {height}, {width}) float32, made of cadences {shape} (position, time bin, frequency channel):

```json
{canvas}
```

## Use

```
python infer.py --shards SHARDS --weights model.safetensors --tta --out submission.csv
```
{timm}
## Figures

{figures}

## Training

{training}

## Limits

The model knows only the kinds of signals and interference that it was trained on. A high score is no more than a reason
to look at a cadence. Scores for other receivers, resolutions or simulations were not tested here.
"""
_TIMM = """
or, on canvases of your own, with timm:

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # from the hub: "hf-hub:NAME"
logit = model(image)  # (B, {channels}, {height}, {width}) to (B, 1)
```
"""


def write_model_card(trained: Trained, weights: Path, is_timms: bool) -> str:
    """The text of the card. Its figures come from the folder of the weights, if that is the folder of their run."""
    about, canvas = trained.about, trained.canvas
    sizes = {"channels": canvas.channels, "height": canvas.height, "width": canvas.width}
    run_dir = weights.parent
    figures = _figures(run_dir, about)
    name = f"needlestream {about['model']}"
    results = [
        EvalResult("image-classification", "needlestream", f"validation, fold {about['fold']}", metric, value,
                   metric_name=title)
        for metric, title, value in figures
    ]  # fmt: skip
    data = ModelCardData(
        library_name="timm" if is_timms else "needlestream", tags=list(_TAGS), model_name=name, eval_results=results
    )
    rows = [f"| {title} | {value:.4f} |" for _, title, value in figures]
    heading = f"| fold {about['fold']}, held out | |\n| --- | ---: |"
    return _TEXT.format(
        metadata=data.to_yaml(), name=name, model=about["model"], shape=tuple(about["shape"]),
        canvas=json.dumps(about["canvas"], indent=1), timm=_TIMM.format(**sizes) if is_timms else "",
        figures="\n".join([heading, *rows, "", _remark(run_dir, about)]), training=_training(run_dir, about), **sizes,
    )  # fmt: skip


def _figures(run_dir: Path, about: dict[str, Any]) -> list[tuple[str, str, float]]:
    """The hub's name, title and value of each figure; all but the ROC AUC come from the run's scores."""
    figures = [("roc_auc", "ROC AUC", float(about["auc"]))]
    if (scores := _own_scores(run_dir, about)) is None:
        return figures
    figures.append(("average_precision", "average precision", average_precision(scores.target, scores.logit)))
    negatives = int((scores.target == 0).sum())
    for rate in _RATES:
        if negatives >= round(_EXPECTED_FALSE / rate):
            recall = recall_at_fpr(scores.target, scores.logit, rate)
            figures.append(("recall", f"recall at a false positive rate of {rate:g}", recall))
    return figures


def _remark(run_dir: Path, about: dict[str, Any]) -> str:
    """The data behind the figures, in words."""
    scores = _own_scores(run_dir, about)
    if scores is None:
        return "The run's scores were not beside the weights, so there are no other figures."
    needles = int(np.count_nonzero(scores.target == 1))
    return (
        f"Of {len(scores.keys):,} cadences, {needles:,} with a needle. The epoch was chosen by this ROC AUC, which is "
        "therefore a little too high."
    )


def _own_scores(run_dir: Path, about: dict[str, Any]) -> Scores | None:
    """The validation scores of these very weights; None if the folder has no scores, or those of other weights."""
    try:
        scores = read_scores(run_dir / "oof.csv")
    except (InputError, OSError):
        return None
    return scores if math.isclose(roc_auc(scores.target, scores.logit), about["auc"], abs_tol=1e-9) else None


def _training(run_dir: Path, about: dict[str, Any]) -> str:
    """The run's configuration, without paths and names of this machine."""
    try:
        config = json.loads((run_dir / "config.json").read_bytes())
        history = (run_dir / "metrics.jsonl").read_text().splitlines()
    except (OSError, ValueError):
        return f"Trained on data set `{about['shards_identity'][:12]}`; the run's folder was not beside the weights."
    names = ("preset", "epochs", "global_batch", "learning_rate", "optimiser", "weight_decay", "ema", "seed", "draws")
    chosen = {name: config[name] for name in names if name in config}
    epochs = f"{len(history)} epoch{'s' if len(history) != 1 else ''}"
    return (
        f"{epochs} on data set `{about['shards_identity'][:12]}`, fold {about['fold']} held out:\n\n"
        f"```json\n{json.dumps(chosen, indent=1)}\n```"
    )
