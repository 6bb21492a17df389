"""Three rates of one model on one data set, measured in turns: loader alone, model alone, both together.

"Both together" is the project's own loop, `train_epoch` or `predict_rows`, over its own loader; "model alone" is the
same function over one batch that is kept on the device. So the loader is the only difference between the two.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from torch import nn

from benchmarks.model_figures import wait_for
from pipeline.loader import Batch, Loader
from pipeline.plan import Share
from train import train_epoch
from training.prediction import predict_rows
from training.run import Progress, Run

What = Literal["train", "infer"]
Rate = Literal["loader", "model", "both"]
Rates = dict[Rate, list[float]]
"""Cadences/s of each round."""


class Held:
    """The first batch of a loader, repeated for as many batches as an epoch has."""

    def __init__(self, loader: Loader, share: Share | None = None) -> None:
        """`share` sets another length of an epoch."""
        self.share = share or loader.share
        first = next(iter(loader))
        loader.load_state_dict({"epoch": 0, "position": 0})  # so that the loader still starts with this batch
        self.batch: Batch = dataclasses.replace(first, image=first.image.clone())

    def __len__(self) -> int:
        return self.share.steps * self.share.accumulate

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(len(self)):
            yield self.batch


def trained_per_second(run: Run, batches: Loader | Held) -> float:
    """Cadences/s of an epoch of train.py's loop over `batches`."""
    # With new Progress, so that the epoch counts from its first step.
    return train_epoch(dataclasses.replace(run, train_loader=cast(Loader, batches), progress=Progress()))[
        "cadences_per_s"
    ]


def predicted_per_second(accelerator: Accelerator, model: nn.Module, batches: Loader | Held) -> float:
    """Cadences/s of infer.py's `predict_rows` over `batches`, each in all its views."""
    began = time.perf_counter()
    predict_rows(accelerator, model, cast(Loader, batches), "prediction")  # it ends with the logits on the CPU
    return batches.share.length / (time.perf_counter() - began)


def loaded_per_second(loader: Loader, device: torch.device) -> float:
    """Cadences/s of an epoch of the loader; its batches are not used."""
    began = time.perf_counter()
    for _ in loader:
        pass
    wait_for(device)
    return loader.share.length / (time.perf_counter() - began)


def train_rates(run: Run, rounds: int) -> Rates:
    """The three rates of training."""
    held = Held(run.train_loader)
    return take_turns(
        {
            "loader": lambda: loaded_per_second(run.train_loader, run.accelerator.device),
            "model": lambda: trained_per_second(run, held),
            "both": lambda: trained_per_second(run, run.train_loader),
        },
        rounds,
    )


def infer_rates(accelerator: Accelerator, model: nn.Module, loader: Loader, rounds: int) -> Rates:
    """The three rates of prediction."""
    held = Held(loader)
    return take_turns(
        {
            "loader": lambda: loaded_per_second(loader, accelerator.device),
            "model": lambda: predicted_per_second(accelerator, model, held),
            "both": lambda: predicted_per_second(accelerator, model, loader),
        },
        rounds,
    )


def take_turns(ways: Mapping[Rate, Callable[[], float]], rounds: int) -> Rates:
    """Call each way once to warm up, then once a round, in an order that changes from round to round."""
    names = list(ways)
    found: Rates = {name: [] for name in names}
    for turn in range(-1, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            rate = ways[name]()
            if turn >= 0:
                found[name].append(rate)
    return found


def to_figures(what: What, rates: Rates, views: int) -> list[dict[str, Any]]:
    """A figure for each rate, and one with the ratio, the stall and what bounds the rate."""
    figures: list[dict[str, Any]] = [
        {
            "workload": what,
            "rate": name,
            "cadences_per_s": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
        }
        for name, values in rates.items()
    ]
    ratios = [both / model for both, model in zip(rates["both"], rates["model"], strict=True)]
    middle = {name: statistics.median(values) for name, values in rates.items()}
    figures.append(
        {
            "workload": what,
            "ratio": statistics.median(ratios),
            "lowest_ratio": min(ratios),
            "highest_ratio": max(ratios),
            # The share of a step that the loader adds.
            "stall": max(0.0, 1 - statistics.median(ratios)),
            "bound_by": "loader" if middle["loader"] < middle["model"] else "model",
            "images_per_s": middle["both"] * views,
            "model_images_per_s": middle["model"] * views,
        }
    )
    return figures


def verdict(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """The figure that has the ratio, the stall and what bounds the rate."""
    (found,) = (figure for figure in figures if "ratio" in figure)
    return found


def below_goal(figures: list[dict[str, Any]], goal: float, margin: float) -> bool:
    """Whether the ratio of both together to the model alone is below the goal times a margin."""
    return bool(verdict(figures)["ratio"] < goal * margin)
