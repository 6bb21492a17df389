"""The page of an observation beside its table of candidates: their waterfalls, and the interference by frequency."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from reports.event_waterfalls import EventLine, Panels, draw_event
from reports.interference import draw_lines, draw_strengths, read_interference
from reports.page import Block, Picture, Section, to_picture, write_page
from reports.plots import to_png
from shard_tools.atomic_files import write_whole
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from shard_tools.observation.cadence_tables import Observations, ObservedCadence, read_observations
from shard_tools.observation.candidates_table import INTERFERENCE, Candidate, beside, read_candidates
from shard_tools.observation.lines import TRUTH_TABLE, read_truth
from shard_tools.observation.recall import RecallConfig, find_needles, group_needles
from shard_tools.sample import read_snippet_of

_LISTED = 50  # rows of the table on the page
_HEADINGS = (
    "rank", "MHz", "Hz/s", "SNR", "score", "false alarm rate", "bandwidth (Hz)", "coarse channel", "source", "flags",
)  # fmt: skip
_ABOUT = (
    "A candidate is a narrow line that drifts in frequency and is there only while the telescope points at the target "
    "(ON), not while it points elsewhere (OFF). The best are at the top. A high rank proves nothing: look at each "
    "picture, and observe again."
)
_FALSE_ALARMS = (
    "The false alarm rate is the share of candidates with at least this score that chance or interference would give, "
    "estimated by the same search with ON and OFF exchanged: (lines that it found with at least this score + 1) / "
    "candidates, at most 1. A rate of 0.1 means that one of ten such candidates is expected by chance. It is never 0: "
    "with n candidates it is at least 1 / n, so a few candidates have high rates however bright they are. It assumes "
    "that the sky and the interference are alike in ON and OFF."
)
_PICTURES = (
    "Time runs down; each panel is drawn when it was observed, with the pauses between. Red arrowheads in the pauses "
    "show where the line enters and leaves each panel; nothing is drawn over the signal itself. A needle is bright in "
    "the three A panels alone, along the arrowheads. Suspect a line that shows in B, C or D too, one without drift, "
    "and one in a flagged snippet."
)
_INTERFERENCE = (
    "Lines that are in ON and OFF panels, and how much the values of each snippet vary compared with the receiver's "
    "noise (1: noise alone). What stands out in ON and OFF alike is interference. Trust candidates among it the least."
)
_SNR = (
    "Their SNR is that of one panel in one channel of the file for a needle without drift; drift and summed channels "
    "lower it."
)


@dataclass(frozen=True)
class ObservedSnippet:
    """Where a snippet was observed."""

    row: int
    """Its row in the manifest."""
    cadence: ObservedCadence
    first_mhz: float
    level: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]


class ObservedSnippets:
    """Finds the observed snippets of a manifest by key. Data sets that `pack` made have none."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.observed: list[tuple[range, Observations]] = []
        for data_set in manifest.data_sets:
            if (found := read_observations(data_set)) is not None:
                self.observed.append((data_set.rows, found))
        if not self.observed:
            raise InputError(
                f"{manifest.root}: has no frequencies, as `pack` made it; an observation is made by `ingest`"
            )

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {str(key): row for row, key in enumerate(self.manifest.keys.to_pylist())}

    def find(self, key: str) -> ObservedSnippet | None:
        """The snippet of that key; None if no observation has it."""
        row = self._rows.get(key)
        for rows, observed in self.observed:
            if row is not None and row in rows:
                n = row - rows.start
                cadence = observed.cadences[observed.cadence[n]]
                return ObservedSnippet(row, cadence, float(observed.first_mhz[n]), observed.level[n], observed.scale[n])
        return None

    def panels(self, snippet: ObservedSnippet) -> Panels:
        """The panels of a snippet, in standard deviations of the receiver's noise."""
        values = read_snippet_of(self.manifest, snippet.row).astype(np.float32)
        noise = snippet.level[:, None, None] + snippet.scale[:, None, None] * values
        cadence = snippet.cadence
        return Panels(
            noise, cadence.panel_start_s.tolist(), cadence.bin_length_s, snippet.first_mhz, cadence.channel_width_hz
        )


def write_observation_report(table: Path, manifest: Manifest, weights: Sequence[str] = ()) -> Path:
    """Draw the candidates for which a table names a picture, write a page beside it, and return the page's path.

    If truth.csv of `inject` lies beside the shards, the page also says which added needles were found. Raises
    InputError if the table, or a snippet that it names, cannot be read.
    """
    candidates = read_candidates(table)
    snippets = ObservedSnippets(manifest)
    pictures = [write_picture(table, snippets, candidate) for candidate in candidates if candidate.picture]
    interference = read_interference(beside(table, INTERFERENCE))
    charts = [draw_lines(candidates, interference)]
    charts += draw_strengths([observed for _, observed in snippets.observed], manifest)
    blocks = [
        Block("", _ABOUT, numbers=_headline(candidates, snippets, len(interference))),
        Block("The table", _FALSE_ALARMS, table=_to_table(candidates[:_LISTED])),
        Block("Pictures", _PICTURES, pictures=pictures),
        Block("Interference by frequency", _INTERFERENCE, pictures=charts, is_wide=True),
        *_added(table, candidates, manifest),
        *_searched(snippets, weights),
    ]
    if not candidates:
        blocks[1] = Block("The table", "It is empty: no line was found that is in ON and not in OFF.")
        del blocks[2]
    about = f"{table.name}, made {datetime.now(UTC):%Y-%m-%d %H:%M UTC}."
    page = table.with_name(f"{table.stem}.report.html")
    write_page(page, table.stem, [Section("Candidates", about, blocks)])
    return page


def write_picture(table: Path, snippets: ObservedSnippets, candidate: Candidate) -> Picture:
    """Draw one candidate, write it to the file that the table names, and return it with what is known about it."""
    snippet = snippets.find(candidate.snippet)
    if snippet is None:
        raise InputError(
            f"{table}: rank {candidate.rank} has snippet {candidate.snippet!r}, which {snippets.manifest.root} does "
            "not hold; give the shards that were scored"
        )
    line = EventLine(candidate.frequency_mhz, candidate.drift_rate_hz_s)
    png = to_png(draw_event(snippets.panels(snippet), line, candidate.panel_snrs))
    path = table.parent / candidate.picture
    if not path.resolve().is_relative_to(table.parent.resolve()):
        raise InputError(f"{table}: picture {candidate.picture!r} leads out of its folder; expected a path inside")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, png, durable=False)
    title = f"{candidate.rank}: {candidate.frequency_mhz:.6f} MHz"
    lines = [
        f"score {_said(candidate.score, '.3f')}, false alarm rate {_said(candidate.false_alarm_rate, '.2g')}",
        f"drift {_said(candidate.drift_rate_hz_s, '+.3f')} Hz/s, SNR {_said(candidate.snr, '.1f')}",
        f"{candidate.source}, MJD {_said(candidate.tstart_mjd, '.5f')}",
    ]
    if candidate.flags:
        lines.append(f"flags: {candidate.flags}")
    return to_picture(png, f"waterfall of candidate {candidate.rank}, six panels", title, lines)


def _said(value: float, form: str) -> str:
    return "not known" if math.isnan(value) else format(value, form)


def _headline(
    candidates: Sequence[Candidate], snippets: ObservedSnippets, interference: int
) -> list[tuple[str, str, str]]:
    numbers = [(f"{len(candidates):,}", "candidates", "")]
    likely = sum(candidate.false_alarm_rate <= 0.1 for candidate in candidates)
    numbers.append((f"{likely:,}", "with a false alarm rate of at most 0.1", ""))
    numbers.append((f"{interference:,}", "lines of interference", ""))
    searched = sum(len(observed.first_mhz) for _, observed in snippets.observed)
    numbers.append((f"{searched:,}", "snippets searched", ""))
    return numbers


def _to_table(candidates: Sequence[Candidate]) -> list[Sequence[str]]:
    return [_HEADINGS, *map(_to_cells, candidates)]


def _to_cells(candidate: Candidate) -> Sequence[str]:
    """The cells of a row, in the order of _HEADINGS."""
    return (
        f"{candidate.rank}",
        f"{candidate.frequency_mhz:.6f}",
        _said(candidate.drift_rate_hz_s, "+.3f"),
        _said(candidate.snr, ".1f"),
        _said(candidate.score, ".3f"),
        _said(candidate.false_alarm_rate, ".2g"),
        _said(candidate.bandwidth_hz, ".0f"),
        "not known" if candidate.coarse_channel is None else f"{candidate.coarse_channel}",
        candidate.source,
        candidate.flags,
    )


def _added(table: Path, candidates: Sequence[Candidate], manifest: Manifest) -> list[Block]:
    """Which of the needles that `inject` added are among the candidates; nothing if it added none."""
    truth = Path(manifest.root) / TRUTH_TABLE if isinstance(manifest.root, Path) else None
    if truth is None or not truth.is_file():
        return []
    found = find_needles(candidates, read_truth(truth), RecallConfig(table, truth))
    if not found:
        return []
    hits = sum(each.candidate is not None for each in found)
    rows: list[Sequence[str]] = [("", "", "found", "of", "recall")]
    for name, groups in group_needles(found).items():
        rows += [(name, g.name, f"{g.found}", f"{g.needles}", f"{g.found / g.needles:.0%}") for g in groups]
    text = f"{hits} of {len(found)} simulated needles are in the table: not every candidate is from the sky. {_SNR}"
    return [Block("Added needles that were found", text, table=rows)]


def _searched(snippets: ObservedSnippets, weights: Sequence[str]) -> list[Block]:
    """What was searched: when and where each data set was observed, and how many of its snippets have which flag."""
    channels = snippets.manifest.shape[2]
    rows = [("shards", str(snippets.manifest.root))]
    if weights:
        rows.append(("weights", ", ".join(weights)))
    if list(weights) == ["none"]:
        rows.append(("score", "that of the search alone, in standard deviations of the noise"))
    for _, observed in snippets.observed:
        rows.append(("observed", observed.describe(channels)))
        starts = ", ".join(f"{start:.0f}" for start in observed.cadences[0].panel_start_s)
        rows.append(("panels begin at", f"{starts} s after MJD {observed.cadences[0].start_mjd:.6f}"))
        flags = Counter(word for words in observed.flags for word in words.split())
        rows += [(f"snippets flagged {flag}", f"{count:,}") for flag, count in sorted(flags.items())]
    return [Block("What was searched", rows=rows)]
