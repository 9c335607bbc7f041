"""metrics.csv of the runs of a cell as one curve: mean and interval over seeds at every step. Knows no figure."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf.reporting.runs import LARGEST, STEPS, Run
from rlhf.reporting.statistics import band

CURVES = {
    "rollout/reward": "reward of the rollouts",
    "rollout/kl": "KL to the reference, nats an answer",
    "rollout/length": "answer length, tokens",
    "rollout/eos_rate": "share of answers that ended by themselves",
    "actor/entropy": "entropy of the actor, nats a token",
    "actor/clip_fraction": "share of tokens whose ratio is clipped",
    "critic/explained_variance": "explained variance of the critic",
    "critic/loss": "value loss",
    "sft/loss": "SFT loss",
    "sft/eval_loss": "SFT loss, held out",
    "reward/train_accuracy": "reward model, accuracy on the batch",
    "reward/accuracy": "reward model, accuracy held out",
    "dpo/accuracy": "DPO, accuracy held out",
    "dpo/train_accuracy": "DPO, accuracy on the batch",
    "dpo/margin": "DPO, margin",
}
"""Metric -> title of its panel, in the order of the page. A metric that no run drawn has is left out."""
POINTS = 60
"""A longer curve is drawn as so many means over stretches of equal length."""

Column = tuple[list[float], list[float]]
"""Steps and values."""


class BadCurve(ValueError):
    """A metrics.csv cannot be read: the file, the line and what is wrong."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric of one cell; all arrays (points,)."""

    cell: str
    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    """nan where one seed alone got so far."""
    high: np.ndarray


def read_columns(run: Run) -> dict[str, Column]:
    """The columns of CURVES that the run has. Those of a pipeline are in its steps' files.

    Raises:
        BadCurve: a file is malformed. A last line that is still being written is none.
    """
    files = [run.folder / "metrics.csv", *(run.folder / step / "metrics.csv" for step in STEPS)]
    found: dict[str, Column] = {}
    for file in files:
        if file.is_file():
            found |= _read(file)
    return found


def _read(file: Path) -> dict[str, Column]:
    try:
        with file.open(encoding="utf-8", newline="\n") as opened:  # other ends of lines may be in a quoted name
            lines = list(opened)
    except UnicodeDecodeError as error:
        raise BadCurve(f"{file}: not text: {error}") from error
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # a row is written whole, with its end; this one is on its way
    rows = csv.reader(lines)
    header = next(rows, [])
    if "step" not in header:
        if not lines:
            return {}
        raise BadCurve(f"{file}:1: no column step")
    places = {name: header.index(name) for name in CURVES if name in header}
    at = header.index("step")
    columns: dict[str, Column] = {name: ([], []) for name in places}
    for row in rows:
        if len(row) != len(header):
            raise BadCurve(f"{file}:{rows.line_num}: {len(row)} fields, the header has {len(header)}")
        for name, place in places.items():
            if row[place]:
                try:
                    step, value = float(row[at]), float(row[place])
                except ValueError:
                    raise BadCurve(f"{file}:{rows.line_num}: step and {name} must be numbers, got {row[at]!r} and {row[place]!r}") from None
                columns[name][0].append(step)
                columns[name][1].append(value)
    return {name: column for name, column in columns.items() if column[0]}


def curve(cell: str, runs: Iterable[Column]) -> Curve | None:
    """None: no run has a value that is finite and not beyond LARGEST. Steps are those of any run; a step that a run lacks is left to the others."""
    columns = [(np.asarray(steps), np.asarray(values)) for steps, values in runs]
    steps = np.unique(np.concatenate([steps for steps, _ in columns])) if columns else np.empty(0)
    if not len(steps):
        return None
    table = np.full((len(columns), len(steps)), np.nan)
    for row, (own, values) in zip(table, columns, strict=True):
        row[np.searchsorted(steps, own)] = np.where(np.abs(values) <= LARGEST, values, np.nan)
    steps, table = _thinned(steps, table)
    seen = ~np.isnan(table).all(axis=0)
    if not seen.any():
        return None
    mean, low, high = band(table[:, seen])
    return Curve(cell=cell, steps=steps[seen], mean=mean, low=low, high=high)


def _thinned(steps: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(steps) <= POINTS:
        return steps, table
    stretches = np.array_split(np.arange(len(steps)), POINTS)
    thin = np.full((len(table), POINTS), np.nan)
    for i, stretch in enumerate(stretches):
        part = table[:, stretch]
        seen = ~np.isnan(part)
        count = seen.sum(axis=1)
        thin[count > 0, i] = np.where(seen, part, 0).sum(axis=1)[count > 0] / count[count > 0]
    return np.array([steps[stretch].mean() for stretch in stretches]), thin
