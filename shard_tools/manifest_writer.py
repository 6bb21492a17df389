"""Write the files beside the shards: samples, skipped samples, the submission's ids and the manifest."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shard_tools.atomic_files import file_sha256, write_whole
from shard_tools.errors import InputError
from shard_tools.kaggle_layout import SPLITS, SUBMISSION, Record
from shard_tools.manifest import MANIFEST, canonical_json, manifest_content
from shard_tools.sample_table import SAMPLES, SAMPLES_SCHEMA
from shard_tools.tar_shard import PackedShard

SKIPPED = "skipped.csv"
# For snippets that were cut from a telescope's files, three more tables say where (observation/cadence_tables.py).
CADENCES, CUTS, BANDPASS = "cadences.parquet", "cuts.parquet", "bandpass.parquet"
TABLES = (SAMPLES, SKIPPED, SUBMISSION, CADENCES, CUTS, BANDPASS)
NO_FILE = "no file"


@dataclass(frozen=True)
class PackedDataSet:
    """What the tables and the manifest hold about the written shards."""

    records: Sequence[Record]
    """All records, including those left out."""
    packed: Sequence[PackedShard]
    skipped: Sequence[Sequence[str]]
    """[key, split, reason] of every sample that was left out or has no file."""
    shape: tuple[int, ...]
    """(P, T, F)"""
    made: dict[str, Any]
    """How the data set was made, for the manifest."""


def write_tables(source: Path, folder: Path, data: PackedDataSet) -> None:
    """Write samples.parquet, skipped.csv, the submission's ids and last the manifest, which makes the data set valid.

    `source` is the folder that was packed. Raises InputError if every snippet was left out.
    """
    rows = _sample_rows(data)
    if not rows:
        raise InputError(f"{source}: every snippet was left out; {data.skipped[-1][2]}")
    table = pa.table([list(column) for column in zip(*rows, strict=True)], schema=SAMPLES_SCHEMA)
    parquet = io.BytesIO()
    pq.write_table(table, parquet)
    write_whole(folder / SAMPLES, parquet.getvalue())
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["id", "split", "reason"], *data.skipped])
    write_whole(folder / SKIPPED, text.getvalue())
    if (source / SUBMISSION).is_file():
        write_whole(folder / SUBMISSION, (source / SUBMISSION).read_bytes())
    files = {name: file_sha256(folder / name) for name in TABLES if (folder / name).is_file()}
    splits = _count_splits(rows, data.skipped)
    content = manifest_content(data.shape, [packed.shard for packed in data.packed], splits, data.made, files)
    write_whole(folder / MANIFEST, canonical_json(content))


def _sample_rows(data: PackedDataSet) -> list[tuple[Any, ...]]:
    """The rows of samples.parquet, in the order of SAMPLES_SCHEMA."""
    by_key = {record.key: record for record in data.records}
    return [
        (key, SPLITS.index(by_key[key].split), by_key[key].target, by_key[key].fold, number, offset, size)
        for number, packed in enumerate(data.packed)
        for key, offset, size in packed.members
    ]


def _count_splits(rows: Sequence[tuple[Any, ...]], skipped: Sequence[Sequence[str]]) -> dict[str, dict[str, int]]:
    """The counts of each split, for the manifest."""
    return {
        split: {
            "samples": sum(row[1] == number for row in rows),
            "positive": sum(row[1] == number and row[2] == 1 for row in rows),
            "missing": sum(line[1] == split and line[2] == NO_FILE for line in skipped),
            "quarantined": sum(line[1] == split and line[2] != NO_FILE for line in skipped),
        }
        for number, split in enumerate(SPLITS)
    }
