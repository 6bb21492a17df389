"""One workload's contest: start everyone, compare what they load with a reference, then let them take turns."""

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.bench_data import snippet_paths
from benchmarks.peers.figures import Round, Row
from benchmarks.peers.measure import COMPARED
from benchmarks.peers.process import ContestantProcess, Failed, ProcessContest
from benchmarks.peers.spec import Contestant, Spec
from benchmarks.peers.transforms import load_npy, resized

Array = npt.NDArray[Any]
_TOLERANCE = 5e-4  # of the noise's standard deviation; resizing sums float32 in other orders
# At the border DALI repeats the outermost row and column and torch does not, so the two differ there.
_EDGE_TOLERANCE = 1.0


class Contest(ProcessContest):
    """The contestants of one workload, each in its own process, and a row of results for each."""

    def __init__(self, contestants: Sequence[Contestant], spec: Spec, step: Callable[[str], None]) -> None:
        """`step` is called at every turn with a description of it."""
        super().__init__(lambda name: step(f"{spec.workload}, {name}"))
        taking_part = [contestant for contestant in contestants if spec.workload in contestant.workloads]
        self.rows = [Row(contestant, spec.workload, spec.source) for contestant in taking_part]
        self._spec = spec

    def __enter__(self) -> "Contest":
        for row in self.rows:
            missing = row.contestant.missing()
            if missing:
                row.failed = f"not installed: {missing}"
            elif self._spec.source not in row.contestant.sources:
                row.failed = f"no such source: {self._spec.source}"
            else:
                self.processes[row.name] = ContestantProcess("benchmarks.peers", self._spec.words(row.name))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def compare(self, at_once: int) -> None:
        """Compare the first keys of an epoch of each with the reference, `at_once` contestants in parallel."""
        reference = reference_of(self._spec)
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(at_once) as pool:
            list(pool.map(lambda row: self._compare(row, Path(folder), reference), self.rows))

    def warm_up(self) -> None:
        """Run another epoch of each, one contestant at a time, and measure its memory."""
        for row in self.rows:
            answer = self.ask(row, "warm")
            row.peak_mb = answer.get("peak_mb", 0.0)

    def play(self, number: int, seconds: float, before: Callable[[Contestant], None]) -> None:
        """One round: a turn of each, in reverse order in every other round.

        `before` is called before each turn, and may raise Failed.
        """
        for row in self.rows[:: -1 if number % 2 else 1]:
            try:
                if not row.failed:
                    before(row.contestant)
            except Failed as reason:
                self.fail(row, str(reason))
            answer = self.ask(row, f"round {seconds}")
            if answer:
                row.rounds.append(Round(**answer))

    def _compare(self, row: Row, folder: Path, reference: dict[str, Array]) -> None:
        path = folder / f"{row.contestant.module}-{row.contestant.parallel}.npz"
        answer = self.ask(row, f"check {path}") if row.contestant.checked else {}
        if not answer:
            return
        with np.load(path) as found:
            row.failed = difference(dict(found), reference)
        count = len(snippet_paths(self._spec.data))
        if (answer["cadences"], answer["distinct"]) != (count, count):
            row.failed = f"an epoch of {answer['cadences']}, {answer['distinct']} distinct; expected {count}"


def reference_of(spec: Spec) -> dict[str, Array]:
    """The expected samples of the first keys, computed from their files."""
    found = {}
    for path in snippet_paths(spec.data)[:COMPARED]:
        snippet = load_npy(path)
        if spec.workload == "raw":
            found[path.stem] = snippet
            continue
        canvas = resized(torch.from_numpy(snippet).flatten(0, 1).float())
        views = [canvas, canvas.flip(-1)] if spec.workload == "tta" else [canvas]
        found[path.stem] = torch.stack(views).numpy()
    return found


def difference(found: dict[str, Array], reference: dict[str, Array]) -> str:
    """How a contestant's samples differ from the reference; empty if they agree within the tolerance."""
    if found.keys() != reference.keys():
        return f"failed: other keys, such as {min(found.keys() ^ reference.keys())}"
    for key, expected in reference.items():
        if found[key].size != expected.size:
            return f"failed: shape {found[key].shape}, expected {expected.shape}"
        apart = np.abs(found[key].reshape(expected.shape).astype(np.float32) - expected.astype(np.float32))
        if expected.dtype == np.float16:
            if apart.max() > 0:
                return f"failed: {key} differs by {apart.max():.2g}; float16 has to be equal"
        elif not (apart[..., 1:-1, 1:-1].max() <= _TOLERANCE and apart.max() <= _EDGE_TOLERANCE):
            return f"failed: canvas of {key} differs by {apart.max():.2g}"
    return ""
