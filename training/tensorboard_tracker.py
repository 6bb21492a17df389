"""TensorBoard, through Accelerate: event files in the run folder, one run however often the training is started.

As with W&B, the training does not depend on it: an error only gives a warning.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import TensorBoardTracker
from PIL.Image import Image

FOLDER = "tensorboard"
_log = logging.getLogger(__name__)


class OptionalTensorBoard(TensorBoardTracker):  # type: ignore[misc]  # Accelerate ships no types
    """Writes RUN/tensorboard; whatever fails there never stops the training."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(FOLDER, run_dir)
        self.writer: Any = None

    def start_after(self, step: int) -> None:
        """Hide what an earlier start wrote after `step`, where this one goes on. Call it before `start`.

        Step 0 hides nothing: the run begins, or it is finished and has lost its checkpoints.
        """
        if step:
            self.init_kwargs["purge_step"] = step + 1

    def start(self) -> None:
        """Begin a new event file, which TensorBoard shows as one run with the earlier ones."""
        try:
            super().start()
        except Exception as error:  # of any kind: the training does not need a tracker
            self._go_on_without(error)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Write the configuration as text; Accelerate's own way takes no nested values."""
        text = "```\n" + json.dumps(values, indent=1) + "\n```"
        self._try(lambda: self.writer.add_text("config", text, global_step=0))

    def log(self, values: dict[str, Any], step: int | None = None, **words: Any) -> None:
        """Write the numbers of a step."""
        log = super().log
        self._try(lambda: log(values, step=step, **words))

    def log_images(self, values: dict[str, Sequence[Image]], step: int | None = None, **words: Any) -> None:
        """Write pictures; several under one name get a number each."""
        for name, images in values.items():
            for number, image in enumerate(images, start=1):
                tag = name if len(images) == 1 else f"{name}/{number}"
                self._try(lambda tag=tag, image=image: self._add_image(tag, image, step))  # type: ignore[misc]

    def log_table(self, name: str, columns: Sequence[str], data: Sequence[Sequence[Any]], step: int) -> None:
        """Write a table as text, and the pictures in its cells as pictures."""
        is_picture = [any(isinstance(row[number], Image) for row in data) for number in range(len(columns))]
        self.log_images({name: [cell for row in data for cell in row if isinstance(cell, Image)]}, step)
        words = [[cell for cell, skip in zip(row, is_picture, strict=True) if not skip] for row in (columns, *data)]
        self._try(lambda: self.writer.add_text(name, _to_markdown(words), global_step=step))

    def finish(self) -> None:
        """Write what is left, and close the file; does nothing the second time."""
        self._try(lambda: self.writer.close())
        self.writer = None

    def _add_image(self, tag: str, image: Image, step: int | None) -> None:
        self.writer.add_image(tag, np.asarray(image.convert("RGB")), global_step=step, dataformats="HWC")

    def _try(self, do: Callable[[], None]) -> None:
        """Do something with the writer; go on without it if that fails."""
        if self.writer is None:
            return
        try:
            do()
        except Exception as error:  # of any kind: the training does not need a tracker
            self._go_on_without(error)

    def _go_on_without(self, error: Exception) -> None:
        _log.warning(
            "warning: TensorBoard failed (%s: %s): going on without; metrics.jsonl has the same numbers",
            type(error).__name__, error,
        )  # fmt: skip
        self.writer = None


def _to_markdown(rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table of rows, of which the first is its head."""
    head, *body = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])
