"""A sweep's directory: sweep.yaml, the cells, and what has become of each.

Knows files and overrides; knows no configuration and who runs a cell. docs/architecture.md describes the directory.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from rlhf.config import UserError

FILE = "sweep.yaml"
INTERRUPTED = "Interrupted: "
"""Begins the error of a cell that Ctrl-C ended: it may go on."""


@dataclass
class Cell:
    """One run of a sweep."""

    folder: str
    """Below the sweep's directory: 0, 1, 2, ..."""
    overrides: dict[str, Any]
    """Values of the swept keys."""
    trial: int | None = None
    """Of a search."""

    def title(self) -> str:
        return " ".join([self.folder, *(f"{key}={shown(value)}" for key, value in self.overrides.items())])


def shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, bool | list | dict | None) else str(value)


@dataclass
class Sweep:
    """What sweep.yaml holds."""

    verb: str
    words: list[str]
    """The overrides of the command line, those of the sweep section included, without run_dir and sweep.resume."""
    config_name: str | None
    config_dir: str | None
    commit: str | None
    settings: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)

    def write(self, directory: Path) -> None:
        node = dataclasses.asdict(self)
        node["cells"] = [{key: value for key, value in cell.items() if key != "trial" or value is not None} for cell in node["cells"]]
        part = directory / f"{FILE}.part"
        part.write_text(yaml.safe_dump(node, sort_keys=False, allow_unicode=True), encoding="utf-8")
        part.rename(directory / FILE)


def read_sweep(directory: Path) -> Sweep:
    """
    Raises:
        UserError: there is none, or the file is damaged.
    """
    file = directory / FILE
    if not file.is_file():
        raise UserError(
            f"sweep.resume=true, but run_dir={directory} holds no sweep (no {FILE}): give the directory of the one to go on with"
        )
    try:
        node = yaml.safe_load(file.read_text(encoding="utf-8"))
        return _whole(Sweep(**{**node, "cells": [Cell(**cell) for cell in node["cells"]]}))
    except (yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: this is no file of a sweep ({type(error).__name__}): start a new run_dir") from error


def _whole(sweep: Sweep) -> Sweep:
    """
    Raises:
        TypeError: a value is none that a sweep writes.
    """
    texts = [sweep.verb, *sweep.words, *(cell.folder for cell in sweep.cells)]
    mappings = [sweep.settings, *(cell.overrides for cell in sweep.cells)]
    optional = isinstance(sweep.config_name, str | None) and isinstance(sweep.config_dir, str | None)
    trials = all(isinstance(cell.trial, int | None) for cell in sweep.cells)
    if not (optional and trials and all(isinstance(one, str) for one in texts) and all(isinstance(one, dict) for one in mappings)):
        raise TypeError("a value of another kind")
    return sweep


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Keeps a second command out of a sweep or a run that goes on. The lock goes with this process, however it ends, and is no file; where the file
    system has no locks there is none.

    Raises:
        UserError: another process has it, or it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"run_dir={directory} cannot be made: {error.strerror}: give run_dir=PATH where you may write") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UserError(f"run_dir={directory}: another command is at work there: wait for its end, or choose another run_dir") from error
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(handle)


# --- what has become of a cell -------------------------------------------------------------------------------------------------


def read_summary(folder: Path) -> dict[str, Any] | None:
    """How a cell ended; None where it has not, or where the file is damaged: such a cell counts as one that was cut short. A metric that is null
    was no number, and is NaN again."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(summary, dict) or not isinstance(summary.get("status"), str):
        return None
    return summary | {"metrics": {name: math.nan if value is None else value for name, value in (summary.get("metrics") or {}).items()}}


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """A number that is none becomes null, as JSON has no NaN and no infinity."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "summary.json.part"
    part.write_text(json.dumps(_with_null(summary), indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    part.rename(folder / "summary.json")


def _with_null(value: Any) -> Any:
    """null for each NaN and each infinity."""
    if isinstance(value, Mapping):
        return {name: _with_null(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_with_null(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Fate = Literal["keep", "go on", "anew"]


def fate(folder: Path, *, steps: bool) -> Fate:
    """What a resumed sweep does with a cell: leave it, go on from its checkpoint, or begin anew.

    Args:
        steps: it is a pipeline, which knows itself where to go on.
    """
    summary = read_summary(folder)
    status = summary and summary["status"]
    if status in ("done", "pruned"):
        return "keep"
    if status == "failed" and not str(summary.get("error", "")).startswith(INTERRUPTED):  # type: ignore[union-attr]
        return "anew"
    begun = (folder / "config.yaml").is_file() and (steps or any((folder / "checkpoints").glob("step-*/manifest.json")))
    return "go on" if begun else "anew"


def clear(folder: Path) -> None:
    """Makes room for a cell that begins anew: a failed run is kept beside it as N.failed-1, -2, ...; of one that was cut short
    before its first checkpoint only the log stays."""
    summary = read_summary(folder)
    if summary is not None and summary["status"] == "failed" and not str(summary.get("error", "")).startswith(INTERRUPTED):
        number = 1
        while (aside := folder.with_name(f"{folder.name}.failed-{number}")).exists():
            number += 1
        folder.rename(aside)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "log.txt":
            path.unlink()


def first_difference(old: Sequence[str], new: Sequence[str]) -> str | None:
    """`x, which the sweep did not begin with` or `x, which it began with, is missing`; None where both have the same words."""
    for word in new:
        if word not in old:
            return f"{word} is not what the sweep began with"
    for word in old:
        if word not in new:
            return f"{word}, which the sweep began with, is missing"
    return None


def joined(old: Sequence[Cell], new: Sequence[Cell]) -> list[Cell]:
    """The cells of a sweep that goes on with more values: the old ones in their folders, then those that are new.

    Raises:
        UserError: an old one is no longer among them.
    """
    wanted = [cell.overrides for cell in new]
    gone = next((cell for cell in old if cell.overrides not in wanted), None)
    if gone is not None:
        raise UserError(f"the sweep holds cell {gone.title()}, which these words leave out: values may be added, not taken away")
    known = [cell.overrides for cell in old]
    more = [overrides for overrides in wanted if overrides not in known]
    return [*old, *(Cell(str(len(old) + i), overrides) for i, overrides in enumerate(more))]
