"""From events to the rows of candidates.csv: ranked, with false alarm rates, places in the files, and flags."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shard_tools.cadence import ON_POSITIONS
from shard_tools.manifest import Manifest
from shard_tools.observation.candidates_table import PICTURES, Candidate
from training.metrics import sigmoid
from training.observation.events import Event
from training.observation.false_alarms import false_alarm_rates
from training.observation.interference import COMB, CROSSED, CROWDED, in_comb, is_crossed, is_crowded
from training.observation.observed import Observed
from training.observation.search_observation import Findings

Float64s = npt.NDArray[np.float64]
_PANEL_COLUMNS = ("snr_a1", "snr_b", "snr_a2", "snr_c", "snr_a3", "snr_d")


def rank_events(
    findings: Findings, observed: Observed, manifest: Manifest, *, trained: bool, pictures: int
) -> tuple[list[Candidate], list[Event]]:
    """Rows of the table, best first, and the event of each.

    `trained`: scores are logits of trained weights. The first `pictures` rows name a picture.
    """
    scores = _scores(findings.events)
    rates = false_alarm_rates(scores, _scores(findings.controls))
    shown = sigmoid(scores) if trained else scores
    flags = _flags(findings)
    # By the logits: the best scores may all be 1. Of equal ones the brighter is first.
    snrs = np.array([event.line.snr for event in findings.events])
    order = np.lexsort((-snrs, -scores)).tolist()
    keys = manifest.keys_of(np.array([event.line.row for event in findings.events], np.int64))
    candidates = []
    for rank, number in enumerate(order, start=1):
        event = findings.events[number]
        picture = f"{PICTURES}/{rank}.png" if rank <= pictures else ""
        about = rank, float(shown[number]), float(rates[number]), flags[number], keys[number], picture
        candidates.append(_to_candidate(event, observed, *about))
    return candidates, [findings.events[number] for number in order]


def _scores(events: Sequence[Event]) -> Float64s:
    return np.array([event.line.score for event in events], np.float64)


def _flags(findings: Findings) -> list[str]:
    """The words of each event."""
    events, both = findings.events, [*findings.events, *findings.interference]
    marks = {
        CROWDED: is_crowded(events, findings.interference),
        COMB: in_comb(both)[: len(events)],
        CROSSED: is_crossed(events, both),
    }
    return [
        " ".join([*event.flags, *(word for word, marked in marks.items() if marked[number])])
        for number, event in enumerate(events)
    ]


def _to_candidate(
    event: Event, observed: Observed, rank: int, score: float, rate: float, flags: str, key: str, picture: str
) -> Candidate:
    files = observed.cadences[event.place.cadence]
    channel = files.channel_of(event.start_mhz)
    panels = dict(zip(_PANEL_COLUMNS, event.line.fit.panel_snr.tolist(), strict=True))
    return Candidate(
        rank=rank,
        score=score,
        false_alarm_rate=rate,
        frequency_mhz=event.start_mhz,
        drift_rate_hz_s=event.drift_rate_hz_s,
        snr=event.line.fit.snr(ON_POSITIONS),
        **panels,
        bandwidth_hz=event.bandwidth_hz,
        coarse_channel=channel // files.nfpc if files.nfpc else None,
        channel=channel,
        source=files.source,
        ra=float("nan") if files.ra_hours is None else files.ra_hours,
        dec=float("nan") if files.dec_degrees is None else files.dec_degrees,
        tstart_mjd=files.start_mjd,
        flags=flags,
        snippet=key,
        picture=picture,
    )
