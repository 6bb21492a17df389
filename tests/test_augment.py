"""The draws' promises: pure in (seed, epoch, position), within their bounds, weights equal to the kept area."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.augment import DrawConfig, Draws, draw, mixed_targets, partner_positions
from pipeline.canvas import CanvasConfig, Layout
from pipeline.plan import Order, Share
from pipeline.planner import Planner, UpcomingBatches, batch_slots
from pipeline.randomness import EpochPart
from shard_tools.errors import InputError

PLANES = (6, 39, 256)
CANVAS = CanvasConfig("on_off", 112, 224, sum_time_bins=7)
SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 100)
CONFIGS = st.builds(
    DrawConfig,
    roll_frequency=st.floats(0, 1),
    shift_time=st.floats(0, 1),
    erase=st.floats(0, 1),
    erase_size=st.floats(0, 1),
    cutmix=st.floats(0, 1),
    cutmix_alpha=st.floats(0.1, 5),
    cutmix_box=st.sampled_from(["box", "band"]),
    mixup=st.floats(0, 1),
    inject=st.sampled_from([0.0, 0.5, 1.0]),
) | st.builds(DrawConfig, needles=st.floats(0, 1), permute_panels=st.none() | st.floats(0, 1))


def draws_at(positions: np.ndarray, config: DrawConfig, seed: int = 0, epoch: int = 0, length: int = 10**6) -> Draws:
    return draw(config, CANVAS, PLANES, EpochPart(seed, epoch, positions, length))


@given(config=CONFIGS, seed=SEEDS, epoch=EPOCHS, start=st.integers(0, 10**6), split=st.integers(1, 63))
def test_draws_do_not_depend_on_batching(config: DrawConfig, seed: int, epoch: int, start: int, split: int) -> None:
    positions = np.arange(start, start + 64)
    whole = draws_at(positions, config, seed, epoch, length=start + 64)
    parts = [draws_at(part, config, seed, epoch, start + 64) for part in (positions[:split], positions[split:])]
    for field in dataclasses.fields(Draws):
        together = getattr(whole, field.name)
        assert np.array_equal(together, np.concatenate([getattr(part, field.name) for part in parts])), field.name


@given(config=CONFIGS, seed=SEEDS, epoch=EPOCHS)
def test_the_mixing_weight_is_the_area_kept_and_boxes_lie_inside(config: DrawConfig, seed: int, epoch: int) -> None:
    found = draws_at(np.arange(200), config, seed, epoch)
    _, time_bins, channels = PLANES
    for box, mixed, kept in zip(found.cutmix_box, found.mixed, found.kept, strict=True):
        mask = np.ones((time_bins, channels), bool)
        mask[box[0] : box[1], box[2] : box[3]] = False
        assert 0 <= box[0] <= box[1] <= time_bins and 0 <= box[2] <= box[3] <= channels
        assert kept == pytest.approx(1 - float(mixed) if mixed else mask.mean(), abs=1e-12)
        assert 0 <= mixed <= 0.5 and (mask.all() or not mixed)
        if config.cutmix_box == "band" and not mask.all():
            assert (box[0], box[1]) == (0, time_bins)
    ends = found.erase_start + found.erase_shape
    assert (found.erase_start >= 0).all() and (ends <= np.array(PLANES)).all()
    assert (np.abs(found.shift) <= config.shift_time * time_bins).all()
    roll = np.minimum(found.roll, channels - found.roll)
    assert ((roll >= 0) & (roll <= config.roll_frequency * channels)).all()


def test_cutmix_keeps_shares_as_its_beta_distribution_says() -> None:
    """Clipping a box at the border keeps more; for boxes around the middle the mean share kept is the Beta's, 1/2."""
    band = draws_at(np.arange(20_000), DrawConfig(cutmix=1, cutmix_box="band"))
    centred = np.abs(band.cutmix_box[:, 2:].mean(axis=1) - PLANES[2] / 2) < 1
    assert band.kept.mean() > 0.5
    assert abs(band.kept[centred].mean() - 0.5) < 0.1
    off = draws_at(np.arange(1000), DrawConfig(cutmix=0))
    assert (off.kept == 1).all() and not off.cutmix_box.any()


def test_probabilities_are_met() -> None:
    found = draws_at(np.arange(20_000), DrawConfig(flip_frequency=0.3, flip_time=0.7, erase=0.2, cutmix=0.4))
    for share, values in (
        (0.3, found.flip_frequency),
        (0.7, found.flip_time),
        (0.2, found.erase_shape[:, 0] > 0),
        (0.4, found.kept < 1),
    ):
        assert abs(values.mean() - share) < 0.02


def test_time_is_never_reversed_over_the_stack_of_six() -> None:
    stack = CanvasConfig("stack6", 224, 224)
    config = DrawConfig(flip_time=1)
    found = draw(config, stack, (6, 273, 256), EpochPart(0, 0, np.arange(100), 100))
    assert not found.flip_time.any()


@given(length=st.integers(1, 1000))
def test_partners_are_pairs(length: int) -> None:
    positions = np.arange(length)
    partners = partner_positions(positions, length)
    assert np.array_equal(partners[partners], positions)
    assert (partners == positions).sum() == length % 2


@given(length=st.integers(1, 200), batch_size=st.integers(1, 40), world_size=st.integers(1, 3))
def test_a_batch_holds_every_partner_it_needs(length: int, batch_size: int, world_size: int) -> None:
    for rank in range(world_size):
        share = Share(length, batch_size, 1, rank, world_size)
        for step in range(share.steps):
            positions, counts = share.positions(step)
            slots, places = batch_slots(positions, counts, length)
            own = positions[counts]
            assert np.array_equal(slots[:batch_size], positions)
            assert np.array_equal(slots[places[: len(own)]], partner_positions(own, length))
            assert len(slots) - batch_size <= (2 if batch_size % 2 else 0)


@given(
    length=st.integers(1, 900),
    batch_size=st.integers(1, 40),
    world_size=st.integers(1, 3),
    asked=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 10**6), st.integers(1, 12)), min_size=1, max_size=4),
)
def test_batches_that_are_planned_together_are_those_that_are_planned_alone(
    length: int, batch_size: int, world_size: int, asked: list[tuple[int, int, int]]
) -> None:
    canvas, targets = CanvasConfig(), np.zeros(length, np.int8)
    share = Share(length, batch_size, 2, world_size - 1, world_size)
    config = DrawConfig(cutmix=0.6, mixup=0.3, erase=0.5, inject=0.5)
    planner = Planner(Order(np.arange(length), targets), share, config, canvas, canvas.plane_shape((6, 8, 16)))
    upcoming, micros = UpcomingBatches(planner), share.steps * share.accumulate
    for epoch, start, count in asked:
        for micro in range(start % micros, min(micros, start % micros + count)):
            taken, alone = upcoming.take(epoch, micro), planner.plan(epoch, micro)
            for name in ("positions", "counts", "rows"):
                assert np.array_equal(getattr(taken, name), getattr(alone, name))
            assert taken.draws is not None and alone.draws is not None
            for name, expected in vars(alone.draws).items():
                assert np.array_equal(getattr(taken.draws, name), expected), name
            taken.rows[:] = -1  # as where a bad sample is replaced


def test_mixup_ends_with_its_last_epoch() -> None:
    config = DrawConfig(cutmix=0, mixup=1, mixup_epochs=3)
    mixed = [(draws_at(np.arange(100), config, epoch=epoch).mixed > 0).mean() for epoch in range(5)]
    assert mixed == [1, 1, 1, 0, 0]


@given(seed=SEEDS, interference=st.floats(0, 1), layout=st.sampled_from(["stack6", "on", "on_off", "panels"]))
def test_an_added_signal_is_a_needle_if_and_only_if_it_is_in_on_panels_alone(
    seed: int, interference: float, layout: Layout
) -> None:
    config = DrawConfig(inject=0.8, inject_interference=interference, inject_snr_min=0.5, inject_snr_max=2)
    canvas = CanvasConfig(layout, 112, 224, sum_time_bins=7)
    planes = canvas.plane_shape((6, 273, 256))
    found = draw(config, canvas, planes, EpochPart(seed, 0, np.arange(40), 40))
    assert found.signal_level.shape == found.signal_path.shape == (40, 1, planes[0], 273)
    present = found.signal_level[:, 0].max(axis=2) > 0
    is_on = np.isin(canvas.positions, (0, 2, 4))
    for in_planes, is_needle, level, path in zip(
        present, found.has_needle, found.signal_level[:, 0], found.signal_path[:, 0], strict=True
    ):
        if is_needle:
            assert not in_planes[~is_on].any()
        elif layout != "on":
            assert in_planes[~is_on].any() == in_planes.any()
        assert ((level == 0) | ((level > 0.499 / 3**0.5) & (level < 2.001 * 3**0.5))).all()
        # Even a signal that bends as far as it drifts lies within the channels at its centre.
        assert not in_planes.any() or (np.abs(path[level > 0] - 127.5) < 128 + 20).all()


def test_signals_are_as_frequent_as_asked_and_last_long_enough_to_be_seen() -> None:
    config = DrawConfig(inject=0.6, inject_interference=0.3)
    found = draws_at(np.arange(5000), config)
    present = found.signal_level.max(axis=(1, 2, 3)) > 0
    assert abs(present.mean() - 0.6) < 0.02
    assert abs(found.has_needle.mean() - 0.6 * 0.7) < 0.02
    assert ((found.signal_level[present] > 0).mean(axis=(1, 2, 3)) > 0.009).all()  # 15 of 1638 time bins
    nothing = draws_at(np.arange(50), DrawConfig())
    assert not nothing.signal_level.size and not nothing.has_needle.any()


def test_targets_are_mixed_by_area_or_by_or() -> None:
    found = dataclasses.replace(draws_at(np.arange(4), DrawConfig()), kept=np.array([0.25, 0.25, 1.0, 0.5]))
    own, partner = np.array([1, 0, 0, 0], np.int8), np.array([0, 1, 1, 0], np.int8)
    assert mixed_targets(DrawConfig(), found, own, partner).tolist() == [0.25, 0.75, 0.0, 0.0]
    assert mixed_targets(DrawConfig(mix_target="or"), found, own, partner).tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flip_time", 1.5),
        ("erase", -0.1),
        ("roll_frequency", 2.0),
        ("gain", 1.0),
        ("offset", -1.0),
        ("cutmix_alpha", 0.0),
        ("mixup", 1.5),
        ("mixup_epochs", -1),
        ("inject_snr_min", 0.0),
        ("inject_snr_max", 0.1),
        ("needles", 1.5),
        ("permute_panels", -0.1),
        ("signal_snr_min", 0.0),
        ("signal_snr_max", 50.0),
    ],
)
def test_impossible_draws_are_refused_by_the_name_of_their_flag(name: str, value: float) -> None:
    with pytest.raises(InputError, match="--" + name.replace("_", "-")):
        DrawConfig(**{name: value})  # type: ignore[arg-type]
