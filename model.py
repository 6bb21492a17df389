"""The backbone: build a timm model for a canvas, and load and save its weights."""

import difflib
import hashlib
import json
import logging
import socket
import urllib.parse
import urllib.request
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, cast

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.nn.functional import linear

from candidates import CUTOUT_CHANNELS, CUTOUT_PLANES, PANELS, CandidateModel, upright_shape
from shard_tools.errors import InputError
from shard_tools.files import write_whole

_log = logging.getLogger(__name__)
_METADATA, _SHA256 = "needlestream", "sha256"
_HUB_SECONDS = 5.0

# Small enough for a CPU: timm's tiny Swin, half as wide and a third as deep, of 5 million weights; and without its last
# stage, of 2 million, for small images.
_OWN_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin_nano": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 48, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 16)},
    ),
    "swin_pico": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 64, "depths": (2, 2, 2), "num_heads": (2, 4, 8)},
    ),
}


@dataclass(frozen=True)
class ModelConfig:
    """Which network, and what it starts from."""

    model: str = "swin_small_patch4_window7_224"
    """Name of a timm model, or swin_nano or swin_pico."""
    pretrained: str = "none"
    """hub: timm's pretrained weights, from its cache or the model hub. none: start from scratch.
    Anything else: a file of weights (.safetensors, .pth) for this model."""
    stem: Literal["none", "candidates"] = "none"
    """What the network looks at. none: the whole canvas. candidates: the lines on which the ON panels stand out most,
    turned upright (candidates.py); needs --canvas panels, and is made for unresized, unnormalised ones, as preset demo
    has them."""
    candidates: int = 2
    """With the stem candidates, the number of lines; the control (ON and OFF exchanged) has as many again."""
    drop_path: float = 0.0
    """Probability of skipping a residual branch in training (stochastic depth)."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_path < 1:
            raise InputError(f"--drop-path {self.drop_path}: expected 0 to below 1")
        if self.pretrained not in ("hub", "none") and not Path(self.pretrained).is_file():
            raise InputError(f"--pretrained {self.pretrained}: no such file; expected hub, none or a weights file")
        if not 1 <= self.candidates <= 64:
            raise InputError(f"--candidates {self.candidates}: expected 1 to 64")

    @property
    def sees_time_reversed(self) -> bool:
        """Whether reversing time leaves a cadence as it would be seen: not where lines run on from ON to OFF panels."""
        return self.stem == "none"

    def views(self, possible: tuple[str, ...]) -> tuple[str, ...]:
        """Of a canvas's TTA views, of which the first two leave time as it is, those that this network may see."""
        return possible if self.sees_time_reversed else possible[:2]


def build_model(config: ModelConfig, channels: int, height: int, width: int) -> nn.Module:
    """A network from canvases (B, channels, height, width) to logits (B, 1).

    Raises InputError where timm has no such model, or the pretrained file does not fit it.
    """
    name, own = _OWN_MODELS.get(config.model, (config.model, {}))
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*timm.list_models(), *_OWN_MODELS], n=3)
        raise InputError(f"--model {config.model}: timm has no such model; {f'near it: {near}' if near else ''}")
    options: dict[str, Any] = {**own, "in_chans": channels, "num_classes": 1, "drop_path_rate": config.drop_path}
    path = config.pretrained
    if config.stem == "none":
        return _create_backbone(name, (height, width), options, path)
    if channels != PANELS:
        raise InputError("--stem candidates: needs the six panels apart, --canvas panels")
    if width < CUTOUT_CHANNELS:
        raise InputError(f"--stem candidates: needs {CUTOUT_CHANNELS} channels or more, and the canvas has {width}")
    if config.candidates > 2 * width:
        raise InputError(f"--candidates {config.candidates}: a canvas of {width} channels has {2 * width} at most")
    options["in_chans"] = CUTOUT_PLANES
    ours = path not in ("none", "hub") and _is_of_candidates(path)
    backbone = _create_backbone(name, upright_shape(height), options, "none" if ours else path)
    model = CandidateModel(backbone, height, width, config.candidates)
    if ours:
        fill_model(model, load_weights(Path(path))[0], f"--pretrained {path}")
    return model


def _is_of_candidates(path: str) -> bool:
    """Whether a file holds weights that were trained with the stem, and not a backbone's alone."""
    try:
        with safe_open(path, framework="pt") as file:
            return any(name.startswith("backbone.") for name in file.keys())  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError):
        return False  # of another format: whoever reads it as a backbone's says what is wrong


class _Float32Linear(nn.Linear):
    """A head whose logits are float32 under autocast too: bf16 has 8 bits, which make near scores the same."""

    def forward(self, input: Tensor) -> Tensor:  # the name is nn.Linear's
        device = input.device.type
        with torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext():
            return linear(input.float(), self.weight, self.bias)


def _create_backbone(name: str, size: tuple[int, int], options: dict[str, Any], pretrained: str) -> nn.Module:
    if pretrained == "none":
        model = _create(name, size, options)
    elif pretrained == "hub":
        model = _create_from_hub(name, size, options)
    else:
        model = _create_from_file(name, size, options, pretrained)
    classifier = cast(Any, model).get_classifier()
    for path, module in list(model.named_modules()):
        if module is classifier and isinstance(module, nn.Linear):
            head = _Float32Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            head.load_state_dict(module.state_dict(), assign=True)
            model.set_submodule(path, head)
    return model


def _create(name: str, size: tuple[int, int], options: dict[str, Any]) -> nn.Module:
    try:
        return _timm_model(name, img_size=size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return _timm_model(name, **options)  # a convolutional model takes any size
    except AssertionError as error:
        raise InputError(f"--model {name}: does not take a canvas of {size[0]} x {size[1]} ({error})") from None


def _timm_model(name: str, **options: Any) -> nn.Module:
    model: nn.Module = timm.create_model(name, **options)
    return model


def _create_from_file(name: str, size: tuple[int, int], options: dict[str, Any], path: str) -> nn.Module:
    try:
        state = load_state_dict(path, weights_only=True)
        # timm adapts channels, tables of positions and the head, as it does with its own weights.
        given = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}
        model = _create(name, size, options | given)
    except (RuntimeError, SafetensorError, ValueError, OSError, EOFError, UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--pretrained {path}: does not fit {name} ({reason})") from None
    # timm lets weights that it does not know pass, and leaves those it misses as they were drawn.
    known = len(model.state_dict().keys() & state.keys())
    if 2 * known < len(model.state_dict()):
        raise InputError(f"--pretrained {path}: does not fit {name} ({known} of its {len(model.state_dict())} weights)")
    return model


def _create_from_hub(name: str, size: tuple[int, int], options: dict[str, Any]) -> nn.Module:
    import huggingface_hub.constants as hub

    if not hub.HF_HUB_OFFLINE and not _reachable(hub.ENDPOINT):
        hub.HF_HUB_OFFLINE = True  # look into the cache alone: the hub's own retries take most of a minute
    try:
        return _create(name, size, options | {"pretrained": True})
    except (OSError, RuntimeError) as error:
        _log.warning("no pretrained weights for %s at hand (%s): starting from scratch", name, type(error).__name__)
        return _create(name, size, options)


def _reachable(url: str) -> bool:
    if urllib.request.getproxies():
        return True  # a proxy answers for it
    try:
        socket.create_connection((urllib.parse.urlsplit(url).hostname, 443), timeout=_HUB_SECONDS).close()
    except OSError:
        return False
    return True


def save_weights(path: Path, state: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write weights as safetensors, at once or not at all; `about` says what is needed to use them."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    text = json.dumps(about)
    write_whole(path, save(tensors, metadata={_METADATA: text, _SHA256: _digest(tensors, text)}))


def _digest(tensors: dict[str, Tensor], about: str) -> str:
    """SHA-256 of weights and of what is said about them: safetensors itself notices no flipped bit."""
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights and what was said about them. Raises InputError where the file is not such weights."""
    try:
        # Read, not mapped: not every file system can map files, and all of it is hashed anyway.
        data = path.read_bytes()
        tensors = load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        text, stated = metadata[_METADATA], metadata[_SHA256]
        if _digest(tensors, text) != stated:
            raise InputError(f"{path}: changed after it was written (its SHA-256 does not match); train again")
        return tensors, json.loads(text)
    except FileNotFoundError:
        raise InputError(f"{path}: no such weights; train.py writes best.safetensors into its run folder") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a safetensors file ({error}); expected train.py's best.safetensors") from None
    except (KeyError, ValueError):
        raise InputError(f"{path}: does not say what it was trained on; expected train.py's best.safetensors") from None


def fill_model(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Put weights into a model. Raises InputError where they do not fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{where}: the weights do not fit the model ({reason}); of another version of the program? train again"
        ) from None


def pick_precision(device: torch.device) -> str:
    """bf16 where the hardware has it, else fp16 on a GPU, else float32; in Accelerate's words."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    # Emulated bf16 is slower than float32.
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "no"
