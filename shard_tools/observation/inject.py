"""Add needles to a user's own files while these are cut, to count which are found (`recall`).

They are added to the files' power, before anything is done to it: a needle loses as much as a real line to the
bandpass, to DC spikes, to the borders of coarse channels and of snippets, and to interference.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from shard_tools.cadence import ON_POSITIONS
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from shard_tools.observation.cut_plan import CutPlan
from shard_tools.observation.ingest import ingest
from shard_tools.observation.ingest_config import IngestConfig
from shard_tools.observation.lines import TRUTH_TABLE, Line, TrueLine, check_snr_range, write_truth
from shard_tools.storage.address import is_remote, local_folder

_MOST_NEEDLES = 1000  # unless more are asked for


@dataclass(frozen=True)
class InjectConfig(IngestConfig):
    """Ingest observations with simulated needles added to each cadence, to count which of them are found.

    The needles are listed in truth.csv beside the shards; `python -m shard_tools recall` compares them with candidates.
    """

    needles: int | None = None
    """Needles for each cadence, spread evenly over its band outside --exclude-mhz. Unset: one for every third snippet,
    at most 1,000."""
    snr_min: float = 10.0
    """SNR of the faintest needle, in one panel and one channel of the file, if it does not drift."""
    snr_max: float = 200.0
    """SNR of the brightest needle."""
    seed: int = 0
    """Same seed and files, same needles; 0 or more. Drift rates are drawn up to --max-drift, of either sign."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if is_remote(self.out):
            raise InputError(f"--out {self.out}: expected a local folder, as truth.csv is written beside the shards")
        if self.needles is not None and self.needles < 1:
            raise InputError(f"--needles {self.needles}: expected at least 1")
        check_snr_range(self.snr_min, self.snr_max)
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: expected 0 or more")


def inject(config: InjectConfig) -> Manifest:
    """Ingest with needles, write truth.csv beside the shards, and return the manifest. Raises as `ingest` does."""
    drawn: list[CutPlan] = []  # of all cadences, including those that turn out to be damaged

    def change(plans: list[CutPlan]) -> list[CutPlan]:
        drawn.extend(replace(plan, needles=draw_needles(plan, config, number)) for number, plan in enumerate(plans))
        return drawn

    manifest = ingest(config, change)
    keys = set(manifest.keys.to_pylist())
    kept = [plan for plan in drawn if plan.key(0) in keys]
    write_truth(local_folder(config.out) / TRUTH_TABLE, [line for plan in kept for line in _to_truth(plan)])
    return manifest


def draw_needles(plan: CutPlan, config: InjectConfig, number: int) -> tuple[Line, ...]:
    """The needles of cadence `number`: its band is cut into equal parts, with one at a random place in each.

    The excluded ranges do not count as parts of the band. Each needle stays in the band, and outside these ranges, for
    the whole cadence. Raises InputError where needles would lie closer than snippets do, or where one has no place.
    """
    header, cadence = plan.cadence.first, plan.cadence
    most = len(plan.starts)
    count = config.needles or min(_MOST_NEEDLES, -(-most // 3))
    if count > most:
        raise InputError(
            f"--needles {count}: expected at most {most}, one for each snippet of {header.path}: more would "
            "disturb each other"
        )
    rng = np.random.default_rng([config.seed, number])
    drifts = rng.uniform(-config.max_drift, config.max_drift, count)
    snrs = np.exp(rng.uniform(np.log(config.snr_min), np.log(config.snr_max), count))
    width_mhz = plan.column_width_hz / 1e6 * int(plan.borders[-1])
    crossed_mhz = drifts * cadence.length_s / 1e6
    shares = (np.arange(count) + rng.uniform(0, 1, count)) / count
    lowest = header.lowest_mhz + np.maximum(0, -crossed_mhz)
    lengths = np.maximum(0, width_mhz - np.abs(crossed_mhz))
    places = zip(lowest.tolist(), lengths.tolist(), crossed_mhz.tolist(), shares.tolist(), strict=True)
    starts = [_find_start(plan, *place) for place in places]
    return tuple(
        Line("needle", mhz, drift, snr, ON_POSITIONS)
        for mhz, drift, snr in zip(starts, drifts.tolist(), snrs.tolist(), strict=True)
    )


def _find_start(plan: CutPlan, lowest: float, length: float, crossed: float, share: float) -> float:
    """Where a line that drifts by `crossed` begins, in MHz: at `share` of the places that --exclude-mhz leaves free.

    The places are those from `lowest` to `lowest + length` at which it touches no excluded range.
    """
    free = [(0.0, length)]  # parts of the band, as distances from `lowest`
    for low, high in plan.exclude_mhz:
        first, last = low - max(0, crossed) - lowest, high - min(0, crossed) - lowest
        parts = [part for begin, end in free for part in ((begin, min(end, first)), (max(begin, last), end))]
        free = [(begin, end) for begin, end in parts if begin <= end]
    if not free:
        raise InputError(
            f"--exclude-mhz: {plan.cadence.first.path} has no place for a needle that drifts by {crossed * 1e6:.0f} Hz "
            "in a cadence and touches no excluded range; give smaller ranges or a smaller --max-drift"
        )
    place = share * sum(end - begin for begin, end in free)
    for begin, end in free[:-1]:
        if place < end - begin:
            return lowest + begin + place
        place -= end - begin
    return lowest + free[-1][0] + place


def _to_truth(plan: CutPlan) -> Sequence[TrueLine]:
    header = plan.cadence.first
    return [TrueLine(line, header.start_mjd, _place(plan, line.frequency_mhz)) for line in plan.needles]


def _place(plan: CutPlan, mhz: float) -> float:
    """Where a frequency is in its coarse channel, from 0 at the lowest to 1; NaN if coarse channels are not known."""
    header = plan.cadence.first
    if not header.nfpc:
        return np.nan
    return float(((mhz - header.lowest_mhz) / abs(header.foff_mhz) + 0.5) / header.nfpc % 1)
