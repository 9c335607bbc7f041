"""What a report leaves: report.html, table.csv, table.md and the figures. Knows names of files; each is written whole or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rlhf.config import UserError
from rlhf.reporting import figures
from rlhf.reporting.evaluated import Evaluated
from rlhf.reporting.html import as_html
from rlhf.reporting.runs import Run
from rlhf.reporting.study import Study, read_study
from rlhf.reporting.study_table import as_csv, as_markdown

PAGE, TABLE, MARKDOWN = "report.html", "table.csv", "table.md"
CURVES, EFFECTS, TRADEOFFS = "report_curves.png", "report_effects.png", "report_pareto.png"
"""A pipeline has a curves.png of its own in its directory."""

ReadEvaluation = Callable[[Run], Evaluated | None]


def write_report(
    folders: Iterable[Path], out: Path, metric: str | None = None, baseline: str | None = None, metrics: Sequence[str] | None = None,
    direction: str | None = None, evaluation: ReadEvaluation | None = None,
) -> Study:  # fmt: skip
    """Reads the runs below the folders and writes report.html, table.csv, table.md and the figures as PNGs into `out`.

    Args:
        metric: the one that the report is about; None: the first of MAIN that there is.
        baseline: a cell's name, or `key=value` (several with blanks between); None: the first cell.
        metrics: further ones; None or empty: those of FURTHER.
        direction: `higher` or `lower` is better; None: by the metric's name.
        evaluation: reads what `rlhf evaluate` left in a run, for the page of a single one; None: the page does not show it.

    Raises:
        UserError: a folder holds no run, or there is no such metric or cell. Nothing has been written.
    """
    study = read_study(folders, metric=metric, baseline=baseline, metrics=metrics or None, direction=direction)
    return write_study(study, out, evaluation)


def write_study(study: Study, out: Path, evaluation: ReadEvaluation | None = None) -> Study:
    """Writes all of it into `out`; figures without anything to draw are left out, and those of an earlier report taken away.

    Args:
        evaluation: reads what `rlhf evaluate` left in a run. A page of one run shows it; side by side, runs are compared by their metrics.

    Returns:
        The study, with a warning for every file of curves or answers that cannot be read.

    Raises:
        UserError: `out` cannot be written to.
    """
    found, complaints = figures.panels(study)
    runs = study.runs
    evaluated = evaluation(runs[0]) if evaluation is not None and len(runs) == 1 else None
    complaints += () if evaluated is None else evaluated.complaints
    study = dataclasses.replace(study, warnings=(*study.warnings, *complaints))
    costs = figures.tradeoffs(study)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write(out / TABLE, as_csv(study))
        _write(out / MARKDOWN, as_markdown(study))
        drawn = {CURVES: bool(found), EFFECTS: bool(figures.effects_of(study)), TRADEOFFS: bool(costs)}
        if drawn[CURVES]:
            figures.save_curves(study, found, out / CURVES)
        if drawn[EFFECTS]:
            figures.save_effects(study, out / EFFECTS)
        if drawn[TRADEOFFS]:
            figures.save_tradeoffs(study, costs, out / TRADEOFFS)
        for name in (name for name, there in drawn.items() if not there):
            (out / name).unlink(missing_ok=True)
        _write(out / PAGE, as_html(study, found, costs, out, evaluated))
    except OSError as error:
        raise UserError(f"report.out={out}: cannot be written to: {error.strerror or error}") from error
    return study


def _write(file: Path, text: str) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.rename(file)
