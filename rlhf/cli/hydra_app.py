"""One command line from its words to an exit code: judged, composed by Hydra, run. With `-m` it is `rlhf.cli.sweep.start`'s.

Knows Hydra's flags and where it makes directories; knows no training.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rlhf.cli import rundir
from rlhf.cli.compose import (
    ASKING,
    MULTIRUN,
    conf_dir,
    going_on,
    primary_config,
    require_choices,
    resolved,
    with_own_group,
)
from rlhf.cli.explain import explain
from rlhf.cli.grammar import quoted, unquoted
from rlhf.cli.own_verb import config_folder, require_file
from rlhf.cli.verbs import VERBS
from rlhf.config import UserError

FLAGS = (
    *MULTIRUN, *ASKING, "--version", "--resolve", "-p", "--package", "-r", "--run", "-cp", "--config-path", "-cn", "--config-name", "-cd",
    "--config-dir", "--experimental-rerun",
)  # fmt: skip
GIVEN = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun, srun scripts and the deepspeed launcher all set beside RANK."""


def run(verb: str, overrides: list[str]) -> int:
    """Composes and runs a verb, once or as a sweep; returns the exit code."""
    flags = [word.partition("=")[0] for word in overrides]
    folder = config_folder(overrides)
    try:
        if verb not in VERBS:
            assert folder is not None, "rlhf.cli.main looks for the flag"
            require_file(verb, folder, (path.stem for path in conf_dir().iterdir()))
        overrides = with_own_group(verb, overrides)
        if any(flag in MULTIRUN for flag in flags) and not any(flag in ASKING for flag in flags):
            from rlhf.cli.sweep.start import run_sweep

            return run_sweep(verb, overrides)
        name = primary_config(verb, overrides)
        _check_single(overrides)
        _check_flags(overrides)
        require_choices(verb, overrides, folder)
        overrides = _with_directory(overrides)
    except UserError as error:
        return _refuse(str(error))
    except YAMLError as error:
        return _refuse(_unreadable(error))
    sys.argv = [f"rlhf {verb}", *overrides]
    # Hydra's own error report ends the process with code 1 and a hint about its internals; the errors come to us instead.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    codes: list[int] = []
    begun: list[bool] = []
    there = _folders_before(overrides, name)

    def job(cfg: DictConfig) -> None:
        begun.append(True)
        try:
            codes.append(_job(cfg, verb))
        finally:
            _take_back(Path(HydraConfig.get().runtime.output_dir), there)

    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(job)()
    except UserError as error:
        return _refuse(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        return _refuse(explain(error, name, folder))
    except YAMLError as error:
        return _refuse(_unreadable(error))
    except OSError as error:
        if begun:
            raise
        return _refuse(str(rundir.cannot_be_made(error)))
    return max(codes, default=0)


def _folders_before(overrides: list[str], name: str) -> set[Path]:
    """Of the folders that Hydra is about to make a run directory in, and of that itself, those that are there."""
    given = next((word.partition("=")[2] for word in reversed(overrides) if word.startswith("hydra.run.dir=")), f"runs/{name}/of-now")
    run_dir = Path(unquoted(given)).absolute()
    return {folder for folder in (run_dir, *run_dir.parents) if os.path.isdir(folder)}  # Path.is_dir raises where a name is too long


def _take_back(run_dir: Path, there: set[Path]) -> None:
    """Removes the run directory that Hydra made before the job was judged, where the job has put nothing into it."""
    if os.environ.get("RANK", "0") != "0":  # rank zero is the one that writes there
        return
    for folder in (run_dir, *run_dir.parents):
        if folder in there or not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()


def _check_flags(overrides: list[str]) -> None:
    """argparse would answer a flag it does not know with all those it does."""
    for word, following in zip(overrides, [*overrides, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        if not flag.startswith("-") or flag in FLAGS:
            continue
        behind = value if equals else following if following and "=" not in following and not following.startswith("-") else "VALUE"
        raise UserError(f"{flag}: overrides are key=value, without dashes: {flag.lstrip('-')}={behind}")


def _check_single(overrides: list[str]) -> None:
    word = next((word for word in overrides if word.lstrip("+~").partition("=")[0].partition(".")[0] == "sweep"), None)
    if word is not None:
        raise UserError(f"{word} says how a sweep is run, and this is none: add -m, or leave it out")


def _with_directory(overrides: list[str]) -> list[str]:
    """`run_dir=PATH` is Hydra's output directory, which may have any name.

    Raises:
        UserError: no path is behind it.
    """
    words = []
    for word in overrides:
        key, _, value = word.lstrip("+").partition("=")
        if key == "run_dir":
            rundir.require_path(unquoted(value))
            word = f"hydra.run.dir={quoted(value)}"
        words.append(word)
    return words


def _job(cfg: DictConfig, verb: str) -> int:
    """One composed job; its exit code."""
    from rlhf.cli.job import JobFailed

    try:
        if HydraConfig.get().sweeper.params:
            raise UserError(f"{HydraConfig.get().job.config_name} is a sweep, as it names values to go through: add -m")
        config = resolved(cfg)
        if config["verb"] != verb:
            raise UserError(f"{HydraConfig.get().job.config_name}.yaml is no config of rlhf {verb}: its verb is {config['verb']}")
        _run(config)
    except UserError as error:
        return _refuse(str(error))
    except OmegaConfBaseException as error:
        return _refuse(" ".join(str(error).split()))
    except JobFailed as error:
        return error.code
    return 0


def _run(config: dict[str, Any]) -> dict[str, Any]:
    """The verb's job."""
    if config["verb"] == "plan":
        from rlhf.cli.plan import run_plan

        return run_plan(config)
    if config["verb"] == "report":
        from rlhf.cli.report.verb import run_report

        return run_report(config)
    if config["verb"] == "chat":
        from rlhf.cli.chat import run_chat

        return run_chat(config)
    from rlhf.cli.job import run_job
    from rlhf.cli.pipeline import run_pipeline

    if config["launcher"]["name"] == "external":
        _check_external(config["trainer"])
    config = going_on(config, HydraConfig.get().overrides.task)
    return (run_pipeline if config["verb"] == "pipeline" else run_job)(config)


def _check_external(trainer: Mapping[str, Any]) -> None:
    """Several processes compose this command line, so what one of them would make up has to be given."""
    if "RANK" not in os.environ:
        raise UserError("launcher=external, but no RANK is set: start this command with torchrun, or use launcher=local")
    if not any(word.startswith("hydra.run.dir=") for word in HydraConfig.get().overrides.hydra):
        raise UserError("launcher=external needs run_dir=PATH: each rank would make up a directory of its own")
    missing = [name for name in GIVEN if name not in os.environ]
    if missing:
        raise UserError(
            f"launcher=external, but beside RANK there is no {', '.join(missing)}: start this command with torchrun, "
            "or unset RANK and use launcher=local"
        )
    started, asked = os.environ["WORLD_SIZE"], trainer["devices"] * trainer["num_nodes"]
    if started != str(asked):
        raise UserError(
            f"launcher=external, but WORLD_SIZE={started} ranks were started and trainer.devices x trainer.num_nodes = {asked}: make them equal"
        )


def _unreadable(error: YAMLError) -> str:
    return f"a configuration file is no YAML: {' '.join(str(error).split())}"


def _refuse(message: str) -> int:
    print(f"rlhf: error: {message}", file=sys.stderr)
    return 2
