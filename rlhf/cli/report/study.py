"""A study in the terminal. Knows rich; computes nothing."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from rlhf.cli.report.page import wide_console
from rlhf.reporting.files import PAGE
from rlhf.reporting.runs import shown
from rlhf.reporting.study import Result, Study
from rlhf.reporting.words import NOTHING, caveats, counts, digits_of, headline, interval, number, title

COLOURS = {"helps": "green", "hurts": "red"}
NOT_DONE = 10
"""Runs that are not done and are printed; the page has them all."""


def print_study(study: Study, out: Path) -> None:
    """A row for each cell, the answer in words, warnings, runs that are in no mean, and where the page is."""
    console = wide_console()
    if study.metric is not None:
        console.print(_table(study, study.metric))
    for text in (headline(study), *caveats(study), f"{counts(study)[:1].upper()}{counts(study)[1:]}."):
        console.print(escape(text), soft_wrap=True)
    for text in study.warnings:
        console.print(f"[yellow]warning[/] {escape(text)}", soft_wrap=True)
    for run, cell in study.not_done[:NOT_DONE]:
        of_cell = f" ({cell})" if cell and cell != run.name else ""
        parts = [f"{run.name}{of_cell}", run.status, run.reason, f"see {shown(run.log)}" if run.log is not None else ""]
        console.print(escape(": ".join(part for part in parts if part)), soft_wrap=True)
    if len(study.not_done) > NOT_DONE:
        console.print(f"and {len(study.not_done) - NOT_DONE} more that are not done", soft_wrap=True)
    console.print(escape(f"wrote {out / PAGE}"), soft_wrap=True)


def _table(study: Study, metric: str) -> Table:
    table = Table(title=escape(title(study)), title_justify="left")
    table.add_column("cell")
    for name in ("seeds", metric, "sd", "95 %", "difference", "95 %"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for name in study.columns:
        table.add_column(name, justify="right")
    digits = {name: digits_of(study, name) for name in study.metrics}
    for result in study.results:
        table.add_row(*_row(result, metric, study.columns, digits))
    return table


def _row(result: Result, metric: str, columns: tuple[str, ...], digits: dict[str, int]) -> list[str]:
    one, difference, count = result.estimates[metric], result.differences.get(metric), digits[metric]
    paired = [NOTHING, NOTHING]
    if difference is not None:
        paired = [number(difference.mean, count, sign=True), interval(difference.low, difference.high, count, sign=True)]
    colour = COLOURS.get(result.verdict)
    said = f"[{colour}]{result.verdict}[/]" if colour else result.verdict
    return [
        escape(result.name), result.cell.counts(), number(one.mean, count), number(one.sd, count), interval(one.low, one.high, count),
        *paired, said, *(number(result.estimates[name].mean, digits[name]) for name in columns),
    ]  # fmt: skip
