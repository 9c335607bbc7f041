"""What a failed or refused job leaves behind: a line on stderr, a summary, an exit code. Knows no training."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.cli import rundir
from rlhf.config import UserError
from rlhf.sweeping.cells import read_summary

DONE, FAILED, REFUSED = 0, 1, 2


class Interrupted(Exception):
    """The user pressed Ctrl-C; the message says where the run stopped and how to go on."""


Rows = tuple[int, int] | None


def rows(config: Mapping[str, Any]) -> Rows:
    """When metrics.csv was written and how long it is, to tell later whether a run has gone on; None: it is not there. A run that is resumed
    writes it anew before its first step."""
    file = Path(config["run_dir"]) / "metrics.csv"
    if not file.is_file():
        return None
    found = file.stat()
    return found.st_mtime_ns, found.st_size


def report(config: Mapping[str, Any], error: BaseException, before: Rows = None) -> int:
    """Says what is wrong, records it in rank zero's summary, and returns the exit code.

    A resumed run that is refused, or that was done already, keeps the summary it has: only a first start may be taken back. A run that
    has begun to learn, or has gone on, has failed, whatever ends it (a user's function that raises at last): its directory is not free.

    Args:
        before: `rows` as the run was started or resumed.
    """
    mistake = isinstance(error, UserError)
    begun = rows(config) != before
    refused = mistake and not begun
    if os.environ.get("RANK", "0") == "0":
        print(f"rlhf: {'error: ' if mistake else ''}{error}", file=sys.stderr)
        earlier = read_summary(Path(config["run_dir"])) if config["resume"] and not begun else None
        if not (config["resume"] and refused) and not (earlier and earlier["status"] == "done"):
            rundir.write_summary(config, "refused" if refused else "failed", error=f"{type(error).__name__}: {error}")
    return REFUSED if refused else FAILED
