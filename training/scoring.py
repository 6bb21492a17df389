"""Score many cadences in parts that are kept as parquet, on one machine or on the nodes of a Ray cluster.

A part holds the rows from a multiple of ROWS to the next. Its file is written whole, into a folder whose name is a hash
of the data, weights and options. So there is one file for a part, whichever process wrote it and after however many
tries.
"""

import shard_tools.system.openmp  # noqa: F401  before torch is loaded: a node's process begins here

# isort: split
import functools
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator

from shard_tools.atomic_files import file_sha256, write_whole
from shard_tools.errors import InputError
from shard_tools.manifest import Int64s, Manifest
from shard_tools.manifest_rows import only_rows
from shard_tools.observation.observed_axes import is_observed
from shard_tools.storage import open_remote
from shard_tools.storage.address import is_remote, local_folder
from shard_tools.storage.base import StoreConfig, read_file
from shard_tools.storage.local import LocalStore
from shard_tools.system.cores import rank_cores
from shard_tools.tasks.base import Need, TaskConfig, Work
from shard_tools.tasks.local import InTurn
from shard_tools.tasks.opening import open_tasks, run_shown
from training.accelerator import build_accelerator
from training.prediction import PredictConfig, Trained, predict_all

ROWS = 4096
"""Cadences of a part: seconds of work, and few enough that little is done twice after a failure."""
_MEMORY = 3_000_000_000  # bytes for torch, a model and some batches
_AGAIN = "delete it and run the same command again"
SCORES_SCHEMA = pa.schema({"key": pa.string(), "logits": pa.list_(pa.float64())})
"""One row for each cadence: its key, and the logit of each file of weights."""


@dataclass(frozen=True)
class Scoring:
    """What is scored with what, and where the parts are kept."""

    manifest: Manifest
    trained: Sequence[Trained]
    weights: Sequence[Path]
    """The file of each model."""
    model: str | None
    """The timm model of files of another program, which do not name it."""
    precision: str
    how: PredictConfig
    place: str
    """Folder or URL for the parts."""

    @property
    def folder(self) -> str:
        """The folder, or URL, of the parts: it differs with the model, the data sets and the options."""
        views = [(str(each.canvas), [str(view) for view in each.views]) for each in self.trained]
        digests = [file_sha256(path) for path in self.weights]
        about = [self.manifest.identity, digests, views, self.precision, self.how.split, self.how.batch_size, ROWS]
        if self.model is not None:  # without it, folders keep the names that earlier versions gave them
            about.append(self.model)
        digest = hashlib.sha256(repr(about).encode()).hexdigest()
        return f"{self.place.rstrip('/')}/{digest[:16]}"


class PartFiles:
    """The finished parts in a folder or a store."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._store = open_remote(folder, StoreConfig()) if is_remote(folder) else None

    def names(self) -> set[str]:
        """Names of the finished parts."""
        found = self._store.names() if self._store else [path.name for path in self._path("").glob("*.parquet")]
        return {name for name in found if name.endswith(".parquet")}

    def where(self, name: str) -> str:
        """A part as messages name it."""
        return f"{self._folder}/{name}"

    def read(self, name: str) -> pa.Table:
        """One part. Raises InputError if it is damaged or absent."""
        try:
            data = read_file(self._store or LocalStore(self._path("")), name)
            if data is not None:
                return pq.read_table(io.BytesIO(data), schema=SCORES_SCHEMA)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self.where(name)}: damaged ({error}); {_AGAIN}") from None
        raise InputError(
            f"{self.where(name)}: was written, but is not there; --scores must be a folder that all machines see under "
            "this path, or the URL of a store"
        )

    def prepare(self) -> None:
        """Make the folder."""
        if not self._store:
            self._path("").mkdir(parents=True, exist_ok=True)

    def write(self, name: str, table: pa.Table) -> None:
        """Write one part, at once or not at all. Raises OSError if this machine does not see the folder."""
        data = io.BytesIO()
        pq.write_table(table, data)
        if self._store:
            self._store.write(name, data.getvalue())
        else:
            write_whole(self._path(name), data.getvalue())

    def _path(self, name: str) -> Path:
        return local_folder(self._folder) / name


def score_in_parts(where: TaskConfig, scoring: Scoring) -> tuple[Int64s, list[npt.NDArray[np.float64]]]:
    """Rows and each model's logits of a split, as `predict_all` gives them; finished parts are not made again.

    Raises InputError for an observation, and if a part does not hold each of its cadences exactly once.
    """
    if is_observed(scoring.manifest):
        raise InputError(
            f"--scores: {scoring.manifest.root} is an observation, whose snippets are scored on one machine, as each "
            "needs the times of its own cadence; leave out --scores and --on ray"
        )
    rows = scoring.manifest.rows(scoring.how.split)
    parts = {f"part-{start // ROWS:06d}.parquet": rows[start : start + ROWS] for start in range(0, len(rows), ROWS)}
    folder = scoring.folder
    files = PartFiles(folder)
    files.prepare()  # not by a task: a machine that does not see this file system would make a folder of its own
    missing = sorted(parts.keys() - files.names())
    work = Work(
        score_part,
        _Calls(scoring.manifest, folder, [(name, parts[name]) for name in missing]),
        "scoring",
        "cadences",
        [files.where(name) for name in missing],
        Need(_MEMORY),
        functools.partial(Scorer, tuple(scoring.trained), scoring.precision, scoring.how),
        [len(parts[name]) for name in missing],
    )
    with open_tasks(where, InTurn()) as tasks:
        for done in run_shown(tasks, work):
            done.result()
    logits = np.concatenate(list(_read_parts(scoring.manifest, files, parts)))
    return rows, [np.ascontiguousarray(column) for column in logits.T]


class _Calls(Sequence[tuple[Any, ...]]):
    """For each part its folder, its name and its rows of the manifest, which are made when they are asked for."""

    def __init__(self, manifest: Manifest, folder: str, parts: Sequence[tuple[str, Int64s]]) -> None:
        self._manifest, self._folder, self._parts = manifest, folder, parts

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: Any) -> Any:
        name, rows = self._parts[number]
        return self._folder, name, only_rows(self._manifest, rows)


class Scorer:
    """Models on the device of a process."""

    def __init__(self, trained: Sequence[Trained], precision: str, how: PredictConfig, cores: int | None) -> None:
        """`cores` are those that a cluster gave this process; None: those that it may use."""
        # loader_threads may be the default of the driver, for the cores of the driver's machine.
        here = cores or int(os.environ.get("OMP_NUM_THREADS") or rank_cores())
        threads = min(how.loader.loader_threads, here)
        self._trained, self._how = trained, replace(how, loader=replace(how.loader, loader_threads=threads))
        self._accelerator: Accelerator = build_accelerator(precision)

    def score(self, manifest: Manifest) -> npt.NDArray[np.float64]:
        """(rows, models) logits of all rows of a manifest."""
        _, logits = predict_all(self._accelerator, manifest, self._trained, self._how)
        return np.stack(logits, axis=1)


def score_part(scorer: Scorer, folder: str, name: str, manifest: Manifest) -> None:
    """Score all rows of a manifest and write them as a part."""
    logits = scorer.score(manifest)
    keys = manifest.keys_of(np.arange(len(manifest)))
    PartFiles(folder).write(name, pa.table([keys, logits.tolist()], schema=SCORES_SCHEMA))


def _read_parts(manifest: Manifest, files: PartFiles, parts: dict[str, Int64s]) -> Iterator[npt.NDArray[np.float64]]:
    """(rows, models) logits of each part, after its keys were checked against those of its rows."""
    for name, rows in parts.items():
        table = files.read(name)
        if table["key"].to_pylist() != manifest.keys_of(rows):
            raise InputError(f"{files.where(name)}: holds other cadences than it should; {_AGAIN}")
        yield np.array(table["logits"].to_pylist(), np.float64)
