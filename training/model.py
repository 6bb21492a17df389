"""The network: a timm model built for a canvas, with or without pretrained weights."""

import difflib
from dataclasses import dataclass
from typing import Any, Literal, cast

import timm
import torch
from timm.models import split_model_name_tag
from torch import Tensor, nn
from torch.random import fork_rng

from shard_tools.axes import kaggle_axes
from shard_tools.cadence import PANELS
from shard_tools.errors import InputError
from training.float32_linear import Float32Linear
from training.pretrained import NoPretrainedError, create_from_hub, fill_pretrained, read_state, without_prefixes
from training.search.candidates import (
    CUTOUT_CHANNELS,
    CUTOUT_PLANES,
    FEATURES,
    WINDOW_CHANNELS,
    WINDOW_PLANES,
    WINDOW_RATES,
    CandidateModel,
    Candidates,
    SumWindows,
    WindowModel,
    upright_shape,
)
from training.search.panel_paths import PATH_PLANES, path_shape
from training.search.window_network import convnext_window
from training.weights import MAKE_FINE, SHIPPED, SHIPPED_FINE, fill_model, find_weights

# Small enough for a CPU: timm's tiny Swin, half as wide and a third as deep (5 million weights); one without its last
# stage (2 million), for small images; and convolutions (0.1 million) for windows of the de-Doppler sums.
_OWN_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "swin_nano": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 48, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 16)},
    ),
    "swin_pico": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 64, "depths": (2, 2, 2), "num_heads": (2, 4, 8)},
    ),
    convnext_window.__name__: (convnext_window.__name__, {}),
}


@dataclass(frozen=True)
class ModelConfig:
    """The network and its initial weights."""

    model: str = "swin_small_patch4_window7_224"
    """Name of a timm model, or swin_nano, swin_pico or convnext_window."""
    pretrained: str = "none"
    """hub: timm's pretrained weights, from its cache or the model hub. none: start from scratch.
    needlestream: the weights that come with the program, of preset demo. needlestream-fine: those that `make
    weights-fine` made, of preset fine. Anything else: a file of weights (.safetensors, .pth) for this model."""
    stem: Literal["none", "sums", "candidates"] = "none"
    """What the network looks at. none: the whole canvas. The others look at the lines on which the ON panels stand out
    most (training/search/candidates.py). sums: the de-Doppler sums around each line. candidates: the cadence along each
    line, turned upright. Both need --canvas panels, and are made for panels that are neither resized nor normalised, as
    in preset demo."""
    candidates: int = 2
    """With --stem sums or candidates, the number of lines; the control (ON and OFF exchanged) has the same number."""
    drop_path: float = 0.0
    """Probability of skipping a residual branch in training (stochastic depth)."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_path < 1:
            raise InputError(f"--drop-path {self.drop_path}: expected 0 to below 1")
        weights = find_weights(self.pretrained)
        if self.pretrained not in ("hub", "none") and not weights.is_file():
            expected = "expected hub, none, needlestream, needlestream-fine or a weights file"
            remedy = MAKE_FINE if weights == SHIPPED_FINE else expected
            raise InputError(f"--pretrained {self.pretrained}: no such file; {remedy}")
        if weights in (SHIPPED, SHIPPED_FINE) and (self.model, self.stem) != (convnext_window.__name__, "sums"):
            raise InputError(
                f"--pretrained {self.pretrained}: these weights are those of presets demo and fine (--model "
                f"convnext_window --stem sums), and not of --model {self.model} --stem {self.stem}"
            )
        if not 1 <= self.candidates <= 64:
            raise InputError(f"--candidates {self.candidates}: expected 1 to 64")

    @property
    def name(self) -> str:
        """The network's name. The command line, run files and weight files call it `model`."""
        return self.model

    @property
    def sees_time_reversed(self) -> bool:
        """Whether a cadence reversed in time is a valid input: not if lines are followed from panel to panel."""
        return self.stem == "none"

    def views(self, possible: tuple[str, ...]) -> tuple[str, ...]:
        """The TTA views of a canvas that this network may see; only the first two do not reverse time."""
        return possible if self.sees_time_reversed else possible[:2]


def build_model(config: ModelConfig, channels: int, height: int, width: int) -> nn.Module:
    """A network from canvases (B, channels, height, width) to logits (B, 1).

    Raises InputError if timm has no such model, it does not take such canvases, or the pretrained file does not fit
    it; NoPretrainedError if the hub's weights are not available.
    """
    name, own = _OWN_MODELS.get(config.model, (config.model, {}))
    _check_name(config.model, name)
    if config.model in _OWN_MODELS and config.pretrained == "hub":
        raise NoPretrainedError(
            f"--pretrained hub: there are no pretrained weights of {config.model}; start from scratch with "
            "--pretrained none, or give a file of weights with --pretrained FILE"
        )
    options: dict[str, Any] = {**own, "in_chans": channels, "num_classes": 1, "drop_path_rate": config.drop_path}
    if config.stem == "none":
        return _create_backbone(name, (height, width), options, config.pretrained)
    _check_candidates(config, channels, width)
    return _build_search_model(config, name, options, (height, width))


def _build_search_model(config: ModelConfig, name: str, options: dict[str, Any], size: tuple[int, int]) -> nn.Module:
    """A network behind a search; `name` and `options` are those of timm's model in it, `size` is the canvas's."""
    path = config.pretrained if config.pretrained in ("none", "hub") else str(find_weights(config.pretrained))
    state = {} if path in ("none", "hub") else read_state(path)
    # Whether the weights are a whole model's, with the stem, and not just a backbone's.
    ours = any(name.split(".")[-1] == "control_share" for name in state)
    start = "none" if ours else path
    model: nn.Module
    if config.stem == "sums":
        own = options | {"in_chans": WINDOW_PLANES, "num_classes": FEATURES}
        backbone = _create_backbone(name, (WINDOW_RATES, WINDOW_CHANNELS), own, start)
        own = {"in_chans": PATH_PLANES, "num_classes": FEATURES, "drop_path_rate": config.drop_path}
        path_network = _create_backbone(convnext_window.__name__, path_shape(size[0]), own, "none")
        model = WindowModel(backbone, path_network, SumWindows(kaggle_axes(*size), config.candidates))
    else:
        own = options | {"in_chans": CUTOUT_PLANES}
        backbone = _create_backbone(name, upright_shape(size[0]), own, start)
        model = CandidateModel(backbone, Candidates(kaggle_axes(*size), config.candidates))
    if ours:
        fill_model(model, without_prefixes(state, model.state_dict().keys()), f"--pretrained {path}")
    return model


def _check_candidates(config: ModelConfig, channels: int, width: int) -> None:
    """Raise InputError if the search for candidates cannot work on this canvas."""
    if channels != PANELS:
        raise InputError(f"--stem {config.stem}: needs the six panels apart, --canvas panels")
    if width < CUTOUT_CHANNELS:
        raise InputError(f"--stem {config.stem}: needs {CUTOUT_CHANNELS} channels or more, and the canvas has {width}")
    if config.candidates > 2 * width:
        raise InputError(f"--candidates {config.candidates}: a canvas of {width} channels has {2 * width} at most")


def _check_name(given: str, name: str) -> None:
    """Raise InputError if timm lacks a model, or the variant (tag) of it after the dot."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*timm.list_models(), *_OWN_MODELS], n=3)
        raise InputError(f"--model {given}: timm has no such model{f'; similar names: {near}' if near else ''}")
    bare, tag = split_model_name_tag(name)
    tags = timm.list_models(bare, include_tags=True)
    if tag and name not in tags:
        raise InputError(f"--model {given}: timm has no such variant of {bare}; expected {bare} or one of {tags}")


def _create_backbone(name: str, size: tuple[int, int], options: dict[str, Any], pretrained: str) -> nn.Module:
    """Timm's model, with a head in float32."""
    where = f"--model {name}, on a canvas of {options['in_chans']} x {size[0]} x {size[1]}"
    model: nn.Module
    if pretrained == "hub":
        with fork_rng(devices=[]):  # of this model only the accepted options are used
            _, taken = _create(name, where, size, options)
        model = create_from_hub(name, lambda: timm.create_model(name, pretrained=True, **taken))
    else:
        model, _ = _create(name, where, size, options)
        if pretrained != "none":
            fill_pretrained(model, read_state(pretrained), options["in_chans"], f"--pretrained {pretrained}")
    classifier = cast(Any, model).get_classifier()
    for path, module in list(model.named_modules()):
        if module is classifier and isinstance(module, nn.Linear):
            head = Float32Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            head.load_state_dict(module.state_dict(), assign=True)
            model.set_submodule(path, head)
    _try_out(model, where, (options["in_chans"], *size), options["num_classes"])
    return model


def _create(name: str, where: str, size: tuple[int, int], options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A timm model with new random weights, and those of the options that it accepts.

    Convolutional models take any size, and have no option `img_size`; some families have no stochastic depth.
    """
    optional = {"img_size": size, "drop_path_rate": options["drop_path_rate"]}
    needed = {key: value for key, value in options.items() if key not in optional}
    reason: Exception | None = None
    for left_out in ((), ("img_size",), ("drop_path_rate",), tuple(optional)):
        taken = needed | {key: value for key, value in optional.items() if key not in left_out}
        try:
            model = timm.create_model(name, **taken)
        except TypeError as error:  # an unknown argument
            reason = reason or error
            continue
        except Exception as error:  # each family checks sizes in its own way
            raise _refusal(where, error) from error
        if "drop_path_rate" in left_out and options["drop_path_rate"]:
            raise InputError(f"--drop-path {options['drop_path_rate']}: {name} has no stochastic depth, expected 0")
        return model, taken
    assert reason is not None
    raise _refusal(where, reason) from reason


def _try_out(model: nn.Module, where: str, shape: tuple[int, ...], outputs: int) -> None:
    """Run the model on one empty canvas (C, H, W): some models can be built for sizes on which they then fail."""
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), fork_rng(devices=[]):
            logit = model(torch.zeros(1, *shape, device=device))
    except Exception as error:
        raise _refusal(where, error) from error
    model.train()
    if not isinstance(logit, Tensor) or logit.shape != (1, outputs):
        raise InputError(f"{where}: does not give {outputs} numbers; choose another model")


def _refusal(where: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"{where}: fails ({type(error).__name__}: {reason}); choose another model, --height or --width")
