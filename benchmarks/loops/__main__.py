"""A loop's process: answers each line on standard input with one line of JSON.

turn [PATH]     an epoch of training, or a prediction of all cadences, whose logits go to PATH (npy)
quit
"""

# Every loop gets these settings of train.py and infer.py: the loops are compared, not the settings of the process.
import shard_tools.system.allocator
import shard_tools.system.openmp  # noqa: F401  before torch is loaded

# isort: split
import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loops.feed import Job
from benchmarks.loops.spec import BY_NAME, LoopSpec, Turn, Turns
from benchmarks.model_figures import wait_for
from benchmarks.peers.measure import cpu_seconds
from benchmarks.peers.process import own_stdout, reason_of

Answer = Callable[[dict[str, Any]], None]


def take_turns(commands: Iterable[str], answer: Answer, device: torch.device) -> Turns:
    """A Turn for each command; times what the loop does until it asks for the next one, and answers with that."""
    for line in commands:
        command, *path = line.rstrip("\n").split(" ", 1)
        if command == "quit":
            break
        turn, cpu, began = Turn(), cpu_seconds(), time.perf_counter()
        yield turn
        wait_for(device)
        seconds = time.perf_counter() - began
        for each in path:
            np.save(each, turn.logits)
        answer(
            {
                "cadences": turn.cadences, "loss": turn.loss, "shape": list(turn.shape), "seconds": seconds,
                "cpu_s": cpu_seconds() - cpu,
            }
        )  # fmt: skip
    answer({})


def run(job: Job, module: Any, turns: Turns) -> None:
    """Train or predict once for each turn."""
    if job.spec.what == "train":
        module.train(job, turns)
        return
    predict = module.predictor(job)
    for turn in turns:
        turn.logits, turn.cadences = predict(), len(job.rows)


def main() -> None:
    """Answer until told to quit, or until standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loops", description=__doc__)
    parser.add_argument("name", choices=BY_NAME)
    parser.add_argument("spec", type=Path, help="a file that holds a LoopSpec as JSON")
    words = parser.parse_args()
    loop, spec = BY_NAME[words.name], LoopSpec.from_json(words.spec.read_text())
    answers = own_stdout()

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        job = Job(spec, loop.feed, loop.workers(spec.workers))
        module = import_module(f"benchmarks.loops.{loop.module}")
        run(job, module, take_turns(sys.stdin, answer, job.device))
    except Exception as error:
        answer({"failed": reason_of(error)})


if __name__ == "__main__":
    main()
