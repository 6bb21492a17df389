"""A training run on a GPU that is not there: its tensors have shapes, types and a device, but no values.

Everything is the program's own but for the data, and for what asks the driver: backward(), and fp16's scaler when it
looks whether a gradient overflowed.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, Self

import numpy as np
import pytest
import torch
import torch.cuda.amp.common
from timm.models.swin_transformer import SwinTransformerStage
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.loader import Batch
from shard_tools.manifest import Manifest
from training import run as run_module
from training.accelerator import build_accelerator
from training.config import Preset, TrainConfig
from training.model import build_model
from training.presets import PRESETS
from training.run import Run, build_run

GPU = torch.device("cuda", 0)
# Operations whose result Python has to know before it goes on.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique", "is_nonzero", "equal.default")
_PRODUCTS = ("linear.", "matmul.", "mm.", "addmm.", "bmm.", "convolution.", "_scaled_dot_product")


@cache
def _name(func: object) -> str:
    return str(func).removeprefix("aten.")


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Watch(TorchDispatchMode):
    """Notes what operations would do wrong on a GPU (mix devices, wait, use float64), and the types of products."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: set[str] = set()
        self.products: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _name(func)
        taken = _tensors((args, kwargs))
        if name.startswith(_WAITS) and any(each.device == GPU for each in taken):
            self.faults.add(f"{name} waits for the GPU")
        out = func(*args, **(kwargs or {}))
        tensors = [*taken, *_tensors(out)]
        devices = {each.device for each in tensors}
        if len(devices) > 1 and not (name == "copy_.default" and args[2:] == (True,)):  # an asynchronous copy
            self.faults.add(f"{name} on {sorted(map(str, devices))}")
        if any(each.dtype == torch.float64 and each.device == GPU and each.numel() > 1000 for each in tensors):
            self.faults.add(f"{name} in float64")
        if name.startswith(_PRODUCTS):
            self.products[tensors[-1].dtype] += 1
        return out


class Memory(TorchDispatchMode):
    """Measures the most bytes that tensors hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in _tensors(out):
            self._add(each.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self._known:
            self._known.add(address)
            self.held += size
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.held -= size


class FakeLoader:
    """Batches on the GPU, without values."""

    def __init__(self, manifest: Any, order: Any, share: Any, canvas: Any, *others: Any, **options: Any) -> None:
        self.share, self._canvas = share, canvas

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise NotImplementedError


def fake_batch(config: TrainConfig, views: int = 0, device: torch.device = GPU) -> Batch:
    size, canvas = config.batch_size, config.canvas
    shape = (size, *([views] if views else []), canvas.channels, canvas.height, canvas.width)
    return Batch(
        image=torch.empty(shape, device=device),
        target=torch.empty(size, device=device),
        counts=torch.empty(size, device=device, dtype=torch.bool),
        row=torch.empty(size, device=device, dtype=torch.int64),
        position=np.arange(size),
    )


def forget_values(mode: FakeTensorMode, model: nn.Module) -> nn.Module:
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: mode.from_tensor(values) for name, values in held.items() if values is not None})
    return model


def move(model: nn.Module, device: torch.device | None = None, **_: object) -> nn.Module:
    """nn.Module.to for tensors without values, which torch cannot move in place."""
    for module in model.modules():
        for name, values in module._parameters.items():
            if values is not None and values.device != device:
                module._parameters[name] = nn.Parameter(torch.empty_like(values, device=device))
        for name, values in module._buffers.items():
            if values is not None and values.device != device:
                module._buffers[name] = torch.empty_like(values, device=device)
    return model


def backward_without_driver(run: Run) -> Callable[[Tensor], None]:
    """A backward() that checks the loss and sets gradients of the right shapes and types."""

    def backward(loss: Tensor) -> None:
        assert loss.requires_grad and loss.ndim == 0 and (loss.device, loss.dtype) == (GPU, torch.float32)
        scaler = run.accelerator.scaler
        assert (scaler is None) == (run.accelerator.mixed_precision != "fp16")
        if scaler is not None:
            scaler.scale(loss)
        for parameter in run.bare_model.parameters():
            parameter.grad = torch.empty_like(parameter)

    return backward


class HostGenerator(torch.Generator):
    """A CPU generator in place of the GPU's that timm's EMA makes, to round weights in bf16, which ours are not."""

    def __new__(cls, device: object = None) -> Self:
        return super().__new__(cls)


class FakeEvent:
    """A CUDA event; nobody may wait for one before a later one was recorded."""

    latest: Any = None

    def __init__(self, **_: object) -> None: ...

    def record(self, stream: object = None) -> None:
        FakeEvent.latest = self

    def synchronize(self) -> None:
        assert FakeEvent.latest is not self, "waits for the GPU"


def is_set(flag: Tensor) -> bool:
    """The truth of a flag: False for its copy on the CPU; to read it on the GPU is a fault."""
    return bool(flag.item()) if flag.device == GPU else False


def pretend(patch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Answer for the GPU that is not there as its driver would."""
    patch.delenv("ACCELERATE_USE_CPU", raising=False)
    patch.setenv("ACCELERATE_TORCH_DEVICE", str(device))
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.amp.GradScaler, "_maybe_opt_step", lambda self, optimiser, *_: optimiser.step())
    patch.setattr(torch.cuda, "Event", FakeEvent)
    patch.setattr(torch.cuda, "current_stream", lambda *_: None)
    patch.setattr(torch, "Generator", HostGenerator)
    patch.setattr(FakeTensor, "__bool__", is_set, raising=False)
    patch.setattr(nn.Module, "to", move)
    patch.setattr(
        FakeTensorMode, "__deepcopy__", lambda self, _: self, raising=False
    )  # a copied model's tensors belong to the same mode


@contextmanager
def fake_run(
    preset: Preset, precision: str, manifest: Manifest, batch_size: int = 2, device: torch.device = GPU,
    is_whole: bool = False,
) -> Iterator[Run]:  # fmt: skip
    """A run of a preset as train.py builds it; without `is_whole` a Swin has only two blocks per stage."""
    base = PRESETS[preset]
    config = replace(base, shards=str(manifest.root), model=replace(base.model, pretrained="none"),
                     batch_size=batch_size, tracker="none", precision=precision)  # fmt: skip
    canvas = config.canvas
    # Built before values are taken away, since timm looks at values while it builds.
    bare = build_model(config.model, canvas.channels, canvas.height, canvas.width)
    for module in bare.modules():
        if isinstance(module, SwinTransformerStage) and not is_whole:
            module.blocks = module.blocks[:2]  # one without and one with shifted windows; the others repeat these
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch, device)
        patch.setattr(run_module, "Loader", FakeLoader)
        accelerator = build_accelerator(precision)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            patch.setattr(run_module, "build_model", lambda *_: forget_values(mode, bare))
            run = build_run(config, accelerator, manifest)
            if device == GPU:
                patch.setattr(accelerator, "backward", backward_without_driver(run))
            yield run
