"""Backgrounds: data sets of cadences without needles, to which the plan adds signals while it trains."""

import numpy as np

from pipeline.plan import Order
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest


def backgrounds_order(backgrounds: Manifest, seed: int) -> Order:
    """Every cadence of the data sets once an epoch, of whichever split, shuffled. Raises as `check_no_needles`."""
    check_no_needles(backgrounds)
    rows = np.arange(len(backgrounds))
    return Order(rows, np.zeros(len(rows), np.int8), "uniform", seed)


def check_no_needles(backgrounds: Manifest) -> None:
    """Raise InputError naming a data set that has cadences with target 1."""
    for each in backgrounds.data_sets:
        positive = int((backgrounds.target[each.rows.start : each.rows.stop] == 1).sum())
        if positive:
            raise InputError(
                f"{each.store.root}: {positive:,} cadences with target 1, expected cadences without needles; pack them "
                "without train_labels.csv or with targets 0"
            )
