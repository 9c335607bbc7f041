"""A folder's table drawn: published, modelled and measured, and the scaling where there is some. Knows matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.reporting.tables import Experiment

SERIES = (
    ("published", "#555555", "s"), ("modelled, original's engine", "#8fb3d9", "o"), ("modelled, ours", "#1f5fa8", "o"), ("measured", "#c2571a", "D"),
)  # fmt: skip
"""Name, colour, marker."""
COLOURS = ("#1f5fa8", "#c2571a", "#3a7d44", "#7a4fa0", "#8a6d00")


def draw(found: Experiment, file: Path) -> None:
    """Writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context({"text.parse_math": False}):  # titles and names are the user's, and may hold dollars
        figure = _drawn(found)
        figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _drawn(found: Experiment) -> Any:
    import matplotlib.pyplot as plt

    columns = 2 if found.scale else 1
    size = (9.0 if columns == 1 else 14.0, max(3.5 if columns == 1 else 4.8, 0.24 * len(found.rows) + 1.6))
    figure, axes = plt.subplots(1, columns, figsize=size, squeeze=False)
    _dots(axes[0][0], found)
    if found.scale:
        _scaling(axes[0][1], found)
    figure.suptitle(found.title, fontsize=11)
    figure.tight_layout()
    return figure


def _dots(axis: Any, found: Experiment) -> None:
    """A line for each cell, its numbers on one logarithmic axis: bars would begin at an arbitrary place."""
    rows = found.rows
    values = [[row.published for row in rows], [row.dschat for row in rows], [row.ours for row in rows],
              [None if row.measured is None else row.measured.value for row in rows]]  # fmt: skip
    for (name, colour, marker), numbers in zip(SERIES, values, strict=True):
        there = [i for i, value in enumerate(numbers) if value is not None]
        if there:
            published = numbers is values[0]  # a frame, that a point on it stays to be seen
            axis.plot([numbers[i] for i in there], there, marker, color=colour, label=name, markersize=9 if published else 6,
                      fillstyle="none" if published else "full")  # fmt: skip
    names = [" ".join(f"{row.model} {row.gpus} x {row.hardware}, {row.quantity}".split()) for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=7)
    axis.invert_yaxis()
    axis.grid(axis="both", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set(xscale="log", xlabel="; ".join(dict.fromkeys(row.unit for row in rows)))
    axis.xaxis.set_major_formatter("{x:g}")  # the formatter of a logarithmic axis writes formulas
    axis.legend(fontsize=7)


def _scaling(axis: Any, found: Experiment) -> None:
    models = list(dict.fromkeys(row.model for row in found.scale))
    engines = list(dict.fromkeys(row.engine for row in found.scale))
    for model, engine in dict.fromkeys((row.model, row.engine) for row in found.scale):
        mine = [row for row in found.scale if (row.model, row.engine) == (model, engine) and row.sequences_per_s is not None]
        colour, dash = COLOURS[models.index(model) % len(COLOURS)], ("--", "-", ":")[engines.index(engine) % 3]
        axis.plot(
            [row.gpus for row in mine], [row.sequences_per_s for row in mine], dash, color=colour, marker=".", label=f"{model}, {engine}"
        )
        stops = [row for row in mine if row.stops]
        axis.plot([row.gpus for row in stops], [row.sequences_per_s for row in stops], "o", color=colour, markersize=9, fillstyle="none")
    counts = sorted({row.gpus for row in found.scale})
    axis.set(xscale="log", yscale="log", xlabel="GPUs; a ring: the first doubling that brings less than 1.5 times", ylabel="sequences/s")
    axis.set_xticks(counts, [str(count) for count in counts], fontsize=7)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.legend(fontsize=7)
