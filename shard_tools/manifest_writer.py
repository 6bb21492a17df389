"""What lies beside the shards: the samples, what was left out, the submission's ids, and the manifest."""

import csv
import io
from collections.abc import Sequence
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
TABLES = (SAMPLES, SKIPPED, SUBMISSION)
NO_FILE = "no file"


def write_tables(
    source: Path,
    folder: Path,
    records: Sequence[Record],
    packed: Sequence[PackedShard],
    skipped: Sequence[Sequence[str]],
    shape: tuple[int, ...],
    made: dict[str, Any],
) -> None:
    """samples.parquet, skipped.csv, the submission's ids, and last the manifest, which makes the data set exist."""
    by_key = {record.key: record for record in records}
    rows = [
        (key, SPLITS.index(by_key[key].split), by_key[key].target, by_key[key].fold, number, offset, size)
        for number, shard in enumerate(packed)
        for key, offset, size in shard.places
    ]
    if not rows:
        raise InputError(f"{source}: every snippet was left out; {skipped[-1][2]}")
    table = pa.table([list(column) for column in zip(*rows, strict=True)], schema=SAMPLES_SCHEMA)
    parquet = io.BytesIO()
    pq.write_table(table, parquet)
    write_whole(folder / SAMPLES, parquet.getvalue())
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["id", "split", "reason"], *skipped])
    write_whole(folder / SKIPPED, text.getvalue())
    if (source / SUBMISSION).is_file():
        write_whole(folder / SUBMISSION, (source / SUBMISSION).read_bytes())
    names = [name for name in TABLES if (folder / name).is_file()]
    splits = {
        split: {
            "samples": sum(row[1] == number for row in rows),
            "positive": sum(row[1] == number and row[2] == 1 for row in rows),
            "missing": sum(line[1] == split and line[2] == NO_FILE for line in skipped),
            "quarantined": sum(line[1] == split and line[2] != NO_FILE for line in skipped),
        }
        for number, split in enumerate(SPLITS)
    }
    files = {name: file_sha256(folder / name) for name in names}
    content = manifest_content(shape, [shard.shard for shard in packed], splits, made, files)
    write_whole(folder / MANIFEST, canonical_json(content))
