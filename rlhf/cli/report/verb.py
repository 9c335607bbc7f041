"""The verb `report`: runs and sweeps compared on one page, and the published tables of experiments/, printed and drawn.

Knows what is read and where it goes; how it looks is rlhf/reporting's and report_page's. Imports no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.cli.grammar import quoted
from rlhf.cli.rundir import write_atomically
from rlhf.config import UserError, build
from rlhf.reporting.tables import Experiment, Row, median_error, read_experiment
from rlhf.rules import check
from rlhf.settings import ReportConfig

TEXTS = ("metric", "baseline", "out")
"""Keys whose values are taken as they are typed: names of cells have `=` in them, and blanks."""


def with_runs(words: list[str]) -> list[str]:
    """Words right after the verb are folders: `rlhf report DIR DIR` is `rlhf report report.runs=[DIR,DIR]`. Values of TEXTS are quoted.

    Raises:
        UserError: `report.runs` is given as well, or a `run_dir`, which this verb has no use for.
    """
    folders = list(itertools.takewhile(lambda word: not word.startswith("-") and ("=" not in word or Path(word).exists()), words))
    rest = [as_typed(word) for word in words[len(folders) :]]
    if any(word.startswith("run_dir=") for word in rest):
        raise UserError("run_dir: rlhf report leaves no run directory; report.out=PATH says where its page goes")
    if not folders:
        return rest
    if any(word.startswith("report.runs=") for word in rest):
        raise UserError(f"report.runs is {' '.join(folders)} already, the words right after rlhf report")
    return ["report.runs=[" + ",".join(quoted(folder) for folder in folders) + "]", *rest]


def as_typed(word: str) -> str:
    """`report.baseline=ppo.kl_coef=0.05` with the value in quotes; null, and what is quoted already, stay as they are."""
    key, _, value = word.partition("=")
    if key not in {f"report.{name}" for name in TEXTS} or value == "null":
        return word
    return f"{key}={quoted(value)}"


def run_report(config: Mapping[str, Any]) -> dict[str, Any]:
    """Published tables one by one, then all the runs together; returns a summary for sweeps.

    Raises:
        UserError: no folder is named, one is not there, a file in it is malformed, or an option has nothing to act on.
    """
    cfg = build(config)
    check(cfg)
    if not cfg.report.runs:
        raise UserError("report.runs is empty: name a folder, as in rlhf report runs/ppo/my-sweep or rlhf report experiments/table1")
    folders = [Path(run) for run in cfg.report.runs]
    published = [folder for folder in folders if (folder / "published.csv").is_file()]
    runs = [folder for folder in folders if folder not in published]
    if not runs:
        _refuse_without_runs(cfg.report)
    found = [read_experiment(folder) for folder in published]
    metrics: dict[str, float] = {}
    if runs:
        metrics |= _study(cfg.report, runs)
    if found:
        metrics |= _experiments(found)
    return {"verb": "report", "status": "done", "metrics": metrics, "seconds": {}}


# --- runs and sweeps --------------------------------------------------------------------------------------------------------------


def _study(cfg: ReportConfig, runs: list[Path]) -> dict[str, float]:
    """Writes and prints the report of the runs; returns the best cell's mean."""
    from rlhf.cli.report.evaluation import read_evaluated
    from rlhf.cli.report.study import print_study
    from rlhf.reporting.files import write_report

    out = runs[0] if cfg.out is None else Path(cfg.out)
    study = write_report(runs, out, cfg.metric, cfg.baseline, cfg.metrics, cfg.direction, read_evaluated)
    print_study(study, out)
    best = study.best()
    return {} if best is None or study.metric is None else {study.metric: best.estimates[study.metric].mean}


def _refuse_without_runs(cfg: ReportConfig) -> None:
    """An option that would be read by nobody."""
    for name in (*TEXTS, "metrics", "direction"):
        if getattr(cfg, name):
            raise UserError(f"report.{name} is for runs and sweeps, and {' '.join(cfg.runs)} holds published tables")


# --- published tables -------------------------------------------------------------------------------------------------------------


def _experiments(found: list[Experiment]) -> dict[str, float]:
    from rlhf.cli.report.page import print_medians, print_report

    for one in found:
        write_experiment(one)
        print_report(one)
    if len(found) > 1:
        print_medians([row for one in found for row in one.rows])
    return {name: value for one in found for name, value in metrics_of(one.folder.name, list(one.rows))}


def write_experiment(found: Experiment) -> None:
    """table.md and plot.png of a folder, and its README.md where that has the markers."""
    from rlhf.reporting.page import as_markdown, into_readme
    from rlhf.reporting.plot import draw

    table, readme = as_markdown(found), found.folder / "README.md"
    write_atomically(found.folder / "table.md", table)
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        if (changed := into_readme(text, table)) != text:
            write_atomically(readme, changed)
    draw(found, found.folder / "plot.png")


def metrics_of(name: str, rows: list[Row]) -> list[tuple[str, float]]:
    pairs = [("median_error", median_error(rows)), ("median_error_held_out", median_error(rows, "held out"))]
    return [(f"{name}/{key}", value) for key, value in pairs if value is not None]
