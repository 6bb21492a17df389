"""A data set small enough to train on in seconds, with needles that a few steps can learn."""

import csv
from pathlib import Path

import numpy as np

from pipeline.augment import DrawConfig
from pipeline.canvas import CanvasConfig
from shard_tools.manifest import Manifest
from shard_tools.pack import PackConfig, pack
from training.config import TrainConfig
from training.model import ModelConfig
from training.presets import PRESETS

SHAPE = (6, 14, 56)
CANVAS = CanvasConfig("on_off", height=28, width=56, sum_time_bins=2)


def write_tiny_data(root: Path, train: int, test: int, shape: tuple[int, int, int] = SHAPE) -> Path:
    """White noise in the Kaggle layout; every second training cadence has a bright line in the ON panels."""
    rng = np.random.default_rng(7)
    tables: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for number in range(train + test):
        split = "train" if number < train else "test"
        key = f"{'0123456789abcdef'[number % 16]}{number:06d}"
        snippet = rng.standard_normal(shape)
        if number % 2:
            snippet[0::2, :, rng.integers(shape[2])] += 8
        path = root / split / key[0] / f"{key}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, snippet.astype(np.float16))
        tables[split].append((key, str(number % 2) if split == "train" else "0.5"))
    for name, rows in (("train_labels.csv", tables["train"]), ("sample_submission.csv", tables["test"][::-1])):
        with (root / name).open("w", newline="") as file:
            csv.writer(file).writerows([("id", "target"), *rows])
    return root


def pack_tiny(folder: Path, train: int = 50, test: int = 11) -> Manifest:
    """Pack such a data set into several shards, in `folder`/shards."""
    write_tiny_data(folder / "data", train, test)
    return pack(PackConfig(folder / "data", folder / "shards", folds=5, workers=2, shard_mb=1))


def tiny_config(shards: Path, run_dir: Path, **changes: object) -> TrainConfig:
    """A training run that takes seconds."""
    values: dict[str, object] = {
        "epochs": 2,
        "batch_size": 8,
        "eval_batch_size": 8,
        "tracker": "none",
        "report": False,
        "precision": "float32",
        "learning_rate": 1e-3,
        "warmup_epochs": 0.0,
        "model": ModelConfig("swin_nano", drop_path=0.1),
        "canvas": CANVAS,
        "draws": DrawConfig(cutmix=0.5),
        **changes,
    }
    fields = {**vars(PRESETS["demo"]), "shards": shards, "run_dir": run_dir, **values}
    return TrainConfig(**fields)  # type: ignore[arg-type]
