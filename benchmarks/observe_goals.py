"""Goals for the ingest and search of an observation with coarse channels of the real size, on two cores."""

from collections.abc import Sequence
from typing import Any

import numpy as np

INGEST, START, SEARCH, TURBO_SETI = "ingest", "its start", "infer.py --candidates", "turboSETI FindDoppler"
MOST_SECONDS, MOST_MB, MOST_SHARE = 1.0, 1500.0, 0.5  # for a coarse channel of six files; memory; of turboSETI's time
MOST_HZ, MOST_HZ_S = 45.0, 0.05  # errors of 95 % of the needles: two channels of 22 Hz
_FAR = 3.5  # standard deviations by which a group's recall may differ from that of all


def missed_goals(figures: Sequence[dict[str, Any]], margin: float) -> list[str]:
    """The goals that are missed, a line for each."""
    of = {figure["what"]: figure for figure in figures if "group" not in figure}
    missed = []
    for what, name, limit, unit in (
        (INGEST, "seconds_per_coarse_channel", MOST_SECONDS / margin, "s for a coarse channel"),
        (INGEST, "peak_mb", MOST_MB, "MB of memory"),
        ("ours / turboSETI", "share", MOST_SHARE / margin, "of turboSETI's time"),
        ("added needles", "hz_95", MOST_HZ, "Hz off"),
        ("added needles", "hz_s_95", MOST_HZ_S, "Hz/s off"),
        ("carrier", "hz", MOST_HZ, "Hz off"),
        ("carrier", "hz_s", MOST_HZ_S, "Hz/s off"),
    ):
        value = of.get(what, {}).get(name)
        if value is not None and value > limit:
            missed.append(f"{what}: {value:.3g} {unit}, expected at most {limit:.3g}")
    # Needles that were not found have no errors, and a recall of 0 is the same everywhere: no goal above notices them.
    missed += [f"{what}: not found" for what in ("added needles", "carrier") if not of[what]["found"]]
    whole = of["added needles"]
    share = whole["found"] / whole["needles"]
    for figure in figures:
        if figure["what"] == "recall by place in the coarse channel":
            spread = np.sqrt(max(share * (1 - share), 0.25 / whole["needles"]) / figure["needles"])
            if abs(figure["found"] / figure["needles"] - share) > _FAR * spread:
                missed.append(
                    f"recall at {figure['group']} of a coarse channel: {figure['found']} of {figure['needles']}, "
                    f"expected about {share:.0%} as elsewhere"
                )
    return missed
