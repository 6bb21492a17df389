"""Training's promises, on a data set that trains in seconds."""

import csv
import dataclasses
import json
import math
import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train as train_module
from pipeline.augment import DrawConfig
from pipeline.canvas import CanvasConfig
from pipeline.loader import Batch, Loader, LoaderConfig
from pipeline.plan import Order, Share
from pipeline.stall import StallTimer
from shard_tools.errors import InputError
from shard_tools.kaggle_layout import LABELS
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.pack import PackConfig, pack
from tests.launch import command_line, flags
from tests.tiny import CANVAS, pack_tiny, tiny_config, write_tiny_data
from train import train
from training.accelerator import build_accelerator
from training.checkpoint import save_checkpoint
from training.config import TrainConfig
from training.metrics import roc_auc
from training.model import ModelConfig
from training.prediction import predict_rows
from training.presets import PRESETS, parse_train_config
from training.run import Run, build_optimiser, build_run, build_schedule

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("train"))


def read_history(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def launch(script: str, *arguments: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    words = command_line(script, *arguments, processes=processes)
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_a_run_leaves_everything_it_promises(manifest: Manifest, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(tiny_config(manifest.root, run_dir, fold=1, report=True))
    names = {path.name for path in run_dir.iterdir()}
    promised = {
        "config.json",
        "metrics.jsonl",
        "norms.jsonl",
        "curves.png",
        "roc.png",
        "best.safetensors",
        "oof.csv",
        "summary.json",
        "report.html",
    }
    assert promised <= names
    history = read_history(run_dir)
    with (run_dir / "oof.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    held_out = manifest.rows("train", 1, held_out=True)
    assert [row["id"] for row in rows] == manifest.keys_of(held_out)
    auc = roc_auc(np.array([int(row["target"]) for row in rows]), np.array([float(row["score"]) for row in rows]))
    best = max(line["auc"] for line in history)
    assert auc == best == json.loads((run_dir / "summary.json").read_text())["auc"]
    assert len(history) == 2 and all(math.isfinite(value) for line in history for value in line.values())
    assert all(line["cadences_per_s"] > 0 and 0 <= line["stall"] <= 1 for line in history)
    assert (run_dir / "checkpoints" / "last").is_dir() and (run_dir / "checkpoints" / "best").is_dir()


def test_the_wait_for_batches_counts_as_stall_and_the_work_on_them_does_not(manifest: Manifest) -> None:
    rows = manifest.rows("train")
    order = Order(rows, manifest.target[rows], "sequential")
    loader = Loader(manifest, order, Share(len(rows), 8), CANVAS)
    batch = next(iter(loader))
    loader.close()

    def late() -> Iterator[Batch]:
        for _ in range(3):
            time.sleep(0.02)
            yield batch

    timed, began = StallTimer(late(), torch.device("cpu")), time.perf_counter()
    for found in timed:
        assert found is batch
        time.sleep(0.03)
    assert timed.seconds >= 3 * 0.02  # even on a busy machine, as a sleep is never too short
    assert time.perf_counter() - began - timed.seconds >= 3 * 0.03


def test_a_run_learns_what_there_is_to_learn(manifest: Manifest, tmp_path: Path) -> None:
    config = tiny_config(manifest.root, tmp_path / "run", epochs=12, draws=DrawConfig(cutmix=0), ema=0.9)
    train(config)
    history = read_history(config.run_dir)
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    assert max(line["auc"] for line in history) > 0.9


class Killed(BaseException):
    """Ends a run as a power cut might."""


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"epochs": 3, "checkpoint_every": 2, "ema": 0.9, "sampling": "weighted"}
    whole, cut = (tiny_config(manifest.root, tmp_path / name, **options) for name in ("whole", "cut"))
    train(whole)
    saved = []

    def save_and_die(*arguments: object, **options: object) -> None:
        save_checkpoint(*arguments, **options)  # type: ignore[arg-type]
        saved.append(arguments[2])
        raise Killed

    # Every start gets to one more checkpoint, in the middle of an epoch or at its end.
    monkeypatch.setattr(train_module, "save_checkpoint", save_and_die)
    config = cut
    while True:
        try:
            train(config)
            break
        except Killed:
            config = dataclasses.replace(cut, resume=True)
    assert saved == [2, 4, 5, 6, 8, 10, 12, 14, 15, 15]  # the last epoch's before and after its validation
    timings = {"cadences_per_s", "stall", "validation_s"}
    for ours, theirs in zip(read_history(whole.run_dir), read_history(cut.run_dir), strict=True):
        assert {k: v for k, v in ours.items() if k not in timings} == {
            k: v for k, v in theirs.items() if k not in timings
        }
    norms = [(config.run_dir / "norms.jsonl").read_text() for config in (whole, cut)]
    assert norms[0] == norms[1] and '"step": 10,' in norms[0]
    ours, theirs = (load_file(config.run_dir / "best.safetensors") for config in (whole, cut))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_accumulated_steps_equal_large_batches(manifest: Manifest, tmp_path: Path) -> None:
    """Equal global batches give equal steps, also in the short step at the end of an epoch."""
    common = {"epochs": 1, "model": ModelConfig("swin_nano")}
    large = tiny_config(manifest.root, tmp_path / "large", batch_size=12, **common)
    split = tiny_config(manifest.root, tmp_path / "split", batch_size=4, accumulate=3, **common)
    train(large)
    train(split)
    ours, theirs = read_history(large.run_dir)[0], read_history(split.run_dir)[0]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert ours["auc"] == pytest.approx(theirs["auc"], abs=0.05)


@pytest.mark.parametrize(
    ("model", "canvas"),
    [
        (ModelConfig("swin_nano"), CANVAS),
        (
            ModelConfig("swin_pico", stem="candidates"),
            CanvasConfig("panels", 7, 56, sum_time_bins=2, normalise=False),
        ),
    ],
    ids=["whole canvas", "candidates"],
)
def test_two_ranks_train_and_predict_as_one_does(
    manifest: Manifest, tmp_path: Path, model: ModelConfig, canvas: CanvasConfig
) -> None:
    draws = dataclasses.replace(PRESETS["demo"].draws, cutmix=1.0)
    common = {"epochs": 1, "model": model, "canvas": canvas, "draws": draws}
    one = tiny_config(manifest.root, tmp_path / "one", batch_size=8, **common)
    two = tiny_config(manifest.root, tmp_path / "two", batch_size=4, **common)
    train(one)
    done = launch("train.py", *flags(two))
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stderr
    configs = [json.loads((config.run_dir / "config.json").read_text()) for config in (one, two)]
    others = {name for name in configs[0] if configs[0][name] != configs[1][name]}
    assert others - {"loader"} == {"batch_size", "run_dir"}  # ranks share the cores, if there are several
    ours, theirs = read_history(one.run_dir)[0], read_history(two.run_dir)[0]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    first = [json.loads((config.run_dir / "norms.jsonl").read_text().splitlines()[0]) for config in (one, two)]
    assert first[0]["gradient"] == pytest.approx(first[1]["gradient"], rel=1e-2)
    weights = one.run_dir / "best.safetensors"
    for processes in (1, 2):
        out = tmp_path / f"{processes}.csv"
        words = ["infer.py", "--shards", manifest.root, "--weights", weights, "--tta", "--batch-size", 4, "--out", out]
        done = launch(*words, "--precision", "float32", processes=processes)
        assert done.returncode == 0, done.stderr
    alone, together = (list(csv.reader((tmp_path / f"{n}.csv").open())) for n in (1, 2))
    assert [row[0] for row in alone] == [row[0] for row in together]
    scores = [[float(row[1]) for row in rows[1:]] for rows in (alone, together)]
    np.testing.assert_allclose(*scores, atol=1e-5)


@pytest.mark.kaggle
def test_it_overfits_real_needles_against_their_on_off_swapped_twins(kaggle_seti: Path, tmp_path: Path) -> None:
    """The ON/OFF pattern of real snippets can be learnt: the AUC on the training data is above 0.95."""
    with (kaggle_seti / LABELS).open(newline="") as file:
        positive = {row["id"] for row in csv.DictReader(file) if row["target"] == "1"}
    rows = []
    for path in sorted(kaggle_seti.glob("train/*/*.npy")):
        if path.stem not in positive:
            continue
        snippet = np.load(path)
        for key, target, panels in ((path.stem, 1, snippet), (f"{path.stem}-swapped", 0, snippet[[1, 0, 3, 2, 5, 4]])):
            folder = tmp_path / "data" / "train" / key[0]
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{key}.npy", panels)
            rows.append((key, target))
    with (tmp_path / "data" / LABELS).open("w", newline="") as file:
        csv.writer(file).writerows([("id", "target"), *rows])
    # Two folds: one is trained on and judged below, the other is validated on.
    manifest = pack(PackConfig(tmp_path / "data", tmp_path / "shards", folds=2))
    canvas = CanvasConfig("on_off", 56, 112, sum_time_bins=13, subtract="lines_bursts", compress="asinh")
    quiet = DrawConfig(flip_time=0, roll_frequency=0, shift_time=0, erase=0, gain=0, offset=0, cutmix=0)
    config = tiny_config(
        manifest.root, tmp_path / "run", epochs=25, batch_size=12, learning_rate=1e-3, canvas=canvas, draws=quiet,
        model=ModelConfig("swin_nano"),
    )  # fmt: skip
    train(config)
    assert trained_auc(config, manifest) > 0.95


def trained_auc(config: TrainConfig, manifest: Manifest) -> float:
    """ROC AUC of a run's last weights on the folds that it was trained on."""
    accelerator = build_accelerator("float32")
    run = build_run(config, accelerator, manifest)
    accelerator.load_state(str((config.run_dir / "checkpoints" / "last").resolve()))
    rows = manifest.rows("train", config.fold)
    order = Order(rows, manifest.target[rows], "sequential")
    loader = Loader(manifest, order, Share(len(rows), 16), config.canvas)
    found, logit = predict_rows(accelerator, run.judged_model, loader, "trained on")
    return roc_auc(manifest.target[found], logit)


def test_validation_is_begun_before_the_last_step_and_the_next_epoch_before_validation(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No epoch is begun after the last one."""
    begun: list[tuple[int, int]] = []

    def noting(function: Any) -> Any:
        def call(run: Run, *arguments: Any) -> Any:
            begun.append((len(run.train_loader._begun), len(run.valid_loader._begun)))
            return function(run, *arguments)

        return call

    monkeypatch.setattr("train.train_step", noting(train_module.train_step))
    monkeypatch.setattr("train.validate", noting(train_module.validate))
    train(tiny_config(manifest.root, tmp_path / "run", epochs=2))
    first, second = begun[: len(begun) // 2], begun[len(begun) // 2 :]
    assert [valid for _, valid in first] == [valid for _, valid in second] == [0] * (len(first) - 2) + [2, 2]
    assert (first[-1][0], second[-1][0]) == (5, 0)


def test_a_run_that_ends_with_an_error_leaves_no_thread(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends while both loaders have begun batches."""

    def fail(run: Run) -> None:
        assert run.train_loader._begun and run.valid_loader._begun
        raise InputError("stopped in the validation")

    before = set(threading.enumerate())
    monkeypatch.setattr("train.validate", fail)
    with pytest.raises(InputError, match="stopped in the validation"):
        train(tiny_config(manifest.root, tmp_path / "run", epochs=2))
    assert set(threading.enumerate()) <= before


def test_skipped_samples_are_named_at_the_end(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(manifest.root, tmp_path / "shards")
    copy = read_manifest(tmp_path / "shards")
    row = int(copy.rows("train", 0)[3])
    with (copy.root / copy.shards[int(copy.shard[row])].name).open("r+b") as file:
        file.seek(int(copy.offset[row]))
        file.write(b"broken")
    config = tiny_config(copy.root, tmp_path / "run", epochs=1)
    with pytest.raises(InputError, match=copy.key(row)):
        train(config)
    train(dataclasses.replace(config, run_dir=tmp_path / "skip", loader=LoaderConfig(on_bad_sample="skip")))
    assert f"skipped 1 bad samples (see summary.json): {copy.key(row)}" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "skip" / "summary.json").read_text())["skipped"]) == [copy.key(row)]


def test_a_folder_that_is_in_use_or_of_another_run_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = tiny_config(manifest.root, run_dir, epochs=1)
    train(config)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="not empty"):
        train(config)
    with pytest.raises(InputError, match=r"learning_rate: 0.001 then, 0.01 now"):
        train(dataclasses.replace(config, resume=True, learning_rate=1e-2))
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "letters.txt").write_text("mine")
    with pytest.raises(InputError, match=r"letters\.txt"):
        train(dataclasses.replace(config, run_dir=tmp_path / "else"))


def test_a_finished_run_is_not_trained_again(manifest: Manifest, tmp_path: Path) -> None:
    config = tiny_config(manifest.root, tmp_path / "run", epochs=1)
    train(config)
    weights = (config.run_dir / "best.safetensors").stat().st_mtime_ns
    train(dataclasses.replace(config, resume=True))
    assert (config.run_dir / "best.safetensors").stat().st_mtime_ns == weights
    assert len(read_history(config.run_dir)) == 1


def test_a_full_disk_in_a_checkpoint_is_named_and_the_last_one_stays(manifest: Manifest, tmp_path: Path) -> None:
    """A limit on file sizes imitates a full disk: smaller files are written, the checkpoint's are not."""
    config = tiny_config(manifest.root, tmp_path / "run", epochs=1)
    train(config)
    last = config.run_dir / "checkpoints" / "last"
    before = {path.name: path.read_bytes() for path in last.iterdir()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, resource.RLIM_INFINITY))
    try:
        with pytest.raises(InputError, match=r"step-00000006: could not be written"):
            train(dataclasses.replace(config, resume=True, epochs=2, override=("epochs",), checkpoint_every=3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert before == {path.name: path.read_bytes() for path in last.iterdir()}
    train(dataclasses.replace(config, resume=True, epochs=2, override=("epochs",)))
    assert len(read_history(config.run_dir)) == 2


def test_a_damaged_checkpoint_is_refused_by_name(manifest: Manifest, tmp_path: Path) -> None:
    config = tiny_config(manifest.root, tmp_path / "run", epochs=1)
    train(config)
    state = config.run_dir / "checkpoints" / "last" / "model.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"checkpoints.last: could not be read as a checkpoint"):
        train(dataclasses.replace(config, resume=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fold": 5}, "--fold 5: .* folds 0 to 4"),
        ({"precision": "fp16"}, "--precision fp16: needs a GPU"),
        ({"model": ModelConfig("swim_tiny_patch4_window7_224")}, "--model swim_tiny.*swin_tiny"),
        ({"canvas": CanvasConfig("on_off", 28, 56, sum_time_bins=3)}, "--sum-time-bins 3"),
        ({"sampling": "weighted", "class_weights": (0.0, -1.0)}, "--class-weights"),
    ],
)
def test_what_cannot_work_is_refused_by_the_name_of_its_flag(
    manifest: Manifest, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(tiny_config(manifest.root, tmp_path / "run", **changes))


def test_shards_without_training_cadences_are_refused_with_what_to_do(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data", 10, 6)
    shutil.rmtree(data / "train")
    (data / LABELS).unlink()
    packed = pack(PackConfig(data, str(tmp_path / "shards")))
    message = f"{packed.root}: no training cadences, only 6 of test/; pack a folder with train_labels.csv and train/"
    with pytest.raises(InputError, match=message):
        train(tiny_config(packed.root, tmp_path / "run"))


def test_a_fold_that_holds_all_training_cadences_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """A partial download may be such a data set."""
    data = write_tiny_data(tmp_path / "data", 20, 6)
    whole = pack(PackConfig(data, str(tmp_path / "whole"), folds=2))
    for key in whole.keys_of(whole.rows("train", 1, held_out=True)):
        (data / "train" / key[0] / f"{key}.npy").unlink()
    part = pack(PackConfig(data, str(tmp_path / "part"), folds=2, allow_missing=True))
    with pytest.raises(InputError, match=r"--fold 0: all 10 training cadences of .* hold out another fold, or pack"):
        train(tiny_config(part.root, tmp_path / "run"))
    with pytest.raises(InputError, match="--fold 1: holds none of the 10 training cadences"):
        train(tiny_config(part.root, tmp_path / "other", fold=1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "--epochs 0"),
        (["--batch-size", "-1"], "--batch-size -1"),
        (["--learning-rate", "0"], "--learning-rate 0"),
        (["--ema", "1"], "--ema 1"),
        (["--pretrained", "/nowhere.safetensors"], "--pretrained /nowhere.safetensors: no such file"),
        (["--canvas", "on", "--subtract", "lines"], "--subtract lines"),
        (["--height", "0"], "--height 0"),
    ],
)
def test_impossible_options_are_refused_by_name(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_train_config(["--shards", "s", "--run-dir", "r", *words])


@pytest.mark.parametrize("preset", PRESETS)
def test_options_go_on_top_of_their_preset(preset: str) -> None:
    words = ["--shards", "s", "--run-dir", "r", "--preset", preset, "--epochs", "77", "--canvas", "panels"]
    found = parse_train_config(words)
    expected = PRESETS[preset]  # type: ignore[index]
    assert found.epochs == 77 and found.canvas.layout == "panels"
    unchanged = {"epochs": expected.epochs, "canvas": expected.canvas, "shards": expected.shards}
    assert dataclasses.replace(found, **unchanged, run_dir=expected.run_dir) == expected


def test_the_seed_preset_is_the_original_recipe() -> None:
    seed = PRESETS["seed"]
    assert seed.model.name == "swin_small_patch4_window7_224"
    assert (seed.canvas.layout, seed.canvas.height, seed.canvas.width) == ("stack6", 224, 224)
    assert (seed.optimiser, seed.learning_rate, seed.weight_decay) == ("adam", 1e-4, 1e-6)
    assert (seed.batch_size, seed.epochs, seed.sampling) == (32, 5, "weighted")
    assert (seed.draws.cutmix, seed.draws.cutmix_alpha) == (1.0, 1.0)
    optimiser = build_optimiser(seed, torch.nn.Linear(3, 1))
    schedule = build_schedule(seed, optimiser, steps_per_epoch=100)
    rates = []
    for step in (0, 500, 1000):
        schedule.step_update(step)
        rates.append(optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-4, (1e-4 + 1e-6) / 2, 1e-6])


def test_manifests_of_another_data_set_are_not_gone_on_with(manifest: Manifest, tmp_path: Path) -> None:
    config = tiny_config(manifest.root, tmp_path / "run", epochs=1)
    train(config)
    other = pack_tiny(tmp_path / "other", train=40)
    assert read_manifest(other.root).identity != manifest.identity
    with pytest.raises(InputError, match="shards_identity"):
        train(dataclasses.replace(config, shards=other.root, resume=True))
