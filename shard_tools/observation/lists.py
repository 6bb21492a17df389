"""Lists of cadences: turboSETI's .lst (one path a line, six a cadence), and Aetherscan's CSV catalogues."""

from pathlib import Path

from shard_tools.cadence import PANELS
from shard_tools.csv_table import read_table
from shard_tools.errors import InputError

CSV_PATH = ".h5 path"
CSV_GROUP = ("Target", "Session", "Band", "Cadence ID", "Frequency")
"""The columns of a catalogue whose values the six rows of a cadence share."""


def read_cadence_list(path: Path) -> list[tuple[Path, ...]]:
    """The paths of each cadence, in order. Relative ones count from the list's folder.

    Raises InputError naming the line or the cadence where they are not six.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a list of cadences (.lst or .csv)")
    cadences = _read_catalogue(path) if path.suffix.lower() == ".csv" else _read_lines(path)
    if not cadences:
        raise InputError(f"{path}: empty, expected six paths for each cadence")
    return [tuple(path.parent / name for name in names) for names in cadences]


def _read_lines(path: Path) -> list[list[str]]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file ({error}); expected one path a line") from None
    names = [line for line in lines if line and not line.startswith("#")]
    if len(names) % PANELS:
        raise InputError(f"{path}: {len(names)} paths, expected six for each cadence (A B A C A D)")
    return [names[start : start + PANELS] for start in range(0, len(names), PANELS)]


def _read_catalogue(path: Path) -> list[list[str]]:
    """The rows of each group, in the order of the table."""
    groups: dict[tuple[str, ...], list[str]] = {}
    with path.open("rb") as file:
        for where, cells in read_table(file, str(path), (*CSV_GROUP, CSV_PATH)):
            if not cells[CSV_PATH]:
                raise InputError(f"{where}: no {CSV_PATH!r}, expected the path of a file")
            groups.setdefault(tuple(cells[name] for name in CSV_GROUP), []).append(cells[CSV_PATH])
    for group, names in groups.items():
        if len(names) != PANELS:
            raise InputError(
                f"{path}: cadence {', '.join(group)} has {len(names)} files, expected six; complete it or "
                "remove its rows"
            )
    return list(groups.values())
