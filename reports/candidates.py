"""Scored cadences: how they are ranked, and their pictures on a page with what is known about each."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from reports.page import Block, Picture, to_picture
from reports.plots import to_png
from reports.waterfalls import draw_waterfall, write_waterfalls
from shard_tools.cadence import CHANNEL_WIDTH_HZ, TIME_BIN_SECONDS
from shard_tools.manifest import Manifest
from shard_tools.observation.observed_axes import is_observed
from shard_tools.sample import read_snippet_of, read_snippets
from training.out_of_fold import read_scores
from training.search.dedoppler import find_drift

Rows = npt.NDArray[np.int64]
_SHOWN = 6  # cadences in a picture, and in each gallery of validation
_TRACKS = (
    "Red arrowheads show where a drifting line enters and leaves each panel: the best line that a de-Doppler search "
    "finds in the ON panels and not in the OFF panels. It is an estimate that does not depend on the network's score; "
    "check it by eye. Channels count from 0; Hz/s assume channels of {hertz:.2f} Hz and time bins of {seconds:.2f} s."
)
_NO_TRACKS = (
    "Snippets of an observation, drawn panel after panel without the pauses between them. infer.py --candidates finds "
    "lines with their frequencies and drift rates."
)


@dataclass(frozen=True)
class Scored:
    """Rows of a data set with their targets (-1: not known) and scores."""

    rows: Rows
    target: npt.NDArray[np.int8]
    score: npt.NDArray[np.float64]
    logit: npt.NDArray[np.float64] | None = None
    """None if the ranks of several models were averaged."""

    @property
    def order(self) -> npt.NDArray[np.float64]:
        """What cadences are ranked by: logits if there are any, since the best may all have the score 1."""
        return self.score if self.logit is None else self.logit

    @property
    def falling(self) -> Rows:
        """Places among the rows, from the highest score to the lowest."""
        return np.argsort(-self.order, kind="stable")

    def say(self, place: int) -> list[str]:
        """The rank of a cadence in one line, and its logit and score in another: scores alone may all be 1.0000."""
        rank = 1 + int((self.order > self.order[place]).sum())
        score = f"score {self.score[place]:.4f}"
        return [
            f"rank {rank:,} of {len(self.rows):,}",
            score if self.logit is None else f"logit {self.logit[place]:.2f}, {score}",
        ]

    @property
    def is_judged(self) -> bool:
        """Whether every target is known and both classes occur, so that there is a ROC AUC."""
        return bool((self.target >= 0).all()) and len(np.unique(self.target)) == 2


def read_validation(run_dir: Path, manifest: Manifest, fold: int) -> Scored:
    """The scores of the held-out fold by the best weights of a run. Raises InputError if they cannot be read."""
    judged = read_scores(run_dir / "oof.csv")
    rows = manifest.rows("train", fold, held_out=True).astype(np.int64)  # oof.csv has them in this order
    return Scored(rows, manifest.target[rows], judged.score, judged.logit)


def build_galleries(manifest: Manifest, scored: Scored) -> list[Block]:
    """Validation's best candidates and its worst errors of both kinds, as strips of waterfalls."""
    falling = scored.falling
    kinds = {
        "Best candidates of validation": falling,
        "Worst errors: no needle, and a high score": falling[scored.target[falling] == 0],
        "Worst errors: a needle, and a low score": falling[::-1][scored.target[falling[::-1]] == 1],
    }
    texts = [describe_tracks(manifest), "", ""]  # one explanation is enough for all galleries
    return [
        Block(heading, text, pictures=draw_candidates(manifest, scored, chosen[:_SHOWN]), is_gallery=True)
        for text, (heading, chosen) in zip(texts, kinds.items(), strict=True)
    ]


def write_best(picture: Path, manifest: Manifest, scored: Scored) -> None:
    """Draw the waterfalls of the best candidates as one picture. Raises InputError if a snippet cannot be read."""
    best = scored.falling[:_SHOWN]
    chosen = scored.rows[best]
    titles = [
        "\n".join([key, *scored.say(int(place))]) for key, place in zip(manifest.keys_of(chosen), best, strict=True)
    ]
    write_waterfalls(picture, read_snippets(manifest, chosen), titles)


def draw_candidates(manifest: Manifest, scored: Scored, chosen: Rows) -> list[Picture]:
    """A waterfall of each of the `chosen` places, with its key, its rank, the truth if known, and its estimated drift.

    Snippets of an observation get no drift, as that search assumes panels without pauses between them. Raises
    InputError if a snippet cannot be read.
    """
    rows = scored.rows[chosen]
    observed = is_observed(manifest)
    summed = manifest.time_bin  # time bins summed while packing; find_drift takes each sum for a single time bin
    pictures = []
    for place, row, key in zip(chosen, rows, manifest.keys_of(rows), strict=True):
        snippet = read_snippet_of(manifest, int(row))
        lines = scored.say(int(place))
        if scored.target[place] >= 0:
            lines.append("truth: needle" if scored.target[place] else "truth: no needle")
        ends = None
        if not observed:
            track = find_drift(snippet)
            lines.append(f"drift {track.drift_rate / summed:+.3f} Hz/s")
            is_inside = 0 <= track.start_channel < manifest.shape[2]
            lines.append(f"from channel {track.start_channel:.0f}{'' if is_inside else ', outside the snippet'}")
            ends = track.start_channel, track.end_channel
        figure = draw_waterfall(snippet, ends)
        pictures.append(to_picture(to_png(figure), f"waterfall of {key}, six panels", key, lines))
    return pictures


def describe_tracks(manifest: Manifest) -> str:
    """What the arrowheads of the waterfalls show, and in which units the drift is given."""
    if is_observed(manifest):
        return _NO_TRACKS
    seconds = TIME_BIN_SECONDS * manifest.time_bin
    return _TRACKS.format(hertz=CHANNEL_WIDTH_HZ, seconds=seconds)
