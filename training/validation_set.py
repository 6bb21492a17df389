"""A validation set for an observation, which has no labels: snippets kept back, with needles added to half of them.

It is a data set of shards with labels, in the run's folder. Signals are drawn as for training, but only once: all
epochs are judged by the same snippets. pipeline/backgrounds.py decides which snippets are kept back.
"""

import dataclasses
import hashlib
import io
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.augment import DrawConfig
from pipeline.backgrounds import VALIDATION
from pipeline.canvas import CanvasConfig
from pipeline.loader import Loader
from pipeline.plan import Order, Share
from shard_tools.atomic_files import write_whole
from shard_tools.cadence import npy_header
from shard_tools.errors import InputError
from shard_tools.joined_manifest import read_manifests
from shard_tools.kaggle_layout import Record
from shard_tools.manifest import MANIFEST, Manifest, read_contents, read_manifest
from shard_tools.manifest_writer import BANDPASS, CADENCES, CUTS, PackedDataSet, write_tables
from shard_tools.observation.band_folds import FOLDS, band_folds
from shard_tools.observation.cadence_tables import read_observations
from shard_tools.tar_shard import write_members
from training.accelerator import build_accelerator
from training.config import TrainConfig

_SNIPPETS = 400  # at most, of a fold, evenly spaced over it
_BATCH = 32
_SHARD = "validation-00000.tar"
# Added to the run's seed: with the same seed the training would add the same signals to its snippets.
_OTHER_SEED = 1 << 32
_SUFFIX = "-v"  # of keys: a snippet with an added needle is no longer the original one
_log = logging.getLogger(__name__)


def with_validation_set(config: TrainConfig) -> TrainConfig:
    """`config`, or for an observation without labels a copy of it that validates on a labelled validation set.

    The set is made unless it exists. Raises InputError if it cannot be made.
    """
    if not config.backgrounds or not _is_unlabelled_observation(config):
        return config
    folder = config.run_dir / VALIDATION
    accelerator = build_accelerator(config.precision)
    if accelerator.is_main_process:
        make_validation_set(folder, read_manifests(config.shards, config.store), config)
    accelerator.wait_for_everyone()
    return dataclasses.replace(config, shards=(str(folder),))


def _is_unlabelled_observation(config: TrainConfig) -> bool:
    """Whether --shards are snippets that `ingest` cut; only their tables of contents are read."""
    fields = [read_contents(root, config.store).fields for root in config.shards]
    has_labels = any(each["splits"]["train"]["samples"] for each in fields)
    return not has_labels and all(CUTS in each["files"] for each in fields)


def make_validation_set(folder: Path, manifest: Manifest, config: TrainConfig) -> Manifest:
    """Write the validation set of an observation to `folder`, at once or not at all, unless it is there already.

    Raises InputError if the folder holds another one.
    """
    made = _describe(manifest, config)
    if (folder / MANIFEST).is_file():
        there = read_manifest(folder)
        if there.made != made:
            raise InputError(
                f"{folder}: holds a validation set of other data or options; delete it, or choose another --run-dir"
            )
        return there
    temporary = folder.with_name(f".{VALIDATION}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    chosen = _choose(manifest, config)
    keys = [key + _SUFFIX for key in manifest.keys_of(chosen.rows)]
    about: dict[str, Any] = {}
    packed = write_members(_members(manifest, chosen, keys, config, about), temporary / _SHARD, about)
    _write_tables_of(temporary, manifest, chosen, keys)
    records = [
        Record(key, "train", target, int(fold), folder)
        for key, target, fold in zip(keys, about["targets"], chosen.fold, strict=True)
    ]
    write_tables(temporary, temporary, PackedDataSet(records, [packed], [], manifest.shape, made))
    temporary.rename(folder)
    _log.info("validation: %d snippets are kept back, with needles added to %d", len(keys), sum(about["targets"]))
    return read_manifest(folder)


@dataclass(frozen=True)
class _Chosen:
    """The snippets of a validation set."""

    rows: npt.NDArray[np.int64]
    fold: npt.NDArray[np.int8]


def _choose(manifest: Manifest, config: TrainConfig) -> _Chosen:
    fold = band_folds(manifest)
    wanted = range(FOLDS) if config.fold == "all" else (config.held_out,)
    rows = [_evenly(np.flatnonzero(fold == each), _SNIPPETS) for each in wanted]
    chosen = np.sort(np.concatenate(rows))
    if not len(chosen):
        raise InputError(f"--fold {config.fold}: {manifest.root} has folds 0 to {max(fold)}")
    return _Chosen(chosen, fold[chosen])


def _evenly(rows: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows)), dtype=np.int64)]


def _describe(manifest: Manifest, config: TrainConfig) -> dict[str, Any]:
    """The data and options that a validation set is made from, for its manifest."""
    observation = manifest.data_sets[0].made["observation"]
    drifts = [each.made["observation"]["max_drift_hz_s"] for each in manifest.data_sets]
    validation = {
        "of": [each.identity for each in manifest.data_sets],
        "seed": config.seed,
        **{name: getattr(config.draws, name) for name in ("needles", "signal_snr_min", "signal_snr_max")},
        "fold": config.fold,
    }
    digest = hashlib.sha256(repr(sorted(validation.items())).encode()).hexdigest()
    return {
        "folds": FOLDS,
        "seed": config.seed,
        "time_bin": 1,
        "shard_mb": 0,
        "catalog_sha256": digest,
        "observation": {**observation, "max_drift_hz_s": max(drifts)},
        VALIDATION: validation,
    }


def _members(
    manifest: Manifest, chosen: _Chosen, keys: Sequence[str], config: TrainConfig, about: dict[str, Any]
) -> Iterator[tuple[str, bytes, int]]:
    """Key, npy file and target of each snippet, in order; `about["targets"]` collects the targets."""
    _, time_bins, channels = manifest.shape
    canvas = CanvasConfig("panels", time_bins, channels, normalise=False)
    draws = _only_signals(config.draws)
    count = len(chosen.rows)
    order = Order(chosen.rows, np.zeros(len(manifest), np.int8), "sequential", config.seed + _OTHER_SEED)
    share = Share(count, min(_BATCH, count))
    header, in_time = npy_header(manifest.shape), np.argsort(canvas.positions)
    about["targets"] = []
    on_cpu = replace(config.loader, engine="cpu", on_bad_sample="fail")
    loader = Loader(manifest, order, share, canvas, draws, config=on_cpu)
    try:
        names = iter(keys)
        for batch in loader:
            for image, target, counts in zip(batch.image.numpy(), batch.target.tolist(), batch.counts, strict=True):
                if counts:
                    about["targets"].append(int(target))
                    yield next(names), header + image[in_time].astype(np.float16).tobytes(), int(target)
    finally:
        loader.close()


def _only_signals(draws: DrawConfig) -> DrawConfig:
    """Draws that add signals and leave the rest as it is."""
    return replace(
        draws, flip_frequency=0.0, flip_time=0.0, roll_frequency=0.0, shift_time=0.0, erase=0.0, gain=0.0, offset=0.0,
        cutmix=0.0, mixup=0.0, permute_panels=0.0,
    )  # fmt: skip


def _write_tables_of(folder: Path, manifest: Manifest, chosen: _Chosen, keys: Sequence[str]) -> None:
    """Write the observation's tables for the chosen rows, with cadences numbered over all data sets."""
    tables: dict[str, list[pa.Table]] = {name: [] for name in (CADENCES, CUTS, BANDPASS)}
    cadences = 0
    for data_set in manifest.data_sets:
        observations = read_observations(data_set)
        assert observations is not None, f"{data_set.store.root}: not observed"
        rows = chosen.rows[(chosen.rows >= data_set.rows.start) & (chosen.rows < data_set.rows.stop)]
        for name, table in observations.tables.items():
            kept = table.take(pa.array(rows - data_set.rows.start)) if name == CUTS else table
            tables[name].append(_renumbered(kept, cadences) if "cadence" in kept.column_names else kept)
        cadences += len(observations.cadences)
    for name, parts in tables.items():
        whole = pa.concat_tables(parts)
        if name == CUTS:
            whole = whole.set_column(0, whole.schema.field("key"), pa.array(list(keys)))
        parquet = io.BytesIO()
        pq.write_table(whole, parquet)
        write_whole(folder / name, parquet.getvalue())


def _renumbered(table: pa.Table, first: int) -> pa.Table:
    """A table whose column `cadence` counts from `first`."""
    place = table.column_names.index("cadence")
    values = pa.array(np.asarray(table["cadence"]) + first, table.schema.field("cadence").type)
    return table.set_column(place, table.schema.field("cadence"), values)
