"""A sweep on the terminal: a line when a cell starts and ends, a table at the end. Knows summaries; knows no job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf.logging import log
from rlhf.sweeping.cells import Cell, read_summary, shown

HEADLINES = ("gold/ppo", "gold/after", "rollout/reward", "dpo/accuracy", "reward/accuracy", "reward/after", "sft/perplexity")
"""The number that a run is judged by: the first of these it has."""
STATUSES = ("done", "pruned", "failed", "refused")


def headline(metrics: dict[str, float], wanted: str | None = None) -> str | None:
    return next((name for name in (wanted, *HEADLINES) if name in metrics), None)


def say_start(cell: Cell, gpus: Sequence[str], *, goes_on: bool) -> None:
    log.info("%s %s%s", cell.title(), "goes on" if goes_on else "starts", f" on GPU {','.join(gpus)}" if gpus else "")


def say_end(cell: Cell, summary: dict[str, Any], wanted: str | None = None) -> None:
    log.info("%s %s", cell.title(), ended(summary, wanted))


def ended(summary: dict[str, Any], wanted: str | None = None) -> str:
    """`done in 12 s: gold/ppo 0.76`, or the status and why."""
    if summary["status"] != "done":
        return f"{summary['status']}: {first_line(summary.get('error', ''))}"
    name = headline(summary["metrics"], wanted)
    seconds = summary["seconds"].get("total")
    return "done" + (f" in {seconds:.0f} s" if seconds is not None else "") + (f": {name} {summary['metrics'][name]:.4g}" if name else "")


def first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""


def print_table(directory: Path, cells: Sequence[Cell], wanted: str | None = None) -> None:
    """All cells with what was swept and what came out; below it why some are not done."""
    summaries = [read_summary(directory / cell.folder) for cell in cells]
    keys = list(dict.fromkeys(key for cell in cells for key in cell.overrides))
    metrics = [summary["metrics"] for summary in summaries if summary is not None and summary["status"] == "done"]
    names = list(dict.fromkeys(name for one in metrics for name in (headline(one, wanted),) if name is not None))
    table = Table(title=str(directory))
    for column in ("cell", *keys, "status", "seconds", *names):
        table.add_column(column, justify="right" if column in ("seconds", *names) else "left", overflow="fold")
    for cell, summary in zip(cells, summaries, strict=True):
        row = [cell.folder, *(shown(cell.overrides[key]) if key in cell.overrides else "" for key in keys)]
        table.add_row(*map(escape, [*row, *_outcome(summary, names)]))
    console = Console()
    console.print(table)
    for cell, summary in zip(cells, summaries, strict=True):
        if summary is not None and summary["status"] != "done":
            console.print(f"{cell.folder} {ended(summary)}", soft_wrap=True, markup=False, highlight=False)


def _outcome(summary: dict[str, Any] | None, names: Sequence[str]) -> list[str]:
    """Status, seconds, one value a metric."""
    if summary is None:
        return ["not run", "", *("" for _ in names)]
    seconds = summary["seconds"].get("total")
    values = [f"{summary['metrics'][name]:.4g}" if name in summary["metrics"] else "" for name in names]
    return [summary["status"], "" if seconds is None else f"{seconds:.0f}", *values]


def print_counts(directory: Path, cells: Sequence[Cell]) -> None:
    """`7 of 9 cells done, 1 failed, 1 refused`, and where their logs are."""
    statuses = [(summary or {"status": "not run"})["status"] for summary in (read_summary(directory / cell.folder) for cell in cells)]
    others = [(status, statuses.count(status)) for status in (*STATUSES[1:], "not run") if status in statuses]
    more = "".join(f", {count} {status}" for status, count in others)
    where = f"; why is in {directory}/N/log.txt" if any(status == "failed" for status, _ in others) else ""
    log.info("%d of %d cells done%s%s", statuses.count("done"), len(cells), more, where)
