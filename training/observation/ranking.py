"""From events to the rows of candidates.csv: ranked, with false alarm rates, places in the files, and flags."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shard_tools.cadence import ON_POSITIONS, PANEL_NAMES
from shard_tools.manifest import Manifest
from shard_tools.observation.candidates_table import Candidate
from training.metrics import sigmoid
from training.observation.events import Event
from training.observation.false_alarms import false_alarm_rates
from training.observation.interference import (
    COMB,
    CROSSED,
    CROWDED,
    REPEATED,
    in_comb,
    is_crossed,
    is_crowded,
    is_repeated,
)
from training.observation.observed import CadenceFiles, Observed
from training.observation.search_observation import Findings

Float64s = npt.NDArray[np.float64]
_PANEL_COLUMNS = tuple(f"snr_{name.lower()}" for name in PANEL_NAMES)


def rank_events(
    findings: Findings, observed: Observed, manifest: Manifest, *, trained: bool, pictures: Sequence[str]
) -> tuple[list[Candidate], list[Event]]:
    """Rows of the table, best first, and the event of each.

    `trained`: scores are logits of trained weights. `pictures` are the files of the first rows' pictures.
    """
    scores = _scores(findings.events)
    rates = false_alarm_rates(scores, _scores(findings.controls))
    shown = sigmoid(scores) if trained else scores
    flags = _flags(findings, [files.source for files in observed.cadences])
    # By logits, as the best scores may all be 1. Of lines with equal logits the brighter one is first.
    snrs = np.array([event.line.snr for event in findings.events])
    order = np.lexsort((-snrs, -scores)).tolist()
    keys = manifest.keys_of(np.array([event.line.row for event in findings.events], np.int64))
    candidates = []
    for rank, number in enumerate(order, start=1):
        event = findings.events[number]
        candidates.append(
            Candidate(
                **_columns_of_line(event),
                **_columns_of_files(event, observed.cadences[event.origin.cadence]),
                rank=rank,
                score=float(shown[number]),
                false_alarm_rate=float(rates[number]),
                flags=flags[number],
                snippet=keys[number],
                picture=pictures[rank - 1] if rank <= len(pictures) else "",
            )
        )
    return candidates, [findings.events[number] for number in order]


def _scores(events: Sequence[Event]) -> Float64s:
    return np.array([event.line.score for event in events], np.float64)


def _flags(findings: Findings, sources: Sequence[str]) -> list[str]:
    """The flags of each event; `sources` are the targets of the cadences."""
    events, both = findings.events, [*findings.events, *findings.interference]
    marks = {
        CROWDED: is_crowded(events, findings.interference),
        COMB: in_comb(both)[: len(events)],
        CROSSED: is_crossed(events, both),
        REPEATED: is_repeated(events, [*both, *findings.controls], sources),
    }
    return [
        " ".join([*event.flags, *(word for word, marked in marks.items() if marked[number])])
        for number, event in enumerate(events)
    ]


def _columns_of_line(event: Event) -> dict[str, Any]:
    return {
        "frequency_mhz": event.start_mhz,
        "drift_rate_hz_s": event.drift_rate_hz_s,
        "snr": event.line.fit.snr(ON_POSITIONS),
        **dict(zip(_PANEL_COLUMNS, event.line.fit.panel_snr.tolist(), strict=True)),
        "bandwidth_hz": event.bandwidth_hz,
    }


def _columns_of_files(event: Event, files: CadenceFiles) -> dict[str, Any]:
    channel = files.channel_of(event.start_mhz)
    return {
        "coarse_channel": channel // files.nfpc if files.nfpc else None,
        "channel": channel,
        "source": files.source,
        "ra": math.nan if files.ra_hours is None else files.ra_hours,
        "dec": math.nan if files.dec_degrees is None else files.dec_degrees,
        "tstart_mjd": files.start_mjd,
    }
