"""The weights that come with the program are small, fit preset demo, and beat chance on skies they have not seen."""

import csv
from pathlib import Path

import pandas as pd
import pytest
import torch

from infer import InferConfig, infer
from shard_tools.errors import InputError
from shard_tools.pack import PackConfig, pack
from shard_tools.simulate import SimulateConfig, simulate
from training import load_model
from training.metrics import roc_auc
from training.model import ModelConfig, build_model
from training.presets import PRESETS
from training.weights import SHIPPED, SHIPPED_FINE, load_weights

DEMO = PRESETS["demo"]


def test_they_are_of_preset_demo_and_small() -> None:
    assert SHIPPED.stat().st_size < 10e6
    model, canvas = load_model("needlestream")
    assert canvas == DEMO.canvas and not model.training


def test_they_find_needles_without_training(tmp_path: Path) -> None:
    config = SimulateConfig(
        tmp_path / "data", train=4, test=80, positive_share=0.5, snr_min=500, snr_max=3000, seed=987, workers=1
    )
    simulate(config)
    shards = pack(PackConfig(tmp_path / "data", str(tmp_path / "shards"), folds=2, workers=1)).root
    infer(InferConfig((str(shards),), (Path("needlestream"),), tmp_path / "submission.csv"))
    truth = pd.read_csv(tmp_path / "data" / "truth.csv", dtype={"id": str}).set_index("id")["target"]
    with (tmp_path / "submission.csv").open(newline="") as file:
        scores = {row["id"]: float(row["target"]) for row in csv.DictReader(file)}
    assert roc_auc(truth[list(scores)].to_numpy(), list(scores.values())) > 0.9
    assert (tmp_path / "submission.report.html").is_file() and not (SHIPPED.parent / "report.html").exists()


def test_a_training_starts_from_them_and_another_network_refuses_them() -> None:
    config = ModelConfig("convnext_window", "needlestream", stem="sums")
    built = build_model(config, DEMO.canvas.channels, DEMO.canvas.height, DEMO.canvas.width).state_dict()
    expected, _ = load_weights(SHIPPED)
    assert built.keys() == expected.keys() and all(torch.equal(built[name], expected[name]) for name in expected)
    with pytest.raises(
        InputError, match=r"these weights are those of presets demo and fine .* not of --model swin_nano --stem no"
    ):
        ModelConfig("swin_nano", "needlestream")


@pytest.mark.skipif(SHIPPED_FINE.is_file(), reason="these weights were made here")
def test_the_error_for_fine_weights_that_are_missing_says_how_they_are_made() -> None:
    with pytest.raises(InputError, match=r"--pretrained needlestream-fine: .* `make weights-fine` trains them"):
        ModelConfig("convnext_window", "needlestream-fine", stem="sums")
    with pytest.raises(InputError, match=r"needlestream-fine.safetensors: .* `make weights-fine` trains them"):
        load_model("needlestream-fine")
