"""Which weights decay, and how the optimiser's state in a checkpoint is matched to its weights."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from shard_tools.errors import InputError
from tests.tiny import CANVAS, pack_tiny, tiny_config
from train import train
from training import run as run_module
from training.config import TrainConfig
from training.model import ModelConfig, build_model
from training.optimiser import build_optimiser, undecayed

CONFIG = tiny_config(Path("shards"), Path("run"), weight_decay=0.05)


def decay_of(optimiser: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    """The decay of each weight, by its name in the model."""
    names = {weight: name for name, weight in model.named_parameters()}
    return {names[weight]: group["weight_decay"] for group in optimiser.param_groups for weight in group["params"]}


@pytest.mark.parametrize(
    ("name", "spared"),
    [
        ("swin_tiny_patch4_window7_224", ("relative_position_bias_table",)),
        ("swinv2_cr_tiny_224", ()),
        ("vit_tiny_patch16_224", ("pos_embed", "cls_token")),
        ("tiny_vit_5m_224", ("attention_biases",)),
        ("xcit_nano_12_p16_224", ("temperature", "pos_embed", "cls_token")),  # named by parts, and by a pattern
        ("edgenext_xx_small", ("temperature",)),
        ("resnet18", ()),  # it has no such list
    ],
)
def test_what_a_model_asks_to_spare_does_not_decay_and_all_other_matrices_do(
    name: str, spared: tuple[str, ...]
) -> None:
    model = timm.create_model(name, num_classes=1)
    found = decay_of(build_optimiser(CONFIG, model), model)
    assert found.keys() == dict(model.named_parameters()).keys()
    asked = {name for name in found if set(name.split(".")) & set(spared)}
    assert bool(asked) == bool(spared) and asked <= undecayed(model)
    for name, weight in model.named_parameters():
        is_spared = name in asked or weight.ndim <= 1 or name.endswith(".bias")
        if is_spared or name not in undecayed(model):
            assert found[name] == (0.0 if is_spared else 0.05), name


def test_the_candidates_scalars_and_their_backbones_tables_do_not_decay() -> None:
    model = build_model(ModelConfig("swin_pico", stem="candidates"), 6, 14, 56)
    model.compile()
    found = decay_of(build_optimiser(CONFIG, model), model)
    assert {"slope", "control_share"} <= undecayed(model)
    spared = {name for name, decay in found.items() if decay == 0}
    assert {name for name in found if "relative_position_bias_table" in name} | undecayed(model) <= spared
    assert len([name for name in spared if name.startswith("backbone.") and name.endswith("table")]) == 6
    assert found["weigh.0.weight"] == found["backbone.layers.0.blocks.0.mlp.fc1.weight"] == 0.05


def old_optimiser(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of earlier versions, which ignored the model's exemptions: no names, and tables decay too."""
    if config.optimiser == "adam":
        return torch.optim.Adam(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.AdamW(param_groups_weight_decay(model, config.weight_decay), config.learning_rate)


def step(model: nn.Module, optimiser: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    optimiser.step()


def trained(config: TrainConfig, build: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = build_model(ModelConfig("swin_nano"), CANVAS.channels, CANVAS.height, CANVAS.width)
    optimiser = build(config, model)  # type: ignore[operator]
    for seed in range(2):
        step(model, optimiser, seed)
    return model, optimiser


@pytest.mark.parametrize("builder", [old_optimiser, build_optimiser], ids=["old", "new"])
@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_a_checkpoints_optimiser_goes_on_as_it_began(builder: object, kind: str) -> None:
    """The next step is the same as without saving; each weight has its own moments and decay."""
    config = dataclasses.replace(CONFIG, optimiser=kind, learning_rate=0.1)
    model, optimiser = trained(config, builder)
    torch.manual_seed(1)
    other = build_model(ModelConfig("swin_nano"), CANVAS.channels, CANVAS.height, CANVAS.width)
    other.load_state_dict(model.state_dict())
    resumed = build_optimiser(config, other)
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    again = build_optimiser(config, other)
    again.load_state_dict(resumed.state_dict())  # a second time
    assert decay_of(resumed, other) == decay_of(again, other) == decay_of(optimiser, model)
    assert all(group["fused"] for group in again.param_groups)
    for seed in range(2, 4):
        step(model, optimiser, seed)
        step(other, again, seed)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_changed_weight_decay_is_followed_and_another_models_state_is_refused() -> None:
    model, optimiser = trained(CONFIG, build_optimiser)
    changed = build_optimiser(dataclasses.replace(CONFIG, weight_decay=0.3), model)
    changed.load_state_dict(optimiser.state_dict())
    assert {group["weight_decay"] for group in changed.param_groups} == {0.0, 0.3}
    other = build_model(ModelConfig("swin_pico"), CANVAS.channels, CANVAS.height, CANVAS.width)
    for state in (optimiser.state_dict(), old_optimiser(CONFIG, model).state_dict()):
        with pytest.raises(ValueError, match="groups of weights are not those of this model"):
            build_optimiser(CONFIG, other).load_state_dict(state)


def test_an_old_run_goes_on_with_the_groups_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = pack_tiny(tmp_path, train=30, test=2)
    config = tiny_config(manifest.root, tmp_path / "run", epochs=1, ema=0.9)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "build_optimiser", old_optimiser)
        patch.setattr(run_module, "FiniteWatch", lambda *_: Unwatched())
        train(config)
    before = group_sizes(config)
    train(dataclasses.replace(config, epochs=2, resume=True, override=("epochs",)))
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(math.isfinite(value) for line in lines for value in json.loads(line).values())
    assert group_sizes(config) == before
    with pytest.raises(InputError, match="optimiser's groups of weights"):
        train(dataclasses.replace(config, epochs=3, resume=True, override=("epochs", "weight_decay"), weight_decay=0.0))


class Unwatched:
    """Raises nothing, as this optimiser, which is not fused, takes no flag."""

    def add_loss(self, _: object) -> None: ...

    def before_update(self, *_: object) -> None: ...

    def check(self, *_: object) -> None: ...


def group_sizes(config: TrainConfig) -> list[int]:
    state = torch.load(config.run_dir / "checkpoints" / "last" / "optimizer.bin")
    return [len(group["params"]) for group in state["param_groups"]]
