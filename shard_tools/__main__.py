"""Simulate, pack, ingest, import, verify and inspect data sets: python -m shard_tools COMMAND --help."""

import sys
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import tyro

from shard_tools.baselines import read_trivial_auc
from shard_tools.errors import InputError
from shard_tools.fingerprint import FingerprintConfig, Groups, fingerprint
from shard_tools.import_webdataset import ImportConfig, import_webdataset
from shard_tools.kaggle_layout import SPLITS
from shard_tools.manifest import Manifest, read_manifest
from shard_tools.manifest_writer import CUTS, SKIPPED
from shard_tools.observation.cadence_tables import read_observations
from shard_tools.observation.ingest import ingest
from shard_tools.observation.ingest_config import IngestConfig
from shard_tools.observation.inject import InjectConfig, inject
from shard_tools.observation.lines import TRUTH_TABLE
from shard_tools.observation.recall import RecallConfig, recall_lines
from shard_tools.observation.simulate import SimulateObservationConfig, simulate_observation
from shard_tools.pack import PackConfig, pack
from shard_tools.simulate import SimulateConfig, simulate
from shard_tools.storage.base import StoreConfig
from shard_tools.system.command import run_command
from shard_tools.tasks.base import TaskConfig
from shard_tools.verify import verify


@dataclass(frozen=True)
class VerifyConfig:
    """Check every byte of a folder of shards against its manifest; name every fault; exit with 1 if there is any."""

    shards: tyro.conf.Positional[str]
    """Folder or URL with manifest.json."""
    store: tyro.conf.OmitArgPrefixes[StoreConfig] = field(default_factory=StoreConfig)
    tasks: tyro.conf.OmitArgPrefixes[TaskConfig] = field(default_factory=TaskConfig)


@dataclass(frozen=True)
class InfoConfig:
    """Show what a folder of shards holds, and how well trivial statistics separate its needles from the rest."""

    shards: tyro.conf.Positional[str]
    """Folder or URL with manifest.json."""
    trivial: int = 2000
    """Number of training snippets, evenly spaced, to compute the trivial statistics on; 0 computes none."""
    store: tyro.conf.OmitArgPrefixes[StoreConfig] = field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        if self.trivial < 0:
            raise InputError(f"--trivial {self.trivial}: expected 0 or more")


Command = (
    Annotated[SimulateConfig, tyro.conf.subcommand("simulate")]
    | Annotated[SimulateObservationConfig, tyro.conf.subcommand("simulate-observation")]
    | Annotated[FingerprintConfig, tyro.conf.subcommand("fingerprint")]
    | Annotated[PackConfig, tyro.conf.subcommand("pack")]
    | Annotated[IngestConfig, tyro.conf.subcommand("ingest")]
    | Annotated[InjectConfig, tyro.conf.subcommand("inject")]
    | Annotated[RecallConfig, tyro.conf.subcommand("recall")]
    | Annotated[ImportConfig, tyro.conf.subcommand("import")]
    | Annotated[VerifyConfig, tyro.conf.subcommand("verify")]
    | Annotated[InfoConfig, tyro.conf.subcommand("info")]
)


def main() -> int:
    """Parse the command line and run one command."""
    command = tyro.cli(Command, prog="python -m shard_tools", description=__doc__)
    match command:
        case SimulateConfig():
            simulate(command)
        case SimulateObservationConfig():
            simulate_observation(command)
        case FingerprintConfig():
            _print_groups(fingerprint(command), command)
        case PackConfig():
            _print_packed(pack(command))
        case InjectConfig():  # before IngestConfig, its base class
            _print_packed(inject(command))
        case IngestConfig():
            _print_packed(ingest(command))
        case RecallConfig():
            print("\n".join(recall_lines(command)))
        case ImportConfig():
            _print_packed(import_webdataset(command))
        case VerifyConfig():
            return _verify(command)
        case InfoConfig():
            _print_info(read_manifest(command.shards, command.store), command.trivial)
    return 0


def _print_groups(found: Groups, command: FingerprintConfig) -> None:
    sizes = found.sizes()
    print(
        f"{len(found.records):,} snippets, {len(found.pairs.first):,} overlapping pairs ({found.refuted:,} candidates "
        f"refuted), {len(sizes):,} groups, the largest of {sizes.max():,}; {found.seconds:.1f} s: {command.out}"
    )
    if found.unreadable:
        print(f"  could not be read, so in groups of their own: {len(found.unreadable):,}")
    if command.test:
        in_test = np.array([record.split == "test" for record in found.records])
        leaking = np.isin(found.group[in_test], found.group[~in_test]).sum()
        print(f"  {leaking:,} of {in_test.sum():,} snippets of test/ share a group with one of train/")


def _print_packed(manifest: Manifest) -> None:
    print(f"packed {_samples(manifest)} into {_shards(manifest)}: {manifest.root}")
    for split in SPLITS:
        counts = manifest.splits[split]
        if counts["missing"] or counts["quarantined"]:
            print(
                f"  {split}: {counts['missing']:,} files missing, {counts['quarantined']:,} snippets quarantined; "
                f"see {manifest.store.where(SKIPPED)}"
            )


def _samples(manifest: Manifest) -> str:
    """How many samples there are: called snippets in an observation, which has many per cadence, else cadences."""
    noun = "snippet" if CUTS in manifest.data_sets[0].files else "cadence"
    return f"{len(manifest):,} {noun}{'' if len(manifest) == 1 else 's'}"


def _shards(manifest: Manifest) -> str:
    count, gigabytes = len(manifest.shards), sum(shard.bytes for shard in manifest.shards) / 1e9
    return f"{count:,} shard{'' if count == 1 else 's'}, {gigabytes:.2f} GB"


def _verify(command: VerifyConfig) -> int:
    faults = 0
    for fault in verify(command.shards, command.store, command.tasks):
        print(f"fault: {fault}")
        faults += 1
    print(f"{command.shards}: {f'{faults} faults' if faults else 'every byte is as it was packed'}")
    return 1 if faults else 0


def _print_info(manifest: Manifest, trivial: int) -> None:
    panels, time_bins, channels = manifest.shape
    print(f"{manifest.root}: {_samples(manifest)} in {_shards(manifest)}")
    print(f"snippets: {panels} panels x {time_bins} time bins x {channels} frequency channels, float16")
    if observations := read_observations(manifest.data_sets[0]):
        print(f"observed: {observations.describe(channels)}")
    if needles := manifest.made.get("observation", {}).get("needles"):
        print(f"added: {needles:,} simulated needles, listed in {TRUTH_TABLE}")
    for split in SPLITS:
        counts = manifest.splits[split]
        print(f"{split}: " + ", ".join(f"{number:,} {name}" for name, number in counts.items()))
    for fold in np.unique(manifest.fold[manifest.fold >= 0]):
        held_out = manifest.target[manifest.fold == fold]
        print(f"  fold {fold}: {len(held_out):,} cadences, {held_out.mean():.2%} with a needle")
    rows = manifest.rows("train")
    if trivial and len(rows):
        rows = rows[np.linspace(0, len(rows) - 1, min(trivial, len(rows)), dtype=np.int64)]
    if trivial and len(np.unique(manifest.target[rows])) == 2:
        print(f"ROC AUC of trivial statistics, ON panels minus OFF panels, over {len(rows):,} training cadences:")
        for name, auc in read_trivial_auc(manifest, rows).items():
            print(f"  {name}: {auc:.3f}")


if __name__ == "__main__":
    sys.exit(run_command(main))
