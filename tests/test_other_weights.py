"""Weights that another program trained score as in their own network, or are refused by name."""

import csv
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from infer import InferConfig, infer
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from shard_tools.sample import read_snippets
from tests import twin
from tests.tiny import CANVAS, pack_tiny, tiny_config
from train import train
from training.metrics import sigmoid

STACK = dataclasses.replace(CANVAS, canvas="stack6")
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("other"))


def network(channels: int, outputs: int, **options: object) -> nn.Module:
    """A Swin of swin_nano's size, as another program makes it, whose scores differ between cadences."""
    torch.manual_seed(channels + 10 * outputs)
    sizes = {"embed_dim": 48, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 16), "img_size": (28, 56), **options}
    model: nn.Module = timm.create_model(
        "swin_tiny_patch4_window7_224", in_chans=channels, num_classes=outputs, **sizes
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.startswith("head.fc"):
                value.copy_(torch.randn_like(value) * 0.3)
    return model.eval()


class OwnHead(nn.Module):
    """A backbone without a head, followed by a linear layer, as in many notebooks."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = network(1, 0)
        self.fc = nn.Linear(384, 1)

    def forward(self, image: Tensor) -> Tensor:
        logit: Tensor = self.fc(self.backbone(image))
        return logit


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def as_in_older_timm(state: State) -> State:
    """The names of timm before version 0.9, and buffers that it saved."""
    older = {}
    for name, value in state.items():
        name = name.replace("head.fc.", "head.")
        older[re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name)] = value
    older["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    older["layers.0.blocks.1.attn_mask"] = torch.zeros(2, 49, 49)
    return older


FILES: dict[str, tuple[Callable[[], nn.Module], int, Callable[[State], object]]] = {
    "one channel, one logit": (lambda: network(1, 1), 1, lambda state: state),
    "three colours, two classes, of DDP and a compiler": (
        lambda: network(3, 2), 3, lambda state: prefixed(state, "module._orig_mod."),
    ),
    "a checkpoint of a training": (
        lambda: network(3, 1), 3,
        lambda state: {"epoch": 3, "optimizer": {"state": {}}, "model": prefixed(state, "model.") | {
            "criterion.pos_weight": torch.ones(1)}},
    ),
    "a head of its own name": (OwnHead, 1, lambda state: state),
    "of an older timm": (lambda: network(1, 1), 1, as_in_older_timm),
}  # fmt: skip


def scores_by_hand(manifest: Manifest, model: nn.Module, channels: int) -> dict[str, float]:
    """The network's own scores of the twin's images, repeated for each of its channels."""
    rows = manifest.rows("test")
    found = {}
    for key, snippet in zip(manifest.keys_of(rows), read_snippets(manifest, rows), strict=True):
        image = torch.from_numpy(twin.resize(twin.to_planes(snippet, STACK), STACK)).float()
        with torch.inference_mode():
            logit = model(image[None].repeat(1, channels, 1, 1))[0]
        found[key] = float(logit.softmax(0)[1] if len(logit) == 2 else logit.sigmoid())
    return found


def scores_in(path: Path) -> dict[str, float]:
    with path.open(newline="") as file:
        return {row["id"]: float(row["target"]) for row in csv.DictReader(file)}


def config_of(manifest: Manifest, out: Path, *weights: Path, **options: object) -> InferConfig:
    values = {"model": "swin_nano", "canvas": STACK, "batch_size": 4, "precision": "float32", **options}
    return InferConfig(manifest.root, weights, out, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", FILES)
def test_weights_of_another_program_score_as_their_own_network_does(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    build, channels, wrap = FILES[kind]
    model = build().eval()
    torch.save(wrap(dict(model.state_dict())), tmp_path / "theirs.pth")
    infer(config_of(manifest, tmp_path / "out.csv", tmp_path / "theirs.pth"))
    expected, found = scores_by_hand(manifest, model, channels), scores_in(tmp_path / "out.csv")
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(expected.values()) - min(expected.values()) > 0.01
    assert "theirs.pth  (of another program)" in capsys.readouterr().out


def test_one_file_under_two_models_shares_no_part(manifest: Manifest, tmp_path: Path) -> None:
    """Two networks may have parameters of equal names and shapes; these two pad differently."""
    torch.manual_seed(0)
    models = ["mobilenetv3_small_100", "tf_mobilenetv3_small_100"]
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model(models[0], in_chans=1, num_classes=1).state_dict(), path)
    found = []
    for place in (None, str(tmp_path / "scores")):
        for number, model in enumerate(models):
            config = config_of(manifest, tmp_path / f"{number}.csv", path, model=model)
            infer(dataclasses.replace(config, scores=place))
            found.append(scores_in(config.out))
    assert found[2:] == found[:2] and found[0] != found[1]


def test_weights_of_another_program_are_averaged_with_ones_own(manifest: Manifest, tmp_path: Path) -> None:
    model = network(1, 1)
    save_file(model.state_dict(), tmp_path / "theirs.safetensors")
    run = tiny_config(manifest.root, tmp_path / "run", epochs=1)
    train(run)
    files = [tmp_path / "theirs.safetensors", run.run_dir / "best.safetensors"]
    for name, weights in (("both", files), ("own", files[1:])):
        plain = {"model": None, "canvas": CANVAS.__class__()} if name == "own" else {}
        infer(config_of(manifest, tmp_path / f"{name}.csv", *weights, **plain))
    theirs, both, own = (
        scores_by_hand(manifest, model, 1), *(scores_in(tmp_path / f"{name}.csv") for name in ("both", "own"))
    )  # fmt: skip
    for key, score in both.items():
        mean = np.mean([np.log(each[key] / (1 - each[key])) for each in (theirs, own)])
        assert score == pytest.approx(float(sigmoid(mean)), abs=1e-3)


def with_two_layers(state: State) -> State:
    state = {name: value for name, value in state.items() if not name.startswith("head.fc")}
    return state | {"fc1.weight": torch.ones(384, 384), "fc2.weight": torch.ones(1, 384)}


REFUSED: dict[str, tuple[Callable[[], State], str]] = {
    "another head": (lambda: dict(network(1, 1000).state_dict()), "head.fc has 1000 outputs, expected 1, or 2"),
    "no head": (lambda: dict(network(1, 0).state_dict()), "0 linear layers could be its head"),
    "a head of two layers": (lambda: with_two_layers(network(1, 1).state_dict()), "2 linear layers could be its head"),
    "another number of channels": (lambda: dict(network(2, 1).state_dict()), "images of 2 channels, and --canvas"),
    "a larger image": (lambda: dict(network(1, 1, img_size=(56, 112)).state_dict()), "images of another size"),
    "a deeper network": (lambda: dict(network(1, 1, depths=(2, 2, 4, 2)).state_dict()), "has more than that model"),
    "a shallower network": (lambda: dict(network(1, 1, depths=(2, 2, 1, 2)).state_dict()), r"lacks layers\.2\.blocks"),
    "a wider network": (lambda: dict(network(1, 1, embed_dim=96).state_dict()), "other shapes|could be its head"),
    "one more layer": (lambda: network(1, 1).state_dict() | {"neck.weight": torch.ones(384)}, r"more .*neck\.weight"),
    "not a number": (
        lambda: network(1, 1).state_dict() | {"norm.bias": torch.full((384,), torch.nan)}, r"norm\.bias: not finite"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_weights_that_would_not_be_used_whole_are_refused_by_name(
    manifest: Manifest, tmp_path: Path, kind: str
) -> None:
    make, message = REFUSED[kind]
    torch.save(make(), tmp_path / "theirs.pth")
    with pytest.raises(InputError, match=rf"--weights .*theirs\.pth: .*({message})"):
        infer(config_of(manifest, tmp_path / "out.csv", tmp_path / "theirs.pth"))
    assert not (tmp_path / "out.csv").exists()


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


def test_no_code_of_a_weights_file_is_run(manifest: Manifest, tmp_path: Path) -> None:
    state = network(1, 1).state_dict() | {"more": Payload(tmp_path / "ran")}
    torch.save(state, tmp_path / "theirs.pth")
    with pytest.raises(InputError, match=r"--weights .*theirs\.pth: not a file of weights that can be read safely"):
        infer(config_of(manifest, tmp_path / "out.csv", tmp_path / "theirs.pth"))
    assert not (tmp_path / "ran").exists()


def test_a_model_is_asked_for_where_it_is_needed_and_only_there(manifest: Manifest, tmp_path: Path) -> None:
    out, theirs = tmp_path / "out.csv", tmp_path / "theirs.pth"
    torch.save(network(1, 1).state_dict(), theirs)
    with pytest.raises(InputError, match=r"theirs\.pth: .* give infer\.py its --model, --canvas"):
        infer(config_of(manifest, out, theirs, model=None, canvas=type(STACK)()))
    with pytest.raises(InputError, match=r"--canvas and its options .* need --model too"):
        config_of(manifest, out, theirs, model=None)
    run = tiny_config(manifest.root, tmp_path / "run", epochs=1)
    train(run)
    with pytest.raises(InputError, match=r"--model swin_nano: train\.py wrote all of these weights"):
        infer(config_of(manifest, out, run.run_dir / "best.safetensors"))
