"""Weights & Biases and TensorBoard show one run however often a training starts, and never stop it."""

import dataclasses
import importlib.util
import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from tests.conftest import forget_accelerate
from tests.tiny import pack_tiny, tiny_config
from tests.wandb_server import Fault, wandb_server
from train import train
from training import tracker
from training.config import to_dict
from training.out_of_fold import read_scores
from training.presets import parse_train_config
from training.tensorboard_tracker import OptionalTensorBoard
from training.tracker import OptionalWandB, build_trackers, own_run_id

KEY = "0123456789" * 4


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("tracker"))


@pytest.fixture
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    import wandb

    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_RUN_ID", "NETRC", "WANDB_CONFIG_DIR")
    for name in (*names, *tracker._ENVIRONMENT):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    wandb.teardown()  # remove what an earlier test's environment left
    yield monkeypatch
    wandb.teardown()


@pytest.fixture
def quick(logged_out: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Logged in, with a short time-out at the start, which is enough for a run offline."""
    logged_out.setenv("WANDB_API_KEY", KEY)
    logged_out.setenv("WANDB_INIT_TIMEOUT", "2")
    logged_out.setenv("WANDB_FINISH_TIMEOUT", "20")
    return logged_out


def track(run_dir: Path, steps: range) -> OptionalWandB:
    """Call a tracker as one start of a training does."""
    run_dir.mkdir(exist_ok=True)
    one = OptionalWandB(run_dir)
    one.start()
    one.store_init_configuration({"epochs": 2})
    for step in steps:
        one.log({"loss": 0.5}, step=step)
    one.finish()
    return one


def our_words(caplog: pytest.LogCaptureFixture) -> list[str]:
    names = ("training.tracker", "training.tensorboard_tracker")
    return [record.getMessage() for record in caplog.records if record.name in names]


def written_runs(run_dir: Path, kind: str) -> list[Path]:
    return sorted((run_dir / "wandb").glob(f"{kind}run-2*/run-*.wandb"))


def test_without_a_login_a_run_is_tracked_offline_in_its_folder(
    manifest: Manifest, tmp_path: Path, logged_out: pytest.MonkeyPatch
) -> None:
    config = tiny_config(manifest.root, tmp_path / "run", epochs=1, tracker="wandb")
    train(config)
    runs = written_runs(config.run_dir, "offline-")
    assert len(runs) == 1 and runs[0].stat().st_size > 0


def test_each_start_goes_on_with_the_same_online_run(tmp_path: Path, quick: pytest.MonkeyPatch) -> None:
    quick.setenv("WANDB_INIT_TIMEOUT", "20")
    with wandb_server() as server:
        quick.setenv("WANDB_BASE_URL", server.url)
        for steps in (range(3), range(3, 6)):
            track(tmp_path / "run", steps)
    (history,) = [lines for name, lines in server.history.items() if lines]
    assert [history[line]["_step"] for line in range(6)] == [0, 1, 2, 3, 4, 5]


def test_offline_starts_become_one_run_when_they_are_sent(tmp_path: Path, logged_out: pytest.MonkeyPatch) -> None:
    for steps in (range(3), range(3, 6)):
        track(tmp_path / "run", steps)
    assert len({path.name for path in written_runs(tmp_path / "run", "offline-")}) == 1
    with wandb_server() as server:
        environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        words = [sys.executable, "-m", "wandb", "sync", str(tmp_path / "run" / "wandb")]
        subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120)
    (history,) = [lines for name, lines in server.history.items() if lines]
    assert [history[line]["_step"] for line in sorted(history)] == [0, 1, 2, 3, 4, 5]


def test_runs_of_other_folders_are_other_runs_and_a_broken_id_is_replaced(
    tmp_path: Path, logged_out: pytest.MonkeyPatch
) -> None:
    ids = [own_run_id(tmp_path / name) for name in ("a", "b", "a")]
    assert ids[0] == ids[2] != ids[1]
    (tmp_path / "a" / "run_id.txt").write_bytes(b"\xff\0/no id")
    assert own_run_id(tmp_path / "a") == own_run_id(tmp_path / "a") != ids[0]
    logged_out.setenv("WANDB_RUN_ID", "mine")
    assert own_run_id(tmp_path / "b") == "mine"


@pytest.mark.parametrize("fault", ["hangs", "refuses the key", "nobody listens", "a key that is none"])
def test_a_run_that_cannot_be_online_is_tracked_offline_with_one_warning(
    tmp_path: Path, quick: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    with wandb_server("hangs" if fault == "hangs" else "refuses the key") as server:
        quick.setenv("WANDB_BASE_URL", server.url)
        if fault == "nobody listens":
            server.server_close()
        if fault == "a key that is none":
            quick.setenv("WANDB_API_KEY", "short")
        with caplog.at_level(logging.WARNING, logger="training.tracker"):
            track(tmp_path / "run", range(3))
    assert len(written_runs(tmp_path / "run", "offline-")) == 1
    (said,) = our_words(caplog)
    assert server.url in said and "wandb sync" in said and "--tracker none" in said and "\n" not in said


def test_a_training_ends_well_when_the_server_hangs_from_the_start(
    manifest: Manifest, tmp_path: Path, quick: pytest.MonkeyPatch
) -> None:
    with wandb_server("hangs") as server:
        quick.setenv("WANDB_BASE_URL", server.url)
        config = tiny_config(manifest.root, tmp_path / "run", epochs=1, tracker="wandb")
        train(config)
    assert (config.run_dir / "summary.json").is_file() and written_runs(config.run_dir, "offline-")


def test_a_server_that_hangs_later_is_given_up_on_at_the_end(
    tmp_path: Path, quick: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quick.setenv("WANDB_INIT_TIMEOUT", "20")
    quick.setenv("WANDB_FINISH_TIMEOUT", "0.5")
    fault: Fault = "hangs later"
    with wandb_server(fault) as server, caplog.at_level(logging.WARNING, logger="training.tracker"):
        quick.setenv("WANDB_BASE_URL", server.url)
        track(tmp_path / "run", range(3))
    (said,) = our_words(caplog)
    assert "Timed out" in said and "wandb sync --include-online" in said
    assert len(written_runs(tmp_path / "run", "")) == 1


def test_a_training_outlives_the_service_of_its_tracker(
    tmp_path: Path, logged_out: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A scheduler's signal, or a kernel without free memory, may end wandb's own process."""
    (tmp_path / "run").mkdir()
    one = OptionalWandB(tmp_path / "run")
    with caplog.at_level(logging.WARNING, logger="training.tracker"):
        one.start()
        services = [process for process in psutil.Process().children() if "wandb" in process.name()]
        assert services
        for process in services:
            process.kill()
            process.wait()
        for step in range(3):
            one.log({"loss": 0.5}, step=step)
        one.finish()
    (said,) = our_words(caplog)
    assert "W&B failed" in said


def test_a_tracker_that_cannot_write_is_done_without(
    tmp_path: Path, logged_out: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING, logger="training.tracker"):
        track(tmp_path / "run", range(2))
    (said,) = our_words(caplog)
    assert "going on without" in said


@pytest.mark.parametrize("kept_in", ["the environment", "netrc"])
def test_a_login_is_found_where_wandb_keeps_it(tmp_path: Path, quick: pytest.MonkeyPatch, kept_in: str) -> None:
    """The login is used: the server is asked, and refuses."""
    with wandb_server("refuses the key") as server:
        quick.setenv("WANDB_BASE_URL", server.url)
        if kept_in == "netrc":
            quick.delenv("WANDB_API_KEY")
            (tmp_path / ".netrc").write_text(
                f"machine {server.url.removeprefix('http://')} login user password {KEY}\n"
            )
            (tmp_path / ".netrc").chmod(0o600)
        track(tmp_path / "run", range(1))
        assert server.asked


def test_no_tracker_means_none_and_a_missing_one_is_said(
    tmp_path: Path, logged_out: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert build_trackers(tiny_config(tmp_path, tmp_path / "run", tracker="none")) == {}
    logged_out.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert build_trackers(tiny_config(tmp_path, tmp_path / "run", tracker="wandb")) == {}
    assert "wandb is not installed" in caplog.text


# TensorBoard


def read_events(run_dir: Path) -> EventAccumulator:
    """All events of a run, as TensorBoard itself reads them."""
    events = EventAccumulator(str(run_dir / "tensorboard"), dict.fromkeys(("scalars", "images", "tensors"), 0))
    events.Reload()
    return events


def scalars(events: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(name)]


def text(events: EventAccumulator, name: str) -> str:
    return events.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()


@pytest.fixture(scope="module")
def tracked(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was started twice, once for each of two epochs."""
    config = tiny_config(manifest.root, tmp_path_factory.mktemp("tensorboard") / "run", epochs=1, tracker="tensorboard")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ACCELERATE_USE_CPU", "true")
        train(config)
        forget_accelerate()
        lost = OptionalTensorBoard(config.run_dir)  # a start that was killed before its next checkpoint
        lost.start()
        lost.log({"auc": 9.0}, step=7)
        lost.finish()
        train(dataclasses.replace(config, epochs=2, resume=True, override=("epochs",)))
        forget_accelerate()
    return config.run_dir


def test_tensorboard_has_every_figure_of_the_run_once_at_its_step(tracked: Path) -> None:
    events = read_events(tracked)
    lines = [json.loads(line) for line in (tracked / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and {"auc", "loss", "stall", "cadences_per_s"} <= lines[0].keys()
    for name in lines[0]:
        assert [step for step, _ in scalars(events, name)] == [5, 10], name
        np.testing.assert_allclose([value for _, value in scalars(events, name)], [line[name] for line in lines], 1e-6)
    norms = [json.loads(line) for line in (tracked / "norms.jsonl").read_text().splitlines()]
    part = norms[0]["part"]
    expected = [(row["step"], pytest.approx(row["weight"])) for row in norms if row["part"] == part]
    assert scalars(events, f"weight_norm/{part}") == expected and len(expected) == 2


def test_tensorboard_has_the_configuration_the_pictures_and_the_best_candidates(tracked: Path) -> None:
    events = read_events(tracked)
    assert '"batch_size": 8' in text(events, "config")
    images = events.Tags()["images"]
    assert {"curves", "roc", "candidates/1", "candidates/10"} <= set(images)
    for name in ("roc", "candidates/1"):
        image = events.Images(name)[-1]
        assert image.step == 10 and image.encoded_image_string.startswith(b"\x89PNG") and image.height > 100
    scores = read_scores(tracked / "oof.csv")
    ranked = [scores.keys[place] for place in np.argsort(-scores.logit, kind="stable")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text(events, "candidates").splitlines()]
    assert rows[0][:5] == ["rank", "key", "target", "score", "logit"] and "waterfall" not in rows[0]
    assert [row[1] for row in rows[2:]] == ranked[:12] and len(ranked) == 10
    best = scores.keys.index(ranked[0])
    assert rows[2][2:5] == [str(scores.target[best]), str(scores.score[best]), str(scores.logit[best])]


def test_what_was_tracked_after_the_checkpoint_that_a_run_goes_on_from_is_hidden(tmp_path: Path) -> None:
    for first, steps in ((0, range(1, 7)), (3, range(4, 9))):
        one = OptionalTensorBoard(tmp_path)
        one.start_after(first)
        one.start()
        for step in steps:
            one.log({"loss": float(first)}, step=step)
        one.finish()
    assert scalars(read_events(tmp_path), "loss") == [(step, 0.0 if step < 4 else 3.0) for step in range(1, 9)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread dies
@pytest.mark.parametrize("fault", ["no folder", "no room"])
def test_a_tensorboard_that_cannot_write_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    if fault == "no folder":
        (tmp_path / "tensorboard").write_text("a file where the folder would be")
    one, before = OptionalTensorBoard(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.WARNING, logger="training"):
        one.start()
        try:
            if fault == "no room":
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
            for step in range(10):
                one.log({"loss": 0.5}, step=step)
            one.log_images({"roc": [Image.new("RGB", (9, 9))]}, step=9)
            one.finish()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (said,) = our_words(caplog)
    assert "TensorBoard failed" in said and "metrics.jsonl" in said


# Several


def test_several_trackers_get_the_same_figures(
    manifest: Manifest, tmp_path: Path, logged_out: pytest.MonkeyPatch
) -> None:
    config = tiny_config(manifest.root, tmp_path / "run", epochs=1, tracker=("wandb", "tensorboard"))
    train(config)
    assert len(written_runs(config.run_dir, "offline-")) == 1
    assert [step for step, _ in scalars(read_events(config.run_dir), "auc")] == [5]
    kept = json.loads((config.run_dir / "config.json").read_text())
    assert kept["tracker"] == ["wandb", "tensorboard"]


def test_trackers_are_named_together_and_one_alone_is_kept_as_in_older_runs(tmp_path: Path) -> None:
    words = ["--shards", "shards", "--run-dir", str(tmp_path), "--preset", "demo"]
    for given, kept in (
        ([], "wandb"),
        (["--tracker", "none"], "none"),
        (["--tracker", "tensorboard", "wandb"], ["tensorboard", "wandb"]),
    ):
        assert to_dict(parse_train_config([*words, *given]))["tracker"] == kept


@pytest.mark.parametrize("names", [("none", "wandb"), ("wandb", "wandb"), (), ("aim",)])
def test_names_of_trackers_that_do_not_go_together_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=rf"--tracker {' '.join(names)}: expected"):
        tiny_config(tmp_path, tmp_path / "run", tracker=names)


def test_wandb_gets_the_pictures_the_best_candidates_and_the_stall(
    manifest: Manifest, tmp_path: Path, quick: pytest.MonkeyPatch
) -> None:
    quick.setenv("WANDB_INIT_TIMEOUT", "20")
    with wandb_server() as server:
        quick.setenv("WANDB_BASE_URL", server.url)
        config = tiny_config(manifest.root, tmp_path / "run", epochs=1, tracker="wandb")
        train(config)
    (history,) = [lines for name, lines in server.history.items() if lines]
    (epoch,) = [line for line in history.values() if "auc" in line]
    line = json.loads((config.run_dir / "metrics.jsonl").read_text())
    assert epoch["stall"] == line["stall"] and epoch["_step"] == 5
    for name in ("curves", "roc"):
        (path,) = [name_ for name_ in server.files if name_.startswith(f"media/images/{name}_")]
        assert server.files[path].startswith(b"\x89PNG")
    assert [name for name in server.files if name.startswith("media/table/candidates")]
    table = json.loads(server.files["candidates.table.json"])  # in the artifact, which holds the pictures too
    scores = read_scores(config.run_dir / "oof.csv")
    assert table["data"][0][1] == scores.keys[int(np.argmax(scores.logit))]
    pictures = [row[table["columns"].index("waterfall")]["path"] for row in table["data"]]
    assert len(pictures) == 10 and all(server.files[picture].startswith(b"\x89PNG") for picture in pictures)
