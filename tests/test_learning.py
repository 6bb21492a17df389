"""Can the presets' networks learn? The learning check, on a few tiny snippets, passes and finds what is broken."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.learning.runs import Learning, learn, memorising, opened, scores, small_preset, untrained
from benchmarks.learning.verdicts import (
    Verdict,
    judge_doubling,
    judge_memory,
    judge_norms,
    judge_start,
    table,
)
from benchmarks.learning_check import Findings, LearningCheckConfig, conclude
from pipeline.canvas import CanvasConfig
from shard_tools.pack import PackConfig, pack
from tests.conftest import MakeData
from tests.tiny import CANVAS, SHAPE, pack_tiny
from training.config import TrainConfig
from training.presets import PRESETS
from training.run import Run

STEPS, PASS = 160, 2  # 32 snippets in batches of 16
EDIT = Callable[[Run], None]


@pytest.fixture
def shards(make_data: MakeData, tmp_path: Path) -> str:
    """White noise, a third of it labelled as needles: only memory can tell which."""
    data = make_data(train=40, test=0, shape=SHAPE)
    return str(pack(PackConfig(data.root, str(tmp_path / "shards"), folds=5, workers=1, shard_mb=1)).root)


def tiny_preset(name: str) -> TrainConfig:
    """A preset for snippets of 14 x 56."""
    config = small_preset(name)  # type: ignore[arg-type]
    canvas = CanvasConfig("panels", 7, 56, sum_time_bins=2, normalise=False)
    if config.model.stem == "none":
        canvas = replace(config.canvas, height=CANVAS.height, width=CANVAS.width, sum_time_bins=2)
    return memorising(replace(config, canvas=canvas), STEPS, PASS)


def learnt(config: TrainConfig, shards: str, precision: str, edit: EDIT = lambda run: None, **how: Any) -> Learning:
    with opened(config, (shards,), precision) as run:
        edit(run)
        return learn(run, **{"steps": STEPS, "enough": 0.04, **how})


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_memorises_snippets_and_moves_every_part(shards: str, name: str, precision: str) -> None:
    learning = learnt(tiny_preset(name), shards, precision)
    verdicts = [judge_memory(name, precision, learning, STEPS), *judge_norms(name, precision, learning)]
    assert [verdict for verdict in verdicts if not verdict.passed] == []
    assert [verdict.check for verdict in verdicts] == [
        "memorises", *(f"{what}, {step}" for step in (1, 10) for what in ("gradients", "updates"))
    ]  # fmt: skip


def test_a_rate_that_is_too_high_does_not_pass_as_learning(shards: str) -> None:
    config = replace(tiny_preset("full"), learning_rate=10.0, min_learning_rate=10.0)
    learning = learnt(config, shards, "float32", steps=12)
    assert not judge_memory("full", "float32", learning, 12).passed
    assert not all(verdict.passed for verdict in judge_norms("full", "float32", learning))


@pytest.mark.parametrize("part", ["patch_embed", "layers.1", "head"])
def test_a_part_that_does_not_learn_is_named(shards: str, part: str) -> None:
    def freeze(run: Run) -> None:
        for weight in run.bare_model.get_submodule(part).parameters():
            weight.requires_grad_(False)

    learning = learnt(tiny_preset("full"), shards, "float32", freeze, steps=1)
    gradients, updates = judge_norms("full", "float32", learning)
    assert not gradients.passed and gradients.found == f"none: {part}"
    assert not updates.passed and updates.found == f"0e+00: {part}"


def test_parts_whose_gradients_are_far_apart_or_huge_updates_are_named(shards: str) -> None:
    rows = learnt(tiny_preset("full"), shards, "float32", steps=1).norms
    for row in rows:
        factor = 1e-6 if row["part"] == "norm" else 1.0
        row["gradient"] *= factor
        row["update"] = row["weight"] if row["part"] == "layers.2" else row["update"]
    gradients, updates = judge_norms("full", "float32", Learning([], rows, 1, 1))
    assert not gradients.passed and gradients.found.endswith("least norm")
    assert not updates.passed and updates.found == "1e+00: layers.2"


def test_a_part_may_stand_still_only_once_everything_is_memorised() -> None:
    still = {"part": "slope", "gradient": 1e-6, "weight": 4.0, "update": 0.0}
    learning = Learning([1.0, 0.01, 0.01, 0.01], [{"step": step, **still} for step in (1, 4)], 1, 1)
    _, before, _, after = judge_norms("demo", "bf16", learning)
    assert not before.passed and after.passed


@pytest.mark.parametrize("name", PRESETS)
def test_the_loss_before_training_is_about_that_of_a_guess(tmp_path: Path, name: str) -> None:
    shards = str(pack_tiny(tmp_path, train=40, test=2).root)
    with opened(replace(untrained(name), canvas=tiny_preset(name).canvas, model=tiny_preset(name).model),
                (shards,), "float32") as run:  # fmt: skip
        target, logit = scores(run, run.manifest, 32)
        assert judge_start(name, "float32", target, logit).passed
        with torch.no_grad():
            list(run.bare_model.parameters())[-1].add_(20.0)
        assert not judge_start(name, "float32", *scores(run, run.manifest, 32)).passed


def test_twice_the_data_passes_unless_it_is_worse_beyond_chance() -> None:
    rng = np.random.default_rng(0)
    target = np.arange(200) % 2
    good, bad = (target * gain + rng.standard_normal(200) for gain in (2.0, 0.5))
    assert judge_doubling("demo", "auto", target, [bad], [good]).passed
    assert judge_doubling("demo", "auto", target, [good], [good + 0.1 * rng.standard_normal(200)]).passed
    assert not judge_doubling("demo", "auto", target, [good], [bad]).passed


def test_a_step_that_is_not_finite_is_a_failed_check_not_a_crash(shards: str) -> None:
    def spoil(run: Run) -> None:
        next(run.bare_model.parameters()).data.fill_(float("nan"))

    learning = learnt(tiny_preset("full"), shards, "float32", spoil)
    verdict = judge_memory("full", "float32", learning, STEPS)
    assert not verdict.passed and "not finite" in verdict.found


@pytest.mark.parametrize(("loss", "code"), [(0.01, 0), (0.5, 1)])
def test_the_command_prints_80_columns_draws_and_fails_where_a_check_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], loss: float, code: int
) -> None:
    rows = [
        {"step": step, "part": part, "gradient": 0.1, "weight": 10.0, "update": 0.01}
        for step in (1, 1000)
        for part in ("patch_embed", "control_share")
    ]
    rng = np.random.default_rng(0)
    target, logit = np.arange(40) % 2, 0.1 * rng.standard_normal(40)
    learning = Learning([loss] * 320, rows, 8, 128)
    findings = Findings(
        {("demo", "float32"): learning, ("demo", "bf16"): learning},
        {"demo": (target, logit)},
        {("demo", "few"): [(target, logit)], ("demo", "twice"): [(target, logit)]},
    )
    assert conclude(findings, LearningCheckConfig(out=tmp_path / "learning.png")) == code
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 80 and sum("FAIL" in line for line in lines) == 2 * code
    assert (tmp_path / "learning.png").stat().st_size > 10_000


def test_the_widest_line_of_the_table_fits_80_columns() -> None:
    wide = Verdict("gradients, 1000", "demo", "float32", "99999, least control_share"[:25], "up to 1e+04 apart", False)
    assert max(map(len, table([wide]).splitlines())) <= 80
