"""A run's own weights: written and read as safetensors with what is needed to use them, and put into a model."""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from shard_tools.atomic_files import write_whole
from shard_tools.errors import InputError

SHIPPED = Path(__file__).with_name("needlestream.safetensors")
"""Weights that come with the program: preset demo, trained on simulated cadences alone (make weights)."""
SHIPPED_FINE = Path(__file__).with_name("needlestream-fine.safetensors")
"""Weights for fine products: preset fine, trained on simulated observations alone (make weights-fine)."""
MAKE_FINE = "these weights do not come with the program; `make weights-fine` trains them"
"""What an error says if SHIPPED_FINE is missing."""
_METADATA, _SHA256 = "needlestream", "sha256"
_LONGEST_HEADER = 100_000_000  # bytes, as safetensors itself allows
_NAMED = 6  # tensors that a message names
_OTHERS = "; for weights of another program give infer.py its --model, --canvas, --height and --width too"


def find_weights(given: Path | str) -> Path:
    """The file of weights; the names `needlestream` and `needlestream-fine` stand for files of the program."""
    return next((path for path in (SHIPPED, SHIPPED_FINE) if str(given) == path.stem), Path(given))


def save_weights(path: Path, state: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write weights as safetensors, at once or not at all; `about` says what is needed to use them."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    text = json.dumps(about)
    write_whole(path, save(tensors, metadata={_METADATA: text, _SHA256: _digest(tensors, text)}))


def _digest(tensors: dict[str, Tensor], about: str) -> str:
    """SHA-256 of weights and their metadata: safetensors itself does not detect flipped bits."""
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights and their metadata. Raises InputError if the file is not such weights."""
    try:
        # Read, not mapped: not every file system can map files, and all of it is hashed anyway.
        data = path.read_bytes()
        tensors, metadata = load(data), _read_metadata(io.BytesIO(data))
        text, stated = metadata[_METADATA], metadata[_SHA256]
        if _digest(tensors, text) != stated:
            raise InputError(f"{path}: changed after it was written (its SHA-256 does not match); train again")
        return tensors, json.loads(text)
    except FileNotFoundError:
        remedy = MAKE_FINE if path == SHIPPED_FINE else "train.py writes best.safetensors into its run folder"
        raise InputError(f"{path}: no such weights; {remedy}") from None
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: unreadable, or not a safetensors file ({error}); expected train.py's best.safetensors{_OTHERS}"
        ) from None
    except (KeyError, ValueError):
        raise InputError(
            f"{path}: does not say what it was trained on; expected train.py's best.safetensors{_OTHERS}"
        ) from None


def is_ours(path: Path) -> bool:
    """Whether `save_weights` wrote a file."""
    try:
        with path.open("rb") as file:
            return _METADATA in _read_metadata(file)
    except (ValueError, OSError):
        return False


def _read_metadata(file: BinaryIO) -> dict[str, str]:
    """The metadata of a safetensors file, which begins with its header's length in 8 bytes and the header as JSON.

    Raises ValueError if there is no such header.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(file.read(length))
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError("no metadata")
    return metadata


def fill_model(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Put weights into a model. Raises InputError if they do not fit, or are not finite."""
    check_finite(state, where)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{where}: the weights do not fit the model ({reason}); they may be from another version of the "
            "program: train again"
        ) from None


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raise InputError naming the weights that hold NaN or an infinity: all their output would be NaN."""
    bad = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if bad:
        raise InputError(f"{where}: {some(bad)}: not finite; expected weights of a training that did not diverge")


def some(names: list[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
