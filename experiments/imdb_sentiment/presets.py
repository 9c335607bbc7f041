"""Curves of presets.sh: `python presets.py OUT` collects presets.csv and reward_models.csv; without OUT it draws presets.png from them."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
PPO = {"corrected": "C0", "dschat": "C3", "grpo": "C2"}
REWARD = {"tokens": "rm=default", "dschat": "rm=dschat"}
CURVES = (
    "rollout/reward", "rollout/kl", "rollout/length", "rollout/eos_rate", "actor/entropy", "actor/clip_fraction",
    "time/generate", "time/score", "time/train",
)  # fmt: skip
ACCURACY = ("reward/train_accuracy", "reward/accuracy")
SMOOTHED = 24
"""Training steps of which the curve of the reward models is a mean: 16 pairs each say little alone."""


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def collect(out: Path) -> None:
    write(HERE / "presets.csv", "preset", CURVES, ((name, row) for name in PPO for row in read(out / name / "ppo" / "metrics.csv")))
    rewards = ((name, row) for name in REWARD for row in read(out / f"rm-{name}" / "reward" / "metrics.csv"))
    write(HERE / "reward_models.csv", "model", ACCURACY, rewards)


def write(file: Path, kind: str, columns: tuple[str, ...], rows: Iterator[tuple[str, dict[str, str]]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow([kind, "step", *columns])
        for name, row in rows:
            values = [f"{float(row[column]):.5g}" if row.get(column) else "" for column in columns]
            if any(values):
                writer.writerow([name, row["step"], *values])


def column(rows: list[dict[str, str]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, where there is one."""
    known = [(float(row["step"]), float(row[name])) for row in rows if row[name]]
    steps, values = zip(*known, strict=True)
    return np.array(steps), np.array(values)


def draw() -> None:
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    for name, label in REWARD.items():
        rows = [row for row in read(HERE / "reward_models.csv") if row["model"] == name]
        steps, accuracy = column(rows, "reward/train_accuracy")
        mean = np.convolve(accuracy, np.ones(SMOOTHED) / SMOOTHED, mode="valid")
        (line,) = axes[0].plot(steps[SMOOTHED - 1 :], mean, label=f"{label}, training (mean of {SMOOTHED} steps)")
        axes[0].plot(*column(rows, "reward/accuracy"), "o", color=line.get_color(), label=f"{label}, held out")
    for name, colour in PPO.items():
        rows = [row for row in read(HERE / "presets.csv") if row["preset"] == name]
        for axis, metric in zip(axes[1:], ("rollout/reward", "rollout/kl", "rollout/length"), strict=True):
            axis.plot(*column(rows, metric), color=colour, label=f"ppo={name}")
    titles = ("pairs ranked right", "score by the own reward model", "KL to SFT, nats an answer", "answer, tokens")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("training step" if axis is axes[0] else "PPO iteration")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(HERE / "presets.png", dpi=110)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        collect(Path(sys.argv[1]))
    draw()
