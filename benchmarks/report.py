"""Pictures and a page of the benchmarks' history: bar chart, trend over commits, tables for the documentation.

    python benchmarks/report.py [--readme docs/performance.md --recipe docs/recipe.md]

Writes loader.png, trend.png and index.html (one file, pictures inside, no network) into benchmarks/results. A panel
holds the last run of one workload from one source on one size of machine. Only rates in the same panel can be compared.
"""

import base64
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jinja2
import tyro

from benchmarks.chart_panels import ChartPanel, latest_panels, panels_of
from benchmarks.charts import write_bars, write_trend
from benchmarks.history import HISTORY, RESULTS, read
from benchmarks.history_tables import NEEDLES, OF_THE_RECIPE, Table, front_tables, loader_table, other_tables
from shard_tools.atomic_files import write_whole
from shard_tools.errors import InputError
from shard_tools.system.command import run_command

TEMPLATE = Path(__file__).with_suffix(".html")


@dataclass(frozen=True)
class ReportConfig:
    """Draw the history of the benchmarks."""

    history: Path = HISTORY
    """The file that the benchmarks append to."""
    out: Path = RESULTS
    """Folder for loader.png, trend.png and index.html."""
    readme: Path | None = None
    """A Markdown file. The tables of speed replace its text between <!-- benchmarks:begin --> and
    <!-- benchmarks:end -->."""
    recipe: Path | None = None
    """A Markdown file. The table of the learning curve, if there is one, replaces its text between <!-- curve:begin -->
    and <!-- curve:end -->; likewise those of changed recipes (`changes`) and of real skies (`skies`)."""


def markdown(tables: Sequence[Table], picture: str | None) -> str:
    """The tables as Markdown, below the picture."""
    parts = [f"![cadences/s of this loader, of others and of the ceilings]({picture})"] if picture else []
    for table in tables:
        lines = [table.headings, ["---", *["---:"] * (len(table.headings) - 1)], *table.rows]
        rows = ["| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines]
        parts.append(f"**{_escaped(table.title)}** ({_escaped(table.about)})\n\n" + "\n".join(rows))
    return "\n\n".join(parts)


def _escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def replace_block(readme: Path, block: str, name: str = "benchmarks") -> None:
    """Put `block` between the marks called `name` of a Markdown file and change nothing else.

    Raises InputError unless each mark is there exactly once, and in order.
    """
    text, begin, end = readme.read_bytes().decode(), f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise InputError(f"{readme}: expected {begin} and, after it, {end}, each once")
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    write_whole(readme, f"{before}\n{block}\n{after}")


def write_page(path: Path, pictures: Sequence[Path], tables: Sequence[Table], versions: dict[str, str]) -> None:
    """Write one HTML page with everything inside it."""
    template = jinja2.Environment(autoescape=True).from_string(TEMPLATE.read_text())
    images = [base64.b64encode(picture.read_bytes()).decode() for picture in pictures]
    write_whole(path, template.render(images=images, tables=tables, versions=versions))


def write_tables(config: ReportConfig, panels: Sequence[ChartPanel], others: Sequence[Table]) -> None:
    """Put the tables into the Markdown files that were named."""
    for name in OF_THE_RECIPE:
        tables = [table for table in others if table.title == name]
        if config.recipe and tables:
            replace_block(config.recipe, markdown(tables, None), name)
            print(f"table:       {config.recipe} ({name})")
    if config.readme:
        picture = os.path.relpath(config.out / "loader.png", config.readme.parent)
        rest = [table for table in others if table.title not in (NEEDLES, *OF_THE_RECIPE)]
        replace_block(config.readme, markdown([*front_tables(panels), *rest], picture if panels else None))
        print(f"table:       {config.readme}")


def main(config: ReportConfig) -> None:
    """Draw everything."""
    entries = read(config.history)
    if not entries:
        raise InputError(f"{config.history}: empty; run a benchmark first, such as benchmarks/loader_bench.py")
    config.out.mkdir(parents=True, exist_ok=True)
    pictures: list[Path] = []
    panels = latest_panels(entries)
    if panels:
        pictures = [config.out / "loader.png", config.out / "trend.png"]
        write_bars(pictures[0], panels)
        loaders = [entry for entry in entries if entry["benchmark"] == "loader"]
        write_trend(pictures[1], [panel for entry in loaders for panel in panels_of(entry)])
    others = other_tables(entries)
    write_page(config.out / "index.html", pictures, [*map(loader_table, panels), *others], entries[-1]["versions"])
    print(f"page:        {config.out / 'index.html'}")
    write_tables(config, panels, others)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(tyro.cli(ReportConfig))))
