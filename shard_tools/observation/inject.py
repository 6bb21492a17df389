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
    """Needles for each cadence, spread evenly over its band. Unset: one for every third snippet, at most 1,000."""
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

    Each stays in the band for the whole cadence. Raises InputError where they would lie closer than snippets do.
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
    starts = lowest + shares * np.maximum(0, width_mhz - np.abs(crossed_mhz))
    return tuple(
        Line("needle", float(mhz), float(drift), float(snr), ON_POSITIONS)
        for mhz, drift, snr in zip(starts, drifts, snrs, strict=True)
        if not _is_excluded(plan, float(mhz), float(mhz + drift * cadence.length_s / 1e6))
    )


def _is_excluded(plan: CutPlan, *ends_mhz: float) -> bool:
    """Whether a line touches a range of --exclude-mhz."""
    return any(low <= max(ends_mhz) and min(ends_mhz) <= high for low, high in plan.exclude_mhz)


def _to_truth(plan: CutPlan) -> Sequence[TrueLine]:
    header = plan.cadence.first
    return [TrueLine(line, header.start_mjd, _place(plan, line.frequency_mhz)) for line in plan.needles]


def _place(plan: CutPlan, mhz: float) -> float:
    """Where a frequency is in its coarse channel, from 0 at the lowest to 1; NaN if coarse channels are not known."""
    header = plan.cadence.first
    if not header.nfpc:
        return np.nan
    return float(((mhz - header.lowest_mhz) / abs(header.foff_mhz) + 0.5) / header.nfpc % 1)
