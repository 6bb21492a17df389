"""Import shards that other WebDataset tools made: read with the webdataset library, packed as ours.

Each array is first written to a folder in the Kaggle layout, which `pack` then reads like any other: same checks, same
folds, same bytes. The folder takes disk space for all arrays until the end.
"""

import csv
import glob
import io
import json
import logging
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

from shard_tools.atomic_files import write_whole
from shard_tools.cadence import check_key
from shard_tools.errors import InputError
from shard_tools.kaggle_layout import LABELS, SUBMISSION, to_target
from shard_tools.manifest import Manifest
from shard_tools.pack import PackConfig, pack
from shard_tools.system.cores import usable_cores
from shard_tools.system.progress import progress

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")  # pipe:, http:, s3: ...
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_LARGEST_ARRAY = 1 << 30  # bytes; an array that unpacks to more than this is not a snippet
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImportConfig:
    """Import shards that other WebDataset tools made (tar or tar.gz of .npy or .npz arrays and labels)."""

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TAR ...")]
    """Tar files; patterns such as 'train-{000..009}.tar' and 'train-*.tar' too."""
    out: str
    """Folder for the shards, made if it is absent, or URL (s3://, gs://, file://)."""
    split: Literal["train", "test"] = "train"
    """Split that the samples go to. In train each needs a label; in test labels are ignored."""
    array_ext: str = ""
    """What follows the first dot in the name of an array's member, such as npy or image.npy. Unset: names that end with
    .npy or .npz; any earlier dots belong to the key."""
    array_name: str = ""
    """Name of the array in an .npz file. Unset: the only one."""
    label_ext: str = ""
    """What follows the first dot in the name of a label's member. Unset: names that end with .cls, .txt or .json."""
    label_field: str = ""
    """Field of a JSON label, such as target. Unset: the JSON is a number, or an object with one field."""
    staging: Path | None = None
    """Folder for the arrays until they are packed; they are removed at the end. Unset: the system's folder for
    temporary files."""
    folds: int = 5
    """Number of stratified folds of the train split."""
    seed: int = 0
    """Seed of the folds."""
    workers: int = usable_cores()
    """Threads, each of which writes its own shard."""
    on_bad: Literal["fail", "quarantine"] = "fail"
    """What to do with an invalid snippet (damaged, not finite, of another shape or type): stop, or leave it out and
    list it in skipped.csv."""
    cast: Literal["none", "float16"] = "none"
    """What to do with numbers of other types, such as float32. none: refuse them; float16: round them."""
    time_bin: int = 1
    """Number of neighbouring time bins to sum into one, for smaller shards; 1 keeps the arrays as they are."""
    shard_mb: int = 256
    """Size of a shard, in MB (10^6 bytes)."""

    def __post_init__(self) -> None:
        if self.array_ext and self.array_ext.rsplit(".")[-1] not in ("npy", "npz"):
            raise InputError(f"--array-ext {self.array_ext}: expected a name that ends with npy or npz")

    def to_pack(self, folder: Path) -> PackConfig:
        """The options to pack `folder` with."""
        names = ("folds", "seed", "workers", "on_bad", "cast", "time_bin", "shard_mb")
        options = {name: getattr(self, name) for name in names}
        return PackConfig(folder, self.out, **options)


class _Member(NamedTuple):
    """A regular file of a tar."""

    tar: str
    name: str
    data: bytes

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"{self.tar}, {self.name}"


@dataclass
class _Found:
    """What was found in the tars so far."""

    arrays: dict[str, str] = field(default_factory=dict)
    """Key to the tar and member that hold its array."""
    labels: dict[str, int] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    """Keys of the arrays as in the tars, with dots and folders."""
    renamed: int = 0
    others: int = 0


def import_webdataset(config: ImportConfig) -> Manifest:
    """Import shards and return the manifest of the new ones.

    Nothing is unpickled and no command is run. Raises InputError as `pack` does, and naming a tar or member that cannot
    be read, is not an array or has no label.
    """
    tars = expand_sources(config.sources)
    if config.staging:
        config.staging.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="needlestream-import-", dir=config.staging) as name:
        folder, found = Path(name), _Found()
        for tar in progress(tars, len(tars), "importing", "tars"):
            for member in _members(tar):
                _take(config, folder, found, member)
        _check_found(config, found, tars)
        table = LABELS if config.split == "train" else SUBMISSION
        rows = [(key, found.labels.get(key, 0.5)) for key in sorted(found.arrays)]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("id", "target"), *rows])
        write_whole(folder / table, text.getvalue())
        if found.others:
            _log.info("%d members are neither arrays nor labels, and were left out", found.others)
        if found.renamed:
            _log.info("%d keys had characters other than letters, digits, _ and -, which became _", found.renamed)
        return _pack_staged(config, folder, found)


def _pack_staged(config: ImportConfig, folder: Path, found: _Found) -> Manifest:
    """Pack the staged arrays; errors name the tar and member instead of the staged file."""
    try:
        return pack(config.to_pack(folder))
    except InputError as error:
        staged = re.compile(rf"{re.escape(str(folder))}/{config.split}/[^/]/([\w-]+)\.npy", re.ASCII)
        text = staged.sub(lambda match: found.arrays.get(match[1], match[0]), str(error))
        raise type(error)(text.replace(str(folder), " ".join(config.sources))) from None


def expand_sources(sources: tuple[str, ...]) -> list[str]:
    """Paths of all tars, in order. Raises InputError for URLs, pipes and files that do not exist."""
    import braceexpand  # webdataset's own

    tars: list[str] = []
    for source in sources:
        if _SCHEME.match(source) or source.startswith("-"):
            raise InputError(f"{source}: expected a local tar file; copy it here first (pipe: and URLs are not opened)")
        for pattern in [source] if Path(source).is_file() else braceexpand.braceexpand(source):
            found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (an absolute pattern too)
            if not found:
                raise InputError(f"{pattern}: no such file; expected tar files, or a pattern of their names")
            tars += found
    if not tars:
        raise InputError("expected at least one tar file")
    return tars


def _members(tar: str) -> Iterator[_Member]:
    """Each regular file of a tar, compressed or not."""
    from webdataset.tariterators import tar_file_iterator  # it loads torch

    with Path(tar).open("rb") as file, closing(tar_file_iterator(file)) as members:
        try:
            for member in members:
                yield _Member(tar, member["fname"], member["data"])
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise InputError(f"{tar}: not a whole tar file ({error}); make or copy it again") from None


def _take(config: ImportConfig, folder: Path, found: _Found, member: _Member) -> None:
    """Keep an array or a label; count anything else."""
    name, data, where = member.name, member.data, member.where
    if Path(name).name.startswith("._"):  # tar on a Mac adds such a file, with the same extension, to each member
        found.others += 1
        return
    if ext := _ext_of(name, config.array_ext, ("npy", "npz")):
        key = _to_key(name, ext, where, found)
        if key in found.arrays:
            raise InputError(f"{where}: a second array of {key}, after {found.arrays[key]}; expected one (--array-ext)")
        found.arrays[key] = where
        found.names.add(name[: -len(ext) - 1].removeprefix("./").strip("/"))
        path = folder / config.split / key[0] / f"{key}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_unzip(data, config.array_name, where) if ext.endswith("npz") else data)
    elif ext := _ext_of(name, config.label_ext, ("cls", "txt", "json")):
        if config.split == "train":
            key = _to_key(name, ext, where, found)
            if key in found.labels:
                raise InputError(f"{where}: a second label of {key}; expected one (--label-ext)")
            found.labels[key] = _to_label(data, ext, config.label_field, key, where)
    else:
        found.others += 1


def _ext_of(member: str, given: str, usual: tuple[str, ...]) -> str:
    """A member's extension if it is the given one or, where none was given, one of the usual ones; else empty.

    A given one is compared as WebDataset splits names: at the first dot after the folders.
    """
    name = member.lower()
    if given:
        return given if name.rpartition("/")[2].partition(".")[2] == given.lower() else ""
    return next((ext for ext in usual if name.endswith(f".{ext}")), "")


def _to_key(member: str, ext: str, where: str, found: _Found) -> str:
    """The key: the member's name without its extension; characters that keys may not contain become _."""
    name = member[: -len(ext) - 1].removeprefix("./").strip("/")
    key = _UNSAFE.sub("_", name)
    check_key(key, where)
    found.renamed += key != name
    return key


def _unzip(data: bytes, name: str, where: str) -> bytes:
    """The bytes of an .npy file inside an .npz file, without decoding them."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            arrays = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            if name not in arrays and (name or len(arrays) != 1):
                wanted = f"{name!r}" if name else "one array"
                raise InputError(f"{where}: holds {sorted(arrays)}, expected {wanted}; choose one with --array-name")
            info = arrays[name] if name else next(iter(arrays.values()))
            if info.file_size > _LARGEST_ARRAY:
                raise InputError(f"{where}: unpacks to {info.file_size:,} bytes, expected a snippet")
            return file.read(info)
    # zipfile's own: NotImplementedError for an unknown compression, RuntimeError for an encrypted file.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{where}: not an .npz file ({error})") from None


def _to_label(data: bytes, ext: str, field_name: str, key: str, where: str) -> int:
    """Parse a label's bytes to 0 or 1."""
    text = data.decode("utf-8", "replace").strip()
    if ext.endswith("json"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error})") from None
        if isinstance(value, dict):
            if not field_name and len(value) != 1:
                raise InputError(f"{where}: fields {sorted(value)[:10]}, expected one; name it with --label-field")
            value = value.get(field_name) if field_name else next(iter(value.values()))
        text = str(value)
    return to_target(text, key, where)


def _check_found(config: ImportConfig, found: _Found, tars: list[str]) -> None:
    """Raise InputError where arrays are missing or ambiguous, or in the train split do not match the labels."""
    if not found.arrays:
        ext = config.array_ext or "npy or .npz"
        raise InputError(f"{tars[0]}: no array in {len(tars)} tars; expected members KEY.{ext} (--array-ext)")
    for name, (short, _, word) in ((name, name.rpartition(".")) for name in found.names):
        if short in found.names:
            raise InputError(
                f"{found.arrays[_UNSAFE.sub('_', name)]}: a second array of {short}; choose one with --array-ext "
                f"npy or --array-ext {word}.npy"
            )
    if config.split == "test":
        return
    if without := sorted(found.arrays.keys() - found.labels.keys()):
        raise InputError(
            f"{found.arrays[without[0]]}: no label, the first of {len(without)}; expected KEY."
            f"{config.label_ext or 'cls, .txt or .json'} (--label-ext), or --split test"
        )
    if stray := sorted(found.labels.keys() - found.arrays.keys()):
        raise InputError(f"{tars[0]}: a label of {stray[0]} but no array, the first of {len(stray)} such (--array-ext)")
