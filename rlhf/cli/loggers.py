"""The loggers of a run from its config, and what each of them is told of it. Knows the logger group; knows no job.

Entries of the groups `logger` and `callbacks` are built alike: what their constructors ask for by name and the entry does not say is the run's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from rlhf.callbacks.csv_log import MetricsFile
from rlhf.callbacks.wandb_log import Place
from rlhf.cli import rundir, wandb_settings
from rlhf.config import UserError, locate


def build_loggers(config: Mapping[str, Any], *, first_step: int | None = None) -> list[Any]:
    """metrics.csv always; what the logger group adds, on rank zero's say.

    Args:
        first_step: the first one of a resumed run.
    """
    run_dir = Path(config["run_dir"])
    return [MetricsFile(run_dir), *added_loggers(config, first_step=first_step)]


def added_loggers(config: Mapping[str, Any], *, first_step: int | None = None) -> list[Any]:
    """Of the logger group alone. Each gets the resolved config, the commit of the code and the machine."""
    place = Place(**wandb_settings.place(config))
    context = {"folder": Path(config["run_dir"]), "place": place, "first_step": first_step, "resumes": bool(config["resume"])}
    loggers = [with_context(node, context) for node in config["logger"].values()]
    if loggers:
        told = {**config, "commit": rundir.commit(), "machine": rundir.hardware(), **wandb_settings.facts(config)}
        for logger in loggers:
            logger.log_hyperparams(told)
    return loggers


def with_context(node: Mapping[str, Any], context: Mapping[str, Any]) -> Any:
    """Builds a `_target_` node, giving its constructor what it asks for by name and the node does not say.

    Raises:
        UserError: the constructor refuses its arguments.
    """
    parameters = inspect.signature(locate(node["_target_"])).parameters
    try:
        return instantiate(dict(node), **{k: v for k, v in context.items() if k in parameters and k not in node})
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise
