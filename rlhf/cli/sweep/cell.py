"""One cell of a sweep as a process: `python -m rlhf.cli.sweep.cell` reads a resolved config and runs its job.

Started by a sweep, on this machine or in a job of SLURM. It leaves a summary whatever happens, as long as it lives. Knows no sweep.
Exit codes: 0 done, 1 failed, 2 refused.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlhf.cli import rundir
from rlhf.cli.errors import DONE, FAILED, REFUSED
from rlhf.config import UserError
from rlhf.logging import log, setup_logging
from rlhf.sweeping.orphans import end_with_parent


def run_cell(config: Mapping[str, Any]) -> int:
    """Runs the job and returns its exit code; where the job itself could not say how it ended, this does."""
    from rlhf.cli.job import JobFailed, run_job
    from rlhf.cli.pipeline import run_pipeline

    try:
        (run_pipeline if config["verb"] == "pipeline" else run_job)(config)
    except UserError as error:
        print(f"rlhf: error: {error}", file=sys.stderr)
        return settle(config, REFUSED, f"UserError: {error}")
    except JobFailed as error:
        return settle(config, error.code, failed_step(config) or f"the job ended with exit code {error.code}")
    except KeyboardInterrupt:
        return settle(config, FAILED, "RuntimeError: stopped at once by Ctrl-C")
    except Exception as error:
        log.error("the job failed: %s", traceback.format_exc())
        return settle(config, FAILED, f"{type(error).__name__}: {error}")
    return DONE


def settle(config: Mapping[str, Any], code: int, error: str) -> int:
    """Writes the summary that the job has not written. Returns the code."""
    if rundir.read_summary(Path(config["run_dir"])) is None:
        rundir.write_summary(config, "refused" if code == REFUSED else "failed", error=error)
    return code


def failed_step(config: Mapping[str, Any]) -> str | None:
    """Why a pipeline did not end: the error of the step that is not done."""
    for step in config.get("steps", ()):
        summary = rundir.read_summary(Path(config["run_dir"]) / step)
        if summary is not None and summary["status"] != "done":
            kind, _, text = summary["error"].partition(": ")
            return f"{kind}: {step}: {text}"
    return None


def main() -> int:
    end_with_parent()
    config = yaml.safe_load(sys.stdin)
    setup_logging()
    return run_cell(config)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Hard exit, as in rank.py: destructors of process groups and CUDA can wait forever.
    os._exit(code)
