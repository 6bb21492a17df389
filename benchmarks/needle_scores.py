"""What scores say of a detector: a flat figure for each row of the needle benchmark, tables of them, and the goals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.needle_data import TWIN, NeedleSet
from benchmarks.needle_rows import CLASSICAL, OURS
from metrics import (
    recall_at_fpr,
    recall_at_fpr_interval,
    roc_auc,
    roc_auc_interval,
    share_interval,
    snr_at_half_recall,
)
from shard_tools.simulate import KINDS

RATE = 1e-2  # false positive rate at which recall is told by SNR and by kind
SNR_GOAL = 1.5  # times lower than the classical search's
Figure = dict[str, Any]
_COLUMNS = (
    ("recall_1e2", ".3f"), ("recall_1e3", ".3f"), ("half_snr", ".0f"), ("auc_swapped", ".3f"), ("drop", ".3f"),
    ("epochs", "d"), ("train_s", ".0f"), ("cadences_per_s", ",.0f"),
)  # fmt: skip


def found_needles(needles: NeedleSet, score: pd.Series) -> pd.DataFrame:
    """The simulated needles' rows of truth.csv, with a column `found`: above all but `RATE` of the negatives."""
    negative = np.sort(score[needles.truth.index[needles.truth["target"] == 0]])[::-1]
    positive = needles.truth.loc[needles.twins]
    return positive.assign(found=score[needles.twins] > negative[math.floor(RATE * len(negative))])


def simulated_figure(needles: NeedleSet, score: pd.Series, seed: int) -> Figure:
    """Everything about simulated data; what is not defined is None."""
    target = needles.truth["target"].to_numpy()
    value = score[needles.truth.index].to_numpy()
    figure: Figure = {"workload": "needles", "auc": roc_auc(target, value)}
    figure["auc_low"], figure["auc_high"] = roc_auc_interval(target, value, seed)
    for name, rate in (("recall_1e2", 1e-2), ("recall_1e3", 1e-3)):
        figure[name] = recall_at_fpr(target, value, rate)
        figure[f"{name}_low"], figure[f"{name}_high"] = recall_at_fpr_interval(target, value, rate, seed)
    found = found_needles(needles, score)
    figure["half_snr"] = snr_at_half_recall(found["snr"].to_numpy(), found["found"].to_numpy())
    for kind in KINDS:
        of_kind = found[found["kind"] == kind]
        figure[f"recall_{kind}"] = float(of_kind["found"].mean())
        figure[f"half_snr_{kind}"] = snr_at_half_recall(of_kind["snr"].to_numpy(), of_kind["found"].to_numpy())
    # The same negatives, and the twins in place of the positives.
    swapped = score[needles.truth.index].copy()
    swapped[needles.twins] = score[[f"{key}{TWIN}" for key in needles.twins]].to_numpy()
    figure["auc_swapped"] = roc_auc(target, swapped.to_numpy())
    figure["drop"] = figure["auc"] - figure["auc_swapped"]
    return _published(figure)


def real_figure(needles: NeedleSet, score: pd.Series, seed: int) -> Figure:
    """How often a real needle scores above its swapped twin, and the AUC between the two sets."""
    ours, theirs = (score[[f"{key}{end}" for key in needles.twins]].to_numpy() for end in ("", TWIN))
    above, count = int((ours > theirs).sum()), len(ours)
    target, value = np.repeat([1, 0], count), np.concatenate((ours, theirs))
    figure: Figure = {"real": count, "real_above": above / count, "real_auc": roc_auc(target, value)}
    figure["real_above_low"], figure["real_above_high"] = share_interval(above, count)
    figure["real_auc_low"], figure["real_auc_high"] = roc_auc_interval(target, value, seed)
    return _published(figure)


def _published(figure: Figure) -> Figure:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in figure.items()
    }


def print_tables(figures: Sequence[Figure]) -> None:
    """The rows, in 80 columns; a dash where a number is not defined: too few negatives, or recall stays below half."""
    head = (("1e-2", 6), ("1e-3", 6), ("SNR", 5), ("swap", 6), ("drop", 7), ("ep", 4), ("s", 5), ("/s", 6))
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
    print("1e-2, 1e-3: recall at these false positive rates. SNR: where the former is 1/2.")
    print("swap: AUC with ON and OFF panels of the positives swapped. ep: epochs.")
    print("s: seconds of training. /s: cadences/s of training, or of a search.")
    scored = [figure for figure in figures if "failed" not in figure]
    print(f"\nrecall at 1e-2 (SNR of one half)\n{'':<17}" + "".join(f"{kind:>15}" for kind in KINDS))
    for figure in scored:
        cells = (f"{_cell(figure, f'recall_{k}', '.3f')} ({_cell(figure, f'half_snr_{k}', '.0f'):>4})" for k in KINDS)
        print(f"{figure['row']:<17}" + "".join(f"{cell:>15}" for cell in cells))
    if any("real" in figure for figure in scored):
        print(f"\nreal needles{'':<5}{'above their swapped twins':>30}{'AUC against the twins':>28}")
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
    """What keeps ours from being ahead of every row with the intervals apart, and 1.5 times as sensitive as the search.

    A row that failed cannot be judged, which is a goal missed too.
    """
    missed = [f"{figure['row']}: failed" for figure in figures if "failed" in figure]
    by_row = {figure["row"]: figure for figure in figures if "failed" not in figure}
    ours, classical = by_row.pop(OURS, None), by_row.get(CLASSICAL)
    if ours is None or classical is None:
        return [*missed, f"{OURS} and {CLASSICAL}: expected both among the rows"]
    for name, figure in by_row.items():
        if name.startswith(OURS):
            continue  # a variant of ours
        if not ours["auc_low"] > figure["auc_high"]:
            missed.append(f"AUC: ours is {ours['auc_low']:.4f} or more, {name} {figure['auc_high']:.4f} or less")
    # The search may never reach one half: then ours is ahead wherever it does.
    ours_snr, classical_snr = (
        math.inf if figure["half_snr"] is None else figure["half_snr"] for figure in (ours, classical)
    )
    if math.isinf(ours_snr) or not classical_snr >= SNR_GOAL * ours_snr:
        missed.append(f"SNR of recall one half: ours {ours_snr:.0f}, {CLASSICAL} {classical_snr:.0f}")
    return missed
