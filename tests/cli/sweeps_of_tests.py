"""Sweeps of jobs that train nothing (`light.py`), and what is read of them. The command, the processes and the files are real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from rlhf.cli.sweep.words import Composer, read_line

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "sweeping"))
from processes_of_tests import all_end, wait_until  # noqa: E402, F401  (for those who import from here)

SMALL = (
    "model@actor.model=tiny", "data=pairs", "data.path=rows.jsonl", "data.max_prompt_tokens=12", "data.max_answer_tokens=8", "data.split=[1,0,0]",
    "sft.batch_size=4", "sft.micro_batch_size=2", "callbacks=none",
)  # fmt: skip
LOCAL = ("sweep=slurm", "sweep.executor=local", "sweep.time_minutes=5")
LIGHT = (*SMALL, "+callbacks.light._target_=light.None")


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def statuses(directory: Path) -> list[str]:
    cells = yaml.safe_load((directory / "sweep.yaml").read_text())["cells"]
    return [summary(directory / cell["folder"])["status"] for cell in cells]


def diaries(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """What each rank of each cell was told, start by start: `{"0/rank-0": [...], ...}`."""
    files = sorted(directory.glob("*/rank-*.jsonl"))
    return {f"{file.parent.name}/{file.stem}": [json.loads(line) for line in file.read_text().splitlines()] for file in files}


def composer(*words: str, verb: str = "sft") -> Composer:
    return Composer(read_line(verb, ["-m", *words]))


def command(folder: Path, *words: str) -> subprocess.Popen[str]:
    """The same from a process of its own."""
    environment = os.environ | {"LIGHT_PYTHON": str(folder.parent / "python"), "PYTHONUNBUFFERED": "1"}
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    full = [sys.executable, str(HERE / "light.py"), "sweep", "sft", "-m", *words, f"run_dir={folder}"]
    return subprocess.Popen(full, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear)


def without_report(directory: Path) -> set[str]:
    """What lies in a sweep's directory, but for the report that its end makes."""
    names = {path.name for path in directory.iterdir()}
    assert {"report.html", "table.csv", "table.md"} <= names
    return {name for name in names if not name.startswith(("report", "table."))}
