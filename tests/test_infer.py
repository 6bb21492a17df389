"""Prediction's promises: the right ids, the right averages, and nothing but whole submissions."""

import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from infer import InferConfig, infer
from metrics import sigmoid
from model import ModelConfig, build_model, fill_model, load_weights, save_weights
from page import read_section
from sections import write_prediction_report
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.trivial import read_snippets
from tests import twin
from tests.tiny import CANVAS, pack_tiny

ABOUT = {
    "model": "swin_nano",
    "canvas": dataclasses.asdict(CANVAS),
    "shape": [6, 14, 56],
    "fold": 0,
    "auc": 0.5,
    "shards_identity": "",
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("infer"))


def write_weights(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    state = build_model(ModelConfig("swin_nano"), 2, 28, 56).state_dict()
    state["head.fc.weight"] *= 40  # so that scores differ
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, state, ABOUT)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("weights")
    return [write_weights(folder / f"{seed}.safetensors", seed) for seed in (1, 2)]


def config_of(manifest: Manifest, weights: list[Path], out: Path, **options: object) -> InferConfig:
    values = {"batch_size": 4, "precision": "float32", **options}
    return InferConfig(manifest.root, tuple(weights), out, **values)  # type: ignore[arg-type]


def scores_in(path: Path) -> dict[str, float]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {row["id"]: float(row["target"]) for row in rows}
    assert len(found) == len(rows)
    return found


def logits_by_hand(manifest: Manifest, path: Path, views: tuple[str, ...]) -> dict[str, float]:
    """The twin's canvases through the model, view by view."""
    model = build_model(ModelConfig("swin_nano"), 2, 28, 56).eval()
    fill_model(model, load_weights(path)[0], str(path))
    rows = manifest.rows("test")
    found = {}
    for key, snippet in zip(manifest.keys_of(rows), read_snippets(manifest, rows), strict=True):
        image = twin.canvas_of(twin.planes_of(snippet, CANVAS), CANVAS)
        with torch.inference_mode():
            logits = model(torch.from_numpy(twin.views_of(image, views)).float())
        found[key] = float(logits.double().mean())
    return found


def test_the_submission_has_the_sample_submissions_ids_in_its_order(
    manifest: Manifest, weights: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    infer(config_of(manifest, weights[:1], tmp_path / "submission.csv"))
    with (manifest.root.parent / "data" / "sample_submission.csv").open(newline="") as file:
        expected = [row["id"] for row in csv.DictReader(file)]
    found = scores_in(tmp_path / "submission.csv")
    assert list(found) == expected and expected != sorted(expected)
    assert all(0 <= score <= 1 for score in found.values())
    assert (tmp_path / "candidates.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "submission.csv" in said and "candidates.png" in said and "1.safetensors" in said and "ROC AUC" in said


@pytest.mark.parametrize("tta", [False, True])
def test_scores_are_the_mean_logit_over_weights_and_views(
    manifest: Manifest, weights: list[Path], tmp_path: Path, tta: bool
) -> None:
    infer(config_of(manifest, weights, tmp_path / "submission.csv", tta=tta))
    views = CANVAS.views if tta else CANVAS.views[:1]
    each = [logits_by_hand(manifest, path, views) for path in weights]
    found = scores_in(tmp_path / "submission.csv")
    expected = {key: float(sigmoid(np.array((each[0][key] + each[1][key]) / 2))) for key in each[0]}
    assert found == pytest.approx(expected, abs=2e-3)
    assert len({round(score, 3) for score in found.values()}) > 3


def test_the_training_split_is_scored_with_its_roc_auc(
    manifest: Manifest, weights: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    infer(config_of(manifest, weights[:1], tmp_path / "train.csv", split="train"))
    assert set(scores_in(tmp_path / "train.csv")) == set(manifest.keys_of(manifest.rows("train")))
    assert "on the train split: 0." in capsys.readouterr().out


def incomplete(tmp_path: Path) -> Manifest:
    """Shards that lack one snippet of the submission."""
    from shard_tools.pack import PackConfig, pack
    from tests.tiny import write_tiny_data

    data = write_tiny_data(tmp_path / "data", 20, 6)
    next((data / "test").rglob("*.npy")).unlink()
    return pack(PackConfig(data, tmp_path / "shards", allow_missing=True))


def test_ids_without_a_snippet_are_an_error_or_get_the_score_they_are_told(weights: list[Path], tmp_path: Path) -> None:
    manifest = incomplete(tmp_path)
    out = tmp_path / "submission.csv"
    with pytest.raises(InputError, match=r"1 of the 6 ids .* --fill-missing"):
        infer(config_of(manifest, weights[:1], out))
    assert not out.exists()
    infer(config_of(manifest, weights[:1], out, fill_missing=0.25))
    assert len(scores_in(out)) == 6 and 0.25 in scores_in(out).values()


def broken_weights(kind: str, good: Path, folder: Path) -> Path:
    path = folder / "weights.safetensors"
    state, about = load_weights(good)
    if kind == "text":
        path.write_text("not weights")
    elif kind == "cut":
        path.write_bytes(good.read_bytes()[:5000])
    elif kind == "unfit":
        save_weights(path, {**state, "head.fc.weight": torch.zeros(2, 3)}, about)
    elif kind == "foreign":
        save_weights(path, state, {"model": "swin_nano"})
    elif kind == "shape":
        save_weights(path, state, {**about, "shape": [6, 16, 56]})
    elif kind == "nan":
        save_weights(path, {name: torch.full_like(value, float("nan")) if value.is_floating_point() else value
                            for name, value in state.items()}, about)  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such weights"),
        ("text", "not a safetensors file"),
        ("cut", "not a safetensors file"),
        ("unfit", "do not fit the model"),
        ("foreign", "another version of the program"),
        ("shape", r"trained on snippets of shape \(6, 16, 56\)"),
        ("nan", "score nan"),
    ],
)
def test_bad_weights_are_refused_by_name_and_an_earlier_submission_stays(
    manifest: Manifest, weights: list[Path], tmp_path: Path, kind: str, message: str
) -> None:
    out = tmp_path / "submission.csv"
    out.write_text("earlier")
    with pytest.raises(InputError, match=message) as error:
        infer(config_of(manifest, [broken_weights(kind, weights[0], tmp_path)], out))
    assert "weights.safetensors" in str(error.value) or "submission.csv" in str(error.value)
    assert out.read_text() == "earlier"


def test_a_shard_cut_short_leaves_no_submission(manifest: Manifest, weights: list[Path], tmp_path: Path) -> None:
    shutil.copytree(manifest.root, tmp_path / "shards")
    copy = read_manifest(tmp_path / "shards")
    shard = copy.root / next(each.name for each in copy.shards if each.name.startswith("test"))
    os.truncate(shard, 20_000)
    with pytest.raises(InputError, match=shard.name):
        infer(config_of(copy, weights[:1], tmp_path / "submission.csv"))
    assert not (tmp_path / "submission.csv").exists()


def test_impossible_options_are_refused_by_name(manifest: Manifest, tmp_path: Path) -> None:
    for options, message in [({"batch_size": 0}, "--batch-size 0"), ({"fill_missing": 2.0}, "--fill-missing 2")]:
        with pytest.raises(InputError, match=message):
            config_of(manifest, [tmp_path], tmp_path, **options)
    with pytest.raises(InputError, match="--weights"):
        config_of(manifest, [], tmp_path)


def test_weights_carry_what_is_needed_to_use_them(weights: list[Path]) -> None:
    state, about = load_weights(weights[0])
    assert about == json.loads(json.dumps(ABOUT))
    fill_model(build_model(ModelConfig("swin_nano"), 2, 28, 56), state, "here")


def test_a_pipe_gets_the_submission_and_nothing_is_written_beside_it(
    manifest: Manifest, weights: list[Path], tmp_path: Path
) -> None:
    """Into the run's own page neither: a pipe is read once and gone."""
    run_dir, pipe = tmp_path / "run", tmp_path / "pipe"
    run_dir.mkdir()
    (run_dir / "config.json").write_text("{}")
    shutil.copy(weights[0], run_dir / "best.safetensors")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    infer(config_of(manifest, [run_dir / "best.safetensors"], pipe))
    found = os.read(reader, 1 << 16)
    os.close(reader)
    assert found.startswith(b"id,target\n") and found.count(b"\n") == 12
    assert pipe.is_fifo() and sorted(path.name for path in tmp_path.iterdir()) == ["pipe", "run"]
    assert sorted(path.name for path in run_dir.iterdir()) == ["best.safetensors", "config.json"]


def test_a_second_prediction_with_a_runs_weights_leaves_the_first_on_its_page(
    manifest: Manifest, weights: list[Path], tmp_path: Path
) -> None:
    """Each submission has a section of its own, which alone is replaced when it is made again."""
    (tmp_path / "config.json").write_text("{}")
    shutil.copy(weights[0], tmp_path / "best.safetensors")
    rows = manifest.rows("test")[:1].astype(np.int64)

    def predict_to(name: str, score: float) -> None:
        out = tmp_path / name
        write_prediction_report([tmp_path / "best.safetensors"], out, "test", manifest, rows, np.array([score]), 1)

    for name, score in (("one.csv", 0.125), ("two.csv", 0.25), ("three.csv", 0.5), ("two.csv", 0.75)):
        predict_to(name, score)
    sections = [read_section(path) for path in sorted((tmp_path / "report").glob("*.json"))]
    assert [section.about.partition(",")[0] for section in sections] == ["one.csv", "two.csv", "three.csv"]
    page = (tmp_path / "report.html").read_text()
    assert [f"score {score:.4f}" in page for score in (0.125, 0.25, 0.5, 0.75)] == [True, False, True, True]
