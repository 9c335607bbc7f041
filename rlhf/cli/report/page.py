"""The report as a table in the terminal. Knows rich; computes nothing."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from rlhf.reporting.page import HEADING, RIGHT, cells, summary
from rlhf.reporting.tables import Experiment, Row

GOOD, BAD = 0.15, 0.3
"""Errors up to the first are green, above the second red."""


def print_report(found: Experiment) -> None:
    """Title, every row, medians, and where the rest lies."""
    console = wide_console()
    table = Table(title=found.title, title_justify="left")
    for name in HEADING:
        table.add_column(name, justify="right" if name in RIGHT else "left")
    for row in found.rows:
        texts = dict(zip(HEADING, cells(row), strict=True))
        texts |= {"error": coloured(texts["error"], row.error), "error, ours": coloured(texts["error, ours"], row.error_ours)}
        table.add_row(*texts.values())
    console.print(table)
    for text in summary(list(found.rows)):
        console.print(text, soft_wrap=True)
    console.print(f"wrote {found.folder / 'table.md'} and {found.folder / 'plot.png'}", soft_wrap=True)


def print_medians(rows: list[Row]) -> None:
    for text in summary(rows):
        wide_console().print(f"All folders together. {text}", soft_wrap=True)


def wide_console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 200)  # a pipe has no width, and a cut table says nothing
    return console


def coloured(text: str, error: float | None) -> str:
    colour = None if error is None else "green" if abs(error) <= GOOD else "red" if abs(error) > BAD else None
    return f"[{colour}]{text}[/]" if colour else text
