"""Weights & Biases: one run however often the training is started, and never a stop because of it."""

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from shard_tools.manifest import Manifest
from tests.tiny import pack_tiny, tiny_config
from tests.wandb_server import Fault, wandb_server
from train import train
from training import tracker
from training.tracker import OptionalWandB, own_run_id, start_tracker

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
    wandb.teardown()  # what an earlier test's environment left behind
    yield monkeypatch
    wandb.teardown()


@pytest.fixture
def quick(logged_out: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Logged in, with little patience at the start: enough for a run that is offline."""
    logged_out.setenv("WANDB_API_KEY", KEY)
    logged_out.setenv("WANDB_INIT_TIMEOUT", "2")
    logged_out.setenv("WANDB_FINISH_TIMEOUT", "20")
    return logged_out


def track(run_dir: Path, steps: range) -> OptionalWandB:
    """One start of a training, as its tracker sees it."""
    run_dir.mkdir(exist_ok=True)
    one = OptionalWandB(run_dir)
    one.start()
    one.store_init_configuration({"epochs": 2})
    for step in steps:
        one.log({"loss": 0.5}, step=step)
    one.finish()
    return one


def our_words(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "training.tracker"]


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
    """A scheduler's signal, or the kernel short of memory, may end wandb's own process."""
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
    """It is used: the server is asked, and refuses."""
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
    assert start_tracker(tiny_config(tmp_path, tmp_path / "run", tracker="none")) == {}
    logged_out.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert start_tracker(tiny_config(tmp_path, tmp_path / "run", tracker="wandb")) == {}
    assert "wandb is not installed" in caplog.text
