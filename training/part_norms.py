"""Norms of gradients, weights and updates for each part of the network, at steps 1, 10, 100, ... of a run.

A part whose gradient is 0, or whose update is tiny or huge next to its weights, does not learn. The norms are taken on
the device and read when a checkpoint is made, so that no step waits for the GPU.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

Norms = Mapping[str, Any]
"""A part at a step, as in norms.jsonl: step, part, gradient, weight, update. The last three are L2 norms, None if
not finite: of the gradient before clipping, of the weights before the update, and of the change that it made."""
_WRAPPER = "backbone."


def is_recorded(step: int) -> bool:
    """Whether the norms of a step, counted from 1, are recorded: powers of ten."""
    return step > 0 and 10 ** round(math.log10(step)) == step


def parts_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """A network's weights by part: its direct children and own weights, and each stage of a numbered stack.

    A Swin's parts are patch_embed, layers.0, layers.1, ..., norm and head.
    """
    found: dict[str, list[nn.Parameter]] = {}
    for name, weight in model.named_parameters():
        found.setdefault(_part_of(model, name), []).append(weight)
    return found


def _part_of(model: nn.Module, name: str) -> str:
    """The part of the weight `name`; a backbone's parts are named without the backbone."""
    wrapper = _WRAPPER if name.startswith(_WRAPPER) else ""
    first, second, *_ = [*name.removeprefix(wrapper).split("."), ""]
    is_stage = second.isdigit() and any(True for _ in model.get_submodule(f"{wrapper}{first}.{second}").children())
    return f"{first}.{second}" if is_stage else first


class PartNorms:
    """Takes the norms of a run's recorded steps."""

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        """`model` is the bare one, on its device."""
        self._accelerator = accelerator
        self._parts = parts_of(model)
        self._unread: list[tuple[int, Tensor]] = []

    @contextlib.contextmanager
    def around_update(self, step: int) -> Iterator[None]:
        """Record `step` if it is one to record; the `with` block clips the gradients and updates the weights."""
        if not is_recorded(step):
            yield
            return
        weights = [weight for part in self._parts.values() for weight in part]
        gradients = [weight.new_zeros(()) if weight.grad is None else weight.grad for weight in weights]
        gradient = self._norms(gradients) / self._scale()
        before = [weight.detach().clone() for weight in weights]
        yield
        update = self._norms(list(torch._foreach_sub([weight.detach() for weight in weights], before)))
        self._unread.append((step, torch.stack([gradient, self._norms(before), update])))

    def read(self) -> list[dict[str, Any]]:
        """Rows of the steps that were recorded since the last call; waits for the device."""
        rows = []
        for step, norms in self._unread:
            for part, values in zip(self._parts, norms.T.tolist(), strict=True):
                named = zip(("gradient", "weight", "update"), values, strict=True)
                rows.append({"step": step, "part": part, **{name: _finite_or_none(value) for name, value in named}})
        self._unread.clear()
        return rows

    def _norms(self, tensors: list[Tensor]) -> Tensor:
        """The norm of each part (parts,); `tensors` has one for each weight."""
        norms = iter(torch._foreach_norm(tensors))
        return torch.stack([torch.stack([next(norms) for _ in part]).norm() for part in self._parts.values()])

    def _scale(self) -> Tensor | float:
        """What the gradients were multiplied by: under fp16 GradScaler's scale, which clipping would divide out."""
        scaler = self._accelerator.scaler
        if scaler is None:
            return 1.0
        scale: Tensor = scaler.scale(torch.ones((), device=self._accelerator.device))
        return scale


def gradient_norm(norms: Norms) -> float:
    """The norm of the gradient; NaN if it was not finite."""
    return math.nan if norms["gradient"] is None else float(norms["gradient"])


def update_share(norms: Norms) -> float:
    """The norm of the update divided by that of the weights; NaN if either was not finite, or the latter 0."""
    if norms["update"] is None or not norms["weight"]:
        return math.nan
    return float(norms["update"] / norms["weight"])


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
