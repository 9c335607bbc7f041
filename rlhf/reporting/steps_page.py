"""What each step of a pipeline changed, as a section of the page. Knows HTML; what was changed is read by steps.py."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rlhf.reporting.markup import breakable, estimate_cell, plain_table, section
from rlhf.reporting.runs import Run
from rlhf.reporting.statistics import FEW
from rlhf.reporting.steps import MeanChange, mean_changes
from rlhf.reporting.study import Result, Study
from rlhf.reporting.words import decimals

HEADS = (("Step and what it is measured by", ""), ("Before", ""), ("After", ""), ("Difference", ""))
NOTE = (
    "SFT and reward model: on the held-out rows of their step, before its first update and after its last. PPO: the policies before and "
    "after it on the same held-out prompts, sampled alike; KL is that of the second to the first, so that it begins at 0."
)


def steps_section(study: Study) -> str:
    """A table for each cell of pipelines; empty where there is none. Of several cells the tables are folded."""
    found = [(result, runs, changes) for result in study.results if (changes := mean_changes(runs := _speaking(result)))]
    if not found:
        return ""
    tables = [_table(changes, result.name) + _unfinished(runs) for result, runs, changes in found]
    if len(study.results) > 1:
        names = [breakable(result.name) for result, _, _ in found]
        tables = [f"<details><summary>{name}</summary>{table}</details>" for name, table in zip(names, tables, strict=True)]
    note = NOTE
    if any(change.difference.n > 1 for _, _, changes in found for change in changes):
        note += " Means over seeds with their 95\u00a0% bootstrap intervals; the difference is taken seed by seed."
    if any(one.too_narrow for _, _, changes in found for change in changes for one in (change.before, change.after, change.difference)):
        note += f" †: fewer than {FEW} seeds, so that the interval is too narrow."
    return section("steps", "What each step changed", "".join(tables) + f"<p class=note>{escape(note)}</p>")


def _speaking(result: Result) -> Sequence[Run]:
    """The runs that are done; where none is, a cell's only run, which has got somewhere."""
    runs = result.cell.runs
    return [run for run in runs if run.done] or (runs if len(runs) == 1 else ())


def _unfinished(runs: Sequence[Run]) -> str:
    return "" if all(run.done for run in runs) else "<p class=note>This run is not done: these are the steps that are.</p>"


def _table(changes: Sequence[MeanChange], name: str) -> str:
    rows = ""
    for change in changes:
        digits = max(decimals([change.before]), decimals([change.after]))  # a perplexity of 135 beside one of 12.9
        numbers = estimate_cell(change.before, digits) + estimate_cell(change.after, digits)
        rows += f"<tr><th scope=row>{escape(change.label)}</th>{numbers}{estimate_cell(change.difference, digits, sign=True)}</tr>\n"
    return plain_table(HEADS, rows, f"what each step of {escape(name, quote=True)} changed", "narrow")
