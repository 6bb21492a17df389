"""The trackers of a training, among them the one for Weights & Biases, through Accelerate.

W&B is online if the user is logged in; else it writes into the run folder, or does nothing. The training does not
depend on it: no network, no key, a wrong key or a hanging server costs seconds and gives a warning.
"""

import atexit
import importlib.util
import logging
import os
import re
import textwrap
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.tracking import WandBTracker
from PIL.Image import Image

from shard_tools.atomic_files import write_whole
from training.config import TrainConfig, to_dict
from training.tensorboard_tracker import OptionalTensorBoard

_PROJECT = "needlestream"
# Defaults for wandb's environment variables. Without them it waits for a server for 90 s at the start and forever at
# the end, and reports its own errors to the server that it cannot reach.
_ENVIRONMENT = {
    "WANDB_INIT_TIMEOUT": "6",
    "WANDB_FINISH_TIMEOUT": "6",
    "WANDB_FINISH_TIMEOUT_RAISES": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
}
_log = logging.getLogger(__name__)


def build_trackers(config: TrainConfig) -> dict[str, Any]:
    """Accelerator's options for the trackers that a configuration asks for; one that is not installed is left out."""
    kinds: dict[str, type[OptionalWandB] | type[OptionalTensorBoard]] = {
        "wandb": OptionalWandB,
        "tensorboard": OptionalTensorBoard,
    }
    wanted = [name for name in config.tracker if name != "none"]
    for name in (missing := [name for name in wanted if importlib.util.find_spec(name) is None]):
        _log.warning(
            "%s is not installed: nothing is sent to it; metrics.jsonl in %s has the same numbers", name, config.run_dir
        )
    trackers = [kinds[name](config.run_dir) for name in wanted if name not in missing]
    return {"log_with": trackers} if trackers else {}


def start_trackers(accelerator: Accelerator, config: TrainConfig, step: int) -> None:
    """Start the trackers of a run that begins, or goes on, after `step`."""
    for tracker in accelerator.log_with:
        if isinstance(tracker, OptionalTensorBoard):
            tracker.start_after(step)
    accelerator.init_trackers(_PROJECT, to_dict(config))


class OptionalWandB(WandBTracker):  # type: ignore[misc]  # Accelerate ships no types
    """A W&B run that each start of the training resumes, and whose failures never stop the training."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(_PROJECT)
        self.run: Any = None
        self._folder = run_dir / "wandb"

    def start(self) -> None:
        """Begin the run of this run folder, or go on with it: online, else offline, else not at all."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            run_id = own_run_id(self._folder)
            self.run = self._online(run_id) or self._init(run_id, "offline")
        except Exception as error:  # of any kind: the training does not need a tracker
            self._go_on_without(error)
        # wandb's own exit hook ends in a traceback if its service died. Hooks run in reverse, so this one runs before.
        atexit.register(self.finish)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the configuration with the run."""
        self._try(lambda: self.run.config.update(values, allow_val_change=True))

    def log(self, values: dict[str, Any], step: int | None = None, **words: Any) -> None:
        """Hand numbers of a step to wandb, which sends them in the background."""
        self._try(lambda: self.run.log(values, step=step, **words))

    def log_images(self, values: dict[str, Sequence[Image]], step: int | None = None, **words: Any) -> None:
        """Hand pictures to wandb."""
        log_images = super().log_images
        self._try(lambda: log_images(values, step=step, **words))

    def log_table(self, name: str, columns: Sequence[str], data: Sequence[Sequence[Any]], step: int) -> None:
        """Hand a table to wandb; its cells may be pictures."""
        self._try(lambda: self._log_table(name, columns, data, step))

    def _log_table(self, name: str, columns: Sequence[str], data: Sequence[Sequence[Any]], step: int) -> None:
        import wandb

        cells: list[Any] = [[wandb.Image(cell) if isinstance(cell, Image) else cell for cell in row] for row in data]
        self.run.log({name: wandb.Table(columns=list(columns), data=cells)}, step=step)

    def finish(self) -> None:
        """Send what is left, and end wandb; does nothing the second time."""
        atexit.unregister(self.finish)
        self._try(lambda: self.run.finish())
        if self.run is not None:
            self.run = None
            _teardown()

    def _online(self, run_id: str) -> Any:
        """The run on the server, or in the mode that WANDB_MODE asks for; None if that fails."""
        import wandb
        from wandb.sdk.lib.wbauth import authenticate_session

        settings = wandb.setup().settings
        try:
            # Without a key wandb.init would ask for one at a terminal, and wait.
            if settings.mode == "online" and not authenticate_session(
                host=settings.base_url, source=_PROJECT, prompt=False, update_session=False
            ):
                return None
            return self._init(run_id, None)
        except Exception as error:  # of the network, the server, the key, wandb's service
            _log.warning(
                "warning: cannot use W&B at %s (%s): tracking offline, `wandb sync %s` uploads it later; "
                "WANDB_INIT_TIMEOUT=60 waits longer, --tracker none turns W&B off",
                settings.base_url, _one_line(error), self._folder,
            )  # fmt: skip
        _teardown()  # its service considers the run started, and would refuse the same id
        return None

    def _init(self, run_id: str, mode: Literal["offline"] | None) -> Any:
        import wandb

        # Offline too the run is resumed: `wandb sync` then asks the server what it has of the run, and adds to it.
        return wandb.init(project=_PROJECT, dir=str(self._folder.parent), id=run_id, resume="allow", mode=mode)

    def _try(self, do: Callable[[], None]) -> None:
        """Do something with the run; go on without it if that fails."""
        if self.run is None:
            return
        try:
            do()
        except Exception as error:  # of any kind: the training does not need a tracker
            self._go_on_without(error)

    def _go_on_without(self, error: Exception) -> None:
        _log.warning(
            "warning: W&B failed (%s): going on without; metrics.jsonl has the same numbers, and "
            "`wandb sync --include-online %s` sends what was not sent",
            _one_line(error), self._folder,
        )  # fmt: skip
        self.run = None
        _teardown()


def own_run_id(folder: Path) -> str:
    """The id of a run folder's W&B run: WANDB_RUN_ID, else the one kept in `folder`, else a new one; kept there."""
    path = folder / "run_id.txt"
    kept = path.read_text(errors="replace").strip() if path.is_file() else ""
    run_id = os.environ.get("WANDB_RUN_ID") or kept
    if not re.fullmatch(r"[\w-]{1,64}", run_id, re.ASCII):
        run_id = uuid.uuid4().hex[:12]
    if run_id != kept:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, run_id + "\n")
    return run_id


def _teardown() -> None:
    """End wandb's service, so that the next run starts with a new one."""
    try:
        import wandb

        wandb.teardown()
    except Exception as error:  # it has ended already, or was never started
        _log.debug("wandb.teardown: %s", error)


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
