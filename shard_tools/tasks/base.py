"""Independent calls of one function, and what the places that run them have in common."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from shard_tools.errors import InputError

T = TypeVar("T")
_UPLOADED_AT_ONCE = 524_288_000  # bytes: s3fs reads ten parts of 50 MiB of a file, and sends them side by side
PathOrUrl = TypeVar("PathOrUrl", bound=str | Path)


@dataclass(frozen=True)
class TaskConfig:
    """Where the work is done."""

    on: Literal["local", "ray"] = "local"
    """local: on this machine. ray: on the nodes of a Ray cluster, in place of --workers. All nodes need the same
    version of the program, and must see the input, and an output folder, under the same path."""
    ray_address: str | None = None
    """With --on ray, HOST:PORT of the cluster's head node. Unset: RAY_ADDRESS, or the cluster of this machine."""

    def __post_init__(self) -> None:
        if self.ray_address is not None and self.on != "ray":
            raise InputError(f"--ray-address {self.ray_address}: is used with --on ray only; give both, or neither")

    def absolute(self, path: PathOrUrl) -> PathOrUrl:
        """A path as all machines have it: with --on ray, relative ones become absolute, from this process's folder."""
        if self.on == "local" or "://" in str(path):
            return path
        return type(path)(Path(path).absolute())


@dataclass(frozen=True)
class Need:
    """What a task needs of its machine, so that a cluster does not start too many at once."""

    memory: int = 300_000_000
    """Bytes, imported libraries included."""
    disk: int = 0
    """Bytes of temporary files."""

    def uploading(self, shard: int) -> "Need":
        """This, plus what uploading a shard of `shard` bytes needs: disk, and memory while it is sent."""
        return replace(self, memory=self.memory + min(shard, _UPLOADED_AT_ONCE), disk=shard)


@dataclass(frozen=True)
class Work(Generic[T]):
    """Calls of one function that depend on their arguments alone. All fields are pickled if processes run them."""

    function: Callable[..., T]
    """A function of a module. It may raise InputError or OSError, and be called again for the same arguments."""
    calls: Sequence[tuple[Any, ...]]
    """The arguments of each call."""
    label: str
    """What is done, for the progress line, such as "packing"."""
    unit: str
    """What is counted, such as "shards"."""
    names: Sequence[str]
    """For each call, the file that messages name."""
    need: Need = field(default_factory=Need)
    prepare: Callable[[int | None], Any] | None = None
    """Makes what each process holds for all of its calls, such as a model on its device. It is given the process's
    number of cores, or None where cores are not shared out. The function gets the result before its other arguments,
    and each process takes a GPU where the cluster has any."""
    counts: Sequence[int] | None = None
    """How many units each call handles; None: one."""
    death: str = "at this file; memory ran out, or the machine failed"
    """Ends the sentence "a process died ..." where one dies on a call."""
    culprit: Callable[[], InputError | None] | None = None
    """Says more exactly why a process of this machine died, where that is known."""


@dataclass(frozen=True)
class Done(Generic[T]):
    """How one call ended."""

    number: int
    """Number of the call."""
    value: T | None = None
    error: InputError | OSError | None = None

    def result(self) -> T:
        """What the function returned; raises what it raised."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # None only where T is


class Tasks(Protocol):
    """A place that runs tasks."""

    def run(self, work: Work[T]) -> Iterator[Done[T]]:
        """Run all calls; yield how each ended, in the order in which they end. Closing the iterator stops the rest.

        Raises InputError naming the file where a process dies on it.
        """

    def describe(self) -> str:
        """What the progress line says of the place; empty where there is nothing to say."""
        return ""


def attempt(number: int, function: Callable[..., T], arguments: Sequence[Any]) -> Done[T]:
    """Call a function; return its InputError or OSError. Other errors are raised: they may not survive pickling."""
    try:
        return Done(number, function(*arguments))
    except (InputError, OSError) as error:
        return Done(number, error=error)


def died(names: Sequence[str], work: Work[Any], remedy: str) -> InputError:
    """The error for a process that died at one of the files `names`; `remedy` is for the case that memory ran out."""
    return InputError(f"{', '.join(names)}: a process died {work.death} ({remedy})")
