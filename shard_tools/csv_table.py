"""CSV tables as people and other programs write them. Every cell stays text: an id such as 0012e9 is not a number."""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from shard_tools.errors import InputError


def read_table(table: BinaryIO, path: str, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each row's location, for messages, and its cells in `columns` without surrounding spaces.

    An absent cell is read as empty. Raises InputError where a column is missing or repeated, or the file is not CSV.
    """
    try:
        with io.TextIOWrapper(table, newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, skipinitialspace=True)
            places = _find_columns(next(rows, None), path, columns)
            for row in filter(None, rows):  # spreadsheets leave empty lines at the end
                cells = {name: row[place].strip() if place < len(row) else "" for name, place in places.items()}
                yield f"{path}, line {rows.line_num}", cells
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV table ({error})") from None


def _find_columns(header: list[str] | None, path: str, columns: Sequence[str]) -> dict[str, int]:
    """The index of each column."""
    names = None if header is None else [name.strip() for name in header]
    for column in columns:
        count = (names or []).count(column)
        if count == 0:
            raise InputError(f"{path}: columns {str(names)[:120]}, expected {list(columns)}")
        if count > 1:
            raise InputError(f"{path}: column {column} appears {count} times; keep the right one")
    return {column: (names or []).index(column) for column in columns}
