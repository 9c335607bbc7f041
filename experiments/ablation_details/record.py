"""Every run of the study as one line of `runs.csv`, kept in the repository: a sitting on any machine goes on where the last one stopped.

Knows summaries and the file; knows no statistics. Whether another machine gives the same numbers is for the SFT model's gold score
to say: report.py refuses runs of one seed in which it differs.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from cells import read_summary

FILE = Path(__file__).with_name("runs.csv")
METRICS = {
    "gold": "gold/ppo", "gold_sft": "gold/sft", "kl": "kl", "length": "length/ppo", "distinct_2": "distinct_2/ppo", "reward": "reward/ppo",
}  # fmt: skip
"""Column -> metric of the summary; empty where the run diverged."""
CURVES = {"value_clipped": "critic/clip_fraction", "ratio_clipped": "actor/clip_fraction"}
"""Column -> column of metrics.csv, as a mean over the run."""
COLUMNS = ("cell", "seed", "status", *METRICS, *CURVES, "wall_seconds", "commit", "torch", "error", "overrides")

Runs = dict[str, dict[int, dict[str, Any]]]
"""Cell -> seed -> what a line says; numbers as numbers, nan where there is none."""


def read_out(out: Path) -> Runs:
    """The runs that run.py left in a folder."""
    runs: Runs = {}
    for file in sorted(out.glob("runs/*/seed-*/summary.json")):
        summary = read_summary(file.parent)
        assert summary is not None
        cell, seed = file.parent.parent.name, int(file.parent.name.removeprefix("seed-"))
        line = {
            "cell": cell,
            "seed": seed,
            "status": summary["status"],
            "error": summary.get("error") or "",
            "commit": str(summary.get("commit")),
        }
        line |= {
            column: summary["metrics"].get(name, math.nan) if summary["status"] == "done" else math.nan for column, name in METRICS.items()
        }
        line |= {column: mean_of_column(file.with_name("metrics.csv"), name) for column, name in CURVES.items()}
        line |= {"wall_seconds": summary["wall_seconds"], "torch": summary.get("hardware", {}).get("torch", "")}
        line |= {"overrides": " ".join(summary.get("overrides", []))}
        runs.setdefault(cell, {})[seed] = line
    return runs


def mean_of_column(file: Path, name: str) -> float:
    """Mean over the rows that have it; nan where none has."""
    if not file.is_file():
        return math.nan
    with file.open(newline="", encoding="utf-8") as f:
        values = [float(row[name]) for row in csv.DictReader(f) if row.get(name)]
    return float(np.mean(values)) if values else math.nan


def read(file: Path = FILE) -> Runs:
    """The runs of a file; none where it is not there."""
    runs: Runs = {}
    if file.is_file():
        with file.open(newline="", encoding="utf-8") as f:
            for row in csv.DictReader(f):
                numbers = {name: float(row[name] or "nan") for name in (*METRICS, *CURVES, "wall_seconds")}
                runs.setdefault(row["cell"], {})[int(row["seed"])] = row | numbers | {"seed": int(row["seed"])}
    return runs


def merged(old: Runs, new: Runs) -> Runs:
    """Both; of a run that is in both, the new one."""
    return {cell: old.get(cell, {}) | new.get(cell, {}) for cell in dict.fromkeys([*old, *new])}


def write(runs: Runs, order: Iterable[str], file: Path = FILE) -> None:
    """Cells in the order of the list, seeds in theirs."""
    part = file.with_name(f"{file.name}.part")
    with part.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for cell in order:
            for _, line in sorted(runs.get(cell, {}).items()):
                writer.writerow({name: shown(line[name]) for name in COLUMNS})
    part.rename(file)


def shown(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.7g}"
