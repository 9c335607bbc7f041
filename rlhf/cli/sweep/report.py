"""What is made of a sweep once it has ended: its report, in W&B too where its cells log there; and how W&B hears of a cell that was stopped.

Knows the report and the loggers; knows no scheduling.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf.cli import rundir
from rlhf.config import UserError
from rlhf.logging import log
from rlhf.sweeping.cells import Cell, read_summary


def report_sweep(directory: Path, cells: Sequence[Cell], metric: str | None) -> None:
    """Writes report.html, its tables and figures beside the cells, as `rlhf report DIRECTORY` does. Nothing where no cell is done.

    Args:
        metric: what a search looked at; None: the report's own choice.
    """
    done = [directory / cell.folder for cell in cells if (read_summary(directory / cell.folder) or {}).get("status") == "done"]
    if not done:
        return
    from rlhf.cli.report.evaluation import read_evaluated
    from rlhf.reporting.files import write_report

    try:
        write_report([directory], directory, metric=metric, evaluation=read_evaluated)
    except Exception as error:  # the runs are on disk: no reason to end a sweep as failed
        log.warning(
            "there is no report of this sweep (%s: %s); rlhf report %s says more", type(error).__name__, error, shlex.quote(str(directory))
        )
        return
    log.info("report: %s", directory / "report.html")
    settings = ((rundir.saved_config(done[0]) or {}).get("logger") or {}).get("wandb")
    if settings is not None:
        from rlhf.cli.sweep.wandb import log_report

        _told(lambda: log_report(directory, settings, directory.name))


def tell_stopped(run_dir: Path, status: str, reason: str) -> None:
    """A cell that was killed could not say itself how it ended."""
    if (run_dir / "wandb").is_dir():
        from rlhf.cli.sweep.wandb import log_status

        _told(lambda: log_status(run_dir, status, reason))


def _told(tell: Callable[[], None]) -> None:
    """A tracker that is away is no reason to lose a sweep."""
    try:
        tell()
    except UserError as error:
        log.warning("W&B was not told: %s", error)
