"""The end of a pipeline on the terminal, and its curves as a PNG. Knows summaries and metrics.csv; knows no training."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf.cli.evaluate.page import ROWS, comparison_table, print_answers
from rlhf.cli.grammar import typed
from rlhf.cli.rundir import read_summary
from rlhf.reporting.runs import countable
from rlhf.reporting.steps import Change, changes, step_metrics

__all__ = ["ROWS", "plot_pipeline", "print_pipeline", "read_columns", "smoothed"]

CURVES = {
    "sft": [("sft/loss", "SFT: loss")],
    "reward": [("reward/train_accuracy", "reward model: accuracy on the batch")],
    "ppo": [("rollout/reward", "PPO: reward"), ("rollout/kl", "PPO: KL to ref, nats an answer"), ("rollout/length", "PPO: answer length")],
}
SAMPLES = 4


def print_pipeline(run_dir: Path, metrics: dict[str, float], seconds: dict[str, float], names: list[str], plot: Path | None) -> None:
    """What each step changed, a table of both policies, a few answers, and where everything lies."""
    console = Console()
    steps = steps_table(changes(step_metrics(run_dir), names))
    if steps.row_count:
        console.print(steps)
    table = comparison_table(f"{run_dir.name}: held out, same sampling", metrics, names)
    if table.row_count:
        console.print(table)
    samples = run_dir / "evaluate" / "samples.jsonl"
    if samples.is_file():
        with samples.open(encoding="utf-8", newline="\n") as lines:  # an answer may hold other ends of lines, such as U+2028
            print_answers(console, [json.loads(line) for line in islice(lines, SAMPLES)], names)
    console.print(
        f"{seconds['total']:.0f} s in all; everything is in {run_dir}" + (f", the curves in {plot}" if plot else ""),
        soft_wrap=True, markup=False,
    )  # fmt: skip
    if (run_dir / "ppo" / "export").is_dir():
        console.print(f"talk to it: rlhf chat {typed('checkpoint', str(run_dir / 'ppo'))}", soft_wrap=True, markup=False)


def steps_table(found: Sequence[Change]) -> Table:
    """A row for each number that was taken before a step and after it."""
    table = Table("", title="what each step changed")
    for column in ("before", "after"):
        table.add_column(column, justify="right")
    for change in found:
        table.add_row(change.label, f"{change.before:.3f}", f"{change.after:.3f}")
    return table


def read_columns(file: Path, names: list[str]) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of some columns of a metrics.csv; empty where a column has none. What cannot be drawn is left out."""
    columns: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    if file.is_file():
        with file.open(newline="") as f:
            for row in csv.DictReader(f):
                for name, (steps, values) in columns.items():
                    if row.get(name) and countable(float(row[name])):
                        steps.append(float(row["step"]))
                        values.append(float(row[name]))
    return columns


def smoothed(values: list[float]) -> list[float]:
    """A centred mean over a twentieth of the curve, for the eye; the raw curve is drawn behind it."""
    half = len(values) // 40
    return [sum(part) / len(part) for part in (values[max(0, i - half) : i + half + 1] for i in range(len(values)))]


def plot_pipeline(run_dir: Path, names: list[str]) -> Path | None:
    """`curves.png`: the steps' curves and the two gold scores. None where no step wrote metrics."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: list[tuple[str, list[float], list[float]]] = []
    for step, curves in CURVES.items():
        columns = read_columns(run_dir / step / "metrics.csv", [name for name, _ in curves])
        panels += [(title, *columns[name]) for name, title in curves if columns[name][0]]
    if not panels:
        return None
    metrics: dict[str, float] = (read_summary(run_dir / "evaluate") or {"metrics": {}})["metrics"]
    bars = [
        (name, metrics[key]) for name in names for key in (f"gold/{name}", f"reward/{name}")[:1] if countable(metrics.get(key, math.nan))
    ]
    with matplotlib.rc_context({"text.parse_math": False}):  # names of policies are the user's, and may hold dollars
        figure = _drawn(panels, bars)
        file = run_dir / "curves.png"
        part = run_dir / "curves.part.png"
        figure.savefig(part, dpi=130)
    plt.close(figure)
    part.rename(file)
    return file


def _drawn(panels: Sequence[tuple[str, list[float], list[float]]], bars: Sequence[tuple[str, float]]) -> Any:
    """The figure: a panel for each curve, the last for the bars."""
    import matplotlib.pyplot as plt

    count = len(panels) + bool(bars)
    figure, axes = plt.subplots(-(-count // 3), min(3, count), figsize=(4.2 * min(3, count), 3.1 * -(-count // 3)), squeeze=False)
    flat = list(axes.flat)
    for axis, (title, steps, values) in zip(flat, panels, strict=False):
        axis.plot(steps, values, color="#1f5fa8", linewidth=0.8, alpha=0.35)
        axis.plot(steps, smoothed(values), color="#1f5fa8", linewidth=1.6)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("iteration" if title.startswith("PPO") else "step", fontsize=8)
        axis.grid(alpha=0.3)
    if bars:
        axis = flat[len(panels)]
        drawn = axis.bar([name for name, _ in bars], [value for _, value in bars], color=["#9bb8d3", "#1f5fa8"])
        axis.bar_label(drawn, fmt="%.2f")
        axis.margins(y=0.15)
        axis.set_title("gold score, held-out prompts", fontsize=10)
    for axis in flat[count:]:
        axis.set_visible(False)
    figure.tight_layout()
    return figure
