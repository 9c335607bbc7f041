"""The verb `report`: published, modelled and measured numbers of a folder of experiments/, printed and drawn.

Knows what is read and where it goes; how it looks is rlhf/reporting's and report_page's. Imports no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.cli.rundir import write_atomically
from rlhf.config import UserError, build, check
from rlhf.reporting.tables import Experiment, Row, median_error, read_experiment


def with_runs(words: list[str]) -> list[str]:
    """Words right after the verb are folders: `rlhf report DIR DIR` is `rlhf report report.runs=[DIR,DIR]`.

    Raises:
        UserError: `report.runs` is given as well, or a `run_dir`, which this verb has no use for.
    """
    folders = list(
        itertools.takewhile(lambda word: not word.startswith(("-", "report.")) and ("=" not in word or Path(word).exists()), words)
    )
    rest = words[len(folders) :]
    if any(word.startswith("run_dir=") for word in rest):
        raise UserError("run_dir: rlhf report writes into the folders it reads, and leaves no run directory")
    if not folders:
        return rest
    if any(word.startswith("report.runs=") for word in rest):
        raise UserError(f"report.runs is {' '.join(folders)} already, the words right after rlhf report")
    return ["report.runs=[" + ",".join(f"'{quoted(folder)}'" for folder in folders) + "]", *rest]


def quoted(word: str) -> str:
    """For Hydra's grammar, between single quotes."""
    return word.replace("\\", "\\\\").replace("'", "\\'")


def run_report(config: Mapping[str, Any]) -> dict[str, Any]:
    """Prints every folder's table and writes table.md, plot.png and the marked part of its README.md; returns a summary for sweeps.

    Raises:
        UserError: no folder is named, one is not there, or a file in it is malformed.
    """
    cfg = build(config)
    check(cfg)
    if not cfg.report.runs:
        raise UserError("report.runs is empty: name a folder, as in rlhf report experiments/table1")
    found = [read_experiment(Path(run)) for run in cfg.report.runs]
    from rlhf.cli.report_page import print_medians, print_report

    for one in found:
        write_report(one)
        print_report(one)
    if len(found) > 1:
        print_medians([row for one in found for row in one.rows])
    metrics = {name: value for one in found for name, value in metrics_of(one.folder.name, list(one.rows))}
    return {"verb": "report", "status": "done", "metrics": metrics, "seconds": {}}


def write_report(found: Experiment) -> None:
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
