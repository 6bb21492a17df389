"""Every command on a file system that lacks something: python -m tests.every_command DIR.

Runs with the library of tests/lacking.c preloaded, in one process, since torch takes seconds to load. Writes the
outcomes to DIR/outcomes.json.
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from infer import InferConfig, infer
from shard_tools import atomic_files as files
from shard_tools.atomic_files import file_sha256
from shard_tools.pack import PackConfig, pack
from shard_tools.sources import SOURCES
from shard_tools.storage.cache import SampleCache
from shard_tools.system.command import run_command
from shard_tools.verify import verify
from tests.tiny import tiny_config, write_tiny_data
from train import train
from training.model import ModelConfig
from training.submission import write_submission
from training.weights import load_weights

LACKS = {
    "nothing": 0,
    "symlink": errno.EOPNOTSUPP,
    "flock": errno.ENOLCK,
    "fsync": errno.EINVAL,
    "fsync of folders": errno.EINVAL,
    "rename over a file": errno.EEXIST,
    "preadv": errno.EOPNOTSUPP,
    "link, utime, statvfs": errno.ENOSYS,
    "mmap": errno.ENODEV,
}
REFUSED = {"room": errno.ENOSPC, "write": errno.EROFS}
AGAIN = "run the same command with --resume"


def main(root: Path) -> None:
    data = write_tiny_data(root / "data", 20, 4)
    outcomes = {lack: use(root / lack / "files", data, lack, number) for lack, number in LACKS.items()}
    outcomes |= {lack: refuse(root / lack / "files", data, lack, number) for lack, number in REFUSED.items()}
    (root / "outcomes.json").write_text(json.dumps(outcomes))


@contextlib.contextmanager
def lacking(folder: Path, lack: str, number: int) -> Iterator[None]:
    os.environ.update({"LACKS_UNDER": str(folder), "LACKS_ERRNO": str(number), "LACKS": f", {lack}, "})
    files._said.clear()  # so that each file system is reported again
    try:
        yield
    finally:
        os.environ["LACKS"] = ""


def use(folder: Path, data: Path, lack: str, number: int) -> dict[str, object]:
    folder.mkdir(parents=True)
    config = tiny_config(folder / "shards", folder / "run", epochs=1, model=ModelConfig("swin_nano"))
    commands: dict[str, Callable[[], object]] = {
        "pack": lambda: pack_to(data, folder / "shards"),
        "train": lambda: train(config),
        "resume": lambda: train(dataclasses.replace(config, resume=True)),
        "scores": lambda: write_submission(folder / "submission.csv", ["a"], {"a": 0.5}, None),
        "scores again": lambda: write_submission(folder / "submission.csv", ["a"], {"a": 0.75}, None),
        "verify": lambda: list(verify(str(folder / "shards"))),
        "cache": lambda: keep(folder),
        "weights": lambda: load_weights(folder / "run" / "best.safetensors"),
    }
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger().addHandler(handler)
    with lacking(folder, lack, number):
        failed = {name: ended for name, command in commands.items() if (ended := quietly(command))[0]}
    logging.getLogger().removeHandler(handler)
    is_whole = not failed.keys() & {"train", "weights", "scores"}
    weights = load_weights(folder / "run" / "best.safetensors")[0] if is_whole else {}
    return {
        "failed": failed,
        "said": said.getvalue(),
        "weights": {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in weights.items()},
        "submission": (folder / "submission.csv").read_text() if is_whole else "",
        "left": sorted(
            str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name not in (".lock", SOURCES)
        ),
    }


def refuse(folder: Path, data: Path, lack: str, number: int) -> dict[str, object]:
    folder.mkdir(parents=True)
    pack_to(data, folder / "shards")
    config = tiny_config(folder / "shards", folder / "run", epochs=1, model=ModelConfig("swin_nano"))
    quietly(lambda: train(config))
    weights = file_sha256(folder / "run" / "best.safetensors")
    further = dataclasses.replace(config, epochs=2, resume=True, override=("epochs",))
    commands: dict[str, Callable[[], None]] = {
        "pack": lambda: pack_to(data, folder / "others"),
        "train": lambda: train(further),
        "infer": lambda: predicted(folder),
    }
    with lacking(folder, lack, number):
        refused = {name: quietly(command) for name, command in commands.items()}
        faults = list(verify(str(folder / "shards")))
    kept = file_sha256(folder / "run" / "best.safetensors") == weights
    partial = (folder / "submission.csv").exists() or (folder / "others" / "manifest.json").exists()
    later = {name: quietly(command)[0] for name, command in commands.items()}
    return {"refused": refused, "faults": faults, "kept": kept, "partial": partial, "later": later}


def quietly(command: Callable[[], object]) -> tuple[int, str]:
    """A command's exit code and what it printed to standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        try:
            code = run_command(lambda: command() and None, again=AGAIN)
        except Exception as error:  # a user would see a traceback
            return 3, f"Traceback: {error!r}"
    return code, err.getvalue()


def pack_to(data: Path, out: Path) -> None:
    pack(PackConfig(data, str(out), folds=5, workers=1, shard_mb=1))


def predicted(folder: Path) -> None:
    weights = (folder / "run" / "best.safetensors",)
    infer(InferConfig(str(folder / "shards"), weights, folder / "submission.csv", batch_size=8, precision="float32"))


def keep(folder: Path) -> None:
    """Write a sample to a cache and read it."""
    cache = SampleCache(folder / "cache", 1e9, "of a data set")
    written, found = [np.arange(9, dtype=np.uint8)], [np.zeros(9, np.uint8)]
    cache.write_record("train-000000.tar", 0, written)
    if cache.read_record("train-000000.tar", 0, found, lambda count: None):
        assert (found[0] == written[0]).all()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
