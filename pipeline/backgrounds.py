"""Backgrounds: data sets of cadences without needles, to which signals are added in training."""

import numpy as np
import pyarrow as pa

from pipeline.plan import Order
from pipeline.randomness import Int64s
from shard_tools.errors import InputError
from shard_tools.key_digests import rows_with, sorted_digests
from shard_tools.manifest import Manifest
from shard_tools.observation.band_folds import band_folds, rows_beside

VALIDATION = "validation"
"""Entry of `Manifest.made` that names the observations of a validation set; also the set's folder in a run."""


def backgrounds_order(backgrounds: Manifest, seed: int, kept_back: Int64s | None = None) -> Order:
    """Every cadence of the data sets, of both splits, once an epoch, shuffled, except the rows `kept_back`.

    Raises as `check_no_needles` does.
    """
    check_no_needles(backgrounds)
    rows = np.arange(len(backgrounds))
    chosen = rows if kept_back is None else np.setdiff1d(rows, kept_back)
    return Order(chosen, np.zeros(len(rows), np.int8), "uniform", seed)


def kept_back_rows(backgrounds: Manifest, validated: Manifest, fold: int) -> Int64s:
    """The rows of `backgrounds` that are not trained on, because some of them are validated on.

    Where `validated` was made from snippets of an observation (training/validation_set.py), these are all snippets of
    the same fold of that observation, and those that share channels with them. Raises InputError naming a table that is
    missing or was changed.
    """
    observations = validated.made.get(VALIDATION, {}).get("of", [])
    if not observations:
        return np.zeros(0, np.int64)
    held_out = np.flatnonzero(band_folds(backgrounds) == fold)
    observed = [each for each in backgrounds.data_sets if each.identity in observations]
    return np.concatenate([held_out[:0], *(rows_beside(backgrounds, each, held_out) for each in observed)])


def check_no_needles(backgrounds: Manifest) -> None:
    """Raise InputError naming a data set that has cadences with target 1."""
    for each in backgrounds.data_sets:
        positive = int((backgrounds.target[each.rows.start : each.rows.stop] == 1).sum())
        if positive:
            raise InputError(
                f"{each.store.root}: {positive:,} cadences with target 1, expected cadences without needles; pack them "
                "without train_labels.csv or with targets 0"
            )


def check_backgrounds(backgrounds: Manifest, validated: Manifest, rows: Int64s) -> None:
    """Raise InputError where a model cannot be trained on `backgrounds` and validated on these `rows` of a data set.

    Shapes and summed time bins must agree, no background may have a needle, and none may be validated on.
    """
    check_no_needles(backgrounds)
    for what, remedy, here, there in (
        ("snippets of shape", "pack both to one shape", backgrounds.shape, validated.shape),
        ("time bins summed by", "pack both with the same --time-bin", backgrounds.time_bin, validated.time_bin),
    ):
        if here != there:
            raise InputError(
                f"{backgrounds.root} and {validated.root}: {what} {here} and {there}, expected the same in "
                f"--backgrounds and --shards; {remedy}"
            )
    shared = np.intersect1d(sorted_digests(backgrounds.keys), sorted_digests(validated.keys.take(pa.array(rows))))
    if not len(shared):
        return
    # Keys with equal digests are nearly always equal.
    shared_keys = set(backgrounds.keys_of(rows_with(backgrounds.keys, shared))) & set(validated.keys_of(rows))
    if shared_keys:
        raise InputError(
            f"{min(shared_keys)}: is in {backgrounds.root}, and in {validated.root} among the cadences that are "
            f"validated on, one of {len(shared_keys):,} such keys; pack the backgrounds again without them"
        )
