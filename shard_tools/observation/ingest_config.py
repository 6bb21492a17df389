"""The options of `python -m shard_tools ingest`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from shard_tools.errors import InputError
from shard_tools.system.cores import usable_cores
from shard_tools.tasks.base import TaskConfig


@dataclass(frozen=True)
class IngestConfig:
    """Cut snippets from observations, six files a cadence (ON A, OFF B, A, C, A, D), and pack them into shards."""

    out: str
    """Folder for the shards, made if it is absent, or URL (s3://, gs://, file://). An interrupted ingest goes on where
    it stopped."""
    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILE ...")] = ()
    """The six files of one cadence, FBH5 (.h5) or SIGPROC (.fil), in the order of the observation: A B A C A D."""
    cadences: Path | None = None
    """Instead of FILES, a list of cadences: turboSETI's .lst (one path per line, six per cadence) or Aetherscan's .csv
    (a column '.h5 path', and Target, Session, Band, Cadence ID and Frequency, which the rows of a cadence share)."""
    channel_bin: int | None = None
    """Number of the file's channels to sum into one channel of a snippet. Unset: 8 for fine products (22 Hz), 1 for
    others. With 1, slow lines stand out more: summing 8 costs a line of one channel a factor of 2.8 in SNR."""
    max_drift: float = 4.0
    """Steepest drift rate, in Hz/s, of a line that one snippet must hold from end to end: neighbouring snippets overlap
    by the channels that it crosses in the cadence."""
    exclude_mhz: tuple[str, ...] = ()
    """Ranges of known interference in MHz, such as 1200-1340: they are blanked, and snippets that hold nothing else are
    left out."""
    nfpc: int | None = None
    """Fine channels per coarse channel. Unset: as the header says, or as Breakthrough Listen's products have them."""
    feed: int | None = None
    """Which polarisation to read, counted from 0, if the files hold several."""
    any_sources: bool = False
    """Do not check that ON files have one source and OFF files others: for schedules that name sources differently."""
    on_bad: Literal["fail", "skip"] = "fail"
    """What to do with a cadence that cannot be used: stop, or leave it out and list it in skipped.csv."""
    staging: Path | None = None
    """With a URL, the local folder that holds shards until they are uploaded, one per worker at a time. Unset: a folder
    among the system's temporary files, the same for the same URL."""
    workers: int = usable_cores()
    """Processes, each of which writes its own shard; each takes about 0.4 GB of memory with 16 spectra
    and --channel-bin 8, and more with more spectra or narrower channels."""
    shard_mb: int = 256
    """Size of a shard, in MB (10^6 bytes)."""
    tasks: tyro.conf.OmitArgPrefixes[TaskConfig] = field(default_factory=TaskConfig)

    def __post_init__(self) -> None:
        for flag, value in (
            ("--workers", self.workers),
            ("--shard-mb", self.shard_mb),
            ("--channel-bin", self.channel_bin),
            ("--nfpc", self.nfpc),
        ):
            if value is not None and value < 1:
                raise InputError(f"{flag} {value}: expected at least 1")
        if not 0 <= self.max_drift <= 1e6:
            raise InputError(f"--max-drift {self.max_drift}: expected 0 to 1e6 Hz/s")
        if bool(self.files) == bool(self.cadences):
            raise InputError("expected six files, or --cadences LIST, and not both")
        self.excluded()
        object.__setattr__(self, "out", self.tasks.absolute(self.out))
        object.__setattr__(self, "files", tuple(map(self.tasks.absolute, self.files)))
        if self.cadences is not None:
            object.__setattr__(self, "cadences", self.tasks.absolute(self.cadences))

    def excluded(self) -> tuple[tuple[float, float], ...]:
        """(lowest, highest) of each range of --exclude-mhz. Raises InputError."""
        return tuple(_to_range(text) for text in self.exclude_mhz)


def _to_range(text: str) -> tuple[float, float]:
    low, _, high = text.partition("-")
    try:
        found = float(low), float(high)
    except ValueError:
        found = 0.0, 0.0
    if not 0 < found[0] < found[1] < float("inf"):
        raise InputError(f"--exclude-mhz {text}: expected LOW-HIGH in MHz, such as 1200-1340")
    return found
