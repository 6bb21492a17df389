"""Out-of-fold scores: `oof.csv`, a line for each cadence of validation, with its logit beside its score.

The score is for reading, the logit for ranking: the sigmoid is 1 for every logit from 37 on.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.special import logit as to_logit

from shard_tools.atomic_files import write_whole
from shard_tools.errors import InputError
from training.metrics import sigmoid

# Stand-ins for scores of 0 and 1 in older runs, whose logits would be infinite; their scores are multiples of 2^-54.
_LOWEST, _HIGHEST = 2.0**-55, 1 - 2.0**-53  # float64 has none nearer to 1


@dataclass(frozen=True)
class Scores:
    """The columns of the table, one value for each cadence of validation, in the order of the file."""

    keys: list[str]
    target: npt.NDArray[np.int8]
    score: npt.NDArray[np.float64]
    logit: npt.NDArray[np.float64]


def write_scores(
    path: Path,
    keys: Sequence[str],
    target: npt.NDArray[np.int8],
    logit: npt.NDArray[np.float64],
    fold: npt.NDArray[np.int8] | None = None,
) -> None:
    """Write id, fold (if there are several), target, score and logit, at once or not at all."""
    columns = {"id": list(keys)} | ({} if fold is None else {"fold": fold.tolist()})
    columns |= {"target": target.tolist(), "score": sigmoid(logit).tolist(), "logit": logit.tolist()}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_whole(path, text.getvalue())


def read_scores(path: Path) -> Scores:
    """Read what `write_scores` wrote, or an older version without logits, which are then computed from the scores.

    Raises InputError if the file is not such a table.
    """
    try:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
        target = np.array([int(line["target"]) for line in lines], np.int8)
        score = np.array([float(line["score"]) for line in lines])
        if lines and "logit" in lines[0]:
            logit = np.array([float(line["logit"]) for line in lines])
        else:
            logit = to_logit(score.clip(_LOWEST, _HIGHEST))
        if not (np.isfinite(score) & np.isfinite(logit)).all():
            raise ValueError
        return Scores([line["id"] for line in lines], target, score, np.asarray(logit))
    except (KeyError, TypeError, ValueError, csv.Error):
        raise InputError(f"{path}: expected columns id, target, score and logit, and numbers in them") from None
