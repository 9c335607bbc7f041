"""A folder's table as Markdown: `table.md`, and the same between two markers of its README.md.

Knows Markdown; computes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.reporting.tables import Experiment, Row, ScaleRow, median_error

BEGIN, END = "<!-- made by rlhf report -->", "<!-- end -->"
"""What stands between these lines of a README.md is replaced."""
HEADING = (
    "actor", "hardware", "GPUs", "quantity", "published", "modelled, original's engine", "error", "half", "modelled, ours", "measured", "error, ours",
)  # fmt: skip
RIGHT = ("GPUs", "published", "modelled, original's engine", "error", "modelled, ours", "error, ours")


def as_markdown(found: Experiment) -> str:
    """Every row with its errors, medians, scaling, and what is said of the published numbers."""
    lines = [line(HEADING), line("---:" if name in RIGHT else "---" for name in HEADING)]
    lines += [line(cells(row)) for row in found.rows]
    lines += ["", *summary(list(found.rows)), ""]
    if found.scale:
        lines += [*_scaling(found.scale), ""]
    notes = dict.fromkeys(one.note for one in found.published if one.note)
    if notes:
        lines += ["On the published numbers:", ""]
        lines += [f"- {', '.join(one.cell for one in found.published if one.note == note)}: {note}" for note in notes] + [""]
    if found.left_out:
        lines += ["Published and not modelled: " + ", ".join(f"{one.cell} {one.value:g} {one.unit}" for one in found.left_out) + ".", ""]
    return "\n".join(lines)


def into_readme(readme: str, table: str) -> str:
    """README.md with the table between its markers; a page without both of them, in this order, stays as it is."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{begin}\n\n{table}\n{end}{after}" if begin and end else readme


def cells(row: Row) -> tuple[str, ...]:
    """One row as text, in the order of HEADING."""
    measured = row.absent if row.measured is None else f"{row.measured.value:.4g} ({row.measured.card})"
    return (
        row.model, row.hardware, str(row.gpus), row.quantity if row.quantity == row.unit else f"{row.quantity}, {row.unit}",
        number(row.published), number(row.dschat), percent(row.error), row.half, number(row.ours), measured, percent(row.error_ours),
    )  # fmt: skip


def summary(rows: list[Row]) -> list[str]:
    """Medians of the errors, in one line; none where nothing published is modelled."""
    parts = [(None, "all rows"), ("fitted", "fitted rows"), ("held out", "held-out rows")]
    known = [(name, median_error(rows, half)) for half, name in parts]
    said = [f"{name} {value:.1%}" for name, value in known if value is not None]
    return [f"Median error of the model with the original's engine: {', '.join(said)}."] if said else []


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{round(value * 100):+d}%"


def line(parts: Iterator[str] | tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(part.replace("|", "\\|") for part in parts) + " |"


def _scaling(rows: tuple[ScaleRow, ...]) -> list[str]:
    counts = sorted({row.gpus for row in rows})
    lines = [
        "Sequences/s by number of GPUs (`scale.csv`), and where it stops scaling: at the first doubling that brings less than 1.5 times.",
        "",
        line(["actor", "engine", *map(str, counts), "stops at"]),
        line(["---", "---", *["---:"] * len(counts), "---"]),
    ]
    for model, engine in dict.fromkeys((row.model, row.engine) for row in rows):
        mine = {row.gpus: row for row in rows if (row.model, row.engine) == (model, engine)}
        stop = next((f"{gpus} ({row.stops})" for gpus, row in mine.items() if row.stops), "not in this range")
        speeds = [number(mine[count].sequences_per_s) if count in mine else "" for count in counts]
        lines.append(line([model, engine, *speeds, stop]))
    return lines
