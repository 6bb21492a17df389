"""The search of an observation: from the shards, batch by batch, to events, controls and interference.

Axes: B snippet, P panel, T time bin, F frequency channel.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.loader import Loader, LoaderConfig
from pipeline.plan import Order, Share
from shard_tools.axes import Axes
from shard_tools.cadence import PANELS
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from shard_tools.system.progress import progress
from training.observation.events import Event, merge_lines
from training.observation.line_scores import LineScorer
from training.observation.observed import Observed
from training.observation.snippet_lines import SnippetLine, find_lines
from training.search.candidates import WindowModel
from training.search.lines import RATES

_LINES = 4  # lines of a snippet in one search without weights
_SUMS_BYTES = 25e6  # the de-Doppler sums of a batch; the search holds a few times as much
_AT_ONCE = 2  # batches
_EMPTY = "empty"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judge:
    """What scores the lines of `rows`."""

    model: WindowModel | None
    """None: the search alone."""
    sum_time_bins: int
    """The canvas option that the model was trained with."""
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True)
class How:
    """How an observation is searched."""

    judges: Sequence[Judge]
    """Each row belongs to one of them."""
    min_snr: float
    device: torch.device
    loader: LoaderConfig
    watched: frozenset[int] = frozenset()
    """Rows whose fainter lines are kept too, down to `watched_snr`."""
    watched_snr: float = 0.0


@dataclass(frozen=True)
class Findings:
    """What was found, from lower to higher frequencies, cadence after cadence."""

    events: list[Event]
    """Lines in the ON panels alone."""
    controls: list[Event]
    """Lines in the OFF panels alone, by the same search with ON and OFF exchanged."""
    interference: list[Event]
    """Lines in both."""
    faint: list[Event]
    """Lines in the ON panels of the watched rows, with an SNR from `watched_snr` to below `min_snr`."""


def search_observation(manifest: Manifest, observed: Observed, split: str, how: How) -> Findings:
    """Search all snippets of a split. Raises InputError if no snippet has noise in all its panels."""
    rows = _rows_with_noise(manifest, observed, split)
    cadence = np.array([observed.origins[row].cadence for row in rows])
    lines: list[SnippetLine] = []
    for judge in how.judges:
        for number, files in enumerate(observed.cadences):
            chosen = np.intersect1d(rows[cadence == number], judge.rows)
            if len(chosen):
                lines += _search_cadence(manifest, chosen, files.axes, judge, how)
    return _to_findings(lines, observed, how.min_snr)


def _to_findings(found: list[SnippetLine], observed: Observed, min_snr: float) -> Findings:
    """Events of the lines of all snippets.

    A snippet that holds only a part of a line may lack the panels that show it as interference. So lines of
    interference are merged with the lines of the ON panels, and with those of the OFF panels; the snippet that shows a
    line best decides what the line is.
    """
    lines = [line for line in found if line.snr >= min_snr]
    faint = [line for line in found if line.snr < min_snr and line.on and not line.is_interference]
    in_both = [line for line in lines if line.is_interference]
    halves = []
    for on in (True, False):
        in_half = [line for line in lines if line.on == on and not line.is_interference]
        merged = merge_lines(in_both + in_half, observed.origins)
        halves.append([event for event in merged if event.line.can_be_judged and not event.line.is_interference])
    return Findings(halves[0], halves[1], *(merge_lines(each, observed.origins) for each in (in_both, faint)))


def _rows_with_noise(manifest: Manifest, observed: Observed, split: str) -> npt.NDArray[np.int64]:
    rows = manifest.rows(split)
    kept = np.array([row for row in rows.tolist() if _EMPTY not in observed.origins[row].flags.split()], np.int64)
    if not len(kept):
        raise InputError(
            f"--candidates: each of the {len(rows):,} snippets of {manifest.root} has a panel without noise (flag "
            f"{_EMPTY}); expected data in all six files: look at what the files hold, and ingest again"
        )
    if all(observed.origins[row].flags for row in kept.tolist()):
        words = sorted({word for row in kept.tolist() for word in observed.origins[row].flags.split()})
        _log.warning("each of %d snippets has a flag (%s): distrust their candidates", len(kept), ", ".join(words))
    if len(kept) < len(rows):
        _log.warning("%d of %d snippets have a panel without noise and are left out", len(rows) - len(kept), len(rows))
    return kept


def _search_cadence(
    manifest: Manifest, rows: npt.NDArray[np.int64], axes: Axes, judge: Judge, how: How
) -> Iterator[SnippetLine]:
    scorer = LineScorer(axes, judge.model, _LINES, how.device, judge.sum_time_bins)
    batch_size = max(1, int(_SUMS_BYTES / (4 * PANELS * RATES * axes.channels)))
    share = Share(len(rows), min(batch_size, len(rows)))
    order = Order(rows, manifest.target[rows], "sequential")
    loader = Loader(manifest, order, share, None, config=how.loader)

    def find(found: npt.NDArray[np.int64], snippets: npt.NDArray[np.float16]) -> list[SnippetLine]:
        least = np.array([how.watched_snr if row in how.watched else how.min_snr for row in found.tolist()])
        return list(find_lines(scorer, found, snippets, least))

    # The lines of one batch are fitted, on one core, while the next is searched.
    with contextlib.closing(loader), ThreadPoolExecutor(_AT_ONCE) as pool:
        started: deque[Future[list[SnippetLine]]] = deque()
        for batch in progress(loader, len(loader), "search", "batches"):
            counts = batch.counts.numpy()
            started.append(pool.submit(find, batch.row.numpy()[counts], batch.image.numpy()[counts]))
            if len(started) > _AT_ONCE:
                yield from started.popleft().result()
        for each in started:
            yield from each.result()
