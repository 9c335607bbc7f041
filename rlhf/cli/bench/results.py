"""Where the numbers of a benchmark go: bench.json with the machine they come from, the loggers, the summary. Knows files; measures nothing."""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rlhf.callbacks.run_log import told
from rlhf.cli import rundir
from rlhf.cli.assemble import Job

PACKAGES = ("torch", "transformers", "deepspeed", "lightning", "triton")


def write_json(job: Job, kind: str, content: dict[str, Any], *, every_rank: bool = False) -> None:
    """`bench.json` of the run directory, whole or not at all; rank zero's alone, unless a rank speaks for itself."""
    if is_rank_zero() or every_rank:
        model = {"name": job.cfg.actor.model.name, "precision": job.cfg.trainer.precision, "tp": job.cfg.tp.size, "ranks": job.world}
        write_report(job, kind, {"actor": model, **content})


def write_report(job: Job, kind: str, content: dict[str, Any]) -> None:
    """bench.json with what every measurement says of its machine."""
    about = {"bench": kind, "card": card(), "versions": versions(), "commit": rundir.commit()}
    rundir.write_atomically(Path(job.run_dir) / "bench.json", json.dumps(about | content, indent=1))


def finish(job: Job, metrics: dict[str, float]) -> dict[str, Any]:
    """The verb's result; the loggers hear it once."""
    loggers = job.loggers()
    with told(loggers) as ending:
        ending.metrics = metrics
        for logger in loggers:
            logger.log_metrics(metrics, 0)
    return {"metrics": metrics, "seconds": {}, "report": {}}


def is_rank_zero() -> bool:
    return os.environ["RANK"] == "0"


def card() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else str(rundir.hardware()["cpu"])


def versions() -> dict[str, str]:
    """Of the libraries that decide the speed; `cuda` is the one torch was built with."""
    found = {} if torch.version.cuda is None else {"cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
