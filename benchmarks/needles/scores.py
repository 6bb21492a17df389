"""From scores to the needle benchmark's results: a flat figure for each row, tables, and the goals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from benchmarks.intervals import (
    Interval,
    Statistic,
    auc_statistic,
    interval,
    recall_statistic,
    share_interval,
    share_statistic,
)
from benchmarks.needles.data import TWIN, NeedleSet
from benchmarks.needles.recipes import CLASSICAL, OURS
from shard_tools.simulate import KINDS
from training.metrics import snr_at_half_recall

RATE = 1e-2  # false positive rate of the recall by SNR and by kind
SNR_GOAL = 1.5  # times lower than the classical search's
Figure = dict[str, Any]
Runs = Sequence[pd.Series]
"""The scores of every run of one recipe, by key; a search, which is not random, has one run."""
_COLUMNS = (
    ("recall_1e2", ".3f"), ("recall_1e3", ".3f"), ("half_snr", ".0f"), ("auc_twins", ".3f"), ("drop", ".3f"),
    ("epochs", "d"), ("train_s", ".0f"), ("cadences_per_s", ",.0f"),
)  # fmt: skip
_AHEAD = (("auc", "AUC"), ("recall_1e2", "recall at 1e-2"), ("recall_1e3", "recall at 1e-3"), ("real_auc", "real AUC"))


def found_needles(needles: NeedleSet, score: pd.Series) -> pd.DataFrame:
    """The simulated needles' rows of truth.csv, with a column `found`: above all but `RATE` of the negatives."""
    negative = np.sort(score[needles.truth.index[needles.truth["target"] == 0]])[::-1]
    positive = needles.truth.loc[needles.twins]
    return positive.assign(found=score[needles.twins] > negative[math.floor(RATE * len(negative))])


def simulated_figure(needles: NeedleSet, runs: Runs, seed: int) -> Figure:
    """All figures of simulated data, as means of the runs; undefined ones are None."""
    figure: Figure = {"workload": "needles", "runs": len(runs)}
    each = [_simulated_statistics(needles, score) for score in runs]
    for name in each[0]:
        figure |= _named(name, interval(_counts(needles), [run[name] for run in each], seed=seed))
    found = pd.concat([found_needles(needles, score) for score in runs])
    figure["half_snr"] = snr_at_half_recall(found["snr"].to_numpy(), found["found"].to_numpy())
    for kind in KINDS:
        of_kind = found[found["kind"] == kind]
        figure[f"recall_{kind}"] = float(of_kind["found"].mean())
        figure[f"half_snr_{kind}"] = snr_at_half_recall(of_kind["snr"].to_numpy(), of_kind["found"].to_numpy())
    return _published(figure)


def real_figure(needles: NeedleSet, runs: Runs, seed: int) -> Figure:
    """How often a real needle scores above its twin, and the AUC between the two sets."""
    each, count = [_real_statistics(needles, score) for score in runs], len(needles.twins)
    figure: Figure = {"real": count}
    for name in each[0]:
        figure |= _named(name, interval((count, count), [run[name] for run in each], pairs=True, seed=seed))
    bounds = share_interval(round(figure["real_above"] * count), count)
    figure["real_above_low"], figure["real_above_high"] = bounds
    return _published(figure)


def ahead_figure(
    needles: NeedleSet, real: NeedleSet | None, ours: Mapping[str, Runs], theirs: Mapping[str, Runs], seed: int
) -> Figure:
    """How far `ours` is ahead of another row, on the same bootstrap draws of the same cadences."""
    figure: Figure = {}
    sides = [[_simulated_statistics(needles, score) for score in row["simulated"]] for row in (ours, theirs)]
    for name in ("auc", "recall_1e2", "recall_1e3"):
        mine, others = ([run[name] for run in side] for side in sides)
        figure |= _named(f"ahead_{name}", interval(_counts(needles), mine, others, seed=seed))
    if real:
        counts = len(real.twins), len(real.twins)
        sides = [[_real_statistics(real, score) for score in row["real"]] for row in (ours, theirs)]
        for name in ("real_auc", "real_above"):
            mine, others = ([run[name] for run in side] for side in sides)
            figure |= _named(f"ahead_{name}", interval(counts, mine, others, pairs=True, seed=seed))
    return _published(figure)


def _simulated_statistics(needles: NeedleSet, score: pd.Series) -> dict[str, Statistic]:
    negative = score[needles.truth.index[needles.truth["target"] == 0]].to_numpy()
    positive, twin = _pairs(needles, score)
    auc, of_twins = (auc_statistic(values, negative) for values in (positive, twin))
    return {
        "auc": auc,
        "recall_1e2": recall_statistic(positive, negative, 1e-2),
        "recall_1e3": recall_statistic(positive, negative, 1e-3),
        # The same negatives, and the twins in place of the positives.
        "auc_twins": of_twins,
        "drop": lambda of_positive, of_negative: auc(of_positive, of_negative) - of_twins(of_positive, of_negative),
    }


def _real_statistics(needles: NeedleSet, score: pd.Series) -> dict[str, Statistic]:
    positive, twin = _pairs(needles, score)
    return {"real_above": share_statistic(positive > twin), "real_auc": auc_statistic(positive, twin)}


def _pairs(needles: NeedleSet, score: pd.Series) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Scores of the needles and of their twins."""
    positive, twin = (score[[f"{key}{end}" for key in needles.twins]].to_numpy(float) for end in ("", TWIN))
    return positive, twin


def _counts(needles: NeedleSet) -> tuple[int, int]:
    positive = int((needles.truth["target"] == 1).sum())
    return positive, len(needles.truth) - positive


def _named(name: str, found: Interval) -> Figure:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _published(figure: Figure) -> Figure:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in figure.items()
    }


def print_tables(figures: Sequence[Figure]) -> None:
    """The rows, in 80 columns; a dash if a number is not defined: too few negatives, or recall stays below half."""
    head = (("1e-2", 6), ("1e-3", 6), ("SNR", 5), ("twins", 6), ("drop", 7), ("ep", 4), ("s", 5), ("/s", 6))
    print(f"\n{'':<17}{'AUC':>6}{'95 %':>12}" + "".join(f"{name:>{width}}" for name, width in head))
    for figure in figures:
        if "failed" in figure:
            print(f"{figure['row']:<17} failed: {figure['failed']}")
            continue
        interval = f"{_cell(figure, 'auc_low', '.3f')}-{_cell(figure, 'auc_high', '.3f')}"
        line = f"{figure['row']:<17}{_cell(figure, 'auc', '.3f'):>6}{interval:>12}"
        for (name, form), (_, width) in zip(_COLUMNS, head, strict=True):
            line += f"{_cell(figure, name, form):>{width}}"
        print(line)
    print("1e-2, 1e-3: recall at these false positive rates.")
    print("SNR: the one at which recall at 1e-2 is 0.5.")
    print("twins: AUC with the needles in OFF panels. ep: epochs.")
    print("s: seconds of training. /s: cadences/s of training, or of a search.")
    scored = [figure for figure in figures if "failed" not in figure]
    print(f"\nrecall at 1e-2 (SNR of one half)\n{'':<17}" + "".join(f"{kind:>15}" for kind in KINDS))
    for figure in scored:
        cells = (f"{_cell(figure, f'recall_{k}', '.3f')} ({_cell(figure, f'half_snr_{k}', '.0f'):>4})" for k in KINDS)
        print(f"{figure['row']:<17}" + "".join(f"{cell:>15}" for cell in cells))
    for name, heading in _AHEAD:
        if any(f"ahead_{name}" in figure for figure in scored):
            print(f"\n{f'ours ahead, {heading}':<34}{'by':>8}{'95 %, on the same cadences':>28}")
        for figure in scored:
            if f"ahead_{name}" in figure:
                by, low, high = (_cell(figure, f"ahead_{name}{end}", "+.3f") for end in ("", "_low", "_high"))
                print(f"{figure['row']:<34}{by:>8}{f'{low} to {high}':>28}")
    if any("real" in figure for figure in scored):
        print(f"\nreal needles{'':<5}{'above their twins':>30}{'AUC against the twins':>28}")
        for figure in scored:
            cells = (
                f"{_cell(figure, n, '.3f')} ({_cell(figure, f'{n}_low', '.3f')}-{_cell(figure, f'{n}_high', '.3f')})"
                for n in ("real_above", "real_auc")
            )
            print(f"{figure['row']:<17}" + "".join(f"{cell:>29}" for cell in cells))


def _cell(figure: Mapping[str, Any], name: str, form: str) -> str:
    value = figure.get(name)
    return "-" if value is None else format(value, form)


def missed_goals(figures: Sequence[Figure]) -> list[str]:
    """The goals that are missed: to be ahead of every row beyond chance, and 1.5 times as sensitive as the search.

    A row that failed counts as a missed goal.
    """
    missed = [f"{figure['row']}: failed" for figure in figures if "failed" in figure]
    by_row = {figure["row"]: figure for figure in figures if "failed" not in figure}
    ours, classical = by_row.pop(OURS, None), by_row.get(CLASSICAL)
    if ours is None or classical is None:
        return [*missed, f"{OURS} and {CLASSICAL}: expected both among the rows"]
    for name, figure in by_row.items():
        if name.startswith(OURS):
            continue  # a variant of ours
        if not figure["ahead_auc_low"] > 0:
            missed.append(f"AUC: ours is ahead of {name} by {figure['ahead_auc_low']:.4f} or more, expected above 0")
    # If the search never reaches one half, ours is ahead as soon as it does.
    ours_snr, classical_snr = (
        math.inf if figure["half_snr"] is None else figure["half_snr"] for figure in (ours, classical)
    )
    if math.isinf(ours_snr) or not classical_snr >= SNR_GOAL * ours_snr:
        missed.append(f"SNR of recall one half: ours {ours_snr:.0f}, {CLASSICAL} {classical_snr:.0f}")
    return missed
