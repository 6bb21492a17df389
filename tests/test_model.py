"""The backbone's promises: any timm name, pretrained weights that fit, and a clear message if they do not."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from shard_tools.errors import InputError
from training.accelerator import pick_precision
from training.model import ModelConfig, build_model


@pytest.mark.parametrize("name", ["swin_nano", "resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_any_timm_model_takes_a_canvas_and_gives_one_logit(name: str) -> None:
    model = build_model(ModelConfig(name), channels=2, height=112, width=224).eval()
    with torch.inference_mode():
        assert model(torch.randn(2, 2, 112, 224)).shape == (2, 1)


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig("swin_nano"),
        ModelConfig("swin_pico", stem="candidates"),
        ModelConfig("convnext_window", stem="sums", candidates=4),
    ],
)
def test_near_scores_stay_apart_under_bf16_too(model: ModelConfig) -> None:
    torch.manual_seed(0)
    network = build_model(model, channels=6, height=56, width=56).eval()
    heads: list[torch.Tensor] = []
    getattr(network, "backbone", network).register_forward_hook(lambda *call: heads.append(call[2]))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        network(torch.randn(64, 6, 56, 56))
    assert heads[0].dtype == torch.float32
    assert (heads[0] != heads[0].bfloat16()).float().mean() > 0.9


def test_pretrained_weights_of_a_file_are_adapted_to_channels_and_canvas(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = timm.create_model("swin_tiny_patch4_window7_224", num_classes=1000)
    save_file(source.state_dict(), tmp_path / "swin.safetensors")
    torch.manual_seed(1)
    config = ModelConfig("swin_tiny_patch4_window7_224", str(tmp_path / "swin.safetensors"))
    model = build_model(config, channels=1, height=112, width=224)
    found, given = model.state_dict(), source.state_dict()
    name = "layers.2.blocks.1.mlp.fc1.weight"
    assert torch.equal(found[name], given[name])
    # One channel gives what a grey picture in all three channels would have given.
    convolved = given["patch_embed.proj.weight"].sum(dim=1, keepdim=True)
    assert torch.allclose(found["patch_embed.proj.weight"], convolved, atol=1e-6)


def test_a_file_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"something": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other.safetensors: does not fit swin_tiny"):
        build_model(ModelConfig("swin_tiny_patch4_window7_224", str(tmp_path / "other.safetensors")), 1, 224, 224)


def test_a_pickle_in_a_weights_file_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (Path.touch, (tmp_path / "run",))

    torch.save({"weights": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(InputError, match=r"trap\.pth"):
        build_model(ModelConfig("swin_nano", str(tmp_path / "trap.pth")), 1, 56, 56)
    assert not (tmp_path / "run").exists()


def test_an_unknown_model_is_refused_with_its_neighbours() -> None:
    with pytest.raises(InputError, match=r"--model swin_nanoo: timm has no such model.*swin_nano"):
        build_model(ModelConfig("swin_nanoo"), 1, 224, 224)


def test_the_precision_picked_for_a_cpu_is_one_it_has() -> None:
    assert pick_precision(torch.device("cpu")) in ("bf16", "no")
