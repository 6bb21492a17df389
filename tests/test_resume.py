"""Stopping and resuming: kills, signals, other numbers of ranks, other configurations."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train as train_module
from pipeline.augment import DrawConfig
from pipeline.canvas import CanvasConfig
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from tests.launch import command_line, flags
from tests.tiny import pack_tiny, tiny_config
from train import EXIT_PREEMPTED, train
from training import results
from training.config import TrainConfig, run_identity
from training.model import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
TIMINGS = {"cadences_per_s", "stall", "validation_s"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("resume"), train=150)


def read_history(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def start(config: TrainConfig, processes: int = 1, script: str = "train.py") -> subprocess.Popen[str]:
    """Start a training in processes and a session of its own, so that all of it can be signalled."""
    words = command_line(script, *flags(config), "--checkpoint-every", 1, "--resume", processes=processes)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def steps_done(config: TrainConfig) -> int:
    last = config.run_dir / "checkpoints" / "last"
    return int(last.readlink().name.split("-")[1]) if last.is_symlink() else 0


def wait_for_step(config: TrainConfig, step: int, process: subprocess.Popen[str]) -> None:
    while steps_done(config) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)  # there is no event for a new file to wait for


def same_weights(one: TrainConfig, other: TrainConfig) -> bool:
    ours, theirs = (load_file(config.run_dir / "best.safetensors") for config in (one, other))
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


WHOLE_CANVAS = {"model": ModelConfig("swin_nano", drop_path=0.1)}
CANDIDATES = {
    "model": ModelConfig("swin_pico", stem="candidates", drop_path=0.1),
    "canvas": CanvasConfig("panels", 7, 56, sum_time_bins=2, normalise=False),
    "draws": DrawConfig(flip_time=0.0, cutmix=0.3, inject=0.5),
}


@pytest.mark.parametrize(
    ("parts", "kills"),
    [(WHOLE_CANVAS, [(2, 0.0), (9, 0.03), (17, 0.01)]), (CANDIDATES, [(9, 0.03)])],
    ids=["whole canvas", "candidates"],
)
def test_a_run_that_was_killed_ends_as_the_undisturbed_one_bit_for_bit(
    manifest: Manifest, tmp_path: Path, parts: dict[str, object], kills: list[tuple[int, float]]
) -> None:
    """Each of `kills` is a step, and the seconds after it at which all processes of the run are killed (kill -9)."""
    common = {"epochs": 2, **parts}
    whole, killed = (tiny_config(manifest.root, tmp_path / name, **common) for name in ("whole", "killed"))
    process = start(whole)
    assert process.wait() == 0, process.communicate()[0]
    for kill, (step, delay) in enumerate(kills):
        process = start(killed)
        wait_for_step(killed, step, process)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL and steps_done(killed) >= step, kill
    process = start(killed)
    assert process.wait() == 0, process.communicate()[0]
    assert read_history(killed.run_dir) == read_history(whole.run_dir)
    assert same_weights(killed, whole)
    assert not list((killed.run_dir / "checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_a_checkpoint_and_says_how_to_go_on(
    manifest: Manifest, tmp_path: Path, number: signal.Signals
) -> None:
    config = tiny_config(manifest.root, tmp_path / "run", epochs=40)
    process = start(config)
    wait_for_step(config, 2, process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_PREEMPTED
    assert "--resume" in said and "Traceback" not in said
    assert steps_done(config) >= 2


SLOW_VALIDATION = """
import sys, time
sys.path.insert(0, {root!r})
import train
from training import prediction
at_once = prediction.progress
prediction.progress = lambda *words: (time.sleep(0.3) or batch for batch in at_once(*words))
sys.exit(train.run_command(train.main))
"""


def test_a_signal_in_validation_ends_it_within_a_batch_and_keeps_what_was_trained(
    manifest: Manifest, tmp_path: Path
) -> None:
    """A run of two ranks that is stopped in its first validation validates when it resumes, and ends as otherwise."""
    common = {"epochs": 2, "batch_size": 4, "eval_batch_size": 2, "ema": 0.9}
    whole, stopped = (tiny_config(manifest.root, tmp_path / name, **common) for name in ("whole", "stopped"))
    process = start(whole, processes=2)
    assert process.wait() == 0, process.communicate()[0]
    script = tmp_path / "slow.py"
    script.write_text(SLOW_VALIDATION.format(root=str(ROOT)))
    process = start(stopped, 2, str(script))
    wait_for_step(stopped, 15, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert "--resume" in said and steps_done(stopped) == 15
    assert not (stopped.run_dir / "metrics.jsonl").exists(), "the validation went on to its end"
    process = start(stopped, processes=2)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "going on after step 15" in said
    assert read_history(stopped.run_dir) == read_history(whole.run_dir)
    assert same_weights(stopped, whole)
    assert (stopped.run_dir / "oof.csv").read_bytes() == (whole.run_dir / "oof.csv").read_bytes()


@pytest.mark.parametrize("until", ["best.safetensors", "oof.csv", "metrics.jsonl"])
def test_a_run_killed_while_an_epoch_is_written_down_ends_as_if_it_had_not_been(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: str
) -> None:
    """The weights, scores and history of a run agree, between whichever two of these files it died."""
    whole, cut = (tiny_config(manifest.root, tmp_path / name) for name in ("whole", "cut"))
    train(whole)

    def die_before(name: str) -> Callable[..., None]:
        do = getattr(results, name)

        def write(path: Path, *arguments: object) -> None:
            if path.name == until:
                raise KeyboardInterrupt
            do(path, *arguments)

        return write

    with monkeypatch.context() as patch:
        for name in ("save_weights", "write_scores", "write_whole"):
            patch.setattr(results, name, die_before(name))
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    train(dataclasses.replace(cut, resume=True))
    assert read_history(cut.run_dir) == read_history(whole.run_dir)
    assert same_weights(cut, whole)
    assert (cut.run_dir / "oof.csv").read_bytes() == (whole.run_dir / "oof.csv").read_bytes()


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 4, 1), (1, 8, 1)), ((1, 4, 2), (2, 4, 1))],
    ids=["2 to 1", "1 to 2"],
)
def test_a_run_goes_on_with_another_number_of_ranks_and_ends_as_if_it_had_not_stopped(
    manifest: Manifest, tmp_path: Path, before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    """Preempted in mid-epoch and continued: no key is repeated or skipped, so the losses are the same.

    Before and after: ranks, batch size, accumulation; their product, the global batch, is 8.
    """
    common = {"epochs": 2, "model": ModelConfig("swin_nano")}
    whole = tiny_config(manifest.root, tmp_path / "whole", batch_size=8, **common)
    elastic = tiny_config(manifest.root, tmp_path / "elastic", **common)
    train(whole)
    ranks, batch_size, accumulate = before
    first = dataclasses.replace(elastic, batch_size=batch_size, accumulate=accumulate)
    process = start(first, ranks)
    wait_for_step(first, 4, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert "--resume" in said
    stopped_at = steps_done(first)
    assert 4 <= stopped_at < 30 and stopped_at != 15
    ranks, batch_size, accumulate = after
    process = start(dataclasses.replace(elastic, batch_size=batch_size, accumulate=accumulate), ranks)
    said, _ = process.communicate(timeout=120)
    assert (
        process.returncode == 0
        and f"going on after step {stopped_at}" in said
        and f"on {ranks} rank{'s' if ranks > 1 else ''} (" in said
    )
    for ours, theirs in zip(read_history(elastic.run_dir), read_history(whole.run_dir), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)
        assert ours["learning_rate"] == theirs["learning_rate"]
    with pytest.raises(InputError, match="global_batch: 8 then, 4 now"):
        train(dataclasses.replace(elastic, batch_size=4, resume=True))


def test_a_dead_rank_ends_the_others(manifest: Manifest, tmp_path: Path) -> None:
    config = tiny_config(manifest.root, tmp_path / "run", epochs=200, batch_size=4)
    process = start(config, processes=2)
    wait_for_step(config, 2, process)
    ranks = subprocess.run(["pgrep", "-f", f"train.py.*{config.run_dir}"], capture_output=True, text=True, check=True)
    children = [int(pid) for pid in ranks.stdout.split() if int(pid) != process.pid]
    assert len(children) >= 2
    os.kill(max(children), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    left = subprocess.run(["pgrep", "-f", f"train.py.*{config.run_dir}"], capture_output=True, text=True, check=False)
    assert not left.stdout.split()


def test_what_may_differ_is_named_and_can_be_allowed(manifest: Manifest, tmp_path: Path) -> None:
    config = tiny_config(manifest.root, tmp_path / "run", epochs=1)
    train(config)
    changed = dataclasses.replace(config, resume=True, epochs=2, seed=4)
    with pytest.raises(InputError, match=r"epochs: 1 then, 2 now; seed: 0 then, 4 now.*--override epochs seed"):
        train(changed)
    with pytest.raises(InputError, match=r"seed: 0 then, 4 now"):
        train(dataclasses.replace(changed, override=("epochs",)))
    with pytest.raises(InputError, match=r"--override sneed"):
        train(dataclasses.replace(changed, override=("sneed",)))
    train(dataclasses.replace(changed, override=("epochs", "seed")))
    assert len(read_history(config.run_dir)) == 2


def test_a_run_that_could_not_start_leaves_its_folder_to_the_next(manifest: Manifest, tmp_path: Path) -> None:
    config = tiny_config(manifest.root, tmp_path / "run", epochs=1)
    with pytest.raises(InputError, match="--sum-time-bins 3"):
        train(dataclasses.replace(config, canvas=CanvasConfig("on_off", 28, 56, sum_time_bins=3)))
    train(config)
    assert len(read_history(config.run_dir)) == 1


def test_two_trainings_into_one_folder_are_one_too_many(manifest: Manifest, tmp_path: Path) -> None:
    config = tiny_config(manifest.root, tmp_path / "run", epochs=200)
    process = start(config)
    wait_for_step(config, 1, process)
    with pytest.raises(InputError, match="another process is writing here"):
        train(dataclasses.replace(config, resume=True))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def finished(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of two epochs."""
    config = tiny_config(manifest.root, tmp_path_factory.mktemp("copied") / "run", model=ModelConfig("swin_nano"))
    train(config)
    return config


@pytest.fixture(scope="module")
def stopped(finished: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The same run, killed in its second validation: `best` is the first epoch's checkpoint, `last` the second's."""
    config = dataclasses.replace(finished, run_dir=tmp_path_factory.mktemp("stopped") / "run")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "validate", stop_in_second_validation(config, train_module.validate))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    return config


def stop_in_second_validation(config: TrainConfig, validate: Callable[..., object]) -> Callable[..., object]:
    def once(run: object) -> object:
        if (config.run_dir / "metrics.jsonl").exists():
            raise KeyboardInterrupt
        return validate(run)

    return once


def copied(config: TrainConfig, to: Path, how: str) -> TrainConfig:
    """Copy the run as tools copy folders: without links, with copies of what they point to, or without a part."""
    shutil.copytree(config.run_dir, to, symlinks=how != "links followed")
    checkpoints = to / "checkpoints"
    last = (checkpoints / "last").resolve()
    if how == "no checkpoints":
        shutil.rmtree(checkpoints)
    if how in ("links dropped", "newest damaged"):
        for pointer in ("last", "best"):
            (checkpoints / pointer).unlink(missing_ok=True)
    if how == "links followed, steps dropped":
        for path in checkpoints.glob("step-*"):
            if path != last:
                shutil.rmtree(path)
        for pointer in ("best", "last"):
            (checkpoints / pointer).unlink(missing_ok=True)
        last.rename(checkpoints / "last")
    if how == "names instead of links":
        for pointer in ("last", "best"):
            if (checkpoints / pointer).is_symlink():
                name = (checkpoints / pointer).readlink().name
                (checkpoints / pointer).unlink()
                (checkpoints / pointer).write_text(f"{name}\n")
    if how == "newest damaged":
        state = last / "model.safetensors"
        state.write_bytes(state.read_bytes()[:-1] + b"x")
    return dataclasses.replace(config, run_dir=to, resume=True)


COPIES = ["as it was", "links followed", "links dropped", "links followed, steps dropped", "names instead of links"]


@pytest.mark.parametrize("how", [*COPIES, "no checkpoints", "newest damaged"])
def test_a_finished_run_that_was_copied_is_never_trained_over(finished: TrainConfig, tmp_path: Path, how: str) -> None:
    config = copied(finished, tmp_path / "run", how)
    names = ("best.safetensors", "oof.csv", "metrics.jsonl")
    before = {name: ((config.run_dir / name).read_bytes(), (config.run_dir / name).stat().st_ino) for name in names}
    train(config)
    after = {name: ((config.run_dir / name).read_bytes(), (config.run_dir / name).stat().st_ino) for name in names}
    assert after == before


@pytest.mark.parametrize("how", [*COPIES, "newest damaged"])
def test_a_stopped_run_that_was_copied_goes_on_from_the_newest_whole_checkpoint(
    stopped: TrainConfig, finished: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """It ends as the undisturbed run does, whichever checkpoint that is; then `last` is a pointer as always."""
    config = copied(stopped, tmp_path / "run", how)
    with caplog.at_level("INFO"):
        train(config)
    assert f"going on after step {15 if how == 'newest damaged' else 30}" in caplog.text
    assert read_history(config.run_dir) == read_history(finished.run_dir)
    assert same_weights(config, finished)
    checkpoints = config.run_dir / "checkpoints"
    assert (checkpoints / "last").is_symlink() and (checkpoints / "last").is_dir()
    assert not [path for path in checkpoints.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("how", ["no checkpoints", "all damaged"])
def test_results_without_a_checkpoint_to_go_on_from_are_refused_and_stay(
    stopped: TrainConfig, tmp_path: Path, how: str
) -> None:
    config = copied(stopped, tmp_path / "run", "no checkpoints" if how == "no checkpoints" else "links dropped")
    for state in config.run_dir.glob("checkpoints/*/model.safetensors"):
        state.write_bytes(b"")
    before = (config.run_dir / "best.safetensors").read_bytes()
    said = "no checkpoint to go on from" if how == "no checkpoints" else "no whole checkpoint"
    with pytest.raises(InputError, match=said):
        train(config)
    assert (config.run_dir / "best.safetensors").read_bytes() == before


def test_a_run_killed_before_its_first_checkpoint_starts_over(manifest: Manifest, tmp_path: Path) -> None:
    config = tiny_config(manifest.root, tmp_path / "run", epochs=1, resume=True)
    config.run_dir.mkdir()
    identity = run_identity(config, manifest.identity, 1)
    (config.run_dir / "config.json").write_text(json.dumps(identity))
    (config.run_dir / "checkpoints" / ".step-00000015.tmp").mkdir(parents=True)
    train(config)
    assert len(read_history(config.run_dir)) == 1
