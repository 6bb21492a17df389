"""Weights & Biases, through Accelerate: online when logged in, else into the run folder, or not at all."""

import importlib.util
import logging
import netrc
import os
import urllib.parse
from typing import Any

from config import TrainConfig

_log = logging.getLogger(__name__)


def start_tracker(config: TrainConfig) -> dict[str, Any]:
    """Accelerator's options for the tracker that a configuration asks for."""
    if config.tracker == "none":
        return {}
    if importlib.util.find_spec("wandb") is None:
        _log.warning("wandb is not installed: no tracker; metrics.jsonl in %s has the same numbers", config.run_dir)
        return {}
    if not _logged_in():
        os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    return {"log_with": "wandb"}


def _logged_in() -> bool:
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return bool(os.environ.get("WANDB_API_KEY")) or netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
