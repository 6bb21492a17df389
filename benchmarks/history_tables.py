"""Tables from the benchmarks' history: those of the loader benchmark, in full and in short, and those of the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.chart_panels import ChartPanel, machine_name, machine_size

Entry = dict[str, Any]
"""A line of the history (benchmarks/history.py)."""
Figure = dict[str, Any]
NEEDLES, CURVE, CHANGES, SKIES = "needles", "curve", "changes", "skies"  # workloads that measure how well, not how fast
OF_THE_RECIPE = (CURVE, CHANGES, SKIES)
_THREE_RATES = ("train", "infer")  # workloads with a figure for each of loader, model and both (benchmarks/rates.py)
_PAIRED = "+.3f to"  # the format of a number and the bounds of its interval
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
    "train peers": (
        ("preset", "preset", "s"), ("loop", "loop", "s"), ("feed", "canvases", "s"), ("workers", "workers", "d"),
        ("cadences_per_s", "cadences/s", ",.1f"), ("lowest", "lowest", ",.1f"), ("highest", "highest", ",.1f"),
        ("cpu_ms", "CPU ms a cadence", ",.1f"), ("ours_times", "ours, times as fast", ".2f"),
        ("failed", "failed", "s"),
    ),
    CURVE: (
        ("row", "cadences trained on", "s"), ("runs", "runs", "d"), ("auc", "ROC AUC", ".4f"),
        ("ahead_auc", "ahead of untrained by (95 %)", _PAIRED), ("recall_1e2", "recall at 1e-2", ".3f"),
        ("ahead_recall_1e2", "ahead by (95 %)", _PAIRED), ("recall_1e3", "at 1e-3", ".3f"),
        ("ahead_recall_1e3", "ahead by (95 %)", _PAIRED), ("drop", "drop with needles in OFF panels", ".3f"),
        ("train_s", "training, s", ",.0f"), ("real_above", "real needles above their twins", ".1%"),
        ("real_auc", "real AUC", ".3f"), ("ahead_real_auc", "ahead by (95 %)", _PAIRED),
    ),
    CHANGES: (
        ("row", "changed", "s"), ("runs", "runs", "d"), ("auc", "ROC AUC", ".4f"),
        ("ahead_auc", "ahead of the recipe by (95 %)", "+.4f to"), ("recall_1e2", "recall at 1e-2", ".3f"),
        ("ahead_recall_1e2", "ahead by (95 %)", _PAIRED), ("recall_1e3", "at 1e-3", ".3f"),
        ("ahead_recall_1e3", "ahead by (95 %)", _PAIRED), ("real_auc", "real AUC", ".3f"),
        ("ahead_real_auc", "ahead by (95 %)", _PAIRED), ("train_s", "training, s", ",.0f"),
    ),
    SKIES: (
        ("row", "trained on", "s"), ("runs", "trainings", "d"), ("cadences", "cadences each", ",.0f"),
        ("auc", "ROC AUC", ".4f"), ("ahead_auc", "ahead of simulated skies by (95 %)", _PAIRED),
        ("recall_1e2", "recall at 1e-2", ".3f"), ("real_above", "real needles above their twins", ".1%"),
        ("real_auc", "real AUC (95 %)", ".3f to"), ("ahead_real_auc", "ahead by (95 %)", _PAIRED),
    ),
    NEEDLES: (
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
_TABLES["infer peers"] = _TABLES["train peers"]
_LOADER_COLUMNS = (
    ("name", "loader", "s"), ("cadences_per_s", "cadences/s", ",.0f"), ("range", "range", "s"),
    ("gb_per_s", "GB/s", ".2f"), ("cpu_ms", "CPU ms a cadence", ".2f"), ("peak_mb", "peak MB", ",.0f"),
    ("first_batch_s", "first batch, s", ".2f"),
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Headings and rows, as text."""

    title: str
    about: str
    headings: tuple[str, ...]
    rows: list[list[str]]


def when_and_where(entry: dict[str, Any]) -> str:
    """Machine, date and commit of an entry."""
    dirty = "+" if entry["commit"].endswith("+") else ""
    return f"{machine_name(entry)}, {entry['time'][:10]}, commit {entry['commit'].rstrip('+')[:7]}{dirty}"


def loader_table(panel: ChartPanel) -> Table:
    """All figures of a panel, and how many times as fast ours is."""
    ours = panel.best.get("ours")
    rows = []
    for figure in panel.figures:
        lowest, highest = _cell(figure.get("lowest"), ",.0f"), _cell(figure.get("highest"), ",.0f")
        shown = {**figure, "range": f"{lowest} to {highest}"}
        times = f"{ours / figure['cadences_per_s']:.2f}" if ours and figure["cadences_per_s"] else ""
        rows.append([*(_cell(shown.get(name), form) for name, _, form in _LOADER_COLUMNS), times])
    headings = (*(heading for _, heading, _ in _LOADER_COLUMNS), "ours, times as fast")
    for figure in panel.failed:
        reason = f"failed: {figure.get('failed', 'no rate')}"
        rows.append([figure["name"], reason, *[""] * (len(headings) - 2)])
    return Table(panel.title, when_and_where(panel.entry), headings, rows)


def front_tables(panels: Sequence[ChartPanel]) -> list[Table]:
    """A short table for each machine: a row for each loader, a column for each panel, cadences/s."""
    tables = []
    for machine in dict.fromkeys(panel.machine_name for panel in panels):
        mine = [panel for panel in panels if panel.machine_name == machine]
        rates = [{figure["name"]: figure["cadences_per_s"] for figure in panel.figures} for panel in mine]
        names = dict.fromkeys(name for rate in rates for name in rate)  # the fastest of the first panel first
        rows = [[name, *(_cell(rate.get(name), ",.0f") for rate in rates)] for name in names]
        abouts = "; ".join(dict.fromkeys(when_and_where(panel.entry) for panel in mine))
        tables.append(Table("cadences/s", abouts, ("loader", *(panel.title for panel in mine)), rows))
    return tables


def other_tables(entries: Sequence[Entry]) -> list[Table]:
    """The last figures of every benchmark but the loader's, on each size of machine."""
    tables = []
    for workload, entry, figures in _latest_figures(entries):
        columns = _TABLES.get(workload, ())
        if workload in _THREE_RATES:
            figures = [_one_row(figures)]
        # Leave out columns that are empty here, such as those that only a GPU fills.
        shown = [column for column in columns if any(figure.get(column[0]) is not None for figure in figures)]
        rows = [[_words(figure, name, form) for name, _, form in shown] for figure in figures]
        if columns:
            tables.append(Table(workload, when_and_where(entry), tuple(heading for _, heading, _ in shown), rows))
    return tables


def _latest_figures(entries: Sequence[Entry]) -> list[tuple[str, Entry, list[Figure]]]:
    """Workload, entry and figures: the last of each workload, size of machine and preset."""
    found: dict[tuple[str, ...], tuple[Entry, list[Figure]]] = {}
    for entry in entries:
        by_workload: dict[str, list[Figure]] = {}
        for figure in entry["figures"] if entry["benchmark"] != "loader" else ():
            by_workload.setdefault(str(figure.get("workload")), []).append(figure)
        for workload, figures in by_workload.items():
            # How well needles are found depends not on the machine but on the form, which sets the training time.
            where = str(entry["config"].get("form")) if workload == NEEDLES else machine_size(entry)
            key = workload, where, _preset(workload, figures)
            # A part of the needle benchmark does not replace a whole one.
            if key in found and entry["config"].get("is_part") and not found[key][0]["config"].get("is_part"):
                continue
            found[key] = (entry, figures)
    return [(workload, entry, figures) for (workload, *_), (entry, figures) in found.items()]


def _preset(workload: str, figures: list[dict[str, Any]]) -> str:
    """The preset of training and prediction, whose rates are compared with the same preset's only."""
    names = [str(figure["preset"]) for figure in figures if "preset" in figure]
    return names[0] if names and workload.removesuffix(" peers") in _THREE_RATES else ""


def _one_row(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """The three rates and the verdict side by side."""
    rates = {figure["rate"]: figure["cadences_per_s"] for figure in figures if "rate" in figure}
    return rates | next((figure for figure in figures if "ratio" in figure), {})


def _words(figure: dict[str, Any], name: str, form: str) -> str:
    if not form.endswith(" to"):
        return _cell(figure.get(name), form)
    if figure.get(name) is None:
        return ""
    value, low, high = (_cell(figure[f"{name}{end}"], form.removesuffix(" to")) for end in ("", "_low", "_high"))
    return f"{value} ({low} to {high})"


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    return str(value) if form == "s" or isinstance(value, str) else format(value, form)
