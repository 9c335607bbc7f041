"""The command as functions, for notebooks and programs: `run` a verb, `load` its parts, `opened` to write the loop yourself.

Takes the words of the command line and knows no training. It imports nothing heavy before it is called, as DeepSpeed wants to be told of the
device first. Errors are the command's: UserError where the input is refused, JobFailed where a job ended otherwise than done.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException

from rlhf.cli import rundir
from rlhf.cli.compose import conf_dir, going_on, primary_config, with_own_group
from rlhf.cli.errors import report
from rlhf.cli.explain import explain
from rlhf.cli.own_verb import require_file
from rlhf.cli.sweep.words import Composer, key_of, read_line
from rlhf.cli.verbs import VERBS
from rlhf.config import UserError, nearest
from rlhf.logging import quiet_libraries, setup_logging

if TYPE_CHECKING:
    from rlhf.cli.assemble import Job
    from rlhf.cli.loop import Loop


def compose(verb: str, *overrides: str, config_dir: str | Path | None = None) -> dict[str, Any]:
    """The resolved configuration of one job, as `rlhf VERB OVERRIDES --cfg job` prints it, values filled in.

    Args:
        overrides: `group=option` and `key=value`, as on the command line; without `run_dir=` the run directory is one made up from the time.
        config_dir: a folder with configuration of your own, as `--config-dir` names it.

    Raises:
        UserError: a verb, group, option or key does not exist, a value is missing, or a key is given several values.
    """
    folder = None if config_dir is None else Path(config_dir)
    flag = next((word for word in overrides if word.startswith("-")), None)
    if flag is not None:
        raise UserError(f"{flag}: flags are the command line's; here an override is group=option or key=value")
    if verb not in VERBS:
        if folder is None:
            raise UserError(f"no such verb: {verb}{nearest(verb, VERBS)}; a verb of your own needs config_dir")
        require_file(verb, folder, (path.stem for path in conf_dir().iterdir()))
    line = read_line(verb, [*with_own_group(verb, list(overrides)), *([] if folder is None else [f"--config-dir={folder}"])])
    if line.sweep:
        raise UserError(f"{line.sweep[0]} says how a sweep is run: on the command line, with -m")
    try:
        composer = Composer(line)
        if composer.swept:
            raise UserError(f"{composer.swept[0].input_line} names several values: call this once for each, or sweep on the command line")
        config, error = composer.config(composer.fixed, Path(line.run_dir) if line.run_dir is not None else composer.default_directory())
    except HydraException as error:
        raise UserError(explain(error, primary_config(verb, list(line.task)), folder)) from error
    finally:
        GlobalHydra.instance().clear()
    if error is not None:
        raise error
    return going_on(config, [word for word in overrides if key_of(word) != "run_dir"])


def run(verb: str, *overrides: str, config_dir: str | Path | None = None) -> dict[str, Any]:
    """Runs a verb to its end, as the command does, and returns its summary; `plan` and `report` print what they have to say, and keep none.

    One rank runs in this process; several are started as processes of their own, from the main thread only.

    Args:
        overrides: as for `compose`.
        config_dir: as for `compose`.

    Raises:
        UserError: refused before anything was written.
        JobFailed: it ended otherwise than done; why has been printed, and is in its summary.json. `code` is 1 (failed) or 2 (refused).
    """
    setup_logging()
    if verb == "chat":
        raise UserError("rlhf chat is for a terminal: rlhf.serving.answerer.Answerer talks to a checkpoint from Python")
    config = compose(verb, *overrides, config_dir=config_dir)
    return _runner(verb)(config)


def _runner(verb: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    if verb == "plan":
        from rlhf.cli.plan import run_plan

        return run_plan
    if verb == "report":
        from rlhf.cli.report.verb import run_report

        return run_report
    if verb == "pipeline":
        from rlhf.cli.pipeline import run_pipeline

        return run_pipeline
    from rlhf.cli.job import run_job

    return run_job


def load(verb: str, *overrides: str, config_dir: str | Path | None = None) -> Job:
    """The job of a verb with one rank, in this process: its settings are checked and its run directory is claimed, nothing runs. A `Job` builds
    tokenizer, data, blueprints and engines when it is asked for them.

    With `launcher=external` under torchrun or srun this process is one rank of several.

    Args:
        overrides: as for `compose`.
        config_dir: as for `compose`.

    Raises:
        UserError: the settings are refused, the run directory holds another run, or the job asks for ranks that nobody starts.
    """
    setup_logging()
    config = compose(verb, *overrides, config_dir=config_dir)
    if verb in ("pipeline", "plan", "report", "chat"):
        raise UserError(f"rlhf {verb} is no job of its own, so that there is nothing to load: rlhf.cli.api.run runs it")
    from rlhf.cli.job import checked
    from rlhf.engines.launcher import prepare_rank

    cfg = checked(config)
    external = cfg.launcher.name == "external"
    if cfg.trainer.devices * cfg.trainer.num_nodes > 1 and not external:
        raise UserError(
            "trainer.devices and trainer.num_nodes ask for several ranks, but this process is one: use launcher=external under torchrun"
        )
    prepare_rank(cfg.trainer)
    if not external or os.environ["RANK"] == "0":
        rundir.claim(Path(cfg.run_dir), config)
    from rlhf.cli.assemble import Job

    quiet_libraries()
    return Job(config, cfg)


@contextmanager
def opened(verb: str, *overrides: str, config_dir: str | Path | None = None) -> Iterator[Loop]:
    """A training verb whose loop is the caller's: networks, engines and data stand, and nothing runs before it is called. On leaving, the
    engines are released and summary.json is written: `done`, or `failed` and why where the block raised.

    The groups of callbacks, checkpoints and held-out evaluation are the trainer's, which does not run here: callbacks are none.

    Args:
        overrides: as for `compose`.
        config_dir: as for `compose`.

    Raises:
        UserError: as `load`; or the verb trains nothing; or a key asks for what only the trainer does.
    """
    job = load(verb, "callbacks=none", *overrides, config_dir=config_dir)
    from rlhf.cli.loop import loop, recipe

    start = time.perf_counter()
    try:
        with loop(job, recipe(job.cfg)) as parts:
            yield parts
        seconds = {"total": time.perf_counter() - start, **parts.seconds}
        if os.environ["RANK"] == "0":
            rundir.write_summary(job.config, "done", metrics=parts.metrics, seconds=seconds, data=parts.data.report)
    except BaseException as error:
        report(job.config, error)
        raise
