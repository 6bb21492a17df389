"""Train and judge the weights for fine products: python benchmarks/fine_weights.py

The backgrounds are simulated observations, with interference and without needles, cut by `ingest` as real files are.
Training adds needles to them (preset fine). Then two more sets of observations are simulated: with needles in the raw
spectra, and without. The network's scores of their snippets are compared with those of two others: one with random
weights, which gives the scores of the search alone, and one with the weights `needlestream`, which were trained on the
competition's shape. Finished parts are kept: after an interruption the same command goes on.
"""

import dataclasses
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shard_tools.system.openmp  # noqa: F401  before torch is loaded

# isort: split
import numpy as np
import numpy.typing as npt
import tyro

from benchmarks.history import record
from pipeline.loader import LoaderConfig
from shard_tools.atomic_files import write_whole
from shard_tools.cadence import ON_POSITIONS
from shard_tools.joined_manifest import read_manifests
from shard_tools.manifest import MANIFEST, Manifest
from shard_tools.observation.cadence_tables import read_observations
from shard_tools.observation.ingest import ingest
from shard_tools.observation.ingest_config import IngestConfig
from shard_tools.observation.lines import Line
from shard_tools.observation.observed_axes import axes_of
from shard_tools.observation.simulate import (
    CHANNEL_MHZ,
    SimulateObservationConfig,
    draw_lines,
    draw_panel,
    header_fields,
    write_fbh5,
)
from shard_tools.system.command import run_command
from train import train
from training.accelerator import build_accelerator
from training.metrics import recall_at_fpr, roc_auc
from training.model import build_model
from training.prediction import PredictConfig, Trained, predict_all, read_trained
from training.presets import PRESETS
from training.search.aiming import aim_at
from training.validation_set import with_validation_set

_NFPC, _COARSE = 1 << 17, 8  # fine channels of a coarse channel, and coarse channels
_INTERFERENCE = 60  # lines in all panels, in each observation
_NEEDLES = 60  # in each observation that is judged
_MAX_DRIFT = 3.8  # Hz/s of the needles; the snippets are cut for 4
_SNR = (4.0, 40.0)  # of a needle in one panel, if it stayed in one channel of 2.8 Hz
_FPR = 0.01
_log = logging.getLogger("fine_weights")


@dataclass(frozen=True)
class FineWeightsConfig:
    """Train the weights for fine products, and judge them."""

    work_dir: Path
    """Folder for shards and the run: about 600 MB, and 300 MB more while an observation is cut."""
    keep: Path | None = None
    """File to copy the weights to."""
    skies: int = 6
    """Simulated observations to train on, of about 190 snippets each."""
    judged: int = 4
    """Observations with needles, and as many without, to judge by."""
    epochs: int = 12
    pretrained: str = "needlestream"
    """What the training starts from; none: from random weights."""
    seed: int = 0
    """Seed of all observations and of the training."""


def simulate_sky(folder: Path, seed: int, lines: Sequence[Line]) -> Manifest:
    """Make the shards of a simulated observation with these lines, unless they are there already."""
    config = _sky_config(seed)
    files = folder.with_name(f"{folder.name}-files")
    if not (folder / MANIFEST).is_file():
        files.mkdir(parents=True, exist_ok=True)
        paths = tuple(files / f"{panel}.h5" for panel in range(6))
        for panel, path in enumerate(paths):
            fields = header_fields(config, panel)
            fields["tstart"] += seed  # a day for each observation: else their snippets would have the same keys
            write_fbh5(path, draw_panel(config, panel, list(lines)), fields, _NFPC)
        ingest(IngestConfig(str(folder), paths, workers=1))
    shutil.rmtree(files, ignore_errors=True)
    return read_manifests(folder)


def _sky_config(seed: int) -> SimulateObservationConfig:
    return SimulateObservationConfig(
        Path(), coarse_channels=_COARSE, nfpc=_NFPC, needles=0, interference=_INTERFERENCE, snr_min=5, snr_max=500,
        max_drift=0.5, seed=seed,
    )  # fmt: skip


def draw_interference(seed: int) -> list[Line]:
    """Lines in all panels, or in OFF panels alone."""
    found = [line for line in draw_lines(_sky_config(seed)) if line.kind == "interference"]
    return [line._replace(panels=(1, 3, 5)) if number % 4 == 0 else line for number, line in enumerate(found)]


def draw_needles(seed: int) -> list[Line]:
    """Lines in the ON panels, with drift rates up to almost the steepest that snippets are cut for."""
    config, rng = _sky_config(seed), np.random.default_rng([seed, 7])
    snr = np.exp(rng.uniform(np.log(_SNR[0]), np.log(_SNR[1]), _NEEDLES))
    drift = rng.uniform(-_MAX_DRIFT, _MAX_DRIFT, _NEEDLES)
    mhz = config.first_mhz - rng.uniform(0.02, 0.98, _NEEDLES) * config.channels * CHANNEL_MHZ
    each = zip(mhz.tolist(), drift.tolist(), snr.tolist(), strict=True)
    return [Line("needle", *values, ON_POSITIONS) for values in each]


def label(manifest: Manifest, needles: Sequence[Line]) -> npt.NDArray[np.int64]:
    """(rows,) 1 if a snippet holds a whole needle, 0 if it holds none, -1 if it holds only a part of one."""
    (axes,), observations = axes_of(manifest), read_observations(manifest.data_sets[0])
    assert observations is not None
    low = observations.first_mhz[:, None]
    high = low + axes.channels * axes.channel_width_hz / 1e6
    start = np.array([line.frequency_mhz for line in needles])
    length = axes.panel_starts_s[4] + axes.time_bins * axes.bin_length_s  # to the end of the third ON panel
    end = start + np.array([line.drift_rate_hz_s for line in needles]) * length / 1e6
    lowest, highest = np.minimum(start, end), np.maximum(start, end)
    whole = ((lowest > low) & (highest < high)).any(axis=1)
    touched = ((highest > low) & (lowest < high)).any(axis=1)
    return np.where(whole, 1, np.where(touched, -1, 0))


def train_weights(config: FineWeightsConfig) -> Path:
    """Train on simulated skies; return the file of the best weights."""
    skies = [
        simulate_sky(config.work_dir / f"sky{number}", seed, draw_interference(seed))
        for number, seed in enumerate(range(config.seed + 1000, config.seed + 1000 + config.skies))
    ]
    shards = tuple(str(each.root) for each in skies)
    model = replace(PRESETS["fine"].model, pretrained=config.pretrained)
    run = replace(
        PRESETS["fine"], shards=shards, backgrounds=shards, run_dir=config.work_dir / "run", model=model,
        epochs=config.epochs, seed=config.seed, resume=True, tracker=("none",), report=False,
        loader=LoaderConfig(loader_threads=1),
    )  # fmt: skip
    train(with_validation_set(run))
    return run.run_dir / "best.safetensors"


def judge(config: FineWeightsConfig, weights: Path) -> dict[str, Any]:
    """ROC AUC and recall of the weights, of `needlestream` and of random weights, on observations new to all three."""
    found: dict[str, list[npt.NDArray[np.float64]]] = {}
    labels = []
    for number in range(2 * config.judged):
        seed = config.seed + 2000 + number
        needles = draw_needles(seed) if number < config.judged else []
        sky = simulate_sky(config.work_dir / f"judged{number}", seed, [*draw_interference(seed), *needles])
        labels.append(label(sky, needles) if needles else np.zeros(len(sky), np.int64))
        trained, _ = read_trained(weights)
        models = {
            "trained": trained,
            "competition": _untrained(trained, sky, "needlestream"),
            "untrained": _untrained(trained, sky, "none"),
        }
        for name, logit in zip(models, _score(sky, list(models.values())), strict=True):
            found.setdefault(name, []).append(logit)
    target = np.concatenate(labels)
    known = target >= 0
    figures: dict[str, Any] = {"positive": int((target == 1).sum()), "negative": int((target == 0).sum())}
    for name, parts in found.items():
        logit = np.concatenate(parts)[known]
        figures[f"{name}_auc"] = roc_auc(target[known], logit)
        figures[f"{name}_recall"] = recall_at_fpr(target[known], logit, _FPR)
    return figures


def _untrained(trained: Trained, sky: Manifest, pretrained: str) -> Trained:
    """The network with other weights than the trained ones, for the same images."""
    canvas = trained.canvas
    config = replace(PRESETS["fine"].model, pretrained=pretrained)
    model = build_model(config, canvas.channels, canvas.height, canvas.width)
    aim_at(model, sky, canvas)
    return Trained(model, canvas, trained.views, {})


def _score(manifest: Manifest, trained: Sequence[Trained]) -> list[npt.NDArray[np.float64]]:
    """The logits of each network."""
    one_view = [replace(each, views=each.views[:1]) for each in trained]
    how = PredictConfig("test", 32, LoaderConfig(loader_threads=1))
    return predict_all(build_accelerator("auto"), manifest, one_view, how)[1]


def main() -> None:
    """Train, judge, and record the figures."""
    config = tyro.cli(FineWeightsConfig, prog="fine_weights.py")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    weights = train_weights(config)
    figures = judge(config, weights)
    print(json.dumps(figures, indent=1))
    record("fine_weights", dataclasses.asdict(config), [figures])
    if config.keep is not None:
        write_whole(config.keep, weights.read_bytes())


if __name__ == "__main__":
    sys.exit(run_command(main))
