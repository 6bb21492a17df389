"""An open file of an observation, whatever its format."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from shard_tools.errors import InputError
from shard_tools.observation.header import Header

Float32s = npt.NDArray[np.float32]
DTYPES = ("float32", "uint16", "uint8")


class FilterbankFile(ABC):
    """Spectra (T, feed, channel) of one pointing, read by ranges of channels."""

    header: Header
    chunk_channels: int
    """Neighbouring channels that are stored together: reading part of them costs as much as all."""

    @abstractmethod
    def _read(self, first: int, last: int, spectra: int, feed: int) -> npt.NDArray[Any]:
        """(spectra, last - first) in the file's own type; channels in the file's order."""

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    def read(self, start: int, stop: int, spectra: int, feed: int = 0) -> Float32s:
        """The first `spectra` spectra of channels `start` to `stop`: (spectra, stop - start), frequencies ascending.

        Raises InputError naming the file where it is damaged or cut short there.
        """
        channels = self.header.layout.channels
        if self.header.foff_mhz > 0:
            return self._read(start, stop, spectra, feed).astype(np.float32, copy=False)
        values = self._read(channels - stop, channels - start, spectra, feed)
        return values[:, ::-1].astype(np.float32, copy=False)

    def __enter__(self) -> "FilterbankFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_feed(header: Header, feed: int | None) -> int:
    """The feed (polarisation) to read. Raises InputError where the file has several and none was chosen."""
    path, feeds = header.path, header.layout.feeds
    if feed is None and feeds != 1:
        raise InputError(
            f"{path}: nifs {feeds}, expected 1; choose one of the polarisations 0 to {feeds - 1} with --feed"
        )
    if feed is not None and not 0 <= feed < feeds:
        raise InputError(f"{path}: --feed {feed}, but the file has nifs {feeds}; choose 0 to {feeds - 1}")
    return feed or 0
