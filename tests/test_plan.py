"""The plan's promises, for all sizes, batch sizes and world sizes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import WeightedRandomSampler

from pipeline.plan import Order, Share
from pipeline.randomness import Stream, permute, uniform
from shard_tools.errors import InputError

SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 1000)


def order_of(targets: np.ndarray, sampling: str, seed: int = 0, weights: tuple[float, float] | None = None) -> Order:
    # Rows other than 0..n-1, like those of a fold.
    return Order(np.arange(len(targets)) * 3 + 1, targets.astype(np.int8), sampling, seed, weights)  # type: ignore[arg-type]


def epoch_of(order: Order, share_of: dict[str, int], epoch: int) -> list[np.ndarray]:
    """The counted rows of every step, over all ranks and micro-batches."""
    steps: list[np.ndarray] = []
    world_size = share_of["world_size"]
    shares = [Share(length=len(order), rank=rank, **share_of) for rank in range(world_size)]
    assert len({share.steps for share in shares}) == 1
    for step in range(shares[0].steps):
        parts = []
        for share in shares:
            for micro in range(share.accumulate):
                positions, counts = share.positions(step, micro)
                assert len(positions) == share.batch_size
                assert (positions >= 0).all() and (positions < len(order)).all()
                parts.append(order.rows_at(epoch, positions[counts]))
        steps.append(np.concatenate(parts))
    return steps


@given(
    size=st.integers(1, 300),
    batch_size=st.integers(1, 40),
    accumulate=st.integers(1, 3),
    world_size=st.integers(1, 5),
    seed=SEEDS,
    epoch=EPOCHS,
)
def test_every_row_is_read_exactly_once_over_all_ranks(
    size: int, batch_size: int, accumulate: int, world_size: int, seed: int, epoch: int
) -> None:
    order = order_of(np.zeros(size), "uniform", seed)
    share = {"batch_size": batch_size, "accumulate": accumulate, "world_size": world_size}
    rows = np.concatenate(epoch_of(order, share, epoch))
    assert sorted(rows.tolist()) == order.rows.tolist()


@given(size=st.integers(1, 200), seed=SEEDS, sampling=st.sampled_from(["uniform", "weighted", "sequential"]))
def test_a_step_has_the_same_samples_for_every_world_size_that_divides_its_batch(
    size: int, seed: int, sampling: str
) -> None:
    order = order_of(np.arange(size) % 2, sampling, seed)
    one = epoch_of(order, {"batch_size": 12, "accumulate": 1, "world_size": 1}, 4)
    for world_size, accumulate in [(2, 1), (3, 2), (4, 3), (12, 1)]:
        batch_size = 12 // world_size // accumulate
        share = {"batch_size": batch_size, "accumulate": accumulate, "world_size": world_size}
        assert [step.tolist() for step in epoch_of(order, share, 4)] == [step.tolist() for step in one]


@given(size=st.integers(1, 5000), seed=SEEDS, epoch=EPOCHS)
def test_the_permutation_is_one(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(seed, epoch, np.arange(size), size).tolist()) == list(range(size))


@given(size=st.integers(1, 10**12), seed=SEEDS, epoch=EPOCHS, data=st.data())
def test_a_position_is_permuted_alike_alone_and_in_company(
    size: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    together = permute(seed, epoch, positions, size)
    alone = [int(permute(seed, epoch, positions[k : k + 1], size)[0]) for k in range(len(positions))]
    assert together.tolist() == alone
    assert (together >= 0).all() and (together < size).all()


@pytest.mark.parametrize("size", [2, 3, 5, 17])
def test_every_place_is_equally_likely_for_every_row(size: int) -> None:
    """Chi-squared over 800 epochs, for each row in each position and for each ordered pair of rows."""
    epochs = 800
    drawn = np.stack([permute(1, epoch, np.arange(size), size) for epoch in range(epochs)])
    counts = np.stack([np.bincount(drawn[:, position], minlength=size) for position in range(size)])
    expected = epochs / size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom)
    neighbours = (drawn[:, 0] + 1) % size == drawn[:, 1]
    assert abs(neighbours.mean() - 1 / (size - 1)) < 5 * np.sqrt(1 / (size - 1) / epochs) if size > 2 else True


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(permute(seed, epoch, np.arange(100), 100)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@given(seed=SEEDS, epoch=EPOCHS)
@settings(max_examples=25)
def test_uniform_numbers_are_uniform_and_streams_independent(seed: int, epoch: int) -> None:
    positions = np.arange(20_000)
    values = [uniform(seed, epoch, positions, stream) for stream in (Stream.ROLL, Stream.SHIFT)]
    for value in values:
        assert value.min() >= 0 and value.max() < 1
        counts = np.bincount((value * 50).astype(int), minlength=50)
        assert ((counts - 400) ** 2 / 400).sum() < 49 + 6 * np.sqrt(98)
    assert abs(np.corrcoef(*values)[0, 1]) < 6 / np.sqrt(len(positions))


@pytest.mark.parametrize("weights", [None, (1.0, 1.0), (1.0, 9.0), (0.2, 0.0)])
def test_weighted_order_draws_as_torchs_weighted_random_sampler(weights: tuple[float, float] | None) -> None:
    """Both draw rows independently, in proportion to their weights: compare the counts of every row."""
    targets = np.array([1] * 3 + [0] * 17)
    order = order_of(targets, "weighted", 7, weights)
    class_weights = weights or (1 / 17, 1 / 3)
    epochs = 3000
    ours = np.concatenate([order.rows_at(epoch, np.arange(20)) for epoch in range(epochs)])
    sample_weights = [class_weights[target] for target in targets]
    torch.manual_seed(0)
    theirs = list(WeightedRandomSampler(sample_weights, 20 * epochs))
    expected = np.array(sample_weights) / sum(sample_weights) * len(ours)
    for counts in (np.bincount((ours - 1) // 3, minlength=20), np.bincount(theirs, minlength=20)):
        possible = expected > 0
        assert counts[~possible].sum() == 0
        chi_squared = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
        assert chi_squared < possible.sum() + 5 * np.sqrt(2 * possible.sum())
    # Draws with replacement are independent: consecutive ones repeat as often as by chance.
    repeats = (ours[1:] == ours[:-1]).mean()
    chance = ((expected / len(ours)) ** 2).sum()
    assert abs(repeats - chance) < 5 * np.sqrt(chance / len(ours))


def test_weighted_order_of_one_class_draws_from_it() -> None:
    order = order_of(np.ones(5), "weighted")
    assert set(order.rows_at(0, np.arange(100))) <= set(order.rows)


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        order_of(np.zeros(0), "uniform")
    with pytest.raises(InputError, match="target of 0 or 1"):
        order_of(np.array([0, 1, -1]), "weighted")
    with pytest.raises(InputError, match="--class-weights"):
        order_of(np.array([0, 1]), "weighted", 0, (-1.0, 1.0))
    with pytest.raises(InputError, match="weight 0"):
        order_of(np.zeros(4), "weighted", 0, (0.0, 1.0)).rows_at(0, np.arange(4))
