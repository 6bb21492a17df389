"""Norms of gradients, weights and updates of each part: at the right steps, unclipped, unscaled, kept on resuming."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from shard_tools.manifest import Manifest
from tests.tiny import pack_tiny, tiny_config
from train import train, train_step
from training.accelerator import build_accelerator
from training.config import TrainConfig
from training.model import ModelConfig, build_model
from training.part_norms import PartNorms, is_recorded, parts_of, update_share
from training.presets import PRESETS
from training.run import Progress, build_run

SWIN_PARTS = ["patch_embed", "layers.0", "layers.1", "layers.2", "layers.3", "norm", "head"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("norms"))


def read_norms(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "norms.jsonl").read_text().splitlines()]


def test_a_run_records_every_part_at_powers_of_ten(manifest: Manifest, tmp_path: Path) -> None:
    train(tiny_config(manifest.root, tmp_path / "run", batch_size=4, epochs=1))
    rows = read_norms(tmp_path / "run")
    assert [(row["step"], row["part"]) for row in rows] == [(step, part) for step in (1, 10) for part in SWIN_PARTS]
    assert all(row[name] > 0 for row in rows for name in ("gradient", "weight", "update"))
    assert [step for step in range(-1, 2000) if is_recorded(step)] == [1, 10, 100, 1000]


@pytest.mark.parametrize("name", PRESETS)
def test_each_weight_of_a_preset_is_in_one_part_and_parts_have_readable_names(name: str) -> None:
    preset = PRESETS[name]  # type: ignore[index]
    model = ModelConfig("swin_pico" if preset.model.stem == "candidates" else "swin_nano", stem=preset.model.stem)
    network = build_model(model, preset.canvas.channels, 56, 56)
    parts = parts_of(network)
    assert sum(map(len, parts.values())) == len(list(network.parameters()))
    assert {"patch_embed", "layers.0", "layers.1", "layers.2", "norm", "head"} <= parts.keys()
    own = {name.split(".")[0] for name, _ in network.named_parameters() if not name.startswith("backbone.")}
    assert not any("backbone" in part for part in parts)
    assert all(part in parts or f"{part}.0" in parts for part in own)


def step_of(config: TrainConfig, manifest: Manifest) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The rows of a run's first step, and the norm of the change that it made to each part."""
    run = build_run(config, build_accelerator(config.precision), manifest)
    run.model.train()
    parts = parts_of(run.bare_model)
    before = {part: torch.cat([weight.detach().flatten() for weight in weights]) for part, weights in parts.items()}
    train_step(run, next(iter(run.train_loader)))
    after = {part: torch.cat([weight.detach().flatten() for weight in weights]) for part, weights in parts.items()}
    run.train_loader.close()
    run.valid_loader.close()
    return run.norms.read(), {part: float((after[part] - before[part]).norm()) for part in parts}


def test_gradients_are_those_before_clipping_and_updates_what_the_step_changed(
    manifest: Manifest, tmp_path: Path
) -> None:
    quiet = {"model": ModelConfig("swin_nano"), "epochs": 1}
    plain, _ = step_of(tiny_config(manifest.root, tmp_path, clip=0.0, **quiet), manifest)
    clipped, changed = step_of(tiny_config(manifest.root, tmp_path, clip=1e-3, **quiet), manifest)
    assert [row["gradient"] for row in clipped] == pytest.approx([row["gradient"] for row in plain])
    assert math.hypot(*(row["gradient"] for row in clipped)) > 0.1
    assert [row["update"] for row in clipped] == pytest.approx([changed[row["part"]] for row in clipped], rel=1e-4)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_under_fp16_the_gradient_is_the_one_without_the_scale(clip: float) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    network[0].weight.data.fill_(2.0)
    accelerator = build_accelerator("float32")
    accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimiser = torch.optim.SGD(network.parameters(), 0.5)
    norms = PartNorms(accelerator, network)
    scaler.scale(3 * network(torch.ones(1, 1)).sum()).backward()
    with norms.around_update(1):
        scaler.unscale_(optimiser)
        if clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
        scaler.step(optimiser)
    (row,) = norms.read()
    assert row == pytest.approx({"step": 1, "part": "0", "gradient": 3, "weight": 2, "update": 0.5 * (clip or 3)})
    assert norms.read() == []


def test_a_gradient_that_overflows_is_null_in_the_file(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    norms = PartNorms(build_accelerator("float32"), network)
    network[0].weight.grad = torch.full((1, 1), math.inf)
    with norms.around_update(1):
        pass
    (row,) = norms.read()
    assert row["gradient"] is None and update_share(row) == 0


def test_a_checkpoint_of_an_earlier_version_has_no_norms_and_is_resumed() -> None:
    progress = Progress()
    progress.load_state_dict({"step": 7, "best_auc": 0.5, "history": [], "loss_sum": 0.0, "trained": None})
    assert progress.norms == [] and progress.step == 7
