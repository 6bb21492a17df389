"""Load weights that another program trained into a timm model, which then gives the same scores as there.

Initial weights (pretrained.py) may lack a head or be adapted to another canvas. Weights for scoring must fit exactly,
with nothing missing, resized or left over; else they are refused.
"""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.canvas import CanvasConfig
from shard_tools.errors import InputError
from training.model import ModelConfig, build_model
from training.pretrained import head_names, read_state, to_own_form, without_prefixes
from training.weights import check_finite, some

_COLOURS = 3  # channels that the usual pretrained weights take; users repeat a grey image for them
_LOSSES = ("criterion.", "loss.", "loss_fn.")  # prefixes of tensors of a training wrapper's loss
_TABLE = ".relative_position_bias_table"
State = dict[str, Tensor]
_log = logging.getLogger(__name__)


def load_other_weights(path: Path, name: str, canvas: CanvasConfig) -> nn.Module:
    """The timm model `name` with the weights of a .pth or .safetensors file, from canvases (B, C, H, W) to (B, 1).

    Logits are those that the file's own network gives. A first convolution of three colours becomes one of a grey
    image, equal to repeating that image three times. A head of two classes becomes one logit, their difference, whose
    sigmoid is the softmax of the second. Raises InputError if the file does not hold exactly such a network.
    """
    where = f"--weights {path}"
    state = read_state(str(path), "--weights")
    model = build_model(ModelConfig(name), canvas.channels, canvas.height, canvas.width)
    own = model.state_dict()
    state = without_prefixes(state, own.keys())
    check_finite(state, where)
    given = _to_own_form(model, state, where, name)
    _match_channels(model, given, canvas, where)
    _match_head(model, given, where)
    _check_whole(given, own, where, name)
    model.load_state_dict({name: given[name] for name in own})
    return model


def _to_own_form(model: nn.Module, state: State, where: str, name: str) -> State:
    """`state` under the model's own names. Raises InputError if timm would resize a tensor to another canvas."""
    own = model.state_dict()
    _check_tables(state, own, where, name)
    try:
        given = to_own_form(model, state)
    except Exception as error:  # timm's functions raise almost any error on unknown names and shapes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{where}: does not fit --model {name} ({reason})") from None
    kept = {id(value) for value in state.values()}
    changed = [key for key, value in given.items() if key in state and id(value) not in kept]
    # These have the model's size already: timm resizes the tables of windows that are not square in any case.
    given |= {key: state[key] for key in changed if key in own and state[key].shape == own[key].shape}
    _refuse_sizes([key for key in changed if given[key] is not state[key]], where, name)
    return given


def _check_tables(state: State, own: State, where: str, name: str) -> None:
    """Raise InputError if tables of relative positions belong to other blocks, or to windows of another size."""
    tables = [key for key in state if key.endswith(_TABLE)]
    if others := sorted(key for key in tables if key not in own):
        raise _not_whole(where, "has more than that model:", others, name)
    _refuse_sizes([key for key in tables if len(state[key]) != len(own[key])], where, name)


def _refuse_sizes(resized: list[str], where: str, name: str) -> None:
    if resized:
        raise InputError(
            f"{where}: trained on images of another size ({some(resized)}); give the --height and --width of that "
            f"training, and check --model {name}"
        )


def _match_channels(model: nn.Module, given: State, canvas: CanvasConfig, where: str) -> None:
    """Sum a first convolution over three colours for a canvas of one channel; refuse any other difference."""
    first = cast(Any, model).pretrained_cfg.get("first_conv")
    key = f"{first}.weight"
    if not isinstance(first, str) or key not in given or given[key].ndim != 4:
        return  # _check_whole says what does not fit
    has, needed = given[key].shape[1], model.state_dict()[key].shape[1]
    if has == needed:
        return
    if (has, needed) != (_COLOURS, 1):
        raise InputError(
            f"{where}: takes images of {has} channels, and --canvas {canvas.layout} has {canvas.channels}; choose a "
            f"--canvas of {has}{' or of 1' if has == _COLOURS else ''}"
        )
    given[key] = given[key].float().sum(dim=1, keepdim=True)


def _match_head(model: nn.Module, given: State, where: str) -> None:
    """Put the file's head, whatever its name, in the place of the model's, as a head of one logit."""
    targets, own = head_names(model), model.state_dict()
    if len(targets) != 1 or f"{targets[0]}.weight" not in own:
        return  # not a classifier of one layer: _check_whole says what does not fit
    target = targets[0]
    name = target if f"{target}.weight" in given else _find_head(given, own, own[f"{target}.weight"].shape[1], where)
    weight, bias = given.pop(f"{name}.weight"), given.pop(f"{name}.bias", None)
    outputs = len(weight)
    if outputs not in (1, 2):
        raise InputError(f"{where}: its head {name} has {outputs} outputs, expected 1, or 2 for two classes")
    bias = torch.zeros(outputs) if bias is None else bias
    weight, bias = weight.float(), bias.float()
    given[f"{target}.weight"] = weight if outputs == 1 else weight[1:] - weight[:1]
    given[f"{target}.bias"] = bias if outputs == 1 else bias[1:] - bias[:1]


def _find_head(given: State, own: State, features: int, where: str) -> str:
    """The name of the one linear layer that the model lacks and that takes its features."""
    found = [
        name.removesuffix(".weight")
        for name, value in given.items()
        if name.endswith(".weight") and name not in own and value.ndim == 2 and value.shape[1] == features
    ]
    if len(found) != 1:
        raise InputError(
            f"{where}: {len(found)} linear layers could be its head{f' ({some(found)})' if found else ''}, expected "
            f"one that takes {features} features; a head of several layers cannot be used"
        )
    return found[0]


def _check_whole(given: State, own: State, where: str, name: str) -> None:
    """Raise InputError unless `given` has all tensors of the model in their shapes, and no others."""
    missing = sorted(own.keys() - given.keys())
    unfit = sorted(key for key in own.keys() & given.keys() if own[key].shape != given[key].shape)
    others = sorted(given.keys() - own.keys())
    of_loss = [key for key in others if key.startswith(_LOSSES)]
    unused = [key for key in others if key not in of_loss]
    for fault, names in (("lacks", missing), ("has other shapes of", unfit), ("has more than that model:", unused)):
        if names:
            raise _not_whole(where, fault, names, name)
    if of_loss:
        _log.info("%s: not used: %s", where, ", ".join(of_loss))


def _not_whole(where: str, fault: str, names: list[str], model: str) -> InputError:
    return InputError(
        f"{where}: {fault} {some(names)}; expected exactly the weights of --model {model}, since scores of an "
        "incomplete network mean nothing"
    )
