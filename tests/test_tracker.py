"""Weights & Biases: offline without a login, nothing when told so, and never a stop where it is not installed."""

import importlib.util
import logging
from pathlib import Path

import pytest

from shard_tools.manifest import Manifest
from tests.tiny import pack_tiny, tiny_config
from tracker import start_tracker
from train import train


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("tracker"))


@pytest.fixture
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SILENT", "NETRC"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_without_a_login_a_run_is_tracked_offline_in_its_folder(
    manifest: Manifest, tmp_path: Path, logged_out: pytest.MonkeyPatch
) -> None:
    config = tiny_config(manifest.root, tmp_path / "run", epochs=1, tracker="wandb")
    train(config)
    runs = list((config.run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 1 and runs[0].stat().st_size > 0


def test_a_login_is_found_in_the_environment_and_in_netrc(tmp_path: Path, logged_out: pytest.MonkeyPatch) -> None:
    import os

    config = tiny_config(tmp_path, tmp_path / "run", tracker="wandb")
    logged_out.setenv("WANDB_API_KEY", "x" * 40)
    assert start_tracker(config) == {"log_with": "wandb"} and "WANDB_MODE" not in os.environ
    logged_out.delenv("WANDB_API_KEY")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert start_tracker(config) == {"log_with": "wandb"} and "WANDB_MODE" not in os.environ
    (tmp_path / ".netrc").unlink()
    assert start_tracker(config) == {"log_with": "wandb"} and os.environ["WANDB_MODE"] == "offline"


def test_no_tracker_means_none_and_a_missing_one_is_said(
    tmp_path: Path, logged_out: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert start_tracker(tiny_config(tmp_path, tmp_path / "run", tracker="none")) == {}
    logged_out.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert start_tracker(tiny_config(tmp_path, tmp_path / "run", tracker="wandb")) == {}
    assert "wandb is not installed" in caplog.text
