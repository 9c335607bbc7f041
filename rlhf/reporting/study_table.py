"""A study as table.csv, a row for each cell and metric, and as table.md, a row for each cell. Knows the two formats."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

from rlhf.reporting.cells import text_of
from rlhf.reporting.page import line
from rlhf.reporting.runs import shown
from rlhf.reporting.statistics import Estimate, verdict
from rlhf.reporting.study import Result, Study, lower_is_better
from rlhf.reporting.words import MINUS, NOTHING, caveats, counts, digits_of, headline, interval, number, title

HEADING = (
    "cell", "metric", "runs", "done", "n", "mean", "sd", "low", "high", "student_low", "student_high", "baseline", "pairs", "difference",
    "difference_low", "difference_high", "difference_student_low", "difference_student_high", "verdict", "too_narrow",
)  # fmt: skip
"""Of table.csv; the settings that set the cells apart follow. Empty: there is no such number."""


def as_csv(study: Study) -> str:
    keys = study.grouping.named_by
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*HEADING, *keys])
    for result in study.results:
        for metric in study.metrics:
            writer.writerow([*_row(result, metric, study), *(text_of(result.cell.settings.get(key)) for key in keys)])
    return text.getvalue()


def _row(result: Result, metric: str, study: Study) -> list[Any]:
    one, difference = result.estimates[metric], result.differences.get(metric)
    runs = result.cell.runs
    values = [result.name, metric, len(runs), sum(run.done for run in runs), one.n, *_numbers(one), study.baseline or ""]
    if difference is None:
        return [*values, *[""] * 6, result.verdict if metric == study.metric else "", _yes(one.too_narrow)]
    low, high = difference.low, difference.high
    lower = study.lower_is_better if metric == study.metric else lower_is_better(metric)
    mean, _, *ends = _numbers(difference)
    said = verdict(low, high, lower_is_better=lower) if one.n else ""
    return [*values, difference.n, mean, *ends, said, _yes(one.too_narrow or difference.too_narrow)]


def _numbers(one: Estimate) -> list[str]:
    """Mean, sd, and both intervals."""
    return [_plain(value) for value in (one.mean, one.sd, one.low, one.high, one.student_low, one.student_high)]


def _plain(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def _yes(what: bool) -> str:
    return "yes" if what else "no"


def as_markdown(study: Study) -> str:
    """Headline, a row for each cell, caveats and warnings, and runs that are in no mean."""
    lines = [f"# {title(study)}", "", headline(study), *caveats(study), "", f"{counts(study)[:1].upper()}{counts(study)[1:]}.", ""]
    if study.metric is not None:
        lines += [*_table(study, study.metric), ""]
    lines += [f"- {text}" for text in study.warnings] + ([""] if study.warnings else [])
    if study.not_done:
        lines += [line(("run", "cell", "seed", "status", "reason", "log")), line(["---"] * 6)]
        for run, cell in study.not_done:
            lines.append(
                line(
                    (
                        run.name,
                        cell,
                        "" if run.seed is None else str(run.seed),
                        run.status,
                        run.reason,
                        "" if run.log is None else shown(run.log),
                    )
                )
            )
    return "\n".join(lines).rstrip().replace(MINUS, "-").replace(NOTHING, "-") + "\n"


def _table(study: Study, metric: str) -> list[str]:
    heads = [
        "cell",
        "seeds",
        metric,
        "sd",
        "95 %",
        f"difference to {study.baseline}",
        "95 %",
        "Student's without 0",
        "verdict",
        *study.columns,
    ]
    lines = [line(heads), line(["---", "---:", "---:", "---:", "---:", "---:", "---:", "---", "---", *["---:"] * len(study.columns)])]
    digits = {name: digits_of(study, name) for name in study.metrics}
    for result in study.results:
        one, difference = result.estimates[metric], result.differences.get(metric)
        paired = [NOTHING] * 3
        if difference is not None:
            paired = [
                number(difference.mean, digits[metric], sign=True),
                interval(difference.low, difference.high, digits[metric], sign=True),
            ]
            paired.append(_yes(difference.excludes_zero_by_student) if difference.n > 1 else NOTHING)
        means = [number(result.estimates[name].mean, digits[name]) for name in study.columns]
        own = [number(one.mean, digits[metric]), number(one.sd, digits[metric]), interval(one.low, one.high, digits[metric])]
        lines.append(line([result.name, result.cell.counts(), *own, *paired, result.verdict, *means]))
    return lines
