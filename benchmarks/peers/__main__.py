"""A contestant's process: builds its loader, then answers each line on standard input with one line of JSON.

check PATH      an epoch; the samples of the first keys go to PATH (npz, by key)
warm            an epoch, while memory is sampled
round SECONDS   whole epochs until SECONDS have passed
quit
"""

import argparse
import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.peers.measure import compared, timed_round, warmed
from benchmarks.peers.process import own_stdout, reason_of
from benchmarks.peers.spec import BY_NAME, Loading, Spec


def _built(spec: Spec, name: str) -> Loading:
    contestant = BY_NAME[name]
    module = import_module(f"benchmarks.peers.{contestant.module}")
    loading: Loading = module.build(spec, contestant.workers(spec.threads))
    return loading


def _answers(spec: Spec, name: str) -> dict[str, Any]:
    """The commands, by name."""
    contestant = BY_NAME[name]
    loading: list[Loading] = []

    def ready() -> Loading:
        if not loading:
            loading.append(_built(spec, name))
        return loading[0]

    def check(path: str) -> dict[str, Any]:
        # Training is random, so the canvas without draws is compared, which another loader makes.
        if spec.workload != "train":
            return compared(ready(), Path(path))
        plain = _built(replace(spec, workload="canvas"), name)
        try:
            return compared(plain, Path(path))
        finally:
            plain.close()

    def finish() -> dict[str, Any]:
        if loading:
            loading[0].close()
        return {}

    return {
        "check": check,
        "warm": lambda: warmed(ready(), (1, spec.threads) if contestant.tries_threads else ()),
        "round": lambda seconds: timed_round(ready(), float(seconds), spec.device),
        "quit": finish,
    }


def main() -> None:
    """Answer until told to quit, or until standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("name", choices=BY_NAME)
    parser.add_argument("--workload", choices=("raw", "canvas", "train", "tta"), required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shape", type=int, nargs=3, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--source", choices=("page-cache", "cold", "s3"), default="page-cache")
    parser.add_argument("--device", default="cpu")
    words = vars(parser.parse_args())
    name = words.pop("name")
    answers = own_stdout()
    commands = _answers(Spec(**{**words, "shape": tuple(words["shape"])}), name)
    for line in sys.stdin:
        command, *arguments = line.rstrip("\n").split(" ", 1)
        try:
            answer = commands[command](*arguments)
        except Exception as error:
            answer = {"failed": reason_of(error)}
        print(json.dumps(answer), file=answers, flush=True)
        if command == "quit":
            break


if __name__ == "__main__":
    main()
