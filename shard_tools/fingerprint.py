"""Find snippets that share a background, by its noise, and write them as groups that folds must not split.

Axes: N snippet, P panel, T time bin, F frequency channel.

Only a few time bins of each snippet are read: once for the codes of its channels (see overlaps.py) and, if these match
another snippet's, once more to prove the pair. The codes take 8 bytes a channel (123 MB for 60,000 snippets of 256
channels), and the search needs about as much again.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from shard_tools.cadence import PANELS, read_rows
from shard_tools.cores import usable_cores
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
from shard_tools.progress import progress

# Measured on the proofs' time bins: snippets without a common channel reach 0.08, even from the same minutes of one
# observation; overlapping ones 0.9999, despite float16 and different normalisation.
LEAST_CORRELATION = 0.5
_AT_ONCE = 64  # snippets or pairs that a thread takes
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FingerprintConfig:
    """Find snippets that were cut from the same background, and write the groups for `pack --groups`."""

    input: Path
    """Folder with train_labels.csv and train/; files that the table names and that are absent are left out."""
    out: Path
    """Table to write, with the columns id and group; a group is named after its first id."""
    min_overlap: float = 0.25
    """Least share of the frequency channels that two snippets must have in common to be paired; above 0, to 1."""
    test: bool = False
    """Take the snippets of test/ too, and say what they share with those of train/."""
    cast: Literal["none", "float16"] = "none"
    """As in `pack`: what to do with numbers of other types, such as float32."""
    workers: int = usable_cores()
    """Threads that read snippets."""
    on_bad: Literal["fail", "quarantine"] = "fail"
    """What to do with a file that is no snippet, or of another shape: stop, or give it a group of its own. Values are
    not checked here: `pack` does."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise InputError(f"--workers {self.workers}: expected at least 1")
        if not 0 < self.min_overlap <= 1:
            raise InputError(f"--min-overlap {self.min_overlap}: expected a share above 0, to 1")
        if self.out.is_dir() or not self.out.absolute().parent.is_dir():
            raise InputError(f"--out {self.out}: expected the path of a table in a folder that exists")


@dataclass(frozen=True)
class Groups:
    """The groups found. Snippets are numbered by their place in `records`."""

    records: list[Record]
    group: npt.NDArray[np.int64]
    """(N,) for each snippet, the number of the first one in its group."""
    pairs: Candidates
    """The proven pairs that joined them; of many copies, only enough pairs to join them all."""
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
    frequency direction and the same time bins. Raises InputError naming the file that is no snippet.
    """
    began = time.monotonic()
    catalog = read_catalog(config.input, folds=None, seed=0, allow_missing=True)
    records = [record for record in catalog.records if config.test or record.split == "train"]
    if not records:
        raise InputError(f"{config.input}: no snippets in train/; with --test those of test/ count too")
    shape = common_shape(config.input, records, config.on_bad == "quarantine", config.cast == "float16")
    if PANELS * (shape[1] - 1) < CODE_BITS or shape[2] < 2:
        raise InputError(f"{records[0].path}: shape {shape}; fingerprints take 12 time bins and 2 channels or more")
    codes, unreadable = _read_codes(config, records, shape)
    candidates = find_candidates(codes, max(1, round(config.min_overlap * shape[2])))
    del codes  # most of the memory
    proven = _prove(config, records, shape, candidates)
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
    config: FingerprintConfig, records: Sequence[Record], shape: tuple[int, int, int]
) -> tuple[Codes, list[tuple[str, str]]]:
    """(N, F - 1) codes of all snippets, and key and reason of those that cannot be read."""
    codes: Codes = np.zeros((len(records), shape[2] - 1), np.uint64)
    unreadable: list[tuple[str, str]] = []
    rows = code_rows(shape[1])

    def read(chunk: range) -> int:
        for number in chunk:
            record = records[number]
            try:
                codes[number] = to_codes(read_rows(record.path, shape, range(PANELS), rows, config.cast == "float16"))
            except InputError as error:
                if config.on_bad == "fail":
                    raise
                unreadable.append((record.key, str(error)))
        return len(chunk)

    _in_chunks(read, len(records), config.workers, "fingerprinting", "snippets")
    for key, reason in sorted(unreadable)[:20]:
        _log.warning("%s has a group of its own: %s", key, reason)
    return codes, sorted(unreadable)


def _prove(
    config: FingerprintConfig, records: Sequence[Record], shape: tuple[int, int, int], pairs: Candidates
) -> npt.NDArray[np.bool_]:
    """(pairs,) whether the noise of the shared channels is the same, in time bins that the codes did not use."""
    proven = np.zeros(len(pairs.first), bool)
    rows = proof_rows(shape[1])

    def prove(chunk: range) -> int:
        @lru_cache(maxsize=8)  # pairs are sorted: consecutive ones often have the same first snippet
        def read(number: int) -> npt.NDArray[np.float16]:
            return read_rows(records[number].path, shape, PROOF_POSITIONS, rows, config.cast == "float16")

        for pair in chunk:
            first, second = read(int(pairs.first[pair])), read(int(pairs.second[pair]))
            proven[pair] = correlation(first, second, int(pairs.shift[pair])) >= LEAST_CORRELATION
        return len(chunk)

    _in_chunks(prove, len(proven), config.workers, "proving", "pairs")
    return proven


def _in_chunks(work: Callable[[range], int], total: int, workers: int, label: str, unit: str) -> None:
    """Call `work` on threads with ranges that cover range(total), and show how many are done."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, range(k, min(k + _AT_ONCE, total))) for k in range(0, total, _AT_ONCE)]
        try:
            items = (None for future in as_completed(futures) for _ in range(future.result()))
            for _ in progress(items, total, label, unit):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
