"""What the benchmark prints, in 80 columns."""

from collections.abc import Mapping, Sequence

from benchmarks.peers.figures import Row

_WIDTH = 80
HEADER = f"{'loader':<17}{'':>4}{'cadences/s':>11}{'lowest-highest':>16}{'GB/s':>6}{'CPU ms':>8}{'MB':>7}{'1st ms':>8}"


def table(rows: Sequence[Row], threads: int, cadence_bytes: int) -> str:
    """A line for each contestant: ours, then the peers from the fastest on, then the ceilings."""
    order = {"ours": 0, "peer": 1, "kernels": 1, "ceiling": 2}
    ranked = sorted(rows, key=lambda row: (order[row.contestant.kind], bool(row.failed), -_rate(row)))
    return "\n".join([HEADER, *(_line(row, threads, cadence_bytes) for row in ranked)])


def _rate(row: Row) -> float:
    return 0.0 if row.failed else row.rate


def _line(row: Row, threads: int, cadence_bytes: int) -> str:
    start = f"{row.contestant.name:<17}{row.contestant.label(threads):>4} "
    if row.failed:
        return (start + row.failed)[:_WIDTH]
    if row.contestant.name == "resident":
        return f"{start}{_short(row.rate):>10}   a batch that is on the device already"
    rates = [turn.rate for turn in row.rounds]
    spread = f"{min(rates):,.0f}-{max(rates):,.0f}"
    return (
        f"{start}{row.rate:>10,.0f}{spread:>16}{row.rate * cadence_bytes / 1e9:>6.2f}"
        f"{row.cpu_ms:>8.3f}{row.peak_mb:>7,.0f}{1000 * row.first_batch_s:>8.1f}"
    )


def _short(rate: float) -> str:
    return f"{rate / 1e6:,.1f} M" if rate >= 1e6 else f"{rate:,.0f}"


def ratio_lines(found: Mapping[str, tuple[float, str]]) -> list[str]:
    """A line for each ratio of our rate to another."""
    lines = []
    for name, (ratio, whom) in found.items():
        others = f"{name} ({whom})" if name.startswith("best") else name
        lines.append(f"ours / {others:<46}{ratio:>8.2f}")
    return lines
