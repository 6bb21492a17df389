"""Start every loop, check what each computes, then let them take turns."""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from benchmarks.loops.rows import Row
from benchmarks.loops.spec import Loop, LoopSpec
from benchmarks.peers.process import ContestantProcess, ProcessContest
from training.config import TrainConfig

Logits = npt.NDArray[np.float64]
_SECONDS_OF_A_TURN = 3600.0
_TOLERANCE = 0.3  # of the logits' standard deviation: torch's resize differs from ours in the outermost pixels
_MAY_DIFFER = 0.05  # share of the logits: of two candidates that are equal but for rounding a search may take either


class Contest(ProcessContest):
    """The loops of one benchmark, each in its own process, and a row of results for each."""

    def __init__(self, loops: Sequence[Loop], spec: LoopSpec, cadences: int, step: Callable[[str], None]) -> None:
        """`cadences` are those of an epoch; `step` is called at every turn with the name of the loop."""
        super().__init__(step)
        self.rows = [Row(loop) for loop in loops]
        self._spec, self._cadences, self._stack = spec, cadences, ExitStack()

    def __enter__(self) -> "Contest":
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        path = self._folder / "spec.json"
        path.write_text(self._spec.to_json())
        for row in self.rows:
            if missing := row.loop.missing():
                row.failed = f"not installed: {missing}"
            else:
                self.processes[row.name] = ContestantProcess("benchmarks.loops", [row.name, str(path)])
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._stack.close()

    def check(self) -> None:
        """Warm each loop up with a turn, and check what it trained on, or its logits against those of the first row."""
        expected: Logits | None = None
        for row in self.rows:
            path = self._folder / f"{row.name}.npy"
            if answer := self.ask(row, f"turn {path}", _SECONDS_OF_A_TURN):
                logits = np.load(path)
                expected = logits if expected is None else expected
                if self._spec.what == "train":
                    reason = training_fault(self._spec.plan, self._cadences, answer)
                else:  # one held batch gives only its own logits
                    reason = "" if row.loop.feed == "held" else difference(logits, expected)
                if reason:
                    self.fail(row, reason)

    def play(self, number: int) -> None:
        """One round: a turn of each, in reverse order in every other round."""
        for row in self.rows[:: -1 if number % 2 else 1]:
            if answer := self.ask(row, "turn", _SECONDS_OF_A_TURN):
                row.rates.append(answer["cadences"] / answer["seconds"])
                row.cpu_ms.append(1000 * answer["cpu_s"] / answer["cadences"])


def measure(spec: LoopSpec, loops: Sequence[Loop], cadences: int, rounds: int) -> list[Row]:
    """Every loop in `rounds` rounds, after one turn that checks it."""
    with tqdm(total=len(loops) * (rounds + 1), unit="turn", disable=None, leave=False, dynamic_ncols=True) as bar:

        def step(name: str) -> None:
            bar.set_description(f"{name:<24}", refresh=False)
            bar.update()

        with Contest(loops, spec, cadences, step) as contest:
            contest.check()
            for number in range(rounds):
                contest.play(number)
    return contest.rows


def training_fault(plan: TrainConfig, cadences: int, answer: Mapping[str, Any]) -> str:
    """Why an epoch of `cadences` was not trained as the plan says; empty if it was."""
    image = [plan.canvas.channels, plan.canvas.height, plan.canvas.width]
    if not math.isfinite(answer["loss"]):
        return f"its loss is {answer['loss']}"
    if answer["shape"][1:] != image:
        return f"images of shape {answer['shape'][1:]}, expected {image}"
    if not 0 <= cadences - answer["cadences"] < plan.batch_size:  # it may drop a last, incomplete batch
        return f"an epoch of {answer['cadences']} cadences, expected {cadences}"
    return ""


def difference(logits: Logits, expected: Logits) -> str:
    """How logits differ from the expected ones; empty if all but a few agree within the tolerance."""
    if logits.shape != expected.shape:
        return f"logits of shape {logits.shape}, expected {expected.shape}"
    if not np.isfinite(logits).all():
        return "a logit is not finite"
    apart = np.abs(logits - expected)
    share = float((apart > _TOLERANCE * expected.std()).mean())
    return f"{share:.0%} of its logits differ, by up to {apart.max():.2g}" if share > _MAY_DIFFER else ""
