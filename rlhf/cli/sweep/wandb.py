"""What is said in W&B about runs that are over: a sweep's report, as a run of its own in the sweep's group, and how a run ended that could
not say it itself.

Knows report.html and table.csv by name; knows not what is in them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.callbacks.run_log import told
from rlhf.callbacks.wandb_log import RECORD, Place
from rlhf.cli.loggers import with_context
from rlhf.cli.wandb_settings import TARGET, place, read_yaml
from rlhf.config import UserError

PAGE, TABLE = "report.html", "table.csv"
JOB_TYPE = "report"


def log_report(folder: Path, settings: Mapping[str, Any], group: str) -> None:
    """Shows the page and keeps page and table as an artifact. A second call for the same folder adds a version to the same run.

    Args:
        folder: where report.html and, where there is one, table.csv lie: the sweep's directory.
        settings: the entry of the logger group, `config["logger"]["wandb"]`.
        group: of the sweep's runs, its directory's name; `settings` may name another one.

    Raises:
        UserError: there is no report.html, or W&B is to be online and there is no key.
    """
    page, table = folder / PAGE, folder / TABLE
    if not page.is_file():
        raise UserError(f"{folder} holds no {PAGE}: there is no report to log")
    own = Place(verb=JOB_TYPE, group=group, name=f"{JOB_TYPE} {group}", tags=())
    log: Any = with_context(settings, {"folder": folder, "place": own, "resumes": True})
    with told([log]):
        log.log_page("report", page)
        log.log_files(artifact_name(group), JOB_TYPE, [file for file in (page, table) if file.is_file()])


def log_status(run_dir: Path, status: str, error: str) -> None:
    """Corrects how a run ended, for those that others ended: a trial that was pruned, ranks that were killed. Nothing where the run has no
    record in W&B.

    Raises:
        UserError: W&B is to be online and does not take it.
    """
    config = read_yaml(run_dir / "config.yaml")
    for node in config.get("logger", {}).values():
        if node["_target_"] == TARGET and (run_dir / RECORD).is_file():
            log: Any = with_context(
                node, {"folder": run_dir, "place": Place(**place({**config, "run_dir": str(run_dir)})), "resumes": True}
            )
            with told([log]) as ending:
                ending.status, ending.error = status, error
                log.reopen()


def artifact_name(group: str) -> str:
    """W&B takes letters, digits, dashes, dots and underscores."""
    return f"{JOB_TYPE}-{re.sub(r'[^A-Za-z0-9._-]', '-', group)}"[:128]
