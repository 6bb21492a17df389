"""From the files of a telescope's cadences to shards: checked, cut, resumable, each file whole or absent."""

import contextlib
import hashlib
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shard_tools.atomic_files import file_sha256
from shard_tools.cadence import npy_header
from shard_tools.errors import InputError, StoreError
from shard_tools.kaggle_layout import NO_FOLD, UNKNOWN_TARGET, Record
from shard_tools.manifest import MANIFEST, TAR_BLOCK, Manifest, read_manifest
from shard_tools.manifest_writer import PackedDataSet, write_tables
from shard_tools.observation.agreement import check_cadence
from shard_tools.observation.band_folds import FOLDS
from shard_tools.observation.cadence_tables import write_observation_tables
from shard_tools.observation.cut_jobs import METHOD, Job, cut_work, identity
from shard_tools.observation.cut_plan import CutOptions, CutPlan, CutShard, plan_cut_shards, plan_cuts
from shard_tools.observation.filterbank import check_feed
from shard_tools.observation.header import Header
from shard_tools.observation.header_reader import HeaderReader
from shard_tools.observation.ingest_config import IngestConfig
from shard_tools.observation.lists import read_cadence_list
from shard_tools.output import Output
from shard_tools.sources import digest_sources, find_unsure, renew_sources, write_sources
from shard_tools.tar_shard import PackedShard, ShardPlan, padded
from shard_tools.tasks.local import Processes
from shard_tools.tasks.opening import open_tasks, run_shown
from shard_tools.unfinished import WORK, ShardDestination

_NEEDLES = "needles"
_log = logging.getLogger(__name__)


def ingest(config: IngestConfig, change: Callable[[list[CutPlan]], list[CutPlan]] = list) -> Manifest:
    """Cut the cadences that `config` names into shards in `config.out` and return their manifest.

    `change` may change the plans of the cadences, to add needles to them.

    Ingesting the same files twice gives the same bytes. Raises InputError naming the file that is refused, or where the
    output folder holds something else; finished shards are kept for the next try.
    """
    output = Output(config.out, config.staging, config.tasks)
    plans, skipped = plan_ingest(config)
    plans = change(plans)
    shards = plan_cut_shards(plans, _per_shard(config, plans))
    made = _describe(config, plans)
    output.prepare()
    if output.is_finished():
        return _already_ingested(config, made, shards, output)
    with output.held():
        if output.is_finished():  # another process finished it since the check above
            return _already_ingested(config, made, shards, output)
        output.clear({shard.name for shard in shards})
        sources = {shard.name: digest_sources(_sources(shard)) for shard in shards}
        jobs = [(output.destination, shard, sources[shard.name]) for shard in shards]
        done = _cut_shards(config, jobs, skipped, output)
        plans, shards, packed = _without_damaged(output, plans, shards, done)
        made = _count_needles(made, plans)
        write_observation_tables(output.folder, plans, shards, packed)
        records = [
            Record(key, "test", UNKNOWN_TARGET, NO_FOLD, output.folder) for done in packed for key, *_ in done.members
        ]
        write_tables(output.folder, output.folder, PackedDataSet(records, packed, skipped, plans[0].shape, made))
        write_sources(output.folder, file_sha256(output.folder / MANIFEST), sources)
        output.publish()
    output.tidy()
    return read_manifest(config.out)


def plan_ingest(config: IngestConfig) -> tuple[list[CutPlan], list[list[str]]]:
    """The cuts of each cadence, in the order of their keys, and [first file, split, reason] of those left out.

    Raises InputError naming the file that is refused, unless refused cadences are left out.
    """
    plans: list[CutPlan] = []
    skipped: list[list[str]] = []
    with HeaderReader(config.nfpc) as reader:
        for paths in read_cadence_list(config.cadences) if config.cadences else [config.files]:
            with _leaving_out(config, paths[0], skipped):
                plans.append(_plan_cadence(config, [reader.read(path) for path in paths]))
    shapes = Counter(plan.shape for plan in plans)
    kept: dict[str, CutPlan] = {}
    for plan in sorted(plans, key=lambda plan: plan.key(0)):
        with _leaving_out(config, plan.cadence.first.path, skipped):
            _check_fits(plan, shapes.most_common(1)[0][0], kept)
            kept[plan.key(0)] = plan
    if not kept:
        raise _nothing_left(config, skipped)
    return list(kept.values()), skipped


@contextlib.contextmanager
def _leaving_out(config: IngestConfig, path: Path, skipped: list[list[str]]) -> Iterator[None]:
    """With --on-bad skip, note a refused cadence under the name of its first file; otherwise let the error through."""
    try:
        yield
    except (InputError, OSError) as error:
        if config.on_bad == "fail":
            raise
        _log.warning("left out: %s", error)
        # Without the folder, so that the same files give the same bytes from another place.
        skipped.append([path.name, "test", str(error).replace(f"{path.parent}/", "")])


def _nothing_left(config: IngestConfig, skipped: Sequence[Sequence[str]]) -> InputError:
    return InputError(f"{config.cadences or config.files[0]}: every cadence was left out; {skipped[-1][2]}")


def _check_fits(plan: CutPlan, shape: tuple[int, int, int], others: Mapping[str, CutPlan]) -> None:
    """Raise InputError where a cadence has another shape than most, or is the same as one of `others`."""
    path = plan.cadence.first.path
    if plan.shape != shape:
        raise InputError(
            f"{path}: snippets of shape {plan.shape}, expected {shape} as in most cadences; ingest those of other "
            "products or lengths into a folder of their own"
        )
    if other := others.get(plan.key(0)):
        raise InputError(
            f"{path}: the same source, time and band as {other.cadence.first.path}; give each cadence once"
        )


def _plan_cadence(config: IngestConfig, headers: Sequence[Header]) -> CutPlan:
    cadence = check_cadence(headers, config.any_sources)
    feed = check_feed(cadence.first, config.feed)
    plan = plan_cuts(cadence, CutOptions(config.channel_bin, config.max_drift, config.excluded(), feed))
    _say_what_is_cut(plan)
    return plan


def _say_what_is_cut(plan: CutPlan) -> None:
    """Log what is planned for a cadence, and warn of what its files do not say or what is left out."""
    first = plan.cadence.first
    last = int(plan.borders[-1])
    _log.info(
        "%s, MJD %.5f: %d snippets of %d x %d, channels of %.4g Hz, %.4f to %.4f MHz",
        *(first.source or "unnamed source", first.start_mjd, len(plan.starts), plan.time_bins, plan.columns),
        *(plan.column_width_hz, plan.column_mhz(0), plan.column_mhz(last - 1)),
    )
    if plan.time_bins < plan.cadence.spectra:
        left_out = plan.cadence.spectra - plan.time_bins
        _log.warning(
            "%s: the last %d of %d spectra are left out, here and in the files after it: snippets have %d time bins",
            *(first.path, left_out, plan.cadence.spectra, plan.time_bins),
        )
    if first.ra_hours is None:
        _log.warning(
            "%s: src_raj and src_dej are missing, or neither decimal hours and degrees nor hhmmss.s and ddmmss.s; its "
            "position is null in the table",
            first.path,
        )
    if not first.nfpc:
        _log.warning(
            "%s: %d channels are not a whole number of known coarse channels, so DC spikes stay in; give the number of "
            "channels in one with --nfpc",
            *(first.path, first.layout.channels),
        )


def _per_shard(config: IngestConfig, plans: Sequence[CutPlan]) -> int:
    """How many snippets go into one shard."""
    panels, time_bins, columns = plans[0].shape
    member = TAR_BLOCK + padded(len(npy_header(plans[0].shape)) + 2 * panels * time_bins * columns)
    return max(1, config.shard_mb * 10**6 // member)


def _describe(config: IngestConfig, plans: Sequence[CutPlan]) -> dict[str, Any]:
    """How the data set is made, for the manifest, without the number of needles; equal for equal files and options."""
    widths, lengths = {plan.column_width_hz for plan in plans}, {plan.cadence.first.bin_length_s for plan in plans}
    return {
        "folds": FOLDS,  # only data sets with the same number of folds can be joined
        "seed": 0,
        "time_bin": 1,
        "shard_mb": config.shard_mb,
        "catalog_sha256": hashlib.sha256(repr([identity(plan) for plan in plans]).encode()).hexdigest(),
        "observation": {
            "method": METHOD,
            # None where cadences differ: cadences.parquet has each one's.
            "channel_width_hz": widths.pop() if len(widths) == 1 else None,
            "bin_length_s": lengths.pop() if len(lengths) == 1 else None,
            "max_drift_hz_s": config.max_drift,
            "exclude_mhz": [list(each) for each in config.excluded()],
        },
    }


def _count_needles(made: dict[str, Any], plans: Sequence[CutPlan]) -> dict[str, Any]:
    """`made` with the number of needles in these plans; without it where there is none."""
    observation = {name: value for name, value in made["observation"].items() if name != _NEEDLES}
    needles = sum(len(plan.needles) for plan in plans)
    return {**made, "observation": observation | ({_NEEDLES: needles} if needles else {})}


def _sources(shard: CutShard) -> list[Record]:
    """The six files of a shard."""
    return [Record(str(n), "test", UNKNOWN_TARGET, NO_FOLD, path) for n, path in enumerate(shard.plan.cadence.paths)]


def _cut_shards(
    config: IngestConfig, jobs: Sequence[Job], skipped: list[list[str]], output: Output
) -> dict[str, PackedShard]:
    """Cut shards, unless an earlier run finished them; return them by name.

    With --on-bad skip, a cadence whose files cannot be read is noted in `skipped`; otherwise the error is raised.
    """
    done: dict[str, PackedShard] = {}
    refused: dict[int, InputError | OSError] = {}
    with open_tasks(config.tasks, Processes(config.workers)) as tasks:
        for each in run_shown(tasks, cut_work(jobs, config.shard_mb * 10**6 if output.is_remote else 0)):
            output.check_held()
            shard = jobs[each.number][1]
            if each.error is None:
                done[shard.name] = each.result()
            elif config.on_bad == "fail" or not _is_of_input(shard, each.error):
                raise each.error
            else:
                refused[each.number] = each.error
    _note_refused(config, jobs, refused, skipped)
    return done


def _note_refused(
    config: IngestConfig,
    jobs: Sequence[Job],
    refused: Mapping[int, InputError | OSError],
    skipped: list[list[str]],
) -> None:
    """Note the cadences of the jobs that were refused. Raises InputError where no cadence is left."""
    cadence_of = [shard.cadence for _, shard, _ in jobs]
    # The first refused job of each cadence, by number and not by time.
    for number in sorted({cadence_of[number]: number for number in sorted(refused, reverse=True)}.values()):
        with _leaving_out(config, jobs[number][1].plan.cadence.first.path, skipped):
            raise refused[number]
    if not set(cadence_of) - {cadence_of[number] for number in refused}:
        raise _nothing_left(config, skipped)


def _is_of_input(shard: CutShard, error: InputError | OSError) -> bool:
    """Whether an error concerns one of the files that are cut, not the place where shards are written."""
    if isinstance(error, OSError):
        return str(error.filename) in map(str, shard.plan.cadence.paths)
    return not isinstance(error, StoreError)


def _without_damaged(
    output: Output, plans: Sequence[CutPlan], shards: Sequence[CutShard], done: Mapping[str, PackedShard]
) -> tuple[list[CutPlan], list[CutShard], list[PackedShard]]:
    """Plans, shards and packed shards, without cadences of which a shard is missing; their other shards are removed."""
    damaged = {shard.cadence for shard in shards if shard.name not in done}
    for shard in shards:
        if shard.cadence in damaged:
            output.remove_shard(shard.name)
    numbers = [number for number in range(len(plans)) if number not in damaged]
    kept = [replace(shard, cadence=numbers.index(shard.cadence)) for shard in shards if shard.cadence not in damaged]
    return [plans[number] for number in numbers], kept, [done[shard.name] for shard in kept]


def _already_ingested(
    config: IngestConfig, made: dict[str, Any], shards: Sequence[CutShard], output: Output
) -> Manifest:
    """Return a finished ingest of the same files; raise InputError if it is of anything else."""
    manifest = read_manifest(config.out)
    records = [ShardPlan(shard.name, _sources(shard)) for shard in shards]
    reason: str | None = "made from other files or with other options"
    if "observation" in manifest.made and _count_needles(manifest.made, []) == made:  # catalog_sha256 covers needles
        unsure = {plan.name for plan in find_unsure(manifest, records)}
        reason = _find_changed(config, manifest, [shard for shard in shards if shard.name in unsure])
        if config.on_bad == "fail" and {shard.name for shard in shards} - {shard.name for shard in manifest.shards}:
            reason = "some of its cadences were left out, see skipped.csv"
        if unsure and not reason:
            renew_sources(manifest, records)
    if reason:
        raise InputError(f"{config.out}: holds finished shards ({reason}); delete it or choose another --out")
    output.tidy()
    _log.info("%s is already ingested; `python -m shard_tools verify %s` checks its bytes", config.out, config.out)
    return manifest


def _find_changed(config: IngestConfig, manifest: Manifest, shards: Sequence[CutShard]) -> str | None:
    """Cut these shards again; say which files changed first, or None if the bytes are those that they have.

    A cadence that was left out as damaged counts as changed if all of its shards can be cut now.
    """
    expected = {shard.name: shard.sha256 for shard in manifest.shards}
    changed: dict[int, CutShard] = {}
    damaged: set[int] = set()
    with tempfile.TemporaryDirectory(prefix="needlestream-ingest-") as folder:
        Path(folder, WORK).mkdir()
        for shard in shards:
            (made,) = Processes(1).run(cut_work([(ShardDestination(Path(folder)), shard, "")]))
            if made.error is None:
                Path(folder, shard.name).unlink()
                if made.result().shard.sha256 != expected.get(shard.name):
                    changed.setdefault(shard.cadence, shard)
            elif shard.name in expected:
                raise made.error
            else:
                damaged.add(shard.cadence)
    first = next((shard for cadence, shard in changed.items() if cadence not in damaged), None)
    return f"{first.plan.cadence.first.path} or a file after it has changed" if first else None
