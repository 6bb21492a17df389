"""Exported models give equal logits in other programs, and are described by the figures of their own run."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from huggingface_hub import ModelCard

from pipeline.canvas import CanvasConfig
from shard_tools.errors import InputError
from tests.conftest import ROOT
from tests.test_infer import ABOUT, write_weights
from tests.tiny import CANVAS, pack_tiny, tiny_config
from train import train
from training.export import ExportConfig, export
from training.model import ModelConfig, build_model
from training.out_of_fold import read_scores
from training.prediction import load_model
from training.weights import load_weights, save_weights


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "run" / "best.safetensors", 1)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ACCELERATE_USE_CPU", "true")
        train(tiny_config(pack_tiny(folder).root, folder / "run", epochs=2))
    return folder / "run"


def images(count: int, canvas: CanvasConfig = CANVAS) -> torch.Tensor:
    shape = (count, canvas.channels, canvas.height, canvas.width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def logits_of(weights: Path, image: torch.Tensor) -> np.ndarray:
    model, _ = load_model(weights, "cpu")
    with torch.inference_mode():
        return model(image).numpy()


@pytest.mark.parametrize("count", [1, 5])
def test_onnx_runtime_gives_the_models_logits_for_any_batch(weights: Path, tmp_path: Path, count: int) -> None:
    export(ExportConfig(weights, tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    image = images(count)
    (found,) = session.run(["logit"], {"image": image.numpy()})
    expected = logits_of(weights, image)
    assert expected.std() > 0.1 or count == 1
    np.testing.assert_allclose(found, expected, atol=1e-4)
    (entry,) = [entry for entry in onnx.load(tmp_path / "model.onnx").metadata_props if entry.key == "canvas"]
    assert CanvasConfig(**json.loads(entry.value)) == CANVAS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "run"]


def test_the_command_says_what_it_wrote_in_one_line(weights: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "training.export", "--weights", str(weights), "--out", str(tmp_path / "model.onnx")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"exported:    {tmp_path / 'model.onnx'}  (ONNX Runtime gives the same logits)\n"


def test_timm_loads_the_folder_for_the_hub_and_gives_the_models_logits(weights: Path, tmp_path: Path) -> None:
    export(ExportConfig(weights, tmp_path / "hub"))
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    with torch.inference_mode():
        found = model(images(5)).numpy()
    np.testing.assert_allclose(found, logits_of(weights, images(5)), atol=1e-5)
    assert (logits_of(tmp_path / "hub" / "model.safetensors", images(5)) == logits_of(weights, images(5))).all()


def with_a_search(tmp_path: Path) -> tuple[Path, CanvasConfig]:
    canvas = CanvasConfig("panels", 14, 56, normalise=False)
    torch.manual_seed(0)
    state = build_model(ModelConfig("convnext_window", stem="sums", candidates=1), 6, 14, 56).state_dict()
    about = {**ABOUT, "model": "convnext_window", "stem": "sums", "candidates": 1, "canvas": dataclasses.asdict(canvas)}
    save_weights(tmp_path / "best.safetensors", state, about)
    return tmp_path / "best.safetensors", canvas


def test_a_model_with_a_search_goes_to_the_hub_but_not_to_onnx(tmp_path: Path) -> None:
    weights, canvas = with_a_search(tmp_path)
    export(ExportConfig(weights, tmp_path / "hub"))
    image = images(3, canvas)
    assert (logits_of(tmp_path / "hub" / "model.safetensors", image) == logits_of(weights, image)).all()
    assert "timm" not in ModelCard.load(tmp_path / "hub" / "README.md").data.to_dict()["library_name"]
    with pytest.raises(InputError, match=r"model\.onnx: a model with --stem sums .* give a folder"):
        export(ExportConfig(weights, tmp_path / "model.onnx"))
    assert not (tmp_path / "model.onnx").exists()


def test_the_card_has_the_figures_of_the_run(run_dir: Path, tmp_path: Path) -> None:
    export(ExportConfig(run_dir / "best.safetensors", tmp_path / "hub"))
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    auc = json.loads((run_dir / "summary.json").read_text())["auc"]
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert card.data.library_name == "timm" and figures["ROC AUC"] == auc and "average precision" in figures
    assert f"| ROC AUC | {auc:.4f} |" in card.text and "Of 10 cadences, 5 with a needle." in card.text
    assert '"learning_rate": 0.001' in card.text and "2 epochs" in card.text
    assert json.dumps(dataclasses.asdict(CANVAS), indent=1) in card.text
    assert str(run_dir.parent) not in card.content  # no path of this machine


def test_scores_of_other_weights_beside_them_are_no_figures_of_the_card(run_dir: Path, tmp_path: Path) -> None:
    state, about = load_weights(run_dir / "best.safetensors")
    (tmp_path / "oof.csv").write_bytes((run_dir / "oof.csv").read_bytes())
    assert read_scores(tmp_path / "oof.csv").keys
    save_weights(tmp_path / "best.safetensors", state, {**about, "auc": 0.123})
    export(ExportConfig(tmp_path / "best.safetensors", tmp_path / "hub"))
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert [result.metric_value for result in card.data.eval_results] == [0.123]
    assert "there are no other figures" in card.text


def test_an_export_with_other_logits_is_refused(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here timm builds another network from the folder, and its logits are compared."""
    create = timm.create_model

    def create_other(name: str, **options: object) -> torch.nn.Module:
        model = create(name, **options)
        if name.startswith("local-dir:"):
            torch.nn.init.zeros_(model.head.fc.weight)
        return model

    monkeypatch.setattr(timm, "create_model", create_other)
    with pytest.raises(InputError, match=r"hub: timm gives logits .* expected"):
        export(ExportConfig(weights, tmp_path / "hub"))


def test_what_onnx_needs_is_named_where_it_is_not_installed(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs onnx and onnxscript; pip install onnx onnxscript"):
        export(ExportConfig(weights, tmp_path / "model.onnx"))
