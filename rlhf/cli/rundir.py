"""The run directory: who may write into it, its config, its summary.

Knows files; knows no training.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from rlhf.config import UserError
from rlhf.sweeping import cells

FREE = ("resume", "run_dir", "logger", "callbacks", "hardware", "launcher", "evaluation", "plan", "experiment")
"""Top-level keys that a resumed run may change."""
FREE_TRAINER = ("log_every", "checkpoint_every", "keep_checkpoints", "eval_every", "eval_batches", "threads")


def claim(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Makes the directory this run's own and writes its config.

    Raises:
        UserError: it holds another run, `resume` finds none or one of another configuration, or it cannot be made.
    """
    require_own(run_dir, config)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise cannot_be_made(error) from error


@contextmanager
def claimed(run_dir: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """`claim`, and nobody else may while this lasts.

    Raises:
        UserError: as `claim`; another command is at work there.
    """
    require_own(run_dir, config)  # before a directory is made
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_be_made(error) from error
    with cells.held(run_dir):
        claim(run_dir, config)
        yield


def require_path(value: str) -> None:
    """
    Raises:
        UserError: what is behind `run_dir=` is nothing.
    """
    if not value:
        raise UserError("run_dir= names no directory: write run_dir=PATH, or leave it out and one is made below runs/")


def cannot_be_made(error: OSError) -> UserError:
    """The refusal of a run directory that the system will not make or write into."""
    return UserError(f"run_dir cannot be made: {error.strerror or error} ({error.filename}): give run_dir=PATH where you may write")


def done_already(run_dir: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The summary of a run that is resumed although it is done, so that there is nothing left to do.

    Raises:
        UserError: as `claim`, for a run that is resumed.
    """
    if not config["resume"]:
        return None
    require_own(run_dir, config)
    summary = read_summary(run_dir)
    return summary if summary is not None and summary["status"] == "done" else None


def require_own(run_dir: Path, config: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: the directory cannot become this run's.
    """
    file = run_dir / "config.yaml"
    if config["resume"]:
        if not file.is_file():
            raise UserError(
                f"resume=true, but run_dir={run_dir} holds no run (no config.yaml): give the directory of the run to go on with"
            )
        change = first_change(saved_config(run_dir) or {}, config)
        if change is not None:
            raise UserError(
                f"resume=true cannot change {change}: a run goes on as it began. Say no more than resume=true and run_dir, repeat the words it was "
                "started with, or start a new run_dir for other settings"
            )
    elif (file.exists() or (run_dir / "summary.json").exists()) and not _was_refused(run_dir):
        raise UserError(f"run_dir={run_dir} already holds a run: choose another run_dir, or resume=true to go on with it")


def _was_refused(run_dir: Path) -> bool:
    """A refused run has done nothing, so its directory may be used again. One that was refused on its way has rows or checkpoints, its own
    or those of a pipeline's step, and is a run like any other."""
    summary = read_summary(run_dir)
    if summary is None or summary["status"] != "refused":
        return False
    parts = [run_dir, *(path for path in run_dir.iterdir() if path.is_dir())]
    return not any(_has_rows(part / "metrics.csv") or any((part / "checkpoints").glob("*")) for part in parts)


def _has_rows(file: Path) -> bool:
    return file.is_file() and len(file.read_bytes().splitlines()) > 1


def saved_config(run_dir: Path) -> dict[str, Any] | None:
    """The config that the directory's run was started with; None where there is none.

    Raises:
        UserError: the file is damaged.
    """
    file = run_dir / "config.yaml"
    if not file.is_file():
        return None
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("trainer"), dict):
        raise UserError(
            f"{file}: this is no configuration of a run, so that it cannot go on: remove {run_dir}, or start anew in another run_dir"
        )
    return config


def first_change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """`key (was x, now y)` of the first difference that matters to a resumed run."""
    for key, before, after in _differences(_fixed(old), _fixed(new), ""):
        return f"{key} (was {before!r}, now {after!r})"
    return None


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in FREE}
    kept["trainer"] = {key: value for key, value in config["trainer"].items() if key not in FREE_TRAINER}
    return kept


def _differences(old: Any, new: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
    elif old != new:
        yield key, old, new


def write_summary(config: Mapping[str, Any], status: str, **fields: Any) -> dict[str, Any]:
    """Writes `summary.json`, which reports and sweeps read; docs/architecture.md lists its keys."""
    summary = {
        "verb": config["verb"], "status": status, "seed": config["seed"], "commit": commit(), "hardware": hardware(), "config": dict(config),
        "metrics": {}, "seconds": {}, **fields,
    }  # fmt: skip
    cells.write_summary(Path(config["run_dir"]), summary)
    return summary


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """How the directory's run ended; None where it has not. A metric that is null was no number, and is NaN again.

    Raises:
        UserError: the file is damaged.
    """
    file = run_dir / "summary.json"
    summary = cells.read_summary(run_dir)
    if summary is None and file.is_file():
        raise UserError(f"{file}: this is no summary of a run: remove it, and the run counts as one that was cut short")
    return summary


def write_atomically(file: Path, text: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.rename(file)


def commit() -> str | None:
    """The git commit of the code, with `+` behind it where files differ from it."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpus": gpus, "cpu": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
