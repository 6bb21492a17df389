"""Cross-validation's promises: each fold an ordinary run, each training key scored by weights that never saw it."""

import csv
import dataclasses
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score, roc_auc_score
from timm.models.swin_transformer import SwinTransformer

from infer import InferConfig, infer
from reports.plots import write_roc
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from shard_tools.pack import PackConfig, pack
from tests.conftest import logged
from tests.launch import command_line, flags
from tests.test_resume import read_history, steps_done, wait_for_step
from tests.tiny import tiny_config, write_tiny_data
from train import EXIT_PREEMPTED, train
from training.accelerator import build_accelerator
from training.config import TrainConfig
from training.cross_validation import check_folds, plan_folds, train_folds, write_cross_validation
from training.model import ModelConfig
from training.presets import parse_train_config

ROOT = Path(__file__).resolve().parents[1]
FOLDS = 3


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("folds")
    write_tiny_data(folder / "data", train=50, test=8)
    return pack(PackConfig(folder / "data", folder / "shards", folds=FOLDS, workers=2, shard_mb=1))


def all_folds(manifest: Manifest, run_dir: Path, **changes: object) -> TrainConfig:
    values = {"fold": "all", "epochs": 1, "model": ModelConfig("swin_nano"), **changes}
    return tiny_config(manifest.root, run_dir, **values)


@pytest.fixture(scope="module")
def trained(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished cross-validation, made in this process."""
    config = all_folds(manifest, tmp_path_factory.mktemp("trained") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        train_folds(config, train, write_roc)
    return config


def start(config: TrainConfig, processes: int = 1) -> subprocess.Popen[str]:
    words = command_line("train.py", *flags(config), "--fold", "all", "--resume", processes=processes)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*words, "--checkpoint-every", "1"], cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def check_scores(config: TrainConfig, manifest: Manifest) -> None:
    """Check that every training key has its fold's score once, in the manifest's order, and check the metrics."""
    with (config.run_dir / "oof.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = manifest.rows("train")
    assert [line["id"] for line in lines] == manifest.keys_of(rows)
    assert [int(line["fold"]) for line in lines] == manifest.fold[rows].tolist()
    target, score = (
        np.array([int(line["target"]) for line in lines]),
        np.array([float(line["score"]) for line in lines]),
    )
    assert target.tolist() == manifest.target[rows].tolist()
    summary = json.loads((config.run_dir / "cv.json").read_text())
    assert summary["auc"] == roc_auc_score(target, score) and summary["cadences"] == len(rows)
    assert summary["average_precision"] == average_precision_score(target, score)
    aucs = []
    for number in range(FOLDS):
        folder = config.run_dir / f"fold{number}"
        aucs.append(json.loads((folder / "summary.json").read_text())["auc"])
        with (folder / "oof.csv").open(newline="") as file:
            expected = [(line["id"], line["score"]) for line in csv.DictReader(file)]
        assert expected == [(line["id"], line["score"]) for line in lines if int(line["fold"]) == number]
    assert summary["fold_auc"] == aucs
    assert summary["fold_auc_mean"] == pytest.approx(np.mean(aucs))
    assert summary["fold_auc_std"] == pytest.approx(statistics.stdev(aucs))
    assert (config.run_dir / "roc.png").read_bytes().startswith(b"\x89PNG")


def test_every_training_key_is_scored_once_by_weights_that_never_saw_it(
    manifest: Manifest, trained: TrainConfig
) -> None:
    check_scores(trained, manifest)


def test_a_fold_of_all_is_the_run_of_that_fold_bit_for_bit(
    manifest: Manifest, trained: TrainConfig, tmp_path: Path
) -> None:
    alone = dataclasses.replace(trained, fold=2, run_dir=tmp_path / "alone")
    train(alone)
    folder = trained.run_dir / "fold2"
    assert (folder / "oof.csv").read_bytes() == (alone.run_dir / "oof.csv").read_bytes()
    assert read_history(folder) == read_history(alone.run_dir)
    ours, theirs = (load_file(path / "best.safetensors") for path in (folder, alone.run_dir))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_finished_fold_is_not_trained_again_and_no_model_of_one_stays_in_memory(trained: TrainConfig) -> None:
    """Each model is freed before the next is built."""
    weights = [trained.run_dir / f"fold{number}" / "best.safetensors" for number in range(FOLDS)]
    before = [path.stat().st_mtime_ns for path in weights]
    scores = (trained.run_dir / "oof.csv").read_bytes()
    alive: list[int] = []

    def count_and_train(config: TrainConfig) -> None:
        alive.append(sum(issubclass(type(each), SwinTransformer) for each in gc.get_objects()))
        train(config)

    gc.collect()
    train_folds(dataclasses.replace(trained, resume=True), count_and_train, write_roc)
    assert len(alive) == FOLDS and alive[1:] == [alive[0]] * (FOLDS - 1)
    assert before == [path.stat().st_mtime_ns for path in weights]
    assert scores == (trained.run_dir / "oof.csv").read_bytes()


def test_an_interrupted_cross_validation_goes_on_in_its_fold_on_another_number_of_ranks(
    manifest: Manifest, trained: TrainConfig, tmp_path: Path
) -> None:
    """Preempted in the second fold on one rank and finished on two, it ends as if it had not stopped."""
    config = all_folds(manifest, tmp_path / "run")
    runs = plan_folds(config, manifest)
    process = start(config)
    wait_for_step(runs[1], 1, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_PREEMPTED and "--resume" in said, said
    stopped_at = steps_done(runs[1])
    assert 1 <= stopped_at < 5 and not runs[2].run_dir.exists() and not (config.run_dir / "cv.json").exists()
    weights = (runs[0].run_dir / "best.safetensors").stat().st_mtime_ns
    process = start(dataclasses.replace(config, batch_size=4), processes=2)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert f"going on after step {stopped_at}" in said and "on 2 ranks" in said
    assert weights == (runs[0].run_dir / "best.safetensors").stat().st_mtime_ns
    check_scores(config, manifest)
    assert f"ROC AUC {json.loads((config.run_dir / 'cv.json').read_text())['auc']:.4f}" in said
    for ours, theirs in zip(runs, plan_folds(trained, manifest), strict=True):
        found, expected = (read_history(each.run_dir)[0]["loss"] for each in (ours, theirs))
        assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-2, "resume": True}, r"fold2: .*learning_rate: 0.001 then, 0.01 now"),
        ({}, r"fold2: not empty .* --resume"),
    ],
)
def test_a_fold_of_another_run_is_refused_before_any_fold_is_trained(
    manifest: Manifest, trained: TrainConfig, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    config = dataclasses.replace(trained, run_dir=tmp_path, **changes)  # type: ignore[arg-type]
    (tmp_path / "fold2").mkdir()
    (tmp_path / "fold2" / "config.json").write_bytes((trained.run_dir / "fold2" / "config.json").read_bytes())
    with pytest.raises(InputError, match=message):
        train_folds(config, train, write_roc)
    assert not (tmp_path / "fold0").exists()


def test_the_folder_of_a_run_of_one_fold_is_refused(manifest: Manifest, trained: TrainConfig) -> None:
    with pytest.raises(InputError, match=r"fold1: holds the run of one fold"):
        train_folds(dataclasses.replace(trained, run_dir=trained.run_dir / "fold1", resume=True), train, write_roc)


def test_folds_that_cannot_be_judged_are_refused_by_number(manifest: Manifest, tmp_path: Path) -> None:
    config = all_folds(manifest, tmp_path / "run")
    runs, accelerator = plan_folds(config, manifest), build_accelerator("float32")
    one_class = dataclasses.replace(manifest, target=np.where(manifest.fold == 1, 0, manifest.target).astype(np.int8))
    with pytest.raises(InputError, match="--fold 1: holds one class only"):
        check_folds(config, runs, accelerator, one_class)
    astray = dataclasses.replace(manifest, fold=np.where(manifest.fold == 1, 7, manifest.fold).astype(np.int8))
    with pytest.raises(InputError, match="training samples outside its 3 folds"):
        check_folds(config, runs, accelerator, astray)


@pytest.mark.parametrize("damage", ["id,target,score\n", "one\n", None])
def test_scores_that_do_not_fit_their_fold_are_refused_by_name(
    manifest: Manifest, trained: TrainConfig, damage: str | None
) -> None:
    path = trained.run_dir / "fold1" / "oof.csv"
    whole, before = path.read_text(), (trained.run_dir / "cv.json").read_bytes()
    first = whole.splitlines()[1]
    path.write_text(whole + first + "\n" if damage is None else damage)
    try:
        with pytest.raises(InputError, match=r"fold1.oof\.csv: expected a score for each of the 17 ids"):
            write_cross_validation(trained.run_dir, plan_folds(trained, manifest), manifest, write_roc)
    finally:
        path.write_text(whole)
    assert (trained.run_dir / "cv.json").read_bytes() == before


def test_scores_of_older_runs_without_logits_are_joined_as_they_were(manifest: Manifest, trained: TrainConfig) -> None:
    path = trained.run_dir / "fold1" / "oof.csv"
    whole, before = path.read_text(), json.loads((trained.run_dir / "cv.json").read_text())
    joined = (trained.run_dir / "oof.csv").read_text()
    path.write_text("".join(f"{line.rpartition(',')[0]}\n" for line in whole.splitlines()))
    try:
        write_cross_validation(trained.run_dir, plan_folds(trained, manifest), manifest, write_roc)
        after = json.loads((trained.run_dir / "cv.json").read_text())
        for name in ("auc", "average_precision", "fold_auc"):
            assert after[name] == pytest.approx(before[name]), name
        found, expected = (
            [float(line["score"]) for line in csv.DictReader(text.splitlines())]
            for text in ((trained.run_dir / "oof.csv").read_text(), joined)
        )
        assert found == pytest.approx(expected)
    finally:
        path.write_text(whole)
    write_cross_validation(trained.run_dir, plan_folds(trained, manifest), manifest, write_roc)
    assert (trained.run_dir / "oof.csv").read_text() == joined


def test_a_fold_is_a_number_or_all() -> None:
    words = ["--shards", "s", "--run-dir", "r", "--fold"]
    assert parse_train_config([*words, "all"]).fold == "all" and parse_train_config([*words, "3"]).held_out == 3
    with pytest.raises(InputError, match=r"--fold -1: expected at least 0, or all"):
        parse_train_config([*words, "-1"])
    for wrong in ("every", "1.5"):
        with pytest.raises(SystemExit):
            parse_train_config([*words, wrong])


@pytest.mark.parametrize(
    ("fold", "trains", "predicts"),
    [
        ((), "--run-dir RUN --preset demo --resume", "--weights RUN/best.safetensors --tta --out RUN/submission.csv"),
        (
            ("FOLD=2",),
            "--run-dir RUN/fold2 --preset demo --fold 2 --resume",
            "--weights RUN/fold2/best.safetensors --tta --out RUN/fold2/submission.csv",
        ),
        (
            ("FOLD=all",),
            "--run-dir RUN --preset demo --fold all --resume",
            "--weights RUN/fold*/best.safetensors --tta --out RUN/submission.csv",
        ),
    ],
)
def test_make_trains_and_predicts_with_the_folds_that_it_is_told(
    manifest: Manifest, tmp_path: Path, fold: tuple[str, ...], trains: str, predicts: str
) -> None:
    words = ["make", "-n", "infer", f"PYTHON={sys.executable}", f"SHARDS={manifest.root}", "DATA=d", "PRESET=demo"]
    done = subprocess.run(
        [*words, f"RUN={tmp_path}", *fold], cwd=ROOT, capture_output=True, text=True, check=True
    )  # fmt: skip
    said = [line.replace(str(tmp_path), "RUN").strip() for line in done.stdout.splitlines()]
    assert [line.split("train.py ")[1] for line in said if "train.py" in line] == [f"--shards {manifest.root} {trains}"]
    assert [line.split("infer.py ")[1] for line in said if "infer.py" in line] == [
        f"--shards {manifest.root} {predicts}"
    ]


def test_make_predicts_with_the_weights_of_every_fold(manifest: Manifest, trained: TrainConfig) -> None:
    words = ["make", "infer", "PYTHON=echo", f"SHARDS={manifest.root}", "DATA=d", "FOLD=all", f"RUN={trained.run_dir}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    weights = " ".join(str(one.run_dir / "best.safetensors") for one in plan_folds(trained, manifest))
    assert f"\ninfer.py --shards {manifest.root} --weights {weights} --tta" in f"\n{done.stdout}"
    assert "echo train.py" not in done.stdout


def test_folds_are_averaged_by_rank_and_a_split_that_they_were_trained_on_is_named(
    manifest: Manifest, trained: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = tuple(one.run_dir / "best.safetensors" for one in plan_folds(trained, manifest))
    config = InferConfig(manifest.root, weights, tmp_path / "test.csv", precision="float32", average="ranks")
    infer(config)
    assert not logged(caplog)
    infer(dataclasses.replace(config, out=tmp_path / "train.csv", split="train"))
    assert "trained on this split" in caplog.text and "oof.csv" in caplog.text
    for name, count in (("test.csv", 8), ("train.csv", 50)):
        with (tmp_path / name).open(newline="") as file:
            scores = [float(line["target"]) for line in csv.DictReader(file)]
        # With any order and any ties the mean score is that of 1 / count, ..., count / count.
        assert sum(scores) == pytest.approx((1 + count) / 2) and len(set(scores)) > 3
