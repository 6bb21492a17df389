"""Pictures and a page of the benchmarks' history: bar chart, trend over commits, tables for the documentation.

    python benchmarks/report.py [--readme docs/performance.md --recipe docs/recipe.md]

Writes loader.png, trend.png and index.html (one file, pictures inside, no network) into benchmarks/results. A panel is
what one machine measured of one workload from one source; it shows the last run of it. Only rates of one panel are
comparable.
"""

import base64
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jinja2
import tyro

from benchmarks.charts import Panel, latest_panels, machine_name, panels_of, write_bars, write_trend
from benchmarks.history import HISTORY, RESULTS, read
from shard_tools.atomic_files import write_whole
from shard_tools.errors import InputError, run_command

_NEEDLES = "needles"  # workload, and the name of the marks around its own table
_PAIRED = "+.3f to"  # a number and the bounds of its interval
# The other benchmarks' columns: (name in the figure, heading, format).
_TABLES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "train": (
        ("preset", "preset", "s"), ("loader", "loader alone", ",.0f"), ("model", "model alone", ",.0f"),
        ("both", "both", ",.0f"), ("ratio", "both / model", ".3f"), ("stall", "stall", ".1%"),
        ("bound_by", "bound by", "s"), ("mfu", "MFU", ".1%"), ("timm_images_per_s", "timm, images/s", ",.0f"),
    ),
    "pack": (
        ("way", "command", "s"), ("seconds", "seconds", ".2f"), ("cadences_per_s", "cadences/s", ",.0f"),
        ("multiple", "pack's multiple", ".2f"),
    ),
    "variants": (
        ("variant", "setting", "s"), ("images_per_s", "images/s", ",.0f"), ("mfu", "MFU", ".1%"),
        ("warm_up_s", "warm-up, s", ".0f"), ("memory_gb", "memory, GB", ".1f"), ("failed", "failed", "s"),
    ),
    "five epochs": (
        ("preset", "preset", "s"), ("seconds", "seconds", ",.0f"), ("cadences", "cadences", ",.0f"),
        ("lowest", "slowest epoch, cadences/s", ",.0f"), ("highest", "fastest", ",.0f"),
    ),
    _NEEDLES: (
        ("row", "recipe", "s"), ("runs", "runs", "d"), ("auc", "ROC AUC", ".4f"),
        ("ahead_auc", "ours ahead by (95 %)", _PAIRED), ("recall_1e2", "recall at 1e-2", ".3f"),
        ("ahead_recall_1e2", "ours ahead by (95 %)", _PAIRED), ("recall_1e3", "at 1e-3", ".3f"),
        ("ahead_recall_1e3", "ours ahead by (95 %)", _PAIRED),
        ("half_snr", "SNR of recall 1/2", ".0f"), ("drop", "drop when ON and OFF swap", ".3f"),
        ("epochs", "epochs", "d"), ("train_s", "training, s", ",.0f"), ("cadences_per_s", "cadences/s", ",.0f"),
        ("real_above", "real needles above their twins", ".1%"), ("real_auc", "real AUC", ".3f"),
        ("ahead_real_auc", "ours ahead by (95 %)", _PAIRED), ("pretrained", "pretrained weights", "s"),
        ("failed", "failed", "s"),
    ),
}  # fmt: skip
_TABLES["infer"] = _TABLES["train"]
_LOADER_COLUMNS = (
    ("name", "loader", "s"), ("cadences_per_s", "cadences/s", ",.0f"), ("range", "range", "s"),
    ("gb_per_s", "GB/s", ".2f"), ("cpu_ms", "CPU ms a cadence", ".2f"), ("peak_mb", "peak MB", ",.0f"),
    ("first_batch_s", "first batch, s", ".2f"),
)  # fmt: skip


@dataclass(frozen=True)
class ReportConfig:
    """Draw the history of the benchmarks."""

    history: Path = HISTORY
    """The lines that the benchmarks appended."""
    out: Path = RESULTS
    """Folder for loader.png, trend.png and index.html."""
    readme: Path | None = None
    """A Markdown file. The tables, but that of the needle benchmark, replace its text between <!-- benchmarks:begin -->
    and <!-- benchmarks:end -->."""
    recipe: Path | None = None
    """A Markdown file. The table of the needle benchmark, once there is one, replaces its text between
    <!-- needles:begin --> and <!-- needles:end -->."""


@dataclass(frozen=True)
class Table:
    """Headings and rows of words."""

    title: str
    about: str
    headings: tuple[str, ...]
    rows: list[list[str]]


def when_and_where(entry: dict[str, Any]) -> str:
    """Machine, date and commit of an entry."""
    dirty = "+" if entry["commit"].endswith("+") else ""
    return f"{machine_name(entry)}, {entry['time'][:10]}, commit {entry['commit'].rstrip('+')[:7]}{dirty}"


def loader_table(panel: Panel) -> Table:
    """The figures of a panel, with what ours is a multiple of."""
    ours = panel.best.get("ours")
    rows = []
    for figure in panel.figures:
        lowest, highest = _cell(figure.get("lowest"), ",.0f"), _cell(figure.get("highest"), ",.0f")
        shown = {**figure, "range": f"{lowest} to {highest}"}
        times = f"{ours / figure['cadences_per_s']:.2f}" if ours and figure["cadences_per_s"] else ""
        rows.append([*(_cell(shown.get(name), form) for name, _, form in _LOADER_COLUMNS), times])
    headings = (*(heading for _, heading, _ in _LOADER_COLUMNS), "ours is times as fast")
    for figure in panel.failed:
        reason = f"failed: {figure.get('failed', 'no rate')}"
        rows.append([figure["name"], reason, *[""] * (len(headings) - 2)])
    return Table(panel.title, when_and_where(panel.entry), headings, rows)


def front_tables(panels: Sequence[Panel]) -> list[Table]:
    """One table a machine, in short: loaders down, panels across, cadences/s."""
    tables = []
    for machine in dict.fromkeys(panel.machine for panel in panels):
        mine = [panel for panel in panels if panel.machine == machine]
        rates = [{figure["name"]: figure["cadences_per_s"] for figure in panel.figures} for panel in mine]
        names = dict.fromkeys(name for rate in rates for name in rate)  # fastest first, as in the first panel
        rows = [[name, *(_cell(rate.get(name), ",.0f") for rate in rates)] for name in names]
        abouts = "; ".join(dict.fromkeys(when_and_where(panel.entry) for panel in mine))
        tables.append(Table("cadences/s", abouts, ("loader", *(panel.title for panel in mine)), rows))
    return tables


def other_tables(entries: Sequence[dict[str, Any]]) -> list[Table]:
    """The last figures of every other benchmark, on each machine."""
    found: dict[tuple[str, ...], tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for entry in entries:
        by_workload: dict[str, list[dict[str, Any]]] = {}
        for figure in entry["figures"] if entry["benchmark"] != "loader" else ():
            by_workload.setdefault(str(figure.get("workload")), []).append(figure)
        for workload, figures in by_workload.items():
            # What is found does not depend on the machine, but on what fits into the time on a CPU or on a GPU.
            where = str(entry["config"].get("form")) if workload == _NEEDLES else machine_name(entry)
            key = workload, where, _preset(workload, figures)
            # Of the needle benchmark a run with other rows, data or times does not replace a whole one.
            if key in found and entry["config"].get("is_part") and not found[key][0]["config"].get("is_part"):
                continue
            found[key] = (entry, figures)
    tables = []
    for (workload, *_), (entry, figures) in found.items():
        columns = _TABLES.get(workload)
        if columns is None:
            continue
        if workload in ("train", "infer"):
            figures = [_one_row(figures)]
        # Without the columns that nobody has something for: what only a GPU has, why a row failed.
        shown = [column for column in columns if any(figure.get(column[0]) is not None for figure in figures)]
        rows = [[_words(figure, name, form) for name, _, form in shown] for figure in figures]
        tables.append(Table(workload, when_and_where(entry), tuple(heading for _, heading, _ in shown), rows))
    return tables


def _preset(workload: str, figures: list[dict[str, Any]]) -> str:
    """What keeps the runs of one preset apart from those of another."""
    names = [str(figure["preset"]) for figure in figures if "preset" in figure]
    return names[0] if names and workload in ("train", "infer") else ""


def _one_row(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """The three rates and the verdict side by side."""
    rates = {figure["rate"]: figure["cadences_per_s"] for figure in figures if "rate" in figure}
    return rates | next((figure for figure in figures if "ratio" in figure), {})


def _words(figure: dict[str, Any], name: str, form: str) -> str:
    if form != _PAIRED:
        return _cell(figure.get(name), form)
    if figure.get(name) is None:
        return ""
    low, high = (_cell(figure[f"{name}_{end}"], "+.3f") for end in ("low", "high"))
    return f"{figure[name]:+.3f} ({low} to {high})"


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    return str(value) if form == "s" or isinstance(value, str) else format(value, form)


def markdown(tables: Sequence[Table], picture: str | None) -> str:
    """The tables for a README, after the picture."""
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

    Raises InputError where the marks are not there, once each and in order.
    """
    text, begin, end = readme.read_bytes().decode(), f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise InputError(f"{readme}: expected {begin} and, after it, {end}, each once")
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    write_whole(readme, f"{before}\n{block}\n{after}")


def write_page(path: Path, pictures: Sequence[Path], tables: Sequence[Table], versions: dict[str, str]) -> None:
    """One HTML page with everything inside it."""
    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    images = [base64.b64encode(picture.read_bytes()).decode() for picture in pictures]
    write_whole(path, template.render(images=images, tables=tables, versions=versions))


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Needlestream: benchmarks</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; color: #1b1f24 }
 img { width: 100%; height: auto } h2 { margin-bottom: 0 } .about { color: #57606a; margin-top: 0 }
 .scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
 th, td { padding: .25rem .75rem; border-bottom: 1px solid #d0d7de; text-align: right; white-space: nowrap }
 th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff }
</style>
<h1>Needlestream: benchmarks</h1>
{% for image in images %}<p><img alt="chart {{ loop.index }}" src="data:image/png;base64,{{ image }}">{% endfor %}
{% for table in tables %}
<h2>{{ table.title }}</h2>
<p class="about">{{ table.about }}</p>
<div class="scroll"><table>
<tr>{% for heading in table.headings %}<th>{{ heading }}{% endfor %}
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}{% endfor %}
{% endfor %}</table></div>
{% endfor %}
<p class="about">Versions of the last run: {% for name, version in versions.items() -%}
{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}
</html>
"""


def main(config: ReportConfig) -> None:
    """Draw everything."""
    entries = read(config.history)
    if not entries:
        raise InputError(f"{config.history}: empty; run a benchmark first")
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
    needles = [table for table in others if table.title == _NEEDLES]
    if config.recipe and needles:
        replace_block(config.recipe, markdown(needles, None), _NEEDLES)
        print(f"table:       {config.recipe}")
    if config.readme:
        picture = os.path.relpath(config.out / "loader.png", config.readme.parent)
        rest = [table for table in others if table.title != _NEEDLES]
        replace_block(config.readme, markdown([*front_tables(panels), *rest], picture if panels else None))
        print(f"table:       {config.readme}")


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(tyro.cli(ReportConfig))))
