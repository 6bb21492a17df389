"""A data set and a run of an earlier commit, kept in tests/data/old_run: today's code has to read them.

They were made at commit 494fdee by `python -m tests.old_run tests/data/old_run`, with the program's own commands except
for two things. The network is a Swin so narrow that its checkpoint can be kept here, and the run in `cut/` ends after
its sixth checkpoint, in the middle of its second epoch. `whole/` has the figures of the same run without that end.
Pictures, pages and all other checkpoints were removed.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
from timm.models import register_model
from timm.models.swin_transformer import SwinTransformer

import infer
import train
from shard_tools.__main__ import main as shard_tools_main
from shard_tools.system.command import run_command
from tests.tiny import write_tiny_data

OLD_RUN = Path(__file__).parent / "data" / "old_run"
_MODEL = "narrow_swin"
_CHECKPOINTS = 6


def register_narrow_swin() -> None:
    """Register the run's network, of a few thousand weights, with timm."""
    if timm.is_model(_MODEL):
        return

    def narrow_swin(pretrained: bool = False, **options: Any) -> SwinTransformer:
        options = {name: value for name, value in options.items() if not name.startswith(("pretrained", "cache_dir"))}
        return SwinTransformer(embed_dim=4, depths=(1, 1), num_heads=(1, 1), window_size=7, **options)

    narrow_swin.__module__ = __name__
    register_model(narrow_swin)


def train_words(shards: Path, run_dir: Path) -> list[str]:
    """The command line of the run."""
    words = (
        f"--shards {shards} --run-dir {run_dir} --preset demo --model {_MODEL} --stem candidates --height 7 --width 28"
    )
    words += " --sum-time-bins 1 --epochs 2 --batch-size 4 --eval-batch-size 4 --ema 0.5 --fold 1 --seed 3"
    words += " --learning-rate 0.003 --warmup-epochs 0.5 --precision float32 --tracker none --no-report"
    return [*words.split(), "--checkpoint-every", "1", "--checkpoint-minutes", "0"]


def infer_words(shards: Path, run_dir: Path, out: Path) -> list[str]:
    """The command line of a prediction with its best weights."""
    words = f"--shards {shards} --weights {run_dir / 'best.safetensors'} --out {out} --tta --precision float32"
    return words.split()


def _end_after(checkpoints: int) -> None:
    save, done = train.save_checkpoint, 0

    def save_and_end(*arguments: Any) -> None:
        nonlocal done
        save(*arguments)
        done += 1
        if done == checkpoints:
            sys.stdout.flush()
            os._exit(0)

    train.save_checkpoint = save_and_end


def _make(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as data:
        write_tiny_data(Path(data), train=20, test=5, shape=(6, 7, 28))
        shards = folder / "shards"
        _run("shard_tools", *shlex.split(f"pack --input {data} --out {shards} --folds 4 --workers 1"))
    _run("train", *train_words(shards, folder / "whole"))
    _run("cut", *train_words(shards, folder / "cut"))
    _run("infer", *infer_words(shards, folder / "cut", folder / "cut" / "submission.csv"))
    # Keep only what the tests need: no pictures, no page, and only the last checkpoint.
    shutil.rmtree(folder / "whole" / "checkpoints")
    shutil.rmtree(folder / "cut" / "report")
    shutil.rmtree((folder / "cut" / "checkpoints" / "best").resolve())
    (folder / "cut" / "checkpoints" / "best").unlink()
    for pattern in ("*/*.png", "*/*.html", "*/.lock", "whole/*.safetensors"):
        for path in folder.glob(pattern):
            path.unlink()


def _run(*words: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([sys.executable, "-m", "tests.old_run", *words], check=True, env=environment)


if __name__ == "__main__":
    register_narrow_swin()
    name, *rest = sys.argv[1:]
    sys.argv = [name, *rest]
    if name == "cut":
        _end_after(_CHECKPOINTS)
    mains = {"shard_tools": shard_tools_main, "train": train.main, "cut": train.main, "infer": infer.main}
    if name in mains:
        sys.exit(run_command(mains[name]))
    _make(Path(name))
