"""The runs below some folders, as they lie there: run directories, pipelines, sweeps, and folders of them.

Knows files: summary.json, config.yaml, sweep.yaml. Knows no statistics. Of nested runs the topmost counts: a pipeline, and not its steps.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf.config import UserError, nearest

DONE = "done"
UNFINISHED = "running or not started"
UNREADABLE = "unreadable"
STEPS = ("sft", "reward", "ppo", "dpo", "evaluate")
"""Folders of a pipeline's steps."""
LARGEST = 1e100
"""A larger number can be neither squared nor drawn: it counts as none, and is said."""
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What sweep.yaml says of its directory."""

    folder: Path
    command: str
    """As it was typed."""
    commit: str | None
    cells: tuple[tuple[str, dict[str, Any]], ...]
    """Folder and overrides of each."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, finished or not."""

    folder: Path
    name: str
    """The folder as a reader is shown it."""
    status: str
    """`done`, `failed`, `refused`, `pruned`, `diverged`, UNFINISHED or UNREADABLE."""
    reason: str = ""
    """Why it is not done, in one line."""
    verb: str = ""
    seed: int | None = None
    """None only where there is no summary that could say."""
    commit: str = ""
    hardware: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Numbers up to LARGEST only, with `seconds/NAME`, `hours` and, on GPUs, `gpu_hours`."""
    uncounted: Mapping[str, float] = field(default_factory=dict)
    """Metrics that are there and no number, or too large a one."""
    cell: str | None = None
    """A name that the run was given by whoever started it."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """What its sweep set for it."""
    sweep: Path | None = None

    @property
    def done(self) -> bool:
        return self.status == DONE

    @property
    def log(self) -> Path | None:
        """All that the job said, where its sweep kept it."""
        file = self.folder / "log.txt"
        return file if file.is_file() else None


@dataclass(frozen=True, kw_only=True)
class Found:
    runs: tuple[Run, ...]
    sweeps: tuple[Sweep, ...]


def find_runs(folders: Iterable[Path]) -> Found:
    """All runs below the folders, each once, in the order of the folders and of numbers in names.

    Raises:
        UserError: a folder is not there or holds no run, or a sweep.yaml is malformed.
    """
    runs: dict[Path, Run] = {}
    sweeps: dict[Path, Sweep] = {}
    for folder in folders:
        if not folder.is_dir():
            near = nearest(folder.name, [path.name for path in folder.parent.iterdir() if path.is_dir()]) if folder.parent.is_dir() else ""
            raise UserError(f"report.runs: there is no folder {folder}{near}")
        before = len(runs)
        for run in _below(folder, sweeps):
            runs.setdefault(run.folder.resolve(), run)
        if len(runs) == before and not any(path.is_relative_to(folder.resolve()) for path in runs):
            raise UserError(
                f"report.runs: {folder} holds no run (no summary.json, config.yaml or sweep.yaml in it or below) and no published.csv"
            )
    return Found(runs=tuple(runs.values()), sweeps=tuple(sweeps.values()))


def _below(folder: Path, sweeps: dict[Path, Sweep]) -> Iterator[Run]:
    if (folder / "sweep.yaml").is_file():
        sweep = sweeps[folder.resolve()] = read_sweep(folder)
        for name, overrides in sweep.cells:
            yield read_run(folder / name, overrides, folder)
    elif (folder / "summary.json").is_file() or _config(folder) is not None:
        yield read_run(folder)
    else:
        inside = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
        for child in sorted(inside, key=lambda path: by_number(path.name)):
            if not (child.is_symlink() and folder.resolve().is_relative_to(child.resolve())):  # a link back would have no end
                yield from _below(child, sweeps)


def shown(path: Path) -> str:
    """As a reader is shown it: from the working directory on, where it lies below that."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else str(path)


def by_number(name: str) -> list[tuple[int, str]]:
    """Sorts 10 behind 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


# --- one run ------------------------------------------------------------------------------------------------------------------


def read_run(folder: Path, overrides: Mapping[str, Any] | None = None, sweep: Path | None = None) -> Run:
    """A run from its directory. What cannot be read is a run, too: UNREADABLE, with the file and what is wrong with it."""
    known: dict[str, Any] = {"folder": folder, "name": shown(folder), "sweep": sweep, "overrides": dict(overrides or {})}
    file = folder / "summary.json"
    if not file.is_file():
        return _unfinished(folder, known)
    try:
        return _from_summary(json.loads(file.read_text(encoding="utf-8")), known)
    except json.JSONDecodeError as error:
        what = f"{file}:{error.lineno}: not JSON: {error.msg}"
    except RecursionError:
        what = f"{file}: nested too deeply to be read"
    except (UnicodeDecodeError, OSError, ValueError) as error:
        what = f"{file}: {error}"
    return Run(status=UNREADABLE, reason=what, seed=_seed(known), **known)


def countable(value: float) -> bool:
    """Whether a mean can be taken of it: finite, and not beyond LARGEST."""
    return abs(value) <= LARGEST


def _from_summary(summary: Any, known: dict[str, Any]) -> Run:
    """
    Raises:
        ValueError: what is wrong with it.
    """
    if not isinstance(summary, dict):
        raise ValueError("not a mapping")
    for key, kind in (("status", str), ("metrics", dict), ("config", dict), ("seconds", dict), ("hardware", dict)):
        if key in ("status", "metrics") and key not in summary:
            raise ValueError(f"no key {key!r}")
        if not isinstance(summary.get(key, kind()), kind):
            raise ValueError(f"{key} must be a {'mapping' if kind is dict else 'text'}, got {summary[key]!r}")
    config = summary.get("config", {})
    _require_shapes(config, summary.get("hardware", {}))
    seed = summary.get("seed", config.get("seed", _seed(known)))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be a whole number, got {seed!r}")
    metrics = _numbers("metrics", summary["metrics"]) | _times(summary, config)
    if isinstance(summary.get("overrides"), list) and not known["overrides"]:
        known = known | {"overrides": _words(summary["overrides"])}
    return Run(
        status=summary["status"], reason=_first_line(summary.get("error")), verb=str(summary.get("verb", config.get("verb", ""))),
        seed=seed, commit=str(summary.get("commit") or ""), hardware=_hardware(summary.get("hardware", {}), config), config=config,
        metrics={name: value for name, value in metrics.items() if countable(value)}, cell=None if summary.get("cell") is None else str(summary["cell"]),
        uncounted={name: value for name, value in metrics.items() if not countable(value)}, **known,
    )  # fmt: skip


def _require_shapes(config: Mapping[str, Any], hardware: Mapping[str, Any]) -> None:
    """What is read of the configuration and of the hardware is what it should be.

    Raises:
        ValueError: the key, and what it should be.
    """
    for key in ("trainer", "evaluation", "ref"):
        if not isinstance(config.get(key) or {}, dict):
            raise ValueError(f"config.{key} must be a mapping, got {config[key]!r}")
    for key in ("devices", "num_nodes"):
        value = (config.get("trainer") or {}).get(key)
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise ValueError(f"config.trainer.{key} must be a whole number, got {value!r}")
    for where, names in (
        ("hardware.gpus", hardware.get("gpus")),
        ("config.evaluation.names", (config.get("evaluation") or {}).get("names")),
    ):
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"{where} must be a list of names, got {names!r}")


def _unfinished(folder: Path, known: dict[str, Any]) -> Run:
    """No summary. A pipeline whose step failed has one in that step."""
    config = _config(folder) or {}
    status, reason = UNFINISHED, "no summary.json yet" if folder.is_dir() else "no run directory yet"
    for step in STEPS if config.get("verb") == "pipeline" else ():
        found = read_run(folder / step) if (folder / step / "summary.json").is_file() else None
        if found is not None and not found.done:
            status, reason = found.status, f"{step}: {found.reason}"
    seed = config["seed"] if isinstance(config.get("seed"), int) else _seed(known)
    return Run(status=status, reason=reason, verb=str(config.get("verb", "")), config=config, seed=seed, **known)


def _config(folder: Path) -> dict[str, Any] | None:
    """config.yaml of a run; None where there is none, or where it is another program's."""
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    try:
        config = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    return config if isinstance(config, dict) and "verb" in config else None


def _numbers(key: str, values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """null stands for a number that was none."""
    found = {}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"{key}: {name} must be a number, got {value!r}")
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            raise ValueError(f"{key}: {name} is too large a number, of {len(str(value))} digits")
        found[prefix + name] = math.nan if value is None else float(value)
    return found


def _times(summary: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each phase, and all of them as hours; `gpu_hours` counts every device."""
    seconds = _numbers("seconds", summary.get("seconds", {}), "seconds/")
    if "seconds/total" not in seconds:
        return seconds
    hours = seconds["seconds/total"] / 3600
    gpus = _devices(config) if summary.get("hardware", {}).get("gpus") else 0
    return seconds | {"hours": hours} | ({"gpu_hours": hours * gpus} if gpus else {})


def _devices(config: Mapping[str, Any]) -> int:
    trainer = config.get("trainer") or {}
    return (trainer.get("devices") or 1) * (trainer.get("num_nodes") or 1)


def _hardware(hardware: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if gpus := hardware.get("gpus"):
        kinds = Counter(gpus)
        nodes = (config.get("trainer") or {}).get("num_nodes") or 1
        return ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) + (f" on each of {nodes} nodes" if nodes > 1 else "")
    threads = hardware.get("threads")
    counted = [] if threads is None else ["1 thread" if threads == 1 else f"{threads} threads"]
    return ", ".join(["CPU", *([str(hardware["cpu"])] if hardware.get("cpu") else []), *counted]) if hardware else ""


def _first_line(text: Any) -> str:
    lines = [line.strip() for line in str(text or "").splitlines() if line.strip()]
    return lines[0] if lines else ""


def _words(words: Iterable[Any]) -> dict[str, Any]:
    """`key=value` words as a mapping; values as YAML reads them."""
    parts = [str(word).partition("=") for word in words]
    return {key: _value(text) for key, _, text in parts}


def _value(text: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError:
        return text


def _seed(known: Mapping[str, Any]) -> int | None:
    """What sweep or folder say of a run that does not say it itself."""
    found = re.fullmatch(r"seed[-_=]?(\d+)", known["folder"].name)
    swept = known["overrides"].get("seed")
    return swept if isinstance(swept, int) else int(found.group(1)) if found else None


# --- sweeps -------------------------------------------------------------------------------------------------------------------


def read_sweep(folder: Path) -> Sweep:
    """
    Raises:
        UserError: sweep.yaml is malformed: the file and what is wrong with it.
    """
    file = folder / "sweep.yaml"
    try:
        text = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise UserError(f"{file}{line}: not YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not YAML: {error}") from error
    if not isinstance(text, dict) or not isinstance(text.get("cells"), list):
        raise UserError(f"{file}: there must be a list of cells, each with folder and overrides")
    cells = []
    for i, cell in enumerate(text["cells"]):
        if not isinstance(cell, dict) or "folder" not in cell or not isinstance(cell.get("overrides", {}), dict):
            raise UserError(f"{file}: cells[{i}] must have a folder and a mapping of overrides, got {cell!r}")
        cells.append((str(cell["folder"]), {str(key).lstrip("+~"): value for key, value in cell.get("overrides", {}).items()}))
    words = [str(word) for word in text.get("words") or []]
    own = [f"{option} {text[key]}" for option, key in (("--config-dir", "config_dir"), ("-cn", "config_name")) if text.get(key)]
    multirun = [] if {"-m", "--multirun"} & set(words) else ["-m"]
    command = " ".join(["rlhf", str(text.get("verb", "")), *multirun, *own, *words])
    return Sweep(folder=folder, command=command, commit=text.get("commit"), cells=tuple(cells))
