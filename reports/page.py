"""The page of a run: sections of plain data in RUN/report/, and one self-contained HTML file made from all of them.

Each command writes its own section; the page is then rendered again from all sections in the folder.
"""

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from shard_tools.atomic_files import write_whole
from shard_tools.errors import InputError

PAGE = "report.html"
SECTIONS = "report"  # a folder beside the page
_FORMAT = 1
_USER = re.compile(r"(?<=://)[^/@\s]*@")
_QUERY = re.compile(r"(://[^\s?#'\"]*)[?#][^\s'\"]*")


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption."""

    png: str
    """Its bytes in base64."""
    alt: str
    """The alternative text, for readers who cannot see it."""
    title: str = ""
    lines: Sequence[str] = ()
    """The lines of the caption below the title."""


@dataclass(frozen=True)
class Block:
    """A heading and its content; empty fields are left out of the page."""

    heading: str
    text: str = ""
    numbers: Sequence[tuple[str, str, str]] = ()
    """Figures in large type: value, what it is, a remark."""
    pictures: Sequence[Picture] = ()
    is_gallery: bool = False
    """On a narrow screen the pictures form a strip to be scrolled sideways, instead of a column."""
    rows: Sequence[tuple[str, str]] = ()
    """A table of names and values."""
    command: str = ""
    is_folded: bool = False
    """Collapsed until the reader opens it."""
    is_wide: bool = False
    """Each picture takes the whole width."""
    table: Sequence[Sequence[str]] = ()
    """A table of many columns; the first row has their names."""


@dataclass(frozen=True)
class Section:
    """One part of the page, as one command writes it."""

    title: str
    about: str
    blocks: Sequence[Block]


def to_picture(png: bytes, alt: str, title: str = "", lines: Sequence[str] = ()) -> Picture:
    """A picture for a page, from the bytes of a PNG."""
    return Picture(base64.b64encode(png).decode(), alt, title, lines)


def without_secrets(text: str) -> str:
    """The text with user, password and query removed from its URLs, since pages are shared."""
    return _QUERY.sub(r"\1?...", _USER.sub("...@", text))


def to_rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Nested values as rows of a table: dotted names, strings as they are, other values as JSON."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            rows += [(f"{name}.{inner}", shown) for inner, shown in to_rows(value)]
        else:
            rows.append((name, value if isinstance(value, str) else json.dumps(value, default=str)))
    return rows


def write_section(folder: Path, name: str, section: Section) -> None:
    """Write or replace the section `name` of the page of `folder`; the page sorts sections by name."""
    place = folder / SECTIONS / f"{name}.json"
    place.parent.mkdir(exist_ok=True)
    write_whole(place, json.dumps({"format": _FORMAT, **asdict(section)}) + "\n")


def read_section(path: Path) -> Section:
    """Read a section. Raises InputError if the file is not one."""
    try:
        content = json.loads(path.read_bytes())
        if content.pop("format") != _FORMAT:
            raise ValueError
        blocks = [
            Block(**{**block, "pictures": [Picture(**picture) for picture in block["pictures"]]})
            for block in content.pop("blocks")
        ]
        return Section(**content, blocks=blocks)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path}: not a section of a page, or of another version; delete it") from None


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Render sections into one HTML file that needs nothing beside it, at once or not at all."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: without_secrets(value) if type(value) is str and "://" in value else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template(PAGE).render(title=title, sections=sections)
    # A file name need not be UTF-8, and Python then holds parts of it that cannot be encoded.
    write_whole(path, html.encode("utf-8", "replace"))


def write_run_page(run_dir: Path) -> Path:
    """Render the page of a run folder from the sections that lie there. Raises InputError if one is damaged."""
    sections = [read_section(path) for path in sorted((run_dir / SECTIONS).glob("*.json"))]
    write_page(run_dir / PAGE, run_dir.resolve().name, sections)
    return run_dir / PAGE
