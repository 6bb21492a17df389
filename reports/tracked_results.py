"""What a run gives its trackers at its end: its pictures, and a table of the best candidates of validation."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from reports.candidates import Scored, read_validation
from reports.plots import to_png
from reports.waterfalls import draw_waterfall
from shard_tools.manifest import Manifest
from shard_tools.observation.observed_axes import is_observed
from shard_tools.sample import read_snippet_of
from training.search.dedoppler import find_drift

PICTURES = ("curves", "roc")
COLUMNS = ("rank", "key", "target", "score", "logit", "drift rate in Hz/s", "first channel", "waterfall")
_CANDIDATES = 12


def track_results(trackers: Sequence[Any], run_dir: Path, manifest: Manifest, fold: int, step: int) -> None:
    """Give the pictures and the best candidates of a run of one fold to its trackers, under its last step.

    Raises InputError if the scores or a snippet cannot be read.
    """
    if not trackers:
        return
    pictures = {name: [_open_whole(run_dir / f"{name}.png")] for name in PICTURES}
    table = _tabulate(manifest, read_validation(run_dir, manifest, fold))
    for tracker in trackers:
        tracker.log_images(pictures, step=step)
        tracker.log_table("candidates", COLUMNS, table, step=step)


def _open_whole(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


def _tabulate(manifest: Manifest, scored: Scored) -> list[list[Any]]:
    """A row of COLUMNS for each of the best candidates, the best first."""
    places = scored.falling[:_CANDIDATES]
    rows = scored.rows[places]
    table: list[list[Any]] = []
    observed = is_observed(manifest)
    for rank, (place, row, key) in enumerate(zip(places, rows, manifest.keys_of(rows), strict=True), start=1):
        snippet = read_snippet_of(manifest, int(row))
        track = None if observed else find_drift(snippet)  # it assumes panels without pauses between them
        waterfall = to_png(draw_waterfall(snippet, track and (track.start_channel, track.end_channel)))
        # find_drift takes a sum of time bins for a single one.
        line = (None, None) if track is None else (track.drift_rate / manifest.time_bin, track.start_channel)
        figures = (float(scored.score[place]), float(scored.order[place]), *line)
        table.append([rank, key, int(scored.target[place]), *figures, Image.open(io.BytesIO(waterfall))])
    return table
