"""Find snippets that share a background, by comparing its noise, and write the groups that folds must not split.

Axes: N snippet, P panel, T time bin, F frequency channel.

Only a few time bins of each snippet are read: once for the codes of its channels (see overlaps.py) and, if these match
another snippet's, once more to prove the pair. The codes take 8 bytes a channel (123 MB for 60,000 snippets of 256
channels), and the search needs about as much again.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import tyro

from shard_tools.cadence import PANELS, read_rows
from shard_tools.errors import InputError
from shard_tools.fold_split import write_groups
from shard_tools.kaggle_layout import Record, common_shape, read_catalog
from shard_tools.overlaps import (
    CODE_BITS,
    PROOF_POSITIONS,
    Candidates,
    Codes,
    code_rows,
    correlation,
    find_candidates,
    proof_rows,
    to_codes,
)
from shard_tools.system.cores import usable_cores
from shard_tools.tasks.base import TaskConfig, Tasks, Work
from shard_tools.tasks.local import Threads
from shard_tools.tasks.opening import open_tasks, run_shown

# Measured on the time bins of the proofs: the correlation reaches 0.08 for snippets without a common channel, even from
# the same minutes of one observation, and 0.9999 for overlapping ones, despite float16 and different normalisation.
LEAST_CORRELATION = 0.5
# Snippets or pairs in one task. Starting a task on another node takes milliseconds.
_AT_ONCE = {"local": 64, "ray": 1024}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FingerprintConfig:
    """Find snippets that were cut from the same background, and write the groups for `pack --groups`."""

    input: Path
    """Folder with train_labels.csv and train/; files that the table names and that are absent are left out."""
    out: Path
    """Table to write, with the columns id and group; a group is named after its first id."""
    min_overlap: float = 0.25
    """Least share of the frequency channels that two snippets must have in common to be paired; above 0, up to 1."""
    test: bool = False
    """Take the snippets of test/ too, and report how many share a group with one of train/."""
    cast: Literal["none", "float16"] = "none"
    """As in `pack`: what to do with numbers of other types, such as float32."""
    workers: int = usable_cores()
    """Threads that read snippets."""
    on_bad: Literal["fail", "quarantine"] = "fail"
    """What to do with a file that is not a snippet or has another shape: stop, or give it a group of its own. Values
    are not checked here; `pack` checks them."""
    tasks: tyro.conf.OmitArgPrefixes[TaskConfig] = field(default_factory=TaskConfig)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise InputError(f"--workers {self.workers}: expected at least 1")
        if not 0 < self.min_overlap <= 1:
            raise InputError(f"--min-overlap {self.min_overlap}: expected a share above 0, up to 1")
        if self.out.is_dir() or not self.out.absolute().parent.is_dir():
            raise InputError(f"--out {self.out}: expected the path of a table in a folder that exists")
        object.__setattr__(self, "input", self.tasks.absolute(self.input))


@dataclass(frozen=True)
class Groups:
    """The groups found. Snippets are numbered by their place in `records`."""

    records: list[Record]
    group: npt.NDArray[np.int64]
    """(N,) for each snippet, the number of the first one in its group."""
    pairs: Candidates
    """The proven pairs that joined the groups; among many copies, only as many as join them all."""
    refuted: int
    """Candidate pairs whose noise turned out to differ."""
    unreadable: list[tuple[str, str]]
    """Key and reason of the files that could not be compared."""
    seconds: float

    def sizes(self) -> npt.NDArray[np.int64]:
        """(groups,) snippets of each group."""
        return np.unique(self.group, return_counts=True)[1]


def fingerprint(config: FingerprintConfig) -> Groups:
    """Find the groups of the snippets in `config.input` and write them to `config.out`.

    Snippets are assumed to be cut on one grid: overlapping ones are a whole number of channels apart, with the same
    frequency direction and the same time bins. Raises InputError naming a file that is not a snippet.
    """
    began = time.monotonic()
    catalog = read_catalog(config.input, folds=None, seed=0, allow_missing=True)
    records = [record for record in catalog.records if config.test or record.split == "train"]
    if not records:
        raise InputError(f"{config.input}: no snippets in train/; with --test those of test/ count too")
    shape = common_shape(config.input, records, config.on_bad == "quarantine", config.cast == "float16")
    if PANELS * (shape[1] - 1) < CODE_BITS or shape[2] < 2:
        raise InputError(f"{records[0].path}: shape {shape}; fingerprints need at least 12 time bins and 2 channels")
    # Threads, not processes: NumPy and reading release the GIL.
    with open_tasks(config.tasks, Threads(config.workers)) as tasks:
        codes, unreadable = _read_codes(config, tasks, records, shape)
        candidates = find_candidates(codes, max(1, round(config.min_overlap * shape[2])))
        del codes  # most of the memory
        proven = _prove(config, tasks, records, shape, candidates)
    pairs = Candidates(*(column[proven] for column in candidates))
    group = _to_groups(pairs, len(records))
    write_groups(config.out, [(r.key, records[g].key) for r, g in zip(records, group.tolist(), strict=True)])
    refuted = len(proven) - int(np.count_nonzero(proven))
    return Groups(records, group, pairs, refuted, unreadable, time.monotonic() - began)


def _to_groups(pairs: Candidates, count: int) -> npt.NDArray[np.int64]:
    """(count,) for each snippet, the first one that pairs connect it to, directly or through others."""
    from scipy.sparse import coo_array  # slow to import, and only this needs it
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(pairs.first), np.int8), (pairs.first, pairs.second)), shape=(count, count))
    _, component = connected_components(links, directed=False)
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    group: npt.NDArray[np.int64] = first[inverse]
    return group


def _read_codes(
    config: FingerprintConfig, tasks: Tasks, records: Sequence[Record], shape: tuple[int, int, int]
) -> tuple[Codes, list[tuple[str, str]]]:
    """(N, F - 1) codes of all snippets, and key and reason of those that cannot be read."""
    codes: Codes = np.zeros((len(records), shape[2] - 1), np.uint64)
    unreadable: list[tuple[str, str]] = []
    chunks = _to_chunks(config, len(records))
    reading = _Reading(shape, config.cast == "float16", config.on_bad == "quarantine")
    calls = [(records[chunk.start : chunk.stop], reading) for chunk in chunks]
    names = [str(records[chunk.start].path) for chunk in chunks]
    work = Work(read_codes, calls, "fingerprinting", "snippets", names, counts=[len(chunk) for chunk in chunks])
    for done in run_shown(tasks, work):
        chunk = chunks[done.number]
        codes[chunk.start : chunk.stop], bad = done.result()
        unreadable += bad
    for key, reason in sorted(unreadable)[:20]:
        _log.warning("%s has a group of its own: %s", key, reason)
    return codes, sorted(unreadable)


@dataclass(frozen=True)
class _Reading:
    """How snippets are read."""

    shape: tuple[int, int, int]
    cast: bool
    quarantine: bool


def read_codes(records: Sequence[Record], reading: _Reading) -> tuple[Codes, list[tuple[str, str]]]:
    """(N, F - 1) codes of N snippets, and key and reason of those that cannot be read, whose codes are 0."""
    codes: Codes = np.zeros((len(records), reading.shape[2] - 1), np.uint64)
    unreadable: list[tuple[str, str]] = []
    rows = code_rows(reading.shape[1])
    for number, record in enumerate(records):
        try:
            codes[number] = to_codes(read_rows(record.path, reading.shape, range(PANELS), rows, reading.cast))
        except InputError as error:
            if not reading.quarantine:
                raise
            unreadable.append((record.key, str(error)))
    return codes, unreadable


def _prove(
    config: FingerprintConfig,
    tasks: Tasks,
    records: Sequence[Record],
    shape: tuple[int, int, int],
    pairs: Candidates,
) -> npt.NDArray[np.bool_]:
    """(pairs,) whether the noise of the shared channels is the same in the time bins of `proof_rows`."""
    proven = np.zeros(len(pairs.first), bool)
    chunks = _to_chunks(config, len(proven))
    reading = _Reading(shape, config.cast == "float16", config.on_bad == "quarantine")
    paths = [record.path for record in records]
    calls = [
        ([(paths[pairs.first[k]], paths[pairs.second[k]], int(pairs.shift[k])) for k in chunk], reading)
        for chunk in chunks
    ]
    names = [str(paths[pairs.first[chunk.start]]) for chunk in chunks]
    work = Work(prove, calls, "proving", "pairs", names, counts=[len(chunk) for chunk in chunks])
    for done in run_shown(tasks, work):
        chunk = chunks[done.number]
        proven[chunk.start : chunk.stop] = done.result()
    return proven


def prove(pairs: Sequence[tuple[Path, Path, int]], reading: _Reading) -> list[bool]:
    """Whether each pair has the same noise in its common channels; a pair is two files and their shift in channels."""
    rows = proof_rows(reading.shape[1])

    @lru_cache(maxsize=8)  # pairs are sorted: consecutive ones often have the same first snippet
    def read(path: Path) -> npt.NDArray[np.float16]:
        return read_rows(path, reading.shape, PROOF_POSITIONS, rows, reading.cast)

    return [bool(correlation(read(first), read(second), shift) >= LEAST_CORRELATION) for first, second, shift in pairs]


def _to_chunks(config: FingerprintConfig, total: int) -> list[range]:
    """Ranges that cover range(total), one for each task."""
    size = _AT_ONCE[config.tasks.on]
    return [range(start, min(start + size, total)) for start in range(0, total, size)]
