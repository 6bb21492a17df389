"""A submission: the ids that it has to hold, checks before anything is scored, and its file."""

import contextlib
import csv
import errno
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from shard_tools.atomic_files import is_stream, write_whole
from shard_tools.errors import InputError
from shard_tools.kaggle_layout import SUBMISSION, to_submission_keys
from shard_tools.manifest import DataSet, Manifest
from shard_tools.storage.base import read_file

_SCORE_BYTES = 26  # of a line, after the id: the longest float64, comma and newline


def check_split(split: str, manifest: Manifest) -> None:
    """Raise InputError if the shards have no cadences of a split."""
    if manifest.splits[split]["samples"]:
        return
    other = "train" if split == "test" else "test"
    raise InputError(
        f"--split {split}: {manifest.root} has no cadences of {split}/; pack a folder that has some, or score the "
        f"{manifest.splits[other]['samples']:,} of {other}/ with --split {other}"
    )


def submission_keys(split: str, manifest: Manifest) -> list[str]:
    """The ids that the submission has to hold, in order: those of each data set, one data set after the other.

    A data set with a sample submission has the ids of that file, in its order. Raises InputError if that file
    changed, or if two data sets have an id in common.
    """
    holder: dict[str, DataSet] = {}
    for each in manifest.data_sets:
        for key in _keys_of(each, split, manifest):
            other = holder.setdefault(key, each)
            if other is not each:
                raise InputError(
                    f"{key}: is an id of the submission of {other.store.root} and of {each.store.root}, expected in "
                    "one only; score the two one after the other"
                )
    return list(holder)


def _keys_of(data_set: DataSet, split: str, manifest: Manifest) -> list[str]:
    if split == "test" and SUBMISSION in data_set.files:
        table, where = read_file(data_set.store, SUBMISSION) or b"", data_set.store.where(SUBMISSION)
        if hashlib.sha256(table).hexdigest() != data_set.files[SUBMISSION]:
            raise InputError(f"{where}: missing, or changed after packing; pack again")
        return to_submission_keys(table, where)
    rows, own = manifest.rows(split), data_set.rows
    return manifest.keys_of(rows[(rows >= own.start) & (rows < own.stop)])


def check_ids(keys: Sequence[str], split: str, manifest: Manifest, fill: float | None) -> None:
    """Raise InputError if the shards lack ids of the submission, unless these are to be filled in."""
    missing = sorted(set(keys).difference(manifest.keys_of(manifest.rows(split))))
    if missing and fill is None:
        raise InputError(
            f"{len(missing):,} of the {len(keys):,} ids of the submission are not in the shards, the first is "
            f"{missing[0]}; pack the whole test part, or give them a score with --fill-missing 0.5"
        )


def check_out(out: Path, keys: Sequence[str]) -> None:
    """Raise InputError if the submission could not be written: a bad path, no permission, or no room."""
    if out.is_dir():
        raise InputError(f"--out {out}: a folder, expected the name of the submission")
    try:
        if is_stream(out):
            if not os.access(out, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        place = Path(os.path.realpath(out))
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place.parent) as file:
            _reserve(file.fileno(), sum(len(key.encode()) + _SCORE_BYTES for key in keys))
    except OSError as error:
        raise InputError(
            f"--out {out}: cannot be written ({error.strerror}); choose another place, or free some space if it is full"
        ) from None


@contextlib.contextmanager
def hold_pipe(out: Path) -> Iterator[None]:
    """If `out` is a pipe, keep it open during the work, so that its reader does not see an end too early.

    Raises InputError if it has no reader: opening it for writing would wait forever.
    """
    if not out.is_fifo():
        yield
        return
    try:
        descriptor = os.open(out, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise InputError(f"--out {out}: a pipe that nobody reads; start its reader first") from None
    try:
        yield
    finally:
        os.close(descriptor)


def _reserve(descriptor: int, size: int) -> None:
    """Reserve room for `size` bytes, if the file system can; raises OSError if there is none."""
    try:
        os.posix_fallocate(descriptor, 0, max(size, 1))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def write_submission(path: Path, keys: Sequence[str], score_of: dict[str, float], fill: float | None) -> None:
    """Write id,target for exactly `keys`, in their order, at once or not at all; `fill` is for those without a score.

    Raises InputError if a score is not a number in 0 to 1.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "target"])
    for key in keys:
        score = score_of[key] if fill is None else score_of.get(key, fill)
        if not 0 <= score <= 1:  # also refuses NaN
            raise InputError(f"{path}: score {score} of {key}, expected 0 to 1; check the weights, or train again")
        writer.writerow([key, repr(float(score))])
    write_whole(path, text.getvalue())
