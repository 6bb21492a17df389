"""Export the weights of train.py to ONNX, or to a folder for the model hub. python -m training.export --help"""

import dataclasses
import importlib.util
import json
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
import tyro
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from shard_tools.atomic_files import whole_file, write_whole
from shard_tools.errors import InputError
from shard_tools.system.command import run_command
from training.model_card import write_model_card
from training.prediction import Trained, read_trained

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"  # the names that the hub and timm look for
ONNX_PACKAGES = ("onnx", "onnxscript")
_TOLERANCE = 1e-4  # of logits: another program sums in another order
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ExportConfig:
    """Write the weights of train.py for other programs, and check that their logits are the same there."""

    weights: Path
    """A file that train.py wrote, such as best.safetensors."""
    out: Path
    """Where to write. A name that ends in .onnx: one file, for ONNX Runtime and others. Any other name: a folder for
    the model hub, which timm loads too; its model card gives the figures of the run whose folder holds the weights."""


def export(config: ExportConfig) -> None:
    """Export as ONNX or as a folder. Raises InputError if that cannot be done or changes the logits."""
    trained, _ = read_trained(config.weights)
    trained.model.eval()
    if config.out.suffix == ".onnx":
        checked_by = write_onnx(trained, config.out)
    else:
        checked_by = write_hub_folder(trained, config.weights, config.out)
    print(f"exported:    {config.out}  ({checked_by})")


def write_onnx(trained: Trained, path: Path) -> str:
    """Write one ONNX file, from `image` (B, C, H, W) float32 to `logit` (B, 1) float32; say what it was checked with.

    The canvas is in the file's metadata, as JSON.
    """
    if (stem := trained.about.get("stem", "none")) != "none":
        raise InputError(
            f"--out {path}: a model with --stem {stem} searches for lines, which ONNX has no operators for; give a "
            "folder instead, for the model hub"
        )
    if missing := [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(f"--out {path}: needs {' and '.join(missing)}; pip install {' '.join(missing)}")
    # They log a line for each node that they simplify, and with torch 2.10 for each operator of torchvision.
    for chatty in ("onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    image = _example(trained, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of operators that are not used here
        program = torch.onnx.export(
            trained.model, (image,), input_names=["image"], output_names=["logit"], dynamic_shapes=({0: "batch"},),
            dynamo=True, verbose=False,
        )  # fmt: skip
    assert program is not None
    program.model.metadata_props["canvas"] = json.dumps(dataclasses.asdict(trained.canvas))
    with whole_file(path) as temporary:
        program.save(str(temporary), external_data=False)
    if importlib.util.find_spec("onnxruntime") is None:
        return "not checked: onnxruntime is not installed"
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    _check_logits(trained, lambda batch: session.run(None, {"image": batch.numpy()})[0], path, "ONNX Runtime")
    return "ONNX Runtime gives the same logits"


def write_hub_folder(trained: Trained, weights: Path, folder: Path) -> str:
    """Write the folder's three files; say what it was checked with.

    model.safetensors is the file of weights itself, so that infer.py takes it too.
    """
    if folder.is_file():
        raise InputError(f"--out {folder}: a file; expected a folder, or a name that ends in .onnx")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / WEIGHTS, weights.read_bytes())
    is_timms = trained.about.get("stem", "none") == "none"
    with whole_file(folder / CONFIG) as temporary:
        if is_timms:
            _write_timm_config(trained, temporary)
        else:
            temporary.write_text(json.dumps({"needlestream": trained.about}, indent=1) + "\n")
    write_whole(folder / CARD, write_model_card(trained, weights, is_timms))
    reader = "timm" if is_timms else "needlestream"
    model = _load_with_timm(folder) if is_timms else read_trained(folder / WEIGHTS)[0].model.eval()
    _check_logits(trained, lambda batch: model(batch).numpy(), folder, reader)
    return f"read back by {reader} with the same logits"


def _write_timm_config(trained: Trained, path: Path) -> None:
    """Write the config.json from which timm builds the network; mean 0, deviation 1, as the canvas is normalised."""
    channels = trained.canvas.channels
    plain: dict[str, Any] = {"mean": [0.0] * channels, "std": [1.0] * channels}
    save_config_for_hf(trained.model, str(path), model_config={"needlestream": trained.about, "pretrained_cfg": plain})


def _load_with_timm(folder: Path) -> nn.Module:
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model.eval()


def _example(trained: Trained, count: int) -> Tensor:
    """Noise in the shape of `count` canvases."""
    canvas = trained.canvas
    return torch.randn(count, canvas.channels, canvas.height, canvas.width, generator=torch.Generator().manual_seed(0))


def _check_logits(trained: Trained, run: Callable[[Tensor], Logits], where: Path, reader: str) -> None:
    """Raise InputError if an exported model gives other logits (3, 1) than the model itself."""
    image = _example(trained, 3)
    with torch.inference_mode():
        expected, found = trained.model(image).numpy(), np.asarray(run(image))
    if found.shape != expected.shape or not np.allclose(found, expected, _TOLERANCE, _TOLERANCE):
        raise InputError(
            f"{where}: {reader} gives logits {found.ravel()[:3]}, expected {expected.ravel()}; do not use it, and "
            "report the versions of torch and timm"
        )


def main() -> None:
    """Parse the command line and export."""
    export(tyro.cli(ExportConfig, prog="python -m training.export"))


if __name__ == "__main__":
    sys.exit(run_command(main))
