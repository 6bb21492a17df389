"""From snippets to canvases, as a competent user of torch writes it, for every peer without transforms of its own.

Axes: B batch; P panels, T time bins, F frequency channels; V views, C channels (1), H, W canvas.
"""

import io
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (as everyone calls it)

from benchmarks.peers.spec import HEIGHT, WIDTH, Workload

# This warning asks for a copy, which would make every peer slower. Views of bytes are only read here.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")
Snippet = npt.NDArray[np.float16]


def snippet_of(npy: bytes) -> Snippet:
    """(P, T, F) from the bytes of an npy file: a read-only view."""
    stream = io.BytesIO(npy)
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    return np.frombuffer(npy, dtype, offset=stream.tell()).reshape(shape)


def resized(stacked: Tensor) -> Tensor:
    """(P T, F) float32 to (1, H, W): antialiased bilinear."""
    return F.interpolate(stacked[None, None], size=(HEIGHT, WIDTH), mode="bilinear", antialias=True)[0]


def transformed(snippet: Snippet | Tensor, workload: Workload) -> Tensor:
    """One sample's part of a batch: (P, T, F), (1, H, W) or (V, 1, H, W)."""
    # Sample by sample, not batch by batch: 1.7 MB of float32 stay in a core's cache, 54 MB don't.
    values = torch.as_tensor(snippet)
    return values if workload == "raw" else augmented(resized(values.flatten(0, 1).float()), workload)


def augmented(canvas: Tensor, workload: Workload) -> Tensor:
    """The views of one canvas in TTA; in training the canvas, flipped along frequency half of the time."""
    if workload == "tta":
        return torch.stack([canvas, canvas.flip(-1)])
    return canvas.flip(-1) if workload == "train" and torch.rand(()) < 0.5 else canvas


def cut_mixed(batch: Tensor) -> Tensor:
    """CutMix (Yun et al. 2019, arXiv:1905.04899) of a batch (B, 1, H, W) with its own reversed order, in place."""
    kept = float(torch.distributions.Beta(1.0, 1.0).sample())
    height, width = (int(side * (1 - kept) ** 0.5) for side in batch.shape[-2:])
    top = int(torch.randint(batch.shape[-2] - height + 1, ()))
    left = int(torch.randint(batch.shape[-1] - width + 1, ()))
    box = batch[..., top : top + height, left : left + width]
    box.copy_(box.flip(0))
    return batch


def finished(batch: Tensor, workload: Workload, device: str) -> Tensor:
    """What the main process does to a batch from the workers: copy it to the device, and in training apply CutMix."""
    if device != "cpu":
        batch = batch.to(device, non_blocking=True)
    return cut_mixed(batch) if workload == "train" else batch


def load_npy(path: Path) -> Snippet:
    """(P, T, F) of one file."""
    snippet: Snippet = np.load(path)
    return snippet
