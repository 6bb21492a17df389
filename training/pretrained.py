"""Initial weights of a training: from the model hub, or from a file that anyone may have written."""

import contextlib
import http.client
import logging
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import timm.models
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from shard_tools.errors import InputError
from training.weights import check_finite, is_ours, load_weights, some

_log = logging.getLogger(__name__)
_HUB_SECONDS = 5.0
# What wrappers put before the names of the network they hold: Lightning modules, notebooks, DDP, torch.compile.
_PREFIXES = ("model.", "backbone.", "module.", "_orig_mod.", "net.")
# Timm's names for the function that converts weights of other programs and sizes to a model's own form.
_FILTERS = ("checkpoint_filter_fn", "_filter_fn")
_NO_GATEWAY = (407, 502, 503, 504)  # statuses of a proxy that cannot reach the hub


class NoPretrainedError(InputError):
    """The hub's weights were asked for but are not available."""


def create_from_hub(name: str, create: Callable[[], nn.Module]) -> nn.Module:
    """What `create` builds with the hub's weights of the timm model `name`, from the hub or from its cache.

    Raises NoPretrainedError if neither has them: training from scratch instead would give another result.
    """
    from huggingface_hub import constants, errors

    failed: type[Exception] = cast(Any, errors).HTTPError  # that of its HTTP library, which has changed before
    configuration = timm.models.get_pretrained_cfg(name)
    if configuration is None or not configuration.has_weights:
        raise NoPretrainedError(
            f"--pretrained hub: there are no pretrained weights of {name}; start from scratch with --pretrained none, "
            "or give a file of weights with --pretrained FILE"
        )
    try:
        with _hub_or_cache():
            return create()
    except (OSError, RuntimeError, ValueError, SafetensorError, EOFError, UnpicklingError, failed) as error:
        raise NoPretrainedError(
            f"--pretrained hub: no weights of {name} at {constants.ENDPOINT}, nor in the cache "
            f"{constants.HF_HUB_CACHE} ({type(error).__name__}). Three ways out: fill the cache where there is a "
            f"""network (HF_HOME=DIR python -c "import timm; timm.create_model('{name}', pretrained=True)") and set """
            "HF_HOME to a copy of DIR here; give a file of weights with --pretrained FILE; or start from scratch with "
            "--pretrained none"
        ) from error


@contextlib.contextmanager
def _hub_or_cache() -> Iterator[None]:
    """Use only the cache in this context if the hub does not answer: the hub's own retries take most of a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not is_reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def is_reachable(url: str) -> bool:
    """Whether a web server answers within seconds, through the proxies that the environment names."""
    if "all" in urllib.request.getproxies():
        return True  # urllib does not know such proxies, but the hub's library does
    opener = urllib.request.build_opener()  # with the current proxies
    try:
        opener.open(urllib.request.Request(url, method="HEAD"), timeout=_HUB_SECONDS).close()  # noqa: S310
    except urllib.error.HTTPError as error:
        return error.code not in _NO_GATEWAY
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the hub's library may trust other certificates
    except (OSError, http.client.HTTPException, ValueError):
        return False
    return True


def read_state(path: str, option: str = "--pretrained") -> dict[str, Tensor]:
    """The tensors of a file of weights, by name, whichever program wrote it.

    Raises InputError naming the command line's `option` if the file holds none. No code in the file is run.
    """
    if is_ours(Path(path)):
        return load_weights(Path(path))[0]
    try:
        if Path(path).suffix == ".safetensors":  # read, not mapped: not every file system can map files
            return load(Path(path).read_bytes())
        held = timm.models.load_state_dict(path, weights_only=True)
    except (RuntimeError, SafetensorError, ValueError, OSError, EOFError, UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{option} {path}: not a file of weights that can be read safely ({reason})") from None
    within = [_tensors(value) for value in held.values() if isinstance(value, Mapping) and _tensors(value)]
    if tensors := _tensors(held):
        return tensors
    if len(within) == 1:
        return within[0]
    raise InputError(f"{option} {path}: holds {len(within)} sets of weights, expected one; keys: {some([*held])}")


def _tensors(held: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def without_prefixes(state: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """`state` without wrappers' prefixes: strips as many as let the most names match a model's `names`."""
    stripped = [state]
    while (shorter := _without_one(stripped[-1])).keys() != stripped[-1].keys():
        stripped.append(shorter)
    return max(stripped, key=lambda found: len(found.keys() & names))  # the first of equals


def _without_one(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the first prefix of each of its names."""
    shorter = {name: next((name.removeprefix(p) for p in _PREFIXES if name.startswith(p)), name) for name in state}
    # A name that had a prefix wins over the same name without one, which belongs to a wrapper.
    ordered = sorted(state, key=lambda name: name != shorter[name])
    return {shorter[name]: state[name] for name in ordered}


def fill_pretrained(model: nn.Module, state: dict[str, Tensor], channels: int, where: str) -> None:
    """Load the tensors of a file into a timm model of one logit for images of `channels`; log which were not used.

    If the file has all of the model's tensors in the same shapes, they are loaded as they are, the head too. Else timm
    adapts channels and tables of positions, and the head stays new unless the file's has one logit. Raises InputError
    where anything else is missing, of another shape, or not finite.
    """
    own = model.state_dict()
    state = without_prefixes(state, own.keys())
    check_finite(state, where)
    if all(name in state and state[name].shape == value.shape for name, value in own.items()):
        model.load_state_dict({name: state[name] for name in own})
        unused = sorted(state.keys() - own.keys())
    else:
        unused = _adapt(model, state, channels, where)
    if unused:
        _log.info("%s: not used: %s", where, ", ".join(unused))


def _adapt(model: nn.Module, state: dict[str, Tensor], channels: int, where: str) -> list[str]:
    """Let timm convert `state` to the model's form and load it; return the names that were not used."""
    configuration = dict(cast(Any, model).pretrained_cfg)
    name = configuration["architecture"]
    classifiers = head_names(model)
    found: list[Any] = []
    hook = cast(Any, model).register_load_state_dict_post_hook(lambda _, keys: found.append(keys))
    try:
        given = to_own_form(model, state)
        configuration |= {"state_dict": dict(given), "custom_load": False}
        configuration |= _shape_of_source(model, configuration, given, channels, classifiers)
        timm.models.load_pretrained(model, configuration, num_classes=1, in_chans=channels, strict=False)
    except Exception as error:  # timm's filters raise almost any error on unknown names and shapes
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{where}: does not fit {name} ({reason})") from None
    finally:
        hook.remove()
    head = {f"{name}.{part}" for name in classifiers for part in ("weight", "bias")}
    missing = sorted(set(found[0].missing_keys) - head)
    if missing:
        raise InputError(
            f"{where}: does not fit {name}: lacks {len(missing)} of its {len(model.state_dict())} "
            f"weights ({some(missing)})"
        )
    kept = {id(value) for value in given.values()}
    dropped = {name for name, value in state.items() if name not in given and id(value) not in kept}
    return sorted({*dropped, *found[0].unexpected_keys, *(head & given.keys() & set(found[0].missing_keys))})


def head_names(model: nn.Module) -> tuple[str, ...]:
    """The names of a timm model's classifiers, mostly one."""
    names = cast(Any, model).pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def to_own_form(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an older timm, of other programs or sizes in a timm model's own form, by timm's own function."""
    module = sys.modules[type(model).__module__]
    adapt = next((getattr(module, name) for name in _FILTERS if hasattr(module, name)), None)
    given: dict[str, Tensor] = adapt(dict(state), model) if adapt else dict(state)
    return given


def _shape_of_source(
    model: nn.Module, configuration: dict[str, Any], given: Mapping[str, Tensor], channels: int, heads: tuple[str, ...]
) -> dict[str, Any]:
    """What timm has to know about weights that are not its own: their numbers of classes and image channels."""
    shape: dict[str, Any] = {}
    classes = [len(given[f"{name}.weight"]) for name in heads if f"{name}.weight" in given]
    if classes:
        shape["num_classes"] = classes[0]
    first = configuration.get("first_conv")
    if isinstance(first, str) and f"{first}.weight" in given:
        convolution = model.get_submodule(first)
        if isinstance(convolution, nn.Conv2d):
            seen = given[f"{first}.weight"].shape[1] * convolution.groups * channels // convolution.in_channels
            shape["input_size"] = (seen, *configuration["input_size"][1:])
    return shape
