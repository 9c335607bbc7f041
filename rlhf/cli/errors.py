"""What a failed or refused job leaves behind: a line on stderr, a summary, an exit code. Knows no training."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from rlhf.cli import rundir
from rlhf.config import UserError

DONE, FAILED, REFUSED = 0, 1, 2


def report(config: Mapping[str, Any], error: BaseException) -> int:
    """Records the error in rank zero's summary (never over a finished one) and returns the exit code."""
    refused = isinstance(error, UserError)
    if os.environ.get("RANK", "0") == "0":
        print(f"rlhf: {'error: ' if refused else ''}{error}", file=sys.stderr)
        rundir.write_summary(config, "refused" if refused else "failed", error=f"{type(error).__name__}: {error}")
    return REFUSED if refused else FAILED
