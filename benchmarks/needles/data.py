"""The data of the needle benchmark: simulated cadences, real ones, and their twins.

The twin of a positive is the same cadence with its signal in OFF panels, so it is a negative with the same background.
A detector that tells the two apart uses the OFF panels. A simulated twin is drawn anew: only the needle moves. In a
real cadence the needle cannot be taken out, so ON and OFF panels are exchanged. That moves the interference too:
a signal in the OFF panels alone is then in the ON panels alone, as a needle would be.
"""

import csv
import dataclasses
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from shard_tools.atomic_files import write_whole
from shard_tools.cadence import npy_header, read_snippet
from shard_tools.errors import InputError
from shard_tools.kaggle_layout import LABELS, SUBMISSION, read_catalog
from shard_tools.pack import PackConfig, pack
from shard_tools.simulate import SimulateConfig, plan_tasks, simulate, simulate_cadence

SWAPPED = (1, 0, 3, 2, 5, 4)  # each ON panel changes places with the OFF panel after it
TWIN = "-twin"  # appended to the key
FOLDS = 10  # one tenth is held out to choose the best epoch


@dataclass(frozen=True)
class NeedleSet:
    """Shards with a test split to be scored, and the truth about it."""

    shards: Path
    truth: pd.DataFrame
    """A row for each test cadence but the twins, by its key: target, and if simulated the columns of truth.csv."""

    @property
    def twins(self) -> list[str]:
        """Keys of the positives that have a twin in the test split."""
        return list(self.truth.index[self.truth["target"] == 1])


def simulate_set(folder: Path, config: SimulateConfig) -> NeedleSet:
    """Simulate into `folder`, add the test positives' twins to the test split, and pack it."""
    data = folder / "data"
    simulate(dataclasses.replace(config, out=data))
    truth = pd.read_csv(data / "truth.csv", dtype={"id": str}).query("split == 'test'").set_index("id")
    with_twin = [task for task in plan_tasks(config) if task.split == "test" and task.target]
    for task in with_twin:
        write_snippet(snippet_path(data, f"{task.key}{TWIN}"), simulate_cadence(config, task, twin=True)[0])
    write_submission_table(data, [*truth.index, *(f"{task.key}{TWIN}" for task in with_twin)])
    pack(PackConfig(data, str(folder / "shards"), folds=FOLDS, workers=config.workers))
    return NeedleSet(folder / "shards", truth)


def simulate_backgrounds(folder: Path, config: SimulateConfig, count: int) -> Path:
    """Simulate and pack cadences without needles, whose skies have only kinds of interference of the train split."""
    simulate(dataclasses.replace(config, out=folder / "data", backgrounds=count))
    pack(PackConfig(folder / "data", str(folder / "shards"), workers=config.workers))
    return folder / "shards"


def pack_real(folder: Path, real: Path) -> NeedleSet:
    """Pack the positives of a folder in the Kaggle layout, as far as their files are there, and their twins.

    Raises InputError if there is none.
    """
    if not (real / LABELS).is_file():
        raise InputError(f"--real {real}: no {LABELS}; expected a folder in the layout of the Kaggle competition")
    records = [record for record in read_catalog(real, 2, 0, allow_missing=True).records if record.target == 1]
    if not records:
        raise InputError(f"--real {real}: no file of a cadence with target 1; expected train/<c>/<id>.npy")
    data = folder / "data"
    for record in records:
        snippet = read_snippet(record.path)[1]
        write_snippet(snippet_path(data, record.key), snippet)
        write_twin(data, record.key, snippet)
    keys = [record.key for record in records]
    write_submission_table(data, [*keys, *(f"{key}{TWIN}" for key in keys)])
    pack(PackConfig(data, str(folder / "shards")))
    return NeedleSet(folder / "shards", pd.DataFrame({"target": 1}, index=pd.Index(keys, name="id")))


def snippet_path(data: Path, key: str) -> Path:
    """The file of a test cadence's snippet."""
    return data / "test" / key[0] / f"{key}.npy"


def write_snippet(path: Path, snippet: npt.NDArray[np.float16]) -> None:
    """Write a snippet (6, T, F) as npy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, npy_header(snippet.shape) + np.ascontiguousarray(snippet).tobytes(), durable=False)


def write_twin(data: Path, key: str, snippet: npt.NDArray[np.float16]) -> None:
    """Write a cadence with ON and OFF panels exchanged into the test split."""
    write_snippet(snippet_path(data, f"{key}{TWIN}"), snippet[list(SWAPPED)])


def write_submission_table(data: Path, keys: Iterable[str]) -> None:
    """Write the table that lists the test split."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("id", "target"), *((key, 0.5) for key in keys)])
    write_whole(data / SUBMISSION, text.getvalue())


def test_snippets(needles: NeedleSet) -> Iterator[tuple[str, Path]]:
    """Key and file of every cadence of the test split, twins too."""
    data = needles.shards.parent / "data"
    for key in [*needles.truth.index, *(f"{key}{TWIN}" for key in needles.twins)]:
        yield key, snippet_path(data, key)
