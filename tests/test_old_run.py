"""This version reads what an earlier one wrote (tests/old_run.py says how that was made)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from infer import InferConfig
from infer import infer as predict_and_write
from pipeline.loader import LoaderConfig
from shard_tools.manifest import read_manifest
from shard_tools.pack import PackConfig, pack
from shard_tools.verify import verify
from tests.conftest import data_set_bytes
from tests.old_run import OLD_RUN, register_narrow_swin, train_words
from tests.tiny import write_tiny_data
from train import train
from training.accelerator import build_accelerator
from training.out_of_fold import read_scores
from training.prediction import PredictConfig, load_trained, predict_all
from training.presets import parse_train_config

SHARDS, CUT, WHOLE = OLD_RUN / "shards", OLD_RUN / "cut", OLD_RUN / "whole"
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # another processor sums in another order


@pytest.fixture(autouse=True)
def narrow_swin() -> None:
    register_narrow_swin()


def read_lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_old_shards_are_whole_and_packing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    assert list(verify(SHARDS)) == []
    data = write_tiny_data(tmp_path / "data", train=20, test=5, shape=(6, 7, 28))
    pack(PackConfig(data, tmp_path / "shards", folds=4, workers=1))
    assert data_set_bytes(tmp_path / "shards") == data_set_bytes(SHARDS)


def test_old_weights_give_the_logits_that_they_gave() -> None:
    manifest = read_manifest(SHARDS)
    trained = load_trained(CUT / "best.safetensors", manifest, tta=False)
    config = PredictConfig("train", 4, LoaderConfig())
    rows, (logit,) = predict_all(build_accelerator("float32"), manifest, [trained], config)
    found = dict(zip(manifest.keys_of(rows), logit.tolist(), strict=True))
    recorded = read_scores(CUT / "oof.csv")
    np.testing.assert_allclose([found[key] for key in recorded.keys], recorded.logit, **TOLERANCE)


def test_old_weights_give_the_submission_that_they_gave(tmp_path: Path) -> None:
    out = tmp_path / "submission.csv"
    weights = Path(shutil.copy(CUT / "best.safetensors", tmp_path))
    predict_and_write(InferConfig(str(SHARDS), (weights,), out, tta=True, precision="float32"))
    then, now = ((path.read_text().splitlines()) for path in (CUT / "submission.csv", out))
    assert [line.split(",")[0] for line in now] == [line.split(",")[0] for line in then]
    scores = [[float(line.split(",")[1]) for line in lines[1:]] for lines in (now, then)]
    np.testing.assert_allclose(*scores, **TOLERANCE)


def test_an_old_run_goes_on_to_the_figures_of_the_run_that_was_not_cut(tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(CUT, tmp_path / "run", symlinks=True))
    train(parse_train_config([*train_words(SHARDS, run_dir), "--resume"]))
    now, then = read_lines(run_dir / "metrics.jsonl"), read_lines(WHOLE / "metrics.jsonl")
    assert now[0] == read_lines(CUT / "metrics.jsonl")[0]
    assert len(now) == len(then) == 2
    for name in ("loss", "auc", "average_precision", "learning_rate"):
        np.testing.assert_allclose(now[1][name], then[1][name], **TOLERANCE)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run_dir, WHOLE)]
    assert summaries[0].keys() == summaries[1].keys()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (run_dir, WHOLE)]
    free = {"run_dir": "", "shards": "", "resume": False}
    assert {**configs[0], **free} == {**configs[1], **free}
