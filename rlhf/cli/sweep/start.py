"""`rlhf VERB -m ...`: which sweep a command line means, a new one or one to go on with, and whether it may.

Knows the words and what an earlier command left; running is `command`'s, trials are `search`'s. Exit codes: 0 the sweep ran to its end
(cells that failed are named), 1 no cell is done, or Ctrl-C, or with sweep.strict=true any cell failed or was refused, 2 refused.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from rlhf.cli import rundir
from rlhf.cli.compose import primary_config
from rlhf.cli.errors import DONE, REFUSED
from rlhf.cli.explain import explain
from rlhf.cli.sweep.command import Command
from rlhf.cli.sweep.words import Composer, Line, is_sweep_word, key_of, read_line
from rlhf.cli.verbs import VERBS
from rlhf.config import UserError, build
from rlhf.logging import log
from rlhf.settings import SearchSweepConfig, SweepConfig
from rlhf.sweeping.cells import Cell, Sweep, first_difference, read_sweep

PRINTS = ("plan", "report")
"""Verbs that start no job and leave no run: they answer in this process, one after the other."""
JOBS = ("pipeline", "sft", "reward", "ppo", "dpo", "evaluate", "bench")
"""Verbs whose runs are cells, as are those of a verb of the user's."""
MAY_CHANGE = (
    "jobs",
    "gpus",
    "jobs_per_gpu",
    "strict",
    "resume",
    "report",
    "trials",
    "partition",
    "account",
    "time_minutes",
    "setup",
    "parameters",
)
"""Keys of the sweep section that a resumed sweep may change."""


def run_sweep(verb: str, words: Sequence[str]) -> int:
    """Runs a sweep and returns the exit code.

    Raises:
        UserError: the sweep as a whole is refused.
    """
    line = read_line(verb, words)
    try:
        if verb in PRINTS:
            return _print_each(line)
        if verb in VERBS and verb not in JOBS:
            raise UserError(f"rlhf {verb} runs no job that would end, so that there is nothing to sweep: leave -m out")
        old = _earlier(line)
        if old is not None:
            line = _with_earlier_words(line, old)
        composer = Composer(line)
        node = composer.settings(line.sweep)
        settings: SweepConfig = build(node, "sweep")
        directory = Path(line.run_dir) if line.run_dir is not None else composer.default_directory()
        sweep = Sweep(verb, line.words, line.config_name, line.config_dir, rundir.commit(), node)
        if old is not None:
            _check_same(composer, sweep, old)
        command = Command(composer, sweep, settings, directory, old)
        if isinstance(settings, SearchSweepConfig):
            from rlhf.cli.sweep.search import start_search

            return start_search(command)
        return command.run()
    except (HydraException, OmegaConfBaseException) as error:
        folder = None if line.config_dir is None else Path(line.config_dir)
        raise UserError(explain(error, primary_config(verb, list(line.task)), folder)) from error
    finally:
        GlobalHydra.instance().clear()


# --- going on ------------------------------------------------------------------------------------------------------------------


def _earlier(line: Line) -> Sweep | None:
    """The sweep that the line goes on with.

    Raises:
        UserError: there is none in run_dir, or one is in the way.
    """
    resume = yaml.safe_load(next((word.partition("=")[2] for word in line.sweep if key_of(word) == "sweep.resume"), "false"))
    if resume is not True:
        return None
    if line.run_dir is None:
        raise UserError("sweep.resume=true needs run_dir=DIR, the directory of the sweep to go on with")
    old = read_sweep(Path(line.run_dir))
    if old.verb != line.verb:
        raise UserError(f"run_dir={line.run_dir} holds a sweep of rlhf {old.verb}, not of rlhf {line.verb}")
    return old


def _with_earlier_words(line: Line, old: Sweep) -> Line:
    """A line that names no jobs goes on with the words of sweep.yaml, and what it says of the sweep section on top."""
    if line.task or line.config_name is not None:
        return line
    task = tuple(word for word in old.words if not is_sweep_word(word))
    sweep = {key_of(word): word for word in (*(word for word in old.words if is_sweep_word(word)), *line.sweep)}
    return dataclasses.replace(line, task=task, config_name=old.config_name, config_dir=old.config_dir, sweep=tuple(sweep.values()))


def _check_same(composer: Composer, sweep: Sweep, old: Sweep) -> None:
    """
    Raises:
        UserError: names the first thing that is not as the sweep began.
    """
    if sweep.config_name != old.config_name:
        raise UserError(f"sweep.resume=true: -cn is {sweep.config_name}, but the sweep began with {old.config_name}")
    searches = "metric" in sweep.settings
    words = [word for word in sweep.words if not is_sweep_word(word)]
    before = [word for word in old.words if not is_sweep_word(word)]
    if not searches:  # a grid may be given more values: `joined` compares those
        swept = {override.get_key_element() for override in (*composer.swept, *composer.swept_in(before))}
        words, before = ([word for word in some if word.partition("=")[0] not in swept] for some in (words, before))
    difference = first_difference(before, words)
    if difference is not None:
        raise UserError(f"sweep.resume=true: {difference}; leave the words out, or start a new run_dir")
    for key in dict.fromkeys([*old.settings, *sweep.settings]):
        was, now = old.settings.get(key), sweep.settings.get(key)
        if key not in MAY_CHANGE and was != now and (searches or "metric" in old.settings):
            raise UserError(f"sweep.resume=true cannot change sweep.{key} (was {was!r}, now {now!r}): start a new run_dir")


# --- verbs that print ----------------------------------------------------------------------------------------------------------


def _print_each(line: Line) -> int:
    """The answers of plan or report, cell by cell; a refused one leaves the others alone."""
    from rlhf.cli.plan import run_plan
    from rlhf.cli.report.verb import run_report

    if line.sweep:
        raise UserError(f"{line.sweep[0]}: rlhf {line.verb} runs no jobs, so that it has no use for the sweep section")
    composer, codes = Composer(line), []
    directory = Path(line.run_dir or ".")
    run = run_plan if line.verb == "plan" else run_report
    for words, (config, error) in [(words, composer.config(words.words, directory)) for words in composer.grid()]:
        log.info("%s", Cell(line.verb, dict(words.overrides)).title())
        try:
            if error is not None:
                raise error
            run(config)
            codes.append(DONE)
        except UserError as refusal:
            print(f"rlhf: error: {refusal}", file=sys.stderr)
            codes.append(REFUSED)
    return DONE if DONE in codes else REFUSED
